"""Frames as what an engine takes: patch groups as RGBA images, background first, each under the hash of its content.

A known background travels as the *reference's* pixels, so that the engine's prefix cache, which goes by the item's
uuid, knows it again. The engine never compares a uuid with pixels: it must be a hash of them, and is one here.
"""

import base64
import threading
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO

import numpy as np

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

KEY_BYTES = 20
FAST_COMPRESSION = 1  # of PNG: nobody keeps these
# Less than the matcher's own 0.3: among the backgrounds of strangers some differ in a sign only, which would be stale
# beside the fresh one (docs/serving.md).
MAX_OVERRIDDEN = 0.1
ENCODED_GROUPS = 64  # PNGs of the most recent backgrounds, which come again


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
        """A content part of the chat completions API; `prefix` sets tenants' uuids apart."""
        url = f"data:image/png;base64,{base64.b64encode(self.png).decode()}"
        return {"type": "image_url", "image_url": {"url": url}, "uuid": prefix + self.key}


@dataclass(frozen=True)
class SplitFrame:
    """A frame's groups and what became of its patches.

    Attributes:
        items: background first; one of the two may be missing.
        reused: patches whose pixels are a reference's.
        total: patches of the grid.
    """

    items: tuple[GroupItem, ...]
    reused: int
    total: int

    @property
    def background(self) -> GroupItem | None:
        return next((item for item in self.items if item.kind == GROUP_KINDS[BACKGROUND]), None)


class FrameSplitter:
    """Splits frames and matches their backgrounds as `processor.enable_background_matching` does. Thread-safe.

    Args:
        processor: the served model's; it stays as it is: matching is switched on in a copy that shares its detector.
        tolerance: largest staleness that is reused, grey levels; 10 suits cameras, 0 reuses equal pixels only.
        matching: options of `BackgroundMatcher`; max_overridden is 0.1 unless given.
    """

    def __init__(
        self, processor: BackdropProcessor | BackdropImageProcessor, tolerance: float = 10.0, **matching
    ):
        images = getattr(processor, "image_processor", processor)
        if not isinstance(images, BackdropImageProcessor):
            raise TypeError(
                f"processor is a {type(images).__name__}; wanted a Backdrop processor "
                "(BackdropProcessor.from_pretrained)."
            )
        # A processor has one matcher: two splitters of the same processor would take each other's away.
        self.processor = images.twin()
        matching = {"max_overridden": MAX_OVERRIDDEN, **matching}
        self.matcher = self.processor.enable_background_matching(tolerance, **matching)
        self._encoded: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        # The matcher reports in the thread that asks it.
        self._report = threading.local()
        self.matcher.observer = lambda report: setattr(self._report, "value", report)

    def split(self, frame, namespace: str = "", match: bool = True, split: bool = True) -> SplitFrame:
        """The groups of a frame.

        Args:
            frame: PIL image, array, path or URL; a patch group is taken as it stands.
            namespace: whose references: nothing crosses from one to another.
            match: False neither uses nor leaves a reference.
            split: False gives the whole frame as one background group (plain LLaVA).
        """
        if isinstance(frame, str) or hasattr(frame, "__fspath__"):
            frame = self.processor.fetch_images(frame)
        self._report.value = None
        with self.matcher.scope(namespace=namespace, bypass=not match):
            groups = self.processor.image_groups([frame], split=split)[0]
        items = tuple(self.item(group) for group in groups)
        report: MatchReport | None = self._report.value
        known = report is not None and report.reference is not None and not report.refreshed
        return SplitFrame(items, int((~report.fresh).sum()) if known else 0, len(groups[0].patch_mask))

    def item(self, group: PatchGroup) -> GroupItem:
        """A group, hashed and encoded."""
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
    """160-bit hash of everything that a group is."""
    digest = blake2b(digest_size=KEY_BYTES)
    digest.update(f"{group.pixels.shape} {patch_size} {geometry} {group.kind}".encode())
    digest.update(np.packbits(group.patch_mask).tobytes())
    digest.update(np.ascontiguousarray(group.pixels).tobytes())
    return digest.hexdigest()
