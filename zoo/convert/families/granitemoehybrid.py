"""Granite 4: Mamba-2 and attention, and a shared MLP beside the experts, if there are any, of every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama
from zoo.convert.rules import Rule, alike, divided, residual_blocks, same
from zoo.convert.settings import Settings
from zoo.graph.parallel import Parallel


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(hidden_act=("silu", "swish"), position_embedding_type=("rope", "nope", None))
    # of published configurations; the original does not read these two
    _layers.idle(s, "num_hidden_layers", "init_method", "normalization_function")
    attention = llama.attention(s) | {"scale": s.attention_multiplier}
    if s.get("position_embedding_type") != "rope":
        attention = {k: v for k, v in attention.items() if "rope" not in k and "rotary" not in k} | {"rope": False}
    ffn = "dense"
    if s.num_local_experts:
        ffn = {"parallel": ["experts", "dense"], "norm": {"rms": {"eps": s.rms_norm_eps}}}
    moe = {
        "num_experts": s.num_local_experts, "top_k": s.num_experts_per_tok, "hidden_dim": s.intermediate_size,
        "aux_coef": s.router_aux_loss_coef,
    }  # fmt: skip
    define = {
        "ssm": {"mamba2": _layers.mamba2(s, s.mamba_expand * s.hidden_size)},
        "full": {"attention": attention},
        "experts": {"moe": moe},
        "dense": {"swiglu": {"hidden_dim": s.shared_intermediate_size}},
        "m": ["ssm", ffn],
        "a": ["full", ffn],
    }
    layers = ["m" if kind == "linear_attention" else "a" for kind in s.layer_types]
    made = _layers.body(s, s.rms_norm_eps, define, layers)
    made |= {"embedding_scale": float(s.embedding_multiplier), "logit_scale": 1 / s.logits_scaling}
    return made | {"residual": {"scale": float(s.residual_multiplier)}}


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.norm")
    blocks, per_layer = residual_blocks(model), 3 if s.num_local_experts else 2
    pairs = [name for name, module in model.named_modules() if isinstance(module, Parallel)]
    for i, kind in enumerate(s.layer_types):
        mixer, *experts, dense = blocks[per_layer * i : per_layer * (i + 1)]
        theirs = f"model.layers.{i}"
        yield same(f"{mixer}.norm.weight", f"{theirs}.input_layernorm.weight")
        yield same(f"{pairs[i] if experts else dense}.norm.weight", f"{theirs}.post_attention_layernorm.weight")
        place = "mamba" if kind == "linear_attention" else "self_attn"
        yield from alike(model, f"{mixer}.block", f"{theirs}.{place}")
        for name in experts:
            yield from alike(model, f"{name}.block", f"{theirs}.block_sparse_moe", gate="router")
        halves = [f"{dense}.block.gate_proj.weight", f"{dense}.block.up_proj.weight"]
        yield divided(halves, f"{theirs}.shared_mlp.input_linear.weight", [s.shared_intermediate_size] * 2)
        yield same(f"{dense}.block.down_proj.weight", f"{theirs}.shared_mlp.output_linear.weight")
