"""The contracts of pyproject.toml on who imports whom, and what hooks ban."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def lint(folder: Path, *args: str) -> subprocess.CompletedProcess:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_imports_run_one_way():
    pytest.importorskip("importlinter")
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "file, line, rule",
    [
        ("blocks/new.py", "import zoo.graph.nodes", "Imports run one way"),
        ("zoo/graph/new.py", "import zoo.blocks.swiglu", "Imports run one way"),
        ("zoo/train/new.py", "import zoo.cost", "Imports run one way"),
        ("zoo/contract.py", "import zoo.errors", "The contract of a block knows nobody"),
        ("kernels/new.py", "import zoo.registry", "Kernels know torch"),
        ("zoo/registry.py", "import torch", "known without torch"),
        ("zoo/train/new.py", "import torchtitan", "torchtitan has one door"),
        ("blocks/new.py", "import transformers", "adapters only"),
    ],
)
def test_the_rules_can_fail(tmp_path, file, line, rule):
    """The links are followed: a broken rule in a folder at the top is seen."""
    pytest.importorskip("importlinter")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked or pytest.skip("no git here"):
        path = ROOT / name
        wanted = (name.endswith(".py") and not name.startswith("tests/")) or name == "pyproject.toml"
        if wanted and path.is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(path.read_bytes())
    for link in ("blocks", "kernels", "architectures", "configs"):
        (tmp_path / "zoo" / link).symlink_to(f"../{link}")
    broken = tmp_path / file
    broken.write_text((broken.read_text() if broken.exists() else "") + f"\n{line}\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
        "from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and re.search(rf"{rule}.*BROKEN", done.stdout), done.stdout[-2000:]


def test_hooks_find_nothing():
    """The bans of .pre-commit-config.yaml, for those who have not installed the hooks."""
    import yaml

    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [r["repo"] for r in config["repos"]] == ["local"]
    bans = [h for r in config["repos"] for h in r["hooks"] if h["language"] == "pygrep"]
    assert len(bans) == 5
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for ban in bans:
        pattern, exclude = re.compile(ban["entry"]), re.compile(ban.get("exclude", "(?!)"))
        found = [f for f in files if not exclude.search(f) and (ROOT / f).is_file()]
        assert [f for f in found if pattern.search((ROOT / f).read_text())] == [], ban["id"]


@pytest.mark.parametrize(
    "text, ban",
    [
        ("import pickle\n", "no-pickle"),
        ("w = torch.load(path)\n", "no-torch-load"),
        ("x = eval(text)\n", "no-eval"),
        ("c = yaml.load(f)\n", "no-yaml-load"),
        ("p = tl.make_block_ptr(a)\n", "no-block-pointers"),
    ],
)
def test_bans_see_what_they_ban(text, ban):
    import yaml

    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pattern = next(h["entry"] for h in hooks if h["id"] == ban)
    assert re.search(pattern, text)
    assert not re.search(pattern, "model.eval()\nyaml.safe_load(f)\nself.eval()\n")
