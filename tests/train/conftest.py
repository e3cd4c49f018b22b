import pytest
from tiny_runs import texts

from zoo.train import prepare


@pytest.fixture(scope="module")
def short_samples():
    """Runs end with a short continuation of the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SAMPLE_TOKENS", 8)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of small texts."""
    return texts(tmp_path_factory.mktemp("data"))
