"""Relations on the cards of combinators: "loop(steps=1) == sequence()" is proven on small models."""

from __future__ import annotations

import torch
from torch import nn

import zoo
from zoo.conformance.causality import documents
from zoo.conformance.relations import TOLERANCE, parse
from zoo.conformance.report import Failure, check
from zoo.conformance.subject import DIM, Subject, same, stir

LAYER = [{"attention": {"num_heads": 4}}, {"swiglu": {"hidden_dim": 96}}]
VOCAB, LENGTH = 40, 70


def _model(name: str, fields: dict) -> nn.Module:
    """A model of one node, whose body is two layers (copies of one in a repeat)."""
    node = {name: {"of": LAYER if name == "repeat" else [LAYER, LAYER], **fields}}
    return stir(zoo.build({"dim": DIM, "vocab_size": VOCAB, "trunk": [node]}).double())


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """In order, without those of the router, which the other side may lack."""
    return [p for name, p in model.named_parameters() if ".router." not in name]


@check(kinds=("combinator",), needs=lambda r: bool(r.relations), per_block=True)
def graph_relations(subject: Subject) -> None:
    """Each relation on a combinator's card holds, in training and in eval(), with documents and without."""
    for relation in subject.registration.relations:
        left, right = (_model(name, dict(fields)) for name, fields in parse(relation))
        ours, theirs = _weights(left), _weights(right)
        if [p.shape for p in ours] != [p.shape for p in theirs]:
            raise Failure(f"{relation}: the two sides have other parameters")
        with torch.no_grad():
            for mine, other in zip(ours, theirs, strict=True):
                mine.copy_(other)
            x = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
            for training in (True, False):
                for ids in (None, documents()):
                    ours, theirs = (model.train(training)(x, doc_ids=ids) for model in (left, right))
                    same(ours, theirs, TOLERANCE, relation)
