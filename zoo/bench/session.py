"""One run of `zoo bench`: what to measure, measuring it, and the document that tells of it."""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo.bench import cases, layers, machine, ops, scaling, sparse
from zoo.bench.groups import Group, Settings, hold
from zoo.errors import ConfigError, ZooError, did_you_mean
from zoo.kernels import dispatch

KINDS = ("layers", "scaling", "sparse")
Tell = Callable[[str, int], Any]  # what is being measured, and how many steps are done with it


def check_subject(subject: str) -> None:
    """ConfigError for what is neither an op nor one of the other benches."""
    if subject in KINDS:
        return
    known = dispatch.ops()
    if subject not in known:
        near = did_you_mean(subject, [*known, *KINDS])
        raise ConfigError(
            f"nothing to bench is called {subject!r}{near}; {', '.join(KINDS)}, or an op: {', '.join(known)}"
        )
    if not cases.of(subject):
        raise ConfigError(f"{subject} has no case to time yet: add one to zoo/bench/cases.py")


def lengths(text: str | None) -> tuple[int, ...]:
    """`512,2048` as numbers."""
    if text is None:
        return ()
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ConfigError(f"--seq {text}: write lengths, as in 512,2048")
    return found


def plan(subject: str, settings: Settings, seqs: Sequence[int], only: Sequence[str]) -> list[Group]:
    """The groups of every kind but `scaling`."""
    if subject == "layers":
        unknown = [name for name in only if name not in layers.names()]
        if unknown:
            near = did_you_mean(unknown[0], layers.names())
            raise ConfigError(f"--only {unknown[0]}: no such layer{near}; {', '.join(layers.names())}")
        return list(layers.groups(only or layers.names(), settings, seqs))
    found = sparse.groups(settings, seqs) if subject == "sparse" else ops.groups(cases.of(subject), settings, seqs)
    return _kept(list(found), [lambda g: g.case, lambda g: g.what], only)


def _kept(items: list[Any], names: Sequence[Callable[[Any], str]], only: Sequence[str]) -> list[Any]:
    kept = [item for item in items if not only or any(word in name(item) for word in only for name in names)]
    if not kept:
        known = sorted({name(item) for item in items for name in names})
        raise ConfigError(f"--only {' '.join(only)}: matches nothing; there is {'; '.join(known)}")
    return kept


def run(subject: str, settings: Settings, seqs: Sequence[int], only: Sequence[str], tell: Tell) -> dict[str, Any]:
    """Measure, and return the document."""
    found = machine.describe(settings.device)  # first: the load is that of others
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers and of other people's libraries
        peaks = machine.peaks(settings.device, settings.dtype)
        if subject == "scaling":
            groups = _scaling(settings, seqs or scaling.LENGTHS, only, tell)
        else:
            groups = []
            for group in plan(subject, settings, seqs, only):
                tell(group.label, 0)
                groups.append(hold(group, settings, peaks))
                tell(group.label, 1)
    return {
        "bench": subject,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": found,
        "settings": {
            "device": settings.device,
            "dtype": str(settings.dtype).removeprefix("torch."),
            "rounds": settings.rounds,
            "compiled": settings.compiled,
            "peer": settings.peer,
        },
        "peaks": peaks.as_dict(),
        "groups": groups,
    }


def steps(subject: str, settings: Settings, seqs: Sequence[int], only: Sequence[str]) -> int:
    """How many steps `run` tells of."""
    if subject == "scaling":
        return 2 * len(_scaling_calls(only))
    return len(plan(subject, settings, seqs, only))


def _scaling_calls(only: Sequence[str]) -> list[tuple[cases.Case, Any]]:
    calls = [(case, what) for case in scaling.linear_cases() for what in ("forward", "forward+backward")]
    return _kept(calls, [lambda c: c[0].title, lambda c: c[1]], only)


def _scaling(settings: Settings, seqs: Sequence[int], only: Sequence[str], tell: Tell) -> list[dict[str, Any]]:
    if len(seqs) < 2:
        raise ConfigError("zoo bench scaling compares lengths: give at least two, as in --seq 4096,8192")
    calls, groups = _scaling_calls(only), []
    for case, what in calls:
        tell(f"{case.title} {what}", 0)
        groups.append(scaling.measure(case, what, sorted(seqs), settings))
        tell(f"{case.title} {what}", 1)
    for (case, what), group in zip(calls, groups):  # last, since it meddles with the allocator
        tell(f"{case.title} {what}: memory", 0)
        scaling.memory(case, what, group, settings)
        tell(f"{case.title} {what}: memory", 1)
    return groups


def results_folder() -> Path:
    """tools/bench/results of the checkout that this code lies in."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "tools" / "bench").is_dir():
        raise ZooError("--save writes into tools/bench/results of a checkout, this is an installed package; use --json")
    return root / "tools" / "bench" / "results"


def save(document: dict[str, Any], folder: Path) -> Path:
    """Write <folder>/<card or processor>/<name>.json and return its path."""
    settings = document["settings"]
    usual = "bfloat16" if settings["device"] == "cuda" else "float32"
    parts = [document["bench"]]
    if settings["dtype"] != usual:
        parts.append(settings["dtype"])
    if settings["device"] == "cpu" and document["machine"]["threads"] != 1:
        parts.append(f"{document['machine']['threads']}_threads")
    path = folder / machine.slug(document["machine"]["device"]) / f"{'_'.join(parts)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(document), indent=1) + "\n", encoding="utf-8")
    return path


def rounded(value: Any) -> Any:
    """Four digits are more than a timing has."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
