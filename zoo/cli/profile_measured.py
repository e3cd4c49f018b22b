"""What `zoo profile` says of a measured pass below its table: machine, memory, compiled, kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.cli import output

if TYPE_CHECKING:
    from zoo.cli.profiled import Profiled
    from zoo.measure.run import Measured


def lines(run: Profiled) -> list[str]:
    """About the pass."""
    measured, report = run.measured, run.report
    if not measured:
        return []
    tokens = report.batch_size * report.seq_len
    found = [
        f"measured on {measured.device}: median of {measured.repeats} passes, "
        f"{measured.threads} thread{'s' * (measured.threads > 1)}, {1e3 * tokens / measured.total:,.0f} tokens/s"
    ]
    if memory := measured.memory:
        kept = f", of which {output.size(memory.kept)} are kept for backward" if measured.backward else ""
        state = "weights" if measured.backward else "weights and state"
        found.append(
            f"memory: {output.size(memory.held)} of {state}, beyond that at most {output.size(memory.peak)}{kept}"
        )
    if compiled := measured.compiled:
        found.append(
            compiled["failure"]
            or f"compiled: {compiled['compiled']:.2f} ms, without {compiled['eager']:.2f} (hooks in neither): "
            f"{compiled['ratio']:.2f} times as quick, after {compiled['seconds']:.0f} s of compiling"
        )
    return found


def kernels(run: Profiled) -> list[str]:
    """What ran, a line for each kind of node."""
    from zoo.views import quantities

    measured: Measured | None = run.measured
    found: dict[str, list[str]] = {}
    for node in run.report.nodes:
        if ran := quantities.kernels(measured, node.path):
            found.setdefault(", ".join(ran), []).append(node.block)
    words = [f"  {', '.join(dict.fromkeys(blocks))}: {ran}" for ran, blocks in found.items()]
    return ["kernels", *words] if words else []
