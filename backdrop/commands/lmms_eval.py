"""`backdrop lmms-eval`: lmms-eval's command line, with Backdrop's model class in it."""

from typing import Annotated

import typer

from .options import examples

EXAMPLE = examples(
    "pip install lmms-eval",
    """backdrop lmms-eval --model backdrop --tasks pope --limit 8 \\
    --model_args pretrained=examples/scenes-model,mode=split \\
    --output_path runs/pope""",
)


def lmms_eval(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="lmms-eval's own options (`python -m lmms_eval --help`). --model backdrop is ours; its --model_args: "
            "pretrained, mode (llava, split, cached, matched), tolerance."
        ),
    ] = None,
) -> None:
    """Run tasks of lmms-eval, a third-party test suite, on a Backdrop model."""
    try:
        from backdrop.evaluation.harness import run_harness
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lmms_eval":
            raise
        raise ImportError("lmms-eval is not installed: `pip install lmms-eval`.") from error

    run_harness(list(arguments or []))
