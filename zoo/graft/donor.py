"""What a module of somebody else's model is in our terms: options of attention, and weights by our names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architectures.model import Model
from zoo.convert import plan as conversion
from zoo.errors import ConfigError
from zoo.graft.document import sites_of
from zoo.graft.hosted import Hosted
from zoo.graph.loader import load_graph

# other names of the same maps
RENAMED = {
    "query": "q_proj", "key": "k_proj", "value": "v_proj", "out_proj": "o_proj", "proj": "o_proj", "fc1": "up_proj",
    "fc2": "down_proj",
}  # fmt: skip
STACKED = ("qkv", "qkv_proj", "in_proj_weight", "in_proj_bias")  # rows of q, then k, then v


@dataclass
class Donor:
    """A module that is replaced. `options` are those of our block that would compute the same, `weights` its tensors
    by our names, `sources` what each of these is called in the host, `place` its layer and their number."""

    dim: int
    options: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    place: tuple[int, int] | None = None


def donors(host: nn.Module, sites: list[str]) -> dict[str, Donor]:
    """One for each site: as the graph of a `zoo.Model` says, or the mapping of the host's family, or else the names of
    its tensors."""
    known = _by_graph(host) if isinstance(host, Model) else _by_family(host)
    return {site: known.get(site) or _by_names(site, host.get_submodule(site), host) for site in sites}


def _by_graph(model: Model) -> dict[str, Donor]:
    found = {}
    layers = load_graph(dict(model.config)).num_layers
    for spec, name in sites_of(model):
        site = f"{name}.block"
        block: Any = model.get_submodule(site)
        tensors = {n: t.detach() for n, t in block.state_dict().items()}
        sources = {n: f"{site}.{n}" for n in tensors}
        found[site] = Donor(block.dim, dict(spec.options), tensors, sources, (spec.layer_index, layers))
    return found


def _by_family(host: nn.Module) -> dict[str, Donor]:
    config = getattr(host, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    try:
        model, rules = conversion(config.to_dict(), dtype=torch.float32)  # type: ignore[union-attr]
    except ConfigError:
        return {}  # a family that has no mapping, or a feature that a graph has not
    tensors, found = host.state_dict(keep_vars=True), {}
    for spec, block in sites_of(model):
        prefix = f"{block}.block."
        own = [r for r in rules if all(n.startswith(prefix) for n in r.ours)]
        site = _common([n for r in own for n in r.theirs])
        if own and all(n in tensors for r in own for n in r.theirs):
            donor = Donor(model.get_submodule(block).block.dim, dict(spec.options))  # type: ignore[union-attr]
            for rule in own:
                with torch.no_grad():
                    made = rule.there([tensors[n].detach() for n in rule.theirs])
                donor.weights |= {n.removeprefix(prefix): t for n, t in zip(rule.ours, made, strict=True)}
                donor.sources |= {n.removeprefix(prefix): ", ".join(rule.theirs) for n in rule.ours}
            found[site] = donor
    return found


def _common(names: list[str]) -> str:
    """The module that holds all of these tensors."""
    paths = [n.replace(".", "/") for n in names]
    return os.path.commonpath(paths if len(paths) > 1 else [os.path.dirname(paths[0])]).replace("/", ".")


def _by_names(site: str, module: nn.Module, host: nn.Module) -> Donor:
    if isinstance(module, Hosted):  # a block that was put there before
        site, module = f"{site}.block", module.block
    donor = Donor(0)
    for name, tensor in module.state_dict().items():
        *path, last = name.split(".")
        owner = path[-1] if path else last
        if owner in STACKED and len(path) < 2:
            part = "bias" if last.endswith("bias") else "weight"
            for letter, rows in zip("qkv", tensor.detach().chunk(3), strict=True):
                donor.weights[f"{letter}_proj.{part}"] = rows
                donor.sources[f"{letter}_proj.{part}"] = f"{site}.{name}"
        else:
            ours = ".".join([RENAMED.get(p, p) for p in path] + [last])
            donor.weights[ours], donor.sources[ours] = tensor.detach(), f"{site}.{name}"
    # what reads the stream: the first linear map, as modules are written in the order of their use
    first = next((m.in_features for m in module.modules() if isinstance(m, nn.Linear)), None)
    matrix = donor.weights.get("q_proj.weight")
    if first is None and matrix is None and any(t.dim() > 1 for t in donor.weights.values()):
        first = getattr(getattr(host, "config", None), "hidden_size", 0)
    donor.dim = int(first or (0 if matrix is None else matrix.shape[1]))
    donor.options = _heads(module, donor.weights)
    return donor


def _heads(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    owners = (module, getattr(module, "config", None))
    said = (getattr(o, n, None) for o in owners for n in ("num_heads", "num_attention_heads"))
    heads = next((v for v in said if isinstance(v, int)), None)
    if heads is None or "q_proj.weight" not in weights:
        return {}
    width = weights["q_proj.weight"].shape[0] // heads
    options = {"num_heads": heads, "head_dim": width, "num_kv_heads": weights["k_proj.weight"].shape[0] // width}
    return options | ({"bias": True} if "q_proj.bias" in weights else {})
