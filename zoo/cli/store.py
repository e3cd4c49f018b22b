"""`zoo store`: blocks of models kept once, compared, and put together anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli import output
from zoo.cli.options import Json
from zoo.cli.teaching import BATCH, SEQ, Batch, Data, Seq, checked, free

if TYPE_CHECKING:
    from zoo.store import Saved, Source, Store

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Keep the blocks of models once each, compare and combine them."
)
Folder = Annotated[Path, typer.Argument(metavar="STORE", help="The folder of the store.")]
ROWS = 128  # on which stitches are fitted
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Save the model here.")]


@app.command()
def add(
    store: Folder,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A saved model or a finished run.")],
    name: Annotated[
        str | None, typer.Option("--name", metavar="N", help="By default that of the configuration.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Keep a model; blocks that are in the store already are not written again."""
    with output.working("loading"):
        from zoo.store import Store

        made = asdict(Store(store).add(model, name))
    if as_json:
        output.emit(made)
    else:
        print(
            f"{made['name']}: {made['nodes']} nodes, {made['shared']} of them shared; "
            f"{output.size(made['saved_bytes'])} of {output.size(made['bytes'])} saved"
        )


@app.command("list")
def list_(store: Folder, as_json: Json = False) -> None:
    """Models of a store: nodes, how many of them other models or places share, bytes."""
    from collections import Counter

    from zoo.store import Store

    kept = Store(store)
    models = {name: list(kept.manifest(name)["nodes"].values()) for name in kept.names()}
    uses = Counter(node["object"] for nodes in models.values() for node in nodes)
    sizes = {node["object"]: node["bytes"] for nodes in models.values() for node in nodes}
    rows = [
        {
            "name": name,
            "nodes": len(nodes),
            "shared": sum(uses[node["object"]] > 1 for node in nodes),
            "bytes": sum(node["bytes"] for node in nodes),
        }
        for name, nodes in models.items()
    ]
    if as_json:
        output.emit({"models": rows, "objects": len(sizes), "bytes": sum(sizes.values())})
        return
    heads = ("model", ">nodes", ">shared", ">size")
    output.table(heads, [[r["name"], str(r["nodes"]), str(r["shared"]), output.size(r["bytes"])] for r in rows])
    print(f"{len(sizes)} objects, {output.size(sum(sizes.values()))}")


@app.command()
def get(
    store: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model of the store.")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Write a model as it was added, bit for bit."""
    from zoo.store import Store

    saved = Store(store).get(name, out)
    if as_json:
        output.emit({"name": name, "saved": str(saved)})
    else:
        print(f"saved in {saved}")


@app.command()
def compare(
    given: Annotated[
        list[str], typer.Argument(metavar="[STORE] A B", help="Two models: names in STORE, or folders of saved models.")
    ],
    seed: Annotated[int, typer.Option("--seed", help="Of the tokens.")] = 0,
    as_json: Json = False,
) -> None:
    """Tell which nodes of two models are equal, and how far apart their streams are on random tokens."""
    from zoo.errors import ConfigError

    if len(given) not in (2, 3):
        raise ConfigError(f"compare takes two models, with or without a store before them; got {len(given)} arguments")
    store = Path(given[0]) if len(given) == 3 else None
    with output.working("comparing"):
        from zoo.store import compare

        found = compare(_saved(given[-2], store), _saved(given[-1], store), seed=seed)
    if as_json:
        output.emit({"equal": found.equal, **asdict(found)})
        return
    rows = [[n.node, n.block, n.how, "" if n.distance is None else f"{n.distance:.3g}", n.why] for n in found.nodes]
    output.table(("node", "block", "how", ">distance", "why"), rows)
    print()
    if found.why:
        print(found.why)
        return
    streams = [
        [s.where, *(("other width", "") if s.relative is None else (f"{s.relative:.3g}", f"{s.cosine:.6f}"))]
        for s in found.streams
    ]
    output.table(("stream behind", ">difference", ">cosine"), streams)


@app.command()
def assemble(
    store: Folder,
    config: Annotated[str, typer.Argument(metavar="CFG", help="YAML file, shipped name or run folder.")],
    take: Annotated[
        list[str],
        typer.Option(
            "--take",
            metavar="NODE=MODEL[:NODE]",
            help="For NODE (all: every node) and all below it the blocks of a stored model; later ones win.",
        ),
    ],
    out: Out,
    data: Data = None,
    seq: Annotated[
        int | None, typer.Option("--seq", min=2, help="Tokens of its rows. [256]", show_default=False)
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="How many. [128]", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Build a model of stored blocks. Blocks of another width than the stream around them stand in a `stitch` of CFG.

    The maps of a stitch are found by least squares, from the streams of the models on both sides on --data; `zoo
    distill` teaches them further.
    """
    from zoo.errors import ConfigError
    from zoo.store import Store
    from zoo.store.store import write

    with output.stdout_kept_for_json(as_json):
        kept = Store(store)
        sources, chosen = kept.sources(config, take), kept.take(config, take)
        made = kept.assemble(config, chosen)
        license = (made.graph.document.get("origin") or {}).get("license") or None
        document: dict[str, Any] = {"saved": str(out), "nodes": chosen, "license": license}
        free(out)
        if made.nodes.keys() - chosen.keys():
            with output.working("fitting"):
                made, fitted = _stitched(kept, made, sources, data, seq or SEQ, rows or ROWS)
            document |= fitted
        elif data or seq or rows:
            raise ConfigError("--data, --seq and --rows go with a stitch that is to be fitted; this model has none")
        write(made, out)
    if as_json:
        return output.emit(document)
    for path, shares in document.get("stitches", {}).items():
        print(f"{path}: explains {shares['in']:.1%} of the stream inside, {shares['out']:.1%} of what lacks around it")
    if "loss" in document:
        output.facts({f"held-out loss, {name}": f"{loss:.4f}" for name, loss in document["loss"].items()})
    print(f"{len(chosen)} stored nodes, licence {license or 'not named'}\nsaved in {out}")


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The model that the others were tuned from.")],
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Tuned models of the same configuration.")],
    out: Out,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Steps of learning.")] = 100,
    lr: Annotated[float, typer.Option("--lr", metavar="X", help="Learning rate of the coefficients.")] = 0.05,
    seq: Seq = None,
    batch: Batch = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Merge tuned models: BASE, and of what each of them added a learned part, one coefficient for each node (aTLAS).

    The coefficients start at zero, which is BASE, and follow the loss on --data. Ctrl-C keeps those learned so far.
    """
    checked(lr)
    free(out)
    with output.stdout_kept_for_json(as_json):
        with output.working("loading"):
            from zoo.errors import DataError
            from zoo.graft.lesson import Lesson, tokenizer_beside
            from zoo.store import merge, read_saved
            from zoo.store.store import write
            from zoo.train.stopping import stopping

            start, *tuned = [read_saved(path) for path in (base, *models)]
            if start.graph.architecture != "causal_lm" or start.graph.diffuses:
                raise DataError(f"{base}: merging learns from text, one token after the other")
            tokenizer = tokenizer_beside(base, start.graph.vocab_size)
            lesson = Lesson(tokenizer, *(data or ()), seq_len=seq or SEQ, size=batch or BATCH)
        with output.progress() as bar, stopping() as stop:
            task = bar.add_task("steps", total=steps)

            def batches() -> Iterator[Any]:
                for number, tokens in zip(range(steps), lesson.batches()):
                    if stop():
                        return
                    yield tokens
                    bar.update(task, completed=number + 1)

            found = merge(start, tuned, batches(), lr=lr)
        write(found.saved, out)
        losses = [lesson.heldout_loss(m.model()) for m in (start, *tuned, found.saved)]
        document: dict[str, Any] = {
            "coefficients": found.coefficients,
            "loss": {"base": losses[0], "models": losses[1:-1], "merged": losses[-1]},
            "steps": len(found.losses),
            "interrupted": len(found.losses) < steps,
            "license": (found.saved.graph.document.get("origin") or {}).get("license") or None,
            "saved": str(out),
        }
    if as_json:
        output.emit(document)
    else:
        cells = [[node, *(f"{c:.3f}" for c in parts)] for node, parts in found.coefficients.items()]
        output.table(("node", *(f">{path}" for path in models)), cells)
        print()
        names = (str(base), *map(str, models), "merged")
        output.facts({f"held-out loss, {name}": f"{loss:.4f}" for name, loss in zip(names, losses)})
        print(f"{document['steps']} steps, licence {document['license'] or 'not named'}\nsaved in {out}")
    if document["interrupted"]:
        raise typer.Exit(130)


def _stitched(
    kept: Store, made: Saved, sources: Mapping[str, Source], data: list[str] | None, seq: int, rows: int
) -> tuple[Saved, dict[str, Any]]:
    """The model with fitted stitches and the tokenizer of the model that its embedding is from; how well they fit."""
    from itertools import islice

    from zoo.errors import ConfigError
    from zoo.graft.lesson import Lesson
    from zoo.store import fit

    models = {name: kept.read(name) for name in dict.fromkeys(s.model for s in sources.values())}
    if "tok_embeddings" not in sources:
        raise ConfigError("a stitch is fitted on text: this model reads none")
    home = sources["tok_embeddings"].model
    lesson = Lesson(_tokenizer(home, models[home]), *(data or ()), seq_len=seq, size=min(rows, BATCH))
    batches = list(islice(lesson.batches(), -(-rows // lesson.size)))
    found = fit(made, sources, models, batches)
    files = {
        name: content for name, content in models[home].files.items() if not name.startswith(("LICENSE", "NOTICE"))
    }
    explained = {path: dict(zip(("in", "out"), shares)) for path, shares in found.explained.items()}
    losses = {name: lesson.heldout_loss(m.model()) for name, m in ((home, models[home]), ("assembled", found.saved))}
    return replace(found.saved, files=files), {"stitches": explained, "loss": losses}


def _tokenizer(name: str, saved: Saved) -> Any:
    """By which a stored model reads text."""
    from tempfile import TemporaryDirectory

    from zoo.graft.lesson import tokenizer_beside

    with TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(saved.config, encoding="utf-8")
        for name, content in saved.files.items():
            (Path(folder) / name).write_bytes(content)
        return tokenizer_beside(Path(folder), saved.graph.vocab_size, name)


def _saved(given: str, store: Path | None) -> Saved:
    from zoo.store import Store, read_saved

    if store is not None and (not Path(given).is_dir() or given in Store(store).names()):
        return Store(store).read(given)
    return read_saved(given)
