"""`zoo calibrate`: measures the device at hand, so that `zoo profile` can predict times on it."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Annotated

import typer

from zoo.cli import output
from zoo.cli.options import Json

if TYPE_CHECKING:
    from zoo.predict.calibration import Calibration


def command(
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Measure products, bandwidth and every block on this device, in three minutes; `zoo profile` uses the result.

    It is kept in ~/.cache/block-zoo, with the processor, the number of threads and the version of torch it holds for.
    """
    with output.stdout_kept_for_json(as_json), output.working("loading"):
        from zoo.bench import machine
        from zoo.predict import calibrate

        machine.check_device(device)
    with output.stdout_kept_for_json(as_json), output.progress("now") as bar:
        task = bar.add_task("calibrating", total=None, now="")
        whole = 0

        def advance(now: str, left: int) -> None:
            nonlocal whole
            whole = max(whole, left)
            bar.update(task, total=whole, completed=whole - left, now=now)

        found = calibrate.calibrate(device, calibrate.PROBES[device], calibrate.WIDTHS[device], advance)
    path = found.save()
    if as_json:
        return output.emit(found.as_dict() | {"path": str(path)})
    _print(found)
    print(f"kept in {path}")


def _print(found: Calibration) -> None:
    e = found.environment
    threads = f", {e.threads} thread{'' if e.threads == 1 else 's'}" if e.device == "cpu" else ""
    products = ", ".join(f"{output.flops(rate)} at {n}" for n, rate in found.products.items())
    facts = {
        "device": f"{e.processor}{threads}, {e.dtype}, torch {e.torch}",
        "products": f"{products} (FLOP/s of a square product, by width)",
        "copy": f"{found.bandwidth / 1e9:.3g} GB/s",
        "smallest call": f"{1e6 * found.launch:.2g} us",
        "fit": f"median error of a node's time {100 * found.error:.0f}%",
    }
    output.facts(facts)
    print()
    heads = ("kind of work", ">blocks", ">us a call", ">FLOP/s", ">best", ">of products", ">training: FLOP/s", ">best")
    rows = [_row(kind, found) for kind in found.kinds if kind in found.reached]
    output.table(heads, rows, "what blocks reach, by the kind of their work: the middle of all sizes, and the best")
    print()


def _row(kind: str, found: Calibration) -> tuple[str, ...]:
    forward, training = found.reached[kind]["prefill"], found.reached[kind]["train"]
    calls = statistics.median(rates[0] for rates in found.kinds[kind]["prefill"])
    return (
        kind, str(len(found.kinds[kind]["prefill"])), f"{1e6 * calls:.0f}", output.flops(forward[0]),
        output.flops(forward[1]), output.percent(forward[1], max(found.products.values())),
        output.flops(training[0]), output.flops(training[1]),
    )  # fmt: skip
