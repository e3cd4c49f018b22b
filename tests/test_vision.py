"""Vision models: equality with transformers, positions, registers, stochastic depth, cost, storage, errors."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo

DIM = 64


def config(layer=None, **top):
    attention = {"num_heads": 4, "causal": False, "rope": False, "bias": True}
    made = {
        "dim": DIM,
        "architecture": "vision",
        "vision": {"image_size": 32, "patch_size": 8, "num_classes": 5},
        "norm": {"layer": {"eps": 1e-6}},
        "trunk": [{"repeat": 3, "of": layer or [{"attention": attention}, {"mlp": {"bias": True}}]}],
    }
    return made | top


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def redrawn(model):
    """The model in fp64 with weights of order one, so that no path is too faint to matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (p.ndim == 1) * 0.5)
    return model.eval()


# ------------------------------------------------------------------------------------------- transformers
def load(model, theirs, renames):
    """Load their weights under our names; every one of ours must be given, every one of theirs used."""
    weights = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in renames:
            name = name.replace(old, new)
        weights[name] = tensor
    for i in range(3):  # their layer scales come as modules, ours as a parameter of the branch
        for theirs_, ours in ((f"layers.{i}.layer_scale1.lambda1", 0), (f"layers.{i}.layer_scale2.lambda1", 1)):
            if theirs_ in weights:
                weights[f"layers.{i}.items.{ours}.scale"] = weights.pop(theirs_)
    weights.pop("embed.mask_token", None)  # of masked image modelling
    model.double().load_state_dict(weights)
    return model


EMBEDDING = [
    ("embeddings.patch_embeddings.projection.", "embed."), ("embeddings.position_embeddings", "embed.pos_embed"),
    ("embeddings.", "embed."),
]  # fmt: skip


def test_vit_of_transformers():
    from transformers import ViTConfig, ViTForImageClassification

    theirs = redrawn(ViTForImageClassification(ViTConfig(
        hidden_size=DIM, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8,
        num_labels=5, layer_norm_eps=1e-12, hidden_act="gelu",
    )))  # fmt: skip
    attention = {"num_heads": 4, "causal": False, "rope": False, "bias": True}
    layer = [{"attention": attention}, {"mlp": {"hidden_dim": 96, "bias": True}}]
    ours = load(zoo.build(config(layer, norm={"layer": {"eps": 1e-12}})), theirs, [
        ("vit.", ""), *EMBEDDING, ("layernorm_before.", "items.0.norm."), ("layernorm_after.", "items.1.norm."),
        ("attention.", "items.0.block."), ("mlp.fc1", "items.1.block.up_proj"), ("mlp.fc2", "items.1.block.down_proj"),
        ("layernorm.", "norm."), ("classifier.", "head."),
    ])  # fmt: skip
    with torch.no_grad():
        x = images(2, 3, 32, 32)
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-5)
        wide = images(2, 3, 48, 64)  # positions interpolated to 6 x 8 patches
        expected = theirs(wide, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(ours(wide), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [32, 48])
def test_deit_of_transformers(size):
    """Distillation token and head; the logits are the mean of both heads."""
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    theirs = redrawn(DeiTForImageClassificationWithTeacher(DeiTConfig(
        hidden_size=DIM, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, image_size=32, patch_size=8,
        num_labels=5, layer_norm_eps=1e-6,
    )))  # fmt: skip
    vision = {"image_size": 32, "patch_size": 8, "num_classes": 5, "distill_token": True}
    ours = load(zoo.build(config(vision=vision)), theirs, [
        ("deit.", ""), ("distillation_token", "distill_token"), *EMBEDDING, ("layernorm_before.", "items.0.norm."),
        ("layernorm_after.", "items.1.norm."), ("attention.", "items.0.block."), ("mlp.fc1", "items.1.block.up_proj"),
        ("mlp.fc2", "items.1.block.down_proj"), ("layernorm.", "norm."), ("cls_classifier.", "head."),
        ("distillation_classifier.", "distill_head."),
    ])  # fmt: skip
    x = images(2, 3, 32, size)
    with torch.no_grad():
        expected = theirs(x, interpolate_pos_encoding=size != 32)
        made = ours.answers(x)
        torch.testing.assert_close(made[0], expected.cls_logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(made[1], expected.distillation_logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours(x), expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("registers, swiglu, size", [(0, False, 40), (0, True, 32), (4, True, 24), (4, False, 48)])
def test_dinov2_of_transformers(registers, swiglu, size):
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    options = dict(
        hidden_size=DIM, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=4, image_size=32, patch_size=8,
        use_swiglu_ffn=swiglu, layerscale_value=0.5, layer_norm_eps=1e-6,
    )  # fmt: skip
    if registers:
        made = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **options))
    else:
        made = Dinov2Model(Dinov2Config(**options))
    theirs = redrawn(made)
    attention = {"num_heads": 4, "causal": False, "rope": False, "bias": True}
    # DINOv2 rounds two thirds of the width up to 8
    ffn = (
        {"swiglu": {"hidden_dim": (4 * DIM * 2 // 3 + 7) // 8 * 8, "bias": True}} if swiglu else {"mlp": {"bias": True}}
    )
    vision = {"image_size": 32, "patch_size": 8, "num_registers": registers, "antialias": registers > 0}
    made = config([{"attention": attention}, ffn], vision=vision, residual={"learn": "channel"})
    ours = load(zoo.build(made), theirs, [
        *EMBEDDING, ("encoder.layer.", "layers."), ("norm1.", "items.0.norm."), ("norm2.", "items.1.norm."),
        ("attention.attention.", "items.0.block."), ("attention.", "items.0.block."),
        ("mlp.fc1", "items.1.block.up_proj"), ("mlp.fc2", "items.1.block.down_proj"), ("mlp.", "items.1.block."),
        ("layernorm.", "norm."),
    ])  # fmt: skip
    with torch.no_grad():
        x = images(2, 3, 32, size)
        expected = theirs(x)
        torch.testing.assert_close(ours.features(x), expected.last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours(x), expected.pooler_output, rtol=0, atol=1e-5)
        x = images(2, 3, 32, 32)  # the size of the table
        torch.testing.assert_close(ours.features(x), theirs(x).last_hidden_state, rtol=0, atol=1e-8)


def test_dinov2_small_has_the_parameters_of_the_released_one():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    with torch.device("meta"):
        theirs = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
            hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, num_register_tokens=4,
        ))  # fmt: skip
    count = sum(p.numel() for n, p in theirs.named_parameters() if not n.endswith("mask_token"))
    assert sum(p.numel() for p in zoo.build("dinov2_small", device="meta").parameters()) == count


# ---------------------------------------------------------------------------------------------- embedding
def embedding(**options):
    vision = {"image_size": 32, "patch_size": 8} | options
    return redrawn(zoo.build(config(vision=vision))).embed


def test_positions_at_their_own_size_are_the_table():
    embed = embedding()
    assert embed.positions(4, 4) is embed.pos_embed
    assert torch.equal(embed.positions(6, 3)[:, 0], embed.pos_embed[:, 0])
    with torch.no_grad():
        embed.pos_embed[:, 1:] = 0.7
    torch.testing.assert_close(embed.positions(6, 3)[:, 1:], torch.full((1, 18, DIM), 0.7, dtype=torch.float64))


def test_registers_stand_behind_the_class_token_and_change_no_patch():
    without, with_them = embedding(), embedding(num_registers=3)
    with_them.load_state_dict(without.state_dict(), strict=False)
    x = images(2, 3, 32, 32)
    plain, made = without(x), with_them(x)
    assert torch.equal(made[:, :1], plain[:, :1]) and torch.equal(made[:, 4:], plain[:, 1:])
    assert torch.equal(made[:, 1:4], with_them.register_tokens.expand(2, -1, -1))


def test_a_hidden_patch_is_not_seen_and_its_token_learns():
    model = redrawn(zoo.build(config(vision={"image_size": 32, "patch_size": 8, "mask_token": True})))
    x, hidden = images(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    hidden[0, 5] = True  # row 1, column 1
    changed = x.clone()
    changed[:, :, 8:16, 8:16] += 1
    plain, other = model.features(x, hidden), model.features(changed, hidden)
    assert torch.equal(plain[0], other[0]) and not torch.equal(plain[1], other[1])
    plain.square().sum().backward()
    assert model.embed.mask_token.grad.any()
    with pytest.raises(ValueError, match="masked patches need a vector"):
        embedding()(x, hidden)


def test_patches_run_row_by_row():
    embed, x = embedding(), images(1, 3, 32, 32)
    patch = x[0, :, 8:16, 16:24]  # row 1, column 2
    expected = (embed.weight * patch).sum((1, 2, 3)) + embed.bias + embed.pos_embed[0, 1 + 4 + 2]
    torch.testing.assert_close(embed(x)[0, 1 + 4 + 2], expected)


@pytest.mark.parametrize("pool, width", [("class", DIM), ("mean", DIM), ("class_mean", 2 * DIM)])
def test_pool(pool, width):
    model = redrawn(zoo.build(config(vision={"image_size": 32, "patch_size": 8, "num_registers": 2, "pool": pool})))
    x = images(2, 3, 32, 32)
    tokens, pooled = model.features(x), model(x)
    assert pooled.shape == (2, width)
    parts = {"class": tokens[:, 0], "mean": tokens[:, 3:].mean(1)}
    torch.testing.assert_close(pooled, torch.cat([parts[p] for p in pool.split("_")], 1))


# ------------------------------------------------------------------------------------------------- layers
def test_layer_scale_zero_is_the_identity():
    model = zoo.build(config(residual={"scale": 0.0, "learn": "channel"}, final_norm="none"))
    x = images(2, 3, 32, 32).float()
    assert torch.equal(model.features(x), model.embed(x))


def test_drop_path():
    plain, dropped = (zoo.build(config(residual={"drop_path": rate})) for rate in (0.0, 0.4))
    x = images(3, 3, 32, 32).float()
    assert torch.equal(plain(x), dropped(x))  # eval
    block = dropped.train().layers[0].items[0]
    rows = torch.randn(1, 5, DIM).expand(4000, -1, -1)
    increment = block.increment(rows)
    full = block.eval().increment(rows[:1])
    kept = increment.abs().sum((1, 2)) > 0
    torch.testing.assert_close(increment[kept], (full / 0.6).expand(int(kept.sum()), -1, -1))
    assert abs(kept.float().mean() - 0.6) < 0.04  # so its mean is the full increment


def test_drop_path_follows_the_depth_inside_a_repeat():
    layer = [{"attention": {"causal": False}, "residual": {"drop_path": [0.0, 0.2]}}]
    model = zoo.build(config(layer))
    assert [m.items[0].drop_path for m in model.layers] == pytest.approx([0.0, 0.1, 0.2])
    with pytest.raises(zoo.ConfigError, match=r"residual\.drop_path: must be less than 1"):
        zoo.build(config(residual={"drop_path": 1.0}))


# ------------------------------------------------------------------------------------------------- models
def test_batch_independence_and_seeds():
    model, x = redrawn(zoo.build(config())), images(3, 3, 32, 32)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=0, atol=1e-10)
    a, b, c = (zoo.build(config(), seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a["embed.weight"], c["embed.weight"])


def test_every_parameter_learns():
    vision = {"image_size": 32, "patch_size": 8, "num_registers": 2, "num_classes": 5, "distill_token": True}
    model = zoo.build(config(vision=vision, residual={"learn": "channel"})).train()
    model(images(2, 3, 32, 32).float()).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    "vision", [{}, {"num_registers": 3, "num_classes": 0}, {"pool": "class_mean", "distill_token": True}]
)
def test_cost_is_what_is_counted(vision):
    model = zoo.build(config(vision={"image_size": 32, "patch_size": 8, "num_classes": 5} | vision))
    tokens, x = model.options.num_tokens, images(2, 3, 32, 32).float()
    assert tokens == model.features(x).shape[1]
    report = zoo.estimate(model, batch_size=2, seq_len=tokens, mode="prefill")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(x)
    assert report.flops == counted.get_total_flops()
    assert report.params == report.active_params == sum(p.numel() for p in model.parameters())
    assert sum(n.params for n in report.nodes) == report.params
    assert report.state_bytes == 0
    embed = zoo.estimate(model, batch_size=2, seq_len=tokens).nodes[0]
    assert embed.flops == 2 * report.nodes[0].flops  # no gradient of the image
    with pytest.raises(zoo.ConfigError, match="train or prefill"):
        zoo.estimate(model, batch_size=1, seq_len=tokens, mode="decode")


def test_saved_and_loaded(tmp_path):
    model = zoo.build(config(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = zoo.from_pretrained(tmp_path)
    x = images(1, 3, 32, 32).bfloat16()
    assert torch.equal(again(x), model(x)) and again.embed.weight.dtype == torch.bfloat16


def test_compiles_and_exports():
    model, x = zoo.build(config()), images(2, 3, 32, 32).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vision": {"image_size": 30, "patch_size": 8}}, "vision.patch_size: must divide image_size 30, got 8"),
        ({"vision": {"pool": "max"}}, "vision.pool"),
        ({"vision": {"distill_token": True}}, "vision.distill_token: answers with a class: it needs num_classes"),
        ({"vision": {"patches": 8}}, "vision.patches: unknown option"),
        ({"vocab_size": 50}, "vocab_size: goes with architecture: causal_lm, this is vision"),
        ({"architecture": "causal_lm", "vocab_size": 50}, "vision: goes with architecture: vision"),
    ],
)
def test_errors_of_the_configuration(changes, message):
    with pytest.raises(zoo.ConfigError, match=message):
        zoo.build(config(**changes))


def test_missing_section_and_wrong_images():
    made = config()
    del made["vision"]
    with pytest.raises(zoo.ConfigError, match="the key vision is missing"):
        zoo.build(made)
    with pytest.raises(ValueError, match="multiples of patch_size=8"):
        zoo.build(config())(torch.zeros(1, 3, 30, 32))
