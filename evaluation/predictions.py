"""Predictions as JSON lines that grow while a model answers, so that a run which was cut off goes on where it stopped."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.modeling.weights_key_backdrop import weights_digest
from backdrop.processing.detector_files_backdrop import DETECTOR_FILES
from backdrop.processing.processing_backdrop import BackdropProcessor


class Predictions:
    """A file of records, its first line a header that says what they depend on.

    Args:
        path: made if it is not there. A last line that was cut off is dropped.
        header: must be equal to that of a file which is there already.
        replace: begin anew where it is not.

    Raises:
        ValueError: the file is of another run, or damaged; the message names the first difference.
    """

    def __init__(self, path: Path, header: dict, replace: bool = False):
        self.path = path
        self._records: list[dict] = []
        header = json.loads(json.dumps(header))
        path.parent.mkdir(parents=True, exist_ok=True)
        if _cut_torn_line(path):
            found, self._records = read_predictions(path)
            other = [name for name in {**header, **found} if header.get(name) != found.get(name)]
            if not other:
                return
            if not replace:
                raise ValueError(
                    f"{path} was made with {other[0]} {found.get(other[0])!r}; wanted {header.get(other[0])!r}. "
                    "Give another folder, or remove that file."
                )
            path.unlink()
            self._records = []
        self._write([{"header": header}])

    @property
    def records(self) -> list[dict]:
        """All of them, in the order they were made."""
        return self._records

    @property
    def done(self) -> set[str]:
        """Ids of the questions that have an answer."""
        return {record["id"] for record in self._records}

    def append(self, records: Iterable[dict]) -> None:
        """Adds records, on disk before the call returns."""
        records = list(records)
        self._write(records)
        self._records += records

    def _write(self, lines: list[dict]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def _cut_torn_line(path: Path) -> bool:
    """Drops a last line without its end; whether any line is left."""
    if not path.exists():
        return False
    with path.open("rb+") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
    return whole > 0


def read_predictions(path: Path) -> tuple[dict, list[dict]]:
    """(header, records) of a file; a torn last line is left out.

    Raises:
        ValueError: it is no file of predictions, or a line in it is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; wanted predictions written by `backdrop eval`.")
    lines = path.read_bytes().split(b"\n")[:-1]
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number} is no JSON: {line[:40]!r}.") from None
    if not values or "header" not in values[0]:
        raise ValueError(
            f"{path} does not begin with a header; wanted predictions written by `backdrop eval`."
        )
    return values[0]["header"], values[1:]


def model_fingerprint(
    model: BackdropForConditionalGeneration, processor: BackdropProcessor, source: str | Path
) -> dict[str, str | None]:
    """What answers depend on in a model: digests of its weights, its processor's options and its detector."""
    options = processor.image_processor.to_dict() | {"separators": processor.use_separators}
    template = processor.chat_template or processor.tokenizer.chat_template
    detector = Path(source, DETECTOR_FILES[0])
    return {
        "weights": weights_digest(model).hex(),
        "processor": _digest(json.dumps([options, template], sort_keys=True, default=str).encode()),
        "detector": _digest(detector.read_bytes()) if detector.is_file() else None,
        "dtype": str(model.dtype),
    }


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
