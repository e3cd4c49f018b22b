"""torchtitan's loader of Hugging Face datasets, with our tokenizer, split and packing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset

from zoo.errors import ConfigError
from zoo.train.hub import HubRows, reading
from zoo.train.tokenizer import Tokenizer

_NAME = "zoo"  # under which torchtitan finds the dataset


class _Dataset(HuggingFaceTextDataset):
    """A document is `end`, its tokens, `end`; inputs and labels are shifted inside of it, so every token is a label
    once. Held-out texts are passed over here: `datasets` forgets its place in a stream that it filters itself."""

    def __init__(self, rows: HubRows, **given: Any):
        self.rows = rows
        DATASETS[_NAME] = DatasetConfig(
            path=rows.source,
            loader=lambda path: rows.open(),
            sample_processor=lambda record: record[rows.text_key],
        )
        super().__init__(_NAME, None, _Encoder(rows.tokenizer), infinite=True, **given)

    def _get_data_iter(self) -> Iterator[dict[str, Any]]:
        return filter(self.rows.trains_on, super()._get_data_iter())


class HubLoader(ParallelAwareDataloader):
    """The state is the place in the stream, and what was read and not yet given out; each rank has its own."""

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        rows: HubRows
        with_labels: bool  # also for the model

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **unused: Any
    ):
        self.rows, self.with_labels = config.rows, config.with_labels
        dataset = _Dataset(config.rows, seq_len=seq_len, dp_rank=dp_rank, dp_world_size=dp_world_size)
        super().__init__(dataset, dp_rank, dp_world_size, batch_size=local_batch_size)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        with reading(self.rows.source):
            for given, labels in super().__iter__():
                # positions begin at 0 in every document
                more = {"doc_ids": (given["positions"] == 0).cumsum(1)} if self.rows.doc_ids else {}
                more |= {"labels": labels} if self.with_labels else {}
                yield {"input": given["input"]} | more, labels

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and state["world_size"] != self.dp_world_size:
            raise ConfigError(
                f"{self.rows.source} was read by {state['world_size']} data ranks: a streamed dataset goes on with as "
                f"many, not with {self.dp_world_size}; its files, prepared by zoo data prepare, with any number"
            )
        super().load_state_dict(state)


class _Encoder(BaseTokenizer):
    """Our tokenizer as torchtitan's loader calls it."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer, self.eos_id = tokenizer, tokenizer.end

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        ids: np.ndarray = self.tokenizer.encode([text.encode("utf-8", "replace")])[0]
        return [self.tokenizer.end] * add_bos + ids.tolist() + [self.tokenizer.end] * add_eos

    def decode(self, ids: list[int], **unused: Any) -> str:
        return self.tokenizer.decode(ids)

    def get_vocab_size(self) -> int:
        return self.tokenizer.vocab_size
