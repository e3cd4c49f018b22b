"""Dynamic chunking of H-Net. Hwang, Wang, Gu 2025, arXiv:2507.07955.

p_t = (1 - cos(W_q x_{t-1}, W_k x_t)) / 2, p = 1 where a document begins;  a chunk begins where p_t >= 1/2
main network on the x_t that begin a chunk:  z_j
smoothing over chunks:  zbar_j = p_j z_j + (1 - p_j) zbar_{j-1}
y_t = ste(c_t) zbar_{chunk of t} + W_r x_t + b_r,  c_t = max(p_t, 1 - p_t), ste(c) = 1 with the gradient of c
ratio loss:  N/(N-1) ((N-1) F G + (1-F)(1-G)),  F = mean of boundaries, G = mean of p
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.contract import Pick, State, add_auxiliary_loss, mean_over_all, state_dtype
from zoo.graph.gather import run_picked
from zoo.graph.hierarchy import Calls, Chunker
from zoo.graph.nodes import Node
from zoo.kernels import work
from zoo.kernels.diagonal_scan import diagonal_scan
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import NonNegativeFloat, PositiveInt, Range
from zoo.segments import handed_on

_CLAMP = 1e-4  # the released smoothing keeps p inside [1e-4, 1 - 1e-4]


def wide(x: Tensor) -> Tensor:
    """x in fp32, fp64 where it is fp64."""
    return x.to(state_dtype(x.dtype))


@dataclass
class DynamicState(State):
    """The last encoder output x [B, D], the last smoothed chunk [B, D], and the tokens seen [B]."""

    main: State
    decoder: State
    last: Tensor
    smoothed: Tensor
    seen: Tensor


@dataclass
class _Chunks:
    """The main network on the outer stream: widened on entry, cut on exit."""

    main: Node
    pad: Tensor | None

    def increment(self, x, *, state: Any = None, positions=None, doc_ids=None):
        # chunks are counted anew: the main network's positions are those of chunks
        wider = x if self.pad is None else torch.cat([x, self.pad.expand(*x.shape[:-1], -1)], -1)
        return self.main(wider, state=state, doc_ids=doc_ids)[..., : x.shape[-1]]


@register(
    "dynamic_chunks",
    kind="chunker",
    paper="arXiv:2507.07955",
    ops=("diagonal_scan",),
    note="the number of chunks follows from the data: torch.compile breaks the graph there, torch.export refuses it",
)
class DynamicChunks(Chunker):
    """Dynamic chunking of H-Net: a chunk begins where neighbouring encoder outputs differ, p_t >= 1/2.

    The first token of a chunk enters the main network, widened by a learned vector to `width` channels; the
    results are smoothed by their boundary probabilities, held until the next chunk, and added to W_r x + b_r.
    `ratio` N: tokens a chunk that the ratio loss aims at and that predicted costs assume. W_q and W_k start as
    the identity, W_r, b_r and the learned vector as zero. As in the released code p is kept inside [1e-4, 1 - 1e-4] in
    the smoothing, so with a boundary everywhere and p = 1 this is the plain stack to 1e-4 only. Streaming, the
    main network and its state move on only where a chunk begins; its state grows with the chunks.
    Useful: 6 D^2 FLOPs a token; the main network is counted on T / ratio chunks.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: PositiveInt | None = None,
        ratio: Annotated[float, Range(gt=1)] = 6.0,
        ratio_coef: NonNegativeFloat = 0.03,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, width or dim)
        if self.width < dim:
            raise ValueError(f"width={width} must be at least the width of the stream around it, {dim}")
        self.ratio, self.ratio_coef = ratio, ratio_coef
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = Linear(dim, dim, bias=False, **factory)
        self.k_proj = Linear(dim, dim, bias=False, **factory)
        self.residual_proj = Linear(dim, dim, **factory)
        self.pad = nn.Parameter(torch.empty(self.width - dim, **factory)) if self.width > dim else None
        self.metrics: dict[str, Tensor] = {}

    @property
    def assumption(self) -> str:
        return f"a dynamic chunk has {self.ratio:g} tokens on average"

    def reset_parameters(self) -> None:
        nn.init.eye_(self.q_proj.weight)
        nn.init.eye_(self.k_proj.weight)
        for zero in (self.residual_proj.weight, self.residual_proj.bias, self.pad):
            if zero is not None:
                nn.init.zeros_(zero)

    def extra_repr(self) -> str:
        return f"width={self.width}, ratio={self.ratio}"

    def boundaries(self, x: Tensor, state: DynamicState | None, doc_ids: Tensor | None) -> Tensor:
        """Boundary probability p [B, T] in fp32 (fp64)."""
        before = torch.zeros_like(x[:, 0]) if state is None else state.last
        q = self.q_proj(torch.cat([before[:, None], x[:, :-1]], 1))
        cosine = (F.normalize(wide(q), dim=-1) * F.normalize(wide(self.k_proj(x)), dim=-1)).sum(-1)
        begins = torch.zeros_like(cosine, dtype=torch.bool)
        begins[:, 0] = True if state is None else state.seen == 0
        if doc_ids is not None:
            begins[:, 1:] |= doc_ids[:, 1:] != doc_ids[:, :-1]
        return torch.where(begins, 1.0, (1 - cosine) / 2).clamp(0, 1)

    def forward(self, x, main, decoder, state: DynamicState | None, positions, doc_ids):
        p = self.boundaries(x, state, doc_ids)
        begins = p >= 0.5
        z = self._main_at(begins, x, main, state, doc_ids)
        # on the tokens' own grid a token inside a chunk decays nothing and adds nothing: that is the upsampling
        weight = torch.where(begins, p.clamp(_CLAMP, 1 - _CLAMP), 0.0)[..., None]
        smoothed, last = diagonal_scan(
            torch.log1p(-weight), weight * wide(z), doc_ids=doc_ids,
            initial_state=None if state is None else state.smoothed.clone(),
        )  # fmt: skip
        c = torch.where(begins, p, 1 - p)[..., None]
        # the residual map runs in fp32 also where the model does not, as released
        residual = F.linear(wide(x), wide(self.residual_proj.weight), wide(self.residual_proj.bias))
        y = smoothed * (1 + (c - c.detach())) + residual
        if self.training:
            y = self._with_ratio_loss(y, p, begins, doc_ids)
        if state is not None:
            state.last.copy_(handed_on(x[:, -1]))
            state.smoothed.copy_(handed_on(last))
            state.seen += x.shape[1]
        inside = None if state is None else state.decoder
        return decoder(y.to(x.dtype), state=inside, positions=positions, doc_ids=doc_ids)

    def _main_at(self, begins, x, main, state, doc_ids) -> Tensor:
        nested = self.training and any(isinstance(m, DynamicChunks) for m in main.modules())
        if nested and state is None and doc_ids is None:
            # rows are filled up to the longest one; documents tell the ratio loss further in what is filling
            doc_ids = torch.zeros_like(begins, dtype=torch.int64)
        inside = None if state is None else state.main
        nowhere = torch.zeros_like(begins, dtype=torch.int64)  # positions: not used
        node: Any = _Chunks(main, self.pad)
        return run_picked(node, Pick(mask=begins), x, inside, nowhere, doc_ids)

    def _with_ratio_loss(self, y: Tensor, p: Tensor, begins: Tensor, doc_ids: Tensor | None) -> Tensor:
        real = torch.ones_like(p) if doc_ids is None else (doc_ids >= 0).to(p.dtype)
        share, mean_p = (mean_over_all((t * real).sum(), real.sum()) for t in (begins.to(p.dtype), p))
        n = self.ratio
        loss = n / (n - 1) * ((n - 1) * share * mean_p + (1 - share) * (1 - mean_p))
        self.metrics = {"chunk_share": share.detach(), "ratio_loss": loss.detach()}
        return add_auxiliary_loss(y, self.ratio_coef * loss)

    def init_state(self, main, decoder, batch_size, max_len):
        like = self.k_proj.weight
        return DynamicState(
            main.init_state(batch_size),  # without a length: it grows with the chunks, which are fewer
            decoder.init_state(batch_size, max_len),
            like.new_zeros(batch_size, self.dim),
            like.new_zeros(batch_size, self.dim, dtype=state_dtype(like.dtype)),
            torch.zeros(batch_size, dtype=torch.int64, device=like.device),
        )

    def calls(self, batch_size, seq_len, context_len, decode):
        chunks, before = max(1, round(seq_len / self.ratio)), round(context_len / self.ratio)
        share = seq_len / self.ratio / chunks if decode else 1.0
        return Calls(batch_size, chunks, before, share), Calls(batch_size, seq_len, context_len)

    def forward_flops(self, batch_size, seq_len, decode):
        return 3 * 2 * batch_size * seq_len * self.dim**2

    def activation_elements(self, batch_size, seq_len):
        # the stream and the one a token later; queries and keys, and their unit vectors; chunks on the grid of tokens,
        # decays, the smoothed stream; lengths, probabilities and weights of a token
        return batch_size * seq_len * (9 * self.dim + 16)

    def vector_flops(self, batch_size, seq_len):
        # unit queries and keys; smoothing (weight, decay, update), the residual and p added
        return batch_size * seq_len * (self.dim * (2 * work.UNIT + 4 + 2) + 6)

    def state_bytes(self, batch_size):
        like = self.k_proj.weight
        return batch_size * (self.dim * (like.element_size() + state_dtype(like.dtype).itemsize) + 8)
