"""What `zoo profile` shows of a measured pass beside its time: forward and backward, memory, kernels, compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.cli import output

if TYPE_CHECKING:
    from zoo.cli.folding import Row
    from zoo.cli.profiled import Profiled
    from zoo.measure.run import Measured


def phases(measured: Measured, row: Row | None = None) -> dict[str, float]:
    """Milliseconds by head, of a row or of the pass; empty where nothing goes backward."""
    if not measured.backward:
        return {}
    if row is None:
        return {">forward": measured.forward, ">backward": measured.backward}
    return {f">{name}": sum(of.get(n.path, 0.0) for n in row.sites) for name, of in measured.phases.items()}


def rest(measured: Measured) -> dict[str, float]:
    """Milliseconds that no node accounts for."""
    found = {f">{name}": sum(of.values()) for name, of in measured.phases.items()}
    return {head: max(0.0, whole - found[head]) for head, whole in phases(measured).items()}


def columns(measured: Measured) -> dict:
    """Peak of memory and kernels."""
    memory = measured.memory
    found: dict = {"kernels": (lambda r: kernels(measured, r), "")}
    if memory:
        peak = (lambda r: output.size(max(memory.nodes.get(n.path, 0) for n in r.sites)), output.size(memory.peak))
        found = {">peak": peak} | found
    return found


def kernels(measured: Measured, row: Row) -> str:
    """Backends of the ops of a row: `attention flash, linear aten`."""
    found: dict[str, dict[str, None]] = {}
    for node in row.sites:
        for op, backends in measured.kernels.get(node.path, {}).items():
            found.setdefault(op, {}).update(dict.fromkeys(backends))
    return ", ".join(f"{op} {' and '.join(backends)}" for op, backends in found.items())


def lines(run: Profiled) -> list[str]:
    """Below the table."""
    measured, found = run.measured, []
    if measured and (memory := measured.memory):
        kept = f", of which {output.size(memory.kept)} are kept for backward" if measured.backward else ""
        state = "weights" if measured.backward else "weights and state"
        found.append(
            f"memory: {output.size(memory.held)} of {state}, beyond that at most {output.size(memory.peak)}{kept}"
        )
    if measured and (compiled := measured.compiled):
        found.append(
            compiled["failure"]
            or f"compiled: {compiled['compiled']:.2f} ms, without {compiled['eager']:.2f} (hooks in neither): "
            f"{compiled['ratio']:.2f} times as quick, after {compiled['seconds']:.0f} s of compiling"
        )
    return found
