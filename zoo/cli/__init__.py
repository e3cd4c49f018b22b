"""The command line. `main` is the entry point `zoo`; every command imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted."""
    from zoo.cli.app import app

    given = list(sys.argv[1:] if args is None else args)
    if "--debug" in given:  # may stand anywhere
        given = ["--debug", *(a for a in given if a != "--debug")]
    app(given, prog_name="zoo")
