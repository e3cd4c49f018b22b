"""For all tests: fresh memory is NaN, so that a read before the first write shows; without a GPU Triton interprets."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before anything of ours

from zoo.conformance.poison import poisoned


@pytest.fixture(autouse=True, scope="session")
def nan_in_fresh_memory():
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def collection():
    """Tests that drive torchtitan's Trainer themselves leave collection off, which others find changed."""
    gc.enable()
    yield
    gc.enable()
