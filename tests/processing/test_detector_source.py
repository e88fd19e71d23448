"""Where a detector is loaded: never on the GPU of the process that this one was forked from."""

import multiprocessing

import numpy as np
import pytest
from tiny_yolo import EVERYTHING, assert_equal_detections, random_images, tiny_yaml

from backdrop.processing import detector_source_backdrop
from backdrop.processing.detector_source_backdrop import DetectorSource


class Recorder:
    """Stands in for a detector: where was it asked to be?"""

    def __init__(self, device="cuda"):
        self.device = device

    def on_device(self, device):
        return Recorder(device)


def in_a_fork(function):
    """What a function returns in a process that is forked from this one."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function()))
    process.start()
    assert receiver.poll(60), "the forked process has not answered"
    found = receiver.recv()
    process.join(10)
    return found


@pytest.mark.parametrize("handed_over", [False, True], ids=["from a folder", "handed over"])
def test_a_forked_process_keeps_off_the_gpu(monkeypatch, handed_over):
    monkeypatch.setattr(
        detector_source_backdrop, "load_saved_detector", lambda folder, device: Recorder(device)
    )
    source = DetectorSource("folder")
    if handed_over:
        source.use(Recorder("cuda"), "cuda")
    assert source.load(None, "cuda").device == "cuda"
    assert in_a_fork(lambda: source.load(None, "cuda").device) == "cpu"
    assert source.load(None, "cuda").device == "cuda"


def test_a_loaded_detector_runs_in_a_forked_process(tiny_detectors):
    detector, images = tiny_detectors["segment"], random_images(1, 64)
    wanted = detector.detect(images, confidence=EVERYTHING)
    assert_equal_detections(in_a_fork(lambda: detector.detect(images, confidence=EVERYTHING)), wanted)


def test_a_detector_that_was_handed_over_outlives_a_call_with_another(tiny_detectors, tmp_path):
    source = DetectorSource()
    source.use(tiny_detectors["detect"], "cpu")
    other = source.load(str(tiny_yaml(tmp_path, "segment")), "cpu")
    assert other.task == "segment"
    assert source.load(None, "cpu").task == "detect"
    np.testing.assert_equal(source.save(None, tmp_path / "saved"), ["detector.safetensors", "detector.json"])
