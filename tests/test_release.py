"""The wheel, installed elsewhere, without the checkout on any path: `make dist` and what a stranger runs first."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from optional import require_ultralytics
from paths import EXAMPLE, ROOT

pytestmark = [pytest.mark.real, pytest.mark.slow]
ROOMS = (
    "benchmarks",
    "data",
    "evaluation",
    "experiments",
    "hub_export",
    "modeling",
    "processing",
    "scenes",
    "serving",
    "train",
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """sdist and wheel, the wheel built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Path:
    """A fresh environment with the wheel; third parties come from this one, ours does not: no .pth is read there."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (wheel,) = dist.glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        site,
        wheel,
    ]
    subprocess.run([str(word) for word in install], check=True, env={**os.environ, "PIP_CONSTRAINT": ""})
    (site / "third_parties.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def backdrop(environment: Path, *words, folder: Path) -> subprocess.CompletedProcess:
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    command = [str(environment / "bin" / "python"), "-m", "backdrop", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**inherited, "HF_HUB_OFFLINE": "1"}
    )


def test_both_hold_every_room_once_and_no_example(dist):
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    for room in ROOMS:
        assert f"backdrop/{room}/__init__.py" in names
    assert "backdrop/train/recipes/finetune_lora.yaml" in names
    assert "backdrop/experiments/recipes/ladder/scenes.yaml" in names
    assert not [name for name in names if not name.startswith(("backdrop/", "backdrop_vlm-"))]
    with tarfile.open(sdist) as archive:
        members = archive.getnames()
    top = {name.split("/")[1] for name in members if name.count("/") >= 1}
    assert top.isdisjoint(ROOMS) and "backdrop" in top
    assert not [name for name in [*names, *members] if name.endswith(".safetensors")]


def test_the_wheel_is_what_runs(installed, tmp_path):
    code = "import backdrop, backdrop.modeling, backdrop.data.derive; print(backdrop.__file__, backdrop.modeling.__file__)"
    done = subprocess.run(
        [str(installed / "bin" / "python"), "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(name).is_relative_to(installed) for name in done.stdout.split())


def test_what_a_stranger_runs_first(installed, tmp_path):
    assets = require_ultralytics() / "assets"
    shown = backdrop(installed, "--help", folder=tmp_path)
    assert shown.returncode == 0 and "split" in shown.stdout
    done = backdrop(
        installed, "split", assets / "bus.jpg", "--model", EXAMPLE, "--out", "split.png", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "split.png").stat().st_size > 10_000
    done = backdrop(installed, "export", EXAMPLE, "exported", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("config.json", "model.safetensors", "modeling_backdrop.py", "README.md"):
        assert (tmp_path / "exported" / name).is_file()


def test_the_demo_says_at_once_where_to_get_an_example(installed, tmp_path):
    done = backdrop(installed, "demo", folder=tmp_path)
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1 and "examples/scenes-model" in done.stderr
