"""Every room is a folder of the tree and a path under `backdrop/` (docs/design/rooms.md)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

ROOMS = sorted(path.name for path in (ROOT / "backdrop").iterdir() if path.is_symlink())


def test_the_rooms_are_all_there():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"backdrop"}
    assert set(ROOMS) == folders and {"modeling", "processing", "train", "hub_export"} <= folders


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_imported_through_its_link(room):
    link = ROOT / "backdrop" / room
    assert os.readlink(link) == f"../{room}", "relative, so that a clone elsewhere has its own"
    found = importlib.util.find_spec(f"backdrop.{room}")
    assert Path(found.origin) == link / "__init__.py"


def test_a_checkout_needs_no_installation(tmp_path):
    """Python with no site-packages of ours on its path, started in the root."""
    code = "import backdrop.data.derive, backdrop.scenes.families.family as found; print(found.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "backdrop" / "scenes" / "families" / "family.py"
