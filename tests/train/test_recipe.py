"""Recipes that do not fit are refused before a weight is read."""

from dataclasses import fields

import pytest
import yaml
from trainings import CPU, trainer_for, words
from trl import ModelConfig, SFTConfig

from backdrop.train.arguments import UNREAD, BackdropArguments, TrainingConfig, parse
from backdrop.train.recipe import check_recipe
from backdrop.train.sft import build_trainer, run


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"trainable": ["multi_modal_projektor"]}, r"\['multi_modal_projektor'\] matches no parameter"),
        ({"use_peft": True, "lora_also_trains": ["projector"]}, "no module"),
        ({"use_peft": True, "lora_target_modules": ["q_proj", "v_prj"]}, r"lora_target_modules: \['v_prj'\]"),
        (
            {"use_peft": True, "lora_target_modules": ["q_prj"]},
            r"lora_target_modules: \['q_prj'\] matches no module",
        ),
        ({"separators": "meening"}, "separators is 'meening'; wanted one of keep, meaning"),
        ({"train_last_layers": 7}, "train_last_layers is 7; the language model has 2 layers"),
        ({"num_prefusion_layers": 3}, "num_prefusion_layers is 3, but the model has 1"),
        ({"requires_stage": "align"}, "names no stage; wanted a checkpoint of stage 'align'"),
        (
            {"use_peft": True, "trainable": ["prefusion"]},
            r"trainable is \['prefusion'\] beside use_peft; wanted lora_also",
        ),
        ({"lora_modules_to_save": ["x"]}, r"lora_modules_to_save is \['x'\].* wanted lora_also_trains"),
        ({"eval_strategy": "epoch"}, "eval_strategy is .*epoch.* without a dataset; wanted eval_dataset"),
        ({"load_in_4bit": True}, "bf16 is false with load_in_4bit"),
        ({"streaming": True}, "max_steps is -1 with streaming"),
        ({"raster_order": True}, "raster_order is True, but there are separators"),
    ],
    ids=str,
)
def test_a_recipe_that_does_not_fit_fails_before_a_weight_is_read(base, tmp_path, keys, message):
    (base / "model" / "model.safetensors").write_bytes(b"no weights")
    recipe = tmp_path / "recipe.yaml"
    values = {"model": str(base / "model"), "dataset": str(base / "rows"), "output_dir": str(base / "out")}
    recipe.write_text(yaml.safe_dump(values | keys))
    with pytest.raises(ValueError, match=message):
        run(*parse(["--config", str(recipe), *CPU]))


def test_a_length_limit_and_a_wrong_module_are_refused(base):
    with pytest.raises(ValueError, match="lora_also_trains: the model has no module"):
        trainer_for(base, ModelConfig(use_peft=True), lora_also_trains=["projector"])
    values = BackdropArguments(model=str(base / "model"), dataset=str(base / "rows"))
    with pytest.raises(ValueError, match="max_length is 1024"):
        build_trainer(values, SFTConfig(output_dir=str(base / "o"), use_cpu=True, bf16=False), ModelConfig())


UNREAD_VALUES = {
    "model_init_kwargs": '{"dtype": "float32"}',
    "dataset_kwargs": '{"skip_prepare_dataset": true}',
    "dataset_num_proc": "2",
    "include_for_metrics": "loss",
    "chat_template_path": "template.jinja",
    "dataset_text_field": "words",
    "truncation_mode": "keep_end",
    "pad_token": "</s>",
    "hub_model_id": "owner/name",
    "hub_revision": "main",
    "hub_token": "none",
}


@pytest.mark.parametrize("name", sorted(UNREAD))
def test_options_that_do_nothing_here_are_refused_by_name(base, name):
    if name not in {option.name for option in fields(TrainingConfig)}:
        pytest.skip(f"this version has no {name}")
    given = parse(
        words(
            base, *([] if name == "liger_kernel_config" else [f"--{name}", UNREAD_VALUES.get(name, "true")])
        )
    )
    if name == "liger_kernel_config":  # a dictionary: from a recipe's file alone
        given[1].liger_kernel_config = {"rope": True}
    with pytest.raises(ValueError, match=f"^{name} is .*, which does nothing here; wanted "):
        check_recipe(*given)


def test_several_gpus_of_one_process_are_refused(base):
    arguments, training, options = parse(words(base))
    training._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs are visible to one process, .* wanted `accelerate launch"):
        check_recipe(arguments, training, options)
