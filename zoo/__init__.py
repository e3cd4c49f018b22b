"""Block Zoo: interchangeable sequence-model blocks, composed from YAML, trained, profiled, imported one by one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zoo import kernels
    from zoo.architectures.model import Model
    from zoo.architectures.storage import build, from_pretrained
    from zoo.cost import estimate
    from zoo.errors import ConfigError, DataError, KernelUnavailable, ZooError
    from zoo.graph.loader import load_config
    from zoo.registry import Card, block_card, list_blocks
    from zoo.registry import create as create_block

# names are looked up on first use, so that `import zoo` costs nothing and needs no torch
_WHERE = {
    "Model": ("zoo.architectures.model", "Model"),
    "build": ("zoo.architectures.storage", "build"),
    "from_pretrained": ("zoo.architectures.storage", "from_pretrained"),
    "estimate": ("zoo.cost", "estimate"),
    "load_config": ("zoo.graph.loader", "load_config"),
    "list_blocks": ("zoo.registry", "list_blocks"),
    "block_card": ("zoo.registry", "block_card"),
    "create_block": ("zoo.registry", "create"),
    "Card": ("zoo.registry", "Card"),
    "ConfigError": ("zoo.errors", "ConfigError"),
    "DataError": ("zoo.errors", "DataError"),
    "KernelUnavailable": ("zoo.errors", "KernelUnavailable"),
    "ZooError": ("zoo.errors", "ZooError"),
    **{
        name: (f"zoo.{name}", "")
        for name in ("architectures", "blocks", "contract", "convert", "graft", "kernels", "registry", "store")
    },
}
__all__ = [
    "Card", "ConfigError", "DataError", "KernelUnavailable", "Model", "ZooError", "block_card", "build",
    "create_block", "estimate", "from_pretrained", "kernels", "list_blocks", "load_config",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
