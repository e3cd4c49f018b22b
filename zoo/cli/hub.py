"""`zoo push` and `zoo pull`: saved models on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from zoo.cli import output
from zoo.cli.options import Json

Repo = Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub.")]


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved model or a finished run.")],
    repo: Repo,
    license: Annotated[
        str, typer.Option("--license", help="Of the weights, where neither origin nor card names one.")
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="If the repository is new: for you alone.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a model: config.yaml, safetensors, tokenizer, licence texts and a model card that names the licence."""
    with output.stdout_kept_for_json(as_json), output.working("pushing"):
        from zoo import hub

        made = hub.push(folder, repo, license=license, private=private)
    if as_json:
        output.emit(asdict(made))
    else:
        print(f"{made.repo}: {', '.join(made.files)}; licence {made.license or 'not named'}")


def pull(
    repo: Repo,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Save the model here.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None,
    as_json: Json = False,
) -> None:
    """Fetch a model: safetensors and text only. No code of the repository is fetched or run, pickles are refused."""
    with output.stdout_kept_for_json(as_json), output.working("pulling"):
        from zoo import hub

        made = hub.pull(repo, out, revision=revision)
    if as_json:
        output.emit(asdict(made))
        return
    print(f"{made.repo}: {len(made.files)} files, licence {made.license or 'not named'}")
    if made.left_out:
        print(f"left out: {', '.join(made.left_out)}")
    print(f"saved in {made.folder}" + ("; next: zoo import" if made.form == "transformers" else ""))
