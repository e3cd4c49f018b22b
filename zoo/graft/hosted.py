"""A block in the place of a foreign module: it is called as that module was, and streams through the host's cache."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from zoo.contract import State
from zoo.errors import ZooError

CACHES = ("past_key_values", "past_key_value", "cache_params")
PLAIN = (bool, int, float, str, type(None))


class Hosted(nn.Module):
    """Calls `block` with what the host passes: x [B, T, D] is its first tensor; position_ids, an attention mask and a
    cache are understood by the names that transformers and fla use. The output has the form of the original's, with
    None for what there is not (attention weights).

    Rows may be padded on the right (the outputs of padding mean nothing). On the left they may where there is no
    cache. ZooError otherwise, and where a cache was begun by the original.
    """

    def __init__(self, block: nn.Module, original: nn.Module, site: str):
        super().__init__()
        self.block, self.site = block, site
        # hosts look at plain attributes of their parts: layer_idx, is_causal, batch_first, ...
        for name, value in vars(original).items():
            if not name.startswith("_") and isinstance(value, PLAIN) and name != "training":
                setattr(self, name, value)
        self.columns = not getattr(original, "batch_first", True) and isinstance(original, nn.MultiheadAttention)
        if isinstance(original, nn.MultiheadAttention):
            self.in_proj_bias = None  # nn.TransformerEncoderLayer asks, and then takes its ordinary path
        self.outputs = _outputs(original)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()), None)
        if x is None or x.dim() != 3:
            raise ZooError(f"{self.site}: a block reads one tensor [B, T, D], the host gave none")
        if self.columns:
            x = x.transpose(0, 1)
        cache = next((kwargs[n] for n in CACHES if kwargs.get(n) is not None), None)
        doc_ids = self._documents(kwargs.get("attention_mask"), x, cache is not None)
        state = None if cache is None else self._state(cache, x)
        positions = kwargs.get("position_ids")
        if positions is not None:
            positions = positions.expand(x.shape[0], -1) if positions.shape[-1] == x.shape[1] else None
        y = self.block(x, state=state, positions=positions, doc_ids=doc_ids)
        if self.columns:
            y = y.transpose(0, 1)
        if self.outputs is None:
            return y
        return (y, *(cache if holds else None for holds in self.outputs))

    def _documents(self, mask: Tensor | None, x: Tensor, streaming: bool) -> Tensor | None:
        """Padding as a document of its own; None where there is none, or only behind the text."""
        if mask is None or not isinstance(mask, Tensor):
            return None
        shown = mask if mask.dtype == torch.bool or mask.dim() == 2 else mask == 0
        if shown.dim() == 4:  # a key that no query sees is padding
            shown = shown.any(1).any(1)
        shown = shown[:, -x.shape[1] :].bool()
        if bool(shown.all()):
            return None
        padded_left = bool((~shown[:, :1]).any())
        if streaming:
            where = "on the left" if padded_left else "on the right"
            raise ZooError(
                f"{self.site}: rows are padded {where}, and a state cannot skip padding: give rows of one length"
            )
        return shown.long() if padded_left else None

    def _state(self, cache: Any, x: Tensor) -> State:
        index = getattr(self, "layer_idx", 0) or 0
        layers = getattr(cache, "layers", None)
        if layers is None:
            raise ZooError(f"{self.site}: the host's cache, {type(cache).__name__}, has no layers to keep a state in")
        while len(layers) <= index:
            layers.append(cache.layer_class_to_replicate())
        layer = layers[index]
        if not isinstance(layer, StateLayer):
            if getattr(layer, "is_initialized", False):
                raise ZooError(f"{self.site}: the cache was begun by the module that the block replaced")
            layer = layers[index] = _with_states(layer)
        if self.site not in layer.states:
            layer.states[self.site] = self.block.init_state(x.shape[0])  # type: ignore[operator]
            layer.seen[self.site] = 0
        layer.seen[self.site] += x.shape[1]
        _mark(layer)
        return layer.states[self.site]


class StateLayer:
    """Mixed into the class of a layer of the host's cache: it also keeps the states of our blocks, and is as long as
    these are. The host may keep something of its own there, as where a layer has attention beside a recurrence: its
    methods then see a layer that is as long as that."""

    is_compileable = False
    is_croppable = False
    states: dict[str, State]
    seen: dict[str, int]

    def get_seq_length(self, *args: Any) -> int:
        if self.seen:
            return max(self.seen.values())
        own = getattr(super(), "get_seq_length", None)
        return own(*args) if own else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

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
        """Have the host do the same to what it keeps here."""
        mine, self.seen = self.seen, {}
        try:
            getattr(super(), method)(*args)
        finally:
            self.seen = mine

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


def _outputs(original: nn.Module) -> tuple[bool, ...] | None:
    """What the original returns beside y, as its annotation says: for each whether it is the cache; None: y alone."""
    said = inspect.signature(type(original).forward).return_annotation
    if said is inspect.Signature.empty:
        return None
    text = said if isinstance(said, str) else str(said)
    inside = re.match(r"(?:typing\.)?[Tt]uple\[(.*)\]$", text.strip())
    if not inside:
        return None
    parts, depth = [""], 0
    for letter in inside[1]:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple("Cache" in part for part in parts[1:])
