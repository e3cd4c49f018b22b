"""Backward chunk by chunk of a row: the gradient of the whole row, in the memory of a chunk."""

from __future__ import annotations

import itertools

import pytest
import torch
from omegaconf import OmegaConf
from tiny_runs import config, history
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.conformance.subject import stir
from zoo.errors import ConfigError
from zoo.sections import DataSection, ParallelSection, TrainSection
from zoo.train.run import train
from zoo.train.sequence_chunks import backward, check, cut, draw, new_state

pytestmark = pytest.mark.usefixtures("short_samples")

ATTENTION = {"attention": {"num_heads": 4, "num_kv_heads": 2}}
WINDOW = {"attention": {"num_heads": 4, "window": 12, "sinks": 2}}
LAYER = [ATTENTION, "swiglu"]
MODELS = {
    "llama": [{"repeat": 2, "of": LAYER}],
    "window": [WINDOW, {"attention": {"num_heads": 4, "window": 50}}, "mla"],
    "mamba2": [{"repeat": 2, "of": [{"mamba2": {"state_dim": 16, "chunk_size": 16}}]}, "mamba"],
    "hybrid": [["gated_deltanet", "swiglu"], LAYER, ["kda", "swiglu"]],
    "recurrent": [
        "rg_lru",
        "gla",
        "retention",
        {"stitch": 32, "of": ["gla", "mlp"]},
        {"value_residual": {"of": ["rwkv7", "rwkv7_ffn", "rwkv7"]}},
    ],
    "parallel": [{"parallel": [ATTENTION, "mamba2"], "merge": "gated"}, {"stage": 2, "first": 1, "of": LAYER}],
    "loops": [
        {"loop": 3, "inject": "concat", "step_signal": "learned", "of": LAYER},
        {"loop": 3, "kv": "first", "of": LAYER},
        {"repeat": 2, "tie": "all", "of": LAYER},
    ],
    "routed": [
        {"loop": 3, "router": "act", "of": LAYER},
        {"loop": 3, "router": {"token_choice": {"balance_coef": 0.0}}, "of": ["gla"]},
        {"route": {"bodies": [LAYER, "mamba2", "skip"], "router": {"token_choice": {"balance_coef": 0.0}}}},
    ],
}


def hydra():
    """hydra_small with a middle that every token thinks through, without the loss that balances a batch."""
    document = OmegaConf.to_container(zoo.load_config("hydra_small"), resolve=True)
    document["trunk"][3]["loop"] = {"steps": 2}
    document["define"]["experts"]["chunk_moe"]["aux_coef"] = 0.0
    return document


def document(name):
    return hydra() if name == "hydra" else {"dim": 64, "vocab_size": 40, "trunk": MODELS[name]}


class Task:
    """Random rows for a model in double precision, and the gradient of their loss."""

    def __init__(self, config, length: int, rows: int = 2):
        self.model = stir(zoo.build(config).double()).train()
        self.meta = zoo.build(config, device="meta").double()
        ids = torch.randint(self.model.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
        self.tokens, self.labels = ids[:, :-1], ids[:, 1:]

    def loss(self, where=slice(None), state=None, wanted=True) -> Tensor:
        logits = self.model(self.tokens[:, where], state)
        return F.cross_entropy(logits.flatten(0, 1), self.labels[:, where].flatten(), reduction="sum")

    def whole(self) -> tuple[float, dict[str, Tensor]]:
        self.model.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss.item(), self.gradients()

    def chunked(self, size: int, drawn=None, keep: float = 1.0) -> tuple[float, dict[str, Tensor]]:
        self.model.zero_grad()
        chunks = cut(self.tokens.shape[1], size)
        state = new_state(self.meta, *self.tokens.shape, self.tokens.device)
        loss = backward(self.loss, state, chunks, drawn or [True] * len(chunks), keep)
        return loss.item(), self.gradients()

    def gradients(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    wrong = {n: (got[n] - g).abs().max().item() / max(1, g.abs().max().item()) for n, g in want.items()}
    assert {n: d for n, d in wrong.items() if not d < 1e-9} == {}


@pytest.mark.parametrize("name", [*MODELS, "hydra"])
def test_the_gradient_is_that_of_the_whole_row(name):
    task = Task(document(name), 200 if name == "hydra" else 75)
    loss, want = task.whole()
    got_loss, got = task.chunked(70 if name == "hydra" else 20)
    assert got_loss == pytest.approx(loss, rel=1e-12)
    assert all(g.abs().max() > 0 for n, g in want.items() if "scale" not in n and "router" not in n)
    same(got, want)


def test_any_size_of_chunks_does():
    task = Task(document("llama"), 24, rows=1)
    loss, want = task.whole()
    for size in (1, 7, 24, 100):
        got_loss, got = task.chunked(size)
        assert got_loss == pytest.approx(loss, rel=1e-12)
        same(got, want)


@pytest.mark.parametrize("name", ["llama", "window", "hybrid", "routed"])
def test_the_expected_gradient_of_drawn_chunks_is_that_of_the_whole_row(name):
    """Summed over all that can be drawn, each with its probability."""
    keep, task = 0.4, Task(document(name), 22)
    loss, want = task.whole()
    mean = {n: torch.zeros_like(g) for n, g in want.items()}
    for drawn in itertools.product((False, True), repeat=3):
        got_loss, got = task.chunked(8, list(drawn), keep)
        assert got_loss == pytest.approx(loss, rel=1e-12)  # also that of chunks that were not drawn
        for n, g in got.items():
            mean[n] += keep ** sum(drawn) * (1 - keep) ** (3 - sum(drawn)) * g
    same(mean, want)


def test_chunks_are_drawn_with_their_probability():
    torch.manual_seed(0)
    assert draw(9, 1.0) == [True] * 9
    assert sum(draw(4000, 0.25)) == pytest.approx(1000, abs=100)


def test_memory_is_that_of_a_chunk():
    task = Task({"dim": 64, "vocab_size": 40, "trunk": MODELS["mamba2"]}, 512, rows=1)
    peaks = []
    for run in (task.whole, lambda: task.chunked(64)):
        alive = most = 0

        class Kept:
            """A tensor that autograd holds."""

            def __init__(self, t):
                nonlocal alive, most
                self.t, self.bytes = t, t.numel() * t.element_size()
                alive += self.bytes
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.bytes

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.t):
            run()
        peaks.append(most)
    assert peaks[1] < peaks[0] / 6


def test_experts_count_each_token_once():
    config = {"dim": 32, "vocab_size": 40, "trunk": [{"moe": {"num_experts": 4, "top_k": 2, "balance": "bias"}}]}
    for drawn in (None, [True, False, True]):
        task = Task(config, 24)
        task.chunked(10, drawn, 0.5 if drawn else 1.0)
        assert task.model.layers[0].block.expert_counts.sum() == 2 * 24 * 2


# ------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_learn_the_same(source, tmp_path, dtype):
    runs = {}
    for size, more in ((0, {}), (7, {"loss_chunks": 2, "accumulation": 2})):
        out = tmp_path / f"{size}"
        given = {"dtype": dtype, "sequence_chunks": {"size": size}, **more}
        train(config("dense", source, **given), out=out, progress=False)
        runs[size] = [r["loss"] for r in history(out)]
    assert len(runs[0]) == 10
    assert runs[7] == pytest.approx(runs[0], rel=1e-4 if dtype == "float32" else 1e-2)


def test_a_run_of_drawn_chunks_learns(source, tmp_path):
    train(config("dense", source, sequence_chunks={"size": 6, "keep": 0.5}), out=tmp_path / "run", progress=False)
    losses = [r["loss"] for r in history(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.5


# ------------------------------------------------------------------------------------------------- refusals
def refusal(trunk, layout=None, data=None, distilled=False, **train_options) -> str:
    section = TrainSection.from_mapping({"sequence_chunks": {"size": 8}, **train_options})
    model = zoo.build({"dim": 64, "vocab_size": 40, "trunk": trunk}, device="meta")
    given = ParallelSection.from_mapping(layout), DataSection.from_mapping(data)
    with pytest.raises(ConfigError) as caught:
        check(model, section, *given, distilled)
    return str(caught.value)


def test_what_cannot_be_trained_so_is_refused_with_its_node():
    assert "layers.0: loop: expert_choice chooses otherwise" in refusal(
        [{"loop": 2, "router": "expert_choice", "of": LAYER}]
    )
    assert "layers.1.block: path_attention: every segment rewrites" in refusal(["gla", "path_attention"])
    assert "pages are shared" in refusal([{"attention": {"num_heads": 4, "cache": "prefix_tree"}}])
    assert "drop_path draws whole rows" in refusal([{"gla": {}, "residual": {"drop_path": 0.1}}])
    assert "it draws whole rows" in refusal([{"loop": 2, "sample_sigma": 0.5, "of": LAYER}])
    assert "ring runs token by token" in refusal([{"loop": 3, "ring": 2, "of": LAYER}])
    assert "skip_layer chooses otherwise" in refusal([{"route": {"of": LAYER, "router": "skip_layer"}}])
    assert "parallel.tp: 1" in refusal(["gla"], {"tp": 2})
    assert "packed documents" in refusal(["gla"], data={"doc_ids": True})
    assert "a student learns from whole rows" in refusal(["gla"], distilled=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_small", "does not read rows of text"),
        ("prefix_small", "prefix_lm: does not read from left to right"),
        ("trm_small", "feedback: what it does depends on where segments end"),
    ],
)
def test_whole_models_are_refused(name, words):
    section = TrainSection.from_mapping({"sequence_chunks": {"size": 8}})
    with pytest.raises(ConfigError, match=words):
        check(zoo.build(name, device="meta"), section, ParallelSection(), DataSection(), False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sequence_chunks": {"keep": 0.5}}, "keep: goes with size"),
        ({"sequence_chunks": {"size": 8, "keep": 0}}, "keep: must be greater than 0"),
        ({"sequence_chunks": {"size": 8}, "compile": True}, "train.sequence_chunks: goes with compile: false"),
        ({"sequence_chunks": {"size": 8}, "activation_checkpoint": "full"}, "leave activation_checkpoint out"),
    ],
)
def test_options_that_do_not_go_together(given, words):
    with pytest.raises(ConfigError) as caught:
        TrainSection.from_mapping(given)
    assert words in str(caught.value)


def test_a_run_that_is_refused_does_not_begin(source, tmp_path):
    with pytest.raises(ConfigError, match="packed documents"):
        document = config("dense", source, sequence_chunks={"size": 8})
        train({**document, "data": {**document["data"], "doc_ids": True}}, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
