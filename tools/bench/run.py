"""Measure everything again and keep it: one JSON and one picture a bench, and a table of what was wanted and reached.

    python tools/bench/run.py                      on this CPU, one thread, float32 (bfloat16 too for whole layers)
    python tools/bench/run.py --device cuda        on this GPU; --tune looks for launch configurations first
    python tools/bench/run.py layers sparse        only these
    python tools/bench/run.py --table              only write the table again

Results go to tools/bench/results/<processor or card>/. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from zoo.bench import cases, machine
from zoo.kernels import dispatch

RESULTS = Path(__file__).resolve().parent / "results"
# glibc returns blocks above 32 MiB after each call: what grows then is the price of fresh pages, not that of the ops
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
KINDS = ("layers", "layers bfloat16", "scaling", "sparse")


def plan(device: str) -> dict[str, list[str]]:
    """What is run, by name: arguments of `zoo bench`."""
    runs = {name: [name.split()[0]] for name in (*KINDS, *cases_of_ops())}
    runs["layers"].append("--compiled")
    runs["layers bfloat16"] += ["--dtype", "bfloat16"]
    if device == "cuda":
        del runs["layers bfloat16"]  # that is the usual dtype there
    return {name: [*args, "--device", device, "--save"] for name, args in runs.items()}


def cases_of_ops() -> list[str]:
    """Ops that can be timed."""
    return [op for op in dispatch.ops() if cases.of(op)]


def run(name: str, args: list[str], folder: Path) -> bool:
    """One bench in a process of its own."""
    picture = folder / f"{name.replace(' ', '_')}.png"
    command = [sys.executable, "-m", "zoo", "bench", *args, "--plot", str(picture)]
    print(f"\n== zoo bench {' '.join(args)}", flush=True)
    start = time.monotonic()
    done = subprocess.run(command, check=False, env=os.environ | (KEEPING if name == "scaling" else {}))
    print(f"{time.monotonic() - start:.0f} s" + (f", exit code {done.returncode}" if done.returncode else ""))
    return done.returncode == 0


def tune(folder: Path) -> None:
    """Launch configurations of every op with Triton kernels."""
    for op in cases_of_ops():
        if "triton" in dispatch.backends(op):
            command = [sys.executable, "-m", "zoo", "bench", op, "--device", "cuda", "--tune", "--json"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            print(f"tuned {op}" if done.returncode == 0 else f"not tuned: {op}: {done.stderr.strip()}", flush=True)
            if done.stdout:
                (folder / f"tuned_{op}.json").write_text(done.stdout)


def table(folder: Path) -> str:
    """What was measured, in Markdown: first what the project wants of itself, then all else."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if "tuned_" not in path.name]
    wanted: list[str] = []
    rest: list[str] = []
    growth: list[str] = []
    for document in found:
        dtype = document["settings"]["dtype"]
        for group in document["groups"]:
            if document["bench"] == "scaling":
                growth.append(_growth(group))
                continue
            (wanted if group["wanted"] else rest).append(_line(group, dtype))
    head = [
        "| case | what | dtype | ours, ms | quickest peer | its ms | ratio | wanted | bound, ms |",
        "|" + "---|" * 9,
    ]
    lines = [f"# {found[0]['machine']['device'] if found else folder.name}", "", *_origin(found)]
    if wanted:
        lines += ["", "## What is wanted", "", *head, *wanted]
    if growth:
        note = "Freed memory was kept for the next call (glibc's `MALLOC_TRIM_THRESHOLD_`)."
        lines += ["", "## Growth for twice the length, the largest", "", note, ""]
        lines += ["| op | what | lengths | time | memory |", "|" + "---|" * 5, *growth]
    if rest:
        lines += ["", "## Everything else", "", *head, *rest]
    return "\n".join(lines) + "\n"


def _origin(found: list[dict]) -> list[str]:
    seen = []
    for document in found:
        host = document["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
        line = f"{host['threads']} threads; {versions}; commit {host.get('commit')}"
        if line not in seen:
            seen.append(line)
    dates = sorted(document["date"][:10] for document in found)
    return [f"Measured {dates[0]} to {dates[-1]}. {'; also '.join(seen)}."] if found else []


def _line(group: dict, dtype: str) -> str:
    length = f"after {group['context']}" if group["what"] == "step" else f"T={group['seq']}"
    ours = next((row for row in group["rows"] if row["chosen"]), None)
    peer = next((row for row in group["rows"] if row["name"] == group["peer"]), None)
    cells = [
        group["case"],
        f"{group['what']} {length}",
        dtype,
        f"{ours['median_ms']:.3g} ({ours['name']})" if ours else "",
        group["peer"] or "",
        f"{peer['median_ms']:.3g}" if peer else "",
        f"{group['reached']:.2f}" if group["reached"] else "",
        f"{group['wanted']:g}" if group["wanted"] else "",
        f"{group['bound_ms']:.3g}" if group["bound_ms"] else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _growth(group: dict) -> str:
    rows = group["rows"]
    if not rows:
        return f"| {group['case']} | {group['what']} | {group.get('problem')} | | |"
    largest = [max((row.get(key) or 0.0 for row in rows), default=0.0) for key in ("growth", "memory_growth")]
    cells = [f"{value:.2f}" if value else "" for value in largest]
    return f"| {group['case']} | {group['what']} | {rows[0]['seq']} to {rows[-1]['seq']} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tune", action="store_true", help="first find launch configurations (cuda)")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    machine.check_device(args.device)
    runs = plan(args.device)
    if unknown := set(args.names) - set(runs):
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(runs)}")
    folder = RESULTS / machine.slug(machine.device_name(args.device))
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    if not args.table:
        if args.tune:
            tune(folder)
        failed = [name for name in args.names or runs if not run(name, runs[name], folder)]
    path = folder / "README.md"
    path.write_text(table(folder), encoding="utf-8")
    print(f"\n{path}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
