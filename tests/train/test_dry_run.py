"""Dry runs: what would train and the memory that it would need."""

from importlib.metadata import version

import pytest
from packaging.version import Version
from trainings import CPU

from backdrop.train.arguments import parse
from backdrop.train.sft import run


@pytest.mark.skipif(Version(version("trl")) < Version("1.16"), reason="the estimate runs TRL 1.16's loss")
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
