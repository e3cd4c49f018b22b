"""`zoo plan CFG --gpus N`: layout, memory and traffic of a run, or a proposal, without any GPU."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli import output
from zoo.cli.options import Config, Json, Overrides

if TYPE_CHECKING:
    from zoo.devices import Device
    from zoo.plan.plan import Plan
    from zoo.plan.propose import Proposal
    from zoo.plan.subject import Subject

Degree = int | None


def command(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Ranks, one a GPU.")] = 8,
    gpu: Annotated[
        str, typer.Option("--gpu", help="Kind of GPU, cpu for this machine, or a YAML file that describes one.")
    ] = "H100",
    dp_replicate: Annotated[Degree, typer.Option("--dp-replicate", min=1, help="Copies of the weights.")] = None,
    dp_shard: Annotated[
        Degree, typer.Option("--dp-shard", min=1, help="Ranks that share weights. [those left]")
    ] = None,
    tp: Annotated[Degree, typer.Option("--tp", min=1, help="Ranks that split heads and channels.")] = None,
    pp: Annotated[Degree, typer.Option("--pp", min=1, help="Ranks that split the layers.")] = None,
    cp: Annotated[Degree, typer.Option("--cp", min=1, help="Ranks that split the sequence.")] = None,
    ep: Annotated[Degree, typer.Option("--ep", min=1, help="Ranks that split the experts.")] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", help="Of the pipeline: 1F1B, GPipe, ...")] = None,
    propose: Annotated[
        bool | None,
        typer.Option("--propose/--no-propose", help="Look for the quickest layouts. [where no number is given]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what each rank of a layout holds, sends and computes in a step; or propose a layout.

    The numbers above stand for the options of `parallel:`.
    """
    given = {
        "dp_replicate": dp_replicate, "dp_shard": dp_shard, "tp": tp, "pp": pp, "cp": cp, "ep": ep,
        "schedule": schedule,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    with output.working("planning"):
        from zoo.devices import named
        from zoo.parallel.layout import check
        from zoo.plan.plan import plan
        from zoo.plan.propose import propose as search
        from zoo.plan.spread import resolve
        from zoo.predict.roofline import Assumed
        from zoo.sections import DataSection, ParallelSection
        from zoo.train import sequence_chunks

        machine = named(gpu, "--gpu")
        document, subject = _subject(config, overrides)
        timing = Assumed(machine, subject.train.dtype)
        wanted = {**(document.get("parallel") or {}), **given}
        layout = ParallelSection.from_mapping(wanted)
        proposal = None
        search_for_it = propose or (propose is None and not wanted)
        data, distilled = DataSection.from_mapping(document.get("data")), document.get("distill") is not None
        sequence_chunks.check(
            subject.model, subject.train, ParallelSection() if search_for_it else layout, data, distilled
        )
        if search_for_it:
            proposal = search(subject, gpus, machine, timing)
            made = proposal.best[0]
        else:
            spread = resolve(layout, subject.train, gpus)
            check(subject.model, layout, subject.seq_len)
            made = plan(subject, spread, machine, timing)
    if as_json:
        return output.emit(_document(subject, made, proposal))
    if proposal:
        _print_proposal(proposal, gpus, machine)
    _print(document["name"], subject, made)


def _subject(config: str, overrides: list[str] | None) -> tuple[Any, Subject]:
    from zoo.architectures.storage import assemble
    from zoo.graph.loader import load_graph
    from zoo.plan.subject import Subject
    from zoo.sections import TrainSection

    graph = load_graph(config, overrides or ())
    train = TrainSection.from_mapping(graph.document.get("train"))
    length = graph.vision.num_tokens if graph.vision else train.seq_len
    return {**graph.document, "name": graph.name}, Subject(assemble(graph), train, length)


# -------------------------------------------------------------------------------------------- shown
def _document(subject: Subject, made: Plan, proposal: Proposal | None) -> dict[str, Any]:
    found = made.as_dict() | {
        "blocks": [dict(zip(("block", "count", "split"), b, strict=True)) for b in _blocks(subject, made)]
    }
    if proposal:
        best = [{"layout": str(p.spread), "seconds": p.seconds, "peak": p.peak} for p in proposal.best]
        found["proposal"] = {**dataclasses.asdict(proposal), "best": best}
    return found


def _print_proposal(proposal: Proposal, gpus: int, machine: Device) -> None:
    rows = [
        (
            str(p.spread), output.size(p.peak), _time(p.compute), _time(p.exposed + max(0.0, p.hidden - p.compute)),
            _time(p.idle), _time(p.seconds),
        )
        for p in proposal.best
    ]  # fmt: skip
    heads = ("layout", ">peak", ">computing", ">waiting", ">pipeline", ">step")
    output.table(heads, rows, f"proposed for {gpus} {machine.name}")
    print(f"{proposal.reason}\n{proposal.tried} layouts: {proposal.refused} refused, {proposal.too_large} too large\n")


def _print(name: str, subject: Subject, made: Plan) -> None:
    spread, train = made.spread, subject.train
    rows = f"{spread.microbatches} x {spread.rows}" if spread.pp > 1 else str(spread.rows)
    pieces = f", {spread.accumulation} times" if spread.accumulation > 1 else ""
    title = f"{name} on {spread.ranks} {made.device.name}: {spread}; a rank computes {rows} x {subject.seq_len} tokens"
    heads = (
        "rank", "layers", ">params", ">weights", ">gradients", ">optimizer", ">gathered", ">activations", ">loss",
        ">peak",
    )  # fmt: skip
    cells = [
        (
            f"stage {i}" if spread.pp > 1 else "every", r.layers, output.count(r.parameters), output.size(r.weights),
            output.size(r.gradients), output.size(r.optimizer), output.size(r.gathered), output.size(r.activations),
            output.size(r.loss), output.size(r.peak),
        )
        for i, r in enumerate(made.ranks)
    ]  # fmt: skip
    output.table(heads, cells, title + pieces)
    share = output.percent(made.peak, made.device.memory)
    print(f"{'fits' if made.fits else 'does not fit'}: {share} of {output.size(made.device.memory)} at the peak\n")
    moves = [
        (m.kind, str(m.ranks), "in a node" if m.inside else "between nodes", output.size(m.bytes), _time(m.seconds))
        for m in made.traffic.values()
    ]
    if moves:
        output.table(("a rank sends in a step", ">ranks", "group", ">bytes", ">time"), moves)
        print()
    if spread.tp > 1:
        output.table(
            ("block", ">sites", f"split over tp {spread.tp}"), [(b, str(n), s) for b, n, s in _blocks(subject, made)]
        )
        print()
    print(
        f"a step: {_time(made.compute)} computing, weights and gradients travel beside it in {_time(made.hidden)}; "
        f"{_time(made.exposed)} waiting for others, {_time(made.idle)} idle in the pipeline: {_time(made.seconds)}, "
        f"{100 * made.mfu:.0f}% of the {train.dtype} peak"
    )
    for line in _assumptions(subject, made):
        print(line)


def _blocks(subject: Subject, made: Plan) -> list[tuple[str, int, str]]:
    """Block, how many, and whether it is split or why not; equal ones together."""
    found: dict[tuple[str, str], int] = {}
    for split in subject.splits(made.spread.tp).values() if made.spread.tp > 1 else ():
        name = str(split.block.zoo_registration.name)  # type: ignore[union-attr]
        kinds = sorted({how for how in split.plan.tensor.values() if how not in ("replicate", "once")})
        how = f"whole: {split.reason}" if split.reason else f"split ({', '.join(kinds)})"
        found[name, how] = found.get((name, how), 0) + 1
    return [(name, count, how) for (name, how), count in found.items()]


def _assumptions(subject: Subject, made: Plan) -> list[str]:
    from zoo.predict.roofline import Assumed

    found = [
        Assumed(made.device, subject.train.dtype).words(w.name for unit in subject.work for w in unit),
        "activations: what the CPU's kernels keep, by the blocks' own cost models; buffers inside a kernel left out",
    ]
    if subject.train.sequence_chunks.size:
        found.append(f"sequence_chunks: activations are those of {subject.piece.seq_len} tokens and the states between")
    if subject.tokens > subject.seq_len:
        found.append(f"a row of {subject.seq_len} tokens goes through the layers as {subject.tokens}: noisy and clean")
    if subject.train.dtype == "bfloat16":
        found.append("bfloat16: activations are counted as float32, so they are at most so large")
    if made.spread.ep > 1:
        found.append("experts: tokens are taken to be spread evenly")
    return found


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.0f} us" if seconds else "0"
