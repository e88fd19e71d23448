"""An exported folder with a detector of transformers: its texts, and that it splits with transformers alone."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import tiny_detectors
from PIL import Image

from backdrop.hub_export.export import export
from backdrop.processing.detector_choice_backdrop import load_detector

# A stranger's machine: neither the package nor ultralytics can be imported.
SPLIT = """
import sys
sys.modules["backdrop"] = sys.modules["ultralytics"] = None
import numpy as np
from PIL import Image
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
groups = processor.image_processor.image_groups([Image.open(sys.argv[2])], confidence=float(sys.argv[3]))[0]
print([[int(group.kind), group.patch_mask.astype(int).tolist()] for group in groups])
"""


@pytest.fixture
def exported(tmp_path, processor, chat_model):
    tiny_detectors.write_detector(tmp_path / "rtdetr_tiny", "rt_detr")
    processor.image_processor.set_detector(load_detector(str(tmp_path / "rtdetr_tiny")))
    return export(chat_model, processor, tmp_path / "out", licence="apache-2.0")


def test_its_texts_speak_of_its_own_licence_and_of_no_ultralytics(tmp_path, exported):
    out = tmp_path / "out"
    assert {"detector.safetensors", "detector.json"} <= set(exported) and "NOTICE" not in exported
    assert not [name for name in exported if name.endswith((".bin", ".pt", ".pkl"))]
    card, licence, requirements = (
        (out / name).read_text() for name in ("README.md", "LICENSE", "requirements.txt")
    )
    assert "license: apache-2.0\n" in card and "agpl" not in (card + licence).lower()
    assert (
        "that of rtdetr_tiny" in card
        and "(detector.safetensors, detector.json): that of rtdetr_tiny." in licence
    )
    assert "an object detector of transformers (rtdetr_tiny)" in card
    assert "ultralytics" not in requirements
    assert json.loads((out / "detector.json").read_text())["kind"] == "transformers"


def test_it_splits_where_neither_package_is_installed(tmp_path, exported, processor):
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (tiny.SIDE, tiny.SIDE, 3), dtype=np.uint8)
    )
    image.save(tmp_path / "image.png")
    detections = processor.image_processor.load_detector().detect([np.asarray(image)], confidence=0.0)
    floor = float(np.sort(detections[0].confidence)[-2])  # the most confident one alone
    groups = processor.image_processor.image_groups([image], confidence=floor)[0]
    wanted = [[int(group.kind), group.patch_mask.astype(int).tolist()] for group in groups]
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            SPLIT,
            str(tmp_path / "out"),
            str(tmp_path / "image.png"),
            str(floor),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == wanted


def test_a_name_on_the_hub_stays_a_name(tmp_path, processor, chat_model):
    processor.image_processor.detector = "PekingU/rtdetr_v2_r18vd"
    files = export(chat_model, processor, tmp_path / "named", licence="apache-2.0")
    assert "detector.safetensors" not in files
    saved = json.loads((tmp_path / "named" / "processor_config.json").read_text())
    assert saved["image_processor"]["detector"] == "PekingU/rtdetr_v2_r18vd"
