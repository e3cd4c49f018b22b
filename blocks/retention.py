"""Multi-scale retention (RetNet): rotated linear attention with one fixed decay per head. Sun et al. 2023,
arXiv:2307.08621."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.blocks.grafting import take
from zoo.blocks.linear_mixer import LinearMixer
from zoo.blocks.recurrent import LinearState
from zoo.contract import State, own_part, positions_from
from zoo.kernels import work
from zoo.kernels.rope import rope
from zoo.registry import register
from zoo.schema import Fraction, PositiveFloat, PositiveInt


@dataclass
class RetentionState(LinearState):
    """memory and, per row, the position of the next token [B]."""

    position: Tensor


@register(
    "retention",
    kind="mixer",
    paper="arXiv:2307.08621",
    ops=("linear_attention", "rope"),
    state_growth="constant",
    relations=(
        "retention(decay=1.0, rotary=False) == linear_attention(num_heads=8, head_dim=8, value_head_dim=16, "
        "feature_map='identity', normalize=False, output_norm=True, output_gate=True)",
        "retention(decay=1.0, rotary=False, expand_v=1.0, num_heads=4) == gla(gate='none', expand_k=1.0)",
    ),
    examples=(
        {"chunk_size": 16},
        {"num_heads": 2, "expand_v": 1.0, "decay": 0.9, "output_gate": False, "chunk_size": 16},
        {"rotary": False, "chunk_size": 24},
    ),
)
class Retention(LinearMixer):
    """Multi-scale retention: S_t = gamma_h S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(Dk).

    gamma_h = 1 - 2^(-5-h), or `decay` for all heads; q and k are rotated by n * 10000^(-i / (Dk/2 - 1)) in
    neighbouring pairs; y = W_o (RMSNorm_head(o) * silu(W_g x)). Value width is expand_v D.
    x: [B, T, D] -> y: [B, T, D]; time O(T), state H Dk Dv = expand_v D^2 / H numbers and a position.
    With decay 1 and no rotation it is linear attention.
    Useful: 4 Dk Dv FLOPs a head and token, and Dk Dv products with the decay.
    """

    decay_kind = "head"

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt = 8,
        expand_v: PositiveFloat = 2.0,
        decay: Fraction | None = None,
        rotary: bool = True,
        output_gate: bool = True,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        value_dim = int(dim * expand_v)
        if dim % num_heads or value_dim < num_heads or value_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim = {dim} and expand_v * dim = {value_dim}")
        if rotary and dim // num_heads % 2:
            raise ValueError(f"rotary needs an even dim / num_heads, got {dim // num_heads}: set rotary=False")
        super().__init__(
            dim,
            num_heads,
            dim // num_heads,
            value_dim // num_heads,
            output_norm=True,
            output_gate=output_gate,
            chunk_size=chunk_size,
            kernel=kernel,
            device=device,
            dtype=dtype,
        )
        self.decay, self.rotary = decay, rotary
        # 10000^(-i / (Dk/2 - 1)), the paper's spacing, is rope's base^(-2i / Dk) for this base
        self.rope_base = 10000.0 ** (self.key_dim / max(self.key_dim - 2, 1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for linear in self.projections():
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight, gain=2**-1 if linear is self.o_proj else 2**-2.5)

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """As every linear attention; channels that rotate together, which come half a head apart, are neighbours."""
        taken = super().from_attention(q, k, v, o)
        if not self.rotary or len(q) != self.dim or len(k) != self.dim:
            return taken
        q, k = (t.unflatten(0, (self.num_heads, 2, -1)).transpose(1, 2).flatten(0, 2) for t in (q, k))
        return taken + take(("q_proj.weight", self.q_proj.weight, q), ("k_proj.weight", self.k_proj.weight, k))

    def features(
        self, q: Tensor, k: Tensor, state: RetentionState | None, positions: Tensor | None, doc_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        B, T = q.shape[:2]
        if positions is None:
            positions = positions_from(doc_ids, B, T, q.device)
            if state is not None:
                positions = positions + state.position[:, None]
        if state is not None:
            state.position.copy_(positions[:, -1] + 1)
        if not self.rotary:
            return q, k
        q, k = (rope(t, positions, base=self.rope_base, interleaved=True) for t in (q, k))
        return q, k

    def token_elements(self) -> int:
        return 2 * self.key_dim * self.rotary  # cos and sin for q and for k

    def log_decay(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        heads = own_part(torch.arange(self.num_heads, device=x.device, dtype=dtype))
        if self.decay is not None:
            return torch.full_like(heads, self.decay).log()
        return torch.log1p(-torch.exp2(-5 - heads))

    @property
    def key_work(self) -> int:
        return 2 * work.ROPE * self.key_dim if self.rotary else 0

    def init_state(self, batch_size: int, max_len: int | None = None) -> State:
        memory = self.new_memory(batch_size)
        return RetentionState(memory, memory.new_zeros(batch_size, dtype=torch.int64))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return super().state_bytes(batch_size, max_len) + batch_size * torch.int64.itemsize
