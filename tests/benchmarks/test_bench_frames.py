"""What benchmarks draw, and the FLOPs they count."""

import numpy as np
import pytest

from backdrop.benchmarks import contenders, flops, shapes
from backdrop.benchmarks.frames import background_image, draw_frame
from backdrop.processing.staleness_backdrop import patch_staleness

TINY = shapes.SHAPES["tiny"]


class TestFrames:
    @pytest.mark.parametrize("share", [0.02, 0.15, 0.4, 0.7])
    def test_exactly_the_drawn_patches_go_stale_at_full_size(self, share):
        shape = shapes.SHAPES["clip-l+135m"]
        processor = contenders.backdrop_processor(shape, detector=None).image_processor
        background = background_image(*shape.source, seed=1)
        reference = processor.model_images([background])[0]
        for seed in range(3):
            frame = draw_frame(background, shape, share, np.random.default_rng(seed))
            image = processor.model_images([frame.image])[0]
            stale = patch_staleness(reference, image, 14)
            assert ((stale > contenders.TOLERANCE) == frame.changed).all()
            assert (stale[~frame.changed] == 0).all()
            assert frame.changed.sum() == round(share * 576)

    def test_no_two_objects_are_the_same(self):
        background = background_image(*TINY.source, seed=1)
        rng = np.random.default_rng(0)
        frames = [draw_frame(background, TINY, 0.25, rng).image.tobytes() for _ in range(8)]
        assert len(set(frames)) == 8


class TestFlops:
    def test_attention_is_counted(self):
        """Twice the positions cost more than twice as much, though the head is paid once."""
        assert flops.text_flops("tiny", 0, 80) > 2 * flops.text_flops("tiny", 0, 40)
        assert flops.group_flops("tiny", 16) > 2 * flops.group_flops("tiny", 8) - 2 * flops.group_flops(
            "tiny", 1
        )

    def test_a_cached_prefix_costs_only_what_attends_to_it(self):
        whole, prefix = flops.text_flops("tiny", 0, 80), flops.text_flops("tiny", 60, 20)
        assert flops.text_flops("tiny", 0, 20) < prefix < whole / 2

    def test_a_whole_clip_l_costs_what_its_parameters_say(self):
        patches = 2 * 576 * 3 * 14 * 14 * 1024
        attention = 24 * 4 * 577**2 * 1024
        tower = 24 * 12 * 1024**2 * 2 * 577
        projector = 2 * 576 * (1024 * 576 + 576**2)
        assert flops.stock_vision_flops("clip-l+135m") == tower + attention + patches + projector
