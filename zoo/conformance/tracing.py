"""torch.compile, torch.export, activation checkpointing, autocast."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from zoo.conformance.cards import WITH_NORMS
from zoo.conformance.report import Failure, check
from zoo.conformance.subject import Subject, finite, gradients, same, tokens

TOLERANCE = 1e-10  # fp64


@check(kinds=WITH_NORMS, slow=True)
def compiles(subject: Subject) -> None:
    """torch.compile(fullgraph=True) traces the forward in one piece and computes the same."""
    block, x = subject.build(), tokens(2, 40)
    torch.compiler.reset()
    with torch.no_grad():
        got = torch.compile(block, fullgraph=True, backend="eager")(x)
        same(got, block(x), TOLERANCE, "compiled against eager")
    torch.compiler.reset()


@check(kinds=WITH_NORMS, slow=True, per_block=True)
def compiles_backward(subject: Subject) -> None:
    """Forward and backward through AOTAutograd compute the same as eager."""
    block, x = subject.build().train(), tokens(2, 40)
    torch.compiler.reset()
    want, want_grads = gradients(block, x)
    block.compile(fullgraph=True, backend="aot_eager")  # in place: names of parameters stay
    got, grads = gradients(block, x)
    torch.compiler.reset()
    same(got, want, TOLERANCE, "compiled output")
    for name, g in want_grads.items():
        same(grads[name], g, 1e-8, f"compiled gradient of {name}")


@check(kinds=WITH_NORMS, slow=True, per_block=True)
@torch.no_grad()
def exports(subject: Subject) -> None:
    """torch.export of the stateless forward computes the same."""
    block, x = subject.build(torch.float32), tokens(2, 40, torch.float32)
    program = torch.export.export(block, (x,))
    same(program.module()(x), block(x), 1e-5, "exported program against eager")


@check(kinds=WITH_NORMS)
def recompute(subject: Subject) -> None:
    """Activation checkpointing gives the same gradients, and leaves buffers as one plain step does."""
    plain, block, x = subject.build().train(), subject.build().train(), tokens(2, 40)
    want, want_grads = gradients(plain, x)
    got, grads = gradients(_Checkpointed(block), x)
    same(got, want, 0, "output under checkpoint")
    for name, g in want_grads.items():
        same(grads[name if name == "x" else f"block.{name}"], g, TOLERANCE, f"recomputed gradient of {name}")
    for (name, b), (_, other) in zip(block.named_buffers(), plain.named_buffers(), strict=True):
        if not torch.equal(b, other):
            raise Failure(f"buffer {name} differs after a recomputed step: the second forward changed it again")


class _Checkpointed(torch.nn.Module):
    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


@check(kinds=WITH_NORMS)
def autocast(subject: Subject) -> None:
    """bf16 autocast with fp32 weights runs forward and backward and stays near fp32."""
    block, x = subject.build(torch.float32), tokens(2, 40, torch.float32)
    with torch.no_grad():
        want = block(x)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(leaf)
    y.float().sum().backward()
    finite(y, "output under autocast")
    for name, p in block.named_parameters():
        if p.grad is not None:
            finite(p.grad, f"gradient of {name} under autocast")
    error = (y.float() - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-6)
    if not error.median() < 0.1:  # the median, as a router may choose otherwise for a few tokens
        raise Failure(f"under bf16 autocast the median token is {error.median():.0%} off fp32")
