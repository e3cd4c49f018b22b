"""README and CONTRIBUTING are true: snippets run, configurations build, commands exist, tables are fresh."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import zoo

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("number", range(len(snippets("python"))))
def test_python_snippets_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippets("python")[number], f"README.md python {number}", "exec"), {"__name__": "readme"})
    assert printed.getvalue()


def test_streaming_snippet_shows_no_difference(capsys):
    exec(snippets("python")[0], {})
    shown = capsys.readouterr().out
    assert float(re.search(r"[\d.]+(e-\d+)?", shown).group()) < 1e-4


@pytest.mark.parametrize("number", range(len(snippets("yaml"))))
def test_yaml_snippets_build(number, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(snippets("yaml")[number])
    assert zoo.build(path, device="meta").layers


def test_forty_layers_in_fifteen_lines(tmp_path):
    text = snippets("yaml")[0]
    (tmp_path / "hybrid.yaml").write_text(text)
    assert len(text.splitlines()) <= 15
    assert len(zoo.build(tmp_path / "hybrid.yaml", device="meta").layers) == 40


def test_shown_errors_are_the_real_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (
        snippets("yaml")[0]
        .replace("num_heads", "num_head")
        .replace("of: [recurrent, recurrent", "of: [recurrent, recurent")
    )
    Path("hybrid.yaml").write_text(text)
    with pytest.raises(zoo.ConfigError) as error:
        zoo.load_config("hybrid.yaml")
    assert str(error.value) in README


def commands() -> list[str]:
    lines = [x.partition("  #")[0].strip() for block in snippets("bash") for x in block.splitlines()]
    return [x for x in lines if x.startswith("zoo ")]


def test_shown_commands_and_options_exist():
    from zoo.cli import main
    from zoo.cli.app import app

    helps = {}
    for line in commands():
        verb, *rest = shlex.split(line)[1:]
        group = [rest.pop(0)] if verb in {group.name for group in app.registered_groups} else []
        if (verb, *group) not in helps:
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as end:
                main([verb, *group, "--help"])
            assert not end.value.code
            helps[verb, *group] = shown.getvalue()
        assert all(re.search(rf"{option}\b", helps[verb, *group]) for option in rest if option.startswith("--")), line
    known = [*app.registered_commands, *app.registered_groups]
    assert {command.name for command in known} == {verb for verb, *_ in helps}


TELLING = ("list", "show", "build", "profile", "sweep")  # but for what compiles, which takes a minute


@pytest.mark.parametrize("line", [x for x in commands() if x.split()[1] in TELLING and "--compile" not in x])
def test_shown_commands_that_only_tell_succeed(line, capsys, tmp_path, monkeypatch):
    from zoo.cli import main

    monkeypatch.chdir(tmp_path)  # some write a page

    with pytest.raises(SystemExit) as end:
        main(shlex.split(line)[1:] + (["--no-measure"] if " profile " in line and "--no-measure" not in line else []))
    assert not end.value.code and capsys.readouterr().out


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "docs" / "README.md").read_text()):
        for target in re.findall(r"\bmake ([a-z]+)\b(?=`|\s+#|$)", text, re.M):
            assert re.search(rf"^{target}:", makefile, re.M), target
    for tool in re.findall(r"tools/\w+\.py", makefile):
        assert (ROOT / tool).is_file(), tool


def test_links_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def tool(name: str, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / name), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_table_of_blocks_is_fresh():
    done = tool("readme_table.py", "--check")
    assert done.returncode == 0, done.stdout


def test_every_card_becomes_a_page(tmp_path):
    done = tool("build_docs.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {p.stem for p in tmp_path.glob("*.md")} == {"README", *zoo.list_blocks()}


def test_the_block_of_contributing_passes_the_suite(tmp_path, monkeypatch):
    """Apply the diff and ask the block all that its card claims."""
    from zoo.conformance import verify

    (diff,) = snippets("diff", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    head, *body = diff.split("\n+")
    assert "+++ b/blocks/token_shift.py" in diff and "--- /dev/null" in head
    source = "\n".join(x[1:] for x in diff.splitlines() if x.startswith("+") and not x.startswith("+++")) + "\n"
    assert f"+1,{source.count(chr(10))} @@" in diff and 40 < len(body) < 90
    (tmp_path / "shown_in_contributing.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    report = verify("shown_in_contributing:token_shift", slow=False)
    assert report.ok and len(report.results) > 40, str(report)
