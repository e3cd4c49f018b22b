"""Activation bytes of whole models, predicted from the graph, against what a training forward leaves in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.conformance.kept import kept_bytes
from zoo.cost import estimate
from zoo.graph.dynamic_chunks import DynamicChunks
from zoo.kernels import native

pytestmark = pytest.mark.skipif(native.missing("attention") is not None, reason="the C cores keep what is predicted")

ROWS, TOKENS = 2, 64
IMAGES = {"dinov2_small", "raptor_small", "vit_small"}  # dinov2_small, of 1374 tokens, is too much for a test
# attention over two copies of a row keeps three outputs and what merging them takes, which no block predicts
TWO_COPIES = {"bd3_small", "fast_dllm_small", "nbdiff_small"}
SMALL = {p.stem for p in Path("configs").glob("*.yaml") if p.stem.endswith(("_small", "_tiny"))} - IMAGES - TWO_COPIES


def kept(model):
    torch.manual_seed(0)
    tokens = torch.randint(model.vocab_size, (ROWS, TOKENS))

    def loss():
        return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    return kept_bytes(loss, [tokens, *model.parameters(), *model.buffers()])


def said(model, seq_len=TOKENS):
    return estimate(model, batch_size=ROWS, seq_len=seq_len, mode="train").activation_bytes


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_shipped_model_keeps_what_is_predicted(name):
    model = zoo.build(name).train()
    seen = kept(model)
    for chunker in (m for m in model.modules() if isinstance(m, DynamicChunks)):
        chunker.ratio = 1 / float(chunker.metrics["chunk_share"])  # untrained, it makes other chunks than it will
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


@pytest.mark.parametrize(
    "loop",
    [
        {"steps": 3},
        {"steps": 3, "inject": "concat"},
        {"steps": 4, "grad_last": 2},
        {"steps": 3, "router": "act"},
        {"steps": 3, "router": {"expert_choice": {"capacity": 0.5}}},
    ],
    ids=("plain", "injected", "last two steps", "halted", "fewer tokens"),
)
def test_loops(loop):
    layer = ["attention", {"swiglu": {"hidden_dim": 96}}]
    model = zoo.build({"dim": 64, "vocab_size": 16, "trunk": [{"loop": loop, "of": layer}]}).train()
    assert said(model) == pytest.approx(kept(model), rel=0.05)
