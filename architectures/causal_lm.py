"""Causal language model: embedding, the layers of the trunk, final norm, head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from zoo.architectures.model import Model, evaluating
from zoo.contract import Cost, Mode, State, part_cost, positions_from, refuse_packed_streaming
from zoo.graph.nodes import Builder, Leaf
from zoo.graph.spec import Graph
from zoo.kernels.attention import TwoCopies
from zoo.kernels.linear import Linear

WORTH_READING_ONCE = 64  # tokens that all prompts of a batch have in common


@dataclass
class ModelState(State):
    """Tokens seen per row [B], and one state per layer."""

    seen: Tensor
    children: list[State] = field(default_factory=list)


class CausalLM(Model):
    """tokens [B, T] int64 -> logits [B, T, V]; every layer a node of the graph it was built from.

    `layers` are ordinary modules; `config` is the resolved configuration as plain values. Embeddings are multiplied
    by `embedding_scale`; logits are cap tanh(logit_scale W h / cap), or without the cap logit_scale W h.
    """

    modes: ClassVar[tuple[Mode, ...]] = ("train", "prefill", "decode")
    embedding: ClassVar[str] = "tok_embeddings"
    rows: ClassVar[bool] = True
    chunked_loss: ClassVar[bool] = True

    def __init__(self, graph: Graph, *, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__(graph)
        builder = Builder(graph.dim, graph.num_layers, device, dtype)
        self.vocab_size = graph.vocab_size
        self.embedding_scale, self.logit_scale, self.logit_cap = (
            graph.embedding_scale,
            graph.logit_scale,
            graph.logit_cap,
        )
        # given its weight, nn.Embedding draws none; on meta that draw would load torch's compiler, seconds
        table = torch.empty(graph.vocab_size, graph.dim, **builder.factory)
        self.tok_embeddings = nn.Embedding(graph.vocab_size, graph.dim, _weight=table)
        self._add_trunk(graph, builder)
        self.lm_head = Linear(graph.dim, graph.vocab_size, bias=False, **builder.factory)
        if graph.tie_embeddings:
            self.lm_head.weight = self.tok_embeddings.weight
        module: Any
        for module in self.modules():
            if isinstance(getattr(module, "readout", None), tuple):  # so the head is no submodule of its own layer
                module.readout = tuple(m for m in (self.norm, self.lm_head) if m is not None)

    # --------------------------------------------------------------------------------- parameters
    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        tied = self._tied
        super().to_empty(device=device, recurse=recurse)
        if tied:
            self.lm_head.weight = self.tok_embeddings.weight
        return self

    @property
    def _tied(self) -> bool:
        both = self.lm_head is not None and self.tok_embeddings is not None  # a pipeline stage may lack either
        return both and self.lm_head.weight is self.tok_embeddings.weight

    def _own_draws(self) -> dict[str, Callable[[], None]]:
        return {"tok_embeddings": self._reset_embedding} | ({} if self._tied else {"lm_head": self._reset_head})

    def _reset_embedding(self) -> None:
        nn.init.normal_(self.tok_embeddings.weight, std=0.02)

    def _reset_head(self) -> None:
        nn.init.normal_(self.lm_head.weight, std=self.dim**-0.5)

    # ------------------------------------------------------------------------------------ forward
    def forward(self, tokens: Tensor, state: ModelState | None = None, doc_ids: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]. state: from `init_state`, updated in place. doc_ids: [B, T], packed documents."""
        return self.head(self.hidden(tokens, state, doc_ids))

    def hidden(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        doc_ids: Tensor | TwoCopies | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The normed stream [B, T, D] in front of the head. positions: [B, T], where they are not 0.. per document."""
        refuse_packed_streaming(state, doc_ids)
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} {tuple(tokens.shape)}")
        if state is not None and len(state.seen) != len(tokens):
            raise ValueError(f"the state is of {len(state.seen)} rows, the tokens are {tuple(tokens.shape)}")
        if isinstance(doc_ids, Tensor) and doc_ids.shape != tokens.shape:
            raise ValueError(f"doc_ids {tuple(doc_ids.shape)} must be as the tokens, {tuple(tokens.shape)}")
        x = self.begin(tokens)
        if state is not None:
            positions = state.seen[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        elif isinstance(doc_ids, Tensor):
            positions = positions_from(doc_ids, tokens.shape[0], tokens.shape[1], tokens.device)
        for i, layer in enumerate(self.layers):
            x = layer(x, state=state and state.children[i], positions=positions, doc_ids=doc_ids)
        if state is not None:
            state.seen += tokens.shape[1]
        return x if self.norm is None else self.norm(x)

    def begin(self, tokens: Tensor) -> Tensor:
        """The stream in front of the first layer."""
        x = self.tok_embeddings(tokens)
        return x * self.embedding_scale if self.embedding_scale != 1 else x

    def end(self, x: Tensor) -> Tensor:
        """Logits of the stream behind the last layer."""
        return self.head(x if self.norm is None else self.norm(x))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the normed stream."""
        logits = self.lm_head(hidden)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return logits if self.logit_cap is None else self.logit_cap * torch.tanh(logits / self.logit_cap)

    def init_state(self, batch_size: int, max_len: int | None = None) -> ModelState:
        """Streaming state for rows of up to `max_len` tokens (None: grows as needed)."""
        seen = torch.zeros(batch_size, dtype=torch.int64, device=self.tok_embeddings.weight.device)
        return ModelState(seen, [layer.init_state(batch_size, max_len) for layer in self.layers])

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue tokens [B, T] by `max_new_tokens`; returns [B, T + new].

        temperature 0 takes the most likely token; otherwise tokens are drawn from the `top_k` best (all where
        None), reproducibly where a `seed` is given. What all prompts have in common at their beginning is read once.
        """
        new = list(self.stream(tokens, max_new_tokens, temperature, top_k=top_k, seed=seed))
        return torch.cat([tokens, *new], 1)

    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """The new tokens of `generate`, one [B, 1] at a time."""
        check_request(tokens, max_new_tokens, temperature)
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        state, tokens = self._begin(tokens, tokens.shape[1] + max_new_tokens)
        for _ in range(max_new_tokens):
            with evaluating(self):
                tokens, _ = draw(self.head(self.hidden(tokens, state)[:, -1:]), temperature, top_k, generator)
            yield tokens

    def _begin(self, tokens: Tensor, max_len: int) -> tuple[ModelState, Tensor]:
        """A state for rows of tokens [B, T], and those that it has yet to read, at least one a row: a long beginning
        that all rows have in common is read once, in one row."""
        rows, common = len(tokens), 0
        if rows > 1:
            common = int((tokens[:, :-1] == tokens[:1, :-1]).all(0).cumprod(0).sum())
        if common < WORTH_READING_ONCE:
            return self.init_state(rows, max_len), tokens
        state = self.init_state(1, max_len)
        with evaluating(self):
            self.hidden(tokens[:1, :common], state)
        state.reorder(torch.zeros(rows, dtype=torch.int64, device=tokens.device))
        return state, tokens[:, common:]

    # --------------------------------------------------------------------------------------- cost
    def ends(self, batch_size: int, seq_len: int, mode: Mode) -> Iterator[Leaf]:
        tokens, item = batch_size * seq_len, self.tok_embeddings.weight.element_size()
        stream, table = tokens * self.dim, self.tok_embeddings.weight.numel()
        # the rows of the tokens are read, and in training their gradients written
        looked_up = stream * item * (2 if mode == "train" else 1)
        rows = Cost(table, table, bytes_read=looked_up, bytes_written=looked_up)
        yield Leaf("tok_embeddings", "embedding", rows, self.tok_embeddings)
        yield from self._norm_leaf(stream, mode)
        logits = tokens * self.vocab_size
        # the head's input, logits as the loss keeps them, and where they are capped the tangent's
        kept = stream + logits * (1 if self.logit_cap is None else 2)
        head = part_cost(mode, item, flops=2 * tokens * table, read=table + stream, written=logits, kept=kept)
        own = 0 if self._tied else table
        head = head.replace(params=own, active_params=own)
        yield Leaf("lm_head", "head (tied)" if self._tied else "head", head, self.lm_head)


def check_request(tokens: Tensor, max_new_tokens: int, temperature: float) -> None:
    """Raise ValueError where nothing can be generated from these."""
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must be [B, T] with T >= 1, got {tuple(tokens.shape)}")
    if temperature < 0 or max_new_tokens < 0:
        raise ValueError("temperature and max_new_tokens must not be negative")


def draw(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """A token for each of logits [B, T, V], and the probability it was drawn with (at temperature 0 that of 1)."""
    if temperature == 0:
        best = logits.max(-1)
        return best.indices, (best.values - logits.logsumexp(-1)).exp()
    if top_k is not None:
        worst = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    p = (logits.float() / temperature).softmax(-1)
    tokens = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2])
    return tokens, p.gather(-1, tokens[..., None]).squeeze(-1)
