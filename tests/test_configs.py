"""Every shipped configuration: its golden file, and the law at a size where fp64 is cheap."""

import re
import sys
from pathlib import Path

import pytest
import torch
from drawn import as_drawn
from torch.utils.flop_counter import FlopCounterMode

import zoo
import zoo.kernels.flops  # formulas that torch lacks
from zoo.architectures.block_diffusion import BlockDiffusionLM
from zoo.architectures.causal_lm import CausalLM
from zoo.blocks.blockffn import BlockFFN
from zoo.graph.feedback import Feedback
from zoo.graph.hierarchy import Hierarchy
from zoo.graph.loader import config_names, find_config, load_graph
from zoo.graph.loop import Loop
from zoo.graph.route import Route
from zoo.graph.stage import Stage
from zoo.registry import block_card, list_blocks

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from golden import FOLDER, golden_text  # noqa: E402

# whose every token sees what came before it alone; tests/test_prefix.py has the others
LANGUAGE = [n for n in config_names() if not re.search("^(vision|prefix):", find_config(n).read_text(), re.M)]
SMALL = ["dim=64", "vocab_size=61"]
SHRINK = {
    "block_attention_small": ["define.layer[0].block_attention.block_size=8"],
    "cache_small": [
        "define.streaming[0].attention.cache.streaming_llm.window=6", "define.heavy[0].attention.cache.h2o.heavy=4",
        "define.heavy[0].attention.cache.h2o.recent=4", "define.heavy[0].attention.cache.h2o.interval=4",
    ],
    "select_small": [
        "define.quest[0].attention.select.quest.block_size=4", "define.quest[0].attention.select.quest.top_k=3",
        "define.lserve[0].attention.select.lserve.block_size=8", "define.lserve[0].attention.select.lserve.sinks=8",
        "define.lserve[0].attention.select.lserve.window=8", "define.lserve[0].attention.select.lserve.top_k=2",
        "define.xattention[0].attention.select.xattention.block_size=8",
        "define.xattention[0].attention.select.xattention.stride=4",
        "define.pbs[0].attention.select.pbs.block_size=4", "define.pbs[0].attention.select.pbs.segment_size=8",
        "define.anchor[0].attention.select.anchor.block_size=4", "define.anchor[0].attention.select.anchor.init=4",
    ],
    "seer_small": ["define.layer[0].seer_attention.block_size=8", "define.layer[0].seer_attention.top_k=2"],
    "sparse_small": [
        "define.blocks[0].moba.block_size=8", "define.blocks[0].moba.top_k=2", "define.conv[0].moba.block_size=8",
        "define.conv[0].moba.top_k=2", "define.seer[0].seer_attention.block_size=8",
        "define.seer[0].seer_attention.top_k=2", "define.land[0].landmark.block_size=8",
        "define.land[0].landmark.top_k=2",
    ],
    "content_small": ["define.chunks[0].rat.chunk_size=5", "define.count[0].cope.num_positions=9"],
    "delta_small": ["define.gated[0].gated_deltanet.head_dim=16"],
    "ssm_small": ["define.long[0].hyena.filter_len=32"],
    "zamba2_small": ["trunk[0].revisit.hidden_dim=96", "trunk[0].revisit.rank=4"],
    "prefix_tree_small": ["define.layer[0].attention.cache.prefix_tree.chunk_size=4"],
    "ramba_small": ["define.retrieve[0].hsa.chunk_size=8"],
    "algoformer_small": ["trunk[1].loop=3", "trunk[1].grad_last=2"],
    "deepseek_v3": [
        "define.attend.mla.num_heads=4", "define.attend.mla.q_lora_rank=24", "define.attend.mla.kv_lora_rank=16",
        "define.attend.mla.qk_nope_head_dim=16", "define.attend.mla.qk_rope_head_dim=8",
        "define.attend.mla.v_head_dim=16", "define.dense.swiglu.hidden_dim=96",
        "define.experts.moe.num_experts=16", "define.experts.moe.hidden_dim=16",
        "trunk[0].repeat=1", "trunk[1].repeat=2",
    ],
    "falcon_h1_500m": [
        "trunk[0].repeat=2", "define.full[0].attention.num_heads=4", "define.full[0].attention.head_dim=16",
        "define.full[0].attention.scale=0.09765625", "define.ssm[0].mamba2.num_heads=6",
        "define.ssm[0].mamba2.head_dim=16", "define.ssm[0].mamba2.state_dim=8", "define.dense[0].swiglu.hidden_dim=96",
    ],
    "hnet_small": ["trunk[0].hierarchy.chunker.dynamic_chunks.width=96"],
    "hnet_2stage_small": ["trunk[0].hierarchy.chunker.dynamic_chunks.width=80",
                          "define.words[0].hierarchy.chunker.dynamic_chunks.width=96",
                          "define.local[0].attention.window=8"],
    "hnet_xl": ["trunk[0].hierarchy.chunker.dynamic_chunks.width=96", "define.m4.repeat=1",
                "define.m4.of.mamba2.head_dim=32", "define.m4.of.mamba2.state_dim=16",
                "define.words[0].hierarchy.chunker.dynamic_chunks.width=128", "define.words[0].hierarchy.of.repeat=2",
                "define.local[0].attention.num_heads=4", "define.local[0].attention.rotary_dim=12",
                "define.local[0].attention.window=8", "define.local[1].swiglu.hidden_dim=96",
                "define.layer[0].attention.num_heads=4", "define.layer[0].attention.rotary_dim=16",
                "define.layer[1].swiglu.hidden_dim=96"],
    "dinov2_small": ["trunk[0].repeat=2"],
    "hydra_hybrid": [
        "define.experts.chunk_moe.hidden_dim=16", "define.experts.chunk_moe.chunk_size=8",
        "define.sparse.window_global.window=8", "define.sparse.window_global.num_globals=4",
        "define.sparse.window_global.chunk_size=8", "define.sparse.window_global.num_heads=4",
        "define.facts.product_key.num_keys=8", "define.facts.product_key.key_dim=16",
        "define.facts.product_key.value_dim=16", "define.facts.product_key.top_k=4",
        "define.thoughts.workspace.slots=8", "define.thoughts.workspace.active=4",
        "define.thoughts.workspace.rank=8", "define.thoughts.workspace.chunk_size=8",
    ],
    "huginn_3.5b": ["define.layer[0].attention.num_heads=4", "define.layer[1].swiglu.hidden_dim=96",
                    "trunk[1].loop.steps=2", "trunk[1].loop.of=[layer]"],
    "huginn_small": ["trunk[1].loop.steps=3", "trunk[1].loop.of=[layer]"],
    "jamba_52b": [
        "trunk[0].repeat=1", "define.ssm.mamba.state_dim=4", "define.ssm.mamba.dt_rank=8",
        "define.full.attention.num_heads=4", "define.full.attention.num_kv_heads=2",
        "define.dense.swiglu.hidden_dim=96", "define.experts.moe.num_experts=4", "define.experts.moe.hidden_dim=32",
    ],
    "kimi_linear_48b": [
        "trunk[0][1].swiglu.hidden_dim=96", "trunk[2].repeat=1", "define.rec.kda.num_heads=4",
        "define.rec.kda.head_dim=16", "define.full.mla.num_heads=4", "define.full.mla.kv_lora_rank=16",
        "define.full.mla.qk_nope_head_dim=16", "define.full.mla.qk_rope_head_dim=8",
        "define.full.mla.v_head_dim=16", "define.experts.moe.num_experts=8", "define.experts.moe.top_k=2",
        "define.experts.moe.hidden_dim=32",
    ],
    "lact_small": ["define.layer[0].lact.chunk_size=8"],
    "llama_1b": ["trunk[0].repeat=2", "define.layer[0].attention.num_heads=4",
                 "define.layer[0].attention.num_kv_heads=2", "define.layer[0].attention.head_dim=16",
                 "define.layer[1].swiglu.hidden_dim=96"],
    "minimax_text_01": [
        "trunk[0].repeat=1", "define.linear.lightning.num_heads=4", "define.linear.lightning.head_dim=16",
        "define.full.attention.num_heads=4", "define.full.attention.num_kv_heads=2",
        "define.full.attention.head_dim=16", "define.full.attention.rotary_dim=8", "define.experts.moe.num_experts=4",
        "define.experts.moe.hidden_dim=32",
    ],
    "nemotron_h_8b": [
        "trunk[0].repeat=1", "trunk[2].repeat=1", "trunk[3].repeat=1", "trunk[2].of[0].repeat=1",
        "define.ssm.mamba2.num_heads=8", "define.ssm.mamba2.head_dim=16", "define.ssm.mamba2.num_groups=2",
        "define.ssm.mamba2.state_dim=8", "define.full.attention.num_heads=4", "define.full.attention.num_kv_heads=2",
        "define.full.attention.head_dim=16", "define.mlp_.mlp.hidden_dim=96",
    ],
    "qwen3_next_80b": [
        "trunk[0].repeat=1", "define.delta.gated_deltanet.num_heads=2", "define.delta.gated_deltanet.num_v_heads=4",
        "define.delta.gated_deltanet.head_dim=16", "define.full.attention.num_heads=4",
        "define.full.attention.head_dim=16", "define.full.attention.rotary_dim=4", "define.experts.moe.num_experts=8",
        "define.experts.moe.top_k=2", "define.experts.moe.hidden_dim=32",
    ],
    "mamba2_130m": ["trunk[0].repeat=2", "trunk[0].of.mamba2.head_dim=32", "trunk[0].of.mamba2.state_dim=16"],
    "mor_360m": ["define.layer[0].attention.num_heads=4", "define.layer[0].attention.num_kv_heads=2",
                 "define.layer[1].swiglu.hidden_dim=96", "trunk[1].loop.of.repeat=2"],
    "recurrentgemma_2b": ["embedding_scale=8", "trunk[0].repeat=3", "define.recurrent[0].rg_lru.num_heads=4",
                          "define.recurrent[1].geglu.hidden_dim=96", "define.local[1].geglu.hidden_dim=96",
                          "define.local[0].attention.head_dim=16", "define.local[0].attention.rotary_dim=8",
                          "define.local[0].attention.window=8"],
    "trm_small": ["trunk[0].inner=1", "trunk[0].outer=1"],
    "zamba2_7b": [
        "trunk[0].revisit.at=1,2,4", "trunk[0].revisit.attention.num_heads=4",
        "trunk[0].revisit.attention.scale=0.25", "trunk[0].revisit.hidden_dim=96", "trunk[0].revisit.rank=8",
        "trunk[0].revisit.of.repeat=6", "trunk[0].revisit.of.of.mamba2.num_heads=8",
        "trunk[0].revisit.of.of.mamba2.state_dim=8",
    ],
    "zamba2_1.2b": [
        "trunk[0].revisit.at=1,2,4", "trunk[0].revisit.attention.num_heads=4",
        "trunk[0].revisit.attention.scale=0.25", "trunk[0].revisit.hidden_dim=96", "trunk[0].revisit.rank=8",
        "trunk[0].revisit.attention_rank=8",
        "trunk[0].revisit.of.repeat=6", "trunk[0].revisit.of.of.mamba2.num_heads=8",
        "trunk[0].revisit.of.of.mamba2.state_dim=8",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", config_names())
def test_golden(name):
    expected = FOLDER / f"{name}.txt"
    assert expected.exists(), "run: make golden"
    assert golden_text(name) == expected.read_text(), "a model changed; if that is meant, run: make golden"


def said(value) -> set[str]:
    """Every word of a configuration: keys and strings."""
    if isinstance(value, dict):
        return set(value).union(*map(said, value.values()))
    if isinstance(value, list):
        return set().union(*map(said, value))
    return {value} if isinstance(value, str) else set()


def test_every_block_is_in_a_configuration():
    """Whatever is registered, a plug-in's apart, can be seen at work in a configuration that ships, mixers and the
    like in one that trains on a CPU."""
    shown: dict[str, set[str]] = {}
    for config in config_names():
        graph = load_graph(config)
        words = said(dict(graph.document)) | {spec.name for spec in graph.walk()}
        for word in words:
            shown.setdefault(word, set()).add(config)
    ours = [c for c in map(block_card, list_blocks()) if c.provider == "block-zoo"]
    assert not [c.name for c in ours if c.name not in shown]
    own = [c.name for c in ours if c.kind in ("mixer", "ffn", "memory", "select", "cache", "router", "chunker")]
    params = {c: re.search(r"params ([\d,]+)", (FOLDER / f"{c}.txt").read_text()) for c in config_names()}
    small = {config for config, found in params.items() if found and int(found[1].replace(",", "")) < 3e7}
    assert not [name for name in own if not shown[name] & small]


@pytest.fixture(scope="module", params=LANGUAGE)
def model(request):
    model = zoo.build(request.param, SMALL + SHRINK.get(request.param, [])).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype) / max(p.shape[-1:] or (1,)) ** 0.5)
    return model


def tokens(length, seed=3):
    return torch.randint(61, (2, length), generator=torch.Generator().manual_seed(seed))


def test_segments(model):
    x = tokens(37)
    with torch.no_grad():
        full = model(x)
        for cuts in ([1] * 37, [20, 1, 16]):
            state, parts, start = model.init_state(2, 37), [], 0
            for length in cuts:
                parts.append(model(x[:, start : start + length], state=state))
                start += length
            torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-8)


def test_generate_is_argmax_over_full_forwards(model):
    x = tokens(11)
    expected = x
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    # a block diffuser remains a causal model, and generates in another way
    made = torch.cat([x, *CausalLM.stream(model, x, 12)], 1) if "diffusion" in model.config else model.generate(x, 12)
    assert torch.equal(made, expected)


def test_batch_and_packing(model):
    x = tokens(30)
    doc_ids = torch.tensor([0] * 13 + [1] * 17).expand(2, 30)
    with torch.no_grad():
        packed = model(x, doc_ids=doc_ids)
        alone = torch.cat([model(x[:, :13]), model(x[:, 13:])], 1)
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-8)
        torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=0, atol=1e-8)


def test_trains(model):
    model = zoo.build(model.config).train()
    x = tokens(24)
    torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.grad is not None for p in model.parameters()) >= 0.9 * len(list(model.parameters()))


def leaves_tokens_out(model):
    """Whether the state of some block lacks tokens that went by: costs do not know how many."""
    nodes = [m for m in model.modules() if isinstance(m, (Loop, Route))]
    left = [m for m in nodes if not (m.router.takes_all or m.router.reads_all or getattr(m, "shares_keys", False))]
    return bool(left) or any(isinstance(m, (Hierarchy, Feedback)) for m in model.modules())


def without_input_gradient(model, batch_size):
    """Matrix FLOPs of maps of what is given, which needs no gradient: pixels, depths."""
    flops = sum(2 * m.steps * m.depth_in.weight.numel() for m in model.modules() if isinstance(m, Stage))
    if hasattr(model, "embed"):
        flops += 2 * batch_size * model.options.grid**2 * model.embed.weight.numel()
    return flops


@pytest.mark.parametrize("name", config_names())
def test_predicted_costs_are_the_counted_ones(monkeypatch, name):
    """Parameters, state bytes and matrix FLOPs of prefill, of training's forward and of a token that is decoded; of
    models that choose, for the choices they made."""
    language = not re.search("^vision:", find_config(name).read_text(), re.M)
    model = zoo.build(name, SMALL + SHRINK.get(name, []) if language else SHRINK.get(name, []))
    length = 37 if language else model.options.num_tokens
    inputs = tokens(length) if language else torch.zeros(2, 3, model.options.image_size, model.options.image_size)
    as_drawn(monkeypatch, model)
    loops = [m for m in model.modules() if isinstance(m, Loop)]

    def said(mode, new=length, before=0):
        return zoo.estimate(model, batch_size=2, seq_len=new, context_len=before, mode=mode)

    def counted(call, *args, **given):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(*args, **given)
        return counter.get_total_flops()

    model.eval()
    seen, report = counted(model, inputs), said("prefill")
    assert report.params == sum(p.numel() for p in model.parameters())
    assert min(report.useful_flops, report.vector_flops) > 0
    # a ring goes token by token, of which some leave
    assert report.flops == (pytest.approx(seen, rel=0.01) if any(m.ring for m in loops) else seen)
    if "decode" in model.modes:
        state = model.init_state(2, length + 1)
        with torch.no_grad():
            model(inputs, state=state)
        seen, step = counted(model, inputs[:, :1], state=state), said("decode", 1, length)
        if not any(isinstance(m, Hierarchy) for m in model.modules()):
            assert step.state_bytes == state.max_nbytes
        if any(isinstance(m, BlockFFN) and m.assumption for m in model.modules()):
            assert step.flops >= seen
        elif not leaves_tokens_out(model):
            assert step.flops == seen

    model.train()
    for loop in loops:
        monkeypatch.setattr(loop, "sample_sigma", None)  # which draws the number of steps
    if isinstance(model, BlockDiffusionLM):
        row = tokens(64) % model.mask_token
        seen, report = counted(model.losses, row, 0.5 * (row % 2)), said("train", 64)
    else:
        seen, report = counted(model, inputs), said("train")
    cut = [m for m in loops if (m.grad_last or m.steps) < m.steps]
    if cut or any(isinstance(m, Feedback) for m in model.modules()):
        assert seen < report.flops < 3 * seen  # of some steps forward alone
    else:
        assert report.flops == 3 * seen - without_input_gradient(model, 2)


def test_saves_and_loads(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = zoo.from_pretrained(tmp_path)
    x = tokens(9)
    assert torch.equal(again(x), model(x))


def test_hydra_is_the_size_it_claims():
    report = zoo.estimate("hydra_hybrid", batch_size=1, seq_len=1)
    assert 1.55e9 < report.params < 1.65e9
    assert 0.90e9 < report.active_params < 1.00e9


def assert_generates_as(ours, theirs, tokens):
    """With a cache, token by token, the same continuation as transformers' model."""
    theirs.generation_config.eos_token_id = None
    mask = torch.ones_like(tokens)
    assert torch.equal(
        ours.generate(tokens, 8), theirs.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)
    )


def test_hnet_xl_is_the_published_one():
    """The parameters of the released hnet_2stage_XL (1.6 B), counted from its own description, layout
    m4 [T1 m4 [T27] m4 T1] m4 with widths 1024, 1536, 2048."""

    def mamba2(d, states=128):
        inner = 2 * d
        heads, channels = inner // 64, inner + 2 * states
        return d * (inner + channels + heads) + 5 * channels + 3 * heads + inner + inner * d + d

    def layer(d, hidden):
        return 4 * d * d + 3 * d * hidden + 2 * d

    def chunks(d, wider):
        return 3 * d * d + d + wider - d

    ends = 2 * 256 * 1024 + 8 * mamba2(1024) + 2 * 1024 + chunks(1024, 1536)
    words = 2 * layer(1536, 4096) + 8 * mamba2(1536) + 2 * 1536 + chunks(1536, 2048)
    want = ends + words + 27 * layer(2048, 5504) + 2048
    report = zoo.estimate("hnet_xl", batch_size=1, seq_len=1)
    assert report.params == want == 1_603_492_224
    assert len(find_config("hnet_xl").read_text().splitlines()) < 60
    # inside, a ninth of the bytes
    byte = zoo.estimate("hnet_xl", batch_size=1, seq_len=1, context_len=8191, mode="decode").flops
    assert byte < 0.2 * 2 * report.params


def test_kimi_linear_is_the_published_one():
    """The number of parameters that transformers' KimiLinearForCausalLM has on the meta device, and the layers of the
    checkpoint that are full attention."""
    report = zoo.estimate("kimi_linear_48b", batch_size=1, seq_len=1)
    assert report.params == 49_122_675_072
    assert 3.4e9 < report.active_params < 3.5e9
    mixers = [n.block for n in report.nodes if n.block in ("kda", "mla")]
    assert [i for i, block in enumerate(mixers, 1) if block == "mla"] == [4, 8, 12, 16, 20, 24, 27]


def test_kimi_linear_is_transformers_model():
    """Logits of a shrunken one, all weights taken over by name: order of layers, routing, norms and scales included."""
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    full = [4, 8, 11]
    config = KimiLinearConfig(
        hidden_size=64, vocab_size=61, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=11,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, pad_token_id=0,
        linear_attn_config={
            "full_attn_layers": full, "kda_layers": [i for i in range(1, 12) if i not in full], "num_heads": 4,
            "head_dim": 16,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = KimiLinearForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.ndim > 1 and "A_log" not in name:
                p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5)
        for layer in theirs.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.2)
    weights = {}
    for name, tensor in theirs.state_dict().items():
        name = name.removeprefix("model.")
        if name.startswith("layers."):
            _, i, part, *rest = name.split(".")
            mixer = part in ("self_attn", "input_layernorm")
            place = f"layers.{2 * int(i) + (not mixer)}" + (".items.0" if mixer or int(i) else "")
            name = ".".join([place, "norm" if "norm" in part else "block", *rest])
        name = name.replace("embed_tokens", "tok_embeddings")
        weights[name] = tensor
    ours = zoo.build("kimi_linear_48b", SMALL + SHRINK["kimi_linear_48b"]).eval()
    missing = ours.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and all("expert_counts" in n for n in missing.missing_keys)
    x = tokens(33)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
    assert_generates_as(ours, theirs, x[:, :7])


def test_deepseek_v3_is_the_size_it_claims():
    report = zoo.estimate("deepseek_v3", batch_size=1, seq_len=1)
    assert report.params == 671_026_404_352  # published: 671 billion, 37 of them active
    assert 36.5e9 < report.active_params < 38e9


def test_deepseek_v3_is_transformers_model():
    """Logits of a shrunken one, all weights taken over by name: latent attention with YaRN, groups of experts, biased
    selection, scale of the routes and the shared expert included."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        hidden_size=64, vocab_size=61, intermediate_size=96, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=16, num_experts_per_tok=8, n_group=8,
        topk_group=4, n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=True, first_k_dense_replace=1,
        q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, pad_token_id=0,
        max_position_embeddings=163840, rope_interleave=True, rope_theta=10000.0,
        rope_scaling={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5 if p.ndim > 1 else 1 + 0.3 * torch.randn(p.shape))
        for layer in theirs.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.2)
    weights = {}
    for name, tensor in theirs.state_dict().items():
        name = name.removeprefix("model.").replace("embed_tokens", "tok_embeddings")
        if name.startswith("layers."):
            _, i, part, *rest = name.split(".")
            place = 2 * int(i) + (part in ("mlp", "post_attention_layernorm"))
            name = ".".join([f"layers.{place}.items.0", "norm" if "norm" in part else "block", *rest])
        weights[name] = tensor
    ours = zoo.build("deepseek_v3", SMALL + SHRINK["deepseek_v3"]).eval()
    missing = ours.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and all("expert_counts" in n for n in missing.missing_keys)
    x = tokens(33)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
    assert_generates_as(ours, theirs, x[:, :7])
