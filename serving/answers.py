"""The answer as the client sees it: an engine's own, but for errors of the gateway and a usage that nobody asked for."""

import contextlib
import json

import httpx
from starlette.responses import JSONResponse, Response

from .problems import ApiError
from .sight import Sight

END_OF_STREAM = b"data: [DONE]"
COMMENT = b": waiting\n\n"  # a line that clients pass over, and that keeps connections and proxies awake
_DATA = b"data: "


def plain_answer(answer: httpx.Response, sight: Sight) -> Response:
    """An answer that is not streamed, with the request's figures; or an engine's refusal of a request, as it came."""
    content = answer.content
    if answer.status_code == 200:
        with contextlib.suppress(ValueError):
            body = json.loads(content)
            if isinstance(body, dict):
                body["usage"] = (body.get("usage") or {}) | {"backdrop": sight.usage()}
                content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(content, answer.status_code, sight.headers(), "application/json")


def refusal(problem: ApiError) -> Response:
    """An error of the gateway, in the API's form."""
    return JSONResponse(problem.body(), problem.status, problem.headers())


def error_event(problem: ApiError) -> bytes:
    """An error of the gateway as an event, for a stream that has begun."""
    return _DATA + json.dumps(problem.body()).encode() + b"\n\n"


def event_line(event: dict) -> bytes:
    """An event as a streamed line, without its end."""
    return _DATA + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def refusal_event(answer: httpx.Response) -> bytes:
    """An engine's refusal of a request as an event, for a stream that has begun."""
    with contextlib.suppress(ValueError):
        body = answer.json()
        if isinstance(body, dict):
            return _DATA + json.dumps(body if "error" in body else {"error": body}).encode() + b"\n\n"
    return error_event(ApiError(502, f"the engine refused with status {answer.status_code}", "engine_failed"))


def usage_event(line: bytes) -> dict | None:
    """The decoded event of a streamed line that carries the usage; None for any other line."""
    if not line.startswith(b"data: {") or b'"usage"' not in line:
        return None
    with contextlib.suppress(ValueError):
        event = json.loads(line[len(_DATA) :])
        return event if event.get("usage") else None
    return None


def is_engine_failure(line: bytes) -> bool:
    """Whether a streamed line is an error of the engine itself, not one of the request.

    vLLM's server outlives its core, and then answers with status 200 and a stream whose first event is an error.
    """
    if not line.startswith(b'data: {"error"'):
        return False
    with contextlib.suppress(ValueError):
        error = json.loads(line[len(_DATA) :])["error"]
        code = error.get("code") if isinstance(error, dict) else None
        return not isinstance(code, int) or code >= 500
    return True
