"""The door to torchtitan: its Trainer runs our models, rows and optimizer settings, in one process or several.

Nothing of torch is patched. What is used of torchtitan stands in `tests/train/test_titan_contract.py`.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.contract import set_auxiliary_scale, set_reduction
from zoo.errors import ConfigError, Problem
from zoo.parallel import pipeline, shard
from zoo.parallel.layout import pieces
from zoo.parallel.weights import full_state
from zoo.train.chunked_loss import chunks_for
from zoo.train.curriculum import Curriculum, check
from zoo.train.device import process_group, quiet, world_size
from zoo.train.evaluate import Share
from zoo.train.guard import Guard
from zoo.train.job import Job, Trained
from zoo.train.noise import NoisyRows
from zoo.train.optim import groups
from zoo.train.sequence_chunks import ChunkedBackward
from zoo.train.titan_adapters import (  # binds the device: in front of torchtitan
    Checkpoints,
    Metrics,
    Model,
    NoTokenizer,
    Sum,
    cut,
    loader,
    spread,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.config import CommConfig, DebugConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.protocols.model_spec import ModelSpec
    from torchtitan.trainer import Trainer

    from zoo.train.titan_optim import lr_schedule, optimizers


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


class _Trainer(Guard, ChunkedBackward, Trainer):
    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        job: Job
        metrics: MetricsProcessor.Config = field(default_factory=Metrics.Config)

    checkpointer: Checkpoints
    metrics_processor: Metrics

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
        """The weights, whole, on the first rank."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)  # room for them
        count = sum(p.numel() for part in self.parts for p in part.parameters())
        if not self.parallel_dims.pp_enabled:
            return Trained(full_state(self.parts, keep=dist.get_rank() == 0), count, self.step)
        group = self.parallel_dims.get_mesh("pp").get_group()
        firsts = dist.get_process_group_ranks(group)[0] == 0  # this rank's stages, with those of its group, are a model
        state = full_state(self.parts, keep=firsts)
        stages: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(stages, count, group)
        count = sum(stages)
        if firsts:
            dist.gather_object(state, stages if dist.get_rank() == 0 else None, 0, group)
            state = {k: v for s in stages for k, v in s.items()} if dist.get_rank() == 0 else {}
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
    chunks, chunked = _loss_chunks(job, model, made.rows), bool(train.sequence_chunks.size)
    return _Trainer.Config(
        job=job,
        model_spec=ModelSpec(
            name="zoo",
            flavor="",
            model=Model.Config(job=job, chunks=chunks),
            parallelize_fn=spread,
            pipelining_fn=cut,
            post_optimizer_build_fn=None,
            state_dict_adapter=None,
        ),
        dump_folder=str(job.folder or ""),
        tokenizer=NoTokenizer.Config(),
        dataloader=loader(job, with_labels=job.objective is not None or chunks > 1),
        loss=(CrossEntropyLoss if _on_labels(job) and chunks == 1 and not chunked else Sum).Config(),
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
        checkpoint=Checkpoints.Config(
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
        metrics=Metrics.Config(log_freq=1, disable_color_printing=True),
    )


def _on_labels(job: Job) -> bool:
    return job.objective is None and not isinstance(job.rows, NoisyRows)


def _loss_chunks(job: Job, model: Any, rows: int) -> int:
    """Pieces of the loss of `rows` rows."""
    train, layout = job.train, job.parallel
    if _on_labels(job) and hasattr(model, "vocab_size") and layout.pp == 1:
        at_once = train.sequence_chunks.size or train.seq_len // layout.cp
        return chunks_for(train.loss_chunks, rows * at_once, model.vocab_size)
    if train.loss_chunks > 1:
        text = "goes with training on the next token, and with parallel.pp: 1"
        raise ConfigError([Problem(text, "train.loss_chunks")])
    return 1
