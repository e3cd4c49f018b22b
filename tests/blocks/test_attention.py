"""The attention block against Hugging Face layers, closed forms and its own streaming."""

import pytest
import torch

import zoo
from zoo.errors import ConfigError

torch.manual_seed(0)
DIM, HEADS, KV, HEAD_DIM, T = 32, 4, 2, 8, 21
COMMON = dict(
    hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=HEAD_DIM, num_hidden_layers=2,
    max_position_embeddings=4096, attn_implementation="eager", vocab_size=8, intermediate_size=8,
)  # fmt: skip


def redraw(module: torch.nn.Module) -> None:
    """Weights of order one, so that a wrong layout cannot hide."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.3 if p.dim() > 1 else 1.0))


def causal_mask(window: int | None = None) -> torch.Tensor:
    gap = torch.arange(T)[:, None] - torch.arange(T)
    seen = (gap >= 0) & (gap < (window or T))
    return torch.zeros(T, T, dtype=torch.float64).masked_fill(~seen, -1e30)[None, None]


def pair(family: str):
    """A Hugging Face attention layer, its rotary module and the same layer of ours."""
    ours = dict(num_heads=HEADS, num_kv_heads=KV, head_dim=HEAD_DIM)
    if family == "llama3":
        from transformers.models.llama import modeling_llama as m

        scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 16}  # fmt: skip
        config = m.LlamaConfig(**COMMON, attention_bias=True, rope_parameters={"rope_theta": 500.0, **scaling})
        return (
            config,
            m.LlamaAttention,
            m.LlamaRotaryEmbedding,
            ours | dict(bias=True, rope_base=500.0, rope_scaling=scaling),
        )
    if family == "qwen3":
        from transformers.models.qwen3 import modeling_qwen3 as m

        config = m.Qwen3Config(**COMMON, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
        return config, m.Qwen3Attention, m.Qwen3RotaryEmbedding, ours | dict(qk_norm="head", rope_base=1e6)
    if family == "olmo2":
        from transformers.models.olmo2 import modeling_olmo2 as m

        config = m.Olmo2Config(**{k: v for k, v in COMMON.items() if k != "head_dim"}, rms_norm_eps=1e-5)
        return config, m.Olmo2Attention, m.Olmo2RotaryEmbedding, ours | dict(qk_norm="full", norm_eps=1e-5)
    if family == "gemma2":
        from transformers.models.gemma2 import modeling_gemma2 as m

        config = m.Gemma2Config(**COMMON, query_pre_attn_scalar=17, attn_logit_softcapping=2.0, sliding_window=6)
        return config, m.Gemma2Attention, m.Gemma2RotaryEmbedding, ours | dict(softcap=2.0, scale=17**-0.5, window=6)
    if family == "gpt_oss":
        from transformers.models.gpt_oss import modeling_gpt_oss as m

        config = m.GptOssConfig(**COMMON, sliding_window=6)
        scaling = {k: v for k, v in config.rope_parameters.items() if k != "rope_theta"}
        base = config.rope_parameters["rope_theta"]
        options = dict(bias=True, sink_logits=True, window=6, rope_base=base, rope_scaling=scaling)
        return config, m.GptOssAttention, m.GptOssRotaryEmbedding, ours | options
    from transformers.models.qwen3_next import modeling_qwen3_next as m

    config = m.Qwen3NextConfig(
        **COMMON, rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    options = dict(output_gate=True, qk_norm="head", norm_zero_centered=True, rope_base=100.0, rotary_dim=4)
    return config, m.Qwen3NextAttention, m.Qwen3NextRotaryEmbedding, ours | options


@pytest.mark.parametrize("family", ["llama3", "qwen3", "olmo2", "gemma2", "gpt_oss", "qwen3_next"])
def test_equals_hugging_face(family):
    config, layer, rotary, options = pair(family)
    theirs = layer(config, 0).double().eval()
    redraw(theirs)
    ours = zoo.create_block("attention", DIM, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, T, DIM, dtype=torch.float64)
    positions = torch.arange(T).expand(2, T)
    embeddings = rotary(config)(x, positions)
    want = theirs(x, embeddings, causal_mask(options.get("window")))[0]
    # their angles are fp32, eager softmax too
    torch.testing.assert_close(ours(x), want, rtol=0, atol=3e-5)
    state = ours.init_state(2, T)
    parts = [ours(part, state=state) for part in x.split([1, 9, 1, 1, 9], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    "options", [{}, {"window": 4}, {"window": 4, "sinks": 2}, {"softcap": 3.0, "sink_logits": True}]
)
def test_streams_rows_of_different_lengths(options):
    block = zoo.create_block("attention", DIM, num_heads=4, num_kv_heads=2, dtype=torch.float64, **options)
    redraw(block)
    x = torch.randn(3, 30, DIM, dtype=torch.float64)
    want = block(x)
    state, done = block.init_state(3), [0, 0, 0]
    with torch.no_grad():
        for rows, count in (([0, 2], 3), ([1], 1), ([0, 1, 2], 1), ([2], 9), ([0, 1], 2), ([1, 2], 1), ([0], 17)):
            part = state.rows(torch.tensor(rows))
            segment = torch.stack([x[r, done[r] : done[r] + count] for r in rows])
            y = block(segment, state=part)
            state.put_rows(torch.tensor(rows), part)
            for i, r in enumerate(rows):
                torch.testing.assert_close(y[i], want[r, done[r] : done[r] + count], rtol=0, atol=1e-9)
                done[r] += count
        state.reorder(torch.tensor([2, 2]))
        y = block(x[2:, done[2] : done[2] + 1].expand(2, -1, -1), state=state)
        torch.testing.assert_close(y, want[2:, done[2] : done[2] + 1].expand(2, -1, -1), rtol=0, atol=1e-9)


def test_rotation_needs_only_differences_and_gathered_tokens_keep_theirs():
    block = zoo.create_block("attention", DIM, num_heads=2, dtype=torch.float64)
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    positions = torch.arange(9)[None]
    torch.testing.assert_close(block(x, positions=positions + 1000), block(x))
    assert not torch.allclose(block(x, positions=2 * positions), block(x))


def test_non_causal():
    block = zoo.create_block("attention", DIM, causal=False, rope=False, dtype=torch.float64)
    assert block.causal is False
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    turn = torch.randperm(7)
    torch.testing.assert_close(block(x[:, turn]), block(x)[:, turn])
    with pytest.raises(ValueError, match="cannot be streamed"):
        block(x, state=block.init_state(2, 8))


def test_full_state_and_bad_options():
    block = zoo.create_block("attention", DIM)
    state = block.init_state(1, 4)
    block(torch.randn(1, 4, DIM), state=state)
    with pytest.raises(ValueError, match="max_len=4"):
        block(torch.randn(1, 1, DIM), state=state)
    for options, words in (
        ({"num_heads": 4, "num_kv_heads": 3}, "must divide num_heads=4"),
        ({"num_heads": 3}, "does not divide dim=32"),
        ({"rotary_dim": 3}, "must be even"),
        ({"sinks": 2}, "give a window"),
        ({"rope_scaling": {"rope_type": "ntk"}}, "rope_type, one of"),
        ({"kernel": "flash"}, "not known for attention"),
    ):
        with pytest.raises(ConfigError, match=words):
            zoo.create_block("attention", DIM, **options)


def test_backpropagation_is_truncated_at_segments():
    block = zoo.create_block("attention", DIM, num_heads=2, window=6, dtype=torch.float64)
    x = torch.randn(1, 12, DIM, dtype=torch.float64, requires_grad=True)
    state = block.init_state(1, 12)
    first = block(x[:, :5], state=state)
    second = torch.cat([block(part, state=state) for part in x[:, 5:].split([1, 6], 1)], 1)
    grad = torch.autograd.grad(second.sum(), x, retain_graph=True)[0]
    assert (grad[:, :5] == 0).all() and (grad[:, 5:] != 0).any()
    first.sum().backward()  # the cache has moved on since, the graph has not
    assert x.grad[:, :5].isfinite().all()
