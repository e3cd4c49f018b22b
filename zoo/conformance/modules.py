"""A block is an ordinary module: dtypes, init on meta, copies, files, gradients."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import Tensor, nn

from zoo.conformance.cards import WITH_NORMS
from zoo.conformance.report import Failure, check
from zoo.conformance.subject import DIM, NO_GRADIENT, Subject, finite, gradients, same, tokens


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@check(kinds=WITH_NORMS)
@torch.no_grad()
def shapes_and_dtypes(subject: Subject) -> None:
    """x [B, T, D] gives y [B, T, D] in x's dtype: fp64, fp32, and bf16 near fp64."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        block = subject.build(dtype)
        for batch, length in ((1, 1), (3, 2), (2, 63)):
            x = tokens(batch, length, dtype)
            y = block(x)
            if y.shape != x.shape or y.dtype != dtype:
                raise Failure(f"x {tuple(x.shape)} {dtype} gave y {tuple(y.shape)} {y.dtype}")
            finite(y, f"output of {batch} x {length} tokens in {dtype}")
        if dtype == torch.float64 and (low := [n for n, p in block.named_parameters() if p.dtype != dtype]):
            raise Failure(f"dtype=torch.float64 left parameters {low} in another dtype")
    wide = subject.build()
    for p, q in zip(wide.parameters(), block.parameters(), strict=True):
        p.copy_(q)
    want = wide(x.double())
    error = (y.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-6)
    # the median over tokens: a router may choose otherwise for a few of them
    if not error.median() < 0.1:
        raise Failure(f"bf16: the median token is {error.median():.0%} off the fp64 output of the same weights")


@check(kinds=WITH_NORMS)
@torch.no_grad()
def speaks(subject: Subject) -> None:
    """The output is neither silent nor huge, and depends on the input."""
    block = subject.build()
    y, other = block(tokens(2, 40)), block(tokens(2, 40, seed=1))
    size = y.square().mean().sqrt().item()
    if not 1e-4 < size < 1e4:
        raise Failure(f"root mean square of the output is {size:.3g} for a unit normal input")
    if (y - other).abs().max() < 1e-6:
        raise Failure("two inputs give the same output")


@check(kinds=WITH_NORMS)
def init_on_meta(subject: Subject) -> None:
    """Meta build, to_empty, NaN everywhere, reset_parameters: the same module as built directly."""
    direct, block = subject.create(seed=3), subject.create(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for t in _tensors(block).values():
            t.fill_(float("nan") if t.is_floating_point() or t.is_complex() else 101 if t.dtype != torch.bool else True)
    for module in (direct, block):  # twice, because constructors of torch's layers draw too
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(3)
            module.reset_parameters()
    want = _tensors(direct)
    for name, t in _tensors(block).items():
        if not torch.equal(t, want[name]):
            raise Failure(f"{name} after to_empty and reset_parameters differs from that of a direct build")
        if bool(t.isnan().any()):
            raise Failure(f"{name} is NaN after reset_parameters")
    for prefix, module in block.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                raise Failure(f"{prefix}.{name} is a plain tensor attribute: make it a buffer, so that it moves along")
    x = tokens(2, 20, torch.float32)
    with torch.no_grad():
        same(block.eval()(x), direct.eval()(x), 0, "output of the re-initialised module")


@check(kinds=WITH_NORMS)
@torch.no_grad()
def state_dict(subject: Subject) -> None:
    """Saved weights, loaded strictly into another draw of the block, give the same output bit for bit."""
    block, other, file = subject.build(torch.float32, 1), subject.build(torch.float32, 2), io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = tokens(2, 30, torch.float32)
    same(other(x), block(x), 0, "output after loading the saved weights")


@check(kinds=WITH_NORMS)
def copies(subject: Subject) -> None:
    """deepcopy and pickle work after a training step and give an independent, equal module."""
    block, x = subject.build(torch.float32), tokens(2, 30, torch.float32)
    with torch.no_grad():
        y = block(x)
    block(x).sum().backward()  # a graph kept on the module would make it uncopyable
    twins = (("deepcopy", copy.deepcopy(block)), ("pickle", pickle.loads(pickle.dumps(block))))
    with torch.no_grad():
        for how, twin in twins:
            same(twin(x), y, 0, f"output of a {how}")
            for p in twin.parameters():
                p.zero_()
            same(block(x), y, 0, f"output of the original after its {how} was zeroed")


@check(kinds=WITH_NORMS)
def gradient_reaches(subject: Subject) -> None:
    """Every parameter gets a finite, nonzero gradient (class attribute `without_gradient`: name -> reason)."""
    block = subject.build().train()
    free = getattr(type(block), NO_GRADIENT, {})
    silent = {n for n, p in block.named_parameters() if p.requires_grad and n not in free}
    for seed in range(4):
        _, grads = gradients(block, tokens(2, 67, seed=seed))
        for name, g in grads.items():
            finite(g, f"gradient of {name}")
        largest = max(g.abs().max().item() for g in grads.values())
        silent = {n for n in silent if not grads[n].abs().max() > 1e-12 * largest}
        if not silent:
            return
    raise Failure(f"no gradient reaches {sorted(silent)}; if that is meant, say why in `{NO_GRADIENT}`")


@check(kinds=("norm",))
@torch.no_grad()
def any_leading_shape(subject: Subject) -> None:
    """A norm works on [..., dim] and treats each vector alone."""
    block, x = subject.build(), tokens(2, 12)
    y = block(x)
    same(block(x[1, 3]), y[1, 3], 1e-12, "one vector alone")
    same(block(x.view(2, 3, 4, DIM)), y.view(2, 3, 4, DIM), 1e-12, "input [2, 3, 4, dim]")
