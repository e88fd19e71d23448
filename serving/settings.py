"""What a gateway is told: replicas, tenants, limits. From the command line, or a YAML file whose unknown keys are errors."""

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Limits(BaseModel):
    """Bounds on what one request may ask for, and on all of them together.

    Attributes:
        body_bytes: of a request; images travel in it as base64.
        body_values: JSON values in it, about: commas and brackets are counted, before anything is parsed.
        image_bytes: of one encoded image.
        image_pixels: of one image, read from its header before it is decoded.
        images: in one request, earlier turns of the conversation counted too.
        answer_tokens: largest max_tokens; where a request has none, the engine's longest request is the bound.
        choices: largest n.
        concurrent: requests in work at a time.
        waiting: requests that wait for a place; beyond, 429.
        wait_seconds: longest wait for a place.
        read_seconds: longest time to receive a body.
        fetch_seconds: longest time to fetch an image by URL.
        first_token_seconds: longest silence of a replica that streams.
        answer_seconds: longest time from the engine's first word, or without streaming from the question, to the end, a
            reader who does not read included.
    """

    model_config = ConfigDict(extra="forbid")

    body_bytes: Count = 32 * 2**20
    body_values: Count = 200_000
    image_bytes: Count = 16 * 2**20
    image_pixels: Count = 40_000_000
    images: Count = 16
    answer_tokens: Count = 4096
    choices: Count = 4
    concurrent: Count = 64
    waiting: Annotated[int, Field(ge=0)] = 128
    wait_seconds: Positive = 30.0
    read_seconds: Positive = 30.0
    fetch_seconds: Positive = 10.0
    first_token_seconds: Positive = 120.0
    answer_seconds: Positive = 600.0


class Matching(BaseModel):
    """How backgrounds are recognised; see `BackgroundMatcher`."""

    model_config = ConfigDict(extra="forbid")

    tolerance: Annotated[float, Field(ge=0, le=255)] = 10.0
    min_reuse: Annotated[float, Field(gt=0, le=1)] = 0.3
    max_overridden: Annotated[float, Field(ge=0, le=1)] = 0.1  # as `FrameSplitter`
    max_references: Count = 1024
    ttl: Positive | None = 24 * 3600.0


class GatewaySettings(BaseModel):
    """Everything about a gateway.

    Attributes:
        processor: the served model's folder or Hub id; None: where the engine says it serves from.
        replicas: base URLs of the engines, without /v1.
        keys: tenant by SHA-256 of its API key (`backdrop serve --hash-key`); empty: one tenant, no key asked for.
        secret: what cache salts are made with; gateways in front of the same engines share it. None: a new one.
        image_hosts: hosts that images may be fetched from, "example.org" or "*.example.org"; none: no URL is fetched.
        split: False sends whole images on (plain LLaVA), for comparison.
        health_seconds: time between two looks at each replica.
        workers: threads that decode, split and match.
    """

    model_config = ConfigDict(extra="forbid")

    processor: str | None = None
    replicas: Annotated[list[str], Field(min_length=1)]
    keys: dict[str, str] = {}
    secret: str | None = None
    image_hosts: list[str] = []
    split: bool = True
    matching: Matching = Matching()
    limits: Limits = Limits()
    health_seconds: Positive = 2.0
    workers: Count = 2

    @field_validator("replicas")
    @classmethod
    def _plain_urls(cls, urls: list[str]) -> list[str]:
        cleaned = [url.rstrip("/").removesuffix("/v1") for url in urls]
        for url in cleaned:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is no URL; wanted http://host:port")
        if len(set(cleaned)) != len(cleaned):
            raise ValueError("a replica is named twice")
        return cleaned

    @field_validator("keys")
    @classmethod
    def _hashes(cls, keys: dict[str, str]) -> dict[str, str]:
        for digest, tenant in keys.items():
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ValueError(f"the key of tenant {tenant!r} is no SHA-256 (64 hexadecimal digits)")
            if not tenant:
                raise ValueError("a tenant has no name")
        return keys


def load_settings(path: str | Path, **changes) -> GatewaySettings:
    """Settings from a YAML file; `changes` that are not None win.

    Raises:
        ValueError: names the file, the key and what was wanted.
        OSError: the file cannot be read.
    """
    return make_settings(
        str(path), **read_settings(path) | {k: v for k, v in changes.items() if v is not None}
    )


def read_settings(path: str | Path) -> dict:
    """A YAML file's keys and values, not checked yet; raises as `load_settings`."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; wanted keys and values.")
    return {str(name): value for name, value in values.items()}


def make_settings(source: str = "settings", /, **values) -> GatewaySettings:
    """As the class, with the first error as one line."""
    try:
        return GatewaySettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        # What is found where something is missing is everything else, the secret too.
        found = "" if first["type"] == "missing" else f" (found {first['input']!r:.200})"
        raise ValueError(f"{source}: {where}: {first['msg'].removeprefix('Value error, ')}{found}") from error


def hash_key(key: str) -> str:
    """What a settings file holds of an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Tenants:
    """Which key is whose, and what sets a tenant's entries in the engine's caches apart from everybody else's."""

    def __init__(self, settings: GatewaySettings):
        self._keys = settings.keys
        self._secret = (settings.secret or secrets.token_hex(32)).encode()

    def of(self, authorization: str | None) -> str | None:
        """The tenant of an Authorization header; None: no valid key."""
        if not self._keys:
            return "default"
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return None
        digest = hash_key(key.strip())
        found = None
        for known, tenant in self._keys.items():  # all of them: the time says nothing
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def mark(self, tenant: str) -> str:
        """32 hexadecimal digits that nobody without the secret can make: cache salt and prefix of the uuids."""
        return hmac.new(self._secret, tenant.encode(), hashlib.sha256).hexdigest()[:32]
