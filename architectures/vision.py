"""Vision transformer: patches of an image, a class token, registers, the layers of the trunk, a head.

Dosovitskiy et al. 2020 (2010.11929); DINOv2 (2304.07193); registers 2309.16588.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.architectures.model import Model
from zoo.contract import Cost, Mode
from zoo.graph.nodes import Builder, Leaf
from zoo.graph.spec import Graph
from zoo.kernels.linear import Linear
from zoo.sections import VisionSection


class PatchEmbedding(nn.Module):
    """Images [B, C, H, W] -> tokens [B, 1 + R + N, D]: the class token, R registers, N patches row by row.

    x_n = W patch_n + b + position_n, class = c + position_0; registers have no position. Positions are learnt on the
    grid of the configuration and interpolated (bicubic) for images of another size.
    """

    def __init__(self, dim: int, options: VisionSection, *, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.options = options
        size, grid = options.patch_size, options.grid

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight, self.bias = parameter(dim, options.channels, size, size), parameter(dim)  # of a convolution
        self.cls_token = parameter(1, 1, dim)
        self.register_tokens = parameter(1, options.num_registers, dim) if options.num_registers else None
        self.pos_embed = parameter(1, 1 + grid * grid, dim)

    def extra_repr(self) -> str:
        o = self.options
        return f"{o.image_size} x {o.image_size} in patches of {o.patch_size}, registers={o.num_registers}"

    def reset_own_parameters(self) -> None:
        """Draw the parameters, small as in DINOv2."""
        std = self.weight[0].numel() ** -0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)
        nn.init.zeros_(self.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02, a=-0.06, b=0.06)
        for tokens in (self.cls_token, self.register_tokens):
            if tokens is not None:
                nn.init.normal_(tokens, std=1e-6)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Positions [1, 1 + rows * columns, D] of the class token and of a grid of patches."""
        grid = self.options.grid
        if (rows, columns) == (grid, grid):
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        wide = table if table.dtype == torch.float64 else table.float()
        wide = F.interpolate(wide, size=(rows, columns), mode="bicubic", antialias=self.options.antialias)
        return torch.cat([self.pos_embed[:, :1], wide.to(table.dtype).flatten(2).mT], 1)

    def forward(self, images: Tensor) -> Tensor:
        size, channels = self.options.patch_size, self.options.channels
        if images.dim() != 4 or images.shape[1] != channels or images.shape[2] % size or images.shape[3] % size:
            raise ValueError(
                f"images must be [B, {channels}, H, W] with H and W multiples of patch_size={size}, "
                f"got {tuple(images.shape)}"
            )
        patches = F.conv2d(images, self.weight, self.bias, stride=size)
        positions = self.positions(*patches.shape[2:])
        first = self.cls_token + positions[:, :1]
        if self.register_tokens is not None:
            first = torch.cat([first, self.register_tokens], 1)
        x = patches.flatten(2).mT + positions[:, 1:]
        return torch.cat([first.expand(x.shape[0], -1, -1), x], 1)


class VisionModel(Model):
    """Images [B, C, H, W] -> class logits [B, K], or the pooled features where `num_classes` is 0.

    The trunk is that of any model here; it sees a whole image at once, so `attention` wants `causal: false`, and
    there is no state. `features` gives all tokens. What is pooled: the class token, the mean over the patches, or
    both side by side (`class_mean`, DINOv2's linear probe).
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
        self.head = None
        if self.options.num_classes:
            width = graph.dim * (2 if self.options.pool == "class_mean" else 1)
            self.head = Linear(width, self.options.num_classes, bias=True, **builder.factory)

    def _own_draws(self) -> dict[str, Callable[[], None]]:
        return {"head": self._reset_head}

    def _reset_head(self) -> None:
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K]; H and W are multiples of the patch size."""
        x, parts = self.features(images), []
        if self.options.pool != "mean":
            parts.append(x[:, 0])
        if self.options.pool != "class":
            parts.append(x[:, 1 + self.options.num_registers :].mean(1))
        pooled = torch.cat(parts, -1)
        return pooled if self.head is None else self.head(pooled)

    def features(self, images: Tensor) -> Tensor:
        """The normed stream [B, 1 + R + N, D]: class token, registers, patches."""
        x = self.embed(images)
        for layer in self.layers:
            x = layer(x)
        return x if self.norm is None else self.norm(x)

    # --------------------------------------------------------------------------------------- cost
    def ends(self, batch_size: int, seq_len: int, mode: Mode) -> Iterator[Leaf]:
        """`seq_len` counts the tokens of the trunk: class token, registers and patches."""
        item, train = self.embed.weight.element_size(), mode == "train"
        stream, kernel = batch_size * seq_len * self.dim * item, self.embed.weight.numel()
        patches = batch_size * max(seq_len - 1 - self.options.num_registers, 0)
        pixels = patches * self.embed.weight[0].numel() * item
        own = sum(p.numel() for p in self.embed.parameters())
        passes = 2 if train else 1  # images need no gradient
        embedding = Cost(
            own, own, passes * 2 * patches * kernel, passes * (own * item + pixels), passes * stream,
            pixels if train else 0,
        )  # fmt: skip
        yield Leaf("embed", "patches", embedding, self.embed)
        yield from self._norm_leaf(stream, train)
        if self.head is not None:
            table, passes = self.head.weight.numel(), 3 if train else 1
            own = table + self.head.out_features
            pooled, logits = (batch_size * n * item for n in (self.head.in_features, self.head.out_features))
            head = Cost(
                own, own, passes * 2 * batch_size * table, passes * (own * item + pooled), passes * logits,
                pooled + logits if train else 0,
            )  # fmt: skip
            yield Leaf("head", "head", head, self.head)
