"""The folder: objects/<hash>.safetensors for nodes, files/<hash> for what stands beside weights, models/<name>.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from yaml import YAMLError

from zoo.architectures import storage
from zoo.errors import ConfigError, DataError, Problem, ZooError, did_you_mean, few
from zoo.graph.loader import load_graph
from zoo.store.nodes import Saved, StoredNode, canonical, difference, nodes_of, read_saved
from zoo.store.stitch import Source

FORMAT = 1
STITCH = "stitch"  # the combinator whose maps are found, where no model has them
_NAME = re.compile(r"[^\W_][\w.-]*")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Added:
    """What adding a model did: `shared` of its `nodes` were there before, which saved `saved_bytes` of `bytes`."""

    name: str
    nodes: int
    shared: int
    bytes: int
    saved_bytes: int


class Store:
    """A folder of blocks and of the models made of them. Errors are ConfigError for what was asked, DataError for what
    is damaged, ZooError where the disk refuses."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    # ------------------------------------------------------------------------------------- models
    def names(self) -> list[str]:
        """Models in the store."""
        return sorted(p.stem for p in (self.folder / "models").glob("*.json"))

    def manifest(self, name: str) -> dict[str, Any]:
        """The text of the model's `config`, its `nodes` (path, block, object, bytes) and `files`."""
        path = self._manifest(name)
        if not path.is_file():
            hint = did_you_mean(name, self.names()) or "; zoo store list names them"
            raise ConfigError([Problem(f"there is no model {name!r} in this store{hint}", file=str(self.folder))])
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            known = found["format"] == FORMAT and isinstance(found["config"], str)
            hashes = [*(node["object"] for node in found["nodes"].values()), *found["files"].values()]
            plain = all(Path(file).name == file for file in found["files"])
            if not (known and plain and all(_HASH.fullmatch(h) for h in hashes)):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DataError(f"{path} is damaged or no manifest of a store") from None
        return found

    def add(self, directory: str | Path, name: str | None = None) -> Added:
        """Keep a saved model or finished run under `name`, by default that of its configuration."""
        saved = read_saved(directory)
        name = name or saved.graph.name
        path = self._manifest(name)
        nodes = {
            place: {"block": node.block, "object": node.hash, "bytes": node.nbytes}
            for place, node in saved.nodes.items()
        }
        files = {file: hashlib.sha256(content).hexdigest() for file, content in saved.files.items()}
        made = {"format": FORMAT, "config": saved.config, "nodes": nodes, "files": files}
        if path.exists() and self.manifest(name) != made:
            raise ConfigError([Problem(f"has another model named {name!r}: give a --name", file=str(self.folder))])
        shared = [node for place, node in saved.nodes.items() if not self._keep(node, place)]
        for file, content in saved.files.items():
            with _writing(target := self.folder / "files" / files[file]):
                storage.write_atomically(target, content)
        with _writing(path):
            storage.write_atomically(path, (json.dumps(made, indent=1) + "\n").encode())
        total = sum(node.nbytes for node in saved.nodes.values())
        return Added(name, len(nodes), len(shared), total, sum(node.nbytes for node in shared))

    def read(self, name: str) -> Saved:
        """A model of the store; every object is compared with its hash."""
        manifest = self.manifest(name)
        nodes = {place: self.object(node["object"], place) for place, node in manifest["nodes"].items()}
        files = {file: self._file(file, digest) for file, digest in manifest["files"].items()}
        try:
            document = OmegaConf.to_container(OmegaConf.create(manifest["config"]))
        except (OmegaConfBaseException, YAMLError):
            raise DataError(f"{self._manifest(name)} is damaged: its config is no YAML") from None
        graph = load_graph(document)  # type: ignore[arg-type]
        return Saved(self._manifest(name), manifest["config"], graph, nodes, files)

    def get(self, name: str, out: str | Path) -> Path:
        """Write a model as it was added."""
        return write(self.read(name), Path(out))

    def assemble(self, config: str | Path | Mapping | DictConfig, objects: Mapping[str, str]) -> Saved:
        """A model of `config` whose nodes are these objects of the store, by path. A `stitch` may have none: it adds
        nothing until `zoo.store.fit` finds its maps. ConfigError lists the nodes that have none, or one that does not
        fit; streams of different widths are joined by a stitch only."""
        graph = load_graph(config)
        wanted = nodes_of(storage.assemble(graph))
        problems = [Problem("is no node of this configuration", where=p) for p in objects if p not in wanted]
        if lacking := [p for p, node in wanted.items() if p not in objects and node.block != STITCH]:
            problems.append(Problem(f"no stored block is named for {few(lacking)}"))
        nodes = {p: self.object(objects[p], p) for p in wanted if p in objects}
        for path, node in nodes.items():
            if why := difference(wanted[path], node):
                problems.append(Problem(f"the stored block does not fit: {why}", where=path))
        if problems:
            raise ConfigError(problems)
        dtype = next(t.dtype for node in nodes.values() for t in node.tensors.values())
        for path in wanted.keys() - nodes.keys():
            zeros = {n: torch.zeros(t.shape, dtype=dtype) for n, t in wanted[path].tensors.items()}
            nodes[path] = StoredNode(wanted[path].description, zeros)
        document = dict(graph.document)
        licenses = self._licenses(set(objects.values()))
        if licenses and not (document.get("origin") or {}).get("license"):
            document["origin"] = {**(document.get("origin") or {}), "source": str(self.folder)}
            document["origin"]["license"] = " AND ".join(licenses)
        return Saved(self.folder, OmegaConf.to_yaml(OmegaConf.create(document)), load_graph(document), nodes)

    def sources(self, config: str | Path | Mapping | DictConfig, takes: Sequence[str]) -> dict[str, Source]:
        """Where nodes of `config` are to be taken from, by lines NODE=MODEL or NODE=MODEL:NODE: for NODE (`all`: every
        node) and all below it those of a model. Later lines win. A stitch that no model has is left out."""
        wanted = nodes_of(storage.assemble(load_graph(config)))
        chosen: dict[str, tuple[str, Source]] = {}
        for line in takes:
            node, equals, source = line.partition("=")
            model, _, place = source.partition(":")
            if not (node and equals and model):
                raise ConfigError(f"{line!r} is not NODE=MODEL or NODE=MODEL:NODE, such as layers.0=first:layers.2")
            for path in _below(node, wanted):
                theirs = path if node == "all" else (place or node) + path[len(node) :]
                chosen[path] = line, Source(model, theirs)
        made = {}
        for path, (line, source) in chosen.items():
            have = self.manifest(source.model)["nodes"]
            if wanted[path].block == STITCH and have.get(source.node, {}).get("block") != STITCH:
                continue
            if source.node not in have:
                hint = did_you_mean(source.node, have)
                raise ConfigError(f"{line}: {source.model} has no node {source.node}{hint}")
            made[path] = source
        return made

    def take(self, config: str | Path | Mapping | DictConfig, takes: Sequence[str]) -> dict[str, str]:
        """Objects for `assemble` from lines as `sources` reads them."""
        found = self.sources(config, takes)
        return {path: self.manifest(s.model)["nodes"][s.node]["object"] for path, s in found.items()}

    def _licenses(self, used: set[str]) -> list[str]:
        """Licences of the models that these objects are from. An object that several models hold may be had under the
        licence of any, so it adds none if one of them is needed anyway."""
        holders: dict[str, set[str]] = {}
        for name in self.names():
            manifest = self.manifest(name)
            if license := _license(manifest["config"]):
                for digest in used & {node["object"] for node in manifest["nodes"].values()}:
                    holders.setdefault(digest, set()).add(license)
        needed: set[str] = set()
        for choices in sorted(holders.values(), key=len):
            needed |= choices if not choices & needed else set()
        return sorted(needed)

    # ------------------------------------------------------------------------------------ objects
    def object(self, digest: str, place: str = "") -> StoredNode:
        """A node by its hash, which is computed anew; `place` is named in errors."""
        path = self._object(digest)
        said = f"{path} ({place})" if place else str(path)
        try:
            with safe_open(path, framework="pt") as file:
                description = json.loads((file.metadata() or {})["description"])
                tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            node = StoredNode(description, tensors)
        except FileNotFoundError:
            raise DataError(f"{said} is missing from the store") from None
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise DataError(f"{said} is damaged: {str(error) or type(error).__name__}") from None
        if node.hash != digest:
            raise DataError(f"{said} is damaged: what it holds has another hash, {node.hash[:12]}")
        return node

    def _keep(self, node: StoredNode, place: str) -> bool:
        """Write a node if it is not there, or damaged; whether that was done."""
        path = self._object(node.hash)
        if path.exists():
            try:
                self.object(node.hash, place)
                return False
            except DataError:
                pass  # mended by what is written now
        tensors = {n: t.detach().cpu().contiguous() for n, t in node.tensors.items()}
        with _writing(path), storage.replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"description": canonical(node.description)})
        return True

    def _file(self, name: str, digest: str) -> bytes:
        path = self.folder / "files" / digest
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} ({name}) cannot be read: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise DataError(f"{path} ({name}) is damaged: what it holds has another hash")
        return content

    def _object(self, digest: str) -> Path:
        if not _HASH.fullmatch(digest):
            raise ConfigError(f"{digest!r} is no hash of an object: 64 digits in lower case")
        return self.folder / "objects" / f"{digest}.safetensors"

    def _manifest(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no name for a model: letters, digits, dots, - and _; give a --name")
        return self.folder / "models" / f"{name}.json"


def write(saved: Saved, out: Path) -> Path:
    """Write config.yaml, model.safetensors and the files beside them into an empty or new folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder: give another --out")
    with _writing(out / storage.CONFIG):
        for name, content in saved.files.items():
            storage.write_atomically(out / name, content)
        storage.write_atomically(out / storage.CONFIG, saved.config.encode())
        with storage.replacing(out / storage.WEIGHTS) as temporary:
            save_file(saved.tensors, temporary, metadata={"format": "pt"})
    return out


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Makes the folder of a file; what the disk refuses becomes a ZooError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise ZooError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def _below(node: str, paths: Iterable[str]) -> list[str]:
    """A node and all below it. ConfigError where there is none."""
    found = [p for p in paths if node == "all" or p == node or p.startswith(f"{node}.")]
    if not found:
        raise ConfigError(f"there is no node {node} in this configuration{did_you_mean(node, paths)}")
    return found


def _license(config: str) -> str:
    """The licence that the text of a configuration names, or nothing."""
    try:
        return str(OmegaConf.select(OmegaConf.create(config), "origin.license") or "")
    except (OmegaConfBaseException, YAMLError):
        return ""
