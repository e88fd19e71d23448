"""The command: help with an example, one-line errors, figures as JSON, groups and pictures."""

import json
from dataclasses import replace

import numpy as np
import pytest
from command import run
from PIL import Image
from typer.testing import CliRunner

from backdrop import cli as package
from backdrop.cli import app
from backdrop.processing.patch_groups_backdrop import looks_like_group

COMMANDS = ["split", "convert", "export", "push", "ask", "demo"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_a_real_example(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and f"backdrop {command}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split", "missing.png", "--json"], "Incorrect image source 'missing.png'"),
        (["split", "missing.png"], "Nothing to do"),
        (["convert", "no/such/folder", "out"], "no/such/folder"),
        (["export", "no/such/folder", "out"], "no/such/folder"),
        (["push", "no/such/folder", "me/x"], "no/such/folder"),
        (["demo", "--family", "farm"], "family is 'farm'"),
        (["nonsense"], "nonsense"),
    ],
)
def test_an_error_is_one_line_and_a_non_zero_exit(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("backdrop:")]
    assert code != 0 and len(lines) == 1 and message in lines[0]
    assert "Traceback" not in err


def test_split_writes_json_groups_and_a_picture(monkeypatch, capsys, tmp_path, image_processor):
    from red_square import scene

    from backdrop.processing.image_processing_backdrop import BackdropImageProcessor

    monkeypatch.setattr(
        BackdropImageProcessor, "from_pretrained", classmethod(lambda cls, *a, **k: image_processor)
    )
    scene(14, 14).save(tmp_path / "a.png")
    scene(width=0).save(tmp_path / "b.png")
    code, out, _ = run(
        monkeypatch, capsys, "split", tmp_path / "a.png", tmp_path / "b.png",
        "--model", "x", "--json", "--groups", tmp_path / "g", "--out", tmp_path / "p.png",
    )  # fmt: skip
    assert code == 0
    first, second = json.loads(out)
    assert first["patches"] == {"background": 15, "object": 1, "total": 16}
    assert second["patches"] == {"background": 16, "total": 16}
    assert first["detector"] == "red pixels" and first["boxes"][0]["class"] == "red"
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == [
        "a.background.png",
        "a.object.png",
        "b.background.png",
    ]
    assert looks_like_group(np.asarray(Image.open(tmp_path / "g" / "a.object.png")))
    assert Image.open(tmp_path / "p.png").width > 400
    assert package is not None


@pytest.mark.parametrize(
    ("fit", "said", "record"),
    [
        ("crop", "50% of the width cut off", {"cut_off": {"width": 0.5, "height": 0.0}, "padding": 0.0}),
        ("pad", "50% padding", {"cut_off": {"width": 0.0, "height": 0.0}, "padding": 0.5}),
        ("stretch", "1 boxes\n", {"cut_off": {"width": 0.0, "height": 0.0}, "padding": 0.0}),
    ],
)
def test_split_shows_what_is_cut_off_or_padded(
    monkeypatch, capsys, tmp_path, image_processor, fit, said, record
):
    from red_square import scene

    from backdrop.processing.image_processing_backdrop import BackdropImageProcessor

    monkeypatch.setattr(
        BackdropImageProcessor, "from_pretrained", classmethod(lambda cls, *a, **k: image_processor)
    )
    wide = Image.new("RGB", (112, 56), (90, 90, 90))
    wide.paste(scene(14, 14), (28, 0))
    wide.save(tmp_path / "a.png")
    scene(14, 14).save(tmp_path / "square.png")
    words = ("split", tmp_path / "a.png", "--model", "x", "--fit", fit, "--out")
    code, out, _ = run(monkeypatch, capsys, *words, tmp_path / "wide.png")
    assert code == 0 and said in out
    code, out, _ = run(monkeypatch, capsys, *words, tmp_path / "wide.png", "--json")
    (found,) = json.loads(out)
    assert found["fit"] == fit and {name: found[name] for name in record} == record
    assert len(found["boxes"]) == 1
    # The hatching is there exactly where something is lost or padded.
    sheet = np.asarray(Image.open(tmp_path / "wide.png").convert("RGB"))
    hatched = (sheet == (110, 116, 124)).all(-1)[60:380].sum()
    assert (hatched > 1000) == (fit != "stretch")


@pytest.mark.parametrize(
    "command", ["bench ttft", "bench camera", "bench matching", "cache stats", "cache prune", "cache verify"]
)
def test_help_of_grouped_commands_shows_a_real_example(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0 and f"backdrop {command}" in result.output


def test_cache_commands_tell_prune_and_verify(monkeypatch, capsys, tmp_path):
    import torch

    from backdrop.modeling.background_folder_backdrop import BackgroundFolder

    folder = BackgroundFolder(tmp_path / "kept", 10**6)
    for number in range(3):
        folder.put("tokens", bytes([number]) * 20, (torch.ones(1000),), 1.0)
    code, out, _ = run(monkeypatch, capsys, "cache", "stats", folder.folder, "--json")
    assert code == 0 and json.loads(out) == {"entries": 3, "bytes": folder.stats()["bytes"]}
    assert run(monkeypatch, capsys, "cache", "verify", folder.folder)[0] == 0
    code, out, _ = run(monkeypatch, capsys, "cache", "prune", folder.folder, "--max-bytes", 9000, "--json")
    assert code == 0 and json.loads(out)["bytes"] <= 9000 and folder.stats()["entries"] == 2
    path = next((tmp_path / "kept").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = run(monkeypatch, capsys, "cache", "verify", folder.folder, "--json")
    assert code == 1 and path.name in json.loads(out)["problems"][0]
    code, _, err = run(monkeypatch, capsys, "cache", "stats", tmp_path / "nothing")
    assert code != 0 and err.startswith("backdrop:") and "is no folder" in err


def test_bench_camera_writes_what_it_measured(monkeypatch, capsys, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    base = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    for i in range(6):
        image = base.copy()
        image[:14, 7 * i : 7 * i + 14] = 255
        Image.fromarray(image).save(frames / f"{i}.png")
    code, out, _ = run(
        monkeypatch, capsys, "bench", "camera", frames, "--size", 56, "--json", tmp_path / "f.json",
        "--maps", tmp_path / "m.npz", "--plot", tmp_path / "p.png",
    )  # fmt: skip
    figures = json.loads((tmp_path / "f.json").read_text())
    assert code == 0 and "of vision tokens reused" in out
    assert figures["frames"] == 6 and figures["hits"] >= 3 and figures["max_stale"] <= 10
    assert figures["hits"] + figures["misses"] + figures["refreshes"] == 6
    assert np.load(tmp_path / "m.npz")["fresh"].shape == (6, 16)
    assert Image.open(tmp_path / "p.png").size[0] > 300
    code, _, err = run(monkeypatch, capsys, "bench", "camera", tmp_path / "no.mp4")
    assert code != 0 and "no.mp4" in err and "Traceback" not in err


def test_bench_matching_reports_every_size(monkeypatch, capsys, tmp_path):
    code, out, _ = run(
        monkeypatch,
        capsys,
        "bench",
        "matching",
        "--references",
        "3,20",
        "--queries",
        4,
        "--json",
        tmp_path / "m.json",
    )
    rows = json.loads((tmp_path / "m.json").read_text())
    assert code == 0 and [row["references"] for row in rows] == [3, 20] and "known backgrounds" in out
    assert all(row["hits"] == 4 for row in rows)


def test_show_and_cache_folder_need_reuse(monkeypatch, capsys, tmp_path):
    code, _, err = run(monkeypatch, capsys, "ask", "no-model", "x.png", "-q", "?", "--show", tmp_path)
    assert code != 0 and "--reuse" in err


def test_a_reuse_picture_counts_its_patches(image_processor):
    from red_square import scene

    from backdrop.reuse_panels import (
        ENCODED,
        LEGEND,
        OBJECT,
        REUSED,
        STALE,
        UNOWNED,
        patch_states,
        reuse_panel,
        what_happened,
    )

    reports = []
    image_processor.enable_background_matching(tolerance=0).observer = reports.append
    image_processor.image_groups([scene(0, 0), scene(28, 28)])
    miss, match = (np.bincount(patch_states(report), minlength=len(LEGEND)) for report in reports)
    assert miss[[REUSED, ENCODED, OBJECT, STALE, UNOWNED]].tolist() == [0, 15, 1, 0, 0]
    assert match[[REUSED, ENCODED, OBJECT, STALE, UNOWNED]].tolist() == [14, 0, 0, 1, 1]
    assert "New background" in what_happened(reports[0]) and "is reused" in what_happened(reports[1])
    everything = np.ones_like(reports[1].encoded)
    renewed = replace(reports[1], refreshed=True, encoded=everything)  # known all the same: no failure
    assert np.bincount(patch_states(renewed), minlength=len(LEGEND))[[REUSED, ENCODED]].tolist() == [0, 14]
    assert "Known background, a layer made anew" in what_happened(renewed)
    picture = np.asarray(reuse_panel(reports[1], 14, "frame"))
    # The legend's colours are on the page.
    for state in (REUSED, STALE, UNOWNED):
        assert (picture == LEGEND[state][1]).all(axis=-1).any()
