"""JRT-RNN: prefix linear attention, which reads its prefix without a causal mask first. Arora et al. 2024,
arXiv:2407.05483."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.blocks.based import Based, taylor_features
from zoo.blocks.grafting import take
from zoo.blocks.recurrent import previous
from zoo.contract import ParallelPlan, State, linear_flops, positions_from, refuse_packed_streaming
from zoo.kernels.linear import Linear
from zoo.kernels.linear_attention import linear_attention
from zoo.kernels.precision import no_autocast
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveInt
from zoo.segments import handed_on


@dataclass
class PrefixState(State):
    """memory: [B, H, features, d + 1], encoder included; length: [B] int64, tokens seen."""

    memory: Tensor
    length: Tensor


@register(
    "jrt",
    kind="mixer",
    paper="arXiv:2407.05483",
    ops=("linear_attention",),
    causal=False,
    state_growth="constant",
    relations=("jrt(prefix_len=0) == based()",),
    examples=(
        {"num_heads": 4, "feature_dim": 8, "prefix_len": 12, "chunk_size": 16},
        {"num_heads": 2, "feature_dim": 4, "head_dim": 24, "prefix_len": 100, "chunk_size": 24},
    ),
    note="the tokens of the prefix see the whole prefix, so it must arrive in one segment and stay out of the loss",
)
class JRT(Based):
    """Prefix linear attention: `based` whose memory starts with an encoding of the whole prefix.

    E = sum_{j<M} phi(k^e_j) (v^e_j, 1), M = prefix_len, k^e and v^e by projections of their own;
    o_t = phi(q_t) (E + sum_{j<=t} phi(k_j) (v_j, 1)), then divided by its last column, as in `based`.
    Prefix tokens count twice, once without and once with the causal mask. A shorter sequence is all prefix; each
    document has its own. x: [B, T, D] -> y: [B, T, D]; from token M on y is causal.
    State: that of `based`, E folded in. Streaming: the prefix is what the first segment of a row holds of its
    first M tokens; segments after it may be cut anywhere. prefix_len = 0 is `based`.
    Useful: the work of `based`, and one more update of the state for each token of the prefix.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        feature_dim: PositiveInt = 16,
        head_dim: PositiveInt | None = None,
        prefix_len: NonNegativeInt = 1024,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(
            dim,
            num_heads=num_heads,
            feature_dim=feature_dim,
            head_dim=head_dim,
            chunk_size=chunk_size,
            kernel=kernel,
            device=device,
            dtype=dtype,
        )
        self.prefix_len, self.causal = prefix_len, prefix_len == 0
        self.k_e_proj = self.v_e_proj = None
        if prefix_len:
            self.k_e_proj = Linear(dim, self.k_proj.out_features, bias=False, device=device, dtype=dtype)
            self.v_e_proj = Linear(dim, self.v_proj.out_features, bias=False, device=device, dtype=dtype)

    def encoder(self) -> tuple[nn.Linear | None, ...]:
        """Linear layers that see the prefix alone."""
        return self.k_e_proj, self.v_e_proj

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """As `based`; the encoder's keys and values are those of the decoder."""
        taken = super().from_attention(q, k, v, o)
        if self.k_e_proj is None or self.v_e_proj is None:
            return taken
        keys = self.k_proj.weight if "k_proj.weight" in taken else k
        encoder = ("k_e_proj.weight", self.k_e_proj.weight, keys), ("v_e_proj.weight", self.v_e_proj.weight, v)
        return taken + take(*encoder)

    def projections(self) -> tuple[nn.Linear | None, ...]:
        return *super().projections(), *self.encoder()

    def forward(
        self,
        x: Tensor,
        *,
        state: PrefixState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        q, k, v = self._heads(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = taylor_features(q), taylor_features(k), self.values(v)
        options = {"chunk_size": self.chunk_size, "backend": self.kernel}
        if doc_ids is not None:
            o = self._packed(x, q, k, v, doc_ids, options)
        else:
            memory = None if state is None else previous(state.memory)
            if self.prefix_len:
                memory = self._encode(x[:, : self.prefix_len], state, memory)
            o, memory = linear_attention(q, k, v, initial_state=memory, **options)
            if state is not None:
                state.memory.copy_(handed_on(memory))
                state.length.add_(x.shape[1])
        return self.o_proj(self.read_out(o).to(x.dtype).flatten(-2))

    def _heads(self, x: Tensor, *layers: nn.Linear | None) -> list[Tensor]:
        widths = (self.key_dim,) * (len(layers) - 1) + (self.value_dim,)
        return [layer(x).unflatten(-1, (-1, width)) for layer, width in zip(layers, widths) if layer is not None]

    def _encoder_tokens(self, x: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """phi(k^e) and (v^e, 1) of x; zero where `counts` [B, T] or [B, 1] is false."""
        k, v = self._heads(x, *self.encoder())
        v = self.values(v)
        return taylor_features(k), v if counts is None else v * counts[..., None, None]

    def _encode(self, prefix: Tensor, state: PrefixState | None, memory: Tensor | None) -> Tensor:
        """Memory of the rows that start here: the encoded prefix; of the others: as it was."""
        k, v = self._encoder_tokens(prefix, None if state is None else (state.length == 0)[:, None])
        with no_autocast(prefix.device):
            encoded = k.permute(0, 2, 3, 1) @ v.transpose(1, 2)
        return encoded if memory is None else memory + encoded

    def _packed(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor, options: dict) -> Tensor:
        """Encoder tokens are keys in front of their document that no query belongs to: one row of 2 T tokens."""
        if not self.prefix_len:
            return linear_attention(q, k, v, doc_ids=doc_ids, **options)[0]
        B, T = doc_ids.shape
        order = positions_from(doc_ids, B, T, x.device)
        k_e, v_e = self._encoder_tokens(x, order < self.prefix_len)
        document = (order == 0).long().cumsum(1)
        place = torch.cat([2 * document, 2 * document + 1], 1).argsort(dim=1, stable=True)
        row = torch.arange(B, device=x.device)[:, None]
        q, k, v = (torch.cat(pair, 1)[row, place] for pair in ((torch.zeros_like(q), q), (k_e, k), (v_e, v)))
        o, _ = linear_attention(q, k, v, doc_ids=torch.cat([document, document], 1)[row, place], **options)
        return o[row, place.argsort(dim=1)[:, T:]]

    def init_state(self, batch_size: int, max_len: int | None = None) -> PrefixState:
        memory = self.new_memory(batch_size)
        return PrefixState(memory, torch.zeros(batch_size, dtype=torch.int64, device=memory.device))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return super().state_bytes(batch_size, max_len) + 8 * batch_size

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        flops = super().forward_flops(batch_size, seq_len, context_len, streaming)
        # the first prefix_len tokens of a segment go through the encoder, also where no row starts with it
        tokens, width = min(seq_len, self.prefix_len), self.memory_dim * (self.value_dim + 1)
        outside = linear_flops(batch_size * (seq_len - tokens), *self.encoder())
        return flops - outside + 2 * batch_size * tokens * self.num_heads * width

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        useful = super().useful_flops(batch_size, seq_len, context_len)
        # a row that continues has no prefix
        tokens = 0 if context_len else min(seq_len, self.prefix_len)
        outside = linear_flops(batch_size * (seq_len - tokens), *self.encoder())
        return useful - outside + 2 * batch_size * tokens * self.num_heads * self.memory_dim * (self.value_dim + 1)

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        kept = super().activation_elements(batch_size, seq_len)
        if self.prefix_len:
            # the prefix, twice where it is part of a row; its keys' factors and features, its values; what they add up
            # to
            tokens, value = min(seq_len, self.prefix_len), self.value_dim + self.value_extra
            head = 2 * (self.memory_dim - 1 - self.key_dim) + self.memory_dim + value
            token = self.num_heads * head + (2 * self.dim if tokens < seq_len else 0)
            kept += batch_size * (tokens * token + self.num_heads * self.memory_dim * value)
        return kept

    def parallel_plan(self) -> ParallelPlan:
        plan = super().parallel_plan()
        encoder = {"k_e_proj": "column", "v_e_proj": "column"} if self.prefix_len else {}
        return ParallelPlan({**plan.tensor, **encoder}, units=plan.units, context="gather_input")
