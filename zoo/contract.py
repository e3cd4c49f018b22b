"""What every block is: streaming state, cost, parallel plan, auxiliary losses.

A block maps x [B, T, D] to the increment y [B, T, D]; the graph adds norm and residual. This module knows
only torch, so that kernels, blocks, graph and foreign code can all speak the same language.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from zoo import row
from zoo.counts import Cost, Mode, linear_flops, part_cost  # noqa: F401  for blocks
from zoo.state import EmptyState, SharedKeys, State, StateList, counter, state_dtype  # noqa: F401  for blocks

OUTPUTS = ("o_proj", "out_proj", "linear_out", "out_projection")  # names of the last linear layer of a mixer


# ------------------------------------------------------------------------------------- parallel plan
@dataclass(frozen=True)
class ParallelPlan:
    """How a block is split. `tensor` maps parameters or modules below it to `column`, `row`, `expert`, `replicate`,
    or `once` (held by all, added by all: each adds its part); the tensor-parallel degree must divide `units` (heads,
    channels, experts). A split block sees its share of the parameters and computes a part of its increment: it takes
    numbers of heads from shapes, and parts of what all ranks have by `own_part`. `context` says what
    is exchanged when the sequence is cut over ranks: `token` (nothing), `gather_kv`, `pass_state`, `halo` (the ops
    that the block runs on do it, or the block by `zoo.row`); `gather_input`: every rank computes the block on the
    whole row and keeps its part, which is right for every block and saves nothing; `none`: it cannot be, with the
    `reason`."""

    tensor: Mapping[str, str] = field(default_factory=dict)
    units: int = 1
    context: Literal["token", "gather_kv", "pass_state", "halo", "gather_input", "none"] = "gather_input"
    reason: str = ""


# ---------------------------------------------------------------------------------- auxiliary losses
class _AuxiliaryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.like = (loss.shape, loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        shape, dtype, device = ctx.like
        return grad, torch.full(shape, ctx.scale, dtype=dtype, device=device), None


_auxiliary_scale = 1.0


def set_auxiliary_scale(scale: float) -> None:
    """Weight of every auxiliary loss in the gradient. A trainer that sums gradients over ranks and
    accumulation steps sets 1 / (ranks * steps)."""
    global _auxiliary_scale
    _auxiliary_scale = float(scale)


@contextlib.contextmanager
def weighted_auxiliary(weight: float) -> Iterator[None]:
    """Inside, auxiliary losses count `weight` times as much: those of a part of what is trained at once."""
    global _auxiliary_scale
    before, _auxiliary_scale = _auxiliary_scale, _auxiliary_scale * weight
    try:
        yield
    finally:
        _auxiliary_scale = before


def add_auxiliary_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Return `x` unchanged; in backward, the gradient of the scalar `loss` is added. So the loss survives
    pipeline stages, compilation and any foreign trainer."""
    return _AuxiliaryLoss.apply(x, loss, _auxiliary_scale) if loss.requires_grad else x


# ----------------------------------------------------------------------------------- several processes
_part: tuple[int, int] = (0, 1)


@contextlib.contextmanager
def one_part(number: int, count: int) -> Iterator[None]:
    """Inside, a block computes one of `count` parts of its increment. Auxiliary losses, which every part adds, count
    that much less."""
    global _part
    before, _part = _part, (number, count)
    try:
        with weighted_auxiliary(1 / count):
            yield
    finally:
        _part = before


def own_part(t: Tensor, dim: int = -1) -> Tensor:
    """What belongs to the heads or experts of this part, of a tensor that has all of them along `dim`."""
    number, count = _part
    return t if count == 1 else t.chunk(count, dim)[number]


_reduction: Callable[[Tensor], Any] | None = None


def set_reduction(reduce: Callable[[Tensor], Any] | None) -> None:
    """`reduce(counts)` adds up, in place, what ranks that hold different tokens have counted; None: there are none."""
    global _reduction
    _reduction = reduce


def counted_by_all(counts: Tensor) -> Tensor:
    """Counts over the tokens of all ranks, for statistics of a batch that must not depend on how it is spread."""
    if _reduction is None:
        return counts
    total = counts.detach().clone()
    _reduction(total)
    return total


def mean_over_all(total: Tensor, count: Tensor) -> Tensor:
    """`total` / `count` over the tokens of all ranks, from the sums of each over its own. Of any function of it, linear
    or not, the mean over ranks of the gradients is the gradient of the whole batch."""
    if _reduction is None:
        return total / count
    sums, counts, ranks = counted_by_all(torch.stack([total.detach(), count.to(total.dtype), torch.ones_like(total)]))
    own = total * ranks / counts
    return own + (sums / counts - own).detach()


# ------------------------------------------------------------------------------------- initialisation
class DrawsItself(type):
    """Of a module built on a real device every parameter is drawn, as in any torch module; `reset_parameters` is
    called once, after the whole `__init__`, so subclasses may extend both. On the meta device nothing happens."""

    draws_itself = True

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        module = super().__call__(*args, **kwargs)
        if not any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            module.reset_parameters()
        return module


# --------------------------------------------------------------------------------------------- block
class Block(nn.Module, metaclass=DrawsItself):
    """Base of mixers, FFNs and memories. `forward(x, *, state=None, positions=None, doc_ids=None) -> y`.

    x, y: [B, T, D]. state: from `init_state`, updated in place, rows continue where they stopped.
    positions: [B, T] int64, used for rotary angles (default: 0.. or continuing the state). doc_ids: [B, T]
    int64, equal ids are contiguous and form one document that sees only itself; not together with `state`.
    Subclasses draw parameters in `reset_parameters`, never in `__init__`, and keep inference behaviour
    in `eval()` strictly causal where `causal` is true.
    """

    causal: bool = True
    scans: ClassVar[bool] = True  # its state is of attention or of a scan, whose results selective checkpointing keeps
    interval: ClassVar[int] = 64  # tokens between the states that a scan on a CPU keeps
    # why the gradient of a later segment does not reach an earlier one through the state, also not in
    # `zoo.segments.differentiable_states`; empty: it does
    cuts_gradient: str = ""
    shares_keys: bool = False  # takes a SharedKeys in the place of its state; then it has `write_keys`
    # names of own parameters, for trainers; modules inside a block declare theirs by the same attributes
    not_decayed: ClassVar[tuple[str, ...]] = ()  # spared by weight decay, as every vector is
    matrices: ClassVar[tuple[str, ...]] = ()  # [n, rows, columns]: n maps of hidden vectors, as weights of a linear are

    def __init__(self, dim: int):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}")
        self.dim = dim

    def reset_parameters(self) -> None:
        """Draw every parameter and fill every buffer of this block; safe after `to_empty`."""
        raise NotImplementedError(f"{type(self).__name__}.reset_parameters")

    def init_state(self, batch_size: int, max_len: int | None = None) -> State:
        """State for `batch_size` rows of up to `max_len` tokens (None: grows as needed)."""
        return EmptyState()

    @property
    def sees_blocks(self) -> bool:
        """Whether block diffusion may let a token see its whole block: every token is treated alone, or the mixing
        is attention over a `KVCache` that takes `TwoCopies` for document ids."""
        return isinstance(self.init_state(1, 1), EmptyState)

    @property
    def assumption(self) -> str:
        """In words, what predicted costs take for granted where the work depends on what the tokens are; then what a
        call with a state executes is at most what they say."""
        return ""

    @property
    def expectation(self) -> str:
        """In words, what predicted bytes and useful work take for granted where they depend on what the tokens are."""
        return ""

    # cost, in parts that a block overrides
    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        """Executed matrix FLOPs of one forward of `seq_len` tokens per row, `context_len` tokens being in
        the state already (`streaming`: a state is given)."""
        raise NotImplementedError(f"{type(self).__name__}.forward_flops")

    def useful_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        """Matrix FLOPs of one forward that the mathematics needs (see `Cost`); by default those that are executed."""
        return self.forward_flops(batch_size, seq_len, context_len, context_len > 0)

    def vector_flops(self, batch_size: int, seq_len: int, context_len: int = 0) -> int:
        """Work of one forward outside matrix products (see `Cost`); by default one operation for each element that is
        kept for backward."""
        return self.activation_elements(batch_size, seq_len)

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        """Equals `init_state(batch_size, max_len).max_nbytes`."""
        return 0

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        """Elements kept for backward by one training forward, x among them where it is kept: those that the CPU's
        kernels keep in float32. An int64 counts as two, a bool as a quarter."""
        raise NotImplementedError(f"{type(self).__name__}.activation_elements")

    def product_elements(self, batch_size: int, seq_len: int) -> int:
        """Elements of the results of matrix products, attention and scans in one training forward: by default those of
        linear layers, what the output projection reads and, of a state that does not grow, one every `interval` tokens
        and the last."""
        linears = {name: m for name, m in self.named_modules() if isinstance(m, nn.Linear)}
        token = sum(m.out_features for m in linears.values())
        size = self.state_bytes(1, 1) if self.scans else 0
        if size:
            output = next((linears[name] for name in OUTPUTS if name in linears), None)
            token += (output.in_features if output else self.dim) + getattr(self, "num_heads", 0)
        grows = not size or self.state_bytes(1, 4096) > size
        states = 0 if grows else size // state_dtype(self.reference_parameter.dtype).itemsize
        return batch_size * (seq_len * token + states * (-(-seq_len // self.interval) + 1))

    def copies_elements(self, batch_size: int, seq_len: int, causal: bool) -> tuple[int, int]:
        """What a training forward over a noisy and a clean copy of rows of `seq_len` tokens (`TwoCopies`) keeps beyond
        that of a row twice as long: elements in all, and of these results of products and attention."""
        return 0, 0

    def unread_bytes(self, batch_size: int, seq_len: int, context_len: int) -> int:
        """Of the state after `context_len` tokens, what `seq_len` more leave unread because they choose their keys."""
        return 0

    def pieces(self, seq_len: int, streaming: bool = False) -> int:
        """Pieces of a row that a call works through one after another, launching its operations for each; `streaming`:
        after tokens that a state holds."""
        return 1

    def active_params(self) -> int:
        """Parameters one token touches."""
        return sum(p.numel() for p in self.parameters())

    def cost(self, batch_size: int, seq_len: int, context_len: int = 0, mode: Mode = "train") -> Cost:
        """See `Cost`. `context_len` tokens precede the `seq_len` tokens of each row."""
        streaming = mode == "decode" or context_len > 0
        forward = self.forward_flops(batch_size, seq_len, context_len, streaming)
        params = sum(p.numel() for p in self.parameters())
        itemsize = self.itemsize
        stream = batch_size * seq_len * self.dim * itemsize
        state = self.state_bytes(batch_size, context_len + seq_len) if mode != "train" else 0
        before = self.state_bytes(batch_size, context_len) if state and context_len else 0
        unread = self.unread_bytes(batch_size, seq_len, context_len) if before else 0
        # what is appended; of a full ring as many slots; a state that does not grow changes as a whole
        added = state - before or min(state, self.state_bytes(batch_size, seq_len))
        kept = self.activation_elements(batch_size, seq_len) * itemsize if mode == "train" else 0
        passes = 3 if mode == "train" else 1
        return Cost(
            params=params,
            active_params=self.active_params(),
            flops=passes * forward,
            bytes_read=passes * (params * itemsize + stream) + before - unread + kept,
            bytes_written=passes * stream + added + kept,
            activation_bytes=kept,
            state_bytes=state,
            useful_flops=passes * self.useful_flops(batch_size, seq_len, context_len),
            vector_flops=passes * self.vector_flops(batch_size, seq_len, context_len),
            product_bytes=self.product_elements(batch_size, seq_len) * itemsize if mode == "train" else 0,
            calls=1,
            pieces=self.pieces(seq_len, context_len > 0),
        )

    def parallel_plan(self) -> ParallelPlan:
        """How this block is split over ranks."""
        return ParallelPlan(reason="no plan was written for this block")

    # conveniences
    @property
    def reference_parameter(self) -> Tensor:
        """A tensor whose dtype and device new state follows."""
        for t in self.parameters():
            return t
        for t in self.buffers():
            return t
        return torch.empty(0)

    @property
    def itemsize(self) -> int:
        return self.reference_parameter.element_size()


def refuse_packed_streaming(state: State | None, doc_ids: object) -> None:
    """Raise ValueError where both a state and document ids are given."""
    if state is not None and doc_ids is not None:
        raise ValueError("doc_ids with a state: stream one document per row, or pack documents without a state")


def positions_from(doc_ids: Tensor | None, batch_size: int, seq_len: int, device: torch.device) -> Tensor:
    """Position [B, T] of each token inside its document; its place in the row where there are no documents."""
    return row.positions(doc_ids, batch_size, seq_len, device)


def init_linear_(linear: nn.Linear, gain: float = 1.0) -> None:
    """Weight ~ truncated normal of std gain / sqrt(fan_in), bias zero."""
    std = gain / linear.in_features**0.5
    nn.init.trunc_normal_(linear.weight, std=std, a=-3 * std, b=3 * std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


# -------------------------------------------------------------------------------------------- router
@dataclass
class Pick:
    """Tokens that take a step: `index` [B, k] ascending (the same number in every row), or `mask` [B, T],
    or neither for all of them."""

    index: Tensor | None = None
    mask: Tensor | None = None


class Router(nn.Module, metaclass=DrawsItself):
    """Decides which tokens run which step of a loop (`nested`: among those still running) or which body of a
    route. The combinator calls `start`, then for each step `pick` and `advance`, then `finish`.

    `streaming` is true where rows arrive in segments: then, and in `eval()`, a choice may depend on the token
    itself and its past only, so that any cut of the sequence gives the same result.
    """

    causal: bool = True
    reads_all: bool = False  # tokens that do not take a body leave it their keys all the same
    # whether every token of a row takes the same steps, and nothing is learnt or drawn that depends on the row
    takes_all: bool = False
    segmented: bool = False  # whether training chooses for a row in segments what it chooses for the whole row

    def __init__(self, dim: int, steps: int, nested: bool):
        super().__init__()
        self.dim, self.steps, self.nested = dim, steps, nested

    def reset_parameters(self) -> None:
        """Draw every parameter."""

    def start(self, x: Tensor) -> dict[str, Tensor]:
        """What is carried through the steps, from the input x [B, T, D]."""
        return {}

    def pick(self, step: int, x: Tensor, carry: dict[str, Tensor], streaming: bool) -> Pick:
        """The tokens that take this step."""
        return Pick()

    def advance(self, step: int, x: Tensor, increment: Tensor, carry: dict[str, Tensor]) -> Tensor:
        """The stream after a step; `increment` [B, T, D] is zero at tokens that did not take it."""
        return x + increment

    def finish(self, x: Tensor, carry: dict[str, Tensor]) -> Tensor:
        """The output stream."""
        return x

    def share(self, step: int) -> float:
        """Expected share of tokens that take a step: what predicted costs assume."""
        return 1.0

    @property
    def assumption(self) -> str:
        """In words, what `share` takes for granted, where tokens may do otherwise."""
        shares = [self.share(step) for step in range(self.steps)]
        if all(share in (0, 1) for share in shares):
            return ""
        what = "steps" if self.nested else "bodies"
        return f"{what} are taken by {', '.join(f'{share:.3g}' for share in shares)} of the tokens"

    def step_flops(self, tokens: int) -> int:
        """Matrix FLOPs of all decisions for `tokens` tokens."""
        return sum(2 * tokens * p.numel() for n, p in self.named_parameters() if n.endswith("weight"))

    def activation_elements(self, tokens: int, entered: bool = False) -> int:
        """Elements that all decisions and the weights of increments keep for backward. `entered`: something is added to
        the stream in front of each step, so that a step does not keep the stream as the step before left it."""
        return 0

    def step_vector_flops(self, tokens: int) -> int:
        """Work outside matrix products of all decisions and of the weights of increments: by default the activation of
        one score a step, its product with the increment, and their sum with the stream."""
        return tokens * self.steps * (1 + 2 * self.dim)
