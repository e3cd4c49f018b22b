"""Ops and blocks against the plain torch forms of flash-linear-attention: `make oracles`.

fla is not in the default environment: where it is installed, transformers sends models that have a CPU form to its
Triton kernels. The target puts it into a folder of its own, which only this test sees. Its forms compute in float32.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo import registry
from zoo.kernels.delta_rule import delta_rule
from zoo.kernels.dplr import dplr
from zoo.kernels.linear_attention import linear_attention

pytest.importorskip("fla", reason="flash-linear-attention is not installed: make oracles")

B, T, H, K, V = 2, 70, 3, 16, 24
SCALE = K**-0.5


def naive(family: str, name: str):
    return getattr(importlib.import_module(f"fla.ops.{family}.naive"), name)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def agree(ours, theirs, inputs: list[Tensor], outputs: int = 2) -> None:
    """Values of both and gradients of a random functional; `theirs` may write into what it is given."""
    results = []
    for fn in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        values = fn(*(x.clone() for x in leaves))
        values = values[:outputs] if isinstance(values, tuple) else (values,)
        weights = torch.Generator().manual_seed(1)
        total = sum((y * torch.randn(y.shape, generator=weights)).sum() for y in values)
        results.append((*values, *torch.autograd.grad(total, leaves)))
    for ours, theirs in zip(*results, strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert error < 1e-5, f"relative error {error:.1e}"


def test_linear_attention_without_decay(draw):
    theirs = naive("linear_attn", "naive_recurrent_linear_attn")
    agree(
        lambda q, k, v, s: linear_attention(q, k, v, scale=SCALE, initial_state=s),
        lambda q, k, v, s: theirs(q, k, v, initial_state=s, output_final_state=True),
        [draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), draw(B, H, K, V)],
    )


def test_linear_attention_decay_per_head(draw):
    theirs = naive("simple_gla", "naive_recurrent_simple_gla")
    agree(
        lambda q, k, v, g, s: linear_attention(q, k, v, F.logsigmoid(g), scale=SCALE, initial_state=s),
        lambda q, k, v, g, s: theirs(q, k, v, F.logsigmoid(g), initial_state=s),
        [draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), draw(B, T, H), draw(B, H, K, V)],
    )


def test_linear_attention_decay_per_channel(draw):
    theirs = naive("gla", "naive_recurrent_gla")
    agree(
        lambda q, k, v, g, s: linear_attention(q, k, v, F.logsigmoid(g), scale=SCALE, initial_state=s),
        lambda q, k, v, g, s: theirs(q, k, v, F.logsigmoid(g), initial_state=s, output_final_state=True),
        [draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), draw(B, T, H, K), draw(B, H, K, V)],
    )


def test_linear_attention_constant_decay(draw):
    theirs = naive("retention", "naive_retention")
    log_decay = torch.log1p(-(2.0 ** (-5 - torch.arange(H))))
    agree(
        lambda q, k, v: linear_attention(q, k, v, log_decay, scale=SCALE)[0],
        lambda q, k, v: theirs(*heads_first(q, k, v)).transpose(1, 2),
        [draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V)],
    )


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def test_delta_rule(draw):
    theirs = naive("delta_rule", "delta_rule_recurrence")

    def oracle(q, k, v, beta, s):
        o, s = theirs(*heads_first(q, unit(k), v, beta.sigmoid()), initial_state=s)
        return o.transpose(1, 2), s

    agree(
        lambda q, k, v, beta, s: delta_rule(q, unit(k), v, beta.sigmoid(), scale=SCALE, initial_state=s),
        oracle,
        [draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), draw(B, T, H), draw(B, H, K, V)],
    )


def test_gated_delta_rule(draw):
    theirs = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    agree(
        lambda q, k, v, beta, g, s: delta_rule(
            q, unit(k), v, beta.sigmoid(), F.logsigmoid(g), scale=SCALE, initial_state=s
        ),
        lambda q, k, v, beta, g, s: theirs(
            q, unit(k), v, beta.sigmoid(), F.logsigmoid(g), initial_state=s, output_final_state=True
        ),
        [draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), draw(B, T, H), draw(B, T, H), draw(B, H, K, V)],
    )


def test_kimi_delta_attention(draw):
    theirs = naive("kda", "naive_recurrent_kda")
    agree(
        lambda q, k, v, beta, g, s: delta_rule(
            q, unit(k), v, beta.sigmoid(), F.logsigmoid(g), scale=SCALE, initial_state=s
        ),
        lambda q, k, v, beta, g, s: theirs(
            q, unit(k), v, F.logsigmoid(g), beta.sigmoid(), initial_state=s, output_final_state=True
        ),
        [draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), draw(B, T, H), draw(B, T, H, K), draw(B, H, K, V)],
    )


def test_dplr(draw):
    theirs = naive("generalized_delta_rule.dplr", "dplr_recurrence")

    def oracle(q, k, v, a, gate, g, s):
        o, s = theirs(*heads_first(q, k, v, unit(a), -unit(a) * gate.sigmoid(), F.logsigmoid(g)), initial_state=s)
        return o.transpose(1, 2), s

    agree(
        lambda q, k, v, a, gate, g, s: dplr(
            q, k, v, unit(a), -unit(a) * gate.sigmoid(), F.logsigmoid(g), scale=SCALE, initial_state=s
        ),
        oracle,
        [*(draw(B, T, H, K) for _ in range(2)), draw(B, T, H, V), *(draw(B, T, H, K) for _ in range(3)),
         draw(B, H, K, V)],
    )  # fmt: skip


def block(name: str, **options):
    torch.manual_seed(0)
    built = registry.create(name, 48, **options)
    for p in built.parameters():  # a fresh block hides what starts at zero
        torch.nn.init.normal_(p, std=0.2)
    return built


def test_products_of_householder_matrices(draw):
    theirs = naive("gated_delta_product", "naive_recurrent_gated_delta_product")
    layer = block("deltanet", num_heads=H, num_householder=2, decay="head")
    n = layer.updates
    inputs = [draw(B, T, H, K), draw(B, T, n * H, K), draw(B, T, n * H, V), draw(B, T, n * H), draw(B, T, H)]
    layer.scale = SCALE

    def oracle(q, k, v, beta, g):
        k, v, beta = (t.unflatten(2, (n, H)).flatten(1, 2) for t in (unit(k), v, beta.sigmoid()))
        return theirs(q, k, v, F.logsigmoid(g), beta, scale=SCALE, output_final_state=True, num_householder=n)

    agree(
        lambda q, k, v, beta, g: layer.mix(q, unit(k), v, beta.sigmoid(), F.logsigmoid(g), None, None), oracle, inputs
    )


def test_based(draw):
    theirs = naive("based", "naive_parallel_based")
    layer = block("based", num_heads=3, feature_dim=8)

    def oracle(x):
        q, k, v = (p(x).unflatten(-1, (3, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        return layer.o_proj(theirs(*heads_first(q, k, v)).transpose(1, 2).flatten(2))

    agree(layer, oracle, [draw(B, T, 48)])


def test_parallax(draw):
    theirs = naive("parallax", "naive_parallax")
    layer = block("parallax", num_heads=4, num_kv_heads=2, rope=False)

    def oracle(x):
        projections = (layer.q_proj, layer.r_proj, layer.k_proj, layer.v_proj)
        return layer.o_proj(theirs(*(p(x).unflatten(-1, (-1, layer.head_dim)) for p in projections)).flatten(2))

    agree(layer, oracle, [draw(B, T, 48)])


def test_path_attention(draw):
    theirs = naive("path_attn", "naive_path_attn")
    layer = block("path_attention", num_heads=4, num_kv_heads=2, chunk_size=16)

    def oracle(x):
        q, k, v = (p(x).unflatten(-1, (-1, layer.head_dim)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        w = unit(layer.w_conv1d(layer.w_proj(x), None, None).unflatten(-1, (-1, layer.head_dim)))
        beta, none = 2 * layer.bt_proj(x).sigmoid(), torch.zeros(*q.shape[:3])
        return layer.o_proj(theirs(q, k, v, w, beta, none, layer.head_dim**-0.5).flatten(2))

    agree(layer, oracle, [draw(B, T, 48)])


# ------------------------------------------------------------------------- whole blocks round the plain forms
def split(layer, x: Tensor, *names: str) -> list[Tensor]:
    """Projections of x in heads."""
    return [getattr(layer, name)(x).unflatten(-1, (layer.num_heads, -1)) for name in names]


def gla(layer, x):
    q, k, v = split(layer, x, "q_proj", "k_proj", "v_proj")
    g = (F.logsigmoid(layer.gk_proj(x)) / layer.gate_logit_normalizer).unflatten(-1, (layer.num_heads, -1))
    return naive("gla", "naive_recurrent_gla")(q, k, v, g)[0]


def simple_gla(layer, x):
    g = F.logsigmoid(layer.gk_proj(x)) / layer.gate_logit_normalizer
    return naive("simple_gla", "naive_recurrent_simple_gla")(*split(layer, x, "q_proj", "k_proj", "v_proj"), g)[0]


def retention(layer, x):
    q, k, v = heads_first(*split(layer, x, "q_proj", "k_proj", "v_proj"))
    return naive("retention", "naive_retention")(q, k, v).transpose(1, 2)


def hgrn2(layer, x):
    q, f, v = split(layer, x, "q_proj", "f_proj", "i_proj")
    f = 0.25 + 0.75 * f.sigmoid()
    return naive("gla", "naive_recurrent_gla")(F.silu(q), 1 - f, v, f.log())[0]


def softplus_gate(layer, x):
    return -layer.A_log.exp() * F.softplus(layer.a_proj(x) + layer.dt_bias)


def deltanet(layer, x):
    q, k, v = (F.silu(h) for h in split(layer, x, "q_proj", "k_proj", "v_proj"))
    o, _ = naive("delta_rule", "delta_rule_recurrence")(*heads_first(unit(q), unit(k), v, layer.b_proj(x).sigmoid()))
    return o.transpose(1, 2)


def gated_deltanet(layer, x):
    q, k, v = (F.silu(h) for h in split(layer, x, "q_proj", "k_proj", "v_proj"))
    beta, g = layer.b_proj(x).sigmoid(), softplus_gate(layer, x)
    return naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")(unit(q), unit(k), v, beta, g)[0]


def kda(layer, x):
    q, k, v = (F.silu(h) for h in split(layer, x, "q_proj", "k_proj", "v_proj"))
    gate = layer.forget_gate
    f = gate.f_b_proj(gate.f_a_proj(x)) + gate.dt_bias
    g = -gate.A_log.exp() * F.softplus(f).unflatten(-1, (layer.num_heads, -1))
    return naive("kda", "naive_recurrent_kda")(unit(q), unit(k), v, g, layer.b_proj(x).sigmoid())[0]


MIXERS = {
    "gla": (gla, {"num_heads": 3, "output_gate": False}),
    "simple_gla": (simple_gla, {"num_heads": 3, "output_gate": False}),
    "retention": (retention, {"num_heads": 3, "rotary": False, "output_gate": False}),
    "hgrn2": (hgrn2, {"num_heads": 3, "lower_bound": 0.25}),
    "deltanet": (deltanet, {"num_heads": 3, "conv_size": 0}),
    "gated_deltanet": (gated_deltanet, {"num_heads": 3, "conv_size": 0, "output_gate": False}),
    "kda": (kda, {"num_heads": 3, "conv_size": 0, "output_gate": False}),
}


@pytest.mark.parametrize("name", MIXERS)
def test_mixers(draw, name):
    core, options = MIXERS[name]
    layer = block(name, **options)

    def oracle(x):
        o, norm = core(layer, x), layer.g_norm if name == "hgrn2" else layer.o_norm
        width = norm.weight.shape[0]
        return layer.o_proj(
            F.rms_norm(o.flatten(2).unflatten(-1, (-1, width)), (width,), norm.weight, norm.eps).flatten(2)
        )

    agree(layer, oracle, [draw(B, T, 48)])


def test_rwkv7(draw):
    """Between the projections as the paper's equations have them, the recurrence of fla."""
    theirs = naive("generalized_delta_rule.dplr", "dplr_recurrence")
    layer = block("rwkv7", num_heads=3)

    def oracle(x):
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        mix = {c: x + (before - x) * getattr(layer, f"x_{c}") for c in "rwkvag"}
        heads = (layer.num_heads, layer.head_dim)
        r, k, v = (getattr(layer, f"{c}_proj")(mix[c]).unflatten(-1, heads) for c in "rkv")
        a = layer.a_lora(mix["a"]).sigmoid().unflatten(-1, heads)
        g = -torch.exp(torch.tensor(-0.5)) * layer.w_lora(mix["w"]).sigmoid().unflatten(-1, heads)
        kappa = unit(k * layer.k_k.view(heads))
        k = k * (1 + (a - 1) * layer.k_a.view(heads))
        # it scales queries by Dk^-1/2
        o, _ = theirs(*heads_first(r * layer.head_dim**0.5, k, v, -kappa, kappa * a, g))
        o = layer.g_norm(o.transpose(1, 2).flatten(2).flatten(0, 1)).view(x.shape)
        bonus = (r * k * layer.r_k).sum(-1, keepdim=True) * v
        return layer.o_proj((o + bonus.flatten(2)) * layer.g_lora(mix["g"]))

    agree(layer, oracle, [draw(B, T, 48)])


def test_native_sparse_attention(draw):
    """The layer of flash-linear-attention is one setting of `nsa`: means as compression, keys and values shared by the
    branches, windows and blocks alike."""
    compress, choose, read = (naive("nsa", f"naive_nsa_{n}") for n in ("compression", "topk", "selection"))
    size, window = 8, 20
    layer = block("nsa", num_heads=4, num_kv_heads=2, compression="mean", shared_kv=True, kernel_size=size,
                  kernel_stride=size, block_size=size, top_k=4, window=window, rope=False)  # fmt: skip
    scale = layer.head_dim**-0.5

    def oracle(x):
        q, k, v = (p(x).unflatten(-1, (-1, layer.head_dim)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        full = T // size * size
        means = [t[:, :full].unflatten(1, (-1, size)).mean(2) for t in (k, v)]
        compressed, _ = compress(q, *means, size, scale)
        # their lists end at the last whole block; the own one, open as it may be, is one more
        padded = torch.cat([means[0], torch.zeros_like(means[0][:, :1])], 1)
        selected = read(q, k, v, choose(q, padded, 4, size, scale), size, scale)
        place = torch.arange(T)
        near = (place[:, None] >= place) & (place[:, None] < place + window)
        keys, values = (t.repeat_interleave(2, 2).transpose(1, 2) for t in (k, v))
        local = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=near).transpose(1, 2)
        gates = layer.g_proj(x).sigmoid().unflatten(-1, (-1, 3, 1)).unbind(3)
        parts = (compressed, selected, local)
        return layer.o_proj(sum(g * o for g, o in zip(gates, parts, strict=True)).flatten(2))

    agree(layer, oracle, [draw(B, T, 48)])


def test_hierarchical_sparse_attention_of_single_tokens_is_stick_breaking(draw):
    theirs = naive("stickbreaking_attn", "naive_stickbreaking_attn")
    layer = block("hsa", num_heads=4, chunk_size=1, top_k=T, retrieval_dim=32)

    def oracle(x):
        projections = (layer.retrieval_proj, layer.landmark_proj, layer.v_proj)
        r, mark, v = (p(x).unflatten(-1, (4, -1)) for p in projections)
        return layer.o_proj(theirs(r, mark, v)[0].flatten(2))

    agree(layer, oracle, [draw(B, T, 48)])  # its q and k have nothing to choose from in a chunk of one token


HEADS = {"num_heads": 4}
LAYERS = [
    ("rwkv7", HEADS | {"value_residual": True, "layer_index": 1, "num_layers": 3}, "RWKV7Attention",
     HEADS | {"head_dim": 16, "layer_idx": 1, "num_hidden_layers": 3, "value_dim": 64}),
    ("hgrn2", HEADS, "HGRN2Attention", HEADS | {"expand_ratio": 16}),
    ("deltanet", HEADS, "DeltaNet", HEADS),
    ("deltanet", HEADS | {"head_dim": 16, "expand_v": 2.0, "num_householder": 2, "decay": "head", "output_gate": True},
     "GatedDeltaProduct", HEADS | {"head_dim": 16, "num_householder": 2}),
    ("gated_deltanet", HEADS | {"head_dim": 12}, "GatedDeltaNet", HEADS | {"head_dim": 12}),
    ("based", HEADS, "BasedLinearAttention", HEADS | {"num_key_value_heads": 4}),
    ("mamba2", {"head_dim": 16, "state_dim": 16}, "Mamba2", {"head_dim": 16, "num_heads": 8, "state_size": 16}),
    ("mamba3", {"head_dim": 16, "state_dim": 16}, "Mamba3", {"head_dim": 16, "state_size": 16}),
    ("parallax", HEADS, "Parallax", HEADS),
    ("path_attention", HEADS | {"forget_gate": True}, "PaTHAttention", HEADS | {"use_forget_gate": True}),
    ("nsa", {"num_heads": 16, "num_kv_heads": 1, "head_dim": 4, "compression": "mean", "shared_kv": True},
     "NativeSparseAttention", {"num_heads": 16, "num_kv_heads": 1, "head_dim": 4}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "layer", "theirs"), LAYERS, ids=[case[2] for case in LAYERS])
def test_weights_have_the_names_and_shapes_of_its_layers(name, options, layer, theirs):
    """So they can be loaded as they are. (KDA and lightning attention have those of Hugging Face.)"""
    cls = getattr(importlib.import_module("fla.layers"), layer)
    ours, wanted = registry.create(name, 64, **options), cls(hidden_size=64, **theirs)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in wanted.state_dict().items()}
