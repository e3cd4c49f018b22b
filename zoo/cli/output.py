"""How results are shown: tables on stdout, one JSON document on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_PIPE_WIDTH = 160  # a pipe has no width; narrow tables would lose text


def console(stderr: bool = False) -> Console:
    """A console on stdout or stderr that prints text as it is: no markup, no highlighting."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit by itself

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Plain(file=stream, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", expendable: Sequence[str] = ()
) -> list[str]:
    """Print a table; columns whose head starts with `>` hold numbers and stand to the right. Where the width does not
    do, `expendable` ones are left out, the first ones first; their heads are returned."""
    from rich.table import Table
    from rich.text import Text

    screen = console()
    gone = _too_many(columns, rows, expendable, screen.width)
    grid = Table(box=None, pad_edge=False)
    kept = [i for i, head in enumerate(columns) if head not in gone]
    for i in kept:
        head, right = columns[i].removeprefix(">"), columns[i].startswith(">")
        grid.add_column(Text(head, style="bold"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(row[i]) for i in kept))
    if title:  # as wide as the screen, not as the table
        screen.print(Text(title, style="bold"))
    screen.print(grid)
    return [head.removeprefix(">") for head in columns if head in gone]


def left_out(heads: Sequence[str]) -> None:
    """Say which columns of a table there was no room for."""
    if heads:
        print(f"(too narrow for {', '.join(heads)}; --csv and --json have more)")


def _too_many(columns: Sequence[str], rows: Sequence[Sequence[str]], order: Sequence[str], width: int) -> list[str]:
    gap, most = 2, 24  # longer texts may break
    needed = {}
    for i, head in enumerate(columns):
        long = max(len(cell) for cell in (head.removeprefix(">"), *(row[i] for row in rows)))
        needed[head] = gap + (long if head.startswith(">") else min(long, most))
    order = [head for head in order if head in needed]
    over = sum(needed.values()) - gap - width
    gone = []
    while order and over > 0:
        gone.append(order.pop(0))
        over -= needed[gone[-1]]
    return gone


def facts(pairs: Mapping[str, str]) -> None:
    """Print names and values, one pair a line."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        print(f"{name:<{width}}  {value}")


def emit(document: Any) -> None:
    """Print a JSON document. Numbers that JSON cannot hold become null."""
    sys.stdout.write(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def stdout_kept_for_json(json_wanted: bool) -> Iterator[None]:
    """Inside, whatever libraries print goes to stderr where the one document is to stand on stdout."""
    with contextlib.redirect_stdout(sys.stderr) if json_wanted else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on a terminal while something takes a while."""
    if not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(what):
        yield


@contextlib.contextmanager
def progress(*columns: str) -> Iterator[Progress]:
    """A progress bar on stderr, with further `columns` of task fields; silent where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    fields = [TextColumn(f"{{task.fields[{c}]}}", markup=False) for c in columns]
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *fields,
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        yield bar


def count(number: float) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{letter}" if number < 999.5 * size else f"{number / size:.0f}{letter}"
    return f"{number:g}"


def flops(number: float) -> str:
    """1234567 -> 1.23M, with G for 1e9."""
    return count(number).replace("B", "G") if number < 1e15 else f"{number / 1e15:.3g}P"


def size(number: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return (
                f"{number:.0f} B"
                if unit == "B"
                else f"{number:.3g} {unit}"
                if number < 999.5
                else f"{number:.0f} {unit}"
            )
        number /= 1024
    return f"{number:.3g} TiB"


def percent(part: float, whole: float) -> str:
    """Share in percent."""
    return f"{100 * part / whole:.1f}%" if whole else ""
