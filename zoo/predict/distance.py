"""What it costs that weights lie far away: the next pass reads them again only after all that a pass moves, and caches
may not hold so much."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

Curve = tuple[tuple[float, float], ...]  # bytes moved between two readings; seconds a byte more than from nearby


def curve(found: Iterable[tuple[float, float]], held: float) -> Curve:
    """From the seconds that a layer with `held` bytes of weights takes in passes that move ever more bytes. Who moves
    more waits no less: what a longer pass undercuts was disturbed."""
    points = sorted(found)
    least = min(seconds for _, seconds in points)
    made, waits = [], math.inf
    for span, seconds in reversed(points):
        waits = min(waits, seconds - least)
        made.append((span, waits / held))
    return tuple(reversed(made))


def seconds_a_byte(curve: Curve, span: float) -> float:
    """More than from nearby, in a pass that moves `span` bytes; between two points by the logarithm of bytes."""
    if not curve or span <= curve[0][0]:
        return curve[0][1] if curve else 0.0
    for (near, less), (far, more) in pairwise(curve):
        if span <= far:
            return less + (more - less) * math.log(span / near) / math.log(far / near)
    return curve[-1][1]
