"""What a block carries from one segment to the next: dataclasses of tensors, one row per sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor


class State:
    """Streaming state of a block: subclasses are dataclasses of tensors [B, ...], nested states, lists or
    dicts of states, and plain Python values. Tensors are preallocated and updated in place.

    `field(metadata={"fill": value})` says what `reset` writes (0 where absent).
    """

    def _children(self) -> Iterator[tuple[Any, str, State]]:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, State):
                yield None, f.name, value
            elif isinstance(value, list):
                yield from ((i, f.name, v) for i, v in enumerate(value) if isinstance(v, State))
            elif isinstance(value, dict):
                yield from ((k, f.name, v) for k, v in value.items() if isinstance(v, State))

    def own_tensors(self) -> Iterator[Tensor]:
        """The tensors of this state without those of the states inside it."""
        for _, t in self._tensors():
            yield t

    def _tensors(self) -> Iterator[tuple[dataclasses.Field, Tensor]]:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            if isinstance(value := getattr(self, f.name), Tensor):
                yield f, value

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of this state and of the states inside it."""
        for state in self.walk():
            yield from state.own_tensors()

    def walk(self) -> Iterator[State]:
        """This state and every one inside it."""
        yield self
        for _, _, child in self._children():
            yield from child.walk()

    @property
    def nbytes(self) -> int:
        """Bytes held, nested states included."""
        return self._tensor_bytes() + sum(child.nbytes for _, _, child in self._children())

    @property
    def max_nbytes(self) -> int:
        """Bytes held when the rows are full. More than `nbytes` only of a state that makes room as it is used, even
        where `max_len` is given, because it may never need all of it; it says here what that would be."""
        return self._tensor_bytes() + sum(child.max_nbytes for _, _, child in self._children())

    def _tensor_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in self._tensors())

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """A new state with `fn` applied to every tensor; Python values are kept."""
        return self._rebuilt(fn, lambda child: child.map(fn))

    def _rebuilt(self, fn: Callable[[Tensor], Tensor], inside: Callable[[State], State]) -> Self:
        new: dict[str, Any] = {}
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                value = fn(value)
            elif isinstance(value, State):
                value = inside(value)
            elif isinstance(value, list):
                value = [inside(v) if isinstance(v, State) else v for v in value]
            elif isinstance(value, dict):
                value = {k: inside(v) if isinstance(v, State) else v for k, v in value.items()}
            new[f.name] = value
        return type(self)(**new)

    def clone(self) -> Self:
        """An independent copy."""
        return self.map(torch.clone)

    snapshot = clone

    def mark(self) -> Self:
        """As `clone`, but buffers that are only appended to may be shared: what was in them at the mark stays there
        as long as the rows just go on."""
        return self._rebuilt(torch.clone, lambda child: child.mark())

    def untouched(self, before: Self) -> Tensor | None:
        """Which slots [B, S] of its tensors [B, S, ...] hold what they held at the mark `before`, of a state whose
        segments write some slots and leave the others; None: any element may have changed."""
        return None

    def restore(self, snapshot: Self) -> None:
        """Go back to `snapshot` (which stays usable)."""
        self._copy_from(snapshot, lambda mine, theirs: theirs.clone())

    def reorder(self, index: Tensor) -> None:
        """Row b becomes the old row `index[b]` (beam search); the number of rows may change."""
        self._copy_from(self, lambda mine, theirs: theirs.index_select(0, index))

    def rows(self, index: Tensor) -> Self:
        """A copy that holds only the rows `index`."""
        return self.map(lambda t: t.index_select(0, index))

    def put_rows(self, index: Tensor, part: Self) -> None:
        """Write back what `rows(index)` took. A buffer that grew in `part` grows here too."""

        def write(mine: Tensor, theirs: Tensor) -> Tensor:
            if theirs.shape[1:] != mine.shape[1:]:
                grown = mine.new_zeros(mine.shape[0], *theirs.shape[1:])
                grown[tuple(slice(0, n) for n in mine.shape)] = mine
                mine = grown
            return mine.index_copy_(0, index, theirs)

        self._copy_from(part, write, merge=max)

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget everything, or only the rows `rows` (int64 indices)."""
        for f, t in self._tensors():
            fill = f.metadata.get("fill", 0)
            t.fill_(fill) if rows is None else t.index_fill_(0, rows, fill)
        for _, _, child in self._children():
            child.reset(rows)
        if rows is None:
            for f in dataclasses.fields(self):  # type: ignore[arg-type]
                if isinstance(getattr(self, f.name), int) and f.metadata.get("counter"):
                    setattr(self, f.name, 0)

    def _copy_from(self, other: Self, fn, merge: Callable | None = None) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, Tensor):
                setattr(self, f.name, _assign(mine, fn(mine, theirs)))
            elif not isinstance(mine, (State, list, dict)):
                setattr(self, f.name, merge(mine, theirs) if merge and f.metadata.get("counter") else theirs)
        for (_, _, mine), (_, _, theirs) in zip(self._children(), other._children(), strict=True):
            mine._copy_from(theirs, fn, merge)


def _assign(old: Tensor, new: Tensor) -> Tensor:
    # the same storage where shapes allow, so that a captured CUDA graph keeps reading the right memory
    return old if new is old else old.copy_(new) if old.shape == new.shape else new


@dataclass
class EmptyState(State):
    """State of a block that carries nothing from one segment to the next."""


@dataclass
class StateList(State):
    """States of the children of a composite node, in order."""

    children: list[State] = field(default_factory=list)


@dataclass
class SharedKeys(State):
    """In the place of a block's state: the keys and values that one call leaves to later calls of the same block.

    `write_keys` of the block fills it, with the keys of `own`, its state, where rows are streamed; then every call
    queries what is in it. k, v: [B, S, H, .] (with their gradient); indices and documents as in `attention`.
    """

    own: State | None = None
    k: Any = None  # tensors once they are written
    v: Any = None
    q_index: Tensor | None = None
    k_index: Tensor | None = None
    doc_ids: Tensor | None = None

    @property
    def written(self) -> bool:
        """Whether keys are there."""
        return self.k is not None

    def at(self, tokens: Tensor) -> SharedKeys:
        """The same keys for queries of only the tokens [B, n] of the segment."""
        q_index, k_index = self.q_index, self.k_index
        if q_index is None and self.k is not None:
            k_index = torch.arange(self.k.shape[1], device=tokens.device).expand(self.k.shape[:2])
            q_index = k_index
        return dataclasses.replace(self, q_index=q_index.gather(1, tokens), k_index=k_index)  # type: ignore[union-attr]


def counter() -> Any:
    """Dataclass field for a host-side count: an upper bound over rows, zeroed by a full `reset`."""
    return field(default=0, metadata={"counter": True})


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Recurrent states are float32, and float64 where the model is."""
    return torch.float64 if dtype == torch.float64 else torch.float32
