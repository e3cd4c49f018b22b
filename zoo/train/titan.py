"""The only door to torchtitan: its Trainer runs our models, rows and optimizer settings in one process.

torchtitan 0.3 names its device once, at import, so the device is bound here before the rest of it is loaded.
Nothing of torch is patched. What is used of torchtitan stands in `tests/train/test_titan_contract.py`.
"""

from __future__ import annotations

import gc
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.contract import set_auxiliary_scale, set_reduction
from zoo.errors import ConfigError, Problem, ZooError
from zoo.parallel import context, pipeline, shard, tensor
from zoo.parallel.expert import exchange, mixtures
from zoo.parallel.layout import pieces
from zoo.parallel.pipeline import stages_per_rank
from zoo.parallel.weights import full_state, whole
from zoo.train.checkpoints import Save, clear_leftovers
from zoo.train.chunked_loss import chunks_for, loss_by_chunks
from zoo.train.curriculum import Curriculum, check, scale_auxiliary_losses
from zoo.train.device import Cpu, process_group, quiet, world_size
from zoo.train.evaluate import Share
from zoo.train.guard import Guard
from zoo.train.hub import HubRows
from zoo.train.job import Job, Trained
from zoo.train.loader import Loader
from zoo.train.lowbit import to_float8
from zoo.train.noise import NoisyRows
from zoo.train.optim import groups
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
    from torchtitan.components.loss import BaseLoss, CrossEntropyLoss, cross_entropy_loss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import CommConfig, DebugConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.protocols.model import BaseModel
    from torchtitan.protocols.model_spec import ModelSpec
    from torchtitan.trainer import Trainer

    from zoo.train.titan_optim import lr_schedule, optimizers


# ------------------------------------------------------------------------------------------- interface
def fit(job: Job) -> Trained:
    """Run a job to its end, or until `job.stop()`. All processes of a run call it alike."""
    collecting = gc.isenabled()
    with process_group(), quiet(), torch.random.fork_rng(devices=[]):
        trainer = None
        try:
            trainer = _config(job).build()
            trainer.train()
            return trainer.result()
        finally:
            if trainer is not None:
                trainer.close()
            set_auxiliary_scale(1.0)
            set_reduction(None)
            if collecting:
                gc.enable()  # torchtitan collects by itself and leaves collection switched off


# ------------------------------------------------------------------------------------------- adapters
class _Model(BaseModel):
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
        evaluate: Callable[[nn.Module], Any] | None = None,
    ) -> Any:
        half, device = self.section.dtype != "float32", next(self.parameters()).device.type
        # without a cache of cast weights, which recomputation would find in another state
        with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=False):
            if evaluate is not None:
                return evaluate(self.model)
            assert inputs is not None
            return self._losses_or_logits(inputs, doc_ids, labels, noise, block)

    def _losses_or_logits(self, inputs: Tensor, doc_ids: Any, labels: Any, noise: Any, block: int | None) -> Tensor:
        if self.job.objective is not None and labels is not None:
            return self.job.objective(self.model, inputs, labels, self.step)
        if labels is not None:
            return loss_by_chunks(self.model, inputs, labels, doc_ids, self.chunks, cross_entropy_loss)
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


class _Data(BaseDataLoader):
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


def _loader(job: Job, with_labels: bool) -> BaseDataLoader.Config:
    if not isinstance(job.rows, HubRows):
        return _Data.Config(job=job, with_labels=with_labels)
    from zoo.train.titan_data import HubLoader  # a second spent on `datasets`, which others need not

    return HubLoader.Config(rows=job.rows, with_labels=with_labels)


class _NoTokenizer(BaseTokenizer):
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


class _Sum(BaseLoss):
    """The losses that an objective or the model itself gave, summed; torchtitan divides by the number of labels."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, **unused: Any):
        self.fn = lambda losses, labels: losses.sum()


class _Metrics(MetricsProcessor):
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


class _Checkpoints(CheckpointManager):
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


class _Trainer(Guard, Trainer):
    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        job: Job
        metrics: MetricsProcessor.Config = field(default_factory=_Metrics.Config)

    checkpointer: _Checkpoints
    metrics_processor: _Metrics

    def __init__(self, config: Config):
        super().__init__(config)
        self.job = config.job
        self.wrappers: list[Any] = list(self.model_parts)
        self.parts: list[Any] = [w.model for w in self.wrappers]
        self.ranks = dist.get_world_size()
        dims = self.parallel_dims
        pieces = self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches
        set_auxiliary_scale(1 / (pieces * dims.dp_replicate * dims.dp_shard * dims.cp))
        if dims.dp_cp_enabled:
            set_reduction(partial(dist.all_reduce, group=dims.get_mesh("loss").get_group()))
        modules = [m for part in self.parts for m in part.modules()]
        # what modules do once per optimiser step: move a selection bias, count the steps of a warm-up
        hooks = ("update_bias", "after_step")
        self.hooks: list[Any] = [h for m in modules for name in hooks if callable(h := getattr(m, name, None))]
        self.measuring: list[Any] = [m for m in modules if isinstance(getattr(m, "metrics", None), dict)]
        self.parameters = [p for part in self.parts for p in part.parameters()]
        stages = self.job.train.curriculum
        self.curricula = [Curriculum(part, stages) for part in self.parts] if stages else []
        if stages:
            self.optimizers.state_dict()  # of a parameter that stands still there must be a state to save, too
            for state in (s for optimizer in self.optimizers for s in optimizer.state.values() if "step" in s):
                state["step"].zero_()
        self.watch()

    def train(self) -> None:
        """The loop of torchtitan's Trainer without its end-of-run pause, with evaluation and a way to stop."""
        job, train = self.job, self.job.train
        if job.resume_from is not None:
            self.checkpointer.load(job.resume_from)
            self._apply_schedule()
        batches = self.batch_generator(self.dataloader)
        while self.step < train.steps and not self._agreed(job.stop()):
            self.step += 1
            self.gc_handler.run(self.step)
            record = self._timed_step(batches)
            last = self.step == train.steps
            if record is not None:  # the step was not skipped
                if job.evaluate and train.eval_every and (last or self.step % train.eval_every == 0):
                    record |= self.evaluate(job.evaluate)
                job.on_step(record)
            if last or self._agreed(job.stop()):
                self.checkpointer.save(self.step, last_step=True)
            elif train.checkpoint_every:
                self.checkpointer.save(self.step)

    def evaluate(self, evaluate: Callable[[nn.Module, Share], dict[str, float]]) -> dict[str, float]:
        """The same figures on all ranks, of the model as training computes it."""
        share = Share(*self._data_rank, getattr(self.parts[0], "slice", None), self._sum_over_tokens)
        if self.parallel_dims.pp_enabled:
            stages: Any = pipeline.InTurn(self.wrappers, self.parallel_dims.get_mesh("pp"))
            found = evaluate(stages, share)
        else:  # inside the root of FSDP, whatever of the model is called
            found = self.wrappers[0](None, evaluate=lambda model: evaluate(model, share))
        for wrapper in self.wrappers:
            shard.free(wrapper)
        return found

    @property
    def _data_rank(self) -> tuple[int, int]:
        """Number of this rank among those that read different rows, and how many there are."""
        if not self.parallel_dims.dp_enabled:
            return 0, 1
        mesh = self.parallel_dims.get_mesh("batch")
        return mesh.get_local_rank(), mesh.size()

    def _sum_over_tokens(self, sums: Tensor) -> None:
        """In place, over all ranks that look at different tokens or hold other stages."""
        total = sums.to(self.device)
        dims = self.parallel_dims
        for name, there in (("loss", dims.dp_cp_enabled), ("pp", dims.pp_enabled)):
            if there:
                dist.all_reduce(total, group=dims.get_mesh(name).get_group())
        sums.copy_(total)

    def _timed_step(self, batches: Iterator[Any]) -> dict[str, Any] | None:
        scheduler: Any = self.lr_schedulers.schedulers[0]
        lr = self.job.train.lr * scheduler.lr_lambdas[0](scheduler.last_epoch)  # groups may have others
        start, before = time.perf_counter(), self.ntokens_seen
        self.train_step(batches)
        seconds = time.perf_counter() - start
        if self.skips:
            return None
        last = self._from_last_stage(self.metrics_processor.last)
        return {
            "step": self.step,
            "loss": last["loss"],
            "lr": lr,
            "grad_norm": last["grad_norm"],
            "tokens": last["tokens"],
            "tokens_per_second": self.data_ranks * (self.ntokens_seen - before) / seconds,
            "seconds": seconds,
        } | self._block_metrics()

    def _block_metrics(self) -> dict[str, dict[str, float]]:
        """What the blocks measured in the last forward, averaged over those that measure it."""
        found: dict[str, list[float]] = {}
        for module in self.measuring:
            for name, value in module.metrics.items():
                found.setdefault(name, []).append(float(value))
        return {"blocks": {name: sum(v) / len(v) for name, v in found.items()}} if found else {}

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        for wrapper in self.wrappers:
            wrapper.step = self.step
        for curriculum in self.curricula:
            curriculum.begin((self.step - 1) / max(1, self.job.train.steps - 1))
        super().train_step(data_iterator)
        if self.skips:
            return
        resting = {m for curriculum in self.curricula for m in curriculum.resting}
        for hook in self.hooks:
            if hook.__self__ not in resting:
                hook()

    def drop_gradients(self) -> None:
        """Of what stands still in this stage of the curriculum."""
        for curriculum in self.curricula:
            curriculum.drop_gradients()

    def loss_of_all_ranks(self, mine: Tensor) -> float | None:
        """The loss of the step; None on a rank that does not know it."""
        if self.parallel_dims.pp_enabled and not self.pp_has_last_stage:
            return None
        if self.parallel_dims.dp_cp_enabled:
            return dist_utils.dist_sum(mine, self.parallel_dims.get_optional_mesh("loss"))
        return float(mine)

    def post_dataloading_process(
        self, input_dict: dict[str, Any], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """This rank's part of the rows."""
        inputs, more = input_dict["input"], {k: v for k, v in input_dict.items() if k != "input"}
        if self.parallel_dims.cp_enabled:
            mesh = self.parallel_dims.get_mesh("cp")

            def own(t: Any) -> Any:
                return t.chunk(mesh.size(), 1)[mesh.get_local_rank()].contiguous() if isinstance(t, Tensor) else t

            inputs, labels, more = own(inputs), own(labels), {k: own(v) for k, v in more.items()}
        self.ntokens_seen += labels.numel()
        return inputs, labels, more

    @property
    def data_ranks(self) -> int:
        """Ranks that read different tokens."""
        return self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard * self.parallel_dims.cp

    def _agreed(self, stop: bool) -> bool:
        """Whether any process wants to stop."""
        if self.ranks == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _from_last_stage(self, figures: dict[str, float]) -> dict[str, float]:
        if not self.parallel_dims.pp_enabled:
            return figures
        group = self.parallel_dims.get_mesh("pp").get_group()
        told = [figures]
        dist.broadcast_object_list(told, dist.get_global_rank(group, dist.get_world_size(group) - 1), group)
        return figures | {"loss": told[0]["loss"]}

    def result(self) -> Trained:
        """The weights, whole."""
        state, count = full_state(self.parts), sum(p.numel() for part in self.parts for p in part.parameters())
        if self.parallel_dims.pp_enabled:
            group = self.parallel_dims.get_mesh("pp").get_group()
            stages: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(stages, (state, count), group)
            state, count = {k: v for s, _ in stages for k, v in s.items()}, sum(n for _, n in stages)
        return Trained(state, count, self.step)

    def _apply_schedule(self) -> None:
        # the loaded groups carry the old run's rate, which differs where the schedule was changed
        for scheduler in self.lr_schedulers.schedulers:
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = lr

    def close(self) -> None:
        try:
            self.checkpointer.maybe_wait_for_saving()
        finally:
            super().close()


def _config(job: Job) -> _Trainer.Config:
    train, layout = job.train, job.parallel
    model = job.build("meta")
    check(model, train)
    if train.dtype == "float8" and layout.tp > 1:
        raise ConfigError([Problem("float8 goes with parallel.tp: 1", "train.dtype")])
    made = pieces(layout, train, world_size())
    chunks = _loss_chunks(job, model, made.rows)
    return _Trainer.Config(
        job=job,
        model_spec=ModelSpec(
            name="zoo",
            flavor="",
            model=_Model.Config(job=job, chunks=chunks),
            parallelize_fn=_parallelize,
            pipelining_fn=_pipeline,
            post_optimizer_build_fn=None,
            state_dict_adapter=None,
        ),
        dump_folder=str(job.folder or ""),
        tokenizer=_NoTokenizer.Config(),
        dataloader=_loader(job, with_labels=job.objective is not None or chunks > 1),
        loss=(CrossEntropyLoss if _on_labels(job) and chunks == 1 else _Sum).Config(),
        optimizer=optimizers(groups(model, train)),
        lr_scheduler=lr_schedule(train),
        training=TrainingConfig(
            local_batch_size=made.rows,
            global_batch_size=train.batch_size,
            seq_len=train.seq_len,
            steps=train.steps,
            max_norm=train.grad_clip or math.inf,
            disable_cuda_graphs=True,
        ),
        # the backend for modules that know nothing of torchtitan
        parallelism=ParallelismConfig(
            data_parallel_replicate_degree=layout.dp_replicate,
            data_parallel_shard_degree=layout.dp_shard,
            tensor_parallel_degree=layout.tp,
            context_parallel_degree=layout.cp,
            pipeline_parallel_degree=layout.pp,
            pipeline_parallel_schedule=layout.schedule,
            pipeline_parallel_microbatch_size=made.rows // made.microbatches if layout.pp > 1 else 1,
            expert_parallel_degree=layout.ep,
            enable_sequence_parallel=False,
            spmd_backend="partial_dtensor",
            context_parallel_load_balancer=None,
        ),
        checkpoint=_Checkpoints.Config(
            enable=job.folder is not None,
            interval=train.checkpoint_every or train.steps,
            keep=train.keep_checkpoints,
            keep_latest_k=0,
            async_mode="async" if train.checkpoint_async else "disabled",
            last_save_model_only=False,  # so that a finished run can be continued
            initial_load_model_only=False,
        ),
        activation_checkpoint=None,
        comm=CommConfig(trace_buf_size=0),
        debug=DebugConfig(enable_structured_logging=False),
        metrics=_Metrics.Config(log_freq=1, disable_color_printing=True),
    )


def _on_labels(job: Job) -> bool:
    return job.objective is None and not isinstance(job.rows, NoisyRows)


def _loss_chunks(job: Job, model: Any, rows: int) -> int:
    """Pieces of the loss of `rows` rows."""
    train, layout = job.train, job.parallel
    if _on_labels(job) and hasattr(model, "vocab_size") and layout.pp == 1:
        return chunks_for(train.loss_chunks, rows * train.seq_len // layout.cp, model.vocab_size)
    if train.loss_chunks > 1:
        text = "goes with training on the next token, and with parallel.pp: 1"
        raise ConfigError([Problem(text, "train.loss_chunks")])
    return 1


def _parallelize(wrapper: _Model, *, parallel_dims: Any, **unused: Any) -> _Model:
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
        shard.apply(model, mesh, root=wrapper, experts=experts, reshard=not dims.pp_enabled)
    return wrapper


def _pipeline(whole: _Model, *, parallel_dims: Any, parallelism: Any, training: Any, device: Any, parallelize_fn: Any,
              loss_fn: Any, **given: Any) -> tuple[Any, list[nn.Module], bool, bool]:  # fmt: skip
    mesh = parallel_dims.get_mesh("pp")
    rank, per_rank = mesh.get_local_rank(), stages_per_rank(parallelism.pipeline_parallel_schedule)
    count = mesh.size() * per_rank
    cuts = pipeline.balanced(pipeline.layer_weights(whole.model, training.seq_len), count)
    own = [rank + i * mesh.size() for i in range(per_rank)]
    parts: list[nn.Module] = []
    for number in own:
        with torch.device("meta"):
            part = _Model(_Model.Config(job=whole.job))
        pipeline.keep(part.model, cuts[number], number == 0, number == count - 1)
        part.ties = _ties(part.model)
        parts.append(parallelize_fn(part, parallel_dims=parallel_dims))
    schedule = pipeline.build_schedule(
        parts, mesh, device, parallelism.pipeline_parallel_schedule,
        training.local_batch_size // parallelism.pipeline_parallel_microbatch_size,
        lambda *args, **kwargs: loss_fn(*args, **kwargs)[0],
    )  # fmt: skip
    return schedule, parts, own[0] == 0, own[-1] == count - 1
