"""Hybrids, state space and vision models of transformers with drawn weights: equal, and back bit for bit."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from models_hybrid import MODELS
from torch.overrides import TorchFunctionMode

import zoo
from zoo.convert import from_hf, plan, to_hf

# its cached step does not clamp delta, its sequence does
UNLIKE_ITSELF = {"mamba2.biases", "bamba.biases", "nemotron_h.biases"}


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


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith(("vit", "dino"))])
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
        exact = type(theirs)(copy.deepcopy(theirs.config)).double().eval()
        given = {n: t for n, t in theirs.state_dict().items() if "decay" not in n and "slope" not in n}  # rounded
        exact.load_state_dict(given, strict=False)
        exact.set_experts_implementation("eager")  # the other has no fp64
        want = exact(x, use_cache=False).logits
    got = ours.double()(x)
    torch.testing.assert_close(got, want, atol=1e-9 * want.std().item(), rtol=0)
