"""`backdrop results`: the documentation's tables from their figures."""

from pathlib import Path
from typing import Annotated

import typer

from .options import examples

EXAMPLE = examples("backdrop results --check")


def results(
    folder: Annotated[Path, typer.Option(help="Folder of the pages, with their JSON in `data/`.")] = Path(
        "docs/results"
    ),
    check: Annotated[
        bool, typer.Option("--check", help="Rewrite nothing; exit 1 if a table is not what its JSON says.")
    ] = False,
) -> None:
    """Rewrite the tables of the documentation's result pages from their JSON (in a checkout)."""
    from backdrop.results import refresh

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; wanted docs/results, from the root of a checkout.")
    stale = refresh(check, folder)
    for page in stale:
        typer.echo(page)
    if stale and check:
        raise typer.Exit(1)
