"""Grids and fronts."""

from __future__ import annotations

import random

import pytest

from zoo.errors import ConfigError
from zoo.views.sweep import Point, axes, grid, with_front


def test_values_may_be_lists_maps_and_texts():
    found = axes(["a=1,2", "b.c=[1,2],[3]", "d={x: 1, y: 2},{x: 3}", 'e="p,q",r', "f=5"])
    assert found == [
        ("a", ["1", "2"]), ("b.c", ["[1,2]", "[3]"]), ("d", ["{x: 1, y: 2}", "{x: 3}"]), ("e", ['"p,q"', "r"]),
        ("f", ["5"]),
    ]  # fmt: skip
    combined = grid(found)
    assert len(combined) == 16 and combined[1] == {"a": "1", "b.c": "[1,2]", "d": "{x: 1, y: 2}", "e": "r", "f": "5"}
    assert axes(["a=1,1,2"]) == [("a", ["1", "2"])]


@pytest.mark.parametrize(
    "settings, message",
    [(["dim"], "write key=value"), (["dim=1,,2"], "write key=value"), (["=1,2"], "write key=value"),
     (["a=1,2", "a=3"], "a is given twice"), (["a=1"], "nothing to sweep")],
)  # fmt: skip
def test_wrong_settings_are_told(settings, message):
    with pytest.raises(ConfigError, match=message):
        axes(settings)


def point(time, memory, params, flops=0):
    return Point({}, 8, params, params, flops, flops, time, memory, True)


def test_the_front_is_what_nothing_beats():
    random.seed(0)
    points = [point(random.randint(1, 9), random.randint(1, 9), random.randint(1, 9)) for _ in range(60)]
    for found, sign in ((with_front(points, "more"), -1), (with_front(points, "fewer"), 1)):
        keys = [(p.cost, p.memory, sign * p.params) for p in found]
        assert [k[:2] for k in keys] == sorted(k[:2] for k in keys)
        for p, key in zip(found, keys):
            better = [k for k in keys if k[0] <= key[0] and k[1] <= key[1] and k[2] <= key[2] and k != key]
            assert p.front == (not better)
    assert all(p.front for p in with_front([point(1, 1, 1)] * 2, "more"))  # equals beat none of them


def test_flops_stand_for_an_unknown_time():
    found = with_front([point(None, 2, 5, flops=7), point(None, 2, 5, flops=3)], "more")
    assert [(p.flops, p.front) for p in found] == [(3, True), (7, False)]
