"""The rows of the time-to-first-token benchmark as tables and as a picture. Pure functions of the rows."""

from pathlib import Path

from .contenders import MATCHED_MODES, MODES
from .report import format_seconds, pyplot
from .shapes import SHAPES


def render_markdown(rows: list[dict]) -> str:
    """The rows as tables, one per shape, device, dtype and batch."""
    lines = ["# Time to first token", ""]
    header = (
        "| fresh patches | mode | median | p95 | faster than LLaVA | FLOP ideal | of the ideal | MiB per background "
        "| break-even reuses | cold / (LLaVA + detector) |"
    )
    for key in _panels(rows):
        panel = _panel_rows(rows, key)
        lines += [f"## {_panel_title(key)}", "", header, "|" + "---:|" * 10]
        for row in panel:
            stores = row["mode"] in MATCHED_MODES
            break_even = "never" if row["break_even_reuses"] is None else f"{row['break_even_reuses']:.1f}"
            cold = row["cold_over_llava_plus_detector"]
            cells = [
                f"{row['measured_fresh_share']:.1%}",
                row["mode"],
                format_seconds(row["median_s"]),
                format_seconds(row["p95_s"]),
                f"{row['ratio_to_llava']:.2f}x",
                f"{row['flop_ideal_ratio']:.2f}x",
                f"{row['fraction_of_ideal']:.0%}",
                f"{row['bytes_per_background'] / 2**20:.3g}" if stores else "",
                break_even if stores else "",
                "" if cold is None else f"{cold:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *_origins(panel), ""]
    return "\n".join(lines)


def _origins(rows: list[dict]) -> list[str]:
    """How the rows were made, each way once."""
    ways = []
    for row in rows:
        hardware = ", ".join(f"{name} {value}" for name, value in row["machine"].items())
        software = ", ".join(f"{name} {value}" for name, value in row["versions"].items())
        way = f"{row['repeats']} repeats; {hardware}; {software}; `{row['command']}`"
        if way not in ways:
            ways.append(way)
    return ways


def render_plot(rows: list[dict], path: Path) -> None:
    """How much faster than LLaVA each mode is over the fresh share, one panel per shape and batch, as a PNG.

    Dashed lines: what FLOPs alone would allow. All panels have the same axes.

    Raises:
        ValueError: there are no rows, or no matplotlib.
    """
    if not rows:
        raise ValueError("There are 0 rows to plot; wanted those of one cell at least.")
    plt = pyplot()
    keys = _panels(rows)
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    width, height = max(6.4, 4.6 * columns), 3.9 * lines + 1.1
    figure, grid = plt.subplots(
        lines, columns, figsize=(width, height), squeeze=False, sharex=True, sharey=True
    )
    # Orange: everything is encoded freshly. Blue: the background is reused, the darker the more of it.
    styles = {
        "cold": ("#f0841e", "nothing reused"),
        "tokens": ("#7fb0e6", "vision tokens reused"),
        "tokens+prefix": ("#1f5aa6", "prefix reused"),
    }
    for axes in grid.flat[len(keys) :]:
        axes.set_visible(False)
    for axes, key in zip(grid.flat, keys, strict=False):
        panel = _panel_rows(rows, key)
        for mode, (colour, words) in styles.items():
            points = [row for row in panel if row["mode"] == mode]
            x = [100 * row["measured_fresh_share"] for row in points]
            measured, ideal = (
                [row[name] for row in points] for name in ("ratio_to_llava", "flop_ideal_ratio")
            )
            axes.plot(x, measured, "o-", color=colour, label=words)
            style = {"alpha": 0.6, "markersize": 5, "linewidth": 1.2}
            axes.plot(x, ideal, "x--", color=colour, label=f"{words}: FLOP ideal", **style)
        axes.axhline(1, color="0.35", linewidth=1.2, zorder=1, label="LLaVA")
        axes.set_title(_panel_title(key), fontsize=10)
        axes.set_xlabel("patches that differ from the background, %")
        axes.set_ylabel("times faster than LLaVA")
        axes.tick_params(labelbottom=True, labelleft=True)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Time to first token on a known background, against LLaVA")
    # Columns are filled first: each mode above its ideal where there is room for four.
    ncols = 4 if columns > 1 else 2
    legend_inches = 0.12 + 0.21 * -(-7 // ncols)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=ncols, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, legend_inches / height, 1, 1))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panels(rows: list[dict]) -> list[tuple]:
    """(shape, device, dtype, batch) of the rows, in the order of `SHAPES`, then by batch."""
    keys = {(row["shape"], row["device"], row["dtype"], row["batch"]) for row in rows}
    return sorted(keys, key=lambda key: (list(SHAPES).index(key[0]), *key[1:]))


def _panel_title(key: tuple) -> str:
    shape, device, dtype, batch = key
    return f"{shape}, batch {batch} ({device}, {dtype})"


def _panel_rows(rows: list[dict], key: tuple) -> list[dict]:
    chosen = [row for row in rows if (row["shape"], row["device"], row["dtype"], row["batch"]) == key]
    return sorted(chosen, key=lambda row: (row["fresh_share"], row["repeats"], MODES.index(row["mode"])))
