"""Object detectors of transformers behind the detector's protocol: what they find, their files, where they are chosen."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import tiny_detectors
import torch
from tiny_yolo import assert_equal_detections, random_images, tiny_yaml

from backdrop.processing import detector_choice_backdrop
from backdrop.processing.detector_backdrop import ObjectDetector
from backdrop.processing.detector_choice_backdrop import is_hub_id, load_detector, load_saved_detector
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.transformers_detector_backdrop import TransformersDetector

FAMILIES = list(tiny_detectors.MODELS)
LOW = 0.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder, model and image processor by family."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family) / f"tiny-{family}"
        found[family] = (folder, *tiny_detectors.write_detector(folder, family))
    return found


def expected(model, processor, image, threshold=LOW):
    inputs = processor(images=[image], return_tensors="pt")
    with torch.no_grad():
        (result,) = processor.post_process_object_detection(
            model(**inputs), threshold=threshold, target_sizes=[image.shape[:2]]
        )
    return {name: value.numpy() for name, value in result.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(56, 56, 3), (40, 88, 3)])
def test_it_finds_what_the_stock_model_finds(checkpoints, family, shape):
    folder, model, processor = checkpoints[family]
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    (found,) = load_detector(str(folder)).detect([image], confidence=LOW)
    theirs = expected(model, processor, image)
    height, width = shape[:2]
    order = np.argsort(-theirs["scores"], kind="stable")
    boxes = theirs["boxes"][order].clip(0, [width, height, width, height])
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    assert kept.sum() >= 3 and found.masks is None
    np.testing.assert_array_equal(found.confidence, theirs["scores"][order][kept])
    np.testing.assert_array_equal(found.class_id, theirs["labels"][order][kept])
    np.testing.assert_allclose(found.xyxy, boxes[kept], atol=1e-4)
    assert found.xyxy.dtype == np.float32 and found.class_id.dtype == np.int64
    assert (np.diff(found.confidence) <= 0).all() and found.names == tiny_detectors.LABELS


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same_and_no_pickle_is_read(checkpoints, family, tmp_path, monkeypatch):
    detector = load_detector(str(checkpoints[family][0]))
    assert detector.save(tmp_path) == ["detector.safetensors", "detector.json"]

    def refuse(*args, **kwargs):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)
    again = load_saved_detector(tmp_path)
    assert isinstance(again, TransformersDetector)
    assert again.source == f"detector.safetensors (tiny-{family})" and detector.source == f"tiny-{family}"
    batch = random_images(3, 56)
    wanted = detector.detect(batch, confidence=LOW)
    assert_equal_detections(again.detect(batch, confidence=LOW), wanted)
    assert_equal_detections(load_detector(str(tmp_path)).detect(batch, confidence=LOW), wanted)
    assert_equal_detections(
        [again.on_device("cpu").detect([image], confidence=LOW)[0] for image in batch], wanted
    )
    again.save(tmp_path / "again")
    for name in ("detector.json", "detector.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    text = (tmp_path / "detector.json").read_text()
    assert "AGPL" not in text and str(checkpoints[family][0]) not in text
    assert b"AGPL" not in (tmp_path / "detector.safetensors").read_bytes()[:4096]
    stored = safetensors.torch.load_file(tmp_path / "detector.safetensors")
    assert all(key.startswith("detector.") for key in stored)


def test_classes_confidence_and_input_are_checked(checkpoints):
    detector = load_detector(str(checkpoints["rt_detr"][0]))
    batch = random_images(1, 56)
    (everything,) = detector.detect(batch, confidence=LOW)
    wanted = int(everything.class_id[0])
    (only,) = detector.detect(batch, confidence=LOW, classes=[tiny_detectors.LABELS[wanted]])
    assert set(only.class_id.tolist()) == {wanted}
    assert len(only.confidence) == (everything.class_id == wanted).sum()
    assert len(detector.detect(batch, confidence=LOW, classes=[])[0].confidence) == 0
    floor = float(np.median(everything.confidence))
    (fewer,) = detector.detect(batch, confidence=floor)
    assert 0 < len(fewer.confidence) < len(everything.confidence) and (fewer.confidence > floor).all()
    assert detector.detect([]) == []
    for images, options, message in (
        (
            batch,
            {"classes": ["unicorn"]},
            "class 'unicorn' is unknown to tiny-rt_detr; wanted one of: 0 person",
        ),
        (batch, {"confidence": 25}, "confidence is 25"),
        (batch, {"batch_size": 0}, "batch_size is 0"),
        ([np.zeros((8, 8, 3), np.float32)], {}, "dtype float32"),
        ([np.zeros((8, 8, 4), np.uint8)], {}, r"\(8, 8, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            detector.detect(images, **options)


def test_files_that_do_not_belong_together_and_other_models_are_refused(checkpoints, tmp_path):
    load_detector(str(checkpoints["rt_detr"][0])).save(tmp_path / "a")
    load_detector(str(checkpoints["yolos"][0])).save(tmp_path / "b")
    (tmp_path / "a" / "detector.safetensors").write_bytes(
        (tmp_path / "b" / "detector.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="of its tensors do not fit its configuration"):
        load_saved_detector(tmp_path / "a")
    path = tmp_path / "b" / "detector.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "config": {"model_type": "llama"}}))
    with pytest.raises(
        ValueError, match="model_type is 'llama'; wanted one that transformers has an object detector for"
    ):
        load_saved_detector(tmp_path / "b")
    path.write_text(json.dumps({**description, "config": None}))
    with pytest.raises(ValueError, match="field 'config' is None; wanted dict"):
        load_saved_detector(tmp_path / "b")


def test_a_name_goes_to_the_class_that_reads_it(tmp_path, monkeypatch):
    read = []
    for cls in (ObjectDetector, TransformersDetector):
        monkeypatch.setattr(
            cls, "from_name_or_path", classmethod(lambda c, name, device="cpu": read.append(c))
        )
    (tmp_path / "folder").mkdir()
    names = [
        "yolov8n.pt",
        "PekingU/rtdetr_v2_r18vd",
        "folder/yolov8n.pt",
        str(tmp_path / "folder"),
        "yolo26n",
    ]
    for name in names:
        detector_choice_backdrop.load_detector(name)
    assert [cls.__name__ for cls in read] == [
        "ObjectDetector",
        "TransformersDetector",
        "ObjectDetector",
        "TransformersDetector",
        "ObjectDetector",
    ]
    assert is_hub_id("owner/name") and not is_hub_id("/nowhere/name") and not is_hub_id("a/b/c")


def test_the_image_processor_takes_its_name_and_keeps_its_weights(checkpoints, tmp_path):
    folder = str(checkpoints["d_fine"][0])
    processor = BackdropImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, detector=folder, confidence=LOW
    )
    image = random_images(1, 56)[0]
    groups = processor.image_groups([image])[0]
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["detector"] is None
    again = BackdropImageProcessor.from_pretrained(tmp_path)
    for one, two in zip(groups, again.image_groups([image])[0], strict=True):
        np.testing.assert_array_equal(one.patch_mask, two.patch_mask)


def test_ultralytics_is_not_imported_for_it(checkpoints, tmp_path):
    load_detector(str(checkpoints["yolos"][0])).save(tmp_path)
    code = (
        "import sys; sys.modules['ultralytics'] = None\n"
        "import numpy as np\n"
        "from backdrop.processing.detector_choice_backdrop import load_saved_detector\n"
        "print(len(load_saved_detector(sys.argv[1]).detect([np.zeros((56, 56, 3), np.uint8)], confidence=0)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr


def test_a_detectors_own_folder_of_either_kind_is_a_name(tmp_path):
    pytest.importorskip("ultralytics")
    ObjectDetector.from_name_or_path(str(tiny_yaml(tmp_path, "detect"))).save(tmp_path / "saved")
    assert isinstance(load_detector(str(tmp_path / "saved")), ObjectDetector)
