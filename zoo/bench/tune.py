"""`zoo bench OP --tune`: the quickest correct launch configuration of each Triton kernel, kept for this card."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from zoo.bench.cases import Case
from zoo.bench.groups import Settings, What, complaint
from zoo.bench.ops import contest
from zoo.bench.timing import Runner, race
from zoo.errors import ConfigError, KernelUnavailable
from zoo.kernels import dispatch, gpu

Config = dict[str, int]


def check(op: str, device: str) -> None:
    """Say why nothing can be tuned, before anything is measured."""
    if device != "cuda":
        raise ConfigError("--tune chooses launch configurations on the card that they are for: give --device cuda")
    if "triton" not in dispatch.backends(op):
        raise ConfigError(f"--tune: {op} has no Triton kernel")


def tune(
    op: str, cases: Sequence[Case], settings: Settings, lengths: Sequence[int], tell: Callable[[str], Any]
) -> list[dict[str, Any]]:
    """Try every configuration of every kernel that the cases launch; write and return what was kept."""
    device = torch.device("cuda", torch.cuda.current_device())
    row = next(row for row in dispatch.rows(op) if row.backend == "triton")
    if why := row.objection(device, settings.dtype):
        raise KernelUnavailable(f"--tune: the Triton kernels of {op} cannot run here: {why}")
    verdicts: dict[tuple[str, str], str | None] = {}
    found: list[dict[str, Any]] = []
    for case, what, seq in _calls(cases, lengths):
        tell(f"{case.title} {what} {seq}")
        found += _tuned_call(op, case, what, seq, settings, device, verdicts)
    card = torch.cuda.get_device_name(device)
    path = gpu.tuned_path(card)
    path.parent.mkdir(exist_ok=True)
    kept = dict(gpu.tuned(card)) | {key: entry["kept"] for entry in found if entry["kept"] for key in entry["keys"]}
    path.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    gpu.tuned.cache_clear()
    return found


def _calls(cases: Sequence[Case], lengths: Sequence[int]) -> Iterator[tuple[Case, What, int]]:
    for case in cases:
        for seq in lengths or (2 * case.seq,):
            yield case, "forward", seq
            if case.backward:
                yield case, "forward+backward", seq
            if case.step:
                yield case, "step", seq


def _tuned_call(
    op: str,
    case: Case,
    what: What,
    seq: int,
    settings: Settings,
    device: torch.device,
    verdicts: dict[tuple[str, str], str | None],
) -> list[dict[str, Any]]:
    """Kernel after kernel of one call, those before at their best."""
    candidates = [c for c in contest(case, what, seq, settings, ("triton",)).candidates if c.name == "triton"]
    if not candidates or candidates[0].runner is None:
        return []
    run, like, found = candidates[0].runner.run, torch.empty(0, device=device), []
    gpu.seen.clear()
    gpu.asked.clear()
    try:
        run()
        for kernel, configs in list(gpu.seen.items()):
            keys = sorted(gpu.asked[kernel])

            def verdict(config: Config, kernel: str = kernel) -> str | None:
                label = (kernel, json.dumps(config, sort_keys=True))
                if label not in verdicts:
                    gpu.forced[kernel] = config
                    verdicts[label] = gpu.self_check(op, "triton", device)
                return verdicts[label]

            tried = choose(kernel, [gpu.allowed(c, like) for c in configs], verdict, run, settings)
            if tried["kept"]:
                gpu.forced[kernel] = tried["kept"]
            else:
                gpu.forced.pop(kernel, None)
            found.append({"case": case.title, "what": what, "seq": seq, "keys": keys} | tried)
    except KernelUnavailable as error:
        found.append({"case": case.title, "what": what, "seq": seq, "keys": [], "kept": None, "kernel": "",
                      "tried": [{"config": {}, "problem": complaint(error)}]})  # fmt: skip
    finally:
        gpu.forced.clear()
    return found


def choose(
    kernel: str,
    configs: Sequence[Config],
    verdict: Callable[[Config], str | None],
    run: Callable[[], Any],
    settings: Settings,
) -> dict[str, Any]:
    """The quickest of those configurations that pass their check; each is forced while it is timed."""
    tried: list[dict[str, Any]] = []
    runners: dict[str, Runner] = {}
    for number, config in enumerate(configs):
        entry: dict[str, Any] = {"config": config, "problem": verdict(config), "median_ms": None}
        tried.append(entry)
        if entry["problem"]:
            continue

        def forced(config: Config = config) -> None:
            gpu.forced[kernel] = config
            run()

        try:
            forced()
            runners[str(number)] = Runner(forced)
        except Exception as error:  # out of shared memory at this size, for one
            entry["problem"] = complaint(error)
    for number, timing in race(runners, settings.device, settings.rounds).items():
        tried[int(number)]["median_ms"] = timing.median
    best = min(tried, key=lambda e: math.inf if e["median_ms"] is None else e["median_ms"], default=None)
    kept = best["config"] if best and best["median_ms"] is not None else None
    return {"kernel": kernel, "kept": kept, "tried": tried}
