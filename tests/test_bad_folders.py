"""Folders that somebody made to do harm: one message, exit code 2, nothing run, nothing written."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.cli import main
from zoo.convert import from_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OURS = {"name": "tiny", "dim": 32, "vocab_size": 40, "trunk": [{"mlp": {"hidden_dim": 24}}]}
TEXT = "name: tiny\ndim: 32\nvocab_size: 40\ntrunk: [{mlp: {hidden_dim: 24}}]\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("folders")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=40))
    model.save_pretrained(root / "one")
    model.save_pretrained(root / "many", max_shard_size="20KB")
    zoo.build(OURS).save_pretrained(root / "ours")
    return root


class Executed:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def text(name, content):
    def change(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def header(content, data=b""):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return text(WEIGHTS, struct.pack("<Q", len(raw)) + raw + data)


def config(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def placed(file):
    """One tensor is said to be in this file; None: in that of another."""

    def change(folder):
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["model.norm.weight"] = file or min(index["weight_map"].values())
        (folder / INDEX).write_text(json.dumps(index))

    return change


def twice(folder):
    first, *_, last = sorted(folder.glob("model-*"))
    save_file(load_file(last) | load_file(first), last)


def tensors(change):
    def rewrite(folder):
        save_file({n: change(n, t) for n, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)

    return rewrite


def pickled(folder):
    (folder / WEIGHTS).write_bytes(pickle.dumps(Executed(folder.parent / "executed")))


def python(folder):
    config(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil")(folder)
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'executed')!r}, 'w')")


DEEP = "[" * 100_000 + "]" * 100_000
FLOATS = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
IMPORTED = {
    "nothing": ("one", text("config.json", ""), "is no JSON"),
    "list": ("one", text("config.json", "[1]"), "holds no JSON object"),
    "deep": ("one", text("config.json", DEEP), "is no JSON"),
    "no text": ("one", text("config.json", b"\xff\xfe\0"), "is no JSON"),
    "not a number": ("one", text("config.json", '{"rms_norm_eps": NaN}'), "NaN is no number"),
    "type": ("one", config(model_type=["llama"]), "cannot be converted"),
    "python": ("one", python, "'evil' cannot be converted"),
    "layers": ("one", config(num_hidden_layers=10**9), "num_hidden_layers: 1000000000 is more than any model has"),
    "labels": ("one", config(num_labels=10**9), "num_labels: 1000000000 is more than any model has"),
    "vocabulary": ("one", config(vocab_size=2**63), "more than any memory holds"),
    "width": ("one", config(hidden_size=-32), "-32"),
    "heads": ("one", config(num_attention_heads=0), "not one of llama"),
    "head": ("one", config(head_dim=0), "builds no LlamaForCausalLM|head_dim"),
    "class": ("one", config(architectures=["pipeline"]), "names no model of type 'llama'"),
    "resolver": ("one", config(bos_token_id="${oc.env:HOME}"), "bos_token_id"),
    "pickled": ("one", pickled, "is damaged or no safetensors file"),
    "empty": ("one", text(WEIGHTS, b""), "is damaged or no safetensors file"),
    "long header": ("one", text(WEIGHTS, b"\xff" * 8 + b"{}"), "is damaged or no safetensors file"),
    "deep header": ("one", header(DEEP.encode()), "is damaged or no safetensors file"),
    "outside": ("one", header({"a": FLOATS}), "is damaged or no safetensors file"),
    "large": ("one", header({"a": FLOATS | {"shape": [2**40, 2**40]}}, b"0" * 16), "is damaged or no safetensors file"),
    "no tensor": ("one", header({}), "holds no tensor"),
    "parent": ("many", placed("../../../etc/passwd"), "is no safetensors file of its folder"),
    "absolute": ("many", placed("/etc/x.safetensors"), "is no safetensors file of its folder"),
    "number": ("many", placed(5), "names 5, which is no safetensors file"),
    "null byte": ("many", placed("a\0.safetensors"), "is no safetensors file of its folder"),
    "long name": ("many", placed("a" * 5000 + ".safetensors"), "is no safetensors file of its folder"),
    "twice": ("many", twice, "again, which is in model-00001"),
    "elsewhere": ("many", placed(None), "that they do not: model.norm.weight"),
    "no map": ("many", text(INDEX, '{"weight_map": [1]}'), "has no weight_map"),
}  # fmt: skip
BOMB = "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(12))
SAVED = {
    "bomb": (text("config.yaml", TEXT + "define:\n" + BOMB), "aliases expand to more than"),
    "tag": (text("config.yaml", TEXT + "origin: !!python/object/apply:os.system [touch executed]\n"), "is not allowed"),
    "resolver": (text("config.yaml", TEXT + "origin: {source: '${oc.env:HOME}'}\n"), "resolvers .* are not allowed"),
    "cycle": (text("config.yaml", TEXT + "origin: &a [*a]\n"), "contains itself"),
    "deep": (text("config.yaml", "a: " + "[" * 5000 + "]" * 5000), "nested deeper"),
    "vocabulary": (text("config.yaml", TEXT.replace("40", str(2**62))), "more than any memory holds"),
    "hidden": (text("config.yaml", TEXT.replace("24", str(10**12))), "do not fit the config; shape"),
    "number": (text("config.yaml", TEXT + f"logit_scale: {10**400}\n"), "logit_scale: must be a number"),
    "repeated": (text("config.yaml", TEXT.replace("{mlp", "{repeat: 1000000000, of: [mlp]}, {mlp")), "repeat"),
    "integers": (tensors(lambda n, t: t.to(torch.int8)), "do not fit the config; type: "),
    "one integer": (tensors(lambda n, t: t.bool() if n == "norm.weight" else t), "type: norm.weight"),
    "pickled": (pickled, "is damaged or no safetensors file"),
    "cut": (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-9]), "is damaged or no safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPORTED)
def test_import(name, folders, tmp_path, capsys):
    kind, change, words = IMPORTED[name]
    refused(folders / kind, change, words, tmp_path, capsys, "import", "model", "--out", "out")


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("command", [("export", "model", "--out", "out"), ("store", "add", "out", "model")])
def test_saved(name, command, folders, tmp_path, capsys):
    refused(folders / "ours", *SAVED[name], tmp_path, capsys, *command)


@pytest.mark.parametrize(
    "content", ["{", "[]", b"\xff\xfe", DEEP, '{"model": {"type": "BPE", "vocab": 3}}'], ids=range(5)
)
def test_tokenizer(content, folders, tmp_path, capsys):
    change = text("tokenizer.json", content)
    refused(folders / "ours", change, "is not a `tokenizers` JSON file", tmp_path, capsys,
            "export", "model", "--out", "out")  # fmt: skip


def refused(folder, change, words, tmp_path, capsys, *command):
    shutil.copytree(folder, tmp_path / "model")
    change(tmp_path / "model")
    began = time.perf_counter()
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / word) if word in ("model", "out") else word for word in command])
    printed = capsys.readouterr()
    assert end.value.code == 2, printed
    assert time.perf_counter() - began < 20
    assert len(printed.err.splitlines()) == 1 and len(printed.err) < 500 + len(str(tmp_path)), printed.err
    assert re.search(words, printed.err), printed.err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_others_are_not_fetched(name, folders, tmp_path, monkeypatch):
    import transformers.integrations.hub_kernels as kernels

    def fetch(*args, **given):
        raise AssertionError("fetched")

    for function in [n for n in dir(kernels) if n.startswith(("load", "get_kernel", "lazy_load"))]:
        monkeypatch.setattr(kernels, function, fetch)
    shutil.copytree(folders / "one", tmp_path / "model")
    config(**{name: "somebody/kernels"})(tmp_path / "model")
    from_folder(tmp_path / "model")
