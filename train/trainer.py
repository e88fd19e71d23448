"""TRL's `SFTTrainer` with checkpoints that are complete or absent, and an optional image-text matching loss."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTTrainer

from backdrop.modeling.configuration_backdrop import BACKGROUND, OBJECT

from .adapters import give_head_a_bias
from .trainable import TrainableCheck, mask_sharded_gradients, partly_trained_tables

PARTIAL = ".partial"
GROUP_KINDS = {"any": {BACKGROUND, OBJECT}, "background": {BACKGROUND}, "object": {OBJECT}}


class BackdropTrainer(SFTTrainer):
    """`SFTTrainer` of a Backdrop model.

    Args:
        matching_loss: weight of the matching loss, 0: off. Each example's answer is scored with its own images and with
            those of another example of the batch; the loss is `softplus(other - own)`, scores being mean log-probabilities
            of the answer's tokens: image-text matching (ALBEF, Li et al. 2021, section 3.2) as a ranking by the
            language model's own likelihood, without a head that no checkpoint would hold.
        group_kinds: "background" or "object" refuses a batch with groups of the other kind; "any" takes both.
    """

    data_collator: Callable[[list[dict]], dict]

    def __init__(
        self, *args: Any, matching_loss: float = 0.0, group_kinds: str = "any", **kwargs: Any
    ) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, nn.Module):
            # FSDP refuses to wrap by a class of layers that the model does not have, such as another tower's.
            present = {type(module).__name__ for module in model.modules()}
            model._no_split_modules = {name for name in model._no_split_modules if name in present}
        super().__init__(*args, **kwargs)
        give_head_a_bias(self.model)
        self.matching_loss = matching_loss
        # Weight decay would move the frozen embedding rows of tables that train in part.
        self._partly_trained = partly_trained_tables(self.model)
        if group_kinds != "any":
            self.data_collator = KindCollator(self.data_collator, group_kinds)
        if matching_loss:
            self.data_collator = MismatchCollator(self.data_collator)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that weight decay applies to: not tables that train in part."""
        return [name for name in super().get_decay_parameter_names(model) if name not in self._partly_trained]

    def training_step(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step as TRL makes it; tells `TrainableCheck` the batch's group kinds."""
        kinds = set(inputs["group_kind"].tolist()) if inputs.get("group_kind") is not None else set()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TrainableCheck):
                callback.kinds |= kinds
        loss = super().training_step(model, inputs, *args, **kwargs)
        mask_sharded_gradients(model, self._partly_trained)
        return loss

    # ---- whole checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._is_saving else folder

    _is_saving = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint beside its place and renames it into it once every process has written its part."""
        folder = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial, place = folder / PARTIAL / name, folder / name
        if self.args.should_save:
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.model.config.save_pretrained(partial)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(place)
                self.state.save_to_json(str(partial / "trainer_state.json"))
            replace_folder(partial, place)
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    # ---- losses

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """TRL's loss, plus the matching loss where the batch holds `mismatched`."""
        mismatched = inputs.pop("mismatched", None)
        labels = inputs.get("labels")
        own_inputs = dict(inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if mismatched is None:
            return result
        loss, outputs = result if return_outputs else (result, None)
        own = answer_scores(model, own_inputs | {"labels": labels})
        other = answer_scores(model, mismatched)
        matching = nn.functional.softplus(other - own).mean()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["matching_loss"].append(matching.item())
        self._metrics[mode]["matching_accuracy"].append((own > other).float().mean().item())
        if num_items_in_batch is not None:  # the token loss is already a mean over all accumulated batches
            matching = matching / self.current_gradient_accumulation_steps
        loss = loss + self.matching_loss * matching
        return (loss, outputs) if return_outputs else loss


def answer_scores(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Mean log-probability of each example's answer tokens (`labels` other than -100): `[B]`, float32."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    kept = labels != -100
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (chosen * kept).sum(-1) / kept.sum(-1).clamp(min=1)


@dataclass
class MismatchCollator:
    """Adds `mismatched` to a batch: the same conversations with the images of another example.

    The other example is the nearest one before it in the batch (cyclically) with as many, but other, images. Where there
    is none, an example keeps its own images and adds no gradient.
    """

    collator: Any

    def __call__(self, examples: list[dict]) -> dict:
        """The batch with `mismatched`; a `ValueError` for a batch of one example."""
        if len(examples) < 2:
            raise ValueError(
                f"matching_loss compares examples of a batch, and this one has {len(examples)}; wanted a batch size of 2 or "
                "more, and dataloader_drop_last."
            )
        images = [list(example["images"]) for example in examples]
        shifted = []
        for i, example in enumerate(examples):
            before = images[i - 1 :: -1] + images[:i:-1] if i else images[:0:-1]
            others = (other for other in before if len(other) == len(images[i]) and other != images[i])
            shifted.append({**example, "images": next(others, images[i])})
        return {**self.collator(examples), "mismatched": dict(self.collator(shifted))}


@dataclass
class KindCollator:
    """Refuses a batch with groups of a kind that the recipe is not for."""

    collator: Any
    kind: str

    def __call__(self, examples: list[dict]) -> dict:
        """The batch; a `ValueError` where a group is of another kind."""
        batch = self.collator(examples)
        found = set(batch["group_kind"].tolist()) if "group_kind" in batch else set()
        if not found <= GROUP_KINDS[self.kind]:
            names = {BACKGROUND: "background", OBJECT: "object"}
            raise ValueError(
                f"group_kinds is {self.kind!r}, but a batch holds {sorted(names[kind] for kind in found)} groups; wanted "
                "a dataset of ready-made groups of that kind (backdrop derive captions)."
            )
        return batch


def replace_folder(built: Path, place: Path) -> None:
    """Moves a complete folder to `place`, replacing what is there."""
    old = place.with_name(f".old-{place.name}")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(built, place)
    shutil.rmtree(old, ignore_errors=True)


def replace_files(built: Path, place: Path, last: tuple[str, ...]) -> None:
    """Moves a finished run's files into a folder that holds checkpoints too.

    The files named in `last` make the folder loadable. They are removed first and written last, so that a run that is cut
    off in between leaves a folder that refuses to load.
    """
    place.mkdir(parents=True, exist_ok=True)
    for name in last:
        (place / name).unlink(missing_ok=True)
    files = sorted(path for path in built.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.name in last):
        target = place / path.relative_to(built)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(built)
