"""What `zoo graft --distill` and `zoo distill` share: models from disk, options, and the teaching itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli import output
from zoo.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from zoo.graft import Pair
    from zoo.graft.plan import Plan

LR, SEQ, BATCH = 1e-3, 256, 8
Lr = Annotated[
    float | None, typer.Option("--lr", metavar="X", help=f"Learning rate of teaching. [{LR:g}]", show_default=False)
]
Seq = Annotated[int | None, typer.Option("--seq", min=2, help=f"Tokens of its rows. [{SEQ}]", show_default=False)]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help=f"Rows of a step. [{BATCH}]", show_default=False)]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="The text: a file or a folder; several in equal parts. [python-stdlib]",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Where it is taught. [cuda where there is one, else cpu]", show_default=False),
]


@dataclass(frozen=True)
class Taught:
    """Held-out losses of the original, of the changed model before it was taught, and after; steps done of each
    stage."""

    original: float
    begun: float
    taught: float
    steps: dict[str, int]
    interrupted: bool


def checked(lr: float | None) -> None:
    """ConfigError where it is no learning rate."""
    if lr is not None and not 0 < lr < 1:
        raise ConfigError(f"--lr: must be above 0 and below 1, got {lr:g}")


def free(out: Path) -> None:
    """ConfigError where a model cannot be saved there, before it is made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder: give another --out")


def loaded(folder: Path) -> Any:
    """A model as the graph of its blocks, from what wrote it here or elsewhere."""
    import zoo
    from zoo.architectures.model import Model
    from zoo.convert import from_folder

    ours = any((folder / name).is_file() for name in ("config.yaml", "model/config.yaml"))
    theirs = not ours and (folder / "config.json").is_file()
    if not ours and not theirs:
        raise ConfigError(f"{folder}: is no saved model, no finished run and no folder of the Hub")
    model = from_folder(folder) if theirs else zoo.from_pretrained(folder)
    if not isinstance(model, Model):
        raise ConfigError(f"{folder}: holds a {type(model).__name__}, whose blocks cannot be replaced")
    return model


def device_of(name: str | None) -> torch.device:
    """The device of a name, or the best there is. ConfigError where it cannot be had."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device).add_(1).item()
    except Exception as error:  # every backend of torch raises its own kind
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--device {name}: cannot be used here ({first})") from None
    return device


def teach(
    pair: Plan | Pair,
    folder: Path,
    steps: int,
    *,
    lr: float | None = None,
    seq: int | None = None,
    batch: int | None = None,
    data: list[str] | None = None,
    device: str | None = None,
) -> Taught:
    """Teach what a plan puts in, or what differs in a pair, on text as the tokenizer in `folder` reads it. Ctrl-C ends
    it early. Half precision would lose small steps, so all is float32 meanwhile."""
    import torch

    from zoo.architectures.block_diffusion import BlockDiffusionLM
    from zoo.graft import Plan, distill
    from zoo.graft.lesson import Lesson, tokenizer_beside
    from zoo.train.stopping import stopping

    model: Any = pair.model
    if "decode" not in model.modes or isinstance(model, BlockDiffusionLM):
        raise DataError(f"{folder}: teaching needs a model that tells one token after the other")
    with output.working("reading text"):
        tokenizer = tokenizer_beside(folder, model.vocab_size)
        lesson = Lesson(tokenizer, *(data or ()), seq_len=seq or SEQ, size=batch or BATCH)
    dtype, where = next(model.parameters()).dtype, device_of(device)
    wide = torch.promote_types(dtype, torch.float32)
    model.to(device=where, dtype=wide)
    if isinstance(pair, Plan):
        pair.apply()
    with pair.original() as original:
        before = lesson.heldout_loss(original.to(device=where, dtype=wide))
    begun = lesson.heldout_loss(model)
    with output.progress("loss") as bar, stopping() as stop:
        tasks = {name: bar.add_task(name, total=steps, loss="") for name in ("layers", "model")}
        losses = distill(
            pair,
            (tokens.to(where) for tokens in lesson.batches()),
            layer_steps=steps,
            model_steps=steps,
            lr=lr or LR,
            progress=lambda stage, step, loss: bar.update(tasks[stage], completed=step + 1, loss=f"{loss:.3f}"),
            stop=stop,
        )
    done = {stage: len(values) for stage, values in losses.items()}
    after = lesson.heldout_loss(model.to(dtype=dtype))
    model.cpu()
    return Taught(before, begun, after, done, min(done.values()) < steps)


def show(document: Mapping[str, Any]) -> None:
    """Print what teaching did."""
    output.facts({f"held-out loss, {k.replace('_', ' ')}": f"{v:.4f}" for k, v in document["loss"].items()})
    if document["interrupted"]:
        done = ", ".join(f"{n} of stage {stage}" for stage, n in document["steps"].items())
        print(f"interrupted: steps done are {done}")
