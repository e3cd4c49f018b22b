"""Tasks with an answer. `make_task(...)` gives `sample(rng) -> (inputs [T], labels [T])`, labels -100 where
nothing is scored.

mqar: pairs `k1 v1 .. kn vn`, then each key again at a random later place: answer its value (arXiv:2312.04927).
selective_copy: n tokens among blanks, then n markers: answer the tokens in order (arXiv:2312.00752).
needle: pairs `key value` at random places among filler tokens, at the end the keys again: answer their values.
induction: a trigger, the token after it, ..., the trigger again: answer that token (arXiv:2312.00752).
state_tracking: permutations of n items, at each place answer the product of all so far (arXiv:2404.08819): parity
for n = 2; from n = 5 on attention and diagonal recurrences of fixed depth are believed not to solve it at all lengths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from zoo.errors import ConfigError, Problem
from zoo.sections import DataSection

IGNORE = -100
Sample = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]
BLANK, MARKER, TRIGGER = 0, 1, 0
_DISTANCE_POWER = 0.01  # keys come back after power-law distributed distances, mostly soon


def make_task(data: DataSection, seq_len: int, vocab_size: int) -> Sample:
    """The sampler of `data.source`. ConfigError where rows or vocabulary are too small for the task."""
    task = {
        "mqar": _mqar,
        "selective_copy": _selective_copy,
        "induction": _induction,
        "needle": _needle,
        "state_tracking": _state_tracking,
    }[data.source]
    return task(data, seq_len, vocab_size)


def _need(have: int, least: int, where: str, why: str) -> None:
    if have < least:
        raise ConfigError([Problem(f"must be at least {least} {why}, got {have}", where)])


def _mqar(data: DataSection, seq_len: int, vocab_size: int) -> Sample:
    pairs = data.num_pairs
    _need(seq_len, 4 * pairs, "train.seq_len", f"for mqar with num_pairs {pairs}")
    _need(vocab_size, 2 * pairs + 2, "vocab_size", f"for mqar with num_pairs {pairs}")
    half = vocab_size // 2  # 0: blank; 1 .. half-1: keys; half .. vocab_size-1: values
    slots = (seq_len - 2 * pairs) // 2
    weights = np.arange(1, slots + 1) ** (_DISTANCE_POWER - 1)
    weights /= weights.sum()

    def sample(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        keys = rng.permutation(half - 1)[:pairs] + 1
        values = rng.integers(half, vocab_size, pairs)
        inputs = np.full(seq_len, BLANK)
        inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2] = keys, values
        at = 2 * pairs + 2 * rng.choice(slots, pairs, replace=False, p=weights)
        labels = np.full(seq_len, IGNORE)
        inputs[at], labels[at] = keys, values
        return inputs, labels

    return sample


def _selective_copy(data: DataSection, seq_len: int, vocab_size: int) -> Sample:
    count = data.num_copied
    _need(seq_len, 2 * count, "train.seq_len", f"for selective_copy with num_copied {count}")
    _need(vocab_size, 4, "vocab_size", "for selective_copy")

    def sample(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        tokens = rng.integers(2, vocab_size, count)
        inputs, labels = np.full(seq_len, BLANK), np.full(seq_len, IGNORE)
        inputs[np.sort(rng.permutation(seq_len - count)[:count])] = tokens
        inputs[-count:], labels[-count:] = MARKER, tokens
        return inputs, labels

    return sample


def _induction(data: DataSection, seq_len: int, vocab_size: int) -> Sample:
    _need(seq_len, 3, "train.seq_len", "for induction")
    _need(vocab_size, 3, "vocab_size", "for induction")

    def sample(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        inputs, labels = rng.integers(1, vocab_size, seq_len), np.full(seq_len, IGNORE)
        at = rng.integers(0, seq_len - 2)
        inputs[at] = inputs[-1] = TRIGGER
        labels[-1] = inputs[at + 1]
        return inputs, labels

    return sample


def _needle(data: DataSection, seq_len: int, vocab_size: int) -> Sample:
    pairs = data.num_pairs
    _need(seq_len, 3 * pairs, "train.seq_len", f"for needle with num_pairs {pairs}")
    _need(vocab_size, 3 * pairs, "vocab_size", f"for needle with num_pairs {pairs}")
    third = vocab_size // 3  # 0 .. third-1: filler; third .. 2 third-1: keys; 2 third .. vocab_size-1: values

    def sample(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        keys = third + rng.permutation(third)[:pairs]
        values = rng.integers(2 * third, vocab_size, pairs)
        inputs, labels = rng.integers(0, third, seq_len), np.full(seq_len, IGNORE)
        at = np.sort(rng.permutation(seq_len - 2 * pairs)[:pairs]) + np.arange(pairs)  # two tokens each, then the keys
        inputs[at], inputs[at + 1] = keys, values
        asked = rng.permutation(pairs)
        inputs[-pairs:], labels[-pairs:] = keys[asked], values[asked]
        return inputs, labels

    return sample


def _state_tracking(data: DataSection, seq_len: int, vocab_size: int) -> Sample:
    items = data.num_items
    _need(vocab_size, math.factorial(items), "vocab_size", f"for state_tracking with num_items {items}")
    table = _products(items)

    def sample(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        inputs = rng.integers(0, len(table), seq_len)
        labels = list(itertools.accumulate(inputs.tolist(), lambda state, token: int(table[token, state])))
        return inputs, np.asarray(labels)

    return sample


@lru_cache
def _products(items: int) -> np.ndarray:
    """[n!, n!]: number of the permutation that does b and then a; the first one, 0, changes nothing."""
    permutations = np.array(list(itertools.permutations(range(items))))
    code = items ** np.arange(items)  # a permutation as one number
    order = np.argsort(permutations @ code)
    products = permutations[:, permutations] @ code  # [a, b, i]: a(b(i))
    return order[np.searchsorted((permutations @ code)[order], products)]
