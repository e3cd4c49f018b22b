"""Work that is done piece by piece, so that what it needs on the way is bounded."""

from __future__ import annotations


def cut(count: int, elements: int, at_once: int) -> list[slice]:
    """Slices of `count` things that need `elements` numbers each, `at_once` numbers together at most."""
    step = max(1, at_once // max(elements, 1))
    return [slice(a, min(a + step, count)) for a in range(0, count, step)]
