"""A model as a folder for transformers: weights, configuration, one modelling file, tokenizer, card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zoo
from zoo import registry
from zoo.architectures.causal_lm import CausalLM
from zoo.architectures.storage import CONFIG, WEIGHTS, assemble, save_pretrained, saved_in, write_atomically
from zoo.convert.folder import beside as files_beside
from zoo.errors import ConfigError, ZooError
from zoo.export.bundle import bundle
from zoo.export.card import PICTURE, model_card, picture
from zoo.export.tokenizer import tokenizer_files
from zoo.graph.loader import load_graph
from zoo.graph.spec import Graph, Residual, Spec
from zoo.train.tokenizer import Tokenizer

MODELLING = "modeling_zoo"
ROOT = "zoo.export.modeling"


def export_hf(
    model: CausalLM, directory: Path, tokenizer: Tokenizer | None, beside: Mapping[str, bytes] | None = None
) -> list[str]:
    """Write the folder; names of its files. beside: files of the original (`kept_beside`). ConfigError where the graph
    cannot be exported, ZooError where the disk refuses; what cannot be exported leaves nothing behind."""
    beside = dict(beside or {})
    generation, tokenization = (
        _settings(beside.pop(f"{name}_config.json", b"")) for name in ("generation", "tokenizer")
    )
    graph = load_graph(dict(model.config))
    code = modelling_file(graph)
    knows = tokenizer is not None and tokenizer.vocab_size <= graph.vocab_size
    ends = {"eos_token_id": tokenizer.end, "bos_token_id": tokenizer.end} if tokenizer is not None and knows else {}
    dtype = str(model.tok_embeddings.weight.dtype).removeprefix("torch.")
    files = {
        f"{MODELLING}.py": code,
        "config.json": _json(config_of(graph, dtype, ends)),
        "generation_config.json": _json({"use_cache": True, **ends, **generation}),
        PICTURE: picture(graph),
        "README.md": model_card(model, graph, knows, model.config.get("origin") or {}),
        **(tokenizer_files(tokenizer, tokenization) if tokenizer is not None and knows else {}),
    }
    contents = beside | {name: text.encode() for name, text in files.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(directory / name, content)
    except OSError as error:
        raise ZooError(f"cannot write the model in {directory}: {error.strerror or error}") from None
    save_pretrained(model, directory)  # last: what is interrupted has no weights, and is no model
    return sorted([*contents, CONFIG, WEIGHTS])


def kept_beside(run: Path) -> dict[str, bytes]:
    """What lies beside the weights of a run or saved model and goes along: licence texts, and of an imported one the
    chat template and the settings of tokenizer and generation."""
    found = {}
    for path in files_beside(saved_in(run)):
        if path.name.startswith(("LICENSE", "NOTICE", "chat_template")) or path.name.endswith("_config.json"):
            found[path.name] = path.read_bytes()
    return found


def _settings(content: bytes) -> dict[str, Any]:
    """The values of a JSON file that name no code."""
    try:
        values = json.loads(content)
    except ValueError:
        values = None
    return {k: v for k, v in values.items() if k != "auto_map"} if isinstance(values, dict) else {}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def refusal(graph: Graph) -> str | None:
    """Why transformers cannot hold a model of this graph, or None."""
    if graph.architecture != "causal_lm":
        return f"{graph.name} is a {graph.architecture} model: AutoModelForCausalLM holds causal language models"
    if graph.diffuses:
        return f"{graph.name} generates by diffusion, block by block, which generate() of transformers cannot"
    for name in _names(graph):
        card = registry.block_card(name)
        if not card.module.startswith("zoo."):
            return f"{name} comes from {card.provider}: only blocks of the zoo are written into a file"
    return None


def modelling_file(graph: Graph) -> str:
    """The Python file that builds and runs a graph. ConfigError where it cannot."""
    why = refusal(graph)
    if why is not None:
        raise ConfigError(why)
    cards = {name: registry.block_card(name) for name in _names(graph)}
    blocks = {name: (card.module, card.class_name) for name, card in cards.items()}
    blocks["residual"] = ("zoo.graph.nodes", "ResidualBlock")
    header = (
        f"# {graph.name}, written by Block Zoo {zoo.__version__} (Apache License 2.0): every module that its graph\n"
        "# needs, in one file. The sources are those of the zoo; kernels that need a compiler were left out.\n"
    )
    return bundle(ROOT, blocks, header)


def config_of(graph: Graph, dtype: str, tokens: Mapping[str, int]) -> dict[str, Any]:
    """config.json. tokens: ids of special tokens."""
    return {
        "architectures": ["ZooForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELLING}.ZooConfig",
            "AutoModelForCausalLM": f"{MODELLING}.ZooForCausalLM",
        },
        "model_type": "block_zoo",
        "dtype": dtype,
        "vocab_size": graph.vocab_size,
        "hidden_size": graph.dim,
        "num_hidden_layers": graph.num_layers,
        "tie_word_embeddings": graph.tie_embeddings,
        "embedding_scale": graph.embedding_scale,
        "logit_scale": graph.logit_scale,
        "logit_cap": graph.logit_cap,
        "use_cache": True,
        **tokens,
        "graph": {"trunk": [_node(s) for s in graph.trunk], "norm": _node(graph.norm) if graph.norm else None},
    }


def _node(spec: Spec) -> dict[str, Any]:
    """The fields of a node that are not the usual ones."""
    node: dict[str, Any] = {"name": spec.name}
    for field in dataclasses.fields(Spec):
        value = getattr(spec, field.name)
        if field.name in ("name", "path") or (not value and field.name != "kind"):
            continue
        if isinstance(value, Spec):
            value = _node(value)
        elif field.name == "children":
            value = [_node(child) for child in value]
        elif isinstance(value, Residual):
            usual = Residual()
            value = {k: v for k, v in vars(value).items() if v != getattr(usual, k)}
            if not value:
                continue
        elif field.name == "kind" and value == "combinator":
            continue
        node[field.name] = value
    return node


def _names(graph: Graph) -> list[str]:
    """Every class that the graph names or that its modules are, components of attention included."""
    specs = [*graph.walk(), *([graph.norm] if graph.norm else [])]
    specs += [part for spec in specs for part in (spec.norm, spec.router) if part is not None]
    found = {spec.name for spec in specs if spec.kind != "skip"}
    found |= {str(m.zoo_registration.name) for m in assemble(graph).modules() if hasattr(m, "zoo_registration")}  # type: ignore[union-attr]
    for spec in specs:
        for kind in registry.COMPONENTS:
            value = spec.options.get(kind)
            if isinstance(value, (str, Mapping)):
                found.add(value if isinstance(value, str) else next(iter(value)))
    return sorted(found & {*registry.list_blocks()})
