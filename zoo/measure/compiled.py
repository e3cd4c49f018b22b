"""Passes with and without torch.compile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from zoo.architectures.model import Model
from zoo.measure.passes import Pass
from zoo.measure.times import Times

BACKEND = "inductor"
PASSES = 5


def against_compiled(model: Model, once: Pass, device: str) -> dict[str, Any]:
    """Milliseconds of a pass as it is (`eager`) and with every layer compiled by itself, as in training (`compiled`),
    both without hooks, `ratio`: how many times as quick that is, `seconds`: what compiling took. Or the `failure`."""
    import torch

    clock = Times(device, time.perf_counter)
    found: dict[str, Any] = {"eager": _median(once, clock), "compiled": None, "ratio": None, "failure": None}
    layers: list[nn.Module] = list(dict.fromkeys(model.layers))  # a shared layer stands there often
    try:
        for layer in layers:
            layer.compile(backend=BACKEND)
        begun = time.perf_counter()
        for _ in range(2):  # sizes that change are seen in the second
            once()
        found["seconds"] = time.perf_counter() - begun
        found["compiled"] = _median(once, clock)
        found["ratio"] = found["eager"] / found["compiled"]
    except Exception as error:  # whatever a compiler may raise
        found["failure"] = f"torch.compile fails: {type(error).__name__}: {reason(error)}"
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        torch._dynamo.reset()
    return found


def reason(error: Exception) -> str:
    """Its first line, and the next one where that says what follows; without the end of a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")


def _median(once: Pass, clock: Times) -> float:
    return 1e3 * statistics.median(timed(once, clock, lambda: None)[0] for _ in range(PASSES))


def timed(once: Pass, clock: Times, end: Callable[[], None]) -> tuple[float, float]:
    """Seconds of a pass and of its forward. `end` is called after the backward."""
    once.prepare()
    clock.settle()
    start = clock.mark()
    loss = once.forward()
    turn = stop = clock.mark()
    if loss is not None:
        loss.backward()
        end()
        stop = clock.mark()
    clock.settle()
    return clock.seconds(start, stop), clock.seconds(start, turn)
