"""Fixed seeds, no network whatever a test does, and one thread for each of several test processes."""

import atexit
import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported; what a test starts inherits it. More threads than cores only wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    # transformers copies a folder's code there before it imports it; two processes must not write the same copy.
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="backdrop-test-modules-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import tiny
import torch
import transformers
from red_detector import RedDetector

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.processing_backdrop import BackdropProcessor

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
    from backdrop.hub_export.chat_template import chat_template

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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Spreads the slow tests of `-m real`: xdist gives each process a run of neighbours, and two take minutes each."""
    if config.option.markexpr != "real":
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    slow = slow[0::2] + slow[1::2]  # neighbours end up in different halves
    others = [item for item in items if not item.get_closest_marker("slow")]
    share = len(others) / max(len(slow), 1)
    spread = []
    for i, item in enumerate(slow):
        spread += [item, *others[round(i * share) : round((i + 1) * share)]]
    items[:] = spread if slow else others
