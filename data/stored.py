"""Rows that have messages and images already, in any form that TRL takes: checked, and otherwise left as they are.

`messages`, or `prompt` and `completion` (text or messages), which are put together; `images`, or a single `image`.

An image that is an RGBA patch group stays one. `content` is text (TRL puts the images before the first question) or
parts, `{"type": "image"}` and `{"type": "text", "text": ...}`, with one image part for each of the images.
"""

from collections.abc import Collection
from pathlib import Path

from datasets import Features, Image, List, Value

from .images import stored_image
from .prompts import IMAGE_TOKEN, checked_list, checked_text, image_position
from .rows import TRAINING_FEATURES, BadRowError, Example

# As `TRAINING_FEATURES` with contents in parts. Arrow gives every part both fields: the text of an image part is None.
STRUCTURED_FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
    }
)
COLUMNS = list(TRAINING_FEATURES)
# Of each line one set of columns is wanted.
FORMS = ((("messages",), ("prompt", "completion")), (("images",), ("image",)))


def stored_columns(found: Collection[str], where: str) -> list[str]:
    """Those of a dataset's columns that its rows are read from.

    Raises:
        ValueError: it has no messages or no images in any form; the message names `where` it comes from.
    """
    chosen: list[str] = []
    for forms in FORMS:
        names = next((form for form in forms if all(name in found for name in form)), None)
        if names is None:
            wanted = " or ".join(" and ".join(form) for form in forms)
            raise ValueError(f"{where} has columns {', '.join(found)}; it lacks {wanted}.")
        chosen += names
    return [*(["id"] if "id" in found else []), *chosen]


def with_messages(row_id: str, row: dict) -> dict:
    """A row in any of the `FORMS` as one with `messages` and `images`.

    Raises:
        BadRowError: a prompt or completion that is neither text nor a list, or placeholders for other than the images.
    """
    images = row["images"] if "images" in row else [] if row["image"] is None else [row["image"]]
    if "messages" in row:
        return {**row, "images": images}
    sides = [("user", "prompt"), ("assistant", "completion")]
    messages: list = []
    for role, name in sides:
        value = row[name]
        if isinstance(value, str):
            count = value.count(IMAGE_TOKEN)
            text, _ = image_position(row_id, value, len(images or []) if count and role == "user" else 0)
            messages.append({"role": role, "content": text})
        else:
            messages += checked_list(row_id, name, value)
    return {"id": row.get("id"), "images": images, "messages": messages}


def structured(messages: list[dict], images: int, image_at: str = "start") -> list[dict]:
    """Text contents as parts, the images in the first question before or after ("end") its text."""
    result = []
    for message in messages:
        parts = [{"type": "text", "text": message["content"]}]
        if message["role"] == "user" and images:
            pictures = [{"type": "image", "text": None}] * images
            parts = parts + pictures if image_at == "end" else pictures + parts
            images = 0
        result.append({"role": message["role"], "content": parts})
    return result


def checked_row(number: int, row: dict, folder: Path | None) -> dict:
    """The row with its id and its images undecoded.

    Args:
        number: its place, the id of a row that has none.
        folder: where relative paths of images start.

    Raises:
        BadRowError: an image without data, roles out of order, empty content, or placeholders that do not fit.
    """
    row_id = str(number if row.get("id") is None else row["id"])
    row = with_messages(row_id, row)
    images = row["images"] if row["images"] is not None else []
    images = [stored_image(row_id, image, folder) for image in images]
    messages = checked_list(row_id, "messages", row["messages"])
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise BadRowError(
            row_id, f"roles are {', '.join(map(str, roles[:6]))}; wanted user, assistant in turn"
        )
    contents = [_checked_content(row_id, message["role"], message.get("content")) for message in messages]
    parts = [part["type"] for content in contents if isinstance(content, list) for part in content]
    if any(isinstance(content, list) for content in contents) and parts.count("image") != len(images):
        raise BadRowError(row_id, f"{parts.count('image')} image parts for {len(images)} images")
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return {"id": row_id, "images": images, "messages": messages}


def _checked_content(row_id: str, role: str, content: object) -> str | list[dict]:
    if not isinstance(content, list):
        checked_text(row_id, f"content of {role}", content)
        return str(content)
    parts = []
    for part in content:
        kind = part.get("type")
        if kind not in ("image", "text"):
            raise BadRowError(row_id, f"a part of type {kind!r}; wanted image or text")
        parts.append({"type": kind, "text": part.get("text") if kind == "text" else None})
    if role != "user" and any(part["type"] == "image" for part in parts):
        raise BadRowError(row_id, f"an image in the {role}'s message")
    checked_text(row_id, f"content of {role}", _text(parts))
    return parts


def _text(content: str | list[dict]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] or "" for part in content)


def row_example(row: dict) -> Example:
    """A checked row as questions and answers; what a system message says is not part of them."""
    messages = [message for message in row["messages"] if message["role"] != "system"]
    texts = [_text(message["content"]).strip() for message in messages]
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    first = messages[0]["content"]
    at = "end" if isinstance(first, list) and first[0]["type"] == "text" and row["images"] else "start"
    answers = [turns[0][1]] if len(turns) == 1 else []
    return Example(row["id"], row["images"], turns, answers, image_at=at)
