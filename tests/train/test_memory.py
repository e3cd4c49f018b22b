"""How a step is computed, in less memory or in half precision, does not change what it computes."""

import pytest
import torch
from tiny_runs import config, history
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from zoo.errors import ConfigError
from zoo.sections import TrainSection
from zoo.train import parallelize as parallelize_module
from zoo.train import titan
from zoo.train.chunked_loss import LOGITS_AT_ONCE, chunks_for, loss_by_chunks
from zoo.train.lowbit import to_float8
from zoo.train.parallelize import cheapest, parallelize
from zoo.train.run import train

pytestmark = pytest.mark.usefixtures("short_samples")


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    train(config("hybrid", source, steps=3), out=out, progress=False)
    return history(out)


DOCUMENT = {
    "name": "m", "dim": 32, "vocab_size": 50,
    "trunk": [[{"attention": {"num_heads": 2}}, "swiglu"],
              [{"gated_deltanet": {"num_heads": 2}}, {"moe": {}}], "swiglu",
              {"loop": {"steps": 2}, "of": ["swiglu"]}],
}  # fmt: skip


def built(dtype=torch.float32):
    torch.manual_seed(0)
    return zoo.build(DOCUMENT, dtype=dtype)


def step(model, tokens):
    model.zero_grad()
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


# ---------------------------------------------------------------------------------------- recomputation
class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["full", "selective", "budget"])
def test_recomputation_changes_nothing(how):
    tokens = torch.randint(0, 50, (2, 24))
    model = built()
    with Products() as before:
        expected = step(model, tokens)
    parallelize(model, TrainSection(activation_checkpoint=how, activation_budget=0.6))
    with Products() as after:
        found = step(model, tokens)
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][n], g) for n, g in expected[1].items())
    extra = after.count - before.count
    assert extra == 0 if how == "selective" else extra > 0


def test_a_budget_takes_the_layers_that_cost_least():
    model = built()
    layers = list(model.layers)
    kept = {layer: sum(x.cost.activation_bytes for x in layer.leaves(1, 64, 0, "train")) for layer in layers}
    total, stream = sum(kept.values()), 64 * 32 * 4
    assert cheapest(layers, 1.0, 64, 32) == []
    assert set(cheapest(layers, 0.0, 64, 32)) == set(layers)
    for budget in (0.3, 0.5, 0.8):
        chosen = cheapest(layers, budget, 64, 32)
        after = total - sum(kept[one] - stream for one in chosen)
        assert after <= budget * total < after + kept[chosen[-1]] - stream


# ------------------------------------------------------------------------------------------------- loss
class Largest(TorchDispatchMode):
    """The most elements that any new tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_is_the_loss_without_its_logits(tied):
    torch.manual_seed(0)
    document = DOCUMENT | {"vocab_size": 3000, "tie_embeddings": tied, "logit_cap": 5.0, "trunk": ["swiglu"], "dim": 16}
    model = zoo.build(document)
    tokens, labels = torch.randint(0, 3000, (2, 2, 30))
    labels[:, :4] = -100

    def total(logits, wanted):
        return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum", ignore_index=-100)

    found, peaks = [], []
    for chunks in (1, 5, 7):
        model.zero_grad()
        with Largest() as seen:
            loss = loss_by_chunks(model, tokens, labels, None, chunks, total)
            loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
        peaks.append(seen.elements)
    whole = total(model(tokens), labels)
    for loss, gradients in found:
        torch.testing.assert_close(loss, whole.detach())
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-4, atol=1e-5)
    weights = 3000 * 16
    assert peaks == [2 * 30 * 3000, weights, weights]  # no logits are larger than the table of embeddings


def test_chunks_follow_the_size():
    assert chunks_for(0, 4096, 257) == 1 and chunks_for(3, 1, 1) == 3
    assert chunks_for(0, 8192, 128_256) == -(-8192 * 128_256 // LOGITS_AT_ONCE) > 10


# ------------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"activation_checkpoint": "selective"}, 1e-6),
        ({"activation_checkpoint": "budget", "activation_budget": 0.3}, 1e-6),
        ({"loss_chunks": 4}, 1e-5),
        ({"dtype": "bfloat16"}, 0.02),
        ({"dtype": "bfloat16", "activation_checkpoint": "selective", "loss_chunks": 2}, 0.02),
    ],
)
def test_runs(plain, source, tmp_path, changes, tolerance):
    train(config("hybrid", source, steps=3, **changes), out=tmp_path / "run", progress=False)
    found = history(tmp_path / "run")
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in plain], rel=tolerance)
    if "dtype" in changes:
        assert [r["loss"] for r in found] != [r["loss"] for r in plain]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "selective"])
def test_compiled(plain, source, tmp_path, monkeypatch, how):
    monkeypatch.setattr(parallelize_module, "COMPILE_BACKEND", "aot_eager")
    given = config("hybrid", source, steps=3, activation_checkpoint=how, compile=True)
    train(given, out=tmp_path / "run", progress=False)
    assert [r["loss"] for r in history(tmp_path / "run")] == pytest.approx([r["loss"] for r in plain], rel=1e-4)


def test_float8_where_there_is_none_is_one_sentence(source):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"train.dtype: float8 needs a GPU of .* none here: use dtype: bfloat16"):
        train(config("dense", source, dtype="float8"), progress=False)


def test_float8_rounds_the_large_linear_layers(source, plain, monkeypatch):
    """Emulated: the numbers of float8 without its hardware."""
    pytest.importorskip("torchao.float8")
    model = zoo.build(DOCUMENT, device="meta")
    names = {n for n, _ in model.named_parameters()}
    to_float8(model, emulate=True)
    assert not any(type(m).__name__ == "Float8Linear" for m in model.modules())  # all too small
    to_float8(model, smallest=32, emulate=True)
    assert type(model.layers[0].items[0].block.q_proj).__name__ == "Float8Linear"
    assert type(model.lm_head).__name__ == "Linear"
    assert {n for n, _ in model.named_parameters()} == names
    monkeypatch.setattr(titan, "to_float8", lambda model: to_float8(model, smallest=16, emulate=True))
    made = config("dense", source, dtype="float8", steps=3)
    losses = [train(made, progress=False).loss]
    made["train"]["dtype"] = "float32"
    losses.append(train(made, progress=False).loss)
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


def test_loss_in_chunks_needs_logits_of_the_next_token(source):
    made = config("dense", source, loss_chunks=2) | {"vocab_size": 258, "diffusion": {"block_size": 8}}
    with pytest.raises(ConfigError, match=r"train.loss_chunks: goes with training on the next token"):
        train(made, progress=False)
