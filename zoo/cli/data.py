"""`zoo data`: text turned into tokens on disk, and a look at them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli import output
from zoo.cli.options import Json

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Prepare tokens on disk, and check them.")
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `zoo data prepare` wrote.")]


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Text, JSONL or parquet file, folder of them, or python-stdlib.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write to, or to go on with.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="T", help="bytes, or the path of a `tokenizers` JSON file.")
    ] = "bytes",
    heldout: Annotated[
        float, typer.Option("--heldout", min=1e-9, max=0.999, help="Share of the bytes that is held out.")
    ] = 0.05,
    text_key: Annotated[
        str, typer.Option("--text-key", help="Field of a JSONL record or parquet row that holds the text.")
    ] = "text",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that tokenize.")] = 1,
    as_json: Json = False,
) -> None:
    """Tokenize files of any size into DIR; the same command again goes on where it was stopped.

    Train on it by data.source=DIR.
    """
    from zoo.train.progress import Reporter
    from zoo.train.tokenize import prepare_tokens

    with Reporter() as report:
        made = prepare_tokens(
            source, out, tokenizer=tokenizer, heldout=heldout, text_key=text_key, workers=workers, report=report
        )
    _tell(made, as_json)


@app.command()
def show(folder: Folder, as_json: Json = False) -> None:
    """Sizes, tokenizer and source of prepared tokens."""
    from zoo.train.tokens import Prepared

    _tell(Prepared(folder), as_json)


@app.command()
def check(folder: Folder, as_json: Json = False) -> None:
    """Read all prepared tokens and compare them with their sha256."""
    from zoo.train.progress import Reporter
    from zoo.train.tokenize import count_bytes
    from zoo.train.tokens import Prepared

    made = Prepared(folder)
    total = sum(size for _, size, _ in made.files())
    with Reporter() as report:
        made.check(count_bytes(report, "checking", total))
    if as_json:
        output.emit({"ok": True, "files": len(made.files()), "bytes": total})
    else:
        print(f"{len(made.files())} files, {output.size(total)}: every one is as it was written")


def _tell(made: Any, as_json: bool) -> None:
    index, summary = made.index, made.summary()
    found = {"folder": str(made.folder), "source": index["source"], "tokenizer": index["tokenizer"]["name"]}
    found |= {"dtype": made.dtype.name, "shards": sum(len(s) for s in made.shards.values())}
    if as_json:
        output.emit(found | summary)
    else:
        output.facts({k.replace("_", " "): f"{v:,}" if isinstance(v, int) else v for k, v in (found | summary).items()})
