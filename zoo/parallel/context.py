"""Context parallelism: the tokens of a row lie on several ranks, and each rank runs the whole model on its slice.

Attention gathers keys and values, recurrences pass their states from slice to slice, convolutions take the tokens in
front of the cut: the ops do it (`zoo.kernels.slices`). What looks at the row in another way is given the whole row on
every rank, which is exact and saves nothing: see `exchange`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo import row
from zoo.contract import Block
from zoo.errors import ConfigError, Problem, ZooError
from zoo.graph.nodes import Node, ResidualBlock
from zoo.row import Slice


def refusals(model: nn.Module, degree: int) -> list[Problem]:
    """What of a model cannot run under context parallelism over `degree` ranks, why, and what would do instead."""
    if degree == 1:
        return []
    if not getattr(model, "rows", False):
        text = f"{type(model).__name__} does not read rows of text from left to right, which alone are cut"
        return [Problem(f"{text}; use dp_shard, tp or pp", "parallel.cp")]
    plans = [(path, m, m.parallel_plan()) for path, m in _blocks(model) if isinstance(m, Block)]
    return [
        Problem(
            f"{path}: {_name(m)}: {plan.reason}; use another block in its place, or dp_shard, tp or pp", "parallel.cp"
        )
        for path, m, plan in plans
        if plan.context == "none"
    ]


# ------------------------------------------------------------------------------------- what is exchanged
@dataclass(frozen=True)
class Exchange:
    """What a rank sends to every other one in a forward pass of training, for each row of a batch: bytes for each token
    of its slice, and bytes whatever the length. Backward sends as much. `input`: every rank computes all of the node;
    `loss`: an auxiliary loss over the row is all that looks beyond a token."""

    kind: Literal["nothing", "loss", "kv", "state", "halo", "input"]
    bytes_per_token: float
    bytes_per_row: float = 0.0


_KINDS: dict[str, Any] = {"token": "loss", "gather_kv": "kv", "pass_state": "state", "halo": "halo"}


def exchange(module: Node | Block) -> Exchange:
    """What a block, or a node that needs whole rows, exchanges when it runs once."""
    block: Any = module.block if isinstance(module, ResidualBlock) else module
    kind = _KINDS.get(block.parallel_plan().context, "input") if isinstance(block, Block) else "input"
    weight = next(iter(block.parameters()), torch.empty(0))
    if kind == "input":
        dim = block.dim if isinstance(block, Block) else _width(block)
        return Exchange("input", dim * weight.element_size())
    block, counted = copy.deepcopy(block).to("meta").train(), []
    reach = max(getattr(block, name, None) or 0 for name in ("window", "chunk_size"))
    length = max(256, 2 * reach)  # slices that are longer than anything reaches back
    for tokens in (length, 2 * length):
        part = _Counting(None, 0, 2)
        with torch.no_grad(), row.using(part):
            block(torch.empty(1, tokens, block.dim, dtype=weight.dtype, device="meta"))
        counted.append(sum(part.sent))
    if not any(counted):
        return Exchange("nothing", 0.0)
    per_token = (counted[1] - counted[0]) / length
    return Exchange(kind, per_token, counted[0] - length * per_token)


def exchanges(model: nn.Module) -> Iterator[tuple[str, str, Exchange]]:
    """Path, name and `exchange` of everything in a model that may send something; shared modules once."""
    known: dict[Any, Exchange] = {}
    for path, module in _blocks(model):
        key = _likeness(module)
        if key not in known:
            known[key] = exchange(module)
        yield path, _name(module), known[key]


def _likeness(module: nn.Module) -> Any:
    """Equal for modules that are built alike."""
    plain = (bool, int, float, str, tuple, type(None))
    inner = tuple((name, type(m), repr([v for v in vars(m).items() if isinstance(v[1], plain)]))
                  for name, m in module.named_modules())  # fmt: skip
    return inner, tuple((name, p.shape, p.dtype) for name, p in module.named_parameters())


@dataclass(frozen=True)
class _Counting(Slice):
    """Counts what would be sent."""

    sent: list[int] = field(default_factory=list)

    def stack(self, x: Tensor) -> Tensor:
        self.sent.append(x.numel() * x.element_size())
        return torch.stack([x] * self.size)


def _blocks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Blocks and nodes that need whole rows, outermost first; what is inside one of them is left out."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(above) for above in inside):
            continue
        if isinstance(module, Block) or (isinstance(module, Node) and not module.sliceable):
            inside.append(f"{path}.")
            yield path, module


def _name(module: Any) -> str:
    return module.zoo_registration.name if hasattr(module, "zoo_registration") else type(module).__name__


def _width(node: nn.Module) -> int:
    """Channels of the stream that enters a node: those of the first part that knows."""
    widths = (getattr(m, "dim", None) for m in node.modules())
    return next((dim for dim in widths if isinstance(dim, int)), 0)


# -------------------------------------------------------------------------------------------- in place
def apply(model: Any, group: dist.ProcessGroup) -> None:
    """From now on `model(tokens [B, T], doc_ids=[B, T])` is called by every rank of `group` on its slice of the rows,
    in the order of the ranks, and gives its slice of what the whole rows would give. Gradients of losses on the
    slices, summed over the ranks, are those of the loss on the rows. Call it before layers are compiled or recomputed.

    The mean over ranks of an auxiliary loss is what it is on whole rows: weigh it by 1 / ranks (see
    `zoo.contract.set_auxiliary_scale`). Ranks have to draw the same random numbers.
    """
    if wrong := refusals(model, dist.get_world_size(group)):
        raise ConfigError(wrong)
    model.slice = part = Slice(group, dist.get_rank(group), dist.get_world_size(group))
    cut(model, part)
    model.hidden = _hidden(part, model.hidden)


def cut(module: nn.Module, part: Slice) -> None:
    """Have every block and node of `module` take slices. They are given positions, which `apply` sees to."""
    for inner in module.modules():
        if isinstance(inner, (Block, Node)):
            for name in ("forward", "increment", "write_keys", "value"):
                if hasattr(type(inner), name):
                    run = _on_slices(part, inner, getattr(inner, name), name in ("forward", "increment"))
                    setattr(inner, name, run)


def _on_slices(part: Slice, module: nn.Module, run: Callable[..., Any], wholes: bool) -> Callable[..., Any]:
    """`run`, a method of `module` that takes a slice."""
    block = isinstance(module, Block)
    always = block and module.parallel_plan().context == "gather_input"

    @functools.wraps(run)
    def on_slice(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # recomputed in backward it starts here, not in the model
        with row.using(part):
            if wholes and row.current() is not None and (always or not (block or module.sliceable)):
                return _on_row(part, run, x, *args, **kwargs)
            return run(x, *args, **kwargs)

    return on_slice


def _on_row(
    part: Slice, run: Callable[..., Tensor], x: Tensor, *, state: Any = None, positions: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`run` on the whole row, of which this rank's tokens are returned."""
    if state is not None:
        raise ZooError("rows that are cut over ranks are not streamed: call the model without a state")
    positions, doc_ids = (None if t is None else part.gather(t) for t in (positions, doc_ids))
    x = part.gather(x)
    with row.whole():
        return part.own(run(x, positions=positions, doc_ids=doc_ids))


def _hidden(part: Slice, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(run)
    def hidden(
        tokens: Tensor, state: Any = None, doc_ids: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        if state is not None:
            raise ZooError("rows that are cut over ranks are not streamed: call the model without a state")
        with row.using(part):
            if positions is None and doc_ids is None:  # blocks that count for themselves would begin at 0
                positions = part.index(tokens.shape[1], tokens.device).expand(tokens.shape)
            return run(tokens, None, doc_ids, positions)

    return hidden
