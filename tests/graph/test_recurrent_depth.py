"""Loops as Huginn, looped transformers and AlgoFormer use them, against models unrolled by hand."""

import math

import pytest
import torch
from test_combinators import LAYER, T, build, copy_weights, loop, stream, tokens
from torch.nn import functional as F

import zoo

TOKENWISE = ["swiglu"]  # a body in which no token reads another


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_huginn_is_the_published_size():
    """3,564,976,800 parameters in the released model, which ties the norm after the loop to the final one."""
    assert zoo.estimate("huginn_3.5b", batch_size=1, seq_len=1).params == 3_564_976_800 + 5_280


@pytest.mark.parametrize("interleaved", [False, True])
def test_huginn_is_its_equations(interleaved):
    """A shrunken one, token embeddings to logits: x <- n2(x + f(n1 x)) in every layer, s <- core(A [s; e]) from s_0."""
    small = [
        "dim=32", "vocab_size=50", "define.layer[0].attention.num_heads=4", "define.layer[1].swiglu.hidden_dim=48",
        "trunk[1].loop.steps=3", "trunk[1].loop.ring=null", "trunk[1].loop.router=fixed",
        f"define.layer[0].attention.rope_interleaved={interleaved}",
    ]  # fmt: skip
    model = zoo.build("huginn_3.5b", small).double()
    w = model.state_dict()
    for name, value in w.items():
        if value.ndim == 1 and "start" not in name:  # biases and norms speak too
            value.add_(torch.linspace(-0.4, 0.5, len(value)))

    def rms(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def heads(h, name, bias=True):
        y = h @ w[f"{name}.weight"].T
        return (y + w[f"{name}.bias"] if bias else y).unflatten(-1, (4, 8))

    def turned(y):
        angle = torch.arange(T)[:, None] * 50000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
        a, b = (y[..., 0::2], y[..., 1::2]) if interleaved else y.chunk(2, -1)
        z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.stack([z.real, z.imag], -1).flatten(-2) if interleaved else torch.cat([z.real, z.imag], -1)

    def layer(x, at):
        a, f = f"{at}.items.0", f"{at}.items.1"
        h = rms(x, f"{a}.norm")
        q, k = (turned(heads(h, f"{a}.block.{n}_proj")) for n in "qk")
        score = torch.einsum("bthd,bshd->bhts", q, k) / 8**0.5
        score = score.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        o = torch.einsum("bhts,bshd->bthd", score.softmax(-1), heads(h, f"{a}.block.v_proj", bias=False))
        x = rms(x + o.flatten(2) @ w[f"{a}.block.o_proj.weight"].T, f"{a}.out_norm")
        h, m = rms(x, f"{f}.norm"), f"{f}.block"
        h = F.silu(h @ w[f"{m}.gate_proj.weight"].T) * (h @ w[f"{m}.up_proj.weight"].T)
        return rms(x + h @ w[f"{m}.down_proj.weight"].T, f"{f}.out_norm")

    embedded = 5280**0.5 * w["tok_embeddings.weight"][tokens()]
    e = layer(layer(embedded, "layers.0"), "layers.1")
    s = w["layers.2.start"].expand_as(e)
    for _ in range(3):
        s = torch.cat([s, e], -1) @ w["layers.2.inject_proj.weight"].T
        for i in range(4):
            s = layer(s, f"layers.2.body.items.{i}")
    s = layer(layer(rms(s, "layers.2.final_norm"), "layers.3"), "layers.4")
    close(model(tokens()), rms(s, "norm") @ w["tok_embeddings.weight"].T, 1e-9)


def test_concat_reads_state_and_input():
    node = build(loop(steps=3, inject="concat", final_norm="rms")).layers[0]
    e, s = stream(), torch.zeros_like(stream())
    for _ in range(3):
        s = node.body(torch.cat([s, e], -1) @ node.inject_proj.weight.T)
    close(node(e), node.final_norm(s))


def test_noise_is_drawn_per_token_in_training_and_one_vector_in_eval():
    node = build(loop(steps=2, inject="add", start="noise")).layers[0]
    e = stream()
    close(node(e), node.body(node.body(node.start + e) + e))
    assert torch.equal(node(e), node(e))
    node.train()
    assert not torch.equal(node(e), node(e))
    drawn = node._first(torch.zeros(64, 200, 32))
    assert abs(drawn.std().item() - math.sqrt(0.4)) < 0.02 and drawn.abs().max() <= 3 * math.sqrt(0.4)
    assert drawn[:, 0].std() > 0.5


def test_two_loops_of_one_body_are_one_longer_loop():
    one = build(loop(steps=5)).layers[0]
    two = build({"loop": 2, "of": {"sequence": LAYER, "share": "f"}}, {"loop": 3, "of": {"share": "f"}})
    copy_weights(two.layers[0].body.items[0], one.body)
    close(two.layers[1](two.layers[0](stream())), one(stream()))


def test_algoformer_with_one_step_is_a_plain_stack_and_takes_more_steps_later():
    plain = build(LAYER, LAYER, LAYER)
    stacked = build(LAYER, loop(steps=1), LAYER)
    names = {n: n.replace("layers.1.body.", "layers.1.") for n in stacked.state_dict()}
    stacked.load_state_dict({n: plain.state_dict()[old] for n, old in names.items()})
    close(stacked(tokens()), plain(tokens()))
    longer = build(LAYER, loop(steps=4), LAYER)
    longer.load_state_dict(stacked.state_dict())
    x = longer.layers[0](longer.tok_embeddings(tokens()))
    for _ in range(4):
        x = stacked.layers[1].body(x)
    close(longer(tokens()), longer.lm_head(longer.norm(longer.layers[2](x))))


def test_number_of_steps_is_a_log_normal_poisson():
    node = build(loop(steps=32, sample_sigma=0.5, of=TOKENWISE)).layers[0].train()
    torch.manual_seed(0)
    drawn = torch.tensor([node._draw_steps() for _ in range(4000)], dtype=torch.float64)
    # E = 1 + mean; Var = mean + mean^2 (exp(sigma^2) - 1)
    assert abs(drawn.mean() - 33) < 1
    assert abs(drawn.std() - math.sqrt(32 + 32**2 * (math.exp(0.25) - 1))) < 1.5
    torch.manual_seed(0)
    assert [node._draw_steps() for _ in range(5)] == drawn[:5].int().tolist()


@pytest.mark.parametrize("drawn", [1, 2, 5])
def test_gradient_goes_through_the_last_drawn_steps_only(drawn, monkeypatch):
    node = build(loop(steps=3, sample_sigma=0.5, grad_last=2, inject="add")).layers[0].train()
    monkeypatch.setattr(node, "_draw_steps", lambda: drawn)
    e = stream().requires_grad_()
    (got,) = torch.autograd.grad(node(e).square().sum(), e)
    s = torch.zeros_like(e)
    for step in range(drawn):
        s = node.body(s + e)
        if step < drawn - 2:
            s = s.detach()
    (expected,) = torch.autograd.grad(s.square().sum(), e)
    close(got, expected, 1e-8)


def test_eval_takes_the_configured_steps():
    sampled, fixed = build(loop(steps=3, sample_sigma=0.5)).layers[0], build(loop(steps=3)).layers[0]
    assert torch.equal(sampled(stream()), fixed(stream()))


def test_losses_on_the_last_steps_of_a_looped_transformer():
    """Y_0 = 0, Y_t+1 = f(Y_t + P); the loss is the mean over the last three of five outputs, gradients start there."""
    model = build(loop(steps=5, inject="add", grad_last=3)).train()
    node, inputs, losses = model.layers[0], tokens(), []

    def loss_of(y):
        return F.cross_entropy(model.lm_head(model.norm(y))[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())

    node.on_step = lambda number, y: losses.append((number, loss_of(y)))
    model(inputs)
    assert [number for number, _ in losses] == [2, 3, 4]
    ours = torch.autograd.grad(sum(loss for _, loss in losses) / 3, list(model.parameters()))
    p = model.tok_embeddings(inputs)
    y, expected = torch.zeros_like(p), 0
    for t in range(5):
        y = node.body(y + p)
        if t < 2:
            y = y.detach()
        else:
            expected = expected + loss_of(y) / 3
    for a, b in zip(ours, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        close(a, b, 1e-8)
    losses.clear()
    model.eval()(inputs)
    model.train()(inputs, state=model.init_state(2, T))
    assert not losses


def test_more_loops_than_trained_stay_finite():
    model = zoo.build("algoformer_small", ["dim=32", "trunk[1].loop=16"])  # twice as many
    assert model(tokens()).isfinite().all()


# --------------------------------------------------------------------------------- universal transformer
def test_coordinates_are_the_sinusoids_of_position_and_step():
    node = build(loop(steps=3, step_signal="coordinate")).layers[0]

    def sinusoid(place):
        rates = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
        return torch.stack([(place * rates).sin(), (place * rates).cos()], -1).flatten()

    x = y = stream()
    for step in range(1, 4):
        y = node.body(y + torch.stack([sinusoid(t) + sinusoid(step) for t in range(T)]))
    close(node(x), y, 1e-5)  # sinusoids are float32


@pytest.mark.parametrize("copy", [True, False])
def test_act_by_hand(copy):
    """Graves' weights; a halted state is copied forward, or goes on with weight zero."""
    node = build(loop(steps=5, router={"act": {"copy_halted": copy, "bias_start": -0.5, "eps": 0.05}})).layers[0]
    x, halt = stream(), node.router.halt
    state, output = x, torch.zeros_like(x)
    h, n = torch.zeros(2, T, dtype=torch.float64), torch.zeros(2, T)
    for step in range(5):
        p = torch.sigmoid(state @ halt.weight[0] + halt.bias)
        new = node.body(state)
        running = h < 1
        last = running & ((h + p >= 0.95) | torch.tensor(step == 4))
        u = torch.where(last, 1 - h, torch.where(running, p, 0))
        h = torch.where(last, 1, h + u)
        output, n = output + u[..., None] * new, n + running
        state = torch.where(running[..., None], new, state) if copy else new
    assert len(n.unique()) > 1
    close(node(x), output)


# ------------------------------------------------------------------------------------------- early exit
def test_exit_of_a_tokenwise_body_stops_each_token_by_itself():
    node = build(loop(steps=12, inject="add", of=TOKENWISE, router={"exit": {"threshold": 0.2}})).layers[0]
    with torch.no_grad():
        for p in node.parameters():
            p.mul_(0.5)
    e = stream()
    y, left = torch.empty_like(e), []
    for b in range(e.shape[0]):
        for t in range(T):
            s, one = torch.zeros(1, 1, e.shape[-1], dtype=e.dtype), e[b, t][None, None]
            for step in range(12):
                new = node.body(s + one)
                small = step > 0 and (new - s).norm() < 0.2 * new.norm()
                s = new
                if small:
                    break
            left.append(step)
            y[b, t] = s
    assert len(set(left)) > 1, "a threshold at which tokens differ"
    close(node(e), y)


def test_exit_by_kl_reads_the_models_head():
    model = build(loop(steps=8, inject="add", of=TOKENWISE, router={"exit": {"metric": "kl"}}))
    node = model.layers[0]
    with torch.no_grad():
        for p in node.parameters():
            p.mul_(0.5)
    x = model.tok_embeddings(tokens())
    s, running, counts = torch.zeros_like(x), torch.ones(x.shape[:2], dtype=torch.bool), []
    for step in range(8):
        counts.append(int(running.sum()))
        new = torch.where(running[..., None], node.body(s + x), s)
        if step:
            p, q = (model.lm_head(model.norm(h)).log_softmax(-1) for h in (new, s))
            change = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
            if step == 1:
                node.router.threshold = change.median().item() * 1.001  # half of the tokens leave at once
            running = running & (change >= node.router.threshold)
        s = new
    assert len(set(counts)) > 2
    close(node(x), s)


@pytest.mark.parametrize("ring", [None, 1])
def test_exit_thresholds_at_the_ends(ring):
    always, never = (build(loop(steps=5, ring=ring, router={"exit": {"threshold": t}})).layers[0] for t in (1e9, 1e-30))
    two = build(loop(steps=2, ring=ring)).layers[0]
    close(always(stream()), two(stream()))
    close(never(stream()), build(loop(steps=5, ring=ring)).layers[0](stream()))
    always.train()
    close(always(stream()), build(loop(steps=5)).layers[0](stream()))


# ------------------------------------------------------------------------------------------------- ring
ATTENTION = [{"attention": {"num_heads": 1, "rope": False}}]


@pytest.mark.parametrize("exit", [None, 0.5])
@pytest.mark.parametrize("ring", [1, 2])
def test_ring_against_keys_kept_by_hand(ring, exit):
    """Token by token; at step i a token reads the newest keys that earlier ones left at steps of i's class."""
    router = {"exit": {"threshold": exit}} if exit else "fixed"
    node = build(loop(steps=5, inject="add", of=ATTENTION, ring=ring, router=router)).layers[0]
    block = node.body.items[0]
    wq, wk, wv, wo = (getattr(block.block, f"{n}_proj").weight for n in "qkvo")
    e, y, counts = stream(), torch.empty_like(stream()), set()
    for b in range(e.shape[0]):
        slots = [[] for _ in range(ring)]
        for t in range(T):
            s = torch.zeros_like(e[b, t])
            own = [None] * ring
            for step in range(5):
                x = s + e[b, t]
                h = block.norm(x)
                own[step % ring] = (wk @ h, wv @ h)
                keys, values = (torch.stack(z) for z in zip(*slots[step % ring], own[step % ring], strict=True))
                new = x + wo @ (((keys @ (wq @ h)) / 32**0.5).softmax(0) @ values)
                small = exit and step > 0 and (new - s).norm() < exit * new.norm()
                s = new
                if small:
                    break
            counts.add(step)
            for slot, mine in zip(slots, own, strict=True):
                slot.append(mine)
            y[b, t] = s
    assert len(counts) > 1 or not exit
    close(node(e), y)


def test_a_ring_of_all_steps_is_no_ring_and_training_knows_none():
    plain = build(loop(steps=3)).layers[0]
    whole, short = (build(loop(steps=3, ring=m)).layers[0] for m in (3, 1))
    assert torch.equal(whole(stream()), plain(stream()))
    assert torch.equal(short.train()(stream()), plain(stream()))
    assert not torch.allclose(short.eval()(stream()), plain(stream()))


def test_ring_state_holds_its_own_steps_only():
    sizes = [build(loop(steps=6, ring=m)).init_state(2, T).nbytes - 16 for m in (1, 2, 6)]
    assert [s - 16 for s in sizes] == [k * (sizes[0] - 16) for k in (1, 2, 6)]


def test_a_growing_ring_state_when_some_rows_leave_early(monkeypatch):
    monkeypatch.setattr("zoo.blocks.kv_cache.FIRST_CAPACITY", 3)
    model = build(loop(steps=4, ring=1, inject="add", router={"exit": {"threshold": 0.5}}))
    x = tokens(rows=3, length=9)
    state = model.init_state(3)
    close(torch.cat([model(x[:, :2], state=state), model(x[:, 2:], state=state)], 1), model(x), 1e-9)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"start": "noise"}, "a loop without inject"),
        ({"sample_sigma": 0.5, "router": "act"}, "act plans a fixed number of steps"),
        ({"sample_sigma": 0.5, "step_signal": "learned"}, "more steps than learned signals"),
        ({"sample_sigma": -1.0}, "must be greater than 0"),
        ({"final_norm": "rsm"}, "did you mean rms"),
        ({"rnig": 2}, "did you mean ring"),
        ({"inject": "add", "router": "token_choice"}, "inject needs every token"),
        ({"router": {"exit": {"metric": "kll"}}}, "did you mean kl"),
    ],
)
def test_mistakes(fields, words):
    with pytest.raises(zoo.ConfigError, match=words):
        build(loop(steps=2, **fields))
