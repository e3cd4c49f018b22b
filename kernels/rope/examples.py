"""Small calls of rope, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zoo.kernels.rope.frequencies import rope_frequencies


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (x, positions, frequencies, amplitude, interleaved, inverse) of each."""

    def case(name, T=130, H=4, D=64, rotary=64, amplitude=1.0, interleaved=False, inverse=False):
        gen = torch.Generator().manual_seed(D)
        x = torch.randn(2, T, H, D, generator=gen).to(device, dtype)
        positions = torch.randint(0, 500, (2, T), generator=gen).to(device)
        frequencies, _ = rope_frequencies(rotary, 10000.0, None, x.device)
        return name, (x, positions, frequencies, amplitude, interleaved, inverse)

    yield case("halves")
    yield case("pairs", interleaved=True)
    yield case("part of the head", D=72, rotary=40)
    yield case("one token", T=1)
    yield case("back, with an amplitude", amplitude=1.2, inverse=True)
