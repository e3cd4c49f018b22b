"""Kill training runs with SIGKILL at random moments, resume them, and compare them with uninterrupted ones.

    python tools/kill_test.py [--kills 20] [--out docs/measured/kills.json]

Of every five kills of a run each second one is aimed at a moment when a checkpoint is being written. Half of the runs
save in the background. Numbers are compared bit for bit: every line of metrics.jsonl, the exported weights, the
evaluation.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import kills  # noqa: E402
from tiny_runs import texts  # noqa: E402

KILLS_OF_A_RUN = 5
OPTIONS = {"steps": 40, "checkpoint_every": 2, "eval_every": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/measured/kills.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = texts(Path(folder) / "texts")
        whole = Path(folder) / "whole"
        kills.run("hybrid", str(source), str(whole), False, OPTIONS)
        for first in range(0, args.kills, KILLS_OF_A_RUN):
            out, background = Path(folder) / f"run-{first}", bool(first // KILLS_OF_A_RUN % 2)
            options = OPTIONS | {"checkpoint_async": background}
            count = min(KILLS_OF_A_RUN, args.kills - first)
            found = kills.killed("hybrid", source, out, count, seed=first, options=options)
            kills.run("hybrid", str(source), str(out), True, options)
            same = kills.equal(out, whole)
            rows += [{"run": first // KILLS_OF_A_RUN + 1, **row, "equal in the end": same} for row in found]
            for row in rows[-count:]:
                print(row)
    good = sum(row["equal in the end"] and not row["passed over"] for row in rows)
    saving = sum(row["while saving"] for row in rows)
    summary = {"kills": len(rows), "while saving": saving, "continued bit for bit": good, "rows": rows}
    args.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} kills, {saving} while saving: {good} continued bit for bit -> {args.out}")


if __name__ == "__main__":
    main()
