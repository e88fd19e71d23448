"""The command: help with an example, one-line errors, figures as JSON, groups and pictures."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from backdrop import cli as package
from backdrop.cli import app, main
from backdrop.processing.patch_groups_backdrop import looks_like_group

COMMANDS = ["split", "convert", "export", "push", "ask", "demo"]


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["backdrop", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    out = capsys.readouterr()
    return left.value.code or 0, out.out, out.err


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
    from test_processing import scene

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
