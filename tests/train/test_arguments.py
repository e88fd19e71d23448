"""The options of a run: shipped recipes, recipes by name, mistakes, the help page."""

from pathlib import Path

import pytest
import yaml
from paths import ROOT
from trainings import CPU

from backdrop.train.arguments import parse
from backdrop.train.assemble import quantization
from backdrop.train.recipe import outline_trainable
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
