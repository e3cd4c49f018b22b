"""Exported folders are loaded by transformers in a process that has no zoo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported_models import MODELS

import zoo
from zoo.errors import ConfigError
from zoo.export.hf import export_hf
from zoo.train.tokenizer import ByteTokenizer

LOADING = Path(__file__).with_name("loading.py")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The models, their folders, and what a stranger finds in these."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("exported")
    models = {}
    for name, config in MODELS.items():
        models[name] = model = zoo.build(config, seed=3)
        with torch.no_grad():
            for p in model.parameters():  # so that nothing is at its usual beginning
                p.add_(0.02 * torch.randn_like(p))
        export_hf(model, root / name, ByteTokenizer())
        torch.save(torch.randint(1, model.vocab_size, (2, 21)), root / f"{name}.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", str(LOADING), str(root)], capture_output=True, text=True, timeout=300,
        env={"HF_MODULES_CACHE": str(root.parent / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return models, root, torch.load(root / "found.pt")


@pytest.mark.parametrize("name", MODELS)
def test_a_stranger_computes_the_same(exported, name):
    models, root, every = exported
    model, found = models[name], every[name]
    tokens = torch.load(root / f"{name}.pt")
    with torch.no_grad():
        logits = model(tokens)
    greedy = model.generate(tokens, 8)
    assert found["told"] == {} and not found["training"]
    assert found["tied"] == model._tied
    close(found["logits"], logits)
    assert torch.equal(found["greedy"], greedy)
    assert torch.equal(found["without_cache"], greedy)
    close(found["second"], logits[:, -1:])
    assert found["length"] == tokens.shape[1]
    assert found["several"] == (4, tokens.shape[1] + 8)
    close(found["reloaded"], logits)
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert found["loss"] == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_padding(exported, name):
    models, root, every = exported
    tokens, found = torch.load(root / f"{name}.pt"), every[name]
    with torch.no_grad():
        close(found["padded"], models[name](tokens))
    behind, inside = found["refused"]
    assert "padding stands in front of a row" in behind
    assert "inside a row" in inside
    alone = [models[name].generate(t[None], 8)[0, -8:] for t in (tokens[0], tokens[1, 2:])]
    assert torch.equal(found["left"][:, -8:], torch.stack(alone))
    assert torch.equal(found["left_beams"][:, -8:], found["left_beams_alone"])


def test_gradient_reaches_what_it_reaches_here(exported):
    _, _, every = exported
    assert every["llama"]["without_gradient"] == every["mamba2"]["without_gradient"] == []


def test_tokenizer(exported):
    _, _, every = exported
    text = "Ünder\n two  words"
    assert every["ids"] == list(text.encode()) and every["text"] == text and every["end"] == 256


def test_pipeline(exported):
    """Texts of two lengths in one batch, by the tokenizer and the generation settings of the folder."""
    models, _, every = exported
    for text, written in zip((b"Once upon", b"A"), every["written"], strict=True):
        assert written[-4:] == models["llama"].generate(torch.tensor([[*text]]), 4)[0, -4:].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_folder(exported, name):
    models, root, _ = exported
    folder = root / name
    code = (folder / "modeling_zoo.py").read_text()
    assert "import zoo" not in code and "from zoo" not in code and "@register" not in code
    assert "triton" not in code and "def forward_flops" not in code and "def parallel_plan" not in code
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_zoo.ZooForCausalLM"
    card = (folder / "README.md").read_text()
    assert f"{sum(p.numel() for p in models[name].parameters()):,} parameters" in card
    assert (folder / "graph.svg").read_text().startswith("<svg")
    again = zoo.from_pretrained(folder)  # it is a saved model all the same
    for (key, mine), (_, theirs) in zip(again.state_dict().items(), models[name].state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), key


def test_licence_is_carried_along(tmp_path):
    origin = {"source": "somebody/llama", "license": "mit\nmalicious: true"}
    export_hf(zoo.build({**MODELS["llama"], "origin": origin}), tmp_path, None)
    card = (tmp_path / "README.md").read_text().splitlines()
    assert card[1] == "license: mit malicious&#58; true" and any("somebody/llama" in line for line in card)
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("config, why", [("bd3_small", "diffusion"), ("vit_small", "vision")])
def test_refused(tmp_path, config, why):
    with pytest.raises(ConfigError, match=why):
        export_hf(zoo.build(config), tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def close(a, b):
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()
