"""Start-up, help, exit codes and messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import zoo.cli.build
import zoo.cli.listing
from zoo.errors import ConfigError, DataError, KernelUnavailable, Problem, ZooError

VERBS = ("list", "show", "build", "profile", "train", "generate", "phases", "verify", "doctor", "bench", "export")


def fresh(*args: str) -> tuple[dict, float]:
    """Run a command in a new interpreter; which heavy modules it loaded, and how long it took."""
    code = (
        "import sys, json\nfrom zoo.cli import main\n"
        f"try: main({list(args)!r})\nexcept SystemExit as e: code = e.code\n"
        "heavy = [m for m in ('torch', 'numpy', 'omegaconf', 'transformers') if m in sys.modules]\n"
        "print(json.dumps({'code': code, 'heavy': heavy}), file=sys.stderr)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    seconds = time.perf_counter() - start
    return {**json.loads(done.stderr.splitlines()[-1]), "out": done.stdout}, seconds


@pytest.mark.parametrize(
    "args", [("--help",), ("list",), ("list", "--json"), ("list", "--configs"), ("build", "--help")]
)
def test_light_commands_do_not_import_torch(args):
    seen, _ = fresh(*args)
    assert seen["code"] in (0, None) and seen["out"]
    assert seen["heavy"] == []


@pytest.mark.parametrize("args, limit", [(("--help",), 0.5), (("list",), 1.0)])
def test_light_commands_are_quick(args, limit):
    # the best of a few tries: other processes share the machine
    assert min(fresh(*args)[1] for _ in range(5)) < 2 * limit


def test_python_m_zoo_and_version():
    done = subprocess.run([sys.executable, "-m", "zoo", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"zoo {zoo.__version__}\n" and done.returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(zoo, verb):
    out = zoo(verb, "--help").out
    assert out.startswith(f"Usage: zoo {verb}") and "--json" in out


def test_help_names_every_verb(zoo):
    out = zoo("--help").out
    assert all(f"  {verb} " in out for verb in VERBS)


def test_usage_errors_exit_2(zoo):
    assert "did you mean" in zoo("biuld", "x", code=2).err.lower()
    assert "--nope" in zoo("list", "--nope", code=2).err
    zoo("build", code=2)
    zoo("profile", "gla_small", "--mode", "sleep", code=2)


def raising(monkeypatch, error: BaseException) -> None:
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("zoo.registry.list_blocks", fail)


@pytest.mark.parametrize(
    "error, code",
    [
        (ConfigError("wrong words"), 2),
        (DataError("wrong words"), 2),
        (KernelUnavailable("wrong words"), 1),
        (ZooError("wrong words"), 1),
        (RuntimeError("wrong words\nsecond line"), 1),
        (MemoryError(), 1),
    ],
)
def test_errors_become_exit_codes_and_short_messages(zoo, monkeypatch, error, code):
    raising(monkeypatch, error)
    printed = zoo("list", "--json", code=code)
    assert printed.out == ""
    assert ("wrong words" in printed.err) == bool(str(error)) and len(printed.err.splitlines()) <= 2
    assert ("--debug" in printed.err) == (not isinstance(error, ZooError))


def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch, capsys):
    raising(monkeypatch, RuntimeError("wrong words"))
    for args in (["--debug", "list"], ["list", "--debug"]):
        with pytest.raises(SystemExit) as end:
            zoo.cli.main(args)
        assert end.value.code == 1 and "Traceback" in capsys.readouterr().err


def test_many_problems_are_cut(zoo, monkeypatch):
    raising(monkeypatch, ConfigError([Problem(f"number {i}", "trunk") for i in range(100)]))
    lines = zoo("list", code=2).err.splitlines()
    assert len(lines) == 21 and lines[-1] == "and 80 more problems"


def test_interrupt_is_one_line(zoo, monkeypatch):
    raising(monkeypatch, KeyboardInterrupt())
    assert zoo("list", code=130).err == "interrupted\n"


def test_interrupt_by_signal():
    code = (
        # a shell that starts the tests in the background leaves interrupts ignored
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import time, zoo.registry\nzoo.registry.list_blocks = lambda kind: (print('in', flush=True), time.sleep(60))\n"
    )
    code += "from zoo.cli import main\nmain(['list'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "interrupted\n"


def test_broken_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([sys.executable, "-m", "zoo", "list"], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert process.stderr == b"" and process.returncode == 141
