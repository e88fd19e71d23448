"""Exact-match accuracy of a small model on scenes whose backgrounds it never saw.

    python -m backdrop.train.scene_eval --model examples/scenes-model --scenes 400 --out report.json

Three forms of the same questions: `whole` (one group, plain LLaVA), `split` (the detector's groups) and `matched`
(the background's pixels and tokens come from another frame of the same scene, found by the matcher, memo on).
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.patch_groups_backdrop import group_to_image
from backdrop.processing.processing_backdrop import BackdropProcessor

from .scenes import FAMILIES, Question, Scene, background_seeds, render_scene

FORMS = ("whole", "split", "matched")


def draw(split: str, count: int, seed: int, questions: int) -> list[tuple[Scene, Scene, list[Question]]]:
    """(earlier frame, frame, questions about the frame) of `count` backgrounds."""
    rng = random.Random(f"eval/{split}/{seed}")
    drawn = []
    for _ in range(count):
        place = rng.choice(FAMILIES), rng.choice(background_seeds(split))
        earlier, scene = (render_scene(*place, rng.randrange(2**31)) for _ in range(2))
        drawn.append((earlier, scene, rng.sample(scene.questions, min(questions, len(scene.questions)))))
    return drawn


@torch.no_grad()
def answer(model, processor, images: list, questions: list[str], **options) -> list[str]:
    """Greedy answers to one question per item; an item is a list of images or ready-made groups."""
    texts = [
        processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * len(item) + [{"type": "text", "text": question}],
                }
            ],
            add_generation_prompt=True,
        )
        for item, question in zip(images, questions, strict=True)
    ]
    inputs = processor(
        images=images, text=texts, padding=True, return_tensors="pt", add_special_tokens=False, **options
    )
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def evaluate(
    model: BackdropForConditionalGeneration, processor: BackdropProcessor, scenes, form: str, batch: int = 16
) -> list[dict]:
    """One record per question: family, topic, about, question, truth, answer, right, matched."""
    records = []
    for start in tqdm(range(0, len(scenes), batch), desc=form):
        chunk = scenes[start : start + batch]
        items, hits = [], []
        for earlier, scene, _ in chunk:
            hit = False
            if form == "matched":
                matcher = processor.background_matching
                matcher.clear()
                before = matcher.stats()["matches"]
                groups = processor.image_processor.image_groups([earlier.image, scene.image])[1]
                hit = matcher.stats()["matches"] > before
                size, geometry = processor.image_processor.patch_size, processor.image_processor.geometry()
                items.append([group_to_image(group, size, geometry) for group in groups])
            else:
                items.append([scene.image])
            hits.append(hit)
        # All questions about the chunk's images, a batch at a time.
        rows = [(i, question) for i, (_, _, questions) in enumerate(chunk) for question in questions]
        options = {} if form == "matched" else {"split": form == "split"}
        for first in range(0, len(rows), 32):
            part = rows[first : first + 32]
            answers = answer(
                model, processor, [items[i] for i, _ in part], [q.question for _, q in part], **options
            )
            for (i, question), text in zip(part, answers, strict=True):
                records.append(
                    {
                        "family": chunk[i][1].family,
                        "topic": question.topic,
                        "about": question.about,
                        "question": question.question,
                        "truth": question.answer,
                        "answer": text,
                        "right": text == question.answer,
                        "matched": hits[i],
                    }
                )
    return records


def accuracy(records: list[dict], key: str | None = None) -> dict:
    """Share right and count, overall or by a field of the records."""
    groups = defaultdict(list)
    for record in records:
        groups[record[key] if key else "all"].append(record["right"])
    return {name: {"accuracy": sum(v) / len(v), "questions": len(v)} for name, v in sorted(groups.items())}


def markdown(report: dict) -> str:
    """The accuracies of a report as a Markdown table, a column per form."""
    lines = ["| exact match | questions | " + " | ".join(FORMS) + " |", "|---|---:|" + "---:|" * len(FORMS)]
    sections = [("all", {"all": report[FORMS[0]]["overall"]}, "overall")]
    sections += [(key, report[FORMS[0]][key], key) for key in ("by_family", "by_about", "by_topic")]
    for title, rows, key in sections:
        for name in rows:
            cells = [report[form][key] if key == "overall" else report[form][key][name] for form in FORMS]
            label = "**all**" if title == "all" else f"{title.removeprefix('by_')} {name}"
            figures = " | ".join(f"{cell['accuracy']:.1%}" for cell in cells)
            lines.append(f"| {label} | {cells[0]['questions']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--questions", type=int, default=3, help="questions per scene")
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    processor = BackdropProcessor.from_pretrained(options.model)
    model = BackdropForConditionalGeneration.from_pretrained(options.model).eval()
    scenes = draw(options.split, options.scenes, options.seed, options.questions)
    report = {
        "model": options.model.name,
        "scenes": options.scenes,
        "split": options.split,
        "seed": options.seed,
    }
    for form in FORMS:
        processor.disable_background_matching()
        model.disable_background_cache()
        if form == "matched":
            processor.enable_background_matching(tolerance=0)
            model.enable_background_cache(max_bytes=2**28)
        records = evaluate(model, processor, scenes, form)
        report[form] = {
            "overall": accuracy(records)["all"],
            "by_family": accuracy(records, "family"),
            "by_topic": accuracy(records, "topic"),
            "by_about": accuracy(records, "about"),
        }
        if form == "matched":
            report[form]["share_of_images_matched"] = sum(r["matched"] for r in records) / len(records)
            stats = model.background_cache.stats()
            total = stats["vision_tokens_reused"] + stats["vision_tokens_computed"]
            report[form]["share_of_vision_tokens_reused"] = stats["vision_tokens_reused"] / total
        print(f"{form}: {report[form]['overall']}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(markdown(report))


if __name__ == "__main__":
    main()
