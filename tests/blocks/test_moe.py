"""Token-choice mixture of experts against Hugging Face's, a dense masked form, and its own controllers."""

import pytest
import torch

import zoo.registry as registry
from zoo.kernels import use

DIM, HIDDEN = 32, 16
X = torch.randn(2, 9, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def moe(**options):
    torch.manual_seed(0)
    return registry.create("moe", DIM, dtype=torch.float64, **{"hidden_dim": HIDDEN} | options)


def redraw(module):
    generator = torch.Generator().manual_seed(7)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * p.shape[-1] ** -0.5
    return module.double().eval()


def mixtral():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=6, num_experts_per_tok=2)
    return MixtralSparseMoeBlock(config), {"num_experts": 6}


def qwen3():
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=DIM, moe_intermediate_size=HIDDEN, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False
    )
    return Qwen3MoeSparseMoeBlock(config), {"top_k": 3, "renormalize": False}


def deepseek_v3():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=DIM, moe_intermediate_size=HIDDEN, n_routed_experts=8, num_experts_per_tok=2, n_group=4,
        topk_group=2, n_shared_experts=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    module = DeepseekV3MoE(config)
    module.gate.e_score_correction_bias = torch.randn(8, generator=torch.Generator().manual_seed(1)) * 0.2
    return module, {
        "score": "sigmoid", "num_groups": 4, "top_groups": 2, "num_shared_experts": 2, "route_scale": 2.5,
        "balance": "bias",
    }  # fmt: skip


def qwen3_next():
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

    config = Qwen3NextConfig(
        hidden_size=DIM, moe_intermediate_size=HIDDEN, shared_expert_intermediate_size=HIDDEN, num_experts=8,
        num_experts_per_tok=2,
    )  # fmt: skip
    module = Qwen3NextSparseMoeBlock(config)
    module.shared_experts = module.shared_expert  # our name for it
    return module, {"num_shared_experts": 1, "shared_gate": True}


@pytest.mark.parametrize("family", [mixtral, qwen3, deepseek_v3, qwen3_next])
def test_is_hugging_faces(family):
    theirs, options = family()
    theirs = redraw(theirs)
    ours = moe(**options).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "shared_expert." not in k})
    want = theirs(X)
    want = want[0] if isinstance(want, tuple) else want
    # their routers compute in fp32
    torch.testing.assert_close(ours(X), want, rtol=1e-5, atol=1e-5)


def test_clamped_experts_with_biases_are_those_of_gpt_oss():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    sizes = {"intermediate_size": HIDDEN, "num_local_experts": 8, "num_experts_per_tok": 3}
    theirs = redraw(GptOssMLP(GptOssConfig(hidden_size=DIM, swiglu_limit=0.4, **sizes)))
    ours = moe(top_k=3, bias=True, swiglu_limit=0.4).eval()
    ours.gate.load_state_dict(theirs.router.state_dict())
    weights = dict(theirs.experts.state_dict())
    for name in ("gate_up_proj", "down_proj"):
        weights[name] = weights[name].mT
    for name in ("gate_up_proj", "gate_up_proj_bias"):  # theirs alternate gate and up
        weights[name] = torch.cat([weights[name][:, ::2], weights[name][:, 1::2]], 1)
    ours.experts.load_state_dict(weights)
    torch.testing.assert_close(ours(X), theirs(X)[0], rtol=1e-9, atol=1e-9)


def test_balance_loss_is_hugging_faces():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    ours = moe(num_experts=6, top_k=2).train()
    ours(X)
    logits = ours.gate(X.reshape(-1, DIM))[0]
    want = load_balancing_loss_func((logits,), 6, 2) / 2  # theirs counts each of the k choices in full
    torch.testing.assert_close(ours.metrics["balance_loss"].float(), want, rtol=1e-6, atol=1e-6)


def dense(ours, x):
    """Every expert on every token, masked by the routing weights."""
    flat = x.reshape(-1, DIM)
    _, _, indices, weights = ours.gate(flat)
    gate, up = torch.einsum("nd,ehd->neh", flat, ours.experts.gate_up_proj).chunk(2, -1)
    outs = torch.einsum("neh,edh->ned", torch.nn.functional.silu(gate) * up, ours.experts.down_proj)
    full = torch.zeros(len(flat), ours.num_experts, dtype=x.dtype).scatter(1, indices, weights)
    y = torch.einsum("ne,ned->nd", full, outs).view_as(x)
    return y if ours.shared_experts is None else y + ours.shared_experts(x)


OPTIONS = (
    {},
    {"score": "sigmoid", "num_groups": 4, "top_groups": 2, "num_shared_experts": 1},
    {"top_k": 1, "renormalize": False, "num_experts": 5},
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kernel", ["loop", "chunked", "reference"])
def test_dispatch_equals_the_dense_masked_form(options, kernel):
    ours = moe(**options, kernel=kernel).eval()
    got, want = ours(X), dense(ours, X)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    parameters = list(ours.parameters())
    for g, w in zip(
        torch.autograd.grad(got.square().sum(), parameters), torch.autograd.grad(want.square().sum(), parameters)
    ):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-9)


def test_one_expert_is_swiglu():
    ours = moe(num_experts=1, top_k=1)
    swiglu = registry.create("swiglu", DIM, hidden_dim=HIDDEN, dtype=torch.float64)
    swiglu.gate_proj.weight.data, swiglu.up_proj.weight.data = ours.experts.gate_up_proj.data[0].chunk(2)
    swiglu.down_proj.weight.data = ours.experts.down_proj.data[0]
    torch.testing.assert_close(ours(X), swiglu(X))


def test_all_experts_with_equal_scores_are_a_mean():
    ours = moe(num_experts=4, top_k=4, route_scale=3.0)
    torch.nn.init.zeros_(ours.gate.weight)
    single = [ours.experts(X.reshape(-1, DIM), torch.full((18, 1), e), torch.ones(18, 1)) for e in range(4)]
    torch.testing.assert_close(ours(X).reshape(-1, DIM), 3.0 * sum(single) / 4)


def test_groups_limit_the_choice():
    ours = moe(score="sigmoid", num_groups=4, top_groups=2, top_k=3)
    indices = ours.gate(X.reshape(-1, DIM))[2]
    assert all(len(set(row)) <= 2 for row in (indices // 2).tolist())
    scores = ours.gate(X.reshape(-1, DIM))[1]
    best = scores.unflatten(-1, (4, 2)).sum(-1).topk(2).indices
    assert all(set((i // 2).tolist()) <= set(g.tolist()) for i, g in zip(indices, best))


def test_selection_bias_steers_selection_only():
    ours = moe(balance="bias", score="sigmoid").eval()
    y = ours(X)
    ours.gate.e_score_correction_bias.add_(0.7)
    torch.testing.assert_close(ours(X), y)  # a constant changes nothing
    ours.gate.e_score_correction_bias[3] += 10.0
    _, scores, indices, weights = ours.gate(X.reshape(-1, DIM))
    assert (indices == 3).any(-1).all()
    chosen = scores.gather(1, indices)
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))


def test_loss_free_balance_evens_out_a_skewed_stream():
    ours = moe(balance="bias", score="sigmoid", bias_update_rate=0.02).train()
    skew = torch.randn(DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loads = []
    for step in range(120):
        x = torch.randn(4, 32, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) + skew
        with torch.no_grad():
            ours(x)
        loads.append(ours.expert_counts.double())
        ours.update_bias()
        assert ours.expert_counts.sum() == 0
    early, late = sum(loads[:3]), sum(loads[-40:])
    assert early.max() / early.mean() > 2.0 and late.max() / late.mean() < 1.1


def test_bias_update_by_hand_and_only_from_training():
    ours = moe(balance="bias", bias_update_rate=0.5)
    ours.eval()(X)
    ours.update_bias()
    assert ours.gate.e_score_correction_bias.abs().max() == 0 and ours.metrics == {}
    ours.expert_counts.copy_(torch.tensor([4, 0, 2, 2, 2, 2, 2, 2]))
    ours.update_bias()
    assert ours.gate.e_score_correction_bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0, 0]


def test_recomputation_counts_once():
    from torch.utils.checkpoint import checkpoint

    ours = moe(balance="bias").train()
    checkpoint(ours, X, use_reentrant=False).sum().backward()
    assert ours.expert_counts.sum() == X.shape[0] * X.shape[1] * ours.top_k


def test_losses_add_their_gradient_and_leave_the_output():
    ours, x = moe(z_loss_coef=0.3, aux_coef=0.2).train(), X.clone().requires_grad_()
    y = ours(x)
    torch.testing.assert_close(y, ours.eval()(x))
    got = torch.autograd.grad(y.sum(), ours.gate.weight)[0]
    logits, scores, indices, _ = ours.gate(x.reshape(-1, DIM))
    share = torch.bincount(indices.flatten(), minlength=8) / indices.numel()
    loss = 0.2 * 8 * (share * scores.mean(0)).sum() + 0.3 * logits.logsumexp(-1).square().mean()
    want = torch.autograd.grad(ours(x).sum() + loss, ours.gate.weight)[0]
    torch.testing.assert_close(got, want)


def test_sequence_loss_is_the_balance_loss_of_each_row():
    ours = moe(score="sigmoid", balance="bias", sequence_aux_coef=0.4).train()
    y = ours(X)
    got = torch.autograd.grad(y.sum(), ours.gate.weight)[0]
    losses = []
    for row in X:
        s = (row @ ours.gate.weight.t()).sigmoid()
        f = torch.bincount(ours.gate(row)[2].flatten(), minlength=8) * 8 / (2 * len(row))
        losses.append((f * (s / s.sum(-1, keepdim=True)).mean(0)).sum())
    loss = torch.stack(losses).mean()
    torch.testing.assert_close(ours.metrics["sequence_loss"], loss.detach())
    want = torch.autograd.grad(ours.eval()(X).sum() + 0.4 * loss, ours.gate.weight)[0]
    torch.testing.assert_close(got, want)


def hypersphere(**options):
    return moe(router="hypersphere", router_dim=3, **options).eval()


def test_hypersphere_is_the_cosine_over_the_temperature():
    ours = hypersphere()
    logits, _, indices, weights = ours.gate(X.reshape(-1, DIM))
    assert ours.gate.log_temperature.exp().item() == pytest.approx(0.3)
    for n, x in enumerate(X.reshape(-1, DIM)):
        token = ours.gate.proj.weight @ x
        for e, expert in enumerate(ours.gate.weight):
            want = token @ expert / (token.norm() * expert.norm()) / 0.3
            assert logits[n, e].item() == pytest.approx(want.item(), abs=1e-12)
    chosen = logits.softmax(-1).gather(1, indices)
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))
    torch.testing.assert_close(ours(X), dense(ours, X), rtol=0, atol=1e-10)


def test_hypersphere_sees_directions_only():
    ours, x = hypersphere(), X.reshape(-1, DIM)
    logits = ours.gate(x)[0]
    torch.testing.assert_close(ours.gate(7 * x)[0], logits)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    ours.gate.proj.weight.data = turn @ ours.gate.proj.weight
    ours.gate.weight.data = 5 * ours.gate.weight @ turn.t()
    torch.testing.assert_close(ours.gate(x)[0], logits)
    ours.gate.log_temperature.data.fill_(-12.0)  # cold: the best expert takes all
    scores = ours.gate(x)[1]
    torch.testing.assert_close(scores.max(-1).values, torch.ones(len(x), dtype=torch.float64))
    assert torch.equal(scores.argmax(-1), logits.argmax(-1))
    assert ours.gate(0 * x)[0].abs().max() == 0  # no direction, no preference, no NaN


def test_hypersphere_parameters():
    xmoe = registry.create("moe", DIM, num_experts=16, router="hypersphere", device="meta")
    assert sum(p.numel() for p in xmoe.gate.parameters()) == (DIM + 16) * 8 + 1


def test_parameters_and_cost():
    ours = moe(num_shared_experts=1, balance="bias")
    one = 3 * DIM * HIDDEN
    assert sum(p.numel() for p in ours.parameters()) == 9 * one + 8 * DIM
    assert ours.active_params() == 3 * one + 8 * DIM
    few, many = ours.cost(1, 1, mode="prefill"), ours.cost(4, 64, mode="prefill")
    assert many.bytes_read - few.bytes_read == 8 * (6 * one + 255 * DIM)  # one token leaves six experts unread
    wide = registry.create("moe", 2048, device="meta")
    assert wide.top_k * wide.hidden_dim == pytest.approx(8 / 3 * 2048, rel=0.01)


def test_backend_can_be_forced_from_outside():
    ours = moe().eval()
    want = ours(X)
    with use(grouped_mm="chunked"):
        torch.testing.assert_close(ours(X), want)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"top_k": 9}, "top_k=9 is more than num_experts=8"),
        ({"top_k": 1}, "set renormalize: false"),
        ({"shared_gate": True}, "give num_shared_experts"),
        ({"num_groups": 3}, "num_groups=3 must divide"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups=3 is more than"),
        ({"num_groups": 8, "top_groups": 1}, "do not fit into top_groups=1"),
        ({"router_dim": 4}, "set router: hypersphere"),
        ({"kernel": "tourch"}, "did you mean torch"),
    ],
)
def test_bad_combinations_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        registry.load("moe")(DIM, **options)


@pytest.mark.parametrize(
    "name, options", [("moe", {}), ("chunk_moe", {"chunk_size": 4}), ("blockffn", {"num_experts": 8})]
)
def test_autocast_leaves_the_route_in_fp32(name, options):
    torch.manual_seed(0)
    ours, x = registry.create(name, DIM, **options).eval(), X.float()
    want = ours(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(x)
    # a flipped choice of experts would be far outside bf16's error
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.03 * want.abs().max().item())


@pytest.mark.parametrize("name", ["moe", "chunk_moe", "blockffn", "product_key"])
def test_training_with_losses_and_metrics_compiles_to_one_graph(name):
    torch.manual_seed(0)
    ours = registry.create(name, DIM).train()
    x = X.float().requires_grad_()
    ours(x).sum().backward()
    want, metrics = {n: p.grad.clone() for n, p in ours.named_parameters()}, dict(ours.metrics)
    ours.zero_grad()
    ours.metrics = {}
    torch.compile(ours, fullgraph=True, backend="aot_eager")(x).sum().backward()
    for n, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, want[n], rtol=1e-4, atol=1e-5)
    assert metrics and all(torch.allclose(ours.metrics[k], v) for k, v in metrics.items())
