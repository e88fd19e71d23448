"""Checks of single options, each with one line that names the option, what was found and what is wanted."""

import math
import numbers
import os


def check_number(
    name: str, value, wanted: str, least: float, most: float = math.inf, above: bool = False
) -> None:
    """Checks a real number from `least` to `most`.

    Args:
        wanted: the range in words.
        above: `least` itself is too small.

    Raises:
        ValueError: it is no number, not finite, or out of the range.
    """
    is_number = not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
    if not is_number or not least <= value <= most or (above and value == least):
        raise ValueError(f"{name} is {value!r}; wanted {wanted}.")


def check_whole_number(name: str, value, wanted: str, least: int) -> None:
    """Checks an integer of at least `least`.

    Raises:
        ValueError: it is none, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} is {value!r}; wanted {wanted}.")


def check_flag(name: str, value) -> None:
    """Checks True or False.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; wanted True or False.")


def check_path(name: str, value, wanted: str) -> None:
    """Checks the path of a file or folder, which need not exist.

    Raises:
        ValueError: it is no path, or an empty one, which would be the working directory.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"{name} is {value!r}; wanted {wanted}.")
