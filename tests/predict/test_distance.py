"""What weights far away cost: the curve by hand, and what a fit makes of it."""

import pytest

from zoo.predict.calibrate import Sample, fit
from zoo.predict.distance import curve, seconds_a_byte
from zoo.predict.work import Work

HELD = 2e6
FOUND = [(1e6, 1e-3), (4e6, 1e-3), (16e6, 3e-3), (64e6, 3.2e-3)]  # bytes of a pass, seconds of a layer


def test_a_curve_by_hand():
    made = curve(FOUND, HELD)
    assert seconds_a_byte(made, 1e3) == seconds_a_byte(made, 4e6) == 0
    assert seconds_a_byte(made, 16e6) == pytest.approx(1e-9) and seconds_a_byte(made, 1e12) == pytest.approx(1.1e-9)
    assert seconds_a_byte(made, 8e6) == pytest.approx(0.5e-9)  # in the middle, by the logarithm
    assert seconds_a_byte((), 1e9) == 0


def test_what_moves_more_waits_no_less():
    disturbed = [*FOUND, (2e6, 9e-3), (32e6, 9e-3)]
    waits = [wait for _, wait in curve(disturbed, HELD)]
    assert waits == sorted(waits) and waits[-1] == pytest.approx(1.1e-9)
    assert curve(reversed(FOUND), HELD) == curve(FOUND, HELD)


def test_rates_are_those_of_weights_at_hand():
    """Two sizes of weights, near and far; rates are fitted to what is left when the way is subtracted."""
    distance = {"decode": curve(FOUND, HELD)}
    samples = []
    for held in (1e5, 1e6, 4e6):
        for span in (1e6, 64e6):
            work = Work(1, held / 2, 0, held, held / 2, held=held, span=span)
            seconds = 2e-5 + 2e-9 * held + held * seconds_a_byte(distance["decode"], span)
            samples.append(Sample("swiglu", "decode", work, seconds))
    found, _, error = fit(samples, 1e15, distance)
    assert error < 1e-3 and found["swiglu", "decode"][0] == pytest.approx(2e-5, rel=0.01)
    assert fit(samples, 1e15, {})[2] > 0.1  # without the curve, one rate stands for both


def test_a_wait_is_no_longer_than_what_was_measured():
    distance = {"decode": curve(FOUND, HELD)}
    work = Work(1, 1e6, 0, 1e6, held=1e6, span=64e6)
    found, _, _ = fit([Sample("swiglu", "decode", work, 1e-4)] * 3, 1e15, distance)  # the curve says 1.1 ms
    assert sum(r * x for r, x in zip(found["swiglu", "decode"], work.features, strict=True)) > 0
