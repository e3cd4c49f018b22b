"""What a model has learned: held-out loss, bits per byte beside simple references, accuracy on a task."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.architectures.model import evaluating
from zoo.row import Slice
from zoo.train.corpus import Document, Heldout, Stream
from zoo.train.loader import Batch, HeldoutRows, Rows, batch
from zoo.train.synthetic import IGNORE
from zoo.train.texts import Text
from zoo.train.tokenizer import ByteTokenizer

Advance = Callable[[int, int], None]  # (batches done, batches in all)


@dataclass(frozen=True)
class Share:
    """What one of several processes scores: of each batch the rows of number `rank` of `ranks`, with a `slice` its
    tokens of them. `reduce(sums)` adds up in place what all of them found."""

    rank: int = 0
    ranks: int = 1
    slice: Slice | None = None
    reduce: Callable[[Tensor], Any] = lambda sums: None

    def of(self, rows: Rows, first: int, last: int) -> tuple[range, Batch]:
        """The numbers of its rows among first .. last - 1, and these rows. Where there are too few for all ranks,
        a row without labels: the ranks run the model together."""
        each = -(-(last - first) // self.ranks)
        start = min(first + self.rank * each, last)
        mine = range(start, min(start + each, last))
        part = batch(rows, mine.start, len(mine)) if mine else batch(rows, first, 1)
        if not mine:
            part = part._replace(labels=torch.full_like(part.labels, IGNORE))
        if self.slice is not None:
            cut = (self.slice.own(t).contiguous() if isinstance(t, Tensor) else t for t in part)
            part = Batch(*cut)  # type: ignore[arg-type]
        return mine, part

    def sums(self, *mine: float) -> list[float]:
        """These numbers, summed over the ranks."""
        total = torch.tensor(mine, dtype=torch.float64)
        self.reduce(total)
        return total.tolist()


ALL = Share()


def score(
    model: Any, rows: Rows, count: int, size: int, advance: Advance | None = None, share: Share = ALL
) -> dict[str, float]:
    """Loss in nats per scored token (or image), accuracy of the most likely one, and how many were scored, over
    the first `count` rows in batches of `size`, this process computing its `share` of them.

    Of noisy rows the loss is the bound sum_masked -log p / rate, whatever the model was trained on, and the
    accuracy that of the masked tokens. A model that gives None has its logits in another process.
    """
    nats, right, asked, tokens = 0.0, 0, 0, 0
    device = next(model.parameters()).device
    with evaluating(model):
        for first in range(0, count, size):
            part = share.of(rows, first, min(first + size, count))[1].to(device)
            labels, noise = part.labels.flatten(), part.noise
            weight = (labels != IGNORE).float()
            if noise is None:
                logits = model(part.inputs, **({} if part.doc_ids is None else {"doc_ids": part.doc_ids}))
            else:
                logits = model.logits_of(model.two_copies(part.inputs, noise > 0, part.doc_ids)[0])
            if logits is not None:
                tokens += int(weight.sum())
                if noise is not None:
                    weight = torch.where(noise.flatten() > 0, weight / noise.flatten(), 0)
                logits = logits.float().flatten(0, -2)
                losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
                nats += float((losses * weight).sum())  # a product of vectors would be one in bfloat16 under autocast
                right += int(((logits.argmax(-1) == labels) & (weight > 0)).sum())
                asked += int((weight > 0).sum())
            if advance:
                advance(min(first + size, count), count)
    nats, right, asked, tokens = share.sums(nats, right, asked, tokens)
    return {"loss": nats / tokens, "accuracy": right / max(asked, 1), "tokens": int(tokens)}


def evaluate_text(
    model: Any,
    text: Text,
    *,
    seq_len: int,
    batch_size: int,
    limit: int,
    doc_ids: bool = False,
    asked: Callable[[Rows], Rows] = lambda rows: rows,
    advance: Advance | None = None,
) -> dict[str, float | int]:
    """Bits per byte of the model and of the references on the same held-out bytes; `asked` gives rows the labels that
    are scored, or the noise of a block diffuser, of which it is an estimate of the bound.

    The ends of documents are predicted too, and paid for, by the model, the unigram and the bigram; gzip reads
    the documents joined. Every row starts without context.
    """
    heldout = text.heldout(limit)
    rows = HeldoutRows(heldout.stream, seq_len, doc_ids)
    result = score(model, asked(rows), len(rows), batch_size, advance)
    unigram, bigram = ngram_bits(text.train_documents(), heldout.documents)
    joined = b"".join(d.text for d in heldout.documents)
    return {
        "heldout_bytes": heldout.size,
        "heldout_tokens": int(result["tokens"]),
        "loss": result["loss"],
        "accuracy": result["accuracy"],
        "bits_per_byte": bits_per_byte(result["loss"], heldout),
        "unigram_bits_per_byte": unigram / len(joined),
        "bigram_bits_per_byte": bigram / len(joined),
        "gzip_bits_per_byte": 8 * len(gzip.compress(joined, 9)) / len(joined),
    }


def bits_per_byte(loss: float, text: Heldout) -> float:
    """What `loss` nats a token make of a text; tokens that no row scores count like the others."""
    return loss * (len(text.stream) - 1) / math.log(2) / text.size


def ngram_bits(train: Sequence[Document], heldout: Sequence[Document]) -> tuple[float, float]:
    """Bits of the held-out bytes and document ends under add-one smoothed unigrams and bigrams of the train
    documents, counted in bytes whatever the model's tokenizer."""
    tokenizer = ByteTokenizer()
    size = tokenizer.vocab_size
    ids = Stream.of(train, tokenizer).ids.astype(np.int64)
    pairs = np.bincount(ids[:-1] * size + ids[1:], minlength=size * size).reshape(size, size)
    single = pairs.sum(0)
    log_single = np.log2((single + 1) / (single.sum() + size))
    log_pairs = np.log2((pairs + 1) / (pairs.sum(1, keepdims=True) + size))
    test = Stream.of(heldout, tokenizer).ids.astype(np.int64)
    return -float(log_single[test[1:]].sum()), -float(log_pairs[test[:-1], test[1:]].sum())
