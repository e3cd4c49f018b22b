"""Models of transformers with drawn weights: the same logits, the same continuation, and back bit for bit."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from models import CONTEXTS, LLAMA3, MODELS, made
from parity import measure

import zoo
from zoo.convert import from_hf, plan, to_hf


@pytest.mark.parametrize("name", MODELS)
def test_family(name):
    found = measure(MODELS[name](), CONTEXTS.get(name))
    assert found.error < 1e-4 and found.error_fp64 < 1e-9
    assert found.generation and found.round_trip


@pytest.mark.parametrize("name", [n for n in MODELS if "." not in n])
@torch.no_grad()
def test_every_setting_is_mapped_refused_or_without_effect(name):
    theirs, x = MODELS[name](), torch.arange(1, 40)[None]
    for key, value in theirs.config.to_dict().items():
        if not isinstance(value, (bool, float)) or key.startswith(("return_", "output_")):
            continue  # the others are sizes mostly: where one is lost, weights do not fit
        config = copy.deepcopy(theirs.config)
        setattr(config, key, not value if isinstance(value, bool) else 0.7 * value + 0.3)
        changed = type(theirs)(config).eval()
        changed.load_state_dict(theirs.state_dict(), strict=False)
        with contextlib.suppress(zoo.ConfigError):
            torch.testing.assert_close(from_hf(changed)(x), changed(x).logits, atol=1e-3, rtol=1e-3, msg=key)


def test_what_cannot_be_represented_is_refused_before_weights_are_touched(monkeypatch):
    theirs = made("Llama", hidden_act="gelu")
    monkeypatch.setattr("zoo.convert.fill", pytest.fail)
    with pytest.raises(zoo.ConfigError, match="llama: hidden_act: 'gelu' cannot be represented; can be 'silu'"):
        from_hf(theirs)
    theirs.config.hidden_act, theirs.config.rotate_twice = "silu", True
    with pytest.raises(zoo.ConfigError, match="rotate_twice: True cannot be represented"):
        from_hf(theirs)
    with pytest.raises(zoo.ConfigError, match="'lama' cannot be converted; did you mean llama"):
        plan({"model_type": "lama"}, dtype=torch.float32)


LLAMA3_HALF = {"rope_parameters": LLAMA3["rope_parameters"] | {"partial_rotary_factor": 0.5}}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, "'axial' .* can be default, linear"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved: True cannot be represented; can be False"),
        ("llama", LLAMA3_HALF, "partial_rotary_factor: 0.5 with rope_type: 'llama3' cannot be represented"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha: 1.0 cannot be represented; can be 1.702"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types: 'chunked_attention'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: 'softmax'"),
        ("mixtral", {"num_experts_per_tok": 1}, "top_k=1 with renormalize=true"),
        ("mixtral", {"num_experts_per_tok": 7}, "top_k=7 is more than num_experts=6"),
    ],
)
def test_features_without_a_counterpart_are_named(name, settings, message):
    config = MODELS[name]().config.to_dict() | settings
    with pytest.raises(zoo.ConfigError, match=message):
        plan(config, dtype=torch.float32)


def test_a_converted_model_is_saved_and_changed(tmp_path):
    ours = from_hf(made("Llama"))
    again = zoo.from_pretrained(ours.save_pretrained(tmp_path))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in ours.state_dict().items())
    assert to_hf(again).keys() == to_hf(ours).keys()
    changed = zoo.build(dict(ours.config), ["define.layer[0].attention.window=4"])
    with pytest.raises(zoo.ConfigError, match="no longer a llama: its define was changed"):
        to_hf(changed)
