"""The one door to the Hugging Face Hub: saved models go up with a card and come down without code or pickles."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from zoo.architectures.storage import CONFIG, WEIGHTS, assemble, check_fit, read_tensors, saved_in, unique_tensors
from zoo.convert import folder as theirs
from zoo.errors import ConfigError, Problem, ZooError, few
from zoo.graph.loader import load_graph
from zoo.graph.spec import Graph

CARD = "README.md"
# text and safetensors, in the folder itself: the rest of a repository is not fetched
FETCHED = ("*.safetensors", "*.json", "*.yaml", "*.txt", "*.md", "*.jinja", "LICENSE*", "NOTICE*")
# what zoo export writes beside the two files, for those who load the model without the zoo
EXPORTED = ("config.json", "modeling_zoo.py", "graph.svg")
# the Hub knows licences by these names; another is `other` with a `license_name`
_KNOWN = re.compile(
    r"apache-2\.0|mit|isc|unlicense|zlib|wtfpl|ms-pl|postgresql|ncsa|afl-3\.0|artistic-2\.0|bsl-1\.0|ecl-2\.0"
    r"|(bsd|cc|gpl|lgpl|agpl|mpl|epl|eupl|osl|odc|odbl|ofl|openrail|bigscience|creativeml|llama|gemma|deepfloyd)[\w.+-]*"
)


@dataclass(frozen=True)
class Pushed:
    """What went up."""

    repo: str
    files: tuple[str, ...]
    license: str


@dataclass(frozen=True)
class Pulled:
    """What came down into `folder`, and what of the repository was `left_out`. `form`: a saved model of the zoo, or
    one of transformers for `zoo import`."""

    repo: str
    folder: Path
    form: Literal["zoo", "transformers"]
    license: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]


def connected() -> Any:
    """The client of huggingface_hub, with the token that is logged in."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ConfigError("the Hub is reached by huggingface_hub: pip install 'block-zoo[hf]'") from None
    return HfApi()


def push(directory: str | Path, repo: str, *, license: str = "", private: bool = False, client: Any = None) -> Pushed:
    """Upload a saved or exported model or a finished run with a model card. The licence is that of its origin or card;
    `license` names it where neither does. client: has the methods of `HfApi`. ConfigError where anything is pickled or
    does not fit, before the Hub is asked."""
    folder = saved_in(directory)
    if pickled := _matching((p.name for p in folder.iterdir()), theirs.PICKLED):
        raise _refused(folder, f"has pickled files ({few(pickled)}), which run code when read; take them away")
    graph = load_graph(folder / CONFIG)
    own = unique_tensors(assemble(graph))
    check_fit(own, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    license = _agreed(folder, graph, license)
    client = client or connected()
    with tempfile.TemporaryDirectory() as staged:
        exported = [folder / name for name in EXPORTED if (folder / name).is_file()]
        for path in [folder / CONFIG, folder / WEIGHTS, *exported, *theirs.beside(folder)]:
            (Path(staged) / path.name).symlink_to(path.resolve())
        (Path(staged) / CARD).write_text(_card(folder, graph, repo, license, own.values()), encoding="utf-8")
        files = tuple(sorted(p.name for p in Path(staged).iterdir()))
        with _asking(repo):
            client.create_repo(repo, private=private, exist_ok=True)
            client.upload_folder(repo_id=repo, folder_path=staged, commit_message=f"{graph.name}, by zoo push")
    return Pushed(repo, files, license)


def pull(repo: str, out: str | Path, *, revision: str | None = None, client: Any = None) -> Pulled:
    """Fetch a model into an empty or new folder: safetensors and text, nothing of it is run. A failure leaves nothing.
    ConfigError where there are no safetensors, or they do not fit the configuration."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder: give another --out")
    client = client or connected()
    with _asking(repo):
        offered = sorted(client.list_repo_files(repo, revision=revision))
    files = [f for f in _matching(offered, FETCHED) if Path(f).name == f]
    left_out = [f for f in offered if f not in files and not f.startswith(".git")]
    if not _matching(files, ["*.safetensors"]):
        pickled = _matching(offered, theirs.PICKLED)
        why = f"only pickled ones ({few(pickled)}), which run code when read" if pickled else "no weights at all"
        raise ConfigError(f"{repo} has no safetensors, {why}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fetched = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ZooError(f"cannot write {out}: {error.strerror}") from None
    try:
        with _asking(repo):
            client.snapshot_download(repo, revision=revision, local_dir=fetched, allow_patterns=files)
        shutil.rmtree(fetched / ".cache", ignore_errors=True)  # notes of huggingface_hub
        if odd := sorted(p.name for p in fetched.iterdir() if p.name not in files or p.is_symlink() or p.is_dir()):
            raise ConfigError(f"{repo} sent what was not asked for: {few(odd)}")
        form, license = _checked(fetched, repo)
        fetched.chmod(0o755)
        os.replace(fetched, out)
    except ConfigError as error:  # named as it would lie
        problems = [
            Problem(p.message, p.where, p.file.replace(str(fetched), repo), p.line, p.column) for p in error.problems
        ]
        raise ConfigError(problems) from None
    finally:
        shutil.rmtree(fetched, ignore_errors=True)
    return Pulled(repo, out, form, license, tuple(files), tuple(left_out))


def _checked(folder: Path, repo: str) -> tuple[Literal["zoo", "transformers"], str]:
    """The form of a model that was fetched, and its licence. ConfigError where it is none."""
    named = theirs.license_of(folder)
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        graph = load_graph(folder / CONFIG)
        check_fit(unique_tensors(assemble(graph)), read_tensors(folder / WEIGHTS), folder / WEIGHTS)
        return "zoo", _origin(graph).get("license") or named
    if (folder / theirs.CONFIG).is_file():
        theirs.read_json(folder / theirs.CONFIG)
        theirs.Weights(folder)  # reads every header
        return "transformers", named
    raise ConfigError(f"{repo} has neither {CONFIG} nor {theirs.CONFIG}, so it is no model that can be read")


# ------------------------------------------------------------------------------------------------- card
def _origin(graph: Graph) -> dict[str, Any]:
    return dict(graph.document.get("origin") or {})


def _agreed(folder: Path, graph: Graph, given: str) -> str:
    """The licence of the weights. ConfigError where two places name different ones."""
    named = {
        "its origin": _origin(graph).get("license") or "",
        "its README.md": theirs.license_of(folder),
        "you": given,
    }
    named = {who: license for who, license in named.items() if license}
    if len(set(named.values())) > 1:
        said = ", ".join(f"{who}: {license}" for who, license in named.items())
        raise _refused(folder, f"has more than one licence ({said})")
    return next(iter(named.values()), "")


def _card(folder: Path, graph: Graph, repo: str, license: str, tensors: Iterable[Any]) -> str:
    """The README.md that is there, or a short one; its front matter names the licence."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except FileNotFoundError:
        text = _described(graph, repo, license, tensors)
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(folder / CARD, f"cannot be read: {error}") from None
    head, body = {}, text
    if found := re.match(r"---\n(.*?)^---\n", text, re.S | re.M):
        try:
            head, body = yaml.safe_load(found[1]) or {}, text[found.end() :]
        except (yaml.YAMLError, RecursionError):
            head = None
        if not isinstance(head, dict):
            raise _refused(folder / CARD, "has a head that is no YAML mapping")
    head.setdefault("library_name", "block-zoo")
    if license and not head.get("license"):
        head |= {"license": license} if _KNOWN.fullmatch(license) else {"license": "other", "license_name": license}
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n{body}"


def _described(graph: Graph, repo: str, license: str, tensors: Iterable[Any]) -> str:
    blocks = Counter(spec.name for spec in graph.walk() if spec.kind != "combinator")
    said = ", ".join(f"{name} ({number})" if number > 1 else name for name, number in blocks.items())
    source = _origin(graph).get("source")
    lines = [
        f"# {graph.name}",
        str(graph.document.get("description") or ""),
        f"{sum(t.numel() for t in tensors):,} parameters, width {graph.dim}, {graph.interface}. Blocks: {said}.",
        f"Converted from {source}." if source else "",
        f"Licence of the weights: {license or 'not named'}.",
        f"```bash\nzoo pull {repo} --out model\nzoo build model\n```",
    ]
    return "\n" + "\n\n".join(filter(None, lines)) + "\n"


# ----------------------------------------------------------------------------------------------- helpers
def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = tuple(patterns)
    return sorted(n for n in names if any(fnmatchcase(n.lower(), p.lower()) for p in patterns))


def _refused(path: Path, message: str) -> ConfigError:
    return ConfigError([Problem(message, file=str(path))])


@contextlib.contextmanager
def _asking(repo: str) -> Iterator[None]:
    """What the Hub or the way to it refuses becomes one sentence."""
    from httpx import HTTPError  # of huggingface_hub
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError:
        raise ConfigError(f"{repo!r} is no name of a repository: OWNER/NAME") from None
    except errors.GatedRepoError:
        raise ZooError(f"{repo} is gated: accept its terms on the Hub, then log in (hf auth login)") from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(f"there is no repository {repo} on the Hub that you may read") from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{repo} has no such revision") from None
    except (HTTPError, OSError) as error:
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ZooError(f"the Hub cannot be used for {repo}: {said}") from None
