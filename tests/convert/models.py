"""Tiny models of transformers with drawn weights, several option sets of each family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 61, "pad_token_id": 0,
}  # fmt: skip


def drawn(model: Any) -> Any:
    """Matrices that keep the size of what they map, and vectors off their constants."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5) if p.ndim > 1 else p.add_(0.2 * torch.randn(p.shape))
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.add_(0.1 * torch.randn(b.shape))
    return model.eval()


def made(family: str, **options: Any) -> Any:
    """A causal language model; `family` is the name of its classes."""
    import transformers

    config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")(**SIZES | options)
    return drawn(getattr(transformers, f"{family}ForCausalLM")(config))


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    """Rotary parameters as transformers names them."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5e4, **parameters}}


LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)  # fmt: skip
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=8.0, beta_slow=2.0)
LONGROPE = {
    "original_max_position_embeddings": 4, "max_position_embeddings": 64,
    **rope("longrope", short_factor=[1.0] * 8, long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0]),
}  # fmt: skip
KINDS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 7}
EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 48}
QWEN_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
DEEPSEEK = {
    "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 3, "kv_lora_rank": 24, "q_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 16, "first_k_dense_replace": 1, "rms_norm_eps": 1e-5,
}  # fmt: skip
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
GRANITE = {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}
BIASES = {"attention_bias": True, "tie_word_embeddings": True}

# tokens to be read, where angles depend on it
CONTEXTS = {"llama.dynamic": 64, "phi3.long": 64}
# a name with a dot is another option set of the family in front of it
MODELS: dict[str, Callable[[], Any]] = {
    name: partial(made, family, **options)
    for name, family, options in [
        ("llama", "Llama", {}),
        ("llama.biases", "Llama", {**BIASES, "mlp_bias": True, "head_dim": 8, "rms_norm_eps": 1e-3}),
        ("llama.llama3", "Llama", LLAMA3),
        ("llama.linear", "Llama", rope("linear", factor=3.0)),
        ("llama.yarn", "Llama", YARN),
        ("llama.dynamic", "Llama", {**rope("dynamic", factor=2.0), "max_position_embeddings": 64}),
        # a share that the original's code does not read: it rotates every channel
        ("llama.partial", "Llama", rope("default", partial_rotary_factor=0.5)),
        ("mistral", "Mistral", {"sliding_window": 6}),
        ("mistral.full", "Mistral", {"sliding_window": None, "head_dim": 24, "tie_word_embeddings": True}),
        ("qwen2", "Qwen2", {}),
        ("qwen2.window", "Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, **YARN}),
        ("qwen3", "Qwen3", {"head_dim": 24}),
        ("qwen3.window", "Qwen3", {"head_dim": 16, "use_sliding_window": True, **BIASES, **KINDS}),
        ("gemma3_text", "Gemma3", {"head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 3}),
        ("gemma3_text.scaled", "Gemma3", {
            "head_dim": 24, "query_pre_attn_scalar": 20, "final_logit_softcapping": 3.0, "attention_bias": True,
            "rope_parameters": GEMMA_ROPE, "tie_word_embeddings": False, **KINDS,
        }),
        ("olmo2", "Olmo2", {}),
        ("olmo2.biases", "Olmo2", {**BIASES, "num_key_value_heads": 4, **YARN}),
        ("phi3", "Phi3", {}),
        ("phi3.partial", "Phi3", {
            "sliding_window": 6, "tie_word_embeddings": True,
            **rope("default", partial_rotary_factor=0.5),
        }),
        ("phi3.long", "Phi3", LONGROPE),
        ("mixtral", "Mixtral", EXPERTS),
        ("mixtral.window", "Mixtral", {**EXPERTS, "sliding_window": 6, "tie_word_embeddings": True, "head_dim": 8}),
        ("qwen3_moe", "Qwen3Moe", QWEN_MOE),
        ("qwen3_moe.some", "Qwen3Moe", {
            **QWEN_MOE, **BIASES, "mlp_only_layers": [0], "norm_topk_prob": True, "use_sliding_window": True,
            "sliding_window": 6, "head_dim": 8,
        }),
        ("qwen3_moe.dense", "Qwen3Moe", {**QWEN_MOE, "mlp_only_layers": [0, 1, 2]}),
        ("qwen3_moe.step", "Qwen3Moe", {**QWEN_MOE, "decoder_sparse_step": 2, "num_hidden_layers": 4}),
        ("deepseek_v3", "DeepseekV3", DEEPSEEK),
        ("deepseek_v3.yarn", "DeepseekV3", {
            **DEEPSEEK, **BIASES, "q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False,
            "n_shared_experts": 2, "routed_scaling_factor": 1.5,
            **rope("yarn", factor=4.0, original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=0.7),
        }),
        ("gpt_oss", "GptOss", {**EXPERTS, "head_dim": 16, "sliding_window": 6, "swiglu_limit": 0.5}),
        ("gpt_oss.plain", "GptOss", {
            **EXPERTS, **KINDS, **LLAMA3, "head_dim": 8, "attention_bias": False, "tie_word_embeddings": True,
        }),
        ("granite", "Granite", {**GRANITE, "attention_multiplier": 0.2}),
        ("granite.biases", "Granite", {**BIASES, "mlp_bias": True, "attention_multiplier": 0.1}),
    ]
}  # fmt: skip
