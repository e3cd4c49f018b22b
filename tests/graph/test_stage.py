"""A stage: one layer at several depths. Its definition, its limits, the law, its cost, Raptor's published size."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.graph.stage import layers_of

DIM, VOCAB, T = 32, 50, 13
LAYER = [{"attention": {"num_heads": 4}}, {"swiglu": {"hidden_dim": 48}}]
SCALED = {"scale": 0.7, "learn": "channel"}


def build(*trunk, **top):
    """A model in fp64 whose parameters are large enough for every path to speak."""
    model = zoo.build({"dim": DIM, "vocab_size": VOCAB, "trunk": list(trunk), **top}).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) / max(p.shape[-1:] or (1,)) ** 0.5)
    return model


def stream(rows=2):
    return torch.randn(rows, T, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(rows=2):
    return torch.randint(VOCAB, (rows, T), generator=torch.Generator().manual_seed(2))


def stage(**fields):
    return {"stage": {"of": LAYER, **fields}}


def test_definition():
    node, x = build(stage(steps=3, first=4), residual=SCALED).layers[0], stream()
    expected = x
    for depth in (4.0, 5.0, 6.0):
        hidden = F.silu(depth * node.depth_in.weight[:, 0] + node.depth_in.bias)
        t1, t2, t3 = (1 + node.depth_out.weight @ hidden + node.depth_out.bias).split(DIM)
        attention, ffn = node.body.items
        expected = expected + t1 * attention.scale * attention.block(attention.norm(expected))
        expected = expected + t2 * ffn.scale * ffn.block(ffn.norm(expected))
        expected = t3 * expected
    torch.testing.assert_close(node(x), expected, rtol=0, atol=1e-11)
    one_by_one = x
    for apply in layers_of(node):
        one_by_one = apply(one_by_one)
    torch.testing.assert_close(one_by_one, expected, rtol=0, atol=1e-11)


def test_without_the_depth_it_is_a_loop():
    node, looped = (build({name: {"steps": 3, "of": LAYER}}).layers[0] for name in ("stage", "loop"))
    with torch.no_grad():
        node.depth_out.weight.zero_(), node.depth_out.bias.zero_()
    looped.body.load_state_dict(node.body.state_dict())
    torch.testing.assert_close(node(stream()), looped(stream()), rtol=0, atol=1e-11)


def test_it_begins_near_the_unconditioned_layer():
    model = zoo.build({"dim": DIM, "vocab_size": VOCAB, "trunk": [stage(steps=12)]})
    assert 0 < (model.layers[0].scales() - 1).abs().max() < 0.02


def test_stages_of_one_step_are_a_stack():
    """k = L phases: layers of their own, each with scales of its own depth."""
    node, x = build(stage(steps=1, first=5)).layers[0], stream()
    (t1, t2, t3), (attention, ffn) = node.scales()[0], node.body.items
    y = x + t1 * attention.increment(x)
    torch.testing.assert_close(node(x), t3 * (y + t2 * ffn.increment(y)), rtol=0, atol=1e-12)


def test_layers_of_any_trunk():
    trunk = [stage(steps=2), {"repeat": 3, "of": LAYER, "tie": "cycle", "unique": 1}, LAYER, {"loop": 2, "of": LAYER}]
    model = build(*trunk)
    found = [layers_of(layer) for layer in model.layers]
    assert [len(f) for f in found] == [2, 3, 1, 1]
    assert found[1][0] is found[1][2] is model.layers[1].items[0]
    x = y = stream()
    for layer, applies in zip(model.layers, found, strict=True):
        x = layer(x)
        for apply in applies:
            y = apply(y)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-11)


def test_the_law_for_whole_models():
    model, x = build(stage(steps=3), stage(steps=2, first=4)), tokens(3)
    full = model(x)
    for cuts in ([1] * T, [5, 1, 7]):
        state, parts = model.init_state(3, T), []
        for part in x.split(cuts, 1):
            parts.append(model(part, state=state))
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-9)
    order, state = torch.tensor([2, 0, 0]), model.init_state(3, T)
    model(x[:, :6], state=state)
    state.reorder(order)
    torch.testing.assert_close(model(x[order, 6:], state=state), full[order, 6:], rtol=0, atol=1e-9)
    packed = model(x, doc_ids=torch.tensor([0] * 4 + [1] * (T - 4)).expand(3, T))
    torch.testing.assert_close(packed, torch.cat([full[:, :4], model(x[:, 4:])], 1), rtol=0, atol=1e-9)


def test_cost_is_what_is_counted():
    model = build(stage(steps=3), stage(steps=2, first=4)).float()
    for mode in ("prefill", "train"):
        report = zoo.estimate(model, batch_size=2, seq_len=T, mode=mode)
        depth = [n for n in report.nodes if n.block == "stage"]
        node = model.layers[0]
        with FlopCounterMode(display=False) as counter:
            (node.scales().sum().backward if mode == "train" else node.scales)()
        assert depth[0].flops == counter.get_total_flops()
    report = zoo.estimate(model, batch_size=2, seq_len=T, mode="prefill")
    assert report.params == sum(p.numel() for p in model.parameters())
    assert report.state_bytes == model.init_state(2, T).nbytes
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens())
    assert report.flops == counter.get_total_flops()


def test_raptor_has_its_published_size():
    """The blocks that stand for DINOv2 ViT-B/14 in arXiv:2512.19941: 9,490,976 parameters each."""
    layer = [
        {"attention": {"num_heads": 12, "causal": False, "rope": False, "bias": True}},
        {"swiglu": {"hidden_dim": 3072, "bias": True}},
    ]
    trunk = [{"stage": 7, "of": layer}, {"stage": 3, "first": 8, "of": layer}, {"stage": 2, "first": 11, "of": layer}]
    made = {"architecture": "vision", "vision": {"patch_size": 14}, "dim": 768, "trunk": trunk, "norm": "layer"}
    model = zoo.build(made | {"residual": {"scale": 1e-5, "learn": "channel"}}, device="meta")
    assert [sum(p.numel() for p in stage.parameters()) for stage in model.layers] == [9_490_976] * 3


@pytest.mark.parametrize(
    "trunk, message",
    [
        ({"stage": 2, "of": [LAYER, LAYER]}, "stage repeats one layer: a list of blocks"),
        ({"stage": 2, "of": {"loop": 2, "of": LAYER}}, "stage repeats one layer: a list of blocks"),
        ({"stage": 2}, "stage needs the field of"),
        ({"stage": 0, "of": LAYER}, "must be at least 1, got 0"),
        ({"stage": 2, "frist": 3, "of": LAYER}, "did you mean first"),
    ],
)
def test_errors(trunk, message):
    with pytest.raises(zoo.ConfigError, match=message):
        build(trunk)
