"""Blocks in models that know nothing of the zoo."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from zoo.convert import from_hf
from zoo.graft import distill, plan, replace

SITES = "model.layers.*.self_attn"


def drawn(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, p.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return drawn(LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, pad_token_id=0, eos_token_id=None,
    )))  # fmt: skip


def tokens(rows=2, length=24, seed=3):
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


# selections and caches at the setting where they are attention itself
DENSE = {
    "attention": {}, "moba": {"top_k": 64}, "block_attention": {}, "seer_attention": {"top_k": 64}, "landmark": {},
    "infllm_v2": {}, "parallax": {}, "window_global": {}, "prefix_lm": None,
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in DENSE if DENSE[n] is not None])
@torch.no_grad()
def test_a_selection_that_keeps_everything_is_the_attention_it_replaced(llama, name):
    want, more = llama(tokens()).logits, llama.generate(tokens(), max_new_tokens=6, do_sample=False)
    done = replace(llama, SITES, name, **DENSE[name])
    assert "dropped" not in done.counts()
    torch.testing.assert_close(llama(tokens()).logits, want, atol=2e-5, rtol=0)
    assert torch.equal(llama.generate(tokens(), max_new_tokens=6, do_sample=False), more)


@pytest.mark.parametrize("name", [n for n in zoo.list_blocks("mixer") if n not in ("jrt", "prefix_lm")])
@torch.no_grad()
def test_the_host_streams_every_mixer_through_its_own_cache(llama, name):
    """jrt and prefix_lm read a prompt at once, so no cut of it gives the same."""
    replace(llama, "model.layers.1.self_attn", name)
    x, parts, cache = tokens(), [], None
    for part in x.split([11, 1, 12], 1):
        out = llama(part, past_key_values=cache, use_cache=True)
        parts, cache = [*parts, out.logits], out.past_key_values
    torch.testing.assert_close(torch.cat(parts, 1), llama(x, use_cache=False).logits, atol=1e-4, rtol=0)
    assert cache.get_seq_length() == 24


@pytest.fixture
def falcon():
    """Attention and Mamba-2 beside each other in every layer, which keep their states in one layer of the cache."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    return drawn(FalconH1ForCausalLM(FalconH1Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, pad_token_id=0, eos_token_id=None, mamba_d_ssm=96, mamba_n_heads=6, mamba_d_state=8,
    )))  # fmt: skip


@pytest.mark.parametrize(
    "host, sites", [("llama", SITES), ("falcon", SITES), ("falcon", "model.layers.*.mamba")], ids=str
)
@torch.no_grad()
def test_every_layer_may_be_replaced_and_beams_reorder_the_states(request, host, sites):
    model = request.getfixturevalue(host)
    replace(model, sites, "gated_deltanet", num_heads=4)
    greedy = model.generate(tokens(), max_new_tokens=6, do_sample=False)
    x = tokens()
    for _ in range(6):
        x = torch.cat([x, model(x, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, x)
    beams = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "output_scores": True}
    found = model.generate(tokens(), **beams, return_dict_in_generate=True)
    logp = model(found.sequences, use_cache=False).logits.log_softmax(-1)[:, 23:-1]
    own = logp.gather(-1, found.sequences[:, 24:, None]).squeeze(-1).sum(1) / 5
    torch.testing.assert_close(found.sequences_scores, own, atol=1e-4, rtol=0)


def test_nothing_changes_before_apply_and_undo_brings_everything_back(llama):
    before, x = dict(llama.named_parameters()), tokens()
    want = llama(x).logits
    made = plan(llama, SITES, "gla")
    assert not made.applied and dict(llama.named_parameters()).keys() == before.keys()
    made.apply()
    assert made.applied and not torch.allclose(llama(x).logits, want)
    changed = llama(x).logits
    made.undo()
    assert not made.applied and torch.equal(llama(x).logits, want)
    assert all(p is before[n] for n, p in llama.named_parameters())
    made.apply()
    assert torch.equal(llama(x).logits, changed)


@pytest.mark.parametrize("name", ["gla", "mamba2", "lightning", "hgrn2", "rwkv7", "mla", "swiglu"])
def test_the_plan_names_every_tensor_once(llama, name):
    old = {f"{n}.{k}" for n, m in llama.named_modules() if n.endswith("self_attn") for k in m.state_dict()}
    done = replace(llama, SITES, name)
    new = {f"{n}.block.{k}" for n, m in llama.named_modules() if n.endswith("self_attn") for k in m.block.state_dict()}
    said = [f"{e.site}.block.{e.tensor}" for e in done.entries if e.action != "dropped"]
    assert sorted(said) == sorted(new)
    sources = {s for e in done.entries for s in e.source.split(", ") if s}
    assert sources == old
    for e in done.entries:
        if e.action == "kept":
            tensor = llama.get_submodule(f"{e.site}.block").state_dict()[e.tensor]
            assert torch.equal(tensor, done.originals[e.site].state_dict()[e.source.removeprefix(f"{e.site}.")])


def test_linear_attention_and_mamba_take_the_projections(llama):
    """Linear attention with the queries, keys and values of attention, keys repeated for the heads that share them;
    Mamba-2 holds the same maps as C, B and x."""
    old = llama.model.layers[0].self_attn
    k = old.k_proj.weight.unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1)
    new = replace(llama, "model.layers.0.self_attn", "linear_attention").blocks["model.layers.0.self_attn"].block
    assert torch.equal(new.q_proj.weight, old.q_proj.weight) and torch.equal(new.k_proj.weight, k)
    old = llama.model.layers[1].self_attn
    k = old.k_proj.weight.unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1)
    mamba = replace(llama, "model.layers.1.self_attn", "mamba2").blocks["model.layers.1.self_attn"].block
    _, x, B, C, _ = mamba.in_proj.weight.split([64, 64, 64, 64, 4])
    v = old.v_proj.weight.unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1)
    assert torch.equal(C, old.q_proj.weight) and torch.equal(B, k) and torch.equal(x, v)


def test_several_patterns_keep_some_attention(llama):
    done = replace(llama, "model.layers.0.self_attn, model.layers.2.*_attn", "gla")
    assert done.sites == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    assert type(llama.model.layers[1].self_attn).__name__ == "LlamaAttention"


@torch.no_grad()
def test_plain_torch_modules():
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = drawn(nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False))
    x = torch.randn(2, 9, 64)
    want = model(x)
    done = replace(model, "layers.*.self_attn", "attention", causal=False, rope=False)
    assert done.counts() == {"kept": 16}
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=0)
    done.undo()
    columns = drawn(nn.TransformerEncoderLayer(64, 4, 128))
    want = columns(x)
    replace(columns, "self_attn", "attention", causal=False, rope=False)
    torch.testing.assert_close(columns(x), want, atol=1e-5, rtol=0)


def test_a_zoo_model_is_saved_as_what_it_became(tmp_path):
    theirs = [{"attention": {"num_heads": 4, "num_kv_heads": 2}}, "swiglu"]
    document = {"dim": 64, "vocab_size": 61, "define": {"layer": theirs}}
    model = zoo.build({**document, "trunk": [{"repeat": 2, "of": "layer"}, {"attention": {}, "norm": "layer"}]})
    x, want = tokens(), model(tokens())
    done = replace(model, "layers.*.items.0.block", "kda", chunk_size=16)
    again = zoo.from_pretrained(model.save_pretrained(tmp_path))
    assert torch.equal(again(x), model(x)) and not torch.allclose(model(x), want)
    done.undo()
    assert torch.equal(model(x), want) and "attention" in model.config["define"]["layer"][0]
    with pytest.raises(zoo.ConfigError, match=r"also means layers.0.items.0.block: replace both"):
        replace(model, "layers.1.items.0.block", "kda")


@pytest.mark.parametrize(
    "pattern, block, options, message",
    [
        ("model.layer.*.self_attn", "gla", {}, r"did you mean model.layers.\*.self_attn"),
        (SITES, "gala", {}, "unknown block 'gala'; did you mean gla"),
        (SITES, "gla", {"num_hed": 4}, "num_hed: unknown option of gla"),
        (SITES, "gla", {"num_heads": 3}, "model.layers.0.self_attn.*num_heads"),
        ("model.norm", "gla", {}, "no weights of this LlamaRMSNorm tell"),
        (SITES, "expert_choice", {}, "expert_choice is a router, no block that maps x to y"),
    ],
)
def test_bad_requests(llama, pattern, block, options, message):
    with pytest.raises(zoo.ConfigError, match=message):
        replace(llama, pattern, block, **options)


def test_a_cache_that_the_original_began_is_refused(llama):
    cache = llama(tokens(), use_cache=True).past_key_values
    replace(llama, SITES, "gla")
    with pytest.raises(zoo.ZooError, match="begun by the module that the block replaced"):
        llama(tokens(), past_key_values=cache, use_cache=True)


def test_distillation_brings_the_original_back(llama):
    """Attention whose weights were disturbed is taught what it computed; only the blocks' weights move."""
    x = tokens(4, 32, 1000)
    wanted = llama(x).logits.detach().log_softmax(-1)

    def distance():
        with torch.no_grad():
            return (wanted.exp() * (wanted - llama(x).logits.log_softmax(-1))).sum(-1).mean().item()

    done = replace(llama, SITES, "attention")
    with torch.no_grad():
        for p in done.trainable():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    before = distance()
    frozen = {n: p.clone() for n, p in llama.named_parameters() if "self_attn" not in n}
    batches = (tokens(4, 32, seed) for seed in range(100))
    losses = distill(done, batches, layer_steps=40, model_steps=20, lr=3e-3)
    assert sum(losses["layers"][-5:]) < 0.8 * sum(losses["layers"][:5])
    assert distance() < 0.5 * before and len(losses["model"]) == 20
    assert all(torch.equal(p, frozen[n]) for n, p in llama.named_parameters() if n in frozen)
    assert all(p.requires_grad for p in llama.parameters()) and done.applied
    with pytest.raises(zoo.ConfigError, match="batches ended"):
        distill(done, [], layer_steps=1)


def test_a_converted_model_is_grafted_in_its_yaml(llama):
    ours = from_hf(llama)
    replace(ours, "layers.*.items.0.block", "gated_deltanet")
    assert list(ours.config["define"]["layer"][0]) == ["gated_deltanet"]
    assert zoo.build(dict(ours.config), device="meta").state_dict().keys() == ours.state_dict().keys()
