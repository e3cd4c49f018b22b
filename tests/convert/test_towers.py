"""Models that see: their text tower as a model of ours, from memory and from both forms on disk."""

from __future__ import annotations

import pytest
import torch
from models import GEMMA_ROPE, KINDS, SIZES
from models_hybrid import drawn
from published import SEEING
from safetensors.torch import load_file, save_file

import zoo
from zoo.convert import from_folder, from_hf, hf, plan, to_hf_model

SIGHT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
GEMMA = {"head_dim": 16, "rope_parameters": GEMMA_ROPE, **KINDS}


def seeing(name):
    """A tiny model with both towers."""
    import transformers

    text, sight = {
        "gemma3": ({"model_type": "gemma3_text"} | GEMMA, {"model_type": "siglip_vision_model"}),
        "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model"}),
        "mistral3": ({"model_type": "mistral", "head_dim": 16, "sliding_window": 6}, {"model_type": "pixtral"}),
    }[name]
    kind = {"gemma3": "Gemma3", "llava": "Llava", "mistral3": "Mistral3"}[name]
    config = getattr(transformers, f"{kind}Config")(
        text_config=SIZES | text, vision_config=SIGHT | sight, image_token_index=60,
        **({"mm_tokens_per_image": 4} if name == "gemma3" else {}),
    )  # fmt: skip
    return drawn(getattr(transformers, f"{kind}ForConditionalGeneration")(config))


@pytest.mark.parametrize("name", ["gemma3", "llava", "mistral3"])
@torch.no_grad()
def test_text_tower(name, tmp_path):
    theirs, x = seeing(name), torch.arange(1, 34)[None]
    want = theirs(input_ids=x).logits
    ours = from_hf(theirs)
    assert (ours(x) - want).abs().max() < 1e-4 * want.std()
    assert ours.config["origin"]["tower_of"] == name
    theirs.save_pretrained(tmp_path / "disk")
    on_disk = load_file(tmp_path / "disk" / "model.safetensors")
    assert any(n.startswith("language_model.") for n in on_disk) and any("vision_tower" in n for n in on_disk)
    theirs.save_pretrained(tmp_path / "memory", save_original_format=False)
    assert "model.language_model.norm.weight" in load_file(tmp_path / "memory" / "model.safetensors")
    for folder in ("disk", "memory"):
        read = from_folder(tmp_path / folder)
        assert all(torch.equal(t, read.state_dict()[n]) for n, t in ours.state_dict().items())
    alone = to_hf_model(ours)
    assert "ConditionalGeneration" not in type(alone).__name__
    torch.testing.assert_close(alone(x).logits, want)
    # what belongs to neither tower is not dropped
    save_file(on_disk | {"hearing_tower.weight": torch.ones(2)}, tmp_path / "disk" / "model.safetensors")
    with pytest.raises(zoo.ConfigError, match=r"no place for: hearing_tower\.weight"):
        from_folder(tmp_path / "disk")


@torch.no_grad()
def test_a_head_that_is_there_is_read(tmp_path):
    """Mistral Small's file does not say that its head is not tied, and its class would tie it."""
    theirs, x = seeing("mistral3"), torch.arange(1, 34)[None]
    assert theirs.config.tie_word_embeddings
    theirs.save_pretrained(tmp_path)
    head = torch.randn(61, 64) / 8
    save_file(
        load_file(tmp_path / "model.safetensors") | {"language_model.lm_head.weight": head},
        tmp_path / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    again = type(theirs).from_pretrained(tmp_path)
    want = again(input_ids=x).logits
    for ours in (from_folder(tmp_path), from_hf(again)):
        assert torch.equal(ours.lm_head.weight, head)
        assert (ours(x) - want).abs().max() < 1e-4 * want.std()


def test_a_tower_of_an_unknown_family_is_refused():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=SIZES | {"model_type": "gemma"}, vision_config=SIGHT | {"model_type": "clip_vision_model"}
    )
    with pytest.raises(zoo.ConfigError, match="models of type 'gemma' cannot be converted"):
        from_hf(LlavaForConditionalGeneration(config))


# parameters of the text towers, without a head of its own
TEXT = {"google/gemma-3-4b-pt": 3_880_263_168, "mistralai/Mistral-Small-3.1-24B-Instruct-2503": 22_901_314_560}


@pytest.mark.parametrize("name", SEEING)
def test_published(name):
    config = hf.text_config(hf.configuration(SEEING[name]))
    ours, _ = plan(config.to_dict(), dtype=torch.bfloat16)
    assert sum(p.numel() for p in ours.parameters()) == TEXT[name]
    attention = [item["attention"] for parts in ours.config["define"].values() for item in parts if "attention" in item]
    if name.startswith("google"):
        linear = {"rope_type": "linear", "factor": 8.0}
        assert [(a.get("window"), a["rope_base"], a.get("rope_scaling")) for a in attention] == [
            (1024, 1e4, None), (None, 1e6, linear)
        ]  # fmt: skip
