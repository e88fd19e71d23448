"""A recording's reuse, staleness and references over its frames, as a picture."""

from pathlib import Path

import numpy as np

from backdrop.data.atomic import replacing

from .camera_run import HIT, MISS, REFRESH
from .report import pyplot

_MOST_BINS = 600  # more points than pixels only make a solid block
# Blue is what is reused of the background, orange what is fresh, as in the pictures of `backdrop split` and `backdrop ask`.
_REUSED, _RENEWED, _NEW = "#2e6fbe", "#96bae2", "#f0841e"
_STALE, _TOLERANCE, _REFERENCES = "#5a5f66", "#b3123f", "#7d3fb5"
_BYTES = "#3f7f4f"


def plot(table: dict[str, np.ndarray], figures: dict, path: Path) -> None:
    """Draws reuse, staleness and what is kept over the frames as PNG; long recordings in bins of frames."""
    plt = pyplot()
    frames, patches = figures["frames"], figures["patches_per_frame"]
    hit, refresh, miss = (table["state"] == state for state in (HIT, REFRESH, MISS))
    index = np.arange(frames)
    starts = np.unique(np.linspace(0, frames, min(frames, _MOST_BINS), endpoint=False).astype(int))
    sizes = np.diff([*starts, frames])
    middle = starts + (sizes - 1) / 2
    binned = sizes.max() > 1
    marker = {"marker": ".", "markersize": 4} if frames <= 120 else {}

    figure, (reuse, stale, kept) = plt.subplots(
        3, 1, sharex=True, figsize=(11, 8.5), height_ratios=(3, 3, 2), layout="constrained"
    )
    figure.suptitle(
        f"{figures['source']}: {frames:,} frames, {figures['share_reused']:.1%} of vision tokens reused, "
        f"staleness at most {figures['max_stale']:.2f} grey levels",
        fontsize=13,
    )

    # A frame that makes a layer anew reuses the rest: it has a mark of its own too.
    share = np.where(hit | refresh, table["reused"] / patches, 0.0) * 100
    mean = np.add.reduceat(share, starts) / sizes
    for name, colour, label in (
        ("stale", _NEW, "stale in the prompt"),
        ("disowned", _STALE, "disowned: never rests"),
    ):
        drawn = np.add.reduceat(table[name], starts) / sizes / patches * 100
        reuse.plot(middle, drawn, color=colour, linewidth=1, label=label)
    if binned:
        shown = share
        low, high = np.fmin.reduceat(shown, starts), np.fmax.reduceat(shown, starts)
        reuse.fill_between(middle, low, high, color=_REUSED, alpha=0.2, linewidth=0, label="least to most")
    label = f"mean of {round(sizes.mean())} frames" if binned else "reused"
    reuse.plot(middle, mean, color=_REUSED, linewidth=1.3, label=label, **marker)
    renewed = {"markerfacecolor": _RENEWED, "markeredgecolor": _REUSED, "markersize": 7, "linestyle": "none"}
    label = f"a layer made anew ({refresh.sum()})"
    reuse.plot(index[refresh], share[refresh], "D", label=label, **renewed)
    label = f"new background ({miss.sum()})"
    reuse.plot(index[miss], np.full(miss.sum(), -6), "|", color=_NEW, markersize=9, label=label)
    reuse.set(ylim=(-11, 104), ylabel="vision tokens reused (%)", yticks=range(0, 101, 20))

    count = np.add.reduceat(table["reused"], starts)
    used = count > 0
    worst = np.where(used, np.maximum.reduceat(table["stale_max"], starts), np.nan)
    average = np.where(used, np.add.reduceat(table["stale_sum"], starts) / np.maximum(count, 1), np.nan)
    stale.plot(middle, worst, color=_STALE, linewidth=1.1, label="largest of the reused patches", **marker)
    stale.plot(middle, average, color=_REUSED, linewidth=1.3, label="mean of the reused patches", **marker)
    tolerance = figures["tolerance"]
    stale.axhline(tolerance, color=_TOLERANCE, linestyle="--", linewidth=1, label=f"tolerance {tolerance:g}")
    top = max(tolerance, figures["max_stale"]) * 1.12 or 1.0
    stale.set(ylim=(-0.03 * top, top), ylabel="staleness (grey levels)")

    last = [*(starts[1:] - 1), frames - 1]
    size = kept.twinx()
    mebibytes = np.maximum.reduceat(table["bytes"], starts) / 2**20
    size.fill_between(middle, mebibytes, step="mid", color=_BYTES, alpha=0.3, linewidth=0)
    size.set_ylabel("kept (MiB, area)", color=_BYTES)
    # More headroom than for the count: both often grow together, and would cover each other.
    size.set_ylim(0, max(mebibytes.max() * 1.7, 0.01))
    kept.step(middle, table["references"][last], where="mid", color=_REFERENCES, linewidth=1.4)
    kept.set(ylim=(0, max(table["references"].max() * 1.2, 1)), xlabel="frame")
    kept.set_ylabel("references (line)", color=_REFERENCES)
    kept.yaxis.get_major_locator().set_params(integer=True)
    kept.set_zorder(size.get_zorder() + 1)
    kept.patch.set_visible(False)
    for axes in (reuse, stale, kept, size):
        axes.spines["top"].set_visible(False)
    for axes in (reuse, stale):
        axes.spines["right"].set_visible(False)
        axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False, fontsize=9)
    for axes in (reuse, stale, kept):
        axes.grid(axis="y", color="#e3e5e8", linewidth=0.7)
        axes.set_axisbelow(True)
    margin = max(frames * 0.01, 0.5)
    kept.set_xlim(-margin, frames - 1 + margin)
    kept.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
