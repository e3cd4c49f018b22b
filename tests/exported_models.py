"""Five small models."""

from __future__ import annotations

from typing import Any

_TINY = {"dim": 32, "vocab_size": 257}
_ATTENTION = {"attention": {"num_heads": 4, "num_kv_heads": 2}}
MODELS: dict[str, Any] = {
    "hydra": "hydra_small",
    "mor": "mor_small",
    "llama": {**_TINY, "name": "llama", "trunk": [{"repeat": 2, "of": [[_ATTENTION, {"swiglu": {"hidden_dim": 48}}]]}]},
    "mamba2": {
        **_TINY, "name": "mamba2", "tie_embeddings": False, "trunk": [{"repeat": 2, "of": [["mamba2"]]}],
    },
    "moe": {
        **_TINY, "name": "moe", "logit_cap": 20.0,
        "trunk": [
            [_ATTENTION, {"moe": {"num_experts": 4, "hidden_dim": 16, "score": "sigmoid", "balance": "bias"}}],
            {"mlp": {"hidden_dim": 40}, "share": "twice"}, {"mlp": {"hidden_dim": 40}, "share": "twice"},
        ],
    },
}  # fmt: skip
