"""The ways of the Triton kernels of sparse_attention, each forced, in the interpreter; and lists seen from the keys."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from zoo.kernels import gpu
from zoo.kernels.block_list import BlockList, sort_ids
from zoo.kernels.compare import first_difference
from zoo.kernels.sparse_attention import reference, sparse_attention
from zoo.kernels.sparse_attention import triton as launch
from zoo.kernels.sparse_attention.triton_common import Call
from zoo.kernels.sparse_attention.triton_lists import by_block, groups_of, invert

pytestmark = pytest.mark.skipif(not gpu.interpreting(), reason="Triton compiles here: test_rows.py compares on the GPU")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lists(B, Hs, tiles, n, num_keys, kv_block, stride=0, q_tile=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    idx = torch.rand(B, Hs, tiles, -(-num_keys // kv_block), generator=g).argsort(-1)[..., :n]
    idx = torch.where(torch.rand(idx.shape, generator=g) < 0.8, idx, -1)
    if stride == 1:
        idx = torch.where((idx >= 0) & (idx * (kv_block + 1) < num_keys), idx * (kv_block + 1), -1)
    return BlockList(sort_ids(idx), q_tile, kv_block, stride)


def call(Tq, Tk, Hq, Hkv, blocks, D=16, Dv=16, B=1, window=None, docs=False, bias=0, dtype=torch.float32):
    q, k, v = draw(B, Tq, Hq, D, dtype=dtype), draw(B, Tk, Hkv, D, seed=1, dtype=dtype), draw(B, Tk, Hkv, Dv, seed=2)
    index = torch.arange(Tq).expand(B, Tq) + Tk - Tq, torch.arange(Tk).expand(B, Tk)
    ids = tuple((x >= Tk // 3).long() for x in index) if docs else (None, None)
    k_bias = draw(B, Tk, bias, seed=3) if bias else None
    return q, k, v.to(dtype), blocks, True, window, 0.3, *index, *ids, k_bias


def agrees(args, **tolerance):
    return first_difference(launch.attend, reference.sparse_attention, args, **tolerance)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(
    "Tq,Tk,Hq,Hkv,Hs,q_tile,kv_block,stride,more",
    [
        (41, 41, 6, 2, 2, 1, 16, 0, {"docs": True, "D": 24, "Dv": 40}),
        (23, 70, 4, 4, 4, 1, 24, 1, {"window": 31}),
        (37, 37, 4, 2, 4, 5, 16, 0, {"bias": 1}),
        (30, 90, 6, 2, 1, 3, 40, 0, {"bias": 2}),
    ],
)
def test_every_way_gives_the_same(monkeypatch, pairs, Tq, Tk, Hq, Hkv, Hs, q_tile, kv_block, stride, more):
    monkeypatch.setattr(Call, "by_pairs", pairs)
    blocks = lists(1, Hs, -(-Tq // q_tile), 3, Tk, kv_block, stride, q_tile)
    assert agrees(call(Tq, Tk, Hq, Hkv, blocks, **more)) is None


@pytest.mark.parametrize("splits", [2, 5])
def test_split_lists(monkeypatch, splits):
    monkeypatch.setattr(launch, "_splits", lambda call, programs: splits)  # more than some lists have blocks
    assert agrees(call(3, 200, 4, 2, lists(2, 2, 3, 6, 200, 16), B=2)) is None


def test_half_precision(monkeypatch):
    for pairs in (False, True):
        monkeypatch.setattr(Call, "by_pairs", pairs)
        args = call(20, 64, 4, 2, lists(1, 2, 20, 3, 64, 16), dtype=torch.float16)
        assert agrees(args, tolerance=4e-3) is None


def test_the_way_follows_from_the_sizes():
    def by_pairs(Tq, Hq, Hkv, Hs, q_tile, kv_block, n, Tk):
        q, k = torch.empty(1, Tq, Hq, 64, device="meta"), torch.empty(1, Tk, Hkv, 64, device="meta")
        idx, order = torch.empty(1, Hs, -(-Tq // q_tile), n, device="meta"), torch.empty(1, Tq, device="meta")
        return Call(q, k, k, idx, order, order, None, None, None, q_tile, kv_block, kv_block, True, None, 1.0).by_pairs

    assert by_pairs(4096, 16, 4, 16, 1, 256, 4, 4096)  # MoBA
    assert not by_pairs(4096, 32, 2, 2, 1, 64, 16, 4096)  # a GQA group fills a product
    assert not by_pairs(4096, 32, 8, 32, 128, 128, 8, 4096)  # so does a tile
    assert not by_pairs(1, 16, 4, 16, 1, 256, 4, 4096)  # decoding: every block is listed once


def test_keys_and_values_are_read_where_they_lie():
    q, k, v, *rest = call(9, 40, 4, 2, lists(1, 2, 9, 2, 40, 16))
    cache = torch.full((1, 64, 2, 50), float("nan"))
    cache[:, :40, :, 1:17], cache[:, :40, :, 20:36] = k, v
    views = cache[:, :40, :, 1:17], cache[:, :40, :, 20:36]
    torch.testing.assert_close(launch.attend(q, *views, *rest), launch.attend(q, k, v, *rest), rtol=0, atol=0)


def test_no_keys_and_no_queries():
    for Tq, Tk in ((3, 0), (0, 5)):
        q, k = draw(1, Tq, 2, 16).requires_grad_(), draw(1, Tk, 2, 16).requires_grad_()
        blocks = BlockList(torch.full((1, 2, Tq, 2), -1, dtype=torch.int32), kv_block=16)
        o, lse = sparse_attention(q, k, k, blocks, backend="triton")
        o.sum().backward()
        assert not o.any() and torch.isneginf(lse).all() and not q.grad.any() and not k.grad.any()


def test_too_wide_heads_are_refused():
    q = torch.randn(1, 2, 1, 257)
    with pytest.raises(Exception, match="above 256"):
        sparse_attention(q, q, q, lists(1, 1, 2, 1, 2, 1), backend="triton")


@pytest.mark.parametrize(
    "kv_block,stride,num_keys",
    [(1, 0, 100), (4, 0, 90), (24, 0, 200), (40, 1, 300), (64, 0, 200), (70, 1, 400), (16, 1, 200)],
)
def test_inverted_lists_hold_every_listed_key_once(kv_block, stride, num_keys):
    blocks = lists(2, 2, 5, 4, num_keys, kv_block, stride)
    inverted = invert(blocks.idx, num_keys, kv_block, blocks.stride)
    want = blocks.mask(num_keys).flatten(0, 1)
    found = torch.zeros_like(want, dtype=torch.int)
    for x, offset in enumerate(inverted.offset.tolist()):
        for cell, (begin, end) in enumerate(itertools.pairwise(offset)):
            tiles = inverted.tile[x, begin:end].tolist()
            assert inverted.bits is None or sorted(set(tiles)) == tiles
            for entry, tile in enumerate(tiles, begin):
                bits = -1 if inverted.bits is None else int(inverted.bits[x, entry])
                for inside in range(min(inverted.size, num_keys - cell * inverted.size)):
                    found[x, tile, cell * inverted.size + inside] += bits >> inside & 1
    torch.testing.assert_close(found, want.int())


@pytest.mark.parametrize("rows,size", [(1, 4), (3, 4), (6, 16)])
def test_groups_cover_every_row_of_every_pair(rows, size):
    blocks = lists(2, 2, 9, 3, 80, 8)
    offset, pair = by_block(blocks.idx, 10)
    groups, first = groups_of(offset, rows, size, pair.shape[1])
    flat = blocks.idx.flatten(0, 1).flatten(1)
    for x in range(4):
        seen = []
        for g, block in enumerate(groups[x].tolist()):
            if block == 10:
                continue
            begin, end = offset[x, block : block + 2].tolist()
            for row in range((g - int(first[x, block])) * size, (g - int(first[x, block]) + 1) * size):
                if row < (end - begin) * rows:
                    where = int(pair[x, begin + row // rows])
                    assert flat[x, where] == block
                    seen.append((where, row % rows))
        assert sorted(seen) == [(p, r) for p in range(27) if flat[x, p] >= 0 for r in range(rows)]
