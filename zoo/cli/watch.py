"""`zoo watch RUN`: a page with the curves and the health of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli import output
from zoo.cli.options import Json


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, which may be training.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of the page; 0 takes a free one.")] = 8765,
    once: Annotated[bool, typer.Option("--once", help="Write RUN/watch.html as of now, and end.")] = False,
    as_json: Json = False,
) -> None:
    """Serve a live page of a run on this machine: curves, nodes, incidents, evaluation. Ctrl-C ends it."""
    from zoo.train.watch import server, snapshot, write_page

    if as_json:
        return output.emit(snapshot(run))
    path = write_page(run)
    if once:
        print(path)
        return
    with server(run, port) as serving:
        print(f"http://127.0.0.1:{serving.server_address[1]}", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            return
