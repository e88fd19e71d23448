"""Questions about a scene, each with its short answer, and the words that backgrounds carry."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .drawing import CELL
from .labels import GLYPHS
from .seeds import seeded_random


@dataclass(frozen=True)
class Question:
    """A question with its short answer, what it asks for, and which part of the image holds the answer."""

    topic: str
    about: Literal["object", "background", "both"]
    question: str
    answer: str


class Questioner:
    """Collects the questions about one scene, one wording of each picked at random.

    Attributes:
        rng: what a family draws from when it must choose what to ask for.
        questions: those asked so far.
        places: questions for the number of a thing's column, kept apart (topic "place").
    """

    def __init__(self, wordings: Mapping[str, Sequence[str]], rng: random.Random) -> None:
        self._wordings = wordings
        self.rng = rng
        self.questions: list[Question] = []
        self.places: list[Question] = []

    def __call__(
        self, topic: str, about: Literal["object", "background", "both"], answer: str, **names: str
    ) -> None:
        """Asks about a topic; `names` fill the wording's braces."""
        wording = self.rng.choice(self._wordings[topic]).format(**names)
        self.questions.append(Question(topic, about, wording, answer))

    def place(self, about: Literal["object", "background"], x: float, kind: str) -> None:
        """Asks for the column, 1 to 12, that design pixel `x` lies in."""
        wording = self.rng.choice(self._wordings["place"]).format(kind=kind)
        self.places.append(Question("place", about, wording, str(int(x) // CELL + 1)))


def background_word(words: Sequence[str], family: str, background_seed: int) -> str:
    """A word of the list, or, for half of all backgrounds, 3 to 5 random characters that nobody can know by heart."""
    rng = seeded_random("word", family, background_seed)
    if rng.random() < 0.5:
        return rng.choice(words)
    return "".join(rng.choice(GLYPHS) for _ in range(rng.randint(3, 5)))
