"""Pushing to a stand-in for the Hub: one commit with everything, or nothing and one line that says why."""

import re
import shutil
import time

import pytest
from hub_server import DROP, DROP_AFTER, TOKEN, HubServer
from huggingface_hub.utils import close_session
from test_export import tiny_pair

from backdrop.hub_export import push as push_module
from backdrop.hub_export.export import export
from backdrop.hub_export.push import PushError, push
from backdrop.hub_export.verify import load_failures

REPO = "writer/tiny"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "tiny"
    export(*tiny_pair(), folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "tiny")


@pytest.fixture
def hub(monkeypatch):
    # Weights go by LFS: the Xet client speaks to a server of its own.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    with HubServer() as hub:
        yield hub
    close_session()


@pytest.fixture
def verified(monkeypatch):
    """The folders that a push verified. Skips the clean process, which takes seconds, where something else is tested."""
    folders = []
    monkeypatch.setattr(push_module, "verify_in_clean_process", folders.append)
    return folders


def upload(folder, hub, **options):
    return push(folder, REPO, **{"endpoint": hub.endpoint, "token": TOKEN, **options})


def expected_files(folder):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files["README.md"].count(b"OWNER/NAME") == 3
    return {**files, "README.md": files["README.md"].replace(b"OWNER/NAME", REPO.encode())}


def test_whole_folder_in_one_commit(folder, hub, verified):
    url = upload(folder, hub)
    repository = hub.repositories[REPO]
    assert verified == [folder]
    assert len(repository.commits) == 1
    assert url == f"{hub.endpoint}/{REPO}/commit/{repository.head}"
    assert not repository.private
    attributes = repository.files.pop(".gitattributes")
    assert attributes
    assert repository.files == expected_files(folder)
    assert hub.steps().count("commit") == hub.steps().count("lfs upload") == 1


@pytest.mark.slow
def test_folder_that_does_not_load_is_refused_before_any_request(folder, hub):
    (folder / "prefusion_backdrop.py").unlink()
    with pytest.raises(ValueError, match="does not load in a clean process: .*prefusion_backdrop") as caught:
        upload(folder, hub)
    assert "\n" not in str(caught.value)
    assert hub.requests == []


def test_what_is_no_export_is_refused_before_any_request(tmp_path, hub):
    with pytest.raises(ValueError, match="holds no config.json"):
        upload(tmp_path, hub)
    with pytest.raises(ValueError, match="Repo id"):
        push(tmp_path, "not/a/repository", endpoint=hub.endpoint, token=TOKEN)
    assert hub.requests == []


DAMAGE = {
    # file: (what happens to it, what is said about it)
    "model.safetensors": (lambda data: data[:-1000], "SafetensorError"),
    "processor_config.json": (lambda data: data.replace(b"AutoProcessor", b"Auto"), "wanted BackdropProc"),
    "modeling_backdrop.py": (lambda data: data + b"\nimport backdrop\n", "import of backdrop halted"),
}


@pytest.mark.slow
def test_damage_is_found(exported, tmp_path):
    """All in one clean process; a folder that is whole comes last and does not suffer from those before it."""
    for name, (damage, _) in DAMAGE.items():
        folder = shutil.copytree(exported, tmp_path / f"without_{name.partition('.')[0]}")
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
    *reasons, whole = load_failures([*sorted(tmp_path.iterdir()), exported])
    for name, reason in zip(sorted(DAMAGE), reasons, strict=True):
        assert re.search(DAMAGE[name][1], reason), (name, reason)
    assert whole is None


def test_second_push_replaces_what_changed(folder, hub, verified):
    upload(folder, hub)
    first = hub.repositories[REPO].head
    assert upload(folder, hub).endswith(first)
    assert len(hub.repositories[REPO].commits) == 1, "nothing changed, nothing committed"
    (folder / "requirements.txt").unlink()
    (folder / "extra").mkdir()
    (folder / "extra" / "figure.json").write_text("{}")
    (folder / ".hidden").write_text("not to be sent")
    upload(folder, hub, revision="main")
    repository = hub.repositories[REPO]
    assert [commit["summary"] for commit in repository.commits] == ["Upload Backdrop model"] * 2
    assert repository.commits[1]["parentCommit"] == first
    assert "requirements.txt" not in repository.files
    assert ".hidden" not in repository.files
    assert repository.files["extra/figure.json"] == b"{}"
    assert ".gitattributes" in repository.files
    assert hub.steps().count("lfs upload") == 1, "weights that are there are not sent again"


def test_private(folder, hub, verified):
    upload(folder, hub, private=True)
    assert hub.repositories[REPO].private
    hub.repositories[REPO].private = False
    with pytest.raises(PushError, match="public already"):
        upload(folder, hub, private=True)


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        ({"create": 403}, r"no permission to write there \(403\).*write access"),
        ({"create": 500}, r"answered 500 \(refused with 500\)"),
        ({"info": 404}, r"not found \(404\)"),
        ({"commit": 401}, r"not logged in.*\(401\)"),
        ({"commit": 403}, r"no permission to write there \(403\)"),
        ({"commit": 409}, r"conflict, 409.*push again"),
        ({"commit": 412}, r"conflict, 412.*push again"),
        ({"lfs upload": 403}, r"no permission to write there \(403\)"),
        ({"create": DROP}, "the connection to http://127.0.0.1:.* failed"),
        ({"commit": DROP}, "the connection to http://127.0.0.1:.* failed"),
        ({"lfs upload": DROP}, "the connection to http://127.0.0.1:.* failed"),
    ],
)
def test_failure_commits_nothing_and_says_so(folder, hub, verified, monkeypatch, failures, message):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits before it tries again
    hub.failures = failures
    with pytest.raises(PushError, match=message) as caught:
        upload(folder, hub)
    text = str(caught.value)
    assert REPO in text and "\n" not in text
    assert text.endswith("; nothing was committed.")
    repository = hub.repositories.get(REPO)
    assert repository is None or (not repository.commits and set(repository.files) == {".gitattributes"})


def test_wrong_token(folder, hub, verified):
    with pytest.raises(PushError, match=r"not logged in.*\(401\).*hf auth login.*nothing was committed"):
        upload(folder, hub, token="hf_wrong")
    assert hub.repositories == {}


def test_lost_answer_is_not_called_a_failure(folder, hub, verified):
    hub.failures = {"commit": DROP_AFTER}
    with pytest.raises(PushError, match="answer was lost, but the repository has a new commit"):
        upload(folder, hub)
    assert len(hub.repositories[REPO].commits) == 1


def test_server_gone_before_and_during(folder, hub, verified, monkeypatch):
    from huggingface_hub import HfApi

    info = HfApi.model_info

    def only_once(self, *args, **kwargs):
        if "commit" in hub.steps():
            raise ConnectionError("unreachable")
        return info(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "model_info", only_once)
    hub.failures = {"commit": DROP}
    with pytest.raises(PushError, match="whether the commit arrived is not known"):
        upload(folder, hub)
    with pytest.raises(PushError, match="connection to http://127.0.0.1:9 failed.*nothing was committed"):
        upload(folder, hub, endpoint="http://127.0.0.1:9")


def test_commit_made_meanwhile_is_not_overwritten(folder, hub, verified, monkeypatch):
    def slow_additions(*args):
        hub.repositories[REPO].commits.append({"summary": "someone else's"})
        return additions(*args)

    additions = push_module._additions
    monkeypatch.setattr(push_module, "_additions", slow_additions)
    with pytest.raises(PushError, match="changed meanwhile.*nothing was committed"):
        upload(folder, hub)
    assert [commit["summary"] for commit in hub.repositories[REPO].commits] == ["someone else's"]
