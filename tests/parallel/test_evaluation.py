"""What a run learns of its held-out rows while it trains does not depend on the processes."""

import pytest
from jobs import job_of
from test_layouts import DEEP, HYBRID, MIXTURE, TRAIN, VISION
from tiny_runs import texts

DIFFUSION = {**MIXTURE, "vocab_size": 258, "diffusion": {"block_size": 8, "search_clip": True}}


def heldout(config, layout, recipe, source=None, folder=None):
    """The losses and the held-out figures of each step of a short run, on text where it has a `source`."""
    from zoo.train import titan

    data = {"source": "mqar", "num_pairs": 4} if source is None else {"source": str(source), "doc_ids": True}
    given = {"data": data, **config, "parallel": layout}
    given["train"] = {**TRAIN, "eval_every": 2, "eval_batches": 2, **recipe}
    records = []
    titan.fit(job_of(given, evaluated=True, folder=folder, on_step=records.append))
    told = [{k: v for k, v in r.items() if k == "loss" or k.startswith(("heldout", "clip"))} for r in records]
    assert ["heldout_loss" in r for r in told] == [False, True, False, True]
    return told


@pytest.mark.parametrize(
    ("config", "layout", "pieces"),
    [
        (HYBRID, {"dp_shard": 2}, 1),
        (VISION, {"dp_shard": 2}, 1),
        (HYBRID, {"cp": 2}, 1),
        (MIXTURE, {"ep": 2}, 1),
        (MIXTURE, {"pp": 2}, 2),
        (VISION, {"pp": 2}, 2),
        (DEEP, {"pp": 2, "schedule": "Interleaved1F1B"}, 1),
        (HYBRID, {"dp_shard": 2, "tp": 2}, 1),
    ],
    ids=("fsdp", "vit fsdp", "cp", "ep", "pp", "vit pp", "interleaved", "fsdp tp"),
)
def test_held_out_figures_are_those_of_one_process(workers, config, layout, pieces):
    ranks = 4 if len(layout) > 1 and "tp" in layout else 2
    wanted = heldout(config, {}, {"accumulation": pieces})
    for found in workers(ranks).run(heldout, config, layout, {}, timeout_s=120):
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "layout", "recipe", "tolerance"),
    [
        (DIFFUSION, {"dp_shard": 2}, {}, 1e-4),
        (MIXTURE, {"cp": 2}, {}, 1e-4),
        (MIXTURE, {"dp_shard": 2}, {"dtype": "bfloat16"}, 1e-2),
    ],
    ids=("diffusion", "documents", "bfloat16"),
)
def test_held_out_text(workers, tmp_path, config, layout, recipe, tolerance):
    """Documents that do not see each other, and a checkpoint behind each evaluation."""
    source = texts(tmp_path / "texts")
    recipe = recipe | {"checkpoint_every": 2}
    wanted = heldout(config, {}, recipe, source, tmp_path / "one")
    for found in workers(2).run(heldout, config, layout, recipe, source, tmp_path / "two"):
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine == pytest.approx(theirs, rel=tolerance)
