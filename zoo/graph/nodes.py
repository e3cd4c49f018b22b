"""Nodes of a built model. A node maps the full residual stream x [B, T, D] to the full stream.

`increment` is out - in: what route, loop and parallel add up, so that "weighted" means one thing only.
"""

# pyright: reportCallIssue=false
# (nn.ModuleList forgets the type of its items)
from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.contract import Block, Cost, Mode, State, StateList, part_cost
from zoo.graph.spec import Residual, Spec
from zoo.registry import register


@dataclass
class Leaf:
    """Cost of one block at one site; `calls` is how often it runs on how many expected `tokens`."""

    path: str
    block: str
    cost: Cost
    module: nn.Module


class Node(nn.Module):
    """Base of residual blocks and combinators."""

    # whether it is right on a slice of a row (`zoo.row`) if the blocks inside are; else it is given the whole row
    sliceable: bool = False
    # why a row in segments would not be trained as the whole row is (`train.sequence_chunks`), if the blocks inside
    # are; empty: it would
    cuts_gradient: str = "what it does depends on where segments end"

    def forward(
        self, x: Tensor, *, state: State | None = None, positions: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        return x + self.increment(x, state=state, positions=positions, doc_ids=doc_ids)

    def increment(
        self, x: Tensor, *, state: State | None = None, positions: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        """What this node adds to the stream."""
        return self(x, state=state, positions=positions, doc_ids=doc_ids) - x

    def write_keys(self, x: Tensor, keys: Any, positions: Tensor, doc_ids: Tensor | None) -> None:
        """Have the first block below leave its keys of x in `keys` (see `zoo.graph.gather.shared_keys`)."""
        raise NotImplementedError

    def init_state(self, batch_size: int, max_len: int | None = None) -> State:
        """State of this node and all below it."""
        raise NotImplementedError

    def leaves(self, batch_size: int, seq_len: int, context_len: int, mode: Mode, path: str = "") -> Iterator[Leaf]:
        """Costs of the blocks below, one entry per site."""
        raise NotImplementedError

    def reset_own_parameters(self) -> None:
        """Draw the parameters that belong to this node itself, not those of its children."""


class Builder:
    """Builds modules from specs; nodes with one `share` name are built once. What a module was built from, with the
    options that nobody gave, is its `built_from`."""

    def __init__(self, dim: int, num_layers: int, device: Any = None, dtype: torch.dtype | None = None):
        self.dim, self.num_layers = dim, num_layers
        self.factory = {"device": device, "dtype": dtype}
        self.shared: dict[str, nn.Module] = {}

    def at_width(self, width: int) -> Builder:
        """The same builder for a stream of another width."""
        inner = copy.copy(self)  # `shared` stays common
        inner.dim = width
        return inner

    def node(self, spec: Spec) -> Any:
        """The node of a spec."""
        if spec.width not in (None, self.dim):
            return self.at_width(spec.width).node(spec)
        if spec.share and spec.share in self.shared:
            return self.shared[spec.share]
        name = "residual" if spec.kind != "combinator" else spec.name
        cls = ResidualBlock if name == "residual" else registry.load(name)
        module: Any = cls.from_spec(spec, self)
        if spec.kind == "combinator":
            module.built_from = {"block": spec.name, "dim": self.dim, "options": dict(spec.options)}
        if spec.share:
            self.shared[spec.share] = module
        return module

    def component(self, spec: Spec, **context: Any) -> Any:
        """A block, norm or router with uninitialised parameters."""
        known = registry.options(spec.name)
        here = {"layer_index": spec.layer_index, "num_layers": self.num_layers, **context}
        values = {**spec.options, **{k: v for k, v in here.items() if k in known}}
        made = registry.load(spec.name)(self.dim, **values, **self.factory)
        defaults = {k: o.default for k, o in known.items() if o.default is not inspect.Parameter.empty}
        made.built_from = {"block": spec.name, "dim": self.dim, "options": defaults | values}
        return made


class ResidualBlock(Node):
    """A block in its residual branch: x + scale * block(norm(x)) and its variants. `post` norms the sum instead,
    norm(skip * x + scale * block(x)), and `reordered` the block's output, x + scale * norm(block(x)); `normed` adds to
    what the block reads, skip * n + scale * block(n), n = norm(x).
    """

    def __init__(
        self, block: Block, norm: nn.Module | None, out_norm: nn.Module | None, residual: Residual, name: str, **factory
    ):
        super().__init__()
        self.block, self.norm, self.out_norm = block, norm, out_norm
        self.style, self.skip, self.block_name = residual.style, residual.skip, name
        self.fixed_scale = residual.scale if residual.learn == "none" else None
        self.scale_start, self.drop_path = residual.scale, residual.drop_path
        shape = {"none": None, "scalar": (1,), "channel": (block.dim,)}[residual.learn]
        self.scale = None if shape is None else nn.Parameter(torch.empty(shape, **factory))

    sliceable = True

    @property
    def cuts_gradient(self) -> str:
        return "drop_path draws whole rows" if self.drop_path else ""

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> ResidualBlock:
        block = builder.component(spec)
        norms = [builder.component(spec.norm) if spec.norm else None for _ in range(2)]
        out_norm = norms[1] if spec.residual.style in ("sandwich", "pre_post") else None
        return cls(block, norms[0], out_norm, spec.residual, spec.name, **builder.factory)  # type: ignore[arg-type]

    def reset_own_parameters(self) -> None:
        if self.scale is not None and self.scale_start is not None:
            nn.init.constant_(self.scale, self.scale_start)

    def increment(self, x, *, state: Any = None, positions=None, doc_ids=None):
        if self.style in ("post", "normed", "pre_post"):
            return self(x, state=state, positions=positions, doc_ids=doc_ids) - x
        return self._branch(self._normed(x), state, positions, doc_ids)

    def forward(self, x, *, state: Any = None, positions=None, doc_ids=None, v_first: Tensor | None = None):
        h = self._normed(x)
        y = self._branch(h, state, positions, doc_ids, v_first)
        if self.style == "none":
            return y
        if self.style == "normed":
            x = h
        y = y + (x if self.skip == 1 else self.skip * x)
        norm = {"post": self.norm, "pre_post": self.out_norm}.get(self.style)
        return y if norm is None else norm(y)

    def write_keys(self, x, keys, positions, doc_ids):
        if self.block.shares_keys:
            self.block.write_keys(self._normed(x), keys, positions=positions, doc_ids=doc_ids)  # type: ignore[operator]

    @property
    def assumption(self) -> str:
        """That of the block."""
        return getattr(self.block, "assumption", "")

    @property
    def expectation(self) -> str:
        """That of the block."""
        return getattr(self.block, "expectation", "")

    def value(self, x, *, state: Any = None, doc_ids=None):
        """The value of a block that has one, before `forward` moves its state on; later blocks take it as v_first."""
        return self.block.value(self._normed(x), state=state, doc_ids=doc_ids)  # type: ignore[operator]

    def _normed(self, x):
        """What the block reads."""
        return x if self.norm is None or self.style in ("post", "reordered") else self.norm(x)

    def _branch(self, h, state, positions, doc_ids, v_first: Tensor | None = None):
        given = {} if v_first is None else {"v_first": v_first}
        y = self.block(h, state=state, positions=positions, doc_ids=doc_ids, **given)
        norm = {"sandwich": self.out_norm, "reordered": self.norm}.get(self.style)
        if norm is not None:
            y = norm(y)
        if self.scale is not None:
            y = y * self.scale
        elif self.fixed_scale is not None:
            y = y * self.fixed_scale
        if self.drop_path and self.training:
            kept = torch.rand(y.shape[0], 1, 1, device=y.device) >= self.drop_path
            y = y * (kept / (1 - self.drop_path)).to(y.dtype)
        return y

    def init_state(self, batch_size, max_len=None):
        return self.block.init_state(batch_size, max_len)

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        cost = self.block.cost(batch_size, seq_len, context_len, mode)
        own = sum(p.numel() for n, p in self.named_parameters() if not n.startswith("block."))
        norms: list[Any] = [norm for norm in (self.norm, self.out_norm) if norm is not None]
        # what norms keep for backward, a learned scale what it multiplies; the block counts what it reads
        kept = sum(norm.activation_elements(batch_size * seq_len) for norm in norms)
        kept += batch_size * seq_len * self.block.dim if self.scale is not None else 0
        added = self.style != "none"
        number = sum(norm.vector_flops for norm in norms) + added + (self.skip != 1)
        number += self.scale is not None or self.fixed_scale not in (None, 1)
        tokens, item = batch_size * seq_len * self.block.dim, self.block.itemsize
        around = part_cost(
            mode, item, params=own, vector=number * tokens, read=(len(norms) + 2 * added) * tokens,
            written=(len(norms) + added) * tokens, kept=kept,
        )  # fmt: skip
        yield Leaf(path, self.block_name, cost + around, self)


class Composite(Node):
    """A combinator: how its fields are parsed and how it is built stands in its own class."""

    main_field: ClassVar[str] = "of"
    uses_norm: ClassVar[bool] = False
    # whether it treats each token alone, so that block diffusion may let tokens see their whole block
    sees_blocks: ClassVar[bool] = False

    @staticmethod
    def own_blocks(spec: Spec) -> Iterator[tuple[Spec, int]]:
        """Blocks that the combinator builds for itself, to be tried before; each is that many streams wide."""
        yield from ()


@register("sequence", kind="combinator")
class Sequence(Composite):
    """Nodes one after the other: x -> f_n(... f_1(x)).

    Fields: `of`, a list of nodes; a plain YAML list means the same. A list of blocks is a layer:
    `[attention, swiglu]` is x += attention(norm(x)); x += swiglu(norm(x)).
    Useful: the sum of its nodes.
    """

    sees_blocks = True
    sliceable = True
    cuts_gradient = ""

    def __init__(self, items: list[nn.Module], order: tuple[int, ...] = (), label: str = ""):
        super().__init__()
        self.items = nn.ModuleList(items)
        self.order = tuple(order) or tuple(range(len(items)))
        self.label = label

    def extra_repr(self) -> str:
        return self.label

    @property
    def is_layer(self) -> bool:
        """Whether this is a plain list of residual blocks."""
        return all(isinstance(item, ResidualBlock) for item in self.items)

    @staticmethod
    def parse(fields) -> Spec | None:
        body = fields.body()
        fields.options()
        return body

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> Sequence:
        return cls([builder.node(c) for c in spec.children], spec.order, spec.label)

    def forward(self, x, *, state: Any = None, positions=None, doc_ids=None):
        for i, item in enumerate(self.order):
            x = self.items[item](x, state=state and state.children[i], positions=positions, doc_ids=doc_ids)
        return x

    def increment(self, x, *, state: Any = None, positions=None, doc_ids=None):
        if len(self.order) == 1:  # exact, where out - in would round
            inside = state and state.children[0]
            return self.items[0].increment(x, state=inside, positions=positions, doc_ids=doc_ids)
        return super().increment(x, state=state, positions=positions, doc_ids=doc_ids)

    def write_keys(self, x, keys, positions, doc_ids):
        self.items[self.order[0]].write_keys(x, keys.children[0], positions, doc_ids)

    def init_state(self, batch_size, max_len=None):
        return StateList([self.items[i].init_state(batch_size, max_len) for i in self.order])

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        for i, item in enumerate(self.order):
            yield from self.items[item].leaves(batch_size, seq_len, context_len, mode, f"{path}.{i}".strip("."))
