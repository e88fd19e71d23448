"""What is drawn at random follows from seeds alone: the same seeds give the same scene on every machine."""

import random
from typing import Literal

Split = Literal["train", "validation", "test"]

_BACKGROUND_SEEDS = {"train": (0, 100_000), "validation": (100_000, 110_000), "test": (110_000, 120_000)}


def seeded_random(*key: str | int) -> random.Random:
    """A generator that follows from its key alone."""
    return random.Random(":".join(("backdrop-scenes", *map(str, key))))


def background_seeds(split: Split) -> range:
    """The background seeds of a split; the splits share none."""
    return range(*_BACKGROUND_SEEDS[split])
