"""Backdrop as a model of lmms-eval, so that its tasks run through the same answers as `backdrop eval`.

    backdrop lmms-eval --model backdrop --model_args pretrained=my-model,mode=matched,tolerance=10 \\
        --tasks pope --batch_size 16 --output_path runs/harness

All arguments are lmms-eval's own (`python -m lmms_eval --help`); this module registers the model and hands over.
"""

import sys
from itertools import islice
from unittest import mock

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from .answering import Answerer, load

MANIFEST = ModelManifest("backdrop", simple_class_path="backdrop.evaluation.harness.BackdropHarnessModel")
REFUSED = ("num_beams", "temperature", "do_sample")  # what would make a generation another than greedy


class BackdropHarnessModel(lmms):
    """lmms-eval's `generate_until` in one of Backdrop's modes.

    Requests are answered in the task's order, because with matching the images before are the references.

    Args:
        pretrained: a folder or a Hub id.
        mode, tolerance: see `Answerer`.
        batch_size: questions answered together.
        device: "auto", "cpu", "cuda".
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        mode: str = "split",
        tolerance: float = 0.0,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,  # lmms-eval passes it to every model
    ):
        super().__init__()
        model, processor = load(pretrained, device or "auto")
        self.batch_size = int(batch_size)
        self.answerer = Answerer(model, processor, mode, float(tolerance))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer for each request, cut at the first of its `until` strings."""
        answers: list[str] = []
        left = iter(tqdm(requests, desc=self.answerer.mode))
        while batch := list(islice(left, self.batch_size)):
            # (context, generation options, document -> images, document's number, task, split)
            arguments = [request.args for request in batch]
            lengths = {_longest(options) for _, options, *_ in arguments}
            if len(lengths) > 1:
                raise ValueError(f"max_new_tokens is {sorted(lengths)} in one task; wanted one value.")
            self.answerer.max_new_tokens = lengths.pop()
            documents = [(task, split, number) for _, _, _, number, task, split in arguments]
            prepared = self.answerer.prepare(
                [
                    to_images(self.task_dict[task][split][number])
                    for (_, _, to_images, *_), (task, split, number) in zip(arguments, documents, strict=True)
                ]
            )
            texts = self.answerer.answer(prepared, [_plain(context) for context, *_ in arguments])
            answers += [_cut(text, options) for text, (_, options, *_) in zip(texts, arguments, strict=True)]
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: Backdrop answers single rounds only."""
        raise NotImplementedError("Backdrop's harness model answers single rounds only.")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: Backdrop generates, and scores no given answers."""
        raise NotImplementedError(
            "Backdrop's harness model generates only; choose tasks of type generate_until."
        )


def _plain(context: str) -> str:
    """The question without lmms-eval's placeholders: the chat template puts the images."""
    return context.replace("<image>", "").strip()


def _longest(options: dict) -> int:
    greedy = (
        options.get("num_beams", 1) == 1 and not options.get("do_sample") and not options.get("temperature")
    )
    if not greedy:
        raise ValueError(
            f"The task wants { ({name: options.get(name) for name in REFUSED}) }; wanted greedy generation."
        )
    return int(options.get("max_new_tokens", 128))


def _cut(text: str, options: dict) -> str:
    until = options.get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        # A task's default "\n\n" and the tokenizer's end mark: an answer that begins with one is left as it is.
        text = text.split(stop)[0] or text if stop else text
    return text.strip()


def run_harness(arguments: list[str]) -> None:
    """lmms-eval's command line with `arguments`, and the model "backdrop" in it."""
    from lmms_eval.__main__ import cli_evaluate

    MODEL_REGISTRY_V2.register_manifest(MANIFEST, overwrite=True)
    # lmms-eval reads its options, and those of configuration files, from the program's arguments.
    with mock.patch.object(sys, "argv", ["lmms-eval", *arguments]):
        cli_evaluate()
