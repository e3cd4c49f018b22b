"""Multi-head latent attention against DeepSeek-V3 of Hugging Face, plain attention and its absorbed form."""

import pytest
import torch

import zoo
from zoo.errors import ConfigError

torch.manual_seed(0)
DIM, HEADS, T = 32, 4, 19
SIZES = dict(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)


def redraw(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.3 if p.dim() > 1 else 1.0))


@pytest.mark.parametrize("low_rank_q", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("yarn", [True, False])
def test_equals_deepseek_v3(low_rank_q, interleaved, yarn):
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as m

    sizes = SIZES | ({} if low_rank_q else {"q_lora_rank": None})
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0,
               "mscale_all_dim": 0.8} if yarn else None  # fmt: skip
    config = m.DeepseekV3Config(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=HEADS, attention_bias=True,
        attn_implementation="eager", rope_interleave=interleaved, max_position_embeddings=256, **sizes,
        rope_parameters={"rope_theta": 10000.0, **(scaling or {"rope_type": "default"})},
    )  # fmt: skip
    theirs = m.DeepseekV3Attention(config, 0).double().eval()
    redraw(theirs)
    ours = zoo.create_block(
        "mla", DIM, num_heads=HEADS, bias=True, rope_interleaved=interleaved, rope_scaling=scaling,
        dtype=torch.float64, **sizes,
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, T, DIM, dtype=torch.float64)
    mask = torch.zeros(T, T, dtype=torch.float64).masked_fill(torch.ones(T, T).triu(1).bool(), -1e30)[None, None]
    embeddings = m.DeepseekV3RotaryEmbedding(config)(x, torch.arange(T).expand(2, T))
    want = theirs(x, embeddings, mask)[0]
    torch.testing.assert_close(ours(x), want, rtol=0, atol=3e-5)
    state = ours.init_state(2, T)
    parts = [ours(part, state=state) for part in x.split([6, 1, 1, 11], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=3e-5)


@pytest.mark.parametrize("rope_dim", [0, 4])
@pytest.mark.parametrize("kernel", ["auto", "chunked", "reference"])
def test_absorbed_equals_expanded(rope_dim, kernel):
    sizes = SIZES | {"qk_rope_head_dim": rope_dim}
    block = zoo.create_block("mla", DIM, num_heads=HEADS, kernel=kernel, dtype=torch.float64, **sizes)
    redraw(block)
    x = torch.randn(2, T, DIM, dtype=torch.float64)
    q, cached = block.project(x, block.query_input(x), torch.arange(T).expand(2, T))
    doc_ids = (torch.arange(T) > 7).long().expand(2, T)
    given = dict(q_index=None, k_index=None, doc_ids=doc_ids)
    results = []
    for attend in (block.attend_expanded, block.attend_absorbed):
        o = attend(q, cached, **given)
        results.append((o, *torch.autograd.grad(o.sin().sum(), (q, cached), retain_graph=True)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_both_forms_are_chosen_and_give_the_same_stream():
    block = zoo.create_block("mla", DIM, num_heads=HEADS, dtype=torch.float64, **SIZES | {"kv_lora_rank": 64})
    assert block._absorbs(1, 50) and not block._absorbs(60, 50) and not block._absorbs(1, 0)
    x = torch.randn(1, 111, DIM, dtype=torch.float64)
    state = block.init_state(1)
    parts = [block(part, state=state) for part in x.split([50, 1, 60], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), block(x), rtol=0, atol=1e-9)


def test_full_rank_is_multi_head_attention():
    # a latent that is x itself (its norm undone by the weight of tokens of equal length), no rotary channels
    mha = zoo.create_block("attention", DIM, num_heads=HEADS, rope=False, dtype=torch.float64)
    mla = zoo.create_block(
        "mla", DIM, num_heads=HEADS, kv_lora_rank=DIM, qk_nope_head_dim=8, qk_rope_head_dim=0, norm_eps=1e-30,
        dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        mla.q_proj.weight.copy_(mha.q_proj.weight)
        mla.o_proj.weight.copy_(mha.o_proj.weight)
        mla.kv_a_proj_with_mqa.weight.copy_(torch.eye(DIM))
        kv = [w.unflatten(0, (HEADS, 8)) for w in (mha.k_proj.weight, mha.v_proj.weight)]
        mla.kv_b_proj.weight.copy_(torch.cat(kv, 1).flatten(0, 1))
    x = torch.randn(2, T, DIM, dtype=torch.float64)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(mla(x), mha(x), rtol=0, atol=1e-10)


def test_cache_does_not_depend_on_heads():
    few, many = (zoo.create_block("mla", DIM, num_heads=h, **SIZES, device="meta") for h in (1, 8))
    assert few.state_bytes(2, 100) == many.state_bytes(2, 100) == 2 * (100 * (10 + 4) * 4 + 8)


def test_bad_options():
    with pytest.raises(ConfigError, match="must be even"):
        zoo.create_block("mla", DIM, qk_rope_head_dim=3)
    zoo.create_block("mla", DIM, qk_rope_head_dim=3, rope=False)
