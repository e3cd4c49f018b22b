"""The combinator feedback against the Tiny Recursive Model written out."""

import pytest
import torch
from test_combinators import LAYER, T, build, stream, tokens
from torch.nn import functional as F

import zoo


def node_of(of=LAYER, **fields):
    return build({"feedback": of, "residual": "post", **fields}).layers[0]


def cycle(node, x, y, z):
    for _ in range(node.inner):
        z = node.body(x + y + z)
    return node.body(y + z), z


def start(node, x):
    return node.y_start.expand_as(x), node.z_start.expand_as(x)


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_the_paper_sizes_have_its_parameters():
    sizes = ["dim=512", "define.layer[0].attention.num_heads=8", "define.layer[1].swiglu.hidden_dim=1536"]
    model = zoo.build("trm_small", sizes, device="meta")
    assert sum(p.numel() for n, p in model.layers.named_parameters() if "block" in n) == 6_815_744


def test_one_cycle_is_n_plus_one_calls_with_their_gradient():
    node = node_of(inner=3, outer=1)
    x = stream().requires_grad_()
    expected, _ = cycle(node, x, *start(node, x))
    close(node(x), expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), [x, *node.body.parameters()]) for y in (node(x), expected))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-8)


@pytest.mark.parametrize("segments", [1, 3])
def test_gradient_goes_through_the_last_cycle_only(segments):
    node = node_of(inner=2, outer=2, segments=segments).train()
    x = stream().requires_grad_()
    y, z = start(node, x)
    for _ in range(2 * segments):
        y, z = cycle(node, x, y.detach(), z.detach())
    (ours,), (theirs,) = (torch.autograd.grad(out.square().sum(), x) for out in (node(x), y))
    close(node(x), y)
    close(ours, theirs, 1e-8)


def test_deep_supervision_trains_every_segment_and_the_halting_head():
    model = build({"feedback": LAYER, "residual": "post", "inner": 1, "outer": 2, "segments": 3, "halt": True}).train()
    node, inputs = model.layers[0], tokens()

    def loss_of(y, q):
        logits = model.lm_head(model.norm(y))[:, :-1]
        right = (logits.argmax(-1) == inputs[:, 1:]).double()
        answer = F.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten())
        return answer + 0.5 * F.binary_cross_entropy_with_logits(q[:, :-1], right)

    losses = []
    node.on_segment = lambda number, y, q: losses.append(loss_of(y, q))
    model(inputs)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(sum(losses), parameters)

    x = model.tok_embeddings(inputs)
    y, z = start(node, x)
    expected = []
    for _ in range(3):
        with torch.no_grad():
            y, z = cycle(node, x, y, z)
        y, z = cycle(node, x, y, z)
        expected.append(loss_of(y, node.halt(y).squeeze(-1)))
        y, z = y.detach(), z.detach()
    for a, b in zip(ours, torch.autograd.grad(sum(expected), parameters), strict=True):
        close(a, b, 1e-8)
    assert len(losses) == 3 and ours[-1].abs().sum() > 0


def test_halted_tokens_keep_their_answer():
    node = node_of(of=["swiglu"], inner=2, outer=1, segments=4, halt=True)
    with torch.no_grad():
        node.halt.bias.zero_()
        node.halt.weight.normal_(generator=torch.Generator().manual_seed(0))
    x = stream()
    expected, lengths = torch.empty_like(x), set()
    for b in range(x.shape[0]):
        for t in range(T):
            one = x[b, t][None, None]
            y, z = start(node, one)
            for segment in range(4):
                y, z = cycle(node, one, y, z)
                if node.halt(y).item() > 0:
                    lengths.add(segment)
                    break
            expected[b, t] = y
    assert len(lengths) > 1
    close(node(x), expected)
    node.train()
    y, z = start(node, x)
    for _ in range(4):
        y, z = cycle(node, x, y, z)
    close(node(x), y)


def test_segments_and_documents_when_tokens_halt():
    model, x = (
        build({"feedback": LAYER, "residual": "post", "inner": 1, "outer": 1, "segments": 3, "halt": True}),
        tokens(),
    )
    with torch.no_grad():
        model.layers[0].halt.bias.zero_()
        model.layers[0].halt.weight.normal_(generator=torch.Generator().manual_seed(0))
    state = model.init_state(2, T)
    close(torch.cat([model(x[:, a:b], state=state) for a, b in ((0, 1), (1, 9), (9, T))], 1), model(x), 1e-8)
    packed = model(x, doc_ids=torch.tensor([0] * 7 + [1] * (T - 7)).expand(2, T))
    close(packed, torch.cat([model(x[:, :7]), model(x[:, 7:])], 1), 1e-8)


def test_fresh_heads_never_halt_and_starts_are_kept():
    config = {"dim": 32, "vocab_size": 50, "trunk": [{"feedback": {"of": "swiglu", "halt": True, "segments": 2}}]}
    one, other = (zoo.build(config, seed=s) for s in (0, 1))
    node = one.layers[0]
    assert torch.equal(node.halt(torch.randn(5, 32)), torch.full((5, 1), -5.0))
    assert not torch.equal(node.y_start, node.z_start)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(tokens()), one(tokens()))


def test_predicted_training_cost_knows_which_calls_have_gradients():
    def flops(**fields):
        return zoo.estimate(build({"feedback": ["swiglu"], **fields}), batch_size=1, seq_len=8).flops

    one = flops(inner=1, outer=1)  # two calls, three passes each
    head = 3 * 2 * 8 * 32 * 50
    assert flops(inner=1, outer=2) - head == (one - head) * 4 / 3
    assert flops(inner=1, outer=1, segments=3) - head == (one - head) * 5 / 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"inner": 0}, "must be at least 1"),
        ({"iner": 2}, "unknown field of feedback; did you mean inner"),
        ({"halt": 3}, "must be true or false"),
        ({"of": ["swiglo"]}, "did you mean swiglu"),
    ],
)
def test_mistakes(fields, words):
    with pytest.raises(zoo.ConfigError, match=words):
        build({"feedback": {"of": "swiglu", **fields}})
    with pytest.raises(zoo.ConfigError, match="feedback needs the field of"):
        build({"feedback": {"inner": 2}})
