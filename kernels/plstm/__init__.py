"""pLSTM in one dimension: linear attention whose decay is a matrix over state-tracking slots."""

from __future__ import annotations

from torch import Tensor

from zoo import row
from zoo.kernels import slices
from zoo.kernels.dispatch import call, register_row
from zoo.kernels.plstm import chunked, reference, scalar
from zoo.kernels.plstm.cost import flops, kept

__all__ = ["flops", "kept", "plstm"]

register_row("plstm", "linear_attention", scalar.plstm, priority=20, refuse=scalar.refuse)
register_row("plstm", "chunked", chunked.plstm, priority=10)
register_row("plstm", "reference", reference.plstm, priority=0)


def plstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    doc_ids: Tensor | None = None,
    chunk_size: int = 16,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """o_t = scale * (M_t C_{t-1} q_t + D_t v_t (q_t . k_t));  C_t = T_t C_{t-1} + (S_t v_t) k_t^T.

    The past is read before the token is written. C holds J slots of Dk x Dv, a token brings V values and gives R
    outputs. q, k: [B, T, H, Dk]; v: [B, T, H, V, Dv]; source S: [B, T, H, J, V]; transition T: [B, T, H, J, J], best
    with norm <= 1; mark M: [B, T, H, R, J]; direct D: [B, T, H, R, V]; initial_state: [B, H, J, Dk, Dv]; doc_ids:
    [B, T], a new document starts from a zero state (the first one from initial_state). Returns o [B, T, H, R, Dv] in
    v's dtype and the final state in float32 (float64 for float64). chunk_size changes speed only.
    """
    lead, (V, Dv), J = q.shape[:3], v.shape[3:], transition.shape[-1]
    R = mark.shape[3] if mark.ndim == 5 else -1
    wanted = {
        "k": (k, q.shape), "v": (v, (*lead, V, Dv)), "source": (source, (*lead, J, V)),
        "transition": (transition, (*lead, J, J)), "mark": (mark, (*lead, R, J)), "direct": (direct, (*lead, R, V)),
    }  # fmt: skip
    for name, (x, shape) in wanted.items():
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"plstm: {name} must be {list(shape)} beside q {list(q.shape)}, got {list(x.shape)}")
    rest = (source, transition, mark, direct, scale)

    def run(initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        return call("plstm", backend, q, k, v, *rest, initial_state, doc_ids, chunk_size)

    if (part := row.current()) is not None:
        return slices.plstm(part, run, transition, initial_state, doc_ids)
    return run(initial_state)
