"""A trained model, and one that was made of it and saved: which of its nodes are others, to be taught."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.architectures.model import Model
from zoo.errors import ConfigError
from zoo.graph.nodes import Node, ResidualBlock

Part = nn.Module | None


class Span(nn.Module):
    """Layers of a model, one after the other, which stay where they are."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, **given: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, **given)
        return x


@dataclass(frozen=True)
class Pair:
    """`blocks` of the student `model` by their names, and of the `teacher` the `originals` in their place, as
    `zoo.graft.distill` takes them."""

    teacher: Model
    model: Model
    blocks: dict[str, nn.Module]
    originals: dict[str, nn.Module]
    applied: bool = True

    @contextmanager
    def original(self) -> Iterator[nn.Module]:
        """The teacher."""
        yield self.teacher

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of the blocks that are taught."""
        return list(dict.fromkeys(p for block in self.blocks.values() for p in block.parameters()))


def pair(teacher: Model, student: Model) -> Pair:
    """What of the student is not as in the teacher: single blocks where both trunks have the same form, else whole
    nodes, or all layers between the first and the last that differ. ConfigError where more than layers differ, where
    nothing does, or where what differs has no weights."""
    for name in dict.fromkeys(n for model in (teacher, student) for n, _ in model.named_children()):
        a, b = (getattr(m, name, None) for m in (teacher, student))
        if name != "layers" and not _equal(a, b):
            raise ConfigError(
                f"{name} of the student is not the teacher's: only layers are taught what others computed"
            )
    ours, theirs = list(student.layers), list(teacher.layers)
    if len(ours) == len(theirs):
        names = [n for i, (a, b) in enumerate(zip(theirs, ours)) for n in _sites(f"layers.{i}", a, b)]
        if not names:
            raise ConfigError("the student is the teacher: nothing is to be taught")
        blocks = {n: student.get_submodule(n) for n in names}
        found = Pair(teacher, student, blocks, {n: teacher.get_submodule(n) for n in names})
    else:
        first, last = _same(theirs, ours), _same(theirs[::-1], ours[::-1])
        last = min(last, len(ours) - first, len(theirs) - first)
        spans = [Span(layers[first : len(layers) - last]) for layers in (ours, theirs)]
        name = f"layers.{first}-{len(ours) - last - 1}"
        if not all(span.layers for span in spans):
            raise ConfigError("the student is the teacher with layers left out or repeated: no block of it is another")
        found = Pair(teacher, student, {name: spans[0]}, {name: spans[1]})
    if not found.trainable():
        raise ConfigError(f"what differs has no weights to be taught: {', '.join(found.blocks)}")
    return found


def _same(a: list[nn.Module], b: list[nn.Module]) -> int:
    """How many at the start are equal."""
    return next((i for i, (one, two) in enumerate(zip(a, b)) if not _equal(one, two)), min(len(a), len(b)))


def _sites(path: str, a: nn.Module, b: nn.Module) -> list[str]:
    """The innermost modules that hold all that differs, and that are called with a stream."""
    if _equal(a, b):
        return []
    inside, other = dict(a.named_children()), dict(b.named_children())
    apart = [n for n in inside.keys() & other.keys() if not _equal(inside[n], other[n])]
    if not (_about(a) == _about(b) and inside.keys() == other.keys() and _own_equal(a, b)):
        return [path]
    if isinstance(a, ResidualBlock):
        return [f"{path}.block"] if apart == ["block"] else [path]
    if not all(isinstance(m, (Node, nn.ModuleList)) for n in apart for m in (inside[n], other[n])):
        return [path]
    return [site for n in inside if n in apart for site in _sites(f"{path}.{n}", inside[n], other[n])]


def _equal(a: Part, b: Part) -> bool:
    """Built alike, with the same numbers."""
    if a is None or b is None:
        return a is b
    one, two = dict(a.named_modules()), dict(b.named_modules())
    return one.keys() == two.keys() and all(
        _about(m) == _about(two[n]) and _own_equal(m, two[n]) for n, m in one.items()
    )


def _about(module: nn.Module) -> tuple:
    """What a module was built from, where it stands in no list of tensors."""
    around = (module.style, module.skip, module.fixed_scale) if isinstance(module, ResidualBlock) else ()
    order = getattr(module, "order", None)
    return type(module), getattr(module, "built_from", None), order, around


def _own_equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether the tensors of the modules themselves are the same, in the coarser type of both."""
    one, two = ({n: t for n, t in m.state_dict().items() if "." not in n} for m in (a, b))
    return one.keys() == two.keys() and all(_as(t, two[n].dtype).equal(_as(two[n], t.dtype)) for n, t in one.items())


def _as(tensor: Tensor, other: torch.dtype) -> Tensor:
    smaller = min(tensor.dtype, other, key=lambda dtype: dtype.itemsize)
    return tensor.to(smaller)
