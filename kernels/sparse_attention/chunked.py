"""Attention over a BlockList in chunks of query tiles, gathering the listed keys or masking all of them; or from
the side of the keys (key_major.py). Which way is taken depends on the sizes alone.

Both directions recompute the probabilities of a chunk from the logits and the saved lse, so that memory is
linear in the sequence length: q, k, v, o, lse and one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import pieces
from zoo.kernels.block_list import BlockList
from zoo.kernels.precision import no_autocast
from zoo.kernels.sparse_attention import key_major
from zoo.kernels.sparse_attention.cost import choose_way

_NONE = float("-inf")


@dataclass
class _Call:
    """One call, laid out by tiles: query tensors are [B, Hl, tiles, G', q_tile, .] with Hl heads of lists."""

    k: Tensor  # [B, Hkv, Tk, D]
    v: Tensor  # [B, Hkv, Tk, Dv]
    k_bias: Tensor | None  # [B, Hkv, Tk]
    blocks: BlockList
    q_index: Tensor  # [B, tiles, q_tile]
    k_index: Tensor  # [B, Tk]
    q_doc_ids: Tensor | None
    k_doc_ids: Tensor | None
    causal: bool
    window: int | None
    scale: float
    heads: int  # Hl
    dense: bool

    def slots(self, tiles: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of the keys gathered for some tiles: listed? [B, Hs, n, L], slot in a row [B, Hs, n, L] and row in
        the flattened keys [B, Hl, n, L]."""
        B, Hkv, Tk, _ = self.k.shape
        ids = self.blocks.idx[:, :, tiles, :, None].long()
        inside = torch.arange(self.blocks.kv_block, device=ids.device)
        slot = (ids * self.blocks.stride + inside).flatten(-2)
        listed = (slot >= 0) & (slot < Tk) & (ids >= 0).expand(*ids.shape[:-1], inside.numel()).flatten(-2)
        slot = slot.clamp(0, Tk - 1)
        row = torch.arange(B, device=ids.device)[:, None] * Hkv
        row = row + torch.arange(self.heads, device=ids.device) * Hkv // self.heads  # the key head of a list head
        return listed, slot, row[..., None, None] * Tk + slot

    def visible(self, tiles: slice, listed: Tensor, slot: Tensor | None) -> Tensor:
        """Bool, broadcastable to the logits [B, Hl, n, G', q_tile, L]."""

        def of_keys(x: Tensor) -> Tensor:  # [B, Tk] -> [B, Hs or 1, n or 1, 1, 1, L]
            if slot is None:
                return x[:, None, None, None, None]
            batch = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
            return x[batch, slot][:, :, :, None, None]

        key, query = of_keys(self.k_index), self.q_index[:, None, tiles, None, :, None]
        ok = listed[:, :, :, None, None] & (key >= 0)
        if self.causal:
            ok = ok & (key <= query)
        if self.window is not None:
            ok = ok & (query - key < self.window)
        if self.q_doc_ids is not None:
            ok = ok & (of_keys(self.k_doc_ids) == self.q_doc_ids[:, None, tiles, None, :, None])
        return ok

    def keys(self, tiles: slice) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
        """K, V [.., L, .] and bias for the products of some tiles, what is visible, and where K comes from."""
        if self.dense:
            part = BlockList(self.blocks.idx[:, :, tiles], kv_block=self.blocks.kv_block, stride=self.blocks.stride)
            visible = self.visible(tiles, part.mask(self.k.shape[2]), None)
            bias = None
            if self.k_bias is not None:
                bias = self.k_bias.repeat_interleave(self.heads // self.k.shape[1], 1)[:, :, None, None, None]
            return self.k, self.v, bias, visible, None
        listed, slot, flat = self.slots(tiles)
        k, v = (x.flatten(0, 2).index_select(0, flat.flatten()).unflatten(0, flat.shape) for x in (self.k, self.v))
        bias = None if self.k_bias is None else self.k_bias.flatten()[flat][:, :, :, None, None]
        return k, v, bias, self.visible(tiles, listed, slot), flat

    def rows(self, x: Tensor) -> Tensor:
        """Tiles [B, Hl, n, G', q_tile, .] as the rows of a product with the keys."""
        return x.reshape(x.shape[0], self.k.shape[1], -1, x.shape[-1]) if self.dense else x.flatten(3, 4)

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, visible: Tensor) -> Tensor:
        s = (self.rows(q) @ k.mT).reshape(*q.shape[:-1], -1) * self.scale
        return torch.where(visible, s if bias is None else s + bias, _NONE)

    def chunks(self, tiles: int, rows: int) -> list[slice]:
        """Query tiles that are worked on at once."""
        L = self.k.shape[2] if self.dense else self.blocks.idx.shape[3] * self.blocks.kv_block
        one = self.k.shape[0] * self.heads * L * (2 * rows + (0 if self.dense else 2 * self.k.shape[3]))
        return pieces.cut(tiles, one, key_major.CHUNK_ELEMENTS)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, k_bias, idx, q_index, k_index, q_doc_ids, k_doc_ids, static):
        run = _call(k, v, k_bias, idx, q_index, k_index, q_doc_ids, k_doc_ids, static)
        with no_autocast(q.device):
            o, lse = _forward(run, q)
        ctx.save_for_backward(q, k, v, k_bias, idx, q_index, k_index, q_doc_ids, k_doc_ids, o, lse)
        ctx.static = static
        return o, lse

    @staticmethod
    def backward(ctx, grad_o, grad_lse):
        q, *rest, o, lse = ctx.saved_tensors
        with no_autocast(q.device):
            grads = _backward(_call(*rest, ctx.static), q, o, lse, grad_o, grad_lse)
        return *grads, *[None] * 6


def _forward(run: _Call, q: Tensor) -> tuple[Tensor, Tensor]:
    outputs, lses = [], []
    for tiles in run.chunks(q.shape[2], q.shape[3] * q.shape[4]):
        part = q[:, :, tiles]
        keys, values, bias, visible, _ = run.keys(tiles)
        s = run.logits(part, keys, bias, visible)
        top = s.amax(-1, keepdim=True)
        top = torch.where(top == _NONE, 0, top)
        p = (s - top).exp()
        total = p.sum(-1, keepdim=True)
        o = (run.rows(p) @ values).reshape(*part.shape[:-1], values.shape[-1])
        outputs.append(o / torch.where(total == 0, 1, total))
        lses.append((top + total.log())[..., 0])
    return torch.cat(outputs, 2), torch.cat(lses, 2)


def _backward(
    run: _Call, q: Tensor, o: Tensor, lse: Tensor, grad_o: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    k, v = run.k, run.v
    none = lse == _NONE
    # d logits = p * (grad_p - sum(grad_o * o) + grad_lse)
    shift = torch.where(none, 0, (grad_o * o).sum(-1) - grad_lse)[..., None]
    lse = torch.where(none, 0, lse)[..., None]
    grad_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
    grad_bias = None if run.k_bias is None else torch.zeros_like(run.k_bias)
    for tiles in run.chunks(q.shape[2], q.shape[3] * q.shape[4]):
        part, do = q[:, :, tiles], grad_o[:, :, tiles]
        keys, values, bias, visible, flat = run.keys(tiles)
        p = (run.logits(part, keys, bias, visible) - lse[:, :, tiles]).exp()
        dp = (run.rows(do) @ values.mT).reshape(p.shape)
        ds = p * (dp - shift[:, :, tiles])
        grad_q.append((run.rows(ds) @ keys).reshape(part.shape) * run.scale)
        dk = run.rows(ds).mT @ run.rows(part) * run.scale
        dv = run.rows(p).mT @ run.rows(do)
        if flat is None:
            grad_k, grad_v = grad_k + dk, grad_v + dv
        else:
            where = flat.flatten()
            grad_k = grad_k.flatten(0, 2).index_add(0, where, dk.flatten(0, 3)).reshape(k.shape)
            grad_v = grad_v.flatten(0, 2).index_add(0, where, dv.flatten(0, 3)).reshape(v.shape)
        if grad_bias is not None:
            db = ds.sum((3, 4))  # [B, Hl, n, L]
            if flat is None:
                grad_bias = grad_bias + db.sum(2).unflatten(1, (k.shape[1], -1)).sum(2)
            else:
                grad_bias = grad_bias.flatten().index_add(0, flat.flatten(), db.flatten()).reshape(grad_bias.shape)
    return torch.cat(grad_q, 2), grad_k, grad_v, grad_bias


def _call(k, v, k_bias, idx, q_index, k_index, q_doc_ids, k_doc_ids, static) -> _Call:
    q_tile, kv_block, stride, *options = static
    blocks = BlockList(idx, q_tile, kv_block, stride)
    return _Call(k, v, k_bias, blocks, q_index, k_index, q_doc_ids, k_doc_ids, *options)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    causal: bool,
    window: int | None,
    scale: float,
    q_index: Tensor,
    k_index: Tensor,
    q_doc_ids: Tensor | None,
    k_doc_ids: Tensor | None,
    k_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.sparse_attention.sparse_attention`."""
    B, Tq, Hq, D = q.shape
    Tk, Hkv, Dv = v.shape[1:]
    tile, heads = blocks.q_tile, Hq if blocks.idx.shape[1] > Hkv else Hkv
    N = blocks.idx.shape[2]
    pad = N * tile - Tq
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    tiled = F.pad(q.to(dtype), (0, 0, 0, 0, 0, pad)).reshape(B, N, tile, heads, Hq // heads, D)
    tiled = tiled.permute(0, 3, 1, 4, 2, 5)  # [B, Hl, N, G', q_tile, D]
    k, v = k.to(dtype).transpose(1, 2).contiguous(), v.to(dtype).transpose(1, 2).contiguous()
    if k_bias is not None:
        k_bias = k_bias.to(dtype).transpose(1, 2).expand(B, Hkv, Tk).contiguous()
    q_index = F.pad(q_index, (0, pad), value=-1).reshape(B, N, tile)
    if q_doc_ids is not None:
        q_doc_ids = F.pad(q_doc_ids, (0, pad)).reshape(B, N, tile)
    static = (tile, blocks.kv_block, blocks.stride, causal, window, scale, heads)
    sizes = (N, Hq // heads * tile, Tk, blocks.idx.shape[3], blocks.kv_block, blocks.num_blocks(Tk))
    way = choose_way(*sizes)
    tensors = (tiled, k, v, k_bias, blocks.idx, q_index, k_index, q_doc_ids, k_doc_ids)
    if way == "key_major":
        o, lse = key_major.KeyMajor.apply(*tensors, static)
    else:
        o, lse = _Attend.apply(*tensors, (*static, way == "mask"))
    o = o.permute(0, 2, 4, 1, 3, 5).reshape(B, N * tile, Hq, Dv)[:, :Tq]
    lse = lse.permute(0, 2, 4, 1, 3).reshape(B, N * tile, Hq)[:, :Tq]
    return o.to(q.dtype), lse
