"""Definition of the structured linear maps: loops over blocks that read like the equations."""

from __future__ import annotations

import torch
from torch import Tensor


def block_linear(x: Tensor, first: Tensor, second: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """Block-diagonal (second None), Monarch (scales None) or BLAST; see `zoo.kernels.block_linear`."""
    z = _block_diagonal(x, first)
    if second is None:
        return torch.cat(z, -1)
    blocks = range(second.shape[0])
    if scales is None:
        z = torch.cat(z, -1)
        y = _block_diagonal(torch.cat([z[:, block :: len(blocks)] for block in blocks], -1), second)
        return torch.stack(y, -1).flatten(1)  # the block is the fastest index
    return torch.cat([sum(scales[i, j] * z[j] for j in range(len(z))) @ second[i].mT for i in blocks], -1)


def _block_diagonal(x: Tensor, weight: Tensor) -> list[Tensor]:
    """y_i = W_i x_i of each block."""
    k = weight.shape[2]
    return [x[:, i * k : (i + 1) * k] @ weight[i].mT for i in range(weight.shape[0])]
