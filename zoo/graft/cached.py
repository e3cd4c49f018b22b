"""States of our blocks in the cache of a host, one layer of it each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.contract import State
from zoo.errors import ZooError

COUNTERS = ("cumulative_length", "cumulative_length_int")  # of windows and of caches of fixed size
CACHES = ("past_key_values", "past_key_value", "cache_params")


def state_in(cache: Any, hosted: Any, x: Tensor) -> tuple[State, int]:
    """The state of a hosted block in a cache, and how many tokens went into it; those of x are counted as read."""
    site, own = hosted.site, not hosted.listens
    index = getattr(hosted, "layer_idx", 0) or 0
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ZooError(f"{site}: the host's cache, {type(cache).__name__}, has no layers to keep a state in")
    while len(layers) <= index:
        layers.append(cache.layer_class_to_replicate())
    layer = layers[index]
    if not isinstance(layer, StateLayer):
        # what another module keeps there may be as long as x, which that module has read already
        if getattr(layer, "is_initialized", False) and (own or int(layer.get_seq_length()) > x.shape[1]):
            raise ZooError(f"{site}: the cache was begun by the module that the block replaced")
        layer = layers[index] = _with_states(layer)
    if site not in layer.states:
        layer.states[site], layer.seen[site] = hosted.block.init_state(x.shape[0]), 0
    seen = layer.seen[site]
    layer.seen[site] += x.shape[1]
    layer.count()
    if own:
        _mark(layer)
    return layer.states[site], seen


class StateLayer:
    """Mixed into the class of a layer of the host's cache: it also keeps the states of our blocks. Where the host keeps
    nothing of its own there, the layer is as long as these are. The host may, as where a layer has attention beside a
    recurrence: then it is as long as that."""

    is_croppable = False
    states: dict[str, State]
    seen: dict[str, int]

    @property
    def ours(self) -> bool:
        """Whether our states alone say how long the layer is."""
        return bool(self.seen) and not getattr(self, "is_initialized", False)

    def get_seq_length(self, *args: Any) -> int:
        if self.ours:
            return max(self.seen.values())
        own = getattr(super(), "get_seq_length", None)
        return own(*args) if own else 0

    def count(self) -> None:
        """Tell the host how long the layer is: masks of all layers may be made by the sizes that this one gives."""
        if self.ours:
            self._set(max(self.seen.values()))

    def _set(self, length: int) -> None:
        for name in COUNTERS:
            value = getattr(self, name, None)
            if isinstance(value, Tensor):
                value.fill_(length)
            elif value is not None:
                setattr(self, name, length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx)
        self._of_host("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = next((t.shape[0] for state in self.states.values() for t in state.tensors()), 0)
        self._rows(torch.arange(rows).repeat_interleave(repeats))
        self._of_host("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(indices)
        self._of_host("batch_select_indices", indices)

    def reset(self) -> None:
        for state in self.states.values():
            state.reset()
        self.seen = dict.fromkeys(self.seen, 0)
        self._of_host("reset")

    def _rows(self, index: Tensor) -> None:
        for state in self.states.values():
            state.reorder(index.to(next(state.tensors(), index).device))

    def _of_host(self, method: str, *args: Any) -> None:
        """Have the host do the same to what it keeps here, which it sees without our states."""
        if self.ours:
            self._set(0)
        mine, self.seen = self.seen, {}
        try:
            getattr(super(), method)(*args)
        finally:
            self.seen = mine
            self.count()

    def crop(self, *args: Any) -> None:
        raise ZooError("a cache with states of blocks cannot be cropped: a state does not know its past")


def _with_states(layer: Any) -> Any:
    cls = type(layer)
    made = object.__new__(type(f"{cls.__name__}WithStates", (StateLayer, cls), {}))
    made.__dict__.update(vars(layer), states={}, seen={})
    return made


def _mark(layer: Any) -> None:
    # layers of recurrent hosts tell by this whether a row has begun
    if isinstance(begun := getattr(layer, "has_previous_state", None), dict):
        layer.has_previous_state = dict.fromkeys(begun, True)
