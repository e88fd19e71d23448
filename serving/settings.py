"""The settings of a gateway: replicas, tenants' keys, limits, matching. From the command line or a YAML file.

Unknown keys of the file are errors, so that a misspelt limit is never silently left at its default.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Limits(BaseModel):
    """Bounds on what one request may ask for, and on all requests together.

    Attributes:
        body_bytes: size of a request's body, in which images travel as base64; also of all images that one request has
            fetched by URL, together.
        body_values: JSON values in a body, estimated from its commas and brackets before it is parsed.
        image_bytes: size of one encoded image.
        image_pixels: pixels of one image, read from its header before it is decoded.
        photo_pixels: pixels of one JPEG that is decoded at reduced size, to `image_pixels` at most.
        images: images in one request, those of earlier turns of the conversation included; how many fit is decided by
            their tokens.
        choices: largest n.
        concurrent: requests in progress at a time.
        waiting: requests that wait for one of them to end; further ones get a 429.
        wait_seconds: longest such wait.
        read_seconds: longest time to receive a body.
        fetch_seconds: longest time to fetch an image by URL.
        first_token_seconds: longest silence of a replica that streams.
        headers_seconds: after this time without a first token a stream's headers are sent; until then what goes wrong is
            a status of its own.
        comment_seconds: time between two comment lines of a stream that waits for its first token.
        answer_seconds: longest time to the end of an answer: from its first event where it is streamed (the time in
            which the client does not read counts), from the question where it is not.
    """

    model_config = ConfigDict(extra="forbid")

    body_bytes: Count = 32 * 2**20
    body_values: Count = 200_000
    image_bytes: Count = 20 * 2**20
    image_pixels: Count = 40_000_000
    photo_pixels: Count = 128_000_000
    images: Count = 256
    choices: Count = 4
    concurrent: Count = 64
    waiting: Annotated[int, Field(ge=0)] = 128
    wait_seconds: Positive = 30.0
    read_seconds: Positive = 30.0
    fetch_seconds: Positive = 10.0
    first_token_seconds: Positive = 120.0
    headers_seconds: Positive = 1.0
    comment_seconds: Positive = 10.0
    answer_seconds: Positive = 600.0


class Matching(BaseModel):
    """How backgrounds are recognised; the attributes are options of `BackgroundMatcher`.

    Attributes:
        tolerance: largest staleness that is reused, grey levels.
        min_reuse: smallest share of the image's patches that a match must reuse.
        max_overridden: largest share of a reference's patches that may be overridden for no known reason.
        max_references: references kept, of all tenants together.
        ttl: seconds after which a reference is forgotten; None: never.
        refresh, layers, strict, follow_exposure, align: as `BackgroundMatcher` takes them.
    """

    model_config = ConfigDict(extra="forbid")

    tolerance: Annotated[float, Field(ge=0, le=255)] = 10.0
    min_reuse: Annotated[float, Field(gt=0, le=1)] = 0.2
    max_overridden: Annotated[float, Field(ge=0, le=1)] = 0.1
    max_references: Count = 1024
    ttl: Positive | None = 24 * 3600.0
    refresh: bool = True
    layers: Literal[1, 2] = 2
    strict: bool = False
    follow_exposure: bool = False
    align: bool = False


class GatewaySettings(BaseModel):
    """All settings of a gateway.

    Attributes:
        processor: the served model's folder or Hub id; None: where the engine says it serves from.
        replicas: base URLs of the engines, without /v1.
        keys: tenant by the SHA-256 of its API key (`backdrop serve --hash-key`); empty: one tenant, and no key is needed.
        secret: from which cache salts are derived; gateways in front of the same engines share it. None: a new one at
            each start.
        image_hosts: hosts that images may be fetched from, "example.org" or "*.example.org"; empty: no URL is fetched.
        split: False sends whole images to the engine (plain LLaVA), for comparison.
        fit: what becomes of images that are not square, "crop", "pad" or "stretch"; None: what the processor says. Engines
            must be told too: `--mm-processor-kwargs '{"fit": "pad"}'`, as `backdrop serve` does for those that it starts.
        health_seconds: time between two health checks of each replica.
        workers: threads that decode, split and match.
        camera_from_user: the request's field `user` names the camera, for clients that can set nothing else.
        cors_origins: web pages that may call the gateway from a browser, "https://example.org" or "*"; empty: none.
        admin_keys: who may use `/admin`, by the SHA-256 of its key: a tenant, whose references and figures it sees, or "*",
            which sees all tenants' figures and no tenant's pixels. Empty: `/admin` is not there. With such keys `/metrics`
            needs one too.
    """

    model_config = ConfigDict(extra="forbid")

    processor: str | None = None
    replicas: Annotated[list[str], Field(min_length=1)]
    keys: dict[str, str] = {}
    secret: str | None = None
    image_hosts: list[str] = []
    split: bool = True
    fit: Literal["crop", "pad", "stretch"] | None = None
    matching: Matching = Matching()
    limits: Limits = Limits()
    health_seconds: Positive = 2.0
    workers: Count = 2
    camera_from_user: bool = False
    cors_origins: list[str] = []
    admin_keys: dict[str, str] = {}

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

    @field_validator("keys", "admin_keys")
    @classmethod
    def _hashes(cls, keys: dict[str, str]) -> dict[str, str]:
        for digest, tenant in keys.items():
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ValueError(f"the key of tenant {tenant!r} is no SHA-256 (64 hexadecimal digits)")
            if not tenant:
                raise ValueError("a tenant has no name")
        return keys


def load_settings(path: str | Path, **changes: object) -> GatewaySettings:
    """Settings from a YAML file.

    Args:
        path: of the file.
        changes: values that replace the file's; those that are None do not.

    Raises:
        ValueError: one line that names the file, the key and what was wanted.
        OSError: the file cannot be read.
    """
    return make_settings(
        str(path), **read_settings(path) | {k: v for k, v in changes.items() if v is not None}
    )


def read_settings(path: str | Path) -> dict:
    """The keys and values of a YAML file, not validated yet. Raises as `load_settings` does."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; wanted keys and values.")
    return {str(name): value for name, value in values.items()}


def make_settings(source: str = "settings", /, **values: object) -> GatewaySettings:
    """Validated settings.

    Args:
        source: where the values come from, for the error.
        values: fields of `GatewaySettings`.

    Raises:
        ValueError: one line about the first value that is wrong.
    """
    try:
        return GatewaySettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        # For a missing field pydantic shows all the other values as its input, the secret among them.
        found = "" if first["type"] == "missing" else f" (found {first['input']!r:.200})"
        raise ValueError(f"{source}: {where}: {first['msg'].removeprefix('Value error, ')}{found}") from error
