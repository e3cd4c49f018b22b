"""The list of commands, and how an error becomes a message and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from zoo.cli import (
    bench,
    build,
    calibrate,
    data,
    distill,
    doctor,
    eval,
    export,
    generate,
    graft,
    hub,
    import_hf,
    launch,
    listing,
    phases,
    plan,
    profile,
    show,
    store,
    sweep,
    train,
    verify,
    watch,
)
from zoo.errors import ConfigError, DataError, Problem, ZooError

MOST_PROBLEMS = 20
FAILED, WRONG_REQUEST, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
_debug = False


class Commands(TyperGroup):
    """Runs a command; what it raises is told on stderr in a few lines."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # the reader is gone; what is still buffered must not complain at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        except (ConfigError, DataError) as error:
            raise _told(error, WRONG_REQUEST) from None
        except ZooError as error:
            raise _told(error, FAILED) from None
        except Exception as error:
            if _is_of_typer(error):
                raise
            first = next(iter(str(error).strip().splitlines()), "")
            _say(f"{type(error).__name__}: {first}" if first else type(error).__name__)
            if _debug:
                traceback.print_exc()
            else:
                _say("this is unexpected; --debug shows the traceback")
            raise typer.Exit(FAILED) from None


def _is_of_typer(error: Exception) -> bool:
    # usage errors, Exit and Abort; their classes moved between versions of typer
    return type(error).__module__.partition(".")[0] in ("typer", "click")


def _told(error: ZooError, code: int) -> typer.Exit:
    problems = error.problems if isinstance(error, ConfigError) else [Problem(str(error))]
    for problem in problems[:MOST_PROBLEMS]:
        _say(str(problem) if problem.file or problem.where else problem.message)
    if len(problems) > MOST_PROBLEMS:
        _say(f"and {len(problems) - MOST_PROBLEMS} more problems")
    if _debug:
        traceback.print_exc()
    return typer.Exit(code)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _version(wanted: bool) -> None:
    if wanted:
        from zoo import __version__

        print(f"zoo {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help is quick and can be piped
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def zoo(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Interchangeable sequence-model blocks: compose them in YAML, build, train, profile, generate.

    CFG is a YAML file, the name of a configuration that comes with the zoo, or a run folder. key=value changes
    it: dim=256 trunk[0].repeat=2 train.lr=1e-3.
    """
    global _debug
    _debug = debug


app.command("list")(listing.command)
app.command("show")(show.command)
app.command("build")(build.command)
app.command("profile")(profile.command)
app.command("calibrate")(calibrate.command)
app.command("sweep")(sweep.command)
app.command("plan")(plan.command)
app.command("train")(train.command)
app.command("launch")(launch.command)
app.add_typer(data.app, name="data")
app.command("watch")(watch.command)
app.command("import")(import_hf.command)
app.command("graft")(graft.command)
app.command("distill")(distill.command)
app.add_typer(store.app, name="store")
app.command("push")(hub.push)
app.command("pull")(hub.pull)
app.command("generate")(generate.command)
app.command("eval")(eval.command)
app.command("export")(export.command)
app.command("phases")(phases.command)
app.command("verify")(verify.command)
app.command("doctor")(doctor.command)
app.command("bench")(bench.command)
