"""Draws `docs/pictures/concepts.png`: the words of `docs/concepts.md` on two frames of one drawn street.

    python docs/pictures/concepts.py

Everything shown is what the production processor and matcher of `examples/scenes-model` make of the frames.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from backdrop.processing.image_processing_backdrop import BackdropImageProcessor  # noqa: E402
from backdrop.processing.patch_groups_backdrop import BACKGROUND, covered_patches  # noqa: E402
from backdrop.scenes.world import background_seeds, camera_clip  # noqa: E402

BLUE, ORANGE, LIGHT_ORANGE, GREY = (46, 111, 190), (240, 132, 30), (250, 190, 120), (196, 200, 206)
INK, FAINT, PAPER = (32, 36, 42), (100, 106, 114), (255, 255, 255)
SCALE, PANEL, GAP, LEFT = 2, 336, 36, 40  # panels are drawn at twice the model's 168 px
FRAMES = (10, 13)


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def tinted(
    pixels: np.ndarray, patch_size: int, colours: list[tuple[np.ndarray, tuple]], hatched=None
) -> Image.Image:
    """A frame under a grid, each set of patches `[P]` in its colour; `hatched` patches get diagonal stripes."""
    image = Image.fromarray(pixels).resize((PANEL, PANEL), Image.Resampling.NEAREST)
    grid, step = pixels.shape[0] // patch_size, patch_size * SCALE
    for mask, colour in colours:
        for i in np.flatnonzero(mask):
            y, x = divmod(int(i), grid)
            box = (x * step, y * step, (x + 1) * step, (y + 1) * step)
            tile = image.crop(box)
            image.paste(
                Image.blend(tile, Image.new("RGB", tile.size, colour), 0.9 if colour == GREY else 0.5), box
            )
    draw = ImageDraw.Draw(image)
    for i in np.flatnonzero(hatched) if hatched is not None else ():
        y, x = divmod(int(i), grid)
        for offset in range(0, step, 7):
            draw.line([(x * step + offset, y * step), (x * step, y * step + offset)], fill=BLUE, width=2)
            draw.line(
                [((x + 1) * step, y * step + offset), (x * step + offset, (y + 1) * step)], fill=BLUE, width=2
            )
    for i in range(grid + 1):
        draw.line([(i * step, 0), (i * step, PANEL)], fill=(255, 255, 255), width=1)
        draw.line([(0, i * step), (PANEL, i * step)], fill=(255, 255, 255), width=1)
    return image


def boxed(pixels: np.ndarray, found) -> Image.Image:
    image = Image.fromarray(pixels).resize((PANEL, PANEL), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    for box, kind in zip(found.xyxy, found.class_id, strict=True):
        x0, y0, x1, y1 = (float(v) * SCALE for v in box)
        draw.rectangle((x0, y0, min(x1, PANEL - 2), min(y1, PANEL - 2)), outline=(214, 39, 77), width=3)
        draw.rectangle((x0, y0 - 18, x0 + 46, y0), fill=(214, 39, 77))
        draw.text((x0 + 5, y0 - 17), found.names[int(kind)], fill=PAPER, font=font(13))
    return image


def main() -> None:
    processor = BackdropImageProcessor.from_pretrained(str(ROOT / "examples" / "scenes-model"))
    matcher = processor.enable_background_matching(tolerance=0)
    clip = camera_clip("street", background_seeds("test")[0], max(FRAMES) + 1, 0)
    first, second = (processor.model_images([clip[i].image])[0] for i in FRAMES)
    found = processor.detections([first])[0]
    p = processor.patch_size
    detected = covered_patches(found.combined_mask(first.shape[0]), p)
    groups = processor.image_groups([clip[FRAMES[0]].image])[0]
    background = next(group.patch_mask for group in groups if group.kind == BACKGROUND)
    objects = ~background
    match = matcher.match(second)
    reference = match.reference
    owned, fresh = reference.patch_mask, match.fresh
    overridden, unseen = fresh & owned, fresh & ~owned
    reused = ~fresh

    width = LEFT * 2 + 3 * PANEL + 2 * GAP + 330
    sheet = Image.new("RGB", (width, 1130), PAPER)
    draw = ImageDraw.Draw(sheet)
    columns = [LEFT + i * (PANEL + GAP) for i in range(3)]

    def panel(column: int, top: int, title: str, image: Image.Image, note: str) -> None:
        draw.text((columns[column], top), title, fill=INK, font=font(19))
        sheet.paste(image, (columns[column], top + 28))
        draw.rectangle(
            (columns[column] - 1, top + 27, columns[column] + PANEL, top + 28 + PANEL), outline=GREY
        )
        draw.text((columns[column], top + 34 + PANEL), note, fill=FAINT, font=font(15))

    top = 24
    draw.text((LEFT, top), "A frame of an unknown background", fill=INK, font=font(24))
    top += 44
    panel(0, top, "Detector: YOLO", boxed(first, found), f"{len(found.xyxy)} boxes")
    panel(
        1,
        top,
        "Patches of two groups",
        tinted(first, p, [(background, BLUE), (detected, ORANGE), (objects & ~detected, LIGHT_ORANGE)]),
        f"{background.sum()} background, {objects.sum()} object (margin of 1 patch)",
    )
    shown = reference.pixels.copy()
    panel(
        2, top, "Reference", tinted(shown, p, [(~owned, GREY)]), f"owns {owned.sum()} of {len(owned)} patches"
    )
    top += PANEL + 92
    draw.text((LEFT, top), "A later frame of the same background", fill=INK, font=font(24))
    top += 44
    panel(
        0,
        top,
        "Frame",
        Image.fromarray(second).resize((PANEL, PANEL), Image.Resampling.NEAREST),
        "no detector runs",
    )
    panel(
        1,
        top,
        "Matched against the reference",
        tinted(second, p, [(reused, BLUE), (fresh, ORANGE)], hatched=overridden),
        f"{reused.sum()} reused, {fresh.sum()} fresh: {unseen.sum()} not owned, {overridden.sum()} stale",
    )
    mixed = np.where(
        np.kron(fresh.reshape(12, 12), np.ones((p, p), dtype=bool))[..., None], second, 255
    ).astype(np.uint8)
    panel(
        2,
        top,
        "Encoded for this frame",
        tinted(mixed, p, [(fresh, ORANGE)], hatched=overridden),
        "only the fresh group",
    )

    legend = [
        (BLUE, "background patch, or reused", None),
        (ORANGE, "object patch, or fresh", None),
        (LIGHT_ORANGE, "object patch by margin", None),
        (GREY, "not owned by the reference", None),
        (ORANGE, "fresh, and overrides a patch", "the reference owns (stale there)"),
    ]
    x, y = columns[2] + PANEL + GAP, 100
    for i, (colour, words, more) in enumerate(legend):
        draw.rectangle((x, y, x + 22, y + 22), fill=colour)
        if i == 4:
            for offset in range(0, 23, 7):
                draw.line([(x + offset, y), (x, y + offset)], fill=BLUE, width=2)
                draw.line([(x + 22, y + offset), (x + offset, y + 22)], fill=BLUE, width=2)
        draw.text((x + 34, y + 1), words, fill=INK, font=font(16))
        if more:
            draw.text((x + 34, y + 21), more, fill=INK, font=font(16))
        y += 36

    prompt(draw, top + PANEL + 96, width, int(owned.sum()), int(fresh.sum()), int(overridden.sum()))
    sheet.save(Path(__file__).with_suffix(".png"), optimize=True)


def prompt(
    draw: ImageDraw.ImageDraw, top: int, width: int, background: int, fresh: int, overridden: int
) -> None:
    """The later frame's prompt as a strip of tokens, and what of it is a prefix."""
    draw.text((LEFT, top), "The later frame's prompt", fill=INK, font=font(24))
    top += 48
    parts = [
        ("system text", GREY, 150),
        ("[BG_START]", INK, 116),
        (f"background: {background} tokens of the reference", BLUE, 460),
        ("[BG_END]", INK, 100),
        ("[OBJ_START]", INK, 122),
        (f"fresh: {fresh} tokens", ORANGE, 220),
        ("[OBJ_END]", INK, 106),
        ("question", GREY, 130),
    ]
    x, ends = LEFT, []
    for words, colour, size in parts:
        draw.rectangle((x, top, x + size - 4, top + 44), fill=colour)
        ink = INK if colour in (GREY, ORANGE) else PAPER
        draw.text((x + size / 2 - 2, top + 22), words, fill=ink, font=font(16), anchor="mm")
        x += size
        ends.append(x - 4)
    for start, end, words in (
        (LEFT, ends[3], "prefix: keys and values are in the cache (one segment for each background)"),
        (ends[3] + 4, ends[7], "computed for this frame"),
    ):
        y = top + 58
        draw.line([(start, y), (end, y)], fill=FAINT, width=2)
        draw.line([(start, y - 6), (start, y)], fill=FAINT, width=2)
        draw.line([(end, y - 6), (end, y)], fill=FAINT, width=2)
        draw.text(((start + end) / 2, y + 18), words, fill=FAINT, font=font(16), anchor="mm")


if __name__ == "__main__":
    main()
