"""Building models from configurations, and keeping them: config.yaml + model.safetensors, no pickle."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from zoo.architectures.block_diffusion import BlockDiffusionLM
from zoo.architectures.causal_lm import CausalLM
from zoo.architectures.model import Model
from zoo.architectures.vision import VisionModel
from zoo.errors import ConfigError, Problem, ZooError
from zoo.graph.loader import load_graph
from zoo.graph.spec import Graph

WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
ARCHITECTURES: dict[str, type[CausalLM] | type[VisionModel]] = {"causal_lm": CausalLM, "vision": VisionModel}


def assemble(graph: Graph, *, dtype: torch.dtype = torch.float32) -> Model:
    """The model of a graph on the meta device."""
    architecture = BlockDiffusionLM if graph.diffuses else ARCHITECTURES[graph.architecture]
    return architecture(graph, device="meta", dtype=dtype)


def build(
    path_or_config: str | Path | Mapping | DictConfig,
    overrides: Iterable[str] = (),
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Any:
    """Compose, check and build a model. It comes in eval() mode; call train() to train it.

    path_or_config: a YAML file, a shipped name, a run folder, or a mapping. overrides: `key=value` strings.
    On the meta device nothing is allocated. ConfigError lists every problem of the configuration.
    """
    graph = load_graph(path_or_config, overrides)
    # built on meta first: a model that does not fit fails before half of it is drawn
    model = assemble(graph, dtype=dtype)
    if str(device) != "meta":
        model.to_empty(device=device)
        model.init_weights(seed)
    return model.eval()


@torch.no_grad()
def allocate(model: Model, device: Any = "cpu") -> None:
    """Give a model on the meta device memory. Constants are computed; parameters hold anything, for the caller to
    write over: to draw what is thrown away takes longer than to read a checkpoint."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    model.init_weights()  # which does nothing to parameters on meta
    constants = dict(model.named_buffers())
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(constants[name])


def unique_tensors(model: Model) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, each shared one once, under its first name."""
    persistent = model.state_dict(keep_vars=True)
    seen: dict[int, str] = {}
    return {n: t.detach() for n, t in persistent.items() if seen.setdefault(id(t), n) == n}


def save_pretrained(model: Model, directory: Path) -> Path:
    """Write the two files; a failure leaves nothing half-written. ZooError where the disk refuses."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {n: t.contiguous().cpu() for n, t in unique_tensors(model).items()}
        write_atomically(directory / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(model.config))).encode())
        with replacing(directory / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise ZooError(f"cannot save the model in {directory}: {getattr(error, 'strerror', None) or error}") from None
    return directory


class replacing:
    """A temporary name beside `path` that takes its place on success and vanishes on failure."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> str:
        handle, self.name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        os.close(handle)
        return self.name

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            os.chmod(self.name, 0o644)
            os.replace(self.name, self.path)
        elif os.path.exists(self.name):
            os.unlink(self.name)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def from_pretrained(directory: str | Path, *, device: str | torch.device = "cpu", dtype: Any = None) -> Any:
    """Load what `save_pretrained` wrote. ConfigError where files are missing, damaged or do not fit."""
    folder = saved_in(directory)
    graph = load_graph(folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS, device)
    return with_tensors(graph, tensors, folder / WEIGHTS, device=device, dtype=dtype)


def saved_in(directory: str | Path) -> Path:
    """The folder with the two files: `directory`, or the one inside a run folder. ConfigError where there is none."""
    folder = Path(directory)
    if not (folder / WEIGHTS).is_file() and (folder / "model" / WEIGHTS).is_file():
        folder = folder / "model"  # a run folder
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(
                [Problem(f"there is no {name}; is it a saved model or a finished run?", file=str(folder))]
            )
    return folder


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. ConfigError where it is none."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise ConfigError([Problem(f"is damaged or no safetensors file: {error}", file=str(path))]) from None


def with_tensors(
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Model:
    """The model of a graph with these weights, in eval() mode. ConfigError where they do not fit; `path` is where they
    came from."""
    embedding = tensors.get(f"{ARCHITECTURES[graph.architecture].embedding}.weight")
    stored = embedding.dtype if embedding is not None and embedding.is_floating_point() else torch.float32
    model = assemble(graph, dtype=dtype or stored)
    check_fit(unique_tensors(model), tensors, path)  # first: nobody has the memory that a wrong size may ask for
    if str(device) != "meta":
        allocate(model, device)
    with torch.no_grad():
        for name, tensor in unique_tensors(model).items():
            tensor.copy_(tensors[name])
    return model.eval()


def check_fit(own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """ConfigError where names or shapes of saved tensors are not those of the model, or numbers are of another kind."""
    missing, surplus = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    both = sorted(own.keys() & tensors.keys())
    wrong = [n for n in both if own[n].shape != tensors[n].shape]
    odd = [n for n in both if own[n].is_floating_point() != tensors[n].is_floating_point()]
    if missing or surplus or wrong or odd:
        kinds = (("missing", missing), ("unknown", surplus), ("shape", wrong), ("type", odd))
        parts = [f"{kind}: {', '.join(names[:3])}" for kind, names in kinds if names]
        raise ConfigError([Problem("the weights do not fit the config; " + "; ".join(parts), file=str(path))])
