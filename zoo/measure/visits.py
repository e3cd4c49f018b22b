"""Who is told when a pass comes to a node and leaves it, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from zoo.architectures.model import Model

Phase = Literal["forward", "backward"]
Paths = tuple[str, ...]  # of the sites of one module, several where weights are shared


class Visitor(Protocol):
    """What `enter` returns is given back to `leave`."""

    def enter(self, paths: Paths, phase: Phase) -> Any: ...

    def leave(self, paths: Paths, phase: Phase, mark: Any) -> None: ...


def parts(model: Model) -> list[tuple[nn.Module, Paths]]:
    """Blocks and norms of the trunk's nodes, and what stands around the trunk, with the paths of the report's nodes."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for leaf in model.leaves(1, 1, 0, "train"):
        for part in (getattr(leaf.module, name, None) for name in ("norm", "block", "out_norm")):
            if isinstance(part, nn.Module) and hasattr(leaf.module, "block"):
                found.setdefault(id(part), (part, []))[1].append(leaf.path)
    for leaf in model.ends(1, 1, "train"):
        found[id(leaf.module)] = (leaf.module, [leaf.path])
    return [(module, tuple(paths)) for module, paths in found.values()]


@contextmanager
def visited(model: Model, visitor: Visitor) -> Iterator[Callable[[], None]]:
    """Inside, `visitor` is told of every part of every node. What is yielded is to be called after each backward: the
    embedding has no gradient to hand on, so its backward ends with the pass. A part inside another belongs to that."""
    tour = _Tour(visitor)
    first = model.get_submodule(model.embedding)
    handles = []
    for module, paths in parts(model):
        handles.append(module.register_forward_pre_hook(tour.before(paths)))
        handles.append(module.register_forward_hook(tour.after(paths, last=module is first), always_call=True))
    try:
        yield tour.end
    finally:
        for handle in handles:
            handle.remove()


class _Tour:
    """Hooks. Backward begins when the gradient of the output is known and ends when that of the input is: the input is
    seen through a view of its own, since others may read the same tensor."""

    def __init__(self, visitor: Visitor):
        self.visitor = visitor
        self.calls: list[_Call] = []  # forwards that have begun
        self.open: list[_Call] = []  # backwards that end with the pass

    def before(self, paths: Paths) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple) -> Any:
            call = _Call(self.visitor, paths)
            self.calls.append(call)
            if len(self.calls) > 1:
                return None
            if isinstance(args[0], Tensor) and args[0].requires_grad:
                x = args[0].view_as(args[0])
                x.register_hook(call.backward_ends)
                args = (x, *args[1:])
            call.mark = self.visitor.enter(paths, "forward")
            return args

        return hook

    def after(self, paths: Paths, last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            call = self.calls.pop()
            if self.calls:
                return
            self.visitor.leave(paths, "forward", call.mark)
            if isinstance(out, Tensor) and out.requires_grad:
                out.register_hook(call.backward_begins)
                if last:
                    self.open.append(call)

        return hook

    def end(self) -> None:
        for call in self.open:
            call.backward_ends()
        self.open.clear()


class _Call:
    """One call of a part."""

    def __init__(self, visitor: Visitor, paths: Paths):
        self.visitor, self.paths = visitor, paths
        self.mark: Any = None
        self.begun = False

    def backward_begins(self, grad: Tensor) -> None:
        self.begun, self.mark = True, self.visitor.enter(self.paths, "backward")

    def backward_ends(self, grad: Tensor | None = None) -> None:
        if self.begun:
            self.visitor.leave(self.paths, "backward", self.mark)
            self.begun = False
