"""Relations on the card: "gla(gate='none') == linear_attention()" is proven, not believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo import relation as text
from zoo.conformance.causality import documents
from zoo.conformance.report import Failure, check
from zoo.conformance.subject import Subject, same, tokens
from zoo.errors import ConfigError
from zoo.registry import Registration, load
from zoo.relation import Place, Relation

TOLERANCE = 1e-9  # fp64


def parse(relation: str) -> Relation:
    """As `zoo.relation.parse`; what cannot be read fails the check."""
    try:
        return text.parse(relation)
    except ValueError as error:
        raise Failure(str(error)) from None


def _full_name(subject: Subject, name: str) -> str:
    """In a stranger's module, names mean the blocks of that module first."""
    module, foreign, _ = subject.name.rpartition(":")
    try:
        load(full := f"{module}:{name}" if foreign else name)
        return full
    except ConfigError:
        return name


class First(nn.Module):
    """Returns its first input: in the place of a norm or a convolution."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return x


def skip(model: nn.Module, places: tuple[Place, ...]) -> set[Place]:
    """Put `First` where `places` say; returns those that were found."""
    found = [(place, name) for place in places for name, _ in model.named_modules() if name and place.names(name)]
    for _, name in found:
        model.set_submodule(name, First())
    return {place for place, _ in found}


def fill(model: nn.Module, relation: Relation, values: Mapping[str, Tensor] | None = None) -> set[int]:
    """Set what `at` names; `values` are the right side's parameters, without which only constants are set. Returns
    the numbers of the settings that found a parameter."""
    found = set()
    for number, (place, value) in enumerate(relation.settings):
        of_right = isinstance(value, Place) and value.name not in ("identity", "eye")
        if value == Place("identity") or (of_right and values is None):
            continue
        for name, p in (*model.named_parameters(), *model.named_buffers()):
            if not place.names(name):
                continue
            found.add(number)
            part = p[place.index] if place.index else p
            if not isinstance(value, Place):
                part.fill_(value)
            elif not of_right:
                part.copy_(torch.eye(*part.shape[-2:], dtype=p.dtype).expand_as(part))
            else:
                part.copy_(_value(value, values or {}, part.shape))
    return found


def _value(place: Place, values: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    named = [v for name, v in values.items() if place.names(name)]
    if len(named) != 1:
        raise Failure(f"the right side has {len(named)} parameters named {place}")
    value = named[0][place.index] if place.index else named[0]
    if value.shape != shape:
        raise Failure(f"{place} of the right side has shape {tuple(value.shape)}, its place {tuple(shape)}")
    return value


def adopt(left: nn.Module, right: nn.Module, relation: Relation, told: str) -> None:
    """Give `left` the parameters of `right` by name, and both what `at` says."""
    found = fill(right, relation)
    theirs, ours = dict(right.named_parameters()), dict(left.named_parameters())
    # what `at` sets on the right or puts elsewhere on the left need not have a place of the same name
    placed = [p for setting in relation.settings for p in setting if isinstance(p, Place)]
    for name, p in theirs.items():
        if name in ours and ours[name].shape == p.shape:
            ours[name].copy_(p)
        elif not any(place.names(name) for place in placed):
            lack = f"has shape {tuple(ours[name].shape)}" if name in ours else "is missing"
            raise Failure(f"{told}: {name} {tuple(p.shape)} of the right side {lack} on the left")
    found |= fill(left, relation, theirs)
    for number, (place, value) in enumerate(relation.settings):
        if value != Place("identity") and number not in found:
            raise Failure(f"{told}: neither side has a parameter named {place}")


def prove(subject: Subject, relation: str) -> None:
    """Build both sides, copy the right side's weights into the left by name, compare outputs."""
    sides, parsed = [], parse(relation)
    for name, options in (parsed.left, parsed.right):
        name = _full_name(subject, name)
        registration: Registration = load(name).zoo_registration  # type: ignore[attr-defined]
        sides.append(Subject(name, registration, options).build())
    left, right = sides
    if lost := set(parsed.skipped) - skip(left, parsed.skipped) - skip(right, parsed.skipped):
        raise Failure(f"{relation}: neither side has a module named {', '.join(map(str, lost))}")
    with torch.no_grad():
        adopt(left, right, parsed, relation)
        x, ids = tokens(2, 70), documents()
        same(left(x), right(x), TOLERANCE, relation)
        same(left(x, doc_ids=ids), right(x, doc_ids=ids), TOLERANCE, f"{relation}, packed documents")


@check(needs=lambda r: bool(r.relations), per_block=True)
def relations(subject: Subject) -> None:
    """Each relation on the card holds."""
    for relation in subject.registration.relations:
        prove(subject, relation)
