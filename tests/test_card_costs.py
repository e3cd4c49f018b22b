"""What cards say of work ("Useful: ...") against what blocks count: each sentence of a card as plain arithmetic.

Nothing here but the weights of linear layers is taken from the blocks; tokens, pairs and blocks of keys are counted one
by one. What is left out of a formula are those linear layers that run on every token.
"""

from __future__ import annotations

import inspect
import re

import pytest
from torch import nn

import zoo
from zoo import registry
from zoo.blocks.attention import Attention
from zoo.blocks.selection import Policy
from zoo.contract import Block, Router

D, T = 64, 100
H, HEAD = 4, 16  # heads and their width, where a block is not told otherwise
HEADS = {"num_heads": H}
PAIRS = sum(t + 1 for t in range(T))


def each(count):
    """Sum over the tokens of a row, of place t."""
    return sum(count(t) for t in range(T))


def own(t, size):
    """Keys of the own block up to the token."""
    return t % size + 1


def past(t, size, most=T):
    """Whole blocks before the own one, of which it takes so many."""
    return min(t // size, most)


def whole(size, every, t):
    """Windows of `size` tokens, one every so many, that have ended at place t."""
    return max(0, (t + 1 - size) // every + 1) if t + 1 >= size else 0


# options, words of the card, FLOPs of a row of T tokens beside those of linear layers on all tokens
CARDS = {
    # ------------------------------------------------------------------------------------ attention
    "attention": (HEADS, "4 H d FLOPs for each pair of a query and a key that it sees", 4 * H * HEAD * PAIRS),
    "prefix_lm": (
        {**HEADS, "prefix_len": 9},
        "4 H d FLOPs a causal pair, and for the pairs that look ahead in the prefix",
        4 * H * HEAD * each(lambda t: max(t + 1, 9)),
    ),
    "block_attention": (
        {**HEADS, "block_size": 16, "num_blocks": 3},
        "4 H d FLOPs a pair inside a passage, and for each pair of the question",
        4 * H * HEAD * each(lambda t: own(t, 16) if t < 48 else t + 1),
    ),
    "cope": (
        {**HEADS, "num_positions": 8},
        "4 H d FLOPs a causal pair and 2 H d num_positions a token",
        4 * H * HEAD * PAIRS + 2 * H * HEAD * 8 * T,
    ),
    "parallax": (HEADS, "6 H d FLOPs a causal pair", 6 * H * HEAD * PAIRS),
    "path_attention": (
        {**HEADS, "num_kv_heads": 2},
        "4 d FLOPs a causal pair for each query head, and as many for each key head, whose keys are rewritten",
        4 * HEAD * (H * PAIRS + 2 * each(lambda t: t)),  # the token's own key is not
    ),
    "window_global": (
        {**HEADS, "window": 16, "num_globals": 4, "chunk_size": 16},
        "4 H d FLOPs for each key of the window and each global that has left it",
        4 * H * HEAD * each(lambda t: min(t + 1, 16) + min(max(t + 1 - 16, 0), 4)),
    ),
    "rat": (
        {**HEADS, "chunk_size": 8},
        "4 D FLOPs for each earlier chunk of a token",
        4 * D * each(lambda t: past(t, 8)),
    ),
    "moba": (
        {**HEADS, "block_size": 8, "top_k": 3},
        "2 H d FLOPs for each past block and 4 H d for each key of the chosen ones up to the token",
        H * HEAD * each(lambda t: 2 * past(t, 8) + 4 * (own(t, 8) + 8 * past(t, 8, 2))),
    ),
    "landmark": (
        {**HEADS, "block_size": 8, "top_k": 3},
        "4 H d FLOPs for each key of the own and the chosen sections, 2 H d for each landmark",
        # a landmark is a score alone, and that of a chosen section carries its section's value
        H * HEAD * each(lambda t: 4 * own(t, 8) + 2 * past(t, 8) + (4 * 7 + 2) * past(t, 8, 3)),
    ),
    "hsa": (
        {**HEADS, "chunk_size": 8, "top_k": 3, "retrieval_dim": 4},
        "(4 chunk_size + 2) H d FLOPs for each chosen chunk, 2 dr a retrieval head for each past one",
        each(lambda t: (4 * 8 + 2) * H * HEAD * past(t, 8, 3) + 2 * 4 * H * past(t, 8)),
    ),
    "infllm_v2": (
        {**HEADS, "block_size": 8, "top_k": 3, "kernel_size": 4, "kernel_stride": 2, "init_blocks": 1, "window": 8,
         "dense_len": 40},
        "4 H d FLOPs for each key that is read, 2 H d for each window that is scored",
        H * HEAD * each(
            lambda t: 4 * (t + 1) if t < 40 else 4 * (own(t, 8) + 8 * past(t, 8, 2)) + 2 * whole(4, 2, t)
        ),
    ),
    "seer_attention": (
        {**HEADS, "block_size": 8, "top_k": 3, "gate_dim": 8},
        "4 H d FLOPs for each key that is read, 2 gate_dim a group for each past block",
        each(lambda t: 4 * H * HEAD * (own(t, 8) + 8 * past(t, 8, 2)) + 2 * 8 * H * past(t, 8))
        + 2 * H * HEAD * 8 * T + 6 * H * HEAD * 8 * (T // 8),
    ),
    "mla": (
        {**HEADS, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
        "2 H (nope + rope + v) FLOPs a causal pair",
        2 * H * (8 + 4 + 6) * PAIRS,
    ),
    "dsa": (
        {**HEADS, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "top_k": 12,
         "index_heads": 2, "index_head_dim": 8},
        "a score of the indexer for each causal pair, and MLA's work for the chosen min(t, top_k) keys",
        2 * 2 * (8 + 1) * PAIRS + 2 * H * (8 + 4 + 6) * each(lambda t: min(t + 1, 12)),
    ),
    "nsa": (
        {**HEADS, "num_kv_heads": 2, "block_size": 8, "top_k": 3, "kernel_size": 4, "kernel_stride": 2, "window": 12},
        "4 H d FLOPs for each complete window, chosen key and near key",
        4 * H * HEAD * each(lambda t: whole(4, 2, t) + own(t, 8) + 8 * past(t, 8, 2) + min(t + 1, 12)),
    ),
    "lact": (
        {**HEADS, "num_fast_heads": 2, "inter_multi": 1.0, "chunk_size": 16, "muon": False},
        "4 D FLOPs for each pair in the window, and the network's for reading and learning",
        # the last chunk teaches nobody
        4 * D * each(lambda t: min(t + 1, 16)) + 6 * D * 32 * T + 12 * D * 32 * ((T - 1) // 16 * 16),
    ),
    # ---------------------------------------------------------------------------------- recurrences
    "linear_attention": (HEADS, "4 Dk (Dv + 1) FLOPs a head and token", T * H * 4 * HEAD * (HEAD + 1)),
    "gla": ({**HEADS, "expand_k": 0.5, "expand_v": 1.0}, "4 Dk Dv FLOPs a head and token", T * H * 4 * 8 * 16),
    "simple_gla": ({**HEADS, "expand_k": 0.5, "expand_v": 1.0}, "4 Dk Dv FLOPs a head and token", T * H * 4 * 8 * 16),
    "retention": ({**HEADS, "expand_v": 2.0}, "4 Dk Dv FLOPs a head and token", T * H * 4 * 16 * 32),
    "lightning": (HEADS, "4 H Dh^2 FLOPs a token for the state", T * 4 * H * HEAD**2),
    "hgrn2": (HEADS, "4 D Dh FLOPs a token for the state", T * 4 * D * HEAD),
    "flow_attention": (HEADS, "4 H Dk Dv FLOPs a token for the memory", T * 4 * H * HEAD**2),
    "based": (
        {**HEADS, "feature_dim": 4},
        "4 (1 + F + F(F+1)/2) (d + 1) FLOPs a head and token",
        T * H * 4 * (1 + 4 + 10) * (HEAD + 1),
    ),
    "jrt": (
        {**HEADS, "feature_dim": 4, "prefix_len": 9},
        "the work of `based`, and one more update of the state for each token of the prefix",
        (4 * T + 2 * 9) * H * (1 + 4 + 10) * (HEAD + 1),
    ),
    "deltanet": (
        {**HEADS, "head_dim": 16, "expand_v": 2.0, "num_householder": 2},
        "(4 n + 2) Dk Dv FLOPs a head and token",
        T * H * (4 * 2 + 2) * 16 * 32,
    ),
    "gated_deltanet": (
        {**HEADS, "head_dim": 16, "expand_v": 2.0}, "6 Dk Dv FLOPs a value head and token", T * H * 6 * 16 * 32
    ),
    "kda": ({**HEADS, "head_dim": 16}, "6 Dk^2 FLOPs a head and token", T * H * 6 * 16**2),
    "rwkv7": (HEADS, "8 D Dh FLOPs a token for the state", T * 8 * D * HEAD),
    "mlstm": (HEADS, "4 H Dk (Dv + 1) FLOPs a token for memory and normaliser", T * 4 * H * 8 * (16 + 1)),
    "mamba": ({"state_dim": 8}, "2 E N FLOPs a token to read the states", T * 2 * 2 * D * 8),
    "mamba2": ({"state_dim": 8, "head_dim": 16}, "4 E N FLOPs a token for the state", T * 4 * 2 * D * 8),
    "mamba3": ({"state_dim": 8, "head_dim": 16}, "4 R E N FLOPs a token for the state", T * 4 * 2 * D * 8),
    "s4d": ({"state_dim": 8}, "2 D N FLOPs a token to read the states", T * 2 * D * 8),
    "plstm": (
        {**HEADS, "tracking_dim": 1}, "(4 J + 2 J^2) Dk Dv FLOPs a head and token", T * H * (4 * HEAD**2 + 2 * HEAD)
    ),
    "rg_lru": ({**HEADS}, "all products of the layers", 2 * 2 * T * D * D // H),
    "diag_ssm": ({}, "10 D^2 FLOPs a token, of its maps", 0),
    "lru": ({"state_dim": 8}, "8 D N + 4 D^2 FLOPs a token, of its maps", T * 8 * D * 8),
    "gated_conv": ({}, "all 8 D^2 FLOPs a token, of its maps", 0),
    # ------------------------------------------------------------------------- networks and memories
    "swiglu": ({"hidden_dim": 96}, "all 6 D F FLOPs a token", 0),
    "geglu": ({"hidden_dim": 96}, "all 6 D F FLOPs a token", 0),
    "mlp": ({"hidden_dim": 96}, "all 4 D F FLOPs a token", 0),
    "rwkv7_ffn": ({"hidden_dim": 96}, "all 4 D F FLOPs a token", 0),
    "blockffn": ({}, "2 D E + 4 D E d_e FLOPs a token", 0),
    "moe": (
        {"num_experts": 8, "top_k": 2, "hidden_dim": 48},
        "6 D hidden_dim FLOPs a token for each chosen expert, 2 D E for the choice",
        T * (2 * 6 * D * 48 + 2 * D * 8),
    ),
    "chunk_moe": (
        {"num_experts": 8, "top_k": 2, "hidden_dim": 48, "chunk_size": 16},
        "6 D hidden_dim FLOPs a token for each chosen expert, 2 D E for each chunk that begins",
        T * 2 * 6 * D * 48 + 7 * 2 * D * 8,
    ),
    "product_key": (
        {"num_heads": 2, "num_keys": 8, "key_dim": 4, "top_k": 3, "value_dim": 16},
        "2 D H k + 4 H n key_dim (+ 2 v D) FLOPs a token",
        T * 4 * 2 * 8 * 4,
    ),
    "workspace": (
        {"slots": 6, "rank": 8, "active": 2, "chunk_size": 16},
        "2 slots (D + rank) FLOPs a token, and a write for each chunk that ends",
        T * 2 * 6 * (D + 8) + (6 + 1) * 2 * 6 * D * 8,
    ),
    "hyena": ({"filter_len": 40}, "all of its maps on each token, and of the filter's network on each tap", 0),
    "structured_ffn": (
        {"structure": "low_rank", "rank": 8, "hidden_dim": 96},
        "two FLOPs a token for each parameter",
        T * 2 * 3 * 8 * (D + 96),
    ),
}  # fmt: skip
# linear layers that do not run on every token, by the beginning of their names: how often
TIMES = {
    "structured_ffn": {"": 0},
    "hsa": {"landmark_proj": T // 8},
    "nsa": {"compress": 2 * whole(4, 2, T - 1)},
    "jrt": {"k_e_proj": 9, "v_e_proj": 9},
    "workspace": {"k_proj": 0, "write_up": 2 * (T // 16), "write": T // 16, "controller": T // 16},
    "hyena": {"filter": 40},
    "chunk_moe": {"gate": 0},
    "moe": {"gate": 0},
}


def words(name):
    return re.sub(r"\s+", " ", inspect.getdoc(registry.load(name)) or "")


@pytest.mark.parametrize("name", CARDS)
def test_a_card_says_what_is_counted(name):
    options, said, flops = CARDS[name]
    useful = re.search(r"Useful: (.*)", words(name))
    assert useful and said in useful[1]
    block = zoo.create_block(name, D, device="meta", **options)
    for path, m in block.named_modules():
        if isinstance(m, nn.Linear):
            often = next((n for begin, n in TIMES.get(name, {}).items() if path.startswith(begin)), T)
            flops += 2 * often * m.weight.numel()
    assert block.cost(1, T, 0, "prefill").useful_flops == flops


def layer(name, given):
    """A node, of a policy the attention that has it."""
    kind, _, policy = name.partition(" ")
    return {"attention": {**HEADS, kind: {policy: given}}} if policy else {name: given}


def useful(trunk):
    report = zoo.estimate({"dim": D, "vocab_size": 8, "trunk": trunk}, batch_size=1, seq_len=T, mode="prefill")
    return report.useful_flops - 2 * T * D * 8  # the head


PLAIN = ["attention", {"swiglu": {"hidden_dim": 96}}]
SECOND = [{"gla": {"num_heads": 2}}]
THIRD = [{"rwkv7": {"num_heads": 4}}]
TOKENS = 25  # a quarter of them
COMBINED = {  # a graph, and what its parts make of T and of TOKENS tokens
    "sequence": ([PLAIN, SECOND], lambda part: part(PLAIN) + part(SECOND)),
    "repeat": ([{"repeat": 3, "of": [PLAIN], "tie": "all"}], lambda part: 3 * part(PLAIN)),
    "parallel": (
        [{"parallel": ["attention", *SECOND], "merge": "concat"}],
        lambda part: part(["attention"]) + part(SECOND) + 2 * T * 2 * D * D,
    ),
    "loop": (
        [{"loop": {"steps": 3, "inject": "concat", "router": "act"}, "of": [PLAIN]}],
        lambda part: 3 * part(PLAIN) + 3 * 2 * T * 2 * D * D + 3 * 2 * T * D,
    ),
    "route": (
        [{"route": {"router": {"mod": {"capacity": 0.25}}}, "of": [PLAIN]}],
        lambda part: part(PLAIN, TOKENS) + 2 * T * D,
    ),
    "stage": (
        [{"stage": {"steps": 3, "hidden": 8}, "of": [PLAIN]}],
        lambda part: 3 * part(PLAIN) + 3 * 2 * 8 * (1 + 3 * D),
    ),
    "feedback": (
        [{"feedback": [PLAIN], "inner": 2, "outer": 3, "segments": 2, "halt": True}],
        lambda part: 2 * 3 * 3 * part(PLAIN) + 2 * T * D,
    ),
    "hierarchy": (
        [{"hierarchy": {"chunker": {"dynamic_chunks": {"ratio": 4}}, "of": [PLAIN], "decoder": [SECOND]}}],
        lambda part: part(PLAIN, TOKENS) + part(SECOND) + 6 * D * D * T,
    ),
    "stitch": (
        [{"stitch": 32, "of": [SECOND]}],
        lambda part: part(SECOND, width=32) + 4 * T * D * 32,
    ),
    "value_residual": (
        [{"value_residual": [THIRD, THIRD]}],
        # the gate of the second block is a map of rank 32
        lambda part: 2 * part(THIRD) + 2 * T * D * D + 2 * T * 2 * D * 32,
    ),
}


@pytest.mark.parametrize("name", COMBINED)
def test_a_combinator_adds_up_what_its_card_says(name):
    trunk, expected = COMBINED[name]

    def part(layer, tokens=T, width=D):
        blocks = [{one: {}} if isinstance(one, str) else one for one in layer]
        made = [zoo.create_block(kind, width, device="meta", **given) for one in blocks for kind, given in one.items()]
        return sum(block.cost(1, tokens, 0, "prefill").useful_flops for block in made)

    assert useful(trunk) == expected(part)


def test_early_steps_of_a_loop_go_forward_alone():
    def flops(**options):
        trunk = [{"loop": {"steps": 5, **options}, "of": [PLAIN]}]
        return zoo.estimate({"dim": D, "vocab_size": 8, "trunk": trunk}, batch_size=1, seq_len=T).flops

    step = (flops() - 3 * 2 * T * D * 8) / 15
    assert flops(grad_last=2) == flops() - 2 * 3 * step


POLICIES = {  # keys that a head reads at place t
    "anchor": ({}, lambda t: t + 1),
    "pbs": ({"block_size": 8, "segment_size": 16}, lambda t: t + 1),
    "xattention": ({"block_size": 8, "stride": 4}, lambda t: t + 1),
    "quest": ({"block_size": 8, "top_k": 3}, lambda t: own(t, 8) + 8 * past(t, 8, 2)),
    "lserve": (
        {"block_size": 8, "page_size": 4, "top_k": 3, "streaming_heads": []},
        lambda t: own(t, 8) + 8 * past(t, 8, 2),
    ),
    "h2o": ({"heavy": 6, "recent": 5, "interval": 4}, lambda t: min(t + 1, 6 + 5 + 2)),
    "streaming_llm": ({"window": 12, "sinks": 2}, lambda t: min(t + 1, 14)),
    "prefix_tree": ({}, lambda t: t + 1),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_reads_what_its_card_says(name):
    options, keys = POLICIES[name]
    kind = registry.block_card(name).kind
    block = zoo.create_block("attention", D, device="meta", **HEADS, **{kind: {name: options}})
    policy = block.select or block.cache
    choosing = 0 if kind == "cache" else policy.choosing_flops(T, 0)
    read = block.cost(1, T, 0, "prefill").useful_flops - 2 * T * 4 * D * D - choosing
    assert read == 4 * H * HEAD * each(keys)


def test_every_card_says_what_its_work_is():
    cards = {name: registry.block_card(name).kind for name in registry.list_blocks()}
    assert [name for name in cards if "Useful: " not in words(name)] == []
    counted = {*CARDS, *COMBINED, *POLICIES, "revisit"}  # test_configs counts that one
    rest = {name for name, kind in cards.items() if kind in ("router", "chunker", "norm")}
    assert set(cards) - rest == counted


# where tokens that come one by one take other work than a row: why
CUT = {
    "dsa": "few keys are read densely, and in the form that takes less",
    "mla": "expands or absorbs, whichever takes less",
    "hyena": "a call makes its filter anew",
    "jrt": "a prefix of one token is one that has ended",
    "prefix_lm": "likewise",
    "seer_attention": "the gate has nothing to choose from among few keys",
    "plstm": "merging chunks of a row takes less than moving every slot",
    "lact": "its matrices of low rank are multiplied out in every call",
    "workspace": "what the last chunk of a row writes, nobody reads",
}


@pytest.mark.parametrize("name", [n for n in registry.list_blocks() if n not in CUT])
def test_work_does_not_depend_on_how_a_row_is_cut(name):
    card = registry.block_card(name)
    if card.kind not in ("mixer", "ffn", "memory"):
        return
    for options in card.examples:
        block = zoo.create_block(name, D, device="meta", **options)
        row = block.cost(2, T, 0, "prefill").useful_flops
        for pieces in ([1] * T, [37, 5, 58]):
            starts = [sum(pieces[:i]) for i in range(len(pieces))]
            cut = [block.cost(2, n, start, "decode").useful_flops for start, n in zip(starts, pieces, strict=True)]
            assert sum(cut) == row


# ------------------------------------------------------------------------------ what costs take for granted
LAYERS = {
    "moe": ({}, "tokens choose experts evenly"),
    "chunk_moe": ({}, "chunks choose experts evenly"),
    "blockffn": ({}, "every expert fires"),
    "product_key": ({}, "reads 8 values a token"),
    "dsa": ({"top_k": 12}, "reads 12 keys"),
    "nsa": ({"top_k": 4}, "reads 4 blocks of"),
    "moba": ({"top_k": 4}, "reads 4 blocks of"),
    "hsa": ({"top_k": 4}, "reads 4 chunks of"),
    "seer_attention": ({"top_k": 4}, "reads 4 blocks of"),
    "infllm_v2": ({}, "blocks of 64 keys"),
    "landmark": ({"top_k": 4}, "reads 4 sections of"),
    "select anchor": ({}, "reads all keys"),
    "select pbs": ({}, "reads all keys"),
    "select xattention": ({}, "reads all keys"),
    "select quest": ({"top_k": 4}, "reads 4 pages of"),
    "select lserve": ({"top_k": 4}, "reads 4 pages of"),
    "cache prefix_tree": ({}, "rows share nothing"),
}
NODES = {
    "act": ([{"loop": {"steps": 2, "router": "act"}, "of": [PLAIN]}], "every token takes every step"),
    "exit": ([{"loop": {"steps": 2, "router": "exit"}, "of": [PLAIN]}], "no token leaves"),
    "expert_choice": ([{"loop": {"steps": 2, "router": "expert_choice"}, "of": [PLAIN]}], "1, 0.5 of the tokens"),
    "token_choice": ([{"loop": {"steps": 2, "router": "token_choice"}, "of": [PLAIN]}], "1, 0.5 of the tokens"),
    "mod": ([{"route": {"router": {"mod": {"capacity": 0.25}}}, "of": [PLAIN]}], "0.25 of the tokens"),
    "skip_layer": ([{"route": {"router": "skip_layer"}, "of": [PLAIN]}], "0.5 of the tokens"),
    "sampled": ([{"loop": {"steps": 2, "sample_sigma": 0.5}, "of": [PLAIN]}], "draws 3 on average"),
    "feedback": ([{"feedback": [PLAIN], "inner": 2, "outer": 1, "segments": 2, "halt": True}], "no token halts"),
    "dynamic_chunks": (COMBINED["hierarchy"][0], "a dynamic chunk has 4 tokens"),
    "fixed_chunks": (
        [{"hierarchy": {"chunker": {"fixed_chunks": {"length": 4}}, "of": [PLAIN], "decoder": [PLAIN]}}], "one in 4"
    ),
}  # fmt: skip
ASSUMED = {name: ([layer(name, given)], said) for name, (given, said) in LAYERS.items()} | NODES


@pytest.mark.parametrize("name", ASSUMED)
def test_a_profile_prints_what_it_takes_for_granted(name):
    trunk, said = ASSUMED[name]
    report = zoo.estimate({"dim": D, "vocab_size": 8, "trunk": trunk}, batch_size=1, seq_len=T)
    assert any(said in line for line in report.assumptions), report.assumptions


def test_no_expectation_is_silent():
    """A block whose bytes or work depend on a choice says what is expected of it; others have nothing to say."""
    for name in registry.list_blocks():
        cls, card = registry.load(name), registry.block_card(name)
        if issubclass(cls, Block):
            # attention says what its policy says
            chooses = cls.unread_bytes not in (Block.unread_bytes, Attention.unread_bytes) or cls.cost is not Block.cost
            assert not chooses or name in LAYERS
        elif issubclass(cls, Policy):
            assert f"{card.kind} {name}" in LAYERS
        elif issubclass(cls, Router):
            expected = cls.share is not Router.share or cls.assumption is not Router.assumption
            assert not expected or name in NODES or name == "fixed"
