"""A part of the trunk at another width than the stream around it."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo.contract import init_linear_, linear_flops, part_cost
from zoo.graph.nodes import Builder, Composite, Leaf
from zoo.graph.spec import Spec
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import PositiveInt


@register(
    "stitch",
    kind="combinator",
    paper="arXiv:2404.18322",
    relations=(
        "stitch(width=64) == sequence() at in_proj.weight=eye, in_proj.bias=0, out_proj.weight=eye, out_proj.bias=0",
    ),
)
class Stitch(Composite):
    """Nodes of another width: x -> x + W_out (body(h) - h) + b_out, h = W_in x + b_in.

    Fields: `stitch` (or `width`): that of the stream inside; `of`: the body. What the body adds to its stream is mapped
    back and added to the stream around it, which passes as it is: blocks of a narrow model in a wide one take nothing
    from it. The stitching block with which BlockLLM joins blocks of models of different widths; `zoo store assemble`
    finds both maps from the two models by least squares. With identities for maps it is the body.
    Useful: the body's at its width, and 4 D width FLOPs a token for the maps.
    """

    main_field = "width"
    sees_blocks = True
    sliceable = True
    cuts_gradient = ""

    def __init__(self, body: nn.Module, dim: int, *, width: PositiveInt, device=None, dtype=None):
        super().__init__()
        self.dim, self.width = dim, width
        self.in_proj = Linear(dim, width, device=device, dtype=dtype)
        self.body: Any = body
        self.out_proj = Linear(width, dim, device=device, dtype=dtype)

    @staticmethod
    def parse(fields) -> Spec | None:
        parser, before = fields.parser, fields.parser.width
        parser.width = width = fields.values.get("width")
        try:
            body = fields.body()
        finally:
            parser.width = before
        options = fields.options()
        if body is None or "width" not in options:
            return None
        return Spec("stitch", fields.path, options=options, children=(body.with_(width=width),))

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> Stitch:
        return cls(builder.node(spec.children[0]), builder.dim, **spec.options, **builder.factory)

    def extra_repr(self) -> str:
        return f"width={self.width}"

    def reset_own_parameters(self) -> None:
        init_linear_(self.in_proj)
        init_linear_(self.out_proj)

    def increment(self, x, *, state: Any = None, positions=None, doc_ids=None):
        return self.out_proj(self.body.increment(self.in_proj(x), state=state, positions=positions, doc_ids=doc_ids))

    def init_state(self, batch_size, max_len=None):
        return self.body.init_state(batch_size, max_len)

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        yield from self.body.leaves(batch_size, seq_len, context_len, mode, f"{path}.body".strip("."))
        maps, tokens = (self.in_proj, self.out_proj), batch_size * seq_len
        weights = [p for linear in maps for p in linear.parameters()]
        both = tokens * (self.dim + self.width)  # what one map reads and the other writes, and what both keep
        cost = part_cost(
            mode, weights[0].element_size(), params=sum(p.numel() for p in weights),
            flops=sum(linear_flops(tokens, linear) for linear in maps), vector=2 * both,  # both biases and both sums
            read=2 * both + tokens * self.dim, written=both + tokens * self.dim, kept=both,
        )  # fmt: skip
        yield Leaf(f"{path}.maps".strip("."), "stitch", cost, self)
