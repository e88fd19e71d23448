"""The code beside a saved model: what its `auto_map` names goes along, so that the folder loads by itself.

transformers copies the code of a class that it loaded from a folder, and none where the installed package was taken.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path


def save_model_code(folder: str | Path, auto_map: Mapping[str, str]) -> dict[str, str]:
    """Copies the files beside this one that belong to the model.

    Args:
        folder: where the model is being saved.
        auto_map: class names by Auto class, "module.Class" or "repository--module.Class".

    Returns:
        `auto_map` without repositories where the code is in the folder now, and without entries whose code is nowhere.
    """
    here, folder = Path(__file__).parent, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for source in here.glob("*_backdrop.py"):
        if source.resolve() != (folder / source.name).resolve():
            shutil.copyfile(source, folder / source.name)
    return {auto: found for auto, name in auto_map.items() if (found := _found(name, here))}


def _found(name: str, here: Path) -> str | None:
    repository, _, own = name.rpartition("--")
    if (here / f"{own.partition('.')[0]}.py").is_file():
        return own
    return name if repository else None
