"""Variants of the toy block that are broken in one way each, with the checks that must notice."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import nn
from toy_block import Toy, ToyState

from zoo.contract import ParallelPlan
from zoo.registry import register

SAME = dict(kind="mixer", ops=("short_conv",), state_growth="constant", examples=({}, {"width": 3, "gate": True}))
BROKEN: dict[str, tuple[type, set[str], str]] = {}  # class, checks, part of the message where the block crashes


def breaks(*checks: str, crash: str = "", **changes):
    """Register a broken variant of the toy, and name the checks of which every one must fail."""

    def add(cls: type) -> type:
        name = cls.__name__.lower()
        register(name, **{**SAME, **changes})(cls)
        BROKEN[name] = (cls, set(checks), crash)
        return cls

    return add


def bad_state(**methods):
    """Replace methods of the toy's state, only in blocks whose init_state uses the returned class."""
    return type("BadState", (ToyState,), methods)


@breaks("causal")
class Future(Toy):
    def decay(self, doc_ids, length, like):
        weight = super().decay(doc_ids, length, like)
        return weight + 0.1 * weight.transpose(-1, -2)


@breaks("packing", "documents_apart")
class LeaksDocuments(Toy):
    def decay(self, doc_ids, length, like):
        return super().decay(None, length, like)


@breaks("documents_apart")
class CountsPositionsOverDocuments(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        if positions is None and state is None:
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return super().forward(x, state=state, positions=positions, doc_ids=doc_ids)


@breaks("batch_independence")
class MixesBatch(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        y = super().forward(x, state=state, positions=positions, doc_ids=doc_ids)
        return y + 0.1 * y.mean(0)


@breaks("mixes", kind="mixer")
class MovesNothing(Toy):
    def decay(self, doc_ids, length, like):
        return torch.eye(length, dtype=like.dtype)

    def __init__(self, dim, *, width: int = 1, gate: bool = False, device=None, dtype=None):
        super().__init__(dim, width=1, gate=gate, device=device, dtype=dtype)


@breaks("speaks")
class Silent(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        return 0 * super().forward(x, state=state, positions=positions, doc_ids=doc_ids)


@breaks("flops_prefill")
class WrongFlops(Toy):
    def forward_flops(self, batch_size, seq_len, context_len=0, streaming=False):
        return super().forward_flops(batch_size, seq_len) + 1


@breaks("flops_decode")
class WrongDecodeFlops(Toy):
    def forward_flops(self, batch_size, seq_len, context_len=0, streaming=False):
        return super().forward_flops(batch_size, seq_len) + context_len


@breaks("flops_prefill")
class WrongTrainFlops(Toy):
    def cost(self, batch_size, seq_len, context_len=0, mode="train"):
        cost = super().cost(batch_size, seq_len, context_len, mode)
        return cost.replace(flops=cost.flops // 3 * 2) if mode == "train" else cost


@breaks("useful_work")
class MoreUsefulThanDone(Toy):
    def useful_flops(self, batch_size, seq_len, context_len=0):
        return super().useful_flops(batch_size, seq_len, context_len) + 1


@breaks("useful_work")
class NoVectorWork(Toy):
    def vector_flops(self, batch_size, seq_len, context_len=0):
        return 0


@breaks("useful_work")
class WrongVectorTraining(Toy):
    def cost(self, batch_size, seq_len, context_len=0, mode="train"):
        cost = super().cost(batch_size, seq_len, context_len, mode)
        return cost.replace(vector_flops=1000)


@breaks("parameters")
class WrongParams(Toy):
    def cost(self, batch_size, seq_len, context_len=0, mode="train"):
        return super().cost(batch_size, seq_len, context_len, mode).replace(params=7)


@breaks("parameters")
class TooManyActive(Toy):
    def active_params(self):
        return super().active_params() + 1


@breaks("state_size")
class WrongStateBytes(Toy):
    def state_bytes(self, batch_size, max_len):
        return super().state_bytes(batch_size, max_len) + 8


@breaks("state_size", state_growth="none")
class StatelessLie(Toy):
    pass


@dataclass
class SpareState(ToyState):
    spare: torch.Tensor


@breaks("state_size")
class LinearLie(Toy):
    def init_state(self, batch_size, max_len=None):
        spare = torch.zeros(batch_size, max_len or 1, device=self.conv.device)
        return SpareState(**vars(super().init_state(batch_size, max_len)), spare=spare)

    def state_bytes(self, batch_size, max_len):
        return super().state_bytes(batch_size, max_len) + batch_size * 4 * max_len


@breaks("state_stays_small")
class Hoards(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        y = super().forward(x, state=state, positions=positions, doc_ids=doc_ids)
        if state is not None:
            state.conv = torch.cat([state.conv, state.conv], 1)[:, : state.conv.shape[1] + 1].roll(1, 1)
        return y


@breaks("activations")
class WrongActivations(Toy):
    def activation_elements(self, batch_size, seq_len):
        return batch_size * seq_len


@breaks("meta_cost")
class CostReadsWeights(Toy):
    def activation_elements(self, batch_size, seq_len):
        return super().activation_elements(batch_size, seq_len) + int(self.conv.device.type == "cpu")


@breaks("every_width", crash="dim must be 64")
class OneWidth(Toy):
    def __init__(self, dim, *, width: int = 4, gate: bool = False, device=None, dtype=None):
        if dim != 64:
            raise ValueError("dim must be 64")
        super().__init__(dim, width=width, gate=gate, device=device, dtype=dtype)


@breaks("segments", "rows_apart", "reorder", "rollback", "reset_state", "gathered_segments")
class WrongDecay(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        y = super().forward(x, state=state, positions=positions, doc_ids=doc_ids)
        if state is not None:
            state.sum *= 1.001
        return y


@breaks("long_segments")
class ForgetsLate(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        if state is not None and state.seen.max() > 100:
            state.sum *= 0.9
        return super().forward(x, state=state, positions=positions, doc_ids=doc_ids)


@breaks("plan")
class NoPlan(Toy):
    def parallel_plan(self):
        return ParallelPlan()


@breaks("plan")
class WrongPlan(Toy):
    def parallel_plan(self):
        return ParallelPlan({"v_proj": "column", "o_porj": "row"}, units=self.dim, context="pass_state")


@breaks("plan")
class HalfPlan(Toy):
    def parallel_plan(self):
        return ParallelPlan({"v_proj": "column", "o_proj": "row"}, units=self.dim, context="pass_state")


@breaks("card")
class NoDocstring(Toy):
    pass


@breaks("card", causal=False)
class NoReason(Toy):
    """A block that is not causal and does not say why."""


class Width(int):
    """An integer that YAML does not know."""


@breaks("yaml_round_trip", crash="cannot represent", examples=({"width": Width(5)},))
class OptionsOfPython(Toy):
    pass


@breaks("segments", "gathered_segments")
class SinglePrecision(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        y = super().forward(x, state=state, positions=positions, doc_ids=doc_ids)
        if state is not None:
            state.sum.copy_(state.sum.float())
        return y


@breaks("rows_apart", "reorder", "reset_state")
class HostCounter(Toy):
    seen = 0

    def init_state(self, batch_size, max_len=None):
        self.seen = 0
        return super().init_state(batch_size, max_len)

    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        if state is not None and positions is None:
            positions = torch.arange(self.seen, self.seen + x.shape[1]).expand(x.shape[:2])
            self.seen += x.shape[1]
        return super().forward(x, state=state, positions=positions, doc_ids=doc_ids)


@breaks("rollback", "clone")
class SharedClones(Toy):
    def init_state(self, batch_size, max_len=None):
        state = super().init_state(batch_size, max_len)
        return bad_state(clone=lambda s: s, snapshot=lambda s: s)(state.sum, state.conv, state.seen)


@breaks("reset_state")
class ForgetsToReset(Toy):
    def init_state(self, batch_size, max_len=None):
        state = super().init_state(batch_size, max_len)
        return bad_state(reset=lambda s, rows=None: s.sum.zero_())(state.sum, state.conv, state.seen)


@breaks("state_in_place")
class Rebinds(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        y = super().forward(x, state=state, positions=positions, doc_ids=doc_ids)
        if state is not None:
            state.sum = state.sum.clone()
        return y


@breaks("state_overflow", state_growth="linear")
class SilentOverflow(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        if state is not None and getattr(state, "room", 16) < int(state.seen.max()) + x.shape[1]:
            state.sum.zero_()
        return super().forward(x, state=state, positions=positions, doc_ids=doc_ids)

    def init_state(self, batch_size, max_len=None):
        state = super().init_state(batch_size, max_len)
        state.room = max_len or 10**9
        return state


@breaks("carried_gradients")
class CutsGradients(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        y = super().forward(x, state=state, positions=positions, doc_ids=doc_ids)
        if state is not None:
            state.sum.copy_(state.sum.detach())
        return y


@breaks("segment_gradients")
class DetachedStream(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        x = x if state is None else x.detach()
        return super().forward(x, state=state, positions=positions, doc_ids=doc_ids)


@breaks("packed_streaming")
class AcceptsBoth(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        return super().forward(x, state=state, positions=positions, doc_ids=None if state is not None else doc_ids)


@breaks("gathered_segments")
class IgnoresPositionsInStream(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        return super().forward(x, state=state, positions=None if state is not None else positions, doc_ids=doc_ids)


@breaks("positions")
class PositionsOfRowZero(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        positions = None if positions is None else positions[:1].expand_as(positions)
        return super().forward(x, state=state, positions=positions, doc_ids=doc_ids)


@breaks("positions", "documents_apart")
class PositionsFromOne(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        positions = None if positions is None else positions + 1
        return super().forward(x, state=state, positions=positions, doc_ids=doc_ids)


@breaks("init_on_meta", "shapes_and_dtypes")
class Uninitialised(Toy):
    def reset_parameters(self):
        for linear in (self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=0.1)
        self.conv.data[:, 1:] = 0.3


@breaks("init_on_meta")
class DrawsInConstructor(Toy):
    def __init__(self, dim, *, width: int = 4, gate: bool = False, device=None, dtype=None):
        super().__init__(dim, width=width, gate=gate, device=device, dtype=dtype)
        self.extra = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        return super().forward(x, state=state, positions=positions, doc_ids=doc_ids) * self.extra


@breaks("init_on_meta")
class BufferOnce(Toy):
    def __init__(self, dim, *, width: int = 4, gate: bool = False, device=None, dtype=None):
        super().__init__(dim, width=width, gate=gate, device=device, dtype=dtype)
        self.register_buffer("order", torch.arange(dim, device=device), persistent=False)


@breaks("init_on_meta")
class PlainTensor(Toy):
    def __init__(self, dim, *, width: int = 4, gate: bool = False, device=None, dtype=None):
        super().__init__(dim, width=width, gate=gate, device=device, dtype=dtype)
        self.table = torch.arange(dim)


@breaks("state_dict")
class Unsaved(Toy):
    def __init__(self, dim, *, width: int = 4, gate: bool = False, device=None, dtype=None):
        super().__init__(dim, width=width, gate=gate, device=device, dtype=dtype)
        self.register_buffer("sign", torch.empty(dim, device=device, dtype=dtype), persistent=False)

    def reset_parameters(self):
        super().reset_parameters()
        self.sign.copy_(torch.randn(self.dim).sign())

    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        return super().forward(x, state=state, positions=positions, doc_ids=doc_ids) * self.sign


@breaks("gradient_reaches")
class DeadParameter(Toy):
    def __init__(self, dim, *, width: int = 4, gate: bool = False, device=None, dtype=None):
        super().__init__(dim, width=width, gate=gate, device=device, dtype=dtype)
        self.dead = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.ones_(self.dead)


@breaks("copies", crash="graph leaves")
class KeepsGraph(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        y = super().forward(x, state=state, positions=positions, doc_ids=doc_ids)
        self.last = y
        return y


@breaks("copies", crash="cannot pickle")
class HoldsLock(Toy):
    def __init__(self, dim, *, width: int = 4, gate: bool = False, device=None, dtype=None):
        super().__init__(dim, width=width, gate=gate, device=device, dtype=dtype)
        self.lock = threading.Lock()


@breaks("copies")
class SharesOnCopy(Toy):
    def __deepcopy__(self, memo):
        return self


@breaks("shapes_and_dtypes")
class ReturnsFloat32(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        y = super().forward(x, state=state, positions=positions, doc_ids=doc_ids)
        return y.float() if x.dtype == torch.bfloat16 else y


@breaks("shapes_and_dtypes")
class CrudeInHalf(Toy):
    def decay(self, doc_ids, length, like):
        weight = super().decay(doc_ids, length, like)
        return weight if self.conv.dtype != torch.bfloat16 else (weight * 4).round() / 4


@breaks("shapes_and_dtypes")
class ReadsFreshMemory(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        y = super().forward(x, state=state, positions=positions, doc_ids=doc_ids)
        return y + 0 * torch.empty(x.shape[-1], dtype=x.dtype)


@breaks("autocast", crash="must have the same scalar type")
class NoAutocast(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        y = super().forward(x, state=state, positions=positions, doc_ids=doc_ids)
        return y.index_add(1, torch.zeros(1, dtype=torch.long), x[:, :1])


@breaks("recompute")
class CountsSteps(Toy):
    def __init__(self, dim, *, width: int = 4, gate: bool = False, device=None, dtype=None):
        super().__init__(dim, width=width, gate=gate, device=device, dtype=dtype)
        self.register_buffer("steps", torch.zeros((), device=device))

    def reset_parameters(self):
        super().reset_parameters()
        self.steps.zero_()

    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        if self.training:
            self.steps.add_(1)
        return super().forward(x, state=state, positions=positions, doc_ids=doc_ids)


@breaks("compiles", "compiles_backward", "exports", crash="data-dependent")
class LooksAtData(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        x = x if x.abs().max().item() < 1e9 else x / 2
        return super().forward(x, state=state, positions=positions, doc_ids=doc_ids)


@breaks("options_are_typed", crash="must be keyword-only")
class UntypedOption(Toy):
    def __init__(self, dim, *, width=4, gate: bool = False, device=None, dtype=None):
        super().__init__(dim, width=width, gate=gate, device=device, dtype=dtype)


@breaks("kernel_option")
class AnyKernel(Toy):
    def __init__(self, dim, *, width: int = 4, gate: bool = False, kernel: str = "auto", device=None, dtype=None):
        super().__init__(dim, width=width, gate=gate, device=device, dtype=dtype)


@breaks("segments", crash="did you mean width", examples=({"widht": 3},))
class WrongExample(Toy):
    pass


@breaks("fast_paths", crash="unknown op", ops=("no_such_op",))
class UnknownOp(Toy):
    pass


@breaks("relations", relations=("falserelation(width=4) == toy(width=4)",))
class FalseRelation(Toy):
    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        return 1.01 * super().forward(x, state=state, positions=positions, doc_ids=doc_ids)


@breaks("relations", relations=("shapelessrelation(width=4) == shapelessrelation(width=3)",))
class ShapelessRelation(Toy):
    pass


@breaks("relations", relations=("missingrelation() == missingrelation(gate=True)",))
class MissingRelation(Toy):
    pass
