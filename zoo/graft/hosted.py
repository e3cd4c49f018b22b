"""A block in the place of a foreign module: it is called as that module was, and streams through the host's cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.contract import State
from zoo.errors import ZooError
from zoo.graft.cached import CACHES, state_in
from zoo.graft.returned import returned

HEARD = (*CACHES, "position_ids", "attention_mask")
OTHERS = ("key", "value", "key_value_states", "encoder_hidden_states")  # of cross attention
PLAIN = (bool, int, float, str, type(None))


class Hosted(nn.Module):
    """Calls `block` with what the host passes: x [B, T, D] is its first tensor; position_ids, a mask and a cache are
    understood by the names that transformers, fla and torch use. The output has the form of the original's, with None
    for what there is not (attention weights).

    Tokens that the mask hides as padding are not read: the state of a row is that of its other tokens, and the outputs
    at padding mean nothing. A block with a state in the place of a module that is given no cache, as a feed-forward
    layer, takes what the modules around it are given. ZooError where a cache was begun by the original.
    """

    def __init__(self, block: nn.Module, original: nn.Module, site: str):
        super().__init__()
        # hosts look at plain attributes of their parts: layer_idx, is_causal, batch_first, ...
        for name, value in vars(original).items():
            if not name.startswith("_") and isinstance(value, PLAIN) and name != "training":
                setattr(self, name, value)
        self.block, self.site = block, site
        joint = isinstance(original, nn.MultiheadAttention)
        self.columns = joint and not original.batch_first
        if joint:
            self.in_proj_bias = None  # nn.TransformerEncoderLayer asks, and then takes its ordinary path
        if isinstance(original, Hosted):  # a block that was put there before
            self.outputs, self.names = original.outputs, original.names
        else:
            self.outputs, self.names = returned(original), list(inspect.signature(original.forward).parameters)
        keeps = block.zoo_registration.state_growth != "none"  # type: ignore[union-attr]
        self.listens = keeps and not any(name in self.names for name in CACHES)
        self._heard: list[dict[str, Any]] = []
        self._undo: list[Any] = []

    def attach(self, around: Iterable[nn.Module]) -> None:
        """Listen to what the modules around the site are given, where the site itself is given no cache."""
        self.detach()
        for module in around:
            if self.listens:
                before = module.register_forward_pre_hook(self._hear, with_kwargs=True)
                self._undo += [before.remove, module.register_forward_hook(self._forget, always_call=True).remove]
            if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
                module.use_nested_tensor = False  # rows without their padding are no tensor that a block can read
                self._undo.append(_Again(module))

    def detach(self) -> None:
        """Stop listening."""
        for undo in self._undo:
            undo()
        self._undo = []

    def _hear(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._heard.append({n: kwargs[n] for n in HEARD if kwargs.get(n) is not None})

    def _forget(self, module: nn.Module, args: tuple, out: Any) -> None:
        self._heard.pop()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()), None)
        if x is None or x.dim() != 3:
            raise ZooError(f"{self.site}: a block reads one tensor [B, T, D], the host gave none")
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if any(isinstance(given.get(name), Tensor) and given[name] is not x for name in OTHERS):
            raise ZooError(f"{self.site}: the host gave keys or values of another sequence; a block reads one alone")
        for heard in reversed(self._heard):
            given |= {name: value for name, value in heard.items() if given.get(name) is None}
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        y = self._streamed(x.transpose(0, 1) if self.columns else x, cache, given)
        y = y.transpose(0, 1) if self.columns else y
        return y if self.outputs is None else (y, *(cache if holds else None for holds in self.outputs))

    def _streamed(self, x: Tensor, cache: Any, given: dict[str, Any]) -> Tensor:
        state, seen = (None, 0) if cache is None else state_in(cache, self, x)
        positions = given.get("position_ids")
        if positions is not None:
            fits = positions.dim() == 2 and positions.shape[1] == x.shape[1]
            positions = positions.expand(x.shape[0], -1) if fits else None
        shown = _shown(given, x, seen)
        if shown is None or bool(shown.all()):
            return self.block(x, state=state, positions=positions)
        if state is not None:
            return self._without_padding(x, shown, state, positions)
        if bool(shown[:, 0].all()) and getattr(self.block, "causal", True):
            return self.block(x, positions=positions)  # what stands behind the text changes nothing
        return self.block(x, positions=positions, doc_ids=shown.long())  # padding is a document of its own

    def _without_padding(self, x: Tensor, shown: Tensor, state: State, positions: Tensor | None) -> Tensor:
        """Rows that are padded alike together, each without its padding."""
        y = torch.zeros_like(x)
        for pattern in shown.unique(dim=0):
            rows, columns = (shown == pattern).all(1).nonzero()[:, 0], pattern.nonzero()[:, 0]
            if len(columns):
                at = rows[:, None], columns
                part = state.rows(rows)
                there = None if positions is None else positions[at]
                y[at] = self.block(x[at], state=part, positions=there).to(y.dtype)  # autocast gives another
                state.put_rows(rows, part)
        return y


class _Again:
    """Lets a torch encoder drop padding again."""

    def __init__(self, encoder: nn.TransformerEncoder):
        self.encoder = encoder

    def __call__(self) -> None:
        self.encoder.use_nested_tensor = True


def _shown(given: dict[str, Any], x: Tensor, seen: int) -> Tensor | None:
    """Which tokens of x are no padding, [B, T]: 2D masks say it, in others a key that no query sees is padding."""
    mask, hidden = given.get("attention_mask"), given.get("key_padding_mask")
    if isinstance(hidden, Tensor):
        return ~hidden if hidden.dtype == torch.bool else hidden == 0
    if not isinstance(mask, Tensor):
        return None
    shown = mask.bool() if mask.dtype == torch.bool or mask.dim() == 2 else mask == 0
    if shown.dim() == 4:
        shown = shown.any(1).any(1)
    # a cache of fixed size has columns for tokens to come, one of a window only some of those before
    tokens = x.shape[1]
    first = seen if shown.shape[1] >= seen + tokens else shown.shape[1] - tokens
    return shown[:, first : first + tokens].expand(x.shape[0], -1)
