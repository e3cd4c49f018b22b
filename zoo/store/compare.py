"""How far two models are the same: node by node in their weights, layer by layer in what they compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.architectures.model import Model, evaluating
from zoo.graph.spec import Graph
from zoo.store.nodes import Saved, StoredNode, difference


@dataclass(frozen=True)
class NodeComparison:
    """One node: `equal` bit for bit; other `weights` of the same block, `distance` |a - b| / |a|; another `block`, or
    a node that only one model has (`why` says what)."""

    node: str
    block: str
    how: Literal["equal", "weights", "block", "only a", "only b"]
    distance: float | None = None
    why: str = ""


@dataclass(frozen=True)
class StreamComparison:
    """The stream behind a layer, or what the model says: |a - b| / |a| over all numbers, and the mean over tokens of
    the cosine. None where widths differ."""

    where: str
    relative: float | None
    cosine: float | None


@dataclass(frozen=True)
class Comparison:
    """All nodes; all streams, or `why` they cannot be compared."""

    nodes: tuple[NodeComparison, ...]
    streams: tuple[StreamComparison, ...]
    why: str = ""

    @property
    def equal(self) -> bool:
        """Whether both have the same nodes and say the same."""
        return all(n.how == "equal" for n in self.nodes) and not self.why and not any(s.relative for s in self.streams)

    def __str__(self) -> str:
        lines = [
            f"{n.node} {n.block}: {n.how}{'' if n.distance is None else f' {n.distance:.3g}'} {n.why}".rstrip()
            for n in self.nodes
        ]
        lines += [self.why] if self.why else []
        for s in self.streams:
            told = "other width" if s.relative is None else f"difference {s.relative:.3g}, cosine {s.cosine:.6f}"
            lines.append(f"{s.where}: {told}")
        return "\n".join(lines)


def compare(a: Saved, b: Saved, *, rows: int = 2, tokens: int = 64, seed: int = 0) -> Comparison:
    """Compare two models. Streams are those of `rows` rows of drawn tokens (or drawn images), the same for both."""
    nodes = []
    for path in [*a.nodes, *(p for p in b.nodes if p not in a.nodes)]:
        one, two = a.nodes.get(path), b.nodes.get(path)
        if one is None or two is None:
            there: Any = one or two
            nodes.append(NodeComparison(path, there.block, "only a" if two is None else "only b"))
        else:
            nodes.append(_node(path, one, two))
    if why := _incomparable(a.graph, b.graph):
        return Comparison(tuple(nodes), (), why)
    inputs = _inputs(a.graph, rows, tokens, seed)
    both = [dict(_streams(saved.model(), inputs, seed)) for saved in (a, b)]
    shared = [where for where in both[0] if where in both[1]]
    return Comparison(tuple(nodes), tuple(_stream(where, both[0][where], both[1][where]) for where in shared))


def _node(path: str, one: StoredNode, two: StoredNode) -> NodeComparison:
    if one.hash == two.hash:
        return NodeComparison(path, one.block, "equal")
    if why := difference(one, two):
        return NodeComparison(path, one.block, "block", why=why)
    pairs = [(t.double(), two.tensors[name].double()) for name, t in one.tensors.items()]
    apart = math.hypot(*(float((x - y).norm()) for x, y in pairs))
    length = math.hypot(*(float(x.norm()) for x, _ in pairs))
    if apart == 0:  # the same numbers, kept in another type
        return NodeComparison(path, one.block, "weights", 0.0, "another dtype")
    return NodeComparison(path, one.block, "weights", apart / length if length else math.inf)


def _incomparable(a: Graph, b: Graph) -> str:
    if (a.architecture, a.interface) != (b.architecture, b.interface):
        return f"outputs cannot be compared: {a.interface} against {b.interface}"
    return ""


def _inputs(graph: Graph, rows: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if graph.vision is None:
        return torch.randint(graph.vocab_size, (rows, tokens), generator=generator)
    size = graph.vision.image_size
    return torch.randn(rows, graph.vision.channels, size, size, generator=generator)


def _streams(model: Model, inputs: Tensor, seed: int) -> Iterator[tuple[str, Tensor]]:
    with evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # blocks that start from noise start from the same
        like = next(model.parameters()).dtype
        x = model.begin(inputs.to(like) if inputs.is_floating_point() else inputs)
        yield "embedding", x
        for i, layer in enumerate(model.layers):
            x = layer(x)
            yield f"layers.{i}", x
        yield "output", model.end(x)


def _stream(where: str, a: Tensor, b: Tensor) -> StreamComparison:
    if a.shape != b.shape:
        return StreamComparison(where, None, None)
    a, b = a.double().flatten(0, -2), b.double().flatten(0, -2)
    length, apart = float(a.norm()), float((a - b).norm())
    relative = 0.0 if apart == 0 else apart / length if length else math.inf
    return StreamComparison(where, relative, float(torch.cosine_similarity(a, b, dim=-1).mean()))
