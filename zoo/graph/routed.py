"""What loops, routes and feedback share: their state, the positions of their tokens, and the costs of bodies that
run several times or on a part of the tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo import registry
from zoo.contract import Cost, Router, State, part_cost, positions_from
from zoo.graph.nodes import Leaf
from zoo.graph.spec import Spec


@dataclass
class RoutedState(State):
    """One state of the body per step (or per body), and the tokens seen [B]."""

    seen: Tensor
    children: list[State] = field(default_factory=list)

    def next_positions(self, length: int) -> Tensor:
        """Positions [B, T] of the coming tokens."""
        return self.seen[:, None] + torch.arange(length, device=self.seen.device)


def token_positions(x: Tensor, state: RoutedState | None, positions: Tensor | None, doc_ids: Tensor | None) -> Tensor:
    """Positions of x's tokens: the given ones, or those that continue the state or start each document."""
    if positions is None:
        here = positions_from(doc_ids, x.shape[0], x.shape[1], x.device)
        positions = here if state is None else state.next_positions(x.shape[1])
    if state is not None:
        state.seen += x.shape[1]
    return positions


def not_segmented(router: Router) -> str:
    """Why a router keeps a row from being trained in segments."""
    return f"{type(router).zoo_registration.name} chooses otherwise where rows come in segments"  # type: ignore


def cannot_share_keys(body: Spec) -> str:
    """Why the blocks of a body cannot query keys that another call wrote, or an empty string."""
    for spec in body.walk():
        if spec.kind == "combinator":
            if spec.name not in ("sequence", "repeat", "parallel"):
                return f"a {spec.name} keeps states of its own; shared keys go through plain layers only"
        elif registry.block_card(spec.name).state_growth != "none" and not registry.load(spec.name).shares_keys:
            return f"{spec.name} has no keys that another call can query; use attention"
        elif wrong := [kind for kind in registry.COMPONENTS if spec.options.get(kind) is not None]:
            return f"{spec.name} with {wrong[0]}: reads its own keys only; leave {wrong[0]} out"
    return ""


def picked_leaves(body, share, batch_size, seq_len, context_len, mode, path) -> list[Leaf]:
    """Costs of a body that a `share` of the tokens takes. Its state is allocated for all of them."""
    everything = list(body.leaves(batch_size, seq_len, context_len, mode, path))
    if share == 1:
        return everything
    if share == 0:
        idle = [(e, e.cost.of_share(0).replace(activation_bytes=0, product_bytes=0)) for e in everything]
        return [Leaf(e.path, e.block, cost, e.module) for e, cost in idle]
    if seq_len == 1:  # decoding: a share of the steps does the work
        return [Leaf(e.path, e.block, e.cost.of_share(share), e.module) for e in everything]
    part = body.leaves(batch_size, max(1, int(share * seq_len)), round(share * context_len), mode, path)
    return [
        Leaf(p.path, p.block, p.cost.replace(state_bytes=e.cost.state_bytes), p.module)
        for p, e in zip(part, everything, strict=True)
    ]


def reading_leaves(body, share, batch_size, seq_len, context_len, mode, path) -> list[Leaf]:
    """Costs of a body that a `share` of the tokens takes over keys that are written already, and kept."""
    train = mode == "train"
    queries = seq_len if seq_len == 1 or share == 1 else max(1, int(share * seq_len))
    often = share if seq_len == 1 else 1
    run = []
    for leaf in picked_leaves(body, share, batch_size, seq_len, context_len, mode, path):
        block, cost = getattr(leaf.module, "block", None), leaf.cost
        if getattr(block, "shares_keys", False):
            given, passes = (batch_size, queries, seq_len, context_len), often * (3 if train else 1)
            flops, useful = block.query_flops(*given), block.useful_query_flops(*given)  # type: ignore[union-attr]
            cost = cost.replace(flops=round(passes * flops), useful_flops=round(passes * useful))
            if train:
                spared = block.key_elements(batch_size * queries)  # type: ignore[union-attr]
                # where only some ask, places of queries and keys are int64
                spared -= 0 if queries == seq_len else 2 * batch_size * (queries + seq_len)
                spared *= block.itemsize  # type: ignore[union-attr]
                cost += Cost(bytes_read=-spared, bytes_written=-spared, activation_bytes=-spared)
        run.append(Leaf(leaf.path, leaf.block, cost, leaf.module))
    return run


def sum_leaves(runs: list[Leaf], more: list[Leaf]) -> list[Leaf]:
    """The same weights once more: work and state add up, parameters do not."""
    if not runs:
        return more
    return [
        Leaf(a.path, a.block, a.cost + b.cost.replace(params=0, active_params=0), a.module)
        for a, b in zip(runs, more, strict=True)
    ]


def stateless(leaf: Leaf) -> Leaf:
    """A run that allocates no state: an earlier one did."""
    return Leaf(leaf.path, leaf.block, leaf.cost.replace(state_bytes=0), leaf.module)


def routing_leaf(
    node, router, batch_size, seq_len, mode, path, extra=None, runs=0, trained=0, entered=False
) -> Leaf:  # fmt: skip
    """Cost of a combinator's own parameters: its router (`entered`: see its `activation_elements`), and a map `extra`
    that runs so often (backward is two), and `trained` times with a gradient."""
    inside = {id(p) for name, child in node.named_children() if name in ("body", "bodies") for p in child.parameters()}
    own = sum(p.numel() for p in node.parameters() if id(p) not in inside)
    tokens, item = batch_size * seq_len, next(node.parameters()).element_size()
    shares = [router.share(step) for step in range(router.steps)]
    # a step that some tokens take gathers them, and adds to them what it says
    moved = tokens * router.dim * sum(2 * share for share in shares if share < 1)
    scored = tokens * router.dim * len(shares) if own else 0
    # the map's input; the streams that tokens are taken from (a loop has one a step), int64 places of those taken
    kept = router.activation_elements(tokens, entered)
    kept += 0 if extra is None else trained * tokens * extra.in_features
    some = [share for share in shares if 0 < share < 1 and not router.reads_all]
    kept += tokens * router.dim * (len(some) if router.nested else bool(some)) + round(2 * tokens * sum(some))
    cost = part_cost(
        mode, item, params=own, flops=router.step_flops(tokens), vector=router.step_vector_flops(tokens),
        read=round(scored + moved), written=round(moved), kept=kept,
        state_bytes=8 * batch_size,  # the count of tokens seen, int64 per row
    )  # fmt: skip
    if extra is not None:
        flops, width = 2 * runs * tokens * extra.weight.numel(), extra.in_features
        read = runs * item * (tokens * width + extra.weight.numel())
        written = runs * item * tokens * extra.out_features
        cost += Cost(flops=flops, useful_flops=flops, bytes_read=read, bytes_written=written)
    return Leaf(f"{path}.router".strip("."), type(router).zoo_registration.name, cost, node)
