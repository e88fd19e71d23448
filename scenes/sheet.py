"""A contact sheet: a look at what the families draw and ask."""

from PIL import Image, ImageDraw, ImageFont

from .drawing import DESIGN_SIZE
from .render import FAMILIES, render_scene


def contact_sheet(backgrounds: int = 2, frames: int = 4, seed: int = 0, zoom: int = 2) -> Image.Image:
    """Rows of frames, one row to a background, with object boxes and one question and answer over each tile."""
    caption, gap = 34, 8
    tile = DESIGN_SIZE * zoom
    rows = [(family, seed + i) for family in FAMILIES for i in range(backgrounds)]
    sheet = Image.new(
        "RGB", (frames * (tile + gap) + gap, len(rows) * (tile + caption + gap) + gap), (250, 250, 250)
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for row, (family, background_seed) in enumerate(rows):
        for column in range(frames):
            scene = render_scene(family, background_seed, column)
            x, y = gap + column * (tile + gap), gap + row * (tile + caption + gap)
            asked = scene.questions[(row * frames + column) % len(scene.questions)]
            draw.text(
                (x, y),
                f"{family}  background {background_seed}  frame {column}",
                fill=(90, 90, 90),
                font=font,
            )
            draw.text((x, y + 15), f"{asked.question} {asked.answer}", fill=(10, 10, 10), font=font)
            sheet.paste(scene.image.resize((tile, tile), Image.Resampling.NEAREST), (x, y + caption))
            for item in scene.objects:
                x0, y0, x1, y1 = (v * zoom for v in item.xyxy)
                box = (x + x0 - 1, y + caption + y0 - 1, x + x1, y + caption + y1)
                draw.rectangle(box, outline=(255, 0, 200), width=1)
    return sheet
