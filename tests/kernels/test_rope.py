"""Rotary embedding against the reference, the complex closed form and Hugging Face."""

import pytest
import torch

from zoo.kernels.rope import rope, rope_frequencies

torch.manual_seed(0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 4, 0])
@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}]
)
def test_against_reference_and_inverse(interleaved, rotary_dim, scaling):
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    positions = torch.randint(0, 1000, (2, 5))
    options = dict(rotary_dim=rotary_dim, interleaved=interleaved, scaling=scaling)
    y = rope(x, positions, **options)
    torch.testing.assert_close(y, rope(x, positions, backend="reference", **options), rtol=0, atol=1e-12)
    torch.testing.assert_close(rope(y, positions, inverse=True, **options), x, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: rope(x, positions, **options), x)
    for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 3e-2)):
        low = rope(x.to(dtype), positions, **options)
        assert low.dtype == dtype
        torch.testing.assert_close(low.double(), y, rtol=tolerance, atol=tolerance)


def test_angles_add_and_only_differences_matter():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    at = lambda x, p: rope(x, torch.tensor([[p]]))  # noqa: E731
    torch.testing.assert_close(rope(at(q, 5), torch.tensor([[7]])), at(q, 12))
    torch.testing.assert_close((at(q, 9) * at(k, 4)).sum(), (at(q, 105) * at(k, 100)).sum())


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 512},
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
         "beta_slow": 1.0, "truncate": False},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
         "mscale_all_dim": 0.7},
    ],
)  # fmt: skip
def test_frequencies_of_hugging_face(scaling):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=4096 * 32,
        rope_parameters={"rope_theta": 150000.0, **scaling},
    )  # fmt: skip
    want, amplitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    have, factor = rope_frequencies(64, 150000.0, scaling)
    torch.testing.assert_close(have.float(), want, rtol=1e-5, atol=1e-9)
    assert factor == pytest.approx(amplitude)


@pytest.mark.parametrize(("length", "which"), [(4096, "short_factor"), (4097, "long_factor")])
def test_longrope_of_hugging_face(length, which):
    from transformers import Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    lists = {"short_factor": [1 + 0.01 * i for i in range(32)], "long_factor": [1.0 + i for i in range(32)]}
    config = Phi3Config(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=131072, original_max_position_embeddings=4096,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "longrope", **lists},
    )  # fmt: skip
    want, amplitude = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=length)
    have, factor = rope_frequencies(
        64, 10000.0, {"rope_type": "longrope", "factors": lists[which], "attention_factor": amplitude}
    )
    torch.testing.assert_close(have.float(), want, rtol=1e-5, atol=1e-9)
    assert factor == amplitude
    x, at = torch.randn(1, 3, 2, 64, dtype=torch.float64), torch.tensor([[0, 7, 5000]])
    scaling = {"rope_type": "longrope", "factors": lists[which]}
    plain = rope(x, at, base=10000.0, scaling=scaling | {"factors": [1.0] * 32})
    torch.testing.assert_close(plain, rope(x, at, base=10000.0))
    turned = rope(x, at, scaling=scaling)
    torch.testing.assert_close(turned, rope(x, at, scaling=scaling, backend="reference"), rtol=0, atol=1e-12)


def test_refusals():
    x, p = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        rope(x, p, rotary_dim=3)
    with pytest.raises(ValueError, match="yarn has no facto"):
        rope(x, p, scaling={"rope_type": "yarn", "facto": 2.0})
    with pytest.raises(ValueError, match="needs factor"):
        rope(x, p, scaling={"rope_type": "linear"})
    with pytest.raises(ValueError, match=r"needs 4 factors, one a pair; got"):
        rope(x, p, scaling={"rope_type": "longrope", "factors": [1.0]})
