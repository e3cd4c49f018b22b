"""How long until a run has taken its first step? From the start of the process to the first line of metrics.jsonl.

    python tools/startup.py [--rounds 3]       # docs/measured/startup.md and startup.json

`zoo train configs/hydra_small` is started as from a shell, and its clock stops when the record of the first step is in
the file: loading, data, the model, and the whole of the first step. "Warm" has been run before; "cold" finds none of
its files in memory (what other processes have mapped stays); "first on the machine" has no compiled kernels either. The
parts are those of a warm run that says at each of them how late it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/hydra_small"
MOST = 120.0


def first_step(out: Path, env: dict[str, str]) -> float:
    """Seconds of a real run until its first step is written down. The run is then ended."""
    begin = time.monotonic()
    run = subprocess.Popen(
        [sys.executable, "-m", "zoo", "train", CONFIG, "--out", str(out)],
        cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        while time.monotonic() - begin < MOST:
            with contextlib.suppress(FileNotFoundError):
                if b"\n" in (out / "metrics.jsonl").read_bytes():
                    return time.monotonic() - begin
            if run.poll() is not None:
                raise SystemExit(run.communicate()[1].decode())
            time.sleep(0.005)
        raise SystemExit(f"no step in {MOST:.0f} s")
    finally:
        run.kill()
        run.wait()


def forget_files() -> None:
    """Ask the system to drop the files of the environment and of the checkout from memory."""
    for folder in (Path(sys.prefix), Path(os.__file__).parent, ROOT):
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file() and not path.is_symlink():
                    file = os.open(path, os.O_RDONLY)
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(file)


# ------------------------------------------------------------------------------------------ the parts
def inside(begin: float, out: str) -> None:
    """Train here up to the first step and print when each part was done."""
    found: dict[str, float] = {}
    last = [begin]

    def done(part: str) -> None:
        now = time.monotonic()
        found[part] = found.get(part, 0.0) + now - last[0]
        last[0] = now

    def timed(owner: Any, name: str, part: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            done("the rest")
            result = call(*args, **kwargs)
            done(part)
            return result

        setattr(owner, name, wrapped)

    done("python")
    import torch  # noqa: F401

    done("import torch")
    from zoo.cli import app  # noqa: F401
    from zoo.graph.loader import load_config

    done("import zoo")
    document = load_config(CONFIG)
    done("read the configuration")
    from zoo.train import run

    done("import zoo.train")
    timed(run, "_titan", "import torchtitan")
    timed(run, "prepare", "read the data")
    timed(run, "speed_of", "cost model, speed of a product")
    timed(run, "describe", "config.yaml, environment.json")
    load = run._titan

    def titan() -> Any:
        module = load()
        timed(module._Trainer, "__init__", "build the trainer and the model")
        timed(module._Trainer, "_timed_step", "first step")
        return module

    run._titan = titan
    add = run.MetricsFile.add

    def end(self: Any, record: dict[str, Any]) -> None:
        add(self, record)
        if "loss" in record:
            done("write it down")
            print(json.dumps(found), flush=True)
            os._exit(0)

    run.MetricsFile.add = end  # type: ignore[method-assign]
    run.train(document, out=out, progress=False)


def parts(out: Path, env: dict[str, str]) -> dict[str, float]:
    """Seconds of each part of a run, in order."""
    command = [sys.executable, __file__, "--inside", str(time.monotonic()), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode or not done.stdout:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def page(found: dict[str, Any], machine: dict[str, Any]) -> str:
    """docs/measured/startup.md"""
    said = (__doc__ or "").split("\n\n")[-1].strip()
    rows = [f"| {name} | {', '.join(f'{s:.1f}' for s in times)} |" for name, times in found["seconds"].items()]
    most = [f"| {name} | {s:.2f} |" for name, s in found["parts"].items()]
    return "\n".join([
        "# Startup", "", f"Written by `python tools/startup.py`. {said}", "", "| | seconds to the first step |",
        "| --- | --- |", *rows, "", "| part of a warm run | seconds |", "| --- | --- |", *most,
        f"| in all | {sum(found['parts'].values()):.2f} |", "",
        f"{machine['device']}, {machine['processors']} processors, {machine['threads']} thread(s), "
        f"Python {machine['python']}, torch {machine['versions']['torch']}.",
    ]) + "\n"  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one warm run and its parts; nothing is written")
    args = parser.parse_args()
    env = dict(os.environ)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = (folder / str(i) for i in range(1000))
        first_step(next(names), env)  # kernels are compiled, files are in memory
        seconds["warm"] = [first_step(next(names), env) for _ in range(1 if args.quick else args.rounds)]
        of_parts = parts(next(names), env)
        if not args.quick:
            seconds["cold"] = []
            for _ in range(args.rounds):
                forget_files()
                seconds["cold"].append(first_step(next(names), env))
            fresh = env | {"ZOO_CACHE": str(folder / "cache")}
            seconds["first on the machine, cold"] = []
            forget_files()
            seconds["first on the machine, cold"].append(first_step(next(names), fresh))
    from zoo.bench.machine import describe

    found, machine = {"seconds": seconds, "parts": of_parts}, describe("cpu")
    text = page(found, machine)
    print(text)
    if not args.quick:
        measured = ROOT / "docs/measured"
        (measured / "startup.md").write_text(text, encoding="utf-8")
        (measured / "startup.json").write_text(json.dumps({"machine": machine} | found, indent=1) + "\n")
    return int(max(s for times in seconds.values() for s in times) > 15)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(float(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main())
