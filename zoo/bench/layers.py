"""`zoo bench layers`: whole layers against transformers' code of the same layer with the same weights in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo import registry
from zoo.bench import peers
from zoo.bench.groups import Candidate, Contest, Group, Settings, What, complaint
from zoo.bench.problems import Draw
from zoo.bench.timing import Runner
from zoo.contract import Block

HF = "zoo.bench.peers.transformers:layer_"
DIM, CONTEXT, STEPS = 512, 2048, 8
LENGTHS = (2048, 512)
WHATS: tuple[What, ...] = ("forward", "forward+backward", "step")


@dataclass(frozen=True)
class LayerCase:
    """A block of ours, the function that builds its peer from it, and the peer's settings worth trying (the first
    is its default). wanted: the ratios to reach on one CPU thread in float32, forward, forward+backward, step.
    unrolled: the peer is a Python loop over tokens, which torch.compile would unroll."""

    block: str
    options: dict[str, Any]
    peer: str
    wanted: tuple[float | None, float, float]
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    unrolled: bool = False


LAYERS = (
    LayerCase("mamba", {}, "mamba", (3.0, 1.5, 2.0)),
    LayerCase("mamba2", {}, "mamba2", (3.0, 2.0, 2.0), {"": {}, "chunk 64": {"chunk_size": 64}}),
    LayerCase(
        "gated_deltanet", {"num_heads": 8, "head_dim": 64, "expand_v": 1.0, "norm_eps": 1e-6}, "gated_deltanet",
        (3.0, 2.0, 2.0),
    ),
    LayerCase("kda", {"num_heads": 8}, "kda", (8.0, 4.0, 2.0)),
    LayerCase(
        "mla",
        {"num_heads": 8, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64},
        "mla", (3.0, 3.0, 2.0),
    ),
    LayerCase("attention", {"num_heads": 8}, "attention", (1.0, 1.0, 2.0)),
    LayerCase(
        "lightning", {"num_heads": 8}, "lightning", (1.5, 1.2, 2.0), {"": {}, "block 64": {"block_size": 64}}
    ),
    LayerCase(
        "moe", {"num_experts": 8, "top_k": 2, "hidden_dim": 1024}, "moe", (1.0, 1.2, 2.0),
        {"": {}, "eager experts": {"experts_implementation": "eager"}},
    ),
    LayerCase("rg_lru", {"num_heads": 8}, "rg_lru", (None, 2.0, 2.0), unrolled=True),
)  # fmt: skip


def names() -> list[str]:
    """What can be asked for."""
    return [layer.block for layer in LAYERS]


def groups(chosen: Sequence[str], settings: Settings, lengths: Sequence[int] = ()) -> Iterator[Group]:
    """Forward and forward+backward at each length, and a step after the longest context."""
    lengths = lengths or LENGTHS
    context = max(lengths) if lengths != LENGTHS else CONTEXT
    for layer in LAYERS:
        if layer.block in chosen:
            for what, wanted in zip(WHATS, layer.wanted):
                for seq in lengths if what != "step" else (context,):
                    yield _group(layer, what, seq, settings, _goal(settings, wanted, seq))


def _goal(settings: Settings, wanted: float | None, seq: int) -> float | None:
    usual = settings.device == "cpu" and settings.dtype == torch.float32
    return wanted if usual and seq == CONTEXT else None


def _group(layer: LayerCase, what: What, seq: int, settings: Settings, wanted: float | None) -> Group:
    def build(length: int) -> Contest:
        return contest(layer, what, length, settings)

    return Group(layer.block, what, seq, build, context=seq if what == "step" else 0, wanted=wanted,
                 facts={"dim": DIM, "options": layer.options})  # fmt: skip


def contest(layer: LayerCase, what: What, seq: int, settings: Settings) -> Contest:
    """Our block and every variant of its peer, with the block's weights, eager and (if wanted) compiled."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = registry.create(layer.block, DIM, **layer.options)
    block = block.to(settings.device, settings.dtype).eval()
    x = Draw(settings.device, settings.dtype)(1, seq + (STEPS if what == "step" else 0), DIM)
    candidates = [Candidate("zoo", "zoo", _ours(block, block, x, what, seq), row=True)]
    if settings.compiled:
        torch._dynamo.reset()  # or the limit on recompilations sends it back to eager
        compiled = torch.compile(block)
        candidates.append(Candidate("zoo, compiled", "zoo", _ours(block, compiled, x, what, seq), row=True))
    build = peers.find(HF + layer.peer, settings.device)
    for variant, changes in layer.variants.items():
        name = f"transformers{f', {variant}' if variant else ''}"
        if isinstance(build, str):
            candidates.append(Candidate.refused(name, "peer", build))
            continue
        try:
            peer = build(block, seq + STEPS, changes)
            candidates.append(
                Candidate(name, "peer", _theirs(peer, peer.module, x, what, seq), growing=what == "forward+backward")
            )
            if settings.compiled and layer.unrolled and what != "step":
                why = "a Python loop over tokens, which torch.compile would unroll"
                candidates.append(Candidate.refused(f"{name}, compiled", "peer", why))
            elif settings.compiled:
                compiled = torch.compile(peer.module)
                candidates.append(Candidate(f"{name}, compiled", "peer", _theirs(peer, compiled, x, what, seq)))
        except Exception as error:  # their caches and configurations change between versions
            candidates.append(Candidate.refused(name, "peer", complaint(error)))
    if what == "step":
        cost = block.cost(1, 1, seq, "decode")
        return Contest(candidates, cost.flops, cost.bytes_read, best=True)
    cost = block.cost(1, seq, 0, "train" if what == "forward+backward" else "prefill")
    return Contest(candidates, cost.flops, cost.bytes_read + cost.bytes_written, best=True)


def _ours(block: Block, module: Any, x: Tensor, what: What, context: int) -> Runner:
    if what == "step":
        state = block.init_state(1, x.shape[1])
        with torch.no_grad():
            block(x[:, :context], state=state)
        filled = state.snapshot()
        tokens = x[:, context:].split(1, 1)

        def steps() -> Tensor:
            with torch.no_grad():
                for token in tokens:
                    y = module(token, state=state)
            return y

        return Runner(steps, lambda: state.restore(filled), calls=len(tokens))
    return _passes(module, lambda module, x: module(x), x, what)


def _theirs(peer: peers.Peer, module: Any, x: Tensor, what: What, context: int) -> Runner:
    if what == "step":
        cache = peer.cache()
        with torch.no_grad():
            peer.call(peer.module, x[:, :context], cache, 0)
        filled = peers.snapshot(cache)
        tokens = list(enumerate(x[:, context:].split(1, 1), context))

        def steps() -> Tensor:
            with torch.no_grad():
                for position, token in tokens:
                    y = peer.call(module, token, cache, position)
            return y

        return Runner(steps, lambda: peers.restore(cache, filled), calls=len(tokens))
    return _passes(module, lambda module, x: peer.call(module, x, None, 0), x, what)


def _passes(module: Any, call: Callable[[Any, Tensor], Tensor], x: Tensor, what: What) -> Runner:
    if what == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return call(module, x)

        return Runner(forward)
    x = x.clone().requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    leaves = [x, *module.parameters()]

    def both() -> list[Tensor]:
        y = call(module, x)
        grads = torch.autograd.grad(y, leaves, weight, allow_unused=True)
        return [y.detach(), grads[0]]

    return Runner(both)
