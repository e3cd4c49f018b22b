"""The passes that are measured: what prepares one, its forward and its backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.architectures.block_diffusion import BlockDiffusionLM
from zoo.architectures.causal_lm import CausalLM
from zoo.architectures.vision import VisionModel
from zoo.errors import ConfigError

if TYPE_CHECKING:
    from zoo.cost import CostReport


@dataclass(frozen=True)
class Pass:
    """`forward` gives the loss, or None where nothing goes backward. `held` are bytes in use before it begins."""

    prepare: Callable[[], Any]
    forward: Callable[[], Tensor | None]
    held: int

    def __call__(self) -> None:
        """All of it."""
        self.prepare()
        loss = self.forward()
        if loss is not None:
            loss.backward()


def pass_of(model: CausalLM | VisionModel, report: CostReport, device: str) -> Pass:
    """A pass of the kind that `report` describes, on random tokens or images; the model is put into its mode."""
    generator = torch.Generator().manual_seed(0)
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    train, held = report.mode == "train", sum(weights.values())
    model.train(train)
    if isinstance(model, VisionModel):
        o = model.options
        images = torch.randn(report.batch_size, o.channels, o.image_size, o.image_size, generator=generator).to(device)
        return Pass(lambda: model.zero_grad(set_to_none=True), lambda: _see(model, images, train), held)
    shape = (report.batch_size, report.context_len + report.seq_len + 1)
    tokens = torch.randint(model.vocab_size, shape, generator=generator).to(device)
    if train:
        if isinstance(model, BlockDiffusionLM) and report.seq_len % model.block_size:
            raise ConfigError(f"--seq {report.seq_len}: the model learns whole blocks of {model.block_size} tokens")
        return Pass(lambda: model.zero_grad(set_to_none=True), lambda: _learn(model, tokens), held)
    before, after = tokens[:, : report.context_len], tokens[:, report.context_len : -1]
    with torch.no_grad():
        filled = model.init_state(report.batch_size, report.context_len + report.seq_len)
        for part in before.split(1024, dim=1) if report.context_len else ():
            model.hidden(part, filled)
    snapshot = filled.snapshot()

    @torch.no_grad()
    def read() -> None:
        model.head(model.hidden(after, filled)[:, -1])

    return Pass(lambda: filled.restore(snapshot), read, held + filled.nbytes)


def _tensors(model: torch.nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _learn(model: CausalLM, tokens: Tensor) -> Tensor:
    if isinstance(model, BlockDiffusionLM):
        row = tokens[:, :-1]
        rate = torch.full(row.shape, 0.5, device=row.device)
        return model.losses(row, rate * (row % 2)).mean()  # about every other token is masked
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def _see(model: VisionModel, images: Tensor, train: bool) -> Tensor | None:
    with torch.set_grad_enabled(train):
        out = model(images).float()
        return out.logsumexp(-1).mean() if train else None
