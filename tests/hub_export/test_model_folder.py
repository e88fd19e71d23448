"""Folders that are not what a command takes are refused by what they are."""

import json

import pytest
import typer

from backdrop.commands.options import known_model
from backdrop.demo import Asker
from backdrop.evaluation.answering import load
from backdrop.hub_export.checkpoint import load_checkpoint
from backdrop.hub_export.convert import convert
from backdrop.hub_export.model_folder import check_exported
from backdrop.train.stages import check_start

QUANTISED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
OURS = {"model_type": "backdrop"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"config.json": {"model_type": "llava"}},
            "type 'llava'; wanted 'backdrop'; convert it first: backdrop convert",
        ),
        ({"config.json": {"model_type": "bert"}}, "type 'bert'; wanted 'backdrop'"),
        (
            {"config.json": OURS | QUANTISED},
            r"is quantised \(bitsandbytes\); wanted the checkpoint in 16 or 32 bit",
        ),
        ({"notes.json": {}}, "holds notes.json; wanted the folder of a Backdrop model"),
    ],
)
def test_a_folder_of_another_kind_is_refused_everywhere(tmp_path, files, message):
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(typer.BadParameter, match=message):
        known_model(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        Asker(str(tmp_path), reuse=False)
    if "config.json" in files:
        for use in (load, load_checkpoint, lambda folder: check_start(str(folder), None)):
            with pytest.raises(ValueError, match=message):
                use(tmp_path)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"adapter_config.json": {}}, "an adapter alone"),
        ({"adapter_config.json": {}, "config.json": OURS}, "an adapter alone"),
        ({"config.json": OURS}, "a checkpoint without the code that loads it"),
        ({"processor_config.json": {}}, "a processor without a model"),
    ],
)
def test_what_ask_cannot_load_names_the_export(tmp_path, files, what):
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    known_model(str(tmp_path))  # other commands take it
    with pytest.raises(ValueError, match=f"is {what}; export it first: backdrop export"):
        Asker(str(tmp_path), reuse=False)
    (tmp_path / "config.json").write_text(json.dumps(OURS | {"auto_map": {}}))
    (tmp_path / "adapter_config.json").unlink(missing_ok=True)
    check_exported(tmp_path)
    check_exported("owner/name")


def test_a_quantised_llava_is_not_converted(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"} | QUANTISED))
    with pytest.raises(ValueError, match=r"is quantised \(bitsandbytes\)"):
        convert(tmp_path)
