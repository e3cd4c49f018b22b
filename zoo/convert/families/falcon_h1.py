"""Falcon-H1 (arXiv:2507.22448): attention and Mamba-2 beside each other in every layer, on one norm.

Its multipliers stand where the graph has a place for them: of the keys in the scale of the scores, of the input of
attention there (twice) and at its output, of the input of Mamba-2 in its five.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama
from zoo.convert.rules import Rule, alike, residual_blocks, same
from zoo.convert.settings import Settings
from zoo.graph.parallel import Parallel

# stand in published configurations; the original does not read them
UNUSED = ("attn_layer_indices", "mamba_use_mlp", "mlp_expansion_factor", "rope_scaling", "rope_theta")


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    _layers.idle(s, *UNUSED)
    if s.mamba_proj_bias != s.projectors_bias:
        raise s.refused("mamba_proj_bias without projectors_bias", "Mamba-2 has both biases or none")
    if s.mamba_proj_bias and s.ssm_in_multiplier != 1:
        raise s.refused("ssm_in_multiplier with mamba_proj_bias", "it would scale the bias")
    if s.get("attention_bias") and s.attention_in_multiplier != 1:
        raise s.refused("attention_in_multiplier with attention_bias", "it would scale the biases")
    if s.mamba_rms_norm:
        s.expect(mamba_norm_before_gate=False)
    s.get("mamba_norm_before_gate")  # of a norm that is not there
    attention = llama.attention(s)
    attention["scale"] = s.key_multiplier * s.attention_in_multiplier**2 * attention["head_dim"] ** -0.5
    multipliers = [s.ssm_in_multiplier * m for m in s.ssm_multipliers]
    width = s.get("mamba_d_ssm") or s.mamba_expand * s.hidden_size
    mamba2 = _layers.mamba2(s, width, multipliers=multipliers, gated_norm=s.mamba_rms_norm)
    gate, down = s.mlp_multipliers
    define = {
        "full": [
            {"attention": attention, "residual": {"scale": s.attention_out_multiplier * s.attention_in_multiplier}}
        ],
        "ssm": [{"mamba2": mamba2, "residual": {"scale": s.ssm_out_multiplier}}],
        "dense": [{"swiglu": llama.swiglu(s) | {"gate_scale": gate}, "residual": {"scale": down}}],
        "layer": [{"parallel": ["full", "ssm"], "norm": {"rms": {"eps": s.rms_norm_eps}}}, "dense"],
    }
    made = _layers.body(s, s.rms_norm_eps, define, ["layer"] * s.num_hidden_layers)
    return made | {"embedding_scale": s.embedding_multiplier, "logit_scale": s.lm_head_multiplier}


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.final_layernorm")
    blocks = residual_blocks(model)
    pairs = [name for name, module in model.named_modules() if isinstance(module, Parallel)]
    for i in range(s.num_hidden_layers):
        attention, mamba2, ffn = blocks[3 * i : 3 * i + 3]
        theirs = f"model.layers.{i}"
        yield same(f"{pairs[i]}.norm.weight", f"{theirs}.input_layernorm.weight")
        yield same(f"{ffn}.norm.weight", f"{theirs}.pre_ff_layernorm.weight")
        yield from alike(model, f"{attention}.block", f"{theirs}.self_attn")
        yield from alike(model, f"{mamba2}.block", f"{theirs}.mamba")
        yield from alike(model, f"{ffn}.block", f"{theirs}.feed_forward")
