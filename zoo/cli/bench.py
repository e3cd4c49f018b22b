"""`zoo bench WHAT`: ops and layers timed against their peers."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli import output
from zoo.cli.options import Json

if TYPE_CHECKING:
    from zoo.bench.groups import Settings


def command(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="An op, or layers, scaling, sparse.")],
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="TEXT", help="Only what is called so; may be repeated.", show_default=False),
    ] = None,
    seq: Annotated[str | None, typer.Option("--seq", metavar="N,...", help="Tokens. [as listed in the cases]")] = None,
    device: Annotated[str, typer.Option("--device", help="Where to measure: cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option("--dtype", help="[float32; on cuda bfloat16]")] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Interleaved rounds.")] = 7,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also all layers under torch.compile; minutes.")] = False,
    peer: Annotated[
        str | None, typer.Option("--peer", metavar="NAME", help="Compare with this row. [the quickest peer]")
    ] = None,
    patience: Annotated[
        float, typer.Option("--patience", min=0.0, help="Seconds that one call of a slow row may take.")
    ] = 20.0,
    plot: Annotated[str | None, typer.Option("--plot", metavar="FILE", help="Draw it: .png, .svg or .pdf.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the result in tools/bench/results.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Find launch configurations for this card instead (cuda only).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time every row of an op, or whole layers, against other people's code in one process."""
    with output.stdout_kept_for_json(as_json), output.working("loading"):
        from zoo.bench import machine, session
        from zoo.bench import plot as drawing
        from zoo.bench import tune as tuning
        from zoo.bench.groups import Settings, wrong

        session.check_subject(what)
        machine.check_device(device)
        settings = Settings(device, machine.dtype_named(dtype, device), rounds, compiled, peer, patience)
        seqs, words = session.lengths(seq), list(only or ())
        drawing.check(plot)
        folder = session.results_folder() if save else None
        if tune:
            tuning.check(what, device)
    if tune:
        return _tune(what, settings, seqs, as_json)
    with output.stdout_kept_for_json(as_json), machine.threads(threads), output.progress("now") as bar:
        task = bar.add_task(f"bench {what}", total=session.steps(what, settings, seqs, words), now="")

        def tell(now: str, done: int) -> None:
            bar.update(task, advance=done, now=now)
            if bar.disable and not done:  # a log of a long run
                print(now, file=sys.stderr, flush=True)

        document = session.run(what, settings, seqs, words, tell)
    document["command"] = "zoo " + " ".join(sys.argv[1:])
    if peer and what != "scaling" and not any(g["peer"] for g in document["groups"]):
        print(f"no row called {peer!r} was timed, so there are no ratios", file=sys.stderr)
    output.emit(session.rounded(document)) if as_json else _print(document)
    if plot:
        drawing.draw(document, plot)
    if folder:
        print(f"kept in {_shown(session.save(document, folder))}", file=sys.stderr)
    failures = list(wrong(document["groups"]))
    for failure in failures:
        print(failure, file=sys.stderr)
    if failures:
        raise typer.Exit(1)


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _print(document: dict[str, Any]) -> None:
    if document["bench"] == "scaling":
        _print_scaling(document["groups"])
    else:
        _print_groups(document)
    peaks, machine, settings = document["peaks"], document["machine"], document["settings"]
    print(
        f"\n{machine['device']}, {settings['dtype']}, {machine['threads']} threads; measured here: "
        f"{output.count(peaks['gflops'])} GFLOP/s of one product, {peaks['copy_gb_s']:.3g} GB/s of a copy, "
        f"{peaks['stream_gb_s']:.3g} GB/s of weights"
    )
    if machine.get("load", 0) > max(0.5 * (machine["processors"] or 1), 0.5):
        print(f"this machine was busy (load {machine['load']} before the start): times are not to be relied on")


def _print_groups(document: dict[str, Any]) -> None:
    columns = ("case", "what", "by", ">ms", ">least", ">spread", ">GFLOP/s", ">roofline", ">x peer", ">wanted")
    rows: list[tuple[str, ...]] = []
    for group in document["groups"]:
        length = f"after {group['context']}" if group["what"] == "step" else f"T={group['seq']}"
        head = (group["case"], f"{group['what']} {length}")
        for row in group["rows"]:
            if not row.get("median_ms"):
                continue
            wanted = f"{group['wanted']:g}" if group["wanted"] and row["chosen"] else ""
            rows.append((*head, row["name"] + (" *" if row["chosen"] else ""), *_numbers(row), wanted))
            head = ("", "")
        if group["bound_ms"]:
            rows.append((*head, "(bound)", _ms(group["bound_ms"]), "", "", "", "", "", ""))
    output.table(columns, rows)
    print("* ours: what kernel: auto runs, of a layer the quicker of eager and compiled. x peer: the peer's time over")
    print("this one. bound: FLOPs or bytes at the speeds below")
    for line in _left_out(document["groups"]):
        print(line)


def _numbers(row: dict[str, Any]) -> tuple[str, ...]:
    gflops, roofline, ratio = row["gflops"], row["roofline"], row["ratio"]
    return (
        _ms(row["median_ms"]),
        _ms(row["min_ms"]),
        f"{100 * row['spread']:.0f}%",
        f"{gflops:.3g}" if gflops else "",
        f"{100 * roofline:.0f}%" if roofline else "",
        f"{ratio:.2f}" if ratio else "",
    )


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"


def _left_out(groups: Iterable[dict[str, Any]]) -> list[str]:
    """Who did not take part and why, each reason once with where it holds."""
    reasons: dict[tuple[str, str], list[str]] = {}
    total = 0
    for group in groups:
        total += 1
        for row in group["rows"]:
            if row["problem"]:
                place = f"{group['case']} {group['what']} {group['seq']}"
                reasons.setdefault((row["name"], row["problem"]), []).append(place)
    lines = []
    for (name, reason), places in reasons.items():
        where = "" if len(places) == total else f" ({places[0]}{', ...' if len(places) > 1 else ''})"
        lines.append(f"not timed: {name}{where}: {reason}")
    return lines


def _print_scaling(groups: Iterable[dict[str, Any]]) -> None:
    rows: list[tuple[str, ...]] = []
    for group in groups:
        head = (group["case"], group["what"])
        for row in group["rows"]:
            memory = output.size(row["memory"]) if row.get("memory") is not None else ""
            rows.append((*head, str(row["seq"]), _ms(row["median_ms"]), f"{100 * row['spread']:.0f}%",
                         _times(row["growth"]), memory, _times(row.get("memory_growth"))))  # fmt: skip
            head = ("", "")
        if group.get("problem"):
            rows.append((*head, "", group["problem"], "", "", "", ""))
    columns = ("op", "what", ">tokens", ">ms", ">spread", ">time x2 length", ">memory", ">memory x2 length")
    output.table(columns, rows)
    print("for twice the length 2.00 is linear, 4.00 quadratic; wanted: at most 2.1")


def _times(factor: float | None) -> str:
    return f"{factor:.2f}" if factor else ""


def _tune(op: str, settings: Settings, seqs: tuple[int, ...], as_json: bool) -> None:
    from zoo.bench import cases, tune

    with output.stdout_kept_for_json(as_json), output.progress("now") as bar:
        task = bar.add_task(f"tuning {op}", total=None, now="")
        found = tune.tune(op, cases.of(op), settings, seqs, lambda now: bar.update(task, now=now))
    if as_json:
        return output.emit({"op": op, "tuned": found})
    rows = [
        (
            entry["case"], f"{entry['what']} {entry['seq']}", entry["kernel"], str(one["config"]),
            _ms(one["median_ms"]) if one.get("median_ms") else "",
            one["problem"] or ("kept" if one["config"] == entry["kept"] else ""),
        )
        for entry in found
        for one in entry["tried"]
    ]  # fmt: skip
    output.table(("case", "what", "kernel", "configuration", ">ms", ""), rows)
