"""Attention over a BlockList from the side of the keys: the queries that listed a block are brought to it.

Pairs (query tile, listed block) are sorted by block and cut into groups of M pairs of one block, so that a block
is read once per group and not once per query. sum_j ceil(c_j / M) <= pairs / M + blocks bounds the groups, whatever
was selected. Each pair gives (o, lse) over its block; the pairs of a query are then merged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import pieces
from zoo.kernels.block_list import BlockList
from zoo.kernels.precision import no_autocast
from zoo.kernels.sparse_attention.cost import group_size, num_groups

CHUNK_ELEMENTS = 1 << 22
_NONE = float("-inf")


class KeyMajor(torch.autograd.Function):
    """q [B, Hl, N, G', q_tile, D], k and v [B, Hkv, Tk, .], k_bias [B, Hkv, Tk] -> o and lse laid out as q."""

    @staticmethod
    def forward(ctx, q, k, v, k_bias, idx, q_index, k_index, q_doc_ids, k_doc_ids, static):
        plan = _Plan(q, k, v, k_bias, idx, q_index, k_index, q_doc_ids, k_doc_ids, static)
        with no_autocast(q.device):
            o, lse = plan.forward()
        ctx.save_for_backward(q, k, v, k_bias, idx, q_index, k_index, q_doc_ids, k_doc_ids, o, lse)
        ctx.static = static
        return o.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])

    @staticmethod
    def backward(ctx, grad_o, grad_lse):
        *tensors, o, lse = ctx.saved_tensors
        plan = _Plan(*tensors, ctx.static)
        with no_autocast(grad_o.device):
            grads = plan.backward(o, lse, grad_o.reshape(o.shape), grad_lse.reshape(lse.shape))
        return *grads, *[None] * 6


class _Plan:
    """Groups of one call. Heads are flattened: X = B * Hl rows of lists, R = G' * q_tile queries in a tile."""

    def __init__(self, q, k, v, k_bias, idx, q_index, k_index, q_doc_ids, k_doc_ids, static):
        q_tile, kv_block, stride, self.causal, self.window, self.scale, heads = static
        B, Hkv, Tk, _ = k.shape
        N, self.n = idx.shape[2:]
        X, self.R = B * heads, q.shape[3] * q.shape[4]
        self.q_shape, self.k, self.v, self.k_bias = q.shape, k, v, k_bias
        self.q = q.reshape(X, N, self.R, q.shape[-1])
        blocks = BlockList(idx, q_tile, kv_block, stride).num_blocks(Tk)
        self.M = group_size(self.R)
        self.groups = num_groups(N * self.n, blocks, self.M)
        self.pairs = N * self.n
        device = idx.device

        def of_queries(x: Tensor | None) -> Tensor | None:  # [B, N, q_tile] -> [X, N, R]
            return None if x is None else x[:, None, :, None].expand(q.shape[:-1]).reshape(X, N, self.R)

        self.q_index, self.q_doc_ids = of_queries(q_index), of_queries(q_doc_ids)
        # pairs in the order of their blocks, empty slots last
        block = idx.expand(B, heads, -1, -1) if idx.shape[1] == 1 else idx
        block = block.reshape(X, self.pairs).long()
        block = torch.where(block >= 0, block, blocks)
        block, pair = block.sort(dim=-1, stable=True)
        count = block.new_zeros(X, blocks + 1).scatter_add_(1, block, torch.ones_like(block))[:, :blocks]
        ends = torch.nn.functional.pad(count.cumsum(1), (1, 0))
        group_ends = torch.nn.functional.pad((count + self.M - 1).div(self.M, rounding_mode="floor").cumsum(1), (1, 0))
        rank = torch.arange(self.pairs, device=device) - ends.gather(1, block)
        place = torch.where(block < blocks, group_ends.gather(1, block) * self.M + rank, self.groups * self.M)
        full = (X, self.groups * self.M + 1)
        at = torch.full(full, self.pairs, device=device).scatter_(1, place, pair)[:, :-1]
        self.pair = at.unflatten(1, (self.groups, self.M))  # [X, groups, M]; = pairs where empty
        self.place = torch.empty_like(pair).scatter_(1, pair, place)  # [X, pairs]; = groups * M where empty
        group = torch.arange(self.groups, device=device).expand(X, self.groups).contiguous()
        which = torch.searchsorted(group_ends[:, 1:].contiguous(), group, right=True)
        self.slot = which[..., None] * stride + torch.arange(kv_block, device=device)  # [X, groups, kv_block]
        self.exists = (self.slot < Tk) & (which < blocks)[..., None]
        self.slot = self.slot.clamp(max=Tk - 1)
        list_row = torch.arange(X, device=device)[:, None, None]
        self.batch, self.list_row = list_row // heads, list_row
        self.key_row = (self.batch * Hkv + list_row % heads * Hkv // heads) * Tk + self.slot
        self.k_index, self.k_doc_ids = k_index, k_doc_ids

    def chunks(self) -> list[slice]:
        D, Dv, kv_block = self.q.shape[-1], self.v.shape[-1], self.slot.shape[-1]
        one = self.q.shape[0] * (self.M * self.R * (D + Dv + 2 * kv_block) + kv_block * (D + Dv))
        return pieces.cut(self.groups, one, CHUNK_ELEMENTS)

    def rows(self, x: Tensor, part: slice) -> Tensor:
        """Rows [X, groups, M * R, ...] of x [X, N, R, ...] for the pairs of some groups."""
        tile = (self.pair[:, part] // self.n).clamp(max=x.shape[1] - 1)
        return x[self.list_row, tile].flatten(2, 3)

    def keys(self, x: Tensor, part: slice) -> Tensor:
        """[X, groups, kv_block, ...] of x [B, Hkv, Tk, ...]."""
        row = self.key_row[:, part]
        return x.flatten(0, 2).index_select(0, row.flatten()).unflatten(0, row.shape)

    def logits(self, q: Tensor, k: Tensor, part: slice) -> Tensor:
        s = q @ k.mT * self.scale
        if self.k_bias is not None:
            s = s + self.keys(self.k_bias, part)[:, :, None]
        real = (self.pair[:, part] < self.pairs)[..., None].expand(-1, -1, -1, self.R).flatten(2, 3)
        slot = self.slot[:, part]
        key = self.k_index[self.batch, slot][:, :, None]
        query = self.rows(self.q_index, part)[..., None]
        ok = real[..., None] & self.exists[:, part, None] & (key >= 0)
        if self.causal:
            ok = ok & (key <= query)
        if self.window is not None:
            ok = ok & (query - key < self.window)
        if self.q_doc_ids is not None:
            ok = ok & (self.rows(self.q_doc_ids, part)[..., None] == self.k_doc_ids[self.batch, slot][:, :, None])
        return torch.where(ok, s, _NONE)

    def of_pairs(self, parts: list[Tensor], empty: float) -> Tensor:
        """[X, groups, M * R, ...] in chunks -> [X, N, n, R, ...], `empty` where a list has no block."""
        x = torch.cat(parts, 1).unflatten(2, (self.M, self.R)).flatten(1, 2)
        x = torch.cat([x, x.new_full((x.shape[0], 1, *x.shape[2:]), empty)], 1)
        return x[self.list_row[:, :, 0], self.place].unflatten(1, (-1, self.n))

    def forward(self) -> tuple[Tensor, Tensor]:
        outputs, lses = [], []
        for part in self.chunks():
            s = self.logits(self.rows(self.q, part), self.keys(self.k, part), part)
            top = s.amax(-1, keepdim=True)
            top = torch.where(top == _NONE, 0, top)
            p = (s - top).exp()
            total = p.sum(-1, keepdim=True)
            outputs.append(p @ self.keys(self.v, part) / torch.where(total == 0, 1, total))
            lses.append((top + total.log())[..., 0])
        o, lses = self.of_pairs(outputs, 0.0), self.of_pairs(lses, _NONE)
        top = lses.amax(2, keepdim=True)
        top = torch.where(top == _NONE, 0, top)
        weight = (lses - top).exp()
        total = weight.sum(2, keepdim=True)
        share = weight / torch.where(total == 0, 1, total)
        return (share[..., None] * o).sum(2), (top + total.log()).squeeze(2)

    def backward(
        self, o: Tensor, lse: Tensor, grad_o: Tensor, grad_lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        none = lse == _NONE
        # d logits = p * (grad_p - sum(grad_o * o) + grad_lse)
        shift = torch.where(none, 0, (grad_o * o).sum(-1) - grad_lse)
        lse = torch.where(none, 0, lse)
        flat_k, flat_v = (torch.zeros_like(x).flatten(0, 2) for x in (self.k, self.v))
        bias = None if self.k_bias is None else torch.zeros_like(self.k_bias).flatten()
        grad_q = []
        for part in self.chunks():
            q, do, k = self.rows(self.q, part), self.rows(grad_o, part), self.keys(self.k, part)
            p = (self.logits(q, k, part) - self.rows(lse, part)[..., None]).exp()
            ds = p * (do @ self.keys(self.v, part).mT - self.rows(shift, part)[..., None])
            grad_q.append(ds @ k * self.scale)
            row = self.key_row[:, part].flatten()
            flat_k = flat_k.index_add(0, row, (ds.mT @ q * self.scale).flatten(0, 2))
            flat_v = flat_v.index_add(0, row, (p.mT @ do).flatten(0, 2))
            if bias is not None:
                bias = bias.index_add(0, row, ds.sum(2).flatten())
        grad_q = self.of_pairs(grad_q, 0.0).sum(2).reshape(self.q_shape)
        bias = None if bias is None else bias.reshape(self.k_bias.shape)
        return grad_q, flat_k.reshape(self.k.shape), flat_v.reshape(self.v.shape), bias
