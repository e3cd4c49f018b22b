"""A small vision model whose layers stand in known phases."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import zoo

ATTENTION = {"attention": {"num_heads": 2, "causal": False, "rope": False, "bias": True}}


def known_phases(sizes: Sequence[int], **vision):
    """Layers tied in phases; each phase writes a direction of its own, much longer than all before it."""
    layer = [ATTENTION, {"mlp": {"bias": True}}]
    model = zoo.build({
        "name": "known", "architecture": "vision", "dim": 32, "norm": "layer", "data": {"source": "shapes"},
        "vision": {"image_size": 16, "patch_size": 8, "num_classes": 8} | vision,
        "trunk": [{"repeat": n, "of": layer, "tie": "all"} for n in sizes],
    })  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, phase in enumerate(model.layers):
            phase.items[0].items[1].block.down_proj.bias.copy_(30.0**i * torch.randn(32, generator=generator))
    return model
