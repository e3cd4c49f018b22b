"""What `zoo eval` measures: needles in long texts, synthetic tasks at several lengths, held-out text."""

import json

import pytest
import torch
from torch import nn

import zoo
from zoo.errors import ConfigError
from zoo.train import passkey
from zoo.train.passkey import DEPTHS, Passkey, find_needles, logits_from
from zoo.train.suite import Trained, evaluate_run
from zoo.train.synthetic import IGNORE
from zoo.train.tokenizer import ByteTokenizer

MODEL = {
    "name": "small",
    "dim": 16,
    "vocab_size": 257,
    "trunk": [[{"gla": {"num_heads": 2}}, {"mlp": {"hidden_dim": 24}}], [{"attention": {"num_heads": 2}}]],
    "train": {"seq_len": 32, "batch_size": 4},
}


class Finder(nn.Module):
    """Says what followed the last 10 tokens where they stood first among the `reach` tokens before."""

    def __init__(self, reach):
        super().__init__()
        self.reach, self.scale = reach, nn.Parameter(torch.ones(()))

    def init_state(self, rows, max_len):
        return [[] for _ in range(rows)]

    def hidden(self, tokens, state):
        made = torch.zeros(*tokens.shape, 257)
        for row, seen in enumerate(state):
            for at, token in enumerate(tokens[row].tolist()):
                seen.append(token)
                near, last = bytes(t % 256 for t in seen[-self.reach :]), bytes(t % 256 for t in seen[-10:])
                first = near.find(last)
                if 0 <= first < len(near) - 10:
                    made[row, at, near[first + 10]] = 50
        return made

    def head(self, hidden):
        return hidden


def test_prompts_hold_the_key_at_its_depth():
    tokenizer = ByteTokenizer()
    for depth in DEPTHS:
        text, answer = Passkey(tokenizer, 900, depth).prompt(3)
        words, key = bytes(text[1:]).decode(), bytes(answer).decode()
        assert text[0] == 256 and words.endswith("The pass key is") and len(key) == 6 and key[1:].isdigit()
        assert words.count(key) == 2 and 750 < len(text) + len(answer) <= 900
        place = words.find("The pass key is") / words.find("What is")
        assert place == pytest.approx(depth * 0.92, abs=0.1)
    assert Passkey(tokenizer, 900, 0.5).prompt(3) != Passkey(tokenizer, 900, 0.5).prompt(4)
    inputs, labels = Passkey(tokenizer, 300, 0.5).batch(0, 3)
    row, scored = inputs[1], labels[1] != IGNORE
    assert bytes(labels[1][scored].tolist()) == bytes(Passkey(tokenizer, 300, 0.5).prompt(1)[1])
    assert torch.equal(row[1:][scored[:-1]], labels[1][:-1][scored[:-1]])  # the right digits are given


def test_who_sees_everything_finds_every_needle_and_who_forgets_only_the_near_ones(monkeypatch):
    monkeypatch.setattr(passkey, "SEGMENT", 100)
    far = find_needles(Finder(10**6), ByteTokenizer(), 500, count=3, size=2)
    assert [(f["depth"], f["accuracy"], f["digits"]) for f in far] == [(d, 1.0, 1.0) for d in DEPTHS]
    assert all(f["loss"] < 1e-6 for f in far)
    near = find_needles(Finder(200), ByteTokenizer(), 800, count=2, size=2)
    assert near[0]["accuracy"] == near[1]["accuracy"] == 0 and near[-1]["accuracy"] == 1


def test_texts_read_in_segments_give_the_logits_of_the_whole(monkeypatch):
    monkeypatch.setattr(passkey, "SEGMENT", 7)
    model = zoo.build(MODEL, dtype=torch.float64)
    tokens = torch.randint(0, 257, (2, 40))
    assert torch.allclose(logits_from(model, tokens, 25), model(tokens)[:, 25:].float(), atol=1e-5)


@pytest.fixture
def save(tmp_path):
    def make(**changes):
        zoo.build(MODEL | changes).save_pretrained(tmp_path / "m")
        return tmp_path / "m"

    return make


def test_tasks_by_length(save):
    folder = save(data={"source": "mqar", "num_pairs": 3}, vocab_size=32)
    trained = Trained.load(folder)
    assert trained.default_tasks() == ["heldout", "mqar"]
    found = evaluate_run(trained, ["heldout", "mqar", "induction"], lengths=[24, 8, 24], samples=6)
    heldout, mqar, induction = found
    assert set(heldout["figures"]) == {"loss", "accuracy", "scored_tokens"}
    assert mqar["rows"][0] == {"length": 8, "skipped": "must be at least 12 for mqar with num_pairs 3, got 8"}
    assert mqar["rows"][1]["length"] == 24 and 0 <= mqar["rows"][1]["accuracy"] <= 1
    assert mqar["trained_on"] and not induction["trained_on"] and len(induction["rows"]) == 2
    assert json.loads((folder / "evaluation" / "mqar.json").read_text()) == mqar


def test_text_models_are_asked_in_words(save, tmp_path):
    (tmp_path / "t.txt").write_text("words and more words\n" * 200)
    folder = save(data={"source": str(tmp_path / "t.txt"), "heldout_bytes": 300})
    heldout, needle = evaluate_run(Trained.load(folder), lengths=[100, 200, 300], samples=2)
    assert heldout["figures"]["bits_per_byte"] > 0
    assert needle["rows"][0]["skipped"].startswith("needs 1") and len(needle["rows"]) == 1 + 2 * len(DEPTHS)
    (tmp_path / "other.txt").write_text("nothing alike 12345\n" * 200)
    other = Trained.load(folder, [f"data.source={tmp_path / 'other.txt'}"])
    assert evaluate_run(other, ["heldout"])[0]["figures"] != heldout["figures"]


def test_requests_that_cannot_be_met(save):
    folder = save()
    with pytest.raises(ConfigError, match="neddle: no such task; did you mean needle"):
        evaluate_run(Trained.load(folder), ["neddle"])
    with pytest.raises(ConfigError, match="only data and train can be changed, not dim"):
        Trained.load(folder, ["dim=32"])
    with pytest.raises(ConfigError, match="no length fits: needs"):
        evaluate_run(Trained.load(folder), ["needle"], lengths=[9])
