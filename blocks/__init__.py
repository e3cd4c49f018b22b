"""Blocks: `from zoo.blocks import GatedLinearAttention`. A module is imported when its class is first named."""

import importlib

from zoo.registry import class_index


def __getattr__(name: str):
    modules = class_index()
    if name in modules:
        return getattr(importlib.import_module(modules[name]), name)
    raise AttributeError(f"module 'zoo.blocks' has no block class {name!r}")


def __dir__() -> list[str]:
    return sorted(class_index())
