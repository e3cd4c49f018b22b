"""Blocks of fixed length. Block Transformer, Ho et al. 2024, arXiv:2406.02657.

    e_b = [W_e x_{bL}; ..; W_e x_{bL+L-1}],  c_b = main(e_0 .. e_b)
    decoder on each block alone: [W_p c_{b-1} as k prefix tokens, x_{bL}, .., x_{bL+L-2}]
The output of the last prefix stands at the token before the block (it predicts the block's first token), the
output of x_t at t. So the last token of a block reaches later tokens through c_b only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.contract import State, init_linear_, positions_from
from zoo.graph.hierarchy import Calls, Chunker
from zoo.graph.nodes import Node
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import PositiveInt


@dataclass
class FixedState(State):
    """States of both parts, the tokens [B, L, D] of the block that is not complete yet, and the tokens seen [B].
    The decoder's state is that of one block: it is emptied when the next one begins."""

    main: State
    decoder: State
    tokens: Tensor
    seen: Tensor


@register(
    "fixed_chunks",
    kind="chunker",
    paper="arXiv:2406.02657",
    note="with packed documents the number of blocks follows from the data: torch.compile breaks the graph there",
)
class FixedChunks(Chunker):
    """Blocks of `length` tokens, as in Block Transformer: a block decoder gives each next block its context.

    Embedder: W_e maps each token to width / length channels, and a block is their concatenation. The paper's
    lookup has a table of its own for this; here W_e reads the stream, so a product of the token table and W_e
    takes that table's place. The context of block b becomes `prefixes` tokens in front of block b + 1, whose
    tokens the decoder sees, and no others. The first block has a learned context where the released code pads
    prompts on the left. Each document begins with a block of its own. Streaming, the main network moves on when
    a block is complete; its state holds 1 / length of the tokens, the decoder's one block.
    Useful: the embedder on the tokens of whole blocks, a context's map for each block and one before the first; the
    main network on T / length blocks, the decoder on prefixes + length - 1 tokens for each.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: PositiveInt | None = None,
        length: PositiveInt = 4,
        prefixes: PositiveInt = 2,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, width or dim)
        if self.width % length:
            raise ValueError(f"length={length} must divide the width of the block embeddings, {self.width}")
        self.length, self.prefixes = length, prefixes
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed = Linear(dim, self.width // length, bias=False, **factory)
        self.first = nn.Parameter(torch.empty(self.width, **factory))
        self.prefix_proj = Linear(self.width, prefixes * dim, **factory)

    @property
    def assumption(self) -> str:
        return f"one in {self.length} decoded tokens completes a block"

    def reset_parameters(self) -> None:
        init_linear_(self.embed)
        init_linear_(self.prefix_proj)
        nn.init.normal_(self.first, std=0.02)

    def extra_repr(self) -> str:
        return f"width={self.width}, length={self.length}, prefixes={self.prefixes}"

    def forward(self, x, main, decoder, state: FixedState | None, positions, doc_ids):
        if state is not None:
            return self._stream(x, main, decoder, state)
        rows, tokens, dim = x.shape
        if doc_ids is None:
            blocks = tokens // self.length + 1  # the last one may be empty: its prefix is read by the token before it
            grid = F.pad(x, (0, 0, 0, blocks * self.length - tokens)).view(rows, blocks, self.length, dim)
            return self._on_grid(grid, main, decoder, None)[:, 1 : tokens + 1]
        index, blocks = self._places(doc_ids)
        grid = x.new_zeros(rows, blocks * self.length, dim).scatter(1, index[..., None].expand_as(x), x)
        ids = doc_ids.new_full((rows, blocks), -1).scatter(1, index // self.length, doc_ids)
        # a document that fills its last block has one more, which holds no token
        empty = (index + 1) // self.length
        ids = ids.scatter(1, empty, doc_ids)
        y = self._on_grid(grid.view(rows, blocks, self.length, dim), main, decoder, ids)
        return y.gather(1, (index + 1)[..., None].expand_as(x))

    def _places(self, doc_ids: Tensor) -> tuple[Tensor, int]:
        """Slot [B, T] of each token where every document begins a block, and the number of blocks."""
        rows, tokens = doc_ids.shape
        within = positions_from(doc_ids, rows, tokens, doc_ids.device)
        # the slots of a document of n tokens: (n // L + 1) L, known at its last token
        last = torch.ones_like(doc_ids, dtype=torch.bool)
        last[:, :-1] = doc_ids[:, 1:] != doc_ids[:, :-1]
        slots = torch.where(last, ((within + 1) // self.length + 1) * self.length, 0)
        ends = slots.cumsum(1)
        return ends - slots + within, int(ends[:, -1].max()) // self.length

    def _on_grid(self, grid: Tensor, main: Node, decoder: Node, ids: Tensor | None) -> Tensor:
        """Outputs [B, blocks * L, D] for tokens [B, blocks, L, D]; slot i holds what stands at token i - 1."""
        context = self.first.repeat(len(grid), 1, 1)
        if grid.shape[1] > 1:
            known = main(self._embed(grid[:, :-1]), doc_ids=None if ids is None else ids[:, :-1])
            if ids is not None:
                known = torch.where((ids[:, 1:] == ids[:, :-1])[..., None], known, self.first)
            context = torch.cat([context, known], 1)
        return self._decode(context, grid[:, :, : self.length - 1], decoder)

    def _embed(self, blocks: Tensor) -> Tensor:
        return self.embed(blocks).flatten(2)

    def _decode(self, context: Tensor, tokens: Tensor, decoder: Node, state: State | None = None) -> Tensor:
        """[B, n * (1 + m), D]: for n blocks with context [B, n, width] and tokens [B, n, m, D], the outputs of the
        last prefix and of the tokens."""
        rows, count = context.shape[:2]
        prefix = self.prefix_proj(context).unflatten(-1, (self.prefixes, self.dim))
        inputs = torch.cat([prefix, tokens], 2).flatten(0, 1)  # a block is a row of its own
        y = decoder(inputs, state=state)[:, self.prefixes - 1 :]
        return y.unflatten(0, (rows, count)).flatten(1, 2)

    # ---------------------------------------------------------------------------------- streaming
    def _stream(self, x: Tensor, main: Node, decoder: Node, state: FixedState) -> Tensor:
        # rows at the same place of their block go together; those that begin have no context yet
        place = torch.where(state.seen == 0, -1, state.seen % self.length)
        y = torch.empty_like(x)
        for value in place.unique().tolist():
            rows = (place == value).nonzero().squeeze(1)
            if len(rows) == len(x):
                return self._stream_aligned(x, main, decoder, state, value)
            part = state.rows(rows)
            y[rows] = self._stream_aligned(x[rows], main, decoder, part, value)
            state.put_rows(rows, part)
        return y

    def _stream_aligned(self, x: Tensor, main: Node, decoder: Node, state: FixedState, place: int) -> Tensor:
        length, here = self.length, max(place, 0)
        tokens = torch.cat([state.tokens[:, :here], x], 1)
        complete, rest = divmod(tokens.shape[1], length)
        parts = []
        head = x[:, : max(0, length - 1 - here)]  # of the block that is open already
        if head.shape[1] and place < 0:
            first = self.first.repeat(len(x), 1, 1)
            parts.append(self._decode(first, head[:, None], decoder, state.decoder)[:, 1:])
        elif head.shape[1]:
            parts.append(decoder(head, state=state.decoder))
        if complete:
            blocks = tokens[:, : complete * length].unflatten(1, (complete, length))
            context = main(self._embed(blocks), state=state.main)
            if complete > 1:
                parts.append(self._decode(context[:, :-1], blocks[:, 1:, :-1], decoder))
            state.decoder.reset()
            tail = tokens[:, None, complete * length :]
            parts.append(self._decode(context[:, -1:], tail, decoder, state.decoder))
        state.tokens[:, :rest] = tokens[:, complete * length :].detach()
        state.seen += x.shape[1]
        return torch.cat(parts, 1)

    def init_state(self, main, decoder, batch_size, max_len):
        like = self.embed.weight
        return FixedState(
            main.init_state(batch_size, None if max_len is None else max(1, max_len // self.length)),
            decoder.init_state(batch_size, self.prefixes + self.length - 1),
            like.new_zeros(batch_size, self.length, self.dim),
            torch.zeros(batch_size, dtype=torch.int64, device=like.device),
        )

    def calls(self, batch_size, seq_len, context_len, decode):
        inside = self.prefixes + self.length - 1
        if decode:
            # one in `length` tokens completes a block and runs the prefixes, the others themselves
            main = Calls(batch_size, 1, max(1, (context_len + seq_len) // self.length) - 1, seq_len / self.length)
            return main, Calls(batch_size, 1, inside - 1, seq_len * inside / self.length)
        main = Calls(batch_size, max(1, seq_len // self.length), context_len // self.length)
        return main, Calls(batch_size * (seq_len // self.length + 1), inside, 0, rows=batch_size)  # of the open block

    def forward_flops(self, batch_size, seq_len, decode):
        whole = seq_len // self.length
        embedded, contexts = (seq_len, seq_len / self.length) if decode else (whole * self.length, whole + 1)
        maps = embedded * self.embed.weight.numel() + contexts * self.prefix_proj.weight.numel()
        return round(2 * batch_size * maps)

    def activation_elements(self, batch_size, seq_len):
        # the tokens of whole blocks as they are embedded, and the context of each block
        whole = seq_len // self.length
        return batch_size * (whole * self.length * self.dim + (whole + 1) * self.width)

    def state_bytes(self, batch_size):
        return batch_size * (self.length * self.dim * self.embed.weight.element_size() + 8)
