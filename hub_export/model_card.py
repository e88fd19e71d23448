"""The texts of an exported folder: model card, licence, notice."""

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

## Reuse of the background

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
        front_matter=_front_matter(base_model, licence, None if detector_licence else detector),
        name=name,
        placeholder=REPO_PLACEHOLDER,
        side=tower.image_size,
        patch=tower.patch_size,
        layout=_LAYOUT if config.separator_token_ids is None else _LAYOUT_WITH_SEPARATORS,
        facts="\n".join(f"- {fact}" for fact in _facts(config, base_model)),
        detector=own,
        licence=licence,
        of_base=f"; the terms of {base_model} apply too." if base_model else ".",
        detector_licence=own_licence,
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


def _facts(config: BackdropConfig, base_model: str | None) -> list[str]:
    text = config.get_text_config()
    facts = [
        f"Vision tower: {TOWER_NAMES[tower_config(config).model_type]}, {config.num_patches} patches.",
        f"Language model: {text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}.",
        f"Prefusion layers: {config.num_prefusion_layers}.",
    ]
    if base_model is not None:
        facts.append(f"Base model: [{base_model}](https://huggingface.co/{base_model}).")
    if not config.trained_on_groups:
        facts.append("Converted, not yet finetuned on patch groups: splitting an image may cost quality.")
    return facts


def _front_matter(base_model: str | None, licence: str, detector: str | None) -> str:
    lines = [f"license: {licence}"]
    if detector is not None:
        # One tag cannot name both licences, and the repository as a whole is not just under the weaker one.
        lines = [
            "license: other",
            f"license_name: {licence}-with-agpl-3.0-detector",
            "license_link: LICENSE",
        ]
    if base_model is not None:
        lines.append(f"base_model: {base_model}")
    lines += ["pipeline_tag: image-text-to-text", "library_name: transformers", "tags:"]
    lines += [f"- {tag}" for tag in ("backdrop", "custom_code", "llava", "background-reuse")]
    return "\n".join(lines)
