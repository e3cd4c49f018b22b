"""The config.json of published models, with all that stands in them, by their names on the Hub.

Only lists are shortened in their writing: kinds of layers that repeat, rotary factors (theirs have as many).
"""

from __future__ import annotations

from typing import Any


def causal(kind: str, name: str, **more: Any) -> dict[str, Any]:
    """What nearly every file of a language model has."""
    return {
        "architectures": [f"{kind}ForCausalLM"], "model_type": name, "torch_dtype": "bfloat16", "use_cache": True,
        "initializer_range": 0.02, "transformers_version": "4.45.0", "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def sizes(vocab: int, hidden: int, inner: int, layers: int, heads: int, keys: int) -> dict[str, int]:
    """What nearly every file of a transformer has."""
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": keys,
    }  # fmt: skip


def at(count: int, places: tuple[int, ...], kind: str, other: str) -> list[str]:
    """Kinds of layers."""
    return [kind if i in places else other for i in range(count)]


PHI = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attention_bias": False, "attention_dropout": 0.0, "original_max_position_embeddings": 4096,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "pad_token_id": 32000,
}  # fmt: skip
LONGROPE = {"type": "longrope", "long_factor": [1 + 1.3 * i for i in range(48)], "short_factor": [1.0] * 48}
QWEN = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "attention_dropout": 0.0,
    "use_sliding_window": False,
}  # fmt: skip
STEPS = {
    "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
    "time_step_scale": 1.0, "rescale_prenorm_residual": False, "residual_in_fp32": True, "layer_norm_epsilon": 1e-5,
    "use_bias": False, "use_conv_bias": True, "hidden_act": "silu", "conv_kernel": 4, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "attention_probs_dropout_prob": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 768,
    "initializer_range": 0.02, "num_attention_heads": 12, "num_channels": 3, "num_hidden_layers": 12, "qkv_bias": True,
    "torch_dtype": "float32", "transformers_version": "4.32.0.dev0",
}  # fmt: skip
DINO = VISION | {
    "apply_layernorm": True, "drop_path_rate": 0.0, "image_size": 518, "layer_norm_eps": 1e-6, "layerscale_value": 1.0,
    "mlp_ratio": 4, "out_features": ["stage12"], "out_indices": [12], "patch_size": 14, "reshape_hidden_states": True,
    "stage_names": ["stem", *(f"stage{i}" for i in range(1, 13))], "use_swiglu_ffn": False,
}  # fmt: skip
DEEPSEEK_V3 = causal(
    "DeepseekV3", "deepseek_v3", **sizes(129280, 7168, 18432, 61, 128, 128), hidden_act="silu", rms_norm_eps=1e-6,
    rope_theta=10000, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1, n_group=8, topk_group=4,
    num_experts_per_tok=8, first_k_dense_replace=3, moe_layer_freq=1, ep_size=1, num_nextn_predict_layers=1,
    norm_topk_prob=True, routed_scaling_factor=2.5, scoring_func="sigmoid", topk_method="noaux_tc", kv_lora_rank=512,
    q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, attention_bias=False,
    attention_dropout=0.0, max_position_embeddings=163840, tie_word_embeddings=False,
    rope_scaling={"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn",
                  "original_max_position_embeddings": 4096},
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
)  # fmt: skip
GPT_OSS = causal(
    "GptOss", "gpt_oss", **sizes(201088, 2880, 2880, 24, 64, 8), head_dim=64, hidden_act="silu", rms_norm_eps=1e-5,
    rope_theta=150000, sliding_window=128, layer_types=["sliding_attention", "full_attention"] * 12,
    num_local_experts=32, num_experts_per_tok=4, experts_per_token=4, initial_context_length=4096,
    output_router_logits=False, router_aux_loss_coef=0.9, swiglu_limit=7.0, attention_bias=True, attention_dropout=0.0,
    max_position_embeddings=131072, tie_word_embeddings=False, pad_token_id=199999,
    rope_scaling={"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False,
                  "original_max_position_embeddings": 4096},
)  # fmt: skip
GEMMA3_TEXT = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
    "initializer_range": 0.02, "max_position_embeddings": 32768, "query_pre_attn_scalar": 256, "rope_theta": 1000000,
    "rope_local_base_freq": 10000, "sliding_window_pattern": 6,
}  # fmt: skip

# models that see
SEEING: dict[str, dict[str, Any]] = {
    "google/gemma-3-4b-pt": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {
            "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
        },
    },
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": {
        "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3",
        "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "vision_feature_layer": -1,
        "text_config": {
            "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
            "initializer_range": 0.02, "intermediate_size": 32768, "max_position_embeddings": 131072,
            "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5, "rope_theta": 1000000000.0, "sliding_window": None, "use_cache": True,
            "vocab_size": 131072,
        },
        "vision_config": {
            "attention_dropout": 0.0, "head_dim": 64, "hidden_act": "gelu", "hidden_size": 1024, "image_size": 1540,
            "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "pixtral", "num_attention_heads": 16,
            "num_channels": 3, "num_hidden_layers": 24, "patch_size": 14, "rope_theta": 10000.0,
        },
    },
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B": causal(
        "Llama", "llama", **sizes(128256, 2048, 8192, 16, 32, 8), head_dim=64, hidden_act="silu", rms_norm_eps=1e-5,
        attention_bias=False, attention_dropout=0.0, mlp_bias=False, pretraining_tp=1, rope_theta=500000.0,
        max_position_embeddings=131072, tie_word_embeddings=True,
        rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                      "original_max_position_embeddings": 8192},
    ),
    "HuggingFaceTB/SmolLM2-135M": causal(
        "Llama", "llama", **sizes(49152, 576, 1536, 30, 9, 3), hidden_act="silu", rms_norm_eps=1e-5, rope_scaling=None,
        attention_bias=False, attention_dropout=0.0, mlp_bias=False, pretraining_tp=1, rope_theta=100000,
        max_position_embeddings=8192, tie_word_embeddings=True, is_llama_config=True, rope_interleaved=False,
        **{"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    ),
    "mistralai/Mistral-7B-v0.1": causal(
        "Mistral", "mistral", **sizes(32000, 4096, 14336, 32, 32, 8), hidden_act="silu", rms_norm_eps=1e-5,
        rope_theta=10000.0, sliding_window=4096, max_position_embeddings=32768, tie_word_embeddings=False,
    ),
    "mistralai/Mistral-7B-v0.3": causal(
        "Mistral", "mistral", **sizes(32768, 4096, 14336, 32, 32, 8), hidden_act="silu", rms_norm_eps=1e-5,
        rope_theta=1000000.0, sliding_window=None, max_position_embeddings=32768, tie_word_embeddings=False,
        attention_dropout=0.0,
    ),
    "Qwen/Qwen2.5-0.5B": causal(
        "Qwen2", "qwen2", **sizes(151936, 896, 4864, 24, 14, 2), **QWEN, sliding_window=32768, max_window_layers=24,
        max_position_embeddings=32768, use_mrope=False, tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-0.6B": causal(
        "Qwen3", "qwen3", **sizes(151936, 1024, 3072, 28, 16, 8), **QWEN, head_dim=128, attention_bias=False,
        sliding_window=None, max_window_layers=28, max_position_embeddings=40960, rope_scaling=None,
        tie_word_embeddings=True,
    ),
    "google/gemma-3-1b-pt": causal(
        "Gemma3", "gemma3_text", **sizes(262144, 1152, 6912, 26, 4, 1), **GEMMA3_TEXT, sliding_window=512,
        rope_scaling=None, pad_token_id=0,
    ),
    "allenai/OLMo-2-0425-1B": causal(
        "Olmo2", "olmo2", **sizes(100352, 2048, 8192, 16, 16, 16), hidden_act="silu", rms_norm_eps=1e-6,
        rope_theta=500000, rope_scaling=None, attention_bias=False, attention_dropout=0.0,
        max_position_embeddings=4096, tie_word_embeddings=False, pad_token_id=100277,
    ),
    "microsoft/Phi-3-mini-4k-instruct": causal(
        "Phi3", "phi3", **sizes(32064, 3072, 8192, 32, 32, 32), **PHI, rope_scaling=None, sliding_window=2047,
        max_position_embeddings=4096, tie_word_embeddings=False,
    ),
    "microsoft/Phi-3-mini-128k-instruct": causal(
        "Phi3", "phi3", **sizes(32064, 3072, 8192, 32, 32, 32), **PHI, rope_scaling=LONGROPE, sliding_window=262144,
        max_position_embeddings=131072, tie_word_embeddings=False,
    ),
    "microsoft/Phi-4-mini-instruct": causal(
        "Phi3", "phi3", **sizes(200064, 3072, 8192, 32, 24, 8), **PHI, rope_scaling=LONGROPE, sliding_window=262144,
        partial_rotary_factor=0.75, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False,
        max_position_embeddings=131072, tie_word_embeddings=True,
    ),
    "mistralai/Mixtral-8x7B-v0.1": causal(
        "Mixtral", "mixtral", **sizes(32000, 4096, 14336, 32, 32, 8), hidden_act="silu", rms_norm_eps=1e-5,
        rope_theta=1000000.0, sliding_window=None, num_experts_per_tok=2, num_local_experts=8, attention_dropout=0.0,
        output_router_logits=False, router_aux_loss_coef=0.02, max_position_embeddings=32768,
        tie_word_embeddings=False,
    ),
    "Qwen/Qwen3-30B-A3B": causal(
        "Qwen3Moe", "qwen3_moe", **sizes(151936, 2048, 6144, 48, 32, 4), **QWEN, head_dim=128, decoder_sparse_step=1,
        mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_experts=128, num_experts_per_tok=8,
        output_router_logits=False, router_aux_loss_coef=0.001, sliding_window=None, max_window_layers=48,
        attention_bias=False, max_position_embeddings=40960, rope_scaling=None, tie_word_embeddings=False,
    ),
    "unsloth/DeepSeek-V3-bf16": DEEPSEEK_V3,
    "unsloth/gpt-oss-20b-BF16": GPT_OSS | {"unsloth_fixed": True},
    "ibm-granite/granite-3.1-2b-base": causal(
        "Granite", "granite", **sizes(49152, 2048, 8192, 40, 32, 8), hidden_act="silu", rms_norm_eps=1e-5,
        rope_theta=5000000.0, rope_scaling=None, attention_multiplier=0.015625, embedding_multiplier=12.0,
        logits_scaling=8.0, residual_multiplier=0.22, attention_bias=False, attention_dropout=0.1, mlp_bias=False,
        max_position_embeddings=131072, tie_word_embeddings=True,
    ),
    "state-spaces/mamba-130m-hf": causal(
        "Mamba", "mamba", **STEPS, d_inner=1536, d_model=768, expand=2, fused_add_norm=True, hidden_size=768,
        intermediate_size=1536, n_layer=24, num_hidden_layers=24, pad_vocab_size_multiple=8, rms_norm=True, ssm_cfg={},
        state_size=16, time_step_rank=48, vocab_size=50280,
    ),
    "mistralai/Mamba-Codestral-7B-v0.1": causal(
        "Mamba2", "mamba2", **STEPS, chunk_size=256, expand=2, head_dim=64, hidden_size=4096, intermediate_size=8192,
        n_groups=8, norm_before_gate=True, num_heads=128, num_hidden_layers=64, rms_norm=True, state_size=128,
        tie_word_embeddings=False, time_step_limit=[0.0, float("inf")], time_step_rank=256, vocab_size=32768,
    ),
    "tiiuae/falcon-mamba-7b": causal(
        "FalconMamba", "falcon_mamba", **STEPS, expand=16, hidden_size=4096, intermediate_size=8192,
        num_hidden_layers=64, state_size=16, tie_word_embeddings=False, time_step_rank=256, use_mambapy=False,
        vocab_size=65024,
    ),
    "ai21labs/Jamba-v0.1": causal(
        "Jamba", "jamba", **sizes(65536, 4096, 14336, 32, 32, 8), hidden_act="silu", rms_norm_eps=1e-6,
        attention_dropout=0.0, attn_layer_offset=4, attn_layer_period=8, calc_logits_for_entire_prompt=False,
        expert_layer_offset=1, expert_layer_period=2, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_state=16,
        mamba_dt_rank=256, mamba_expand=2, mamba_inner_layernorms=True, mamba_proj_bias=False, n_ctx=262144,
        num_experts=16, num_experts_per_tok=2, num_logits_to_keep=1, output_router_logits=False, pad_token_id=0,
        router_aux_loss_coef=0.001, sliding_window=None, tie_word_embeddings=False, use_mamba_kernels=True,
        auto_map={"AutoConfig": "configuration_jamba.JambaConfig"},
    ),
    "ibm-ai-platform/Bamba-9B-v1": causal(
        "Bamba", "bamba", **sizes(128256, 4096, 14336, 32, 32, 8), hidden_act="silu", rms_norm_eps=1e-5,
        attention_bias=False, attention_dropout=0.0, attn_layer_indices=[9, 18, 27], attn_rotary_emb=64,
        mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=64, mamba_d_state=128, mamba_expand=2,
        mamba_n_groups=1, mamba_n_heads=128, mamba_proj_bias=False, max_position_embeddings=262144, mlp_bias=False,
        num_logits_to_keep=1, pad_token_id=0, rope_theta=10000.0, tie_word_embeddings=False, use_mamba_kernels=True,
    ),
    "tiiuae/Falcon-H1-0.5B-Base": causal(
        "FalconH1", "falcon_h1", **sizes(32784, 1024, 2048, 36, 8, 2), hidden_act="silu", rms_norm_eps=1e-5,
        attention_bias=False, attention_dropout=0.0, attention_in_multiplier=1.0, attention_out_multiplier=0.9375,
        attn_layer_indices=None, embedding_multiplier=5.656854249492381, head_dim=64, key_multiplier=0.390625,
        lm_head_multiplier=0.0390625, mamba_chunk_size=128, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=64,
        mamba_d_ssm=1536, mamba_d_state=128, mamba_expand=2, mamba_n_groups=1, mamba_n_heads=24,
        mamba_norm_before_gate=False, mamba_proj_bias=False, mamba_rms_norm=False, mamba_use_mlp=True,
        max_position_embeddings=16384, mlp_bias=False, mlp_expansion_factor=8, num_logits_to_keep=1, pad_token_id=0,
        mlp_multipliers=[0.8838834764831845, 0.5859375], projectors_bias=False, rope_scaling=None,
        rope_theta=100000000000.0, ssm_in_multiplier=1.25, ssm_out_multiplier=0.23570226039551587,
        ssm_multipliers=[0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
        tie_word_embeddings=False, use_mamba_kernels=True,
    ),
    "Zyphra/Zamba2-1.2B": causal(
        "Zamba2", "zamba2", **sizes(32000, 2048, 8192, 38, 32, 32), hidden_act="gelu", rms_norm_eps=1e-5,
        add_bias_linear=False, attention_dropout=0.0, attention_head_dim=128, attention_hidden_size=4096,
        adapter_rank=128, chunk_size=256, ffn_hidden_size=8192, ft_lora=False, gated_linear_unit=True,
        hybrid_layer_ids=[5, 11, 17, 23, 29, 35], kv_channels=64, lora_rank=128,
        layers_block_type=at(38, (5, 11, 17, 23, 29, 35), "hybrid", "mamba"), mamba_d_conv=4, mamba_d_state=128,
        mamba_expand=2, mamba_headdim=64, mamba_ngroups=1, max_position_embeddings=4096, n_mamba_heads=64,
        num_logits_to_keep=1, num_mem_blocks=1, num_query_groups=32, pad_token_id=0, rope_theta=10000,
        sliding_window=None, state_size=128, time_step_floor=0.0001, time_step_limit=None, time_step_max=0.1,
        time_step_min=0.001, use_conv_bias=True, use_long_context=False, use_mamba_kernels=True,
        use_mem_eff_path=False, use_mem_rope=True, use_shared_attention_adapter=True, use_shared_attention_lora=True,
        use_shared_block_lora=True, use_shared_mlp_adapter=True,
    ),
    "nvidia/Nemotron-H-8B-Base-8K": causal(
        "NemotronH", "nemotron_h", **sizes(131072, 4096, 21504, 52, 32, 8), attention_bias=False,
        attention_dropout=0.0, attention_head_dim=128, chunk_size=128, conv_kernel=4, expand=2, hidden_dropout=0.0,
        hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", layer_norm_epsilon=1e-5,
        mamba_head_dim=64, mamba_hidden_act="silu", mamba_num_heads=128, mamba_proj_bias=False, mlp_bias=False,
        max_position_embeddings=8192, mlp_hidden_act="relu2", n_groups=8, num_logits_to_keep=1, pad_token_id=0,
        rescale_prenorm_residual=True, residual_in_fp32=False, rms_norm_eps=1e-5, sliding_window=None,
        ssm_state_size=128, tie_word_embeddings=False, time_step_floor=0.0001, time_step_limit=[0.0, float("inf")],
        time_step_max=0.1, time_step_min=0.001, use_bias=False, use_conv_bias=True, use_mamba_kernels=True,
        auto_map={"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    ),
    "ibm-granite/granite-4.0-h-tiny": causal(
        "GraniteMoeHybrid", "granitemoehybrid", **sizes(100352, 1536, 512, 40, 12, 4), hidden_act="silu",
        rms_norm_eps=1e-5, attention_bias=False, attention_dropout=0.0, attention_multiplier=0.0078125,
        embedding_multiplier=12, init_method="mup", layer_types=at(40, (5, 15, 25, 35), "attention", "mamba"),
        logits_scaling=6, mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=64,
        mamba_d_state=128, mamba_expand=2, mamba_n_groups=1, mamba_n_heads=48, mamba_proj_bias=False,
        max_position_embeddings=131072, normalization_function="rmsnorm", num_experts_per_tok=6, num_local_experts=64,
        output_router_logits=False, pad_token_id=100256, position_embedding_type="nope", residual_multiplier=0.22,
        rope_scaling=None, rope_theta=10000, router_aux_loss_coef=0.0, shared_intermediate_size=1024,
        tie_word_embeddings=True,
    ),
    "MiniMaxAI/MiniMax-Text-01-hf": causal(
        "MiniMax", "minimax", **sizes(200064, 6144, 9216, 80, 64, 8), hidden_act="silu", rms_norm_eps=1e-5,
        attention_dropout=0.0, attn_type_list=([0] * 7 + [1]) * 10, block_size=256, head_dim=128,
        full_attn_alpha_factor=3.5565588200778455, full_attn_beta_factor=1.0,
        linear_attn_alpha_factor=3.5565588200778455, linear_attn_beta_factor=1.0, mlp_alpha_factor=3.5565588200778455,
        mlp_beta_factor=1.0, layer_types=(["linear_attention"] * 7 + ["full_attention"]) * 10,
        max_position_embeddings=10240000, num_experts_per_tok=2, num_local_experts=32, output_router_logits=False,
        postnorm=True, rope_theta=10000000, rotary_dim=64, router_aux_loss_coef=0.001, router_jitter_noise=0.0,
        shared_intermediate_size=0, shared_moe_mode="sigmoid", sliding_window=None, tie_word_embeddings=False,
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": causal(
        "Qwen3Next", "qwen3_next", **sizes(151936, 2048, 5120, 48, 16, 2), hidden_act="silu", rms_norm_eps=1e-6,
        attention_dropout=0.0, decoder_sparse_step=1, full_attention_interval=4, head_dim=256,
        linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=32,
        linear_value_head_dim=128, max_position_embeddings=262144, mlp_only_layers=[], moe_intermediate_size=512,
        norm_topk_prob=True, num_experts=512, num_experts_per_tok=10, output_router_logits=False,
        partial_rotary_factor=0.25, rope_scaling=None, rope_theta=10000000, router_aux_loss_coef=0.001,
        shared_expert_intermediate_size=512, tie_word_embeddings=False, use_sliding_window=False,
    ),
    "moonshotai/Kimi-Linear-48B-A3B-Instruct": causal(
        "KimiLinear", "kimi_linear", **sizes(163840, 2304, 9216, 27, 32, 32), hidden_act="silu", rms_norm_eps=1e-5,
        first_k_dense_replace=1, head_dim=72, kv_lora_rank=512, mla_use_nope=True, model_max_length=1048576,
        moe_intermediate_size=1024, moe_layer_freq=1, moe_renormalize=True, moe_router_activation_func="sigmoid",
        num_expert_group=1, num_experts=256, num_experts_per_token=8, num_nextn_predict_layers=0, num_shared_experts=1,
        pad_token_id=163839, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=None,
        rope_theta=10000.0, routed_scaling_factor=2.446, tie_word_embeddings=False, topk_group=1,
        use_grouped_topk=True, v_head_dim=128, auto_map={"AutoConfig": "configuration_kimi.KimiLinearConfig"},
        linear_attn_config={
            "full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128, "num_heads": 32,
            "kda_layers": [i for i in range(1, 27) if i % 4], "short_conv_kernel_size": 4,
        },
    ),
    "google/recurrentgemma-2b": causal(
        "RecurrentGemma", "recurrent_gemma", **sizes(256000, 2560, 15360, 26, 10, 1), rms_norm_eps=1e-6,
        attention_bias=False, attention_dropout=0.0, attention_window_size=2048, conv1d_width=4,
        block_types=["recurrent", "recurrent", "attention"], embeddings_scale_by_sqrt_dim=True, head_dim=256,
        final_w_init_variance_scale=0.07692307692307693, hidden_activation="gelu_pytorch_tanh", logits_soft_cap=30.0,
        lru_width=2560, pad_token_id=0, partial_rotary_factor=0.5, rope_theta=10000.0, w_init_variance_scale=0.01,
    ),
    "NX-AI/xLSTM-7b": causal(
        "xLSTM", "xlstm", add_forward_backend_padding=False, add_out_norm=True, add_post_norm=False,
        add_qk_norm=False, autocast_kernel_dtype="bfloat16", cell_norm_eps=1e-6, chunk_size=64,
        chunkwise_kernel="chunkwise--triton_xl_chunk", embedding_dim=4096, eps=1e-6, ffn_proj_factor=2.667,
        ffn_round_up_to_multiple_of=64, force_bos_token_insert=True, gate_soft_cap=15.0, head_dim=512,
        igate_bias_init_range=-10.0, inference_state_dtype="float32", max_inference_chunksize=16384,
        mlstm_round_up_to_multiple_of=64, mode="inference", norm_eps=1e-6, norm_reduction_force_float32=True,
        num_blocks=32, num_heads=8, output_logit_soft_cap=30.0, pad_token_id=1, qk_dim_factor=0.5,
        return_last_states=True, sequence_kernel="native_sequence__triton", step_kernel="triton",
        tie_word_embeddings=False, use_bias=False, v_dim_factor=1.0, vocab_size=50304, weight_mode="single",
    ),
    "LiquidAI/LFM2-350M": causal(
        "Lfm2", "lfm2", block_auto_adjust_ff_dim=True, block_dim=1024, block_ff_dim=6656, block_ffn_dim_multiplier=1.0,
        block_mlp_init_scale=1.0, block_multiple_of=256, block_norm_eps=1e-5, block_out_init_scale=1.0,
        block_use_swiglu=True, block_use_xavier_init=True, conv_L_cache=3, conv_bias=False, conv_dim=1024,
        conv_dim_out=1024, conv_use_xavier_init=True, full_attn_idxs=[2, 5, 8, 10, 12, 14], hidden_size=1024,
        max_position_embeddings=128000, norm_eps=1e-5, num_attention_heads=16, num_heads=16, num_hidden_layers=16,
        num_key_value_heads=8, pad_token_id=0, rope_theta=1000000.0, use_pos_enc=True, vocab_size=65536,
    ),
    "google/vit-base-patch16-224": VISION | {
        "architectures": ["ViTForImageClassification"], "model_type": "vit", "image_size": 224,
        "intermediate_size": 3072, "layer_norm_eps": 1e-12, "patch_size": 16,
        "id2label": {str(i): f"class {i}" for i in range(1000)},
        "label2id": {f"class {i}": str(i) for i in range(1000)},
    },
    "facebook/dinov2-base": DINO | {"architectures": ["Dinov2Model"], "model_type": "dinov2"},
    "facebook/dinov2-with-registers-base": DINO | {
        "architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers", "num_register_tokens": 4,
        "interpolate_antialias": True, "interpolate_offset": 0.0,
    },
}  # fmt: skip
