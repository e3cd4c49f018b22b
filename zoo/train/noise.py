"""Rows for block diffusion: which tokens are masked, and at which rate.

Like everything about a row the noise is a function of (seed, index of the row), so a run's losses depend neither on
how it is cut into pieces nor on where it was resumed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from zoo.architectures.block_diffusion import RECIPES
from zoo.architectures.model import evaluating
from zoo.sections import DiffusionSection
from zoo.train.evaluate import ALL, Share
from zoo.train.loader import Row, Rows
from zoo.train.synthetic import IGNORE

# ranges of rates, in twentieths
RANGES = [(low / 20, (low + width) / 20) for width in (10, 12, 14, 16, 18) for low in range(21 - width)]


class NoisyRows:
    """The rows of `rows` with `noise`: at each token the rate at which it was masked, 0 where it was not.

    The rates of the blocks of `group` consecutive rows (a batch) lie one in each of as many equal parts of
    diffusion.clip, in random order: evenly spread rates make the loss of a batch vary less. Labels become the
    tokens of the row itself, IGNORE where nothing is scored. `steps` groups go through diffusion.curriculum.
    `split` 0 is for training.

    `counted`: of each block 1, 2, .. or all tokens are masked, each number equally often, and the rate is their
    share. sum_masked -log p / rate has the same expectation as over rates drawn from 0 to 1, and less variance: the
    weights of a block add up to its size.
    """

    def __init__(
        self,
        rows: Rows,
        diffusion: DiffusionSection,
        seed: int,
        group: int,
        steps: int = 1,
        split: int = 0,
        counted: bool = False,
    ):
        self.rows, self.group, self.seed, self.steps, self.split = rows, group, seed, steps, split
        self.counted = counted
        self.blocks = (*diffusion.curriculum, diffusion.block_size)
        self.clip = diffusion.clip  # `search_clip` may find a better one
        self.first_scored = not RECIPES[diffusion.recipe].shift
        self._shares = lru_cache(maxsize=2)(self._shares_of)

    def _random(self, index: int, what: int) -> np.random.Generator:
        counter = np.array([0, what, index, self.split], np.uint64)
        return np.random.Generator(np.random.Philox(key=[self.seed, 1], counter=counter))

    def _shares_of(self, group: int, blocks: int) -> np.ndarray:
        rng, cells = self._random(group, 0), self.group * blocks
        return ((rng.permutation(cells) + rng.random(cells)) / cells).reshape(self.group, blocks)

    def block(self, index: int) -> int:
        """Block size of a row."""
        stage = index // self.group * len(self.blocks) // self.steps
        return self.blocks[min(stage, len(self.blocks) - 1)]

    def rates(self, index: int, blocks: int) -> np.ndarray:
        """The rate of each block of a row."""
        share = self._shares(index // self.group, blocks)[index % self.group]
        if self.counted:
            block = self.block(index)
            return np.ceil((1 - share) * block) / block
        low, high = self.clip
        return low + (high - low) * share

    def row(self, index: int) -> Row:
        """Row of a global index."""
        inputs, next_tokens, doc_ids, *_ = self.rows.row(index)
        known, block = next_tokens != IGNORE, self.block(index)
        tokens = inputs.astype(np.int64)
        tokens[1:] = np.where(known[:-1], next_tokens[:-1], tokens[1:])  # behind the text's end stands its last token
        scored = np.concatenate([known[:1] & self.first_scored, known[:-1]])
        rates = np.repeat(self.rates(index, len(tokens) // block), block)
        place = self._random(index, 1).random(len(tokens))
        if self.counted:  # the place of each token among those of its block
            place = place.reshape(-1, block).argsort().argsort().flatten() / block
        masked = place < rates
        return Row(tokens, np.where(scored, tokens, IGNORE), doc_ids, np.where(masked, rates, 0), block)


def search_clip(model: Any, rows: NoisyRows, count: int, size: int, share: Share = ALL) -> tuple[float, float]:
    """The range of rates over which the loss of a block varies least: all, or one 0.5 to 0.9 wide.

    Every token counts once in expectation whatever the range, so narrowing it costs no bias of the weights. rows:
    of all rates, of which the first `count` are read in batches of `size`, by this process its `share`. (The released
    code also draws a mask again where the share that it hides lies outside of the range; that does bias them, and is
    not done here.)
    """
    device = next(model.parameters()).device
    losses = torch.zeros(count, len(rows.row(0).inputs) // model.block_size, device=device)
    with evaluating(model):
        for first in range(0, count, size):
            mine, part = share.of(rows, first, min(first + size, count))
            part = part.to(device)
            loss = model.losses(part.inputs, part.noise, part.doc_ids).masked_fill(part.labels == IGNORE, 0)
            losses[mine.start : mine.stop] = loss.unflatten(1, (-1, model.block_size)).mean(-1)[: len(mine)]
    share.reduce(losses)
    drawn = np.concatenate([rows.rates(i, losses.shape[1]) for i in range(count)])
    loss = losses.flatten().cpu().numpy()

    def variance(clip: tuple[float, float]) -> float:
        inside = loss[(drawn >= clip[0]) & (drawn <= clip[1])]
        return float(inside.var()) if len(inside) > 1 else np.inf

    lowest, highest = rows.clip
    return min([(lowest, highest), *((max(low, lowest), high) for low, high in RANGES)], key=variance)
