"""Under autocast torch runs every matrix product in half precision, also those a kernel wants in fp32."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, products keep the dtype of their inputs."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
