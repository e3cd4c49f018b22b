"""`train`: a configuration in, a run folder out.

config.yaml         what was trained, complete; itself a configuration
environment.json    versions, machine, command, size and hash of the data
metrics.jsonl       one line per step
loss.png            the curve
checkpoint/step-N   everything needed to go on (torch.distributed.checkpoint)
model/              config.yaml + model.safetensors, for `zoo.from_pretrained`
evaluation.json     held-out figures
sample.txt          a continuation of held-out text, an answered task, or labelled images
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from omegaconf import OmegaConf
from torch import nn

import zoo
from zoo.errors import ConfigError, DataError, Problem, ZooError
from zoo.sections import SHAPES, DataSection, DiffusionSection, DistillSection, TrainSection, VisionSection
from zoo.train.corpus import Corpus, Stream, read_corpus
from zoo.train.curve import MetricsFile, draw
from zoo.train.distill import Distillation, LayerDistillation, objective_of
from zoo.train.evaluate import bits_per_byte, evaluate_text, score, some_heldout
from zoo.train.files import new_folder, write_text
from zoo.train.images import read_images
from zoo.train.loader import HeldoutRows, Rows, TaskRows, TrainRows, batch
from zoo.train.noise import NoisyRows, search_clip
from zoo.train.progress import Reporter, step_text
from zoo.train.synthetic import IGNORE, make_task
from zoo.train.tokenizer import FileTokenizer, Tokenizer, load_tokenizer

# options of `train:` that a resumed run may change; everything else must be as it was
MAY_CHANGE = (
    "steps", "lr", "min_lr_factor", "schedule", "warmup_steps", "decay_fraction", "grad_clip", "accumulation",
    "compile", "activation_checkpoint", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints",
)  # fmt: skip
SAMPLE_TOKENS = 400
PROMPT_BYTES = 120
TASK_ROWS = 256


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


@dataclass(frozen=True)
class _Data:
    """Rows to train on, and how to judge a model on what it has not seen."""

    rows: Rows
    summary: dict[str, Any]
    glance: Callable[[nn.Module], dict[str, float]]
    judge: Callable[[nn.Module, Reporter], dict[str, float | int]]
    sample: Callable[[nn.Module], str]
    tokenizer: Tokenizer | None
    bits: bool  # one token is one byte
    unit: str = "tokens"
    loss: str = "nats per token"


def free_folder(name: str, under: Path = Path("runs")) -> Path:
    """The first of runs/name, runs/name-2, ... that does not exist."""
    number = 1
    while (path := under / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


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
    document = _document(config)
    section = TrainSection.from_mapping(document.get("train"))
    if steps is not None:
        section = TrainSection.from_mapping({**(document.get("train") or {}), "steps": steps})
        document["train"] = {**(document.get("train") or {}), "steps": steps}
    data_section = DataSection.from_mapping(document.get("data"))
    folder = None if out is None else Path(out)
    if folder:
        _check_folder(folder, resume, document)
    elif resume:
        raise ConfigError("resume needs the run folder: give out")
    distillation = None
    if "distill" in document:
        distillation = objective_of(DistillSection.from_mapping(document["distill"]), section, document)
    with Reporter(progress) as report:
        report.begin("loading torchtitan")
        titan = _titan()
        report.end()
        report.begin("reading data")
        data = _prepare(data_section, section, document, distillation)
        report.end()
        return _run(titan, document, section, data, distillation, folder, resume, report)


def _document(config: Any) -> dict[str, Any]:
    """A configuration, checked and resolved, as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(zoo.load_config(config), resolve=True))


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
    data: _Data,
    distillation: Distillation | None,
    folder: Path | None,
    resume: bool,
    report: Reporter,
) -> RunResult:
    start = time.monotonic()
    at = titan.newest_checkpoint(folder) if folder and resume else None
    records: list[dict[str, Any]] = []
    with ExitStack() as stack:
        if folder:
            _describe(folder, document, data.summary, resume)
            metrics = stack.enter_context(MetricsFile(folder / "metrics.jsonl", at or 0))
            records = metrics.records
        stop = stack.enter_context(_stopping())
        heldout = ""

        def on_step(record: dict[str, Any]) -> None:
            nonlocal heldout
            if distillation is not None:
                record |= distillation.told(record["step"])
            metrics.add(record) if folder else records.append(record)
            if "heldout_loss" in record:
                key = "heldout_bits_per_byte" if "heldout_bits_per_byte" in record else "heldout_loss"
                heldout = f"  held-out {record[key]:.3f}{' bits/byte' if key.endswith('byte') else ''}"
            report.advance(record["step"], step_text(record, heldout, data.unit))

        taught: dict[str, Any] = {}
        build = zoo.build
        if distillation is not None:
            taught, build = {"objective": distillation, "prepare": distillation.prepare}, distillation.build
        job = titan.Job(
            build=lambda device: build(document, device=device),
            train=section,
            rows=data.rows,
            folder=folder,
            resume_from=at,
            on_step=on_step,
            evaluate=data.glance,
            stop=stop,
            **taught,
        )
        report.begin("training", section.steps, at or 0)
        trained, step = titan.fit(job)
    seconds = time.monotonic() - start
    evaluation = text = model = None
    if step >= section.steps:
        # a fresh copy: the trained one may be compiled or recompute
        model = zoo.build(document)
        model.load_state_dict(trained.state_dict())
        model.eval()
        evaluation = data.judge(model, report)
        text = data.sample(model)
    if folder:
        _finish(folder, data, records, evaluation, text, model)
    fast = [r["tokens_per_second"] for r in records[-50:]]
    return RunResult(
        out=folder,
        step=step,
        steps=section.steps,
        interrupted=step < section.steps,
        parameters=sum(p.numel() for p in trained.parameters()),
        loss=records[-1]["loss"] if records else None,
        seconds=seconds,
        tokens_per_second=sum(fast) / len(fast) if fast else 0.0,
        evaluation=evaluation,
        sample=text,
        model=model,
        unit=data.unit,
    )


# ------------------------------------------------------------------------------------------ run folder
def _check_folder(folder: Path, resume: bool, document: dict[str, Any]) -> None:
    """Refuse to write over a run, or to go on with something else than what was begun."""
    known = folder / "config.yaml"
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "holds a run: go on with it by resume, or" if known.is_file() else "is not an empty folder:"
            raise ConfigError(f"{folder} {what} give another out")
        return
    if not known.is_file():
        raise ConfigError(f"{folder} holds no run to resume (it has no config.yaml)")
    before = _document(known)
    changed = [Problem(f"was {a!r} when the run began, is {b!r}", key) for key, a, b in _differences(before, document)]
    if changed:
        raise ConfigError([Problem(f"{folder} cannot be resumed with another configuration"), *changed])


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    sections = {"train": TrainSection, "data": DataSection}
    for key in dict.fromkeys([*before, *now]):
        if key in sections:
            a, b = (sections[key].from_mapping(d.get(key)) for d in (before, now))
            for option in vars(a):
                if key == "train" and option in MAY_CHANGE:
                    continue
                if getattr(a, option) != getattr(b, option):
                    yield f"{key}.{option}", getattr(a, option), getattr(b, option)
        elif before.get(key) != now.get(key):
            yield key, _short(before.get(key)), _short(now.get(key))


def _short(value: Any) -> Any:
    return value if len(repr(value)) < 80 else f"{repr(value)[:77]}..."


def _describe(folder: Path, document: dict[str, Any], data: dict[str, Any], resume: bool) -> None:
    path = folder / "environment.json"
    if resume and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8")).get("data")
        if before != data:
            raise DataError(
                f"{folder} cannot be resumed: the data are not those of its first start ({before} -> {data})"
            )
    write_text(folder / "config.yaml", yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    write_text(path, json.dumps(_environment() | {"data": data}, indent=2) + "\n")


def _environment() -> dict[str, Any]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "zoo": zoo.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchtitan": version("torchtitan"),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    try:
        # the last commit of this very folder: none where the package lies in somebody else's repository
        command = ["git", "-C", str(Path(__file__).resolve().parent), "log", "-1", "--format=%H", "--", "."]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _finish(
    folder: Path,
    data: _Data,
    records: list[dict[str, Any]],
    evaluation: dict[str, Any] | None,
    sample: str | None,
    model: nn.Module | None,
) -> None:
    if evaluation is not None and sample is not None and model is not None:
        with new_folder(folder / "model") as temporary:
            model.save_pretrained(temporary)  # type: ignore[operator]
            if isinstance(data.tokenizer, FileTokenizer):
                shutil.copyfile(data.tokenizer.path, temporary / "tokenizer.json")
        write_text(folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
        write_text(folder / "sample.txt", sample)
    if records:
        names = ("unigram", "bigram", "gzip")
        figures = {n: evaluation[f"{n}_bits_per_byte"] for n in names} if evaluation and data.bits else {}
        draw(records, folder / "loss.png", figures, data.bits, data.loss)


def tokenizer_of(folder: str | Path) -> Tokenizer:
    """The tokenizer of a run or of its `model/` folder."""
    folder = Path(folder)
    for path in (folder / "tokenizer.json", folder / "model" / "tokenizer.json"):
        if path.is_file():
            return FileTokenizer(path)
    return load_tokenizer(DataSection.from_mapping(_document(folder / "config.yaml").get("data")).tokenizer)


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM asks for an orderly end; the second Ctrl-C is not caught."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for n in before:
        signal.signal(n, ask)
    try:
        yield asked.is_set
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


# ------------------------------------------------------------------------------------------------ data
def _prepare(
    data: DataSection, section: TrainSection, document: dict[str, Any], distillation: Distillation | None
) -> _Data:
    if "vision" in document:
        return _images(data, section, VisionSection.from_mapping(document["vision"]), distillation)
    if data.source == SHAPES:
        raise ConfigError([Problem("shapes are images: they go with architecture: vision", "data.source")])
    return _task(data, section, document) if data.synthetic else _text(data, section, document)


def _text(data: DataSection, section: TrainSection, document: dict[str, Any]) -> _Data:
    tokenizer = load_tokenizer(data.tokenizer)
    diffusion = _diffusion(document, section)
    if document["vocab_size"] < tokenizer.vocab_size + (diffusion is not None):
        have = f"the tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids"
        have += " and the mask needs one" if diffusion else ""
        raise ConfigError([Problem(f"{have}, vocab_size is {document['vocab_size']}", "vocab_size")])
    corpus = read_corpus(data)
    stream = Stream.of(corpus.train, tokenizer)
    rows = TrainRows(stream, section.seq_len, section.seed, data.doc_ids)
    training = noisy = None
    if diffusion:
        training = NoisyRows(rows, diffusion, section.seed, section.batch_size, section.steps)
        whole = replace(diffusion, clip=DiffusionSection.clip, curriculum=())
        noisy = partial(NoisyRows, diffusion=whole, seed=section.seed, group=section.batch_size, split=1)
    summary = corpus.summary()
    # about eval_batches batches of held-out text, in whole bytes
    wanted = section.eval_batches * section.batch_size * section.seq_len
    seen = some_heldout(corpus, max(1, round(wanted * int(summary["train_bytes"]) / len(stream.ids))))
    seen_stream = Stream.of(seen, tokenizer)
    seen_rows = HeldoutRows(seen_stream, section.seq_len, data.doc_ids)
    size = section.batch_size // section.accumulation

    def glance(model: nn.Module) -> dict[str, float]:
        judged = noisy(seen_rows, counted=True) if noisy else seen_rows
        loss = score(model, judged, len(seen_rows), size)["loss"]
        bits = bits_per_byte(loss, seen_stream, sum(len(d.text) for d in seen))
        found = {"heldout_loss": loss, "heldout_bits_per_byte": bits}
        if diffusion and training and noisy and diffusion.search_clip:
            training.clip = search_clip(model, noisy(seen_rows), len(seen_rows), size)
            found |= {"clip_low": training.clip[0], "clip_high": training.clip[1]}
        return found

    def judge(model: nn.Module, report: Reporter) -> dict[str, float | int]:
        report.begin("evaluating", -(-data.heldout_bytes // section.seq_len))
        return evaluate_text(
            model,
            corpus,
            tokenizer,
            seq_len=section.seq_len,
            batch_size=size,
            limit=data.heldout_bytes,
            doc_ids=data.doc_ids,
            noisy=noisy and partial(noisy, counted=True),
            advance=lambda done, total: report.advance(done, total=total),
        )

    return _Data(
        training or rows,
        summary,
        glance,
        judge,
        lambda model: _continue(model, corpus, tokenizer),
        tokenizer,
        data.tokenizer == "bytes",
    )


def _diffusion(document: dict[str, Any], section: TrainSection) -> DiffusionSection | None:
    if document.get("diffusion") is None:
        return None
    diffusion = DiffusionSection.from_mapping(document["diffusion"])
    if section.seq_len % diffusion.block_size:
        why = f"must be a multiple of diffusion.block_size {diffusion.block_size}, got {section.seq_len}"
        raise ConfigError([Problem(why, "train.seq_len")])
    return diffusion


def _continue(model: nn.Module, corpus: Corpus, tokenizer: Tokenizer) -> str:
    text = next((d.text for d in corpus.heldout if len(d.text) > 8 * PROMPT_BYTES), corpus.heldout[0].text)
    prompt = tokenizer.encode([text[: text.find(b"\n", min(PROMPT_BYTES, len(text) - 1)) + 1 or PROMPT_BYTES]])[0]
    ids = torch.tensor([[tokenizer.end, *prompt.tolist()]])
    made = model.generate(ids, SAMPLE_TOKENS, 0.8, seed=0)[0].tolist()  # type: ignore[operator]
    begun = tokenizer.decode(made[: ids.shape[1]])
    return f"{begun}\N{BLACK RIGHT-POINTING SMALL TRIANGLE}{tokenizer.decode(made[ids.shape[1] :])}\n"


def _task(data: DataSection, section: TrainSection, document: dict[str, Any]) -> _Data:
    if document.get("diffusion") is not None:
        raise ConfigError([Problem(f"block diffusion learns text, and {data.source} is a task", "data.source")])
    sample = make_task(data, section.seq_len, document["vocab_size"])
    heldout = TaskRows(sample, section.seed, split=1)
    size = section.batch_size // section.accumulation

    def glance(model: nn.Module) -> dict[str, float]:
        result = score(model, heldout, section.eval_batches * section.batch_size, size)
        return {"heldout_loss": result["loss"], "heldout_accuracy": result["accuracy"]}

    def judge(model: nn.Module, report: Reporter) -> dict[str, float | int]:
        report.begin("evaluating", TASK_ROWS)
        fresh = TaskRows(sample, section.seed, split=2)
        result = score(model, fresh, TASK_ROWS, size, lambda done, total: report.advance(done))
        return {"loss": result["loss"], "accuracy": result["accuracy"], "scored_tokens": int(result["tokens"])}

    def answer(model: nn.Module) -> str:
        row = batch(TaskRows(sample, section.seed, split=2), 0, 1)
        with torch.no_grad():
            said = model(row.inputs).argmax(-1)
        scored = row.labels != IGNORE
        parts = (("input", row.inputs[0]), ("wanted", row.labels[scored]), ("answered", said[scored]))
        return "".join(f"{name}: {' '.join(map(str, ids.tolist()))}\n" for name, ids in parts)

    summary = {"task": data.source, "num_pairs": data.num_pairs, "num_copied": data.num_copied}
    return _Data(TaskRows(sample, section.seed), summary, glance, judge, answer, None, False)


def _images(
    data: DataSection, section: TrainSection, vision: VisionSection, distillation: Distillation | None
) -> _Data:
    if not vision.num_classes and distillation is None:
        raise ConfigError(
            [Problem("is 0: nothing can be learnt but from a teacher, see distill", "vision.num_classes")]
        )
    size = section.batch_size // section.accumulation
    found = read_images(data, vision, section.seed, section.eval_batches * section.batch_size)

    def glance(model: nn.Module) -> dict[str, float]:
        result = score(model, found.seen, found.seen_images, size) if vision.num_classes else {}
        seen = {f"heldout_{name}": result[name] for name in ("loss", "accuracy") if result}
        if distillation is not None:  # its loss is the one that is trained
            seen["heldout_loss"] = distillation.figures(model, found.seen, found.seen_images, size)["distill_loss"]
        return seen

    def judge(model: nn.Module, report: Reporter) -> dict[str, float | int]:
        count, made = found.fresh_images, {}
        report.begin("evaluating", count)

        def labelled(model: nn.Module) -> dict[str, float]:
            return score(model, found.fresh, count, size, lambda done, total: report.advance(done))

        if vision.num_classes:
            result = labelled(model)
            made = {"loss": result["loss"], "accuracy": result["accuracy"]}
        if distillation is not None:
            made |= distillation.figures(model, found.fresh, count, size)
            if vision.num_classes:
                made["teacher_accuracy"] = labelled(distillation.teacher)["accuracy"]
        return made | {"scored_images": count}

    def answers(model: nn.Module) -> str:
        part = batch(found.fresh, 0, min(16, found.fresh_images))
        with torch.no_grad():
            said = model(part.inputs).argmax(-1).tolist()
        names = dict(enumerate(found.classes))
        pairs = zip(part.labels.flatten().tolist(), said, strict=True)
        return "".join(f"wanted: {names[w]}  answered: {names.get(a, a)}\n" for w, a in pairs)

    sample, summary, loss = answers, found.summary, "nats per image"
    if distillation is not None:
        summary = summary | {"teacher_sha256": distillation.fingerprint()}
    if isinstance(distillation, LayerDistillation):
        loss = "squared distance to the teacher"
        if not vision.num_classes:
            sample = partial(distillation.sample, rows=found.fresh, count=min(16, found.fresh_images))
    return _Data(found.train, summary, glance, judge, sample, None, False, "images", loss)
