"""zoo import: folders of the Hub as saved models."""

from __future__ import annotations

import json

import pytest
import torch

import zoo as package


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A model as it lies on the Hub: weights, tokenizer, licence."""
    from tokenizers import Tokenizer, models
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=40,
    )  # fmt: skip
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    words = {"<|endoftext|>": 0} | {chr(97 + i): 1 + i for i in range(26)}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n")
    (folder / "modeling_evil.py").write_text("raise SystemExit('executed')")
    return folder


def test_import_saves_what_generates(zoo, hub, tmp_path):
    told = json.loads(zoo("import", hub, "--out", tmp_path / "ours", "--dtype", "float32", "--json").out)
    assert (told["family"], told["license"], told["dtype"]) == ("qwen2", "apache-2.0", "float32")
    assert told["copied"] == ["generation_config.json", "tokenizer.json"]
    assert not (tmp_path / "ours" / "modeling_evil.py").exists()
    model = package.from_pretrained(tmp_path / "ours")
    assert told["params"] == sum(p.numel() for p in model.parameters())
    assert model.config["origin"]["license"] == "apache-2.0" and model.config["origin"]["source"] == str(hub)
    made = zoo("generate", tmp_path / "ours", "--prompt", "abc", "--max-new-tokens", 3, "--json").out
    assert json.loads(made)["tokens"] <= 3


def test_import_keeps_the_type_and_takes_a_licence(zoo, hub, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "in" / name).symlink_to(hub / name)
    out = zoo("import", tmp_path / "in", "--out", tmp_path / "ours", "--license", "mit").out
    assert "qwen2" in out and "bfloat16, licence mit" in out
    assert package.from_pretrained(tmp_path / "ours").lm_head.weight.dtype == torch.bfloat16


def test_import_refuses_in_one_sentence(zoo, hub, tmp_path):
    assert "is not an empty folder" in zoo("import", hub, "--out", hub, code=2).err
    assert "config.json: does not exist" in zoo("import", tmp_path, "--out", tmp_path / "x", code=2).err
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}')
    err = zoo("import", tmp_path, "--out", tmp_path / "x", code=2).err
    assert "models of type 'evil' cannot be converted" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_a_length_is_named_where_angles_depend_on_it(zoo, hub, tmp_path):
    from transformers import Phi3Config, Phi3ForCausalLM

    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = Phi3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=40, pad_token_id=0,
        original_max_position_embeddings=8, max_position_embeddings=32,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
    )  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "in")
    assert "up to 8 takes the short factors" in zoo("import", tmp_path / "in", "--out", tmp_path / "x", code=2).err
    assert "context=9 cannot be" in zoo("import", hub, "--out", tmp_path / "x", "--context", 9, code=2).err
    zoo("import", tmp_path / "in", "--out", tmp_path / "ours", "--context", 9)
    attention = package.from_pretrained(tmp_path / "ours").config["define"]["layer"][0]["attention"]
    assert attention["rope_scaling"]["factors"] == factors["long_factor"]
