"""What a run learns from: rows to train on, and how a model is judged on what it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from zoo.errors import ConfigError, Problem
from zoo.sections import SHAPES, DataSection, DiffusionSection, TrainSection, VisionSection
from zoo.train.corpus import Heldout
from zoo.train.distill import Distillation, LayerDistillation
from zoo.train.evaluate import ALL, Share, bits_per_byte, evaluate_text, score
from zoo.train.hub import HubRows
from zoo.train.images import read_images
from zoo.train.loader import HeldoutRows, PrefixRows, Rows, TaskRows, batch
from zoo.train.mixture import MixedRows
from zoo.train.noise import NoisyRows, search_clip
from zoo.train.progress import Reporter
from zoo.train.synthetic import IGNORE, make_task
from zoo.train.texts import Source, Text, open_sources, over_sources
from zoo.train.tokenizer import Tokenizer, load_tokenizer

SAMPLE_TOKENS = 400
PROMPT_BYTES, PROMPT_SEARCH = 120, 1 << 20
TASK_ROWS = 256


@dataclass(frozen=True)
class Data:
    """Rows to train on, and how to judge a model on what it has not seen."""

    rows: Rows | HubRows
    summary: dict[str, Any]
    glance: Callable[[nn.Module, Share], dict[str, float]]
    judge: Callable[[nn.Module, Reporter], dict[str, float | int]]
    sample: Callable[[nn.Module], str]
    tokenizer: Tokenizer | None
    bits: bool  # one token is one byte
    unit: str = "tokens"
    loss: str = "nats per token"


def prepare(
    data: DataSection, section: TrainSection, document: dict[str, Any], distillation: Distillation | None
) -> Data:
    """Read what `data:` names. ConfigError and DataError say what cannot be used."""
    if "vision" in document:
        return _images(data, section, VisionSection.from_mapping(document["vision"]), distillation)
    if data.source == SHAPES:
        raise ConfigError([Problem("shapes are images: they go with architecture: vision", "data.source")])
    return _task(data, section, document) if data.synthetic else _text(data, section, document)


def _text(data: DataSection, section: TrainSection, document: dict[str, Any]) -> Data:
    tokenizer = load_tokenizer(data.tokenizer)
    diffusion = _diffusion(document, section)
    if document["vocab_size"] < tokenizer.vocab_size + (diffusion is not None):
        have = f"the tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids"
        have += " and the mask needs one" if diffusion else ""
        raise ConfigError([Problem(f"{have}, vocab_size is {document['vocab_size']}", "vocab_size")])
    sources = open_sources(data, tokenizer)
    rows = _rows(sources, data, section)
    asked = scored_rows(document, section)
    training = noisy = None
    if isinstance(rows, HubRows):
        if diffusion or document.get("prefix") is not None:
            what = "block diffusion" if diffusion else "a prefix"
            raise ConfigError([Problem(f"a streamed dataset has no rows for {what}: prepare its files", "data.source")])
    elif diffusion:
        if data.mix and diffusion.search_clip:
            raise ConfigError([Problem("goes with one source of text, not with data.mix", "diffusion.search_clip")])
        training = NoisyRows(rows, diffusion, section.seed, section.batch_size, section.steps)
        whole = replace(diffusion, clip=DiffusionSection.clip, curriculum=())
        noisy = partial(NoisyRows, diffusion=whole, seed=section.seed, group=section.batch_size, split=1)
        asked = partial(noisy, counted=True)
    summaries = [s.text.summary() for s in sources]
    seen = [_seen(source, section) for source in sources]
    seen_rows = [HeldoutRows(s.stream, section.seq_len, data.doc_ids) for s in seen]
    size = section.batch_size // section.accumulation

    def glance(model: nn.Module, share: Share = ALL) -> dict[str, float]:
        each = []
        for heldout, rows in zip(seen, seen_rows, strict=True):
            loss = score(model, asked(rows), len(rows), size, share=share)["loss"]
            each.append({"loss": loss, "bits_per_byte": bits_per_byte(loss, heldout)})
        whole = over_sources(sources, each, "{figure}_{source}")
        found = {f"heldout_{name}": value for name, value in whole.items()}
        if diffusion and training and noisy and diffusion.search_clip:
            training.clip = search_clip(model, noisy(seen_rows[0]), len(seen_rows[0]), size, share)
            found |= {"clip_low": training.clip[0], "clip_high": training.clip[1]}
        return found

    def judge(model: nn.Module, report: Reporter) -> dict[str, float | int]:
        each = []
        for source in sources:
            report.begin("evaluating" + f" {source.name}" * bool(data.mix), -(-data.heldout_bytes // section.seq_len))
            figures = evaluate_text(
                model,
                source.text,
                seq_len=section.seq_len,
                batch_size=size,
                limit=data.heldout_bytes,
                doc_ids=data.doc_ids,
                asked=asked,
                advance=lambda done, total: report.advance(done, total=total),
            )
            each.append(figures)
        return over_sources(sources, each, "{source}_{figure}")

    most = max(sources, key=lambda s: s.share)
    return Data(
        training or (rows if isinstance(rows, HubRows) else asked(rows)),
        {s.name: {"share": s.share} | found for s, found in zip(sources, summaries, strict=True)}
        if data.mix
        else summaries[0],
        glance,
        judge,
        lambda model: _continue(model, most.text),
        tokenizer,
        data.tokenizer == "bytes",
    )


def scored_rows(document: dict[str, Any], section: TrainSection) -> Callable[[Rows], Rows]:
    """Which labels of rows are scored: all, or those that the prefix has not seen."""
    prefix = document.get("prefix")
    if prefix is None:
        return lambda rows: rows
    if section.seq_len <= prefix:
        raise ConfigError([Problem(f"must be more than prefix: {prefix}, got {section.seq_len}", "train.seq_len")])
    return partial(PrefixRows, length=prefix)


def _rows(sources: Sequence[Source], data: DataSection, section: TrainSection) -> Rows | HubRows:
    rows = [s.text.rows(section.seq_len, section.seed, data.doc_ids) for s in sources]
    if not data.mix:
        return rows[0]
    return MixedRows(cast(list[Rows], rows), [w for w, _ in data.sources()], section.seed)


def _seen(source: Source, section: TrainSection) -> Heldout:
    """About eval_batches batches of held-out text, in whole bytes."""
    wanted = section.eval_batches * section.batch_size * section.seq_len * source.share
    return source.text.heldout(max(1, round(wanted * source.text.bytes_per_token)))


def _diffusion(document: dict[str, Any], section: TrainSection) -> DiffusionSection | None:
    if document.get("diffusion") is None:
        return None
    diffusion = DiffusionSection.from_mapping(document["diffusion"])
    if section.seq_len % diffusion.block_size:
        why = f"must be a multiple of diffusion.block_size {diffusion.block_size}, got {section.seq_len}"
        raise ConfigError([Problem(why, "train.seq_len")])
    return diffusion


def _continue(model: nn.Module, source: Text) -> str:
    tokenizer, documents = source.tokenizer, source.heldout(PROMPT_SEARCH).documents
    text = next((d.text for d in documents if len(d.text) > 8 * PROMPT_BYTES), documents[0].text)
    prompt = tokenizer.encode([text[: text.find(b"\n", min(PROMPT_BYTES, len(text) - 1)) + 1 or PROMPT_BYTES]])[0]
    ids = torch.tensor([[tokenizer.end, *prompt.tolist()]])
    made = model.generate(ids, SAMPLE_TOKENS, 0.8, seed=0)[0].tolist()  # type: ignore[operator]
    begun = tokenizer.decode(made[: ids.shape[1]])
    return f"{begun}\N{BLACK RIGHT-POINTING SMALL TRIANGLE}{tokenizer.decode(made[ids.shape[1] :])}\n"


def _task(data: DataSection, section: TrainSection, document: dict[str, Any]) -> Data:
    if document.get("diffusion") is not None:
        raise ConfigError([Problem(f"block diffusion learns text, and {data.source} is a task", "data.source")])
    sample = make_task(data, section.seq_len, document["vocab_size"])
    asked = scored_rows(document, section)
    rows, heldout, fresh = (asked(TaskRows(sample, section.seed, split)) for split in range(3))
    size = section.batch_size // section.accumulation

    def glance(model: nn.Module, share: Share = ALL) -> dict[str, float]:
        result = score(model, heldout, section.eval_batches * section.batch_size, size, share=share)
        return {"heldout_loss": result["loss"], "heldout_accuracy": result["accuracy"]}

    def judge(model: nn.Module, report: Reporter) -> dict[str, float | int]:
        report.begin("evaluating", TASK_ROWS)
        result = score(model, fresh, TASK_ROWS, size, lambda done, total: report.advance(done))
        return {"loss": result["loss"], "accuracy": result["accuracy"], "scored_tokens": int(result["tokens"])}

    def answer(model: nn.Module) -> str:
        row = batch(fresh, 0, 1)
        with torch.no_grad():
            said = model(row.inputs).argmax(-1)
        scored = row.labels != IGNORE
        parts = (("input", row.inputs[0]), ("wanted", row.labels[scored]), ("answered", said[scored]))
        return "".join(f"{name}: {' '.join(map(str, ids.tolist()))}\n" for name, ids in parts)

    summary = {"task": data.source, "num_pairs": data.num_pairs, "num_copied": data.num_copied}
    return Data(rows, summary, glance, judge, answer, None, False)


def _images(data: DataSection, section: TrainSection, vision: VisionSection, distillation: Distillation | None) -> Data:
    if not vision.num_classes and distillation is None:
        raise ConfigError(
            [Problem("is 0: nothing can be learnt but from a teacher, see distill", "vision.num_classes")]
        )
    size = section.batch_size // section.accumulation
    found = read_images(data, vision, section.seed, section.eval_batches * section.batch_size)

    def glance(model: nn.Module, share: Share = ALL) -> dict[str, float]:
        result = score(model, found.seen, found.seen_images, size, share=share) if vision.num_classes else {}
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
    return Data(found.train, summary, glance, judge, sample, None, False, "images", loss)
