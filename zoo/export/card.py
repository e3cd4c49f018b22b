"""The README.md of an exported model: what it is, how to load it, its graph and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import zoo
from zoo.architectures.model import Model
from zoo.cost import CostReport, estimate
from zoo.graph.spec import Graph, Spec

PICTURE = "graph.svg"
TOKENS = 1024  # that the costs are of
_LINE, _INDENT, _WIDTH = 22, 24, 760


def model_card(model: Model, graph: Graph, has_tokenizer: bool, origin: Mapping[str, Any]) -> str:
    """The text. origin: the section of a converted model; its licence is that of the weights."""
    head = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [block-zoo, custom_code]"]
    if origin.get("license"):
        head.insert(0, f"license: {_plain(origin['license'])}")
    prefill = estimate(model, batch_size=1, seq_len=TOKENS, mode="prefill")
    decode = estimate(model, batch_size=1, seq_len=1, context_len=TOKENS, mode="decode")
    source = f" Its weights come from {_plain(origin['source'])}." if origin.get("source") else ""
    return "\n".join([
        "---", *head, "---", f"# {_plain(graph.name)}", "",
        f"A causal language model of {prefill.params:,} parameters, {prefill.active_params:,} of which a token touches,"
        f" written by Block Zoo {zoo.__version__}.{source} {_licence(origin)}", "",
        f"![the graph]({PICTURE})", "", "## Use", "", "```python", *_use(has_tokenizer, graph), "```", "",
        "`modeling_zoo.py` is all the code that it needs beside torch and transformers 5; `zoo.from_pretrained` reads"
        " the same folder. Rows may be padded in front of the text, and without a cache behind it. The cache keeps the"
        " state of every block and cannot be cropped.", "",
        "## Costs", "", f"Of one row of {TOKENS} tokens, and of one token after it.", "", *_costs(prefill, decode), "",
    ])  # fmt: skip


def _licence(origin: Mapping[str, Any]) -> str:
    said = origin.get("license")
    what = f"The weights are under {_plain(said)}" if said else "Nothing is said of the licence of the weights"
    return f"{what}; the code is under Apache 2.0."


def _use(has_tokenizer: bool, graph: Graph) -> list[str]:
    load = 'model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)'
    if not has_tokenizer:
        return [
            "import torch", "from transformers import AutoModelForCausalLM", "", load,
            f"tokens = torch.randint({graph.vocab_size}, (1, 8))",
            "print(model.generate(tokens, max_new_tokens=20))",
        ]  # fmt: skip
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "", load,
        'tokenizer = AutoTokenizer.from_pretrained("DIR", trust_remote_code=True)',
        'tokens = tokenizer("Once", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(tokens, max_new_tokens=20)[0]))",
    ]  # fmt: skip


def _costs(prefill: CostReport, decode: CostReport) -> list[str]:
    """Blocks of one name in one row."""
    rows: dict[str, list[int]] = {}
    for many, one in zip(prefill.nodes, decode.nodes, strict=True):
        row = rows.setdefault(many.block, [0] * 5)
        for i, value in enumerate((1, many.params, many.flops, one.flops, one.state_bytes)):
            row[i] += value
    lines = [
        f"| block | sites | parameters | FLOPs, {TOKENS} tokens | FLOPs, next token | state, bytes |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [f"| {name} | " + " | ".join(f"{v:,}" for v in row) + " |" for name, row in rows.items()]
    total = (len(prefill.nodes), prefill.params, prefill.flops, decode.flops, decode.state_bytes)
    return [*lines, "| **all** | " + " | ".join(f"{v:,}" for v in total) + " |"]


def picture(graph: Graph) -> str:
    """The graph as an SVG: a line a node, children further right, equal neighbours once with their number."""
    lines = [(0, f"{graph.vocab_size} tokens, embedded in {graph.dim} numbers", "combinator"), *_lines(graph.trunk, 0)]
    lines.append((0, "norm, head", "combinator"))
    height = _LINE * (len(lines) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="monospace" '
        f'font-size="13"><rect width="{_WIDTH}" height="{height}" fill="white"/>'
    ]
    colours = {"mixer": "#cfe3f7", "ffn": "#d9efd4", "memory": "#f7e3c4"}
    for i, (depth, text, kind) in enumerate(lines):
        x, y = 12 + _INDENT * depth, _LINE // 2 + _LINE * i
        box = f'<rect x="{x}" y="{y}" width="{_WIDTH - 12 - x}" height="{_LINE - 4}" rx="3" fill="{{}}"/>'
        parts.append(box.format(colours.get(kind, "#ececec")))
        parts.append(f'<text x="{x + 6}" y="{y + _LINE - 9}">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _lines(specs: tuple[Spec, ...], depth: int) -> list[tuple[int, str, str]]:
    found: list[tuple[int, str, str]] = []
    at = 0
    drawn = [_tree(spec, depth) for spec in specs]
    while at < len(drawn):
        times = 1
        while at + times < len(drawn) and drawn[at + times] == drawn[at]:
            times += 1
        first, *rest = drawn[at]
        text = f"{times} x {first[1]}" if times > 1 else first[1]
        found += [(first[0], text, first[2]), *rest]
        at += times
    return found


def _tree(spec: Spec, depth: int) -> list[tuple[int, str, str]]:
    shown = {k: v for k, v in spec.options.items() if not isinstance(v, (dict, list, tuple))}
    options = ", ".join(f"{k} {v}" for k, v in shown.items())
    name = (spec.label or "layer") if spec.name == "sequence" else spec.name
    text = f"{name}: {options}" if options else name
    if spec.router is not None:
        text += f", by {spec.router.name}"
    if len(text) > (limit := 92 - 3 * depth):
        text = text[: limit - 3] + "..."
    return [(depth, text, spec.kind), *_lines(spec.children, depth + 1)]


def _plain(text: object) -> str:
    """One line that opens no markup."""
    return " ".join(str(text).split()).replace("<", "&lt;").replace(":", "&#58;")[:200]
