"""Pooling, scoring, selecting: each fast form against its definition, and the edge cases."""

import pytest
import torch

from zoo.kernels.block_list import BlockList, block_mask, sort_ids
from zoo.kernels.block_scores import block_scores
from zoo.kernels.pool_blocks import pool_blocks
from zoo.kernels.prefix_topk import prefix_topk
from zoo.kernels.select import select

DOCS = torch.tensor([[3] * 5 + [1] * 1 + [7] * 9 + [8] * 4 + [2] * 4, [0] * 23])


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("docs", [None, DOCS])
@pytest.mark.parametrize("mode", ["mean", "max", "min"])
@pytest.mark.parametrize("size", [1, 4, 5, 23, 40])
def test_pool_blocks(size, mode, docs):
    x = draw(2, 23, 3, 5)
    fast, slow = (pool_blocks(x, size, mode=mode, doc_ids=docs, backend=b) for b in ("chunked", "reference"))
    torch.testing.assert_close(fast, slow)


def test_pool_blocks_gradient():
    x = draw(2, 23, 1, 3).requires_grad_()
    for docs in (None, DOCS):
        assert torch.autograd.gradcheck(lambda x, docs=docs: pool_blocks(x, 4, doc_ids=docs)[0], x)


def test_pooled_documents_equal_each_alone():
    x = draw(2, 23, 2, 3)
    pooled, start = pool_blocks(x, 4, doc_ids=DOCS)
    alone, _ = pool_blocks(x[:1, 6:15], 4)
    for n in range(2):
        slot = (start[0] == 6 + 4 * n).nonzero().item()
        torch.testing.assert_close(pooled[0, slot], alone[0, n])
    assert (start[0] >= 0).sum() == 1 + 0 + 2 + 1 + 1


@pytest.mark.parametrize("docs", [False, True])
def test_block_scores(docs):
    q, keys = draw(2, 9, 4, 6), draw(2, 5, 2, 6, seed=1)
    q_index = torch.arange(9).expand(2, 9) + torch.tensor([[0], [6]])
    k_index = torch.tensor([[1, 3, 5, -1, 8], [0, 4, 20, 9, -1]])
    ids = {"q_doc_ids": torch.arange(9).expand(2, 9) // 4, "k_doc_ids": torch.tensor([[0, 0, 1, 1, 1]] * 2)}
    args = {"q_index": q_index, "k_index": k_index, "scale": 0.3, **(ids if docs else {})}
    fast, slow = (block_scores(q, keys, **args, backend=b) for b in ("chunked", "reference"))
    torch.testing.assert_close(fast, slow)
    assert torch.isneginf(fast[0, :, :, 3]).all() and torch.isneginf(fast[0, :, :6, 2]).all()


@pytest.mark.parametrize("rule,limit", [("topk", 0.0), ("top_p", 0.7), ("top_p", 1.0), ("threshold", 0.1)])
@pytest.mark.parametrize("k", [0, 1, 3, 7, 50])
@pytest.mark.parametrize("forced", [False, True])
def test_select(rule, limit, k, forced):
    scores = (draw(2, 3, 11, 7) * 2).round() / 2  # many ties
    visible = torch.arange(7) <= torch.arange(11)[:, None] - 2
    must = (torch.arange(7) == torch.arange(11)[:, None] - 2) | (torch.arange(7) == 0) if forced else None
    args = {"rule": rule, "limit": limit, "forced": must, "visible": visible}
    fast, slow = (select(scores, k, **args, backend=b).idx for b in ("chunked", "reference"))
    assert fast.dtype == torch.int32 and torch.equal(fast, slow)
    assert fast.shape == (2, 3, 11, min(k, 7))


def test_select_by_hand():
    scores = torch.tensor([1.0, 3.0, 3.0, 2.0, float("-inf")]).reshape(1, 1, 1, 5)
    pick = lambda k, **more: select(scores, k, **more).idx.flatten().tolist()  # noqa: E731
    assert pick(1) == [1]  # a tie goes to the lowest index
    assert pick(3) == [1, 2, 3]
    assert pick(5) == [0, 1, 2, 3, -1]  # what is invisible stays out, empty slots at the end
    first = torch.tensor([True, False, False, False, True])
    assert pick(2, forced=first) == [0, 1]  # forced counts within k, invisible is not forced in
    assert pick(5, rule="threshold", limit=2.0) == [1, 2, 3, -1, -1]
    assert pick(5, rule="top_p", limit=0.45) == [1, 2, -1, -1, -1]
    assert not select(scores.clone().requires_grad_(), 2).idx.requires_grad


def test_transpose_lists_the_queries_of_each_block():
    blocks = BlockList(sort_ids(torch.tensor([[[[2, 0], [-1, -1], [2, -1], [1, 0]]]])), kv_block=4)
    offset, row = blocks.transpose(12)
    lists = [row[0, 0, offset[0, 0, j] : offset[0, 0, j + 1]].tolist() for j in range(3)]
    assert lists == [[0, 3], [3], [0, 2]]
    assert row[0, 0, offset[0, 0, 3] :].eq(-1).all()
    assert blocks.counts.flatten().tolist() == [2, 0, 1, 2]
    assert torch.equal(blocks.mask(10)[..., ::4], block_mask(blocks.idx, 3))


def test_mask_of_blocks_that_start_anywhere():
    blocks = BlockList(torch.tensor([[[[1, 5, -1], [8, -1, -1]]]], dtype=torch.int32), kv_block=3, stride=1)
    assert blocks.mask(9).int().tolist() == [[[[0, 1, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1]]]]


@pytest.mark.parametrize("docs", [None, DOCS])
@pytest.mark.parametrize("chunk", [1, 4, 5, 30])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_prefix_topk(k, chunk, docs):
    scores = (draw(2, 23) * 2).round()  # ties
    fast, slow = (prefix_topk(scores, k, chunk, doc_ids=docs, backend=b) for b in ("chunked", "reference"))
    assert torch.equal(fast, slow)
