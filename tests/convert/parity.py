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
    continuation is the same, and the weights on the way back, bit for bit; lines of YAML; seconds of from_hf."""

    error: float
    error_fp64: float
    generation: bool
    round_trip: bool
    yaml_lines: int
    seconds: float


@torch.no_grad()
def measure(theirs: Any) -> Parity:
    """Convert a tiny model and compare."""
    x = torch.randint(1, 61, (2, 33), generator=torch.Generator().manual_seed(3))
    start = time.perf_counter()
    ours = from_hf(theirs)
    seconds = time.perf_counter() - start
    lines = OmegaConf.to_yaml(OmegaConf.create({k: v for k, v in ours.config.items() if k != "origin"})).splitlines()
    error, same = _error(ours(x), theirs(x, use_cache=False).logits), continues(ours, theirs, x[:, :7])
    returned = returns(ours, theirs)
    with in_fp64():
        exact = type(theirs)(copy.deepcopy(theirs.config)).double().eval()
        exact.config._experts_implementation = "eager"  # torch's grouped products know no fp64
        exact.load_state_dict(theirs.state_dict())
        want = exact(x, use_cache=False).logits
    return Parity(error, _error(ours.double()(x), want), same, returned, len(lines), seconds)


def continues(ours: Any, theirs: Any, x: torch.Tensor) -> bool:
    """Whether both continue x by the same tokens with their caches."""
    theirs.generation_config.eos_token_id = None
    more = theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=8, do_sample=False)
    return torch.equal(ours.generate(x, 8), more)


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
