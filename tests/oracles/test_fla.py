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
