"""For all tests: fresh memory is NaN, so that a read before the first write shows."""

import pytest

from zoo.conformance.poison import poisoned


@pytest.fixture(autouse=True, scope="session")
def nan_in_fresh_memory():
    with poisoned():
        yield
