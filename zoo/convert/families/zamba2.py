"""Zamba2 (arXiv:2411.15242): Mamba-2, and at some layers one of a few shared transformers, with low-rank changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers, llama
from zoo.convert.rules import Rule, alike, residual_blocks, same
from zoo.convert.settings import Settings

# stand in published configurations; the original does not read them
UNUSED = (
    "ffn_hidden_size", "ft_lora", "gated_linear_unit", "lora_rank", "rope_theta", "sliding_window", "state_size",
    "use_shared_attention_lora", "use_shared_block_lora", "use_shared_mlp_adapter",
)  # fmt: skip


def _copies(s: Settings) -> int:
    return min(s.num_mem_blocks, len(s.hybrid_layer_ids))


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    # the original shares its transformers only where it also ties the embeddings
    s.expect(hidden_act="gelu", add_bias_linear=False, tie_word_embeddings=True)
    _layers.idle(s, "attention_hidden_size", "chunk_size", "kv_channels", "layers_block_type", "mamba_headdim")
    _layers.idle(s, "num_query_groups", "use_conv_bias", "use_long_context", "use_mem_eff_path", *UNUSED)
    if not s.hybrid_layer_ids:
        raise s.refused("a model without hybrid layers", "it has no place for its shared transformers")
    mamba2 = {
        "num_heads": s.n_mamba_heads, "state_dim": s.mamba_d_state, "num_groups": s.mamba_ngroups,
        "expand": s.mamba_expand, "conv_size": s.mamba_d_conv,
    } | _layers.step_limit([s.time_step_min, float("inf")])  # fmt: skip
    attention = {
        "num_heads": s.num_attention_heads, "num_kv_heads": s.num_key_value_heads,
        "scale": (s.attention_head_dim / 2) ** -0.5,
    }  # fmt: skip
    positions = llama.rope(s)
    attention |= positions if s.use_mem_rope else {"rope": False}
    revisit = {
        "at": ",".join(map(str, s.hybrid_layer_ids)), "attention": attention, "hidden_dim": s.intermediate_size,
        "copies": _copies(s), "rank": s.adapter_rank,
    } | _layers.given(attention_rank=(s.adapter_rank if s.use_shared_attention_adapter else None, None))  # fmt: skip
    made = _layers.body(s, s.rms_norm_eps, {}, [])
    made.pop("define")
    return made | {"trunk": [{"revisit": revisit | {"of": {"repeat": s.num_hidden_layers, "of": {"mamba2": mamba2}}}}]}


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "model.embed_tokens", "model.final_layernorm")
    sites, copies = s.hybrid_layer_ids, _copies(s)
    for i, name in enumerate(residual_blocks(model)):
        theirs = f"model.layers.{i}" + (".mamba_decoder" if i in sites else "")
        yield same(f"{name}.norm.weight", f"{theirs}.input_layernorm.weight")
        yield from alike(model, f"{name}.block", f"{theirs}.mamba")
    # a shared transformer is stored at the first layer that hears it, with the changes of all
    homes = [f"model.layers.{site}.shared_transformer" for site in sites[:copies]]
    renamed = {"gate_up_proj": "feed_forward.gate_up_proj", "down_proj": "feed_forward.down_proj"}
    for n, home in enumerate(homes):
        yield from alike(model, f"layers.0.transformers.{n}", home, **renamed)
    for n, site in enumerate(sites):
        ours, home = f"layers.0.visits.{n}", homes[n % copies]
        yield same(f"{ours}.linear.weight", f"model.layers.{site}.linear.weight")
        for part, step in ((0, "down"), (1, "up")):
            place = f"{home}.feed_forward.gate_up_proj_adapter_list.{n}.{part}.weight"
            yield same(f"{ours}.adapter_{step}.weight", place)
            for x in "qkv" * s.use_shared_attention_adapter:
                place = f"{home}.self_attn.linear_{x}_adapter_list.{n}.{part}.weight"
                yield same(f"{ours}.adapted.{x}_proj.{step}.weight", place)
