"""Frames as patch groups: their keys, what is kept of them, and which backgrounds are one."""

from dataclasses import replace

import numpy as np
import pytest
from fake_engine import red_scene
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from backdrop.processing.patch_groups_backdrop import BACKGROUND, OBJECT, make_group
from backdrop.scenes.world import render_scene
from backdrop.serving import FrameSplitter
from backdrop.serving.frames import ENCODED_GROUPS, group_key
from backdrop.serving.settings import Matching

PATCH = 14


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["pixel", "mask", "kind", "geometry", "patch size"]),
    st.integers(0, 10**6),
)
def test_whatever_differs_has_another_key(seed, what, place):
    random = np.random.default_rng(seed)
    mask = random.random(16) < 0.6
    mask[place % 16] = True
    pixels = random.integers(0, 255, (56, 56, 3), dtype=np.uint8)
    group = make_group(pixels, mask, BACKGROUND, PATCH)
    key = group_key(group, PATCH, "resize+crop")
    assert len(key) == 40 and key == group_key(
        make_group(pixels.copy(), mask.copy(), BACKGROUND, PATCH), PATCH, "resize+crop"
    )
    size, geometry, other = PATCH, "resize+crop", group
    if what == "pixel":
        row, column = divmod(place % 16, 4)
        changed = pixels.copy()
        changed[row * PATCH + place % PATCH, column * PATCH + place % 11, place % 3] += 1
        other = make_group(changed, mask, BACKGROUND, PATCH)
    elif what == "mask":
        # All black, so that the masks differ and the pixels do not.
        pixels[:] = 0
        group = make_group(pixels, mask, BACKGROUND, PATCH)
        key = group_key(group, PATCH, geometry)
        changed = mask.copy()
        changed[(place + 1) % 16] ^= True
        other = make_group(pixels, changed, BACKGROUND, PATCH)
        assert np.array_equal(other.pixels, group.pixels)
    elif what == "kind":
        other = replace(group, kind=OBJECT)
    elif what == "geometry":
        geometry = "pad+resize+crop"
    else:
        size = 7
    assert group_key(other, size, geometry) != key


def test_encoded_backgrounds_are_kept_and_bounded(processor):
    splitter = FrameSplitter(processor)
    first = splitter.split(red_scene(0, 0)).background
    assert splitter.split(red_scene(14, 14)).background.png is first.png  # not encoded again
    for shade in range(ENCODED_GROUPS + 5):
        splitter.split(red_scene(width=0, shade=shade), match=False)
    assert splitter.encoded_backgrounds == ENCODED_GROUPS
    again = splitter.split(red_scene(0, 0)).background
    assert again.png is not first.png and again == first


def test_a_splitter_wants_a_processor():
    with pytest.raises(TypeError, match="processor is a str; wanted a Backdrop processor"):
        FrameSplitter("folder")


def test_streets_that_differ_in_their_sign_are_two_backgrounds(example_processor):
    """Found under load: the prompt held the stale sign of another camera's street beside the fresh one."""
    first = np.asarray(render_scene("street", 115_900, 1).image)
    second = first.copy()
    second[:42, 28:126] = 255 - second[:42, 28:126]  # 21 of 144 patches
    # One default for the processor, the client and the gateway.
    assert Matching().max_overridden == FrameSplitter(example_processor).matcher.max_overridden
    for options, alike in (({}, False), ({"max_overridden": 0.3}, True)):
        splitter = FrameSplitter(example_processor, **options)
        theirs = splitter.split(Image.fromarray(first)).background.key
        found = splitter.split(Image.fromarray(second))
        assert (found.background.key == theirs) == alike == bool(found.reused)


def test_padding_that_nobody_owns_is_neither_sent_nor_counted(processor):
    """A wide frame twice: the second reuses all of its own patches, and the bars are in no item."""
    processor.image_processor.own_padding = False
    splitter = FrameSplitter(processor, fit="pad")
    assert processor.image_processor.fit == "crop" and splitter.pads
    frame = Image.new("RGB", (112, 56), (90, 90, 90))
    first, second = splitter.split(frame), splitter.split(frame)
    assert (first.total, first.reused) == (8, 0) and (second.total, second.reused) == (8, 8)
    (item,) = second.items
    assert item.patches == 8 and item == first.background
    assert FrameSplitter(processor).split(frame).background.key != item.key
