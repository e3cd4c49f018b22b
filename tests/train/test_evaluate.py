import gzip
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from zoo.sections import DataSection
from zoo.train.corpus import Corpus, Document
from zoo.train.evaluate import Share, evaluate_text, ngram_bits, score
from zoo.train.loader import TaskRows
from zoo.train.synthetic import IGNORE, make_task
from zoo.train.texts import MemoryText
from zoo.train.tokenizer import ByteTokenizer

CORPUS = Corpus(
    (Document("a", b"abab" * 30), Document("b", b"ba" * 9)), (Document("c", b"abba" * 8), Document("d", b"zz"))
)


class Fixed(nn.Module):
    """Predicts from the last byte alone, with given log probabilities [V, V]."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens, state=None, doc_ids=None):
        return self.table[tokens]


def test_bigram_table_as_a_model_costs_what_the_bigram_costs():
    """The n-gram figures and the model's go through different code and must agree."""
    counts = torch.ones(257, 257, dtype=torch.float64)
    single = torch.ones(257, dtype=torch.float64)
    stream = [256, *b"abab" * 30, 256, *b"ba" * 9, 256]
    for a, b in pairwise(stream):
        counts[a, b] += 1
        single[b] += 1
    for table, name in ((counts, "bigram"), (single.expand(257, 257), "unigram")):
        model = Fixed(table.log().float())
        for seq_len in (3, 7, 500):
            figures = evaluate_text(
                model, MemoryText(CORPUS, ByteTokenizer()), seq_len=seq_len, batch_size=2, limit=10**6
            )
            assert figures["bits_per_byte"] == pytest.approx(figures[f"{name}_bits_per_byte"], rel=1e-5)
    assert figures["heldout_bytes"] == 34 and figures["heldout_tokens"] == 36
    text = b"abba" * 8 + b"zz"
    assert figures["gzip_bits_per_byte"] == 8 * len(gzip.compress(text, 9)) / 34
    assert figures["loss"] * 36 / math.log(2) / 34 == pytest.approx(figures["bits_per_byte"])


def test_ngrams_are_distributions():
    unigram, bigram = ngram_bits(CORPUS.train, [Document(str(i), bytes([i])) for i in range(256)])
    assert unigram > 0 and bigram > 0
    seen, _ = ngram_bits(CORPUS.train, CORPUS.train)
    assert seen < unigram


def test_score_restores_the_mode_and_counts_only_scored_tokens():
    model = Fixed(torch.zeros(8, 8)).train()
    rows = TaskRows(make_task(DataSection(source="induction"), 12, 8), 0)
    calls = []
    result = score(model, rows, 5, 2, lambda done, total: calls.append((done, total)))
    assert result["tokens"] == 5 and result["loss"] == pytest.approx(math.log(8))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert model.training and model.table.grad is None


def test_shares_of_a_batch_are_the_batch():
    rows = TaskRows(make_task(DataSection(source="induction"), 12, 8), 0)
    for last in (4, 5, 6, 9):  # of three ranks the last one may be left with nothing
        parts = [Share(rank, 3).of(rows, 3, last) for rank in range(3)]
        assert [i for mine, _ in parts for i in mine] == list(range(3, last))
        for mine, part in parts:
            assert len(part.inputs) == max(1, len(mine))
            assert bool((part.labels != IGNORE).any()) == bool(mine)


def test_what_other_ranks_found_counts():
    rows = TaskRows(make_task(DataSection(source="induction"), 12, 8), 0)
    model = Fixed(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    sums = []
    for rank in range(3):
        score(model, rows, 5, 4, share=Share(rank, 3, None, lambda mine: (sums.append(mine.clone()), mine.fill_(1))))
    found = score(model, rows, 5, 4, share=Share(0, 3, None, lambda mine: mine.copy_(torch.stack(sums).sum(0))))
    assert found == pytest.approx(score(model, rows, 5, 4))
