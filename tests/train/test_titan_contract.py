"""What we use of torchtitan, pinned: a new version that changes any of it fails here, not in somebody's run."""

import dataclasses
import inspect
import re
from pathlib import Path

import torch

from zoo.train import (
    titan,  # binds the device: first
    titan_adapters,
    titan_optim,
)


def parameters(function):
    return list(inspect.signature(function).parameters)


def fields(cls):
    return {f.name for f in dataclasses.fields(cls)}


def test_only_the_adapter_knows_torchtitan():
    root = Path(titan.__file__).resolve().parent.parent
    knows = re.compile(r"^\s*(?:from|import)\s+torchtitan\b", re.M)
    files = [f for folder in (root, root.parent / "blocks", root.parent / "kernels") for f in folder.rglob("*.py")]
    known = {f.name for f in files if knows.search(f.read_text(encoding="utf-8"))}
    assert known == {"titan.py", "titan_adapters.py", "titan_data.py", "titan_optim.py"}


def test_configurations_have_the_fields_that_are_set():
    assert fields(titan.Trainer.Config) >= {
        "model_spec", "dump_folder", "tokenizer", "dataloader", "loss", "optimizer", "lr_scheduler", "training",
        "parallelism", "checkpoint", "activation_checkpoint", "comm", "debug", "metrics",
    }  # fmt: skip
    assert fields(titan.TrainingConfig) >= {
        "local_batch_size", "global_batch_size", "seq_len", "steps", "max_norm", "disable_cuda_graphs",
    }  # fmt: skip
    assert fields(titan_adapters.CheckpointManager.Config) >= {
        "enable", "folder", "interval", "keep_latest_k", "async_mode", "last_save_model_only",
        "initial_load_model_only",
    }  # fmt: skip
    assert fields(titan_optim.LRSchedulersContainer.Config) >= {
        "warmup_steps",
        "decay_ratio",
        "decay_type",
        "min_lr_factor",
    }
    assert fields(titan_optim.ParamGroupConfig) == {"pattern", "optimizer_name", "optimizer_kwargs"}
    assert fields(titan.ModelSpec) == {
        "name", "flavor", "model", "parallelize_fn", "pipelining_fn", "post_optimizer_build_fn", "state_dict_adapter",
    }  # fmt: skip
    assert titan_adapters.CheckpointManager.Config().folder == "checkpoint"


def test_methods_that_are_called_or_replaced():
    assert parameters(titan.Trainer.train_step) == ["self", "data_iterator"]
    assert parameters(titan.Trainer.forward_backward_step) == ["self", "input_dict", "labels", "global_valid_tokens"]
    assert parameters(titan.Trainer.batch_generator) == ["self", "data_iterable"]
    assert parameters(titan_adapters.CheckpointManager.save) == ["self", "curr_step", "last_step"]
    assert parameters(titan_adapters.CheckpointManager.load) == ["self", "step"]
    save = titan_adapters.CheckpointManager.dcp_save
    assert parameters(save)[:4] == [
        "self",
        "state_dict",
        "checkpoint_id",
        "async_mode",
    ]
    assert {"maybe_wait_for_saving"} <= set(dir(titan_adapters.CheckpointManager))
    assert parameters(titan_adapters.MetricsProcessor.log) == [
        "self", "step", "global_avg_loss", "global_max_loss", "grad_norm", "extra_metrics",
    ]  # fmt: skip
    assert {"dp_world_size", "dp_rank", "local_batch_size"} <= set(parameters(titan_adapters.Data.__init__))
    container = titan_optim.OptimizersContainer
    assert parameters(container._resolve_optimizer_factory) == ["name"]
    assert parameters(container._build_param_groups) == ["model", "param_group_configs", "impl_kwargs"]
    assert "self._build_param_groups(" in inspect.getsource(container.__init__)
    source = inspect.getsource(titan.Trainer.__init__)
    for name in ("dp_world_size=", "dp_rank=", "local_batch_size=", "init_weights(buffer_device", "tokenizer_path="):
        assert name in source
    assert parameters(titan_adapters.cross_entropy_loss)[:2] == ["pred", "labels"]
    assert parameters(titan_adapters.BaseLoss.__call__)[:4] == ["self", "pred", "labels", "global_valid_tokens"]
    assert "self.fn(pred, labels)" in inspect.getsource(titan_adapters.BaseLoss.__call__)
    assert "](inputs, **extra_kwargs)" in inspect.getsource(titan.Trainer._forward_backward_body)
    assert '"n_tokens_seen"' in inspect.getsource(titan.Trainer.train_step)


def test_the_loop_that_is_replaced_does_what_ours_does():
    """Ours leaves out the profiler, the validator, the shorter timeout after the first step and the last sleep."""
    source = inspect.getsource(titan.Trainer.train)
    for call in ("checkpointer.load(", "batch_generator(", "gc_handler.run(", "train_step(", "checkpointer.save("):
        assert call in source


def test_device_is_bound():
    from torchtitan.tools import utils

    assert utils.device_type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_loader_of_hugging_face_datasets_has_the_parts_that_are_used():
    from zoo.train import titan_data

    assert fields(titan_data.DatasetConfig) == {"path", "loader", "sample_processor"}
    dataset = titan_data.HuggingFaceTextDataset
    given = ["dataset_name", "dataset_path", "tokenizer", "seq_len", "dp_rank", "dp_world_size", "infinite"]
    assert parameters(dataset.__init__)[1:] == given and callable(dataset._get_data_iter)
    assert parameters(titan_data.ParallelAwareDataloader.__init__)[1:] == [
        "dataset",
        "dp_rank",
        "dp_world_size",
        "kwargs",
    ]
