"""Which key a query may see, and the tiles of queries and keys that leave out what no query of a tile sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

QUERY_TILE = 128  # queries of one tile of the chunked form
MAX_WINDOW_TILE = 512


class Tile(NamedTuple):
    """Queries [start, stop) against keys [0, sinks) and [first, last)."""

    start: int
    stop: int
    sinks: int
    first: int
    last: int

    @property
    def num_keys(self) -> int:
        return self.sinks + self.last - self.first

    def queries(self, x: Tensor) -> Tensor:
        """Rows of x [B, T, ...] that are this tile's queries."""
        return x[:, self.start : self.stop]

    def keys(self, x: Tensor) -> Tensor:
        """Rows of x [B, S, ...] that are this tile's keys."""
        part = x[:, self.first : self.last]
        return torch.cat([x[:, : self.sinks], part], 1) if self.sinks else part


class TwoCopies(NamedTuple):
    """Given in place of document ids: a row of 2n tokens is a noisy copy of n tokens and behind it the clean one.

    Token i of either copy lies in block i // block. A noisy token sees its own noisy block, both ways, and the
    clean tokens of the blocks before. A clean token sees the clean tokens up to the end of its block, or with
    `causal` up to itself. doc_ids [B, n]: documents, which still see only themselves (arXiv:2503.09573).
    """

    block: int
    causal: bool = False
    doc_ids: Tensor | None = None

    def documents(self, batch_size: int, tokens: int, device: torch.device) -> Tensor:
        """Document ids [batch_size, tokens] in which the copies are documents of their own, for blocks that only
        ask which tokens are neighbours."""
        if self.doc_ids is None:
            copy = torch.arange(tokens, device=device) >= tokens // 2
            return copy.long().expand(batch_size, tokens)
        return torch.cat([2 * self.doc_ids, 2 * self.doc_ids + 1], 1)


class Mask(NamedTuple):
    """Rules of visibility. Order indices and documents are None where they are 0.. and one document."""

    causal: bool
    window: int | None
    sinks: int
    q_index: Tensor | None
    k_index: Tensor | None
    q_doc_ids: Tensor | None
    k_doc_ids: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether the order is that of memory and every key is real: then tiles can leave keys out."""
        return self.q_index is None

    def visible(self, tile: Tile, device: torch.device) -> Tensor | None:
        """Mask [B or 1, queries, keys] of a tile, True where visible; None where all is visible."""
        if self.q_index is None or self.k_index is None:
            i = torch.arange(tile.start, tile.stop, device=device)[None]
            j = torch.arange(tile.first, tile.last, device=device)
            j = torch.cat([torch.arange(tile.sinks, device=device), j])[None] if tile.sinks else j[None]
        else:
            i, j = tile.queries(self.q_index), tile.keys(self.k_index)
        seen = None if self.plain else (j >= 0)[:, None]
        i, j = i[:, :, None], j[:, None]
        if self.causal:
            seen = _both(seen, j <= i)
        if self.window is not None:
            seen = _both(seen, ((i - j).abs() < self.window) | (j < self.sinks))
        if self.q_doc_ids is not None and self.k_doc_ids is not None:
            seen = _both(seen, tile.queries(self.q_doc_ids)[:, :, None] == tile.keys(self.k_doc_ids)[:, None])
        return seen


def _both(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a & b


def tiles(
    num_queries: int, num_keys: int, causal: bool, window: int | None, sinks: int, plain: bool, fused: bool
) -> Iterator[Tile]:
    """Cut the queries. A fused kernel needs no cut except to skip the keys outside a window."""
    size = QUERY_TILE
    if fused:
        size = num_queries if window is None or not plain else max(64, min(window, MAX_WINDOW_TILE))
    for start in range(0, num_queries, max(size, 1)):
        stop = min(start + size, num_queries)
        first, last = 0, num_keys
        if plain and window is not None:
            first, last = max(0, start - window + 1), min(num_keys, stop + window - 1)
        if plain and causal:
            last = min(last, stop)
        yield Tile(start, stop, min(sinks, first), first, last)
