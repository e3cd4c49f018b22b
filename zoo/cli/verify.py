"""`zoo verify NAME`: the conformance suite on one block, or on all."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from zoo.cli import output
from zoo.cli.options import Json

if TYPE_CHECKING:
    from zoo.conformance import Report


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A block, package.module:Class, or all.")],
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="CHECK", help="Only this check; may be repeated.", show_default=False),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Leave out the slow checks (compilation, export).")] = False,
    as_json: Json = False,
) -> None:
    """Prove that a block keeps the law: segments, causality, packing, cost, gradients, relations."""
    if ":" in name and "" not in sys.path:
        sys.path.insert(0, "")  # a stranger's module may lie in the current folder, as for `python -m`
    with output.stdout_kept_for_json(as_json):
        from zoo.conformance import verify
        from zoo.conformance.suite import cases, checks_for, registration_of
        from zoo.registry import list_blocks

        names = [n for n in list_blocks() if checks_for(registration_of(n))] if name == "all" else [name]
        total = {n: sum(1 for _ in cases(n, only, not fast)) for n in names}
        reports: list[Report] = []
        with output.progress("check") as bar:
            task = bar.add_task(name, total=sum(total.values()), check="")
            for n in names:
                report = verify(
                    n,
                    only=only,
                    slow=not fast,
                    progress=lambda result: bar.update(task, advance=1, check=f"{result.block} {result.check}"),
                )
                reports.append(report)
    if as_json:
        output.emit({"ok": all(r.ok for r in reports), "blocks": [r.to_json() for r in reports]})
    else:
        for report in reports:
            print(report)
    if not all(r.ok for r in reports):
        raise typer.Exit(1)
