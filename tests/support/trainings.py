"""A trainer over a folder with a tiny model and eight examples of ready-made groups (the fixture `base`)."""

from io import BytesIO
from pathlib import Path

import tiny
from datasets import Dataset, Features, Image, List, Value
from red_square import groups_of, scene
from trl import ModelConfig, SFTConfig

from backdrop.processing.detector_backdrop import ObjectDetector
from backdrop.processing.patch_groups_backdrop import save_group
from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.train.arguments import BackdropArguments
from backdrop.train.sft import build_trainer

FEATURES = Features(
    {"images": List(Image()), "messages": List({"role": Value("string"), "content": Value("string")})}
)
CPU = ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false"]


def example(images: list, number: int) -> dict:
    """A row: a question about images or groups, and one of two answers."""
    answer = ["a red bus", "a bus"][number % 2]
    messages = [{"role": "user", "content": "what is shown?"}, {"role": "assistant", "content": answer}]
    return {"images": images, "messages": messages}


def save_base(processor: BackdropProcessor, folder: Path) -> None:
    """Saves a tiny model with one prefusion layer to `model` and the examples to `rows`."""
    tokenizer = processor.tokenizer
    model = tiny.backdrop_model(
        text_config=tiny.text_config(vocab_size=len(tokenizer)),
        image_token_id=processor.image_token_id,
        separator_token_ids=processor.separator_token_ids,
        num_prefusion_layers=1,
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    examples = [example(groups_of(processor.image_processor, scene(14 * (i % 4), 14)), i) for i in range(8)]
    Dataset.from_list(examples, features=FEATURES).save_to_disk(folder / "rows")


def words(base: Path, *more, out: str = "out") -> list[str]:
    """A command line that trains the model of `base` on its examples on the CPU."""
    given = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / out, *CPU, *more]
    return [str(word) for word in given]


def trainer_for(base, options=None, **arguments):
    training = SFTConfig(
        output_dir=str(base / "out"),
        max_length=None,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        completion_only_loss=False,
    )
    values = BackdropArguments(model=str(base / "model"), dataset=str(base / "rows"), **arguments)
    return build_trainer(values, training, options or ModelConfig())


def marked(group) -> dict:
    """A group image as `datasets.Image` stores it, with the text that tells it from a picture of one alpha."""
    data = BytesIO()
    save_group(group, data)
    return {"bytes": data.getvalue(), "path": None}


def save_mixed(base: Path, detector: Path) -> None:
    """Gives the model of `base` a YOLO detector, and writes `mixed`: three batches of four examples, in order.

    Of two processes with two examples of a batch each, one has ordinary pictures, which the detector splits; the other
    has text alone, text alone, background groups alone.
    """
    processor = BackdropProcessor.from_pretrained(base / "model")
    processor.image_processor.set_detector(ObjectDetector.from_name_or_path(str(detector)))
    # The weights are random: the best of whatever boxes there are.
    processor.image_processor.confidence, processor.image_processor.objects = 0.0, "most_confident"
    processor.save_pretrained(base / "model")
    pictures = [[scene(14 * (i % 4), 14)] for i in range(6)]
    grounds = [
        [marked(group) for group in groups_of(processor.image_processor, picture[0], split=False)]
        for picture in pictures[:2]
    ]
    order = [*pictures[:2], [], [], [], [], *pictures[2:4], *grounds, *pictures[4:]]
    Dataset.from_list([example(images, i) for i, images in enumerate(order)], features=FEATURES).save_to_disk(
        base / "mixed"
    )
