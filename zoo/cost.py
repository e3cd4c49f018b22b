"""What a model costs, predicted from its graph: parameters, FLOPs, bytes and state, node by node, no weights."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.contract import Mode
from zoo.errors import ConfigError, one_of

if TYPE_CHECKING:
    from zoo.architectures.model import Model

MODES = ("train", "prefill", "decode")


@dataclass(frozen=True)
class NodeCost:
    """One block at one site. `params` counts shared weights at every site that uses them."""

    path: str
    block: str
    params: int
    active_params: int
    flops: int
    bytes_read: int
    bytes_written: int
    activation_bytes: int
    state_bytes: int
    useful_flops: int
    vector_flops: int
    product_bytes: int = 0
    calls: float = 1.0
    pieces: float = 1.0
    groups: float = 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes that training holds: `gradients` in the dtype of the parameters, and for each `optimizer` bytes AdamW's two
    moments in it, as `zoo train` has them (float32 parameters where `train.dtype` is left out). `activations` is what
    is kept when backward begins, with no checkpointing, selective or full, and the most that one layer computes again
    on top (`again`; backward then frees it)."""

    parameters: int
    gradients: int
    optimizer: int
    activations: dict[str, int]
    again: dict[str, int]

    def total(self, checkpoint: str = "none") -> int:
        """All of it, under `none`, `selective` or `full` checkpointing."""
        held = self.parameters + self.gradients + self.optimizer
        return held + self.activations[checkpoint] + self.again[checkpoint]


@dataclass(frozen=True)
class CostReport:
    """Totals and nodes. `flops`, bytes and state are for the whole batch; parameters count each tensor once.
    `active_params` are those one token touches, the embedding table included. `memory` is that of training, None of
    other modes. `itemsize`: bytes of a parameter."""

    name: str
    mode: Mode
    batch_size: int
    seq_len: int
    context_len: int
    params: int
    active_params: int
    flops: int
    bytes_read: int
    bytes_written: int
    activation_bytes: int
    state_bytes: int
    useful_flops: int
    vector_flops: int
    nodes: tuple[NodeCost, ...]
    assumptions: tuple[str, ...] = ()
    memory: Memory | None = None
    itemsize: int = 4

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def estimate(
    path_or_model: str | Path | Mapping | Model,
    overrides: Iterable[str] = (),
    *,
    batch_size: int,
    seq_len: int,
    context_len: int = 0,
    mode: Mode = "train",
) -> CostReport:
    """Predict the cost of one step: training, prefill of `seq_len` tokens, or decoding `seq_len` tokens after
    `context_len`. Nothing of the model's size is allocated. See `zoo.contract.Cost` for the conventions."""
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r} is unknown; {one_of(MODES)}")
    for name, value, least in (("batch_size", batch_size, 1), ("seq_len", seq_len, 1), ("context_len", context_len, 0)):
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
    model = path_or_model
    if not hasattr(model, "leaves"):
        from zoo.architectures.storage import build

        model = build(model, overrides, device="meta")  # type: ignore[arg-type]
    streams = "decode" in model.modes  # type: ignore[union-attr]
    if not streams and (mode == "decode" or context_len):
        raise ConfigError("the model reads whole rows and has no state: mode can be train or prefill, context_len 0")
    leaves = list(model.leaves(batch_size, seq_len, context_len, mode))  # type: ignore[union-attr]
    first, *last = model.ends(batch_size, seq_len, mode)  # type: ignore[union-attr]
    nodes = [
        NodeCost(n.path, n.block, *dataclasses.astuple(n.cost if n.cost.calls else n.cost.replace(calls=1, pieces=1)))
        for n in (first, *leaves, *last)  # what is no block, as a norm, is called once
    ]
    totals = {f: sum(getattr(n, f) for n in nodes) for f in ("flops", "useful_flops", "vector_flops")}
    totals |= {f: sum(getattr(n, f) for n in nodes) for f in ("bytes_read", "bytes_written")}
    totals |= {f: sum(getattr(n, f) for n in nodes) for f in ("activation_bytes", "state_bytes")}
    # every tensor once, however many sites share it
    once = {id(leaf.module): leaf.cost for leaf in leaves}
    params = sum(p.numel() for p in model.parameters())  # type: ignore[union-attr]
    inactive = sum(c.params - c.active_params for c in once.values())
    assumptions: list[str] = []
    for leaf in leaves:
        router = getattr(leaf.module, "router", None)
        said = [getattr(leaf.module, name, "") for name in ("assumption", "expectation")]
        said += [f"{leaf.block}: {router.assumption}"] if router is not None and router.assumption else []
        assumptions += [line for line in said if line and line not in assumptions]
    # the model counts tokens itself
    state = totals["state_bytes"] + (8 * batch_size if streams and mode != "train" else 0)
    name = str(model.config.get("name", "model"))  # type: ignore[union-attr]
    totals["state_bytes"] = state
    tokens = model.trained_tokens(batch_size, seq_len)  # type: ignore[union-attr]
    memory = _memory(model, nodes, tokens) if mode == "train" else None
    return CostReport(
        name, mode, batch_size, seq_len, context_len, params, params - inactive,
        nodes=tuple(nodes), assumptions=tuple(assumptions), memory=memory,
        itemsize=next(model.parameters()).element_size(), **totals,  # type: ignore[union-attr]
    )  # fmt: skip


def _memory(model: Any, nodes: list[NodeCost], tokens: int) -> Memory:
    """Checkpointing is by layer: the input of each one is kept."""
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    stream = tokens * model.dim * next(model.parameters()).element_size()
    layers, outside = defaultdict(lambda: [0, 0]), 0
    for node in nodes:
        if node.path.startswith("layers."):
            layer = layers[node.path.split(".")[1]]
            layer[0] += node.activation_bytes
            layer[1] += node.product_bytes
        else:
            outside += node.activation_bytes
    kept = {"none": outside + sum(every for every, _ in layers.values())}
    kept["selective"] = outside + sum(stream + products for _, products in layers.values())
    kept["full"] = outside + stream * len(layers)
    again = {"none": 0, "selective": max((max(0, every - products) for every, products in layers.values()), default=0)}
    again["full"] = max((every for every, _ in layers.values()), default=0)
    return Memory(held, trained, 2 * trained, kept, again)
