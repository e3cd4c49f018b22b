"""`zoo eval`: what a trained model can do, task by task, told and written into RUN/evaluation/."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

import zoo
from zoo.architectures.block_diffusion import BlockDiffusionLM
from zoo.errors import ConfigError, did_you_mean, one_of
from zoo.sections import SYNTHETIC, DataSection, DistillSection, TrainSection
from zoo.train.distill import objective_of
from zoo.train.evaluate import score
from zoo.train.files import write_text
from zoo.train.folder import tokenizer_of
from zoo.train.harness import run_task
from zoo.train.loader import TaskRows
from zoo.train.passkey import DEPTHS, find_needles
from zoo.train.prepare import prepare, scored_rows
from zoo.train.progress import Reporter
from zoo.train.synthetic import make_task
from zoo.train.tokenizer import FileTokenizer, Tokenizer

HELDOUT, NEEDLE, HARNESS = "heldout", "needle", "lm_eval:"
SAMPLES = 128
_SPLIT = 3  # rows that neither training nor the evaluation of a run has met


@dataclass
class Trained:
    """A model to be judged, with the sections of its configuration."""

    folder: Path
    model: Any
    document: dict[str, Any]
    data: DataSection
    train: TrainSection

    @classmethod
    def load(cls, run: str | Path, overrides: Iterable[str] = (), *, device: str = "cpu") -> Trained:
        """A run folder or a saved model. overrides: `data.source=...` and the like, for other data."""
        model = zoo.from_pretrained(run, device=device)
        document = cast(
            dict[str, Any], OmegaConf.to_container(zoo.load_config(dict(model.config), overrides), resolve=True)
        )
        changed = [k for k in document if k not in ("data", "train") and document[k] != model.config.get(k)]
        if changed:
            raise ConfigError(f"{run} is a trained model: only data and train can be changed, not {changed[0]}")
        data = DataSection.from_mapping(document.get("data"))
        return cls(Path(run), model, document, data, TrainSection.from_mapping(document.get("train")))

    @property
    def text(self) -> bool:
        """Whether it was trained on text, and tells one token after the other."""
        return self.document.get("vision") is None and not self.data.synthetic

    def default_tasks(self) -> list[str]:
        """What it was trained on."""
        if self.data.synthetic:
            return [HELDOUT, self.data.source]
        return [HELDOUT, NEEDLE] if self.text and not isinstance(self.model, BlockDiffusionLM) else [HELDOUT]


def evaluate_run(
    trained: Trained,
    tasks: Sequence[str] = (),
    *,
    lengths: Sequence[int] = (),
    samples: int | None = None,
    report: Reporter | None = None,
) -> list[dict[str, Any]]:
    """A document for each task, also written to evaluation/TASK.json in the folder of the model.

    heldout: what a run is judged by at its end. A synthetic task: accuracy at several `lengths`, over `samples` rows
    each (128). needle, of a text model: keys found by length and depth. lm_eval:NAME: a task of lm-evaluation-harness,
    on its first `samples` documents (all), with contexts of train.seq_len tokens. lengths: in place of 1/2, 1, 2 and 4
    times train.seq_len. ConfigError where a task does not fit the model.
    """
    report = report or Reporter(False)
    tasks = list(tasks) or trained.default_tasks()
    known = (HELDOUT, NEEDLE, *SYNTHETIC)
    for task in tasks:
        if task not in known and not task.startswith(HARNESS):
            raise ConfigError(f"{task}: no such task{did_you_mean(task, known) or '; ' + one_of(known)}")
        if task != HELDOUT and "decode" not in trained.model.modes:
            raise ConfigError(f"{trained.folder} holds no language model: {task} cannot be asked of it")
    seq_len = trained.train.seq_len
    lengths = sorted(set(lengths)) or [max(1, seq_len // 2), seq_len, 2 * seq_len, 4 * seq_len]
    made = []
    for task in tasks:
        if task == HELDOUT:
            found = _heldout(trained, report)
        elif task.startswith(HARNESS):
            found = _harness(trained, task, samples, report)
        elif task == NEEDLE and trained.text:
            found = _needle(trained, lengths, samples or SAMPLES, report)
        else:
            found = _synthetic(trained, task, lengths, samples or SAMPLES, report)
        source = ", ".join(m["source"] for m in trained.data.mix) or trained.data.source
        document = {"task": task, "run": str(trained.folder), "source": source} | found
        document["evaluated"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_text(
            trained.folder / "evaluation" / f"{task.replace(':', '-')}.json", json.dumps(document, indent=2) + "\n"
        )
        made.append(document)
    return made


def _heldout(trained: Trained, report: Reporter) -> dict[str, Any]:
    document, data = trained.document, trained.data
    distillation = None
    if document.get("distill") is not None:
        distillation = objective_of(DistillSection.from_mapping(document["distill"]), trained.train, document)
    if trained.text:
        tokenizer = tokenizer_of(trained.folder)
        if isinstance(tokenizer, FileTokenizer):  # the copy that was saved with the model
            data = replace(data, tokenizer=str(tokenizer.path))
    report.begin("reading data")
    judged = prepare(data, trained.train, document, distillation)
    report.end()
    return {"figures": judged.judge(trained.model, report)}


def _synthetic(trained: Trained, task: str, lengths: Sequence[int], samples: int, report: Reporter) -> dict[str, Any]:
    size = trained.train.batch_size
    report.begin(task, len(lengths) * samples)

    def at(length: int, advance: Callable[[int], None]) -> list[dict[str, Any]]:
        sample = make_task(replace(trained.data, source=task), length, trained.model.vocab_size)
        asked = scored_rows(trained.document, replace(trained.train, seq_len=length))
        rows, done = asked(TaskRows(sample, trained.train.seed, _SPLIT)), 0

        def batch_done(now: int, total: int) -> None:
            nonlocal done
            advance(now - done)
            done = now

        result = score(trained.model, rows, samples, size, batch_done)
        return [{"accuracy": result["accuracy"], "loss": result["loss"]}]

    rows = _by_length(at, lengths, report)
    return {"trained_on": trained.data.source == task, "samples": samples, "rows": rows}


def _tokenizer(trained: Trained, task: str) -> Tokenizer:
    """The tokenizer of a model that is to be asked in words."""
    if isinstance(trained.model, BlockDiffusionLM):
        raise ConfigError(f"{trained.folder} is block diffusion: {task} asks for one token after the other")
    tokenizer = tokenizer_of(trained.folder)
    if trained.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"{trained.folder} knows {trained.model.vocab_size} tokens, its tokenizer has more")
    return tokenizer


def _harness(trained: Trained, task: str, samples: int | None, report: Reporter) -> dict[str, Any]:
    tokenizer = _tokenizer(trained, task)
    report.begin(task)
    figures = run_task(
        task.removeprefix(HARNESS),
        trained.model,
        tokenizer,
        max_length=trained.train.seq_len,
        limit=samples,
        advance=lambda done, total: report.advance(done, total=total),
    )
    return {"samples": samples, "figures": figures}


def _needle(trained: Trained, lengths: Sequence[int], samples: int, report: Reporter) -> dict[str, Any]:
    tokenizer = _tokenizer(trained, NEEDLE)
    report.begin(NEEDLE, len(lengths) * len(DEPTHS) * samples)

    def at(length: int, advance: Callable[[int], None]) -> list[dict[str, Any]]:
        size = max(1, min(samples, trained.train.batch_size * trained.train.seq_len // length))
        return find_needles(trained.model, tokenizer, length, count=samples, size=size, advance=advance)

    return {"samples": samples, "rows": _by_length(at, lengths, report)}


def _by_length(
    measure: Callable[[int, Callable[[int], None]], list[dict[str, Any]]], lengths: Sequence[int], report: Reporter
) -> list[dict[str, Any]]:
    """Rows of all lengths. A length at which the task or the model cannot be is kept with the reason."""
    rows: list[dict[str, Any]] = []
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report.advance(done)

    for length in lengths:
        try:
            rows += [{"length": length} | row for row in measure(length, advance)]
        except ConfigError as error:
            rows.append({"length": length, "skipped": error.problems[0].message})
    if all("skipped" in row for row in rows):
        raise ConfigError(f"no length fits: {rows[-1]['skipped']}")
    report.end()
    return rows
