"""Ops on a slice of a row (`zoo.row`): what is sent between the slices, so that each gets its part of the whole result.

Recurrences run on every slice at once, from an empty state. What enters a slice is put together from the final states
and the transitions of the slices before it; the recurrence being linear, its effect is added to what was computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo import row
from zoo.kernels.chunking import wide
from zoo.row import Slice

Run = Callable[..., tuple[Tensor, Tensor]]


def _first_document(doc_ids: Tensor | None, like: Tensor) -> Tensor | None:
    """[B, T, 1 ..], true in the document that the slice begins with."""
    if doc_ids is None:
        return None
    return (doc_ids == doc_ids[:, :1]).reshape(*doc_ids.shape, *(1,) * (like.dim() - 2))


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, torch.zeros_like(x))


def _spanning(transition: Tensor, found: row.Cuts | None, part: Slice) -> Tensor:
    """The transition [B, ...] of a slice, zero where a document ends in it."""
    if found is None:
        return transition
    return _masked(transition, found.spans[part.rank].reshape(-1, *(1,) * (transition.dim() - 1)))


def _start(state: Tensor, initial_state: Tensor | None) -> Tensor:
    return torch.zeros_like(state) if initial_state is None else initial_state.to(state.dtype)


def _joins(found: row.Cuts | None) -> Tensor | None:
    return None if found is None else found.joins


# -------------------------------------------------------------------------------------- diagonal transitions
def _elementwise(
    part: Slice, state: Tensor, decay: Tensor, initial_state: Tensor | None, found: row.Cuts | None
) -> tuple[Tensor, Tensor]:
    """What enters this slice and the state behind it; decay [B, ...] broadcasts to state [B, ...]."""
    decay = _spanning(decay, found, part).to(state.dtype)
    sent = part.stack_all(state, decay)
    entering = row.fold(part, sent, lambda e, s, d: torch.addcmul(s, d, e), _start(state, initial_state), _joins(found))
    return entering, torch.addcmul(state, decay, entering)


def linear_attention(
    part: Slice, run: Run, q: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, initial_state: Tensor | None,
    doc_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """run(): the op from an empty state."""
    o, state = run()
    (B, T, Hq), H, dtype = q.shape[:3], v.shape[2], wide(v.dtype)
    total = torch.zeros(H, dtype=dtype, device=q.device) if log_decay is None else log_decay.to(dtype)
    if total.dim() == 1:
        total = (torch.arange(1, T + 1, device=q.device, dtype=dtype)[:, None] * total).expand(B, T, H)
    else:
        total = total.cumsum(1)
    if total.dim() == 3:
        total = total[..., None]
    entering, last = _elementwise(part, state, total[:, -1].exp()[..., None], initial_state, row.cuts(part, doc_ids))
    reading = q.to(dtype).repeat_interleave(H // Hq, 2) * _masked(total.exp(), _first_document(doc_ids, q))
    return o + (scale * torch.einsum("bthk,bhkv->bthv", reading, entering)).to(o.dtype), last


def diagonal_scan(
    part: Slice, run: Run, log_decay: Tensor, inputs: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """run(): the op from an empty state."""
    h, state = run()
    found, (B, T) = row.cuts(part, doc_ids), inputs.shape[:2]
    # padded with ones on the left, so that dimension 1 is time
    decay = log_decay.reshape(*(1,) * (inputs.dim() - log_decay.dim()), *log_decay.shape).to(state.dtype)
    total = decay.expand(B if decay.shape[0] == B else 1, T, *decay.shape[2:]).cumsum(1)
    carried = total[:, -1].exp().expand_as(state)
    entering, last = _elementwise(part, state, carried, initial_state, found)
    reach = _masked(total.exp().expand(h.shape), _first_document(doc_ids, h))
    return h + (reach * entering[:, None]).to(h.dtype), last


def selective_scan(
    part: Slice, run: Run, delta: Tensor, A: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """run(initial_state): the op. It runs twice: what enters is read through a state a token, which is never formed."""
    _, state = run(None)
    decay = (delta.to(state.dtype).sum(1)[..., None] * A.to(state.dtype)).exp()
    entering, _ = _elementwise(part, state, decay, initial_state, row.cuts(part, doc_ids))
    return run(entering)


# ---------------------------------------------------------------------------------------- matrix transitions
def matrix_recurrence(
    part: Slice, run: Run, v: Tensor, key_dim: int, initial_state: Tensor | None, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """run(v, initial_state): an op whose state [B, H, Dk, Dv] is linear in its values, column by column (`delta_rule`,
    `dplr`). Dk more columns start from the identity and get no value: at the end they hold the transition of the slice,
    and on the way they say what is read of a state that enters."""
    (B, _, H, Dv), dtype = v.shape, wide(v.dtype)
    one = torch.eye(key_dim, dtype=dtype, device=v.device).expand(B, H, -1, -1)
    o, state = run(F.pad(v, (0, key_dim)), F.pad(one, (Dv, 0)))
    o, reading = o.split([Dv, key_dim], -1)
    sent = part.stack_all(*(s.contiguous() for s in state.split([Dv, key_dim], -1)))
    start = _start(state[..., :Dv], initial_state)
    entering = row.fold(part, sent, lambda e, s, p: s + p @ e, start, _joins(row.cuts(part, doc_ids)))
    read = torch.einsum("bthk,bhkv->bthv", reading.to(dtype), entering)
    return o + read.to(o.dtype), state[..., :Dv] + state[..., Dv:] @ entering


def plstm(
    part: Slice, run: Run, transition: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """run(initial_state): the op. It runs twice; the transition of the slice is the product of those of its tokens."""
    _, state = run(None)
    steps = list(transition.to(state.dtype).unbind(1))
    while len(steps) > 1:  # neighbours first, so that the chain is log T long
        odd = steps[-1:] if len(steps) % 2 else []
        late, early = torch.stack(steps[1::2]), torch.stack(steps[: len(steps) - len(odd) : 2])
        steps = [*(late @ early).unbind(0), *odd]
    found = row.cuts(part, doc_ids)
    sent = part.stack_all(state, _spanning(steps[0], found, part))
    entering = row.fold(
        part, sent, lambda e, s, p: s + (p @ e.flatten(-2)).view_as(s), _start(state, initial_state), _joins(found)
    )
    return run(entering)


# ------------------------------------------------------------------------------------- halo and keys
def short_conv(
    part: Slice, run: Run, x: Tensor, taps: int, state: Tensor | None, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """run(x, state, doc_ids): the op."""
    if taps == 1:
        return run(x, state, doc_ids)
    halo = row.before(part, x, taps - 1, state)
    if doc_ids is None:
        return run(x, halo, None)
    # the op's state is of no document, so the halo goes in front of the tokens
    y, last = run(torch.cat([halo, x], 1), None, row.joined(part, doc_ids, taps - 1))
    return y[:, taps - 1 :], last


def attention_keys(
    part: Slice, q: Tensor, k: Tensor, v: Tensor, causal: bool, q_index: Tensor | None, k_index: Tensor | None,
    k_doc_ids: Tensor | None, window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """k, v, q_index, k_index and k_doc_ids for queries of this slice over the keys of the row: over all of them, or
    those up to its end where it is `causal` in the order of memory, or those that a `window` reaches."""
    (B, T), sizes, n = q.shape[:2], [k.shape[-1], v.shape[-1]], part.size
    pairs = torch.cat([k, v], -1)
    start, end = part.rank * T, (part.rank + 1) * T if causal else n * T
    if q_index is not None and k_index is not None:
        k, v = part.gather(pairs).split(sizes, -1)
        return k, v, q_index, part.gather(k_index), None if k_doc_ids is None else part.gather(k_doc_ids)
    if causal and window is not None:
        halo = min(max(window - 1, 1), (n - 1) * T)
        pairs = torch.cat([row.before(part, pairs, halo), pairs], 1)
        places = torch.arange(start - halo, end, device=q.device).clamp(min=-1)  # -1: before the row, no key
        k_doc_ids = None if k_doc_ids is None else row.joined(part, k_doc_ids, halo)
    else:
        pairs, places = part.gather(pairs)[:, :end], torch.arange(end, device=q.device)
        k_doc_ids = None if k_doc_ids is None else part.gather(k_doc_ids)[:, :end]
    k, v = pairs.split(sizes, -1)
    return k, v, part.index(T, q.device).expand(B, T), places.expand(B, len(places)), k_doc_ids
