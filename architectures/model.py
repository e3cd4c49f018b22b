"""What every architecture shares: the trunk of its graph, weights drawn by name, costs and storage."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.contract import Cost, Mode, part_cost
from zoo.graph.nodes import Builder, Leaf
from zoo.graph.spec import Graph


class Model(nn.Module):
    """An embedding, the `layers` of a graph, a final `norm`, a head. `config` is the resolved configuration.

    `modes` are the kinds of step the model can take, `embedding` is the name of its first module.
    """

    modes: ClassVar[tuple[Mode, ...]]
    embedding: ClassVar[str]
    is_last: bool = True  # of the stages of a pipeline
    chunked_loss: ClassVar[bool] = False  # whether its loss may be taken in pieces of a row (`train.loss_chunks`)
    rows: ClassVar[bool] = False  # whether its input is rows of tokens that context parallelism may cut
    layers: Any  # an nn.ModuleList, which forgets the type of its items
    norm: Any

    def __init__(self, graph: Graph):
        super().__init__()
        self.config: Mapping[str, Any] = graph.document
        self.dim = graph.dim

    def _add_trunk(self, graph: Graph, builder: Builder) -> None:
        self.layers = nn.ModuleList(builder.node(spec) for spec in graph.trunk)
        self.norm = builder.component(graph.norm) if graph.norm else None

    # --------------------------------------------------------------------------------- parameters
    @torch.no_grad()
    def init_weights(self, seed: int = 0, whole: Callable[[nn.Module], Any] = contextlib.nullcontext) -> None:
        """Draw every parameter; what a module gets depends on the seed and its name only, so not on the order
        of building nor on which modules a rank holds. Safe after `to_empty`. Inside `whole(module)` the parameters of
        a module that is spread over ranks are whole."""
        done: set[int] = set()
        own = self._own_draws()
        module: Any
        for name, module in self.named_modules():
            if id(module) in done:
                continue
            draw = own.get(name)
            if hasattr(module, "zoo_registration") and module.zoo_registration.kind != "combinator":
                draw = module.reset_parameters
                done.update(id(m) for m in module.modules())
            elif hasattr(module, "reset_own_parameters"):
                draw = module.reset_own_parameters
            if draw is not None:
                with torch.random.fork_rng(devices=_cuda_devices(module)):
                    torch.manual_seed(seed_of(seed, name))
                    with whole(module):
                        draw()

    def begin(self, inputs: Tensor) -> Tensor:
        """The stream in front of the first layer."""
        raise NotImplementedError

    def end(self, x: Tensor) -> Tensor:
        """What the model says of the stream behind the last layer."""
        raise NotImplementedError

    def _own_draws(self) -> dict[str, Callable[[], None]]:
        """How the modules outside the trunk are drawn, by name."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------- cost
    def leaves(self, batch_size: int, seq_len: int, context_len: int, mode: Mode) -> Iterator[Leaf]:
        """Costs of the blocks of the trunk, in order. What they keep for streaming counts where the model streams."""
        for i, layer in enumerate(self.layers):
            for leaf in layer.leaves(batch_size, seq_len, context_len, mode, f"layers.{i}"):
                if "decode" not in self.modes:
                    state = leaf.cost.state_bytes
                    cost = leaf.cost + Cost(bytes_read=-state, bytes_written=-state, state_bytes=-state)
                    leaf = replace(leaf, cost=cost)
                yield leaf

    def trained_tokens(self, batch_size: int, seq_len: int) -> int:
        """Tokens that go through the trunk in a training step."""
        return batch_size * seq_len

    def scored_tokens(self, batch_size: int, seq_len: int) -> int:
        """Tokens whose logits a training step takes."""
        return batch_size * seq_len

    def pass_cost(self, node: Any, batch_size: int, seq_len: int) -> Cost:
        """What a block's node costs in training where all tokens of such rows go through it once."""
        return next(iter(node.leaves(batch_size, seq_len, 0, "train"))).cost

    def ends(self, batch_size: int, seq_len: int, mode: Mode) -> Iterator[Leaf]:
        """Costs around the trunk: the embedding first, then final norm and head."""
        raise NotImplementedError

    def _norm_leaf(self, numbers: int, mode: Mode) -> Iterator[Leaf]:
        if self.norm is not None:
            weights = list(self.norm.parameters())
            own, vector = sum(p.numel() for p in weights), self.norm.vector_flops * numbers
            item = weights[0].element_size()
            kept = self.norm.activation_elements(numbers // self.dim)
            cost = part_cost(mode, item, params=own, vector=vector, read=numbers, written=numbers, kept=kept)
            yield Leaf("norm", "norm", cost, self.norm)

    def merge(self) -> None:
        """Drop what only training needed, in every block that has such a thing (`structured_ffn`), and from `config`,
        so that the model is saved and loaded as it is now. ValueError where a block still needs it."""
        changed: dict[str, dict[str, Any]] = {}
        for module in self.modules():
            merge = getattr(module, "merge", None)
            if module is not self and callable(merge):
                changed.setdefault(module.zoo_registration.name, {}).update(merge())  # type: ignore[union-attr]
        self.config = _with_options(self.config, changed)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write config.yaml and model.safetensors into `directory`. See `zoo.from_pretrained`."""
        from zoo.architectures.storage import save_pretrained

        return save_pretrained(self, Path(directory))


def seed_of(seed: int, name: str) -> int:
    """The seed from which a module of this name is drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def _with_options(value: Any, changed: Mapping[str, Mapping[str, Any]]) -> Any:
    """A part of a configuration in which blocks of these names have other options, where they name them."""
    if isinstance(value, (list, tuple)):
        return [_with_options(v, changed) for v in value]
    if not isinstance(value, Mapping):
        return value
    made = {k: _with_options(v, changed) for k, v in value.items()}
    for name in made.keys() & changed.keys():
        if isinstance(options := made[name], Mapping):
            made[name] = {k: changed[name].get(k, v) for k, v in options.items()}
    return made


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode before is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _cuda_devices(module: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
