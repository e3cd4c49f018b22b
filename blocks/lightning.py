"""Lightning attention: linear attention with fixed decays that weaken with depth. TransNormerLLM (Qin et al. 2023,
arXiv:2307.14995), Lightning Attention-2 (arXiv:2401.04658), MiniMax-01 (arXiv:2501.08313)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.blocks.grafting import SMALL, value_scale
from zoo.blocks.norms import RMSNorm
from zoo.blocks.recurrent import LinearState, alibi_slopes, default_heads, previous
from zoo.contract import Block, ParallelPlan, State, init_linear_, linear_flops, refuse_packed_streaming, state_dtype
from zoo.kernels import work
from zoo.kernels.dispatch import check_backend
from zoo.kernels.linear import Linear
from zoo.kernels.linear_attention import INTERVAL, linear_attention
from zoo.kernels.linear_attention import flops as linear_attention_flops
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveInt
from zoo.segments import handed_on


@register(
    "lightning",
    kind="mixer",
    paper="arXiv:2501.08313",
    ops=("linear_attention",),
    state_growth="constant",
    examples=(
        {"chunk_size": 16},
        {"schedule": "paper", "num_heads": 2, "layer_index": 1, "num_layers": 4, "chunk_size": 16},
        {"num_heads": 6, "head_dim": 8, "layer_index": 2, "num_layers": 3, "chunk_size": 16},
    ),
)
class LightningAttention(Block):
    """Lightning attention: S_t = lambda_h S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, q, k, v = silu(W_qkv x).

    y = W_o (sigmoid(W_gate x) * RMSNorm(o)), the norm over all heads together, no 1/sqrt(D). With l the layer,
    L their number: schedule `alibi` (MiniMax) has log lambda_h = -2^(-8(h+1)/H) (1 - l/(L-1) + 1e-5),
    `paper` has log lambda_h = -(8h/H) (1 - l/L), whose head 0 never forgets. Rows of qkv_proj: per head q, k, v.
    x: [B, T, D] -> y: [B, T, D]; time O(T), state H Dh^2 numbers.
    As lambda -> 1 it is un-normalised linear attention on silu features.
    Useful: 4 H Dh^2 FLOPs a token for the state, and H Dh^2 products with the decay.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        schedule: Literal["alibi", "paper"] = "alibi",
        layer_index: NonNegativeInt = 0,
        num_layers: PositiveInt = 1,
        chunk_size: PositiveInt = 64,
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        check_backend("linear_attention", kernel)
        if layer_index >= num_layers:
            raise ValueError(f"layer_index={layer_index} must be below num_layers={num_layers}")
        self.num_heads = num_heads or default_heads(dim)
        self.head_dim = head_dim or max(dim // self.num_heads, 1)
        self.schedule, self.layer_index, self.num_layers = schedule, layer_index, num_layers
        self.chunk_size, self.kernel = chunk_size, kernel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = self.num_heads * self.head_dim
        self.qkv_proj = Linear(dim, 3 * inner, bias=False, **factory)
        self.output_gate = Linear(dim, inner, bias=False, **factory)
        self.norm = RMSNorm(inner, **factory)
        self.out_proj = Linear(inner, dim, bias=False, **factory)

    @torch.no_grad()
    def from_attention(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[str, ...]:
        """Take the maps of attention, each with the rows of all heads; rows of qkv_proj are q, k, v of each head, the
        values small, where SiLU is linear. The output gate starts as 1/2, which the norm makes up for."""
        if any(len(w) != len(self.norm.weight) for w in (q, k, v)):
            return ()
        parts = [w.unflatten(0, (self.num_heads, -1)) for w in (q, k, SMALL * v)]
        self.qkv_proj.weight.copy_(torch.cat(parts, 1).flatten(0, 1))
        self.output_gate.weight.zero_()
        self.norm.weight.copy_(2 * value_scale(v, len(v)))
        self.out_proj.weight.copy_(o)
        return "qkv_proj.weight", "out_proj.weight"

    def reset_parameters(self) -> None:
        for linear in (self.qkv_proj, self.output_gate, self.out_proj):
            init_linear_(linear)
        self.norm.reset_parameters()

    def log_decay(self, x: Tensor) -> Tensor:
        """log lambda [H]; formed here, so that no cast of the model rounds it."""
        if self.schedule == "alibi":
            return -alibi_slopes(self.num_heads, x) * (1 - self.layer_index / (self.num_layers - 1 + 1e-5) + 1e-5)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        heads = torch.arange(self.num_heads, device=x.device, dtype=dtype)
        return -8 * heads / self.num_heads * (1 - self.layer_index / self.num_layers)

    def forward(
        self,
        x: Tensor,
        *,
        state: LinearState | None = None,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        qkv = F.silu(self.qkv_proj(x)).unflatten(-1, (self.num_heads, 3 * self.head_dim))
        q, k, v = qkv.chunk(3, -1)
        o, memory = linear_attention(
            q,
            k,
            v,
            self.log_decay(x),
            initial_state=None if state is None else previous(state.memory),
            doc_ids=doc_ids,
            chunk_size=self.chunk_size,
            backend=self.kernel,
        )
        if state is not None:
            state.memory.copy_(handed_on(memory))
        return self.out_proj(self.output_gate(x).sigmoid() * self.norm(o.flatten(-2)))

    def init_state(self, batch_size: int, max_len: int | None = None) -> State:
        like = self.qkv_proj.weight
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        return LinearState(like.new_zeros(shape, dtype=state_dtype(like.dtype)))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        return batch_size * self.num_heads * self.head_dim**2 * state_dtype(self.qkv_proj.weight.dtype).itemsize

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        core = linear_attention_flops(
            batch_size, seq_len, self.num_heads, self.head_dim, self.head_dim, chunk_size=self.chunk_size
        )
        return linear_flops(batch_size * seq_len, self.qkv_proj, self.output_gate, self.out_proj) + core

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        tokens, D = batch_size * seq_len, self.head_dim
        state = work.recurrence(work.LINEAR, tokens, self.num_heads, D, D)
        return linear_flops(tokens, self.qkv_proj, self.output_gate, self.out_proj) + state

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        # silu of q, k and v; decay of the state; norm; output gate
        number = 3 * work.SILU + self.head_dim + work.RMS + work.SIGMOID + 1
        return batch_size * seq_len * self.num_heads * self.head_dim * number

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        # x; per head qkv before silu and as the op sees them, o before and after norm, gate; a state for each interval
        inner = self.num_heads * self.head_dim
        rows = self.dim + 11 * inner
        return batch_size * (seq_len * rows + -(-seq_len // INTERVAL) * inner * self.head_dim)

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            context="pass_state", reason="the norm before out_proj runs over all heads, so heads are not split"
        )
