"""The sections `vision:`, `train:`, `parallel:`, `data:`, `distill:`, `diffusion:` and `origin:` of a configuration.

Annotated fields are the schema; no torch here.
"""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from zoo.errors import ConfigError, Problem, did_you_mean
from zoo.schema import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, check_type

SYNTHETIC = ("mqar", "selective_copy", "induction", "needle", "state_tracking")
STDLIB = "python-stdlib"
SHAPES = "shapes"
HUB = "hf:"

ZeroToOne = Annotated[float, Range(ge=0, le=1)]
Beta = Annotated[float, Range(ge=0, lt=1)]
Share = Annotated[float, Range(gt=0, lt=1)]
Seed = Annotated[int, Range(ge=0, le=2**32 - 1)]


class _Section:
    """A frozen dataclass that is built from a mapping and reports every problem at once."""

    where: typing.ClassVar[str]

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any] | None) -> Self:
        """Build the section. ConfigError lists every unknown key, wrong value and bad combination."""
        annotations = typing.get_type_hints(cls, include_extras=True)
        known = {f.name: annotations[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        values, complaints = {}, []
        for key, value in (given or {}).items():
            if key not in known:
                hint = did_you_mean(key, known) or "; options: " + ", ".join(known)
                complaints.append((str(key), f"unknown option{hint}"))
                continue
            values[key], why = check_type(value, known[key])
            if why:
                complaints.append((key, why))
        section = cls(**({} if complaints else values))
        complaints += section.complaints()
        if complaints:
            raise ConfigError([Problem(text, f"{cls.where}.{key}") for key, text in complaints])
        return section

    def complaints(self) -> list[tuple[str, str]]:
        """(option, message) for every combination of options that cannot work."""
        return []


@dataclass(frozen=True)
class VisionSection(_Section):
    """Images of `architecture: vision`, square ones in training, and what is told of them."""

    where: typing.ClassVar[str] = "vision"

    image_size: PositiveInt = 224
    patch_size: PositiveInt = 16
    channels: PositiveInt = 3
    num_registers: NonNegativeInt = 0  # tokens without content behind the class token (arXiv:2309.16588)
    num_classes: NonNegativeInt = 0  # 0: no head, the model gives features
    pool: Literal["class", "mean", "class_mean"] = "class"  # class token, mean over patches, or both
    antialias: bool = False  # of the positions, where they are interpolated to a smaller grid
    mask_token: bool = False  # that stands for patches which are hidden (masked image modelling)
    distill_token: bool = False  # with a head of its own, for the answers of a teacher (DeiT, arXiv:2012.12877)

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches."""
        return 1 + self.distill_token + self.num_registers

    @property
    def num_tokens(self) -> int:
        """Tokens of an image: class token, distillation token, registers, patches."""
        return self.num_prefix + self.grid**2

    def complaints(self) -> list[tuple[str, str]]:
        if self.image_size % self.patch_size:
            return [("patch_size", f"must divide image_size {self.image_size}, got {self.patch_size}")]
        if self.distill_token and not self.num_classes:
            return [("distill_token", "answers with a class: it needs num_classes")]
        return []


@dataclass(frozen=True)
class GroupSection(_Section):
    """Parameters that are trained otherwise. `match` names a node by its path in the model (`layers.0`,
    `layers.*.norm`, `**.A_log`; `*` is one part of a path, `**` any number), with all below it, or every block of a
    type (`product_key`). Of the groups that match a parameter the last one holds."""

    where: typing.ClassVar[str] = "train.groups"

    match: str = ""
    lr_scale: NonNegativeFloat = 1.0  # times the learning rate
    weight_decay: NonNegativeFloat | None = None  # in place of train.weight_decay; what is spared stays spared

    def complaints(self) -> list[tuple[str, str]]:
        return [] if self.match else [("match", "must name a node, a parameter or a type of block")]


@dataclass(frozen=True)
class StageSection(_Section):
    """A stage of a curriculum: from the end of the stage before it (the first: the start) to `until`, a share of the
    run's steps. Nodes are named as in GroupSection."""

    where: typing.ClassVar[str] = "train.curriculum"

    until: Fraction = 1.0
    enable: tuple[str, ...] = ()  # blocks that take part from this stage on; before, they add nothing and do not learn
    freeze: tuple[str, ...] = ()  # nodes whose parameters stand still in this stage
    # node: {option: start}: a number moves evenly from start to its configured value while the stage lasts, and stood
    # at start before; start may be a pair [start, end]. Every block has the option `strength`, by which its output is
    # multiplied, 1 in the end
    ramp: dict[str, dict[str, float | tuple[float, ...]]] = field(default_factory=dict)

    def complaints(self) -> list[tuple[str, str]]:
        pairs = [v for options in self.ramp.values() for v in options.values() if isinstance(v, tuple)]
        return [("ramp", "goes from a number or a pair [start, end]") for v in pairs if len(v) != 2][:1]


@dataclass(frozen=True)
class SequenceChunkSection(_Section):
    """Backward chunk by chunk of a row (SeCO, arXiv:2505.16710): activations in memory are those of `size` tokens, for
    one more forward pass. With `keep` below 1 each chunk goes backward with that probability only, and then counts
    1 / keep times as much (SpaCO). Losses that balance a batch (of experts, of depth) are those of a chunk."""

    where: typing.ClassVar[str] = "train.sequence_chunks"

    size: NonNegativeInt = 0  # tokens; 0: whole rows
    keep: Fraction = 1.0

    def complaints(self) -> list[tuple[str, str]]:
        return [("keep", "goes with size, the tokens of a chunk")] if self.keep < 1 and not self.size else []


@dataclass(frozen=True)
class TrainSection(_Section):
    """How a model is trained. A step sees `batch_size` rows of `seq_len` tokens, computed in `accumulation`
    pieces; what a run computes depends on neither the pieces (but for `drop_path`, which draws rows in each) nor the
    number of processes."""

    where: typing.ClassVar[str] = "train"

    steps: PositiveInt = 500
    batch_size: PositiveInt = 16
    seq_len: PositiveInt = 256
    accumulation: PositiveInt = 1
    seed: Seed = 0
    init_from: str = ""  # a run or saved model whose weights are taken over where names and shapes fit
    # muon: orthogonal updates (arXiv:2502.16982) for the matrices of the trunk, AdamW for embedding, head, vectors,
    # convolutions. adamw8bit: AdamW with moments in 8 bits, of the package torchao
    optimizer: Literal["adamw", "muon", "adamw8bit"] = "adamw"
    lr: PositiveFloat = 2e-3
    betas: tuple[Beta, ...] = (0.9, 0.95)
    muon_lr: PositiveFloat | None = None  # [lr: an update of muon is as large as one of AdamW]
    muon_momentum: Beta = 0.95
    # spares vectors (norms, biases, gates) and what a block declares as `not_decayed` (A_log, ...)
    weight_decay: NonNegativeFloat = 0.1
    groups: tuple[GroupSection, ...] = ()  # parameters with another rate or decay
    aux: dict[str, NonNegativeFloat] = field(default_factory=dict)  # node: factor of its auxiliary losses
    curriculum: tuple[StageSection, ...] = ()  # stages in which parts of the model come in, stand still, change
    grad_clip: NonNegativeFloat = 1.0  # 0: never
    # linear warm-up, then from lr down to min_lr_factor * lr; `wsd` stays at lr until the last decay_fraction
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    warmup_steps: NonNegativeInt = 50
    decay_fraction: Fraction = 0.2
    wsd_decay: Literal["linear", "sqrt"] = "linear"  # its shape: 1 - p or 1 - sqrt(p) (arXiv:2405.18392)
    min_lr_factor: ZeroToOne = 0.1
    # of matrix products (autocast); parameters, gradients, the stream, gates and states stay in float32. float8:
    # bfloat16, but for large linear layers of the trunk; it needs the package torchao and a GPU that has it
    dtype: Literal["float32", "bfloat16", "float8"] = "float32"
    compile: bool = False  # torch.compile of each layer
    # what backward computes again. full: each layer; selective: each layer but for its matrix products, attention and
    # scans; budget: as few layers as keep activation_budget, a share of the layers' activations, by the cost model
    activation_checkpoint: Literal["none", "full", "selective", "budget"] = "none"
    activation_budget: ZeroToOne = 0.5
    loss_chunks: NonNegativeInt = 0  # pieces of a row whose logits exist one after the other; 0: by their size
    sequence_chunks: SequenceChunkSection = SequenceChunkSection()  # for very long rows
    eval_every: NonNegativeInt = 100  # 0: only at the end
    eval_batches: PositiveInt = 8
    checkpoint_every: NonNegativeInt = 100  # 0: only at the end
    keep_checkpoints: NonNegativeInt = 2  # 0: all
    health_every: NonNegativeInt = 50  # steps between two looks at every node; 0: never
    tensorboard: bool = False  # RUN/tensorboard
    wandb: str = ""  # project of Weights & Biases; offline where nobody is logged in or the server is not reached
    checkpoint_async: bool = False  # written in the background while training goes on; takes memory for a copy
    # a step whose loss or gradient is not finite, and one whose loss is more than spike_factor times the median of
    # the 50 before it (0: never looked at): skip leaves weights and optimizer as they were
    on_nan: Literal["stop", "skip"] = "stop"
    spike_factor: NonNegativeFloat = 0.0
    on_spike: Literal["stop", "skip"] = "skip"
    max_skips: PositiveInt = 5  # in a row; one more stops the run

    def complaints(self) -> list[tuple[str, str]]:
        found = []
        if self.batch_size % self.accumulation:
            found.append(("accumulation", f"must divide batch_size {self.batch_size}, got {self.accumulation}"))
        if len(self.betas) != 2:
            found.append(("betas", f"must be two numbers, got {list(self.betas)}"))
        if self.keep_checkpoints == 1:
            found.append(("keep_checkpoints", "must be 0 (all) or at least 2: the newest may be half-written"))
        ends = [stage.until for stage in self.curriculum]
        if any(a >= b for a, b in itertools.pairwise(ends)):
            found.append(("curriculum", f"must have stages that end one after the other, got until {ends}"))
        if self.curriculum and self.curriculum[0].enable:
            found.append(("curriculum", "cannot enable in its first stage what was never left out"))
        if self.muon_lr is not None and self.optimizer != "muon":
            found.append(("muon_lr", f"goes with optimizer: muon, this is {self.optimizer}"))
        if self.sequence_chunks.size:
            if self.activation_checkpoint != "none":
                found.append(("sequence_chunks", "recomputes each chunk already: leave activation_checkpoint out"))
            if self.compile:
                found.append(("sequence_chunks", "goes with compile: false"))
        if 0 < self.spike_factor <= 1:
            found.append(("spike_factor", f"must be 0 (off) or more than 1, got {self.spike_factor}"))
        return found


@dataclass(frozen=True)
class ParallelSection(_Section):
    """How a run is spread over processes: their number is dp_replicate * dp_shard * cp * tp * pp. What a run computes
    does not depend on it, and a resumed run may have another one."""

    where: typing.ClassVar[str] = "parallel"

    dp_replicate: PositiveInt = 1  # copies of the sharded model, each on rows of its own (HSDP)
    dp_shard: Annotated[int, Range(ge=-1)] = -1  # ranks that share weights and split the rows (FSDP); -1: those left
    tp: PositiveInt = 1  # ranks that split heads, channels, experts and vocabulary
    cp: PositiveInt = 1  # ranks that split the sequence
    pp: PositiveInt = 1  # ranks that split the layers
    ep: PositiveInt = 1  # of the data-parallel ranks: ranks that split the experts of a mixture
    schedule: Literal["1F1B", "GPipe", "Interleaved1F1B"] = "1F1B"  # of the pipeline
    microbatches: PositiveInt | None = None  # of the pipeline, a piece [as many as it has stages]

    def complaints(self) -> list[tuple[str, str]]:
        found = [("dp_shard", "must be -1 (the ranks that are left) or at least 1")] if self.dp_shard == 0 else []
        if self.ep > 1 and self.tp > 1:
            found.append(("ep", "goes with tp: 1, where each rank has tokens of its own; tp alone splits experts too"))
        if self.pp == 1 and self.microbatches is not None:
            found.append(("microbatches", "goes with pp, the number of pipeline stages"))
        return found

    def data_ranks(self, world: int) -> int:
        """Ranks that see different rows, among `world`. ConfigError where the numbers do not multiply to it."""
        model = self.cp * self.tp * self.pp
        shard = world // (model * self.dp_replicate) if self.dp_shard == -1 else self.dp_shard
        if shard < 1 or shard * self.dp_replicate * model != world:
            shown = "what is left" if self.dp_shard == -1 else str(self.dp_shard)
            text = f"dp_replicate {self.dp_replicate} * dp_shard {shown} * cp {self.cp} * tp {self.tp} * pp {self.pp}"
            raise ConfigError([Problem(f"{text} does not give the {world} processes that were started", self.where)])
        return shard * self.dp_replicate


@dataclass(frozen=True)
class DiffusionSection(_Section):
    """Block diffusion: blocks of `block_size` tokens come one after the other, the tokens of a block in any order.
    The last token of the vocabulary is the mask. The recipes (`zoo.architectures.block_diffusion`) say what is
    trained; `sub_block` and `threshold` are how it is sampled where the caller says nothing."""

    where: typing.ClassVar[str] = "diffusion"

    recipe: Literal["bd3", "fast_dllm", "nbdiff"] = "bd3"
    block_size: PositiveInt = 16
    curriculum: tuple[PositiveInt, ...] = ()  # block sizes of training before block_size, each as long as the last
    # training masks a share of each block drawn from here; a narrower range has less variance (bd3)
    clip: tuple[ZeroToOne, ...] = (0.001, 1.0)
    search_clip: bool = False  # bd3: at each evaluation of a run take the range over which the loss varies least
    ar_weight: NonNegativeFloat = 1.0  # nbdiff: weight of the next-token loss of the clean copy
    sub_block: PositiveInt | None = None  # tokens of a block that are decided together before the next ones
    threshold: PositiveFloat | None = None  # tokens at least so sure come at once [bd3: one at a time, others 0.9]

    def complaints(self) -> list[tuple[str, str]]:
        found = []
        if len(self.clip) != 2 or self.clip[1] <= 0 or self.clip[0] > self.clip[1]:
            found.append(("clip", f"must be two shares, the lower one first, got {list(self.clip)}"))
        if self.sub_block is not None and self.block_size % self.sub_block:
            found.append(("sub_block", f"must divide block_size {self.block_size}, got {self.sub_block}"))
        if self.search_clip and self.recipe != "bd3":
            found.append(("search_clip", f"belongs to the bound that bd3 trains, not to {self.recipe}"))
        if wrong := [n for n in self.curriculum if self.block_size % n]:
            found.append(("curriculum", f"must be divisors of block_size {self.block_size}, got {wrong[0]}"))
        return found


@dataclass(frozen=True)
class MixSection(_Section):
    """One source of `data.mix`. Rows come from it in proportion to `weight`."""

    where: typing.ClassVar[str] = "data.mix"

    source: str = ""
    weight: PositiveFloat = 1.0
    text_key: str | None = None  # in place of data.text_key

    def complaints(self) -> list[tuple[str, str]]:
        if self.source in ("", SHAPES, *SYNTHETIC) or self.source.startswith(HUB):
            return [("source", f"must name text: files or prepared tokens, got {self.source!r}")]
        return []


@dataclass(frozen=True)
class DataSection(_Section):
    """What a model is trained on. `source`: `python-stdlib` (the sources of this machine's Python), a text, JSONL
    or parquet file, a folder of them, a folder that `zoo data prepare` wrote (any size, read by memory map), a dataset
    of Hugging Face (`hf:NAME`, `hf:NAME:CONFIG`, streamed in its own order), or a synthetic task (`mqar`,
    `selective_copy`, `induction`, `needle`, `state_tracking`). For a vision model: `shapes` (drawn ones), or a folder
    of images with a subfolder for each class.

    `mix`: several sources of text in place of one, as [{source: a, weight: 0.7}, {source: b, weight: 0.3}]; rows come
    from them in just these proportions, and each is judged by its own held-out text."""

    where: typing.ClassVar[str] = "data"

    source: str = STDLIB
    mix: tuple[dict[str, Any], ...] = ()
    tokenizer: str = "bytes"  # or the path of a `tokenizers` JSON file
    text_key: str = "text"  # field of a JSONL record or parquet row that holds the text
    heldout: Share = 0.05  # share of the bytes, chosen by whole documents; prepared tokens have theirs already
    heldout_bytes: PositiveInt = 131072  # at most so many of them are read by the final evaluation
    doc_ids: bool = False  # rows pack documents that do not see each other
    num_pairs: PositiveInt = 8  # mqar, needle: key-value pairs to remember
    num_copied: PositiveInt = 16  # selective_copy: tokens to remember
    num_items: Annotated[int, Range(ge=2, le=6)] = 5  # state_tracking: so many items change places; 2: parity

    @property
    def synthetic(self) -> bool:
        """Whether the data are generated."""
        return self.source in SYNTHETIC

    def sources(self) -> list[tuple[float, DataSection]]:
        """Weight and section of each source of the mixture."""
        found = [MixSection.from_mapping(m) for m in self.mix]
        return [
            (m.weight, dataclasses.replace(self, source=m.source, text_key=m.text_key or self.text_key, mix=()))
            for m in found
        ]

    def complaints(self) -> list[tuple[str, str]]:
        found = [("source", "goes with one source: give data.mix or it")] if self.mix and self.source != STDLIB else []
        for i, given in enumerate(self.mix):
            try:
                MixSection.from_mapping(given)
            except ConfigError as error:
                found += [(p.where.replace("data.mix", f"mix[{i}]"), p.message) for p in error.problems]
        return found


@dataclass(frozen=True)
class DistillSection(_Section):
    """A vision model that learns from a trained one.

    layers: in two stages (Raptor, arXiv:2512.19941), first each node of the trunk alone, from the teacher's own layers
    and more and more from its own output; then all of them, one after the other. Embedding, final norm and heads are
    the teacher's and stay as they are. labels: the distillation head learns what the teacher answers (DeiT,
    arXiv:2012.12877)."""

    where: typing.ClassVar[str] = "distill"

    teacher: str = ""  # its run folder or saved model
    targets: Literal["layers", "labels"] = "layers"
    first_stage: ZeroToOne = 0.5  # of learning layers: share of the steps

    def complaints(self) -> list[tuple[str, str]]:
        found = [] if self.teacher else [("teacher", "must name the run folder of a trained vision model")]
        if self.targets == "labels" and self.first_stage != 0.5:
            found.append(("first_stage", "goes with targets: layers"))
        return found


@dataclass(frozen=True)
class OriginSection(_Section):
    """Where a converted model came from: the `config` of the library that made it (its `model_type` names the family),
    the `source` of the weights and their `license`; the `context`, in tokens, that it was converted for, where the
    original is another function at another length; the family `tower_of` which it is the text tower, if it is one."""

    where: typing.ClassVar[str] = "origin"
    config: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    license: str = ""
    context: PositiveInt | None = None
    tower_of: str = ""
