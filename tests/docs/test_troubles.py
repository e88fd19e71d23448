"""The messages that the page of troubles quotes are those of the code."""

import re

import pytest
from paths import ROOT

PAGE = (ROOT / "docs" / "troubles.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^\*\*\d+\. `(.+?)`(?=\*\*)", PAGE, re.M)
ROOMS = ("modeling", "processing", "hub_export", "train", "serving", "backdrop")


def source() -> str:
    """The code of the rooms with the seams of its strings taken out."""
    texts = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            texts.append(path.read_text(encoding="utf-8"))
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(texts))


SOURCE = source()


def test_ten_messages_are_quoted():
    assert len(QUOTED) == 10


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_the_code_s(message):
    # Values stand where the code has fields: whatever lies between two of them must be there word for word.
    parts = re.split(r"\.\.\.|\d+|'[^']*'|<image>|Backdrop\w+|\bMODEL\b", message)
    words = [part.strip(" :,;.") for part in parts]
    words = [part for part in words if len(part) >= 10]
    assert words
    for part in words:
        assert part in SOURCE, part
