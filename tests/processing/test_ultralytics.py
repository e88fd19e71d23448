"""What ultralytics reads and builds, and that it is optional and leaves the process as it was."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_yolo import BACKBONE, EVERYTHING, assert_equal_detections, random_images, tiny_yaml

from backdrop.processing import ultralytics_backdrop
from backdrop.processing.detector_backdrop import ObjectDetector
from backdrop.processing.ultralytics_backdrop import detections_from_result

needs_ultralytics = pytest.mark.skipif(
    importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed"
)


@needs_ultralytics
class TestNetwork:
    def test_weights_of_another_model(self, tiny_detectors, tmp_path):
        tiny_detectors["detect"].save(tmp_path / "a")
        tiny_detectors["segment"].save(tmp_path / "b")
        os.replace(tmp_path / "b" / "detector.safetensors", tmp_path / "a" / "detector.safetensors")
        with pytest.raises(ValueError, match="tensors do not fit its architecture"):
            ObjectDetector.from_folder(tmp_path / "a")

    def test_a_version_that_builds_another_network_is_refused(self, tiny_detectors, tmp_path):
        tiny_detectors["detect"].save(tmp_path)
        path = tmp_path / "detector.json"
        fields = json.loads(path.read_text())
        fields["probe"] = {key: value * 1.05 for key, value in fields["probe"].items()}
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="builds another network"):
            ObjectDetector.from_folder(tmp_path)

    def test_activations_come_from_the_description(self, tiny_detectors, tmp_path):
        """ultralytics 8.4.0 to 8.4.140 build SPPF without its first activation."""
        tiny_detectors["detect"].save(tmp_path)
        path = tmp_path / "detector.json"
        fields = json.loads(path.read_text())
        other = {"SiLU": "Identity", "Identity": "SiLU"}
        fields["activations"]["model.8.cv1.act"] = other[fields["activations"]["model.8.cv1.act"]]
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="builds another network"):  # the probe tells
            ObjectDetector.from_folder(tmp_path)

    def test_another_activation_survives(self, tmp_path):
        (tmp_path / "yaml").mkdir()
        path = tiny_yaml(tmp_path / "yaml", "detect", activation="nn.LeakyReLU(0.1)")
        detector = ObjectDetector.from_name_or_path(str(path))
        detector.save(tmp_path)
        batch = random_images(1, 64)
        again = ObjectDetector.from_folder(tmp_path)
        assert_equal_detections(
            again.detect(batch, confidence=EVERYTHING), detector.detect(batch, confidence=EVERYTHING)
        )


@needs_ultralytics
class TestCheckpoint:
    @pytest.mark.parametrize(
        "name", ["nonsense.pt", "yolov8n", "folder/yolov8n.pt", "absent.yaml", "detector.onnx"]
    )
    def test_unknown_name(self, name):
        with pytest.raises(ValueError, match=re.escape(repr(name))) as error:
            ObjectDetector.from_name_or_path(name)
        assert "wanted" in str(error.value) and "\n" not in str(error.value)

    def test_a_file_that_is_no_checkpoint(self, tmp_path):
        path = tmp_path / "broken.pt"
        path.write_bytes(b"not a checkpoint")
        with pytest.raises((ValueError, OSError), match=r"broken\.pt") as error:
            ObjectDetector.from_name_or_path(str(path))
        assert "\n" not in str(error.value)

    def test_another_kind_of_model(self, tmp_path):
        fields = {
            "nc": 4,
            "backbone": BACKBONE[:1],
            "head": [[-1, 1, "Classify", ["nc"]]],
            "width_multiple": 0.0625,
        }
        path = tmp_path / "classify.yaml"
        path.write_text(json.dumps(fields))
        with pytest.raises(
            ValueError,
            match="is a ClassificationModel; wanted a YOLO detection or segmentation model, or an RT-DETR",
        ):
            ObjectDetector.from_name_or_path(str(path))


class TestMissing:
    def test_message(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "ultralytics", None)
        with pytest.raises(ImportError) as error:
            ObjectDetector.from_name_or_path("yolov8n.pt")
        assert str(error.value) == (
            "An RGB image must be split by a detector, but ultralytics is not installed. "
            "Install it with `pip install ultralytics`, or pass patch groups (RGBA) instead."
        )

    @needs_ultralytics
    def test_from_folder(self, tiny_detectors, tmp_path, monkeypatch):
        tiny_detectors["detect"].save(tmp_path)
        monkeypatch.setitem(sys.modules, "ultralytics", None)
        with pytest.raises(ImportError, match="ultralytics is not installed"):
            ObjectDetector.from_folder(tmp_path)

    @needs_ultralytics
    def test_installed_but_broken_is_told_apart(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cv2", None)
        with pytest.raises(ImportError, match="ultralytics is installed but cannot be imported: .*cv2"):
            ObjectDetector.from_name_or_path("yolov8n.pt")

    def test_transformers_does_not_require_it(self):
        from transformers.dynamic_module_utils import get_imports, get_relative_imports

        def third_parties(file: Path) -> set[str]:
            return set(get_imports(file)) - set(sys.stdlib_module_names)

        folder = Path(ultralytics_backdrop.__file__).parent
        assert third_parties(folder / "detector_backdrop.py") == {"numpy", "torch"}
        assert third_parties(folder / "ultralytics_backdrop.py") == {"PIL", "numpy", "torch"}
        assert third_parties(folder / "detector_files_backdrop.py") == {"safetensors", "torch"}
        assert third_parties(folder / "detections_backdrop.py") == {"numpy"}
        siblings = set(get_relative_imports(folder / "detector_backdrop.py"))
        assert siblings == {"detections_backdrop", "detector_files_backdrop", "ultralytics_backdrop"}


def test_what_lies_in_the_padding_is_dropped():
    class Result:
        masks = None

        class boxes:
            xyxy = torch.tensor([[10.0, 10.0, 40.0, 60.0], [52.0, 0.0, 64.0, 9.0]])
            conf = torch.tensor([0.9, 0.8])
            cls = torch.tensor([1.0, 2.0])

    found = detections_from_result(Result, (50, 50), "detect", {})
    np.testing.assert_array_equal(found.xyxy, [[10, 10, 40, 50]])
    assert found.class_id.tolist() == [1]


FRESH_PROCESS = """
import logging, os, sys
import numpy as np, torch
from PIL import Image
from backdrop.processing.detector_backdrop import ObjectDetector
assert "ultralytics" not in sys.modules and "cv2" not in sys.modules

torch.set_num_threads(3)
torch.manual_seed(5)
names = ("OMP_NUM_THREADS", "NUMEXPR_MAX_THREADS", "TF_CPP_MIN_LOG_LEVEL", "TORCH_CPP_LOG_LEVEL",
         "KINETO_LOG_LEVEL", "CUBLAS_WORKSPACE_CONFIG", "YOLO_CONFIG_DIR", "CUDA_VISIBLE_DEVICES",
         "RANK", "LOCAL_RANK", "WORLD_SIZE")
def state():
    return (torch.get_num_threads(), torch.get_rng_state().tolist(), np.get_printoptions(),
            np.random.get_state()[1].tolist(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), Image.open, torch.save,
            [os.environ.get(name) for name in names])
before = state()
import cv2
cv2_threads = cv2.getNumThreads()
detector = ObjectDetector.from_name_or_path(sys.argv[1])
assert state() == before, "from_name_or_path"
found = detector.detect([np.zeros((64, 64, 3), np.uint8)], confidence=0)
assert state() == before, "detect"
assert cv2.getNumThreads() == cv2_threads
detector.save("saved")
ObjectDetector.from_folder("saved").detect([np.zeros((64, 64, 3), np.uint8)])
assert state() == before, "from_folder"
assert not detector.predictor.callbacks
assert not logging.getLogger("ultralytics").filters
"""


@pytest.mark.slow
@needs_ultralytics
def test_a_fresh_process_is_left_as_it_was(tmp_path):
    """No thread count, environment, random state or patch stays; nothing is printed, no stray file written.

    The home does not exist and cannot be made.
    """
    path = tiny_yaml(tmp_path, "detect")
    work = tmp_path / "work"
    work.mkdir()
    removed = ("XDG_CONFIG_HOME", "YOLO_CONFIG_DIR", "PYTEST_CURRENT_TEST")
    environment = {key: value for key, value in os.environ.items() if key not in removed} | {
        "HOME": os.path.join(os.devnull, "home"),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH_PROCESS, str(path)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""
    assert [entry.name for entry in work.iterdir()] == ["saved"]
