"""The YOLO detector that tells objects from background, and its weights as safetensors.

Everything that needs ultralytics is reached through `_ultralytics`: the package is optional, slow to load,
and AGPL-3.0, as are the weights made with it. A checkpoint (a pickle) is read once, by `from_name_or_path`;
from there on a detector is its architecture (JSON) and its tensors, and is always built from these two.
"""

import contextlib
import copy
import importlib.util
import json
import logging
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError

WEIGHTS_NAME = "detector.safetensors"
DESCRIPTION_NAME = "detector.json"
# Of its tensors in the file: loaders that read every *.safetensors of a folder can tell them from the model's.
KEY_PREFIX = "detector."

_PAD_GREY = 114  # what YOLO models are trained to see beyond the image
_LICENSE = "AGPL-3.0 (made with ultralytics, https://ultralytics.com/license)"
_MISSING = (
    "An RGB image must be split by a detector, but ultralytics is not installed. "
    "Install it with `pip install ultralytics`, or pass patch groups (RGBA) instead."
)
_PLAIN_ACTIVATIONS = {"Identity": torch.nn.Identity, "SiLU": torch.nn.SiLU}
_DESCRIPTION_FIELDS = {
    "source": str,
    "ultralytics": str,
    "task": str,
    "stride": int,
    "names": list,
    "architecture": dict,
    "activations": dict,
    "probe": dict,
}
# What ultralytics writes into the environment while it is imported or a model is made.
_ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "NUMEXPR_MAX_THREADS",
    "TF_CPP_MIN_LOG_LEVEL",
    "TORCH_CPP_LOG_LEVEL",
    "KINETO_LOG_LEVEL",
    "CUBLAS_WORKSPACE_CONFIG",
)


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects found in one image of `S x S` pixels, in descending order of confidence.

    Attributes:
        xyxy: Boxes, float32 `[N, 4]`, left, top, right, bottom in pixels of the image.
        confidence: float32 `[N]` in 0 to 1.
        class_id: int64 `[N]`, keys of `names`.
        names: The detector's class names.
        masks: Instance masks, bool `[N, S, S]`, of a segmentation model; None for a detection model.
    """

    xyxy: np.ndarray
    confidence: np.ndarray
    class_id: np.ndarray
    names: dict[int, str]
    masks: np.ndarray | None = None

    def combined_mask(self, size: int) -> np.ndarray:
        """The pixels that belong to any object.

        Args:
            size: `S`, the side of the image in pixels.

        Returns:
            bool `[S, S]`: the union of the instance masks, or of the boxes (every pixel that a box touches)
            where the detector has no masks.

        Raises:
            ValueError: If the instance masks have another size.
        """
        if self.masks is not None:
            if self.masks.shape[1:] != (size, size):
                raise ValueError(f"size is {size}, but the instance masks are {self.masks.shape[1:]}")
            return self.masks.any(axis=0)
        mask = np.zeros((size, size), dtype=bool)
        for left, top, right, bottom in self.xyxy:
            rows = slice(max(0, int(np.floor(top))), max(0, int(np.ceil(bottom))))
            columns = slice(max(0, int(np.floor(left))), max(0, int(np.ceil(right))))
            mask[rows, columns] = True
        return mask

    def most_confident(self) -> "Detections":
        """The detections reduced to the most confident one; unchanged where nothing was found."""
        if len(self.confidence) == 0:
            return self
        best = int(np.argmax(self.confidence))
        return self._select(slice(best, best + 1))

    def _select(self, which: slice | np.ndarray) -> "Detections":
        return Detections(
            xyxy=self.xyxy[which],
            confidence=self.confidence[which],
            class_id=self.class_id[which],
            names=self.names,
            masks=None if self.masks is None else self.masks[which],
        )


class ObjectDetector:
    """A YOLO detection or segmentation model at the geometry of the vision tower.

    Make one with `from_name_or_path` or `from_folder`. `detect` may be called from several threads.

    Attributes:
        names: Class names by class id.
        source: What it was made from, for display: `"yolov8n.pt"` or `"detector.safetensors (yolov8n.pt)"`.
        task: `"detect"` or `"segment"`.
        stride: Images are padded to a multiple of this many pixels.
        device: Where the model runs.
    """

    def __init__(
        self,
        description: dict,
        state: dict[str, torch.Tensor],
        *,
        source: str,
        device: str | torch.device = "cpu",
    ):
        """Builds the model; `from_name_or_path` and `from_folder` call this.

        Args:
            description: What `detector.json` holds, see `save`.
            state: The weights by name, on the CPU, float32 or float16.
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
        self._description = description
        self._state = state
        self._lock = threading.Lock()
        with _undisturbed(self.device):
            libs = _ultralytics()
            model = _build_model(libs, description, state, source)
            predictors = {"detect": libs.DetectionPredictor, "segment": libs.SegmentationPredictor}
            overrides = {
                "task": self.task,
                "mode": "predict",
                "device": str(self.device),
                "rect": False,
                "save": False,
                "verbose": False,
                # A model with two heads uses the one without suppression, which versions choose differently.
                "nms": False,
                # Nothing is written there; without these some versions make a folder "runs" where they run.
                "project": tempfile.gettempdir(),
                "name": ".",
                "exist_ok": True,
            }
            self._predictor = predictors[self.task](overrides=overrides)
            self._predictor.callbacks.clear()  # they send usage statistics over the network
            self._predictor.setup_model(model, verbose=False)

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
        path = Path(name)
        with _undisturbed(_resolved_device(device)):
            libs = _ultralytics()
            downloadable = path.name == str(name) and path.name in libs.GITHUB_ASSETS_NAMES
            if path.suffix not in (".pt", ".yaml") or not (path.is_file() or downloadable):
                raise ValueError(
                    f"detector {str(name)!r} is neither a file nor a checkpoint that ultralytics knows; "
                    "wanted the path of a .pt or .yaml file, or a name such as 'yolov8n.pt' or 'yolo26n.pt'"
                )
            try:
                # A download draws its progress on stdout, where a command may be printing JSON.
                with contextlib.redirect_stdout(sys.stderr):
                    model = libs.YOLO(str(name)).model.eval()
            except OSError as error:
                raise OSError(
                    f"detector {str(name)!r} could not be read or downloaded: {_one_line(error)}"
                ) from error
            except Exception as error:
                raise ValueError(f"detector {str(name)!r} could not be loaded: {_one_line(error)}") from error
            if type(model) is libs.SegmentationModel:
                task = "segment"
            elif type(model) is libs.DetectionModel:
                task = "detect"
            else:
                raise ValueError(
                    f"detector {str(name)!r} is a {type(model).__name__}; "
                    "wanted a YOLO detection or segmentation model"
                )
            names = dict(enumerate(model.names)) if isinstance(model.names, list) else model.names
            stride = _stride(model)
            description = {
                "license": _LICENSE,
                "source": path.name,
                "ultralytics": libs.version,
                "task": task,
                "stride": stride,
                "names": [str(names[key]) for key in sorted(names)],
                "architecture": {key: value for key, value in model.yaml.items() if key != "yaml_file"},
                "activations": _activations(model),
                "probe": _probe(model, stride),
            }
            state = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
        return cls(json.loads(json.dumps(description)), _as_stored(state), source=path.name, device=device)

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
        weights_file, description_file = Path(folder) / WEIGHTS_NAME, Path(folder) / DESCRIPTION_NAME
        for path in (weights_file, description_file):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is not there; wanted a folder that holds {WEIGHTS_NAME} and {DESCRIPTION_NAME}"
                )
        try:
            description = _checked_description(json.loads(description_file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{description_file} is not a detector's description: {type(error).__name__}: {error}"
            ) from error
        try:
            state = safetensors.torch.load_file(weights_file)
        except SafetensorError as error:
            raise ValueError(f"{weights_file} is damaged or not a safetensors file: {error}") from error
        state = {key.removeprefix(KEY_PREFIX): value for key, value in state.items()}
        return cls(description, state, source=f"{WEIGHTS_NAME} ({description['source']})", device=device)

    def save(self, folder: str | os.PathLike) -> list[str]:
        """Writes `detector.safetensors` and `detector.json`, each in one step.

        Weights that are float16 numbers (those of a published checkpoint are) are stored as float16: half the
        size, and not a bit lost, since float32 is made of them again on loading. The description holds the
        license, the first checkpoint's name, ultralytics' version then, task, stride, class names, the
        architecture, the activation after every convolution, and a probe that recognises the network.

        Args:
            folder: Made where it is not there.

        Returns:
            The names of the two files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # One entry: safetensors writes several in random order, and equal detectors should be equal files.
        _write_atomically(folder / WEIGHTS_NAME, _weights_file(self._state))
        _write_atomically(folder / DESCRIPTION_NAME, (json.dumps(self._description) + "\n").encode())
        return [WEIGHTS_NAME, DESCRIPTION_NAME]

    @staticmethod
    def copy(source: str | os.PathLike, folder: str | os.PathLike) -> list[str]:
        """Copies a saved detector into another folder; needs no ultralytics.

        Returns:
            The names of the two files.
        """
        source, folder = Path(source), Path(folder)
        state = safetensors.torch.load_file(source / WEIGHTS_NAME)
        _write_atomically(folder / WEIGHTS_NAME, _weights_file(state))
        _write_atomically(folder / DESCRIPTION_NAME, (source / DESCRIPTION_NAME).read_bytes())
        return [WEIGHTS_NAME, DESCRIPTION_NAME]

    def detect(
        self,
        images: Sequence[np.ndarray],
        *,
        confidence: float = 0.25,
        classes: Sequence[int | str] | None = None,
        iou: float = 0.7,
        batch_size: int = 16,
    ) -> list[Detections]:
        """Finds the objects in images of one size, without scaling them.

        An image is padded with grey on the right and at the bottom to a multiple of `stride`; what is found
        is cut back to the image, and dropped where nothing is left of it.

        Args:
            images: uint8 `[S, S, 3]` RGB each.
            confidence: The lowest confidence kept, 0 to 1.
            classes: Class ids or class names to look for; None for all of them.
            iou: Of two boxes of one class that overlap more than this (0 to 1) the less confident one goes.
                Models without suppression (YOLOv10, YOLO26) do not read it.
            batch_size: How many images run at once on a GPU. On the CPU each runs alone: a batch is no faster
                there, and alone an image's result cannot depend, in its last bits, on its neighbours.

        Returns:
            One entry per image.

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
        padded = [self._padded(image, len(images[0])) for image in images]
        found: list[Detections] = []
        with self._lock, _muted() as messages, torch.inference_mode():
            args = self._predictor.args
            args.conf, args.iou, args.classes = confidence, iou, class_ids
            step = 1 if self.device.type == "cpu" else batch_size
            for start in range(0, len(padded), step):
                batch = padded[start : start + step]
                messages.clear()
                results = self._predict(batch)
                # After some seconds ultralytics' suppression leaves the rest of a batch empty.
                if any("time limit" in message for message in messages):
                    results = [self._predict([image])[0] for image in batch]
                found += [self._detections(result, len(images[0])) for result in results]
        return found

    def _class_id(self, entry: int | str) -> int:
        for class_id, name in self.names.items():
            if entry in (class_id, name):
                return class_id
        known = ", ".join(f"{class_id} {name}" for class_id, name in self.names.items())
        raise ValueError(f"class {entry!r} is unknown to {self.source}; wanted one of: {known}")

    def _padded(self, image: np.ndarray, size: int) -> np.ndarray:
        """`[S, S, 3]` RGB to `[M, M, 3]` BGR, where M is the next multiple of the stride."""
        if image.dtype != np.uint8 or image.shape != (size, size, 3):
            raise ValueError(
                f"an image has shape {tuple(image.shape)} and dtype {image.dtype}; "
                "wanted square uint8 [S, S, 3] RGB, all of one size"
            )
        side = -(-size // self.stride) * self.stride
        canvas = np.full((side, side, 3), _PAD_GREY, dtype=np.uint8)
        canvas[:size, :size] = image[..., ::-1]
        return canvas

    def _predict(self, batch: list[np.ndarray]) -> list:
        predictor = self._predictor
        # The size is the images' own, so that ultralytics' letterbox neither scales nor pads.
        predictor.args.imgsz = list(batch[0].shape[:2])
        cuda = [self.device] if self.device.type == "cuda" else []
        # The first call on a GPU draws random boxes; a caller's autocast would move the detections.
        with torch.random.fork_rng(devices=cuda), torch.autocast(self.device.type, enabled=False):
            results = predictor(source=batch)
        predictor.results = predictor.batch = predictor.dataset = (
            None  # else the images are kept until the next call
        )
        return results

    def _detections(self, result, size: int) -> Detections:
        xyxy = result.boxes.xyxy.cpu().numpy().astype(np.float32).clip(0, size)
        keep = (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1])
        masks = None
        if self.task == "segment":
            masks = np.zeros((0, size, size), dtype=bool)
            if result.masks is not None:
                masks = result.masks.data.cpu().numpy()[:, :size, :size] > 0
                keep &= masks.any(axis=(1, 2))
        found = Detections(
            xyxy=xyxy,
            confidence=result.boxes.conf.cpu().numpy().astype(np.float32),
            class_id=result.boxes.cls.cpu().numpy().astype(np.int64),
            names=self.names,
            masks=masks,
        )
        return found._select(keep)


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


def _build_model(libs: SimpleNamespace, description: dict, state: dict[str, torch.Tensor], source: str):
    """The ultralytics module with these weights, on the CPU in evaluation mode."""
    model_class = {"detect": libs.DetectionModel, "segment": libs.SegmentationModel}[description["task"]]
    # ultralytics writes into the architecture that it is given.
    model = model_class(copy.deepcopy(description["architecture"]), ch=3, verbose=False)
    wanted = model.state_dict()
    wrong = sorted(wanted.keys() ^ state.keys())
    wrong += [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    if wrong:
        raise ValueError(
            f"detector {source}: {len(wrong)} of its tensors do not fit its architecture, "
            f"the first is {wrong[0]!r}; wanted the weights as they were trained, not fused or pruned"
        )
    if description["stride"] != _stride(model):
        raise ValueError(f"detector {source}: stride is {description['stride']}; wanted {_stride(model)}")
    model.load_state_dict(state, strict=True)
    model.names = dict(enumerate(description["names"]))
    model.eval()
    # Versions disagree on activations: 8.4.0 to 8.4.140 leave one out of YOLOv8 and YOLO11.
    for name, kind in _activations(model).items():
        wanted_kind = description["activations"].get(name)
        if wanted_kind != kind and wanted_kind in _PLAIN_ACTIVATIONS:
            model.set_submodule(name, _PLAIN_ACTIVATIONS[wanted_kind]())
    before, now = description["probe"], _probe(model, description["stride"])
    common = before.keys() & now.keys()  # versions differ in which of the two heads of one model they run
    if not common or not all(math.isclose(before[key], now[key], rel_tol=1e-2) for key in common):
        raise ValueError(
            f"detector {source}: ultralytics {libs.version} builds another network from its architecture; "
            f"wanted the network that ultralytics {description['ultralytics']} built: install that version"
        )
    return model


def _stride(model: torch.nn.Module) -> int:
    """What an image's side must be a multiple of; ultralytics pads to 32 at least."""
    return max(32, int(model.stride.max()))


def _activations(model: torch.nn.Module) -> dict[str, str]:
    """The class of the activation after each convolution, by module name."""
    modules = model.named_modules(remove_duplicate=False)  # one activation module is shared by many layers
    return {name: type(module).__name__ for name, module in modules if name.endswith(".act")}


@torch.no_grad()
def _probe(model: torch.nn.Module, stride: int) -> dict[str, float]:
    """How strongly each convolution of the head answers one fixed image.

    Equal tensor names and shapes do not prove that two versions of ultralytics compute the same from them.
    """
    seen: dict[str, float] = {}

    def note(name: str):
        def hook(module, inputs, output):
            seen[name] = float(f"{output.abs().mean().item():.6g}")

        return hook

    convolutions = [(n, m) for n, m in model.model[-1].named_modules() if isinstance(m, torch.nn.Conv2d)]
    handles = [module.register_forward_hook(note(name)) for name, module in convolutions]
    side = 2 * stride
    model((torch.arange(3 * side * side, dtype=torch.float32) * 0.618).frac().view(1, 3, side, side))
    for handle in handles:
        handle.remove()
    return seen


def _checked_description(description: dict) -> dict:
    """Refuses a description that lacks a field, or whose architecture names anything but layers.

    ultralytics evaluates some strings of an architecture as code.
    """
    for field, kind in _DESCRIPTION_FIELDS.items():
        if not isinstance(description.get(field), kind):
            raise ValueError(f"field {field!r} is {description.get(field)!r}; wanted {kind.__name__}")
    if description["task"] not in ("detect", "segment"):
        raise ValueError(f"task is {description['task']!r}; wanted 'detect' or 'segment'")
    architecture = description["architecture"]
    # Classes are capitalised and functions are not, with one exception.
    for layer in [layer[2] for layer in architecture["backbone"] + architecture["head"]]:
        if not re.fullmatch(r"(nn\.|torchvision\.ops\.)?[A-Z]\w*|v10Detect", layer):
            raise ValueError(f"layer {layer!r} is not the name of a module class")
    activation = architecture.get("activation")
    if activation and not re.fullmatch(r"(torch\.)?nn\.[A-Z]\w*\([\w\s.,=-]*\)", activation):
        raise ValueError(f"activation {activation!r} is not a plain module such as 'nn.SiLU()'")
    return description


def _as_stored(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in float16 where that loses nothing at all, else as they are.

    ultralytics turns a float16 checkpoint into float32 as it loads it, so its own dtype is found by trying.
    """
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    lossless = all(torch.equal(halves[key].to(value.dtype), value) for key, value in state.items())
    return halves if lossless else state


def _one_line(error: Exception) -> str:
    """ultralytics' message without its emoji and line breaks."""
    return " ".join(str(error).encode("ascii", "ignore").decode().split())


def _weights_file(state: dict[str, torch.Tensor]) -> bytes:
    named = {KEY_PREFIX + key.removeprefix(KEY_PREFIX): value for key, value in state.items()}
    return safetensors.torch.save(named, {"license": _LICENSE})


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _muted() -> Iterator[list[str]]:
    """Keeps ultralytics from printing; yields the list that its messages are put into instead."""
    messages: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return False

    # A filter, since importing ultralytics replaces the level and the handlers of its logger.
    logger = logging.getLogger("ultralytics")
    logger.addFilter(collect)
    try:
        yield messages
    finally:
        logger.removeFilter(collect)


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Undoes what importing ultralytics and making a model change in the whole process.

    That is: the number of torch threads (one fewer than there are cores), numpy's print options, environment
    variables that child processes inherit, the random state, the current GPU, and two functions that it
    replaces (its `Image.open` answers an unreadable image by installing a package).
    """
    environment = {name: os.environ.get(name) for name in _ENVIRONMENT}
    threads = torch.get_num_threads()
    image_open, torch_save = Image.open, torch.save
    on_cuda = device.type == "cuda"
    try:
        with (
            _muted(),
            np.printoptions(),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.random.fork_rng(devices=[device] if on_cuda else []),
            torch.cuda.device(device) if on_cuda else contextlib.nullcontext(),
        ):
            yield
    finally:
        Image.open, torch.save = image_open, torch_save
        torch.set_num_threads(threads)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _ultralytics() -> SimpleNamespace:
    """What is used of ultralytics. The first call takes a second or more: call it inside `_undisturbed`."""
    if importlib.util.find_spec("ultralytics") is None:
        raise ImportError(_MISSING)
    try:
        import cv2

        threads = cv2.getNumThreads()
        from ultralytics import YOLO, __version__
        from ultralytics.models.yolo.detect import DetectionPredictor
        from ultralytics.models.yolo.segment import SegmentationPredictor
        from ultralytics.nn.tasks import DetectionModel, SegmentationModel
        from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

        cv2.setNumThreads(threads)  # ultralytics sets it to none for the whole process
    except ImportError as error:
        raise ImportError(f"ultralytics is installed but cannot be imported: {error}") from error
    return SimpleNamespace(
        YOLO=YOLO,
        DetectionModel=DetectionModel,
        SegmentationModel=SegmentationModel,
        DetectionPredictor=DetectionPredictor,
        SegmentationPredictor=SegmentationPredictor,
        version=__version__,
        GITHUB_ASSETS_NAMES=GITHUB_ASSETS_NAMES,
    )
