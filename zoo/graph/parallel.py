"""Branches that read the same stream and are merged."""

# pyright: reportCallIssue=false
# (nn.ModuleList forgets the type of its items)
from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from zoo.contract import StateList, init_linear_, part_cost
from zoo.graph.nodes import Builder, Composite, Leaf
from zoo.graph.spec import Spec
from zoo.kernels.linear import Linear
from zoo.registry import register


@register("parallel", kind="combinator")
class Parallel(Composite):
    """Branches on one input, merged: x + merge_i(branch_i(x) - x).

    Fields: `parallel` (or `branches`): a list of nodes; `merge`: sum, mean, max, gated (learned scalar per
    branch, started at `gates`) or concat (learned map of the joined increments); `norm`: one norm for all
    branches instead of one each, as in y = x + g1 SSM(LN x) + g2 attention(LN x).
    Useful: the sum of its branches, and for concat 2 n D^2 FLOPs a token.
    """

    main_field = "branches"
    sees_blocks = True
    uses_norm = True
    sliceable = True
    cuts_gradient = ""

    def __init__(
        self,
        branches: list[nn.Module],
        dim: int,
        norm: nn.Module | None = None,
        *,
        merge: Literal["sum", "mean", "max", "gated", "concat"] = "sum",
        gates: list[float] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.branches, self.norm, self.merge, self.dim = nn.ModuleList(branches), norm, merge, dim
        self.gate_starts = gates
        factory = {"device": device, "dtype": dtype}
        self.gates = nn.Parameter(torch.empty(len(branches), **factory)) if merge == "gated" else None
        self.out_proj = Linear(len(branches) * dim, dim, bias=False, **factory) if merge == "concat" else None

    @staticmethod
    def parse(fields) -> Spec | None:
        parser = fields.parser
        values = fields.take("branches", required=True)
        norm_given = fields.take("norm")
        options = fields.options()
        if not isinstance(values, list) or len(values) < 2:
            parser.complain(fields.at("branches"), "parallel needs a list of at least two branches")
            return None
        norm, before = None, (parser.default_norm, parser.default_residual)
        if norm_given is not None:
            norm = parser.norm(norm_given, fields.at("norm"))
            parser.default_norm = None  # the branches read the stream that was normed for all of them
        try:
            branches = [parser.node(v, (*fields.at("branches"), i)) for i, v in enumerate(values)]
        finally:
            parser.default_norm, parser.default_residual = before
        gates = options.get("gates")
        if gates is not None and (options.get("merge") != "gated" or len(gates) != len(values)):
            parser.complain(fields.at("gates"), f"`gates` goes with merge: gated, one number for each of {len(values)}")
        return Spec("parallel", fields.path, options=options, children=tuple(b for b in branches if b), norm=norm)

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> Parallel:
        norm = builder.component(spec.norm) if spec.norm else None
        branches = [builder.node(c) for c in spec.children]
        return cls(branches, builder.dim, norm, **spec.options, **builder.factory)

    def extra_repr(self) -> str:
        return f"merge={self.merge}"

    def reset_own_parameters(self) -> None:
        if self.gates is not None:
            with torch.no_grad():
                self.gates.copy_(torch.tensor(self.gate_starts or [1.0] * len(self.branches)))
        if self.out_proj is not None:
            init_linear_(self.out_proj)

    def increment(self, x, *, state: Any = None, positions=None, doc_ids=None):
        h = x if self.norm is None else self.norm(x)
        parts = [
            branch.increment(h, state=state and state.children[i], positions=positions, doc_ids=doc_ids)
            for i, branch in enumerate(self.branches)
        ]
        if self.out_proj is not None:
            return self.out_proj(torch.cat(parts, -1))
        if self.merge == "max":
            return torch.stack(parts).amax(0)
        if self.gates is not None:
            parts = [gate * part for gate, part in zip(self.gates.unbind(), parts, strict=True)]
        total = sum(parts[1:], parts[0])
        return total / len(parts) if self.merge == "mean" else total

    def init_state(self, batch_size, max_len=None):
        return StateList([b.init_state(batch_size, max_len) for b in self.branches])

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        for i, branch in enumerate(self.branches):
            run = list(branch.leaves(batch_size, seq_len, context_len, mode, f"{path}.{i}".strip(".")))
            if i and mode == "train":  # all keep the same input, which the first branch counts
                leaf = run[0]
                stream = batch_size * seq_len * self.dim * next(self.parameters()).element_size()
                kept = max(0, leaf.cost.activation_bytes - stream)
                run[0] = Leaf(leaf.path, leaf.block, leaf.cost.replace(activation_bytes=kept), leaf.module)
            yield from run
        own = [p for n, p in self.named_parameters() if not n.startswith("branches.")]
        count, item = sum(p.numel() for p in own), next(self.parameters()).element_size()
        flops = 0 if self.out_proj is None else 2 * batch_size * seq_len * self.out_proj.weight.numel()
        tokens, parts, normed = batch_size * seq_len * self.dim, len(self.branches), self.norm is not None
        norm: Any = self.norm
        number = 1 + (norm.vector_flops if normed else 0)  # the stream is added
        number += 0 if self.out_proj is not None else parts - 1 + (self.merge == "mean")
        number += 0 if self.gates is None else parts
        cost = part_cost(
            mode, item, params=count, flops=flops, vector=number * tokens, read=(parts + 1 + normed) * tokens,
            written=(1 + normed) * tokens, kept=self._kept(batch_size * seq_len),
        )  # fmt: skip
        yield Leaf(f"{path}.merge", f"merge {self.merge}", cost, self)

    def _kept(self, tokens: int) -> int:
        """Elements that the norm and the merge keep for backward: gates what they multiply, a map and a maximum the
        increments side by side, a maximum also itself and which of them it is."""
        parts, stream = len(self.branches), tokens * self.dim
        kept = 0 if self.norm is None else self.norm.activation_elements(tokens)  # type: ignore[operator]
        if self.merge in ("gated", "concat"):
            kept += parts * stream
        elif self.merge == "max":
            kept += (parts + 1) * stream
        return kept
