"""`zoo import FOLDER`: a model of transformers on disk as a saved model of the zoo."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from zoo.cli import output
from zoo.cli.options import Json


def command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder with config.json and safetensors, as on the Hub.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Save the model here.")],
    dtype: Annotated[
        Literal["float32", "float64", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Of the saved weights; that of the files by default."),
    ] = None,
    license: Annotated[
        str, typer.Option("--license", help="Of the weights, where README.md names none.", show_default=False)
    ] = "",
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Tokens to be read, where rotary angles depend on it (Phi-3 128k)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a pretrained model: the same logits from our blocks, as config.yaml and safetensors.

    Only known families are read, only safetensors, and no code of the folder is run. Tokenizer files and licence
    texts are copied along.
    """
    start = time.perf_counter()
    with output.stdout_kept_for_json(as_json), output.working("loading"):
        import torch

        from zoo.convert import from_folder
        from zoo.convert.folder import copy_beside
        from zoo.errors import ConfigError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder: give another --out")
    with output.stdout_kept_for_json(as_json), output.progress() as bar:
        task = bar.add_task("tensors")
        model = from_folder(
            folder,
            dtype=None if dtype is None else getattr(torch, dtype),
            license=license,
            context=context,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        copied = copy_beside(folder, out)
        model.save_pretrained(out)  # last: what is interrupted has no weights, and is no model
    origin, params = model.config["origin"], sum(p.numel() for p in model.parameters())
    document = {
        "saved": str(out),
        "family": origin["config"]["model_type"],
        "tower_of": origin.get("tower_of"),
        "params": params,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "license": origin.get("license") or None,
        "copied": copied,
        "seconds": round(time.perf_counter() - start, 3),
    }
    if as_json:
        output.emit(document)
    else:
        tower = f" (the text tower of {document['tower_of']})" if document["tower_of"] else ""
        print(
            f"{document['family']}{tower}, {output.count(params)} parameters in {document['dtype']}, "
            f"licence {document['license'] or 'not named'}; {document['seconds']:.1f} s\nsaved in {out}"
        )
