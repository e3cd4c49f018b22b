"""Falcon-Mamba (arXiv:2410.05355): Mamba with norms of dt, B and C that have no weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zoo.architectures.model import Model
from zoo.convert.families import _layers, mamba
from zoo.convert.rules import Rule, alike, constant, residual_blocks, same
from zoo.convert.settings import Settings

NORMS = ("dt_layernorm.weight", "b_layernorm.weight", "c_layernorm.weight")


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    return mamba.document(s, bcdt_norm=True, norm_eps=s.mixer_rms_eps)


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "backbone.embeddings", "backbone.norm_f")
    for i, name in enumerate(residual_blocks(model)):
        yield same(f"{name}.norm.weight", f"backbone.layers.{i}.norm.weight")
        for rule in alike(model, f"{name}.block", f"backbone.layers.{i}.mixer"):
            ours = rule.ours[0]
            norm = ours.endswith(NORMS)
            yield constant(ours, torch.ones(model.get_parameter(ours).shape)) if norm else rule
