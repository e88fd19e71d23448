"""The `backdrop` command: its sub-commands in panels, and errors as one line.

Each sub-command is a function in `backdrop/commands/`; what takes long to import is imported there when it runs.
"""

import os
import sys
from typing import Annotated

import typer

from .commands import (
    bench,
    cache,
    derive,
    evaluate,
    experiments,
    hub,
    lmms_eval,
    pictures,
    results,
    scenes,
    serve,
    train,
    watch,
)

app = typer.Typer(
    name="backdrop",
    help="A LLaVA-style vision-language model that splits images by a YOLO detector into background and objects, and "
    "reuses the background across images.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

_debug = False


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    global _debug
    _debug = debug


USE, TRAIN, MEASURE = "Use", "Train", "Evaluate and measure"
PUBLISH, SCENES = "Publish and serve", "The made scenes"
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command("demo", rich_help_panel=USE, **pictures.DEMO_EXAMPLE)(pictures.demo)
app.command("split", rich_help_panel=USE, **pictures.SPLIT_EXAMPLE)(pictures.split)
app.command("ask", rich_help_panel=USE, **pictures.ASK_EXAMPLE)(pictures.ask)
app.command("watch", rich_help_panel=USE, **watch.EXAMPLE)(watch.watch)

app.command("convert", rich_help_panel=TRAIN, **hub.CONVERT_EXAMPLE)(hub.convert)
app.command("build", rich_help_panel=TRAIN, **hub.BUILD_EXAMPLE)(hub.build)
app.command("data", rich_help_panel=TRAIN, **train.DATA_EXAMPLE)(train.data)
app.command(
    "train",
    rich_help_panel=TRAIN,
    **train.TRAIN_EXAMPLE,
    context_settings=_PASS_ON,
    add_help_option=False,  # `backdrop train --help` is the training program's own
)(train.train)
app.add_typer(derive.app, name="derive", rich_help_panel=TRAIN)

app.command("eval", rich_help_panel=MEASURE, **evaluate.EXAMPLE)(evaluate.evaluate)
app.command("lmms-eval", rich_help_panel=MEASURE, **lmms_eval.EXAMPLE, context_settings=_PASS_ON)(
    lmms_eval.lmms_eval
)
app.command("ladder", rich_help_panel=MEASURE, **experiments.LADDER_EXAMPLE)(experiments.ladder)
app.command("ablate", rich_help_panel=MEASURE, **experiments.ABLATE_EXAMPLE)(experiments.ablate)
app.add_typer(bench.app, name="bench", rich_help_panel=MEASURE)
app.command("results", rich_help_panel=MEASURE, **results.EXAMPLE)(results.results)

app.command("export", rich_help_panel=PUBLISH, **hub.EXPORT_EXAMPLE)(hub.export)
app.command("push", rich_help_panel=PUBLISH, **hub.PUSH_EXAMPLE)(hub.push)
app.command("serve", rich_help_panel=PUBLISH, **serve.EXAMPLE)(serve.serve)
app.add_typer(cache.app, name="cache", rich_help_panel=PUBLISH)

app.add_typer(scenes.app, name="scenes", rich_help_panel=SCENES)


def main() -> None:
    """Entry point: an error is one line and a non-zero exit."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(prog_name="backdrop", standalone_mode=False)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if _debug:
            raise
        format_message = getattr(error, "format_message", None)  # of an error in how the command was called
        usage = format_message is not None
        message = " ".join((str(error) if format_message is None else format_message()).split())
        if message or not usage:  # without arguments the help was printed already
            typer.echo(f"backdrop: {message or type(error).__name__}", err=True)
        sys.exit(2 if usage else 1)
    sys.exit(code if isinstance(code, int) else 0)
