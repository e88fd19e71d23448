import shutil

import pytest
from forked import ForkServer
from trainings import save_base


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.fixture
def base(request, saved_base, tmp_path):
    """A folder with a tiny model (`model`) and a dataset of eight examples of ready-made groups (`rows`)."""
    if not (saved_base / "rows").is_dir():
        save_base(request.getfixturevalue("processor"), saved_base)
    return shutil.copytree(saved_base, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="session", autouse=True)
def _early_fork_server(request):
    """Starts the fork server before the first test, so that it imports torch while others run."""
    if any("fork_server" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("fork_server")


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    return ForkServer(tmp_path_factory.mktemp("home"))
