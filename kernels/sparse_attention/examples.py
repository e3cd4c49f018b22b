"""Small calls of sparse_attention, as its rows receive them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zoo.kernels.block_list import BlockList, sort_ids


def examples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments (q, k, v, blocks, causal, window, scale, q_index, k_index, q_doc_ids, k_doc_ids, k_bias)
    of each. Lists have empty slots, and the first of every head is wholly empty unless `full`."""

    def case(
        name, Tq, Tk=None, *, Hq=4, Hkv=2, Hs=2, D=16, Dv=None, q_tile=1, kv_block=16, n=3, stride=0, B=1, full=False,
        causal=True, window=None, offset=0, used=None, docs=None, bias=0,
    ):  # fmt: skip
        Tk = Tq if Tk is None else Tk
        gen = torch.Generator().manual_seed(7 * Tq + Tk + D)
        shapes = ((B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv or D))
        q, k, v = (torch.randn(shape, generator=gen) for shape in shapes)
        N, blocks = -(-Tq // q_tile), -(-Tk // kv_block)
        idx = torch.rand(B, Hs, N, blocks, generator=gen).argsort(-1)[..., :n]
        if not full:
            idx = torch.where(torch.rand(idx.shape, generator=gen) < 0.8, idx, -1)
            idx[:, :, 0] = -1
        if stride == 1:  # blocks that start anywhere, but do not meet
            idx = torch.where((idx >= 0) & (idx * (kv_block + 1) < Tk), idx * (kv_block + 1), -1)
        q_index = torch.arange(Tq).expand(B, Tq) + (Tk - Tq if offset == 0 else offset)
        k_index = torch.arange(Tk).expand(B, Tk)
        if used is not None:  # slots of a cache behind the last token, and one that was thrown away
            k_index = torch.where((k_index < used) & (k_index != 2), k_index, -1)
        ids = None if docs is None else torch.repeat_interleave(torch.arange(len(docs)), torch.tensor(docs))
        k_bias = torch.randn(B, Tk, bias, generator=gen).to(device, dtype) if bias else None
        q, k, v = (x.to(device, dtype) for x in (q, k, v))
        lists = BlockList(sort_ids(idx).to(device), q_tile, kv_block, stride)
        q_doc_ids, k_doc_ids = (None if ids is None else ids[-T:].expand(B, T).to(device) for T in (Tq, Tk))
        order = (q_index.contiguous().to(device), k_index.contiguous().to(device))
        return name, (q, k, v, lists, causal, window, 1.3 * D**-0.5, *order, q_doc_ids, k_doc_ids, k_bias)

    yield case("per token, shared by the heads of a key head", 65, Hq=8, B=2)
    yield case("per token, one key at a time", 33, Hs=1, kv_block=1, n=12, Dv=24)
    yield case("tiles per head", 130, Hs=4, q_tile=32, kv_block=32, D=32, full=True)
    yield case("tiles of other sizes", 63, Hs=4, q_tile=16, kv_block=32, D=24, Dv=40)
    yield case("per query head, many queries on a block", 97, Hs=4, Hkv=4, kv_block=32, n=2)
    yield case("decode", 1, 200, Hs=4, kv_block=32, n=4, B=2, full=True, offset=180, used=181)
    yield case("decode over tokens", 2, 75, Hs=1, Hkv=1, kv_block=1, n=20, D=20, full=True)
    yield case("documents", 65, q_tile=16, docs=[1, 15, 16, 33])
    yield case("documents, blocks anywhere", 40, Hs=4, kv_block=8, stride=1, docs=[9, 1, 30])
    yield case("window", 50, Hs=1, q_tile=16, window=19)
    yield case("cache with empty slots and a bias", 20, 64, Hs=4, n=4, used=60, bias=1)
    yield case("bias per key head, not causal", 31, Hq=6, kv_block=4, q_tile=8, n=5, bias=2, causal=False)
    yield case("all lists empty", 3, q_tile=16)
