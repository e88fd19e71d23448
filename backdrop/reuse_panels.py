"""The pictures of `backdrop ask --reuse --show DIR`: which patches were reused, and why the others were not."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from backdrop.processing.matches_backdrop import MatchReport

REUSED, OBJECT, CHANGED, ENCODED = (46, 111, 190), (240, 132, 30), (205, 40, 150), (150, 156, 164)
LEGEND = (
    ("reused", REUSED),
    ("fresh: an object is or was there", OBJECT),
    ("fresh: it changed", CHANGED),
    ("encoded for the first time", ENCODED),
)
_SMALLEST_SIDE = 448
_INK, _PAPER = (32, 36, 42), (255, 255, 255)
_MARGIN, _LINE = 16, 22


def patch_reasons(report: MatchReport) -> np.ndarray:
    """What became of each patch: int `[P]`, an index into `LEGEND`."""
    if report.reference is None or report.refreshed:
        return np.where(report.objects, 1, 3)
    reasons = np.zeros(len(report.fresh), dtype=np.int64)
    reasons[report.stale] = 2
    reasons[report.unseen | report.objects] = 1
    return reasons


def reuse_panel(report: MatchReport, patch_size: int, title: str) -> Image.Image:
    """The frame as the model sees it, each patch framed in the colour of its reason, and a legend with shares.

    Args:
        report: of the frame.
        patch_size: pixels.
        title: shown above.
    """
    reasons = patch_reasons(report)
    side = report.image.shape[0]
    scale = max(1, -(-_SMALLEST_SIDE // side))
    panel = Image.fromarray(report.image).resize((side * scale, side * scale), Image.Resampling.NEAREST)
    grid = side // patch_size
    colours = np.array([colour for _, colour in LEGEND], dtype=np.uint8)[reasons].reshape(grid, grid, 3)
    tint = Image.fromarray(colours).resize((grid * patch_size * scale,) * 2, Image.Resampling.NEAREST)
    # What is reused stays as it looks; what was computed is tinted.
    strength = np.where(reasons == 0, 70, 120).astype(np.uint8).reshape(grid, grid)
    mask = Image.fromarray(strength).resize(tint.size, Image.Resampling.NEAREST)
    panel.paste(tint, (0, 0), mask)
    draw = ImageDraw.Draw(panel)
    step = patch_size * scale
    for i in range(grid + 1):
        draw.line([(i * step, 0), (i * step, grid * step)], fill=(255, 255, 255), width=1)
        draw.line([(0, i * step), (grid * step, i * step)], fill=(255, 255, 255), width=1)
    counts = np.bincount(reasons, minlength=len(LEGEND))
    entries = [(i, name) for i, (name, _) in enumerate(LEGEND) if counts[i]]
    height = _MARGIN + _LINE + 8 + panel.height + 12 + _LINE * len(entries) + _MARGIN
    sheet = Image.new("RGB", (panel.width + 2 * _MARGIN, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=ImageFont.load_default(17))
    top = _MARGIN + _LINE + 8
    sheet.paste(panel, (_MARGIN, top))
    top += panel.height + 12
    for i, name in entries:
        draw.rectangle([(_MARGIN, top + 2), (_MARGIN + 14, top + 16)], fill=LEGEND[i][1])
        text = f"{name}: {counts[i]} of {len(reasons)} patches"
        draw.text((_MARGIN + 24, top), text, fill=_INK, font=ImageFont.load_default(15))
        top += _LINE
    return sheet
