"""Mamba-2 (arXiv:2405.21060): mixers and no feed-forward layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers
from zoo.convert.families.mamba import rules as rules_of_mamba
from zoo.convert.rules import Rule
from zoo.convert.settings import Settings


def document(s: Settings) -> dict[str, Any]:
    """The configuration."""
    s.expect(hidden_act=("silu", "swish"))
    # the last three: of published configurations; the original norms behind the gate, and is expand times as wide
    _layers.idle(s, "time_step_rank", "chunk_size", "intermediate_size", "norm_before_gate", "rms_norm")
    mixer = {
        "num_heads": s.num_heads, "head_dim": s.head_dim, "state_dim": s.state_size, "num_groups": s.n_groups,
        "expand": s.expand, "conv_size": s.conv_kernel, "norm_eps": s.layer_norm_epsilon,
    } | _layers.given(bias=(s.use_bias, False), conv_bias=(s.use_conv_bias, True))  # fmt: skip
    mixer |= _layers.step_limit(s.get("time_step_limit"))
    return _layers.body(s, s.layer_norm_epsilon, {"layer": {"mamba2": mixer}}, ["layer"] * s.num_hidden_layers)


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from rules_of_mamba(s, model)
