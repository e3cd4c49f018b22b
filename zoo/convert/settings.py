"""The configuration of somebody else's model, read with account: what no one read is not lost silently."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from zoo.errors import ConfigError, Problem

# what changes no number of an evaluated model: names, tokens, training, bookkeeping of the library
NEUTRAL = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
        "attention_dropout", "attention_probs_dropout_prob", "attn_implementation", "auto_map", "bos_token_id",
        "chunk_size_feed_forward", "classifier_dropout", "dtype", "embd_pdrop", "eos_token_id", "finetuning_task",
        "hidden_dropout", "hidden_dropout_prob", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
        "is_llama_config", "keys_to_ignore_at_inference", "label2id", "max_position_embeddings", "max_sequence_length",
        "max_window_layers", "model_type", "output_attentions", "output_hidden_states", "output_router_logits",
        "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "router_aux_loss_coef",
        "router_jitter_noise", "sep_token_id", "task_specific_params", "tie_encoder_decoder", "tokenizer_class",
        "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "unsloth_fixed",
        "unsloth_version", "use_cache",
    }
)  # fmt: skip


# what makes plain weights of quantised ones, by the method that made them
DEQUANTISED = {
    "fp8": "quantization_config=FineGrainedFP8Config(dequantize=True))",
    "mxfp4": "quantization_config=Mxfp4Config(dequantize=True))",
    "bitsandbytes": "device_map='auto').dequantize()",
}


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """ConfigError where the weights of a configuration are not numbers but codes of them, with the way out."""
    kind = config.get("quantization_config") or {}
    if not kind:
        return
    method = str(kind.get("quant_method", "an unnamed method"))
    out = "give a folder of plain weights"
    if method in DEQUANTISED:
        call = f"AutoModelForCausalLM.from_pretrained(FOLDER, {DEQUANTISED[method]}"
        out = f"let transformers dequantise them and give the model to zoo.convert.from_hf: {call}"
    raise ConfigError(
        [Problem(f"weights quantised by {method} are not read; {out}", file=str(config.get("model_type", "")))]
    )


class Settings:
    """Values of a configuration as attributes; `check_unread` refuses those that nobody asked for.

    context: how many tokens the importer wants to read, for models whose angles depend on it.
    """

    def __init__(self, values: Mapping[str, Any], context: int | None = None):
        self._values = json.loads(json.dumps(values, default=str))  # plain, as a file would hold them
        self._read: set[str] = set()
        self._context, self._context_read = context, False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"the configuration has no {name}")
        self._read.add(name)
        return self._values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """A value that may be absent or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def expect(self, **wanted: Any) -> None:
        """Refuse a configuration in which one of these has another value. A tuple lists those that will do."""
        for name, value in wanted.items():
            if name not in self._values:
                continue
            allowed = value if isinstance(value, tuple) else (value,)
            if self.get(name) not in allowed:
                raise self.refused(f"{name}: {self.get(name)!r}", "can be " + " or ".join(map(repr, allowed)))

    def context(self, feature: str, choices: str) -> int:
        """The length that the importer named, for a feature that depends on the length of the text."""
        if self._context is None:
            why = "its angles depend on the length of the text. Name one by context=N (zoo import --context N)"
            raise self.refused(f"{feature} of any length", f"{why}: {choices}")
        self._context_read = True
        return self._context

    def refused(self, feature: str, why: str) -> ConfigError:
        """The error for a feature that the graph cannot represent."""
        return ConfigError(
            [Problem(f"{feature} cannot be represented; {why}", file=self._values.get("model_type", ""))]
        )

    def check_unread(self) -> None:
        """Refuse settings that the family does not know, and a context it does not need: nothing is dropped
        silently."""
        if self._context is not None and not self._context_read:
            raise self.refused(f"context={self._context}", "the model is the same at every length: leave it out")
        unknown = sorted(k for k in self._values.keys() - self._read - NEUTRAL if self._values[k] is not None)
        if unknown:
            values = ", ".join(f"{k}: {self._values[k]!r}" for k in unknown)
            raise self.refused(values, "the mapping does not know it; take it out of config.json if it says nothing")

    def as_dict(self) -> dict[str, Any]:
        """All values."""
        return dict(self._values)
