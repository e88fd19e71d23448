"""A trainer over a folder with a tiny model and eight examples of ready-made groups (the fixture `base`)."""

from pathlib import Path

import tiny
from datasets import Dataset, Features, Image, List, Value
from red_square import groups_of, scene
from trl import ModelConfig, SFTConfig

from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.train.arguments import BackdropArguments
from backdrop.train.sft import build_trainer

FEATURES = Features(
    {"images": List(Image()), "messages": List({"role": Value("string"), "content": Value("string")})}
)
CPU = ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false"]


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
    examples = [
        {
            "images": groups_of(processor.image_processor, scene(14 * (i % 4), 14)),
            "messages": [
                {"role": "user", "content": "what is shown?"},
                {"role": "assistant", "content": ["a red bus", "a bus"][i % 2]},
            ],
        }
        for i in range(8)
    ]
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
