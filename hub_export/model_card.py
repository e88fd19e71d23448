"""The texts of an exported folder: model card, licence, notice."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from backdrop.modeling.configuration_backdrop import BackdropConfig

from .checkpoint import tower_config

# Where the snippets name the repository; `push` puts the real name in its place.
REPO_PLACEHOLDER = "OWNER/NAME"
AGPL_URL = "https://www.gnu.org/licenses/agpl-3.0.html"
TOWER_NAMES = {
    "clip_vision_model": "CLIP",
    "siglip_vision_model": "SigLIP",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 with registers",
    "dinov3_vit": "DINOv3 ViT",
}


@dataclass(frozen=True)
class Figure:
    """A measured figure of a card.

    Attributes:
        dataset: what it was measured on.
        name: what it is, with how the model was run.
        metric: the metric's name, such as "accuracy".
        value: 0 to 1.
    """

    dataset: str
    name: str
    metric: str
    value: float


_APACHE = """\
The code in this folder (*.py): Copyright the Backdrop authors.

Licensed under the Apache License, Version 2.0 (the "License"); you may not use these files except in compliance with
the License. You may obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
"AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
specific language governing permissions and limitations under the License.
"""

_CARD = """\
---
{front_matter}
---

# {name}

A LLaVA-style vision-language model that answers questions about an image whose background it has already seen without
computing that background again. A YOLO detector says which {patch} x {patch} px patches of the {side} x {side} px image
hold objects; background and object patches are encoded apart and reach the language model background first:

    {layout}

so that the background's vision tokens and the language model's key/value prefix can be reused for the next image of
the same scene: a fixed camera, a screen, a kiosk, a robot's bench.

{facts}

## Use

`pip install -r requirements.txt`; the code in this repository does the rest.

```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="{placeholder}", trust_remote_code=True)
content = [{{"type": "image", "image": "photo.jpg"}}, {{"type": "text", "text": "What is in front?"}}]
print(pipe(text=[{{"role": "user", "content": content}}], max_new_tokens=40, return_full_text=False))
```

{sample}## Reuse of the background

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{placeholder}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{placeholder}", trust_remote_code=True)
model.enable_background_cache(max_bytes=2 * 2**30)
processor.enable_background_matching(tolerance=8)

for frame in ("frame-1.jpg", "frame-2.jpg"):
    content = [{{"type": "image", "image": Image.open(frame)}}, {{"type": "text", "text": "Who is there?"}}]
    inputs = processor.apply_chat_template(
        [{{"role": "user", "content": content}}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    answer = model.generate(**inputs, max_new_tokens=40)
    print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(model.background_cache.stats())
```

The cache never changes an answer: it keeps what the model computed, by content. Matching does change the input, within
a bound: it puts the pixels of a background seen before in place of the new image's wherever they differ by at most
`tolerance` grey levels (0: wherever they are equal), and encodes everything else freshly. Backgrounds that move do not
match, and cost what they cost without it.

## Detector

{detector}

Without a detector, give patch groups (RGBA images) or switch splitting off, which makes this a plain LLaVA:

```python
processor.image_processor.split = False
```

## Licences

- Code (`*.py`): Apache-2.0.
- Model weights: {licence}{of_base}
{detector_licence}
{notes}"""

# What becomes of images that are not square, by `fit` and by `own_padding`.
_CROPPED = "their sides are cut off (`fit='crop'`); of a 16:9 frame 44% of the width is not seen"
_STRETCHED = "distorted to a square (`fit='stretch'`)"
_PADDED = "padded with the mean colour (`fit='pad'`)"
_FITS = {
    "crop": (_CROPPED, _CROPPED),
    "pad": (f"{_PADDED}; patches of padding are left out (`own_padding=False`)", _PADDED),
    "stretch": (_STRETCHED, _STRETCHED),
}

SAMPLE = "sample.png"
_SAMPLE_SECTION = """\
## A picture to try

![A picture and questions about it]({picture})

{questions}

"""
_LAYOUT = "system text · background · objects · question"
_LAYOUT_WITH_SEPARATORS = (
    "system text · [BG_START] background [BG_END] [OBJ_START] objects [OBJ_END] · question"
)

_OWN_DETECTOR = """\
`detector.safetensors` holds a YOLO detector ({source}). Running it needs `ultralytics`. Another detection or
segmentation model takes its place with the image processor's option `detector`, by name or path:

```python
processor.image_processor.detector = "yolo26n-seg.pt"
```"""

_TRANSFORMERS_DETECTOR = """\
`detector.safetensors` holds an object detector of transformers ({source}); nothing else is needed to run it. Another
one takes its place with the image processor's option `detector`, a Hub id or a path:

```python
processor.image_processor.detector = "PekingU/rtdetr_v2_r18vd"
```"""

_NO_DETECTOR = """\
This repository holds no detector weights. Splitting an ordinary image needs the image processor's option `detector`: the
name or path of a detection or segmentation model of `ultralytics`, or of an object detector of transformers.

```python
processor.image_processor.detector = "yolo26n-seg.pt"
```"""

_OWN_DETECTOR_LICENCE = "- Detector (`detector.safetensors`, `detector.json`): AGPL-3.0, see `NOTICE`."
_TRANSFORMERS_DETECTOR_LICENCE = "- Detector (`detector.safetensors`, `detector.json`): {licence}."
_NO_DETECTOR_LICENCE = "- ultralytics, and the detectors made with it, are AGPL-3.0."


def model_card(
    config: BackdropConfig,
    name: str,
    base_model: str | None = None,
    licence: str = "apache-2.0",
    detector: str | None = None,
    notes: str = "",
    fit: str = "crop",
    own_padding: bool = True,
    language: Sequence[str] = (),
    figures: Sequence[Figure] = (),
    questions: Sequence[str] = (),
    detector_licence: str | None = None,
) -> str:
    """README.md of an exported folder.

    Args:
        config: the model's.
        name: title.
        base_model: Hub id of the model that this one was made from.
        licence: of the weights, as the Hub spells licences.
        detector: the checkpoint that the included detector weights came from; None: none are included.
        notes: Markdown for the end: training data, figures.
        fit, own_padding: the image processor's.
        language: codes of the languages that the model answers in, such as "en".
        figures: measured ones.
        questions: about the picture `SAMPLE` of the folder, which the model answers rightly; (): there is no picture.
        detector_licence: of the included detector, if it is one of transformers; None: it is one of ultralytics.
    """
    tower = tower_config(config)
    own, own_licence = _NO_DETECTOR, _NO_DETECTOR_LICENCE
    if detector and detector_licence:
        own = _TRANSFORMERS_DETECTOR.format(source=detector)
        own_licence = _TRANSFORMERS_DETECTOR_LICENCE.format(licence=detector_licence)
    elif detector:
        own, own_licence = _OWN_DETECTOR.format(source=detector), _OWN_DETECTOR_LICENCE
    return _CARD.format(
        front_matter=_front_matter(
            name, base_model, licence, None if detector_licence else detector, language, figures, questions
        ),
        name=name,
        placeholder=REPO_PLACEHOLDER,
        side=tower.image_size,
        patch=tower.patch_size,
        layout=_LAYOUT if config.separator_token_ids is None else _LAYOUT_WITH_SEPARATORS,
        facts="\n".join(f"- {fact}" for fact in _facts(config, base_model, _FITS[fit][own_padding])),
        detector=own,
        licence=licence,
        of_base=f"; the terms of {base_model} apply too." if base_model else ".",
        detector_licence=own_licence,
        sample=_SAMPLE_SECTION.format(
            picture=SAMPLE, questions="\n".join(f"- {question}" for question in questions)
        )
        if questions
        else "",
        notes=f"\n## Notes\n\n{notes.strip()}\n" if notes.strip() else "",
    )


def licence_text(licence: str, detector: str | None = None, detector_licence: str | None = None) -> str:
    """LICENSE: what each part of the folder is under; see `model_card`."""
    parts = [_APACHE, f"The model weights (model*.safetensors): {licence}.\n"]
    if detector is not None:
        terms = detector_licence or "AGPL-3.0, see NOTICE"
        parts.append(f"The detector (detector.safetensors, detector.json): {terms}.\n")
    return "\n".join(parts)


def notice_text(detector: str) -> str:
    """NOTICE: the terms of the detector weights that the folder includes."""
    return (
        f"detector.safetensors and detector.json hold a YOLO detector (from {detector}) made with ultralytics.\n"
        "They are licensed under the GNU Affero General Public License, version 3.0\n"
        f"({AGPL_URL}; https://ultralytics.com/license). Running the detector needs the ultralytics\n"
        "package, which is licensed under AGPL-3.0 too.\n\n"
        "Nothing else in this folder depends on them: delete both files to be rid of these terms, and choose\n"
        "another detector, give patch groups, or do not split (see README.md).\n"
    )


def _facts(config: BackdropConfig, base_model: str | None, not_square: str) -> list[str]:
    text = config.get_text_config()
    facts = [
        f"Vision tower: {TOWER_NAMES[tower_config(config).model_type]}, {config.num_patches} patches.",
        f"Language model: {text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}.",
        f"Prefusion layers: {config.num_prefusion_layers}.",
        f"Images that are not square: {not_square}.",
    ]
    if base_model is not None:
        facts.append(f"Base model: [{base_model}](https://huggingface.co/{base_model}).")
    if not config.trained_on_groups:
        facts.append("Converted, not yet finetuned on patch groups: splitting an image may cost quality.")
    return facts


def _front_matter(
    name: str,
    base_model: str | None,
    licence: str,
    detector: str | None,
    language: Sequence[str],
    figures: Sequence[Figure],
    questions: Sequence[str],
) -> str:
    """What the Hub reads of a card, by a YAML writer: any text may stand in any field."""
    fields: dict[str, Any] = {"license": licence}
    if detector is not None:
        # One tag cannot name both licences, and the repository as a whole is not just under the weaker one.
        fields = {
            "license": "other",
            "license_name": f"{licence}-with-agpl-3.0-detector",
            "license_link": "LICENSE",
        }
    if base_model is not None:
        fields["base_model"] = base_model
    if language:
        fields["language"] = list(language)
    fields |= {"pipeline_tag": "image-text-to-text", "library_name": "transformers"}
    fields["tags"] = ["backdrop", "custom_code", "llava", "background-reuse"]
    if questions:
        fields["widget"] = [{"src": SAMPLE, "text": question} for question in questions]
    if figures:
        fields["model-index"] = [{"name": name, "results": [_result(figure) for figure in figures]}]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000).rstrip()


def _result(figure: Figure) -> dict[str, Any]:
    """A figure in the Hub's form (huggingface_hub's `EvalResult`)."""
    slug = re.sub(r"[^a-z0-9]+", "-", figure.dataset.lower()).strip("-")
    return {
        "task": {"type": "visual-question-answering", "name": "Visual Question Answering"},
        "dataset": {"type": slug, "name": figure.dataset},
        "metrics": [{"type": figure.metric, "name": figure.name, "value": round(100 * figure.value, 2)}],
    }


# How the forms of a report of the made scenes are called in a card.
_FORM_NAMES = {
    "split": "split into background and objects",
    "cached": "background cache",
    "matched": "background of another frame",
    "stale": "a whole stale background",
}


def read_figures(path: str | Path) -> list[Figure]:
    """The figures of a summary that `backdrop eval` wrote, or of a report of the made scenes.

    Raises:
        ValueError: neither.
    """
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    if isinstance(report, dict) and {"data", "mode", "overall", "figures"} <= report.keys():
        found = [
            Figure(report["data"], f"{name}, mode {report['mode']}", name, report["overall"][name]["value"])
            for name in report["figures"]
        ]
        return [figure for figure in found if figure.value is not None]
    if isinstance(report, dict) and "forms" in report:
        dataset = f"made scenes, {report['split']}, {report['scenes']} scenes"
        return [
            Figure(dataset, f"accuracy, {shown}", "accuracy", _overall(report["forms"][form]))
            for form, shown in _FORM_NAMES.items()
            if form in report["forms"]
        ]
    raise ValueError(
        f"{path} holds no figures; wanted summary.json of `backdrop eval`, or a report of the made scenes."
    )


def _overall(form: dict) -> float:
    overall = form["accuracy"]["overall"]
    value = overall.get("accuracy", overall.get("exact", overall))
    return value["value"]


def _is_hub_id(name: object) -> bool:
    """Whether a model's name is that of a repository on the Hub, and no folder of this machine."""
    if not isinstance(name, str) or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def recorded_base(folder: str | Path) -> str | None:
    """The Hub id of the model that a checkpoint came from, as its card or those of the checkpoints before it say."""
    place: str | Path | None = folder
    for _ in range(20):  # stages of training, and no circle
        if place is None:
            return None
        card, stage, adapter = (
            Path(place, name) for name in ("README.md", "backdrop_stage.json", "adapter_config.json")
        )
        if card.is_file():
            head = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8"), re.DOTALL)
            fields = (yaml.safe_load(head.group(1)) if head else None) or {}
            if _is_hub_id(fields.get("base_model")):  # peft's own cards name folders of this machine
                return fields["base_model"]
        before = None
        if stage.is_file():
            before = json.loads(stage.read_text(encoding="utf-8")).get("recipe", {}).get("model")
        elif adapter.is_file():
            before = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        place = before
    return None
