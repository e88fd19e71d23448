"""Cost of recognising a background among many: median and 95th percentile of one image, in one process.

    backdrop bench matching --references 1000,100000 --json matching.json

Each reference is an image of its own; a query is one of them under sensor noise with a rectangle changed, or an image
that matches none. Timed: `BackgroundMatcher.find` (descriptor, candidates, full comparisons) and `accept` (running
mean, counters) of a hit, `find` of a miss.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from backdrop.processing.background_matching_backdrop import BackgroundMatcher

from .report import machine, versions, write_json_atomically


def run_matching(
    references: list[int],
    size: int = 336,
    patch_size: int = 14,
    queries: int = 100,
    tolerance: float = 10.0,
    folder: Path | None = None,
    json_path: Path | None = None,
) -> list[dict]:
    """One row a number of references: `references, find_ms_median, find_ms_p95, accept_ms_median, miss_ms_median,
    hits, memory_bytes, file_bytes`.

    Args:
        references: how many known backgrounds; each needs `size * size * 3` bytes of disk.
        size, patch_size: pixels.
        folder: where the mapped files live.
    """
    rows = []
    for count in references:
        if count < 1:
            raise ValueError(f"references is {count}; wanted 1 or more.")
        with tempfile.TemporaryDirectory(dir=folder, prefix="backdrop-bench-") as scratch:
            rows.append(_measure(count, size, patch_size, queries, tolerance, scratch))
        if json_path is not None:
            write_json_atomically(json_path, rows)
    return rows


def _measure(count: int, size: int, patch_size: int, queries: int, tolerance: float, folder: str) -> dict:
    matcher = BackgroundMatcher(patch_size, tolerance, max_references=count, folder=folder)
    owned: np.ndarray = np.ones((size // patch_size) ** 2, dtype=bool)
    for seed in tqdm(range(count), desc=f"{count} references", unit="reference", disable=None):
        matcher.add(_image(seed, size), owned)
    rng = np.random.default_rng(0)
    found, accepted, missed, hits = [], [], [], 0
    for i in range(queries + 5):
        image = _image(int(rng.integers(count)), size)
        image = np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
        top, left = rng.integers(0, size - size // 4, 2)
        image[top : top + size // 4, left : left + size // 4] = rng.integers(0, 256, 3)
        started = time.perf_counter()
        match = matcher.find(image)
        between = time.perf_counter()
        if match is not None:
            matcher.accept(image, match)
        ended = time.perf_counter()
        unknown = _image(count + i, size)
        before = time.perf_counter()
        matcher.find(unknown)
        after = time.perf_counter()
        if i < 5:  # warm-up
            continue
        hits += match is not None
        found.append(between - started)
        accepted.append(ended - between)
        missed.append(after - before)
    stats = matcher.stats()
    return {
        "references": count,
        "size": size,
        "patch_size": patch_size,
        "queries": queries,
        "hits": hits,
        "find_ms_median": 1000 * float(np.median(found)),
        "find_ms_p95": 1000 * float(np.percentile(found, 95)),
        "accept_ms_median": 1000 * float(np.median(accepted)),
        "miss_ms_median": 1000 * float(np.median(missed)),
        "memory_bytes": stats["memory_bytes"],
        "file_bytes": stats["file_bytes"],
        "machine": machine("cpu"),
        "versions": versions(),
    }


def _image(seed: int, size: int) -> np.ndarray:
    """Blocks of random colours, different for every seed, uint8 `[size, size, 3]`."""
    cells = np.random.default_rng([7, seed]).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return cells.repeat(size // 12, axis=0).repeat(size // 12, axis=1)


def render_markdown(rows: list[dict]) -> str:
    """A table from the JSON rows."""
    lines = [
        "| known backgrounds | find, median | find, p95 | accept, median | a miss, median | hits | memory | files |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['references']:,} | {row['find_ms_median']:.1f} ms | {row['find_ms_p95']:.1f} ms "
            f"| {row['accept_ms_median']:.1f} ms | {row['miss_ms_median']:.1f} ms | {row['hits']} of {row['queries']} "
            f"| {row['memory_bytes'] / 2**20:.0f} MiB | {row['file_bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines) + "\n"
