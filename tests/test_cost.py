"""Costs against counts by hand: plain arithmetic from the published equations of each layer, at one small size.

Nothing here is taken from the package but the report. Useful work follows the mathematics, executed work the form that
runs on a CPU (also counted by torch); both must be within 1 % and are, but where noted, equal.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
import zoo.kernels.flops  # formulas that torch lacks

V, D, L, T = 1024, 256, 2, 256  # vocabulary, width, layers, tokens
H, KV, HEAD, F = 4, 2, 64, 704  # heads, key heads, their width, hidden width of the FFN
PAIRS = T * (T + 1) // 2  # of a query and a key that it sees
NORM = 4  # square, sum, scale, weight
ATTENTION = {"attention": {"num_heads": H, "num_kv_heads": KV}}
SWIGLU = {"swiglu": {"hidden_dim": F}}


def document(layer):
    return {"name": "hand", "dim": D, "vocab_size": V, "trunk": [{"repeat": L, "of": [layer]}]}


# ------------------------------------------------------------------------ parts that several layers have
HEAD_FLOPS = 2 * T * D * V
PROJECTIONS = 2 * T * D * (2 * H * HEAD + 2 * KV * HEAD)  # q, k, v, o
FFN = 3 * 2 * T * D * F
FFN_VECTOR = 3 * T * F  # silu is two, the product with it one
AROUND = (NORM + 1) * T * D  # the norm in front of a branch and the sum with the stream
ROPE = 3 * T * (H + KV) * HEAD
FINAL_NORM = NORM * T * D


def llama(pairs):
    useful = PROJECTIONS + 4 * H * HEAD * pairs + FFN
    vector = ROPE + 5 * H * pairs + FFN_VECTOR + 2 * AROUND
    return useful, vector


def mixtral():
    experts, width, k = 8, 512, 2
    attention, vector = llama(PAIRS)
    useful = attention - FFN + 2 * T * D * experts + k * 3 * 2 * T * D * width
    # the softmax of the router, two weights renormalised, silu and product, weighted sum of the outputs
    moe = T * (5 * experts + 2 * k + k * (3 * width + 2 * D))
    return useful, vector - FFN_VECTOR + moe


def mamba1():
    E, N, W, R = 2 * D, 16, 4, D // 16
    useful = 2 * T * (D * 2 * E + E * (R + 2 * N) + R * E + E * D) + 2 * T * E * N  # the last: y = h C
    # taps and silu; softplus; delta A, exp, delta u B, a h + b for each state; delta u; D u; silu(z) y
    vector = T * E * (2 * W + 2 + 1 + (1 + 1 + 1 + 2) * N + 1 + 2 + 3)
    return useful, vector + AROUND


def mamba2():
    E, N, W, P = 2 * D, 64, 4, 64
    heads, mixed = E // P, E + 2 * N
    useful = 2 * T * (D * (E + mixed + heads) + E * D) + 4 * T * heads * P * N  # S += B x^T; y = S C
    vector = T * (mixed * (2 * W + 2) + 3 * heads)  # taps and silu; softplus, delta A, exp
    vector += T * E * (1 + N + 2 + 3 + NORM)  # delta x, the state's decay, D x, silu(z) y, its norm
    return useful, vector + AROUND


def gated_deltanet():
    keys, values, W = H * HEAD, H * HEAD, 4
    linear = 2 * T * D * (2 * keys + 2 * values + 2 * H) + 2 * T * values * D  # q, k, v, gate, alpha, beta; out
    useful = linear + 3 * 2 * T * H * HEAD * HEAD  # S^T k, k (v - S^T k)^T, S^T q
    vector = T * (2 * keys + values) * (2 * W + 2) + 3 * T * 2 * keys  # taps and silu; unit length
    vector += T * H * (3 + 1 + HEAD * HEAD + 2 * HEAD)  # alpha, beta, the state's decay, beta (v - S^T k)
    vector += T * values * (NORM + 3)  # norm, silu and product
    return useful + FFN, vector + FFN_VECTOR + 2 * AROUND


def kda():
    keys, W = H * HEAD, 4
    linear = 2 * T * (4 * D * keys + D * H + 2 * (D * HEAD + HEAD * keys))  # q, k, v, out; beta; decay and gate
    useful = linear + 3 * 2 * T * H * HEAD * HEAD
    vector = T * 3 * keys * (2 * W + 2) + 3 * T * 2 * keys
    vector += T * (3 * keys + H * (1 + HEAD * HEAD + 2 * HEAD))  # a decay for each channel
    vector += T * keys * (NORM + 2)  # sigmoid and product
    return useful + FFN, vector + FFN_VECTOR + 2 * AROUND


def dsa():
    latent, nope, turned, value, top, ih, iw = 64, 32, 16, 32, 64, 2, 32
    seen = top * (top + 1) // 2 + (T - top) * top
    linear = 2 * T * (D * H * (nope + turned) + D * (latent + turned) + H * value * D)
    linear += 2 * T * latent * H * (nope + value)
    index = 2 * T * (D * iw + D * ih * iw + D * ih) + 2 * PAIRS * ih * (iw + 1)  # every key before is scored
    useful = linear + index + 2 * H * seen * (nope + turned + value)
    vector = NORM * T * latent + 3 * T * turned * (H + 1) + 5 * H * seen
    vector += 7 * T * iw + 3 * T * turned * (ih + 1) + PAIRS * ih  # LayerNorm of the key, rotation, relu
    return useful + FFN, vector + FFN_VECTOR + 2 * AROUND


def rg_lru():
    W = 4
    useful = 2 * T * 3 * D * D + 2 * 2 * T * D * D // H  # W_x, W_y, W_out; two block-diagonal gates
    # taps; sigmoids; log a = r * c; a; sqrt(1 - a a); times i u; a h + b; gelu and product
    vector = T * D * (2 * W + 2 + 1 + 1 + 3 + 2 + 2 + 3)
    return useful + FFN, vector + FFN_VECTOR + 2 * AROUND


GATED = {"gated_deltanet": {"num_heads": H, "head_dim": HEAD, "expand_v": 1.0}}
DSA = {"dsa": {"num_heads": H, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
               "top_k": 64, "index_heads": 2, "index_head_dim": 32}}  # fmt: skip
WINDOW = {"attention": {**ATTENTION["attention"], "window": 32}}
MODELS = {
    "llama": ([ATTENTION, SWIGLU], llama(PAIRS)),
    "sliding window": ([WINDOW, SWIGLU], llama(32 * 33 // 2 + (T - 32) * 32)),
    "mixtral": ([ATTENTION, {"moe": {"num_experts": 8, "top_k": 2, "hidden_dim": 512}}], mixtral()),
    "mamba": ([{"mamba": {}}], mamba1()),
    "mamba2": ([{"mamba2": {"state_dim": 64, "head_dim": 64}}], mamba2()),
    "gated_deltanet": ([GATED, SWIGLU], gated_deltanet()),
    "kda": ([{"kda": {"num_heads": H, "head_dim": HEAD}}, SWIGLU], kda()),
    "dsa": ([DSA, SWIGLU], dsa()),
    "rg_lru": ([{"rg_lru": {"num_heads": H}}, SWIGLU], rg_lru()),
}


@pytest.mark.parametrize("name", MODELS)
def test_work_is_that_of_a_count_by_hand(name):
    layer, (useful, vector) = MODELS[name]
    report = zoo.estimate(document(layer), batch_size=1, seq_len=T, mode="prefill")
    assert report.useful_flops == pytest.approx(L * useful + HEAD_FLOPS, rel=1e-12)
    assert report.vector_flops == pytest.approx(L * vector + FINAL_NORM, rel=1e-12)
    train = zoo.estimate(document(layer), batch_size=2, seq_len=T)
    assert train.useful_flops == 6 * report.useful_flops and train.vector_flops == 6 * report.vector_flops


# what runs on a CPU: all scores, tiles of a window, chunks of 64
SCORES, CHUNKS = 4 * H * HEAD, T // 64
SOLVE = 64 * 64 * (HEAD + HEAD)  # a triangular system, for keys and values
DELTA = H * (4 * 64 * 64 * HEAD + SOLVE + 6 * 64 * HEAD * HEAD + 2 * 64 * 64 * HEAD)
# per-channel decay: pairs in blocks of four tokens are elementwise, the others products of halves
KDA = H * (2 * 64 * HEAD * (64 - 4) + SOLVE + 6 * 64 * HEAD * HEAD + 2 * 64 * 64 * HEAD)
SSD = 2 * 64 * 64 * 64 + 8 * (2 * 64 * 64 * 64 + 4 * 64 * 64 * 64)  # one group of B and C, eight heads
EXECUTED = {
    "llama": SCORES * (T * T - PAIRS),
    # tiles of 64 queries see the 31 keys before them
    "sliding window": SCORES * (64 * 64 + 3 * 64 * 95 - (32 * 33 // 2 + (T - 32) * 32)),
    "mixtral": SCORES * (T * T - PAIRS),
    "mamba": 0,
    "mamba2": CHUNKS * SSD - 4 * T * 8 * 64 * 64,
    "gated_deltanet": CHUNKS * DELTA - 6 * T * H * HEAD * HEAD,
    "kda": CHUNKS * KDA - 6 * T * H * HEAD * HEAD,
    # all pairs for the indexer; chosen keys masked in all of them, in the absorbed form, 80 channels twice
    "dsa": 2 * 2 * 33 * (T * T - PAIRS) + 2 * H * (T * T * 160 - (64 * 65 // 2 + (T - 64) * 64) * 80),
    "rg_lru": 0,
}


@pytest.mark.parametrize("name", MODELS)
def test_executed_work_is_counted_and_by_hand(name):
    layer, (useful, _) = MODELS[name]
    model = zoo.build(document(layer)).eval()
    report = zoo.estimate(model, batch_size=1, seq_len=T, mode="prefill")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.int64))
    assert report.flops == counter.get_total_flops()
    assert report.flops == pytest.approx(L * (useful + EXECUTED[name]) + HEAD_FLOPS, rel=1e-2)
