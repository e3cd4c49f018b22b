"""A composed model for transformers: its configuration, its cache, and the model with its head.

Never imported by the zoo: it is the root of the file that `zoo export` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from zoo.architectures.causal_lm import ModelState
from zoo.contract import positions_from
from zoo.graph.nodes import Builder
from zoo.graph.spec import Residual, Spec
from zoo.kernels.linear import Linear


class ZooConfig(PretrainedConfig):
    """Sizes, and the `graph`: nodes of the trunk and the final norm, each a mapping of the fields of `Spec`."""

    model_type = "block_zoo"

    def __init__(
        self,
        vocab_size: int = 1,
        hidden_size: int = 1,
        num_hidden_layers: int = 1,
        graph: Mapping[str, Any] | None = None,
        embedding_scale: float = 1.0,
        logit_scale: float = 1.0,
        logit_cap: float | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.graph = graph or {"trunk": [], "norm": None}
        self.embedding_scale, self.logit_scale, self.logit_cap = embedding_scale, logit_scale, logit_cap
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings


def spec_of(node: Mapping[str, Any]) -> Spec:
    """A node of the graph."""
    fields = dict(node)
    fields["children"] = tuple(spec_of(child) for child in node.get("children", ()))
    fields["order"] = tuple(node.get("order", ()))
    fields["residual"] = Residual(**node.get("residual", {}))
    for name in ("norm", "router"):
        fields[name] = spec_of(node[name]) if node.get(name) else None
    return Spec(**fields)


class ZooCache(Cache):
    """The streaming state of every layer, and how many tokens were read. It goes on only: a state does not know its
    past, so nothing can be cut off its end."""

    def __init__(self, state: ModelState):
        super().__init__(layers=[])
        self.state, self.length = state, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.length > 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state.reorder(beam_idx.to(self.state.seen.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.max_batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)

    def reset(self) -> None:
        self.state.reset()
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a cache of states cannot be cropped: a state does not know its past")

    @property
    def max_batch_size(self) -> int:
        return len(self.state.seen)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return []

    def __len__(self) -> int:
        return len(self.state.children)


class ZooForCausalLM(PreTrainedModel, GenerationMixin):
    """tokens [B, T] -> logits [B, T, V]: embedding, the layers of the graph, final norm, head."""

    config_class = ZooConfig
    _tied_weights_keys = {"lm_head.weight": "tok_embeddings.weight"}
    _is_stateful = True  # no assisted generation: it takes tokens back

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        builder = Builder(config.hidden_size, config.num_hidden_layers)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(builder.node(spec_of(node)) for node in config.graph["trunk"])
        norm = config.graph["norm"]
        self.norm = builder.component(spec_of(norm)) if norm else None
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        first = {id(p): name for name, p in self.layers.named_parameters()}
        every = self.layers.named_parameters(remove_duplicate=False)
        module: Any = self.layers
        # further names of weights that layers share, which save_pretrained leaves out
        module._tied_weights_keys = {f"{name}$": first[id(p)] for name, p in every if name != first[id(p)]}
        for module in self.layers.modules():
            if isinstance(getattr(module, "readout", None), tuple):  # so the head is no submodule of its own layer
                module.readout = tuple(m for m in (self.norm, self.lm_head) if m is not None)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tok_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lm_head = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Draw what no file gave; what one gave stays."""
        draw = getattr(module, "reset_own_parameters", None) or getattr(module, "reset_parameters", None)
        if isinstance(module, nn.Embedding):
            draw = partial(nn.init.normal_, module.weight, std=0.02)
        if draw is None:
            return
        given = [t for t in (*module.parameters(), *module.buffers()) if getattr(t, "_is_hf_initialized", False)]
        kept = [t.clone() for t in given]
        draw()
        for tensor, value in zip(given, kept, strict=True):
            tensor.copy_(value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """attention_mask: [B, T], 0 at padding in front of a row, or without a cache behind it; the tokens in a cache
        come before these. past_key_values: the cache of an earlier call. labels: [B, T] as input_ids, -100 where
        nothing is predicted."""
        use_cache = past_key_values is not None or bool(use_cache)
        shown = None if attention_mask is None else _shown(attention_mask, input_ids)
        cache = past_key_values
        if use_cache and not isinstance(cache, ZooCache):
            if cache is not None and cache.get_seq_length():
                raise ValueError(f"past_key_values is a {type(cache).__name__} that another model began")
            cache = ZooCache(self.init_state(len(input_ids)))
        if isinstance(cache, ZooCache):
            hidden = self.read(input_ids, cache.state, shown)
            cache.length += input_ids.shape[1]
        else:
            hidden = self.hidden(input_ids, None, None if shown is None else _documents(shown))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]
        return output if return_dict or return_dict is None else output.to_tuple()

    def hidden(self, tokens: Tensor, state: ModelState | None, doc_ids: Tensor | None) -> Tensor:
        """The normed stream [B, T, D] in front of the head."""
        x = self.tok_embeddings(tokens)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        positions = None
        if state is not None:
            positions = state.seen[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        elif doc_ids is not None:  # padding in front counts by itself
            positions = positions_from(doc_ids, tokens.shape[0], tokens.shape[1], tokens.device)
        for i, layer in enumerate(self.layers):
            x = layer(x, state=state and state.children[i], positions=positions, doc_ids=doc_ids)
        if state is not None:
            state.seen += tokens.shape[1]
        return x if self.norm is None else self.norm(x)

    def read(self, tokens: Tensor, state: ModelState, shown: Tensor | None) -> Tensor:
        """`hidden` of rows that may be padded in front. No state reads padding: rows go by their lengths."""
        if shown is None:
            return self.hidden(tokens, state, None)
        if not bool(shown[:, -1].all()):
            raise ValueError("beside a cache padding stands in front of a row: tokenizer.padding_side = 'left'")
        lengths = shown.sum(1)
        order, parts = [], []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            part = state.rows(rows)
            x = self.hidden(tokens[rows, -length:], part, None)
            state.put_rows(rows, part)
            order.append(rows)
            parts.append(F.pad(x, (0, 0, tokens.shape[1] - length, 0)))
        return torch.cat(parts)[torch.cat(order).argsort()]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the normed stream."""
        logits, cap = self.lm_head(hidden), self.config.logit_cap
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def init_state(self, batch_size: int, max_len: int | None = None) -> ModelState:
        """Streaming state for rows of up to `max_len` tokens (None: grows as needed)."""
        seen = torch.zeros(batch_size, dtype=torch.int64, device=self.tok_embeddings.weight.device)
        layers: Any = self.layers
        return ModelState(seen, [layer.init_state(batch_size, max_len) for layer in layers])

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int,
    ) -> Any:  # fmt: skip
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            rows = max(generation_config.num_beams, generation_config.num_return_sequences) * batch_size
            model_kwargs["past_key_values"] = ZooCache(self.init_state(rows))


def _shown(mask: Tensor, tokens: Tensor) -> Tensor | None:
    """Where the tokens [B, T] are none of padding; None where none is. ValueError where padding is inside a row."""
    if mask.dim() != 2 or mask.shape[1] < tokens.shape[1]:
        raise ValueError(f"attention_mask must be [B, T] with 0 at padding, got {tuple(mask.shape)}")
    shown = mask[:, -tokens.shape[1] :].bool()
    if bool(shown.all()):
        return None
    if bool((shown.long().diff(dim=1) > 0)[_begun(shown)[:, :-1]].any()):
        raise ValueError("attention_mask hides tokens inside a row; it may hide padding at its ends only")
    return shown


def _begun(shown: Tensor) -> Tensor:
    return shown.long().cummax(1).values.bool()


def _documents(shown: Tensor) -> Tensor | None:
    """Padding in front of a row as a document of its own; None where there is none in front."""
    begun = _begun(shown)
    return None if bool(begun.all()) else begun.long()
