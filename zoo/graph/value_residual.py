"""The value residual: what the first of many mixers wrote down, mixed into what the later ones write."""

# pyright: reportCallIssue=false
# (nn.ModuleList forgets the type of its items)
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from zoo import registry
from zoo.contract import StateList, linear_flops, part_cost
from zoo.graph.nodes import Builder, Composite, Leaf, ResidualBlock
from zoo.graph.spec import Spec, flatten
from zoo.registry import register


@register(
    "value_residual",
    kind="combinator",
    paper="arXiv:2503.14456",
    relations=(
        "value_residual(of=['rwkv7', 'rwkv7', 'rwkv7']) == sequence(of=['rwkv7', 'rwkv7', 'rwkv7']) at "
        "v_lora.lora.2.bias=-inf",
    ),
)
class ValueResidual(Composite):
    """Nodes one after the other, of which the first mixer's value is mixed into those of the later ones (RWKV-7).

    v_l <- v_l + (v_1 - v_l) * g_l(x_l), v_1 the value of the first block that has one and g_l a gate of block l; it
    travels beside the stream, from the first block to the last, and no state holds it. Fields: `of`: the nodes; at
    least two are blocks with a value, `rwkv7`. Blocks inside other combinators than sequences and repeats take no
    part. The first block's value is computed once more, which costs its projection.
    Useful: the sum of its nodes, with the gates of those that mix, and once more the projection of the first value.
    """

    sees_blocks = False
    sliceable = True
    cuts_gradient = ""

    def __init__(self, items: list[nn.Module]):
        super().__init__()
        self.items = nn.ModuleList(items)
        self.first = next(i for i, item in enumerate(items) if _speaks(item))

    @staticmethod
    def parse(fields) -> Spec | None:
        body = fields.body()
        fields.options()
        if body is None:
            return None
        items, first = list(_residual_blocks(body)), None
        for i, spec in enumerate(items):
            if spec.kind == "mixer" and "value_residual" in registry.options(spec.name):
                if first is not None:
                    items[i] = spec.with_(options={**spec.options, "value_residual": True})
                first = spec if first is None else first
                if spec.share:
                    fields.parser.complain(spec.path, "a block that gives or takes a value cannot be shared")
        if not any(spec.options.get("value_residual") for spec in items):
            fields.parser.complain(fields.at("of"), "value_residual needs two blocks that have a value, such as rwkv7")
            return None
        return Spec("value_residual", fields.path, children=tuple(items))

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> ValueResidual:
        return cls([builder.node(c) for c in spec.children])

    def forward(self, x, *, state: Any = None, positions=None, doc_ids=None):
        v_first = None
        for i, item in enumerate(self.items):
            inside = state and state.children[i]
            given = {}
            if i == self.first:
                v_first = item.value(x, state=inside, doc_ids=doc_ids)
            elif v_first is not None and _speaks(item):
                given = {"v_first": v_first}
            x = item(x, state=inside, positions=positions, doc_ids=doc_ids, **given)
        return x

    def init_state(self, batch_size, max_len=None):
        return StateList([item.init_state(batch_size, max_len) for item in self.items])

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        for i, item in enumerate(self.items):
            if i == self.first:
                block: Any = item.block
                tokens = batch_size * seq_len * block.dim
                cost = part_cost(
                    mode, block.itemsize, flops=linear_flops(batch_size * seq_len, block.v_proj), vector=3 * tokens,
                    read=tokens + block.v_proj.weight.numel(), written=tokens,
                    kept=2 * tokens,  # the mix and the value
                )  # fmt: skip
                yield Leaf(f"{path}.value".strip("."), "first value", cost, self)
            yield from item.leaves(batch_size, seq_len, context_len, mode, f"{path}.{i}".strip("."))


def _speaks(item: nn.Module) -> bool:
    """Whether a node is a block that has a value."""
    return isinstance(item, ResidualBlock) and callable(getattr(type(item.block), "value", None))


def _residual_blocks(body: Spec) -> Iterator[Spec]:
    """The blocks of a body one by one, and what is no plain layer of blocks as it is."""
    for layer in flatten(body):
        if layer.is_layer and not layer.share and layer.order in ((), tuple(range(len(layer.children)))):
            yield from layer.children
        else:
            yield layer
