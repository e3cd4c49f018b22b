"""What torchtitan is given of ours: the model and how it is spread, rows, losses, metrics, checkpoints.

torchtitan 0.3 names its device once, at import, so the device is bound here before the rest of it is loaded.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.contract import State
from zoo.errors import ZooError
from zoo.parallel import context, pipeline, shard, tensor
from zoo.parallel.expert import exchange, mixtures
from zoo.parallel.pipeline import stages_per_rank
from zoo.parallel.weights import whole
from zoo.train.checkpoints import Save, clear_leftovers
from zoo.train.chunked_loss import loss_by_chunks
from zoo.train.curriculum import scale_auxiliary_losses
from zoo.train.device import Cpu
from zoo.train.hub import HubRows
from zoo.train.job import Job
from zoo.train.loader import Loader
from zoo.train.lowbit import to_float8
from zoo.train.parallelize import parallelize


def _bind_device() -> None:
    loaded = "torchtitan.trainer" in sys.modules
    from torchtitan.tools import utils

    if not torch.cuda.is_available() and utils.device_type != "cpu":
        if loaded:
            raise ZooError("import zoo.train.titan before torchtitan: torchtitan fixes its device when it is imported")
        utils.device_type, utils.device_module = "cpu", Cpu()


_bind_device()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchtitan.components.checkpointer import CheckpointManager
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import BaseLoss, cross_entropy_loss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.protocols.model import BaseModel


class Model(BaseModel):
    """Our model under the name `model`. Built on meta, moved by `to_empty`, filled by `init_weights`."""

    model: Any

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        job: Job
        chunks: int = 1  # of the loss

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            pass

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            count = sum(p.numel() for p in model.parameters())
            return count, 6 * count  # only torchtitan's own log would show the FLOPs

    def __init__(self, config: Config):
        super().__init__()
        self.model = config.job.build("meta")
        self.job, self.section, self.chunks = config.job, config.job.train, config.chunks
        scale_auxiliary_losses(self.model, self.section.aux)
        if self.section.dtype == "float8":
            to_float8(self.model)
        self.step = 0
        self.ties = _ties(self.model)

    def verify_module_protocol(self) -> None:
        pass  # the children are ordinary modules on purpose

    def init_weights(self, *, buffer_device: Any = None, **kwargs: Any) -> None:
        for (first, name), *others in self.ties:  # `to_empty` gave each of them a tensor of its own
            for module, other in others:
                module.register_parameter(other, getattr(first, name))
        self.model.init_weights(self.section.seed, whole)
        self.job.prepare(self.model)

    def forward(
        self,
        inputs: Tensor | None,
        *,
        doc_ids: Tensor | None = None,
        labels: Tensor | None = None,
        noise: Tensor | None = None,
        block: int | None = None,
        state: State | None = None,
        evaluate: Callable[[nn.Module], Any] | None = None,
    ) -> Any:
        half, device = self.section.dtype != "float32", next(self.parameters()).device.type
        # without a cache of cast weights, which recomputation would find in another state
        with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=False):
            if evaluate is not None:
                return evaluate(self.model)
            assert inputs is not None
            if state is not None and labels is None:
                return self.model.hidden(inputs, state)
            return self._losses_or_logits(inputs, doc_ids, labels, noise, block, state)

    def _losses_or_logits(
        self, inputs: Tensor, doc_ids: Any, labels: Any, noise: Any, block: int | None, state: State | None
    ) -> Tensor:
        if self.job.objective is not None and labels is not None:
            return self.job.objective(self.model, inputs, labels, self.step)
        if labels is not None:
            return loss_by_chunks(self.model, inputs, labels, doc_ids, self.chunks, cross_entropy_loss, state)
        if noise is not None:
            return self.model.losses(inputs, noise, doc_ids, block)
        if self.job.parallel.pp > 1:
            logits = pipeline.run(self.model, inputs, doc_ids)
            return logits if logits.dim() == 3 else logits[:, None]
        if doc_ids is not None:
            return self.model(inputs, doc_ids=doc_ids)
        logits = self.model(inputs)
        return logits if logits.dim() == 3 else logits[:, None]  # an image is a row with one label


def _ties(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """(module, name) of every parameter that several modules hold."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(p), []).append((module, name))
    return [h for h in holders.values() if len(h) > 1]


class Data(BaseDataLoader):
    """Our rows, by their numbers."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        job: Job
        with_labels: bool  # also for the model

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **unused: Any):
        assert not isinstance(config.job.rows, HubRows)
        self.loader = Loader(config.job.rows, local_batch_size, dp_rank, dp_world_size)
        self.with_labels = config.with_labels

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for inputs, labels, doc_ids, noise, block in self.loader:
            more = {"labels": labels if self.with_labels else None, "doc_ids": doc_ids, "noise": noise, "block": block}
            yield {"input": inputs} | {k: v for k, v in more.items() if v is not None}, labels

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)


def loader(job: Job, with_labels: bool) -> BaseDataLoader.Config:
    """Of the rows of a job, where the model is given labels, too."""
    if not isinstance(job.rows, HubRows):
        return Data.Config(job=job, with_labels=with_labels)
    from zoo.train.titan_data import HubLoader  # a second spent on `datasets`, which others need not

    return HubLoader.Config(rows=job.rows, with_labels=with_labels)


class NoTokenizer(BaseTokenizer):
    """The rows are tokenized before torchtitan sees them."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str | None = None):
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *args: Any, **kwargs: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        raise NotImplementedError


class Sum(BaseLoss):
    """The losses that an objective or the model itself gave, summed; torchtitan divides by the number of labels."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, **unused: Any):
        self.fn = lambda losses, labels: losses.sum()


class Metrics(MetricsProcessor):
    """Keeps the numbers of the last step; the run writes them."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        self.last = {"loss": global_avg_loss, "grad_norm": grad_norm, "tokens": (extra_metrics or {})["n_tokens_seen"]}
        self.data_loading_times.clear()


class Checkpoints(CheckpointManager):
    """A step's folder appears when it is complete, also where it is written in the background."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        keep: int = 0  # not torchtitan's own count, which takes half-written folders for checkpoints

    def __init__(self, config: Config, **parts: Any):
        super().__init__(config, **parts)
        self.keep = config.keep
        if self.enable:
            clear_leftovers(Path(self.folder))

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        save = Save(Path(checkpoint_id), self.pg, self.keep)
        with save.checked():
            future = super().dcp_save(state_dict, str(save.temporary), *args, **kwargs)
        return save.commit_after(future) if isinstance(future, Future) else save.commit()


# ------------------------------------------------------------------------------------------- on a mesh
def spread(wrapper: Model, *, parallel_dims: Any, **unused: Any) -> Model:
    """A model, or one stage of it, over the ranks, in place."""
    model, dims = wrapper.model, parallel_dims
    if dims.ep_enabled:
        for experts in mixtures(model).values():
            exchange(experts, dims.get_mesh("ep"))
    if dims.tp_enabled:
        tensor.apply(model, dims.get_mesh("tp"))
    if dims.cp_enabled:
        context.apply(model, dims.get_mesh("cp").get_group())
    parallelize(model, wrapper.section)
    if dims.world_size > 1:
        replicas = ["dp_replicate"] if dims.dp_replicate_enabled else []
        experts = dims.get_mesh([*replicas, "efsdp"]) if dims.ep_enabled else None
        mesh = dims.get_mesh([*replicas, "fsdp"])
        states = bool(wrapper.section.sequence_chunks.size)
        shard.apply(model, mesh, root=wrapper, experts=experts, reshard=not dims.pp_enabled, states=states)
    return wrapper


def cut(whole: Model, *, parallel_dims: Any, parallelism: Any, training: Any, device: Any, parallelize_fn: Any,
        loss_fn: Any, **given: Any) -> tuple[Any, list[nn.Module], bool, bool]:  # fmt: skip
    """The schedule of a pipeline, the stages of this rank, and whether they hold the first and the last layer."""
    mesh = parallel_dims.get_mesh("pp")
    rank, per_rank = mesh.get_local_rank(), stages_per_rank(parallelism.pipeline_parallel_schedule)
    count = mesh.size() * per_rank
    cuts = pipeline.balanced(pipeline.layer_weights(whole.model, training.seq_len), count)
    own = [rank + i * mesh.size() for i in range(per_rank)]
    parts: list[nn.Module] = []
    for number in own:
        with torch.device("meta"):
            part = Model(Model.Config(job=whole.job))
        pipeline.keep(part.model, cuts[number], number == 0, number == count - 1)
        part.ties = _ties(part.model)
        parts.append(parallelize_fn(part, parallel_dims=parallel_dims))
    schedule = pipeline.build_schedule(
        parts, mesh, device, parallelism.pipeline_parallel_schedule,
        training.local_batch_size // parallelism.pipeline_parallel_microbatch_size,
        lambda *args, **kwargs: loss_fn(*args, **kwargs)[0],
    )  # fmt: skip
    return schedule, parts, own[0] == 0, own[-1] == count - 1
