"""What a forward keeps for backward, counted in memory and not asked of autograd: tensors that a function holds in its
context, or a recomputation in its arguments, are seen too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """Storages that operators return inside this mode, but for those of `known` tensors."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                address = storage.data_ptr()
                if address not in self.known and (address not in self.found or self.found[address][0].expired()):
                    self.found[address] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> int:
        """Bytes of those that somebody still holds."""
        return sum(size for held, size in self.found.values() if not held.expired())


def kept_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes that `forward` allocates and that live on for its backward, its output left out."""
    with torch.enable_grad(), Allocated(known) as allocated:
        graph = forward().grad_fn  # holds what backward needs; the output itself goes
    seen = allocated.alive()
    del graph
    return seen
