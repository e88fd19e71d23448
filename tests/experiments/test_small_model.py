"""A miniature of the small model's whole chain: the same command, recipes and table, far too few steps."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from command import run
from paths import EXAMPLE
from transformers import LlamaForCausalLM

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.scenes import align_words
from backdrop.scenes.exam import FORMS
from backdrop.scenes.world import DENSE_LABELS


@pytest.mark.real
@pytest.mark.slow
def test_the_accuracy_table_in_miniature(tmp_path):
    command = [
        sys.executable,
        "-m",
        "backdrop",
        "scenes",
        "model",
        "--work",
        tmp_path / "work",
        "--size",
        "miniature",
    ]
    command += ["--detector-of", EXAMPLE]
    until = subprocess.run(
        [str(part) for part in [*command, "--until", "scenes_llava_2"]], capture_output=True, text=True
    )
    assert until.returncode == 0, until.stderr[-2000:]
    start = tmp_path / "work" / "scenes_llava_2" / "model"
    assert f"model: {start}" in until.stdout and (start / "config.json").is_file()
    assert not (tmp_path / "work" / "scenes_llava_3").exists()
    early = (start.parent / "done.json").stat().st_mtime_ns

    command += ["--report", tmp_path / "table.json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (start.parent / "done.json").stat().st_mtime_ns == early  # the chain went on from there
    report = json.loads((tmp_path / "table.json").read_text())
    assert set(report["forms"]) == set(FORMS)
    table = (tmp_path / "table.md").read_text()
    for name, form in report["forms"].items():
        overall = form["accuracy"]["overall"]
        assert overall["questions"] > 0 and name in table
    for name in ("split", "cached", "exact", "matched"):
        assert report["forms"][name]["differences"]["llava"]["overall"]["questions"] == 24
    for stage in ("scenes_llava_4", "scenes_split"):
        note = json.loads((tmp_path / "work" / stage / "model" / "backdrop_stage.json").read_text())
        assert note["stage"] == stage and note["start"]["stage"] == "scenes_llava_3"
        assert (tmp_path / "work" / stage / "model" / "trainable.json").is_file()
    # Done once: nothing of the chain runs again.
    before = (tmp_path / "work" / "scenes_split" / "done.json").stat().st_mtime_ns
    again = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert (
        again.returncode == 0
        and (tmp_path / "work" / "scenes_split" / "done.json").stat().st_mtime_ns == before
    )


def test_a_pretrained_language_model_joins_the_tower_of_a_finished_model(tmp_path, monkeypatch, capsys):
    tokenizer = tiny.tokenizer()
    pretrained = LlamaForCausalLM(tiny.text_config(vocab_size=len(tokenizer), tie_word_embeddings=False))
    pretrained.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    arguments = ["--tower-of", EXAMPLE, "--detector-of", EXAMPLE, "--language-model", tmp_path / "llama"]
    code, _, err = run(monkeypatch, capsys, "scenes", "base-model", *arguments, "--out", tmp_path / "base")
    assert code == 0, err
    base = BackdropForConditionalGeneration.from_pretrained(tmp_path / "base")
    finished = BackdropForConditionalGeneration.from_pretrained(EXAMPLE)
    tower, expected = base.model.vision_tower.state_dict(), finished.model.vision_tower.state_dict()
    assert tower.keys() == expected.keys() and all(torch.equal(tower[name], expected[name]) for name in tower)
    own, theirs = base.model.language_model.state_dict(), pretrained.model.state_dict()
    embedding = "embed_tokens.weight"
    rows = theirs[embedding].shape[0]
    assert torch.equal(own.pop(embedding)[:rows], theirs.pop(embedding))
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    processor = BackdropProcessor.from_pretrained(tmp_path / "base")
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == base.config.image_token_id
    ours, example = (folder / "detector.safetensors" for folder in (tmp_path / "base", EXAMPLE))
    assert ours.read_bytes() == example.read_bytes()

    # Its projector then learns to give what the language model keeps under a patch's names, and nothing else changes.
    code, _, err = run(
        monkeypatch,
        capsys,
        "scenes",
        "align-words",
        f"--model={tmp_path / 'base'}",
        f"--out={tmp_path / 'aligned'}",
        "--images=24",
        "--steps=30",
        "--batch-size=4",
    )
    assert code == 0, err
    report = json.loads((tmp_path / "aligned" / "words.json").read_text())
    assert report["unexplained"]["last"] < report["unexplained"]["first"] / 2
    aligned = BackdropForConditionalGeneration.from_pretrained(tmp_path / "aligned").state_dict()
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, aligned[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)


def test_a_word_stands_for_each_class_and_a_patch_for_the_sum_of_its_words():
    assert {head: len(words) + 1 for head, words in align_words.WORDS.items()} == {
        head: classes for head, classes in DENSE_LABELS.items() if head != "anchor"
    }
    tokenizer = tiny.tokenizer()
    embeddings = torch.randn(len(tokenizer), 8)
    table = align_words.word_table(tokenizer, embeddings)
    none = {head: np.zeros(2, np.int64) for head in align_words.WORDS}
    assert not align_words.targets(table, none).any()
    wanted = align_words.targets(table, none | {"glyph": np.array([8, 0]), "row": np.array([0, 3])})
    seven = embeddings[tokenizer("7", add_special_tokens=False)["input_ids"]].mean(0) - embeddings.mean(0)
    third = embeddings[tokenizer(" third", add_special_tokens=False)["input_ids"]].mean(0)
    torch.testing.assert_close(wanted[0], align_words.WEIGHTS["glyph"] * seven)
    torch.testing.assert_close(wanted[1], align_words.WEIGHTS["row"] * (third - embeddings.mean(0)))
