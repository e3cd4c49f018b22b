"""The job that `zoo train` makes of a configuration, without its folder and files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

import zoo
from zoo.sections import DataSection, ParallelSection, TrainSection

if TYPE_CHECKING:
    from zoo.train.job import Job


def job_of(given: Mapping[str, Any], *, evaluated: bool = False, **more: Any) -> Job:
    """`more` are fields of the job; `evaluated`: look at held-out rows where that is due."""
    from zoo.train.job import Job
    from zoo.train.prepare import prepare

    document = OmegaConf.to_container(zoo.load_config(given), resolve=True)
    train = TrainSection.from_mapping(document["train"])
    prepared = prepare(DataSection.from_mapping(document["data"]), train, document, None)
    return Job(
        build=lambda device: zoo.build(document, device=device),
        train=train,
        rows=prepared.rows,
        parallel=ParallelSection.from_mapping(document["parallel"]),
        evaluate=prepared.glance if evaluated else None,
        **more,
    )
