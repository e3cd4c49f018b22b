"""Rules between the tensors of two models: which hold the same numbers, how each is made of the other bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.graph.nodes import ResidualBlock

Change = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Rule:
    """`ours` is made of `theirs` by `there`, and `theirs` of `ours` by `back`, its inverse."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    there: Change
    back: Change


def same(ours: str, theirs: str) -> Rule:
    """The same tensor under another name."""
    return changed(ours, theirs, lambda t: t, lambda t: t)


def changed(ours: str, theirs: str, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Rule:
    """One tensor of another layout."""
    return Rule((ours,), (theirs,), lambda t: [there(t[0])], lambda t: [back(t[0])])


def joined(ours: str, theirs: Sequence[str], sizes: Sequence[int], dim: int = 0) -> Rule:
    """One of ours holds several of theirs, of these sizes along `dim`."""
    return Rule((ours,), tuple(theirs), lambda t: [torch.cat(t, dim)], lambda t: t[0].split(list(sizes), dim))


def divided(ours: Sequence[str], theirs: str, sizes: Sequence[int], dim: int = 0) -> Rule:
    """Several of ours, of these sizes along `dim`, are one of theirs."""
    return Rule(tuple(ours), (theirs,), lambda t: t[0].split(list(sizes), dim), lambda t: [torch.cat(t, dim)])


def stacked(ours: str, theirs: Sequence[str]) -> Rule:
    """One of ours stacks several of theirs, as of experts."""
    return Rule((ours,), tuple(theirs), lambda t: [torch.stack(t)], lambda t: t[0].unbind())


def linear(ours: str, theirs: str, bias: bool = False) -> Iterator[Rule]:
    """The same linear map under another name."""
    for part in ("weight", "bias")[: 1 + bias]:
        yield same(f"{ours}.{part}", f"{theirs}.{part}")


def residual_blocks(model: nn.Module) -> list[str]:
    """Names of the residual blocks of a model in the order in which they run, each shared one once."""
    return [name for name, module in model.named_modules() if isinstance(module, ResidualBlock)]


def alike(model: nn.Module, ours: str, theirs: str, **renamed: str) -> Iterator[Rule]:
    """The same tensors below a module of each; `renamed` maps the first part of our names to that of theirs."""
    for name in model.get_submodule(ours).state_dict():
        first, dot, rest = name.partition(".")
        yield same(f"{ours}.{name}", f"{theirs}.{renamed.get(first, first)}{dot}{rest}")


def constant(ours: str, value: Tensor) -> Rule:
    """One of ours that has no counterpart because it is always this. ConfigError where training has changed it."""

    def back(tensors: list[Tensor]) -> list[Tensor]:
        if not torch.equal(tensors[0].to(value), value):
            raise ConfigError(f"{ours} was changed; the original has no such weights")
        return []

    return Rule((ours,), (), lambda _: [value], back)
