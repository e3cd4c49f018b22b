"""Activation bytes of whole models, predicted from the graph, against what a training forward leaves in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drawn import as_drawn
from torch.nn import functional as F

import zoo
from zoo.architectures.block_diffusion import BlockDiffusionLM
from zoo.conformance.kept import kept_bytes
from zoo.cost import estimate
from zoo.kernels import native

pytestmark = pytest.mark.skipif(native.missing("attention") is not None, reason="the C cores keep what is predicted")

ROWS, TOKENS = 2, 64
IMAGES = {"dinov2_small", "raptor_small", "vit_small"}  # dinov2_small, of 1374 tokens, is too much for a test
SMALL = {p.stem for p in Path("configs").glob("*.yaml") if p.stem.endswith(("_small", "_tiny"))} - IMAGES
LAYER = ["attention", {"swiglu": {"hidden_dim": 96}}]


def kept(model, rows=ROWS):
    torch.manual_seed(0)
    tokens = torch.randint(model.vocab_size - 1, (rows, TOKENS))
    noise = torch.rand(rows, TOKENS) * (torch.rand(rows, TOKENS) < 0.5)

    def loss():
        if isinstance(model, BlockDiffusionLM):
            return model.losses(tokens, noise).sum()
        return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    return kept_bytes(loss, [tokens, noise, *model.parameters(), *model.buffers()])


def said(model, seq_len=TOKENS, rows=ROWS):
    return estimate(model, batch_size=rows, seq_len=seq_len, mode="train").activation_bytes


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_shipped_model_keeps_what_is_predicted(monkeypatch, name):
    model = zoo.build(name).train()
    as_drawn(monkeypatch, model)
    seen = kept(model)
    assert said(model) == pytest.approx(seen, rel=0.05)


@pytest.mark.parametrize("name", ["raptor_small", "vit_small"])
def test_a_vision_model_too(name):
    model = zoo.build(name).train()
    size = model.options.grid * model.options.patch_size
    images = torch.randn(ROWS, model.options.channels, size, size)
    known = [images, *model.parameters(), *model.buffers()]
    seen = kept_bytes(lambda: model(images.clone()).logsumexp(-1).sum(), known)
    assert said(model, model.options.grid**2 + model.options.num_prefix) == pytest.approx(seen, rel=0.05)


@pytest.mark.parametrize("merge", ["sum", "mean", "max", "gated", "concat"])
@pytest.mark.parametrize("norm", [{}, {"norm": "rms"}], ids=("own norms", "one norm"))
def test_merged_branches(merge, norm):
    branches = [{"swiglu": {"hidden_dim": 96}}, "attention"]
    layer = {"parallel": branches, "merge": merge, **norm}
    model = zoo.build({"dim": 64, "vocab_size": 16, "trunk": [layer, layer]}).train()
    assert said(model) == pytest.approx(kept(model), rel=0.02)


ROUTERS = {
    "halted": "act",
    "early exit": "exit",
    "fewer tokens": {"expert_choice": {"capacity": [1.0, 0.5, 0.25]}},
    "token choice": "token_choice",
    "evened out": {"token_choice": {"balance": "bias"}},
}


@pytest.mark.parametrize(
    "loop",
    [
        {"steps": 3},
        {"steps": 3, "inject": "concat"},
        {"steps": 4, "grad_last": 2},
        {"steps": 3, "kv": "first"},
        {"steps": 3, "step_signal": "sinusoid", "router": {"act": {"copy_halted": True}}},
        *({"steps": 3, "kv": kv, "router": router} for router in ROUTERS.values() for kv in ("own", "first")),
    ],
    ids=[
        *("plain", "injected", "last two steps", "first keys", "signalled"),
        *(f"{name}, {kv} keys" for name in ROUTERS for kv in ("own", "first")),
    ],
)
def test_loops(monkeypatch, loop):
    model = zoo.build({"dim": 64, "vocab_size": 16, "trunk": [{"loop": loop, "of": LAYER}]}).train()
    as_drawn(monkeypatch, model)
    seen = kept(model)
    assert said(model) == pytest.approx(seen, rel=0.03 if "grad_last" in loop else 0.01)


@pytest.mark.parametrize(
    ("router", "bodies"),
    [({"mod": {"capacity": 0.25}}, 1), ("skip_layer", 1), ("token_choice", 2), ({"fixed": {"body": 1}}, 2)],
    ids=("mod", "skip_layer", "token_choice", "fixed"),
)
def test_routes(monkeypatch, router, bodies):
    route = {"route": {"router": router, "bodies": [LAYER, [["gla", "swiglu"]]][:bodies]}}
    model = zoo.build({"dim": 64, "vocab_size": 16, "trunk": [route]}).train()
    if router != "skip_layer":  # which trains on all tokens
        as_drawn(monkeypatch, model)
    seen = kept(model)
    assert said(model) == pytest.approx(seen, rel=0.01)


@pytest.mark.parametrize("recipe", ["bd3", "fast_dllm", "nbdiff"])
@pytest.mark.parametrize("rows", [1, 2])
def test_two_copies_of_a_row(recipe, rows):
    """Also where attention is called several times, and next to blocks that see one token alone."""
    latent = {"mla": {"num_heads": 2, "kv_lora_rank": 16, "v_head_dim": 24}}
    trunk = [LAYER, {"loop": 3, "of": [{"attention": {"num_heads": 4, "num_kv_heads": 1}}]}, [latent, "moe"]]
    given = {"dim": 64, "vocab_size": 16, "trunk": trunk, "diffusion": {"recipe": recipe, "block_size": 16}}
    model = zoo.build(given).train()
    assert said(model, rows=rows) == pytest.approx(kept(model, rows), rel=0.01)
