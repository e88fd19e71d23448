"""A detector of ultralytics, YOLO or RT-DETR, that tells objects from background.

A checkpoint (a pickle) is read once, by `ObjectDetector.from_name_or_path`. From there on a detector is its
description (JSON) and its tensors, and is always built from these two, so a saved one is the same network.
"""

import itertools
import json
import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .detections_backdrop import Detections
from .detector_files_backdrop import WEIGHTS_NAME, lossless_half, read_detector, write_detector
from .ultralytics_backdrop import (
    build_network,
    detections_from_result,
    import_ultralytics,
    make_predictor,
    muted,
    read_checkpoint,
    run_predictor,
    undisturbed,
)

_PAD_GREY = 114  # grey level that YOLO models are trained to see beyond the image


class ObjectDetector:
    """A YOLO detection or segmentation model, or an RT-DETR, at the geometry of the vision tower.

    Make one with `from_name_or_path` or `from_folder`. `detect` may be called from several threads.

    Attributes:
        names: Class names by class id.
        source: What it was made from, for display: `"yolov8n.pt"` or `"detector.safetensors (yolov8n.pt)"`.
        task: `"detect"`, `"segment"` or `"rtdetr"`.
        stride: Images are padded to a multiple of this many pixels.
        device: Where the model runs.
        weights: Its tensors by name, on the CPU, as `save` stores them.
        predictor: ultralytics' predictor, which holds the running network; use `detect` to run it.
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
            description: What `detector.json` holds, see `save`.
            weights: By name, on the CPU, float32 or float16.
            source: See the class.
            device: Where the model runs; computation is float32 everywhere.

        Raises:
            ValueError: If the weights are not those of this architecture, the installed ultralytics builds
                another network from it, or the device is not there.
            ImportError: If ultralytics is not installed.
        """
        self.names = dict(enumerate(description["names"]))
        self.source = source
        self.task = description["task"]
        self.stride = description["stride"]
        self.device = _resolved_device(device)
        self.weights = weights
        self._description = description
        self._lock = threading.Lock()
        with undisturbed(self.device):
            libs = import_ultralytics()
            network = build_network(libs, description, weights, source)
            self.predictor = make_predictor(libs, network, self.task, self.device)

    @classmethod
    def from_name_or_path(cls, name: str, device: str | torch.device = "cpu") -> "ObjectDetector":
        """Loads a checkpoint through ultralytics.

        A checkpoint is a pickle: only name files that you trust.

        Args:
            name: A checkpoint that ultralytics knows (`"yolov8n.pt"`; where it is not there yet, ultralytics
                downloads it into the current directory), or the path of a `.pt` file, or of a `.yaml` model
                description, which gives random weights.
            device: Where the model runs.

        Raises:
            ValueError: If the name is neither a file nor known, or the file is not a detection or
                segmentation model.
            OSError: If the checkpoint cannot be downloaded.
            ImportError: If ultralytics is not installed.
        """
        with undisturbed(_resolved_device(device)):
            description, weights = read_checkpoint(import_ultralytics(), name)
        # Through JSON, so that a detector just loaded equals the one that `save` writes and `from_folder` reads.
        description = json.loads(json.dumps(description))
        return cls(description, lossless_half(weights), source=description["source"], device=device)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, device: str | torch.device = "cpu") -> "ObjectDetector":
        """Loads what `save` wrote. Reads no pickle.

        Args:
            folder: Holds `detector.safetensors` and `detector.json`.
            device: Where the model runs.

        Raises:
            FileNotFoundError: If one of the two files is not there.
            ValueError: If one of them is damaged, they do not belong together, or the installed ultralytics
                builds another network from the description.
            ImportError: If ultralytics is not installed.
        """
        description, weights = read_detector(folder)
        return cls(description, weights, source=f"{WEIGHTS_NAME} ({description['source']})", device=device)

    def on_device(self, device: str | torch.device) -> "ObjectDetector":
        """The same detector, built again on another device."""
        return ObjectDetector(self._description, self.weights, source=self.source, device=device)

    def save(self, folder: str | os.PathLike) -> list[str]:
        """Writes `detector.safetensors` and `detector.json`, each in one step.

        Where every weight is a float16 number (those of a published checkpoint are), they are stored as float16: half
        the size and nothing lost, since loading turns them back into float32. The description holds the license, the
        first checkpoint's name, the version of ultralytics that read it, task, stride, class names, architecture, the
        activation after every convolution, and a probe that recognises the network.

        Args:
            folder: Made where it is not there.

        Returns:
            The names of the two files.
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
        """Finds the objects in images, without scaling them.

        An image is padded with grey on the right and at the bottom to a multiple of `stride`; what is found
        is cut back to the image, and dropped where nothing is left of it.

        Args:
            images: uint8 `[h, w, 3]` RGB each, of any sizes.
            confidence: The lowest confidence kept, 0 to 1.
            classes: Class ids or class names to look for; None for all of them.
            iou: Threshold of non-maximum suppression, 0 to 1: of two boxes of one class whose intersection over
                union exceeds it, the less confident one is dropped. Models without suppression (YOLOv10, YOLO26)
                ignore it.
            batch_size: How many images run at once on a GPU. On the CPU each runs alone: a batch is no faster
                there, and an image's result then does not depend, in its last bits, on the rest of the batch.

        Returns:
            One entry per image; instance masks are `[N, h, w]`.

        Raises:
            ValueError: If an image has another shape or dtype than these, a class is unknown, or a number is
                out of its range.
        """
        if not 0 <= confidence <= 1:
            raise ValueError(f"confidence is {confidence}; wanted 0 to 1")
        if not 0 <= iou <= 1:
            raise ValueError(f"iou is {iou}; wanted 0 to 1")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; wanted at least 1")
        class_ids = None if classes is None else [self._class_id(entry) for entry in classes]
        padded = [self._padded(image) for image in images]
        found: list[Detections] = []
        with self._lock, muted() as messages, torch.inference_mode():
            args = self.predictor.args
            args.conf, args.iou, args.classes = confidence, iou, class_ids
            for batch in self._batches(padded, batch_size):
                messages.clear()
                results = run_predictor(self.predictor, batch, self.device)
                # Beyond its time limit ultralytics' suppression gives the rest of a batch no detections.
                if any("time limit" in message for message in messages):
                    results = [run_predictor(self.predictor, [image], self.device)[0] for image in batch]
                for result in results:
                    size = images[len(found)].shape[:2]
                    found.append(detections_from_result(result, size, self.task, self.names))
        return found

    def _batches(self, padded: list[np.ndarray], batch_size: int) -> Iterator[list[np.ndarray]]:
        """The images in order, in batches of one size each."""
        step = 1 if self.device.type == "cpu" else batch_size
        for _, run in itertools.groupby(padded, key=np.shape):
            alike = list(run)
            yield from (alike[start : start + step] for start in range(0, len(alike), step))

    def _class_id(self, entry: int | str) -> int:
        for class_id, name in self.names.items():
            if entry in (class_id, name):
                return class_id
        known = ", ".join(f"{class_id} {name}" for class_id, name in self.names.items())
        raise ValueError(f"class {entry!r} is unknown to {self.source}; wanted one of: {known}")

    def _padded(self, image: np.ndarray) -> np.ndarray:
        """`[h, w, 3]` RGB to BGR with sides that are the next multiples of the stride."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"an image has shape {tuple(image.shape)} and dtype {image.dtype}; wanted uint8 [h, w, 3] RGB"
            )
        height, width = image.shape[:2]
        rows, columns = (-(-length // self.stride) * self.stride for length in (height, width))
        canvas = np.full((rows, columns, 3), _PAD_GREY, dtype=np.uint8)
        canvas[:height, :width] = image[..., ::-1]
        return canvas


def _resolved_device(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"detector device is {str(device)!r}, but torch finds no CUDA device; wanted 'cpu'"
            )
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
    return device
