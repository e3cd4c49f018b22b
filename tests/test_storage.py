"""Saved models: two files, whole or absent, and clear words for what does not fit."""

import errno

import pytest
import torch

import zoo
from zoo.architectures import storage

CONFIG = {
    "name": "tiny",
    "dim": 32,
    "vocab_size": 40,
    "trunk": [{"moe": {"num_experts": 2}, "share": "m"}, {"attention": {"num_heads": 2}}, {"share": "m"}],
}


def tokens():
    return torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_keeps_every_bit_the_dtype_and_the_sharing(tmp_path, tied, dtype):
    model = zoo.build({**CONFIG, "tie_embeddings": tied}, dtype=dtype, seed=3)
    model.save_pretrained(tmp_path)
    again = zoo.from_pretrained(tmp_path)
    assert again.lm_head.weight.dtype == dtype
    assert torch.equal(again(tokens()), model(tokens()))
    assert again.layers[0] is again.layers[2]
    assert (again.lm_head.weight is again.tok_embeddings.weight) == tied
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "model.safetensors"]


def test_the_same_seed_gives_the_same_weights_whatever_was_built_before():
    first = zoo.build(CONFIG, seed=5)
    torch.rand(100)
    second = zoo.build(CONFIG, seed=5)
    other = zoo.build(CONFIG, seed=6)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim < 2 or not torch.equal(a, c)


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    zoo.build(CONFIG, seed=5)
    assert torch.equal(torch.rand(3), expected)


def test_meta_allocates_nothing():
    model = zoo.build("hydra_hybrid", device="meta")
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "there is no model.safetensors"),
        (lambda d: (d / "config.yaml").unlink(), "there is no config.yaml"),
        (lambda d: (d / "model.safetensors").write_bytes(b"PK\x03\x04 no safetensors"), "damaged or no safetensors"),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
            "damaged or no safetensors",
        ),
        (
            lambda d: (d / "config.yaml").write_text((d / "config.yaml").read_text().replace("dim: 32", "dim: 48")),
            "do not fit the config; shape",
        ),
        (
            lambda d: (d / "config.yaml").write_text(
                (d / "config.yaml").read_text().replace("num_heads: 2", "num_heads: 2\n    qk_norm: head")
            ),
            "missing: ",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path, damage, words):
    zoo.build(CONFIG).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(zoo.ConfigError, match=words) as caught:
        zoo.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_full_disk_leaves_the_old_model_and_no_rubbish(tmp_path, monkeypatch):
    old = zoo.build(CONFIG, seed=1)
    old.save_pretrained(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(zoo.ZooError, match="No space left on device"):
        zoo.build(CONFIG, seed=2).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "model.safetensors"]
    assert torch.equal(zoo.from_pretrained(tmp_path)(tokens()), old(tokens()))


def test_generate():
    model = zoo.build(CONFIG)
    x = tokens()
    assert torch.equal(model.generate(x, 0), x)
    drawn = model.generate(x, 5, temperature=1.0, seed=7)
    assert torch.equal(drawn, model.generate(x, 5, temperature=1.0, seed=7))
    assert torch.equal(model.generate(x, 5, temperature=1.0, top_k=1, seed=7), model.generate(x, 5))
    assert drawn.shape == (2, 11) and torch.equal(drawn[:, :6], x)
    for bad in (x.float(), x[0], x[:, :0]):
        with pytest.raises(ValueError, match="tokens must be"):
            model.generate(bad, 1)
    for wrong in ({"state": model.init_state(1)}, {"state": model.init_state(3)}, {"doc_ids": x[:, 1:]}):
        with pytest.raises(ValueError, match=r"the state is of|must be as the tokens"):
            model(x, **wrong)


@pytest.mark.parametrize("common", [63, 64, 79, 80])
def test_generate_reads_a_common_beginning_once(common):
    model = zoo.build({**CONFIG, "trunk": [*CONFIG["trunk"], "gla", "mamba2"]}, dtype=torch.float64)
    x = torch.randint(20, (3, 80), generator=torch.Generator().manual_seed(0))
    x[:, :common] = x[0, :common]
    x[1:, common:] += 20  # row 0 differs from both there
    seen = []
    model.tok_embeddings.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    made = model.generate(x, 6)
    once = {63: [(3, 80)], 64: [(1, 64), (3, 16)], 79: [(1, 79), (3, 1)], 80: [(1, 79), (3, 1)]}[common]
    assert seen == [*once, *[(3, 1)] * 5]
    assert torch.equal(made, torch.cat([model.generate(row[None], 6) for row in x]))


def test_documents_with_a_state_are_refused():
    model = zoo.build(CONFIG)
    with pytest.raises(ValueError, match="doc_ids with a state"):
        model(tokens(), state=model.init_state(2), doc_ids=torch.zeros_like(tokens()))


def test_the_meta_device_holds_while_fresh_memory_is_poisoned():
    """Else the tests of large models would allocate them."""
    assert torch.empty(2).isnan().all()
    with torch.device("meta"):
        assert torch.empty(2).is_meta
