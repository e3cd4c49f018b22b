"""Cost: choosing is no matrix work, scoring is."""

from zoo.kernels.block_scores.cost import flops

__all__ = ["flops"]
