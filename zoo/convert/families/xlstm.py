"""xLSTM-7B (arXiv:2503.13427): mLSTM layers and SwiGLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers
from zoo.convert.rules import Rule, divided, same
from zoo.convert.settings import Settings

# which code computes the same numbers, in which pieces and precision
IDLE = (
    "autocast_kernel_dtype", "chunk_size", "chunkwise_kernel", "inference_state_dtype", "max_inference_chunksize",
    "mode", "norm_reduction_force_float32", "return_last_states", "sequence_kernel", "step_kernel",
)  # fmt: skip
# stand in published configurations; the original does not read them
UNUSED = (
    "add_forward_backend_padding", "add_post_norm", "add_qk_norm", "cell_norm_eps", "force_bos_token_insert",
    "head_dim", "igate_bias_init_range", "mlstm_round_up_to_multiple_of",
)  # fmt: skip
# names of kernels of a package that transformers asks for where they stand
FOREIGN = ("chunkwise_kernel", "sequence_kernel", "step_kernel")


def _width(s: Settings) -> int:
    """Hidden width of the feed-forward layers."""
    multiple = s.ffn_round_up_to_multiple_of
    return int((s.hidden_size * s.ffn_proj_factor + multiple - 1) // multiple * multiple)


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(
        use_bias=False, add_out_norm=True, eps=1e-6, weight_mode=("single", "fused"), embedding_dim=s.hidden_size,
        num_blocks=s.num_hidden_layers,
    )  # fmt: skip
    _layers.idle(s, *IDLE, *UNUSED)
    mlstm = {
        "num_heads": s.num_heads, "qk_dim_factor": s.qk_dim_factor, "v_dim_factor": s.v_dim_factor,
        "gate_soft_cap": s.gate_soft_cap, "norm_eps": s.norm_eps,
    }  # fmt: skip
    define = {"layer": [{"mlstm": mlstm}, {"swiglu": {"hidden_dim": _width(s)}}]}
    made = _layers.body(s, s.norm_eps, define, ["layer"] * s.num_hidden_layers)
    # the original has no tied form, whatever tie_word_embeddings says
    return made | {"tie_embeddings": False, "logit_cap": s.output_logit_soft_cap}


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "backbone.embeddings", "backbone.out_norm", tied=False)
    layers = "backbone.blocks"
    yield from _layers.norms(model, "norm_mlstm", "norm_ffn", layers=layers)
    if s.weight_mode == "single":
        renamed = {"gate_proj": "proj_up_gate", "up_proj": "proj_up", "down_proj": "proj_down"}
        yield from _layers.blocks(model, "mlstm_layer", "ffn", layers=layers, **renamed)
        return
    for mixer, ffn, theirs in _layers.pairs(model, layers):
        mixer, ffn = f"{mixer}.block", f"{ffn}.block"
        yield _fused(model, mixer, ("q", "k", "v", "ogate_preact"), f"{theirs}.mlstm_layer.qkv_opreact")
        for part in ("weight", "bias"):
            gates = ("igate_preact", "fgate_preact")
            yield _fused(model, mixer, gates, f"{theirs}.mlstm_layer.ifgate_preact", part)
        for name in ("multihead_norm", "out_proj"):
            yield same(f"{mixer}.{name}.weight", f"{theirs}.mlstm_layer.{name}.weight")
        yield _fused(model, ffn, ("gate_proj", "up_proj"), f"{theirs}.ffn.proj_up_gate_z")
        yield same(f"{ffn}.down_proj.weight", f"{theirs}.ffn.proj_down.weight")


def _fused(model: Model, ours: str, names: tuple[str, ...], theirs: str, part: str = "weight") -> Rule:
    """Several linear maps of ours that are one of theirs, below each other."""
    places = [f"{ours}.{name}.{part}" for name in names]
    return divided(places, f"{theirs}.{part}", [model.get_parameter(p).shape[0] for p in places])
