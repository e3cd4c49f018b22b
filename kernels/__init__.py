"""Ops: mathematics with one signature each and several implementations behind one dispatcher."""

from zoo.kernels.dispatch import use

__all__ = ["use"]
