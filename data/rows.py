"""The example that every dataset row is read into, its form as a training row, and the list of bad rows."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from datasets import Features, Image, List, Value

# What `SFTTrainer` reads, and the row's name. `images` holds files or bytes; an RGBA patch group stays one.
TRAINING_FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)


@dataclass(frozen=True)
class Example:
    """One example of a dataset: images, and what is asked and said about them.

    Attributes:
        id: names the example in its dataset.
        images: each `{"path": str | None, "bytes": bytes | None}`, as `datasets.Image` stores it undecoded.
        turns: (question, answer) in order; a question carries LLaVA's prompt form and no `<image>`.
        answers: every reference answer to the (only) question: 10 annotators of VQA, all captions of an image.
        question_type: the dataset's own name for the kind of question, "" where it has none.
        image_id: the same for examples of the same image.
        image_at: where `<image>` stood in the first question: "start" or "end".
    """

    id: str
    images: list[dict]
    turns: list[tuple[str, str]]
    answers: list[str] = field(default_factory=list)
    question_type: str = ""
    image_id: str = ""
    image_at: str = "start"

    def row(self) -> dict:
        """The training row: `TRAINING_FEATURES`."""
        messages = []
        for question, answer in self.turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return {"id": self.id, "images": self.images, "messages": messages}


class BadRowError(ValueError):
    """A row that cannot be used: its id and what is wrong with it."""

    def __init__(self, row_id: str, reason: str):
        super().__init__(f"row {row_id}: {reason}")
        self.row_id = row_id
        self.reason = reason


@dataclass
class BadRows:
    """Counts bad rows; raises at the first where the recipe says so.

    Attributes:
        on_bad_row: "skip" or "raise".
        rows: (id, reason) of each.
    """

    on_bad_row: str = "skip"
    rows: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("skip", "raise"):
            raise ValueError(f"on_bad_row is {self.on_bad_row!r}; wanted 'skip' or 'raise'.")

    def add(self, error: BadRowError) -> None:
        """Takes down a bad row; with "raise", raises it."""
        if self.on_bad_row == "raise":
            raise error
        self.rows.append((error.row_id, error.reason))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def summary(self, shown: int = 5) -> str:
        """One line: how many, and the first few with their reasons."""
        if not self.rows:
            return "no bad rows"
        named = "; ".join(f"{row_id}: {reason}" for row_id, reason in self.rows[:shown])
        more = f"; and {len(self.rows) - shown} more" if len(self.rows) > shown else ""
        return f"{len(self.rows)} bad rows skipped ({named}{more})"
