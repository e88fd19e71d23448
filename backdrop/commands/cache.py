"""`backdrop cache`: look after a folder of stored backgrounds."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Json, examples

if TYPE_CHECKING:
    from backdrop.modeling.background_folder_backdrop import BackgroundFolder

app = typer.Typer(
    no_args_is_help=True, help="Look after a folder of cached backgrounds: its size, pruning, damage."
)

Folder = Annotated[
    Path,
    typer.Argument(help="The folder given to enable_background_cache(folder=...) or `ask --cache-folder`."),
]
# Something to look at, in all three examples.
_FILL = (
    "backdrop demo --frames 6 --show runs/demo",
    """backdrop ask examples/scenes-model runs/demo/frame-0?.png --reuse \\
    -q "How many vehicles are there?" --cache-folder runs/cache""",
)


def _folder(path: Path, max_bytes: int = 2**62) -> "BackgroundFolder":
    from backdrop.modeling.background_folder_backdrop import BackgroundFolder

    if not path.is_dir():
        raise ValueError(f"{path} is no folder; wanted one of stored backgrounds.")
    return BackgroundFolder(path, max_bytes)


@app.command(**examples(*_FILL, "backdrop cache stats runs/cache"))
def stats(folder: Folder, json_output: Json = False) -> None:
    """Count a folder's entries and bytes."""
    found = _folder(folder).stats()
    figures = {name: found[name] for name in ("entries", "bytes")}
    if json_output:
        typer.echo(json.dumps(figures, indent=2))
    else:
        typer.echo(f"{folder}: {figures['entries']} entries, {figures['bytes'] / 2**20:.1f} MiB")


@app.command(**examples(*_FILL, "backdrop cache prune runs/cache --max-bytes 1000000"))
def prune(
    folder: Folder,
    max_bytes: Annotated[int, typer.Option(help="Bytes that may stay; the least recently used go first.")],
    json_output: Json = False,
) -> None:
    """Make a folder smaller, and remove what killed writers left."""
    if max_bytes < 0:
        raise ValueError(f"max_bytes is {max_bytes}; wanted 0 or more.")
    kept = _folder(folder)
    freed = kept.prune(max_bytes)
    if json_output:
        typer.echo(json.dumps({"freed_bytes": freed, "bytes": kept.stats()["bytes"]}, indent=2))
    else:
        typer.echo(f"{folder}: {freed / 2**20:.1f} MiB freed, {kept.stats()['bytes'] / 2**20:.1f} MiB left")


@app.command(**examples(*_FILL, "backdrop cache verify runs/cache"))
def verify(folder: Folder, json_output: Json = False) -> None:
    """Read every entry and check it; exit code 1 if one is damaged."""
    kept = _folder(folder)
    problems = kept.verify()
    if json_output:
        typer.echo(json.dumps({"entries": kept.stats()["entries"], "problems": problems}, indent=2))
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"{folder}: {kept.stats()['entries']} entries, {len(problems)} damaged")
    if problems:
        raise typer.Exit(1)
