"""Training rows from the scene generator: patch groups made by the model's own processor, and questions.

    python -m backdrop.train.scene_dataset --model runs/scene_base --out runs/scene_rows --scenes 24000

The detector runs here, once. A share of the rows are *pairs*: the background group comes from another frame of the
same scene and the fresh group from this one, paired by the same matcher that serves at inference, so that training
sees what a matched background looks like. An equal-sized share is the whole image as one group (plain LLaVA).
"""

import argparse
import random
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from tqdm import tqdm

from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import PatchGroup, group_to_image, save_group

from .scenes import FAMILIES, Scene, background_seeds, render_scene

FEATURES = Features(
    {
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)


FORMS = ("whole", "split", "pair")
BATCH = 32


def row_groups(
    processor: BackdropImageProcessor, scenes: list[Scene], earlier: list[Scene | None], forms: list[str]
) -> list[list[PatchGroup]]:
    """Groups of each scene: "whole" image, "split" by the detector, or "pair" (background from the earlier frame)."""
    groups: dict[int, list[PatchGroup]] = {}
    for form in ("whole", "split"):
        members = [i for i, name in enumerate(forms) if name == form]
        with processor.background_matching.scope(bypass=True):
            found = processor.image_groups([scenes[i].image for i in members], split=form == "split")
        groups |= dict(zip(members, found, strict=True))
    for i, (scene, before) in enumerate(zip(scenes, earlier, strict=True)):
        if before is not None:
            processor.background_matching.clear()
            groups[i] = processor.image_groups([before.image, scene.image])[1]
    return [groups[i] for i in range(len(scenes))]


def conversation(scene: Scene, questions: int, rng: random.Random) -> list[dict[str, str]]:
    """Up to `questions` questions about one image, in random order, each answered. TRL puts the images first."""
    chosen = rng.sample(scene.questions, min(questions, len(scene.questions)))
    messages = []
    for question in chosen:
        messages.append({"role": "user", "content": question.question})
        messages.append({"role": "assistant", "content": question.answer})
    return messages


def rows(
    processor: BackdropImageProcessor,
    split: str,
    scenes: int,
    seed: int,
    questions: int,
    shares: dict[str, float],
) -> Iterator[dict]:
    """Dataset rows; `shares` gives the probability of each form ("whole", "split", "pair")."""
    rng = random.Random(f"rows/{split}/{seed}")
    backgrounds = background_seeds(split)
    processor.enable_background_matching(tolerance=0)
    progress = tqdm(total=scenes, desc=f"{split} scenes")
    for start in range(0, scenes, BATCH):
        count = min(BATCH, scenes - start)
        forms = rng.choices(FORMS, weights=[shares[form] for form in FORMS], k=count)
        places = [(rng.choice(FAMILIES), rng.choice(backgrounds)) for _ in forms]
        drawn = [render_scene(*place, rng.randrange(2**31)) for place in places]
        earlier = [
            render_scene(*place, rng.randrange(2**31)) if form == "pair" else None
            for place, form in zip(places, forms, strict=True)
        ]
        for scene, groups in zip(drawn, row_groups(processor, drawn, earlier, forms), strict=True):
            images = [_png(group, processor.patch_size, processor.geometry()) for group in groups]
            yield {"images": images, "messages": conversation(scene, questions, rng)}
        progress.update(count)


def _png(group: PatchGroup, patch_size: int, geometry: str) -> dict:
    buffer = BytesIO()
    save_group(group_to_image(group, patch_size, geometry), buffer)
    return {"bytes": buffer.getvalue(), "path": None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder whose processor splits the scenes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--questions", type=int, default=6, help="questions per scene")
    parser.add_argument("--split", choices=["train", "validation"], default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--whole", type=float, default=0.2, help="share of rows with the whole image as one group"
    )
    parser.add_argument(
        "--pair", type=float, default=0.4, help="share of rows with another frame's background"
    )
    options = parser.parse_args()
    processor = BackdropImageProcessor.from_pretrained(options.model)
    shares = {"whole": options.whole, "pair": options.pair, "split": 1 - options.whole - options.pair}
    dataset = Dataset.from_generator(
        rows,
        features=FEATURES,
        gen_kwargs={
            "processor": processor,
            "split": options.split,
            "scenes": options.scenes,
            "seed": options.seed,
            "questions": options.questions,
            "shares": shares,
        },
        cache_dir=str(options.out) + ".cache",
    )
    dataset.save_to_disk(options.out)
    print(f"{options.out}: {len(dataset):,} rows")


if __name__ == "__main__":
    main()
