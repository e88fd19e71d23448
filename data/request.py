"""What a reader of a dataset is given, and what all of them make of its rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset

from .files import one_file, open_rows, require_columns, split_names
from .images import file_image
from .prompts import CAPTION, checked_answers, checked_list, checked_text, short_answer
from .rows import BadRowError, Example

Parsed = Iterator[Example | BadRowError]


@dataclass(frozen=True)
class Request:
    """What is asked for: see `backdrop.data.load.examples`."""

    source: str
    split: str
    images: Path | None = None
    streaming: bool = False
    ocr_tokens: bool = False

    @property
    def path(self) -> Path:
        """The source as a path."""
        return Path(self.source)

    @property
    def folder(self) -> Path:
        """The folder that the source's files lie in."""
        return self.path.parent if self.path.is_file() else self.path

    @property
    def roots(self) -> list[Path]:
        """Where images may lie: the folder given, else the set's own folder and its `images`."""
        return [self.images] if self.images else [self.folder, self.folder / "images"]

    def image(self, row_id: str, *names: str) -> dict:
        """The image file of the first of `names`, relative to a root, that exists."""
        return file_image(row_id, [root / name for root in self.roots for name in names])

    def file(self, *patterns: str) -> Path:
        """The source itself if it is a file, else the one file in it that matches; `{split}` stands for its names."""
        if self.path.is_file():
            return self.path
        names = split_names(self.split)
        return one_file(
            self.path,
            list(dict.fromkeys(pattern.replace("{split}", name) for pattern in patterns for name in names)),
        )

    def open(self, wanted: list[str], config: str | None = None) -> Dataset | IterableDataset:
        """The rows of a mirror, which must have the columns `wanted`."""
        # Local files are read in place: `datasets` would first write them all to its cache.
        streaming = self.streaming or self.path.exists()
        rows = open_rows(self.source, self.split, config=config, streaming=streaming)
        require_columns(rows, wanted, self.source)
        return rows


def parsed(rows: Iterable, parse: Callable[[dict], Example]) -> Parsed:
    """`parse` of every row; a row that it refuses, that is no object, or that lacks a field or has one of another type
    becomes its error."""
    for number, row in enumerate(rows):
        try:
            if not isinstance(row, dict):
                raise BadRowError(f"#{number}", f"is {type(row).__name__}; wanted an object")
            yield parse(row)
        except KeyError as error:
            yield BadRowError(f"#{number}", f"has no field {error}")
        except BadRowError as error:
            yield error
        except (AttributeError, TypeError, ValueError) as error:
            yield BadRowError(f"#{number}", f"has a field of the wrong type: {error}")


def question_example(
    row_id: str,
    image: dict,
    question: object,
    answers: object,
    *,
    question_type: str = "",
    image_id: str = "",
    ocr_tokens: Sequence[str] = (),
) -> Example:
    """A short question, trained on the answer that most annotators gave."""
    given, most_common = checked_answers(row_id, answers)
    prompt = short_answer(checked_text(row_id, "question", question), ocr_tokens)
    return Example(
        id=row_id,
        images=[image],
        turns=[(checked_text(row_id, "question", prompt), most_common)],
        answers=given,
        question_type=question_type,
        image_id=image_id,
    )


def caption_example(row_id: str, image: dict, captions: object) -> Example:
    """One image with all its captions; the turn has the first."""
    texts = [checked_text(row_id, "caption", value) for value in checked_list(row_id, "captions", captions)]
    return Example(row_id, [image], [(CAPTION, texts[0])], answers=texts, image_id=row_id)
