"""The next-token loss of a model with a large vocabulary, whose logits never exist all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.contract import State

LOGITS_AT_ONCE = 1 << 26


def chunks_for(asked: int, tokens: int, vocab_size: int) -> int:
    """`asked`, or where that is 0 so many that a chunk has at most `LOGITS_AT_ONCE` logits."""
    return asked or max(1, -(-tokens * vocab_size // LOGITS_AT_ONCE))


def loss_by_chunks(
    model: Any, tokens: Tensor, labels: Tensor, doc_ids: Tensor | None, chunks: int,
    cross_entropy: Callable[[Tensor, Tensor], Tensor], state: State | None = None,
) -> Tensor:  # fmt: skip
    """`cross_entropy(model(tokens), labels)`, a sum over tokens, in pieces of the sequence. The logits of a piece
    are computed again in backward: a third more work for the head, and chunks times less memory for the logits."""

    def of_piece(hidden: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(model.head(hidden), wanted)

    hidden = model.hidden(tokens, state, doc_ids=doc_ids)
    if chunks == 1:
        return of_piece(hidden, labels)
    pieces = zip(hidden.chunk(chunks, 1), labels.chunk(chunks, 1), strict=True)
    losses = [checkpoint(of_piece, hidden, wanted, use_reentrant=False) for hidden, wanted in pieces]
    return sum(losses[1:], losses[0])
