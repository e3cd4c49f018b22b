"""How a host calls a block: padding, caches of other kinds, sites that are given no cache, forms of the output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from zoo.graft import replace

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 61, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
SLIDING = {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = {"num_key_value_heads": 4, "first_k_dense_replace": 3, "kv_lora_rank": 16, "q_lora_rank": 16}


def made(family="Llama", head="ForCausalLM", **options):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")(**SIZES | options)
    model = getattr(transformers, family + head)(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, p.shape[-1] ** -0.5)
    return model.eval()


def tokens(rows=2, length=24):
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(3))


def continued(model, x, steps=5):
    """Greedy, every token from the whole text: what no cache and no padding can spoil."""
    for _ in range(steps):
        x = torch.cat([x, model(x, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return x[:, -steps:]


def padded(x, lengths, left):
    row, mask = torch.zeros_like(x), torch.zeros_like(x)
    for i, n in enumerate(lengths):
        place = slice(x.shape[1] - n, None) if left else slice(n)
        row[i, place], mask[i, place] = x[i, :n], 1
    return row, mask


@pytest.mark.parametrize("name", [n for n in zoo.list_blocks("mixer") if n not in ("jrt", "prefix_lm")])
@torch.no_grad()
def test_padding_changes_nothing_with_a_cache_or_without(name):
    """On either side, and in the token that follows; jrt and prefix_lm read a prompt at once."""
    model, x = made(), tokens(2, 14)
    replace(model, "model.layers.1.self_attn", name)
    lengths = 9, 13
    alone = [model(x[i : i + 1, : n + 1], use_cache=False).logits[0] for i, n in enumerate(lengths)]
    for left in (True, False):
        row, mask = padded(x, lengths, left)
        for cached in (True, False):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            out = model(row, attention_mask=mask, position_ids=positions, use_cache=cached)
            for i, n in enumerate(lengths):
                torch.testing.assert_close(out.logits[i][mask[i].bool()], alone[i][:n], atol=1e-4, rtol=0)
            if not cached:
                continue
            one = torch.stack([x[i, n : n + 1] for i, n in enumerate(lengths)])
            longer = torch.cat([mask, torch.ones_like(one)], 1)
            state = {"past_key_values": out.past_key_values, "position_ids": torch.tensor(lengths)[:, None]}
            got = model(one, attention_mask=longer, **state).logits[:, 0]
            torch.testing.assert_close(got, torch.stack([logits[-1] for logits in alone]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "family, options, site",
    [
        ("Mistral", {"sliding_window": 4}, "model.layers.0.self_attn"),
        ("Gemma3", SLIDING | {"num_hidden_layers": 4}, "model.layers.0.self_attn"),
        ("Gemma3", SLIDING | {"num_hidden_layers": 4}, "model.layers.*.mlp"),
        ("Phi3", {}, "model.layers.*.self_attn"),
        ("DeepseekV3", LATENT, "model.layers.1.self_attn"),
        ("Llama", {}, "model.layers.*.mlp"),
    ],
)
@torch.no_grad()
def test_rows_of_unlike_lengths_are_continued_as_if_alone(family, options, site):
    """Hosts with windows, with masks of their own, and sites of feed-forward layers, which are given no cache."""
    model, x = made(family, **options), tokens(3, 11)
    done = replace(model, site, "gla", num_heads=4)
    lengths = (4, 9, 11)
    want = torch.cat([continued(model, x[i : i + 1, :n]) for i, n in enumerate(lengths)])
    row, mask = padded(x, lengths, True)
    got = model.generate(row, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(got[:, -5:], want)
    beams = model.generate(x, max_new_tokens=4, num_beams=2, do_sample=False)
    assert beams.shape == (3, 15)
    done.undo()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_a_cache_of_fixed_size_may_hold_other_layers():
    model, x = made(), tokens()
    replace(model, "model.layers.1.self_attn", "gla")
    got = model.generate(x, max_new_tokens=5, do_sample=False, cache_implementation="static")
    assert torch.equal(got[:, -5:], continued(model, x))


@torch.no_grad()
def test_a_block_in_the_place_of_a_block():
    model, x = made(), tokens()
    first = replace(model, "model.layers.*.self_attn", "gla")
    want = model(x).logits
    second = replace(model, "model.layers.*.self_attn", "gated_deltanet", num_heads=4)
    got = model.generate(x, max_new_tokens=5, do_sample=False)
    assert torch.equal(got[:, -5:], continued(model, x))
    second.undo()
    assert torch.equal(model(x).logits, want)
    first.undo()


class Pair(nn.Module):
    """Attention as people write it: a pair without an annotation, and arguments of its own."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x, mask, *, dropout):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        outputs = (self.proj(y.transpose(1, 2).flatten(2)), None)
        return outputs


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Pair()

    def forward(self, x):
        y, weights = self.attn(x, None, dropout=0.1)
        assert weights is None
        return x + y


@torch.no_grad()
def test_a_pair_stays_a_pair():
    """With two rows a tensor could be taken apart as well as a pair, and nobody would see it."""
    model, x = Layer(), torch.randn(2, 7, 32)
    want = model(x)
    replace(model, "attn", "attention", rope=False)
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_padding_of_a_torch_encoder(left):
    """Attention in both directions does not read padding, and the encoder keeps it in the rows until undo."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, hidden = torch.randn(2, 7, 32), torch.zeros(2, 7, dtype=torch.bool)
    hidden[0, :2] = hidden[1, 3:] = True
    hidden = hidden if left else torch.zeros(2, 7, dtype=torch.bool).index_fill(1, torch.tensor([5, 6]), True)
    want = model(x, src_key_padding_mask=hidden)
    done = replace(model, "layers.*.self_attn", "attention", causal=False, rope=False)
    got = model(x, src_key_padding_mask=hidden)
    done.undo()
    again = model(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(got[~hidden], want[~hidden], atol=1e-5, rtol=0)
    assert torch.equal(again, want) and model.use_nested_tensor


def test_attention_to_another_sequence_is_refused():
    model = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
    replace(model, "multihead_attn", "attention")
    with pytest.raises(zoo.ZooError, match="multihead_attn: the host gave keys or values of another sequence"):
        model(torch.randn(2, 7, 32), torch.randn(2, 5, 32))
