"""What the sub-commands share: options of one name and meaning, examples in a help text, printing of figures."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

EXAMPLE_MODEL = "examples/scenes-model"
NO_EXAMPLE = (
    f"{EXAMPLE_MODEL} is not here: only a checkout of the repository has it, not the installed package. Clone the "
    "repository and run this there, or name another Backdrop model trained on the scenes (`backdrop scenes model` makes one)."
)

Json = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="File for the figures, as JSON.")]
Markdown = Annotated[Path | None, typer.Option(help="File for a table, as Markdown.")]
Plot = Annotated[Path | None, typer.Option(help="File for a plot, as PNG.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
Tolerance = Annotated[
    float,
    typer.Option(help="Largest difference (0-255 grey levels) of a patch that is reused.", min=0, max=255),
]
Fit = Annotated[
    Literal["crop", "pad", "stretch"] | None,
    typer.Option(
        help="Images that are not square: crop their sides off, pad them with bars, or stretch them. Default: the model's own."
    ),
]
Licence = Annotated[
    str, typer.Option(help="Licence of the weights (the base model's), as the Hub spells it.")
]
OnBadRow = Annotated[
    Literal["skip", "raise"], typer.Option(help="skip: leave bad rows out and count them; raise: stop.")
]


class CommandWithExamples(TyperCommand):
    """Prints its epilog line by line below the help; typer would join the lines, and they could not be pasted."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the help page and the examples below it."""
        examples, self.epilog = self.epilog, None
        try:
            super().format_help(ctx, formatter)
        finally:
            self.epilog = examples
        lines = (examples or "").splitlines()
        typer.echo("\n".join([" Example:", *(f" {line}" for line in lines)]) + "\n")


def examples(*commands: str) -> dict:
    """What `app.command` is given for commands to paste, in order, below a help text.

    A long command is cut with backslashes into lines that a terminal of 80 columns does not break.
    """
    lines = "\n".join(inspect.cleandoc(text).replace("\n", "\n    ") for text in commands)
    return {"cls": CommandWithExamples, "epilog": lines}


def known_model(model: str | None) -> str | None:
    """Refuses the shipped example where it is not, before the Hub is asked for a repository of its name.

    Also a local folder that holds no model of ours, before anything slow is imported.
    """
    if model is None:
        return None
    if Path(model) == Path(EXAMPLE_MODEL) and not Path(model).is_dir():
        raise typer.BadParameter(NO_EXAMPLE)
    from backdrop.hub_export.model_folder import check_known

    try:
        check_known(model)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return model


def example_model() -> str:
    """The model that a checkout ships, from wherever the command is run.

    Raises:
        ValueError: this is not a checkout.
    """
    if Path(EXAMPLE_MODEL).is_dir():
        return EXAMPLE_MODEL
    beside = Path(__file__).resolve().parents[2] / EXAMPLE_MODEL
    if beside.is_dir():
        return str(beside)
    raise ValueError(NO_EXAMPLE)


def print_figures(figures: dict, as_json: bool) -> None:
    """Figures as JSON, or as one line for each: `name: value`, nested names joined by dots."""
    if as_json:
        typer.echo(json.dumps(figures, indent=2, default=str))
        return
    for name, value in _flat(figures):
        typer.echo(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


def _flat(figures: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
