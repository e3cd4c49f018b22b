"""The validated, immutable form of a configuration: a tree of `Spec`s under a `Graph`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from zoo.schema import Range
from zoo.sections import VisionSection


@dataclass(frozen=True)
class Residual:
    """How a block's output joins the stream: pre x + f(n x), post n(x + f(x)), normed n x + f(n x), sandwich
    x + n'(f(n x)), pre_post n'(x + f(n x)), none f(n x). `scale` multiplies the output of f, fixed or learned from
    that start (per channel: layer scale, arXiv:2103.17239); `skip` multiplies the stream beside it, in the styles that
    norm it: post (DeepNorm), normed (MiniMax-01), pre_post. `drop_path` is the share of rows that go without f in
    training (stochastic depth, arXiv:1603.09382); in the other rows it is 1 / (1 - drop_path) as large."""

    style: Literal["pre", "post", "normed", "sandwich", "pre_post", "none"] = "pre"
    scale: float | None = None
    learn: Literal["none", "scalar", "channel"] = "none"
    skip: float = 1.0
    drop_path: Annotated[float, Range(ge=0, lt=1)] = 0.0


@dataclass(frozen=True)
class Spec:
    """One node: a block with its residual, or a combinator with its children.

    `path` is the place in the document, `label` the definition it came from, `share` the name under which its
    parameters are shared, `layer_index` the number of mixers before it, `width` the stream's width from here on
    inwards where it is another than outside, `router` what decides: a router, or a hierarchy's chunker.
    """

    name: str
    path: tuple[Any, ...] = ()
    kind: str = "combinator"
    options: Mapping[str, Any] = field(default_factory=dict)
    children: tuple[Spec, ...] = ()
    norm: Spec | None = None
    router: Spec | None = None
    residual: Residual = Residual()
    order: tuple[int, ...] = ()
    label: str = ""
    share: str | None = None
    layer_index: int = 0
    width: int | None = None

    def with_(self, **changes: Any) -> Spec:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def walk(self) -> Iterator[Spec]:
        """This node and all below it, in document order."""
        yield self
        for child in self.children:
            yield from child.walk()

    def widths(self, dim: int) -> Iterator[tuple[Spec, int]]:
        """The same walk, each node with the width of its stream; `dim` is the width around this node."""
        dim = self.width or dim
        yield self, dim
        for child in self.children:
            yield from child.widths(dim)

    @property
    def is_layer(self) -> bool:
        """Whether this is a plain list of residual blocks."""
        return self.name == "sequence" and all(c.kind != "combinator" for c in self.children)


@dataclass(frozen=True)
class Graph:
    """A whole model. `document` is the resolved configuration as plain values; `vocab_size` is 0 and `vision` None
    where the architecture has no such thing."""

    name: str
    architecture: str
    dim: int
    vocab_size: int
    trunk: tuple[Spec, ...]
    norm: Spec | None
    tie_embeddings: bool = True
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    num_layers: int = 1
    vision: VisionSection | None = None
    document: Mapping[str, Any] = field(default_factory=dict)

    @property
    def interface(self) -> str:
        """In words, what the model reads and tells."""
        if self.vision is None:
            return f"vocabulary {self.vocab_size}"
        image = f"{self.vision.image_size} x {self.vision.image_size} pixels in patches of {self.vision.patch_size}"
        return f"{image}, {self.vision.num_classes or 'no'} classes"

    def walk(self) -> Iterator[Spec]:
        """Every node of the trunk."""
        for item in self.trunk:
            yield from item.walk()
