"""Loops, routes, parallel branches: the identities that define them, and the law for whole models."""

import pytest
import torch

import zoo

DIM, VOCAB, T = 32, 50, 23
LAYER = [{"attention": {"num_heads": 4}}, {"swiglu": {"hidden_dim": 48}}]


def build(*trunk, seed=0, **top):
    """A model in fp64 whose parameters are large enough for every path to speak."""
    model = zoo.build({"dim": DIM, "vocab_size": VOCAB, "trunk": list(trunk), **top}, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) / max(p.shape[-1:] or (1,)) ** 0.5)
    return model


def copy_weights(target, source, **renamed):
    """Load `source` into `target`; `renamed` maps target prefixes to source prefixes."""
    own = source.state_dict()
    with torch.no_grad():
        for name, tensor in target.state_dict().items():
            for new, old in renamed.items():
                name = old + name.removeprefix(new)
            tensor.copy_(own[name])


def stream(seed=1, rows=2, length=T):
    return torch.randn(rows, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed=2, rows=2, length=T):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def loop(**fields):
    return {"loop": {"of": LAYER, **fields}}


def test_loop_of_one_step_is_its_body():
    model = build(loop(steps=1))
    node = model.layers[0]
    torch.testing.assert_close(node(stream()), node.body(stream()), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "router",
    ["fixed", {"expert_choice": {"capacity": 1.0, "activation": "one"}}],
)
def test_loop_of_k_steps_is_k_applications(router):
    node = build(loop(steps=3, router=router)).layers[0]
    x = stream()
    for training in (True, False):
        node.train(training)
        torch.testing.assert_close(node(x), node.body(node.body(node.body(x))), rtol=0, atol=1e-12)


def test_tied_repeat_equals_fixed_loop():
    looped, repeated = build(loop(steps=3)).layers[0], build({"repeat": 3, "of": LAYER, "tie": "all"}).layers[0]
    copy_weights(repeated, looped, **{"items.0.": "body."})
    torch.testing.assert_close(looped(stream()), repeated(stream()), rtol=0, atol=1e-12)


def test_inject_add_starts_from_zero_and_feeds_the_input():
    node = build(loop(steps=2, inject="add")).layers[0]
    x = stream()
    torch.testing.assert_close(node(x), node.body(node.body(x) + x), rtol=0, atol=1e-12)


def test_gradient_window():
    node = build(loop(steps=3, grad_last=1)).layers[0]
    x = stream().requires_grad_()
    node(x).square().sum().backward()
    windowed = [p.grad.clone() for p in node.body.parameters()]
    node.zero_grad()
    with torch.no_grad():
        y = node.body(node.body(x))
    node.body(y).square().sum().backward()
    for a, p in zip(windowed, node.body.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-9)


def test_expert_choice_picks_ordered_nested_sets_of_the_right_size():
    node = build(loop(steps=3, router={"expert_choice": {"capacity": [1.0, 0.5, 0.25]}})).layers[0].train()
    router, x = node.router, stream()
    carry = router.start(x)
    before = carry["active"]
    for step, count in enumerate([T, T // 2, T // 4]):
        pick = router.pick(step, x, carry, streaming=False)
        after = carry["active"]
        assert after.sum(1).tolist() == [count, count]
        assert not (after & ~before).any()
        if pick.index is not None:
            assert (pick.index.diff(dim=1) > 0).all()
        before = after


def test_unselected_tokens_do_not_matter_to_deeper_steps():
    node = build({"route": LAYER, "router": {"mod": {"capacity": 0.4}}}).layers[0].train()
    x = stream()
    carry = node.router.start(x)
    node.router.pick(0, x, carry, streaming=False)
    chosen = carry["active"]
    other = torch.where(chosen[..., None], x, x * 0.5)
    carry2 = node.router.start(other)
    node.router.pick(0, other, carry2, streaming=False)
    if torch.equal(chosen, carry2["active"]):
        torch.testing.assert_close(node(x)[chosen], node(other)[chosen], rtol=0, atol=1e-12)
    assert torch.equal(node(x)[~chosen], x[~chosen])


def test_training_top_k_looks_ahead_and_the_threshold_does_not():
    node = build({"route": LAYER, "router": {"mod": {"capacity": 0.4}}}).layers[0]
    x = stream()
    changed = x.clone()
    changed[:, T // 2 :] += 5 * stream(9)[:, T // 2 :]
    assert torch.equal(node.eval()(x)[:, : T // 2], node(changed)[:, : T // 2])
    node.train()
    assert not torch.equal(node(x)[:, : T // 2], node(changed)[:, : T // 2])


def test_route_gradient_reaches_router_through_selected_tokens_only():
    node = build({"route": LAYER, "router": {"mod": {"capacity": 0.4, "aux_coef": 0.0}}}).layers[0].train()
    x = stream().requires_grad_()
    node(x).sum().backward()
    assert node.router.score.weight.grad.abs().sum() > 0


def test_token_choice_of_the_deepest_equals_scaled_loop():
    node = build(loop(steps=3, router="token_choice")).layers[0]
    with torch.no_grad():
        node.router.score.weight.zero_()
        node.router.score.weight[2] = 1.0
    x = stream().abs()  # a positive stream scores the last depth highest everywhere
    p = node.router.score(x).softmax(-1)[..., 2:]
    torch.testing.assert_close(node(x), x + p * (node.body(node.body(node.body(x))) - x), rtol=0, atol=1e-11)


def test_token_choice_route_sends_each_token_to_one_body():
    route = {"route": {"bodies": [["swiglu"], "skip", ["mlp"]], "router": "token_choice"}}
    node = build(route).layers[0]
    x = stream()
    p = node.router.score(x).softmax(-1)
    best, choice = p.max(-1)
    assert len(choice.unique()) > 1
    bodies = [node.bodies[0](x), x, node.bodies[1](x)]
    expected = torch.stack(bodies).gather(0, choice[None, ..., None].expand(1, *x.shape))[0]
    torch.testing.assert_close(node(x), x + best[..., None] * (expected - x), rtol=0, atol=1e-12)


def act_weights(node, x):
    weights, router = [], node.router
    original = router.advance

    def spy(step, x, increment, carry):
        weights.append(carry["weight"].detach().clone())
        return original(step, x, increment, carry)

    router.advance = spy
    y = node(x)
    return torch.stack(weights), y


def test_act_weights_sum_to_one_and_mix_the_states():
    node = build(loop(steps=5, router="act")).layers[0]
    x = stream()
    weights, y = act_weights(node, x)
    torch.testing.assert_close(weights.sum(0), torch.ones(2, T, dtype=torch.float64))
    states, s = [], x
    for _ in range(5):
        s = node.body(s)
        states.append(s)
    torch.testing.assert_close(y, (weights[..., None] * torch.stack(states)).sum(0), rtol=0, atol=1e-11)


def test_act_that_halts_at_once_takes_one_step():
    node = build(loop(steps=4, router={"act": {"bias_start": 20.0}})).layers[0]
    with torch.no_grad():
        node.router.halt.weight.zero_()
        node.router.halt.bias.fill_(20.0)
    x = stream()
    weights, y = act_weights(node, x)
    assert torch.equal(weights[0], torch.ones_like(weights[0])) and not weights[1:].any()
    torch.testing.assert_close(y, node.body(x), rtol=0, atol=1e-12)


def test_auxiliary_losses_leave_the_output_and_reach_the_router():
    for router, coef in (("act", "ponder_coef"), ("expert_choice", "aux_coef"), ("token_choice", "balance_coef")):
        with_loss = build(loop(steps=3, router={router: {coef: 0.5}})).layers[0].train()
        without = build(loop(steps=3, router={router: {coef: 0.0}})).layers[0].train()
        x = stream()
        assert torch.equal(with_loss(x), without(x))
        grads = []
        for node in (with_loss, without):
            node(x).square().mean().backward()
            grads.append(torch.cat([p.grad.flatten() for p in node.router.parameters()]))
        assert not torch.equal(*grads)
        assert with_loss.router.metrics


def test_parallel_merges():
    x = stream()
    for merge in ("sum", "mean", "max"):
        node = build({"parallel": ["swiglu", "mlp"], "merge": merge}).layers[0]
        parts = torch.stack([b(x) - x for b in node.branches])
        expected = {"sum": parts.sum(0), "mean": parts.mean(0), "max": parts.amax(0)}[merge]
        torch.testing.assert_close(node(x), x + expected, rtol=0, atol=1e-12)
    gated = zoo.build(
        {
            "dim": DIM,
            "vocab_size": VOCAB,
            "trunk": [{"parallel": ["swiglu", "mlp"], "merge": "gated", "gates": [0.0, 0.0]}],
        }
    ).layers[0]
    assert torch.equal(gated(x.float()), x.float())


def test_parallel_norm_is_shared_and_blocks_get_none_of_their_own():
    node = build({"parallel": ["swiglu", "mlp"], "norm": "layer"}).layers[0]
    x = stream()
    h = node.norm(x)
    torch.testing.assert_close(node(x), x + node.branches[0].block(h) + node.branches[1].block(h), rtol=0, atol=1e-12)


def test_residual_styles():
    x = stream()
    for style in ("pre", "post", "normed", "sandwich", "reordered", "pre_post", "none"):
        skip = 3.0 if style in ("post", "normed", "pre_post") else 1.0
        node = build({"swiglu": {}, "residual": {"style": style, "scale": 0.5, "skip": skip}}).layers[0]
        inner = node.block(x if style in ("post", "reordered") else node.norm(x))
        if style == "post":
            expected = node.norm(3 * x + 0.5 * inner)
        elif style == "normed":
            expected = 3 * node.norm(x) + 0.5 * inner
        elif style == "sandwich":
            expected = x + 0.5 * node.out_norm(inner)
        elif style == "reordered":
            expected = x + 0.5 * node.norm(inner)
        elif style == "pre_post":
            expected = node.out_norm(3 * x + 0.5 * inner)
        else:
            expected = 0.5 * inner + (x if style == "pre" else 0)
        torch.testing.assert_close(node(x), expected, rtol=0, atol=1e-12)
        increment = expected - x if style != "none" else expected
        torch.testing.assert_close(node.increment(x), increment, rtol=0, atol=1e-12)


def test_skip_goes_with_styles_that_norm_again():
    with pytest.raises(zoo.ConfigError, match="goes with style: post, normed or pre_post, not pre"):
        build({"swiglu": {}, "residual": {"skip": 2.0}})


def revisit(**fields):
    body = {"repeat": 5, "of": LAYER}
    return {"revisit": {"at": "1,2,4", "hidden_dim": 24, "attention": {"num_heads": 4}, "of": body, **fields}}


def test_revisit_without_what_the_sites_say_is_its_body():
    node, x = build(revisit(rank=4)).layers[0], stream()
    for visit in node.visits:
        torch.nn.init.zeros_(visit.linear.weight)
    expected = x
    for item in node.items:
        expected = item(expected)
    torch.testing.assert_close(node(x), expected, rtol=0, atol=1e-12)


def test_revisit_is_heard_by_the_body_alone():
    """One site, written out: what the shared transformer says enters the body's layer, not the stream beside it."""
    node, x = build(revisit(at=1, rank=4, of=[["swiglu"], ["swiglu"]])).layers[0], stream()
    shared, visit = node.transformers[0], node.visits[0]
    y = node.items[0](x)
    h = shared.pre_ff_layernorm(shared.self_attn(shared.input_layernorm(torch.cat([y, x], -1))))
    first = shared.gate_up_proj.weight + visit.adapter_up.weight @ visit.adapter_down.weight
    gate, up = (h @ first.T).chunk(2, -1)
    said = visit.linear(shared.down_proj(torch.nn.functional.gelu(gate) * up))
    branch = node.items[1].items[0]
    expected = y + branch.block(branch.norm(y + said))
    torch.testing.assert_close(node(x), expected, rtol=0, atol=1e-12)


def test_revisit_takes_its_transformers_in_turn_and_adapts_from_zero():
    node = zoo.build({"dim": DIM, "vocab_size": VOCAB, "trunk": [revisit(copies=2, rank=4)]}).layers[0]
    assert [node.transformers[i] for i in (0, 1, 0)] == [node._shared(n) for n in range(3)]
    assert node.sites == [1, 2, 4] and len(node.visits) == 3
    assert all(not v.adapter_up.weight.any() and v.linear.weight.any() for v in node.visits)


def test_value_residual_is_the_stack_written_by_hand():
    layer = [{"rwkv7": {"num_heads": 2}}, "rwkv7_ffn"]
    node, x = build({"value_residual": [{"repeat": 3, "of": layer}]}).layers[0], stream()
    expected, v_first = x, None
    for mixer, ffn in zip(node.items[::2], node.items[1::2], strict=True):
        h = mixer.norm(expected)
        expected = expected + mixer.block(h, v_first=v_first)
        v_first = mixer.block.value(h) if v_first is None else v_first
        expected = expected + ffn.block(ffn.norm(expected))
    assert [item.block.v_lora is None for item in node.items[::2]] == [True, False, False]
    torch.testing.assert_close(node(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("trunk", "words"),
    [
        ([{"value_residual": ["rwkv7", "rwkv7_ffn"]}], "needs two blocks that have a value"),
        ([{"value_residual": ["rwkv7", {"loop": 2, "of": ["rwkv7"]}]}], "needs two blocks that have a value"),
        ([{"value_residual": [{"rwkv7": {}, "share": "a"}, {"share": "a"}]}], "cannot be shared"),
        ([{"rwkv7": {"value_residual": True}}], "comes from where the block stands"),
    ],
)
def test_mistakes_of_value_residual(trunk, words):
    with pytest.raises(zoo.ConfigError, match=words):
        zoo.build({"dim": DIM, "vocab_size": VOCAB, "trunk": trunk})


def test_a_stitch_is_what_its_body_adds_mapped_back():
    node, x = build({"stitch": 16, "of": [LAYER, {"stitch": 8, "of": "swiglu"}]}).layers[0], stream()
    assert {p.shape for p in (node.in_proj.weight, node.body.items[1].out_proj.weight)} == {(16, DIM), (16, 8)}
    h = x @ node.in_proj.weight.T + node.in_proj.bias
    torch.testing.assert_close(node(x), x + node.out_proj(node.body(h) - h), rtol=0, atol=1e-12)
    with torch.no_grad():
        node.out_proj.weight.zero_()
    assert torch.equal(node(x), x + node.out_proj.bias)


@pytest.mark.parametrize(
    ("stitch", "words"),
    [
        ({"stitch": 16}, "stitch needs the field of"),
        ({"stitch": {"of": LAYER}}, "stitch needs this option"),
        ({"stitch": "wide", "of": LAYER}, "must be an integer"),
        ({"stitch": 0, "of": LAYER}, "must be at least 1"),
        ({"stitch": 16, "of": LAYER, "depth": 1}, "unknown field of stitch"),
        ({"stitch": 15, "of": LAYER}, "attention"),
        ([{"sequence": LAYER, "share": "a"}, {"stitch": 16, "of": [{"share": "a"}]}], "different widths"),
    ],
)
def test_mistakes_of_stitch(stitch, words):
    with pytest.raises(zoo.ConfigError, match=words):
        zoo.build({"dim": DIM, "vocab_size": VOCAB, "trunk": [stitch]})


MODELS = {
    "fixed": [loop(steps=3, step_signal="learned")],
    "act": [loop(steps=3, router={"act": {"copy_halted": True}})],
    "expert_choice": [loop(steps=3, router="expert_choice")],
    "token_choice": [loop(steps=3, router="token_choice")],
    "mor": [loop(steps=3, of=[LAYER, LAYER], tie="sequence", router={"expert_choice": {"inference": "predictor"}})],
    "shared keys": [loop(steps=3, kv="first", step_signal="coordinate")],
    "mor shared keys": [loop(steps=3, of=[LAYER, LAYER], kv="first", router="expert_choice")],
    "token choice shared keys": [loop(steps=3, kv="first", router="token_choice")],
    "skip_layer": [LAYER, {"route": LAYER, "router": "skip_layer"}, {"route": ["swiglu"], "router": "skip_layer"}],
    "mod": [LAYER, {"route": LAYER, "router": "mod"}, LAYER],
    "bodies": [{"route": {"bodies": [LAYER, "skip", ["swiglu"]], "router": "token_choice"}}],
    "nested": [loop(steps=2, router="token_choice", of=[{"route": LAYER}, loop(steps=2, router="expert_choice")])],
    "inject": [loop(steps=3, inject="concat", router="act")],
    "exit": [loop(steps=4, inject="concat", start="noise", final_norm="rms", router={"exit": {"threshold": 0.6}})],
    "ring": [loop(steps=3, inject="add", ring=2), {"swiglu": {}, "residual": "pre_post"}],
    "ring exit": [loop(steps=3, inject="add", ring=1, router={"exit": {"metric": "kl", "threshold": 0.01}})],
    "feedback": [{"feedback": LAYER, "residual": "post", "inner": 2, "outer": 1, "segments": 2}],
    "feedback halt": [{"feedback": LAYER, "inner": 1, "outer": 1, "segments": 3, "halt": True}],
    "share": [{"sequence": LAYER, "share": "s"}, "swiglu", {"share": "s"}],
    "parallel": [{"parallel": [{"attention": {"num_heads": 4}}, "swiglu"], "merge": "concat", "norm": "layer"}],
    "revisit": [revisit(copies=2, rank=4, attention_rank=3)],
    "stitch": [LAYER, {"stitch": 16, "of": [LAYER, "gla"]}, {"parallel": [{"stitch": 48, "of": LAYER}, "swiglu"]}],
    "stitch_routed": [
        {"route": [{"stitch": 16, "of": LAYER}], "router": "mod"},
        loop(steps=2, of=[{"stitch": 16, "of": "gla"}]),
    ],
    "value_residual": [{"value_residual": [["rwkv7", "swiglu"], {"repeat": 2, "of": [{"rwkv7": {"num_heads": 2}}]}]}],
    "value_residual_routed": ["swiglu", {"route": [{"value_residual": ["rwkv7", LAYER, "rwkv7"]}], "router": "mod"}],
    "revisit_bare": [{**revisit(at=-1, of=["gla", "swiglu"]), "norm": "none"}, loop(steps=2, of=revisit(at=0))],
}


@pytest.mark.parametrize("name", MODELS)
def test_segment_invariance_of_whole_models(name):
    model, x = build(*MODELS[name]), tokens()
    full = model(x)
    for cuts in ([1] * T, [5, 1, 9, 8], [22, 1]):
        for max_len in (None, T):
            state, parts, start = model.init_state(2, max_len), [], 0
            for length in cuts:
                parts.append(model(x[:, start : start + length], state=state))
                start += length
            torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_state_may_be_reordered_taken_and_reset(name):
    model, x = build(*MODELS[name]), tokens(rows=3)
    state = model.init_state(3, T)
    model(x[:, :10], state=state)
    snapshot = state.snapshot()
    order = torch.tensor([2, 0, 0])
    state.reorder(order)
    torch.testing.assert_close(model(x[order, 10:], state=state), model(x)[order, 10:], rtol=0, atol=1e-8)
    state.restore(snapshot)
    torch.testing.assert_close(model(x[:, 10:], state=state), model(x)[:, 10:], rtol=0, atol=1e-8)
    state.reset()
    torch.testing.assert_close(model(x, state=state), model(x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_and_causality_of_whole_models(name):
    model, x = build(*MODELS[name]), tokens()
    doc_ids = torch.tensor([0] * 7 + [1] + [2] * (T - 8)).expand(2, T)
    packed = model(x, doc_ids=doc_ids)
    alone = torch.cat([model(x[:, :7]), model(x[:, 7:8]), model(x[:, 8:])], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-8)
    other = x.clone()
    other[:, 15:] = (other[:, 15:] + 1) % VOCAB
    torch.testing.assert_close(model(other)[:, :15], model(x)[:, :15], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_predicted_parameters_flops_and_state_are_the_counted_ones(name):
    from torch.utils.flop_counter import FlopCounterMode

    model = build(*MODELS[name]).float()
    report = zoo.estimate(model, batch_size=2, seq_len=T, mode="prefill")
    assert report.params == sum(p.numel() for p in model.parameters())
    assert report.state_bytes == model.init_state(2, T).nbytes
    # routed work depends on the tokens, that of experts does not
    if all(line.endswith("choose experts evenly") for line in report.assumptions):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens())
        assert report.flops == counter.get_total_flops()
