"""Training rows from the scene generator: patch groups made by the model's own processor, and questions.

    backdrop scenes rows --model runs/scene_base --out runs/scene_rows --scenes 12000

The detector runs here, once. Whatever the shares of the forms are, a seed gives the same scenes and questions:

* `whole`: the image as one background group (plain LLaVA);
* `split`: the detector's groups;
* `pair`: the background group comes from another frame of the same scene and the fresh group from this one, paired by
  the same matcher that serves at inference, so that training sees what a matched background looks like;
* `stale`: a pair whose background is the *whole* other frame, so that it still shows that frame's objects: fresh
  tokens contradict background tokens at the same place, and objects that rest are seen in the background.

Half of the rows are as a fixed camera sends them (noise, light, JPEG), with a tolerance; the others as they are drawn.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from tqdm import tqdm

from backdrop.data.stored import STRUCTURED_FEATURES, structured
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import PatchGroup, group_to_image, save_group

from .world import FAMILIES, TOPICS, Scene, Split, background_seeds, disturbed, render_scene, scene_family

FEATURES = Features(
    {
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)
FEATURES_IN_PARTS = Features({**FEATURES, "messages": STRUCTURED_FEATURES["messages"]})

FORMS = ("whole", "split", "pair", "stale")
BATCH = 32  # scenes that the detector sees together
STALE_OVERRIDDEN = 0.3  # share of a reference's patches that a frame may contradict, old objects included
CAMERA_TOLERANCE = 10.0  # grey levels; noise and light of `disturbed` differ by less between two frames
# Streets have the most to ask, and what takes longest to learn: places and plates.
FAMILY_WEIGHTS = {name: scene_family(name).training_weight for name in FAMILIES}
TOPIC_WEIGHTS = {"plate": 4, "side": 2}  # all others 1


def row_groups(
    processor: BackdropImageProcessor,
    images: list,
    earlier: list,
    forms: list[str],
    tolerances: list[float],
) -> list[list[PatchGroup]]:
    """Groups of each image in its form; `earlier` are the other frames that pairs take their background from.

    Where the matcher refuses a pair, the image is split.

    Raises:
        ValueError: background matching is not enabled.
    """
    groups: dict[int, list[PatchGroup]] = {}
    matcher = processor.background_matching
    if matcher is None:
        raise ValueError("background matching is off; wanted processor.enable_background_matching() before.")
    for form in ("whole", "split"):
        members = [i for i, name in enumerate(forms) if name == form]
        with matcher.scope(bypass=True):
            found = processor.image_groups([images[i] for i in members], split=form == "split")
        groups |= dict(zip(members, found, strict=True))
    for i in sorted(set(range(len(images))) - set(groups)):
        matcher.clear()
        matcher.tolerance = tolerances[i]
        if forms[i] == "pair":
            groups[i] = processor.image_groups([earlier[i], images[i]])[1]
        else:
            reference = processor.model_images([earlier[i]])[0]
            matcher.add(reference, np.ones((reference.shape[0] // processor.patch_size) ** 2, dtype=bool))
            groups[i] = processor.image_groups([images[i]])[0]
    return [groups[i] for i in range(len(images))]


def conversation(
    scene: Scene,
    questions: int,
    rng: random.Random,
    places: int = 0,
    topic_weights: Mapping[str, float] = TOPIC_WEIGHTS,
) -> list[dict[str, str]]:
    """Up to `questions` questions about one image and up to `places` for columns, in random order, each answered.

    TRL puts the images first. `topic_weights` say how likely a topic is drawn, 1 where one is not named.
    """
    # The largest of u^(1/w): a weighted sample without replacement (Efraimidis and Spirakis 2006).
    order = sorted(scene.questions, key=lambda q: rng.random() ** (1 / topic_weights.get(q.topic, 1)))
    chosen = order[-questions:] + rng.sample(scene.places, min(places, len(scene.places)))
    rng.shuffle(chosen)
    messages = []
    for question in chosen:
        messages.append({"role": "user", "content": question.question})
        messages.append({"role": "assistant", "content": question.answer})
    return messages


def rows(
    processor: BackdropImageProcessor,
    split: Split,
    scenes: int,
    seed: int,
    questions: int,
    shares: dict[str, float],
    places: int = 0,
    family_weights: Mapping[str, float] = FAMILY_WEIGHTS,
    topic_weights: Mapping[str, float] = TOPIC_WEIGHTS,
    images_last: bool = False,
) -> Iterator[dict]:
    """Dataset rows; `shares` gives the probability of each form.

    `images_last`: contents in parts (`FEATURES_IN_PARTS`), the groups behind the first question instead of before it.
    """
    rng = random.Random(f"rows/{split}/{seed}")
    backgrounds = background_seeds(split)
    # Whole frames as references show old objects, which nothing in the new frame explains: rows are about overriding them.
    processor.enable_background_matching(tolerance=0, refresh=False, max_overridden=STALE_OVERRIDDEN)
    progress = tqdm(total=scenes, desc=f"{split} scenes", mininterval=5)
    for start in range(0, scenes, BATCH):
        count = min(BATCH, scenes - start)
        drawn, images, earlier, tolerances, talks, forms = [], [], [], [], [], []
        for _ in range(count):
            family = rng.choices(FAMILIES, weights=[family_weights[name] for name in FAMILIES])[0]
            background, camera = rng.choice(backgrounds), rng.random() < 0.5
            frames = [render_scene(family, background, rng.randrange(2**31)) for _ in range(2)]
            noise = [rng.randrange(2**31) for _ in frames]
            seen = [
                disturbed(scene.image, seed) if camera else scene.image
                for scene, seed in zip(frames, noise, strict=True)
            ]
            drawn.append(frames[1])
            earlier.append(seen[0])
            images.append(seen[1])
            tolerances.append(CAMERA_TOLERANCE if camera else 0.0)
            talks.append(conversation(frames[1], questions, rng, places, topic_weights))
            forms.append(_form(rng.random(), shares))
        made = row_groups(processor, images, earlier, forms, tolerances)
        for groups, messages in zip(made, talks, strict=True):
            pngs = [_png(group, processor.patch_size, processor.geometry()) for group in groups]
            if images_last:
                messages = structured(messages, len(pngs), "end")
            yield {"images": pngs, "messages": messages}
        progress.update(count)


def _form(draw: float, shares: dict[str, float]) -> str:
    for form in FORMS:
        draw -= shares[form]
        if draw < 0:
            return form
    return FORMS[1]


def _png(group: PatchGroup, patch_size: int, geometry: str) -> dict:
    buffer = BytesIO()
    save_group(group_to_image(group, patch_size, geometry), buffer)
    return {"bytes": buffer.getvalue(), "path": None}


def read_weights(text: str, kind: str, names: Sequence[str], base: Mapping[str, float]) -> dict[str, float]:
    """`"name=number,name=number"` as weights; names that are left out keep their number of `base`.

    Args:
        kind: what the names are, for errors.
        names: those that exist.

    Raises:
        ValueError: an unknown name, or a weight that is no number above 0.
    """
    weights = dict(base)
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in names:
            raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(names)}")
        try:
            weights[name] = float(number)
        except ValueError:
            raise ValueError(f"weight of {name!r} is {number!r}; wanted a number") from None
        if not 0 < weights[name] < float("inf"):
            raise ValueError(f"weight of {name!r} is {number}; wanted a number above 0")
    return weights


def make_rows(
    model: Path,
    out: Path,
    *,
    scenes: int = 12_000,
    questions: int = 8,
    places: int = 0,
    split: str = "train",
    seed: int = 0,
    whole: float = 0.1,
    pair: float = 0.35,
    stale: float = 0.2,
    images_last: bool = False,
    families: str | None = None,
    topics: str | None = None,
) -> Dataset:
    """Makes the rows and saves them to `out`; the rest of the shares is `split`.

    Args:
        model: folder whose processor splits the scenes.
        questions, places: questions per scene, questions for columns per scene.
        whole, pair, stale: shares of these forms, 0-1.
        images_last: see `rows`.
        families, topics: how often each is drawn, as `read_weights` takes it; None: the module's own weights.

    Raises:
        ValueError: shares above 1, or weights that cannot be read.
    """
    shares = {"whole": whole, "pair": pair, "stale": stale}
    shares["split"] = 1 - sum(shares.values())
    if min(shares.values()) < -1e-9:
        raise ValueError(
            f"the shares of whole, pair and stale add up to {1 - shares['split']:g}; wanted at most 1"
        )
    family_weights = (
        read_weights(families, "family", FAMILIES, FAMILY_WEIGHTS) if families else FAMILY_WEIGHTS
    )
    topic_weights = read_weights(topics, "topic", TOPICS, TOPIC_WEIGHTS) if topics else TOPIC_WEIGHTS
    dataset = Dataset.from_generator(
        rows,
        features=FEATURES_IN_PARTS if images_last else FEATURES,
        gen_kwargs={
            "processor": BackdropImageProcessor.from_pretrained(model),
            "split": split,
            "scenes": scenes,
            "seed": seed,
            "questions": questions,
            "shares": shares,
            "places": places,
            "family_weights": family_weights,
            "topic_weights": topic_weights,
            "images_last": images_last,
        },
        cache_dir=str(out) + ".cache",
    )
    dataset.save_to_disk(out)
    return dataset
