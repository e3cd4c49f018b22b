"""Tiny models of transformers with drawn weights: state space models, hybrids and vision, several option sets each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
    return model.eval()


def made(name: str, **options: Any) -> Any:
    """A causal language model of the family of that name."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**options)
    return drawn(getattr(transformers, f"{name}ForCausalLM")(config))


MAMBA = SIZES | {"num_hidden_layers": 2, "state_size": 8}
MAMBA2 = MAMBA | {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16}

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
}  # fmt: skip
