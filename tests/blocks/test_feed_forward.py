"""swiglu, mlp, rms and layer against Hugging Face's modules and closed forms."""

import pytest
import torch
from torch.nn import functional as F

import zoo.registry as registry
from zoo.blocks.swiglu import swiglu_width


def block(name, dim=32, **options):
    torch.manual_seed(0)
    return registry.create(name, dim, dtype=torch.float64, **options)


X = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_swiglu_is_llamas():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48, mlp_bias=True)).double()
    ours = block("swiglu", hidden_dim=48, bias=True)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X), theirs(X))


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gate_scale_is_that_of_the_weight(name):
    plain, scaled = block(name), block(name, gate_scale=0.3)
    with torch.no_grad():
        plain.gate_proj.weight.mul_(0.3)
    torch.testing.assert_close(scaled(X), plain(X))


def test_swiglu_width_has_the_parameters_of_a_fourfold_mlp():
    assert [swiglu_width(d) for d in (32, 48, 768)] == [96, 128, 2048]
    assert 3 * 768 * swiglu_width(768) == 8 * 768**2


@pytest.mark.parametrize(
    "activation, hf_name",
    [("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("relu", "relu"), ("relu2", "relu2"), ("silu", "silu")],
)
def test_mlp_activations(activation, hf_name):
    from transformers.activations import ACT2FN

    ours = block("mlp", activation=activation, hidden_dim=40, bias=True)
    torch.nn.init.normal_(ours.up_proj.bias)
    want = ours.down_proj(ACT2FN[hf_name](ours.up_proj(X)))
    torch.testing.assert_close(ours(X), want)


def test_mlp_defaults_and_errors():
    ours = block("mlp")
    assert ours.up_proj.weight.shape == (128, 32) and ours.up_proj.bias is None
    with pytest.raises(ValueError, match="activation must be one of"):
        registry.load("mlp")(32, activation="tanh")


def test_mlp_is_gpt2s():
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    theirs = GPT2MLP(128, GPT2Config(n_embd=32, resid_pdrop=0.0)).double()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = block("mlp", activation="gelu_tanh", bias=True)
    ours.load_state_dict(
        {
            "up_proj.weight": theirs.c_fc.weight.t(), "up_proj.bias": theirs.c_fc.bias,
            "down_proj.weight": theirs.c_proj.weight.t(), "down_proj.bias": theirs.c_proj.bias,
        }
    )  # fmt: skip
    torch.testing.assert_close(ours(X), theirs(X))


def test_rms_is_torchs_and_computes_wide():
    ours = block("rms", eps=1e-4)
    torch.nn.init.normal_(ours.weight)
    torch.testing.assert_close(ours(X), F.rms_norm(X, (32,), ours.weight, eps=1e-4))
    tiny = X.bfloat16() * 1e-3
    narrow = registry.create("rms", 32, dtype=torch.bfloat16)
    want = F.rms_norm(tiny.double(), (32,), eps=1e-6)
    assert narrow(tiny).dtype == torch.bfloat16
    torch.testing.assert_close(narrow(tiny).double(), want, rtol=1e-2, atol=1e-2)


def test_layer_norm():
    ours = block("layer")
    torch.nn.init.normal_(ours.weight)
    torch.nn.init.normal_(ours.bias)
    centred = X - X.mean(-1, keepdim=True)
    want = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.weight + ours.bias
    torch.testing.assert_close(ours(X), want)
    assert set(block("layer", bias=False).state_dict()) == {"weight"}
