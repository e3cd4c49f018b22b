"""What families of unlike layers share: the trunk as a pattern, the ends of the model, Mamba-2's step limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from zoo.convert.rules import Rule, same
from zoo.convert.settings import Settings


def trunk(layers: Sequence[str]) -> list[Any]:
    """The trunk of these named layers: a repeated pattern where there is one, else runs of equal ones."""
    for period in range(1, len(layers) // 2 + 1):
        times, rest = divmod(len(layers), period)
        if not rest and list(layers) == list(layers[:period]) * times:
            return [{"repeat": times, "of": layers[0] if period == 1 else list(layers[:period])}]
    runs = [(name, len(list(run))) for name, run in groupby(layers)]
    return [name if times == 1 else {"repeat": times, "of": name} for name, times in runs]


def body(s: Settings, eps: float, define: dict[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """A model of these layers with RMS norms in front of the blocks and of the head."""
    norm = {"rms": {"eps": eps}}
    return {
        "dim": s.hidden_size,
        "vocab_size": s.vocab_size,
        "tie_embeddings": bool(s.get("tie_word_embeddings", False)),
        "norm": norm,
        "final_norm": norm,
        "define": {name: parts for name, parts in define.items() if name in _used(define, layers)},
        "trunk": trunk(layers),
    }


def _used(define: dict[str, Any], names: Sequence[Any]) -> set[str]:
    """Names of definitions that are reached from these."""
    found: set[str] = set()
    for name in names:
        if isinstance(name, str) and name in define and name not in found:
            below = define[name]
            found |= {name} | _used(define, below if isinstance(below, list) else [])
    return found


def ends(s: Settings, embedding: str, norm: str, head: str = "lm_head") -> Iterator[Rule]:
    """Embedding, final norm, head."""
    yield same("tok_embeddings.weight", f"{embedding}.weight")
    yield same("norm.weight", f"{norm}.weight")
    if not s.get("tie_word_embeddings", False):
        yield same("lm_head.weight", f"{head}.weight")


def given(**options: tuple[Any, Any]) -> dict[str, Any]:
    """Options as name=(value, default), without those at their default."""
    return {name: value for name, (value, default) in options.items() if value != default}


def step_limit(limit: Sequence[float] | None) -> dict[str, Any]:
    """Mamba-2's bounds of delta. The original clamps in a sequence, not in a step with its cache; ours in both."""
    return given(time_step_limit=(list(limit or (0.0, float("inf"))), [0.0, float("inf")]))


# settings of the first weights, and of which code computes the same numbers
IDLE = (
    "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_init_scheme", "time_step_max",
    "time_step_min", "time_step_scale", "use_associative_scan", "use_mambapy", "use_mamba_kernels",
)  # fmt: skip


def idle(s: Settings, *more: str) -> None:
    """Read the settings that change no number of an evaluated model of this kind."""
    for name in IDLE + more:
        s.get(name)
