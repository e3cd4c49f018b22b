"""A block under test: how it is built, what it is fed, how its outputs are compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.conformance.report import Failure
from zoo.registry import Registration, create

DIM = 64
NO_GRADIENT = "without_gradient"  # class attribute: parameter name -> reason why its gradient is zero


@dataclass(frozen=True)
class Subject:
    """A registered class with one of its examples."""

    name: str  # as `zoo.registry.load` takes it: "gla" or "my_pkg.my_module:MyBlock"
    registration: Registration
    options: Mapping[str, Any]

    def create(self, dtype: torch.dtype = torch.float32, seed: int = 0, dim: int = DIM, device: str = "cpu"):
        """The block as a user gets it, drawn under `seed`."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return create(self.name, dim, **self.options, dtype=dtype, device=device)

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """A block in eval mode that is not silent: see `stir`."""
        return stir(self.create(dtype, seed), seed).eval()

    def lengths(self) -> list[int]:
        """Sequence lengths that are worth a look: the shortest, odd ones, and those around the chunk."""
        block = self.create()
        sizes = [getattr(block, n, None) for n in ("chunk_size", "block_size")]
        around = [s + d for s in sizes if isinstance(s, int) and 2 < s <= 128 for d in (-1, 0, 1)]
        return sorted({1, 2, 63, *(around or (64, 65))})


def stir(block: Any, seed: int = 0) -> Any:
    """Add seeded noise of order one to every parameter that starts constant.

    Zero gates, zero biases, unit norm weights and zero output projections are good initial values, but under
    them whole branches of a block are silent, and a check on a silent branch proves nothing.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for p in block.parameters():
            if p.is_floating_point() and p.numel() and bool((p == p.flatten()[0]).all()):
                scale = 0.4 if p.dim() < 2 else p.shape[-1] ** -0.5
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * scale)
    return block


def tokens(batch: int, length: int, dtype: torch.dtype = torch.float64, seed: int = 0, dim: int = DIM) -> Tensor:
    """Input x [batch, length, dim], normal, the same for the same arguments in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, dim, generator=generator, dtype=torch.float64).to(dtype)


def cuts(length: int, count: int, seed: int = 0) -> Iterator[list[int]]:
    """Ways to cut `length` tokens into segments: one by one, all but one, one first, then `count` random ones."""
    yield [1] * length
    yield [length - 1, 1]
    yield [1, length - 1]
    rng = random.Random(seed)
    for _ in range(count):
        left, parts = length, []
        while left:
            parts.append(min(left, rng.choice((1, 1, 2, 3, 5, 8, 16, 17, 31, 64))))
            left -= parts[-1]
        yield parts


def stream(block: Any, x: Tensor, parts: list[int], state: Any, positions: Tensor | None = None) -> Tensor:
    """Outputs of `x` fed to `state` in segments of the given lengths."""
    outputs, start = [], 0
    for n in parts:
        where = slice(start, start + n)
        given = {} if positions is None else {"positions": positions[:, where]}
        outputs.append(block(x[:, where], state=state, **given))
        start += n
    return torch.cat(outputs, 1)


def same(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Fail where the largest difference exceeds `tolerance` times the largest wanted value (at least 1)."""
    if got.shape != want.shape:
        raise Failure(f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if not got.numel():
        return
    difference = (got.detach().double() - want.detach().double()).abs()
    limit = tolerance * max(1.0, want.detach().double().abs().max().item())
    worst = difference.max().item()
    if not worst <= limit:  # also where it is NaN
        flat = difference.nan_to_num(float("inf")).flatten().argmax()
        at = ", ".join(str(int(i)) for i in torch.unravel_index(flat, difference.shape))
        raise Failure(f"{what}: differs by {worst:.3g} at [{at}], allowed {limit:.1g}")


def finite(t: Tensor, what: str) -> None:
    """Fail where `t` holds NaN or infinity."""
    if not bool(torch.isfinite(t).all()):
        raise Failure(f"{what} is not finite (NaN here can be memory of torch.empty that nobody wrote)")


def gradients(
    block: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None, **given: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the gradients of a fixed random functional of it, for `x` and each parameter. `run`: another way than
    `block(x)` to the output."""
    block.zero_grad(set_to_none=True)
    leaf = x.detach().clone().requires_grad_()
    y = block(leaf, **given) if run is None else run(leaf)
    weight = tokens(*y.shape[:2], seed=77, dim=y.shape[2]).to(y.dtype)
    (y * weight).sum().backward()
    zero = torch.zeros(())
    found = {n: zero.expand(p.shape) if p.grad is None else p.grad for n, p in block.named_parameters()}
    return y.detach(), {"x": zero.expand(x.shape) if leaf.grad is None else leaf.grad, **found}
