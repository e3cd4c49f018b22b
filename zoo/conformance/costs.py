"""What a block says of its cost against what a run counts."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.conformance.kept import kept_bytes
from zoo.conformance.law import carries, streams
from zoo.conformance.report import Failure, check
from zoo.conformance.subject import DIM, Subject, tokens
from zoo.kernels.dispatch import rows

SMALL = 4096  # bytes of constants and indices that no formula names
GROWTH = ("none", "constant", "window", "linear")


def _equal(got: int, want: int, what: str) -> None:
    if got != want:
        raise Failure(f"{what}: cost says {got:,}, the run says {want:,}")


@torch.no_grad()
def counted(block, x: torch.Tensor, **given) -> int:
    """Matrix FLOPs that torch's counter sees in one forward."""
    if importlib.util.find_spec("zoo.kernels.flops"):
        importlib.import_module("zoo.kernels.flops")  # formulas that torch lacks
    with FlopCounterMode(display=False) as counter:
        block(x, **given)
    return counter.get_total_flops()


@check()
def parameters(subject: Subject) -> None:
    """cost().params counts the parameters; active ones are some of them."""
    block = subject.create()
    count = sum(p.numel() for p in block.parameters())
    for mode in ("train", "prefill", "decode"):
        cost = block.cost(2, 16, 0, mode)
        _equal(cost.params, count, f"params in {mode}")
        if not 0 <= cost.active_params <= count or (count and not cost.active_params):
            raise Failure(f"active_params is {cost.active_params} of {count}")
        if min(cost.bytes_read, cost.bytes_written) <= 0:
            raise Failure(f"bytes_read {cost.bytes_read} and bytes_written {cost.bytes_written} must be positive")


@check()
def flops_prefill(subject: Subject) -> None:
    """cost().flops equals the counted run of a stateless forward; training is three times that."""
    block = subject.build(torch.float32)
    for batch, length in ((1, 1), (2, 37), (1, 64), (3, 100)):
        x = tokens(batch, length, torch.float32)
        said = block.cost(batch, length, 0, "prefill").flops
        _equal(said, counted(block, x), f"prefill FLOPs of {batch} x {length} tokens")
        _equal(block.cost(batch, length, 0, "train").flops, 3 * said, f"train FLOPs of {batch} x {length} tokens")


@check(needs=streams)
def flops_decode(subject: Subject) -> None:
    """cost().flops equals the counted run with a state, for one token and for segments, at any context; it is no less
    where the block says what it takes for granted."""
    block = subject.build(torch.float32)
    for batch, length, context in ((2, 1, 0), (1, 1, 1), (2, 1, 37), (2, 5, 20), (1, 1, 80), (1, 33, 64)):
        x = tokens(batch, context + length, torch.float32)
        state = block.init_state(batch, context + length)
        if context:
            with torch.no_grad():
                block(x[:, :context], state=state)
        said = block.cost(batch, length, context, "decode").flops
        seen = counted(block, x[:, context:], state=state)
        if block.assumption and seen <= said:
            continue
        _equal(said, seen, f"decode FLOPs of {batch} x {length} tokens after {context}")


@check()
def useful_work(subject: Subject) -> None:
    """Of 64 tokens and more no more matrix work is useful than is executed; there is work beside it; training is three
    times both."""
    block = subject.create(device="meta")
    for batch, length in ((1, 64), (2, 100), (1, 777)):
        cost, train = (block.cost(batch, length, 0, mode) for mode in ("prefill", "train"))
        what = f"{batch} x {length} tokens"
        if not bool(cost.flops) <= cost.useful_flops <= cost.flops:
            raise Failure(f"useful_flops of {what}: {cost.useful_flops:,} of {cost.flops:,} executed ones")
        if cost.vector_flops <= 0:
            raise Failure(f"vector_flops of {what}: {cost.vector_flops:,}")
        _equal(train.useful_flops, 3 * cost.useful_flops, f"useful train FLOPs of {what}")
        _equal(train.vector_flops, 3 * cost.vector_flops, f"vector train FLOPs of {what}")


@check(needs=streams)
@torch.no_grad()
def state_size(subject: Subject) -> None:
    """state_bytes equals the state's max_nbytes and, once it is full, its nbytes; it grows no faster than the card
    says."""
    for dtype in (torch.float32, torch.bfloat16):
        block = subject.create(dtype).eval()
        for batch, length in ((1, 1), (2, 37), (3, 100)):
            state = block.init_state(batch, length)
            what = f"state bytes of {batch} rows, max_len {length}, {dtype}"
            _equal(block.state_bytes(batch, length), state.max_nbytes, what)
            _equal(block.cost(batch, 1, length - 1, "decode").state_bytes, state.max_nbytes, what + " (cost)")
            block(tokens(batch, length, dtype), state=state)
            _equal(block.state_bytes(batch, length), state.nbytes, what + " after use")
    growth, block = subject.registration.state_growth, subject.create(device="meta")
    short, long, longer = (block.init_state(2, n).max_nbytes for n in (1000, 500_000, 1_000_000))
    _equal(block.state_bytes(2, 500_000), long, "state bytes of max_len 500000 on meta")
    found = "none" if longer == 0 else "constant" if short == longer else "window" if long == longer else "linear"
    if GROWTH.index(found) > GROWTH.index(growth):
        raise Failure(
            f"state_growth is {growth!r}, but the state's bytes grow like {found!r}: {short}, {long}, {longer}"
        )


@check(needs=lambda r: carries(r) and r.state_growth in ("constant", "window"))
@torch.no_grad()
def state_stays_small(subject: Subject) -> None:
    """A state that is not said to grow holds no more bytes after many tokens, with max_len None."""
    block = subject.create().eval()
    state, sizes = block.init_state(1, None), []
    for length in (300, 300, 300):
        block(tokens(1, length, torch.float32), state=state)
        sizes.append(state.nbytes)
    if sizes[1] != sizes[2]:
        raise Failure(f"bytes after 300, 600 and 900 tokens: {sizes}; the state grows without end")


@check()
def activations(subject: Subject) -> None:
    """activation_bytes is within 5 % of what a forward in training leaves in memory for its backward, its input with it
    (on a machine where a native core cannot be built, the portable forms may keep more; a block that says what it
    takes for granted may keep less)."""
    portable = any(
        row.backend == "native" and row.objection(torch.device("cpu"), torch.float32)
        for op in subject.registration.ops
        for row in rows(op)
    )
    block = subject.build(torch.float32).train()
    for length in (100, 257):
        x = tokens(2, length, torch.float32).requires_grad_()
        seen = kept_bytes(lambda x=x: block(x.clone()), [x, *block.parameters(), *block.buffers()])
        said = block.cost(2, length, 0, "train").activation_bytes
        spare = seen // 20 + SMALL
        if (said > seen + spare and not block.assumption) or (said < seen - spare and not portable):
            raise Failure(f"activation_bytes of 2 x {length} tokens: cost says {said:,}, a forward keeps {seen:,}")


@check()
def meta_cost(subject: Subject) -> None:
    """A block on the meta device (no memory) has the same cost."""
    real, meta = subject.create(), subject.create(device="meta")
    for mode in ("train", "prefill", "decode"):
        if real.cost(2, 48, 16, mode) != meta.cost(2, 48, 16, mode):
            raise Failure(f"{mode}: {meta.cost(2, 48, 16, mode)} on meta, {real.cost(2, 48, 16, mode)} on the CPU")
    if any(t.device.type != "meta" for t in [*meta.parameters(), *meta.buffers()]):
        raise Failure("device='meta' left tensors on another device")


@check(per_block=True)
def every_width(subject: Subject) -> None:
    """The block builds at widths 32 to 2048 without options that need no value, and knows its cost there."""
    from zoo.registry import options

    required = {o.name for o in options(subject.name).values() if o.required}
    bare = Subject(subject.name, subject.registration, {k: v for k, v in subject.options.items() if k in required})
    for dim in (32, DIM, 128, 256, 2048):
        cost = bare.create(dim=dim, device="meta").cost(1, 4096, 0, "train")
        if cost.flops < 0 or cost.activation_bytes <= 0:
            raise Failure(f"dim {dim}: {cost}")
    with torch.no_grad():
        block = bare.create(dim=32)
        y = block(tokens(2, 9, torch.float32, dim=32))
    if y.shape != (2, 9, 32):
        raise Failure(f"dim 32: output {tuple(y.shape)}, expected (2, 9, 32)")
