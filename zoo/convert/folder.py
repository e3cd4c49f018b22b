"""A folder of the Hugging Face Hub: config.json, weights in safetensors files, read without running anything in it."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoo.errors import ConfigError, Problem, ZooError, few

CONFIG, ONE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# what stands beside the weights and stays true of the converted model
BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "generation_config.json", "preprocessor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
_FILE = re.compile(r"[\w-][\w.-]{0,200}\.safetensors")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def refused(path: Path, message: str) -> ConfigError:
    """The error of a file or folder."""
    return ConfigError([Problem(message, file=str(path))])


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)  # infinities, which older versions of transformers wrote


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ConfigError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except FileNotFoundError:
        raise refused(path, "does not exist; is it the folder of a model?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise refused(path, f"is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise refused(path, "holds no JSON object")
    return value


def license_of(folder: Path) -> str:
    """The licence that the front matter of README.md names, or nothing."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        if not text.startswith("---"):
            return ""
        found = yaml.safe_load(text.split("---", 2)[1])
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return ""
    if not isinstance(found, dict):
        return ""
    name = found.get("license_name") if found.get("license") == "other" else None
    return str(name or found.get("license") or "")


def copy_beside(folder: Path, out: Path) -> list[str]:
    """Copy tokenizer, generation settings and licence texts into a new folder; their names."""
    found = beside(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in found:
            shutil.copyfile(path, out / path.name)
    except OSError as error:
        raise ZooError(f"cannot write {out}: {error.strerror or error}") from None
    return [path.name for path in found]


def beside(folder: Path) -> list[Path]:
    """Tokenizer, generation settings and licence texts of a folder."""
    return sorted({p for pattern in BESIDE for p in folder.glob(pattern) if p.is_file()})


class Weights:
    """The tensors of a folder by name. Each is read when it is asked for; one file is mapped into memory at a time.

    renamed: the name that a tensor is asked for by, None where it is not wanted. All files and headers are checked at
    the start. ConfigError names what is missing, damaged, pickled or quantised.
    """

    def __init__(self, folder: Path, renamed: Callable[[str], str | None] = str):
        self.folder = folder
        self._headers: dict[str, tuple[str, tuple[int, ...], str, str]] = {}  # file, shape, type and name in it
        self._mapped: tuple[str, Any] = ("", None)
        placed, found = self._placed(), dict[str, str]()  # files by tensor, as promised and as they are
        for name in sorted(set(placed.values())) or [ONE_FILE]:
            file = self._opened(self.folder / name)
            for tensor in file.keys():  # noqa: SIM118 (it is no mapping)
                if tensor in found:
                    raise refused(self.folder / name, f"holds {tensor} again, which is in {found[tensor]}")
                found[tensor] = name
                if (known_as := renamed(tensor)) is not None:
                    part = file.get_slice(tensor)
                    self._headers[known_as] = name, tuple(part.get_shape()), part.get_dtype(), tensor
        if odd := [t for t, name in placed.items() if found.get(t) != name]:
            raise refused(self.folder / INDEX, f"says what files hold that they do not: {few(odd)}")
        if not self._headers:
            raise refused(self.folder / ONE_FILE, "holds no tensor")

    def _placed(self) -> dict[str, str]:
        """Which file of several holds a tensor; empty where one file holds all."""
        if (self.folder / INDEX).is_file():
            index = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(index, dict) or not index:
                raise refused(self.folder / INDEX, "has no weight_map")
            for name in index.values():
                if not (isinstance(name, str) and _FILE.fullmatch(name)):
                    raise refused(
                        self.folder / INDEX, f"names {name!r:.99}, which is no safetensors file of its folder"
                    )
            return index
        if (self.folder / ONE_FILE).is_file():
            return {}
        if pickled := sorted(p.name for pattern in PICKLED for p in self.folder.glob(pattern)):
            raise refused(
                self.folder, f"has pickled weights ({pickled[0]}), which can run code when read; only safetensors are"
            )
        raise refused(self.folder, f"has no weights: neither {ONE_FILE} nor {INDEX}")

    def _opened(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise refused(path, f"is missing, though {INDEX} names it") from None
        except (SafetensorError, OSError) as error:
            raise refused(path, f"is damaged or no safetensors file: {error}") from None

    @property
    def names(self) -> list[str]:
        return list(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is not read."""
        return self._headers[name][1]

    def dtype(self) -> torch.dtype:
        """The type of most numbers. ConfigError where they are none that a model computes with."""
        counted: Counter[str] = Counter()
        for _, shape, dtype, _ in self._headers.values():
            counted[dtype] += torch.Size(shape).numel()
        if odd := sorted(counted.keys() - DTYPES.keys()):
            raise refused(self.folder, f"has quantised weights ({', '.join(odd)}); only float16 to float64 are read")
        return DTYPES[counted.most_common(1)[0][0]]

    def __call__(self, name: str) -> Tensor:
        """A tensor, read now."""
        file, *_, tensor = self._headers[name]
        if self._mapped[0] != file:
            self._mapped = file, self._opened(self.folder / file)
        try:
            return self._mapped[1].get_tensor(tensor)
        except SafetensorError as error:
            raise refused(self.folder, f"{name} cannot be read: {error}") from None
