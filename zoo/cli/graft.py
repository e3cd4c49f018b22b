"""`zoo graft MODEL PATTERN BLOCK`: other blocks in a trained model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli import output, teaching
from zoo.cli.options import Json
from zoo.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from zoo.graft import Plan

ACTIONS = ("kept", "mapped", "new", "dropped")


def command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A saved model, a run folder, or a folder of the Hub.")
    ],
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN", help="Blocks to replace: a name as attention, or sites as layers.*.block, with commas."
        ),
    ],
    block: Annotated[str, typer.Argument(metavar="BLOCK", help="What takes their place; `zoo list` names them.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Its options.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Graft, and save the model here. [only tell]", show_default=False),
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option("--distill", metavar="N", min=1, help="Teach the new blocks: N steps each alone, N together."),
    ] = None,
    lr: teaching.Lr = None,
    seq: teaching.Seq = None,
    batch: teaching.Batch = None,
    data: teaching.Data = None,
    device: teaching.Device = None,
    as_json: Json = False,
) -> None:
    """Replace blocks of a trained model; without --out, tell what would become of each tensor.

    What fits is carried over, such as the projections of attention into linear mixers. --distill then teaches the new
    blocks, and nothing else, what the replaced ones computed and what the model said; it shows the held-out loss
    before, after grafting and after teaching. Text is read by the tokenizer beside the model, as bytes where none is.
    """
    settings = {"lr": lr, "seq": seq, "batch": batch, "data": data, "device": device}
    if distill is None and (given := [k for k, v in settings.items() if v]):
        raise ConfigError(f"--{given[0]} goes with --distill")
    if distill is not None and out is None:
        raise ConfigError("--distill goes with --out: what is taught has to be saved")
    teaching.checked(lr)
    if out is not None:
        teaching.free(out)
    with output.stdout_kept_for_json(as_json):
        with output.working("loading"):
            from zoo import graft
            from zoo.convert.folder import copy_beside

            chosen = _options(block, options or ())
            host = teaching.loaded(model)
            plan = graft.plan(host, pattern, block, **chosen)
        document: dict[str, Any] = _told(plan) | {"saved": None}
        if not as_json:
            _print(document)
        if out is not None:
            if distill is not None:
                taught = teaching.teach(plan, model, distill, **settings)
                document |= {
                    "loss": {
                        "before": taught.original,
                        "after_grafting": taught.begun,
                        "after_distillation": taught.taught,
                    },
                    "steps": taught.steps,
                    "interrupted": taught.interrupted,
                }
            else:
                plan.apply()
            inner = model / "model" if (model / "model").is_dir() else model
            document |= {"copied": copy_beside(inner, out), "saved": str(out)}
            host.save_pretrained(out)  # last: what is interrupted has no weights, and is no model
    if as_json:
        output.emit(document)
    else:
        if "loss" in document:
            print()
            teaching.show(document)
        print(f"\nsaved in {out}" if out else "\nnothing is changed; --out DIR grafts and saves")
    if document.get("interrupted"):
        raise typer.Exit(130)


def _options(block: str, given: Sequence[str]) -> dict[str, Any]:
    from zoo import registry
    from zoo.graph.reading import read_text, scalar

    found: dict[str, Any] = {}
    known = registry.options(block)
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"option {text!r}: write key=value")
        if key not in known:
            raise ConfigError(f"{key}: unknown option of {block}{did_you_mean(key, known)}")
        found[key] = read_text(value).value if value.lstrip().startswith(("[", "{")) else scalar(value)
    return found


def _told(plan: Plan) -> dict[str, Any]:
    """What changes, tensor by tensor and in all."""
    replaced = sum(p.numel() for site in plan.sites for p in plan.model.get_submodule(site).parameters())
    totals = {
        action: {"tensors": len(found), "numbers": sum(math.prod(e.shape) for e in found)}
        for action in ACTIONS
        for found in [[e for e in plan.entries if e.action == action]]
    }
    totals["untouched"] = {"numbers": sum(p.numel() for p in plan.model.parameters()) - replaced}
    return {
        "block": plan.block,
        "sites": plan.options,
        "totals": totals,
        "tensors": [vars(e) | {"shape": list(e.shape)} for e in plan.entries],
    }


def _print(document: Mapping[str, Any]) -> None:
    """Equal sites in one row."""
    rows: dict[tuple[str, ...], int] = {}
    for e in document["tensors"]:
        source = e["source"].replace(f"{e['site']}.", "") if e["action"] in ("kept", "mapped") else ""
        where = re.sub(r"\d+", "*", e["site"], count=1)
        key = (where, e["tensor"], e["action"], " x ".join(map(str, e["shape"])) or "1", source)
        rows[key] = rows.get(key, 0) + 1
    lines = [(*key[:3], str(n) if n > 1 else "", *key[3:]) for key, n in rows.items()]
    lines = [(*("" if i and lines[i - 1][0] == line[0] else line[0], *line[1:]),) for i, line in enumerate(lines)]
    title = f"{document['block']} at {len(document['sites'])} sites"
    output.table(("site", "tensor", "", ">x", ">shape", "made of"), lines, title)
    print()
    for name, total in document["totals"].items():
        tensors = f"{total['tensors']:>5} tensors, " if "tensors" in total else " " * 15
        print(f"{name:<10}{tensors}{output.count(total['numbers']):>6} numbers")
