"""What comes from the package torchao: AdamW with moments in 8 bits, linear layers in float8."""

# pyright: reportMissingImports=false
from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.errors import ConfigError, Problem, ZooError

SMALLEST = 256  # features; scaling and casting a smaller matrix takes longer than float8 saves


def adamw8bit() -> Callable[..., torch.optim.Optimizer]:
    """The optimizer's class."""
    return _torchao("torchao.optim", "optimizer: adamw8bit").AdamW8bit


def to_float8(model: nn.Module, *, smallest: int = SMALLEST, emulate: bool = False) -> None:
    """Let the linear layers of the trunk multiply in float8, forward in e4m3 and gradients in e5m2, each tensor scaled
    by its largest number; weights and their names stay. Layers with fewer than `smallest` features on a side stay as
    they are, and those whose features are no multiple of 16. emulate: rounded like float8, for any device.

    ConfigError where the device has no float8.
    """
    if not emulate and (why := _missing()):
        raise ConfigError([Problem(f"float8 needs a GPU of compute capability 8.9 or newer; {why}", "train.dtype")])
    float8 = _torchao("torchao.float8", "dtype: float8")

    def wanted(module: nn.Module, name: str) -> bool:
        sides = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (0,)
        return all(n >= smallest and n % 16 == 0 for n in sides)

    config = float8.Float8LinearConfig(emulate=emulate)
    float8.convert_to_float8_training(model.layers, module_filter_fn=wanted, config=config)


def _missing() -> str:
    if not torch.cuda.is_available():
        return "there is none here: use dtype: bfloat16"
    have = torch.cuda.get_device_capability()
    return "" if have >= (8, 9) else f"this one has {have[0]}.{have[1]}: use dtype: bfloat16"


def _torchao(module: str, option: str) -> Any:
    import importlib

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        text = f"train.{option} needs the package torchao: pip install 'block-zoo[lowbit]'"
        raise ZooError(f"{text} ({error})") from error
