"""Pretrains a small CLIP vision tower on the dense labels of the made scenes.

A linear head on the features of each patch predicts what the scene generator knows about it: which character,
which colour, which thing, and whether an object's centre lies in it. Half of the images are encoded whole; of the
other half object patches and background patches are encoded apart, as Backdrop does later, so that the tower learns
to see either without the other.

``backdrop scenes tower --out runs/vision_tower`` ends with ``vision_tower`` (load it with
``CLIPVisionModel.from_pretrained``) and ``report.json`` in the output folder. A run that was cut off goes on with
``--resume`` and ends with the weights that it would have had.

Where other programs use the same cores, set ``OMP_WAIT_POLICY=passive`` or ``--threads 1``: PyTorch's threads wait for
each other by spinning, which on two shared cores made a step nine times as slow.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from backdrop.modeling.grouped_vision_backdrop import encode_groups

from .world import DENSE_LABELS, Split, box_patches, disturbed, drawing_digest, sample_scenes

IMAGE_SIZE = 168
PATCH_SIZE = 14
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
_VALIDATION_BATCH = 64
_IMAGE_MEAN = torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1) * 255
_IMAGE_STD = torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1) * 255


@dataclass(frozen=True)
class SceneArrays:
    """Scenes of one split as arrays.

    Attributes:
        pixels: uint8 ``[N, 3, S, S]``.
        object_patches: bool ``[2, N, P]``, the patches that object boxes touch, and those grown by one patch.
        labels: for each head of ``DENSE_LABELS`` int64 ``[N, P]``.
    """

    pixels: np.ndarray
    object_patches: np.ndarray
    labels: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.pixels)

    def first(self, count: int) -> SceneArrays:
        """The first `count` scenes, as views."""
        labels = {head: label[:count] for head, label in self.labels.items()}
        return SceneArrays(self.pixels[:count], self.object_patches[:, :count], labels)


def open_scenes(folder: Path, split: Split, count: int, seed: int) -> SceneArrays:
    """Memory-maps the scenes kept in `folder`; draws them first if they are not there or are drawn differently now."""
    drawing = drawing_digest()
    names = ["pixels", "object_patches", *DENSE_LABELS]
    paths = {name: folder / f"{split}_{count}_{seed}_{drawing}_{name}.npy" for name in names}
    if not all(path.exists() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        _draw_scenes(paths, split, count, seed)
    arrays = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
    return SceneArrays(arrays.pop("pixels"), arrays.pop("object_patches"), arrays)


def _draw_scenes(paths: dict[str, Path], split: Split, count: int, seed: int) -> None:
    partial = {name: path.with_suffix(".partial") for name, path in paths.items()}
    shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        head: ((count, NUM_PATCHES), np.int64) for head in DENSE_LABELS
    }
    shapes["pixels"] = ((count, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    shapes["object_patches"] = ((2, count, NUM_PATCHES), np.bool_)
    arrays = {
        name: np.lib.format.open_memmap(partial[name], mode="w+", shape=shape, dtype=dtype)
        for name, (shape, dtype) in shapes.items()
    }
    drawn = sample_scenes(split, count, seed)
    for i, scene in enumerate(tqdm(drawn, total=count, desc=f"{split} scenes", mininterval=5)):
        # Every other scene as a camera sends it.
        image = disturbed(scene.image, i) if i % 2 else scene.image
        arrays["pixels"][i] = np.asarray(image).transpose(2, 0, 1)
        boxes = [item.xyxy for item in scene.objects]
        for grow in (0, 1):
            arrays["object_patches"][grow, i] = box_patches(boxes, IMAGE_SIZE, PATCH_SIZE, grow)
        for head in DENSE_LABELS:
            arrays[head][i] = scene.labels[head]
    for name, array in arrays.items():
        array.flush()
        os.replace(partial[name], paths[name])


class DenseHeads(nn.ModuleDict):
    """A linear classifier of patch features for each head of ``DENSE_LABELS``."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(
            {
                head: nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, classes))
                for head, classes in DENSE_LABELS.items()
            }
        )

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[N, D]`` features to ``[N, classes]`` logits of each head."""
        return {head: layer(features) for head, layer in self.items()}


def split_patches(object_patches: np.ndarray, apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Puts the patches of `B` images into groups.

    Args:
        object_patches: bool `[B, P]`.
        apart: bool `[B]`, images whose object patches form a group of their own, if they have any.

    Returns:
        `owner`, int64 `[G]`, the image of each group, and `patch_mask`, bool `[G, P]`. Groups share no patches.
    """
    owner, masks = [], []
    for i, (mask, is_apart) in enumerate(zip(object_patches, apart, strict=True)):
        groups = [mask, ~mask] if is_apart else [np.ones_like(mask)]
        for group in groups:
            if group.any():
                owner.append(i)
                masks.append(group)
    return np.array(owner), np.stack(masks)


def group_features(tower: CLIPVisionModel, pixels: np.ndarray, patch_mask: np.ndarray) -> torch.Tensor:
    """Encodes groups apart, each with the pixels of other patches set to 0.

    Args:
        tower: the vision tower.
        pixels: uint8 `[G, 3, S, S]`, the image of each group.
        patch_mask: bool `[G, P]`.

    Returns:
        Last hidden states of the groups' patches, group by group: `[T, D]`.
    """
    mask = torch.from_numpy(patch_mask)
    side = IMAGE_SIZE // PATCH_SIZE
    seen = mask.view(-1, 1, side, side).repeat_interleave(PATCH_SIZE, 2).repeat_interleave(PATCH_SIZE, 3)
    values = (torch.from_numpy(pixels) * seen).float().sub_(_IMAGE_MEAN).div_(_IMAGE_STD)
    return torch.cat(encode_groups(tower, values, mask, vision_feature_layer=-1))


def class_weights(labels: np.ndarray, classes: int) -> torch.Tensor:
    """Weights that fall with the root of a class's frequency and have a mean of 1 over the labels: ``[classes]``."""
    counts = np.bincount(np.asarray(labels).ravel(), minlength=classes).astype(np.float64)
    weights = 1 / np.sqrt(np.maximum(counts, counts.sum() * 1e-4))
    return torch.tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)


def learning_rate_at(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """The learning rate of a step: linear warmup, then a cosine down to a hundredth of the peak."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


@torch.no_grad()
def evaluate(tower: CLIPVisionModel, heads: DenseHeads, data: SceneArrays, apart: bool) -> dict[str, float]:
    """Accuracy of each head as a part of 1.

    ``<head>`` counts every patch, ``<head>_labelled`` only patches with a class, and ``glyph_scenes`` scenes in which
    the glyph of every patch with one is right. With `apart`, object patches and the others are encoded apart.
    """
    right = dict.fromkeys(DENSE_LABELS, 0)
    right_labelled = dict.fromkeys(DENSE_LABELS, 0)
    labelled = dict.fromkeys(DENSE_LABELS, 0)
    read = 0
    for start in range(0, len(data), _VALIDATION_BATCH):
        rows = np.arange(start, min(start + _VALIDATION_BATCH, len(data)))
        owner, mask = split_patches(data.object_patches[0, rows], np.full(len(rows), apart))
        logits = heads(group_features(tower, data.pixels[rows][owner], mask))
        for head in DENSE_LABELS:
            truth = data.labels[head][rows][owner][mask]
            hit = logits[head].argmax(-1).numpy() == truth
            right[head] += int(hit.sum())
            right_labelled[head] += int(hit[truth > 0].sum())
            labelled[head] += int((truth > 0).sum())
            if head == "glyph":
                image_of_patch: np.ndarray = np.repeat(owner, mask.sum(1))
                read += len(rows) - len(np.unique(image_of_patch[~hit & (truth > 0)]))
    accuracy = {head: right[head] / (len(data) * NUM_PATCHES) for head in DENSE_LABELS}
    accuracy |= {f"{head}_labelled": right_labelled[head] / max(1, labelled[head]) for head in DENSE_LABELS}
    return accuracy | {"glyph_scenes": read / len(data)}


@dataclass(frozen=True)
class TowerOptions:
    """How a tower is pretrained.

    Attributes:
        resume: goes on from the folder's checkpoint if there is one.
        images, validation_images: scenes.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as in `CLIPVisionConfig`.
    """

    resume: bool = False
    images: int = 8000
    validation_images: int = 512
    steps: int = 1000
    warmup_steps: int = 60
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    checkpoint_every: int = 100
    hidden_size: int = 192
    intermediate_size: int = 768
    num_hidden_layers: int = 5
    num_attention_heads: int = 6
    seed: int = 0


def train(
    tower: CLIPVisionModel,
    heads: DenseHeads,
    data: SceneArrays,
    validation: SceneArrays,
    out: Path,
    options: TowerOptions,
) -> float:
    """Trains tower and heads in place; returns the seconds taken, those before a resumption included."""
    parameters = [*tower.named_parameters(), *heads.named_parameters()]
    decayed = [p for _, p in parameters if p.ndim > 1]
    kept = [p for _, p in parameters if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": kept, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.98),
    )
    weights = {head: class_weights(data.labels[head], classes) for head, classes in DENSE_LABELS.items()}
    checkpoint, first_step, seconds = out / "checkpoint.pt", 0, 0.0
    if options.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, seconds = state["step"], state["seconds"]

    started = time.perf_counter()
    progress = tqdm(range(first_step, options.steps), initial=first_step, total=options.steps, mininterval=5)
    for step in progress:
        # Each step draws from a generator of its own, so that a resumed run sees the same batches.
        rng = np.random.default_rng((options.seed, step))
        rows = np.sort(rng.choice(len(data), options.batch_size, replace=False))
        grow = rng.integers(0, 2, options.batch_size)
        apart = rng.permutation(options.batch_size) < options.batch_size // 2
        owner, mask = split_patches(data.object_patches[grow, rows], apart)
        logits = heads(group_features(tower, data.pixels[rows][owner], mask))
        losses = {}
        for head in DENSE_LABELS:
            truth = torch.from_numpy(data.labels[head][rows][owner][mask])
            losses[head] = nn.functional.cross_entropy(logits[head], truth, weights[head])
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_([p for _, p in parameters], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, options.steps, options.warmup_steps, options.learning_rate)
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix({head: f"{loss.item():.3f}" for head, loss in losses.items()})
        if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
            state = {
                "tower": tower.state_dict(),
                "heads": heads.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "seconds": seconds + time.perf_counter() - started,
            }
            _save(state, checkpoint)
            figures = evaluate(tower, heads, validation.first(128), apart=True)
            tqdm.write(json.dumps({"step": step + 1} | {k: round(v, 4) for k, v in figures.items()}))
    return seconds + time.perf_counter() - started


def _save(state: dict[str, Any], path: Path) -> None:
    """Writes the file beside its place, then moves it there, so that a cut-off run leaves a whole one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def pretrain(out: Path, options: TowerOptions, cache: Path | None = None, threads: int = 2) -> dict:
    """Pretrains a small CLIP vision tower on dense labels of the made scenes; the report.

    Args:
        out: folder for `vision_tower/` and `report.json`.
        cache: folder for the drawn scenes; `out / "scenes"` by default.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(options.seed)
    out.mkdir(parents=True, exist_ok=True)
    scenes = cache or out / "scenes"
    data = open_scenes(scenes, "train", options.images, options.seed)
    validation = open_scenes(scenes, "validation", options.validation_images, options.seed)

    config = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=options.num_attention_heads,
    )
    tower, heads = CLIPVisionModel(config), DenseHeads(config.hidden_size)
    seconds = train(tower, heads, data, validation, out, options)

    tower.save_pretrained(out / "vision_tower")
    report = {
        "parameters": sum(p.numel() for p in tower.parameters()),
        "validation_accuracy": {
            "groups_apart": evaluate(tower, heads, validation, apart=True),
            "whole_images": evaluate(tower, heads, validation, apart=False),
        },
        "training_seconds": round(seconds, 1),
        "options": asdict(options)
        | {"out": str(out), "cache": None if cache is None else str(cache), "threads": threads},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report
