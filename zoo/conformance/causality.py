"""The companions of the law: causality, packed documents, batch independence, positions."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.conformance.law import carries, streams
from zoo.conformance.report import Failure, check
from zoo.conformance.subject import Subject, cuts, finite, gradients, same, stream, tokens

EXACT = 1e-10  # fp64, the same sums in another order
TOLERANCE = 1e-8  # fp64, other formulas
DOCUMENTS = ((5, 1, 17, 1, 13, 33), (33, 1, 1, 2, 16, 17))  # lengths in row 0 and row 1, 70 tokens each


def documents() -> Tensor:
    """doc_ids [2, 70]: ids that are neither sorted nor counted from zero."""
    ids = torch.tensor([7, 3, 9, 4, 0, 12])
    return torch.stack([ids.repeat_interleave(torch.tensor(lengths)) for lengths in DOCUMENTS])


@check(kinds=("mixer",))
@torch.no_grad()
def mixes(subject: Subject) -> None:
    """A mixer moves information along the sequence (else the checks below would pass on nothing)."""
    block, x = subject.build(), tokens(2, 40)
    changed = x.clone()
    changed[:, 7] += 1
    if not (block(changed) - block(x))[:, 8:].abs().max() > 1e-6:
        raise Failure("changing token 7 changes no later output")


@check(needs=lambda r: r.causal)
@torch.no_grad()
def causal(subject: Subject) -> None:
    """The future changes nothing: outputs before a changed token stay."""
    block, x = subject.build(), tokens(2, 75)
    y, other = block(x), tokens(2, 75, seed=1)
    gaps = torch.arange(75).mul(2).expand(2, 75)
    y_gaps = block(x, positions=gaps)
    for t in (1, 2, 15, 16, 17, 32, 50, 64, 74):
        changed = torch.cat([x[:, :t], other[:, t:]], 1)
        same(block(changed)[:, :t], y[:, :t], EXACT, f"tokens {t}.. changed outputs before {t}")
        if t in (17, 64):
            got = block(changed, positions=gaps)[:, :t]
            same(got, y_gaps[:, :t], EXACT, f"with positions 0, 2, 4, ...: tokens {t}.. changed outputs before {t}")
            same(block(x[:, :t]), y[:, :t], TOLERANCE, f"the first {t} tokens alone")


@check()
def packing(subject: Subject) -> None:
    """Documents packed in one row behave as if alone, forward and gradient."""
    block, x, ids = subject.build(), tokens(2, 70), documents()
    weight = tokens(2, 70, seed=77)
    packed, got = gradients(block, x, doc_ids=ids)
    block.zero_grad(set_to_none=True)
    grad_x = torch.zeros_like(x)
    for row, lengths in enumerate(DOCUMENTS):
        start = 0
        for n in lengths:
            at = (slice(row, row + 1), slice(start, start + n))
            alone = x[at].clone().requires_grad_()
            y = block(alone)
            same(packed[at], y, TOLERANCE, f"row {row}, document of tokens {start}:{start + n}, packed against alone")
            (y * weight[at]).sum().backward()  # gradients of parameters add up over documents
            if alone.grad is not None:
                grad_x[at] = alone.grad
            start += n
    same(got["x"], grad_x, TOLERANCE, "gradient of x, packed against alone")
    for name, p in block.named_parameters():
        want = torch.zeros_like(p) if p.grad is None else p.grad
        same(got[name], want, TOLERANCE, f"gradient of {name}, packed against the sum over documents")


@check()
@torch.no_grad()
def documents_apart(subject: Subject) -> None:
    """Changing one document changes no other, and explicit positions of documents equal the default ones."""
    block, x, ids = subject.build(), tokens(2, 70), documents()
    y = block(x, doc_ids=ids)
    if subject.registration.causal:
        same(block(x[:, :23], doc_ids=ids[:, :23]), y[:, :23], TOLERANCE, "first three documents of row 0 alone")
    for document in (3, 9, 12):
        inside = ids == document
        changed = torch.where(inside[..., None], tokens(2, 70, seed=4), x)
        got = block(changed, doc_ids=ids)
        same(got[~inside], y[~inside], EXACT, f"changing document {document} changed others")
    inside = torch.cat([torch.arange(n) for lengths in DOCUMENTS for n in lengths]).view(2, 70)
    got = block(x, doc_ids=ids, positions=inside)
    same(got, y, EXACT, "positions given as 0.. in each document, against none given")
    same(block(x, doc_ids=torch.zeros_like(ids)), block(x), TOLERANCE, "one document over the row, against no doc_ids")


@check(needs=carries)
def packed_streaming(subject: Subject) -> None:
    """doc_ids together with a state is refused with a ValueError."""
    block = subject.build()
    try:
        block(tokens(1, 4), state=block.init_state(1, 8), doc_ids=torch.zeros(1, 4, dtype=torch.long))
    except ValueError:
        return
    raise Failure("doc_ids with a state was accepted; call refuse_packed_streaming(state, doc_ids)")


@check()
def batch_independence(subject: Subject) -> None:
    """A row's output depends on no other row of the batch."""
    block, x = subject.build(), tokens(4, 35).requires_grad_()
    y = block(x)
    with torch.no_grad():
        same(block(x[2:3]), y[2:3], TOLERANCE, "row 2 alone against row 2 in a batch of 4")
        changed = torch.cat([tokens(2, 35, seed=6), x[2:]])
        same(block(changed)[2:], y[2:], EXACT, "changing rows 0 and 1 changed rows 2 and 3")
    (gradient,) = torch.autograd.grad(y[1].square().sum(), x)
    if gradient[[0, 2, 3]].abs().max() > EXACT:
        raise Failure("the gradient of row 1's output reaches other rows")


@check()
@torch.no_grad()
def positions(subject: Subject) -> None:
    """Explicit positions 0.. equal none, and gathered tokens may keep their own positions."""
    block, x = subject.build(), tokens(2, 40)
    index = torch.arange(40).expand(2, 40)
    same(block(x, positions=index), block(x), EXACT, "positions 0, 1, 2, ... against none given")
    y = block(x, positions=index * 3 + 5)
    finite(y, "output at positions 5, 8, 11, ...")
    one = block(x[1:], positions=(index * 3 + 5)[1:])
    other = torch.stack([index[0], index[1] * 3 + 5])
    same(block(x, positions=other)[1:], one, TOLERANCE, "row 1 where row 0 stands at other positions")


@check(needs=streams)
@torch.no_grad()
def gathered_segments(subject: Subject) -> None:
    """Tokens gathered from a longer sequence, with their own positions, may be cut anywhere too."""
    block, x = subject.build(), tokens(2, 37)
    steps = torch.randint(1, 6, (2, 37), generator=torch.Generator().manual_seed(2))
    where = steps.cumsum(1)  # increasing with gaps, different in each row
    whole = block(x, positions=where)
    for i, parts in enumerate(cuts(37, 2, seed=1)):
        state = block.init_state(2, (37, None, 50)[i % 3])
        got = stream(block, x, parts, state, where)
        short = parts if len(parts) < 12 else [*parts[:6], "..."]
        same(got, whole, TOLERANCE, f"gathered tokens cut into {short} against the whole")
