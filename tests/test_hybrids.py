"""The published hybrids: the parameters of each, and logits equal to transformers' of a shrunken one."""

import pytest
import torch
from test_configs import SHRINK, SMALL, assert_generates_as

import zoo
from zoo.graph.loader import find_config
from zoo.graph.nodes import ResidualBlock
from zoo.graph.parallel import Parallel

# what transformers' model of the published configuration counts on the meta device
PARAMS = {
    "deepseek_v3": 671_026_404_352,
    "falcon_h1_500m": 521_411_104,
    "jamba_52b": 51_570_323_328,
    "kimi_linear_48b": 49_122_675_072,
    "minimax_text_01": 456_089_655_296,
    "nemotron_h_8b": 8_100_852_736,
    "qwen3_next_80b": 79_674_391_296,
    "recurrentgemma_2b": 2_682_862_080,
    "zamba2_1.2b": 1_215_064_704,
    "zamba2_7b": 7_356_749_648,
}
# in billions, where what was published with the weights (model card, size of the checkpoint) tells more than the name
PUBLISHED = {
    "deepseek_v3": 671, "jamba_52b": 51.57, "minimax_text_01": 456, "qwen3_next_80b": 80, "recurrentgemma_2b": 2.683,
    "zamba2_1.2b": 1.215, "zamba2_7b": 7.355,
}  # fmt: skip
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"hidden_size": 64, "vocab_size": 61, "pad_token_id": 0, **HEADS}


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_are_the_published_ones(name):
    params = zoo.estimate(name, batch_size=1, seq_len=1).params
    assert params == PARAMS[name]
    assert params == pytest.approx(1e9 * PUBLISHED.get(name, params / 1e9), rel=0.005)
    assert len(find_config(name).read_text().splitlines()) < 60


def test_active_parameters_are_those_of_the_names():
    for name, active in (("jamba_52b", 12e9), ("minimax_text_01", 46e9), ("qwen3_next_80b", 3.5e9)):
        report = zoo.estimate(name, batch_size=1, seq_len=1)
        inside = report.active_params - report.nodes[0].params  # tables look up, they do not compute
        assert 0.9 < inside / active < 1.1, (name, inside)


def redraw(model):
    """Matrices that keep the size of what they map, and vectors off their constants."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "A_log" not in name:
                p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5)
            else:
                p.add_(0.2 * torch.randn(p.shape))
    return model.eval()


def part(module, **renamed):
    """The weights of one of their modules by our names; `renamed` maps a name's first part."""
    weights = {}
    for name, tensor in module.state_dict().items():
        first, _, rest = name.partition(".")
        weights[".".join(filter(None, [renamed.get(first, first), rest]))] = tensor
    return weights


def compare(name, theirs, blocks, norms, *, embedding, final_norm, overrides=(), extra=None):
    """Logits of ours with the weights of theirs: one entry of `blocks` for each residual block, of `norms` for each
    norm in front of one, `extra` for the first layer beside these."""
    ours = zoo.build(name, [*SMALL, *SHRINK[name], *overrides]).eval()
    mine = [m for m in ours.layers.modules() if isinstance(m, ResidualBlock)]
    for node, weights in zip(mine, blocks, strict=True):
        node.block.load_state_dict(weights)
    mine = [m.norm for m in ours.layers.modules() if isinstance(m, (ResidualBlock, Parallel)) and m.norm is not None]
    for norm, weight in zip(mine, norms, strict=True):
        norm.load_state_dict({"weight": weight})
    if extra:
        missing = ours.layers[0].load_state_dict(extra, strict=False)
        assert not missing.unexpected_keys and all(n.startswith("items.") for n in missing.missing_keys)
    ours.norm.load_state_dict({"weight": final_norm})
    ours.tok_embeddings.load_state_dict({"weight": embedding.weight})
    ours.lm_head.load_state_dict({"weight": theirs.lm_head.weight})
    x = torch.randint(1, 61, (2, 33), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = theirs(x, use_cache=False).logits
        torch.testing.assert_close(ours(x), want, atol=2e-4 * want.std().item(), rtol=0)
    assert_generates_as(ours, theirs, x[:, :7])


def test_jamba():
    from transformers import JambaConfig, JambaForCausalLM

    theirs = redraw(JambaForCausalLM(JambaConfig(
        **SIZES, intermediate_size=96, num_hidden_layers=8, num_experts=4, mamba_d_state=4, mamba_dt_rank=8,
    )))  # fmt: skip
    blocks, norms = [], []
    for layer in theirs.model.layers:
        blocks += [part(layer.mamba if hasattr(layer, "mamba") else layer.self_attn)]
        blocks += [part(layer.feed_forward, router="gate")]
        norms += [layer.input_layernorm.weight, layer.pre_ff_layernorm.weight]
    compare(
        "jamba_52b", theirs, blocks, norms, embedding=theirs.model.embed_tokens,
        final_norm=theirs.model.final_layernorm.weight, overrides=["define.experts.moe.hidden_dim=96"],
    )  # fmt: skip


def test_nemotron_h():
    from transformers import NemotronHConfig, NemotronHForCausalLM

    # time_step_min: the published time_step_limit does not bound delta, though transformers clamps it
    theirs = redraw(NemotronHForCausalLM(NemotronHConfig(
        **SIZES, head_dim=16, hybrid_override_pattern="M-M*-M-M*-M-", intermediate_size=96, ssm_state_size=8,
        mamba_num_heads=8, mamba_head_dim=16, n_groups=2, time_step_min=1e-9,
    )))  # fmt: skip
    layers = theirs.model.layers
    blocks, norms = [part(layer.mixer) for layer in layers], [layer.norm.weight for layer in layers]
    compare(
        "nemotron_h_8b", theirs, blocks, norms, embedding=theirs.model.embeddings,
        final_norm=theirs.model.norm_f.weight,
    )  # fmt: skip


def test_falcon_h1():
    from transformers import FalconH1Config, FalconH1ForCausalLM

    theirs = redraw(FalconH1ForCausalLM(FalconH1Config(
        **SIZES, num_hidden_layers=2, intermediate_size=96, mamba_d_ssm=96, mamba_n_heads=6, mamba_d_state=8,
        mamba_rms_norm=False, rope_parameters={"rope_type": "default", "rope_theta": 1e11},
        lm_head_multiplier=0.0390625, embedding_multiplier=5.656854249492381, key_multiplier=0.390625,
        attention_out_multiplier=0.9375, ssm_in_multiplier=1.25, ssm_out_multiplier=0.23570226039551587,
        mlp_multipliers=[0.8838834764831844, 0.5859375],
        ssm_multipliers=[0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
    )))  # fmt: skip
    blocks, norms = [], []
    for layer in theirs.model.layers:
        blocks += [part(layer.self_attn), part(layer.mamba), part(layer.feed_forward)]
        norms += [layer.input_layernorm.weight, layer.pre_ff_layernorm.weight]
    compare(
        "falcon_h1_500m", theirs, blocks, norms, embedding=theirs.model.embed_tokens,
        final_norm=theirs.model.final_layernorm.weight,
    )  # fmt: skip


def test_minimax():
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    alpha = 3.5565588200778455
    theirs = redraw(MiniMaxForCausalLM(MiniMaxConfig(
        **SIZES, head_dim=16, intermediate_size=32, num_hidden_layers=8, num_local_experts=4, block_size=16,
        layer_types=["linear_attention"] * 7 + ["full_attention"], full_attn_alpha_factor=alpha,
        linear_attn_alpha_factor=alpha, mlp_alpha_factor=alpha,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
    )))  # fmt: skip
    blocks, norms = [], []
    for layer in theirs.model.layers:
        mixer = {k: v for k, v in part(layer.self_attn).items() if "decay" not in k and k != "slope_rate"}
        blocks += [mixer, part(layer.mlp)]
        norms += [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    compare(
        "minimax_text_01", theirs, blocks, norms, embedding=theirs.model.embed_tokens,
        final_norm=theirs.model.norm.weight,
        overrides=["define.full.attention.rotary_dim=16"],  # transformers rotates every channel
    )  # fmt: skip


def delta_weights(delta):
    """Gated DeltaNet as transformers stores it: rows of one projection per key head, q, k, its v and its gates."""
    heads, width, shared = delta.num_k_heads, delta.head_k_dim, delta.num_v_heads // delta.num_k_heads
    values = shared * delta.head_v_dim
    rows = delta.in_proj_qkvz.weight.unflatten(0, (heads, -1)).split([width, width, values, values], 1)
    weights = {f"{n}_proj.weight": w.flatten(0, 1) for n, w in zip("qkvg", rows, strict=True)}
    rows = delta.in_proj_ba.weight.unflatten(0, (heads, -1)).split([shared, shared], 1)
    weights |= {f"{n}_proj.weight": w.flatten(0, 1) for n, w in zip("ba", rows, strict=True)}
    convs = delta.conv1d.weight.split([delta.key_dim, delta.key_dim, delta.value_dim])
    weights |= {f"{n}_conv1d.weight": w for n, w in zip("qkv", convs, strict=True)}
    return weights | {"A_log": delta.A_log, "dt_bias": delta.dt_bias, "o_norm.weight": delta.norm.weight,
                      "o_proj.weight": delta.out_proj.weight}  # fmt: skip


def test_qwen3_next():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    theirs = redraw(Qwen3NextForCausalLM(Qwen3NextConfig(
        **SIZES, head_dim=16, num_hidden_layers=4, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
        linear_num_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1e7,
                                                   "partial_rotary_factor": 0.25},
    )))  # fmt: skip
    blocks, norms = [], []
    for layer in theirs.model.layers:
        if hasattr(layer, "linear_attn"):
            blocks.append(delta_weights(layer.linear_attn))
        else:
            blocks.append({k: v + 1 if "norm" in k else v for k, v in part(layer.self_attn).items()})
        blocks.append(part(layer.mlp, shared_expert="shared_experts"))
        norms += [1 + layer.input_layernorm.weight, 1 + layer.post_attention_layernorm.weight]
    compare(
        "qwen3_next_80b", theirs, blocks, norms, embedding=theirs.model.embed_tokens,
        final_norm=1 + theirs.model.norm.weight,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["zamba2_7b", "zamba2_1.2b"])
def test_zamba2(name):
    from transformers import Zamba2Config, Zamba2ForCausalLM

    copies, groups, in_attention = (2, 2, False) if name == "zamba2_7b" else (1, 1, True)

    sites = [1, 2, 4]
    theirs = redraw(Zamba2ForCausalLM(Zamba2Config(
        **SIZES | {"num_key_value_heads": 4}, num_hidden_layers=6, intermediate_size=96, adapter_rank=8,
        layers_block_type=["hybrid" if i in sites else "linear_attention" for i in range(6)], n_mamba_heads=8,
        mamba_ngroups=groups, mamba_d_state=8, num_mem_blocks=copies, use_mem_rope=True, time_step_min=1e-9,
        use_shared_attention_adapter=in_attention,
    )))  # fmt: skip
    layers = theirs.model.layers
    plain = [getattr(layer, "mamba_decoder", layer) for layer in layers]
    extra = {}
    for n, i in enumerate(sites):
        shared, place = layers[i].shared_transformer, f"transformers.{n % copies}."
        adapter = shared.feed_forward.gate_up_proj_adapter_list[n]
        extra |= {place + k.replace("feed_forward.", ""): v for k, v in part(shared).items() if "adapter" not in k}
        extra |= {f"visits.{n}.adapter_down.weight": adapter[0].weight, f"visits.{n}.adapter_up.weight":
                  adapter[1].weight, f"visits.{n}.linear.weight": layers[i].linear.weight}  # fmt: skip
        for x in "qkv" * in_attention:
            down, up = getattr(shared.self_attn, f"linear_{x}_adapter_list")[n]
            place = f"visits.{n}.adapted.{x}_proj."
            extra |= {f"{place}down.weight": down.weight, f"{place}up.weight": up.weight}
    compare(
        name, theirs, [part(layer.mamba) for layer in plain], [layer.input_layernorm.weight for layer in plain],
        embedding=theirs.model.embed_tokens, final_norm=theirs.model.final_layernorm.weight, extra=extra,
    )  # fmt: skip
