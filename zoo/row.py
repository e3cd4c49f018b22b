"""A row of tokens of which this process holds a slice: what context parallelism cuts, and how its parts meet again.

While a `Slice` is in use, tensors [B, T, ...] are this rank's T of the n T tokens of each row, in the order of the
ranks. Ops and blocks that look at more than one token ask `current()` and exchange what they need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Slice number `rank` of `size` equal ones; `group` is the process group that holds the row."""

    group: Any
    rank: int
    size: int

    def stack(self, x: Tensor) -> Tensor:
        """x of every rank, [n, ...]; the gradient of each comes back to its rank, summed over all that read it.

        Every rank has to make the same calls in the same order, and to read what comes back: a rank that leaves it
        out of its graph is missing when the others send gradients.
        """
        if x.is_complex():
            return torch.view_as_complex(self.stack(torch.view_as_real(x)))
        if x.dtype == torch.bool:
            return self.stack(x.byte()).bool()
        from torch.distributed import _functional_collectives as functional

        # the name up to torch 2.12, and from then on
        gather = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd
        y = gather(x.contiguous()[None], 0, self.group)
        # waited for here: a compiled graph that it enters while under way would give it no gradient
        return y.wait() if isinstance(y, functional.AsyncCollectiveTensor) else y

    def gather(self, x: Tensor) -> Tensor:
        """The whole row [B, n T, ...] of slices x [B, T, ...]."""
        return self.stack(x).transpose(0, 1).flatten(1, 2)

    def stack_all(self, *parts: Tensor) -> list[Tensor]:
        """`stack` of several tensors of one dtype as one message."""
        flat = self.stack(torch.cat([p.flatten() for p in parts]))
        pieces = flat.split([p.numel() for p in parts], 1)
        return [piece.unflatten(1, p.shape) if p.dim() else piece[:, 0] for piece, p in zip(pieces, parts, strict=True)]

    def own(self, x: Tensor) -> Tensor:
        """This rank's tokens of a whole row [B, n T, ...]."""
        T = x.shape[1] // self.size
        return x[:, self.rank * T : (self.rank + 1) * T]

    def index(self, tokens: int, device: torch.device) -> Tensor:
        """Places [T] of this rank's tokens in the row."""
        return torch.arange(self.rank * tokens, (self.rank + 1) * tokens, device=device)


_current: Slice | None = None
_whole = False


def current() -> Slice | None:
    """The slice in use, or None where rows are whole."""
    return None if _whole else _current


@contextlib.contextmanager
def using(part: Slice | None) -> Iterator[None]:
    """Within, rows are cut as `part` says."""
    global _current
    before, _current = _current, part
    try:
        yield
    finally:
        _current = before


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Within, rows are whole again, whatever `using` says inside: the row was gathered."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


# ------------------------------------------------------------------------------ what lies beyond the cut
def before(part: Slice, x: Tensor, count: int, first: Tensor | None = None) -> Tensor:
    """The `count` tokens before this slice [B, count, ...]; before the row lie those of `first`, or zeros."""
    kept = min(count, x.shape[1])
    start = x.new_zeros(x.shape[0], count, *x.shape[2:]) if first is None else first.to(x.dtype)
    tails = part.stack(x[:, x.shape[1] - kept :]).unbind(0)
    row = torch.cat([start, *tails], 1)
    return row[:, part.rank * kept : part.rank * kept + count]


def after(part: Slice, x: Tensor) -> Tensor:
    """The first token after this slice [B, 1, ...], zero behind the row."""
    heads = part.stack(x[:, :1]).unbind(0)
    return torch.stack([*heads, torch.zeros_like(heads[0])])[part.rank + 1]


@dataclass(frozen=True)
class Cuts:
    """What documents say about passing something on, for every slice j: `joins` [n, B], slice j begins in the document
    that slice j - 1 ended with; `spans` [n, B], all of slice j is one document."""

    joins: Tensor
    spans: Tensor


def cuts(part: Slice, doc_ids: Tensor | None) -> Cuts | None:
    """None where a row is one document."""
    if doc_ids is None:
        return None
    first, last = part.stack(doc_ids[:, [0, -1]]).unbind(-1)
    joins = torch.cat([torch.zeros_like(first[:1], dtype=torch.bool), first[1:] == last[:-1]])
    return Cuts(joins, first == last)


def joined(part: Slice, doc_ids: Tensor, count: int) -> Tensor:
    """Document ids [B, count + T]: those of the `count` tokens before this slice in front, of no document of the row
    where the row begins."""
    nobody = (doc_ids.amin(1, keepdim=True) - 1).expand(-1, count)
    ids = before(part, doc_ids, count)
    real = part.rank * min(count, doc_ids.shape[1])
    return torch.cat([ids if real >= count else torch.cat([nobody[:, real:], ids[:, count - real :]], 1), doc_ids], 1)


def delayed(x: Tensor, first: Tensor | None = None, doc_ids: Tensor | None = None) -> Tensor:
    """The token before each token of x [B, T, ...]: `first` [B, ...] or zero before the row, zero before a document."""
    start = None if first is None else first[:, None].to(x.dtype)
    if (part := current()) is not None:
        start = before(part, x, 1, start)
    elif start is None:
        start = torch.zeros_like(x[:, :1])
    y = torch.cat([start, x[:, :-1]], 1)
    if doc_ids is not None:
        ids = doc_ids[:, :1] if part is None else joined(part, doc_ids, 1)[:, :1]
        starts = doc_ids != torch.cat([ids, doc_ids[:, :-1]], 1)
        y = y.masked_fill(starts.reshape(*starts.shape, *(1,) * (x.dim() - 2)), 0)
    return y


def advanced(x: Tensor, doc_ids: Tensor | None = None) -> Tensor:
    """The token after each token of x [B, T, ...], zero behind the last one of the row and of a document."""
    part = current()
    end = torch.zeros_like(x[:, :1]) if part is None else after(part, x)
    y = torch.cat([x[:, 1:], end], 1)
    if doc_ids is not None:
        # what follows the row is zero already
        ids = doc_ids[:, -1:] if part is None else after(part, doc_ids)
        ends = doc_ids != torch.cat([doc_ids[:, 1:], ids], 1)
        y = y.masked_fill(ends.reshape(*ends.shape, *(1,) * (x.dim() - 2)), 0)
    return y


def fold(
    part: Slice, sent: Sequence[Tensor], step: Callable[..., Tensor], start: Tensor, joins: Tensor | None
) -> Tensor:
    """What enters this slice: e_0 = start, e_{j+1} = step(e_j, what slice j sent), zero where slice j + 1 begins
    another document. All of them are formed on every rank, so that all ranks have one graph."""
    entering, all_of_them = start, [start]
    for j in range(part.size - 1):
        entering = step(entering, *(s[j] for s in sent))
        if joins is not None:
            mask = joins[j + 1]
            entering = torch.where(mask.reshape(-1, *(1,) * (entering.dim() - 1)), entering, torch.zeros_like(entering))
        all_of_them.append(entering)
    return torch.stack(all_of_them)[part.rank]


def earlier(x: Tensor) -> Tensor:
    """The sum of x over the slices before this one; zero where rows are whole."""
    part = current()
    if part is None:
        return torch.zeros_like(x)
    sums = part.stack(x).cumsum(0)
    return torch.cat([torch.zeros_like(sums[:1]), sums[:-1]])[part.rank]


def mean(x: Tensor) -> Tensor:
    """The mean of x over the slices of the row: what a loss over the whole row needs of a mean over a slice."""
    part = current()
    return x if part is None else part.stack(x).mean(0)


def positions(doc_ids: Tensor | None, batch_size: int, seq_len: int, device: torch.device) -> Tensor:
    """Position [B, T] of each token inside its document; its place in the row where there are no documents."""
    part = current()
    if part is not None and doc_ids is not None:
        doc_ids = part.gather(doc_ids)
    tokens = seq_len if part is None else seq_len * part.size
    index = torch.arange(tokens, device=device).expand(batch_size, tokens)
    if doc_ids is not None:
        first = torch.ones_like(doc_ids, dtype=torch.bool)
        first[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
        index = index - torch.where(first, index, 0).cummax(dim=1).values
    return index if part is None else part.own(index)


def drawn(shape: Sequence[int], draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """A tensor [B, T, ...] of `shape` made by draw([B, n T, ...]): ranks seeded alike get parts of one draw."""
    part = current()
    if part is None:
        return draw(shape)
    return part.own(draw((shape[0], shape[1] * part.size, *shape[2:])))
