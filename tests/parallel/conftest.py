from collections.abc import Callable, Iterator

import pytest
from workers import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], Workers]]:
    """`workers(n)`: n ranks that are started on first use and stay until the end of the session."""
    pools: dict[int, Workers] = {}
    yield lambda size: pools.setdefault(size, Workers(size))
    for pool in pools.values():
        pool.close()
