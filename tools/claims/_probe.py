"""A model as small as a question about mixers allows, and batches of a task for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.train.synthetic import IGNORE, Sample


class Probe(nn.Module):
    """Mixers (name, options) between embedding and head: logits [B, T, V] of tokens [B, T].

    A token is embedded beside the token before it, so that a value lies beside its key and no mixer needs a
    convolution of its own for that.
    """

    def __init__(self, dim: int, vocab_size: int, mixers: Sequence[tuple[str, dict[str, Any]]], seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.now, self.before = nn.Embedding(vocab_size, dim // 2), nn.Embedding(vocab_size, dim // 2)
        for embedding in (self.now, self.before):
            nn.init.normal_(embedding.weight, std=0.02)
        self.mixers = nn.ModuleList(zoo.create_block(name, dim, **options) for name, options in mixers)
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in mixers)
        self.final_norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.now(tokens), self.before(F.pad(tokens[:, :-1], (1, 0)))], -1)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(self.final_norm(x))


def batches(task: Sample, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (inputs, labels) [rows, T]; batch n is the same in every run."""
    number = 0
    while True:
        samples = [task(np.random.default_rng([seed, number, row])) for row in range(rows)]
        inputs, labels = (torch.from_numpy(np.stack(part)).long() for part in zip(*samples, strict=True))
        yield inputs, labels
        number += 1


def accuracy(model: Any, inputs: Tensor, labels: Tensor, tokens_at_once: int = 1 << 14) -> float:
    """Share of scored positions answered right."""
    rows = max(1, tokens_at_once // inputs.shape[1])
    with torch.no_grad():
        answers = torch.cat([model(part).argmax(-1) for part in inputs.split(rows)])
    return (answers == labels)[labels != IGNORE].float().mean().item()
