"""The kind of work that a node does most, by the ops its block runs on."""

from __future__ import annotations

import functools

from zoo import registry
from zoo.errors import ConfigError

# the first kind of which the block has an op
_BY_OP = {
    "delta rule": ("delta_rule", "dplr"),
    "linear attention": ("linear_attention", "plstm"),
    "sparse attention": ("sparse_attention", "block_scores", "select", "select_blocks"),
    "attention": ("attention",),
    "scan": ("selective_scan", "diagonal_scan"),
    "convolution": ("fft_conv", "short_conv"),
    "grouped products": ("grouped_mm",),
    "lookup": ("product_key_lookup",),
}
_OF_ENDS = {"head": "linear", "patches": "linear", "shared mlp": "linear", "first value": "linear"}
KINDS = (*_BY_OP, "linear", "elementwise")


@functools.cache
def kind_of(block: str) -> str:
    """`block` as a node of a cost report has it."""
    name = plain(block)
    if name in _OF_ENDS:
        return _OF_ENDS[name]
    try:
        card = registry.block_card(name)
    except ConfigError:  # merges, norms and other parts that are no blocks
        return "elementwise"
    if card.kind not in ("mixer", "ffn", "memory"):
        return "elementwise"
    return next((kind for kind, ops in _BY_OP.items() if set(ops) & set(card.ops)), "linear")


def is_joint(block: str) -> bool:
    """Whether a node is a part of a combinator, which has no time of its own."""
    return kind_of(block) == "elementwise" and plain(block) not in ("embedding", "norm")


def plain(block: str) -> str:
    """`head (tied)` -> `head`."""
    return block.partition(" (")[0]
