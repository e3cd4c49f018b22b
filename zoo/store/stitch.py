"""Maps between streams of different widths, found by least squares on what two models make of the same text.

Of every `stitch` in an assembled model, in the order of the trunk: W_in maps the stream in front of it to the stream
that its first block read in the model it is from; then W_out maps what the body adds to what the stream around lacks of
the one that the next block read in its own model (BlockLLM, arXiv:2404.18322). Both are ridge regressions in closed
form, from sums over all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architectures.model import evaluating
from zoo.convert.rules import residual_blocks
from zoo.errors import ConfigError, DataError, Problem
from zoo.graph.stitch import Stitch
from zoo.store.nodes import Saved, nodes_of

RIDGE = 1e-3  # of the mean variance of what is mapped


@dataclass(frozen=True)
class Source:
    """The model of a store, and its node, that a node of an assembled model was taken from."""

    model: str
    node: str


@dataclass(frozen=True)
class Stitched:
    """The model with its maps, and for every stitch that was fitted the share of the variance that W_in and W_out
    explain."""

    saved: Saved
    explained: Mapping[str, tuple[float, float]]


@torch.no_grad()
def fit(
    made: Saved,
    sources: Mapping[str, Source],
    models: Mapping[str, Saved],
    batches: Sequence[Tensor],
    *,
    ridge: float = RIDGE,
) -> Stitched:
    """Fit every stitch of `made` for which `sources` has nothing. sources: of all its other nodes; models: those that
    they name; batches: tokens [B, T]. ConfigError where a stream cannot be seen or the models read other tokens."""
    if other := next((n for n, saved in models.items() if saved.graph.interface != made.graph.interface), None):
        raise ConfigError(f"{other} reads {models[other].graph.interface}, the assembled model {made.graph.interface}")
    if len({saved.files.get("tokenizer.json") for saved in models.values()}) > 1:
        raise ConfigError(f"{' and '.join(models)} have different tokenizers: they cannot read the same text")
    model, donors = made.model(), {name: saved.model() for name, saved in models.items()}
    blocks = residual_blocks(model)
    stitches = {path: m for path, m in model.named_modules() if isinstance(m, Stitch) and path not in sources}
    explained = {}
    for path, stitch in stitches.items():
        first, behind = _around(path, blocks, stitches, sources)
        here, donor = _Seen(model, path), _Seen(donors[first.model], first.node)
        into = _Regression(stitch.dim, stitch.width)
        for tokens in batches:
            into.add(here.read(tokens), donor.read(tokens))
        share = into.solve(stitch.in_proj, ridge)
        home = _Seen(donors[behind.model], behind.node)
        back = _Regression(stitch.width, stitch.dim)
        for tokens in batches:
            x = here.read(tokens)
            back.add(stitch.body.increment(stitch.in_proj(x)), home.read(tokens) - x)
        explained[path] = share, back.solve(stitch.out_proj, ridge)
    fitted = nodes_of(model)
    nodes = {path: fitted[path] if path in explained else node for path, node in made.nodes.items()}
    return Stitched(replace(made, nodes=nodes), explained)


def _around(
    path: str, blocks: list[str], stitches: Mapping[str, Any], sources: Mapping[str, Source]
) -> tuple[Source, Source]:
    """Where the first block of a stitch is from, and the first behind it that reads the stream around it."""
    inside = [b for b in blocks if b.startswith(f"{path}.")]
    if any(other.startswith(f"{path}.") for other in stitches):
        raise ConfigError([Problem("holds another stitch: fit one of them only", where=path)])
    after = [b for b in blocks[blocks.index(inside[-1]) + 1 :] if not b.startswith(tuple(f"{s}." for s in stitches))]
    first = next((sources[b] for b in inside if b in sources), None)
    behind = next((sources[b] for b in [*after, "norm"] if b in sources), None)
    if first is None or behind is None:
        raise ConfigError([Problem("no stored block stands in it and behind it, whose streams it could join", path)])
    return first, behind


class _Seen:
    """The stream that a module of a model reads."""

    def __init__(self, model: nn.Module, path: str):
        self.model, self.path = model, path

    def read(self, tokens: Tensor) -> Tensor:
        """[B, T, D]"""
        seen: list[Tensor] = []
        handle = self.model.get_submodule(self.path).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            with evaluating(self.model):
                self.model(tokens)
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0].shape[:2] != tokens.shape:
            raise ConfigError([Problem("its stream cannot be seen: it does not read every token once", self.path)])
        return seen[0]


class _Regression:
    """y = W x + b by least squares, W pulled towards zero."""

    def __init__(self, inputs: int, outputs: int):
        self.count = 0
        self.x, self.y, self.y_square = torch.zeros(inputs).double(), torch.zeros(outputs).double(), 0.0
        self.xx, self.xy = torch.zeros(inputs, inputs).double(), torch.zeros(inputs, outputs).double()

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.y_square += float(y.square().sum())

    @torch.no_grad()
    def solve(self, linear: nn.Linear, ridge: float) -> float:
        """Write W and b into a layer; the share of the variance of y that they explain."""
        x, y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count - torch.outer(x, x)
        xy = self.xy / self.count - torch.outer(x, y)
        small = ridge * xx.trace() / len(x) + torch.finfo(xx.dtype).tiny  # so that a stream of zeros has a solution
        weight = torch.linalg.solve(xx + small * torch.eye(len(x), dtype=xx.dtype), xy)
        if not weight.isfinite().all():
            raise DataError("a stitch cannot be fitted: the streams of these models are not finite")
        linear.weight.copy_(weight.T)
        linear.bias.copy_(y - x @ weight)
        variance = self.y_square / self.count - float(y.square().sum())
        return float((2 * weight * xy).sum() - (weight * (xx @ weight)).sum()) / max(variance, 1e-30)
