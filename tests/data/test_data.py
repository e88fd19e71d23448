"""Training rows of public data sets: their form, the command that saves them, a step of training on them."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from command import run
from datasets import Dataset, load_from_disk
from public_sets import FEATURES, group_rows, make_coco, make_llava, put_json, read
from trl import ModelConfig, SFTConfig

from backdrop.data.load import examples, load_rows, save_rows
from backdrop.data.rows import TRAINING_FEATURES, BadRows
from backdrop.data.stored import STRUCTURED_FEATURES
from backdrop.hub_export.chat_template import chat_template
from backdrop.train.arguments import BackdropArguments
from backdrop.train.sft import build_trainer


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_those_of_the_examples(tmp_path, streaming):
    make_llava(tmp_path)
    rows, bad = load_rows("llava_instruct", str(tmp_path), streaming=streaming)
    assert rows.features == TRAINING_FEATURES
    expected = [example.row() for example in read("llava_instruct", tmp_path)[0]]
    found = list(rows)
    assert [row["messages"] for row in found] == [row["messages"] for row in expected] and not bad
    assert [len(row["images"]) for row in found] == [1, 1, 0] and found[0]["images"][0].size == (24, 18)
    if not streaming:
        stored = rows.with_format("arrow")[0].to_pylist()[0]["images"]
        assert stored == expected[0]["images"], "by path, without bytes"


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_the_prompts_own_place(tmp_path, streaming):
    make_llava(tmp_path)
    rows, _ = load_rows("llava_instruct", str(tmp_path), streaming=streaming, image_position="in_place")
    assert rows.features == STRUCTURED_FEATURES
    first, last, none = (row["messages"] for row in rows)
    assert [part["type"] for part in first[0]["content"]] == ["image", "text"]
    assert last[0]["content"] == [{"type": "text", "text": "Describe it."}, {"type": "image", "text": None}]
    assert first[2]["content"] == [{"type": "text", "text": "Red?"}]
    assert [part["type"] for part in none[0]["content"]] == ["text"]


def test_every_caption_is_a_row(tmp_path):
    make_coco(tmp_path)
    rows, bad = load_rows("coco_captions", str(tmp_path), split="val", limit=3)
    assert rows["id"] == ["9#0", "9#1", "25#0"] and not bad
    assert rows[1]["messages"][1]["content"] == "caption 1 of 9."


def test_a_stream_is_lazy_and_counts_each_pass_anew(tmp_path):
    make_llava(tmp_path)
    path = tmp_path / "llava_v1_5_mix665k.json"
    rows = json.loads(path.read_text())
    rows = [{**rows[0], "image": "lost.jpg"}, *rows[1:], *[rows[2]] * 8]
    path.write_text(json.dumps(rows)[:-1] + ", {cut")  # an error, but only for who reads so far
    assert (
        len(list(examples("llava_instruct", str(tmp_path), bad_rows=BadRows(), limit=2, check_images=False)))
        == 2
    )
    stream, bad = load_rows("llava_instruct", str(tmp_path), streaming=True, check_images=False)
    for _ in range(2):
        assert [row["id"] for row in stream.take(2)] == ["2", "3"]
        assert [row_id for row_id, _ in bad] == ["1"]
    with pytest.raises(ValueError, match="is not valid JSON"):
        list(stream)


def test_rows_are_read_anew(tmp_path):
    """Not from a cache of the same arguments: the files have changed, and the account of bad rows is needed."""
    make_llava(tmp_path)
    assert len(load_rows("llava_instruct", str(tmp_path))[0]) == 3
    (tmp_path / "coco/train2017/1.jpg").write_bytes(b"")
    rows, bad = load_rows("llava_instruct", str(tmp_path))
    assert rows["id"] == ["3"] and len(bad) == 2


# ---- the command, and training


def test_saved_rows_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    make_llava(tmp_path / "mix")
    rows, bad = load_rows("llava_instruct", str(tmp_path / "mix"))

    def fail(self, folder):
        (folder / "data-00000-of-00001.arrow").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "save_to_disk", fail)
        with pytest.raises(KeyboardInterrupt):
            save_rows(rows, bad, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out-*"))
    save_rows(rows, bad, tmp_path / "out")
    assert load_from_disk(tmp_path / "out")["id"] == ["1", "2", "3"]
    assert [row["id"] for row in load_rows("rows", str(tmp_path / "out"))[0]] == ["1", "2", "3"]
    with pytest.raises(ValueError, match="out exists"):
        save_rows(rows, bad, tmp_path / "out")


def test_the_command(tmp_path, monkeypatch, capsys):
    make_llava(tmp_path / "mix")
    path = tmp_path / "mix/llava_v1_5_mix665k.json"
    rows = json.loads(path.read_text())
    rows[0]["conversations"][1]["value"] = ""
    put_json(path, rows)
    command = ["llava_instruct", "mix", "--out", "kept", "--show", "1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "backdrop", "data", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 rows, 1 without an image; 1 bad rows skipped (1: answer is empty)" in done.stdout
    assert "2: 24 x 18 RGB\n  user: Describe it.\n  assistant: A red bus." in done.stdout
    assert json.loads((tmp_path / "kept/bad_rows.json").read_text()) == [["1", "answer is empty"]]
    assert not list((tmp_path / "cache").glob("backdrop-rows-*")), "scratch folders go with the process"
    put_json(path, [])
    monkeypatch.chdir(tmp_path)
    for arguments, status, message in (
        (command[:2], 1, "backdrop: mix has no good row"),
        (command, 2, "exists; wanted a new folder"),
    ):
        code, _, err = run(monkeypatch, capsys, "data", *arguments)
        assert code == status and message in err


def trainer_for(folder, dataset):
    values = BackdropArguments(
        model=str(folder / "model"), dataset=str(folder / "rows"), trainable=["projector"]
    )
    options = SFTConfig(
        output_dir=str(folder / "out"),
        max_length=None,
        max_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        # Else accelerate cuts every tensor of a stream's batch to as many rows as the batch has: groups are lost.
        accelerator_config={"dispatch_batches": False},
    )
    trainer = build_trainer(values, options, ModelConfig())
    trainer.train_dataset = dataset
    return trainer


@pytest.mark.parametrize("position, streaming", [("first", False), ("in_place", False), ("in_place", True)])
def test_loaded_rows_train(tmp_path, processor, detector, position, streaming):
    """A step of TRL's trainer on a batch with an image before the question, one after it, and none."""
    processor.chat_template = chat_template(system_prompt="", images_first=position == "first")
    model = tiny.backdrop_model(
        text_config=tiny.text_config(vocab_size=len(processor.tokenizer)),
        image_token_id=processor.image_token_id,
        separator_token_ids=processor.separator_token_ids,
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Dataset.from_list(group_rows(processor.image_processor, 1), features=FEATURES).save_to_disk(
        tmp_path / "rows"
    )
    make_llava(tmp_path / "mix")
    dataset, _ = load_rows(
        "llava_instruct", str(tmp_path / "mix"), image_position=position, streaming=streaming
    )
    trainer = trainer_for(tmp_path, dataset)
    trainer.processing_class.image_processor.set_detector(detector)
    batch = trainer.data_collator(list(dataset))
    texts = [processor.tokenizer.decode(row).replace("<pad>", "") for row in batch["input_ids"]]
    separators = batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("[BG_START]")
    assert separators.sum(1).tolist() == [1, 1, 0]
    before = "Describe it." in texts[1].split("[BG_START]")[0]
    assert before == (position == "in_place") and "What is it?" in texts[0].split("[BG_END]")[-1]
    weight = trainer.model.model.multi_modal_projector.linear_1.weight
    start = weight.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 1 and not torch.equal(weight, start)
    assert all(
        torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry
    )
