"""`backdrop ladder` and `backdrop ablate`: several recipes, trained and scored on the same questions."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, examples

LADDER_EXAMPLE = examples(
    """backdrop scenes model --work runs/scenes --until scenes_llava_2 \\
    --detector-of examples/scenes-model""",
    """backdrop ladder experiments/recipes/ladder/scenes.yaml \\
    --report runs/ladder.json""",
)
ABLATE_EXAMPLE = examples(
    "backdrop ablate experiments/recipes/ablate_scenes.yaml --list",
    """backdrop scenes model --work runs/scenes --until scenes_llava_2 \\
    --detector-of examples/scenes-model""",
    """backdrop ablate experiments/recipes/ablate_scenes.yaml \\
    --report runs/ablations.json""",
)


def ladder(
    chain: Annotated[Path, typer.Argument(help="YAML file: start, stages (recipes beside it), rows, score.")],
    report: Annotated[
        Path | None, typer.Option(help="JSON of the report; a table (.md) goes beside it.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Train a chain of recipes, each from the model of the one before, and score every stage.

    A run that was stopped continues with the stage it was in.
    """
    from backdrop.experiments.ladder import markdown, read_chain, run_ladder, write_report

    figures = run_ladder(read_chain(chain))
    if report is not None:
        write_report(figures, report)
    typer.echo(json.dumps(figures, indent=2) if json_output else markdown(figures))


def ablate(
    matrix: Annotated[Path, typer.Argument(help="YAML file: base recipe, axes of changes, rows, score.")],
    report: Annotated[
        Path | None,
        typer.Option(
            help="JSON of the report; a table (.md) and a plot (.png) go beside it. Default: report.json in the matrix's `out`."
        ),
    ] = None,
    list_cells: Annotated[
        bool, typer.Option("--list", help="Print the cells and their recipes, run nothing.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Train and score a base recipe and its changes, one at a time or in all combinations.

    A run that was stopped continues with the cell it was in.
    """
    import yaml

    from backdrop.experiments.ablate import markdown, read_matrix, run_matrix, write_report

    read = read_matrix(matrix)
    if list_cells:
        for cell in read.cells():
            recipe = yaml.safe_dump({**cell.recipe, "rows": cell.rows}, sort_keys=False)
            typer.echo(f"# {cell.name}\n{recipe}")
        return
    figures = run_matrix(read)
    write_report(figures, report or Path(read.out, "report.json"), matrix)
    typer.echo(json.dumps(figures, indent=2, default=str) if json_output else markdown(figures))
