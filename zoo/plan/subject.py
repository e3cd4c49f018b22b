"""What is planned: a model on the meta device, its weights and the work of its layers, read once for all layouts."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.distributed.tensor import Shard

from zoo.contract import Block, State
from zoo.graph.nodes import Leaf
from zoo.parallel import context, pipeline, shard, tensor
from zoo.parallel.expert import mixtures
from zoo.parallel.local import Lying
from zoo.predict import work as predict
from zoo.predict.kinds import plain
from zoo.sections import SequenceChunkSection, TrainSection
from zoo.train.chunked_loss import chunks_for
from zoo.train.optim import groups
from zoo.train.parallelize import cheapest

_EIGHT_BIT = 256  # numbers that share a scale in the moments of AdamW8bit


def share(size: int, ranks: int, index: int = 0) -> int:
    """Rows of rank `index` where `size` rows are cut over `ranks`: equal shares rounded up, the last ones less."""
    one = -(-size // ranks)
    return min(one, max(0, size - index * one))


@dataclass(frozen=True)
class At:
    """A rank, by its number along each axis that cuts weights. The first has no less than any other, and what it has
    is what all allocate: FSDP pads."""

    tp: int = 0
    fsdp: int = 0


@dataclass(frozen=True)
class Weight:
    """A parameter, in the unit (by number) that holds it first."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    unit: int
    expert: bool
    optimizer: str  # "": it is not trained
    key: int


@dataclass(frozen=True)
class Held:
    """Of a unit's weights: elements on a rank; bytes of them, of their gradients and of the optimizer's state; bytes
    when FSDP has gathered them, those of experts apart; bytes of gradients that tensor parallelism sums."""

    elements: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    experts: int = 0
    summed: int = 0
    matrices: int = 0  # elements of gathered weights that autocast casts

    def __add__(self, other: Held) -> Held:
        return Held(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Work:
    """A block at one site, for one row. `outside`: bytes kept that tensor parallelism does not split; `calls`: passes
    over a whole row; `stream`: bytes of what enters in these; `products`: bytes kept by selective checkpointing."""

    path: str
    block: Block | None
    flops: int
    kept: int
    outside: int
    stream: int
    calls: float
    products: int
    name: str
    runs: float  # calls of the block
    pieces: float  # in which its operations are launched
    vector: int
    traffic: int  # bytes beside the weights
    weights: int
    logits: int
    useful: int
    groups: float

    def of(self, rows: float, parts: int) -> predict.Work:
        """Its work for so many rows, one of so many parts."""
        traffic = (self.weights + self.traffic * rows) / parts
        share = rows / parts
        work = (self.pieces, share * self.flops, share * self.vector, traffic, share * self.useful, self.groups / parts)
        return predict.Work(*work)


class Subject:
    """A model and its recipe. Units are numbered: the embedding, the layers, what comes behind them. Of a row `tokens`
    go through the layers, and `scored` have logits."""

    def __init__(self, model: Any, train: TrainSection, seq_len: int):
        self.model, self.train, self.seq_len = model, train, seq_len
        self.item = next(model.parameters()).element_size()
        layers, embedding = list(model.layers), getattr(model, model.embedding)
        behind = [m for name, m in model.named_children() if m is not embedding and name != "layers"]
        self.units: list[nn.Module] = [embedding, *layers, *behind]
        self.names = [model.embedding, *(f"layers.{i}" for i in range(len(layers)))]
        self.names += [n for n, m in model.named_children() if m is not embedding and n != "layers"]
        self.num_layers = len(layers)
        self.vocab_size: int = getattr(model, "vocab_size", 0)
        self.tokens, self.scored = model.trained_tokens(1, seq_len), model.scored_tokens(1, seq_len)
        first, *last = model.ends(1, seq_len, "train")
        self.work: list[list[Work]] = [[self._work(first)]]
        self.work += [[] for _ in layers]
        for leaf in model.leaves(1, seq_len, 0, "train"):
            self.work[1 + int(leaf.path.split(".")[1])].append(self._work(leaf))
        by_module = {id(leaf.module): leaf for leaf in last}
        self.work += [[self._work(by_module[id(m)])] if id(m) in by_module else [] for m in behind]
        self.weights = list(self._weights())
        self.head = self.names.index("lm_head") if "lm_head" in self.names else -1
        self.buffers = [sum(b.numel() * b.element_size() for b in unit.buffers()) for unit in self.units]

    # -------------------------------------------------------------------------------------- weights
    def _weights(self) -> Iterator[Weight]:
        optimizer = {name: g.optimizer for g in groups(self.model, self.train) for name in g.names}
        spread = {id(p) for m in mixtures(self.model).values() for p in m.parameters()}
        unit_of: dict[int, int] = {}
        for i, unit in enumerate(self.units):
            for p in unit.parameters():
                unit_of.setdefault(id(p), i)
        for name, p in self.model.named_parameters():
            trained = optimizer.get(name, "")
            yield Weight(name, tuple(p.shape), p.element_size(), unit_of[id(p)], id(p) in spread, trained, id(p))

    @functools.cached_property
    def fsdp_groups(self) -> list[list[int]]:
        """Units that FSDP gathers together, in the order of their first one."""
        number = {id(unit): i for i, unit in reversed(list(enumerate(self.units)))}
        found = [sorted(number[id(m)] for m in group) for group in shard.groups(self.model)]
        return sorted(found)

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def splits(self, tp: int) -> dict[int, tensor.Split]:
        """What tensor parallelism does to each block, by the block's id."""
        return {id(s.block): s for unit in self.units for s in tensor.splits(unit, tp)}

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _lying(self, tp: int) -> dict[int, Lying]:
        found: dict[int, Lying] = {}
        if tp == 1:
            return found
        for split in self.splits(tp).values():
            if not split.reason:
                found |= {id(p): tensor.lies(n, split.plan, tp) for n, p in split.block.named_parameters()}
        for name in ("tok_embeddings", "lm_head"):
            if end := getattr(self.model, name, None):
                found[id(end.weight)] = Lying(Shard(0))
        return found

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def held(self, tp: int, fsdp: int, ep: int, at: At = At()) -> list[Held]:
        """For each unit, what the rank `at` holds of the weights that stand there first."""
        lying, found = self._lying(tp), [Held()] * len(self.units)
        for w in self.weights:
            shape, how = list(w.shape), lying.get(w.key)
            over, index = fsdp, at.fsdp
            if w.expert and ep > 1:  # neighbours among the ranks of FSDP hold different experts
                shape[0], over, index = share(shape[0], ep, at.fsdp % ep), fsdp // ep, at.fsdp // ep
            elif how is not None and isinstance(how.placement, Shard):
                dim = how.placement.dim
                shape[dim] = share(shape[dim], tp, at.tp)
            whole = math.prod(shape)
            shape[0] = share(shape[0], over, index)
            own = math.prod(shape)
            trained = w.optimizer != ""
            found[w.unit] += Held(
                own,
                own * w.itemsize,
                own * w.itemsize * trained,
                _optimizer_bytes(w.optimizer, own, w.itemsize),
                0 if w.expert else whole * w.itemsize,
                whole * w.itemsize if w.expert else 0,
                whole * w.itemsize * (trained and how is not None and how.gradient.is_partial()),
                whole if len(w.shape) > 1 and w.unit > 0 else 0,
            )
        return found

    # ----------------------------------------------------------------------------------------- work
    def _work(self, leaf: Leaf) -> Work:
        cost, block = leaf.cost, getattr(leaf.module, "block", None)
        weights = min(3 * cost.params * self.item, cost.bytes_read)
        traffic = cost.bytes_read - weights + cost.bytes_written
        logits = self.scored * self.vocab_size * self.item if leaf.path == "lm_head" else 0
        called = (cost.calls or 1.0, cost.pieces or 1.0)
        moved = (cost.vector_flops, traffic, weights, logits, cost.useful_flops, cost.groups)
        timed = (cost.product_bytes, plain(leaf.block), *called, *moved)
        if not isinstance(block, Block):
            return Work(leaf.path, None, cost.flops, cost.activation_bytes, cost.activation_bytes, 0, 1.0, *timed)
        whole = self.model.pass_cost(leaf.module, 1, self.seq_len).activation_bytes
        calls = cost.activation_bytes / whole if whole else 1.0
        stream = calls * self.tokens * block.dim * block.itemsize
        # what its norms and residual keep is in proportion to tokens
        around = next(iter(leaf.module.leaves(1, self.tokens, 0, "train"))).cost.activation_bytes  # type: ignore[operator]
        around -= block.activation_elements(1, self.tokens) * block.itemsize
        inside = calls * (whole - around) - stream
        outside = min(cost.activation_bytes, int(cost.activation_bytes - inside))
        return Work(leaf.path, block, cost.flops, cost.activation_bytes, outside, int(stream), calls, *timed)

    @functools.cached_property
    def piece(self) -> Subject:
        """What is in memory at once: rows, or chunks of them where they are trained chunk by chunk."""
        size = self.train.sequence_chunks.size
        if not size:
            return self
        return Subject(self.model, replace(self.train, sequence_chunks=SequenceChunkSection()), min(size, self.seq_len))

    @property
    def chunks(self) -> int:
        """In which a row is trained."""
        return -(-self.seq_len // self.piece.seq_len)

    def handed_on(self, rows: int) -> int:
        """Bytes that chunks of rows leave each other, at the most. Of what is only appended to, as keys are: the state,
        a chunk's copy of it, the gradient from behind and, with several rows, the keys of a chunk laid out one behind
        the other. Of other states both, two gradients and all borders."""
        if self.piece is self:
            return 0
        laid_out = 1 - 1 / self.chunks if rows > 1 else 0.0
        appended, others = _held_by(self.model.init_state(rows, self.seq_len))
        kept = int(appended * (2 + laid_out + (self.chunks > 1))) + others * (self.chunks + 4)
        return kept + (self._gradients_of_keys(rows) if self.chunks > 1 else 0)

    def _gradients_of_keys(self, rows: int) -> int:
        """Backward through a block makes the gradient of all its keys twice, when what is kept behind it is gone."""
        most = behind = 0
        for work in (w for unit in reversed(self.piece.work) for w in reversed(unit)):
            if work.block is not None:
                most = max(most, 2 * _held_by(work.block.init_state(rows, self.seq_len))[0] - behind)
            behind += rows * work.kept
        return most

    def passes(self, unit: int) -> float:
        """Forward passes that a step is worth: three, more where something is computed again. Chunks of rows but the
        last run forward twice, the first time without logits; those that are not drawn run once."""
        chunked, again = self.train.sequence_chunks, 0.0
        if chunked.size and unit != self.head:
            again = 1 - 1 / self.chunks
        if unit in self.recomputed or (unit == self.head and self.model.chunked_loss and self.train.loss_chunks != 1):
            again += 1
        keep = chunked.keep if chunked.size else 1.0
        return keep * (3 + again) + (1 - keep)

    @functools.cached_property
    def recomputed(self) -> set[int]:
        """Numbers of the units that backward computes again."""
        how = self.train.activation_checkpoint
        if how == "full":
            return set(range(1, 1 + self.num_layers))
        if how == "budget":
            layers = list(dict.fromkeys(self.model.layers))
            chosen = cheapest(layers, self.train.activation_budget, self.seq_len, self.model.dim)
            return {i for i, unit in enumerate(self.units) if any(unit is c for c in chosen)}
        return set()

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def stage_units(self, pp: int, stages: int) -> list[list[int]]:
        """The units of each stage of a pipeline of `pp` ranks."""
        count, end = pp * stages, self.num_layers + 1
        if count == 1:
            return [list(range(len(self.units)))]
        cuts = pipeline.balanced(self._layer_weights, count)
        found = [[1 + i for i in cut] for cut in cuts]
        return [[0, *found[0]], *found[1:-1], [*found[-1], *range(end, len(self.units))]]

    @functools.cached_property
    def _layer_weights(self) -> list[float]:
        return pipeline.layer_weights(self.model, self.seq_len)

    def loss_chunks(self, rows: int, cp: int, pp: int) -> int:
        """Pieces in which logits exist."""
        if pp > 1 or not self.model.chunked_loss:
            return 1
        return chunks_for(self.train.loss_chunks, rows * self.seq_len // cp, self.vocab_size)

    @functools.cached_property
    def _exchanges(self) -> list[tuple[str, str, Any]]:
        return list(context.exchanges(self.model))

    @functools.cached_property
    def exchanges(self) -> list[tuple[int, Any, float]]:
        """What context parallelism exchanges: unit, `context.Exchange`, passes over a row."""
        calls: dict[int, float] = {}
        for work in (w for unit in self.work for w in unit if w.block is not None):
            calls[id(work.block)] = calls.get(id(work.block), 0) + work.calls
        number = {name: i for i, name in enumerate(self.names)}
        found = []
        for path, _, exchange in self._exchanges:
            unit = number.get(".".join(path.split(".")[: 2 if path.startswith("layers.") else 1]), 0)
            found.append((unit, exchange, calls.get(id(self.model.get_submodule(path)), 1.0)))
        return found

    @functools.cached_property
    def on_whole_rows(self) -> set[int]:
        """Ids of the blocks that run on whole rows under context parallelism."""
        found: set[int] = set()
        for path, _, exchange in self._exchanges:
            if exchange.kind == "input":
                found |= {id(m) for m in self.model.get_submodule(path).modules()}
        return found

    @functools.cached_property
    def mixtures(self) -> dict[int, int]:
        """Experts that a token takes, by the id of the block that holds them."""
        blocks = (m for m in self.model.modules() if isinstance(m, Block))
        return {id(m): m.top_k for m in blocks if "expert" in m.parallel_plan().tensor.values()}  # type: ignore


def _held_by(state: State) -> tuple[int, int]:
    """Bytes of a state that marks of it share, being appended to only, and of the rest."""
    shared = {id(t) for t in state.mark().tensors()}
    sizes = [(t.numel() * t.element_size(), id(t) in shared) for t in state.tensors()]
    return sum(n for n, both in sizes if both), sum(n for n, both in sizes if not both)


def _optimizer_bytes(name: str, elements: int, itemsize: int) -> int:
    """State of an optimizer of a parameter of which a rank has `elements`."""
    if name == "Muon":
        return elements * itemsize
    if name == "AdamW8bit" and elements >= 4096 and elements % _EIGHT_BIT == 0:
        return 2 * (elements + 4 * elements // _EIGHT_BIT + 4 * 256) + 4  # codes, scales, the values of the codes
    return 2 * elements * itemsize + 4 if name else 0
