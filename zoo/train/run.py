"""`train`: a configuration in, a run folder out.

config.yaml         what was trained, complete; itself a configuration
environment.json    versions, machine, command, size and hash of the data
metrics.jsonl       one line per step: loss, rate, norm of the gradient, tokens/s, MFU, peak memory, what blocks measure
health.jsonl        how every node is, each `train.health_every` steps (zoo.train.health)
loss.png            the curve
checkpoint/step-N   everything needed to go on (torch.distributed.checkpoint, zoo.train.checkpoints)
model/              config.yaml + model.safetensors, for `zoo.from_pretrained`
evaluation.json     held-out figures
init.json           what was taken from `train.init_from` (zoo.train.initial)
incident-step-N/    a step whose loss or gradient was not finite, or whose loss was a spike (zoo.train.incidents)
sample.txt          a continuation of held-out text, an answered task, or labelled images
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import zoo
from zoo.errors import ConfigError, Problem, ZooError
from zoo.sections import DataSection, DistillSection, ParallelSection, TrainSection
from zoo.train import sequence_chunks
from zoo.train.checkpoints import newest_checkpoint
from zoo.train.complaints import News
from zoo.train.curve import MetricsFile, read_metrics
from zoo.train.device import is_main, world_size
from zoo.train.distill import Distillation, objective_of
from zoo.train.files import write_text
from zoo.train.folder import check_folder, describe, finish, read_document
from zoo.train.incidents import Incident
from zoo.train.initial import initial
from zoo.train.job import Job
from zoo.train.prepare import Data, prepare
from zoo.train.progress import Reporter, step_text
from zoo.train.speed import peak_memory, speed_of
from zoo.train.stopping import stopping
from zoo.train.trackers import Tracker, check_trackers, scalars, trackers


@dataclass(frozen=True)
class RunResult:
    """What a run did. `evaluation` and `model` are None where it was interrupted before its last step."""

    out: Path | None
    step: int
    steps: int
    interrupted: bool
    parameters: int
    loss: float | None
    seconds: float
    tokens_per_second: float  # `unit`s a second
    evaluation: dict[str, float | int] | None
    sample: str | None
    model: nn.Module | None
    unit: str = "tokens"  # what a row is made of: tokens, or one image


def train(
    config: Any,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    steps: int | None = None,
    progress: bool = True,
) -> RunResult:
    """Train a configuration (a path, a shipped name, a mapping or what `zoo.load_config` returned).

    out: the run folder; None writes nothing. resume: go on from the newest complete checkpoint in `out`.
    steps: in place of `train.steps`. Ctrl-C saves a checkpoint and returns with `interrupted`; a second one
    stops at once. ConfigError, DataError and ZooError say what is wrong in one line each.
    """
    document = read_document(config)
    section = TrainSection.from_mapping(document.get("train"))
    if steps is not None:
        section = TrainSection.from_mapping({**(document.get("train") or {}), "steps": steps})
        document["train"] = {**(document.get("train") or {}), "steps": steps}
    data_section = DataSection.from_mapping(document.get("data"))
    layout = ParallelSection.from_mapping(document.get("parallel"))
    folder = None if out is None else Path(out)
    if folder is None and resume:
        raise ConfigError("resume needs the run folder: give out")
    if folder and is_main():
        check_folder(folder, resume, document)
    check_trackers(section, folder)
    distillation = None
    if "distill" in document:
        distillation = objective_of(DistillSection.from_mapping(document["distill"]), section, document)
    if world_size() > 1:
        _check_layout(document, layout, section, distillation)
    if section.sequence_chunks.size:
        sequence_chunks.check(
            zoo.build(document, device="meta"), section, layout, data_section, distillation is not None
        )
    with Reporter(progress and is_main()) as report:
        report.begin("loading torchtitan")
        titan = _titan()
        report.end()
        report.begin("reading data")
        data = prepare(data_section, section, document, distillation)
        report.end()
        return _run(titan, document, section, layout, data, distillation, folder, resume, report)


def _check_layout(
    document: dict[str, Any], layout: ParallelSection, section: TrainSection, distillation: Distillation | None
) -> None:
    from zoo.parallel.layout import check, pieces

    if distillation is not None:
        raise ConfigError([Problem("a student learns in one process", "distill")])
    pieces(layout, section, world_size())
    check(zoo.build(document, device="meta"), layout, section.seq_len)


def _titan() -> Any:
    """The adapter of torchtitan. Its import takes seconds, so it comes after the checks that need none of it."""
    try:
        from zoo.train import titan
    except ImportError as error:
        if (error.name or "").startswith("zoo"):
            raise
        raise ZooError(f"training needs the extra `train`: pip install 'block-zoo[train]' ({error})") from error
    return titan


def _run(
    titan: Any,
    document: dict[str, Any],
    section: TrainSection,
    layout: ParallelSection,
    data: Data,
    distillation: Distillation | None,
    folder: Path | None,
    resume: bool,
    report: Reporter,
) -> RunResult:
    start = time.monotonic()
    at = newest_checkpoint(folder, report.say) if folder and resume else None
    # every process must know them, the first one writes them
    before = [r for r in read_metrics(folder / "metrics.jsonl") if r["step"] <= at] if folder and at else []
    speed = speed_of(document, section) if is_main() else None
    records: list[dict[str, Any]] = []
    metrics = health = None
    told: list[Tracker] = []
    with ExitStack() as stack:
        if folder and is_main():
            describe(folder, document, data.summary, resume, speed)
            metrics = stack.enter_context(MetricsFile(folder / "metrics.jsonl", at or 0))
            records = metrics.records
            health = stack.enter_context(MetricsFile(folder / "health.jsonl", at or 0))
            name = str(document.get("name", "model"))
            told = stack.enter_context(trackers(section, folder, name, document, at or 0))
        stop = stack.enter_context(stopping())
        heldout = ""
        devices = world_size()

        def on_step(record: dict[str, Any]) -> None:
            nonlocal heldout
            if distillation is not None:
                record |= distillation.told(record["step"])
            if speed is not None:
                record["mfu"] = speed.mfu(record["seconds"], devices)
            record["memory"] = peak_memory()
            metrics.add(record) if metrics else records.append(record)
            for tracker in told:
                tracker.add(record["step"], scalars(record))
            if "heldout_loss" in record:
                key = "heldout_bits_per_byte" if "heldout_bits_per_byte" in record else "heldout_loss"
                heldout = f"  held-out {record[key]:.3f}{' bits/byte' if key.endswith('byte') else ''}"
            report.advance(record["step"], step_text(record, heldout, data.unit))

        def on_incident(incident: Incident) -> None:
            report.say(f"skipped: {incident}{incident.where}")

        news = News()

        def on_health(record: dict[str, Any]) -> None:
            if health:
                health.add(record)
            for tracker in told:
                tracker.add(record["step"], scalars(record, "health/"))
            for text in news.of(record):
                report.say(f"step {record['step']}: {text}")

        taught: dict[str, Any] = {}
        build, changes = zoo.build, []
        if section.init_from and at is None:
            beginning = initial(section.init_from, zoo.build(document, device="meta"))
            report.say(str(beginning))
            if folder and is_main():
                write_text(folder / "init.json", json.dumps(beginning.as_dict(), indent=1) + "\n")
            changes.append(beginning.give)
        if distillation is not None:
            taught, build = {"objective": distillation}, distillation.build
            changes.append(distillation.prepare)

        def ready(model: nn.Module) -> None:
            for change in changes:
                change(model)

        job = Job(
            build=lambda device: build(document, device=device),
            train=section,
            rows=data.rows,
            parallel=layout,
            folder=folder,
            resume_from=at,
            on_step=on_step,
            evaluate=data.glance,
            stop=stop,
            prepare=ready,
            on_incident=on_incident,
            on_health=on_health,
            losses=[r["loss"] for r in before],
            skips=(at or 0) - (before[-1]["step"] if before else 0),
            **taught,
        )
        report.begin("training", section.steps, at or 0)
        trained = titan.fit(job)
    seconds = time.monotonic() - start
    evaluation = text = model = None
    if trained.step >= section.steps and is_main():
        # a fresh copy: the trained one may be compiled, or lie on several processes
        model = zoo.build(document)
        model.load_state_dict(trained.state)
        model.eval()
        evaluation = data.judge(model, report)
        text = data.sample(model)
    if folder and is_main():
        finish(folder, data, records, evaluation, text, model)
    fast = [r["tokens_per_second"] for r in records[-50:]]
    return RunResult(
        out=folder,
        step=trained.step,
        steps=section.steps,
        interrupted=trained.step < section.steps,
        parameters=trained.parameters,
        loss=records[-1]["loss"] if records else None,
        seconds=seconds,
        tokens_per_second=sum(fast) / len(fast) if fast else 0.0,
        evaluation=evaluation,
        sample=text,
        model=model,
        unit=data.unit,
    )
