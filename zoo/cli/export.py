"""`zoo export RUN`: a trained model for those who do not have this package."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from zoo.cli import output
from zoo.cli.options import Json

FORMATS = {
    "hf": "a folder that transformers loads",
    "torch": "a program of torch.export",
    "onnx": "the same as ONNX",
}


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a saved model.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new or empty folder.")],
    format: Annotated[
        str, typer.Option("--format", help=f"{', '.join(f'{k}: {v}' for k, v in FORMATS.items())}.")
    ] = "hf",
    length: Annotated[
        int, typer.Option("--length", min=2, help="torch, onnx: tokens of a row, where this cannot be left open.")
    ] = 128,
    as_json: Json = False,
) -> None:
    """Write a model so that it runs without the zoo."""
    start = time.perf_counter()
    with output.working("exporting"):
        from zoo.errors import ConfigError, did_you_mean, one_of

        if format not in FORMATS:
            raise ConfigError(f"unknown format {format!r}{did_you_mean(format, FORMATS)}; {one_of(FORMATS)}")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} is not an empty folder: give another --out")
        from zoo.architectures.storage import from_pretrained

        model = from_pretrained(run)
        if "decode" not in model.modes:
            raise ConfigError(f"{run} holds no language model, and only these are exported")
        dynamic: tuple[str, ...] = ("batch", "length")
        if format == "hf":
            from zoo.export.hf import export_hf, kept_beside
            from zoo.export.tokenizer import tokenizer_of_export

            files = export_hf(model, out, tokenizer_of_export(run, model.config), kept_beside(run))
        else:
            from zoo.export.traced import export_onnx, export_torch

            file, dynamic = (export_torch if format == "torch" else export_onnx)(model, out, length)
            files = [file]
    seconds = round(time.perf_counter() - start, 3)
    size = sum((out / name).stat().st_size for name in files)
    if as_json:
        document = {"format": format, "out": str(out), "files": files, "bytes": size, "dynamic": list(dynamic)}
        output.emit(document | {"seconds": seconds})
        return
    print(f"{out}: {', '.join(files)} ({output.size(size)}, {seconds:.1f} s)")
    if format == "hf":
        print(f'AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)')
    else:
        print(
            f"sizes left open: {', '.join(dynamic) or 'none'}" + ("" if "length" in dynamic else f"; rows of {length}")
        )
