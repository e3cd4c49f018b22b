"""Caches hold the right tokens under any cut, with rows at different lengths."""

import pytest
import torch

from zoo.blocks.kv_cache import KVCache, RingKVCache, kv_cache_bytes, ring_slots

LIKE = torch.empty(0, dtype=torch.float64)


def tokens(batch: int, start: int, count: int):
    """Keys whose value is the token's number, so that contents can be read off."""
    x = torch.arange(start, start + count, dtype=torch.float64).expand(batch, count)
    return x[..., None, None], -x[..., None, None]


def seen(k, v, key_index, query, window, sinks):
    """Sorted contents that the query may attend to, checked against the order index."""
    ok = (key_index >= 0) & (key_index <= query) & ((query - key_index < window) | (key_index < sinks))
    assert torch.equal(k[ok, 0, 0], key_index[ok].double())
    assert torch.equal(v[ok, 0, 0], -key_index[ok].double())
    return sorted(key_index[ok].tolist())


@pytest.mark.parametrize("max_len", [None, 200])
@pytest.mark.parametrize("cuts", [[200], [1] * 100, [3, 1, 1, 70, 2, 1, 64, 5], [5, 5, 1, 20]])
@pytest.mark.parametrize("window, sinks", [(None, 0), (4, 0), (5, 3), (1, 2), (2, 7), (300, 2)])
def test_every_query_sees_its_keys(max_len, cuts, window, sinks):
    if window is None:
        state = KVCache.create(2, max_len, 1, 1, like=LIKE)
    else:
        state = RingKVCache.create(2, max_len, 1, 1, window=window, sinks=sinks, like=LIKE)
    start = 0
    for count in cuts:
        k, v, key_index, query_index = state.append(*tokens(2, start, count))
        assert query_index[0].tolist() == list(range(start, start + count))
        for q in {0, count // 2, count - 1}:
            t = start + q
            want = [j for j in range(t + 1) if window is None or t - j < window or j < sinks]
            assert seen(k[0], v[0], key_index[0], t, window or 10**9, sinks) == want
        start += count
    assert state.length.tolist() == [start] * 2 and state.size == start


@pytest.mark.parametrize("ring", [False, True])
def test_rows_at_different_lengths(ring):
    make = RingKVCache.create if ring else KVCache.create
    state = make(3, 40, 1, 1, **({"window": 4, "sinks": 2} if ring else {}), like=LIKE)
    length = [0, 0, 0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        rows = torch.randperm(3, generator=generator)[:2].sort().values
        count = int(torch.randint(1, 4, (), generator=generator))
        part = state.rows(rows)
        data = [tokens(1, length[r], count) for r in rows]
        k, v, key_index, query_index = part.append(torch.cat([d[0] for d in data]), torch.cat([d[1] for d in data]))
        for i, r in enumerate(rows.tolist()):
            t = length[r] + count - 1
            assert query_index[i, -1] == t
            want = [j for j in range(t + 1) if not ring or t - j < 4 or j < 2]
            assert seen(k[i], v[i], key_index[i], t, 4 if ring else 10**9, 2) == want
            length[r] += count
        state.put_rows(rows, part)
    assert state.length.tolist() == length
    state.reset(torch.tensor([1]))
    _, _, key_index, query_index = state.append(*tokens(3, 0, 1))
    assert query_index[:, 0].tolist() == [length[0], 0, length[2]]
    assert (key_index[1] >= 0).sum() == 1


def test_bytes_and_limits():
    state = KVCache.create(2, 10, 3, 4, 5, like=LIKE)
    assert state.nbytes == kv_cache_bytes(2, 10, 3, 4, 5, 8)
    ring = RingKVCache.create(2, 10, 3, 4, 5, window=4, sinks=2, like=LIKE)
    assert ring.nbytes == kv_cache_bytes(2, ring_slots(10, 4, 2), 3, 4, 5, 8)
    for cache in (KVCache.create(1, 4, 1, 1, like=LIKE), RingKVCache.create(1, 4, 1, 1, window=9, like=LIKE)):
        cache.append(*tokens(1, 0, 3))
        with pytest.raises(ValueError, match="max_len=4"):
            cache.append(*tokens(1, 3, 2))
        cache.append(*tokens(1, 3, 1))
        assert cache.length.item() == 4
    # a stale upper bound is no overflow
    cache = KVCache.create(2, 4, 1, 1, like=LIKE)
    cache.append(*tokens(2, 0, 4))
    cache.reset(torch.tensor([0, 1]))
    cache.append(*tokens(2, 0, 3))
    assert cache.length.tolist() == [3, 3] and cache.size == 3


def test_gradient_reaches_the_segment_and_stops_at_its_border():
    for cache in (KVCache.create(1, 8, 1, 1, like=LIKE), RingKVCache.create(1, 8, 1, 1, window=3, like=LIKE)):
        for count in (2, 1, 3, 1):
            k, v = (x.clone().requires_grad_() for x in tokens(1, 0, count))
            k_all, v_all, *_ = cache.append(k, v)
            (k_all.square().sum() + v_all.square().sum()).backward()
            assert torch.equal(k.grad, 2 * k) and torch.equal(v.grad, 2 * v)
        assert not cache.k.requires_grad
