"""How near is each converted family to its original? Tiny models of transformers with drawn weights against ours.

    python tools/families.py                   # all families, a table in docs/measured/families.md
    python tools/families.py gemma3_text llama # some, printed only

Every family has option sets that exercise what its configuration can say (tests/convert/models*.py); a row shows the
worst of them. Errors are the largest of a logit (of a hidden state, where there is no head) over their standard
deviation; in fp64 the original's casts to fp32 are lifted, so that what is left is the rounding of the last digits.
The continuation is greedy, with both caches. (1): some original does not clamp Mamba-2's delta in its cached step, as
it does in a sequence, and says something else with its cache than without; ours is what it says without.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEAD = ("family", "sets", "error fp32", "error fp64", "same continuation", "bit-equal back", "lines of YAML", "seconds")


def measured(names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What each option set shows, by family."""
    sys.path.insert(0, str(ROOT / "tests" / "convert"))
    from models import CONTEXTS, MODELS
    from models_hybrid import MODELS as HYBRIDS
    from parity import measure

    found: dict[str, list[dict[str, Any]]] = {}
    for name, make in (MODELS | HYBRIDS).items():
        family, _, options = name.partition(".")
        if not names or family in names:
            print(f"  {name}", file=sys.stderr, flush=True)
            found.setdefault(family, []).append({"options": options} | vars(measure(make(), CONTEXTS.get(name))))
    return found


def row(family: str, sets: list[dict[str, Any]]) -> list[str]:
    """The worst of the option sets; lines and seconds of the first."""
    continued = [s["generation"] for s in sets if s["generation"] is not None]
    return [
        family,
        str(len(sets)),
        f"{max(s['error'] for s in sets):.0e}",
        f"{max(s['error_fp64'] for s in sets):.0e}",
        said(all(continued)) + " (1)" * any(s["unlike_itself"] for s in sets) if continued else "generates none",
        said(all(s["round_trip"] for s in sets)),
        str(sets[0]["yaml_lines"]),
        f"{min(s['seconds'] for s in sets):.2f}",
    ]


def said(good: bool) -> str:
    """Yes or no."""
    return "yes" if good else "NO"


def main(names: list[str]) -> int:
    import torch
    import transformers

    torch.set_num_threads(1)
    found = measured(names)
    if unknown := set(names) - found.keys():
        print(f"no such family: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    rows = [list(HEAD), ["---", *["---:"] * 3, "---", "---", "---:", "---:"]]
    rows += [row(family, sets) for family, sets in found.items()]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    here = f"transformers {transformers.__version__}, torch {torch.__version__}, {platform.machine()}, one thread"
    print(table)
    if not names:
        out = ROOT / "docs" / "measured" / "families.md"
        out.write_text(f"# Converted families\n\n{__doc__}\n{here}.\n\n{table}", encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps({"made with": here, "families": found}, indent=1) + "\n")
    good = all(s["round_trip"] and s["generation"] in (True, None) for sets in found.values() for s in sets)
    return 0 if good and all(s["error"] < 1e-4 for sets in found.values() for s in sets) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
