"""A frame as an engine takes it: patch groups as RGBA images, background first, each under the hash of its content.

A known background travels with the *reference's* pixels. The engine's prefix cache knows an item by its uuid, which it
never compares with the pixels; so the uuid must be a hash of them, and equal pixels must have equal uuids.
"""

import base64
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.matches_backdrop import MatchReport
from backdrop.processing.patch_groups_backdrop import (
    BACKGROUND,
    GROUP_KINDS,
    PatchGroup,
    group_to_image,
    save_group,
)
from backdrop.processing.processing_backdrop import BackdropProcessor

# What is read as one frame: an image, an array (H x W x 3), a path or a URL.
Frame: TypeAlias = Image.Image | np.ndarray | str | os.PathLike[str]
KEY_BYTES = 20
FAST_COMPRESSION = 1  # zlib level of the PNGs, which are sent once and not kept
ENCODED_GROUPS = 64  # PNGs kept of the backgrounds that were sent last, since the same ones are sent again


@dataclass(frozen=True)
class GroupItem:
    """One patch group, ready to be sent.

    Attributes:
        kind: "background" or "object".
        patches: how many it owns.
        key: hash of its pixels, patches, kind and geometry, hexadecimal.
        png: the RGBA image.
    """

    kind: str
    patches: int
    key: str
    png: bytes

    def part(self, prefix: str = "") -> dict:
        """A content part of the chat completions API; `prefix` of the uuid keeps tenants apart."""
        url = f"data:image/png;base64,{base64.b64encode(self.png).decode()}"
        return {"type": "image_url", "image_url": {"url": url}, "uuid": prefix + self.key}


@dataclass(frozen=True)
class SplitFrame:
    """A frame's patch groups.

    Attributes:
        items: the background, in one or two layers, and the objects, in this order; one of the two may be missing.
        reused: patches whose pixels are a reference's.
        total: patches that the groups own: those of the grid, without padding that is left out.
        stale: patches of the reference that fresh ones override.
        reference: the number of the reference that it matched; None: none.
    """

    items: tuple[GroupItem, ...]
    reused: int
    total: int
    stale: int = 0
    reference: int | None = None

    @property
    def background(self) -> GroupItem | None:
        """The background group, of two layers the one that changes less; None where everything is object."""
        return next((item for item in self.items if item.kind == GROUP_KINDS[BACKGROUND]), None)


class FrameSplitter:
    """Splits frames and matches their backgrounds as `processor.enable_background_matching` does. Thread-safe.

    Args:
        processor: the served model's. It is not changed: matching is switched on in a copy that shares its detector.
        tolerance: largest staleness that is reused, grey levels; 10 suits cameras, 0 reuses equal pixels only.
        fit: what becomes of frames that are not square, "crop", "pad" or "stretch"; None: what the processor says. Groups
            carry it, and an engine refuses those of another fit.
        matching: options of `BackgroundMatcher`.

    Attributes:
        processor: the copy of the image processor.
        matcher: its `BackgroundMatcher`, with this splitter's references.

    Raises:
        TypeError: `processor` is no Backdrop processor.
        ValueError: a matching option is out of its range.
    """

    def __init__(
        self,
        processor: BackdropProcessor | BackdropImageProcessor,
        tolerance: float = 10.0,
        fit: str | None = None,
        **matching: Any,
    ) -> None:
        images = getattr(processor, "image_processor", processor)
        if not isinstance(images, BackdropImageProcessor):
            raise TypeError(
                f"processor is a {type(images).__name__}; wanted a Backdrop processor "
                "(BackdropProcessor.from_pretrained)."
            )
        # A processor has one matcher: a second splitter of the same processor would replace the first one's.
        self.processor = images.twin()
        if fit is not None:
            self.processor.fit = fit
        self.matcher = self.processor.enable_background_matching(tolerance, **matching)
        self._encoded: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        # The matcher reports in the thread that asks it to match.
        self._report = threading.local()
        self.matcher.observer = lambda report: setattr(self._report, "value", report)

    @property
    def pads(self) -> bool:
        """Whether images that are not square are padded to a square, which may have many more pixels."""
        return self.processor.fit == "pad"

    @property
    def encoded_backgrounds(self) -> int:
        """PNGs of backgrounds that are kept."""
        return len(self._encoded)

    def load_detector(self) -> None:
        """Loads the detector, which is otherwise loaded when the first image is split."""
        self.processor.load_detector()

    def split(
        self,
        frame: Frame | PatchGroup,
        namespace: str = "",
        match: bool = True,
        split: bool = True,
        tolerance: float | None = None,
    ) -> SplitFrame:
        """The patch groups of a frame.

        Args:
            frame: PIL image, array, path or URL; a patch group is taken as it stands.
            namespace: of the references that it may match, or become; nothing crosses from one to another.
            match: False neither uses nor leaves a reference.
            split: False gives the whole frame as one background group (plain LLaVA).
            tolerance: of this frame, grey levels; None: the splitter's.

        Raises:
            ValueError: the image cannot be read, or is no valid patch group.
        """
        if isinstance(frame, str) or hasattr(frame, "__fspath__"):
            frame = self.processor.fetch_images(frame)
        self._report.value = None
        with self.matcher.scope(namespace=namespace, bypass=not match, tolerance=tolerance):
            groups = self.processor.image_groups([frame], split=split)[0]
        items = tuple(self.item(group) for group in groups)
        report: MatchReport | None = self._report.value
        owned = np.logical_or.reduce([group.patch_mask for group in groups])
        total = int(owned.sum())
        if report is None or report.reference is None:
            return SplitFrame(items, 0, total)
        reused = int((~report.encoded & owned).sum())
        return SplitFrame(items, reused, total, int(report.stale.sum()), report.reference.reference_id)

    def item(self, group: PatchGroup) -> GroupItem:
        """A group, hashed and encoded; the PNGs of the last `ENCODED_GROUPS` backgrounds are not made again."""
        geometry, patch_size = self.processor.geometry(), self.processor.patch_size
        key = group_key(group, patch_size, geometry)
        with self._lock:
            png = self._encoded.get(key)
            if png is not None:
                self._encoded.move_to_end(key)
        if png is None:
            buffer = BytesIO()
            save_group(group_to_image(group, patch_size, geometry), buffer, FAST_COMPRESSION)
            png = buffer.getvalue()
            if group.kind == BACKGROUND:
                with self._lock:
                    self._encoded[key] = png
                    while len(self._encoded) > ENCODED_GROUPS:
                        self._encoded.popitem(last=False)
        return GroupItem(GROUP_KINDS[group.kind], int(group.patch_mask.sum()), key, png)


def group_key(group: PatchGroup, patch_size: int, geometry: str) -> str:
    """160-bit hash of a group's pixels, patches, kind and geometry, in hexadecimal.

    Args:
        group: pixels outside its patches are 0.
        patch_size: pixels.
        geometry: how the image was resized, as `BackdropImageProcessor.geometry` names it.
    """
    digest = blake2b(digest_size=KEY_BYTES)
    digest.update(f"{group.pixels.shape} {patch_size} {geometry} {group.kind}".encode())
    digest.update(np.packbits(group.patch_mask).tobytes())
    digest.update(np.ascontiguousarray(group.pixels).tobytes())
    return digest.hexdigest()
