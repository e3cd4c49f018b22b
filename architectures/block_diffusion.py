"""Block diffusion: a causal graph that fills in the tokens of a block in any order, one block after the other.

n tokens x_0 are cut into blocks of L. A share t of each block is replaced by MASK, the last token of the vocabulary;
[x_t ; x_0] go through the graph in one pass (`TwoCopies`), so that block b is read off x_t given the clean blocks
before it. With m_i = 1 where token i is masked and c_i = -log p(x_i | x_t in i's block, x_0 in the blocks before):

bd3        sum_i m_i c_i / t, a bound on -log p(x_0), equal to it for L = 1; MASK has no probability; a token is
           predicted in its own place (BD3-LM, arXiv:2503.09573)
fast_dllm  sum_i c_i over both masks m and 1 - m, so that each token counts once; clean and noisy logits at i - 1
           predict token i, as in the autoregressive model that is adapted (Fast-dLLM v2, arXiv:2509.26328)
nbdiff     sum_i m_i c_i / t, shifted likewise, and the next-token loss of the clean copy, whose tokens see no later
           one: it stays the autoregressive model (NBDiff, arXiv:2512.06776; its training code is not public: the
           weight 1 / t of the masked loss and the default weight 1 of the other are reconstructed)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.architectures.causal_lm import CausalLM, ModelState, check_request, draw
from zoo.architectures.model import evaluating
from zoo.blocks.kv_cache import KVCache
from zoo.contract import Block, Cost, Mode, positions_from
from zoo.errors import ConfigError
from zoo.graph.nodes import Leaf
from zoo.graph.spec import Graph
from zoo.kernels.attention import TwoCopies
from zoo.sections import DiffusionSection


@dataclass(frozen=True)
class Recipe:
    """What a published system trains and how it samples."""

    shift: bool  # the logits at i - 1 are those of token i
    weighted: bool  # a masked token counts 1 / t
    complementary: bool  # every row is read with its mask and with the opposite one
    causal_context: bool  # clean tokens see no later ones of their block, and learn to predict the next token
    threshold: float  # tokens that are surer than this are taken at once
    reuse: bool  # keys and values of the tokens outside the active sub-block are kept from its first pass


RECIPES = {
    "bd3": Recipe(False, True, False, False, math.inf, False),
    "fast_dllm": Recipe(True, False, True, False, 0.9, True),
    "nbdiff": Recipe(True, True, False, True, 0.9, False),
}


@dataclass
class Sampler:
    """How a block is filled: a pass over it, then every open token whose probability is above `threshold` is taken
    and always the surest one; with a `sub_block`, so many tokens first, then the next so many. `reuse`: only the
    first pass over a sub-block runs over the whole block, later ones over the sub-block alone, the rest of the
    block being seen as that first pass left it."""

    threshold: float
    sub_block: int
    reuse: bool


class BlockDiffusionLM(CausalLM):
    """A `CausalLM` whose configuration has a `diffusion:` section. `model(tokens)` stays the causal forward;
    `losses` are what is trained, `generate` and `stream` sample by diffusion as `sampler` says."""

    chunked_loss: ClassVar[bool] = False  # `losses` take all logits
    rows: ClassVar[bool] = False  # a noisy and a clean copy of the row stand one behind the other

    def __init__(self, graph: Graph, *, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__(graph, device=device, dtype=dtype)
        section = DiffusionSection.from_mapping(graph.document["diffusion"])
        self.recipe, self.block_size, self.ar_weight = RECIPES[section.recipe], section.block_size, section.ar_weight
        self.mask_token = self.vocab_size - 1
        threshold = self.recipe.threshold if section.threshold is None else section.threshold
        self.sampler = Sampler(threshold, section.sub_block or section.block_size, self.recipe.reuse)

    # ------------------------------------------------------------------------------------- training
    def losses(
        self, tokens: Tensor, noise: Tensor, doc_ids: Tensor | None = None, block_size: int | None = None
    ) -> Tensor:
        """The recipe's loss [B, n] of each token, in nats; their sum is that of the row.

        tokens, doc_ids: [B, n], n whole blocks. noise: [B, n], the rate at which a token was masked, 0 where it
        was not. block_size: in place of the model's. The first token of a row has no logits in a shifted recipe, and
        no loss.
        """
        masked, rows = noise > 0, len(tokens)
        if self.recipe.complementary:
            masked = torch.cat([masked, ~masked])
            tokens = torch.cat([tokens, tokens])
            doc_ids = None if doc_ids is None else torch.cat([doc_ids, doc_ids])
        noisy, clean = self.two_copies(tokens, masked, doc_ids, block_size)
        loss = nats(self.logits_of(noisy), tokens)
        if self.recipe.weighted:
            loss = loss / noise.to(loss.dtype).masked_fill(~masked, 1)
        loss = loss.masked_fill(~masked, 0)
        if self.recipe.complementary:
            loss = loss[:rows] + loss[rows:]
        if self.recipe.causal_context:
            loss = loss + self.ar_weight * nats(self.logits_of(clean), tokens)
        return F.pad(loss[:, 1:], (1, 0)) if self.recipe.shift else loss

    def two_copies(
        self, tokens: Tensor, masked: Tensor, doc_ids: Tensor | None = None, block_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The normed stream [B, n, D] of the noisy copy, whose tokens are hidden where `masked`, and of the clean."""
        positions = positions_from(doc_ids, tokens.shape[0], tokens.shape[1], tokens.device)
        both = torch.cat([tokens.masked_fill(masked, self.mask_token), tokens], 1)
        copies = TwoCopies(block_size or self.block_size, self.recipe.causal_context, doc_ids)
        noisy, clean = self.hidden(both, doc_ids=copies, positions=torch.cat([positions, positions], 1)).chunk(2, 1)
        return noisy, clean

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] of the token in each place; meaningless in the first where logits are shifted."""
        logits = self.head(hidden)
        return torch.cat([logits[:, :1], logits[:, :-1]], 1) if self.recipe.shift else _without_mask(logits)

    # ----------------------------------------------------------------------------------------- cost
    def trained_tokens(self, batch_size: int, seq_len: int) -> int:
        return 2 * self._rows(batch_size) * seq_len

    def _rows(self, batch_size: int) -> int:
        return batch_size * (2 if self.recipe.complementary else 1)

    def scored_tokens(self, batch_size: int, seq_len: int) -> int:
        # the clean copy is read out where it learns to predict the next token
        return self._rows(batch_size) * seq_len * (2 if self.recipe.causal_context else 1)

    def leaves(self, batch_size: int, seq_len: int, context_len: int, mode: Mode) -> Iterator[Leaf]:
        """In training those of a pass over both copies; else of the causal model, which a step of sampling is."""
        if mode != "train":
            yield from super().leaves(batch_size, seq_len, context_len, mode)
            return
        where = self._rows(batch_size)
        once, both = (super(BlockDiffusionLM, self).leaves(where, n, 0, mode) for n in (seq_len, 2 * seq_len))
        for one, two in zip(once, both, strict=True):
            cost = self._of_copies(one.cost, two.cost, seq_len)
            if isinstance(getattr(two.module, "block", None), Block):
                whole = super().pass_cost(two.module, where, 2 * seq_len)
                calls = two.cost.activation_bytes / whole.activation_bytes
                cost += self._kept_of_copies(two.module, where, seq_len, calls)
            yield replace(two, cost=cost)

    def pass_cost(self, node: Any, batch_size: int, seq_len: int) -> Cost:
        where = self._rows(batch_size)
        once, both = (super(BlockDiffusionLM, self).pass_cost(node, where, n) for n in (seq_len, 2 * seq_len))
        return self._of_copies(once, both, seq_len) + self._kept_of_copies(node, where, seq_len, 1.0)

    def _kept_of_copies(self, node: Any, rows: int, n: int, calls: float) -> Cost:
        """What so many calls of a block keep of the copies beyond what they would of a row of 2 n tokens."""
        more = node.block.copies_elements(rows, n, self.recipe.causal_context)
        kept, products = (round(calls * elements * node.block.itemsize) for elements in more)
        return Cost(bytes_read=kept, bytes_written=kept, activation_bytes=kept, product_bytes=products)

    def _of_copies(self, one: Cost, two: Cost, n: int) -> Cost:
        """From what a causal row of n tokens takes, and one of 2 n. What grows with the square are pairs: executed are
        all n^2 for either copy against the clean one, and n L inside the noisy blocks."""
        L, before = self.block_size, n * (n - self.block_size) / 2  # pairs with clean blocks before the own one
        clean = n * (n + 1) / 2 if self.recipe.causal_context else before + n * L
        share = (clean + before + n * L - n * (n + 1)) / n**2
        return two.replace(
            flops=2 * one.flops + round((two.flops - 2 * one.flops) * L / (2 * n)),
            useful_flops=2 * one.useful_flops + round((two.useful_flops - 2 * one.useful_flops) * share),
            vector_flops=2 * one.vector_flops + round((two.vector_flops - 2 * one.vector_flops) * share),
        )

    def ends(self, batch_size: int, seq_len: int, mode: Mode) -> Iterator[Leaf]:
        if mode != "train":
            yield from super().ends(batch_size, seq_len, mode)
            return
        rows = self._rows(batch_size)
        *around, _ = super().ends(rows, 2 * seq_len, mode)
        yield from around
        *_, head = super().ends(1, self.scored_tokens(batch_size, seq_len), mode)
        yield head

    # ------------------------------------------------------------------------------------- sampling
    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """The new tokens of `generate`, one [B, 1] at a time; they come by whole blocks. Blocks are counted from
        the beginning of the row, as in training, so the prompt's last tokens may lie in the first block."""
        check_request(tokens, max_new_tokens, temperature)
        if self.block_size % self.sampler.sub_block:
            raise ConfigError(f"sub_block={self.sampler.sub_block} must divide block_size={self.block_size}")
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        (B, given), L = tokens.shape, self.block_size
        stop = given + max_new_tokens
        size = -(-stop // L) * L
        row = F.pad(tokens, (0, size - given), value=self.mask_token)
        unknown = (torch.arange(size, device=tokens.device) >= given).repeat(B, 1)
        state, done = self.init_state(B, size), 0
        for start in range(given // L * L, size if max_new_tokens else 0, L):
            with evaluating(self):
                if start:
                    last = self._run(state, row[:, done:start], done, 1 if self.recipe.causal_context else L)[:, -1:]
                    if self.recipe.shift and start >= given:  # the finished text predicts the block's first token
                        logits = _without_mask(self.head(last))
                        row[:, start : start + 1], _ = draw(logits, temperature, top_k, generator)
                        unknown[:, start] = False
                self._fill(state, row, unknown, start, temperature, top_k, generator)
            for i in range(max(start, given), min(start + L, stop)):
                yield row[:, i : i + 1].clone()
            done = start

    def _fill(
        self, state: ModelState, row: Tensor, unknown: Tensor, start: int, temperature: float, top_k: int | None,
        generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        """Decide the unknown tokens of the block at `start`, given the blocks before it in `state`."""
        how, L = self.sampler, self.block_size
        for first in range(start, start + L, how.sub_block):
            part, seen = slice(first, first + how.sub_block), False
            while unknown[:, part].any():
                # shifted logits of the sub-block's first token come from the token before it
                alone = how.reuse and seen and not (self.recipe.shift and unknown[:, first].any())
                if alone:
                    logits = self.logits_of(self._run(state, row[:, part], first, L))
                else:
                    whole = self._run(state, row[:, start : start + L], start, L)
                    logits = self.logits_of(whole)[:, first - start : first - start + how.sub_block]
                seen = True
                tokens, sure = draw(_without_mask(logits), temperature, top_k, generator)
                order = sure
                if temperature and how.threshold == math.inf:
                    # first-hitting: whichever token the reverse process unmasks next, all are equally likely
                    order = torch.rand(sure.shape, generator=generator, device=sure.device)
                best = order.masked_fill(~unknown[:, part], -1).argmax(-1, keepdim=True)
                take = (sure > how.threshold).scatter(1, best, True) & unknown[:, part]
                row[:, part] = torch.where(take, tokens, row[:, part])
                unknown[:, part] &= ~take

    def _run(self, state: ModelState, tokens: Tensor, at: int, block: int) -> Tensor:
        """The normed stream of tokens that stand from `at` on in each row; each sees all of its block."""
        for part in state.walk():
            if isinstance(part, KVCache):
                part.rewind(at)
                part.block = block
            elif isinstance(seen := getattr(part, "seen", None), Tensor):
                seen.fill_(at)
        return self.hidden(tokens, state)


def nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p [B, T] of tokens under logits [B, T, V]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


def _without_mask(logits: Tensor) -> Tensor:
    return F.pad(logits[..., :-1], (0, 1), value=-math.inf)
