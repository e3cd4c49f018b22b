"""zoo push and pull against a folder that plays the Hub."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import HfApi, errors

import zoo
from zoo import hub
from zoo.errors import ConfigError, ZooError

SMALL = {"name": "small", "dim": 16, "vocab_size": 20, "trunk": [{"mlp": {"hidden_dim": 24}}]}


class LocalHub:
    """The methods of HfApi that are used, on a folder."""

    def __init__(self, folder: Path):
        self.folder, self.commits = folder, []

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        self.private = private
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        self.commits.append(commit_message)

    def list_repo_files(self, repo_id, *, revision=None):
        if not (self.folder / repo_id).is_dir():
            raise errors.RepositoryNotFoundError("404\n\nmore", response=httpx.Response(404, request=REQUEST))
        top = self.folder / repo_id
        return [str(p.relative_to(top)) for p in top.rglob("*") if p.is_file()]

    def snapshot_download(self, repo_id, *, revision=None, local_dir, allow_patterns):
        for name in self.list_repo_files(repo_id):
            if any(fnmatch(name, p) for p in allow_patterns):
                (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / repo_id / name, Path(local_dir) / name)
        (Path(local_dir) / ".cache" / "huggingface").mkdir(parents=True)


REQUEST = httpx.Request("GET", "https://huggingface.co")


@pytest.fixture
def local(tmp_path) -> LocalHub:
    return LocalHub(tmp_path / "hub")


@pytest.fixture
def saved(tmp_path) -> Path:
    folder = zoo.build(SMALL | {"origin": {"license": "apache-2.0", "source": "a/b"}}).save_pretrained(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_the_double_has_the_signatures_of_the_client():
    import inspect

    for name in ("create_repo", "upload_folder", "list_repo_files", "snapshot_download"):
        ours = set(inspect.signature(getattr(LocalHub, name)).parameters)
        assert ours <= set(inspect.signature(getattr(HfApi, name)).parameters), name


def test_a_model_goes_up_and_comes_down(local, saved, tmp_path):
    (saved / "notes.log").write_text("mine")  # is nobody's business
    made = hub.push(saved, "me/small", private=True, client=local)
    assert made.files == ("README.md", "config.yaml", "model.safetensors", "tokenizer.json")
    assert made.license == "apache-2.0" and local.private and len(local.commits) == 1
    card = (local.folder / "me/small/README.md").read_text()
    assert card.startswith("---\n") and "license: apache-2.0\n" in card and "library_name: block-zoo" in card
    assert "Converted from a/b." in card and "mlp" in card and "zoo pull me/small" in card
    back = hub.pull("me/small", tmp_path / "back", client=local)
    assert (back.form, back.license, back.left_out) == ("zoo", "apache-2.0", ())
    for name in made.files[1:]:
        assert (tmp_path / "back" / name).read_bytes() == (saved / name).read_bytes()
    tokens = torch.arange(5)[None]
    assert torch.equal(zoo.from_pretrained(back.folder)(tokens), zoo.from_pretrained(saved)(tokens))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hub", "m"]  # nothing else is left


@pytest.mark.parametrize(
    "before, license, has",
    [
        ("# Mine\n", "", "license: apache-2.0\n"),
        ("---\ntags: [x]\n---\n# Mine\n", "", "tags:\n- x\n"),
        ("---\nlicense: apache-2.0\n---\n# Mine\n", "apache-2.0", "license: apache-2.0\n"),
    ],
)
def test_a_card_that_is_there_is_kept(local, saved, before, license, has):
    (saved / "README.md").write_text(before)
    hub.push(saved, "me/small", license=license, client=local)
    card = (local.folder / "me/small/README.md").read_text()
    assert card.endswith("---\n# Mine\n") and has in card and card.count("license:") == 1


def test_an_exported_model_goes_up_whole_and_comes_down_without_code(local, tmp_path):
    from zoo.cli import main

    zoo.build(SMALL).save_pretrained(tmp_path / "m")
    with pytest.raises(SystemExit) as end:
        main(["export", str(tmp_path / "m"), "--format", "hf", "--out", str(tmp_path / "theirs")])
    assert not end.value.code
    made = hub.push(tmp_path / "theirs", "me/theirs", client=local)
    assert set(made.files) == {p.name for p in (tmp_path / "theirs").iterdir()}
    back = hub.pull("me/theirs", tmp_path / "back", client=local)
    assert back.form == "zoo" and back.left_out == ("graph.svg", "modeling_zoo.py")


def test_licences_unknown_to_the_hub_keep_their_name(local, tmp_path):
    folder = zoo.build(SMALL).save_pretrained(tmp_path / "m")
    assert hub.push(folder, "me/none", client=local).license == ""
    assert "license:" not in (local.folder / "me/none/README.md").read_text()
    hub.push(folder, "me/own", license="house rules", client=local)
    assert "license: other\nlicense_name: house rules" in (local.folder / "me/own/README.md").read_text()
    assert hub.pull("me/own", tmp_path / "back", client=local).license == "house rules"


def test_push_refuses_before_the_hub_is_asked(local, saved, tmp_path):
    def refused(said, **given):
        with pytest.raises(ConfigError, match=said) as error:
            hub.push(given.pop("folder", saved), "me/small", client=local, **given)
        assert len(str(error.value).splitlines()) == 1 and not local.folder.exists()

    refused(r"more than one licence \(its origin: apache-2.0, you: mit\)", license="mit")
    (saved / "README.md").write_text("---\nlicense: mit\n---\n")
    refused(r"its README.md: mit")
    (saved / "README.md").write_text("---\n[\n---\n")
    refused("has a head that is no YAML mapping")
    (saved / "optimizer.pt").write_bytes(b"x")
    refused(r"has pickled files \(optimizer.pt\)")
    refused(r"there is no config\.yaml", folder=tmp_path)
    (saved / "optimizer.pt").unlink()
    (saved / "model.safetensors").write_bytes(b"\0" * 20)
    refused("is damaged or no safetensors file")


def test_pull_fetches_no_code_and_no_pickles(local, saved, tmp_path):
    hub.push(saved, "me/small", client=local)
    repo = local.folder / "me/small"
    (repo / "sub").mkdir()
    for name in ("modeling_evil.py", "pytorch_model.bin", "sub/model.safetensors", ".gitattributes"):
        (repo / name).write_text("evil")
    made = hub.pull("me/small", tmp_path / "back", client=local)
    assert made.left_out == ("modeling_evil.py", "pytorch_model.bin", "sub/model.safetensors")
    assert sorted(p.name for p in made.folder.iterdir()) == sorted(made.files)


def test_pull_refuses_in_one_sentence_and_leaves_nothing(local, saved, tmp_path):
    out = tmp_path / "back"

    def refused(said, kind=ConfigError, repo="me/small", out=out):
        with pytest.raises(kind, match=said) as error:
            hub.pull(repo, out, client=local)
        assert len(str(error.value).splitlines()) == 1 and ".back" not in str(error.value)
        assert not any(p.name.startswith((".back", "back")) for p in tmp_path.iterdir())

    refused("there is no repository me/small on the Hub")
    hub.push(saved, "me/small", client=local)
    repo = local.folder / "me/small"
    refused("is not an empty folder", out=saved)
    whole = (repo / "model.safetensors").read_bytes()
    (repo / "model.safetensors").write_bytes(whole[:-9])
    refused("me/small/model.safetensors: is damaged")
    (repo / "model.safetensors").write_bytes(whole)
    (repo / "config.yaml").write_text("dim: 16\nvocab_size: 21\ntrunk: [{mlp: {hidden_dim: 24}}]\n")
    refused("the weights do not fit the config; shape: tok_embeddings.weight")
    (repo / "config.yaml").unlink()
    refused("has neither config.yaml nor config.json")
    (repo / "model.safetensors").rename(repo / "pytorch_model.bin")
    refused(r"has no safetensors, only pickled ones \(pytorch_model.bin\)")
    (repo / "pytorch_model.bin").unlink()
    refused("no weights at all")


def test_what_was_not_asked_for_is_refused(local, saved, tmp_path):
    hub.push(saved, "me/small", client=local)
    fetch = local.snapshot_download

    def more(repo_id, *, local_dir, **given):
        fetch(repo_id, local_dir=local_dir, **given)
        (Path(local_dir) / "evil.json").symlink_to("/etc/passwd")

    local.snapshot_download = more
    with pytest.raises(ConfigError, match=r"sent what was not asked for: evil\.json"):
        hub.pull("me/small", tmp_path / "back", client=local)
    assert not (tmp_path / "back").exists()


def test_what_the_hub_refuses_is_one_sentence(local, saved, tmp_path):
    gated = errors.GatedRepoError("403", response=httpx.Response(403, request=REQUEST))
    for error, said, kind in (
        (errors.HFValidationError("Repo id must"), "is no name of a repository", ConfigError),
        (gated, "is gated", ZooError),
        (httpx.ConnectError("no route"), "the Hub cannot be used for me/small: no route", ZooError),
        (errors.OfflineModeIsEnabled("offline"), "cannot be used for me/small: offline", ZooError),
    ):

        def fail(*args, error=error, **given):
            raise error

        local.list_repo_files = local.create_repo = fail
        with pytest.raises(kind, match=said):
            hub.pull("me/small", tmp_path / "back", client=local)
        with pytest.raises(kind, match=said):
            hub.push(saved, "me/small", client=local)


def test_a_model_of_transformers_comes_down_for_import(local, tmp_path):
    from safetensors.torch import save_file

    repo = local.folder / "you/theirs"
    repo.mkdir(parents=True)
    (repo / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}))
    (repo / "README.md").write_text("---\nlicense: mit\n---\n")
    (repo / "evil.py").write_text("raise SystemExit")
    save_file({"a": torch.ones(2)}, repo / "model.safetensors")
    made = hub.pull("you/theirs", tmp_path / "back", client=local)
    assert (made.form, made.license, made.left_out) == ("transformers", "mit", ("evil.py",))


def test_commands(local, saved, tmp_path, monkeypatch, capsys):
    from zoo.cli import main

    monkeypatch.setattr(hub, "connected", lambda: local)

    def run(*args, code=0):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in args])
        assert (end.value.code or 0) == code
        return capsys.readouterr()

    assert json.loads(run("push", saved, "me/small", "--json").out)["license"] == "apache-2.0"
    assert "licence apache-2.0" in run("push", saved, "me/small").out
    (local.folder / "me/small/evil.py").write_text("")
    out = run("pull", "me/small", "--out", tmp_path / "one").out
    assert "licence apache-2.0" in out and "left out: evil.py" in out
    told = json.loads(run("pull", "me/small", "--out", tmp_path / "two", "--json").out)
    assert told["form"] == "zoo" and told["left_out"] == ["evil.py"]
    assert "no repository me/nothing" in run("pull", "me/nothing", "--out", tmp_path / "x", code=2).err
