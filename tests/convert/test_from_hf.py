"""Models of transformers with drawn weights: the same logits, the same continuation, and back bit for bit."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.convert import from_hf, plan, to_hf

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 61, "pad_token_id": 0,
}  # fmt: skip


def drawn(model):
    """Matrices that keep the size of what they map, and vectors off their constants."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5) if p.ndim > 1 else p.add_(0.2 * torch.randn(p.shape))
    return model.eval()


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    return drawn(LlamaForCausalLM(LlamaConfig(**SIZES | options)))


def assert_converts(theirs):
    """Logits, greedy continuation with a cache, and the weights on the way back."""
    ours = from_hf(theirs)
    x = torch.randint(1, 61, (2, 33), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = theirs(x, use_cache=False).logits
        torch.testing.assert_close(ours(x), want, atol=1e-4 * want.std().item(), rtol=0)
    theirs.generation_config.eos_token_id = None
    mask = torch.ones_like(x[:, :7])
    more = theirs.generate(x[:, :7], attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.generate(x[:, :7], 8), more)
    back, kept = to_hf(ours), theirs.state_dict()
    for name, tensor in back.items():
        assert torch.equal(tensor, kept[name]), name
    tied = {n for n in kept.keys() - back.keys() if any(kept[n].data_ptr() == kept[m].data_ptr() for m in back)}
    assert kept.keys() - back.keys() == tied
    return ours


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 8},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    ],
)  # fmt: skip
def test_llama(options):
    assert_converts(llama(**options))


def test_what_cannot_be_represented_is_refused_before_weights_are_touched(monkeypatch):
    theirs = llama(hidden_act="gelu")
    monkeypatch.setattr("zoo.convert.fill", pytest.fail)
    with pytest.raises(zoo.ConfigError, match="llama: hidden_act: 'gelu' cannot be represented; can be 'silu'"):
        from_hf(theirs)
    theirs.config.hidden_act, theirs.config.rotate_twice = "silu", True
    with pytest.raises(zoo.ConfigError, match="rotate_twice: True cannot be represented"):
        from_hf(theirs)
    with pytest.raises(zoo.ConfigError, match="'lama' cannot be converted; did you mean llama"):
        plan({"model_type": "lama"}, dtype=torch.float32)


def test_a_converted_model_is_saved_and_changed(tmp_path):
    ours = from_hf(llama())
    again = zoo.from_pretrained(ours.save_pretrained(tmp_path))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in ours.state_dict().items())
    assert to_hf(again).keys() == to_hf(ours).keys()
    changed = zoo.build(dict(ours.config), ["define.layer[0].attention.window=4"])
    with pytest.raises(zoo.ConfigError, match="no longer a llama: its define was changed"):
        to_hf(changed)
