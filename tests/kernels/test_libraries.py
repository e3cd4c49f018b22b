"""Rows of other people's kernels. The libraries need a GPU, so what is shown here is our side: a stand-in with the
library's documented signature and layout computes by our definition, and the adapter must agree with the op."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch

from zoo.kernels import dispatch, fla, flash_attn, gpu, libraries, mamba_ssm, xformers
from zoo.kernels.attention import examples as attention_examples
from zoo.kernels.attention import flex
from zoo.kernels.attention import reference as attention_reference
from zoo.kernels.attention.mask import Mask
from zoo.kernels.delta_rule.reference import delta_rule
from zoo.kernels.linear_attention.reference import linear_attention
from zoo.kernels.selective_scan.reference import selective_scan


def ids_of(cu_seqlens):
    return torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())[None]


def module(monkeypatch, name, **members):
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        path = ".".join(parts[:n])
        if path not in sys.modules:
            made = types.ModuleType(path)
            made.__path__ = []
            made.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=True)
            monkeypatch.setitem(sys.modules, path, made)
            if n > 1:
                setattr(sys.modules[".".join(parts[: n - 1])], parts[n - 1], made)
    for key, value in members.items():
        setattr(sys.modules[name], key, value)


def documents(B=2):
    return torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 6, 6]])[:B]


def draws(decay, seed=0, T=9, H=4, G=2, Dk=6, Dv=5):
    gen = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, T, G, Dk, generator=gen) for _ in range(2))
    v, beta = torch.randn(2, T, H, Dv, generator=gen), torch.rand(2, T, H, generator=gen)
    shape = {"none": None, "constant": (H,), "head": (2, T, H), "channel": (2, T, H, Dk)}[decay]
    g = None if shape is None else -torch.rand(shape, generator=gen)
    return q, torch.nn.functional.normalize(k, dim=-1), v, beta, g, torch.randn(2, H, Dk, Dv, generator=gen)


class Chunks:
    """fla's chunk ops by our definitions: one flat row, a state for each document."""

    def __init__(self, op, order):
        self.op, self.order = op, order

    def __call__(self, *given, scale, initial_state=None, output_final_state=False, cu_seqlens=None):
        q, k, v, *rest = given
        assert q.shape[2] == v.shape[2], "as many heads of q and k as of v"
        assert initial_state is None or initial_state.dtype == torch.float32
        rest = [dict(zip(self.order, rest))[name] for name in sorted(self.order)]  # (beta, g) or (g,)
        if cu_seqlens is None:
            return self.op(q, k, v, *rest, scale, initial_state, None, 64)
        assert q.shape[0] == 1, "packed documents are one row"
        outputs, states = [], []
        for n, (a, b) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist())):
            part = [x[:, a:b] for x in (q, k, v, *rest)]
            state = None if initial_state is None else initial_state[n : n + 1]
            o, last = self.op(*part, scale, state, None, 64)
            outputs.append(o)
            states.append(last)
        return torch.cat(outputs, 1), torch.cat(states)


@pytest.mark.parametrize("docs", [False, True])
@pytest.mark.parametrize("decay", ["none", "constant", "head", "channel"])
def test_fla_linear_attention(monkeypatch, decay, docs):
    chunks = Chunks(linear_attention, ("g",))
    module(monkeypatch, "fla.ops.gla", chunk_gla=chunks)
    module(monkeypatch, "fla.ops.simple_gla", chunk_simple_gla=chunks)
    q, k, v, _, g, S = draws(decay)
    args = (q, k, v, g, 0.5, S, documents() if docs else None, 64)
    for got, want in zip(fla.linear_attention(*args), linear_attention(*args)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("docs", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_fla_delta_rule(monkeypatch, decay, docs):
    chunks = Chunks(delta_rule, ("g", "beta"))
    module(monkeypatch, "fla.ops.kda", chunk_kda=chunks)
    module(monkeypatch, "fla.ops.gated_delta_rule", chunk_gated_delta_rule=chunks)
    q, k, v, beta, g, S = draws(decay)
    args = (q, k, v, beta, g, 0.5, S, documents() if docs else None, 64)
    for got, want in zip(fla.delta_rule(*args), delta_rule(*args)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_mamba_selective_scan(monkeypatch):
    def fn(u, delta, A, B, C, delta_softplus=True, return_last_state=False):
        assert not delta_softplus and return_last_state
        assert u.is_contiguous() and B.shape[1] == A.shape[1], "time is last"
        y, last = selective_scan(
            *(x.transpose(1, 2) for x in (u, delta)), A, *(x.transpose(1, 2) for x in (B, C)), None, None, 16
        )
        return y.transpose(1, 2), last

    module(monkeypatch, "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=fn)
    gen = torch.Generator().manual_seed(0)
    u, delta, A = (
        torch.randn(2, 9, 6, generator=gen),
        torch.rand(2, 9, 6, generator=gen),
        -torch.rand(6, 4, generator=gen),
    )
    B, C = (torch.randn(2, 9, 4, generator=gen) for _ in range(2))
    args = (u, delta, A, B, C, None, None, 16)
    for got, want in zip(mamba_ssm.selective_scan(*args), selective_scan(*args)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert "documents" in mamba_ssm.selective_scan_refuses(u, delta, A, B, C, None, documents(), 16)


@pytest.mark.parametrize("docs", [False, True])
def test_mamba_ssd_is_linear_attention(monkeypatch, docs):
    def fn(x, dt, A, B, C, chunk_size, initial_states=None, seq_idx=None, return_final_states=False):
        assert return_final_states and (seq_idx is None or seq_idx.dtype == torch.int32)
        y, last = linear_attention(C, B, x * dt[..., None], dt * A, 1.0, initial_states.mT, seq_idx, chunk_size)
        return y, last.mT

    module(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=fn)
    q, k, v, _, g, S = draws("head")
    g[:, 2] = 0.0  # no decay: the step that divides is zero
    args = (q, k, v, g, 0.5, S, documents() if docs else None, 64)
    for got, want in zip(mamba_ssm.ssd(*args), linear_attention(*args)):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert "decay" in mamba_ssm.ssd_refuses(q, k, v, None, 1.0, None, None, 64)


def by_mask(q, k, v, scale, causal, window, docs=None, softcap=None):
    mask = Mask(causal, window, 0, None, None, docs, docs)
    return attention_reference.attention(q, k, v, mask, scale, softcap, None, False)[0]


def test_flash_attention(monkeypatch):
    def func(q, k, v, softmax_scale, causal, window_size, softcap):
        left, right = window_size
        assert right == (-1 if left < 0 else 0 if causal else left)
        return by_mask(q, k, v, softmax_scale, causal, None if left < 0 else left + 1, softcap=softcap or None)

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal, window_size, softcap):
        assert cu_q.dtype == torch.int32 and max_q == cu_q.diff().max() and cu_q is cu_k
        window = None if window_size[0] < 0 else window_size[0] + 1
        return by_mask(*(x[None] for x in (q, k, v)), softmax_scale, causal, window, ids_of(cu_q), softcap or None)[0]

    module(monkeypatch, "flash_attn", flash_attn_func=func, flash_attn_varlen_func=varlen)
    assert compared(flash_attn) >= 6


def test_xformers(monkeypatch):
    class Bias:
        causal, window, docs = False, None, None

        @classmethod
        def from_seqlens(cls, lengths):
            made = cls()
            made.docs = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
            return made

        def make_local_attention(self, window):
            self.window = window
            return self

    class Causal(Bias):
        causal = True

    class Local(Causal):
        def __init__(self, window):
            self.window = window

    def run(q, k, v, attn_bias, scale):
        assert q.shape[2] == k.shape[2]
        bias = attn_bias or Bias()
        return by_mask(q, k, v, scale, bias.causal, bias.window, bias.docs)

    module(monkeypatch, "xformers.ops", memory_efficient_attention=run)
    biases = types.SimpleNamespace(
        LowerTriangularMask=Causal, BlockDiagonalMask=Bias, BlockDiagonalCausalMask=Causal,
        LowerTriangularFromBottomRightLocalAttentionMask=Local,
    )  # fmt: skip
    module(monkeypatch, "xformers.ops.fmha", attn_bias=biases)
    assert compared(xformers) >= 5


def test_flex_attention(monkeypatch):
    from torch.nn.attention import flex_attention as torch_flex

    request = torch_flex.AuxRequest(lse=True)
    # uncompiled it masks all scores instead of skipping, which is the same function
    monkeypatch.setattr(flex, "_compiled", lambda: (torch_flex.flex_attention, torch_flex.create_block_mask, request))
    with torch.no_grad():
        assert compared(flex) >= 10


def compared(adapter):
    """Number of attention's examples that the adapter takes; on each it must agree with the definition."""
    taken = 0
    for name, args in attention_examples.examples("cpu", torch.float32):
        if adapter.refuse(*args):
            continue
        taken += 1
        got, lse = adapter.attention(*args)
        want, want_lse = attention_reference.attention(*args)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=name)
        if args[-1]:
            torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5, msg=name)
    return taken


def test_a_missing_or_broken_library_is_a_reason(monkeypatch, tmp_path):
    libraries.problem.cache_clear()
    assert "not installed: pip install" in libraries.problem("no_such_library", "no-such-library", "1.0")
    (tmp_path / "broken_library.py").write_text("raise OSError('libcudart.so.11: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(libraries.metadata, "version", lambda name: "2.0")
    assert "libcudart" in libraries.problem("broken_library", "broken", "1.0")
    assert libraries.problem("broken_library", "broken", "3.0") == "needs broken 3.0 or newer, this is 2.0"


@pytest.mark.parametrize(
    ("op", "backend"),
    [
        ("linear_attention", "fla"),
        ("linear_attention", "mamba_ssm"),
        ("delta_rule", "fla"),
        ("selective_scan", "mamba_ssm"),
        ("attention", "flash_attn"),
        ("attention", "xformers"),
        ("attention", "flex"),
        ("grouped_mm", "torch"),
    ],
)
def test_every_library_is_a_row(op, backend):
    assert backend in dispatch.backends(op)


@pytest.mark.parametrize(
    ("capability", "triton", "ptxas", "old", "refused", "warps"),
    [
        ((8, 0), (3, 6, 0), (12, 8), False, False, 8),
        ((9, 0), (3, 6, 0), (12, 8), True, False, 8),
        ((9, 0), (3, 6, 0), (13, 4), True, False, 8),  # Triton's own ordering is wrong, whatever assembles it
        ((9, 0), (3, 7, 1), (12, 8), True, False, 8),
        ((9, 0), (3, 9, 0), (13, 4), False, False, 8),
        ((10, 0), (3, 7, 1), (13, 1), False, False, 4),
        ((10, 3), (3, 8, 0), (13, 3), False, True, 8),
        ((10, 3), (3, 9, 0), (13, 4), False, False, 8),
    ],
)
def test_known_wrong_pairs(capability, triton, ptxas, old, refused, warps):
    assert gpu.needs_old_tensor_cores(capability, triton, ptxas) == old
    assert bool(gpu.refusal(capability, triton)) == refused
    assert gpu.max_warps(capability, triton) == warps
