"""Vision transformer: patches of an image, a class token, registers, the layers of the trunk, a head.

Dosovitskiy et al. 2020 (2010.11929); DeiT (2012.12877); DINOv2 (2304.07193); registers (2309.16588).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.architectures.model import Model
from zoo.contract import Mode, part_cost
from zoo.graph.nodes import Builder, Leaf
from zoo.graph.spec import Graph
from zoo.graph.stage import layers_of
from zoo.kernels.linear import Linear
from zoo.sections import VisionSection


class PatchEmbedding(nn.Module):
    """Images [B, C, H, W] -> tokens [B, P + N, D]: P = 1 + R or 2 + R tokens of its own, N patches row by row.

    x_n = W patch_n + b + position_n; in front of them the class token c + position_0, with `distill_token` that one
    with a position of its own too, and R registers, which have none. Positions are learnt on the grid of the
    configuration and interpolated (bicubic) for images of another size. With `mask_token` a learnt vector stands for
    W patch_n at the patches that are `masked` [B, N].
    """

    def __init__(self, dim: int, options: VisionSection, *, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.options = options
        size, grid = options.patch_size, options.grid

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight, self.bias = parameter(dim, options.channels, size, size), parameter(dim)  # of a convolution
        self.cls_token = parameter(1, 1, dim)
        self.distill_token = parameter(1, 1, dim) if options.distill_token else None
        self.mask_token = parameter(1, dim) if options.mask_token else None
        self.register_tokens = parameter(1, options.num_registers, dim) if options.num_registers else None
        self.placed = 1 + options.distill_token  # tokens before the patches that have a position
        self.pos_embed = parameter(1, self.placed + grid * grid, dim)

    def extra_repr(self) -> str:
        o = self.options
        return f"{o.image_size} x {o.image_size} in patches of {o.patch_size}, registers={o.num_registers}"

    def reset_own_parameters(self) -> None:
        """Draw the parameters, small as in DINOv2."""
        std = self.weight[0].numel() ** -0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)
        nn.init.zeros_(self.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02, a=-0.06, b=0.06)
        for tokens in (self.cls_token, self.distill_token, self.mask_token, self.register_tokens):
            if tokens is not None:
                nn.init.normal_(tokens, std=1e-6)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Positions of the class token, of the distillation token and of a grid of patches, [1, .., D]."""
        grid = self.options.grid
        if (rows, columns) == (grid, grid):
            return self.pos_embed
        table = self.pos_embed[:, self.placed :].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        wide = table if table.dtype == torch.float64 else table.float()
        wide = F.interpolate(wide, size=(rows, columns), mode="bicubic", antialias=self.options.antialias)
        return torch.cat([self.pos_embed[:, : self.placed], wide.to(table.dtype).flatten(2).mT], 1)

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        size, channels = self.options.patch_size, self.options.channels
        if images.dim() != 4 or images.shape[1] != channels or images.shape[2] % size or images.shape[3] % size:
            raise ValueError(
                f"images must be [B, {channels}, H, W] with H and W multiples of patch_size={size}, "
                f"got {tuple(images.shape)}"
            )
        patches = F.conv2d(images, self.weight, self.bias, stride=size)
        positions = self.positions(*patches.shape[2:])
        tokens: list[Tensor] = [t for t in (self.cls_token, self.distill_token) if t is not None]
        first = torch.cat(tokens, 1) + positions[:, : self.placed]
        if self.register_tokens is not None:
            first = torch.cat([first, self.register_tokens], 1)
        x = patches.flatten(2).mT
        if masked is not None:
            if self.mask_token is None:
                raise ValueError("masked patches need a vector that stands for them: set vision.mask_token: true")
            x = torch.where(masked[..., None], self.mask_token, x)
        x = x + positions[:, self.placed :]
        return torch.cat([first.expand(x.shape[0], -1, -1), x], 1)


class VisionModel(Model):
    """Images [B, C, H, W] -> class logits [B, K], or the pooled features where `num_classes` is 0.

    The trunk is that of any model here; it sees a whole image at once, so `attention` wants `causal: false`, and
    there is no state. `features` gives all tokens. What is pooled: the class token, the mean over the patches, or
    both side by side (`class_mean`, DINOv2's linear probe). With `distill_token` a second head reads that token, and
    the logits are the mean of both. `masked` [B, N] says which patches are hidden (`mask_token`).
    """

    modes: ClassVar[tuple[Mode, ...]] = ("train", "prefill")
    embedding: ClassVar[str] = "embed"

    def __init__(self, graph: Graph, *, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__(graph)
        if graph.vision is None:
            raise ValueError("a vision model needs the section `vision`")
        builder = Builder(graph.dim, graph.num_layers, device, dtype)
        self.options = graph.vision
        self.embed = PatchEmbedding(graph.dim, self.options, **builder.factory)
        self._add_trunk(graph, builder)
        self.head = self.distill_head = None
        if self.options.num_classes:
            width = graph.dim * (2 if self.options.pool == "class_mean" else 1)
            self.head = Linear(width, self.options.num_classes, bias=True, **builder.factory)
        if self.options.distill_token:
            self.distill_head = Linear(graph.dim, self.options.num_classes, bias=True, **builder.factory)

    def _own_draws(self) -> dict[str, Callable[[], None]]:
        return {name: partial(_reset_head, head) for name, head in self._heads()}

    def _heads(self) -> Iterator[tuple[str, nn.Linear]]:
        for name, head in (("head", self.head), ("distill_head", self.distill_head)):
            if head is not None:
                yield name, head

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """Logits [B, K]; H and W are multiples of the patch size."""
        return self._mean(*self._read(self.features(images, masked)))

    def begin(self, images: Tensor) -> Tensor:
        """The stream in front of the first layer."""
        return self.embed(images)

    def end(self, x: Tensor) -> Tensor:
        """Logits [B, K] of the stream behind the last layer."""
        return self._mean(*self._read(x if self.norm is None else self.norm(x)))

    @staticmethod
    def _mean(logits: Tensor, distilled: Tensor | None) -> Tensor:
        return logits if distilled is None else (logits + distilled) / 2

    def answers(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, K] of the head (the pooled features where there is none) and of the distillation head."""
        return self._read(self.features(images))

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        parts = []
        if self.options.pool != "mean":
            parts.append(x[:, 0])
        if self.options.pool != "class":
            parts.append(x[:, self.options.num_prefix :].mean(1))
        pooled = torch.cat(parts, -1)
        return (
            pooled if self.head is None else self.head(pooled),
            None if self.distill_head is None else self.distill_head(x[:, 1]),
        )

    def features(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """The normed stream [B, P + N, D]: the tokens of the embedding in their order."""
        x = self.embed(images, masked)
        for layer in self.layers:
            x = layer(x)
        return x if self.norm is None else self.norm(x)

    def trajectory(self, images: Tensor) -> list[Tensor]:
        """The stream [B, P + N, D] before the first layer and after each of the L layers, without the final norm;
        steps of a stage and copies of a repeat are layers of their own."""
        stream = [self.embed(images)]
        for layer in self.layers:
            for apply in layers_of(layer):
                stream.append(apply(stream[-1]))
        return stream

    # --------------------------------------------------------------------------------------- cost
    def ends(self, batch_size: int, seq_len: int, mode: Mode) -> Iterator[Leaf]:
        """`seq_len` counts the tokens of the trunk: class token, registers and patches."""
        item = self.embed.weight.element_size()
        stream, kernel = batch_size * seq_len * self.dim, self.embed.weight.numel()
        patches = batch_size * max(seq_len - self.options.num_prefix, 0)
        pixels = patches * self.embed.weight[0].numel()
        own = sum(p.numel() for p in self.embed.parameters())
        embedding = part_cost(
            mode, item, params=own, flops=2 * patches * kernel, vector=stream, read=pixels, written=stream, kept=pixels,
            passes=2,  # images need no gradient
        )  # fmt: skip
        yield Leaf("embed", "patches", embedding, self.embed)
        yield from self._norm_leaf(stream, mode)
        for name, head in self._heads():
            table = head.weight.numel()
            pooled, logits = (batch_size * n for n in (head.in_features, head.out_features))
            cost = part_cost(
                mode, item, params=table + head.out_features, flops=2 * batch_size * table, read=pooled,
                written=logits, kept=pooled + logits,
            )  # fmt: skip
            yield Leaf(name, "head", cost, head)


def _reset_head(head: nn.Linear) -> None:
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
