"""Zamba's shared transformers: a few attention blocks that many places of a body visit."""

# pyright: reportCallIssue=false
# (nn.ModuleList forgets the type of its items)
from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import registry
from zoo.contract import StateList, init_linear_, part_cost
from zoo.graph.nodes import Builder, Composite, Leaf
from zoo.graph.repeat import chosen
from zoo.graph.spec import Spec, flatten
from zoo.kernels import work
from zoo.kernels.linear import Linear
from zoo.registry import register
from zoo.schema import PositiveInt


class SharedTransformer(nn.Module):
    """Attention over [x; e], 2 D wide, then an MLP of width D; neither has a residual branch of its own."""

    def __init__(self, dim: int, attention: nn.Module, norms: list[nn.Module], hidden_dim: int, **factory):
        super().__init__()
        self.input_layernorm, self.pre_ff_layernorm = norms
        self.self_attn: Any = attention
        # the attention reads 2 D channels and gives D
        old: Any = attention.o_proj
        self.self_attn.o_proj = Linear(old.in_features, dim, bias=old.bias is not None, **factory)
        self.gate_up_proj = Linear(dim, 2 * hidden_dim, bias=False, **factory)
        self.down_proj = Linear(hidden_dim, dim, bias=False, **factory)

    def reset_own_parameters(self) -> None:
        init_linear_(self.gate_up_proj)
        init_linear_(self.down_proj)


class Adapted(nn.Module):
    """W x + B A x: a linear layer that others share, with a low-rank change of its own."""

    def __init__(self, shared: nn.Linear, rank: int, **factory):
        super().__init__()
        self.shared = (shared,)  # a tuple, so that it is no submodule here
        self.down = Linear(shared.in_features, rank, bias=False, **factory)
        self.up = Linear(rank, shared.out_features, bias=False, **factory)

    def reset_own_parameters(self) -> None:
        init_linear_(self.down)
        nn.init.zeros_(self.up.weight)  # LoRA: every site starts from the shared weights

    def forward(self, x: Tensor) -> Tensor:
        return self.shared[0](x) + self.up(self.down(x))


class Visit(nn.Module):
    """What one site has to itself: low-rank changes of the MLP's first matrix and of the attention's projections, and
    the map of the output."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        shared: SharedTransformer,
        rank: int | None,
        attention_rank: int | None,
        **factory,
    ):
        super().__init__()
        self.adapted = nn.ModuleDict()
        self.attention: tuple[nn.Module, ...] = ()
        if attention_rank:
            names = ("q_proj", "k_proj", "v_proj")
            self.adapted.update({n: Adapted(getattr(shared.self_attn, n), attention_rank, **factory) for n in names})
            # the shared attention but for these three; again no submodule, its other parts belong to `shared`
            here = copy.copy(shared.self_attn)
            here._modules = {**here._modules, **self.adapted}
            self.attention = (here,)
        self.adapter_down = Linear(dim, rank, bias=False, **factory) if rank else None
        self.adapter_up = Linear(rank, 2 * hidden_dim, bias=False, **factory) if rank else None
        self.linear = Linear(dim, dim, bias=False, **factory)

    def reset_own_parameters(self) -> None:
        init_linear_(self.linear)
        if self.adapter_down is not None and self.adapter_up is not None:
            init_linear_(self.adapter_down)
            nn.init.zeros_(self.adapter_up.weight)  # LoRA: every site starts from the shared weights

    def forward(self, shared: SharedTransformer, x: Tensor, entry: Tensor, **context: Any) -> Tensor:
        attention = self.attention[0] if self.attention else shared.self_attn
        h = shared.pre_ff_layernorm(attention(shared.input_layernorm(torch.cat([x, entry], -1)), **context))
        gate_up = shared.gate_up_proj(h)
        if self.adapter_down is not None and self.adapter_up is not None:
            gate_up = gate_up + self.adapter_up(self.adapter_down(h))
        gate, up = gate_up.chunk(2, -1)
        return self.linear(shared.down_proj(F.gelu(gate) * up))


@register(
    "revisit",
    kind="combinator",
    paper="arXiv:2411.15242",
    relations=(
        "revisit(at='0', attention={'num_heads': 4}, hidden_dim=96) == repeat(times=2) at visits.0.linear.weight=0",
    ),
)
class Revisit(Composite):
    """Nodes one after the other, x <- x + f_i(x + W_i T(x, e)) at some, x <- x + f_i(x) at the others (Zamba2).

    e is the combinator's input; T one of `copies` transformers that the sites take in turn: attention on [x; e],
    2 D wide, then a GeGLU of `hidden_dim`, whose first matrix a site changes by one of `rank`, as it does queries, keys
    and values by ones of `attention_rank`. What T says reaches the stream through f_i alone. Fields: `of`: the nodes;
    `at`: the sites (`6`, `"6,11"`, `"6::6"`); `attention`: options of the attention block, whose heads are by default
    those of a width of 2 D. Norms are the default norm.
    Useful: the sum of its nodes and at each site a transformer, its changes of low rank and W_i.
    """

    sees_blocks = True
    sliceable = True
    cuts_gradient = ""

    def __init__(
        self,
        items: list[nn.Module],
        transformers: list[SharedTransformer],
        dim: int,
        *,
        at: Any,
        attention: dict[str, Any] | None = None,
        hidden_dim: PositiveInt,
        copies: PositiveInt = 1,
        rank: PositiveInt | None = None,
        attention_rank: PositiveInt | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.items, self.transformers, self.dim = nn.ModuleList(items), nn.ModuleList(transformers), dim
        self.sites = sorted(set(chosen(at, len(items))))
        self.visits = nn.ModuleList(
            Visit(dim, hidden_dim, self._shared(n), rank, attention_rank, device=device, dtype=dtype)
            for n in range(len(self.sites))
        )

    @staticmethod
    def parse(fields) -> Spec | None:
        parser, body, options = fields.parser, fields.body(), fields.options()
        if body is None or "at" not in options:
            return None
        items = tuple(flatten(body))
        try:
            sites = set(chosen(options["at"], len(items)))
            if len(sites) < (copies := options.get("copies", 1)):
                parser.complain(fields.at("copies"), f"copies={copies} is more than the number of sites, {len(sites)}")
        except ValueError as error:
            parser.complain(fields.at("at"), str(error))
        options["attention"] = parser.options("attention", options.get("attention") or {}, fields.at("attention"))
        return Spec("revisit", fields.path, options=options, children=items, norm=parser.default_norm)

    @staticmethod
    def own_blocks(spec: Spec) -> Iterator[tuple[Spec, int]]:
        yield Spec("attention", (*spec.path, "revisit", "attention"), "mixer", spec.options["attention"]), 2

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> Revisit:
        dim, options = builder.dim, spec.options

        def norm(width: int) -> nn.Module:
            if spec.norm is None:
                return nn.Identity()
            return registry.load(spec.norm.name)(width, **spec.norm.options, **builder.factory)

        transformers = [
            SharedTransformer(
                dim, registry.load("attention")(2 * dim, **options["attention"], **builder.factory),
                [norm(2 * dim), norm(dim)], options["hidden_dim"], **builder.factory,
            )
            for _ in range(options.get("copies", 1))
        ]  # fmt: skip
        return cls([builder.node(c) for c in spec.children], transformers, dim, **options, **builder.factory)

    def _shared(self, number: int) -> SharedTransformer:
        return self.transformers[number % len(self.transformers)]  # type: ignore[return-value]

    def forward(self, x, *, state: Any = None, positions=None, doc_ids=None):
        entry, bodies, caches = x, None, None
        if state is not None:
            bodies, caches = (s.children for s in state.children)
        for i, item in enumerate(self.items):
            said = x
            if i in self.sites:
                n = self.sites.index(i)
                context = {"state": caches and caches[n], "positions": positions, "doc_ids": doc_ids}
                said = x + self.visits[n](self._shared(n), x, entry, **context)
            x = x + item.increment(said, state=bodies and bodies[i], positions=positions, doc_ids=doc_ids)
        return x

    def init_state(self, batch_size, max_len=None):
        caches = [self._shared(n).self_attn.init_state(batch_size, max_len) for n in range(len(self.sites))]
        return StateList([StateList([i.init_state(batch_size, max_len) for i in self.items]), StateList(caches)])

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        for i, item in enumerate(self.items):
            if i in self.sites:
                n = self.sites.index(i)
                yield from self._visit_leaves(n, batch_size, seq_len, context_len, mode, f"{path}.{i}".strip("."))
            yield from item.leaves(batch_size, seq_len, context_len, mode, f"{path}.{i}".strip("."))

    def _visit_leaves(self, number, batch_size, seq_len, context_len, mode, path):
        shared, visit = self._shared(number), self.visits[number]
        attention = shared.self_attn
        yield Leaf(f"{path}.shared", "attention", attention.cost(batch_size, seq_len, context_len, mode), attention)
        rest = [p for n, p in shared.named_parameters() if not n.startswith("self_attn.")]
        own = [*rest, *visit.parameters()]
        count, item, tokens = sum(p.numel() for p in own), attention.itemsize, batch_size * seq_len
        passes = 3 if mode == "train" else 1
        flops = passes * 2 * tokens * sum(p.numel() for p in own if p.ndim == 2)
        hidden = shared.down_proj.in_features
        # the joined input and its norm; the norm's input and output, gate and up, gelu(gate) and the product; what
        # lies between adapters, and what they add
        adapters: Any = visit.adapted.values()
        adapted = sum(m.down.out_features + m.up.out_features for m in adapters)
        kept = tokens * (6 * self.dim + 4 * hidden + adapted) * item if mode == "train" else 0
        norms = [shared.input_layernorm, shared.pre_ff_layernorm]
        per_norm = [getattr(norm, "vector_flops", 0) for norm in norms]
        vector = tokens * (self.dim * (2 * per_norm[0] + per_norm[1] + 2) + hidden * (work.GELU + 1))
        cost = part_cost(
            mode, item, params=count, flops=flops // passes, vector=vector, read=4 * tokens * self.dim,
            written=2 * tokens * self.dim, kept=kept // item,
        )  # fmt: skip
        yield Leaf(f"{path}.visit", "shared mlp", cost, visit)
