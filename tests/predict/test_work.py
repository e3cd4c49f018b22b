"""What of a node takes time, by hand."""

import math

import pytest

import zoo
from zoo.predict.work import FEATURES, Work, work_of

DIM, VOCAB, HIDDEN = 64, 100, 96
MODEL = {
    "name": "x", "architecture": "causal_lm", "dim": DIM, "vocab_size": VOCAB,
    "trunk": [{"repeat": 2, "of": [{"attention": {"num_heads": 2}}, {"swiglu": {"hidden_dim": HIDDEN}}]}],
}  # fmt: skip


def works(mode, **sizes):
    report = zoo.estimate(MODEL, mode=mode, **sizes)
    found = {node.path: work_of(node, report) for node in report.nodes}
    assert len({work.span for work in found.values()}) == 1
    return report, found


def test_weights_and_state_are_held():
    report, found = works("decode", batch_size=2, seq_len=1, context_len=30)
    keys = 4 * 2 * 30 * 2 * DIM  # of 2 rows, keys and values
    weights = next(n.params for n in report.nodes if n.path == "layers.0.0")
    assert 1 <= found["layers.0.0"].held / (4 * weights + keys) < 1.05  # and the new tokens
    assert found["lm_head"].held == 4 * VOCAB * DIM and found["tok_embeddings"].held == 4 * 2 * DIM
    assert found["layers.0.0"].span == sum(n.bytes_read + n.bytes_written for n in report.nodes)


def test_prefill_holds_weights_only():
    _, found = works("prefill", batch_size=2, seq_len=16)
    # three matrices and the norm in front of them
    assert found["layers.0.1"].held == 4 * (3 * DIM * HIDDEN + DIM)


def test_training_finds_everything_far_away():
    _, found = works("train", batch_size=2, seq_len=16)
    assert all(work.held == 0 for work in found.values())


def test_the_gradient_of_a_table_is_as_large_as_the_table():
    for tokens in (4, 64):
        _, found = works("train", batch_size=1, seq_len=tokens)
        rows = 4 * tokens * DIM
        assert found["tok_embeddings"].traffic == 4 * rows + 4 * VOCAB * DIM  # rows and gradients, read and written


def test_masked_products_can_be_left_out():
    _, found = works("prefill", batch_size=1, seq_len=64)
    attention = found["layers.0.0"]
    assert attention.matrix - attention.useful == 2 * 2 * DIM * (64 * 64 - 64 * 65 // 2)
    assert found["layers.0.1"].useful == found["layers.0.1"].matrix
    # of the head only the last token's logits, useful or not
    assert found["lm_head"].matrix == found["lm_head"].useful == 2 * DIM * VOCAB


def test_features():
    work = Work(2, 8e6, 3, 4, 6e6, 0, 5, 7)
    assert work.features == (2, 6e6, 3, 4, math.sqrt(2 * 8e6), 0, 8e6) and len(FEATURES) == len(work.features)
    assert Work(1, 4e6).features[1] == 4e6  # nothing is said of what can be left out
    assert Work(1, 4e6, groups=9).features[4] == pytest.approx(6e3)  # nine products of a ninth


@pytest.mark.parametrize("tokens, chosen", [(1, 2.0), (2, 3.5), (4096, 8.0)])
def test_experts_that_are_expected_to_be_chosen(tokens, chosen):
    moe = {**MODEL, "trunk": [{"moe": {"num_experts": 8, "top_k": 2}}, "swiglu"]}
    for mode in ("train", "prefill"):
        report = zoo.estimate(moe, batch_size=1, seq_len=tokens, mode=mode)
        assert [n.groups for n in report.nodes if n.block == "moe"] == [pytest.approx(chosen)]
        assert sum(n.groups for n in report.nodes) == pytest.approx(chosen)
    step = zoo.estimate(moe, batch_size=tokens, seq_len=1, context_len=5, mode="decode")
    assert sum(n.groups for n in step.nodes) == pytest.approx(chosen)
