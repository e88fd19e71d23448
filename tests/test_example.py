"""The committed small model is what this source exports, and it answers."""

from pathlib import Path

import pytest

from backdrop import modeling, processing
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.train.scene_eval import FORMS, accuracy, draw, evaluate

FOLDER = Path(__file__).parent.parent / "examples" / "scenes-model"


def test_its_code_is_this_source():
    for package in (modeling, processing):
        for source in Path(package.__file__).parent.glob("*_backdrop.py"):
            assert (FOLDER / source.name).read_text() == source.read_text(), (
                f"{source.name} differs: run `backdrop export examples/scenes-model examples/scenes-model --notes ...`"
            )


@pytest.mark.real
def test_it_answers_about_backgrounds_it_never_saw():
    """A floor far below the accuracy in its card, and far above chance: a broken split or load falls through it."""
    processor = BackdropProcessor.from_pretrained(FOLDER)
    model = BackdropForConditionalGeneration.from_pretrained(FOLDER).eval()
    scenes = draw("test", 24, seed=7, questions=2)
    for form in FORMS:
        if form == "matched":
            processor.enable_background_matching(tolerance=0)
            model.enable_background_cache(2**27)
        found = accuracy(evaluate(model, processor, scenes, form))["all"]["accuracy"]
        assert found > 0.6, (form, found)
    assert model.background_cache.stats()["vision_tokens_reused"] > 0
