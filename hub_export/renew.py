"""Brings an exported folder's code and texts up to this source. Weights and JSON stay as they are.

    python -m backdrop.hub_export.renew examples/scenes-model --notes docs/scenes-model.md \
        --system-prompt "" --language en --figures docs/results/data/scenes-accuracy.json

`make example` runs this for the example that is kept in the repository.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from backdrop.modeling.configuration_backdrop import BackdropConfig

from .chat_template import chat_template
from .export import code_files, folder_texts
from .model_card import SAMPLE, read_figures

TEMPLATE = "chat_template.jinja"


def outdated(
    folder: Path,
    base_model: str | None = None,
    licence: str = "apache-2.0",
    notes: str = "",
    system_prompt: str | None = None,
    **about: Any,
) -> dict[str, str | None]:
    """Code and texts of `folder` that differ from what an export would write now.

    Args:
        folder: an exported folder.
        base_model, licence, notes, about (`language`, `figures`, `questions`): what the folder was exported with; see `export`.
        system_prompt: of its chat template, where that is `chat_template`'s; None: the template is not looked at.

    Returns:
        File name -> the text that it should have, None for code that no longer exists.
    """
    wanted: dict[str, str | None] = {
        name: source.read_text(encoding="utf-8") for name, source in code_files().items()
    }
    config = BackdropConfig.from_pretrained(folder)
    wanted |= folder_texts(folder, config, folder.resolve().name, base_model, licence, notes, **about)
    if system_prompt is not None:
        wanted[TEMPLATE] = chat_template(system_prompt)
    wanted |= {path.name: None for path in folder.glob("*.py") if path.name not in wanted}
    return {name: text for name, text in wanted.items() if text != _read(folder / name)}


def renew(folder: Path, **options: Any) -> list[str]:
    """Writes what is `outdated`, removes code that no longer exists; the names of the files that it changed."""
    changes = outdated(folder, **options)
    for name, text in changes.items():
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text, encoding="utf-8")
    return sorted(changes)


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Renews code and texts of an exported folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--notes", type=Path, help="Markdown for the end of the model card")
    parser.add_argument("--system-prompt", help="renews the chat template too, with this default prompt")
    parser.add_argument("--language", action="append", default=[], help="code of a language, such as en")
    parser.add_argument("--figures", type=Path, help="JSON of measured figures; see `read_figures`")
    parser.add_argument("--sample", type=Path, help="picture for the card, PNG")
    parser.add_argument("--question", action="append", default=[], help="a question about it")
    options = parser.parse_args()
    notes = options.notes.read_text(encoding="utf-8") if options.notes else ""
    figures = read_figures(options.figures) if options.figures else []
    changed = renew(
        options.folder,
        notes=notes,
        system_prompt=options.system_prompt,
        language=options.language,
        figures=figures,
        questions=options.question,
    )
    if options.sample is not None:
        shutil.copyfile(options.sample, options.folder / SAMPLE)
    print(f"{options.folder}: {len(changed)} files renewed" + "".join(f"\n  {name}" for name in changed))


if __name__ == "__main__":
    main()
