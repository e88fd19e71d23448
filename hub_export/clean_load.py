"""Loads exported folders as a stranger's machine would. `hub_export/verify.py` runs this file as a script.

Prints a JSON line for each folder: {"tokens": n} for n prompt tokens of the forward pass that was made, or {"error": "..."}.
"""

import json
import sys
from pathlib import Path
from typing import Any

MAX_MESSAGE = 400  # transformers' errors can list every weight


def load_and_run(folder: str) -> int:
    """Loads everything through Auto classes and runs one background and one object group; the prompt's length."""
    import torch
    from safetensors import safe_open
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    wanted = json.loads(Path(folder, "processor_config.json").read_text(encoding="utf-8"))["processor_class"]
    if type(processor).__name__ != wanted:  # without its auto_map, AutoProcessor settles for a tokenizer
        raise ValueError(f"AutoProcessor gives {type(processor).__name__}; wanted {wanted}.")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    for auto, wanted in ((AutoModel, model.base_model), (AutoModelForMultimodalLM, model)):
        with torch.device("meta"):  # the class is what counts, and large weights are loaded once
            found = auto.from_config(config, trust_remote_code=True)
        if type(found).__name__ != type(wanted).__name__:
            raise ValueError(f"{auto.__name__} gives {type(found).__name__}; wanted {type(wanted).__name__}.")
    for path in Path(folder).glob("detector.safetensors"):
        with safe_open(path, framework="pt") as file:
            file.keys()

    vision = config.vision_config
    groups = _groups(vision.image_size, vision.patch_size)
    content = [{"type": "image", "image": group} for group in groups] + [{"type": "text", "text": "Hello?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        logits = model(**inputs.to(dtype=model.dtype)).logits
    if not torch.isfinite(logits).all():
        raise ValueError("The model's logits are not finite; wanted numbers: weights are broken.")
    return inputs["input_ids"].shape[1]


def _groups(side: int, patch_size: int) -> list:
    """A background group and an object group (the last column of patches) as RGBA images: no detector is needed."""
    from PIL import Image

    edge = side // patch_size * patch_size
    images = []
    for alpha, left, right in ((253, 0, edge - patch_size), (254, edge - patch_size, edge)):
        image = Image.new("RGBA", (side, side))
        image.paste((90, 120, 150, alpha), (left, 0, right, edge))
        images.append(image)
    return images


if __name__ == "__main__":
    # Installed or not, the package cannot be imported from here on: the folders must do without it.
    modules: dict[str, Any] = sys.modules  # a module that is None there cannot be imported
    modules["backdrop"] = None
    reports: list[dict[str, int | str]] = []
    for folder in sys.argv[1:]:
        try:
            reports.append({"tokens": load_and_run(folder)})
        except Exception as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            line = line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 4] + " ..."
            reports.append({"error": line})
    for report in reports:  # after whatever the folders' own code printed
        print(json.dumps(report))
