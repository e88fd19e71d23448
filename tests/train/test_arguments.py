"""The options of a run: shipped recipes, recipes by name, mistakes, the help page."""

import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from trainings import CPU

from backdrop.train.arguments import (
    EXAMPLES,
    GROUPS,
    RECIPES,
    BackdropArguments,
    RecipeParser,
    find_recipe,
    parse,
    shipped_recipes,
)
from backdrop.train.assemble import quantization
from backdrop.train.recipe import outline_trainable
from backdrop.train.sft import main
from backdrop.train.trainable import trainable_summary

SHIPPED = sorted(
    path
    for room in ("experiments", "train")
    for path in (ROOT / room / "recipes").rglob("*.yaml")
    if path.name not in ("scenes.yaml", "ablate_scenes.yaml", "ablate_llava.yaml")
)


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
    rows = trainable_summary(outline_trainable(arguments, options))
    assert all(row["device"] == "meta" for row in rows)
    assert 0 < sum(row["trainable"] for row in rows) <= sum(row["parameters"] for row in rows)
    assert training.max_length is None


def test_a_misspelt_key_is_named(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\ndataset: d\noutput_dir: o\ntrainabel: [x]\n")
    with pytest.raises(ValueError, match="trainabel"):
        parse(["--config", str(recipe), *CPU])


def test_recipes_are_found_by_name_and_by_path(tmp_path):
    assert find_recipe("finetune_lora") == RECIPES / "finetune_lora.yaml"
    assert find_recipe(str(RECIPES / "align.yaml")) == RECIPES / "align.yaml"
    more = [RECIPES, ROOT / "experiments" / "recipes"]
    assert find_recipe("ladder/1_llava", more).parent.name == "ladder"
    assert {"align", "ladder/1_llava"} <= set(shipped_recipes(more))
    for words in (["--config", "align"], ["--config=align"]):
        assert parse([*words, "--model", "M", "--output_dir", str(tmp_path), *CPU])[0].stage == "align"


def test_an_unknown_recipe_is_one_line_that_lists_those_shipped(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--config", "finetune_lore", "--model", "M"])
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: config is 'finetune_lore', which is no file and no shipped recipe; wanted")
    assert all(name in line for name in shipped_recipes())


def test_the_help_page_shows_our_options_first_and_examples_that_parse(capsys):
    ours = [name for group in GROUPS.values() for name in group]
    assert sorted(ours) == sorted(field.name for field in fields(BackdropArguments)), "one group for each"
    page = RecipeParser([RECIPES]).format_help()
    assert page.startswith("Usage: backdrop train --config RECIPE")
    places = [page.index(f"\n{title}:") for title in GROUPS] + [page.index("\nTRL's ModelConfig")]
    places += [page.index("\nTRL's SFTConfig"), page.index(EXAMPLES)]
    assert places == sorted(places)
    for name in (*ours, "lora_r", "learning_rate"):
        assert page.count(f"\n  --{name} ") == 1, name
    assert "lora_modules_to_save" not in page, "refused"
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert not left.value.code and capsys.readouterr().out == page

    commands = [shlex.split(line, comments=True) for line in EXAMPLES.replace("\\\n", "").splitlines()]
    trainings = [words[2:] for words in commands if words[:2] == ["backdrop", "train"]]
    assert len(trainings) == 2
    for words in trainings:
        arguments, training, options = parse(words)
        assert arguments.stage == "finetune_lora" and options.use_peft and training.use_cpu
        assert (ROOT / arguments.model / "config.json").is_file()
