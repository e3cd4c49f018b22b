"""How near a converted model is to its original: logits, cached greedy continuation, weights on the way back."""

from __future__ import annotations

import contextlib
import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.overrides import TorchFunctionMode

from zoo.convert import from_hf, to_hf


@dataclass(frozen=True)
class Parity:
    """Largest errors of logits as shares of their standard deviation, in fp32 and in fp64; whether the cached greedy
    continuation is the same, and whether the original's is another without its cache; whether the weights on the way
    back are the same, bit for bit; lines of YAML; seconds of from_hf."""

    error: float
    error_fp64: float
    generation: bool | None
    unlike_itself: bool
    round_trip: bool
    yaml_lines: int
    seconds: float


@torch.no_grad()
def measure(theirs: Any, context: int | None = None) -> Parity:
    """Convert a tiny model and compare. Of a vision model without a head it compares the hidden states; none of them
    generates."""
    x = inputs(theirs)
    start = time.perf_counter()
    ours = from_hf(theirs, context=context)
    seconds = time.perf_counter() - start
    lines = OmegaConf.to_yaml(OmegaConf.create({k: v for k, v in ours.config.items() if k != "origin"})).splitlines()
    error = _error(says(ours, x), says(theirs, x))
    same, unlike = continues(ours, theirs, x[:, :7]) if theirs.can_generate() else (None, False)
    returned = returns(ours, theirs)
    with in_fp64():
        exact = built(type(theirs), copy.deepcopy(theirs.config)).double().eval()
        exact.config._experts_implementation = "eager"  # torch's grouped products know no fp64
        weights = {n: t for n, t in theirs.state_dict().items() if not n.endswith(("_decay", "slope_rate"))}
        exact.load_state_dict(weights, strict=False)  # without MiniMax's decays, which it holds rounded
        want = says(exact, x)
    return Parity(error, _error(says(ours.double(), x), want), same, unlike, returned, len(lines), seconds)


def inputs(theirs: Any) -> torch.Tensor:
    """Tokens or images that a tiny model reads."""
    generator = torch.Generator().manual_seed(3)
    if not hasattr(theirs.config, "image_size"):
        return torch.randint(1, 61, (2, 33), generator=generator)
    size = theirs.config.image_size
    side = size if isinstance(size, int) else size[0]
    return torch.randn(2, theirs.config.num_channels, side, side, generator=generator)


def says(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Logits of a model of either library, of a vision model without a head its hidden states."""
    if not hasattr(model, "base_model"):
        return model.features(_as(model, x)) if getattr(model, "head", x) is None else model(_as(model, x))
    found = model(x, use_cache=False) if model.can_generate() else model(_as(model, x))
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def _as(model: Any, x: torch.Tensor) -> torch.Tensor:
    return x.to(next(model.parameters()).dtype) if x.is_floating_point() else x


def built(kind: Any, config: Any) -> Any:
    """A model of this class. That of xLSTM cannot draw its own first weights where they are fused."""
    from transformers.initialization import no_init_weights

    if getattr(config, "weight_mode", "single") == "single":
        return kind(config)
    with no_init_weights(), torch.no_grad():
        model = kind(config)
        for p in model.parameters():
            p.fill_(1)
    return model


def continues(ours: Any, theirs: Any, x: torch.Tensor) -> tuple[bool, bool]:
    """Whether both continue x by the same tokens with their caches; and whether the original says something else with
    its cache than without, in which case what it says without counts."""
    theirs.generation_config.eos_token_id = None
    options = {"attention_mask": torch.ones_like(x), "max_new_tokens": 8, "do_sample": False}
    cached, made = theirs.generate(x, **options), ours.generate(x, 8)
    if torch.equal(made, cached):
        return True, False
    whole = theirs.generate(x, **options, use_cache=False)
    return torch.equal(made, whole), not torch.equal(cached, whole)


def returns(ours: Any, theirs: Any) -> bool:
    """Whether the weights on the way back are those that came; a tied one stands for its twin."""
    back, kept = to_hf(ours), theirs.state_dict()
    tied = {n for n in kept.keys() - back.keys() if any(kept[n].data_ptr() == kept[m].data_ptr() for m in back)}
    return kept.keys() - back.keys() == tied and all(torch.equal(t, kept[n]) for n, t in back.items())


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.std()).item()


@contextlib.contextmanager
def in_fp64():
    """What is built and run inside is fp64 also where the code says fp32, so that it can be compared closely."""
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


class _Wide(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)
