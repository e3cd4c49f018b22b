"""Options and weights that a new block takes over from the one it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.graft.donor import Donor

# options of attention that mean the same in every block that has them
SHARED = (
    "num_heads", "num_kv_heads", "head_dim", "rope", "rope_base", "rotary_dim", "rope_interleaved", "rope_scaling",
    "qk_norm", "norm_zero_centered", "norm_eps", "bias", "out_bias", "scale", "softcap", "causal",
)  # fmt: skip


def options_for(name: str, donor: Donor, given: Mapping[str, Any], place: tuple[int, int]) -> dict[str, Any]:
    """Options of block `name` in the place of the donor: what was `given`, else what both understand. place: number
    of the layer and of layers, where the donor knows no better."""
    known, cls, old = registry.options(name), registry.load(name), donor.options
    made: dict[str, Any] = {k: old[k] for k in SHARED if k in known and k in old}
    heads = old.get("num_heads") or 1
    width = old.get("head_dim") or donor.dim // heads
    if "num_heads" in made:
        # keys and values as wide as those of the donor: expand_v counts in heads where there is a head_dim
        keys, shared = heads * width, heads // (old.get("num_kv_heads") or heads)
        values = shared * len(donor.weights["v_proj.weight"]) if "v_proj.weight" in donor.weights else keys
        wide = {"expand_k": keys / donor.dim, "expand_v": values / (keys if "head_dim" in known else donor.dim)}
        if "expand_v" in known:
            wide["head_dim"] = width
        made |= {k: v for k, v in wide.items() if k in known}
    if hasattr(cls, "like_attention") and "num_heads" in old:
        like = cls.like_attention(donor.dim, heads, old.get("num_kv_heads") or heads, width)
        if "g_proj.weight" in donor.weights:  # a linear mixer: its gate stays
            like.pop("output_gate", None)
        made |= {k: v for k, v in like.items() if k in known}
    layer, layers = donor.place or place
    made |= {k: v for k, v in {"layer_index": layer, "num_layers": layers}.items() if k in known}
    return made | dict(given)


@torch.no_grad()
def carry(block: nn.Module, donor: Donor) -> dict[str, tuple[str, bool]]:
    """Write into the block what the donor has for it: tensors of the same name and shape, heads of keys and values
    repeated where the block has more of them, and what the block itself makes of q, k, v and o (`from_attention`).
    Returns source, and whether it is the same tensor, by name; on the meta device that is all that happens."""
    made: dict[str, tuple[str, bool]] = {}
    old, maps = donor.weights, [f"{n}_proj.weight" for n in "qkvo"]
    if hasattr(block, "from_attention") and all(n in old for n in maps):
        heads = len(_queries(donor))
        source = ", ".join(dict.fromkeys(donor.sources[n] for n in maps))
        device = next(block.parameters()).device  # on meta, where values count for nothing, all is
        q, k, v, o = (w.to(device) for w in (_queries(donor), *(old[n] for n in maps[1:])))
        k, v = (_repeated(w, heads, donor) for w in (k, v))
        if donor.options.get("rope_interleaved") and k is not None:
            q, k = (_in_halves(w, donor) for w in (q, k))
        if k is not None and v is not None:
            made |= {name: (source, False) for name in block.from_attention(q, k, v, o)}  # type: ignore[operator]
    for name, tensor in block.state_dict().items():
        given = old.get(name)
        if given is None or name in made:
            continue
        if given.shape != tensor.shape and name in maps[1:3]:
            given = _repeated(given, len(tensor), donor)
        elif given.shape != tensor.shape and name == maps[0]:
            given = _queries(donor)
        if given is not None and given.shape == tensor.shape:
            tensor.copy_(given)
            made[name] = donor.sources[name], given is old[name]
    return made


def _queries(donor: Donor) -> Tensor:
    """W_q, without the rows of an output gate that stand behind those of each head."""
    given = donor.weights["q_proj.weight"]
    if not donor.options.get("output_gate"):
        return given
    return given.unflatten(0, (donor.options["num_heads"], 2, -1))[:, 0].flatten(0, 1)


def _in_halves(given: Tensor, donor: Donor) -> Tensor:
    """Rows of the heads of q or k whose rotated channels are neighbours, with the second ones of all pairs after the
    first ones: as most models have it. Of q and k alike, so products do not change."""
    head = donor.options.get("head_dim") or donor.dim // donor.options.get("num_heads", 1)
    turned = donor.options.get("rotary_dim") or head
    pairs, rest = given.unflatten(0, (-1, head)).split([turned, head - turned], 1)
    return torch.cat([pairs[:, ::2], pairs[:, 1::2], rest], 1).flatten(0, 1)


def _repeated(given: Tensor, rows: int, donor: Donor) -> Tensor | None:
    """Rows of the heads of k or v, each head as often as query heads share it; None where they do not fit."""
    head = donor.options.get("head_dim") or donor.dim // donor.options.get("num_heads", 1)
    if len(given) % head or rows % len(given):
        return None
    return given.unflatten(0, (-1, head)).repeat_interleave(rows // len(given), 0).flatten(0, 1)
