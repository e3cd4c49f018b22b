"""The config.json of published models: accepted with all that stands in them, or refused by the name of a feature."""

from __future__ import annotations

import json

import pytest
import torch
from models import MODELS
from models_hybrid import MODELS as HYBRIDS
from models_hybrid import drawn
from parity import built, inputs, says
from published import CONFIGS, DEEPSEEK_V3, GPT_OSS, LONGROPE, causal, sizes

import zoo
from zoo.convert import from_folder, from_hf, hf, plan

# parameters as their model cards count them
COUNTS = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "google/gemma-3-1b-pt": 999_885_952,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "unsloth/gpt-oss-20b-BF16": 20_914_757_184,
    "state-spaces/mamba-130m-hf": 129_135_360,
    "mistralai/Mamba-Codestral-7B-v0.1": 7_285_403_648,
    "ai21labs/Jamba-v0.1": 51_570_323_328,
    "tiiuae/Falcon-H1-0.5B-Base": 521_411_104,
    "ibm-granite/granite-4.0-h-tiny": 6_939_037_248,
    "google/vit-base-patch16-224": 86_567_656,
    "facebook/dinov2-base": 86_580_480,
}


def context(values):
    """Tokens to be read, where the model asks."""
    return values.get("max_position_embeddings") if values.get("rope_scaling") is LONGROPE else None


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_has_its_place(name):
    values = CONFIGS[name]
    config = hf.configuration(values)
    ours, rules = plan(config.to_dict(), dtype=torch.bfloat16, context=context(values))
    with torch.device("meta"):
        theirs = hf.class_of(config)(config)
    kept = theirs.state_dict(keep_vars=True)
    assert {id(kept[n]) for rule in rules for n in rule.theirs} == {id(t) for t in kept.values()}
    shapes = {n: t.shape for n, t in ours.state_dict().items()}
    for rule in rules:
        if not any("decay" in n for n in rule.theirs):  # MiniMax's look at the numbers
            made = rule.there([kept[n].detach() for n in rule.theirs])
            assert [t.shape for t in made] == [shapes[n] for n in rule.ours], rule.ours
    # ours of Falcon-Mamba has norms with weights, which are one
    ones = sum(shapes[n].numel() for rule in rules if not rule.theirs for n in rule.ours)
    count = sum(p.numel() for p in ours.parameters()) - ones
    assert count == sum(p.numel() for p in theirs.parameters()) == COUNTS.get(name, count)


# what a small model needs beside the sizes that it has in common with a tiny one of its family
SMALLER = {
    "kimi_linear": {"linear_attn_config": {"full_attn_layers": [2], "kda_layers": [1, 3, 4]}},
    "phi3": {"original_max_position_embeddings": 8, "max_position_embeddings": 32},
    "xlstm": {"hidden_size": 128, "num_hidden_layers": 2},
}


def small(values):
    """The same file with the sizes of a tiny model."""
    kind = values["model_type"]
    tiny = (MODELS | HYBRIDS)[kind]().config.to_dict()
    sizes = {k for k, v in values.items() if k in tiny and type(v) in (int, list)}
    values = values | {k: tiny[k] for k in sizes - {"architectures", "max_position_embeddings"}} | SMALLER.get(kind, {})
    if values.get("rope_scaling") is LONGROPE:
        pairs = int(16 * values.get("partial_rotary_factor", 1)) // 2
        lists = {key: LONGROPE[key][:pairs] for key in ("long_factor", "short_factor")}
        values["rope_scaling"] = {"type": "longrope"} | lists
    return values


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_same_settings_in_a_small_model(name):
    """What a file says beside sizes means what the original means by it, in its old form and in that of today."""
    values = small(CONFIGS[name])
    length = values["max_position_embeddings"] if context(CONFIGS[name]) else None
    config = hf.configuration(values)
    theirs = drawn(built(hf.class_of(config), config))
    ours, x = from_hf(theirs, context=length), inputs(theirs)
    want = says(theirs, x)
    assert (says(ours, x) - want).abs().max() < 1e-3 * want.std()
    again, _ = plan(hf.configuration(config.to_dict()).to_dict(), dtype=torch.float32, context=length)
    assert {k: v for k, v in again.config.items() if k != "origin"} == {
        k: v for k, v in ours.config.items() if k != "origin"
    }


FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
REFUSED = {
    "deepseek-ai/DeepSeek-V3": (
        DEEPSEEK_V3 | {"quantization_config": FP8},
        r"deepseek_v3: weights quantised by fp8 are not read; .*from_hf: .*FineGrainedFP8Config\(dequantize=True\)\)",
    ),
    "openai/gpt-oss-20b": (GPT_OSS | {"quantization_config": MXFP4}, r"by mxfp4 .*Mxfp4Config\(dequantize=True\)\)"),
    "TheBloke/Mistral-7B-v0.1-GPTQ": (
        CONFIGS["mistralai/Mistral-7B-v0.1"] | {"quantization_config": {"bits": 4, "quant_method": "gptq"}},
        "quantised by gptq are not read; give a folder of plain weights",
    ),
    "microsoft/Phi-3-mini-128k-instruct": (
        CONFIGS["microsoft/Phi-3-mini-128k-instruct"],
        r"'longrope' of any length cannot .*--context N\): up to 4096 takes the short factors, more the long ones",
    ),
    "Qwen/Qwen2.5-7B-Instruct-1M": (
        causal(
            "Qwen2", "qwen2", **sizes(152064, 3584, 18944, 28, 28, 4), hidden_act="silu", rms_norm_eps=1e-6,
            rope_theta=10000000.0, sliding_window=32768, max_window_layers=28, use_sliding_window=False,
            dual_chunk_attention_config={"chunk_size": 262144, "local_size": 8192},
        ),
        "dual_chunk_attention_config: .* cannot be represented; the mapping does not know it",
    ),
    "Qwen/Qwen2-VL-2B-Instruct": (
        causal("Qwen2VL", "qwen2_vl") | {"architectures": ["Qwen2VLForConditionalGeneration"]},
        "models of type 'qwen2_vl' cannot be converted",
    ),
    "google/vit-base-patch16-224-in21k": (
        CONFIGS["google/vit-base-patch16-224"] | {"architectures": ["ViTModel"]},
        "the model ViTModel cannot be represented",
    ),
    "state-spaces/mamba-130m": ({"d_model": 768, "n_layer": 24, "vocab_size": 50277}, "names no model_type"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_weights_are_read(name, tmp_path):
    values, words = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(zoo.ConfigError, match=words) as error:
        from_folder(tmp_path)
    assert len(error.value.problems) == 1
