"""`/admin`: references listed, shown and forgotten, each by who may; figures, settings and replicas."""

from io import BytesIO

import numpy as np
import pytest
from fake_engine import red_scene
from PIL import Image
from running_gateway import ADMIN_KEYS, HASHED_KEYS, KEEPER, KEYS, refused

from backdrop.serving.tenants import hash_key

PATHS = [
    ("GET", "/admin/references"),
    ("DELETE", "/admin/references"),
    ("DELETE", "/admin/references/abc"),
    ("GET", "/admin/references/abc/picture"),
    ("GET", "/admin/tenants"),
    ("GET", "/admin/replicas"),
    ("GET", "/admin/settings"),
]
NORTHS = {"Authorization": "Bearer norths-own-admin-key"}


@pytest.fixture
def gateway(serve):
    """Two tenants with references: one of north's camera and one without, one of south's."""
    gateway = serve(
        keys=HASHED_KEYS,
        secret="kept secret",
        admin_keys=ADMIN_KEYS | {hash_key("norths-own-admin-key"): "north"},
    )
    gateway.text(red_scene(0, 0), key=KEYS["north"])
    gateway.text(red_scene(0, 0, 120), key=KEYS["north"], backdrop={"camera": "gate"})
    gateway.text(red_scene(0, 0, 160), key=KEYS["south"])
    return gateway


def admin(gateway, method: str, path: str, headers: dict = KEEPER, **query):
    return gateway.client.request(method, f"{gateway.url}/admin/{path}", headers=headers, params=query)


def rows(gateway, headers: dict = KEEPER, **query) -> list[dict]:
    answer = admin(gateway, "GET", "references", headers, **query)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_nothing_is_there_without_a_key(serve, gateway, method, path):
    bare = serve(admin_keys={})
    assert bare.client.request(method, bare.url + path, headers=KEEPER).status_code == 404
    for headers in ({}, {"Authorization": f"Bearer {KEYS['north']}"}, {"Authorization": "Bearer x"}):
        refused(gateway.client.request(method, gateway.url + path, headers=headers), 401, "no key of /admin")
    assert gateway.ask(key="key-of-the-keeper").status_code == 401, "a keeper's key asks no questions"


def test_references_are_listed_by_tenant_and_camera(gateway):
    found = {(row["tenant"], row["camera"]) for row in rows(gateway)}
    assert found == {("north", None), ("north", "gate"), ("south", None)}
    assert {row["tenant"] for row in rows(gateway, NORTHS)} == {"north"}
    assert [row["camera"] for row in rows(gateway, camera="gate")] == ["gate"]
    assert rows(gateway, tenant="south", camera="gate") == [] and rows(gateway, NORTHS, tenant="south") == []
    answer = gateway.ask(red_scene(28, 0), key=KEYS["north"]).json()
    assert answer["usage"]["backdrop"]["references"] == [
        row["reference"] for row in rows(gateway, tenant="north") if row["camera"] is None
    ]


def test_pictures_are_shown_to_their_tenant_only(gateway):
    for row in rows(gateway):
        path = f"references/{row['reference']}/picture"
        refused(
            admin(gateway, "GET", path), 403, f"pictures of {row['tenant']} are shown to its own key only"
        )
        answer = admin(gateway, "GET", path, NORTHS)
        if row["tenant"] != "north":
            refused(answer, 404, "there is no reference")  # not even that it exists
            continue
        picture = np.asarray(Image.open(BytesIO(answer.content)))
        shade = 120 if row["camera"] else 90
        assert picture[:14, :14, 3].max() == 0 and picture[20, 20].tolist() == [shade, shade, 60, 255]


def test_references_are_forgotten(gateway):
    (gate,) = rows(gateway, camera="gate")
    assert admin(gateway, "DELETE", f"references/{gate['reference']}").json() == {"forgotten": 1}
    refused(admin(gateway, "DELETE", f"references/{gate['reference']}"), 404, "there is no reference")
    (south,) = rows(gateway, tenant="south")
    refused(
        admin(gateway, "DELETE", f"references/{south['reference']}", NORTHS), 404, "there is no reference"
    )
    assert admin(gateway, "DELETE", "references", NORTHS).json() == {"forgotten": 1}
    assert [row["tenant"] for row in rows(gateway)] == ["south"]
    answer = gateway.ask(red_scene(28, 0), key=KEYS["north"]).json()
    assert answer["usage"]["backdrop"]["patches"]["reused"] == 0
    assert admin(gateway, "DELETE", "references", tenant="south").json() == {"forgotten": 1}


def test_figures_settings_and_replicas(gateway, engines):
    gateway.ask(red_scene(28, 0), key=KEYS["north"])
    found = admin(gateway, "GET", "tenants").json()["tenants"]
    assert found["north"] == {
        "requests": 3,
        "images": 3,
        "patches_reused": 14,
        "patches_fresh": 34,
        "patches_stale": 1,
        "references": 2,
    }
    assert found["south"]["requests"] == 1
    assert set(admin(gateway, "GET", "tenants", NORTHS).json()["tenants"]) == {"north"}
    shown = admin(gateway, "GET", "settings")
    assert shown.json()["limits"]["images"] == 256 and shown.json()["tenants"] == ["north", "south"]
    assert "kept secret" not in shown.text and not any(digest in shown.text for digest in HASHED_KEYS)
    assert set(admin(gateway, "GET", "replicas").json()["replicas"]) == {engine.url for engine in engines}
    for path in ("settings", "replicas"):
        refused(admin(gateway, "GET", path, NORTHS), 403, "a key of /admin that is for")


def test_strangers_learn_nothing_of_replicas(gateway, serve, engines):
    for headers in ({}, NORTHS, {"Authorization": f"Bearer {KEYS['north']}"}):
        health = gateway.client.get(f"{gateway.url}/health", headers=headers)
        assert health.status_code == 200 and health.json() == {"status": "ok"}
        assert gateway.client.get(f"{gateway.url}/metrics", headers=headers).status_code == 401
    assert set(gateway.health()) == {engine.url for engine in engines}
    assert "backdrop_replica_up" in gateway.client.get(f"{gateway.url}/metrics", headers=KEEPER).text
    bare = serve(admin_keys={})
    assert bare.client.get(f"{bare.url}/health", headers=KEEPER).json() == {"status": "ok"}
    assert bare.client.get(f"{bare.url}/metrics").status_code == 200
