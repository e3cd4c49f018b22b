"""What replacing a module changes, tensor by tensor, before anything is changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import nn

from zoo import registry
from zoo.architectures.model import Model, seed_of
from zoo.contract import Block
from zoo.errors import ConfigError, Problem, did_you_mean
from zoo.graft.carry import carry, options_for
from zoo.graft.document import rewritten, sites_of
from zoo.graft.donor import Donor, donors
from zoo.graft.hosted import Hosted
from zoo.graph.loader import load_graph


@dataclass(frozen=True)
class Entry:
    """One tensor: `kept` has the same name and shape as `source` in the host, `mapped` is made of it, `new` is drawn,
    `dropped` is in the host and no longer used."""

    site: str
    tensor: str
    action: Literal["kept", "mapped", "new", "dropped"]
    shape: tuple[int, ...]
    source: str = ""


@dataclass
class Plan:
    """Replacements at `sites`. Nothing is changed before `apply`; `undo` puts the originals back, which are kept."""

    model: nn.Module
    block: str
    options: dict[str, dict[str, Any]]
    entries: list[Entry]
    donors: dict[str, Donor] = field(repr=False, default_factory=dict)
    originals: dict[str, nn.Module] = field(repr=False, default_factory=dict)
    blocks: dict[str, nn.Module] = field(repr=False, default_factory=dict)
    documents: tuple[Mapping[str, Any], ...] = field(repr=False, default=())  # of a zoo.Model, before and after

    @property
    def sites(self) -> list[str]:
        """Names of the modules that are replaced."""
        return list(self.options)

    @property
    def applied(self) -> bool:
        """Whether the blocks are in the model."""
        return bool(self.blocks) and all(self.model.get_submodule(s) is b for s, b in self.blocks.items())

    def counts(self) -> dict[str, int]:
        """Number of tensors by action."""
        return dict(Counter(e.action for e in self.entries))

    def apply(self, seed: int = 0) -> Self:
        """Put the blocks in; what is new in them is drawn from `seed` and the site's name."""
        for site in self.sites:
            original = self.model.get_submodule(site)
            if site not in self.blocks:
                like = next(original.parameters())
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed_of(seed, site))
                    block = registry.create(self.block, self.donors[site].dim, **self.options[site], dtype=like.dtype)
                carry(block, self.donors[site])
                block.to(like.device)
                self.originals[site] = original
                self.blocks[site] = block if isinstance(original, Block) else Hosted(block, original, site)
            self.blocks[site].train(original.training)
            _put(self.model, site, self.blocks[site])
            if isinstance(hosted := self.blocks[site], Hosted):
                hosted.attach(_around(self.model, site))
        if self.documents:
            self.model.config = self.documents[1]  # type: ignore[assignment]
        return self

    def undo(self) -> None:
        """Put the originals back. `apply` brings the blocks again, as they were left."""
        for site, original in self.originals.items():
            if isinstance(hosted := self.blocks[site], Hosted):
                hosted.detach()
            original.train(self.blocks[site].training)
            _put(self.model, site, original)
        if self.documents:
            self.model.config = self.documents[0]  # type: ignore[assignment]

    @contextmanager
    def original(self) -> Iterator[nn.Module]:
        """The model as it was, while inside."""
        self.undo()
        try:
            yield self.model
        finally:
            self.apply()

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of the blocks that were put in."""
        return [p for block in self.blocks.values() for p in block.parameters()]

    def __str__(self) -> str:
        lines = [f"{self.block} at {len(self.sites)} sites: " + ", ".join(f"{n} {a}" for a, n in self.counts().items())]
        for e in self.entries:
            source = f"  <- {e.source}" if e.source and e.action in ("kept", "mapped") else ""
            lines.append(f"{e.action:8}{e.site}.{e.tensor} {list(e.shape)}{source}")
        return "\n".join(lines)


def _put(model: nn.Module, site: str, module: nn.Module) -> None:
    parent, _, name = site.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _around(model: nn.Module, site: str) -> list[nn.Module]:
    """The modules that a site is in, the model first."""
    parts = site.split(".")[:-1]
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]


def matching(model: nn.Module, pattern: str) -> list[str]:
    """Names of modules that a pattern means; `*` stands for one part of a name, commas separate several patterns. In a
    `zoo.Model` the name of a block means all of its kind. ConfigError where there is none."""
    if "," in pattern:
        return list(dict.fromkeys(site for part in pattern.split(",") for site in matching(model, part.strip())))
    if isinstance(model, Model) and pattern in registry.list_blocks():
        blocks = [(spec.name, f"{name}.block") for spec, name in sites_of(model)]
        if not (found := [site for block, site in blocks if block == pattern]):
            have = ", ".join(dict.fromkeys(block for block, _ in blocks))
            raise ConfigError(f"the model has no block {pattern}; it has {have}")
        return found
    form = re.compile(r"[^.]+".join(map(re.escape, pattern.split("*"))))
    names = [n for n, _ in model.named_modules() if n]
    found = [n for n in names if form.fullmatch(n)]
    if not found:
        general = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", n) for n in names)
        raise ConfigError(f"no module of {type(model).__name__} is called {pattern}{did_you_mean(pattern, general)}")
    return found


def plan(model: nn.Module, pattern: str, block: str, **options: Any) -> Plan:
    """What `replace` would do. Options that both have (heads, rotary positions, norms) are taken over from the module
    that is replaced; `options` say what is different. ConfigError where the block cannot stand there."""
    registry.block_card(block)
    sites = matching(model, pattern)
    found = donors(model, sites)
    made = Plan(model, block, {}, [])
    for number, site in enumerate(sites):
        donor = found[site]
        if not donor.dim:
            kind = type(model.get_submodule(site)).__name__
            raise ConfigError(f"{site}: no weights of this {kind} tell how wide its input is")
        chosen = options_for(block, donor, options, (number, len(sites)))
        try:
            empty = registry.create(block, donor.dim, **chosen, device="meta")
        except ConfigError as error:
            raise ConfigError([Problem(p.message, p.where, file=site) for p in error.problems]) from None
        if not isinstance(empty, Block):
            raise ConfigError(f"{site}: {block} is a {registry.block_card(block).kind}, no block that maps x to y")
        made.options[site], made.donors[site] = chosen, donor
        made.entries += _entries(site, empty, donor)
    if isinstance(model, Model):
        made.documents = (model.config, rewritten(model, block, made.options))
        load_graph(dict(made.documents[1]))  # a configuration that cannot be built is refused now
    return made


def _entries(site: str, block: nn.Module, donor: Donor) -> list[Entry]:
    entries, carried = [], carry(block, donor)
    for name, tensor in block.state_dict().items():
        source, exactly = carried.get(name, ("", False))
        action = "kept" if exactly else "mapped" if source else "new"
        entries.append(Entry(site, name, action, tuple(tensor.shape), source))
    used = {part for source, _ in carried.values() for part in source.split(", ")}
    for name, tensor in donor.weights.items():
        if not used & set(donor.sources[name].split(", ")):
            entries.append(Entry(site, name, "dropped", tuple(tensor.shape), donor.sources[name]))
    return entries


def replace(model: nn.Module, pattern: str, block: str, **options: Any) -> Plan:
    """Put a block in the place of every module that `pattern` names, in anyone's model; returns the plan that was
    applied, which can be printed and undone.

    pattern: names as `named_modules` gives them, `*` for one part: "model.layers.*.self_attn"; several of them with
    commas between. Weights are carried over where they fit: projections of attention into linear mixers and selections;
    nothing else of the host is changed.
    """
    return plan(model, pattern, block, **options).apply()
