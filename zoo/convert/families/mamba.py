"""Mamba (arXiv:2312.00752): mixers and no feed-forward layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.families import _layers
from zoo.convert.rules import Rule, alike, residual_blocks, same
from zoo.convert.settings import Settings

# stand in published configurations; the original does not read them
UNUSED = ("d_inner", "d_model", "fused_add_norm", "n_layer", "pad_vocab_size_multiple", "rms_norm", "ssm_cfg")


def document(s: Settings, **more: Any) -> dict[str, Any]:
    """The configuration; `more` options of the mixer."""
    s.expect(hidden_act=("silu", "swish"))
    _layers.idle(s, "expand", *UNUSED)  # the width says it too, and is what counts where they differ (Falcon-Mamba)
    expand, rest = divmod(s.intermediate_size, s.hidden_size)
    if rest:
        raise s.refused(f"intermediate_size: {s.intermediate_size}", f"must be a multiple of {s.hidden_size}")
    mixer = {"state_dim": s.state_size, "expand": expand, "conv_size": s.conv_kernel, "dt_rank": s.time_step_rank}
    mixer |= _layers.given(bias=(s.use_bias, False), conv_bias=(s.use_conv_bias, True)) | more
    return _layers.body(s, s.layer_norm_epsilon, {"layer": {"mamba": mixer}}, ["layer"] * s.num_hidden_layers)


def rules(s: Settings, model: Model) -> Iterator[Rule]:
    """What each tensor is in theirs."""
    yield from _layers.ends(s, "backbone.embeddings", "backbone.norm_f")
    for i, name in enumerate(residual_blocks(model)):
        yield same(f"{name}.norm.weight", f"backbone.layers.{i}.norm.weight")
        yield from alike(model, f"{name}.block", f"backbone.layers.{i}.mixer")
