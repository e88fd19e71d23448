"""One thread per test process, fixed seeds, and no network whatever a test does."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import tiny
import torch
import transformers

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.detector_backdrop import Detections
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.processing_backdrop import BackdropProcessor

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class RedDetector:
    """Stands in for a trained detector: one box around whatever is strongly red."""

    names = {0: "red"}
    source = "red pixels"

    def __init__(self):
        self.calls = 0

    def detect(self, images, *, confidence=0.25, classes=None, **kwargs):

        self.calls += len(images)
        found = []
        for image in images:
            red = (image[..., 0] > 200) & (image[..., 1] < 60) & (image[..., 2] < 60)
            rows, columns = np.nonzero(red)
            boxes = (
                [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
                if len(rows)
                else np.zeros((0, 4))
            )
            count = len(boxes)
            found.append(
                Detections(
                    xyxy=np.array(boxes, dtype=np.float32).reshape(count, 4),
                    confidence=np.full(count, 0.9, dtype=np.float32),
                    class_id=np.zeros(count, dtype=np.int64),
                    names=self.names,
                    masks=None,
                )
            )
        return found

    def save(self, folder):
        return []


@pytest.fixture
def detector() -> RedDetector:
    return RedDetector()


@pytest.fixture
def image_processor(detector) -> BackdropImageProcessor:
    """56 px, 14 px patches, split by the red detector, margin 0."""
    side = {"height": tiny.SIDE, "width": tiny.SIDE}
    processor = BackdropImageProcessor(
        size={"shortest_edge": tiny.SIDE}, crop_size=side, patch_size=tiny.PATCH, margin=0
    )
    processor.set_detector(detector)
    return processor


@pytest.fixture
def processor(image_processor) -> BackdropProcessor:
    from backdrop.hub_export.convert import chat_template

    tokenizer = tiny.tokenizer()
    BackdropProcessor.add_tokens(tokenizer)
    return BackdropProcessor(image_processor, tokenizer, chat_template=chat_template(system_prompt=""))


@pytest.fixture
def chat_model(processor) -> BackdropForConditionalGeneration:
    """A tiny model whose vocabulary is the processor's."""
    tokenizer = processor.tokenizer
    return tiny.backdrop_model(
        text_config=tiny.text_config(vocab_size=len(tokenizer)),
        image_token_id=processor.image_token_id,
        separator_token_ids=processor.separator_token_ids,
    )
