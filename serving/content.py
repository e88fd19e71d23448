"""Content parts, in the shapes that clients of several APIs write them, in one shape: texts, and images by their URLs.

Chat completions write `text` and `image_url`, the responses API `input_text` and `input_image`, Anthropic's `image` with a
`source`, LangChain's blocks `image` with `url` or `base64`, OpenAI's `file` a data: URL.
"""

from typing import Any

from .fields import check_part_fields
from .problems import ApiError

# Of each type of part that is text, the field that holds it.
TEXT_TYPES = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# Of each type of part that is an image, the fields in which clients put it; the first that is set counts.
IMAGE_TYPES = {
    "image_url": ("image_url",),
    "input_image": ("image_url",),
    "image": ("image_url", "source", "image", "url", "base64", "data"),
    "file": ("file", "file_data"),
    "input_file": ("file_data", "file"),
}
# Where an image's URL or base64 stands in an object.
_INNER = ("url", "data", "file_data")


def read_content(where: str, content: Any) -> str | list[dict]:
    """A message's content: a text, or parts of the types text and image_url without any other field.

    Args:
        where: names the message in errors, as "messages[0]".
        content: as the client sent it; null is an empty text.

    Raises:
        ApiError: 400, names what is no content, or would be lost.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ApiError(
            400, f"{where}.content is a {type(content).__name__}; wanted text or parts", "invalid_body"
        )
    return [_read_part(f"{where}.content[{number}]", part) for number, part in enumerate(content)]


def _read_part(where: str, part: Any) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in TEXT_TYPES:
        name = TEXT_TYPES[kind]
        check_part_fields(where, part, frozenset(("type", name)))
        if not isinstance(part.get(name), str):
            raise ApiError(400, f"{where}.{name} is missing", "invalid_body")
        return {"type": "text", "text": part[name]}
    if isinstance(kind, str) and kind in IMAGE_TYPES:
        names = IMAGE_TYPES[kind]
        check_part_fields(where, part, frozenset(("type", "source_type", *names)))
        value = next((part[name] for name in names if part.get(name) is not None), None)
        return {"type": "image_url", "image_url": {"url": _image_url(where, kind, part, value)}}
    hint = " (send frames of a video as image_url)" if kind in ("video_url", "video", "input_video") else ""
    raise ApiError(400, f"{where} has the type {kind!r:.40}; wanted text or image_url{hint}", "invalid_body")


def _image_url(where: str, kind: str, part: dict, value: Any) -> str:
    url = value
    if isinstance(value, dict):
        url = next((value[name] for name in _INNER if value.get(name) is not None), None)
    if not isinstance(url, str) or not url.strip():
        stored = part.get("file_id") or (value.get("file_id") if isinstance(value, dict) else None)
        hint = "; files are not stored here" if stored else ""
        raise ApiError(400, f"{where}.{IMAGE_TYPES[kind][0]} has no url{hint}", "invalid_body")
    if kind in ("file", "input_file") and url.startswith("data:") and not url.startswith("data:image/"):
        raise ApiError(400, f"{where} is a file {url[:30]!r}; wanted an image", "invalid_body")
    return url
