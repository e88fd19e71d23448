"""The memory report: tables on the console, and the page memory.md with its figures."""

import json
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .checks import CHECK_COLUMNS, CHECK_LENGTH, CHECK_ROWS, check, check_cells
from .llava import LLAVA_COLUMNS, llava_cells, llava_estimates
from .page import PAGE
from .result import CARDS, CUDA_CONTEXT, FRAGMENTATION, MARGIN


def run_memory(docs: Path | None = None, checked: bool = False) -> None:
    """Prints which finetuning runs of LLaVA-1.5-7B fit 24, 40 and 80 GB, or how far the estimate is off.

    Args:
        docs: folder to write memory.md and memory.json to; both tables are made for it.
        checked: only compare the estimate with measured runs on the CPU (some minutes).
    """
    comparisons = check() if checked or docs is not None else []
    if comparisons:
        _print_table("Estimated against measured", CHECK_COLUMNS, map(check_cells, comparisons))
    if docs is None and checked:
        return
    estimates = llava_estimates()
    _print_table("LLaVA-1.5-7B, GiB at the peak", LLAVA_COLUMNS, map(llava_cells, estimates))
    if docs is not None:
        write_docs(docs, comparisons, estimates)


def _print_table(title: str, columns: list[str], rows: Iterable[list[str]]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _markdown_table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_docs(folder: Path, comparisons: list[dict], estimates: list[dict]) -> None:
    """Writes the figures to memory.json and the page with their tables to memory.md."""
    figures = {"check": comparisons, "llava-1.5-7b": estimates}
    (folder / "memory.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "memory.md").write_text(page(comparisons, estimates))


def page(comparisons: list[dict], estimates: list[dict]) -> str:
    """The text of memory.md."""
    worst = max(comparisons, key=lambda found: abs(found["error"]))
    return PAGE.format(
        llava=_markdown_table(LLAVA_COLUMNS, map(llava_cells, estimates)),
        check=_markdown_table(CHECK_COLUMNS, map(check_cells, comparisons)),
        worst=f"{worst['error']:+.1%} ({worst['case']})",
        cards=", ".join(f"{gb} GB: {gib} GiB" for gb, gib in CARDS.items()),
        margin=f"{MARGIN:.0%}",
        context=f"{CUDA_CONTEXT / 2**20:.0f} MiB",
        fragmentation=f"{FRAGMENTATION:.0%}",
        rows=CHECK_ROWS,
        length=CHECK_LENGTH,
    )
