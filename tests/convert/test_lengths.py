"""Rotary angles that depend on the length of the text: the original's in the regime that the importer names."""

from __future__ import annotations

import pytest
import torch
from models import made, rope
from parity import measure, says

import zoo
from zoo.convert import from_folder, from_hf, save_hf, to_hf

FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 4.0, 8.0]}
ODD = {"factor": 3.0, "attention_factor": 1.3}


def longrope(trained, **more):
    """A tiny Phi 3 that was first trained on so many tokens, half of the channels of its heads rotated."""
    return made(
        "Phi3", **rope("longrope", partial_rotary_factor=0.5, **FACTORS, **more),
        original_max_position_embeddings=trained, max_position_embeddings=64,
    )  # fmt: skip


def dynamic():
    """A tiny Llama that was trained on 16 tokens."""
    return made("Llama", **rope("dynamic", factor=2.0), max_position_embeddings=16)


def text(tokens):
    return torch.randint(1, 61, (2, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.no_grad()
def unlike(ours, theirs, tokens):
    """The largest difference of logits over their standard deviation."""
    want = says(theirs, text(tokens))
    return ((ours(text(tokens)) - want).abs().max() / want.std()).item()


# with both caches: of texts of 33 tokens, and of continuations of 7 that stay on their side
@pytest.mark.parametrize("trained", [4, 48])
@pytest.mark.parametrize("more", [{}, ODD])
def test_longrope_on_either_side(trained, more):
    found = measure(longrope(trained, **more), context=40)
    assert found.error < 1e-4 and found.error_fp64 < 1e-9
    assert found.generation and found.round_trip


def test_the_switch_is_where_the_original_has_it():
    theirs = longrope(16)
    short, long = from_hf(theirs, context=16), from_hf(theirs, context=17)
    assert max(unlike(short, theirs, 5), unlike(short, theirs, 16)) < 1e-4 < 0.01 < unlike(short, theirs, 17)
    assert max(unlike(long, theirs, 17), unlike(long, theirs, 33)) < 1e-4 < 0.01 < unlike(long, theirs, 16)


def test_dynamic_is_plain_up_to_the_trained_length_and_another_base_at_one_beyond():
    theirs = dynamic()
    plain, wide = from_hf(theirs, context=16), from_hf(theirs, context=33)
    assert max(unlike(plain, theirs, 5), unlike(plain, theirs, 16)) < 1e-4 < 0.01 < unlike(plain, theirs, 33)
    assert unlike(wide, theirs, 33) < 1e-4
    # the original keeps the base of the longest text that it has seen
    assert unlike(wide, theirs, 20) < 1e-4
    assert plain.config["define"]["layer"][0]["attention"]["rope_base"] == 5e4


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: longrope(16), dynamic])
def test_a_row_may_be_cut_anywhere(make):
    """Past the length at which the original changes its angles, and what its cache holds does not fit them."""
    ours, x = from_hf(make(), context=33).double(), text(33)
    whole = ours(x)
    for cut in (1, 15, 16, 17, 32):
        state = ours.init_state(2, 33)
        parts = [ours(x[:, :cut], state=state), ours(x[:, cut:], state=state)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=0)


def test_a_length_is_asked_for_and_kept(tmp_path):
    theirs = longrope(16)
    theirs.save_pretrained(tmp_path / "in")
    with pytest.raises(
        zoo.ConfigError, match=r"'longrope' of any length .*: up to 16 takes the short factors"
    ) as error:
        from_folder(tmp_path / "in")
    assert len(error.value.problems) == 1
    with pytest.raises(zoo.ConfigError, match=r"'dynamic' of any length .*: up to 16 leaves the angles as they were"):
        from_hf(dynamic())
    with pytest.raises(zoo.ConfigError, match="context=40 cannot be represented; the model is the same at every"):
        from_hf(made("Llama"), context=40)
    ours = from_folder(tmp_path / "in", context=40)
    again = zoo.from_pretrained(ours.save_pretrained(tmp_path / "ours"))
    assert again.config["origin"]["context"] == 40
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in to_hf(again).items())
    back = type(theirs).from_pretrained(save_hf(again, tmp_path / "out")).eval()
    assert unlike(ours, back, 33) < 1e-4
