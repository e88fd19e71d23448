"""The settings file: its values, and errors that are one line."""

import pytest
import yaml
from running_gateway import HASHED_KEYS

from backdrop.serving.settings import load_settings


def test_a_settings_file(tmp_path):
    values = {
        "replicas": ["http://a:8000/v1", "http://b:8000/"],
        "keys": HASHED_KEYS,
        "limits": {"concurrent": 2},
        "matching": {"tolerance": 0},
        "image_hosts": ["*.example.org"],
    }
    path = tmp_path / "gateway.yaml"
    path.write_text(yaml.safe_dump(values))
    settings = load_settings(path, split=False, processor=None)
    assert settings.replicas == ["http://a:8000", "http://b:8000"] and settings.split is False
    assert (settings.limits.concurrent, settings.limits.waiting) == (2, 128)
    assert settings.matching.tolerance == 0 and settings.keys == HASHED_KEYS and settings.processor is None
    assert load_settings(path, replicas=["http://c"]).replicas == ["http://c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("replicas: [http://a]\nspeed: 3", "speed: Extra inputs are not permitted .found 3."),
        ("replicas: [http://a]\nlimits: {bodybytes: 3}", "limits.bodybytes: Extra inputs"),
        ("replicas: [http://a]\nsource: here", "source: Extra inputs"),
        ("replicas: [http://a]\n5: here", "5: Extra inputs"),
        ("replicas: http://a", "replicas: Input should be a valid list .found 'http://a'."),
        ("replicas: []", "replicas: List should have at least 1 item"),
        ("replicas: [a:8000]", "replicas: 'a:8000' is no URL; wanted http://host:port"),
        ("replicas: [http://a, http://a/v1/]", "replicas: a replica is named twice"),
        ("replicas: [http://a]\nlimits: 5", "limits: Input should be a valid dict"),
        (
            "replicas: [http://a]\nlimits: {concurrent: 0}",
            "limits.concurrent: Input should be greater than or equal to 1",
        ),
        (
            "replicas: [http://a]\nlimits: {concurrent: many}",
            "limits.concurrent: Input should be a valid integer",
        ),
        (
            "replicas: [http://a]\nmatching: {tolerance: 256}",
            "matching.tolerance: Input should be less than or equal to 255",
        ),
        ("replicas: [http://a]\nkeys: {abc: north}", "keys: the key of tenant 'north' is no SHA-256"),
        (f"replicas: [http://a]\nkeys: {{{'0' * 64}: ''}}", "keys: a tenant has no name|keys.*valid string"),
        (f"replicas: [http://a]\nkeys: {{{'a' * 64}: ''}}", "keys: a tenant has no name"),
        ("replicas: [http://a]\nsplit: perhaps", "split: Input should be a valid boolean"),
        ("- replicas", "holds a list; wanted keys and values"),
        ("replicas: [", "is no YAML"),
        ("replicas: !!python/object/apply:os.system [ls]", "is no YAML"),
        ("secret: hunter2", "replicas: Field required$"),
    ],
)
def test_a_bad_settings_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "gateway.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_settings(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(OSError, match="missing.yaml"):
        load_settings(tmp_path / "missing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"replicas: \xff")
    with pytest.raises(ValueError, match="bytes.yaml is no YAML"):
        load_settings(tmp_path / "bytes.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match="replicas: Field required"):
        load_settings(tmp_path / "empty.yaml")
