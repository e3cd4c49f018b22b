"""Relations on the card: "gla(gate='none') == linear_attention()" is proven, not believed."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import torch

from zoo.conformance.causality import documents
from zoo.conformance.report import Failure, check
from zoo.conformance.subject import Subject, same, tokens
from zoo.errors import ConfigError
from zoo.registry import Registration, load

TOLERANCE = 1e-9  # fp64


def parse(relation: str) -> tuple[tuple[str, Mapping[str, Any]], tuple[str, Mapping[str, Any]]]:
    """("gla", {"gate": "none"}), ("linear_attention", {}) of the example above."""
    try:
        tree = ast.parse(relation, mode="eval").body
        match tree:
            case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
                return _call(left), _call(right)
    except (SyntaxError, ValueError, TypeError) as error:
        raise Failure(f"relation {relation!r} cannot be read: {error}") from None
    raise Failure(f"relation {relation!r} is no equation 'name(option=value) == name(option=value)'")


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    match node:
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords) if all(k.arg for k in keywords):
            return name, {str(k.arg): ast.literal_eval(k.value) for k in keywords}
    raise ValueError(f"'{ast.unparse(node)}' is no call with keyword options")


def _full_name(subject: Subject, name: str) -> str:
    """In a stranger's module, names mean the blocks of that module first."""
    module, foreign, _ = subject.name.rpartition(":")
    try:
        load(full := f"{module}:{name}" if foreign else name)
        return full
    except ConfigError:
        return name


def prove(subject: Subject, relation: str) -> None:
    """Build both sides, copy the right side's weights into the left by name, compare outputs."""
    sides = []
    for name, options in parse(relation):
        name = _full_name(subject, name)
        registration: Registration = load(name).zoo_registration  # type: ignore[attr-defined]
        sides.append(Subject(name, registration, options).build())
    left, right = sides
    weights = dict(left.named_parameters())
    with torch.no_grad():
        for name, p in right.named_parameters():
            if name not in weights or weights[name].shape != p.shape:
                found = "is missing" if name not in weights else f"has shape {tuple(weights[name].shape)}"
                raise Failure(f"{relation}: {name} {tuple(p.shape)} of the right side {found} on the left")
            weights[name].copy_(p)
        x, ids = tokens(2, 70), documents()
        same(left(x), right(x), TOLERANCE, relation)
        same(left(x, doc_ids=ids), right(x, doc_ids=ids), TOLERANCE, f"{relation}, packed documents")


@check(needs=lambda r: bool(r.relations), per_block=True)
def relations(subject: Subject) -> None:
    """Each relation on the card holds."""
    for relation in subject.registration.relations:
        prove(subject, relation)
