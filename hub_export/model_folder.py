"""What a folder holds, told from its small files: a model of ours, an adapter, a quantised model, another kind."""

import json
from pathlib import Path

MODEL_TYPE = "backdrop"
CONFIG, ADAPTER, PROCESSOR = "config.json", "adapter_config.json", "processor_config.json"


def check_config(name: str, values: dict) -> None:
    """Refuses the configuration of another kind of model, or of one that is quantised already.

    Args:
        name: the model's folder or Hub id, for the message.
        values: its config.json.

    Raises:
        ValueError: what was found, and what to do.
    """
    found = values.get("model_type")
    if found != MODEL_TYPE:
        hint = f"; convert it first: backdrop convert {name} OUT" if found == "llava" else ""
        raise ValueError(f"{name!r} is a model of type {found!r}; wanted {MODEL_TYPE!r}{hint}.")
    check_not_quantised(name, values)


def check_not_quantised(name: str, values: dict) -> None:
    """Refuses a configuration whose weights are stored quantised: a `ValueError` that says by what."""
    quantised = values.get("quantization_config")
    if quantised:
        method = (
            quantised.get("quant_method", "an unknown method") if isinstance(quantised, dict) else quantised
        )
        raise ValueError(
            f"{name!r} is quantised ({method}); wanted the checkpoint in 16 or 32 bit: load_in_4bit and load_in_8bit "
            "quantise it as it is loaded."
        )


def check_known(name: str | Path) -> None:
    """Refuses a local folder that holds nothing of ours; a name that is no folder passes, it may be a Hub id.

    Raises:
        ValueError: neither a model, an adapter nor a processor is there, or a model of another kind.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    if (folder / CONFIG).is_file():
        check_config(str(name), json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    elif not any((folder / file).is_file() for file in (ADAPTER, PROCESSOR)):
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ValueError(f"{str(name)!r} holds {held}; wanted the folder of a Backdrop model, with {CONFIG}.")


def check_exported(name: str | Path) -> None:
    """Refuses a local folder that transformers could not load by itself: an adapter alone, or a model without its code.

    Raises:
        ValueError: as `check_known`, or one of these; the message names the command that exports it.
    """
    check_known(name)
    folder = Path(name)
    if not folder.is_dir():
        return
    if not (folder / CONFIG).is_file():
        what = "an adapter alone" if (folder / ADAPTER).is_file() else "a processor without a model"
    elif (folder / ADAPTER).is_file():
        what = "an adapter alone"
    elif "auto_map" not in json.loads((folder / CONFIG).read_text(encoding="utf-8")):
        what = "a checkpoint without the code that loads it"
    else:
        return
    raise ValueError(f"{str(name)!r} is {what}; export it first: backdrop export {name} OUT")
