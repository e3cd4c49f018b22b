"""Tiny models of transformers with drawn weights: state space models, hybrids and vision, several option sets each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from parity import built

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"hidden_size": 64, "vocab_size": 61, "pad_token_id": 0}


def drawn(model: Any) -> Any:
    """Matrices that keep the size of what they map, and vectors off their constants."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "A_log" not in name:
                p.copy_(torch.randn(p.shape) / p[0].numel() ** 0.5)
            else:
                p.add_(0.2 * torch.randn(p.shape))
        for name, b in model.named_buffers():
            if "correction" in name:
                b.copy_(0.2 * torch.randn(b.shape))
    return model.eval()


def made(name: str, **options: Any) -> Any:
    """A causal language model of the family of that name."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**options)
    return drawn(built(getattr(transformers, f"{name}ForCausalLM"), config))


def seen(family: str, head: str, **options: Any) -> Any:
    """A vision model."""
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{family}Config")(**sizes | options)
    return drawn(getattr(transformers, f"{family}{head}")(config))


MAMBA = SIZES | {"num_hidden_layers": 2, "state_size": 8}
MAMBA2 = MAMBA | {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16}
HYBRID = SIZES | HEADS | {"intermediate_size": 96}
SSD = HYBRID | {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
DELTA = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "moe_intermediate_size": 32,
}  # fmt: skip
ZAMBA = SIZES | {
    "num_attention_heads": 4, "intermediate_size": 96, "adapter_rank": 8, "n_mamba_heads": 8, "mamba_d_state": 8,
    "chunk_size": 16,
}  # fmt: skip
KIMI = SIZES | {
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_local_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "linear_num_heads": 4, "linear_head_dim": 16,
}  # fmt: skip
XLSTM = SIZES | {"hidden_size": 128, "num_heads": 2, "num_hidden_layers": 2, "chunk_size": 16}


def blocks(count: int, *hybrid: int) -> list[str]:
    """Kinds of the layers of Zamba2."""
    return ["hybrid" if i in hybrid else "linear_attention" for i in range(count)]


# names with a dot: more option sets of the family before it
MODELS: dict[str, Callable[[], Any]] = {
    "mamba": lambda: made("Mamba", **MAMBA),
    "mamba.biases": lambda: made(
        "Mamba", **MAMBA, use_bias=True, use_conv_bias=False, tie_word_embeddings=False, expand=1, conv_kernel=3,
        time_step_rank=7, layer_norm_epsilon=1e-3,
    ),
    "mamba2": lambda: made("Mamba2", **MAMBA2),
    "mamba2.biases": lambda: made(
        "Mamba2", **MAMBA2, use_bias=True, use_conv_bias=False, tie_word_embeddings=True, time_step_limit=(0.3, 0.8),
        layer_norm_epsilon=1e-3,
    ),
    "falcon_mamba": lambda: made("FalconMamba", **MAMBA),
    "falcon_mamba.biases": lambda: made(
        "FalconMamba", **MAMBA, use_bias=True, tie_word_embeddings=False, mixer_rms_eps=1e-2,
    ),
    "jamba": lambda: made(
        "Jamba", **HYBRID, num_hidden_layers=4, num_experts=4, mamba_d_state=4, attn_layer_period=4,
        attn_layer_offset=1, rms_norm_eps=1e-3,
    ),
    "jamba.biases": lambda: made(
        "Jamba", **HYBRID, num_hidden_layers=3, num_experts=4, mamba_d_state=4, mamba_dt_rank=5, attn_layer_period=3,
        expert_layer_offset=0, attn_layer_offset=2, mamba_conv_bias=False, mamba_proj_bias=True, mamba_expand=1,
        mamba_d_conv=3, tie_word_embeddings=True, num_experts_per_tok=1,
    ),
    "jamba.dense": lambda: made(
        "Jamba", **HYBRID, num_hidden_layers=2, num_experts=1, mamba_d_state=4, attn_layer_period=2,
        attn_layer_offset=0,
    ),
    "bamba": lambda: made("Bamba", **SSD, num_hidden_layers=3, attn_layer_indices=[1]),
    "bamba.biases": lambda: made(
        "Bamba", **SSD, num_hidden_layers=2, attn_layer_indices=[0], mamba_conv_bias=False, mamba_proj_bias=True,
        attention_bias=True, mlp_bias=True, mamba_expand=1, mamba_d_conv=3, tie_word_embeddings=True,
        time_step_limit=(0.3, 0.8), rope_parameters=YARN, z_loss_coefficient=0.1,
    ),
    "falcon_h1": lambda: made(
        "FalconH1", **SSD, num_hidden_layers=2, mamba_d_ssm=96, lm_head_multiplier=0.04, embedding_multiplier=5.6,
        key_multiplier=0.4, attention_in_multiplier=1.3, attention_out_multiplier=0.9, ssm_in_multiplier=1.25,
        ssm_out_multiplier=0.24, mlp_multipliers=[0.9, 0.6], ssm_multipliers=[0.35, 0.25, 0.3, 0.5, 0.4],
    ),
    "falcon_h1.biases": lambda: made(
        "FalconH1", **SSD, num_hidden_layers=2, mamba_d_ssm=None, mamba_rms_norm=True, mamba_norm_before_gate=False,
        attention_bias=True, mlp_bias=True, mamba_proj_bias=True, projectors_bias=True, mamba_conv_bias=False,
        key_multiplier=0.4, ssm_out_multiplier=0.5, head_dim=8, tie_word_embeddings=True,
    ),
    "nemotron_h": lambda: made(
        "NemotronH", **HYBRID, head_dim=16, hybrid_override_pattern="M-M*-", ssm_state_size=8, mamba_num_heads=8,
        mamba_head_dim=8, n_groups=2, chunk_size=16, time_step_min=1e-9,
    ),
    "nemotron_h.biases": lambda: made(
        "NemotronH", **HYBRID, head_dim=8, hybrid_override_pattern="-*M", ssm_state_size=8, mamba_num_heads=8,
        mamba_head_dim=16, n_groups=1, chunk_size=16, time_step_min=0.5, use_bias=True, use_conv_bias=False,
        mlp_bias=True, mlp_hidden_act="gelu", tie_word_embeddings=True, layer_norm_epsilon=1e-3,
    ),
    "nemotron_h.experts": lambda: made(
        "NemotronH", **HYBRID, head_dim=16, hybrid_override_pattern="ME*E", ssm_state_size=8, mamba_num_heads=8,
        mamba_head_dim=8, n_groups=2, chunk_size=16, time_step_min=1e-9, n_routed_experts=8, num_experts_per_tok=3,
        moe_intermediate_size=24, moe_shared_expert_intermediate_size=40, n_group=2, topk_group=1,
        routed_scaling_factor=2.5,
    ),
    "granitemoehybrid": lambda: made(
        "GraniteMoeHybrid", **SSD, num_hidden_layers=3, num_local_experts=4, shared_intermediate_size=40,
        layer_types=["linear_attention", "full_attention", "linear_attention"], embedding_multiplier=12,
        logits_scaling=8, residual_multiplier=0.22, attention_multiplier=0.2,
    ),
    "granitemoehybrid.dense": lambda: made(
        "GraniteMoeHybrid", **SSD, num_hidden_layers=2, num_local_experts=0, shared_intermediate_size=40,
        layer_types=["linear_attention", "full_attention"], position_embedding_type="rope", attention_bias=True,
        mamba_proj_bias=True, tie_word_embeddings=True,
    ),
    "minimax": lambda: made(
        "MiniMax", **HYBRID, head_dim=16, num_hidden_layers=4, num_local_experts=4, block_size=16,
        layer_types=["linear_attention"] * 3 + ["full_attention"], full_attn_alpha_factor=3.5,
        linear_attn_alpha_factor=2.5, mlp_alpha_factor=1.5, full_attn_beta_factor=0.9, linear_attn_beta_factor=1.1,
        mlp_beta_factor=0.8,
    ),
    "minimax.window": lambda: made(
        "MiniMax", **HYBRID, head_dim=8, num_hidden_layers=2, num_local_experts=4, block_size=16, sliding_window=5,
        rope_parameters=YARN | {"partial_rotary_factor": 1.0}, tie_word_embeddings=True, rms_norm_eps=1e-3,
    ),
    "qwen3_next": lambda: made(
        "Qwen3Next", **HYBRID, **DELTA, head_dim=16, num_hidden_layers=4, num_experts=8, num_experts_per_tok=2,
        shared_expert_intermediate_size=40,
    ),
    "qwen3_next.dense": lambda: made(
        "Qwen3Next", **HYBRID, **DELTA, head_dim=16, num_hidden_layers=4, num_experts=4, num_experts_per_tok=2,
        shared_expert_intermediate_size=32, layer_types=["full_attention", "linear_attention"] * 2,
        mlp_only_layers=[0], decoder_sparse_step=2, norm_topk_prob=False, attention_bias=True,
        tie_word_embeddings=True, rms_norm_eps=1e-3,
    ),
    "qwen3_next.no_experts": lambda: made(
        "Qwen3Next", **HYBRID, **DELTA, head_dim=16, num_hidden_layers=2, num_experts=0, num_experts_per_tok=2,
        layer_types=["full_attention", "linear_attention"],
    ),
    "recurrent_gemma": lambda: made(
        "RecurrentGemma", **HYBRID | {"hidden_size": 48}, num_hidden_layers=4, attention_window_size=5,
    ),
    "recurrent_gemma.biases": lambda: made(
        "RecurrentGemma", **HYBRID, num_hidden_layers=2, attention_window_size=64, attention_bias=True, lru_width=32,
        logits_soft_cap=2.0, conv1d_width=3, block_types=["attention", "recurrent"], tie_word_embeddings=False,
        rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25},
    ),
    "zamba2": lambda: made(
        "Zamba2", **ZAMBA, num_hidden_layers=4, layers_block_type=blocks(4, 1, 3), mamba_ngroups=2, num_mem_blocks=2,
        use_mem_rope=True, time_step_min=1e-9,
    ),
    "zamba2.adapters": lambda: made(
        "Zamba2", **ZAMBA, num_hidden_layers=5, layers_block_type=blocks(5, 0, 2, 3), num_mem_blocks=2, mamba_d_conv=3,
        use_shared_attention_adapter=True, time_step_min=0.5, rms_norm_eps=1e-3,
    ),
    "kimi_linear": lambda: made(
        "KimiLinear", **KIMI, num_hidden_layers=4, layer_types=["linear_attention"] * 2 + ["full_attention"] * 2,
    ),
    "kimi_linear.ranks": lambda: made(
        "KimiLinear", **KIMI, num_hidden_layers=2, layer_types=["full_attention", "linear_attention"],
        mlp_layer_types=["sparse", "dense"], q_lora_rank=12, attention_bias=True, n_group=2, topk_group=1,
        norm_topk_prob=False, n_shared_experts=2, linear_conv_kernel_dim=3, rms_norm_eps=1e-3,
    ),
    "xlstm": lambda: made("xLSTM", **XLSTM),
    "xlstm.fused": lambda: made(
        "xLSTM", **XLSTM, weight_mode="fused", gate_soft_cap=1.5, output_logit_soft_cap=2.0, qk_dim_factor=1.0,
        v_dim_factor=2.0, norm_eps=1e-3, ffn_proj_factor=1.1, ffn_round_up_to_multiple_of=16,
        tie_word_embeddings=True,
    ),
    "lfm2": lambda: made(
        "Lfm2", **HYBRID, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], block_multiple_of=16,
        block_ffn_dim_multiplier=1.3,
    ),
    "lfm2.biases": lambda: made(
        "Lfm2", **HYBRID, num_hidden_layers=2, full_attn_idxs=[1], conv_bias=True, conv_L_cache=4,
        block_auto_adjust_ff_dim=False, tie_word_embeddings=False, norm_eps=1e-3,
    ),
    "vit": lambda: seen("ViT", "ForImageClassification", num_labels=5, intermediate_size=96),
    "vit.tanh": lambda: seen(
        "ViT", "ForImageClassification", num_labels=3, intermediate_size=96, qkv_bias=False, num_channels=2,
        image_size=[24, 24], patch_size=[8, 8], hidden_act="gelu_new", layer_norm_eps=1e-3,
    ),
    "dinov2": lambda: seen("Dinov2", "Model", layerscale_value=0.5),
    "dinov2.head": lambda: seen(
        "Dinov2", "ForImageClassification", num_labels=5, use_swiglu_ffn=True, use_mask_token=False, qkv_bias=False,
        mlp_ratio=2, drop_path_rate=0.1,
    ),
    "dinov2_with_registers": lambda: seen("Dinov2WithRegisters", "Model", layer_norm_eps=1e-3),
    "dinov2_with_registers.head": lambda: seen(
        "Dinov2WithRegisters", "ForImageClassification", num_labels=5, num_register_tokens=2, hidden_act="silu",
    ),
}  # fmt: skip
