"""What a model costs, predicted from its graph: parameters, FLOPs, bytes and state, node by node, no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.contract import Cost, Mode
from zoo.errors import ConfigError, one_of

if TYPE_CHECKING:
    from zoo.architectures.causal_lm import CausalLM

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


@dataclass(frozen=True)
class CostReport:
    """Totals and nodes. `flops`, bytes and state are for the whole batch; parameters count each tensor once.
    `active_params` are those one token touches, the embedding table included."""

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
    nodes: tuple[NodeCost, ...]
    assumptions: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def estimate(
    path_or_model: str | Path | Mapping | CausalLM,
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
    leaves = list(model.leaves(batch_size, seq_len, context_len, mode))  # type: ignore[union-attr]
    ends = list(_ends(model, batch_size, seq_len, mode))
    nodes = [NodeCost(leaf.path, leaf.block, *dataclasses.astuple(leaf.cost)) for leaf in leaves]
    nodes = [NodeCost(*ends[0][:2], *dataclasses.astuple(ends[0][2])), *nodes]
    nodes += [NodeCost(p, b, *dataclasses.astuple(c)) for p, b, c in ends[1:]]
    totals = {f: sum(getattr(n, f) for n in nodes) for f in ("flops", "bytes_read", "bytes_written")}
    totals |= {f: sum(getattr(n, f) for n in nodes) for f in ("activation_bytes", "state_bytes")}
    # every tensor once, however many sites share it
    once = {id(leaf.module): leaf.cost for leaf in leaves}
    params = sum(p.numel() for p in model.parameters())  # type: ignore[union-attr]
    inactive = sum(c.params - c.active_params for c in once.values())
    assumptions = []
    if any("router" in n.path and n.block not in ("fixed", "act") for n in nodes):
        assumptions.append("routed bodies run on the share of tokens that their router's capacity names")
    assumptions += dict.fromkeys(a for leaf in leaves if (a := getattr(leaf.module, "assumption", "")))
    state = totals["state_bytes"] + (8 * batch_size if mode != "train" else 0)  # the model's own token count
    name = str(model.config.get("name", "model"))  # type: ignore[union-attr]
    totals["state_bytes"] = state
    return CostReport(
        name, mode, batch_size, seq_len, context_len, params, params - inactive,
        nodes=tuple(nodes), assumptions=tuple(assumptions), **totals,
    )  # fmt: skip


def _ends(model: Any, batch_size: int, seq_len: int, mode: Mode) -> Iterable[tuple[str, str, Cost]]:
    """Embedding, final norm and head."""
    tokens, item = batch_size * seq_len, model.tok_embeddings.weight.element_size()
    stream, table = tokens * model.dim * item, model.tok_embeddings.weight.numel()
    train = mode == "train"
    passes = 3 if train else 1
    yield "tok_embeddings", "embedding", Cost(table, table, 0, stream, stream)
    if model.norm is not None:
        own = sum(p.numel() for p in model.norm.parameters())
        yield "norm", "norm", Cost(own, own, 0, stream, stream, stream if train else 0)
    tied = model.lm_head.weight is model.tok_embeddings.weight
    logits = tokens * model.vocab_size * item
    head = Cost(
        0 if tied else table, 0 if tied else table, passes * 2 * tokens * table,
        passes * (table * item + stream), passes * logits, stream + logits if train else 0,
    )  # fmt: skip
    yield "lm_head", "head (tied)" if tied else "head", head
