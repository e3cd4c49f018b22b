"""zoo push and zoo pull by the client of huggingface_hub, against a server on this machine; folders that are half
written, and licences along the way."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from hub_server import Hub

import zoo
from zoo.cli import main

SMALL = {"name": "small", "dim": 16, "vocab_size": 20, "trunk": [{"mlp": {"hidden_dim": 24}}]}


@pytest.fixture
def server(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")
    with Hub() as hub:
        monkeypatch.setattr("zoo.hub.connected", lambda: huggingface_hub.HfApi(endpoint=hub.url))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))  # nobody is logged in
        monkeypatch.setenv("HF_TOKEN", "")
        yield hub


@pytest.fixture
def run(capsys):
    def run(*args, code=0):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in args])
        printed = capsys.readouterr()
        assert (end.value.code or 0) == code, printed
        return printed

    return run


def test_there_and_back(server, run, tmp_path):
    saved = zoo.build(SMALL).save_pretrained(tmp_path / "m")
    told = json.loads(run("push", saved, "me/small", "--license", "mit", "--json").out)
    assert told["files"] == ["README.md", "config.yaml", "model.safetensors"] == sorted(server.repos["me/small"])
    assert server.repos["me/small"]["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    assert sum("/large/" in page for page in server.asked) == 1  # weights go by themselves, before the one commit
    assert [page for page in server.asked if "/commit/" in page] == ["POST /api/models/me/small/commit/main"]
    server.repos["me/small"] |= {"evil.py": b"raise SystemExit", "old.bin": b"pickled"}
    server.asked.clear()
    told = json.loads(run("pull", "me/small", "--out", tmp_path / "back", "--json").out)
    assert (told["license"], told["left_out"]) == ("mit", ["evil.py", "old.bin"])
    assert not [page for page in server.asked if "evil" in page or "old.bin" in page]
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == sorted(told["files"])
    tokens = torch.arange(5)[None]
    assert torch.equal(zoo.from_pretrained(tmp_path / "back")(tokens), zoo.from_pretrained(saved)(tokens))
    said = run("pull", "me/nothing", "--out", tmp_path / "x", code=2).err
    assert said.startswith("there is no repository me/nothing") and len(said.splitlines()) == 1
    server.repos["me/small"]["model.safetensors"] = server.repos["me/small"]["model.safetensors"][:-9]
    assert "is damaged" in run("pull", "me/small", "--out", tmp_path / "x", code=2).err
    assert not (tmp_path / "x").exists()


@pytest.fixture
def theirs(tmp_path):
    """A model of transformers with a licence and what else lies beside weights."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=40)).save_pretrained(tmp_path / "in")
    (tmp_path / "in/README.md").write_text("---\nlicense: apache-2.0\n---\n# Theirs\n")
    for name in ("LICENSE", "NOTICE.txt", "chat_template.jinja"):
        (tmp_path / "in" / name).write_text(f"their {name}")
    return tmp_path / "in"


class Killed(BaseException):
    """The end of a process: nothing catches it."""


@pytest.mark.parametrize("command", ["import", "graft", "export"])
def test_what_is_killed_while_it_writes_is_no_model(command, theirs, run, tmp_path, monkeypatch):
    """At its first file, in the middle, and before the last one, which makes a folder a model."""
    run("import", theirs, "--out", tmp_path / "ours")
    given = {
        "import": ["import", theirs],
        "graft": ["graft", tmp_path / "ours", "layers.*.items.0.block", "gla"],
        "export": ["export", tmp_path / "ours"],
    }[command]
    run(*given, "--out", tmp_path / "whole")
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    for number in (0, len(names) // 2, len(names) - 1):
        left, out = [number], tmp_path / f"killed{number}"

        def before(function, left=left):
            def last(*args, **given):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return function(*args, **given)

            return last

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", before(os.replace))
            patch.setattr(shutil, "copyfile", before(shutil.copyfile))
            main([str(word) for word in (*given, "--out", out)])
        assert len([p for p in out.iterdir() if p.name in names]) == number
        with pytest.raises(zoo.ConfigError, match="there is no"):
            zoo.from_pretrained(out)
        assert not (out / "model.safetensors").exists()


def test_the_licence_goes_from_import_to_push(server, theirs, run, tmp_path):
    """Import, graft, export, push: who published the weights said under which terms, and they stay with them."""
    run("import", theirs, "--out", tmp_path / "ours")
    run("graft", tmp_path / "ours", "layers.*.items.0.block", "gla", "--out", tmp_path / "grafted")
    run("export", tmp_path / "grafted", "--out", tmp_path / "theirs")
    run("push", tmp_path / "theirs", "me/model")
    told = json.loads(run("pull", "me/model", "--out", tmp_path / "back", "--json").out)
    assert told["license"] == "apache-2.0"
    assert b"license: apache-2.0\n" in server.repos["me/model"]["README.md"]
    for folder in ("ours", "grafted", "theirs", "back"):
        assert (tmp_path / folder / "LICENSE").read_text() == "their LICENSE"
        assert (tmp_path / folder / "NOTICE.txt").read_text() == "their NOTICE.txt"
        assert zoo.from_pretrained(tmp_path / folder).config["origin"]["license"] == "apache-2.0"
    assert (tmp_path / "theirs/chat_template.jinja").exists()
    said = run("push", tmp_path / "theirs", "me/model", "--license", "mit", code=2).err
    assert "has more than one licence" in said
