"""Running a node on some of the tokens: gather, run, put back.

Rows may pick different numbers of tokens. Without a state, short rows are padded at their end, where a causal
node cannot see them; with a state, rows that picked the same number run together on their part of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.contract import EmptyState, Pick, SharedKeys, State, StateList

if TYPE_CHECKING:
    from zoo.graph.nodes import Node


def run_picked(
    node: Node, pick: Pick, x: Tensor, state: State | None, positions: Tensor, doc_ids: Tensor | None
) -> Tensor:
    """Increment of `node` [B, T, D] at the picked tokens, zero elsewhere."""
    if pick.index is not None:
        if state is None:
            return _gathered(node, pick.index, None, None, x, positions, doc_ids)
        mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, pick.index, True)
    elif pick.mask is not None:
        mask = pick.mask
    else:
        return node.increment(x, state=state, positions=positions, doc_ids=doc_ids)
    if state is None:
        return _padded(node, mask, None, x, positions, doc_ids)
    first, counts = _front(mask)
    out = torch.zeros_like(x)
    for count in counts.unique().tolist():
        if count == 0:
            continue
        rows = (counts == count).nonzero().squeeze(1)
        tokens = first[rows, :count]
        part = state if len(rows) == len(x) else state.rows(rows)
        y = node.increment(_take(x[rows], tokens), state=part, positions=positions[rows].gather(1, tokens))
        if part is not state:
            state.put_rows(rows, part)
        out[rows[:, None], tokens] = y
    return out


def run_reading(node: Node, pick: Pick, x: Tensor, keys: State, positions: Tensor, doc_ids: Tensor | None) -> Tensor:
    """As `run_picked`, over keys that an earlier call left in `keys` (see `shared_keys`) and that stay as they are."""
    if pick.index is not None:
        return _gathered(node, pick.index, None, keys, x, positions, doc_ids)
    if pick.mask is not None:
        return _padded(node, pick.mask, keys, x, positions, doc_ids)
    return node.increment(x, state=keys, positions=positions, doc_ids=doc_ids)


def shared_keys(state: State, streaming: bool) -> State:
    """A tree like `state` in which a node leaves its keys to later calls: those of `state` itself where rows are
    streamed, else those of the sequence alone."""
    if isinstance(state, StateList):
        return StateList([shared_keys(child, streaming) for child in state.children])
    return state if isinstance(state, EmptyState) else SharedKeys(state if streaming else None)


def _at(keys: Any, tokens: Tensor) -> Any:
    if isinstance(keys, StateList):
        return StateList([_at(child, tokens) for child in keys.children])
    return keys.at(tokens) if isinstance(keys, SharedKeys) else keys


def _front(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [B, T] with the picked tokens of each row first, in order; how many those are [B]."""
    return torch.argsort(mask.int(), dim=1, descending=True, stable=True), mask.sum(1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _padded(node, mask, keys, x, positions, doc_ids):
    first, counts = _front(mask)
    longest = int(counts.max())
    if longest == 0:
        return torch.zeros_like(x)
    valid = torch.arange(longest, device=x.device) < counts[:, None]
    return _gathered(node, first[:, :longest], valid, keys, x, positions, doc_ids)


def _gathered(node, index, valid, keys, x, positions, doc_ids):
    docs = None if doc_ids is None else doc_ids.gather(1, index)
    if docs is not None and valid is not None:
        docs = docs.masked_fill(~valid, -1)  # padding is a document of its own
    state = None if keys is None else _at(keys, index)
    y = node.increment(_take(x, index), state=state, positions=positions.gather(1, index), doc_ids=docs)
    if valid is not None:
        y = y * valid.unsqueeze(-1)
    # under autocast an increment may have another dtype than the stream
    return torch.zeros_like(x).scatter_add(1, index.unsqueeze(-1).expand_as(y), y.to(x.dtype))
