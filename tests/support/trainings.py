"""A trainer over a folder with a tiny model and eight rows of ready-made groups (the fixture `base`)."""

from datasets import Features, Image, List, Value
from trl import ModelConfig, SFTConfig

from backdrop.train.sft import BackdropArguments, build_trainer

FEATURES = Features(
    {"images": List(Image()), "messages": List({"role": Value("string"), "content": Value("string")})}
)


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
