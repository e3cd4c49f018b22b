"""Relations on the cards of combinators and routers: "loop(steps=1) == sequence()" is proven on small models."""

from __future__ import annotations

import torch
from torch import nn

import zoo
from zoo.conformance.causality import documents
from zoo.conformance.relations import TOLERANCE, fill, parse
from zoo.conformance.report import Failure, check
from zoo.conformance.subject import DIM, Subject, same, stir

LAYER = [{"attention": {"num_heads": 4}}, {"swiglu": {"hidden_dim": 96}}]
VOCAB, LENGTH = 40, 70
ADDED = (".router.", ".visits.", ".transformers.", ".in_proj.", ".out_proj.")  # what a combinator has beside its body


def _model(name: str, fields: dict) -> nn.Module:
    """A model of one node, whose body is two layers (copies of one in a repeat)."""
    node = {name: {"of": LAYER if name == "repeat" else [LAYER, LAYER], **fields}}
    return stir(zoo.build({"dim": DIM, "vocab_size": VOCAB, "trunk": [node]}).double())


def _pairs(left: nn.Module, right: nn.Module, told: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Parameters of the same name, of which the left side may have more; or, where the two sides name them
    differently, those of the bodies in their order."""
    ours, theirs = dict(left.named_parameters()), dict(right.named_parameters())
    if theirs.keys() <= ours.keys():
        return [(ours[name], p) for name, p in theirs.items()]
    mine, others = ([p for name, p in side.items() if not any(a in name for a in ADDED)] for side in (ours, theirs))
    if [p.shape for p in mine] != [p.shape for p in others]:
        raise Failure(f"{told}: the two sides have other parameters")
    return list(zip(mine, others, strict=True))


@check(kinds=("combinator", "router"), needs=lambda r: bool(r.relations), per_block=True)
def graph_relations(subject: Subject) -> None:
    """Each relation on the card of a combinator or a router holds, training and in eval(), with documents or none."""
    for relation in subject.registration.relations:
        parsed = parse(relation)
        left, right = (_model(name, dict(fields)) for name, fields in (parsed.left, parsed.right))
        with torch.no_grad():
            for mine, other in _pairs(left, right, relation):
                mine.copy_(other)
            fill(left, parsed)
            x = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
            for training in (True, False):
                for ids in (None, documents()):
                    ours, theirs = (model.train(training)(x, doc_ids=ids) for model in (left, right))
                    same(ours, theirs, TOLERANCE, relation)
