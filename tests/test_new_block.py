"""A new block is one new file: written into a temporary package, then built, trained, profiled and sampled."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # seven processes, one of them loads torchtitan

BLOCK = '''
"""Decayed running mean of a projection."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.contract import Block, State, init_linear_, linear_flops, refuse_packed_streaming
from zoo.kernels.diagonal_scan import diagonal_scan
from zoo.registry import register
from zoo.schema import Fraction
from zoo.segments import handed_on


@dataclass
class MeanState(State):
    mean: Tensor


@register("running_mean", kind="mixer", ops=("diagonal_scan",), state_growth="constant")
class RunningMean(Block):
    """Running mean: h_t = a h_{t-1} + (1 - a) W x_t, y_t = h_t."""

    def __init__(self, dim: int, *, keep: Fraction = 0.5, device=None, dtype=None):
        super().__init__(dim)
        self.keep = keep
        self.proj = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self):
        init_linear_(self.proj)

    def forward(self, x, *, state=None, positions=None, doc_ids=None):
        refuse_packed_streaming(state, doc_ids)
        log_keep = torch.log(torch.tensor(self.keep, dtype=x.dtype)).expand(x.shape)
        start = None if state is None else state.mean.clone()
        h, last = diagonal_scan(log_keep, (1 - self.keep) * self.proj(x), initial_state=start, doc_ids=doc_ids)
        if state is not None:
            state.mean.copy_(handed_on(last))
        return h.to(x.dtype)

    def init_state(self, batch_size, max_len=None):
        return MeanState(self.proj.weight.new_zeros(batch_size, self.dim))

    def forward_flops(self, batch_size, seq_len, context_len=0, streaming=False):
        return linear_flops(batch_size * seq_len, self.proj)

    def state_bytes(self, batch_size, max_len):
        return batch_size * self.dim * self.itemsize

    def activation_elements(self, batch_size, seq_len):
        return 3 * batch_size * seq_len * self.dim  # x; multipliers; h
'''
CONFIG = """
name: new
dim: 32
vocab_size: 257
define: {layer: [{running_mean: {keep: 0.8}}, swiglu]}
trunk: [{repeat: 2, of: layer}]
train: {steps: 3, batch_size: 2, seq_len: 32, warmup_steps: 1, eval_every: 0, checkpoint_every: 0}
data: {source: corpus.txt}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new")
    package, info = folder / "site" / "their_zoo", folder / "site" / "their_zoo-1.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "running_mean.py").write_text(BLOCK)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-zoo\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[zoo.blocks]\nrunning_mean = their_zoo.running_mean:RunningMean\n")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return folder


def zoo(place, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(place / "site"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "zoo", *arguments]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_it_is_listed_built_trained_profiled_and_sampled(place):
    assert "running_mean" in zoo(place, "list", "--kind", "mixer")
    built = json.loads(zoo(place, "build", "config.yaml", "--json"))
    # two layers of W [32, 32], SwiGLU of width 96, two norms; a tied table and the last norm
    assert built["params"] == 2 * (32 * 32 + 3 * 32 * 96 + 2 * 32) + 257 * 32 + 32
    trained = json.loads(zoo(place, "train", "config.yaml", "--out", "run", "--json"))
    assert trained["step"] == 3
    profiled = json.loads(zoo(place, "profile", "run", "--seq", "32", "--batch", "1", "--json"))
    assert "running_mean" in json.dumps(profiled)
    assert "the" in zoo(place, "generate", "run", "--prompt", "the", "--max-new-tokens", "4")


def test_it_keeps_the_law(place):
    report = json.loads(zoo(place, "verify", "running_mean", "--json"))
    assert report["ok"], [r for r in report["results"] if not r["ok"]]
