"""Aligns a fresh projector with a pretrained language model, by the words for what each patch of a made scene shows.

The scene generator knows a patch's character, colour, thing, column and row. Each has a word, and the projector is trained to
give the sum of the embeddings of those words: regression, without a pass through the language model, so that minutes suffice. A
pretrained language model then reads image tokens much as it reads text, where a projector from scratch would need far more
steps than two CPU cores can take through 135 M parameters.

    backdrop scenes align-words --model runs/smollm2/base --out runs/smollm2/aligned
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from backdrop.data.atomic import write_atomically
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor

from .tower import (
    IMAGE_SIZE,
    PATCH_SIZE,
    SceneArrays,
    group_features,
    learning_rate_at,
    open_scenes,
    split_patches,
)
from .world import COLOURS, GLYPHS, THINGS

# fmt: off
_ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth",
    "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth",
)
# fmt: on
# Of each head of `DENSE_LABELS` that has names: the word of each class but 0, which is "none".
WORDS: dict[str, tuple[str, ...]] = {
    "glyph": tuple(GLYPHS),
    "colour": tuple(f" {name}" for name in COLOURS),
    "thing": tuple(f" {name}" for name in THINGS),
    "column": tuple(f" {name}" for name in _ORDINALS),
    "row": tuple(f" {name}" for name in _ORDINALS),
}
# Most questions ask for characters. Column and row weigh little, or they would drown what the patch shows.
WEIGHTS = {"glyph": 2.0, "colour": 1.0, "thing": 1.0, "column": 0.5, "row": 0.25}


@torch.no_grad()
def word_table(tokenizer: PreTrainedTokenizerBase, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
    """For each head the weighted embeddings of its classes' words, `[classes, H]`, each the mean over the word's tokens.

    The mean of all `embeddings` (`[V, H]`) is subtracted; class 0, "none", is 0.
    """
    mean = embeddings.mean(0)  # common to all words, so it carries no information about one
    table = {}
    for head, words in WORDS.items():
        rows = [torch.zeros_like(mean)]
        for word in words:
            ids = tokenizer(word, add_special_tokens=False)["input_ids"]
            rows.append(WEIGHTS[head] * (embeddings[ids].mean(0) - mean))
        table[head] = torch.stack(rows)
    return table


def targets(table: dict[str, torch.Tensor], labels: dict[str, np.ndarray]) -> torch.Tensor:
    """Sums of the words' embeddings, `[T, H]`; labels are int64 `[T]`, one array per head."""
    return sum(table[head][torch.from_numpy(labels[head])] for head in table)


def _batch(
    model: BackdropForConditionalGeneration,
    data: SceneArrays,
    rows: np.ndarray,
    grow: np.ndarray,
    apart: np.ndarray,
) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    owner, mask = split_patches(data.object_patches[grow, rows], apart)
    with torch.no_grad():
        features = group_features(model.model.vision_tower, data.pixels[rows][owner], mask)
    labels = {head: np.asarray(data.labels[head][rows][owner][mask]) for head in WORDS}
    return features, labels


@torch.no_grad()
def accuracy(
    model: BackdropForConditionalGeneration, table: dict[str, torch.Tensor], data: SceneArrays
) -> dict[str, float]:
    """Of the patches that have a name, the share whose projection is nearest (dot product less half the square) to it."""
    model.eval()
    right = dict.fromkeys(WORDS, 0)
    named = dict.fromkeys(WORDS, 0)
    for start in range(0, len(data), 32):
        rows = np.arange(start, min(start + 32, len(data)))
        features, labels = _batch(model, data, rows, np.zeros(len(rows), np.int64), np.ones(len(rows), bool))
        projected = model.model.multi_modal_projector(features)
        for head, words in table.items():
            scores = projected @ words.T - words.square().sum(1) / 2
            truth = labels[head]
            right[head] += int(((scores.argmax(1).numpy() == truth) & (truth > 0)).sum())
            named[head] += int((truth > 0).sum())
    return {head: right[head] / max(1, named[head]) for head in WORDS}


def align(
    model: BackdropForConditionalGeneration,
    table: dict[str, torch.Tensor],
    data: SceneArrays,
    steps: int,
    batch_size: int,
    peak: float,
    seed: int,
) -> tuple[float, float]:
    """Trains the projector in place; the first and the last step's loss, as shares of the targets' variance."""
    projector = model.model.multi_modal_projector
    projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=peak, weight_decay=0.01)
    progress = tqdm(range(steps), desc="words", mininterval=5)
    shares = []
    for step in progress:
        rng = np.random.default_rng((seed, step))
        rows = np.sort(rng.choice(len(data), batch_size, replace=False))
        grow = rng.integers(0, 2, batch_size)
        features, labels = _batch(model, data, rows, grow, rng.permutation(batch_size) < batch_size * 3 // 4)
        wanted = targets(table, labels)
        # Most patches have neither character nor colour; those that have weigh more.
        weight = torch.from_numpy(1.0 + 4 * (labels["glyph"] > 0) + 1.0 * (labels["colour"] > 0)).float()
        error = ((projector(features) - wanted).square().mean(1) * weight).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, min(20, steps // 4), peak)
        optimizer.step()
        shares.append(error.item() / wanted.var(0).mean().item())
        if step % 20 == 0:
            progress.set_postfix(unexplained=f"{shares[-1]:.3f}")
    return shares[0], shares[-1]


def align_words(
    model_folder: Path,
    out: Path,
    *,
    images: int = 2000,
    steps: int = 400,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> dict:
    """Trains the projector of a model that `make_base` wrote, and writes the model; the report, also in `words.json`.

    Raises:
        ValueError: the model's tower takes other images than the made scenes.
    """
    torch.manual_seed(seed)
    model = BackdropForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32)
    vision = model.config.vision_config
    if (vision.image_size, vision.patch_size) != (IMAGE_SIZE, PATCH_SIZE):
        raise ValueError(
            f"The tower takes {vision.image_size} px in patches of {vision.patch_size}; wanted {IMAGE_SIZE} in {PATCH_SIZE}."
        )
    processor = BackdropProcessor.from_pretrained(model_folder)
    model.requires_grad_(False)
    table = word_table(processor.tokenizer, model.get_input_embeddings().weight)
    cache = out.with_name(f"{out.name}.scenes")
    data = open_scenes(cache, "train", images, seed)
    validation = open_scenes(cache, "validation", min(128, images), seed)
    first, last = align(model, table, data, steps, batch_size, learning_rate, seed)
    model.eval()
    model.save_pretrained(out)
    processor.save_pretrained(out)
    shutil.rmtree(cache)
    report = {"unexplained": {"first": first, "last": last}}
    report["validation_accuracy"] = accuracy(model, table, validation)
    write_atomically(out / "words.json", json.dumps(report, indent=2) + "\n")
    return report
