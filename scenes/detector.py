"""Trains a small YOLO detector on the made scenes, from scratch, on the CPU.

The scenes are not scaled: their 168 x 168 pixels are padded with grey on the right and below to 192 x 192, a
multiple of the detector's largest stride, so that boxes are in image pixels. Pad images with `pad_to_detector`
before handing them to the detector too, for it would stretch 168 pixels to 192 otherwise.

``backdrop scenes detector --out runs/scene_detector --images 3000 --epochs 8 --seed 0`` ends with
``detector.pt``, which ``ultralytics.YOLO`` loads, and ``report.json`` in the output folder.

Where other programs use the same cores, set ``OMP_WAIT_POLICY=passive`` or ``--threads 1``: PyTorch's threads wait for
each other by spinning, which on two shared cores made a step nine times as slow.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from tqdm import tqdm

from backdrop.processing.ultralytics_backdrop import undisturbed

with undisturbed(torch.device("cpu")):  # importing it replaces `Image.open` for the whole process
    import ultralytics
    from ultralytics import YOLO
    from ultralytics.nn.tasks import yaml_model_load

from .world import DETECTOR_CLASSES, Scene, Split, box_patches, sample_scenes

DETECTOR_SIZE = 192
_GREY = (114, 114, 114)  # what YOLO itself pads with


def pad_to_detector(image: Image.Image, size: int = DETECTOR_SIZE) -> Image.Image:
    """The RGB image in the upper left corner of a grey square of `size` pixels."""
    padded = Image.new("RGB", (size, size), _GREY)
    padded.paste(image, (0, 0))
    return padded


def write_yolo_dataset(folder: Path, counts: dict[Split, int], seed: int) -> Path:
    """Writes padded PNG scenes with YOLO label files, `counts[split]` to a split; returns the dataset's YAML file."""
    for split, count in counts.items():
        images, labels = folder / split / "images", folder / split / "labels"
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for i, scene in enumerate(tqdm(sample_scenes(split, count, seed), total=count, desc=split)):
            pad_to_detector(scene.image).save(images / f"{i:06d}.png", compress_level=1)
            (labels / f"{i:06d}.txt").write_text("".join(_label_lines(scene)))
    data = {"path": str(folder.resolve()), "names": dict(enumerate(DETECTOR_CLASSES))}
    data |= {"train": "train/images", "val": "validation/images", "test": "test/images"}
    path = folder / "scenes.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def _label_lines(scene: Scene) -> list[str]:
    """A line for each object: its class, then centre and extent as parts of the padded side."""
    lines = []
    for item in scene.objects:
        x0, y0, x1, y1 = (v / DETECTOR_SIZE for v in item.xyxy)
        centre_extent = ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
        lines.append(
            " ".join([str(DETECTOR_CLASSES.index(item.name)), *(f"{v:.6f}" for v in centre_extent)]) + "\n"
        )
    return lines


def small_yolo(width: float, depth: float = 0.33) -> dict[str, Any]:
    """The description of YOLOv8 with its channels multiplied by `width` and its repeats by `depth`."""
    description = yaml_model_load("yolov8.yaml")
    for key in ("scales", "scale", "yaml_file"):
        description.pop(key, None)
    return description | {"nc": len(DETECTOR_CLASSES), "width_multiple": width, "depth_multiple": depth}


def train_detector(
    out: Path,
    data: Path,
    width: float,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    threads: int,
) -> Path:
    """Trains from scratch and returns the checkpoint of the last epoch's averaged weights."""
    description = out / "scene_detector.yaml"
    description.write_text(yaml.safe_dump(small_yolo(width), sort_keys=False))
    model = YOLO(description, task="detect")
    # Ultralytics leaves one core idle, on two cores half of them.
    model.add_callback("on_train_start", lambda trainer: torch.set_num_threads(threads))
    model.train(
        data=str(data),
        epochs=epochs,
        imgsz=DETECTOR_SIZE,
        batch=batch_size,
        nbs=batch_size,
        optimizer="AdamW",
        lr0=learning_rate,
        lrf=0.02,
        cos_lr=True,
        warmup_epochs=0.5,
        warmup_bias_lr=learning_rate,
        weight_decay=0.01,
        # The screens are fixed: an object is never mirrored, cut or rescaled.
        mosaic=0,
        fliplr=0,
        erasing=0,
        scale=0.05,
        translate=0.03,
        hsv_h=0.01,
        hsv_s=0.2,
        hsv_v=0.2,
        pretrained=False,
        device="cpu",
        amp=False,
        cache="ram",
        workers=0,
        val=False,
        plots=False,
        seed=seed,
        deterministic=True,
        project=str(out.resolve()),
        name="training",
        exist_ok=True,
    )
    return Path(model.trainer.last)


def measure_detector(
    model: YOLO, split: Split, count: int, seed: int, confidence: float = 0.25
) -> dict[str, float | dict[str, float]]:
    """How well the detector finds the objects of `count` scenes, as parts of 1.

    ``recall``: objects with a detection of their class at an IoU of 0.5. ``recall_by_class``: the same by class.
    ``precision``: detections that are such. ``object_patches_covered``: patches with a part of an object that
    detections touch, the figure that counts for a split of the image. ``scenes_covered``: scenes with none missed.
    ``background_patches_taken``: patches without an object that detections touch.
    """
    scenes = list(sample_scenes(split, count, seed))
    found = dict.fromkeys(DETECTOR_CLASSES, 0)
    present = dict.fromkeys(DETECTOR_CLASSES, 0)
    right = detected = covered = owned = taken = free = whole = 0
    for start in range(0, count, 32):
        chunk = scenes[start : start + 32]
        images = [pad_to_detector(scene.image) for scene in chunk]
        results = model.predict(images, imgsz=DETECTOR_SIZE, conf=confidence, device="cpu", verbose=False)
        for scene, result in zip(chunk, results, strict=True):
            boxes, classes = result.boxes.xyxy.cpu().numpy(), result.boxes.cls.cpu().numpy().astype(int)
            matched: np.ndarray = np.zeros(len(boxes), dtype=bool)
            for item in scene.objects:
                hits = (classes == DETECTOR_CLASSES.index(item.name)) & (_iou(item.xyxy, boxes) >= 0.5)
                present[item.name] += 1
                found[item.name] += bool(hits.any())
                matched |= hits
            right, detected = right + int(matched.sum()), detected + len(boxes)
            truth = box_patches([item.xyxy for item in scene.objects])
            touched = box_patches(boxes.clip(0, scene.image.width))
            covered, owned = covered + int((truth & touched).sum()), owned + int(truth.sum())
            taken, free = taken + int((touched & ~truth).sum()), free + int((~truth).sum())
            whole += not (truth & ~touched).any()
    return {
        "recall": sum(found.values()) / sum(present.values()),
        "recall_by_class": {name: found[name] / max(1, present[name]) for name in DETECTOR_CLASSES},
        "precision": right / max(1, detected),
        "object_patches_covered": covered / owned,
        "background_patches_taken": taken / free,
        "scenes_covered": whole / count,
    }


def _iou(box_xyxy: Sequence[float], boxes_xyxy: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with `[N, 4]` boxes: `[N]`."""
    upper_left = np.maximum(boxes_xyxy[:, :2], box_xyxy[:2])
    lower_right = np.minimum(boxes_xyxy[:, 2:], box_xyxy[2:])
    shared = (lower_right - upper_left).clip(0).prod(1)
    area = (box_xyxy[2] - box_xyxy[0]) * (box_xyxy[3] - box_xyxy[1])
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
    return shared / (areas + area - shared)


def make_detector(
    out: Path,
    *,
    images: int = 3000,
    test_images: int = 400,
    epochs: int = 8,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    width: float = 0.125,
    threads: int = 2,
    seed: int = 0,
) -> dict:
    """Trains a small YOLO on the made scenes and measures it on unseen backgrounds; the report.

    Args:
        out: folder for `detector.pt` and `report.json`.
        images, test_images: scenes to train on; scenes with unseen backgrounds to measure on.
        width: YOLOv8's channels are multiplied by this.
        threads: CPU threads.
    """
    options = {
        "out": str(out),
        "images": images,
        "test_images": test_images,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "width": width,
        "threads": threads,
        "seed": seed,
    }
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    counts: dict[Split, int] = {
        "train": images,
        "validation": max(16, images // 20),
        "test": test_images,
    }
    data = write_yolo_dataset(out / "dataset", counts, seed)
    written = time.perf_counter()
    checkpoint = train_detector(out, data, width, epochs, batch_size, learning_rate, seed, threads)
    trained = time.perf_counter()
    shutil.copyfile(checkpoint, out / "detector.pt")

    model = YOLO(out / "detector.pt")
    boxes = model.val(
        data=str(data),
        split="test",
        imgsz=DETECTOR_SIZE,
        rect=False,  # the default pads every image by 16 pixels more on each side, unlike any the detector has seen
        device="cpu",
        workers=0,
        plots=False,
        project=str(out.resolve()),
        name="test",
        exist_ok=True,
    ).box
    report = {
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "test_map50": float(boxes.map50),
        "test_map50_95": float(boxes.map),
        "test_at_confidence_0.25": measure_detector(model, "test", test_images, seed),
        "seconds": {
            "dataset": round(written - started, 1),
            "training": round(trained - written, 1),
            "measuring": round(time.perf_counter() - trained, 1),
        },
        "options": options,
        "versions": {"torch": torch.__version__, "ultralytics": ultralytics.__version__},
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report
