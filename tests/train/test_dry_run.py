"""Dry runs: what would train and the memory that it would need."""

import json
from importlib.metadata import version

import pytest
from packaging.version import Version
from trainings import CPU

from backdrop.train.arguments import parse
from backdrop.train.sft import run

needs_estimate = pytest.mark.skipif(
    Version(version("trl")) < Version("1.16"), reason="the estimate runs TRL 1.16's loss"
)


@needs_estimate
def test_a_dry_run_prints_what_trains_and_what_it_needs(base, capsys):
    (base / "model" / "model.safetensors").unlink()  # no weight is read
    words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    run(*parse([*map(str, words), "--dry_run", "true"]))
    printed = capsys.readouterr().out
    assert "What trains" in printed and "multi_modal_projector" in printed and "GiB" in printed
    assert not (base / "out").exists()


def test_a_dry_run_on_an_older_trl_says_which_is_wanted(base, monkeypatch):
    monkeypatch.setattr("backdrop.train.dry_run.version", lambda name: "1.10.0")
    words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    with pytest.raises(ValueError, match="TRL is 1.10.0, wanted 1.16"):
        run(*parse([*map(str, words), "--dry_run", "true"]))


@needs_estimate
def test_ready_made_groups_are_counted_as_what_they_are(base, capsys):
    """A row's background and object group own 16 patches together; counted as images they would own 32."""
    words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    run(*parse([*map(str, words), "--dry_run", "true"]))
    assert "2 groups of 16 patches in all" in capsys.readouterr().out


@needs_estimate
@pytest.mark.parametrize("quantised", [False, True], ids=["lora", "qlora"])
def test_a_dry_run_of_an_adapter_on_tied_embeddings(base, quantised, capsys):
    config = json.loads((base / "model" / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (base / "model" / "config.json").write_text(json.dumps(config))
    words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    words += ["--use_peft", "true", "--lora_r", 2, "--dry_run", "true", "--dry_run_device", "cuda"]
    words += ["--load_in_4bit", "true", "--bf16", "true"] if quantised else []
    run(*parse(list(map(str, words))))
    assert "Fits a card of 24 GB (23.5 GiB): yes" in capsys.readouterr().out


@needs_estimate
def test_dora_over_a_quantised_model_is_not_estimated(base):
    words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    words += ["--use_peft", "true", "--use_dora", "true", "--load_in_4bit", "true", "--bf16", "true"]
    with pytest.raises(ValueError, match="use_dora is true with load_in_4bit"):
        run(*parse([*map(str, words), "--dry_run", "true"]))
