"""Costs against counts by hand: plain arithmetic from the published equations of each layer, at one small size.

Nothing here is taken from the package but the report. Useful work follows the mathematics, executed work the form that
runs on a CPU (also counted by torch); both must be within 1 % and are, but where noted, equal.
"""

import subprocess
import sys
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
import zoo.kernels.flops  # formulas that torch lacks
from zoo.sections import TrainSection
from zoo.train.parallelize import parallelize

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


def test_bytes_of_a_decoded_token():
    """Weights once, of the state what is read, the token that is added; by hand, in four bytes."""

    def moved(name, context, **options):
        block = zoo.create_block(name, D, device="meta", **options)
        step, first = (block.cost(1, 1, n, "decode") for n in (context, 0))
        assert first.bytes_read == 4 * (first.params + D)
        return step.bytes_read - first.bytes_read, step.bytes_written - 4 * D

    token, context = 4 * 2 * KV * HEAD, 10_000  # a key and a value of each head
    plain = moved("attention", context, **ATTENTION["attention"])
    assert plain[0] == pytest.approx(context * token, rel=1e-4) and plain[1] == token
    ring = moved("attention", context, **ATTENTION["attention"], window=32)
    assert ring[0] == pytest.approx(32 * token, rel=0.1) and ring[1] == pytest.approx(token, rel=0.1)
    # two query heads a group choose three blocks each; a sum of keys in each of 625 blocks is read too
    blocks = moved("moba", context, **ATTENTION["attention"], block_size=16, top_k=3)
    assert blocks[0] == pytest.approx(2 * 3 * 16 * token + 625 * token / 2, rel=1e-2)
    state = moved("gated_deltanet", context, num_heads=H, head_dim=HEAD, expand_v=1.0)
    assert state == (4 * (H * HEAD * HEAD + 3 * 3 * H * HEAD),) * 2  # read and written, with three inputs of the taps


def test_a_mixture_reads_the_experts_that_are_chosen():
    block = zoo.create_block("moe", D, num_experts=8, top_k=2, hidden_dim=512, device="meta")
    expert = 4 * 3 * D * 512
    rest = 4 * 8 * D
    for tokens in (1, 3, 100):
        read = block.cost(1, tokens, 0, "prefill").bytes_read - 4 * tokens * D
        assert read == pytest.approx(rest + 8 * (1 - (6 / 8) ** tokens) * expert, rel=1e-6)
    assert "moe: tokens choose experts evenly" in zoo.estimate(
        document(MODELS["mixtral"][0]), batch_size=1, seq_len=1
    ).assumptions  # fmt: skip


def test_training_memory():
    """AdamW in float32 has two moments; activations under each kind of checkpointing against what is allocated."""
    layer = [{"attention": {"num_heads": 2, "num_kv_heads": 1}}, {"moe": {}}]
    trunk = {"trunk": [{"repeat": 3, "of": [layer]}, {"repeat": 2, "of": ["gated_deltanet"]}]}
    given = {"name": "memory", "dim": 128, "vocab_size": 50, **trunk}
    report = zoo.estimate(given, batch_size=2, seq_len=128)
    memory = report.memory
    assert memory.parameters == memory.gradients == memory.optimizer // 2 == 4 * report.params
    assert memory.activations["none"] == report.activation_bytes
    assert memory.total("full") < memory.total("selective") < memory.total()
    for how in ("selective", "full"):
        model = zoo.build(given)
        parallelize(model, TrainSection(activation_checkpoint=how))
        tokens = torch.zeros(2, 128, dtype=torch.int64)
        with torch.profiler.profile(profile_memory=True) as seen:
            logits = model(tokens)  # holds the graph
        kept = sum(e.self_cpu_memory_usage for e in seen.events())
        del logits
        # beside the layers, logits and the inputs of norm and head
        assert memory.activations[how] == pytest.approx(kept, rel=0.05, abs=160_000)
    assert zoo.estimate(given, batch_size=2, seq_len=128, mode="prefill").memory is None


SELECTIVE = {
    "dsa": [{"top_k": 12, "num_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8},
            {"top_k": 48, "num_heads": 2, "kv_lora_rank": 8}],
    "seer_attention": [{"num_heads": 2, "block_size": 8, "top_k": 3, "gate_dim": 8}],
    "infllm_v2": [{"num_heads": 2, "kernel_size": 4, "kernel_stride": 4, "block_size": 8, "window": 8, "top_k": 4}],
    "parallax": [{"num_heads": 4}],
    "attention": [{"num_heads": 4}],
    "mla": [{"num_heads": 4}],
    "mamba2": [{"state_dim": 16}],
    "kda": [{}],
    "gated_conv": [{}],
    "diag_ssm": [{}],
    "rwkv7_ffn": [{}],
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTIVE)
def test_selective_checkpointing_keeps_no_tables_of_scores(name):
    for options in SELECTIVE[name]:
        given = {"dim": 64, "vocab_size": 16, "trunk": [{"repeat": 4, "of": [{name: options}]}]}
        model = zoo.build(given).train()
        parallelize(model, TrainSection(activation_checkpoint="selective"))
        tokens = torch.zeros(2, 256, dtype=torch.int64)
        model(tokens)  # some tables of constants are made once
        with torch.profiler.profile(profile_memory=True) as seen:
            logits = model(tokens)
        kept = sum(e.self_cpu_memory_usage for e in seen.events())
        del logits
        memory = zoo.estimate(given, batch_size=2, seq_len=256).memory
        assert memory.activations["selective"] == pytest.approx(kept, rel=0.06)


LARGE = ["trunk[1].repeat=88"]  # of deepseek_v3: a trillion parameters
MEASURE = """
import re, time
began = time.process_time()
import zoo
report = zoo.estimate("deepseek_v3", {overrides}, batch_size=1, seq_len=4096)
assert report.params > 1e12, report.params
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())  # ru_maxrss would be that of who started it
print(time.process_time() - began, int(peak[1]) / 2**20)
"""


def test_a_trillion_parameters_take_seconds_and_no_memory():
    """Imports included; a third of both limits is usual."""
    found = subprocess.run(
        [sys.executable, "-c", MEASURE.format(overrides=LARGE)], capture_output=True, text=True, check=True
    )
    seconds, gigabytes = map(float, found.stdout.split())
    assert seconds < 10 and gigabytes < 1


@pytest.mark.parametrize("name", ["hydra_hybrid", "hnet_xl", "deepseek_v3"])
def test_large_models_are_estimated_in_a_second(name):
    began = time.process_time()
    zoo.estimate(name, batch_size=1, seq_len=8192)
    zoo.estimate(name, batch_size=8, seq_len=1, context_len=8191, mode="decode")
    assert time.process_time() - began < 5


def test_bytes_of_a_layer_are_those_of_its_parts():
    """x is read by the norm, the branch and the sum, which reads the branch too; each writes once."""
    report = zoo.estimate({"dim": D, "vocab_size": V, "trunk": ["swiglu"]}, batch_size=1, seq_len=T, mode="prefill")
    layer = next(n for n in report.nodes if n.block == "swiglu")
    stream = 4 * T * D
    assert (layer.bytes_read, layer.bytes_written) == (4 * layer.params + 4 * stream, 3 * stream)
    embedding, head = report.nodes[0], report.nodes[-1]
    assert embedding.bytes_read == embedding.bytes_written == stream  # rows, not the table
    assert head.bytes_read == 4 * V * D + stream and head.bytes_written == 4 * T * V


GRAPHS = {
    "loop": {"loop": {"steps": 3}, "of": [["attention", "swiglu"]]},
    "parallel": {"parallel": ["attention", "swiglu"]},
    "stage": {"stage": {"steps": 3}, "of": [["attention", "swiglu"]]},
}


@pytest.mark.parametrize("name", ["loop", "parallel", "stage"])
def test_combinators_add_up(name):
    def of(trunk, mode="prefill"):
        return zoo.estimate({"dim": 64, "vocab_size": 50, "trunk": trunk}, batch_size=1, seq_len=128, mode=mode)

    layer, graph = of([["attention", "swiglu"]]), of([GRAPHS[name]])
    times = 1 if name == "parallel" else 3
    outside = 2 * 128 * 64 * 50  # the head
    own = 2 * 3 * (16 + 16 * 3 * 64) if name == "stage" else 0  # the small network of the depths
    assert graph.useful_flops == times * (layer.useful_flops - outside) + outside + own
    assert graph.flops == times * (layer.flops - outside) + outside + own
    assert graph.vector_flops > layer.vector_flops
    train = of([GRAPHS[name]], "train")
    assert train.useful_flops == pytest.approx(3 * graph.useful_flops, rel=1e-3)
    assert train.vector_flops == 3 * graph.vector_flops


def test_routers_say_what_is_assumed():
    def said(router, nested=True):
        node = {"loop": {"steps": 2, "router": router}, "of": [["swiglu"]]}
        if not nested:
            node = {"route": {"router": router}, "of": [["attention", "swiglu"]]}
        return zoo.estimate({"dim": 64, "vocab_size": 50, "trunk": [node]}, batch_size=1, seq_len=64).assumptions

    assert said("fixed") == ()
    assert said("act") == ("act: every token takes every step",)
    assert said({"expert_choice": {"capacity": [1.0, 0.25]}}) == (
        "expert_choice: steps are taken by 1, 0.25 of the tokens",
    )
    assert said("token_choice") == ("token_choice: steps are taken by 1, 0.5 of the tokens",)
    assert said("exit") == ("exit: no token leaves before the last step",)
    assert said({"mod": {"capacity": 0.125}}, nested=False) == ("mod: bodies are taken by 0.125 of the tokens",)
