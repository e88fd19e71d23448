"""Tenants: who is let in, and that nothing of one reaches another."""

import json

import pytest
from fake_engine import group_of, red_scene
from running_gateway import (
    HASHED_KEYS,
    KEYS,
    asked,
    question,
    refused,
    salt,
)

from backdrop.serving.settings import make_settings
from backdrop.serving.tenants import Tenants, hash_key


def test_tenants_share_nothing(serve, engines, processor):
    engines[1].stop()
    gateway = serve(keys=HASHED_KEYS)
    for tenant, shade in (("north", 90), ("south", 92), ("north", 93), ("south", 88)):
        text = gateway.text(red_scene(shade=shade), key=KEYS[tenant])
        assert text.startswith(salt(engines[0]))
    north, south = salt(engines[0], 0), salt(engines[0], 1)
    assert north != south and [salt(engines[0], n) for n in (2, 3)] == [north, south]
    shades = [int(group_of(engines[0].parts(n)[0], processor).pixels[-1, -1, 0]) for n in range(4)]
    assert shades == [90, 92, 90, 92]  # each tenant's frames match its own reference, never the other's
    for number, mark in enumerate((north, south, north, south)):
        assert all(part["uuid"].startswith(f"{mark}-") for part in engines[0].parts(number))


def test_equal_frames_of_two_tenants_have_nothing_in_common_at_the_engine(serve, engines):
    engines[1].stop()
    gateway = serve(keys=HASHED_KEYS)
    for key in KEYS.values():
        gateway.text(red_scene(), key=key)
    uuids = [{part["uuid"] for part in engines[0].parts(number)} for number in (0, 1)]
    assert not uuids[0] & uuids[1] and salt(engines[0], 0) != salt(engines[0], 1)
    cached = gateway.ask(red_scene(), key=KEYS["north"]).json()["usage"]["prompt_tokens_details"]
    assert cached == {"cached_tokens": 15}


def test_cache_salts_come_from_the_secret():
    settings = [
        make_settings(replicas=["http://a"], secret=secret) for secret in ("one", "one", "two", None, None)
    ]
    marks = [Tenants(each).cache_salt("north") for each in settings]
    assert marks[0] == marks[1] and len(set(marks)) == 4
    assert Tenants(settings[0]).cache_salt("south") != marks[0]
    assert all(len(mark) == 32 and not set(mark) - set("0123456789abcdef") for mark in marks)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Basic key-of-north",
        "key-of-north",
        "Bearer key-of-north x",
        "Bearer \xe4",
    ],
)
def test_without_a_key_nothing_is_answered(serve, engines, header):
    gateway = serve(keys=HASHED_KEYS)
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    body = json.dumps(question(red_scene())).encode()
    for answer in (
        gateway.client.post(f"{gateway.url}/v1/chat/completions", content=body, headers=headers),
        gateway.client.get(f"{gateway.url}/v1/models", headers=headers),
    ):
        refused(answer, 401, "no known key; wanted Bearer KEY")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert asked(*engines) == []


def test_keys_are_asked_for_in_any_case_of_the_scheme(serve):
    gateway = serve(keys=HASHED_KEYS)
    headers = {"Authorization": f"bearer  {KEYS['south']}"}
    assert gateway.client.get(f"{gateway.url}/v1/models", headers=headers).status_code == 200
    assert gateway.client.get(f"{gateway.url}/health").status_code == 200


def test_keys_are_kept_as_hashes():
    assert hash_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    tenants = Tenants(make_settings(replicas=["http://a"], keys=HASHED_KEYS))
    assert tenants.of("Bearer key-of-north") == "north" and tenants.of("Bearer key-of-south") == "south"
    assert tenants.of(f"Bearer {next(iter(HASHED_KEYS))}") is None, "a hash is no key"
    assert Tenants(make_settings(replicas=["http://a"])).of(None) == "default"
