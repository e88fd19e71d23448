"""Everything that touches ultralytics: reading a checkpoint, building the network, running it, undoing side effects.

The package is optional, takes a second or more to import, and is AGPL-3.0, as are the weights made with it. It also
changes the process it is imported into; `undisturbed` undoes that.
"""

import contextlib
import copy
import importlib.util
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from .detections_backdrop import Detections
from .detector_files_backdrop import DETECTOR_LICENSE, unfit_tensors

_MISSING = (
    "An RGB image must be split by a detector, but ultralytics is not installed. "
    "Install it with `pip install ultralytics`, or pass patch groups (RGBA) instead."
)
_PLAIN_ACTIVATIONS = {"Identity": torch.nn.Identity, "SiLU": torch.nn.SiLU}
# What ultralytics writes into the environment while it is imported or a model is made.
_ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "NUMEXPR_MAX_THREADS",
    "TF_CPP_MIN_LOG_LEVEL",
    "TORCH_CPP_LOG_LEVEL",
    "KINETO_LOG_LEVEL",
    "CUBLAS_WORKSPACE_CONFIG",
    # Up to 8.4.0 a detector on the CPU hides every GPU from the process.
    "CUDA_VISIBLE_DEVICES",
)
# By these ultralytics knows, as it is imported, that it trains a YOLO over several processes: it would wait for the others at
# barriers, and they, which train another model with it, may not need a detector at that moment, or at all.
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def import_ultralytics() -> SimpleNamespace:
    """The names that are used of ultralytics. Call inside `undisturbed`: the first import takes a second or more.

    Imported here first, it works as in a single process: it never waits for others of a distributed training.

    Raises:
        ImportError: If ultralytics is not installed, or cannot be imported.
    """
    if importlib.util.find_spec("ultralytics") is None:
        raise ImportError(_MISSING)
    try:
        import cv2

        threads = cv2.getNumThreads()
        with _without(_RANKS):
            from ultralytics import RTDETR, YOLO, __version__
            from ultralytics.models.rtdetr import RTDETRPredictor
            from ultralytics.models.yolo.detect import DetectionPredictor
            from ultralytics.models.yolo.segment import SegmentationPredictor
            from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel, SegmentationModel
            from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

        cv2.setNumThreads(threads)  # ultralytics sets it to none for the whole process
    except ImportError as error:
        raise ImportError(f"ultralytics is installed but cannot be imported: {error}") from error
    return SimpleNamespace(
        YOLO=YOLO,
        RTDETR=RTDETR,
        networks={
            "detect": DetectionModel,
            "segment": SegmentationModel,
            "rtdetr": RTDETRDetectionModel,
        },
        predictors={
            "detect": DetectionPredictor,
            "segment": SegmentationPredictor,
            "rtdetr": RTDETRPredictor,
        },
        version=__version__,
        GITHUB_ASSETS_NAMES=GITHUB_ASSETS_NAMES,
    )


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Undoes what importing ultralytics and making a model change in the whole process.

    These are the number of torch threads (set to one fewer than there are cores), numpy's print options, environment
    variables that child processes inherit, the random state, the current GPU, and two functions that ultralytics
    replaces (its `Image.open` answers an unreadable image by installing a package).

    Args:
        device: Where the detector runs; the random state of that GPU is restored too.
    """
    threads = torch.get_num_threads()
    image_open, torch_save = Image.open, torch.save
    on_cuda = device.type == "cuda"
    try:
        with (
            _kept(_ENVIRONMENT),
            muted(),
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


@contextlib.contextmanager
def _kept(names: tuple[str, ...]) -> Iterator[None]:
    """Gives environment variables back the values that they have now."""
    values = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Takes environment variables away for a while."""
    with _kept(names):
        for name in names:
            os.environ.pop(name, None)
        yield


@contextlib.contextmanager
def muted() -> Iterator[list[str]]:
    """Keeps ultralytics from printing; yields the list that collects its messages."""
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


def read_checkpoint(libs: SimpleNamespace, name: str | os.PathLike) -> tuple[dict, dict[str, torch.Tensor]]:
    """Description and weights of a checkpoint. Call inside `undisturbed`.

    A checkpoint is a pickle: only name files that you trust.

    Args:
        libs: From `import_ultralytics`.
        name: A `.pt` file, a `.yaml` model description (random weights), or a name that ultralytics downloads.

    Returns:
        What `detector.json` holds, and the weights by name, on the CPU.

    Raises:
        ValueError: If the name is neither a file nor known, or not a detection or segmentation model.
        OSError: If the checkpoint cannot be read or downloaded.
    """
    path = Path(name)
    downloadable = path.name == str(name) and path.name in libs.GITHUB_ASSETS_NAMES
    if path.suffix not in (".pt", ".yaml") or not (path.is_file() or downloadable):
        raise ValueError(
            f"detector {str(name)!r} is neither a file nor a checkpoint that ultralytics knows; "
            "wanted the path of a .pt or .yaml file, a name such as 'yolov8n.pt' or 'yolo26n.pt', or the folder or Hub id of "
            "an object detector of transformers"
        )
    try:
        # A download draws its progress on stdout, where a command may be printing JSON.
        with contextlib.redirect_stdout(sys.stderr):
            # YOLO reads RT-DETR's checkpoints too, but not its descriptions.
            described = path.suffix == ".yaml" and "RTDETRDecoder" in path.read_text(encoding="utf-8")
            network = (libs.RTDETR if described else libs.YOLO)(str(name)).model.eval()
    except OSError as error:
        raise OSError(
            f"detector {str(name)!r} could not be read or downloaded: {_one_line(error)}"
        ) from error
    except Exception as error:
        raise ValueError(f"detector {str(name)!r} could not be loaded: {_one_line(error)}") from error
    task = next((task for task, kind in libs.networks.items() if type(network) is kind), None)
    if task is None:
        raise ValueError(
            f"detector {str(name)!r} is a {type(network).__name__}; "
            "wanted a YOLO detection or segmentation model, or an RT-DETR"
        )
    names = dict(enumerate(network.names)) if isinstance(network.names, list) else network.names
    stride = _stride(network)
    description = {
        "license": DETECTOR_LICENSE,
        "source": path.name,
        "ultralytics": libs.version,
        "task": task,
        "stride": stride,
        "names": [str(names[key]) for key in sorted(names)],
        "architecture": {key: value for key, value in network.yaml.items() if key != "yaml_file"},
        "activations": _activations(network),
        "probe": _probe(network, stride, task),
    }
    return description, {key: value.cpu().contiguous() for key, value in network.state_dict().items()}


def build_network(
    libs: SimpleNamespace, description: dict, weights: dict[str, torch.Tensor], source: str
) -> torch.nn.Module:
    """The network that a description names, with its weights, on the CPU in evaluation mode.

    Args:
        libs: From `import_ultralytics`.
        description: What `detector.json` holds.
        weights: By name, float32 or float16.
        source: What the detector was made from, for messages.

    Raises:
        ValueError: If the weights are not those of this architecture, or the installed ultralytics builds another
            network from it.
    """
    # ultralytics writes into the architecture that it is given.
    network = libs.networks[description["task"]](
        copy.deepcopy(description["architecture"]), ch=3, verbose=False
    )
    wrong = unfit_tensors(network.state_dict(), weights)
    if wrong:
        raise ValueError(
            f"detector {source}: {len(wrong)} of its tensors do not fit its architecture, "
            f"the first is {wrong[0]!r}; wanted the weights as they were trained, not fused or pruned"
        )
    if description["stride"] != _stride(network):
        raise ValueError(f"detector {source}: stride is {description['stride']}; wanted {_stride(network)}")
    network.load_state_dict(weights, strict=True)
    network.names = dict(enumerate(description["names"]))
    network.eval()
    # Versions disagree on activations: 8.4.0 to 8.4.140 leave one out of YOLOv8 and YOLO11.
    for name, kind in _activations(network).items():
        wanted_kind = description["activations"].get(name)
        if wanted_kind != kind and wanted_kind in _PLAIN_ACTIVATIONS:
            network.set_submodule(name, _PLAIN_ACTIVATIONS[wanted_kind]())
    before, now = description["probe"], _probe(network, description["stride"], description["task"])
    # Versions also differ in which of a network's two heads they run: only the convolutions of both are compared.
    common = before.keys() & now.keys()
    if not common or not all(math.isclose(before[name], now[name], rel_tol=1e-2) for name in common):
        raise ValueError(
            f"detector {source}: ultralytics {libs.version} builds another network from its architecture; "
            f"wanted the network that ultralytics {description['ultralytics']} built: install that version"
        )
    return network


def make_predictor(libs: SimpleNamespace, network: torch.nn.Module, task: str, device: torch.device):
    """ultralytics' predictor around a network. Call inside `undisturbed`.

    Args:
        libs: From `import_ultralytics`.
        network: From `build_network`.
        task: `"detect"`, `"segment"` or `"rtdetr"`.
        device: Where it runs.
    """
    overrides = {
        "task": "segment" if task == "segment" else "detect",
        "mode": "predict",
        "device": str(device),
        "rect": False,
        "save": False,
        "verbose": False,
        # A network with two heads uses the one that needs no suppression; versions differ in their default.
        "nms": False,
        # Nothing is written there; without these some versions make a folder "runs" in the current directory.
        "project": tempfile.gettempdir(),
        "name": ".",
        "exist_ok": True,
    }
    predictor = libs.predictors[task](overrides=overrides)
    predictor.callbacks.clear()  # they send usage statistics over the network
    predictor.setup_model(network, verbose=False)
    return predictor


def run_predictor(predictor, batch: list[np.ndarray], device: torch.device) -> list:
    """ultralytics' result for each image of a batch, uint8 BGR `[h, w, 3]` of one size, multiples of the stride."""
    # The size is the images' own, so that ultralytics' letterbox neither scales nor pads.
    predictor.args.imgsz = list(batch[0].shape[:2])
    cuda = [device] if device.type == "cuda" else []
    # The first call on a GPU draws random boxes; a caller's autocast would move the detections.
    with torch.random.fork_rng(devices=cuda), torch.autocast(device.type, enabled=False):
        results = predictor(source=batch)
    # The predictor would keep the images until its next call.
    predictor.results = predictor.batch = predictor.dataset = None
    return results


def detections_from_result(result, size: tuple[int, int], task: str, names: dict[int, str]) -> Detections:
    """ultralytics' result for one padded image, cut back to the image.

    Args:
        result: Of `run_predictor`.
        size: height and width of the image without its padding, in pixels.
        task: `"segment"` reads the instance masks too.
        names: The detector's class names by class id.

    Returns:
        The detections of which something is left inside the image.
    """
    height, width = size
    xyxy = result.boxes.xyxy.cpu().numpy().astype(np.float32).clip(0, [width, height, width, height])
    xyxy = xyxy.astype(np.float32)
    keep = (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1])
    masks = None
    if task == "segment":
        masks = np.zeros((0, height, width), dtype=bool)
        if result.masks is not None:
            masks = result.masks.data.cpu().numpy()[:, :height, :width] > 0
            keep &= masks.any(axis=(1, 2))
    found = Detections(
        xyxy=xyxy,
        confidence=result.boxes.conf.cpu().numpy().astype(np.float32),
        class_id=result.boxes.cls.cpu().numpy().astype(np.int64),
        names=names,
        masks=masks,
    )
    order = np.argsort(-found.confidence, kind="stable")  # RT-DETR's come in the order of its queries
    return found.select(order[keep[order]])


def _one_line(error: Exception) -> str:
    """ultralytics' message without its emoji and line breaks."""
    return " ".join(str(error).encode("ascii", "ignore").decode().split())


def _stride(network: torch.nn.Module) -> int:
    """The number of pixels that an image's side must be a multiple of; ultralytics pads to 32 at least."""
    return max(32, int(network.stride.max()))


def _activations(network: torch.nn.Module) -> dict[str, str]:
    """The class of the activation after each convolution, by module name."""
    modules = network.named_modules(remove_duplicate=False)  # one activation module is shared by many layers
    return {name: type(module).__name__ for name, module in modules if name.endswith(".act")}


@torch.no_grad()
def _probe(network: torch.nn.Module, stride: int, task: str) -> dict[str, float]:
    """Mean absolute output of each convolution of the head for one fixed image, by module name.

    It recognises the network: equal tensor names and shapes do not prove that two versions of ultralytics compute
    the same from them.
    """
    seen: dict[str, float] = {}

    def note(name: str):
        def hook(module, inputs, output):
            seen[name] = float(f"{output.abs().mean().item():.6g}")

        return hook

    convolutions = [(n, m) for n, m in network.model[-1].named_modules() if isinstance(m, torch.nn.Conv2d)]
    handles = [module.register_forward_hook(note(name)) for name, module in convolutions]
    side = (8 if task == "rtdetr" else 2) * stride  # RT-DETR picks its queries among the places of the grid
    network((torch.arange(3 * side * side, dtype=torch.float32) * 0.618).frac().view(1, 3, side, side))
    for handle in handles:
        handle.remove()
    return seen
