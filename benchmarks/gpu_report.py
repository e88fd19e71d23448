"""The page of `backdrop bench gpu`, a pure function of its JSON."""

from collections.abc import Callable

from .breakdown import render as render_breakdown
from .captured import render_captured


def render_markdown(results: dict) -> str:
    """The report as a page. A pure function of `gpu.json`."""
    hardware = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    software = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    lines = ["# On a GPU", "", f"{hardware}; {software}; detector: {results['detector']}.", ""]
    parts: dict[str, Callable[[dict], list[str]]] = {
        "parity": _parity_lines,
        "ttft": _ttft_lines,
        "breakdown": _breakdown_lines,
        "graphs": _graph_lines,
        "memory": _memory_lines,
        "compiled": lambda found: render_captured(found.get("rows", [])),
        "torch.compile": _compiled_lines,
    }
    titles = {
        "parity": "Parity",
        "ttft": "Time to first token",
        "breakdown": "Where the time goes",
        "graphs": "Layers from a captured graph",
        "memory": "Memory of a training step",
        "compiled": "Reused answers from captured graphs",
        "torch.compile": "torch.compile",
    }
    for part, render in parts.items():
        found = results.get(part)
        if not found:
            continue
        lines += [f"## {titles[part]}", ""]
        if "error" in found:
            lines += [f"Ended with: {found['error']}", ""]
        if isinstance(found.get("left out"), str):
            lines += [f"Left out: {found['left out']}.", ""]
            continue
        lines += [*render(found), ""]
    return "\n".join(lines)


def _parity_lines(found: dict) -> list[str]:
    rows = found.get("rows", [])
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name != "error"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)] if rows else []
    for row in rows:
        if "error" in row:
            lines.append(
                f"| {row['shape']} | {row['dtype']} | {row['attention']} | {row['error']} |"
                + " |" * (len(names) - 4)
            )
        else:
            lines.append("| " + " | ".join(_cell(row.get(name)) for name in names) + " |")
    maps = [
        f"- `device_map`, {row['device_map']}: "
        + (row.get("error") or f"largest difference of logits {row['largest difference of logits']:.1e}")
        for row in found.get("device_map", [])
    ]
    return [*lines, "", *maps]


def _cell(value: float | str | None) -> str:
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.1e}"
    return "" if value is None else str(value)


def _ttft_lines(found: dict) -> list[str]:
    lines = [
        "| batch | fresh | mode | median, ms | p95, ms | faster than LLaVA | FLOP ideal | MiB a background |",
        "|" + "---:|" * 8,
    ]
    for row in found.get("rows", []):
        lines.append(
            f"| {row['batch']} | {row['measured_fresh_share']:.0%} | {row['mode']} | {1000 * row['median_s']:.1f} | "
            f"{1000 * row['p95_s']:.1f} | {row['ratio_to_llava']:.2f}x | {row['flop_ideal_ratio']:.1f}x | "
            f"{row['bytes_per_background'] / 2**20:.0f} |"
        )
    return [*lines, *(f"- left out: {note}" for note in found.get("left out", []))]


def _breakdown_lines(found: dict) -> list[str]:
    lines: list[str] = []
    for title, rows in found.items():
        if isinstance(rows, dict) and rows:
            lines += [f"{title}:", "", render_breakdown(rows), ""]
    return lines


def _graph_lines(found: dict) -> list[str]:
    lines = ["| batch 1, 15% fresh | launched, ms | replayed, ms |", "|---|---:|---:|"]
    for name, row in found.items():
        if isinstance(row, dict):
            replayed = row.get("error") or f"{row['replayed, ms']:.1f}"
            lines.append(f"| {name} | {row['launched, ms']:.1f} | {replayed} |")
    return lines


def _compiled_lines(found: dict) -> list[str]:
    if "median, ms" not in found:
        return []
    times = ", ".join(f"{mode} {value:.1f} ms" for mode, value in found["median, ms"].items())
    return [
        f"{found['how']}; batch 1, 15% fresh: {times}: {found['ratio']:.2f}x. Warm-up {found['warm-up, s']} s."
    ]


def _memory_lines(found: dict) -> list[str]:
    lines = [
        "| step | shape | measured, GiB | estimated, GiB | estimate / measured |",
        "|---|---|---:|---:|---:|",
    ]
    for row in found.get("rows", []):
        if "error" in row:
            lines.append(f"| {row['case']} | {row['shape']} | {row['error']} | | |")
            continue
        measured = row["measured"]
        cells = (
            ["not measured on a CPU", f"{row['estimated'] / 2**30:.3f}", ""]
            if measured is None
            else [
                f"{measured / 2**30:.2f}",
                f"{row['estimated'] / 2**30:.2f}",
                f"{row['estimated'] / measured:.2f}",
            ]
        )
        lines.append(f"| {row['case']} | {row['shape']} | {' | '.join(cells)} |")
    return lines
