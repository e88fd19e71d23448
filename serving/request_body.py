"""The body of a request: received within bounds of size and time, and parsed only where that is cheap."""

import asyncio
import json

from starlette.requests import Request

from .problems import ApiError
from .settings import Limits


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body; reading ends as soon as it is too long.

    Raises:
        ApiError: 413, more than `limits.body_bytes`; 408, not complete after `limits.read_seconds`.
        ClientDisconnect: the client left while it was sending.
    """
    too_long = ApiError(413, f"the body has more than {limits.body_bytes:,} bytes", "body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.body_bytes:
        raise too_long

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limits.body_bytes:
                raise too_long
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), limits.read_seconds)
    except asyncio.TimeoutError:
        message = f"the body did not arrive within {limits.read_seconds:g} s"
        raise ApiError(408, message, "body_too_slow") from None


def parse_body(data: bytes, max_values: int) -> object:
    """The JSON value of a body.

    Args:
        data: the body.
        max_values: JSON values that it may have, estimated from its commas and brackets: a value of three bytes takes a
            hundred bytes of memory once it is parsed.

    Raises:
        ApiError: 413, too many values; 400, no JSON.
    """
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > max_values:
        message = f"the body has some {values:,} JSON values; wanted at most {max_values:,}"
        raise ApiError(413, message, "body_too_large")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", "invalid_body") from None
