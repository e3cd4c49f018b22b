"""One implementation of an op against another: values and gradients, judged by the precision of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# largest error relative to the largest value of the tensor; sums over a few hundred terms in another order
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def _floats(values: Any) -> list[Tensor]:
    values = values if isinstance(values, (tuple, list)) else (values,)
    return [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]


def differentiable(args: Sequence[Any]) -> list[Any]:
    """The same arguments, each float tensor a new leaf that asks for its gradient."""
    return [x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]


def _run(fn: Callable, args: Sequence[Any], seed: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and the gradients of a random linear functional of them with respect to every float argument."""
    args = differentiable(args)
    values = fn(*args)
    outputs = [y for y in (values if isinstance(values, (tuple, list)) else (values,)) if isinstance(y, Tensor)]
    loss = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for n, y in enumerate(outputs):
        if y.requires_grad:
            generator = torch.Generator().manual_seed(seed + n)
            weight = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
            # an output of -inf (nothing seen) has no gradient to compare
            loss = loss + torch.where(y.isfinite(), y * weight, 0).double().sum()
    leaves = _floats(args)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    return [y.detach() for y in outputs], list(grads)


def _values(fn: Callable, args: Sequence[Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs where nothing is differentiated."""
    with torch.no_grad():
        values = fn(*args)
    return [y for y in (values if isinstance(values, (tuple, list)) else (values,)) if isinstance(y, Tensor)], []


def first_difference(
    fn: Callable, reference: Callable, args: Sequence[Any], *, tolerance: float | None = None, seed: int = 0,
    gradients: bool = True,
) -> str | None:  # fmt: skip
    """Where `fn(*args)` or its gradients first differ from `reference` computed in float64, or None.

    args: arguments of a row; its float tensors are differentiated, unless without `gradients`, where the op runs as
    it does in inference. tolerance: relative to the largest value of each
    tensor, by default what the coarsest input dtype allows.
    """
    dtypes = [x.dtype for x in _floats(args)]
    tolerance = tolerance or max(TOLERANCE[d] for d in dtypes)
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    outputs, grads = _run(fn, args, seed) if gradients else _values(fn, args)
    want_outputs, want_grads = _run(reference, wide, seed) if gradients else _values(reference, wide)
    if len(outputs) != len(want_outputs):
        return f"{len(outputs)} outputs, not {len(want_outputs)}"
    pairs = [(f"output {n}", got, want) for n, (got, want) in enumerate(zip(outputs, want_outputs))]
    pairs += [(f"gradient {n}", got, want) for n, (got, want) in enumerate(zip(grads, want_grads))]
    for what, got, want in pairs:
        if want is None and got is None:
            continue
        got = torch.zeros_like(want) if got is None else got
        want = torch.zeros_like(got) if want is None else want
        if got.shape != want.shape:
            return f"{what} has shape {list(got.shape)}, not {list(want.shape)}"
        if not want.is_floating_point():
            if not torch.equal(got.to(want.dtype), want):
                return f"{what} differs in {int((got != want).sum())} of {want.numel()} places"
            continue
        got = got.double()
        if not torch.equal(got.isfinite(), want.isfinite()):
            return f"{what} is finite elsewhere"
        finite = want.isfinite()
        if not finite.any():
            continue
        error = (got - want)[finite].abs().max().item()
        size = want[finite].abs().max().item()
        if error > tolerance * max(size, 1e-2):
            return f"{what} is off by {error:.2e} where values reach {size:.2e}"
    return None
