"""The tokenizer of a run as the two files that AutoTokenizer reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.train.folder import tokenizer_of
from zoo.train.tokenizer import FileTokenizer, Tokenizer

END = "<|endoftext|>"


def tokenizer_of_export(run: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a run; None for a saved model that says nothing of one."""
    beside = any((run / folder / "tokenizer.json").is_file() for folder in ("", "model"))
    return tokenizer_of(run) if beside or config.get("data") else None


def tokenizer_files(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> dict[str, str]:
    """Names and contents of the files. settings: those of the tokenizer's own tokenizer_config.json, if it has one."""
    if isinstance(tokenizer, FileTokenizer):
        text = Path(tokenizer.path).read_text(encoding="utf-8")
        end = tokenizer.model.id_to_token(tokenizer.end)
    else:
        text, end = json.dumps(_bytes(), ensure_ascii=False, indent=1), END
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if end is not None:
        config |= {"eos_token": end, "bos_token": end, "pad_token": end}
    # generation reads padding only in front of a row
    config = (dict(settings) or config) | {"padding_side": "left"}
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, indent=2)}


def _bytes() -> dict[str, Any]:
    """A byte is its own id, 256 the end of a document: byte-level BPE without a merge."""
    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    plain = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False, "type": "ByteLevel"}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256, "content": END, **special}],
        "normalizer": None,
        "pre_tokenizer": plain,
        "post_processor": None,
        "decoder": plain,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocabulary | {END: 256}, "merges": [],
        },
    }  # fmt: skip


def _letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: itself where it can be printed."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]
