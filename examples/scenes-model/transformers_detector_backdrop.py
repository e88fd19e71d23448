"""An object detector of transformers (RT-DETR, D-FINE, YOLOS, ...) as the detector that tells objects from background.

It needs nothing beyond transformers, and its weights are under the licence of the checkpoint that they came from. As with
any detector, a saved one is a description (JSON) and tensors (safetensors), and is always built from these two.
"""

import itertools
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    AutoImageProcessor,
    AutoModelForObjectDetection,
)

from .detections_backdrop import Detections
from .detector_files_backdrop import (
    TRANSFORMERS,
    WEIGHTS_NAME,
    lossless_half,
    read_detector,
    unfit_tensors,
    write_detector,
)

# What a configuration says of the machine and the versions that wrote it, and nothing of the network.
_NOT_SAVED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map")


class TransformersDetector:
    """A model of `AutoModelForObjectDetection` with its own image processor.

    Make one with `from_name_or_path` or `from_folder`. `detect` may be called from several threads.

    Attributes:
        names: class names by class id.
        source: what it was made from, for display.
        device: where the model runs.
        weights: its tensors by name, on the CPU, as `save` stores them.
    """

    def __init__(
        self,
        description: dict,
        weights: dict[str, torch.Tensor],
        *,
        source: str,
        device: str | torch.device = "cpu",
    ):
        """Builds the model; `from_name_or_path` and `from_folder` call this.

        Args:
            description: what `detector.json` holds, see `save`.
            weights: by name, on the CPU, float32 or float16.
            source: see the class.
            device: where the model runs; computation is float32 everywhere.

        Raises:
            ValueError: the weights are not those of this configuration, or the device is not there.
        """
        self.names = dict(enumerate(description["names"]))
        self.source = source
        self.device = torch.device(device)
        self.weights = weights
        self._description = description
        self._lock = threading.Lock()
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"detector device is {str(device)!r}, but torch finds no CUDA device; wanted 'cpu'"
            )
        config = _config(description)
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
            model = AutoModelForObjectDetection.from_config(config, dtype=torch.float32)
        wrong = unfit_tensors(model.state_dict(), weights)
        if wrong:
            raise ValueError(
                f"detector {source}: {len(wrong)} of its tensors do not fit its configuration, the first is {wrong[0]!r}; "
                "wanted those of the same checkpoint"
            )
        model.load_state_dict(weights)
        self._model = model.eval().requires_grad_(False).to(self.device)
        self._image_processor = _image_processor(description["image_processor"])

    @classmethod
    def from_name_or_path(cls, name: str, device: str | torch.device = "cpu") -> "TransformersDetector":
        """Loads a checkpoint.

        Args:
            name: folder, or id on the Hub (`"PekingU/rtdetr_v2_r18vd"`).
            device: where the model runs.

        Raises:
            ValueError: it is no object detector of transformers, or weights are missing.
            OSError: it is not there, or cannot be downloaded.
        """
        model, info = AutoModelForObjectDetection.from_pretrained(
            name, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
        )
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"detector {name!r}: {len(missing)} weights are missing, the first is {missing[0]!r}"
            )
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        labels = model.config.id2label
        values = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_SAVED}
        description = {
            "kind": TRANSFORMERS,
            "license": f"that of {Path(name).name if Path(name).is_dir() else name}",
            "source": Path(name).name if Path(name).is_dir() else name,
            "names": [str(labels.get(i, i)) for i in range(max(labels) + 1)],
            "config": values,
            "image_processor": processor.to_dict(),
        }
        # Through JSON, so that a detector just loaded equals the one that `save` writes and `from_folder` reads. Clones,
        # since weights that a model ties share their memory, which a file cannot hold.
        description = json.loads(json.dumps(description))
        weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
        return cls(description, lossless_half(weights), source=description["source"], device=device)

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike, device: str | torch.device = "cpu"
    ) -> "TransformersDetector":
        """Loads what `save` wrote. Reads no pickle.

        Raises:
            FileNotFoundError: one of the two files is not there.
            ValueError: one of them is damaged, or they do not belong together.
        """
        description, weights = read_detector(folder)
        return cls(description, weights, source=f"{WEIGHTS_NAME} ({description['source']})", device=device)

    def on_device(self, device: str | torch.device) -> "TransformersDetector":
        """The same detector, built again on another device."""
        return TransformersDetector(self._description, self.weights, source=self.source, device=device)

    def save(self, folder: str | os.PathLike) -> list[str]:
        """Writes `detector.safetensors` and `detector.json`, each in one step; the names of the two files.

        The description holds the checkpoint's name, the class names, the model's configuration and its image processor's.
        """
        return write_detector(folder, self._description, self.weights)

    def detect(
        self,
        images: Sequence[np.ndarray],
        *,
        confidence: float = 0.25,
        classes: Sequence[int | str] | None = None,
        iou: float = 0.7,
        batch_size: int = 16,
    ) -> list[Detections]:
        """Finds the objects in images, which the model's image processor scales as it does for anyone.

        Args:
            images: uint8 `[h, w, 3]` RGB each.
            confidence: the lowest confidence kept, 0 to 1.
            classes: class ids or class names to look for; None: all of them.
            iou: of no use here: these models give each object once.
            batch_size: how many images of one size run at once on a GPU. On the CPU each runs alone, so that an image's
                result does not depend, in its last bits, on the others.

        Returns:
            One entry per image, in descending order of confidence, boxes cut to the image; no masks.

        Raises:
            ValueError: an image has another shape or dtype, a class is unknown, or a number is out of its range.
        """
        if not 0 <= confidence <= 1:
            raise ValueError(f"confidence is {confidence}; wanted 0 to 1")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; wanted at least 1")
        wanted = None if classes is None else [self._class_id(entry) for entry in classes]
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise ValueError(
                    f"an image has shape {tuple(image.shape)} and dtype {image.dtype}; wanted uint8 [h, w, 3] RGB"
                )
        step = 1 if self.device.type == "cpu" else batch_size
        found: list[Detections] = []
        with self._lock, torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            for _, run in itertools.groupby(images, key=np.shape):
                alike = list(run)
                for start in range(0, len(alike), step):
                    found += self._run(alike[start : start + step], confidence, wanted)
        return found

    def _run(self, batch: list[np.ndarray], confidence: float, wanted: list[int] | None) -> list[Detections]:
        """The detections of images of one size."""
        inputs = self._image_processor(images=batch, input_data_format="channels_last", return_tensors="pt")
        inputs = {
            name: value.to(self.device) for name, value in inputs.items() if isinstance(value, torch.Tensor)
        }
        height, width = batch[0].shape[:2]
        results = self._image_processor.post_process_object_detection(
            self._model(**inputs), threshold=confidence, target_sizes=[(height, width)] * len(batch)
        )
        return [self._detections(result, height, width, wanted) for result in results]

    def _detections(self, result: dict, height: int, width: int, wanted: list[int] | None) -> Detections:
        scores, labels, boxes = (result[name].cpu().numpy() for name in ("scores", "labels", "boxes"))
        boxes = boxes.astype(np.float32).clip(0, np.float32([width, height, width, height]))
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        if wanted is not None:
            keep &= np.isin(labels, wanted)
        order = np.argsort(-scores, kind="stable")
        found = Detections(
            xyxy=boxes,
            confidence=scores.astype(np.float32),
            class_id=labels.astype(np.int64),
            names=self.names,
        )
        return found.select(order[keep[order]])

    def _class_id(self, entry: int | str) -> int:
        for class_id, name in self.names.items():
            if entry in (class_id, name):
                return class_id
        known = ", ".join(f"{class_id} {name}" for class_id, name in self.names.items())
        raise ValueError(f"class {entry!r} is unknown to {self.source}; wanted one of: {known}")


def _config(description: dict):
    values = dict(description["config"])
    model_type = values.get("model_type")
    if (
        model_type not in CONFIG_MAPPING
        or CONFIG_MAPPING[model_type] not in MODEL_FOR_OBJECT_DETECTION_MAPPING
    ):
        raise ValueError(
            f"detector {description['source']}: model_type is {model_type!r}; wanted one that transformers has an object "
            "detector for"
        )
    return CONFIG_MAPPING[model_type].from_dict(values)


def _image_processor(values: dict):
    """transformers builds image processors from files alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "preprocessor_config.json").write_text(json.dumps(values), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
