"""Ops: mathematics with one signature each and several implementations behind one dispatcher."""

from zoo.kernels import flops  # registers the formulas that torch's counter lacks
from zoo.kernels.dispatch import use

__all__ = ["flops", "use"]
