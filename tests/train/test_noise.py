"""Rows for block diffusion, and runs that train on them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tiny_runs import history, texts

import zoo
from zoo.sections import DiffusionSection
from zoo.train.corpus import Stream
from zoo.train.loader import HeldoutRows, Loader, Row, TrainRows, batch
from zoo.train.noise import NoisyRows, search_clip
from zoo.train.synthetic import IGNORE


def text(count):
    return Stream(np.arange(count), np.array([0]))


def noisy(recipe="bd3", group=4, count=1000, block=4, clip=(0.001, 1.0)):
    section = DiffusionSection(recipe=recipe, block_size=block, clip=clip)
    return NoisyRows(TrainRows(text(count), 16, 0), section, seed=3, group=group)


def test_noise_belongs_to_the_row():
    rows = noisy()
    together, apart = batch(rows, 0, 8), [batch(rows, i, 2) for i in (0, 2, 4, 6)]
    for name in ("inputs", "labels", "noise"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(b, name) for b in apart]))
    assert torch.equal(together.labels, together.inputs)  # a token is scored in its own place
    shifted = batch(noisy("nbdiff"), 0, 8)
    assert (shifted.labels[:, 0] == IGNORE).all() and torch.equal(shifted.labels[:, 1:], together.labels[:, 1:])


def test_rates_are_spread_evenly_over_a_batch():
    rows = noisy(group=8, clip=(0.25, 0.75))
    for first in (0, 8):
        rates = batch(rows, first, 8).noise.unflatten(1, (4, 4))
        seen = rates.amax(-1)  # of each block the rate, where some token of it was masked
        assert ((rates == 0) | (rates == seen[..., None])).all()
        cells = ((seen[seen > 0] - 0.25) / 0.5 * 32).floor().int().tolist()
        assert len(cells) == len(set(cells)) > 20 and 0 <= min(cells) <= max(cells) < 32


def test_blocks_grow():
    section = DiffusionSection(block_size=8, curriculum=(1, 4))
    rows = NoisyRows(TrainRows(text(1000), 16, 0), section, seed=3, group=2, steps=6)
    parts = [batch(rows, first, 2) for first in range(0, 16, 2)]
    assert [p.block for p in parts] == [1, 1, 4, 4, 8, 8, 8, 8]
    for part in parts:
        rates = part.noise.unflatten(1, (-1, part.block))
        assert ((rates == 0) | (rates == rates.amax(-1, keepdim=True))).all()


def test_every_token_counts_once_in_expectation():
    """Whatever the range of rates; and a narrow one has less variance."""
    spread = {}
    for clip in ((0.001, 1.0), (0.3, 0.8)):
        noise = batch(noisy(clip=clip, count=20000), 0, 600).noise
        weight = torch.where(noise > 0, 1 / noise, 0)
        error = weight.unflatten(1, (4, 4)).mean(-1)
        spread[clip] = error.std()
        assert abs(error.mean() - 1) < 4 * error.std() / error.numel() ** 0.5
    assert spread[0.3, 0.8] < spread[0.001, 1.0]


def test_counted_noise_masks_every_number_of_tokens_equally_often():
    rows = NoisyRows(TrainRows(text(1000), 16, 0), DiffusionSection(block_size=4), seed=3, group=8, counted=True)
    noise = batch(rows, 0, 8).noise.unflatten(1, (4, 4))
    count = (noise > 0).sum(-1)
    assert torch.bincount(count.flatten()).tolist() == [0, 8, 8, 8, 8]
    assert torch.equal(noise.amax(-1), count / 4)
    assert torch.equal(torch.where(noise > 0, 1 / noise, 0).sum(-1), torch.full((8, 4), 4.0))
    assert len({tuple(b) for b in (noise > 0).flatten(0, 1).int().tolist()}) > 8


@pytest.mark.parametrize("size", [1, 3, 5])
def test_counted_noise_has_the_expectation_of_all_rates(size):
    """Over every mask of a block: its probability with a count drawn evenly, times size / count, against the integral
    over rates t of its probability times 1 / t."""
    for count in range(1, size + 1):
        even = 1 / size / math.comb(size, count) * size / count
        t = (np.arange(100000) + 0.5) / 100000
        assert even == pytest.approx((t ** (count - 1) * (1 - t) ** (size - count)).mean(), rel=1e-6)


def test_search_takes_the_range_of_least_variance():
    class Model(torch.nn.Linear):  # its loss depends on the rate alone, and is wild outside of 0.3 .. 0.8
        block_size = 4

        def losses(self, tokens, noise, doc_ids):
            assert not self.training and not torch.is_grad_enabled()
            index = next(counter)
            rates = torch.tensor(np.stack([rows.rates(i, 4) for i in range(2 * index, 2 * index + len(tokens))]))
            wild = (rates < 0.3) | (rates > 0.8)
            return torch.where(wild, 50 * rates, 1).repeat_interleave(4, 1)

    rows, counter = noisy(), itertools.count()
    model = Model(1, 1).train()
    assert search_clip(model, rows, 40, 2) == (0.3, 0.8) and model.training
    # the range is part of the position in the data
    loader = Loader(rows, 2)
    rows.clip = (0.3, 0.8)
    next(iter(loader))
    again = Loader(noisy(), 2)
    again.load_state_dict(loader.state_dict())
    for a, b in zip(next(iter(loader)), next(iter(again)), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_held_out_tokens_are_scored_once():
    section = DiffusionSection(block_size=4)
    for count in (32, 33, 38):
        rows = HeldoutRows(text(count), 16)
        noisy_rows = NoisyRows(rows, section, 0, 4, split=1)
        labels = torch.cat([batch(noisy_rows, i, 1).labels for i in range(len(rows))]).flatten()
        scored = labels[labels != IGNORE].tolist()
        assert scored == list(range(len(scored))) and len(scored) >= count - 1


def test_unscored_inputs_are_kept():
    class Rows:
        def row(self, index):
            return Row(np.array([5, 6, 7, 5]), np.array([6, 7, 8, IGNORE]))

    row = NoisyRows(Rows(), DiffusionSection(block_size=2), 0, 1).row(0)
    assert row.inputs.tolist() == [5, 6, 7, 8] and row.labels.tolist() == [5, 6, 7, 8]


SMALL = ["dim=32", "vocab_size=258", "trunk[0].repeat=1", "define.layer[0].attention.num_heads=2", "train.batch_size=8",
         "train.seq_len=64", "train.steps=40", "train.lr=0.01", "train.warmup_steps=5", "train.eval_every=20",
         "train.eval_batches=1", "train.checkpoint_every=0", "data.heldout_bytes=2000"]  # fmt: skip


@pytest.mark.parametrize("name", ["bd3_small", "fast_dllm_small", "nbdiff_small"])
def test_small_configurations_learn(name, tmp_path, monkeypatch):
    pytest.importorskip("torchtitan")
    from zoo.train import prepare, run

    monkeypatch.setattr(prepare, "SAMPLE_TOKENS", 40)
    config = zoo.load_config(name, [*SMALL, f"data.source={texts(tmp_path / 'data')}"])
    searched = name == "bd3_small"
    config.diffusion.search_clip = searched
    config.train.activation_checkpoint = "full" if name == "nbdiff_small" else "none"
    whole = run.train(config, out=tmp_path / "run", progress=False)
    records = history(tmp_path / "run")
    first, last = (sum(r["loss"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert last < 0.75 * first
    held = [r["heldout_loss"] for r in records if "heldout_loss" in r]
    assert len(held) == 2 and held[1] < held[0]
    if searched:
        assert all(0 < r["clip_low"] < r["clip_high"] <= 1 for r in records if "heldout_loss" in r)
    assert whole.evaluation["bits_per_byte"] < 8 and whole.evaluation["accuracy"] > 0.1
    assert "\N{BLACK RIGHT-POINTING SMALL TRIANGLE}" in whole.sample
    if name == "fast_dllm_small":  # the noise is the row's: a step in pieces is the same step
        config.train |= {"accumulation": 2, "steps": 1}
        assert run.train(config, progress=False).loss == pytest.approx(records[0]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.seq_len=72", "train.seq_len: must be a multiple of diffusion.block_size 16, got 72"),
        ("vocab_size=257", "vocab_size: the tokenizer bytes has 257 ids and the mask needs one, vocab_size is 257"),
        ("data.source=mqar", "data.source: block diffusion learns text, and mqar is a task"),
    ],
)
def test_what_cannot_be_trained(change, words, tmp_path):
    pytest.importorskip("torchtitan")
    from zoo.train import run

    config = zoo.load_config("bd3_small", [*SMALL, f"data.source={texts(tmp_path / 'data')}", change])
    with pytest.raises(zoo.ConfigError) as caught:
        run.train(config, progress=False)
    assert words in str(caught.value)
