"""Small-scale evidence on the CPU for what papers claim.

    python tools/claims                  the claims and what was measured last
    python tools/claims recall           one of them
    python tools/claims all              all of them
    python tools/claims recall --draw    words and picture again from its figures, nothing is measured

Each writes figures (JSON), a table (md) and a picture (png) to docs/measured/claims. One thread, one process.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# python puts this very folder in front, where no package `claims` is
sys.path[0] = str(Path(__file__).resolve().parents[1])


def main() -> int:
    from claims import common

    names = common.names()
    parser = argparse.ArgumentParser(prog="python tools/claims", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("claim", nargs="*", help=f"one of {', '.join(names)}, or all")
    parser.add_argument("--draw", action="store_true", help="write words and picture again from the figures")
    parser.add_argument("--tiny", action="store_true", help="a few steps each, to see that it runs")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    args = parser.parse_args()
    if unknown := [n for n in args.claim if n not in (*names, "all")]:
        parser.error(f"there is no claim {unknown[0]!r}; there are {', '.join(names)}, and all")
    if not args.claim:
        common.overview(args.out)
        return 0
    for name in names if "all" in args.claim else dict.fromkeys(args.claim):
        if args.draw:
            common.redraw(name, args.out)
        else:
            common.measure(name, args.out, tiny=args.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
