"""What families of unlike layers share: the trunk as a pattern, the ends of the model, Mamba-2's step limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from zoo.architectures.model import Model
from zoo.convert.rules import Rule, alike, residual_blocks, same
from zoo.convert.settings import Settings


def trunk(layers: Sequence[str]) -> list[Any]:
    """The trunk of these named layers: a repeated pattern where there is one, else runs of equal ones."""
    for period in range(1, len(layers) // 2 + 1):
        times, rest = divmod(len(layers), period)
        if not rest and list(layers) == list(layers[:period]) * times:
            return [{"repeat": times, "of": layers[0] if period == 1 else list(layers[:period])}]
    runs = [(name, len(list(run))) for name, run in groupby(layers)]
    return [name if times == 1 else {"repeat": times, "of": name} for name, times in runs]


def body(
    s: Settings, eps: float, define: dict[str, Any], layers: Sequence[str], *, zero_centered: bool = False
) -> dict[str, Any]:
    """A model of these layers with RMS norms in front of the blocks and of the head."""
    norm = {"rms": {"eps": eps} | given(zero_centered=(zero_centered, False))}
    return {
        "dim": s.hidden_size,
        "vocab_size": s.vocab_size,
        "tie_embeddings": bool(s.get("tie_word_embeddings", False)),
        "norm": norm,
        "final_norm": norm,
        "define": {name: define[name] for name in define if name in _used(define, list(layers))},
        "trunk": trunk(layers),
    }


def _used(define: dict[str, Any], part: Any) -> set[str]:
    """Names of definitions that are reached from this part of a configuration."""
    if isinstance(part, str):
        return {part} | _used(define, define[part]) if part in define else set()
    inside = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return {name for item in inside for name in _used(define, item)}


def ends(s: Settings, embedding: str, norm: str, *, tied: bool | None = None) -> Iterator[Rule]:
    """Embedding, final norm, head."""
    tied = s.get("tie_word_embeddings", False) if tied is None else tied
    yield same("tok_embeddings.weight", f"{embedding}.weight")
    yield same("norm.weight", f"{norm}.weight")
    if not tied:
        yield same("lm_head.weight", "lm_head.weight")


def pairs(model: Model, layers: str = "model.layers") -> Iterator[tuple[str, str, str]]:
    """Mixer and feed-forward layer, each a residual block, and the name of their layer in theirs."""
    blocks = residual_blocks(model)
    for i, (mixer, ffn) in enumerate(zip(blocks[::2], blocks[1::2], strict=True)):
        yield mixer, ffn, f"{layers}.{i}"


def norms(model: Model, mixer: str, ffn: str, *, layers: str = "model.layers", ours: str = "norm") -> Iterator[Rule]:
    """The norms of both blocks of each layer by their names in theirs, `ours` by that in ours."""
    for first, second, theirs in pairs(model, layers):
        yield from alike(model, f"{first}.{ours}", f"{theirs}.{mixer}")
        yield from alike(model, f"{second}.{ours}", f"{theirs}.{ffn}")


def blocks(
    model: Model, mixers: str | Sequence[str], ffn: str, *, layers: str = "model.layers", **renamed: str
) -> Iterator[Rule]:
    """The same tensors in both blocks of each layer by their names in theirs, those of the mixers one for each layer
    where they differ; `renamed` as in `alike`."""
    for i, (first, second, theirs) in enumerate(pairs(model, layers)):
        mixer = mixers if isinstance(mixers, str) else mixers[i]
        yield from alike(model, f"{first}.block", f"{theirs}.{mixer}", **renamed)
        yield from alike(model, f"{second}.block", f"{theirs}.{ffn}", **renamed)


def given(**options: tuple[Any, Any]) -> dict[str, Any]:
    """Options as name=(value, default), without those at their default."""
    return {name: value for name, (value, default) in options.items() if value != default}


def mamba2(s: Settings, width: float, **more: Any) -> dict[str, Any]:
    """Mamba-2 with `width` channels, as Bamba and those after it name its sizes; `more` options."""
    s.expect(hidden_act=("silu", "swish"))
    idle(s, "mamba_chunk_size", "mamba_expand")
    options = {
        "num_heads": s.mamba_n_heads, "head_dim": s.mamba_d_head, "state_dim": s.mamba_d_state,
        "num_groups": s.mamba_n_groups, "conv_size": s.mamba_d_conv, "expand": width / s.hidden_size,
        "norm_eps": s.rms_norm_eps,
    }  # fmt: skip
    options |= given(bias=(s.mamba_proj_bias, False), conv_bias=(s.mamba_conv_bias, True))
    return options | step_limit(s.get("time_step_limit")) | more


def step_limit(limit: Sequence[float] | None) -> dict[str, Any]:
    """Mamba-2's bounds of delta. The original clamps in a sequence, not in a step with its cache; ours in both."""
    return given(time_step_limit=(list(limit or (0.0, float("inf"))), [0.0, float("inf")]))


# activations of a feed-forward layer, by their names there
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2",
    "silu": "silu", "swish": "silu",
}  # fmt: skip

# settings of the first weights, and of which code computes the same numbers
IDLE = (
    "num_logits_to_keep", "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_init_scheme",
    "time_step_max", "time_step_min", "time_step_scale", "use_associative_scan", "use_mamba_kernels", "use_mambapy",
)  # fmt: skip


def idle(s: Settings, *more: str) -> None:
    """Read the settings that change no number of an evaluated model of this kind."""
    for name in IDLE + more:
        s.get(name)
