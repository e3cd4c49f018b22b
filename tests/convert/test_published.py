"""The config.json of published models, with all that stands in it: accepted, and as many parameters as published."""

from __future__ import annotations

import pytest
import torch

from zoo.convert import hf, plan


def sizes(vocab, hidden, inner, layers, heads, keys, **more):
    """What every file has."""
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": keys, "torch_dtype": "bfloat16", "use_cache": True,
        "initializer_range": 0.02, "attention_dropout": 0.0, "transformers_version": "4.40.0", "rope_scaling": None,
        "bos_token_id": 1, "eos_token_id": [2, 3], **more,
    }  # fmt: skip


LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
YARN = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn",
    "original_max_position_embeddings": 4096,
}  # fmt: skip
GPT_OSS_YARN = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
PUBLISHED = {
    "llama": (8_030_261_248, sizes(
        128256, 4096, 14336, 32, 32, 8, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500000.0,
        rope_scaling=LLAMA3, max_position_embeddings=131072, attention_bias=False, mlp_bias=False, pretraining_tp=1,
        tie_word_embeddings=False,
    )),
    "mistral": (7_241_732_096, sizes(
        32000, 4096, 14336, 32, 32, 8, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096,
        max_position_embeddings=32768, tie_word_embeddings=False,
    )),
    "qwen2": (7_615_616_512, sizes(
        152064, 3584, 18944, 28, 28, 4, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000.0,
        use_sliding_window=False, sliding_window=131072, max_window_layers=28, use_mrope=False,
        max_position_embeddings=131072, tie_word_embeddings=False,
    )),
    "qwen3": (8_190_735_360, sizes(
        151936, 4096, 12288, 36, 32, 8, head_dim=128, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000,
        use_sliding_window=False, sliding_window=None, max_window_layers=36, attention_bias=False,
        max_position_embeddings=40960, tie_word_embeddings=False,
    )),
    "gemma3_text": (999_885_952, sizes(
        262144, 1152, 6912, 26, 4, 1, head_dim=256, hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
        rope_theta=1000000, rope_local_base_freq=10000, sliding_window=512, sliding_window_pattern=6,
        query_pre_attn_scalar=256, attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=False,
        cache_implementation="hybrid", max_position_embeddings=32768,
    )),
    "olmo2": (7_298_617_344, sizes(
        100352, 4096, 11008, 32, 32, 32, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=500000, attention_bias=False,
        max_position_embeddings=4096, tie_word_embeddings=False,
    )),
    "phi3": (3_821_079_552, sizes(
        32064, 3072, 8192, 32, 32, 32, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=2047,
        resid_pdrop=0.0, embd_pdrop=0.0, original_max_position_embeddings=4096, max_position_embeddings=4096,
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, attention_bias=False, tie_word_embeddings=False,
    )),
    "mixtral": (46_702_792_704, sizes(
        32000, 4096, 14336, 32, 32, 8, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None,
        num_experts_per_tok=2, num_local_experts=8, output_router_logits=False, router_aux_loss_coef=0.02,
        max_position_embeddings=32768, tie_word_embeddings=False,
    )),
    "qwen3_moe": (30_532_122_624, sizes(
        151936, 2048, 6144, 48, 32, 4, head_dim=128, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000.0,
        decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_experts=128,
        num_experts_per_tok=8, output_router_logits=False, router_aux_loss_coef=0.001, use_sliding_window=False,
        sliding_window=None, max_window_layers=48, attention_bias=False, tie_word_embeddings=False,
    )),
    "deepseek_v3": (671_026_404_352, sizes(
        129280, 7168, 18432, 61, 128, 128, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000, rope_scaling=YARN,
        moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1, n_group=8, topk_group=4,
        num_experts_per_tok=8, first_k_dense_replace=3, moe_layer_freq=1, ep_size=1, num_nextn_predict_layers=1,
        norm_topk_prob=True, routed_scaling_factor=2.5, scoring_func="sigmoid", topk_method="noaux_tc",
        kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        attention_bias=False, max_position_embeddings=163840, tie_word_embeddings=False,
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    )),
    "gpt_oss": (20_914_757_184, sizes(
        201088, 2880, 2880, 24, 64, 8, head_dim=64, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=150000,
        rope_scaling=GPT_OSS_YARN, sliding_window=128, layer_types=["sliding_attention", "full_attention"] * 12,
        num_local_experts=32, num_experts_per_tok=4, experts_per_token=4, initial_context_length=4096,
        output_router_logits=False, router_aux_loss_coef=0.9, swiglu_limit=7.0, attention_bias=True,
        max_position_embeddings=131072, tie_word_embeddings=False,
    )),
    "granite": (2_533_531_648, sizes(
        49155, 2048, 8192, 40, 32, 8, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=5000000.0,
        attention_multiplier=0.015625, embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22,
        attention_bias=False, mlp_bias=False, max_position_embeddings=131072, tie_word_embeddings=True,
    )),
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_published(family):
    params, values = PUBLISHED[family]
    model, _ = plan(hf.configuration({"model_type": family, **values}).to_dict(), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == params
