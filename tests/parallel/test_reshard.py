"""A checkpoint of one layout is gone on from in another."""

import pytest
from jobs import job_of
from test_guard import CONFIG, TRAIN


def go_on(layout, folder, resume_from, until):
    """The losses of a run from a checkpoint to another, of four steps in all."""
    from zoo.train import titan

    given = {**CONFIG, "train": {**TRAIN, "health_every": 0}, "parallel": layout}
    losses = []
    titan.fit(
        job_of(
            given,
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
