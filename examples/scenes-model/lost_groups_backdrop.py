"""Pictures that were patch groups and are none any more: saved as JPEG, turned RGB, to a palette or to floats, resized.

Their holes would be encoded as black patches, and no error would say so. What says it is the text that travels with a
group, which PIL keeps through most changes, or else the holes themselves. The second is a guess, and a wrong alarm is worse
than a miss, so it asks for much: a picture of exactly the model's size, textured, whose black regions end at lines of the
patch grid and nowhere else, at four or more such lines.
"""

import numpy as np
from PIL import Image

from .patch_groups_backdrop import GROUP_ALPHA, METADATA_KEY, patch_blocks

BLACK = 12  # grey levels that JPEG makes of 0, at most on average
EDGE = 24  # grey levels by which a hole's border stands out at least, on average
MIN_LINES = 4  # of the patch grid, at which holes end: chance puts an edge on one in 1 of p cases
MIN_COLOURS = 64  # of the owned pixels: fewer are a drawing, whose shapes may follow any grid
SHARP_SHARE = 0.9  # of all borders of holes


def lost_group(image, side: int, patch_size: int) -> str | None:
    """Why a picture that is no patch group looks as if it had been one; None: it does not.

    Args:
        image: any image that the processor takes, and that `looks_like_group` does not hold for.
        side, patch_size: the model's.
    """
    if isinstance(image, Image.Image):
        if METADATA_KEY in image.info:
            return f"its text says so, but it is {image.mode}, {image.width} x {image.height} pixels"
        if image.size != (side, side) or image.mode not in ("RGB", "RGBA", "P"):
            return None
        pixels = np.asarray(image.convert("RGB"))
        exact = image.format in (None, "PNG", "BMP", "TIFF")
    else:
        array = np.asarray(image)
        if array.ndim != 3:
            return None
        if array.shape[0] in (3, 4) and array.shape[-1] not in (3, 4):
            array = np.moveaxis(array, 0, -1)
        if array.shape[-1] == 4 and array.dtype != np.uint8 and _has_group_alpha(array[..., 3]):
            return f"its alpha is a group's, but its values are {array.dtype}, not uint8"
        if array.shape[:2] != (side, side) or array.shape[-1] not in (3, 4):
            return None
        unit = np.issubdtype(array.dtype, np.floating) and array.max() <= 1
        pixels, exact = array[..., :3] * (255 if unit else 1), True
    if _has_group_holes(pixels, patch_size, exact):
        return "it has black holes that follow the patch grid, and no alpha"
    return None


def _has_group_alpha(alpha: np.ndarray) -> bool:
    """Whether an alpha that is no uint8 has a group's values, of 255 or of 1, and no others."""
    values = np.unique(alpha)
    scaled = np.round(values * (255 if values.size and values.max() <= 1 else 1))
    return bool(np.isin(scaled, (0, *GROUP_ALPHA)).all() and np.isin(scaled, GROUP_ALPHA).any())


def _has_group_holes(pixels: np.ndarray, patch_size: int, exact: bool) -> bool:
    """Whether the black regions of `[S, S, 3]` are holes of a patch group.

    Args:
        exact: holes are exactly 0; otherwise they are what a lossy format makes of 0.
    """
    centres = pixels[patch_size // 2 :: patch_size, patch_size // 2 :: patch_size]
    if not (centres.max(axis=-1) <= (0 if exact else 2 * BLACK)).any():
        return False  # most pictures: no patch can be a hole
    levels = pixels.max(axis=-1).astype(np.float32)  # [S, S]
    blocks = patch_blocks(levels[..., None], patch_size)[..., 0]  # [P, p, p]
    grid = pixels.shape[0] // patch_size
    holes = (blocks.max(axis=(1, 2)) == 0) if exact else (blocks.mean(axis=(1, 2)) <= BLACK)
    holes = holes.reshape(grid, grid)
    if not holes.any() or holes.all() or _is_rectangle(~holes):
        return False
    inner = levels[: grid * patch_size, : grid * patch_size]
    sharp, lines = [], 0
    for marks, values in ((holes, inner), (holes.T, inner.T)):
        # Borders between a line of patches and the next, along the first axis.
        borders = marks[1:] != marks[:-1]  # [g - 1, g]
        lines += int(borders.any(axis=1).sum())
        before = values[patch_size - 1 : -1 : patch_size].reshape(grid - 1, grid, patch_size)
        behind = values[patch_size::patch_size].reshape(grid - 1, grid, patch_size)
        # The pixels on the owned side of a border are a picture's, all along it; behind it there is nothing.
        owned = np.where(marks[1:, :, None], before, behind)
        empty = np.where(marks[1:, :, None], behind, before)
        stands_out = (owned.mean(axis=-1) - empty.mean(axis=-1) > EDGE) & (np.median(owned, axis=-1) > BLACK)
        sharp.append(stands_out[borders])
    shares = np.concatenate(sharp)
    if lines < MIN_LINES or shares.mean() < SHARP_SHARE:
        return False
    shown = pixels[: grid * patch_size, : grid * patch_size][
        ~np.kron(holes, np.ones((patch_size,) * 2, dtype=bool))
    ]
    return len(np.unique(shown.reshape(-1, 3), axis=0)) >= MIN_COLOURS


def _is_rectangle(marks: np.ndarray) -> bool:
    """Whether what is marked fills its bounding rectangle, as a picture between black bars does."""
    rows, columns = np.flatnonzero(marks.any(axis=1)), np.flatnonzero(marks.any(axis=0))
    return bool(marks[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())
