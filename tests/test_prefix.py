"""Models whose first tokens are read as a whole: what the prefix sees, what training asks, what is refused."""

import numpy as np
import pytest
import torch

import zoo
from zoo.train.loader import IGNORE, PrefixRows, Row

PREFIX = 8
SHRINK = ["dim=64", "vocab_size=61", f"prefix={PREFIX}", f"define.far[0].jrt.prefix_len={PREFIX}",
          f"define.near[0].prefix_lm.prefix_len={PREFIX}"]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    model = zoo.build("prefix_small", SHRINK).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype) / max(p.shape[-1:]) ** 0.5)
    return model


def tokens(length, seed=3):
    return torch.randint(61, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_the_prefix_sees_itself_and_nothing_else_sees_ahead(model):
    x, changed = tokens(20), tokens(20)
    for at in range(20):
        changed = x.clone()
        changed[:, at] = (x[:, at] + 1) % 61
        moved = (model(changed) - model(x)).abs().amax((0, 2)) > 1e-9
        assert moved.tolist() == [t >= (0 if at < PREFIX else at) for t in range(20)]


@torch.no_grad()
def test_segments_behind_the_prefix(model):
    x = tokens(30)
    want = model(x)
    for cuts in ([PREFIX, *[1] * 22], [13, 1, 16]):
        state = model.init_state(2, 30)
        made = torch.cat([model(part, state=state) for part in x.split(cuts, 1)], 1)
        torch.testing.assert_close(made, want, rtol=0, atol=1e-9)
    made = x
    for _ in range(6):
        made = torch.cat([made, model(made)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(x, 6), made)


@torch.no_grad()
def test_packed_documents_have_prefixes_of_their_own(model):
    x, ids = tokens(30), torch.tensor([0] * 13 + [1] * 17).expand(2, 30)
    alone = torch.cat([model(x[:, :13]), model(x[:, 13:])], 1)
    torch.testing.assert_close(model(x, doc_ids=ids), alone, rtol=0, atol=1e-9)


def test_what_the_prefix_has_seen_is_not_asked():
    class Two:
        def row(self, index):
            return Row(
                np.arange(9),
                np.arange(1, 10, dtype=np.uint16),
                np.array([4, 4, 4, 4, 4, 6, 6, 7, 7]) if index else None,
            )

    rows = PrefixRows(Two(), 3)
    # the last token of the prefix is asked for the first one behind it
    assert rows.row(0).labels.tolist() == [IGNORE, IGNORE, 3, 4, 5, 6, 7, 8, 9]
    assert rows.row(1).labels.tolist() == [IGNORE, IGNORE, 3, 4, 5, IGNORE, IGNORE, IGNORE, IGNORE]


@pytest.mark.parametrize(
    ("top", "words"),
    [
        ({"trunk": ["prefix_lm"]}, "the first 256 may, with `prefix: 256` at the top"),
        ({"prefix": 100, "trunk": [{"jrt": {"prefix_len": 101}}]}, "looks at later tokens"),
        ({"prefix": 100, "trunk": [{"attention": {"causal": False}}]}, "looks at later tokens"),
        ({"prefix": 300, "trunk": [{"route": ["prefix_lm"], "router": "mod"}]}, "no router above"),
        ({"prefix": 9, "diffusion": {}, "trunk": ["attention"]}, "has no prefix"),
        ({"prefix": 0, "trunk": ["attention"]}, "at least 1|>= 1"),
    ],
)
def test_mistakes(top, words):
    with pytest.raises(zoo.ConfigError, match=words):
        zoo.build({"dim": 64, "vocab_size": 9, **top})


def test_it_trains(tmp_path, monkeypatch):
    pytest.importorskip("torchtitan")
    from tiny_runs import texts

    from zoo.train import prepare, run

    monkeypatch.setattr(prepare, "SAMPLE_TOKENS", 8)
    config = zoo.load_config("prefix_small", [*SHRINK, "vocab_size=257"])
    config["train"] = sizes = {"steps": 2, "batch_size": 4, "seq_len": 24, "lr": 0.01, "eval_batches": 1}
    config["data"] = {"source": str(texts(tmp_path / "data")), "heldout_bytes": 512, "doc_ids": True}
    result = run.train(config, progress=False)
    scored, made = result.evaluation["heldout_tokens"], result.evaluation["heldout_bytes"]
    assert 0 < scored < 0.8 * made and np.isfinite(result.evaluation["loss"])
    config["train"] = {**sizes, "seq_len": PREFIX}
    with pytest.raises(zoo.ConfigError, match="more than prefix"):
        run.train(config, progress=False)
