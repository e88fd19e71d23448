"""The options of caches: sizes in bytes, whole numbers and flags, each checked with one line that names it."""

import math
import numbers
import re
from typing import Any

UNITS = {"": 1, "b": 1}
UNITS |= {prefix + "b": 1000**power for power, prefix in enumerate(("k", "m", "g", "t"), 1)}
UNITS |= {prefix + "ib": 1024**power for power, prefix in enumerate(("k", "m", "g", "t"), 1)}
SIZE_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)


def byte_count(name: str, value: Any, least: int = 0) -> int:
    """A number of bytes, as a number or as text: "2GB" (2 * 10**9), "512MiB" (512 * 2**20), "1.5 GB".

    Args:
        name: of the option, for the message.
        least: the smallest that is allowed.

    Raises:
        ValueError: it is neither, or too small.
    """
    wanted = f'{least} or more bytes, as a number or as text such as "2GB" or "512MiB"'
    size: Any = value
    if isinstance(value, str):
        match = SIZE_TEXT.fullmatch(value)
        if match is None or match[2].lower() not in UNITS:
            raise ValueError(f"{name} is {value!r}; wanted {wanted}.")
        size = (
            float(match[1]) * UNITS[match[2].lower()]
            if "." in match[1]
            else int(match[1]) * UNITS[match[2].lower()]
        )
    is_number = not isinstance(size, bool) and isinstance(size, numbers.Real) and math.isfinite(size)
    if not is_number or size < least:
        raise ValueError(f"{name} is {value!r}; wanted {wanted}.")
    return int(size)


def whole_number(name: str, value, least: int = 1) -> int:
    """An integer.

    Raises:
        ValueError: it is none, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} is {value!r}; wanted a whole number, {least} or more.")
    return int(value)


def flag(name: str, value) -> bool:
    """True or False.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; wanted True or False.")
    return value
