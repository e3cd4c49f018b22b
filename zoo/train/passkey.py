"""Needle retrieval by a text model: a key is told somewhere in a long text, and asked for at its end.

The text is the same few sentences again and again, as in the passkey task (arXiv:2305.16300); sentences and wording
are our own. The model is asked in words, so it must have learned language; a model of the synthetic task `needle` is
judged by the rows of that task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.architectures.model import evaluating
from zoo.errors import ConfigError, Problem
from zoo.train.synthetic import IGNORE
from zoo.train.tokenizer import Tokenizer

FILLER = "The mill stands by the river. A cart waits at the gate. Nobody is in a hurry, and the day is long.\n"
NEEDLE = "The pass key is{key}. Keep it in mind:{key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DIGITS = 5
SEGMENT = 2048  # tokens that are read at once


class Passkey:
    """Prompts of at most `length` tokens, whole sentences, with the key told at `depth` of 0 (first) to 1 (last)."""

    def __init__(self, tokenizer: Tokenizer, length: int, depth: float):
        self.tokenizer, self.length, self.depth = tokenizer, length, depth
        self.filler, self.question = self._ids(FILLER), self._ids(QUESTION)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode([text.encode()])[0].tolist()

    def prompt(self, index: int) -> tuple[list[int], list[int]]:
        """Tokens of the text with the question, and of the key."""
        rng = np.random.Generator(np.random.Philox(key=[self.length, index]))
        key = f" {rng.integers(10 ** (DIGITS - 1), 10**DIGITS)}"
        needle, answer = self._ids(NEEDLE.format(key=key)), self._ids(key)
        room = self.length - 1 - len(needle) - len(self.question) - len(answer)
        if room < 0:
            raise ConfigError([Problem(f"needs {self.length - room} tokens, got {self.length}", "length of needle")])
        lines = room // len(self.filler)
        before = round(self.depth * lines)
        text = [*self.filler * before, *needle, *self.filler * (lines - before)]
        return [self.tokenizer.end, *text, *self.question], answer

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """inputs, labels: [B, T]; a shorter row is filled behind its end."""
        pairs = [self.prompt(i) for i in range(first, first + count)]
        most = max(len(text) + len(answer) for text, answer in pairs)
        inputs, labels = np.full((count, most - 1), self.tokenizer.end), np.full((count, most - 1), IGNORE)
        for row, (text, answer) in enumerate(pairs):
            inputs[row, : len(text) + len(answer) - 1] = [*text, *answer[:-1]]
            labels[row, len(text) - 1 : len(text) + len(answer) - 1] = answer
        return torch.from_numpy(inputs), torch.from_numpy(labels)


def find_needles(
    model: Any,
    tokenizer: Tokenizer,
    length: int,
    *,
    count: int,
    size: int,
    depths: Sequence[float] = DEPTHS,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[dict[str, float]]:
    """For each depth: `accuracy`, the share of keys that greedy decoding tells without a mistake, `digits`, the share
    of the key's tokens that are most likely after the right ones, and `loss`, nats per token of the key."""
    device, found = next(model.parameters()).device, []
    for depth in depths:
        prompts, right, keys, tokens, nats = Passkey(tokenizer, length, depth), 0, 0, 0, 0.0
        for first in range(0, count, size):
            inputs, labels = (t.to(device) for t in prompts.batch(first, min(size, count - first)))
            scored = labels != IGNORE
            begin = int(scored.any(0).nonzero()[0])
            logits, labels = logits_from(model, inputs, begin), labels[:, begin:]
            hit = (logits.argmax(-1) == labels) | (labels == IGNORE)
            keys += int(hit.all(1).sum())  # greedy decoding goes on from right tokens only while all are right
            right += int((hit & (labels != IGNORE)).sum())
            tokens += int(scored.sum())
            nats += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            advance(len(inputs))
        found.append({"depth": depth, "accuracy": keys / count, "digits": right / tokens, "loss": nats / tokens})
    return found


def logits_from(model: Any, tokens: Tensor, begin: int) -> Tensor:
    """float32 logits of the tokens from `begin` on. Long texts are read in segments, so that the memory they take is
    that of the model's state."""
    with evaluating(model):
        state = model.init_state(len(tokens), tokens.shape[1])
        for at in range(0, begin, SEGMENT):
            model.hidden(tokens[:, at : min(at + SEGMENT, begin)], state)
        return model.head(model.hidden(tokens[:, begin:], state)).float()
