"""The pictures of `backdrop ask --reuse --show DIR`: what became of each patch of a frame, in words and colours."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from backdrop.processing.matches_backdrop import MatchReport

from .panels import BACKGROUND_COLOUR, OBJECT_COLOUR

# What can become of a patch: background in blue, fresh patches in orange, as in the other pictures.
REUSED, ENCODED, OBJECT, STALE, UNOWNED = range(5)
LEGEND = (
    ("background, reused", BACKGROUND_COLOUR),
    ("background, encoded now", (150, 186, 226)),
    ("fresh: an object is here", OBJECT_COLOUR),
    ("fresh: differs from the reference (stale)", (186, 72, 10)),
    ("fresh: not owned by the reference (an object stood here)", (248, 196, 132)),
)
_TINT = 0.6
_SMALLEST_SIDE = 448
_INK, _FAINT, _PAPER = (32, 36, 42), (110, 116, 124), (255, 255, 255)
_MARGIN, _GAP, _LINE = 16, 16, 22


def patch_states(report: MatchReport) -> np.ndarray:
    """What became of each patch: int `[P]`, an index into `LEGEND`."""
    if report.reference is None:
        return np.where(report.objects, OBJECT, ENCODED)
    # The tokens of a layer made anew are computed once more.
    states = np.where(report.encoded, ENCODED, REUSED)
    states[report.stale & report.fresh] = STALE
    states[report.unseen & report.fresh] = UNOWNED
    states[report.objects] = OBJECT
    return states


def what_happened(report: MatchReport) -> str:
    """The frame's outcome in a sentence."""
    if report.reference is None:
        return "New background: it is kept as a reference for the frames to come."
    if report.refreshed:
        return "Known background, a layer made anew from recent frames: that layer is encoded once more."
    return "Known background: what did not change is reused."


def reuse_panel(report: MatchReport, patch_size: int, title: str) -> Image.Image:
    """The frame as the model sees it, beside it what became of its patches, and a legend with counts.

    Args:
        report: of the frame.
        patch_size: pixels.
        title: shown above.
    """
    states = patch_states(report)
    side = report.image.shape[0]
    scale = max(1, -(-_SMALLEST_SIDE // side))
    seen = Image.fromarray(report.image).resize((side * scale, side * scale), Image.Resampling.NEAREST)
    # Colour over grey: an image's own blue or orange would read as a state.
    panel = seen.convert("L").point(lambda value: 128 + value // 2).convert("RGB")
    grid = side // patch_size
    colours = np.array([colour for _, colour in LEGEND], dtype=np.uint8)[states].reshape(grid, grid, 3)
    tint = Image.fromarray(colours).resize((grid * patch_size * scale,) * 2, Image.Resampling.NEAREST)
    panel.paste(tint, (0, 0), Image.new("L", tint.size, round(255 * _TINT)))
    draw = ImageDraw.Draw(panel)
    step = patch_size * scale
    for i in range(grid + 1):
        draw.line([(i * step, 0), (i * step, grid * step)], fill=_PAPER, width=1)
        draw.line([(0, i * step), (grid * step, i * step)], fill=_PAPER, width=1)
    counts = np.bincount(states, minlength=len(LEGEND))
    entries = [(i, name) for i, (name, _) in enumerate(LEGEND) if counts[i]]
    top = _MARGIN + 2 * _LINE + 8
    height = top + panel.height + 12 + _LINE * len(entries) + _MARGIN
    sheet = Image.new("RGB", (2 * panel.width + _GAP + 2 * _MARGIN, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=ImageFont.load_default(17))
    draw.text((_MARGIN, _MARGIN + _LINE), what_happened(report), fill=_FAINT, font=ImageFont.load_default(15))
    sheet.paste(seen, (_MARGIN, top))
    sheet.paste(panel, (_MARGIN + panel.width + _GAP, top))
    top += panel.height + 12
    for i, name in entries:
        draw.rectangle([(_MARGIN, top + 2), (_MARGIN + 14, top + 16)], fill=LEGEND[i][1])
        text = f"{name}: {counts[i]} of {len(states)} patches"
        draw.text((_MARGIN + 24, top), text, fill=_INK, font=ImageFont.load_default(15))
        top += _LINE
    return sheet
