"""The two files of a saved detector: what they hold, and what is refused."""

import importlib.util
import json
import os

import pytest
import safetensors.torch
import torch
from tiny_yolo import EVERYTHING, HEADS, assert_equal_detections, random_images

from backdrop.processing.detector_backdrop import ObjectDetector
from backdrop.processing.detector_files_backdrop import copy_detector, lossless_half

needs_ultralytics = pytest.mark.skipif(
    importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed"
)


@needs_ultralytics
class TestFiles:
    @pytest.mark.parametrize("task", list(HEADS))
    def test_round_trip(self, tiny_detectors, task, tmp_path):
        detector = tiny_detectors[task]
        assert detector.save(tmp_path) == ["detector.safetensors", "detector.json"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["detector.json", "detector.safetensors"]
        # vLLM reads every *.safetensors of a folder: the model class names these keys as none of its own.
        stored = safetensors.torch.load_file(tmp_path / "detector.safetensors")
        assert all(key.startswith("detector.") for key in stored)
        again = ObjectDetector.from_folder(tmp_path)
        assert (again.task, again.stride, again.names) == (task, 32, detector.names)
        assert detector.source == f"tiny-{task}.yaml"
        assert again.source == f"detector.safetensors (tiny-{task}.yaml)"
        assert again.weights.keys() == detector.weights.keys()
        for key, value in detector.weights.items():
            assert value.dtype == again.weights[key].dtype and torch.equal(value, again.weights[key]), key
        batch = random_images(2, 168)
        assert_equal_detections(
            again.detect(batch, confidence=EVERYTHING), detector.detect(batch, confidence=EVERYTHING)
        )
        again.save(tmp_path / "again")
        for name in ("detector.json", "detector.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()

    def test_a_copy_is_whole_and_older_files_are_brought_up_to_date(self, tiny_detectors, tmp_path):
        detector = tiny_detectors["detect"]
        detector.save(tmp_path / "new")
        (tmp_path / "old").mkdir()
        state = safetensors.torch.load_file(tmp_path / "new" / "detector.safetensors")
        bare = {key.removeprefix("detector."): value for key, value in state.items()}
        safetensors.torch.save_file(bare, tmp_path / "old" / "detector.safetensors")
        os.replace(tmp_path / "new" / "detector.json", tmp_path / "old" / "detector.json")
        again = ObjectDetector.from_folder(tmp_path / "old")
        assert again.weights.keys() == detector.weights.keys()
        assert copy_detector(tmp_path / "old", tmp_path / "new") == [
            "detector.safetensors",
            "detector.json",
        ]
        copied = safetensors.torch.load_file(tmp_path / "new" / "detector.safetensors")
        assert copied.keys() == state.keys() and all(torch.equal(copied[key], state[key]) for key in state)

    def test_no_pickle_and_no_path_is_written(self, tiny_detectors, tmp_path):
        tiny_detectors["detect"].save(tmp_path)
        description = (tmp_path / "detector.json").read_text()
        assert "AGPL-3.0" in description
        assert "/" not in description.replace("https://ultralytics.com/license", "")
        weights = (tmp_path / "detector.safetensors").read_bytes()
        assert weights[8:9] == b"{" and b"AGPL-3.0" in weights[:4096]

    def test_loading_reads_no_pickle(self, tiny_detectors, tmp_path, monkeypatch):
        tiny_detectors["detect"].save(tmp_path)

        def refuse(*args, **kwargs):
            raise AssertionError("torch.load was called")

        monkeypatch.setattr(torch, "load", refuse)
        ObjectDetector.from_folder(tmp_path)

    def test_weights_that_are_float16_numbers_are_stored_so(self):
        single = {"w": torch.tensor([1 / 3]), "n": torch.tensor(7)}
        assert lossless_half(single)["w"].dtype == torch.float32
        half = {"w": torch.tensor([1 / 3]).half().float(), "n": torch.tensor(7)}
        stored = lossless_half(half)
        assert stored["w"].dtype == torch.float16 and stored["n"].dtype == torch.int64
        assert torch.equal(stored["w"].float(), half["w"])
        assert lossless_half({"w": torch.tensor([1e5])})["w"].dtype == torch.float32

    def test_corrupt_weights(self, tiny_detectors, tmp_path):
        tiny_detectors["detect"].save(tmp_path)
        path = tmp_path / "detector.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"detector\.safetensors is damaged"):
            ObjectDetector.from_folder(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"task": "pose"}, "task is 'pose'"),
            ({"stride": 16}, "stride is 16; wanted 32"),
            ({"names": None}, "field 'names' is None; wanted list"),
            ({"architecture": {}}, "KeyError: 'backbone'"),
        ],
    )
    def test_damaged_description(self, tiny_detectors, tmp_path, change, message):
        tiny_detectors["detect"].save(tmp_path)
        path = tmp_path / "detector.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=message):
            ObjectDetector.from_folder(tmp_path)
        path.write_text("{")
        with pytest.raises(ValueError, match=r"detector\.json is not a detector's description"):
            ObjectDetector.from_folder(tmp_path)
        path.write_text("{}")
        with pytest.raises(ValueError, match="field 'source' is None"):
            ObjectDetector.from_folder(tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            {"backbone": [[-1, 1, "load_checkpoint", ["evil.pt"]]]},
            {"activation": "__import__('os').system('true')"},
            {"activation": "nn.SiLU(__import__('os'))"},
        ],
    )
    def test_a_description_cannot_run_code(self, tiny_detectors, tmp_path, change):
        tiny_detectors["detect"].save(tmp_path)
        path = tmp_path / "detector.json"
        fields = json.loads(path.read_text())
        fields["architecture"] |= change
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="is not the name of a module class|is not a plain module"):
            ObjectDetector.from_folder(tmp_path)

    def test_missing_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"detector\.safetensors is not there"):
            ObjectDetector.from_folder(tmp_path)
