"""Hybrids, state space and vision models of transformers with drawn weights: equal, and back bit for bit."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from models_hybrid import MODELS, built
from torch.overrides import TorchFunctionMode

import zoo
from zoo.convert import from_hf, plan, to_hf

VISION = {n for n in MODELS if n.startswith(("vit", "dino"))}
# their cached step does not clamp delta, their sequence does
UNLIKE_ITSELF = {"mamba2.biases", "bamba.biases", "nemotron_h.biases", "zamba2.adapters"}


class Wide(TorchFunctionMode):
    """What a model casts to fp32 becomes fp64, so that it can be compared to the last digit."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextlib.contextmanager
def in_fp64():
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def tokens():
    return torch.randint(1, 61, (2, 33), generator=torch.Generator().manual_seed(3))


def assert_returns(ours, theirs):
    """The weights on the way back are those that came."""
    back, kept = to_hf(ours), theirs.state_dict()
    for name, tensor in back.items():
        assert torch.equal(tensor, kept[name]), name
    tied = {n for n in kept.keys() - back.keys() if any(kept[n].data_ptr() == kept[m].data_ptr() for m in back)}
    assert kept.keys() - back.keys() == tied


@pytest.mark.parametrize("name", sorted(MODELS.keys() - VISION))
@torch.no_grad()
def test_language_model(name):
    theirs, x = MODELS[name](), tokens()
    ours = from_hf(theirs)
    want = theirs(x, use_cache=False).logits
    torch.testing.assert_close(ours(x), want, atol=1e-4 * want.std().item(), rtol=0)
    theirs.generation_config.eos_token_id = None
    if name not in UNLIKE_ITSELF:
        mask = torch.ones_like(x[:, :7])
        more = theirs.generate(x[:, :7], attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert torch.equal(ours.generate(x[:, :7], 8), more)
    assert_returns(ours, theirs)
    with in_fp64():
        exact = built(type(theirs), copy.deepcopy(theirs.config)).double().eval()
        given = {n: t for n, t in theirs.state_dict().items() if "decay" not in n and "slope" not in n}  # rounded
        exact.load_state_dict(given, strict=False)
        exact.set_experts_implementation("eager")  # the other has no fp64
        want = exact(x, use_cache=False).logits
    got = ours.double()(x)
    torch.testing.assert_close(got, want, atol=1e-9 * want.std().item(), rtol=0)


@pytest.mark.parametrize("name", sorted(VISION))
@torch.no_grad()
def test_vision_model(name):
    theirs = MODELS[name]()
    ours, config = from_hf(theirs), theirs.config
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        x = torch.randn(2, config.num_channels, size, size, generator=torch.Generator().manual_seed(3)).to(dtype)
        found = theirs.to(dtype)(x)
        if hasattr(found, "logits"):
            want, got = found.logits, ours.to(dtype)(x)
        else:
            want, got = found.last_hidden_state, ours.to(dtype).features(x)
            torch.testing.assert_close(ours(x), found.pooler_output, atol=bound * want.std().item(), rtol=0)
            hidden = torch.rand(2, want.shape[1] - 1 - getattr(config, "num_register_tokens", 0)) < 0.5
            masked = theirs(x, bool_masked_pos=hidden).last_hidden_state
            torch.testing.assert_close(ours.features(x, hidden), masked, atol=bound * want.std().item(), rtol=0)
        torch.testing.assert_close(got, want, atol=bound * want.std().item(), rtol=0)
    assert_returns(ours, theirs)


@pytest.mark.parametrize("name", [n for n in MODELS if "." not in n])
@torch.no_grad()
def test_every_setting_is_mapped_refused_or_without_effect(name):
    theirs = MODELS[name]()
    x = torch.randn(1, 3, 32, 32) if name in VISION else tokens()[:1]

    def says(model):
        found = model(x) if name in VISION else model(x, use_cache=False)
        return found.logits if hasattr(found, "logits") else found.pooler_output

    before = says(theirs)
    for key, value in theirs.config.to_dict().items():
        if not isinstance(value, (bool, float)) or key.startswith(("return_", "output_")):
            continue  # the others are sizes mostly: where one is lost, weights do not fit
        config = copy.deepcopy(theirs.config)
        setattr(config, key, not value if isinstance(value, bool) else 0.7 * value + 0.3)
        try:
            changed = built(type(theirs), config).eval()
            changed.load_state_dict(theirs.state_dict(), strict=False)
            want = says(changed)
        except RuntimeError:
            continue  # it changes shapes, or the original cannot
        if not torch.equal(want, before):
            with contextlib.suppress(zoo.ConfigError):
                torch.testing.assert_close(from_hf(changed)(x), want, atol=1e-3, rtol=1e-3, msg=key)


def test_what_cannot_be_represented_is_refused():
    from transformers import ViTConfig, ViTModel

    for name, settings, message in (
        ("mamba", {"hidden_act": "gelu"}, "mamba: hidden_act: 'gelu' cannot be represented; can be 'silu'"),
        ("nemotron_h", {"layers_block_type": ["moe"]}, "a layer of experts cannot be represented"),
        ("zamba2", {"tie_word_embeddings": False}, "tie_word_embeddings: False cannot be represented"),
        ("minimax", {"num_attention_heads": 6}, "num_attention_heads: 6 cannot be represented; decays"),
        ("falcon_h1.biases", {"projectors_bias": False}, "mamba_proj_bias without projectors_bias"),
        ("falcon_h1.biases", {"mamba_norm_before_gate": True}, "mamba_norm_before_gate: True cannot be represented"),
        ("xlstm", {"use_bias": True}, "use_bias: True cannot be represented"),
        ("qwen3_next", {"shared_expert_intermediate_size": 40}, "must be a multiple of moe_intermediate_size, 32"),
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
