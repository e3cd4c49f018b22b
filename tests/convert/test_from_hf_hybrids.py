"""Hybrids, state space and vision models of transformers with drawn weights: equal, and back bit for bit."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from models_hybrid import MODELS
from parity import built, inputs, measure, says

import zoo
from zoo.convert import from_hf, plan, to_hf


@pytest.mark.parametrize("name", MODELS)
def test_family(name):
    found = measure(MODELS[name]())
    assert found.error < 1e-4 and found.error_fp64 < 1e-9
    assert found.generation in (True, None)
    assert found.round_trip


@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers"])
@torch.no_grad()
def test_hidden_patches(name):
    theirs = MODELS[name]()
    ours, x = from_hf(theirs), inputs(theirs)
    hidden = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    want = theirs(x, bool_masked_pos=hidden)
    torch.testing.assert_close(ours.features(x, hidden), want.last_hidden_state, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(x, hidden), want.pooler_output, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"set vision\.mask_token: true"):
        from_hf(MODELS["dinov2.head"]()).features(x, hidden)


@pytest.mark.parametrize("name", [n for n in MODELS if "." not in n])
@torch.no_grad()
def test_every_setting_is_mapped_refused_or_without_effect(name):
    theirs = MODELS[name]()
    x = inputs(theirs)[:1]
    before = says(theirs, x)
    for key, value in theirs.config.to_dict().items():
        if not isinstance(value, (bool, float)) or key.startswith(("return_", "output_")):
            continue  # the others are sizes mostly: where one is lost, weights do not fit
        config = copy.deepcopy(theirs.config)
        setattr(config, key, not value if isinstance(value, bool) else 0.7 * value + 0.3)
        try:
            changed = built(type(theirs), config).eval()
            changed.load_state_dict(theirs.state_dict(), strict=False)
            want = says(changed, x)
        except RuntimeError:
            continue  # it changes shapes, or the original cannot
        if not torch.equal(want, before):
            with contextlib.suppress(zoo.ConfigError):
                torch.testing.assert_close(says(from_hf(changed), x), want, atol=1e-3, rtol=1e-3, msg=key)


def test_what_cannot_be_represented_is_refused():
    from transformers import ViTConfig, ViTModel

    for name, settings, message in (
        ("mamba", {"intermediate_size": 100}, "intermediate_size: 100 cannot be represented; must be a multiple of 64"),
        ("recurrent_gemma", {"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim: False"),
        ("mamba", {"hidden_act": "gelu"}, "mamba: hidden_act: 'gelu' cannot be represented; can be 'silu'"),
        ("nemotron_h.experts", {"moe_latent_size": 16}, "moe_latent_size: 16 cannot be represented"),
        ("zamba2", {"tie_word_embeddings": False}, "tie_word_embeddings: False cannot be represented"),
        ("minimax", {"num_attention_heads": 6}, "num_attention_heads: 6 cannot be represented; decays"),
        ("falcon_h1.biases", {"projectors_bias": False}, "mamba_proj_bias without projectors_bias"),
        ("falcon_h1.biases", {"mamba_norm_before_gate": True}, "mamba_norm_before_gate: True cannot be represented"),
        ("xlstm", {"use_bias": True}, "use_bias: True cannot be represented"),
        ("vit", {"image_size": [32, 48]}, "must be a square"),
    ):
        config = MODELS[name]().config.to_dict()
        with pytest.raises(zoo.ConfigError, match=message):
            plan(config | settings, dtype=torch.float32)
    with pytest.raises(zoo.ConfigError, match="the model ViTModel cannot be represented"):
        from_hf(ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)))


@torch.no_grad()
def test_weights_that_have_no_place_are_watched():
    """Norms without weights and decays that the configuration says: neither is lost silently."""
    ours = from_hf(MODELS["falcon_mamba"]())
    ours.get_parameter("layers.0.items.0.block.dt_layernorm.weight").mul_(2)
    with pytest.raises(zoo.ConfigError, match=r"dt_layernorm\.weight was changed; the original has no such weights"):
        to_hf(ours)
    theirs = MODELS["minimax"]()
    theirs.model.layers[0].self_attn.slope_rate.mul_(2)
    with pytest.raises(zoo.ConfigError, match="slope_rate is not the one that the configuration says"):
        from_hf(theirs)
