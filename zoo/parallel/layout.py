"""Which layouts a model can take. What it cannot do is said before anything is launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from zoo.errors import ConfigError, Problem
from zoo.parallel import context
from zoo.parallel.expert import mixtures
from zoo.parallel.pipeline import stages_per_rank
from zoo.sections import ParallelSection, TrainSection


@dataclass(frozen=True)
class Pieces:
    """What the numbers of a layout come to: `data` ranks read rows of their own, `shard` of them share weights; each
    takes `rows` at once, in `microbatches` where there is a pipeline."""

    data: int
    shard: int
    rows: int
    microbatches: int


def pieces(layout: ParallelSection, train: TrainSection, ranks: int) -> Pieces:
    """`layout` on `ranks` processes. ConfigError where the numbers do not go together."""
    data = layout.data_ranks(ranks)
    shard, found = data // layout.dp_replicate, []
    if shard * layout.cp % layout.ep:
        text = f"must divide dp_shard * cp, {shard * layout.cp} ranks, got {layout.ep}"
        found.append(Problem(text, "parallel.ep"))
    rows, rest = divmod(train.batch_size, train.accumulation * data)
    if rest:
        text = f"{train.batch_size} is no multiple of {data} data-parallel ranks times accumulation"
        found.append(Problem(f"{text} {train.accumulation}", "train.batch_size"))
    microbatches = 1
    if layout.pp > 1:
        microbatches = layout.microbatches or layout.pp * stages_per_rank(layout.schedule)
        if rows % microbatches:
            text = f"must divide the {rows} rows of a rank, got {microbatches}; a larger train.batch_size helps"
            found.append(Problem(text, "parallel.microbatches"))
        if layout.schedule == "1F1B" and microbatches < layout.pp:
            text = f"1F1B takes at least one for each of {layout.pp} stages, got {microbatches}; GPipe takes fewer"
            found.append(Problem(text, "parallel.microbatches"))
        if layout.schedule == "Interleaved1F1B" and microbatches % max(1, microbatches // layout.pp):
            text = f"Interleaved1F1B takes them in rounds of {layout.pp} ranks, got {microbatches}; use a multiple"
            found.append(Problem(text, "parallel.microbatches"))
    if found:
        raise ConfigError(found)
    return Pieces(data, shard, rows, microbatches)


def check(model: Any, layout: ParallelSection, seq_len: int) -> None:
    """Raise ConfigError with every node of `model` (on the meta device) that `layout` does not suit, the reason and
    what could be done instead. Tensor parallelism suits all: blocks that it does not split are computed whole."""
    found: list[Problem] = []
    if layout.pp > 1:
        found += _pipeline(model, layout)
    if layout.ep > 1:
        found += _experts(model, layout.ep)
    if layout.cp > 1:
        if seq_len % layout.cp:
            found.append(Problem(f"train.seq_len {seq_len} is no multiple of it", "parallel.cp"))
        found += context.refusals(model, layout.cp)
    if found:
        raise ConfigError(found)


def _pipeline(model: Any, layout: ParallelSection) -> list[Problem]:
    found, layers = [], list(model.layers)
    if hasattr(model, "losses"):
        text = f"{type(model).__name__} sends two copies of a row through its layers, which stages do not hand on"
        found.append(Problem(f"{text}; use dp_shard or tp", "parallel.pp"))
    count = layout.pp * stages_per_rank(layout.schedule)
    if len(layers) < count:
        text = f"{layout.schedule} on {layout.pp} ranks needs {count} layers, the trunk has {len(layers)}"
        found.append(Problem(f"{text}; a loop is one layer", "parallel.pp"))
    held = [id(p) for layer in layers for p in layer.parameters()]  # shared ones stand there more than once
    if len(set(held)) < len(held):
        found.append(Problem("layers share weights (share), which stages cannot; use tp or dp_shard", "parallel.pp"))
    for path, module in model.named_modules():
        if isinstance(getattr(module, "readout", None), tuple):
            name = module.zoo_registration.name
            text = f"{path}: {name} (metric: kl) asks the head, which lies in the last stage"
            found.append(Problem(f"{text}; use metric: latent, or dp_shard or tp", "parallel.pp"))
    if _ties_ends(model):
        found.append(Problem("embedding and head are one matrix; set tie_embeddings: false", "parallel.pp"))
    return found


def _ties_ends(model: nn.Module) -> bool:
    embedding, head = getattr(model, "tok_embeddings", None), getattr(model, "lm_head", None)
    return embedding is not None and head is not None and embedding.weight is head.weight


def _experts(model: nn.Module, degree: int) -> list[Problem]:
    found = mixtures(model)
    if not found:
        return [Problem("there is no mixture of experts in the model; use dp_shard or tp", "parallel.ep")]
    return [
        Problem(f"{path}: {m.num_experts} experts cannot be spread evenly over {degree} ranks", "parallel.ep")
        for path, m in found.items()
        if m.num_experts % degree  # type: ignore[operator]
    ]
