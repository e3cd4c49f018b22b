"""Backward chunk by chunk of a row, on ranks that share weights: what one process learns from whole rows."""

import pytest
import torch
from test_layouts import losses

HYBRID = {
    "dim": 32,
    "vocab_size": 257,
    "trunk": [
        [{"gla": {"num_heads": 2}}, "swiglu"],
        {"loop": 2, "of": [{"attention": {"num_heads": 2}}]},
        {"parallel": [{"mamba2": {"state_dim": 8}}, {"attention": {"num_heads": 2, "window": 9}}]},
    ],
}


@pytest.mark.parametrize(
    ("layout", "one", "many"),
    [
        ({"dp_shard": 2}, {}, {"size": 10}),
        ({"dp_replicate": 2, "dp_shard": 1}, {}, {"size": 16}),
        # the chunks that a step draws are its own; in some steps there are none
        ({"dp_shard": 2}, {"size": 16, "keep": 0.4}, {"size": 16, "keep": 0.4}),
    ],
    ids=("fsdp", "ddp", "drawn chunks"),
)
def test_ranks_learn_what_one_process_learns(workers, layout, one, many):
    def recipe(chunks):
        return {**HYBRID, "train": {"sequence_chunks": chunks}}

    wanted, _, weights = losses(recipe(one), {})
    answers = workers(2).run(losses, recipe(many), layout, timeout_s=120)
    for found, _, _ in answers:
        assert torch.tensor(found) == pytest.approx(torch.tensor(wanted), rel=1e-4)
    assert answers[0][2] == pytest.approx(weights, rel=1e-3, abs=1e-2)  # the first rank has the weights
