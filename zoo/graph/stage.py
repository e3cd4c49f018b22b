"""A layer applied several times that is told how deep it is: the recurrent stage of a block-recurrent transformer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.contract import State, StateList, init_linear_, part_cost
from zoo.graph.nodes import Builder, Composite, Leaf, ResidualBlock, Sequence
from zoo.graph.spec import Spec
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import PositiveInt

START = 1e-4  # std of what makes the scales: they begin near 1


@register(
    "stage",
    kind="combinator",
    paper="arXiv:2512.19941",
    relations=(
        "stage(steps=3, of=['attention', 'swiglu']) == loop(steps=3, of=['attention', 'swiglu']) at "
        "depth_out.weight=0, depth_out.bias=0",
    ),
)
class Stage(Composite):
    """One layer at depths l = first .. first + steps - 1: x <- t_i(l) * branch_i(x) + x, at last x <- t_out(l) * x.

    (t_1, .., t_n, t_out)(l) = 1 + W_2 silu(W_1 l + b_1) + b_2, D channels each: a small network of the depth scales
    the branches of the layer and its output (Raptor). Fields: `steps`; `first`: the first depth, counted from 1;
    `hidden`: width of the small network; `of`: a layer, which is a list of blocks. Every step keeps its own state.
    Where W_2 and b_2 are zero it is `loop(steps)`.
    Useful: the layer's once for every step, and 2 hidden (1 + (n + 1) D) FLOPs a step for the network of the depth.
    """

    main_field = "steps"
    sliceable = True
    cuts_gradient = ""
    sees_blocks = True

    def __init__(
        self,
        body: Sequence,
        dim: int,
        *,
        steps: PositiveInt,
        first: PositiveInt = 1,
        hidden: PositiveInt = 16,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.body, self.dim, self.steps, self.first = body, dim, steps, first
        factory = {"device": device, "dtype": dtype}
        self.depth_in = Linear(1, hidden, bias=True, **factory)
        self.depth_out = Linear(hidden, (len(body.order) + 1) * dim, bias=True, **factory)

    @staticmethod
    def parse(fields) -> Spec | None:
        body = fields.body()
        options = fields.options()
        if body is None or "steps" not in options:
            return None
        while body.name == "sequence" and len(body.children) == 1 and not body.is_layer:  # the name of a definition
            body = body.children[0]
        if not body.is_layer or body.share:
            fields.parser.complain(fields.at("of"), "stage repeats one layer: a list of blocks")
            return None
        return Spec("stage", fields.path, options=options, children=(body,))

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> Stage:
        return cls(builder.node(spec.children[0]), builder.dim, **spec.options, **builder.factory)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, first={self.first}"

    def reset_own_parameters(self) -> None:
        init_linear_(self.depth_in)
        nn.init.normal_(self.depth_out.weight, std=START)
        nn.init.normal_(self.depth_out.bias, std=START)

    def scales(self) -> Tensor:
        """t [steps, n + 1, D]: of the n branches and of the output at each depth."""
        weight = self.depth_in.weight
        depth = torch.arange(self.first, self.first + self.steps, device=weight.device, dtype=weight.dtype)
        made = self.depth_out(F.silu(self.depth_in(depth[:, None])))
        return 1 + made.unflatten(-1, (-1, self.dim))

    def forward(self, x, *, state: Any = None, positions=None, doc_ids=None):
        for step, scales in enumerate(self.scales().unbind(0)):
            x = self._at(x, scales, state and state.children[step], positions, doc_ids)
        return x

    def step(self, x: Tensor, step: int) -> Tensor:
        """The stream after step 0 <= `step` < `steps` alone."""
        return self._at(x, self.scales()[step], None, None, None)

    def _at(self, x, scales: Tensor, state: Any, positions, doc_ids) -> Tensor:
        *branches, out = scales.unbind(0)
        for i, (item, scale) in enumerate(zip(self.body.order, branches, strict=True)):
            inside = state and state.children[i]
            branch: Any = self.body.items[item]
            x = x + scale * branch.increment(x, state=inside, positions=positions, doc_ids=doc_ids)
        return out * x

    def init_state(self, batch_size: int, max_len: int | None = None) -> State:
        return StateList([self.body.init_state(batch_size, max_len) for _ in range(self.steps)])

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        for leaf in self.body.leaves(batch_size, seq_len, context_len, mode, f"{path}.body".strip(".")):
            again = leaf.cost.replace(params=0, active_params=0)  # the same weights: work and state add up
            yield Leaf(leaf.path, leaf.block, sum([again] * (self.steps - 1), leaf.cost), leaf.module)
        first, second = (2 * self.steps * m.weight.numel() for m in (self.depth_in, self.depth_out))
        own = sum(p.numel() for m in (self.depth_in, self.depth_out) for p in m.parameters())
        # the depth itself needs no gradient
        flops = 2 * first + 3 * second if mode == "train" else first + second
        item, tokens = self.depth_in.weight.element_size(), batch_size * seq_len * self.dim
        # each step scales its branches and its output
        scaled = self.steps * (len(self.body.order) + 1) * tokens
        cost = part_cost(mode, item, params=own, vector=scaled, read=scaled, written=scaled, kept=scaled)
        yield Leaf(f"{path}.depth".strip("."), "stage", cost.replace(flops=flops, useful_flops=flops), self)


def layers_of(node: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """The layers that the stream goes through in a node: steps of a stage, copies of a repeat one by one; any other
    node is one layer."""
    if isinstance(node, Stage):
        return [partial(node.step, step=i) for i in range(node.steps)]
    if isinstance(node, Sequence) and not all(isinstance(item, ResidualBlock) for item in node.items):
        return [layer for i in node.order for layer in layers_of(node.items[i])]
    return [node]
