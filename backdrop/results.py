"""The tables of `docs/results/*.md`, from `docs/results/data/*.json`.

A page has prose, and between the lines `<!-- table NAME -->` and `<!-- end -->` a table. `NAME` is a key of `TABLES`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path("docs") / "results"  # of a checkout, from its root
_MARKED = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.S)


def scenes(report: dict) -> str:
    """The exam's accuracy in every form, by family and topic."""
    from backdrop.scenes.exam_report import markdown

    return markdown(report)


def ladder(report: dict) -> str:
    """A row for each rung of the ladder."""
    from backdrop.experiments.ladder import markdown

    return markdown(report)


def ablations(report: dict) -> str:
    """A row for each cell of the matrix."""
    from backdrop.experiments.ablate import markdown

    return markdown(report)


def ttft(rows: list[dict]) -> str:
    """Time to first token, a table for each shape."""
    from backdrop.benchmarks.ttft_report import render_markdown

    # The page has a title of its own.
    return render_markdown(rows).removeprefix("# Time to first token\n\n").replace("## ", "### ")


def matching(rows: list[dict]) -> str:
    """Time and memory of matching, by number of references."""
    from backdrop.benchmarks.matching import render_markdown

    return render_markdown(rows)


def serving(report: dict) -> str:
    """Latency and throughput of the served modes."""
    from backdrop.benchmarks.serving import render_markdown

    return render_markdown(report)


def gpu(report: dict) -> str:
    """All parts of the GPU benchmark."""
    from backdrop.benchmarks.gpu_report import render_markdown

    # The page has a title of its own.
    return render_markdown(report).removeprefix("# On a GPU\n\n").replace("## ", "### ")


def camera(report: dict) -> str:
    """What matching reused of each recording, and how stale it was (grey levels)."""
    head = (
        "recording",
        "frames",
        "matched",
        "refreshed",
        "missed",
        "vision tokens reused",
        "stale in the prompt",
        "hidden",
        "disowned",
        "patches within the tolerance of the frame before",
        "staleness, largest",
        "mean",
        "beyond the tolerance",
        "references",
    )
    rows = [
        (
            r["source"],
            r["frames"],
            r["hits"],
            r["refreshes"],
            r["misses"],
            f"{r['share_reused']:.1%}",
            *(f"{r[f'{name}_share']:.1%}" for name in ("stale", "hidden", "disowned")),
            f"{r['static_share']:.1%}",
            f"{r['max_stale']:.2f}",
            f"{r['mean_stale']:.2f}",
            r["violations"],
            r["references"],
        )
        for r in report["recordings"]
    ]
    return _table(head, rows)


def memory(report: dict) -> str:
    """Peak memory of LLaVA-1.5-7B finetuning by method, GiB, and the devices that hold it."""
    parts = ("weights", "gradients", "optimizer", "activations", "temporaries", "overhead")
    devices = list(report["llava-1.5-7b"][0]["fits"])
    rows = []
    for r in report["llava-1.5-7b"]:
        shared = f" ({r['processes']} x {r['sharding']})" if r["processes"] > 1 else ""
        fits = ("yes" if r["fits"][name] else "no" for name in devices)
        sizes = (f"{r[part]:.1f}" for part in (*parts, "total"))
        rows.append((r["method"] + shared, r["rows"], r["length"], *sizes, *fits))
    return _table(("method", "rows", "tokens a row", *parts, "total GiB", *devices), rows)


def memory_check(report: dict) -> str:
    """Estimated and measured peak memory of small runs, MiB."""
    rows = [
        (
            r["case"],
            f"{r['estimated'] / 2**20:.1f}",
            f"{r['allocated'] / 2**20:.1f}",
            f"{r['error']:+.1%}",
            f"{r['resident'] / 2**20:.0f}",
        )
        for r in report["check"]
    ]
    return _table(("case", "estimated MiB", "measured MiB", "error", "resident MiB"), rows)


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "scenes-accuracy": ("scenes-accuracy.json", scenes),
    "scenes-accuracy-seed1": ("scenes-accuracy-seed1.json", scenes),
    "smollm2-accuracy": ("smollm2-accuracy.json", scenes),
    "ladder": ("ladder.json", ladder),
    "ablations": ("ablations.json", ablations),
    "ttft": ("ttft.json", ttft),
    "gpu": ("gpu.json", gpu),
    "matching": ("matching.json", matching),
    "serving": ("serving.json", serving),
    "serving-clip-l": ("serving-clip-l.json", serving),
    "camera": ("camera.json", camera),
    "memory": ("memory.json", memory),
    "memory-check": ("memory.json", memory_check),
}


def with_tables(text: str, folder: Path = RESULTS) -> str:
    """A page with the tables that its JSON files give.

    Raises:
        KeyError: the page names a table that `TABLES` has not.
    """

    def fill(match: re.Match) -> str:
        file, render = TABLES[match["name"]]
        table = render(json.loads((folder / "data" / file).read_text(encoding="utf-8"))).strip()
        return f"{match[1]}\n{table}\n\n{match[3]}"

    return _MARKED.sub(fill, text)


def refresh(check: bool = False, folder: Path = RESULTS) -> list[Path]:
    """Rewrites the pages whose tables are not what their JSON says (`check`: only finds them), and returns them."""
    stale = []
    for page in sorted(folder.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        fresh = with_tables(text, folder)
        if fresh != text:
            stale.append(page)
            if not check:
                page.write_text(fresh, encoding="utf-8")
    return stale


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)
