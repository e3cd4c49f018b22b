"""A main network on a shorter stream: encoder, chunking, main network, dechunking, decoder.

H-Net (arXiv:2507.07955), Block Transformer (arXiv:2406.02657). What a chunk is and how its result comes back to
the tokens is the chunker's part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from zoo.contract import Cost, DrawsItself, EmptyState, State, part_cost
from zoo.graph.nodes import Builder, Composite, Leaf, Node
from zoo.graph.spec import Spec
from zoo.registry import register


class Calls(NamedTuple):
    """How a part of the hierarchy is called: sizes, and how often (a share of the calls while decoding)."""

    batch_size: int
    seq_len: int
    context_len: int
    share: float = 1.0
    rows: int | None = None  # that a state is kept of, where it is not kept of all


class Chunker(nn.Module, metaclass=DrawsItself):
    """Shortens a stream of `dim` channels for a main network of `width` channels and brings the result back.

    `main` and `decoder` are nodes; `main` maps chunks [B, C, width] to the same shape, its norm included.
    """

    causal: bool = True
    assumption: str = ""  # what predicted costs take for granted

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.dim, self.width = dim, width

    def reset_parameters(self) -> None:
        """Draw every parameter."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, main: Node, decoder: Node, state: Any, positions: Tensor | None, doc_ids: Tensor | None
    ) -> Tensor:
        """The decoder's output [B, T, dim] for the encoder's output x [B, T, dim]."""
        raise NotImplementedError

    def init_state(self, main: Node, decoder: Node, batch_size: int, max_len: int | None) -> State:
        """The states of both parts and what the chunker carries."""
        raise NotImplementedError

    def calls(self, batch_size: int, seq_len: int, context_len: int, decode: bool) -> tuple[Calls, Calls]:
        """What predicted costs assume for the main network and for the decoder."""
        raise NotImplementedError

    def forward_flops(self, batch_size: int, seq_len: int, decode: bool) -> int:
        """Matrix FLOPs of the chunker itself."""
        raise NotImplementedError

    def vector_flops(self, batch_size: int, seq_len: int) -> int:
        """Work of the chunker itself outside matrix products."""
        return 0

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        """Elements that the chunker itself keeps for backward."""
        raise NotImplementedError

    def state_bytes(self, batch_size: int) -> int:
        """Bytes of what the chunker itself carries."""
        raise NotImplementedError


@dataclass
class HierarchyState(State):
    """State of the encoder; the chunker's holds those of the main network and the decoder."""

    encoder: State
    chunker: State


class _Normed(Node):
    """A node with a norm at its end; without a node it hands on the stream as it is."""

    def __init__(self, body: Node | None, norm: Any):
        super().__init__()
        self.body, self.norm = body, norm

    def forward(self, x, *, state: Any = None, positions=None, doc_ids=None):
        if self.body is None:
            return x
        y = self.body(x, state=state, positions=positions, doc_ids=doc_ids)
        return y if self.norm is None else self.norm(y)

    def init_state(self, batch_size, max_len=None):
        return EmptyState() if self.body is None else self.body.init_state(batch_size, max_len)

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        if self.body is None:
            return
        yield from self.body.leaves(batch_size, seq_len, context_len, mode, path)
        if self.norm is not None:
            weights = list(self.norm.parameters())
            own = sum(p.numel() for p in weights)
            tokens, item = batch_size * seq_len * self.norm.dim, weights[0].element_size()
            vector = self.norm.vector_flops * tokens
            kept = self.norm.activation_elements(batch_size * seq_len)
            cost = part_cost(mode, item, params=own, vector=vector, read=tokens, written=tokens, kept=kept)
            yield Leaf(f"{path}.norm", "norm", cost, self.norm)


@register("hierarchy", kind="combinator", paper="arXiv:2507.07955")
class Hierarchy(Composite):
    """A main network on chunks of the stream: x -> decoder(dechunk(main(chunk(encoder(x))))).

    Fields: `chunker`: dynamic_chunks (H-Net) or fixed_chunks (Block Transformer), the stream inside having the
    chunker's `width`; `encoder` (may be left out); `of`: the main network, which may hold a hierarchy itself;
    `decoder`. Encoder and main network end with the norm of their blocks; the decoder's end is normed by what
    stands around it: the main network's norm of an outer hierarchy, or the model's final norm.
    Useful: encoder and decoder on all tokens, the main network on as many chunks as the chunker expects.
    """

    def __init__(self, encoder: Node | None, main: Node, decoder: Node, chunker: Chunker, norms: list):
        super().__init__()
        self.encoder = _Normed(encoder, norms[0] if encoder is not None else None)
        self.chunker = chunker
        self.main = _Normed(main, norms[1])
        self.decoder: Any = decoder

    @staticmethod
    def parse(fields) -> Spec | None:
        parser = fields.parser
        chunker = fields.component("chunker", fields.take("chunker", "dynamic_chunks"))
        skip = Spec("skip", kind="skip")
        encoder = fields.body("encoder") if "encoder" in fields.values else skip
        before = parser.width
        width = parser.width = chunker.options.get("width", before) if chunker else before
        try:
            main = fields.body("of")
        finally:
            parser.width = before
        decoder = fields.body("decoder")
        fields.options()
        if chunker is None or encoder is None or main is None or decoder is None:
            return None
        children = (encoder, main.with_(width=width), decoder)
        return Spec("hierarchy", fields.path, children=children, norm=parser.default_norm, router=chunker)

    @classmethod
    def from_spec(cls, spec: Spec, builder: Builder) -> Hierarchy:
        encoder, main, decoder = spec.children
        chunker = builder.component(spec.router or Spec("dynamic_chunks"))  # the parser gives every one a chunker
        inside = builder.at_width(chunker.width)
        norms = [b.component(spec.norm) if spec.norm else None for b in (builder, inside)]
        # the parts are built in the order of the stream
        first = None if encoder.kind == "skip" else builder.node(encoder)
        return cls(first, inside.node(main), builder.node(decoder), chunker, norms)

    def forward(self, x, *, state: Any = None, positions=None, doc_ids=None):
        x = self.encoder(x, state=state and state.encoder, positions=positions, doc_ids=doc_ids)
        return self.chunker(x, self.main, self.decoder, state and state.chunker, positions, doc_ids)

    def init_state(self, batch_size, max_len=None):
        inside = self.chunker.init_state(self.main, self.decoder, batch_size, max_len)
        return HierarchyState(self.encoder.init_state(batch_size, max_len), inside)

    def leaves(self, batch_size, seq_len, context_len, mode, path=""):
        decode = mode == "decode"
        main, decoder = self.chunker.calls(batch_size, seq_len, context_len, decode)
        yield from self.encoder.leaves(batch_size, seq_len, context_len, mode, f"{path}.encoder".strip("."))
        yield self._chunker_leaf(batch_size, seq_len, mode, f"{path}.chunker".strip("."))
        for part, calls, name in ((self.main, main, "main"), (self.decoder, decoder, "decoder")):
            yield from _shared_out(part, calls, mode, f"{path}.{name}".strip("."))

    def _chunker_leaf(self, batch_size: int, seq_len: int, mode, path: str) -> Leaf:
        own = list(self.chunker.parameters())
        count, item = sum(p.numel() for p in own), own[0].element_size()
        tokens = batch_size * seq_len * self.chunker.dim
        flops = self.chunker.forward_flops(batch_size, seq_len, mode == "decode")
        state, vector = self.chunker.state_bytes(batch_size), self.chunker.vector_flops(batch_size, seq_len)
        # into and out of the chunks
        cost = part_cost(
            mode, item, params=count, flops=flops, vector=vector, read=2 * tokens, written=2 * tokens,
            kept=self.chunker.activation_elements(batch_size, seq_len), state_bytes=state,
        )  # fmt: skip
        return Leaf(path, type(self.chunker).zoo_registration.name, cost, self.chunker)  # type: ignore[attr-defined]


def _shared_out(part: Node, calls: Calls, mode, path: str) -> Iterator[Leaf]:
    batch_size, seq_len, context_len, share, rows = calls
    for leaf in part.leaves(batch_size, seq_len, context_len, mode, path):
        cost = leaf.cost.of_share(share)
        if rows is not None:
            dropped = cost.state_bytes - cost.state_bytes * rows // batch_size
            cost += Cost(bytes_written=-dropped, state_bytes=-dropped)
        yield Leaf(leaf.path, leaf.block, cost, leaf.module)
