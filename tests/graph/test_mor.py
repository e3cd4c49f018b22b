"""Mixture-of-Recursions against its equations written out token by token: sharing of weights and of keys, routers."""

import math

import pytest
import torch
from test_combinators import DIM, LAYER, T, build, copy_weights, loop, stream, tokens
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import zoo

HEADS = 4


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------ sharing of weights
@pytest.mark.parametrize(
    ("tie", "rule"),
    [
        ("cycle", lambda layer: layer % 2),
        ("sequence", lambda layer: layer // 3),
        ("middle_cycle", lambda layer: {0: 0, 7: 3}.get(layer, 1 + (layer - 1) % 2)),
        ("middle_sequence", lambda layer: {0: 0, 7: 3}.get(layer, 1 + (layer - 1) // 3)),
    ],
)
def test_sharing_schemes(tie, rule):
    """Eight copies (six without ends) of two weight sets, three recursions."""
    ends = tie.startswith("middle_")
    copies, unique = (8, 4) if ends else (6, 2)
    node = build({"repeat": copies, "of": LAYER, "tie": tie, "unique": unique}).layers[0]
    assert len({p.data_ptr() for p in node.parameters()}) == unique * len(list(node.items[0].parameters()))
    x = y = stream()
    for layer in range(copies):
        y = node.items[rule(layer)](y)
    close(node(x), y)
    # the same as a loop, which a router can leave; the ends are layers of their own
    scheme = tie.removeprefix("middle_")
    trunk = [LAYER, loop(steps=3, of=[LAYER, LAYER], tie=scheme), LAYER]
    looped = build(*trunk) if ends else build(trunk[1])
    middle = looped.layers[1 if ends else 0]
    for i in range(2):
        copy_weights(middle.body.items[i], node.items[i + ends])
    if ends:
        copy_weights(looped.layers[0], node.items[0])
        copy_weights(looped.layers[2], node.items[3])
    for layer in looped.layers:
        x = layer(x)
    close(x, y)


def test_a_loop_tied_in_sequence_has_each_parameter_once():
    model = build(loop(steps=3, of=[LAYER, LAYER], tie="sequence"))
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if "q_proj" in n]
    assert names == [f"layers.0.body.items.{i}.items.0.block.q_proj.weight" for i in range(2)]
    report = zoo.estimate(model, batch_size=1, seq_len=8)
    assert report.params == sum(p.numel() for p in model.parameters())


def test_the_published_sizes():
    """118 million parameters outside the embedding in three recursions, 167 in two, 315 in the plain model (paper)."""
    for layers, millions in ((10, 118), (15, 167), (30, 315)):
        report = zoo.estimate("mor_360m", [f"trunk[1].loop.of.repeat={layers}"], batch_size=1, seq_len=1)
        assert round((report.params - 960 * 49152) / 1e6) == millions


# --------------------------------------------------------------------------------- the recursion itself
def scores(router, x, step):
    return router.scale * torch.sigmoid(x @ router.score.weight[step])


def naive_mor(node, x, capacities, keys_of_first=False, threshold=False, border=0):
    """Row by row, step by step: the best of those still running, in order, through the body by themselves. A document
    ends before token `border`."""
    rows = []
    for h in x:
        running, first = list(range(len(h))), None
        for step, capacity in enumerate(capacities):
            z = h @ node.router.score.weight[step]
            if threshold and capacity < 1:
                chosen = [t for t in running if z[t] > 0]
            else:
                best = sorted(running, key=lambda t: -z[t].item())
                chosen = sorted(best[: max(1, int(capacity * len(h)))])
            if chosen:
                where = torch.tensor(chosen)
                out, written = naive_body(node.body, h[where], where, first, border)
                first = written if keys_of_first and first is None else first
                weight = scores(node.router, h[where], step)[:, None]
                h = h.index_put((where,), h[where] + weight * (out - h[where]))
            running = chosen
        rows.append(h)
    return torch.stack(rows)


def naive_body(body, h, where, written, border):
    """Layers of attention and SwiGLU over the tokens `where` of a row; with `written`, over those keys."""
    kept, positions = [], torch.where(where < border, where, where - border)
    for i, (attention, ffn) in enumerate(layer.items for layer in body.items):
        block, n = attention.block, attention.norm(h)
        q = rotated((n @ block.q_proj.weight.T).unflatten(-1, (HEADS, -1)), positions)
        if written is None:
            k = rotated((n @ block.k_proj.weight.T).unflatten(-1, (HEADS, -1)), positions)
            kept.append((k, (n @ block.v_proj.weight.T).unflatten(-1, (HEADS, -1)), where))
        k, v, at = (written or kept)[i]
        s = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
        unseen = (at > where[:, None]) | ((at < border) != (where[:, None] < border))
        s = s.masked_fill(unseen, -torch.inf)
        h = h + torch.einsum("hts,shd->thd", s.softmax(-1), v).flatten(1) @ block.o_proj.weight.T
        n, f = ffn.norm(h), ffn.block
        gate, up = n @ f.gate_proj.weight.T, n @ f.up_proj.weight.T
        h = h + (F.silu(gate) * up) @ f.down_proj.weight.T
    return h, kept


def rotated(y, positions):
    half = y.shape[-1] // 2
    angle = positions[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(*y.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


CAPACITIES = [1.0, 0.6, 0.3]


def mor(**fields):
    router = {"expert_choice": {"capacity": CAPACITIES, "scale": 0.7, "aux_coef": 0.0}}
    return build(loop(steps=3, router=router, of=[LAYER, LAYER], **fields)).layers[0]


@pytest.mark.parametrize("border", [0, 8])
@pytest.mark.parametrize("kv", ["own", "first"])
def test_expert_choice_in_training_and_its_gradient(kv, border):
    node, x = mor(kv=kv).train(), stream().requires_grad_()
    doc_ids = torch.tensor([5] * border + [2] * (T - border)).expand(2, T) if border else None
    ours = node(x, doc_ids=doc_ids)
    naive = naive_mor(node, x, CAPACITIES, keys_of_first=kv == "first", border=border)
    close(ours, naive)
    leaves = [x, *node.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (ours, naive)), strict=True):
        close(a, b, 1e-8)


@pytest.mark.parametrize("kv", ["own", "first"])
def test_threshold_inference(kv):
    node, x = mor(kv=kv), stream(rows=3)
    naive = naive_mor(node, x, CAPACITIES, keys_of_first=kv == "first", threshold=True)
    close(node(x), naive)
    state = node.init_state(3, T)
    with torch.no_grad():
        parts = [node(part, state=state) for part in x.split([9, 1, 1, 12], 1)]
    close(torch.cat(parts, 1), naive, 1e-9)


def test_positions_and_documents_travel_with_shared_keys():
    node, x = mor(kv="first"), stream()
    close(node(x, positions=torch.arange(T).expand(2, T) + 5), node(x), 1e-9)  # rotary angles are relative
    docs = torch.tensor([3] * 8 + [1] * (T - 8)).expand(2, T)
    close(node(x, doc_ids=docs), torch.cat([node(x[:, :8]), node(x[:, 8:])], 1), 1e-10)


@pytest.mark.parametrize(
    "attention",
    [{"window": 6, "sinks": 2}, {"num_kv_heads": 1, "qk_norm": "head", "output_gate": True}, {"qk_norm": "full"}],
)
def test_shared_keys_of_other_attention(attention):
    """A second step that changes nothing but the queries' input: keys and values stay those of the first."""
    layer = [{"attention": {"num_heads": 4, **attention}}]
    node = build(loop(steps=2, of=layer, kv="first")).layers[0]
    x, block = stream(), node.body.items[0]
    first = block(x)
    # the same block with the keys frozen: its key and value maps read x's norm instead of the stream's
    reading = build(loop(steps=1, of=layer)).layers[0].body.items[0]
    copy_weights(reading, block)
    attend = reading.block.forward
    n = block.norm(x)
    reading.block.k_proj.forward = lambda _: F.linear(n, reading.block.k_proj.weight)
    reading.block.v_proj.forward = lambda _: F.linear(n, reading.block.v_proj.weight)
    assert attend is not None
    close(node(x), reading(first))
    state = node.init_state(2, T)
    with torch.no_grad():
        close(torch.cat([node(part, state=state) for part in x.split([7, 1, 15], 1)], 1), node(x), 1e-9)


def test_shared_keys_are_kept_once():
    one, own, first = (build(loop(steps=s, kv=kv)).layers[0] for s, kv in ((1, "own"), (3, "own"), (3, "first")))
    sizes = [node.init_state(2, T).nbytes - 16 for node in (one, own, first)]
    assert sizes == [sizes[0], 3 * sizes[0], sizes[0]]


def test_predicted_decoding_makes_no_keys_after_the_first_step():
    model, x = build(loop(steps=3, kv="first")).float(), tokens()
    state = model.init_state(2, T)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:, :-1], state=state)
        before = counter.get_total_flops()
        model(x[:, -1:], state=state)
    report = zoo.estimate(model, batch_size=2, seq_len=1, context_len=T - 1, mode="decode")
    assert report.flops == counter.get_total_flops() - before
    own = zoo.estimate(build(loop(steps=3)), batch_size=2, seq_len=1, context_len=T - 1, mode="decode")
    assert own.flops - report.flops == 2 * 2 * 2 * 2 * DIM * DIM  # two rows, two steps, keys and values


def test_recursion_wise_caches_hold_the_tokens_of_their_step():
    node, x = mor(), stream()
    state, chosen = node.init_state(2, T), []
    pick = node.router.pick

    def spy(*given):
        taken = pick(*given)
        chosen.append(torch.full((2,), T) if taken.mask is None else taken.mask.sum(1))
        return taken

    node.router.pick = spy
    node(x, state=state)
    lengths = [child.children[0].children[0].length for child in state.children]
    assert all(torch.equal(a, b) for a, b in zip(lengths, chosen, strict=True))
    assert lengths[2].sum() < lengths[0].sum()


def test_tokens_that_left_do_not_matter_to_deeper_steps():
    node, x = mor().train(), stream()
    carry = node.router.start(x)
    node.router.pick(0, x, carry, False)
    node.router.pick(1, x, carry, False)
    inside = carry["active"]
    steps = [node.body(x)]
    for h in (x, torch.where(inside[..., None], x, torch.randn_like(x))):
        index = inside[0].nonzero().T
        steps.append(node.body(h[:1].gather(1, index.unsqueeze(-1).expand(1, -1, DIM)), positions=index))
    close(steps[1], steps[2])


# ------------------------------------------------------------------------------------------------ routers
def test_capacity_one_is_the_looped_transformer():
    """x + w (f(x) - x) with w = 1; the released combination x + w f(x) is another function."""
    router = {"expert_choice": {"capacity": 1.0, "activation": "one"}}
    for kv in ("own", "first"):
        routed, plain = build(loop(steps=3, router=router, kv=kv)).layers[0], build(loop(steps=3, kv=kv)).layers[0]
        copy_weights(plain.body, routed.body)
        for training in (True, False):
            close(routed.train(training)(stream()), plain.train(training)(stream()))


def test_capacity_falls_from_one_by_a_cosine():
    router = {"expert_choice": {"capacity": [1.0, 0.5, 0.25], "warmup_steps": 10}}
    model = build(loop(steps=3, router=router)).train()
    node, x = model.layers[0], stream()
    taken = []
    for step in range(13):
        carry, counts = node.router.start(x), []
        for r in range(3):
            node.router.pick(r, x, carry, False)
            counts.append(carry["active"].sum(1).unique().item())
        share = (1 + math.cos(math.pi * min(step / 10, 1))) / 2
        assert counts == [int((c + (1 - c) * share) * T) for c in (1.0, 0.5, 0.25)]
        taken.append(counts[2])
        node.router.after_step()
    assert taken[0] == T and taken[10] == T // 4
    again = build(loop(steps=3, router=router))
    again.load_state_dict(model.state_dict())
    assert again.layers[0].router.capacity_now(2) == 0.25 and int(again.layers[0].router.steps_done) == 13
    fresh = build(loop(steps=3, router=router))
    assert fresh.layers[0].router.capacity_now(2) == 0.25  # eval() knows no warm-up
    assert fresh.train().layers[0].router.capacity_now(2) == 1.0


@pytest.mark.parametrize("inference", ["threshold", "predictor"])
def test_auxiliary_loss_is_a_binary_cross_entropy_against_the_top_k(inference):
    options = {"capacity": 0.4, "inference": inference, "aux_coef": 0.3}
    node = build({"route": LAYER, "router": {"mod": options}}).layers[0].train()
    router, x = node.router, stream().requires_grad_()
    y = node(x)
    r = x @ router.score.weight[0]
    chosen = torch.zeros_like(r).scatter(1, r.topk(int(0.4 * T), dim=1).indices, 1.0)
    if inference == "predictor":
        p = router.predictor
        guess = (
            F.gelu(F.linear(x.detach(), p.up_proj.weight, p.up_proj.bias)) @ p.down_proj.weight[0]
        ) + p.down_proj.bias
    else:
        guess = r
    log = torch.nn.functional.logsigmoid
    bce = -(chosen * log(guess) + (1 - chosen) * log(-guess)).mean()
    body = torch.zeros_like(x)
    for b in range(2):
        where = chosen[b].nonzero().squeeze(1)
        body[b, where] = node.bodies[0](x[b : b + 1, where], positions=where[None])[0] - x[b, where]
    naive = x + r[..., None] * body
    close(y, naive)
    leaves = [x, *router.parameters()]
    ours = torch.autograd.grad(y.square().sum(), leaves)
    expected = torch.autograd.grad(naive.square().sum() + 0.3 * bce, leaves)
    for a, b in zip(ours, expected, strict=True):
        close(a, b, 1e-5)  # the loss is taken in float32


def test_z_loss_is_the_mean_square_of_the_running_tokens_scores():
    grads = []
    for coef in (0.0, 0.4):
        options = {"capacity": [1.0, 0.5], "aux_coef": 0.0, "z_coef": coef}
        node = build(loop(steps=2, router={"expert_choice": options})).layers[0].train()
        weight, seen = node.router.score.weight, []
        pick = node.router.pick
        node.router.pick = lambda r, h, *rest, pick=pick, seen=seen: (seen.append(h), pick(r, h, *rest))[1]
        y = node(stream())
        loss = sum(0.4 * (h @ weight[r]).square().mean() for r, h in enumerate(seen))  # all run in both steps
        grads.append(torch.autograd.grad(y.square().sum() + (loss if not coef else 0), weight)[0])
    close(*grads, 1e-5)  # the loss is taken in float32


def test_mixture_of_depths_decodes_by_its_predictor():
    options = {"capacity": 0.4, "inference": "predictor"}
    node = build({"route": LAYER, "router": {"mod": options}}).layers[0]
    x, router = stream(rows=3), node.router
    chosen = router.predictor(x, 0) > 0
    assert 0 < chosen.sum() < chosen.numel()
    expected = x.clone()
    for b in range(3):
        where = chosen[b].nonzero().squeeze(1)
        out = node.bodies[0](x[b : b + 1, where], positions=where[None])[0]
        expected[b, where] += (x[b, where] @ router.score.weight[0])[:, None] * (out - x[b, where])
    close(node(x), expected)
    state = node.init_state(3, T)
    with torch.no_grad():
        close(torch.cat([node(t, state=state) for t in x.split(1, 1)], 1), expected, 1e-9)
    assert torch.equal(state.children[0].children[0].length, chosen.sum(1))


def test_the_predictor_learns_the_top_k():
    torch.manual_seed(0)
    options = {"capacity": 0.25, "inference": "predictor", "aux_coef": 1.0}
    node = zoo.build({"dim": 32, "vocab_size": 8, "trunk": [{"route": "swiglu", "router": {"mod": options}}]}).layers[0]
    optimiser = torch.optim.Adam(node.router.predictor.parameters(), lr=0.02)
    for _ in range(100):
        node.train()(torch.randn(4, 64, 32)).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    node(torch.randn(8, 64, 32))
    assert node.router.metrics["agreement_0"] > 0.9


def test_token_choice_balanced_by_a_bias():
    node = (
        build(loop(steps=3, router={"token_choice": {"balance": "bias", "bias_update_rate": 0.05}})).layers[0].train()
    )
    router, x = node.router, stream(rows=4)
    plain = router.start(x)
    loads = F.one_hot(plain["choice"], 3).sum((0, 1)).double()
    router.update_bias()
    close(router.selection_bias.double(), 0.05 * torch.sign(loads.mean() - loads))
    p = router.score(x).softmax(-1)
    biased = router.start(x)
    assert torch.equal(biased["choice"], (p + router.selection_bias).argmax(-1))
    close(biased["weight"], p.gather(-1, biased["choice"][..., None])[..., 0])  # the bias selects, it does not weigh
    for _ in range(40):
        router.start(x)
        router.update_bias()
    after = F.one_hot(router.start(x)["choice"], 3).sum((0, 1)).double()
    assert after.max() < loads.max() and "balance" not in biased


# ---------------------------------------------------------------------------------------------- SkipLayer
def skip(**options):
    return {"route": LAYER, "router": {"skip_layer": options}}


def gate(node, bias):
    """Let every token (bias > 0) or none take the body."""
    with torch.no_grad():
        node.router.score.weight.copy_(torch.outer(torch.tensor([-bias, bias]), torch.ones(DIM)))


def test_skip_layer_against_the_equation():
    node = build(skip()).layers[0]
    x, body = stream(), node.bodies[0]
    z = node.router.score(x)
    taken = z[..., 1] > z[..., 0]
    assert 0 < taken.sum() < taken.numel()
    close(node(x), torch.where(taken[..., None], body(x), x))  # skipped tokens are attended to
    state = node.init_state(2, T)
    with torch.no_grad():
        parts = [node(part, state=state) for part in x.split([4, 1, 1, 17], 1)]
    close(torch.cat(parts, 1), node(x), 1e-9)
    assert state.children[0].children[0].length.tolist() == [T, T]


def test_skip_layer_at_its_ends():
    node = build(skip()).layers[0]
    x = stream().abs()
    gate(node, 9.0)
    close(node(x), node.bodies[0](x))
    gate(node, -9.0)
    state = node.init_state(2)
    assert torch.equal(node(x, state=state), x)
    gate(node, 9.0)
    more = stream(5).abs()
    close(node(more, state=state), node.bodies[0](torch.cat([x, more], 1))[:, T:], 1e-9)


def test_skip_layer_learns_by_a_straight_through_gate():
    node, x = build(skip(density=0.3, density_coef=2.0, temperature=0.7)).layers[0].train(), stream()
    torch.manual_seed(3)
    ours = torch.autograd.grad(node(x).square().sum(), node.router.score.weight)[0]
    torch.manual_seed(3)
    z = x @ node.router.score.weight.T
    noise = -torch.empty_like(z).exponential_().log()
    soft = ((z + noise) / 0.7).softmax(-1)[..., 1]
    m = (soft > 0.5).double() + soft - soft.detach()
    y = x + m[..., None] * (node.bodies[0](x) - x)
    loss = y.square().sum() + 2.0 * (m.mean() - 0.3) ** 2
    close(ours, torch.autograd.grad(loss, node.router.score.weight)[0], 1e-8)
    assert 0 < node.router.metrics["share_0"] < 1


# ----------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("node", "words"),
    [
        (loop(steps=2, kv="frist"), "did you mean first"),
        (loop(steps=2, kv="first", ring=1), "ring does not"),
        (loop(steps=2, kv="first", grad_last=1), "grad_last does not"),
        (loop(steps=2, kv="first", tie="sequence"), "use tie: cycle"),
        (loop(steps=2, kv="first", router={"expert_choice": {"capacity": 0.5}}), "first capacity"),
        (loop(steps=2, kv="first", of=["gla"]), "gla has no keys"),
        (loop(steps=2, kv="first", of=[loop(steps=2)]), "a loop keeps states"),
        (loop(steps=2, tie="sequence", ring=1), "ring expects the same"),
        ({"route": [LAYER, LAYER], "router": "skip_layer"}, "no keys for a second mixer"),
        ({"route": ["gla"], "router": "skip_layer"}, "gla has no keys"),
        ({"route": {"bodies": [LAYER, "skip"], "router": "skip_layer"}}, "the body is one plain layer"),
        (loop(steps=2, router="skip_layer"), "one body of a route"),
        (
            {"route": LAYER, "router": {"mod": {"inference": "predictor", "aux_coef": 0.0}}},
            "never trains the predictor",
        ),
    ],
)
def test_mistakes(node, words):
    with pytest.raises(zoo.ConfigError, match=words):
        build(node)


def test_models_with_routers_draw_the_same_weights_twice():
    one, two = (zoo.build({"dim": 32, "vocab_size": 8, "trunk": [skip()]}, seed=4) for _ in range(2))
    assert torch.equal(one(tokens() % 8), two(tokens() % 8))
