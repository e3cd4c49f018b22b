import subprocess
import sys

import pytest

from zoo.errors import ConfigError
from zoo.sections import DataSection, TrainSection


def test_defaults_are_valid_and_fixed():
    assert TrainSection.from_mapping(None) == TrainSection()
    assert not DataSection.from_mapping({}).synthetic
    assert DataSection.from_mapping({"source": "mqar"}).synthetic
    with pytest.raises(AttributeError):
        TrainSection().steps = 3


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        TrainSection.from_mapping({"step": 5, "lr": 0, "betas": [0.9, 1.0], "schedule": "cosin", "seed": -1})
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    assert "train.step: unknown option; did you mean steps?" in text
    assert "train.lr: must be greater than 0" in text
    assert "train.schedule: must be one of cosine, linear, wsd" in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 6, "accumulation": 4}, "train.accumulation: must divide batch_size 6, got 4"),
        ({"betas": [0.9]}, "train.betas: must be two numbers"),
        ({"keep_checkpoints": 1}, "train.keep_checkpoints: must be 0 (all) or at least 2"),
    ],
)
def test_combinations(given, words):
    with pytest.raises(ConfigError, match="train") as caught:
        TrainSection.from_mapping(given)
    assert words in str(caught.value)


def test_needs_no_torch():
    code = "import sys, zoo.sections; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
