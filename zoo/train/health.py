"""How every node is, looked at in one step of many: gradients, outputs of the layers, what blocks measure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoo.train.incidents import of_all_ranks
from zoo.train.sites import Site, owner


@contextmanager
def outputs_of(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Mean squares of what the layers return inside, one for each call.

    A compiled layer keeps its compiled code: it is measured around the call, where a hook would be part of it.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    undo: list[Any] = []

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and torch._C._current_graph_task_id() == -1:  # not when recomputed
            found[name].append(output.detach().float().square().mean())

    for name, layer in layers.items():
        compiled = layer._compiled_call_impl
        if compiled is None:
            undo.append(layer.register_forward_hook(lambda m, args, y, name=name: note(name, y)).remove)
        else:
            layer._compiled_call_impl = _around(compiled, name, note)
            undo.append(lambda layer=layer, compiled=compiled: setattr(layer, "_compiled_call_impl", compiled))
    try:
        yield found
    finally:
        for put_back in undo:
            put_back()


def _around(call: Any, name: str, note: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        note(name, output)
        return output

    return run


def gradients_of(parts: Iterable[nn.Module], sites: Sequence[Site]) -> dict[str, float]:
    """Norm of the gradient of each node's weights, by path; a weight inside several nodes counts for the innermost."""
    sizes: dict[str, list[Tensor]] = {}
    for name, p in (named for part in parts for named in part.named_parameters()):
        site = owner(name, sites)
        if site is not None and p.grad is not None:
            size = p.grad.float().norm()
            sizes.setdefault(site.path, []).append(size.full_tensor() if hasattr(size, "full_tensor") else size)  # type: ignore[operator]
    return {path: float(torch.stack(its).norm()) for path, its in sizes.items()}


def measured(parts: Iterable[nn.Module], sites: Sequence[Site]) -> dict[str, dict[str, float]]:
    """What the blocks of each node measured in their last forward, by path."""
    found: dict[str, dict[str, float]] = {}
    for name, module in (named for part in parts for named in part.named_modules()):
        values = getattr(module, "metrics", None)
        if isinstance(values, dict) and values and (site := owner(name, sites)):
            found.setdefault(site.path, {}).update({k: float(v) for k, v in values.items()})
    return found


def record(
    step: int,
    sites: Sequence[Site],
    gradients: Mapping[str, float],
    outputs: Mapping[str, Sequence[Tensor]],
    metrics: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """One line of health.jsonl: `nodes` by path, `layers` the RMS of their outputs. Ranks put theirs together."""
    mine = (gradients, {name: [float(v) for v in values] for name, values in outputs.items()}, metrics)
    nodes: dict[str, dict[str, Any]] = {}
    squares: dict[str, list[float]] = {}
    ranks = of_all_ranks(mine)
    for its_gradients, its_outputs, _ in ranks:
        for path, size in its_gradients.items():
            nodes.setdefault(path, {})["grad_norm"] = size
        for name, values in its_outputs.items():
            squares.setdefault(name, []).extend(values)
    for path, names in _names([m for _, _, m in ranks]).items():
        for name, values in names.items():
            nodes.setdefault(path, {})[name] = sum(values) / len(values)
    blocks = {s.path: s.block for s in sites}
    return {
        "step": step,
        "nodes": {p: {"block": blocks[p]} | nodes[p] for p in blocks if p in nodes},
        "layers": {name: (sum(v) / len(v)) ** 0.5 for name, v in squares.items() if v},
    }


def _names(ranks: Iterable[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for metrics in ranks:
        for path, values in metrics.items():
            for name, value in values.items():
                found.setdefault(path, {}).setdefault(name, []).append(value)
    return found
