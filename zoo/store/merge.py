"""Several fine-tuned models in one: a learned coefficient for each node of each task vector (aTLAS, arXiv:2407.02880).

A task vector is what fine-tuning added, tau_i = theta_i - theta_0. Node n of the merged model has the weights
theta_0[n] + sum_i c[i, n] tau_i[n], and c, a few numbers in all, is learned by gradient on batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor
from torch.func import functional_call

from zoo.errors import ConfigError, Problem
from zoo.graph.loader import load_graph
from zoo.store.nodes import Saved, StoredNode, difference


@dataclass(frozen=True)
class Merged:
    """The merged model; for every node that a fine-tuning changed, the coefficient of each task vector; the loss of
    every batch before its step."""

    saved: Saved
    coefficients: Mapping[str, tuple[float, ...]]
    losses: tuple[float, ...]


def next_token_loss(model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each token [B, T] given those before it."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def merge(
    base: Saved,
    models: Sequence[Saved],
    batches: Iterable[Any],
    *,
    lr: float = 0.05,
    loss: Callable[[Callable[..., Tensor], Any], Tensor] = next_token_loss,
) -> Merged:
    """Merge models that were fine-tuned from `base`; one step of Adam a batch, from all coefficients zero, which is
    `base`. loss(model, batch): what is to be small. ConfigError where a node of a model is not that of the base."""
    vectors = {path: _task_vectors(path, node, models) for path, node in base.nodes.items()}
    _same_nodes(base, models)
    vectors = {path: taus for path, taus in vectors.items() if any(t.any() for tau in taus for t in tau.values())}
    learned = {path: torch.zeros(len(models), requires_grad=True) for path in vectors}
    if not learned:
        raise ConfigError("no model differs from the base: there is nothing to merge")
    model, losses = base.model().requires_grad_(False), []
    adam = torch.optim.Adam(learned.values(), lr=lr)
    for batch in batches:
        moved = {f"{p}.{n}": t for p, c in learned.items() for n, t in _moved(base.nodes[p], vectors[p], c).items()}
        value = loss(lambda *given, moved=moved: functional_call(model, moved, given), batch)
        losses.append(float(value.detach()))
        adam.zero_grad()
        value.backward()
        adam.step()
    with torch.no_grad():
        nodes = {
            path: replace(node, tensors={**node.tensors, **_moved(node, vectors[path], learned[path])})
            if path in learned
            else node
            for path, node in base.nodes.items()
        }
    made = _licensed(replace(base, nodes=nodes), models)
    return Merged(made, {p: tuple(c.tolist()) for p, c in learned.items()}, tuple(losses))


def _licensed(made: Saved, models: Sequence[Saved]) -> Saved:
    """Under the licences of all that went in."""
    origins = [m.graph.document.get("origin") or {} for m in (made, *models)]
    licenses = " AND ".join(sorted({o["license"] for o in origins if o.get("license")}))
    if licenses == (origins[0].get("license") or ""):
        return made
    document = {**made.graph.document, "origin": {**origins[0], "license": licenses}}
    return replace(made, config=OmegaConf.to_yaml(OmegaConf.create(document)), graph=load_graph(document))


def _same_nodes(base: Saved, models: Sequence[Saved]) -> None:
    """ConfigError where a model has a node that the base lacks."""
    problems = [
        Problem("the base has no such node", where=path, file=str(model.place))
        for model in models
        for path in model.nodes.keys() - base.nodes.keys()
    ]
    if problems:
        raise ConfigError(problems)


def _task_vectors(path: str, node: StoredNode, models: Sequence[Saved]) -> list[dict[str, Tensor]]:
    """What each model adds to the numbers of a node. ConfigError where its node is another."""
    taus = []
    for model in models:
        theirs = model.nodes.get(path)
        if theirs is None or (why := difference(node, theirs)):
            said = "is missing" if theirs is None else f"is another block: {why}"
            raise ConfigError([Problem(f"{said}; only models of one configuration are merged", path, str(model.place))])
        floating = {n: t for n, t in node.tensors.items() if t.is_floating_point()}
        taus.append({n: _wide(theirs.tensors[n]) - _wide(t) for n, t in floating.items()})
    return taus


def _moved(node: StoredNode, taus: Sequence[Mapping[str, Tensor]], coefficients: Tensor) -> dict[str, Tensor]:
    """The tensors of a node, each task vector added by its coefficient, in the type that they have."""
    made = {}
    for name in taus[0]:
        start = node.tensors[name]
        made[name] = (_wide(start) + sum(c * tau[name] for c, tau in zip(coefficients, taus))).to(start.dtype)
    return made


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
