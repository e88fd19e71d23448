"""The picture drawn by `backdrop split IMAGE... --out panels.png`: images on their way to patch groups."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from backdrop.processing.detections_backdrop import Detections
from backdrop.processing.picture_placement_backdrop import PicturePlacement

COLUMNS = ("Original image", "What the model sees", "Detector", "Object pixels", "Patch groups")

# In all pictures and plots blue is the background and orange what is fresh, objects first of all.
BACKGROUND_COLOUR = (46, 111, 190)
OBJECT_COLOUR = (240, 132, 30)
_INK, _FAINT, _FRAME, _PAPER = (32, 36, 42), (110, 116, 124), (200, 204, 210), (255, 255, 255)
_UNOWNED = (225, 227, 230)
# Of boxes by class: neither blue nor orange.
_BOXES = ((214, 39, 77), (18, 120, 84), (128, 62, 186), (90, 94, 100), (196, 0, 150), (110, 20, 48))
_TINT, _MARGIN_TINT = 0.6, 0.25  # strength of the colour over a patch; over one that only the margin adds

_HATCH = 12  # pixels between two lines over what the model does not see, and over padding
_SMALLEST_PANEL = 320  # smaller images are drawn magnified
_MARGIN, _GAP = 28, 20
_TITLE, _NAME, _TEXT, _LABEL = 17, 18, 15, 13  # font sizes


@dataclass(frozen=True, eq=False)
class PanelRow:
    """What is known of one image after it was split.

    Attributes:
        name: Shown above the row.
        original: The image as it was given, of any size.
        detections: What the detector found, in the geometry of `model_image`.
        model_image: uint8 `[S, S, 3]` RGB, after resizing and cropping or padding.
        pixel_mask: bool `[S, S]`, the pixels that count as objects.
        groups: The patch groups, each a kind (`"background"` or `"object"`) and the patches it owns: bool
            `[P]` with `P = (S // patch_size) ** 2` in row-major order. Groups may overlap.
        patch_size: Side of a patch in pixels.
        margin: Patches by which the objects were grown.
        placement: Where the original lies in the model's square; None: not known, nothing is said of it.
    """

    name: str
    original: Image.Image
    detections: Detections
    model_image: np.ndarray
    pixel_mask: np.ndarray
    groups: list[tuple[str, np.ndarray]]
    patch_size: int
    margin: int = 0
    placement: PicturePlacement | None = None


def split_panels(rows: list[PanelRow]) -> Image.Image:
    """Draws one row of five panels for each image, and a legend.

    Args:
        rows: The images, at least one; their sizes may differ.

    Returns:
        An RGB image.

    Raises:
        ValueError: If there are no rows, or a row's arrays do not fit each other.
    """
    if not rows:
        raise ValueError("rows is empty; wanted at least one image")
    for row in rows:
        _check(row)
    column_width = max(_panel_side(row) for row in rows)
    header_height, legend_height = _TITLE + 22, _TEXT + 1
    width = 2 * _MARGIN + len(COLUMNS) * column_width + (len(COLUMNS) - 1) * _GAP
    height = 2 * _MARGIN + header_height + sum(_row_height(row) for row in rows) + legend_height
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = [_MARGIN + column * (column_width + _GAP) for column in range(len(COLUMNS))]

    for left, title in zip(lefts, COLUMNS, strict=True):
        _write(draw, (left, _MARGIN), title, _TITLE, _INK, column_width)
    line = _MARGIN + header_height - 12
    draw.line([(_MARGIN, line), (width - _MARGIN, line)], fill=_FRAME)

    top = _MARGIN + header_height
    for row in rows:
        side = _panel_side(row)
        _write(draw, (_MARGIN, top), row.name, _NAME, _INK, width - 2 * _MARGIN)
        panel_top = top + _NAME + 12
        for left, (panel, caption) in zip(lefts, _panels(row), strict=True):
            y = panel_top + (side - panel.height) // 2
            sheet.paste(panel, (left, y))
            draw.rectangle((left - 1, y - 1, left + panel.width, y + panel.height), outline=_FRAME)
            _write(draw, (left, panel_top + side + 8), caption, _TEXT, _FAINT, column_width)
        top += _row_height(row)
    hatched = any(row.placement and (any(row.placement.lost) or row.placement.padded) for row in rows)
    _legend(sheet, _MARGIN, top, max(row.margin for row in rows), hatched)
    return sheet


def _check(row: PanelRow) -> None:
    size = row.model_image.shape[0]
    if row.model_image.dtype != np.uint8 or row.model_image.shape != (size, size, 3):
        raise ValueError(
            f"{row.name}: model_image has shape {row.model_image.shape} and dtype {row.model_image.dtype}; "
            "wanted square uint8 [S, S, 3]"
        )
    if row.pixel_mask.shape != (size, size):
        raise ValueError(f"{row.name}: pixel_mask has shape {row.pixel_mask.shape}; wanted {(size, size)}")
    patches = (size // row.patch_size) ** 2
    for kind, owned in row.groups:
        if kind not in ("background", "object"):
            raise ValueError(f"{row.name}: a group's kind is {kind!r}; wanted 'background' or 'object'")
        if owned.shape != (patches,):
            raise ValueError(f"{row.name}: a group's patches have shape {owned.shape}; wanted {(patches,)}")


def _scale(row: PanelRow) -> int:
    return -(-_SMALLEST_PANEL // row.model_image.shape[0])


def _panel_side(row: PanelRow) -> int:
    return row.model_image.shape[0] * _scale(row)


def _row_height(row: PanelRow) -> int:
    return _NAME + 12 + _panel_side(row) + 8 + _TEXT + 30


def _panels(row: PanelRow) -> list[tuple[Image.Image, str]]:
    """The five panels of a row with their captions, in the order of `COLUMNS`."""
    size, side = row.model_image.shape[0], _panel_side(row)
    original = row.original.convert("RGB")
    shrink = side / max(original.size)
    fitted = original.resize(
        [max(1, round(length * shrink)) for length in original.size], Image.Resampling.LANCZOS
    )
    fitted = _with_cut_hatched(fitted, row.placement)
    seen = _enlarged(row.model_image, side)
    cut, bars = _loss_in_words(row.placement)
    found = Counter(row.detections.names[int(class_id)] for class_id in row.detections.class_id)
    objects = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in found.items())
    patches, counts = _patch_panel(row, seen)
    return [
        (fitted, f"{original.width} x {original.height} px{cut}"),
        (
            _with_bars_hatched(seen, row.placement),
            f"{size} x {size} px, patches of {row.patch_size} px{bars}",
        ),
        (_detector_panel(row, seen), objects or "nothing found"),
        (_mask_panel(row, side), f"{row.pixel_mask.mean():.0%} of the pixels"),
        (patches, counts),
    ]


def _loss_in_words(placement: PicturePlacement | None) -> tuple[str, str]:
    """What is added to the captions of the original and of the model's square."""
    if placement is None:
        return "", ""
    width, height = placement.lost
    losses = [f"{share:.0%} of the {side}" for share, side in ((width, "width"), (height, "height")) if share]
    cut = f", {' and '.join(losses)} cut off" if losses else ""
    return cut, f", {placement.padded:.0%} padding" if placement.padded else ""


def _with_cut_hatched(fitted: Image.Image, placement: PicturePlacement | None) -> Image.Image:
    """The original, whose parts that the model does not see are greyed and hatched."""
    if placement is None or not any(placement.lost):
        return fitted
    across, down = fitted.width / placement.width, fitted.height / placement.height
    left, top, right, bottom = placement.kept_box
    kept = (round(left * across), round(top * down), round(right * across), round(bottom * down))
    return _hatched_outside(fitted, kept)


def _with_bars_hatched(seen: Image.Image, placement: PicturePlacement | None) -> Image.Image:
    """The model's square with its bars hatched."""
    if placement is None or not placement.padded:
        return seen
    scale = seen.width / placement.side
    edges = (placement.left, placement.top, placement.right, placement.bottom)
    left, top, right, bottom = (min(max(round(float(edge) * scale), 0), seen.width) for edge in edges)
    return _hatched_outside(seen, (left, top, max(right, left + 1), max(bottom, top + 1)))


def _hatched_outside(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The image, pale and hatched outside a box of its pixels, which gets a frame."""
    outside = Image.new("L", image.size, 255)
    outside.paste(0, box)
    pale = Image.blend(image, Image.new("RGB", image.size, _UNOWNED), 0.65)
    draw = ImageDraw.Draw(pale)
    for start in range(-image.height, image.width, _HATCH):
        draw.line([(start, image.height), (start + image.height, 0)], fill=_FAINT, width=1)
    result = image.copy()
    result.paste(pale, mask=outside)
    if box[2] > box[0] and box[3] > box[1]:
        ImageDraw.Draw(result).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_INK)
    return result


def _enlarged(array: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST)


def _tinted(image: np.ndarray, where: np.ndarray, color: tuple[int, int, int], strength: float) -> np.ndarray:
    """uint8 `[H, W, 3]` with `color` laid over the pixels of `where`, bool `[H, W]`."""
    mixed: np.ndarray = image.astype(np.float32)
    mixed[where] = (1 - strength) * mixed[where] + strength * np.asarray(color, dtype=np.float32)
    return mixed.round().astype(np.uint8)


def _detector_panel(row: PanelRow, seen: Image.Image) -> Image.Image:
    size, scale = row.model_image.shape[0], _scale(row)
    mask = row.detections.combined_mask(size).repeat(scale, axis=0).repeat(scale, axis=1)
    panel = Image.fromarray(_tinted(np.asarray(seen), mask, OBJECT_COLOUR, 0.45))
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default(_LABEL)
    colors = {class_id: _BOXES[i % len(_BOXES)] for i, class_id in enumerate(sorted(row.detections.names))}
    # The most confident last, on top.
    order = np.argsort(row.detections.confidence, kind="stable")
    for i in order:
        left, top, right, bottom = (row.detections.xyxy[i] * scale).round().astype(int).tolist()
        right, bottom = min(right, panel.width - 1), min(bottom, panel.height - 1)
        draw.rectangle(
            (left, top, max(left, right), max(top, bottom)),
            outline=colors[int(row.detections.class_id[i])],
            width=2,
        )
    taken: list[tuple[int, int, int, int]] = []
    for i in order[::-1]:
        class_id = int(row.detections.class_id[i])
        text = f"{row.detections.names[class_id]} {row.detections.confidence[i]:.2f}"
        left, top = (row.detections.xyxy[i, :2] * scale).round().astype(int).tolist()
        chip_width, chip_height = round(font.getlength(text)) + 8, _LABEL + 5
        left = max(0, min(left, panel.width - chip_width))
        top = top - chip_height if top >= chip_height else top
        while any(_overlap((left, top, left + chip_width, top + chip_height), other) for other in taken):
            top += chip_height
        chip = (left, top, left + chip_width, top + chip_height)
        taken.append(chip)
        draw.rectangle(chip, fill=colors[class_id])
        draw.text((left + 4, top + chip_height / 2), text, font=font, fill=_PAPER, anchor="lm")
    return panel


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _mask_panel(row: PanelRow, side: int) -> Image.Image:
    colors = np.where(row.pixel_mask[..., None], np.uint8(OBJECT_COLOUR), np.uint8(_UNOWNED))
    return _enlarged(colors, side)


def _patch_panel(row: PanelRow, seen: Image.Image) -> tuple[Image.Image, str]:
    size, cell = row.model_image.shape[0], row.patch_size * _scale(row)
    grid = size // row.patch_size
    owned = {kind: np.zeros((grid, grid), dtype=bool) for kind in ("background", "object")}
    for kind, patches in row.groups:
        owned[kind] |= patches.reshape(grid, grid)
    background, objects = owned["background"], owned["object"]
    seen_pixels = row.pixel_mask[: grid * row.patch_size, : grid * row.patch_size]
    detected = seen_pixels.reshape(grid, row.patch_size, grid, row.patch_size).any(axis=(1, 3))
    by_margin = objects & ~detected

    # Colour over grey: an image's own blue or orange would read as a group.
    grey = np.asarray(seen.convert("L").point(lambda value: 128 + value // 2).convert("RGB"))
    canvas = _tinted(grey, np.ones(grey.shape[:2], dtype=bool), _UNOWNED, 0.75)
    y, x = np.mgrid[:cell, :cell]
    upper = x + y < cell
    whole: np.ndarray = np.ones((cell, cell), dtype=bool)
    extent = grid * cell
    for row_index, column in np.ndindex(grid, grid):
        place = (slice(row_index * cell, (row_index + 1) * cell), slice(column * cell, (column + 1) * cell))
        if background[row_index, column]:
            canvas[place] = _tinted(grey[place], whole, BACKGROUND_COLOUR, _TINT)
        if objects[row_index, column]:
            # A patch of both groups is cut in two.
            part = ~upper if background[row_index, column] else whole
            strength = _MARGIN_TINT if by_margin[row_index, column] else _TINT
            canvas[place][part] = _tinted(grey[place], whole, OBJECT_COLOUR, strength)[part]
    panel = Image.fromarray(canvas)
    lines = Image.new("L", panel.size, 0)
    draw = ImageDraw.Draw(lines)
    for position in range(0, extent + 1, cell):
        draw.line([(position, 0), (position, extent)], fill=90)
        draw.line([(0, position), (extent, position)], fill=90)
    panel.paste(Image.new("RGB", panel.size, _PAPER), mask=lines)

    margin = f" ({by_margin.sum()} margin)" if by_margin.any() else ""
    counts = f"{background.sum()} background + {objects.sum()} object{margin} of {grid * grid}"
    both = int((background & objects).sum())
    return panel, counts + (f", {both} in both" if both else "")


def _legend(sheet: Image.Image, left: int, top: int, margin: int, hatched: bool) -> None:
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT)
    swatch = _TEXT + 1
    margin_colour = tuple(
        round(_UNOWNED[i] + 2 * _MARGIN_TINT * (OBJECT_COLOUR[i] - _UNOWNED[i])) for i in range(3)
    )
    entries = (
        ("background patch", BACKGROUND_COLOUR, None),
        ("detected object: its pixels, and patches that have some", OBJECT_COLOUR, None),
        (f"object patch added by the margin of {margin} patch{'es' * (margin != 1)}", margin_colour, None),
        ("patch of both groups", BACKGROUND_COLOUR, OBJECT_COLOUR),
        ("neither", _UNOWNED, None),
    )
    for text, color, second in entries:
        box = (left, top, left + swatch, top + swatch)
        draw.rectangle(box, fill=color)
        if second is not None:
            draw.polygon(
                [(left + swatch, top), (left + swatch, top + swatch), (left, top + swatch)], fill=second
            )
        draw.rectangle(box, outline=_FRAME)
        draw.text((left + swatch + 8, top + swatch / 2), text, font=font, fill=_FAINT, anchor="lm")
        left += swatch + 8 + round(font.getlength(text)) + 28
    if hatched:
        sample = _hatched_outside(Image.new("RGB", (swatch, swatch), _UNOWNED), (0, 0, 0, 0))
        sheet.paste(sample, (left, top))
        text = "cut off, or padding"
        draw.text((left + swatch + 8, top + swatch / 2), text, font=font, fill=_FAINT, anchor="lm")


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    font_size: int,
    color: tuple[int, int, int],
    width: int,
) -> None:
    """One line of text, cut with an ellipsis where it is wider than `width`."""
    font = ImageFont.load_default(font_size)
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    draw.text(at, text, font=font, fill=color)
