"""A checkpoint of one layout is gone on from in another."""

import pytest
from omegaconf import OmegaConf
from test_guard import CONFIG, TRAIN

import zoo
from zoo.sections import DataSection, ParallelSection, TrainSection


def go_on(layout, folder, resume_from, until):
    """The losses of a run from a checkpoint to another, of four steps in all."""
    from zoo.train import titan
    from zoo.train.job import Job
    from zoo.train.prepare import prepare

    given = {**CONFIG, "train": {**TRAIN, "health_every": 0}, "parallel": layout}
    document = OmegaConf.to_container(zoo.load_config(given), resolve=True)
    train = TrainSection.from_mapping(document["train"])
    losses = []
    titan.fit(
        Job(
            build=lambda device: zoo.build(document, device=device),
            train=train,
            parallel=ParallelSection.from_mapping(document["parallel"]),
            rows=prepare(DataSection.from_mapping(document["data"]), train, document, None).rows,
            folder=folder,
            resume_from=resume_from,
            on_step=lambda record: losses.append(record["loss"]),
            stop=lambda: (resume_from or 0) + len(losses) >= until,
        )
    )
    return losses


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return go_on({}, tmp_path_factory.mktemp("whole"), None, 4)


@pytest.mark.parametrize(("first", "second"), [({"dp_shard": 2}, {}), ({}, {"tp": 2}), ({"tp": 2}, {"pp": 2})])
def test_another_layout_goes_on(workers, whole, tmp_path, first, second):
    def run(layout, *args):
        return workers(2).run(go_on, layout, *args, timeout_s=120)[0] if layout else go_on(layout, *args)

    assert run(first, tmp_path, None, 2) == pytest.approx(whole[:2], rel=1e-4)
    assert run(second, tmp_path, 2, 4) == pytest.approx(whole[2:], rel=1e-4)
