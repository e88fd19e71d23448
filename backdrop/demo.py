"""Answers through `pipeline("image-text-to-text")`, and what was reused for each."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table

from backdrop.hub_export.model_folder import check_exported
from backdrop.processing.matches_backdrop import MatchReport

CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Answer:
    """One answered question.

    `first_token_s`: seconds from the decoded image to the first token, everything included; `share_reused`: share of
    vision tokens that came from the cache; `background`: "hit" when the image's background was known, else "miss".
    """

    name: str
    question: str
    answer: str
    truth: str | None
    background: str
    share_reused: float
    first_token_s: float


class Asker:
    """A model behind its pipeline, with or without reuse."""

    def __init__(
        self,
        model: str,
        reuse: bool,
        tolerance: float = 0.0,
        show: Path | None = None,
        cache_folder: Path | None = None,
    ):
        check_exported(model)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()  # the pipeline warns about its own call, at every call
        self.pipe = transformers.pipeline("image-text-to-text", model=model, trust_remote_code=True)
        if reuse:
            self.pipe.model.enable_background_cache(max_bytes=CACHE_BYTES, folder=cache_folder)
            matcher = self.pipe.processor.enable_background_matching(tolerance=tolerance)
            matcher.observer = self._hear
        self.show = show
        self._reports: list[MatchReport] = []
        self._shown = 0

    def _hear(self, report: MatchReport) -> None:
        self._reports.append(report)

    def close(self) -> None:
        """Waits until what is to outlive the process is written."""
        cache = self.pipe.model.background_cache
        if cache is not None and cache.folder is not None:
            cache.folder.flush()

    def ask(
        self,
        image: Image.Image | str,
        question: str,
        max_new_tokens: int = 16,
        name: str = "",
        truth: str | None = None,
    ) -> Answer:
        """One question about one image, in a fresh conversation."""
        key = "path" if isinstance(image, str) else "image"
        content = [{"type": "image", key: image}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        before = self._counters()
        self._reports.clear()
        started = time.perf_counter()
        self.pipe(text=messages, return_full_text=False, max_new_tokens=1, do_sample=False)
        first_token = time.perf_counter() - started
        after = self._counters()
        if self.show is not None:
            self._draw(name, self.show)
        # The whole answer, from what the first token left behind: not part of the measured time.
        text = self.pipe(
            text=messages, return_full_text=False, max_new_tokens=max_new_tokens, do_sample=False
        )
        reused, computed, hits = (now - then for now, then in zip(after, before, strict=True))
        return Answer(
            name=name,
            question=question,
            answer=text[0]["generated_text"].strip(),
            truth=truth,
            background="hit" if hits else "miss",
            share_reused=reused / (reused + computed) if reused + computed else 0.0,
            first_token_s=first_token,
        )

    def _draw(self, name: str, folder: Path) -> None:
        from .reuse_panels import reuse_panel

        folder.mkdir(parents=True, exist_ok=True)
        patch_size = self.pipe.processor.image_processor.patch_size
        for report in self._reports:
            panel = reuse_panel(report, patch_size, name)
            panel.save(folder / f"{self._shown:03d}-{Path(name).stem}.png")
            self._shown += 1

    def _counters(self) -> tuple[int, int, int]:
        cache = self.pipe.model.background_cache
        if cache is None:
            return 0, 0, 0
        stats = cache.stats()
        return stats["vision_tokens_reused"], stats["vision_tokens_computed"], stats["tokens_hits"]


def print_answers(answers: list[Answer], as_json: bool) -> None:
    """A table, or JSON."""
    if as_json:
        print(json.dumps([asdict(answer) for answer in answers], indent=2))
        return
    table = Table("frame", "question", "answer", "truth", "background", "reused", "first token")
    for a in answers:
        mark = "" if a.truth is None else a.truth + (" ✓" if a.answer == a.truth else " ✗")
        time_text = f"{a.first_token_s * 1000:.0f} ms"
        table.add_row(a.name, a.question, a.answer, mark, a.background, f"{a.share_reused:.0%}", time_text)
    Console(width=150).print(table)


def run_demo(model: str, frames: int, family: str, seed: int, show: Path | None, as_json: bool) -> None:
    """The clip of one background that training never saw, first frame to last, once with reuse and once without."""
    from backdrop.scenes.world import FAMILIES, background_seeds, camera_clip

    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; wanted one of {', '.join(FAMILIES)}.")
    background = background_seeds("test")[seed]
    clip = camera_clip(family, background, frames, seed)
    reusing, cold = Asker(model, reuse=True), Asker(model, reuse=False)
    warmup = camera_clip(family, background_seeds("validation")[seed], 2, seed)
    for asker in (reusing, cold):  # first calls pay for imports and allocations
        for scene in warmup:
            asker.ask(scene.image, scene.questions[0].question, 2)
    reusing.pipe.model.background_cache.clear()
    reusing.pipe.processor.background_matching.clear()
    answers, cold_answers = [], []
    for i, scene in enumerate(clip):
        question = scene.questions[i % len(scene.questions)]
        name = f"{family} {i}"
        answers.append(reusing.ask(scene.image, question.question, name=name, truth=question.answer))
        cold_answers.append(cold.ask(scene.image, question.question, name=name, truth=question.answer))
    if show is not None:
        _save_pictures(cold, [scene.image for scene in clip], show)
    figures = _figures(answers, cold_answers, reusing)
    if as_json:
        print(json.dumps({"answers": [asdict(a) for a in answers], **figures}, indent=2))
        return
    print_answers(answers, as_json=False)
    print(
        f"{figures['background_hits']} of {frames} frames had a known background; "
        f"{figures['share_of_vision_tokens_reused']:.0%} of all vision tokens were reused.\n"
        f"Answers right: {figures['right']} of {frames} with reuse, {figures['right_cold']} of {frames} without.\n"
        f"Time to first token over those frames, median: {figures['first_token_cold_ms']:.0f} ms cold, "
        f"{figures['first_token_reused_ms']:.0f} ms reused "
        f"({figures['speedup']:.1f}x; detector, matching and tokenising included)."
    )


def _figures(answers: list[Answer], cold: list[Answer], reusing: Asker) -> dict:
    # The same frames in both, those whose background was known.
    pairs = [
        (a.first_token_s, c.first_token_s)
        for a, c in zip(answers, cold, strict=True)
        if a.background == "hit"
    ]
    hits = [reused for reused, _ in pairs]
    reused_ms = median(hits) * 1000 if pairs else float("nan")
    cold_ms = median(cold_s for _, cold_s in pairs) * 1000 if pairs else float("nan")
    return {
        "frames": len(answers),
        "background_hits": len(hits),
        "share_of_vision_tokens_reused": sum(a.share_reused for a in answers) / len(answers),
        "right": sum(a.answer == a.truth for a in answers),
        "right_cold": sum(a.answer == a.truth for a in cold),
        "first_token_cold_ms": cold_ms,
        "first_token_reused_ms": reused_ms,
        "speedup": cold_ms / reused_ms,
        "cache": reusing.pipe.model.background_cache.stats(),
    }


def _save_pictures(asker: Asker, images: list[Image.Image], folder: Path, rows: int = 6) -> None:
    """Every frame as PNG, and `frames.png`: how the first ones were split."""
    from backdrop.processing.patch_groups_backdrop import GROUP_KINDS

    from .panels import PanelRow, split_panels

    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"frame-{i:02d}.png")
    processor = asker.pipe.processor.image_processor
    placed = processor.placed_images(images[:rows])
    panels = []
    detected = processor.detections(*map(list, zip(*placed, strict=True)))
    for i, ((seen, where), found) in enumerate(zip(placed, detected, strict=True)):
        mask = found.combined_mask(seen.shape[0])
        parts = [(GROUP_KINDS[p.kind], p.patch_mask) for p in processor.split_groups(seen, mask, where)]
        panels.append(
            PanelRow(
                f"frame {i}",
                images[i],
                found,
                seen,
                mask,
                parts,
                processor.patch_size,
                processor.margin,
                where,
            )
        )
    split_panels(panels).save(folder / "frames.png")
