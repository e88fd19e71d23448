"""Recipes: every one shipped fits a model, mistakes are named before a weight is read, saves are whole, runs resume."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from packaging.version import Version
from paths import EXAMPLE, FSDP_ON_CPU, ROOT
from PIL import Image
from safetensors.torch import load_file
from trainings import trainer_for
from trl import ModelConfig

from backdrop.evaluation.answering import load
from backdrop.experiments.ablate import Matrix, markdown, plot, read_matrix, run_matrix
from backdrop.experiments.ladder import read_chain, run_ladder
from backdrop.experiments.steps import load_for_scoring, step, train_stage
from backdrop.hub_export.chat_template import chat_template
from backdrop.hub_export.checkpoint import load_checkpoint
from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.train.assemble import ModelArguments, assemble, quantization
from backdrop.train.sft import build_trainer, outline_trainable, parse, run
from backdrop.train.stages import check_start, read_stage
from backdrop.train.trainable import select_trainable, trainable_rows
from backdrop.train.trainer import MismatchCollator, answer_scores, replace_files

RECIPES = ROOT / "experiments" / "recipes"
SHIPPED = sorted(
    path
    for room in ("experiments", "train")
    for path in (ROOT / room / "recipes").rglob("*.yaml")
    if path.name not in ("scenes.yaml", "ablate_scenes.yaml", "ablate_llava.yaml")
)
CPU = ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false"]


def parsed(path, *more):
    words = ["--config", str(path), *CPU]
    given = yaml.safe_load(Path(path).read_text())
    for name, value in (("model", "MODEL"), ("dataset", "ROWS"), ("output_dir", "OUT")):
        if name not in given:
            words += [f"--{name}", value]
    return parse([*words, *more])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_recipe_parses_and_fits_a_model(base, path):
    text = path.read_text()
    assert text.startswith("# "), "a comment on when to use it"
    arguments, training, options = parsed(path)
    arguments.model = str(base / "model")
    # The fixture's model has 2 layers and one prefusion layer.
    arguments.train_last_layers = min(arguments.train_last_layers, 2)
    arguments.num_prefusion_layers = 0
    if not arguments.train:
        return
    if options.load_in_4bit:
        assert quantization(arguments, options).load_in_4bit
    rows = trainable_rows(outline_trainable(arguments, options))
    assert all(row["device"] == "meta" for row in rows)
    assert 0 < sum(row["trainable"] for row in rows) <= sum(row["parameters"] for row in rows)
    assert training.max_length is None


def test_a_misspelt_key_is_named(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\ndataset: d\noutput_dir: o\ntrainabel: [x]\n")
    with pytest.raises(ValueError, match="trainabel"):
        parse(["--config", str(recipe), *CPU])


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
        ({"eval_strategy": "epoch"}, "eval_strategy is .*epoch.* without rows; wanted eval_dataset"),
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


def test_the_script_prints_one_line(base):
    command = [
        sys.executable,
        "-m",
        "backdrop.train.sft",
        "--model",
        base / "model",
        "--dataset",
        base / "rows",
    ]
    result = subprocess.run(
        [*map(str, command), "--trainable", "tower_of_vision", "--output_dir", str(base / "out"), *CPU],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: trainable: ['tower_of_vision'] matches no parameter")
    assert "Traceback" not in result.stderr


# ---- what trains


def test_separators_alone_train_their_rows_and_no_other(base):
    trainer = trainer_for(base, trainable=["separators"])
    trainer.args.weight_decay = 0.5
    table = trainer.model.get_input_embeddings().weight
    before = table.detach().clone()
    trainer.train()
    moved = (table.detach() != before).any(-1).nonzero().squeeze(-1).tolist()
    assert moved == sorted(trainer.model.config.separator_token_ids)
    row = next(row for row in trainable_rows(trainer.model) if row["module"] == "embed_tokens")
    assert row["trainable"] == 4 * table.shape[1]


def test_the_last_layers_train(base):
    trainer = trainer_for(base, trainable=["separators"], train_last_layers=1)
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert names and all("layers.1." in name or "norm" in name or "embed" in name for name in names)
    assert any("layers.1.self_attn" in name for name in names)
    trainer.train()


def test_a_trainable_part_that_nothing_reads_stops_the_run(base):
    # Whole images have no object groups: the objects' projector gets no gradient.
    trainer = trainer_for(base, trainable=["multi_modal_projector"], separate_projectors=True)
    dataset = trainer.train_dataset

    def background_only(row):
        return {**row, "images": row["images"][:1]}

    trainer.train_dataset = [background_only(dataset[i]) for i in range(len(dataset))]
    with pytest.raises(ValueError, match="without a gradient after 2 steps: .*object_multi_modal_projector"):
        trainer.train()


def test_a_first_step_without_images_is_no_mistake(base):
    """LLaVA's mix has rows of text alone: a projector is looked at once there was an image."""

    def train(images):
        trainer = trainer_for(base, trainable=["multi_modal_projector", "language_model"])
        rows = [trainer.train_dataset[i] for i in range(8)]
        trainer.train_dataset = [
            row if i >= 4 and images else {**row, "images": []} for i, row in enumerate(rows)
        ]
        trainer.args.train_sampling_strategy = "sequential"
        trainer.args.max_steps = 3 if not images else 2
        trainer.train()

    train(images=True)
    with pytest.raises(ValueError, match="after 3 steps: model.multi_modal_projector"):
        train(images=False)


def test_gradients_that_an_engine_has_taken_away_count(base):
    """DeepSpeed steps and clears inside `backward`, before the optimizer's step is announced."""
    trainer = trainer_for(base, trainable=["multi_modal_projector"])
    trainer.create_optimizer()
    whole = trainer.training_step

    def stepping(model, inputs, *args, **kwargs):
        loss = whole(model, inputs, *args, **kwargs)
        model.zero_grad(set_to_none=True)
        return loss

    trainer.training_step = stepping
    trainer.train()


@pytest.mark.parametrize("change", ["one", "all_alike", "a_row"])
def test_a_frozen_parameter_that_moves_stops_the_run(base, change):
    trainer = trainer_for(base, trainable=["multi_modal_projector", "separators"])
    step_of = trainer.training_step
    norm = trainer.model.model.language_model.norm.weight
    table = trainer.model.get_input_embeddings().weight

    def meddling(*args, **kwargs):
        with torch.no_grad():
            if change == "one":
                norm[3].add_(1e-6)
            elif change == "all_alike":
                norm.mul_(1.01)  # an even number of equal elements: XOR alone would not see it
            else:
                table[5] += 1e-3
        return step_of(*args, **kwargs)

    trainer.training_step = meddling
    name = "embed_tokens" if change == "a_row" else "norm.weight"
    with pytest.raises(ValueError, match=rf"Frozen parameters moved in the first step: .*{name}"):
        trainer.train()


def test_only_optional_parts_may_be_missing():
    import tiny

    model = tiny.backdrop_model()
    select_trainable(model, ["multi_modal_projector", "prefusion", "object_vision_tower"])
    with pytest.raises(ValueError, match="nothing would train"):
        select_trainable(tiny.backdrop_model(separators=False), ["prefusion", "separators"])


def test_the_table_is_saved_beside_the_checkpoint(base):
    recipe = base / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": str(base / "model"),
                "dataset": str(base / "rows"),
                "output_dir": str(base / "out"),
                "trainable": ["multi_modal_projector"],
                "max_steps": 1,
                "stage": "one",
            }
        )
    )
    run(*parse(["--config", str(recipe), *CPU]))
    rows = json.loads((base / "out" / "trainable.json").read_text())
    assert {"module", "parameters", "trainable", "share", "dtype", "device"} == set(rows[0])
    assert read_stage(base / "out")["stage"] == "one"
    assert read_stage(base / "out")["recipe"]["trainable"] == ["multi_modal_projector"]
    check_start(str(base / "out"), "one")
    with pytest.raises(ValueError, match="of stage 'one'; wanted stage 'two'"):
        check_start(str(base / "out"), "two")


def test_streamed_rows_train(base):
    from datasets import load_from_disk

    (base / "files").mkdir()
    load_from_disk(base / "rows").to_parquet(base / "files" / "train.parquet")
    words = ["--model", base / "model", "--dataset", base / "files", "--output_dir", base / "out", *CPU]
    words += ["--streaming", "true", "--max_steps", 2, "--per_device_train_batch_size", 2]
    run(*parse([*map(str, words), "--trainable", "multi_modal_projector"]))
    assert (base / "out" / "model.safetensors").is_file()


@pytest.mark.skipif(Version(version("trl")) < Version("1.16"), reason="the estimate runs TRL 1.16's loss")
def test_a_dry_run_prints_what_trains_and_what_it_needs(base, capsys):
    (base / "model" / "model.safetensors").unlink()  # no weight is read
    words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    run(*parse([*map(str, words), "--dry_run", "true"]))
    printed = capsys.readouterr().out
    assert "What trains" in printed and "multi_modal_projector" in printed and "GiB" in printed
    assert not (base / "out").exists()


def test_a_dry_run_on_an_older_trl_says_which_is_wanted(base, monkeypatch):
    monkeypatch.setattr("backdrop.train.sft.version", lambda name: "1.10.0")
    words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    with pytest.raises(ValueError, match="TRL is 1.10.0, wanted 1.16"):
        run(*parse([*map(str, words), "--dry_run", "true"]))


def test_lora_with_separators_trains_a_model_with_tied_embeddings(base):
    model = BackdropForConditionalGeneration.from_pretrained(base / "model")
    config = model.config.to_dict()
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = True
    tied = BackdropForConditionalGeneration(BackdropConfig.from_dict(config))
    tied.save_pretrained(base / "model")
    words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    words += ["--use_peft", "true", "--lora_r", 2, "--lora_also_trains", "multi_modal_projector"]
    run(*parse([*map(str, words), "--max_steps", "2", "--learning_rate", "0.01"]))
    trained, _ = load_checkpoint(base / "out")
    separators = tied.config.separator_token_ids
    changed = (trained.get_input_embeddings().weight != tied.get_input_embeddings().weight).any(-1)
    assert changed.nonzero().flatten().tolist() == sorted(separators)
    assert trained.lm_head.weight is trained.get_input_embeddings().weight
    # The evaluation takes the adapter's folder as it is.
    scored, _ = load(base / "out", "cpu")
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(scored.parameters(), trained.parameters(), strict=True)
    )


# ---- losses


def test_the_matching_loss_is_the_ranking_of_likelihoods(base):
    trainer = trainer_for(base, trainable=["multi_modal_projector"], matching_loss=0.5)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    other = batch["mismatched"]
    assert torch.equal(other["labels"][0][-3:], batch["labels"][0][-3:])
    groups = [len(trainer.train_dataset[i]["images"]) for i in range(4)]
    assert torch.equal(other["pixel_values"][: groups[3]], batch["pixel_values"][-groups[3] :])
    model = trainer.model.eval()
    with torch.no_grad():
        alone = [
            answer_scores(model, trainer.data_collator.collator([trainer.train_dataset[i]])) for i in range(4)
        ]
        together = answer_scores(model, {k: v for k, v in batch.items() if k != "mismatched"})
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-4)
    trainer.train()
    assert {"matching_loss", "matching_accuracy"} <= set().union(*trainer.state.log_history)
    with pytest.raises(ValueError, match="this one has 1; wanted a batch size of 2"):
        trainer.data_collator([trainer.train_dataset[0]])


def test_mismatched_images_are_others_and_as_many():
    """Two captions of one image in a row, and a row with two images: none is told that its own image is wrong."""
    seen = MismatchCollator(lambda rows: {"images": [row["images"] for row in rows]})
    one, two, other = (Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(3))
    rows = [{"images": images} for images in ([one], [one.copy()], [one, two], [other], [])]
    assert seen(rows)["mismatched"]["images"] == [[other], [other], [one, two], [one], []]


def test_rows_of_the_other_kind_are_refused(base):
    trainer = trainer_for(base, trainable=["multi_modal_projector"], group_kinds="background")
    with pytest.raises(
        ValueError, match=r"group_kinds is 'background', but a batch holds \['background', 'object'\]"
    ):
        trainer.train()


# ---- saving and going on


def test_an_adapter_is_evaluated_as_it_was_trained(base):
    words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    words += ["--use_peft", "true", "--lora_r", 2, "--masked_attention", "false", "--max_steps", 1]
    run(*parse([*map(str, words)]))
    assert BackdropConfig.from_pretrained(base / "model").masked_attention
    model, _ = load(base / "out", "cpu")
    assert not model.config.masked_attention and not model.model.config.masked_attention
    # Quantised for a score, an adapter is merged first.
    quantised, _ = load_for_scoring(base / "out", {"load_in_8bit": True}, base / "score")
    assert quantised.is_loaded_in_8bit and not quantised.config.masked_attention


def test_packed_numbers_are_counted_as_what_they_stand_for():
    model = tiny.backdrop_model()
    total = sum(row["parameters"] for row in trainable_rows(model))
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    packed = torch.nn.Parameter(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=weight.shape)
    model.model.language_model.layers[0].mlp.up_proj.weight = packed
    assert sum(row["parameters"] for row in trainable_rows(model)) == total


def test_rows_to_evaluate_on_give_a_loss(base):
    words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    words += ["--eval_dataset", base / "rows", "--eval_split", "train", "--eval_strategy", "epoch"]
    words += ["--num_train_epochs", 2, "--load_best_model_at_end", "true", "--save_total_limit", 1]
    run(*parse([*map(str, words)]))
    log = json.loads((base / "out" / "log.json").read_text())
    assert sum("eval_loss" in entry for entry in log) == 2
    assert json.loads((base / "out" / "bad_rows.json").read_text()) == []


def test_the_seed_draws_new_parts_too(base):
    config = BackdropConfig.from_pretrained(base / "model")
    config.num_prefusion_layers = 0
    BackdropForConditionalGeneration(config).save_pretrained(base / "model")

    def drawn(seed):
        words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
        words += ["--num_prefusion_layers", 2, "--seed", seed]
        return build_trainer(*parse([*map(str, words)])).model.state_dict()

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("lora", [False, True], ids=["projector", "lora"])
def test_a_resumed_run_has_the_same_losses(base, lora):
    def trainer():
        options = ModelConfig(use_peft=lora, lora_r=2)
        made = trainer_for(base, options, trainable=None if lora else ["multi_modal_projector", "separators"])
        made.args.max_steps, made.args.logging_steps = 6, 1
        made.args.save_strategy, made.args.save_steps = "steps", 3
        return made

    whole = trainer()
    whole.train()
    assert sorted(path.name for path in (base / "out").glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
    ]
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(base / "out" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    assert (base / "out" / "checkpoint-3" / "config.json").is_file()


def test_a_checkpoint_every_epoch_by_default(base):
    words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    words += [
        "--num_train_epochs",
        2,
        "--per_device_train_batch_size",
        4,
        "--trainable",
        "multi_modal_projector",
    ]
    run(*parse([*map(str, words)]))
    assert sorted(path.name for path in (base / "out").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    BackdropForConditionalGeneration.from_pretrained(base / "out")


def test_a_save_that_is_cut_off_leaves_no_checkpoint(base, monkeypatch):
    trainer = trainer_for(base, trainable=["multi_modal_projector"])
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    trainer.args.max_steps = 2

    def cut_off(*args):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return whole(*args)

    whole = trainer._save_optimizer_and_scheduler
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [path.name for path in (base / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_finished_model_that_is_cut_off_does_not_load(tmp_path, monkeypatch):
    built, place = tmp_path / "built", tmp_path / "place"
    for folder, text in ((built, "new"), (place, "old")):
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text(text)
    replace = os.replace

    def cut_off(source, target):
        if Path(target).name == "tokenizer.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        replace_files(built, place, ("config.json",))
    assert not (place / "config.json").exists()
    with pytest.raises(ValueError, match=r"holds no config.json; wanted a finished checkpoint"):
        check_start(str(place), None)
    monkeypatch.undo()
    (built / "model.safetensors").write_text("new")
    replace_files(built, place, ("config.json",))
    assert {path.read_text() for path in place.iterdir()} == {"new"}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_alike(base, tmp_path):
    recipe = {
        "dataset": str(base / "rows"), "trainable": ["multi_modal_projector"], "max_steps": 8, "save_strategy": "steps",
        "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "learning_rate": 0.01,
    }  # fmt: skip
    whole = train_stage(recipe, base / "model", tmp_path / "whole")
    code = (
        "from backdrop.experiments.steps import train_stage; import yaml, sys;"
        "train_stage(yaml.safe_load(sys.argv[1]), sys.argv[2], __import__('pathlib').Path(sys.argv[3]))"
    )
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", code, yaml.safe_dump(recipe), str(base / "model"), str(killed)],
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(killed.glob("model/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    again = train_stage(recipe, base / "model", killed)
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- switches


def test_switches_reach_model_and_processor(base):
    def made(**switches):
        return assemble(ModelArguments(model=str(base / "model"), **switches), ModelConfig())

    model, processor = made(split=False, separators="none", margin=2, background_first=False)
    assert model.config.separator_token_ids is None and not processor.use_separators
    images = processor.image_processor
    assert (images.split, images.margin, images.background_first) == (False, 2, False)
    rows = made()[0].config.separator_token_ids
    tables = [
        made(separators=start)[0].get_input_embeddings().weight[rows].detach()
        for start in ("keep", "meaning", "random")
    ]
    assert not any(torch.equal(a, b) for a, b in zip(tables, tables[1:] + tables[:1], strict=True))
    model, processor = made(separators="none", raster_order=True, masked_attention=False)
    assert model.config.raster_order and not model.config.masked_attention


def test_a_stage_without_training_saves_its_switches(base):
    recipe = base / "recipe.yaml"
    values = {"model": str(base / "model"), "output_dir": str(base / "one"), "train": False, "split": False}
    recipe.write_text(yaml.safe_dump(values | {"separators": "none", "stage": "ladder_1"}))
    run(*parse(["--config", str(recipe), *CPU]))
    processor = BackdropProcessor.from_pretrained(base / "one")
    model = BackdropForConditionalGeneration.from_pretrained(base / "one")
    assert not processor.image_processor.split and model.config.separator_token_ids is None
    check_start(str(base / "one"), "ladder_1")
    old = load_file(base / "model" / "model.safetensors")
    assert all(
        torch.equal(value, old[name]) for name, value in load_file(base / "one" / "model.safetensors").items()
    )


def test_images_in_place(processor):
    processor.chat_template = chat_template(system_prompt="", images_first=False)
    image, text = {"type": "image"}, {"type": "text", "text": "what is it?"}

    def prompt(*parts):
        return processor.apply_chat_template([{"role": "user", "content": list(parts)}], tokenize=False)

    assert "USER: what is it?\n<image> " in prompt(text, image)
    assert "USER: <image>\nwhat is it? " in prompt(image, text)
    assert "USER: <image><image>\nwhat is it?\n<image> " in prompt(image, image, text, image)
    processor.chat_template = chat_template(system_prompt="")
    assert "USER: <image>\nwhat is it? " in prompt(text, image)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_only_the_language_models_layers_are_quantised_and_lora_trains_on_them(base, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    words = [
        "--model",
        base / "model",
        "--dataset",
        base / "rows",
        "--output_dir",
        base / "out",
        "--max_steps",
        2,
    ]
    words += ["--use_peft", "true", f"--{bits}", "true", "--lora_r", 2, "--use_cpu", "true", "--bf16", "true"]
    words += ["--gradient_checkpointing", "false", "--lora_also_trains", "multi_modal_projector", "prefusion"]
    trainer = build_trainer(*parse([*map(str, words)]))
    kind = bitsandbytes.nn.Linear4bit if bits == "load_in_4bit" else bitsandbytes.nn.Linear8bitLt
    packed = [name for name, module in trainer.model.named_modules() if isinstance(module, kind)]
    assert packed and all("language_model.layers" in name for name in packed)
    trainer.train()  # gradients where they should be, nothing frozen moved: else the check would stop it
    assert trainer.state.log_history[-1]["train_loss"] > 0
    words[words.index("--use_peft") + 1] = "false"
    with pytest.raises(ValueError, match="wanted use_peft: true"):
        build_trainer(*parse([*map(str, words)]))


# ---- ladder and ablations


def test_the_ladder_reads_its_stages_and_refuses_unknown_keys(tmp_path):
    chain = read_chain(RECIPES / "ladder" / "scenes.yaml")
    stages = list(chain["stages"].values())
    assert [stage["stage"] for stage in stages] == [f"ladder_{i}" for i in range(1, 7)]
    assert [stage.get("requires_stage") for stage in stages[1:]] == [f"ladder_{i}" for i in range(1, 6)]
    wrong = tmp_path / "chain.yaml"
    wrong.write_text("start: x\nout: y\nstages: []\nscore: {}\nrow: {}\n")
    with pytest.raises(ValueError, match=r"unknown keys \['row'\]"):
        read_chain(wrong)


@pytest.mark.real
@pytest.mark.slow
def test_a_matrix_and_a_ladder_run_from_start_to_report(tmp_path):
    """Far too few steps, but every step of both: switches set, rows made, trained, scored, a second run does nothing."""
    example = EXAMPLE
    rows = {"scenes": 8, "questions": 2}
    score = {"forms": ["split"], "scenes": 3, "questions": 1}
    cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    recipe = {"trainable": ["multi_modal_projector"], "max_steps": 1, "assistant_only_loss": True, **cpu}
    axes = {
        "margin": {"0": {"margin": 0}},
        "position": {
            "behind": {
                "image_position": "in_place",
                "rows": {"image-position": "last"},
                "score": {"images_last": True},
            }
        },
        "bits": {"8": {"score": {"loaded": {"load_in_8bit": True, "int8_threshold": 0}}}},
    }
    matrix = {"start": str(example), "out": str(tmp_path / "matrix"), "rows": rows, "score": score}
    matrix |= {"base": {"split": True, **recipe}, "axes": axes}
    stages = {"first.yaml": {"train": False, "stage": "one"}}
    stages["second.yaml"] = {
        "trainable": ["lm_head"],
        "max_steps": 1,
        "stage": "two",
        "requires_stage": "one",
    }
    chain = {"start": str(example), "out": str(tmp_path / "ladder"), "stages": list(stages)}
    chain |= {"common": cpu, "rows": rows, "score": {"default": score}}
    for name, values in {**stages, "chain.yaml": chain, "matrix.yaml": matrix}.items():
        (tmp_path / name).write_text(yaml.safe_dump(values, sort_keys=False))

    report = run_matrix(read_matrix(tmp_path / "matrix.yaml"))
    assert not report["failed"], report["failed"]
    assert [row["cell"] for row in report["cells"]] == ["base", "margin=0", "position=behind", "bits=8"]
    assert all(row["score"]["questions"] == 3 for row in report["cells"])
    assert all("to_base" in row for row in report["cells"][1:])
    folders = (tmp_path / "matrix" / "rows").iterdir()
    texts = [Dataset.load_from_disk(folder / "rows")[0]["messages"][0]["content"] for folder in folders]
    (parts,) = [content for content in texts if isinstance(content, list)]
    assert [part["type"] for part in parts] == ["text", *["image"] * (len(parts) - 1)] and len(parts) > 1
    ladder = run_ladder(read_chain(tmp_path / "chain.yaml"))
    assert list(ladder["stages"]) == ["first", "second"]
    note = read_stage(tmp_path / "ladder" / "second" / "stage" / "model")
    assert note["stage"] == "two" and note["start"]["stage"] == "one"

    marks = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}
    assert run_matrix(read_matrix(tmp_path / "matrix.yaml"))["cells"] == report["cells"]
    assert run_ladder(read_chain(tmp_path / "chain.yaml"))["stages"] == ladder["stages"]
    assert marks == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}


def test_a_tied_head_is_selected_by_either_name():
    """Found by the ladder's last stage: parameters are listed under their first name only."""
    for tied in (True, False):
        for pattern, names in (("lm_head", {"lm_head.weight"}), ("embed_tokens", {"embed_tokens"})):
            model = tiny.backdrop_model(text_config=tiny.text_config(tie_word_embeddings=tied))
            select_trainable(model, [pattern])
            trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
            both = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
            assert trained == (both if tied else {n for n in both if any(name in n for name in names)})


def test_a_matrix_is_a_star_or_a_product():
    questions = {axis for axis in read_matrix(RECIPES / "ablate_llava.yaml").axes}
    assert {"epochs", "detector", "bits", "attention mask", "separators", "prefusion", "margin"} <= questions
    matrix = read_matrix(RECIPES / "ablate_scenes.yaml")
    cells = matrix.cells()
    assert cells[0].name == "base" and len({cell.folder for cell in cells}) == len(cells)
    assert all(len(cell.changes) == 1 for cell in cells[1:])
    # What only the score changes is not trained again.
    shared = {cell.name for cell in cells[1:] if matrix.trained_as(cell) != cell}
    assert shared == {"bits=8", "bits=8, no outliers", "bits=4"}
    assert all(matrix.trained_as(cell) == cells[0] for cell in cells if cell.name in shared)
    axes = {
        "a": {"1": {"learning_rate": 1}, "2": {"rows": {"pair": 0}}},
        "b": {"x": {}, "y": {"score": {"forms": ["llava"]}}},
    }
    product = Matrix("s", "o", {"forms": ["split"]}, {"lr": 0}, axes, {"pair": 1}, design="product").cells()
    assert [cell.name for cell in product] == ["a=1, b=x", "a=1, b=y", "a=2, b=x", "a=2, b=y"]
    assert (
        product[3].score == {"forms": ["llava"]}
        and product[3].rows == {"pair": 0}
        and product[0].rows == {"pair": 1}
    )
    with pytest.raises(ValueError, match="neither rows nor base.dataset"):
        Matrix("s", "o", {}, {}, axes)
    with pytest.raises(ValueError, match=r"score has unknown keys \['form'\]"):
        Matrix("s", "o", {"form": "split"}, {"dataset": "d"}, axes)
    with pytest.raises(ValueError, match="design is 'cube'"):
        Matrix("s", "o", {}, {"dataset": "d"}, axes, design="cube")


def test_the_report_shows_only_cells_that_ran(tmp_path):
    match = {"value": 0.5, "low": 0.4, "high": 0.6, "questions": 10}
    cells = [
        {"cell": "base", "changes": {}, "seed": 0, "form": "split", "minutes": 1, "score": match},
        {"cell": "margin=0", "changes": {}, "seed": 0, "form": "split", "minutes": 1, "score": match}
        | {"to_base": {"value": -0.01, "low": -0.02, "high": 0.0}},
    ]
    text = markdown({"cells": cells, "metric": "exact match"})
    assert "| margin=0 | split | 0 | 10 | 50.0 [40.0, 60.0] | -1.0 [-2.0, +0.0] | 1 |" in text
    plot({"cells": cells, "metric": "exact match"}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_is_done_once_and_never_over_foreign_files(tmp_path):
    calls = []
    assert step(tmp_path / "s", {"a": 1}, lambda: calls.append(1))
    assert not step(tmp_path / "s", {"a": 1}, lambda: calls.append(1))
    assert step(tmp_path / "s", {"a": 2}, lambda: calls.append(2)) and calls == [1, 2]

    def cut_off():
        (tmp_path / "t" / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step(tmp_path / "t", {}, cut_off)
    step(tmp_path / "t", {}, lambda: calls.append((tmp_path / "t" / "half").is_file()))
    assert calls[-1] is True
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "mine").write_text("x")
    with pytest.raises(ValueError, match="holds files of something else"):
        step(tmp_path / "u", {}, lambda: None)


@pytest.mark.slow
def test_two_processes_train_alike(base):
    """DDP over two CPU processes: one checkpoint, written once, and the gradients of both."""
    words = [
        "--model",
        base / "model",
        "--dataset",
        base / "rows",
        "--trainable",
        "multi_modal_projector",
        *CPU,
    ]
    words += [
        "--max_steps",
        2,
        "--logging_steps",
        1,
        "--save_strategy",
        "steps",
        "--save_steps",
        1,
        "--seed",
        3,
    ]
    launch = [
        Path(sys.executable).parent / "accelerate",
        "launch",
        "--cpu",
        "--num_processes",
        2,
        "--num_machines",
        1,
    ]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        0,
        "-m",
        "backdrop.train.sft",
    ]
    done = subprocess.run(
        [*map(str, [*launch, *words, "--per_device_train_batch_size", 2, "--output_dir", base / "two"])],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("What trains") == 1
    run(*parse([*map(str, [*words, "--per_device_train_batch_size", 4, "--output_dir", base / "one"])]))
    one, two = (
        [entry["loss"] for entry in json.loads((base / name / "log.json").read_text()) if "loss" in entry]
        for name in ("one", "two")
    )
    assert len(two) == 2
    assert two == pytest.approx(one, rel=0.02)
    assert sorted(path.name for path in (base / "two").glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    BackdropForConditionalGeneration.from_pretrained(base / "two")


SHARDED = {
    "projector and separators": ("FULL_STATE_DICT", ["multi_modal_projector", "separators"], []),
    "all but the tower": (
        "SHARDED_STATE_DICT",
        ["multi_modal_projector", "prefusion", "language_model"],
        ["--num_prefusion_layers", 1],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("states", "trainable", "more"), SHARDED.values(), ids=SHARDED)
def test_sharded_processes_train_alike(base, states, trainable, more):
    """FSDP2 over two CPU processes ends with the weights of one process, in one folder that loads."""
    words = ["--model", base / "model", "--dataset", base / "rows", *CPU, "--trainable", *trainable, *more]
    words += [
        "--max_steps",
        2,
        "--logging_steps",
        1,
        "--save_strategy",
        "steps",
        "--save_steps",
        1,
        "--seed",
        3,
    ]
    words += ["--optim", "sgd", "--learning_rate", 0.1, "--weight_decay", 0.1]  # Adam would amplify rounding
    launch = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", 2]
    launch += [FSDP_ON_CPU, *words, "--per_device_train_batch_size", 2]
    done = subprocess.run(
        [*map(str, [*launch, "--output_dir", base / "two"])],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FSDP_STATE_DICT_TYPE": states},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run(*parse([*map(str, [*words, "--per_device_train_batch_size", 4, "--output_dir", base / "one"])]))
    checkpoint = {path.name for path in (base / "two" / "checkpoint-1").iterdir()}
    divided = {"FULL_STATE_DICT": "pytorch_model_fsdp.bin", "SHARDED_STATE_DICT": "pytorch_model_fsdp_0"}[
        states
    ]
    assert divided in checkpoint, "the processes did not run under FSDP"
    before, one, two = (
        BackdropForConditionalGeneration.from_pretrained(base / name).state_dict()
        for name in ("model", "one", "two")
    )
    assert any(not torch.equal(value, before[name]) for name, value in one.items() if name in before)
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    table = two["model.language_model.embed_tokens.weight"]
    if "separators" in trainable:  # only the separators' rows have moved
        moved = (
            (table != before["model.language_model.embed_tokens.weight"])
            .any(dim=1)
            .nonzero()
            .flatten()
            .tolist()
        )
        assert moved == sorted(BackdropConfig.from_pretrained(base / "two").separator_token_ids)
