"""Grouped matrix product: every row against the row loop, gradients, refusals, counts of all kinds."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import KernelUnavailable
from zoo.kernels import native
from zoo.kernels.dispatch import explain, use
from zoo.kernels.grouped_mm import cost, grouped_mm
from zoo.kernels.grouped_mm.tokens import MOST, swiglu_tokens

COUNTS = ([3, 0, 70, 5], [0, 0, 0, 78], [78, 0, 0, 0], [20, 19, 19, 20])


def problem(counts, dtype=torch.float64, k=16, m=8):
    generator = torch.Generator().manual_seed(0)
    n, e = sum(counts), len(counts)
    x = torch.randn(n, k, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(e, k, m, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, torch.tensor(counts)


def forward_backward(x, weight, counts, backend):
    y = grouped_mm(x, weight, counts, backend=backend)
    return (y, *torch.autograd.grad(y.square().sum(), (x, weight)))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    "backend, dtype, tolerance",
    [
        ("chunked", torch.float64, 1e-12),
        ("loop", torch.float64, 1e-12),
        ("torch", torch.float32, 1e-4),
        ("torch", torch.bfloat16, 0.3),
        ("loop", torch.bfloat16, 0.3),
    ],
)
def test_equals_the_row_loop(counts, backend, dtype, tolerance):
    want = forward_backward(*problem(counts), "reference")
    got = forward_backward(*problem(counts, dtype), backend)
    for g, w in zip(got, want):
        assert g.dtype == dtype
        assert (g.double() - w).abs().max() <= tolerance * max(1.0, w.abs().max().item() / 10)


def test_weight_may_be_a_transposed_view():
    x, weight, counts = problem(COUNTS[0], torch.float32)
    stored = weight.detach().transpose(1, 2).contiguous().requires_grad_()
    want = forward_backward(x, weight, counts, "reference")
    for backend in ("loop", "torch", "chunked"):
        y = grouped_mm(x, stored.transpose(1, 2), counts, backend=backend)
        (grad,) = torch.autograd.grad(y.square().sum(), stored)
        torch.testing.assert_close(y, want[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad.transpose(1, 2), want[2], rtol=1e-3, atol=1e-3)


def test_expanded_gradients_are_accepted():
    x, weight, counts = problem(COUNTS[0], torch.float32)
    grouped_mm(x, weight, counts, backend="torch").sum().backward()  # torch's op alone raises here
    assert weight.grad[1].abs().max() == 0 < weight.grad[2].abs().max()


def test_no_rows_at_all():
    for backend in ("reference", "chunked", "loop"):
        y = grouped_mm(torch.zeros(0, 16), torch.zeros(4, 16, 8), torch.zeros(4, dtype=torch.int64), backend=backend)
        assert y.shape == (0, 8)


def test_twice_differentiable():
    x, weight, counts = problem([3, 0, 2], k=4, m=3)
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_mm(a, b, counts), (x, weight))


def test_custom_ops_keep_their_promises():
    x, weight, counts = problem([3, 0, 5, 2], torch.float32)
    torch.library.opcheck(torch.ops.zoo.grouped_mm.default, (x, weight, counts, "torch"))
    torch.library.opcheck(torch.ops.zoo.grouped_mm_weight.default, (x, torch.randn(10, 8), counts, "loop"))


@pytest.mark.parametrize("backend", ["loop", "torch", "chunked"])
def test_one_compiled_graph_serves_all_counts(backend):
    compiled = torch.compile(grouped_mm, fullgraph=True, backend="aot_eager")
    for counts in COUNTS:
        x, weight, n = problem(counts, torch.float32)
        got = compiled(x, weight, n, backend=backend)
        torch.testing.assert_close(got, grouped_mm(x, weight, n, backend="reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend, executed", [("loop", cost.flops(78, 16, 8)), ("torch", cost.flops(78, 16, 8)),
                                               ("chunked", cost.chunked_flops(78, 4, 16, 8))])  # fmt: skip
def test_flops_are_counted(backend, executed):
    x, weight, counts = problem(COUNTS[0], torch.float32)
    with FlopCounterMode(display=False) as counter:
        y = grouped_mm(x, weight, counts, backend=backend)
    assert counter.get_total_flops() == executed
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * executed


def test_torch_refuses_what_its_kernel_cannot_take():
    x, weight, counts = problem([3, 2], torch.float32, k=6, m=8)
    with pytest.raises(KernelUnavailable, match=r"K = 6 rows are not a multiple of 16 bytes"):
        grouped_mm(x, weight, counts, backend="torch")
    with pytest.raises(KernelUnavailable, match="does not take float64"):
        grouped_mm(*problem([3, 2]), backend="torch")
    assert dict((r.backend, why) for r, why in explain("grouped_mm", "cpu", torch.float64))["loop"] == "chosen"


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="do not"):
        grouped_mm(torch.zeros(5, 3), torch.zeros(2, 4, 6), torch.tensor([2, 3]))
    with pytest.raises(ValueError, match="counts sum to 4, x has 5 rows"):
        grouped_mm(torch.zeros(5, 4), torch.zeros(2, 4, 6), torch.tensor([2, 2]))


def test_autocast_mixes_dtypes_as_matmul_does():
    x, weight, counts = problem([3, 0, 5, 2], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_mm(x.bfloat16(), weight, counts)
        exact = grouped_mm(x.double(), weight.double(), counts)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.1)


def experts_call(tokens, dtype, dim=37, width=21, num_experts=5, k=2):
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, dim), (num_experts, 2 * width, dim), (num_experts, dim, width)
    x, gate_up, down = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    scores = torch.rand(tokens, num_experts, generator=generator).to(dtype)
    weights, experts = scores.topk(k, dim=-1)
    return x, experts, weights, gate_up, down


@pytest.mark.skipif(native.missing("grouped_mm") is not None, reason="no C compiler")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_tokens_of_the_c_core(dtype, tolerance, tokens, threads):
    x, experts, weights, gate_up, down = experts_call(tokens, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = swiglu_tokens(20 * x, experts, weights, gate_up, down)  # gates up to 100 and more, of both signs
    finally:
        torch.set_num_threads(before)
    want = torch.zeros_like(x)
    for n in range(tokens):
        for e, weight in zip(experts[n], weights[n]):
            gate, up = (gate_up[e] @ (20 * x[n])).chunk(2)
            want[n] += weight * (down[e] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def test_the_c_core_leaves_what_it_cannot_do():
    call = experts_call(2, torch.float32)
    assert swiglu_tokens(*experts_call(MOST + 1, torch.float32)) is None
    assert swiglu_tokens(*experts_call(0, torch.float32)) is None
    assert swiglu_tokens(*experts_call(2, torch.bfloat16)) is None
    assert swiglu_tokens(call[0].requires_grad_(), *call[1:]) is None
    with FlopCounterMode(display=False), torch.no_grad():
        assert swiglu_tokens(*call) is None
    with torch.no_grad(), use(grouped_mm="loop"):
        assert swiglu_tokens(*call) is None
