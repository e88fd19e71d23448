"""`backdrop convert`, `backdrop export` and `backdrop push`: from a LLaVA checkpoint to a repository on the Hub."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from .options import Fit, Json, Licence, Seed, examples

CONVERT_EXAMPLE = examples("backdrop convert llava-hf/llava-1.5-7b-hf runs/start --detector yolov8n.pt")
BUILD_EXAMPLE = examples(
    """backdrop build --vision google/siglip2-base-patch16-384 \\
    --language Qwen/Qwen3-1.7B runs/small --detector yolo11n.pt"""
)
EXPORT_EXAMPLE = examples("backdrop export examples/scenes-model runs/my-model --licence apache-2.0")
PUSH_EXAMPLE = examples(
    "backdrop export examples/scenes-model runs/my-model --licence apache-2.0",
    "backdrop push runs/my-model OWNER/NAME --private",
)


def convert(
    source: Annotated[str, typer.Argument(help="LLaVA checkpoint: a folder or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: a complete Hub folder.")],
    base: Annotated[
        str | None,
        typer.Option(help="Language model that an original LoRA or projector checkpoint was trained on."),
    ] = None,
    tower: Annotated[
        str | None, typer.Option(help="Vision tower instead of the one that an original checkpoint names.")
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            help="Detector whose weights go into the folder: ultralytics, or transformers (a Hub id)."
        ),
    ] = None,
    separators: Annotated[bool, typer.Option(help="Wrap groups in separator tokens.")] = True,
    prefusion_layers: Annotated[int, typer.Option(help="Prefusion layers (they start as the identity).")] = 0,
    prefusion_rotary: Annotated[bool, typer.Option(help="Rotary positions in prefusion.")] = True,
    separate_towers: Annotated[bool, typer.Option(help="A second vision tower for objects.")] = False,
    separate_projectors: Annotated[bool, typer.Option(help="A second projector for objects.")] = False,
    fit: Fit = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="Jinja file of a chat template to use in place of the checkpoint's own."),
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="System message of conversations that have none.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    licence: Licence = "other",
    json_output: Json = False,
) -> None:
    """Turn a LLaVA checkpoint into a Backdrop model, to be finetuned with `backdrop train`."""
    from backdrop.hub_export.convert import convert as convert_llava
    from backdrop.hub_export.export import export as export_folder

    hub = {"revision": revision} if revision else {}
    model, processor = convert_llava(
        source,
        base=base,
        tower=tower,
        separators=separators,
        num_prefusion_layers=prefusion_layers,
        prefusion_rotary=prefusion_rotary,
        separate_vision_towers=separate_towers,
        separate_projectors=separate_projectors,
        detector=detector,
        fit=fit,
        template=None if chat_template is None else chat_template.read_text(encoding="utf-8"),
        system_prompt=system_prompt,
        **hub,
    )
    base = source if not os.path.isdir(source) else None
    files = export_folder(model, processor, out, base_model=base, licence=licence)
    if json_output:
        typer.echo(
            json.dumps({"folder": str(out), "files": len(files), "parameters": model.num_parameters()})
        )
    else:
        typer.echo(f"{out}: {len(files)} files, {model.num_parameters():,} parameters")


def build(
    out: Annotated[Path, typer.Argument(help="Folder to write: a complete Hub folder.")],
    vision: Annotated[
        str,
        typer.Option(
            help="Vision tower: CLIP, SigLIP, SigLIP 2, DINOv2 or DINOv3 ViT; a folder or a Hub id."
        ),
    ],
    language: Annotated[
        str, typer.Option(help="Language model, whose chat template is kept; a folder or a Hub id.")
    ],
    image_side: Annotated[
        int | None, typer.Option(help="Pixels; for DINOv2 and DINOv3, whose towers take several sizes.")
    ] = None,
    vision_feature_layer: Annotated[
        int, typer.Option(help="Which of the tower's hidden states the projector reads.")
    ] = -2,
    detector: Annotated[
        str | None,
        typer.Option(
            help="Detector whose weights go into the folder: ultralytics, or transformers (a Hub id)."
        ),
    ] = None,
    separators: Annotated[bool, typer.Option(help="Wrap groups in separator tokens.")] = True,
    weights: Annotated[
        bool, typer.Option(help="Without: what a dry run needs alone, and no weight is downloaded.")
    ] = True,
    seed: Seed = 0,
    licence: Licence = "other",
    json_output: Json = False,
) -> None:
    """Make a new model of a vision tower and a language model, its projector still to be trained."""
    from backdrop.hub_export.build import build as build_model
    from backdrop.hub_export.build import save_outline
    from backdrop.hub_export.export import export as export_folder

    model, processor = build_model(
        vision,
        language,
        image_side=image_side,
        vision_feature_layer=vision_feature_layer,
        separators=separators,
        detector=detector,
        seed=seed,
        weights=weights,
    )
    if weights:
        base = language if not os.path.isdir(language) else None
        files = export_folder(model, processor, out, base_model=base, licence=licence)
    else:
        files = save_outline(model, processor, out)
    if json_output:
        typer.echo(
            json.dumps({"folder": str(out), "files": len(files), "parameters": model.num_parameters()})
        )
    else:
        typer.echo(f"{out}: {len(files)} files, {model.num_parameters():,} parameters")


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint of a training run, or a LoRA adapter's folder.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    base_model: Annotated[str | None, typer.Option(help="Base model for the model card.")] = None,
    notes: Annotated[Path | None, typer.Option(help="Markdown file that goes into the model card.")] = None,
    licence: Licence = "other",
    language: Annotated[
        list[str] | None,
        typer.Option(help="Language that the model answers in, such as en; may be repeated."),
    ] = None,
    figures: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON of measured figures for the card: summary.json of `backdrop eval`; may be repeated."
        ),
    ] = None,
    sample: Annotated[Path | None, typer.Option(help="Picture (PNG) for the card; with --question.")] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(help="Question about the picture that the model answers; may be repeated."),
    ] = None,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold-prefusion",
            help="Make the prefusion layers the language model's first layers (vLLM wants this).",
        ),
    ] = False,
    json_output: Json = False,
) -> None:
    """Write a complete Hub folder that loads with nothing of ours installed."""
    from backdrop.hub_export.export import export_checkpoint
    from backdrop.hub_export.model_card import read_figures

    text = notes.read_text() if notes else ""
    measured = [figure for path in figures or [] for figure in read_figures(path)]
    about: dict = {
        "language": language or (),
        "figures": measured,
        "sample": sample,
        "questions": question or (),
    }
    files = export_checkpoint(checkpoint, out, base_model, licence, text, fold, **about)
    if json_output:
        typer.echo(json.dumps({"folder": str(out), "files": len(files)}))
    else:
        typer.echo(f"{out}: {len(files)} files")


def push(
    folder: Annotated[Path, typer.Argument(help="A folder written by convert or export.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub.")],
    private: Annotated[bool, typer.Option(help="Create the repository as private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
) -> None:
    """Upload a folder to the Hub in one commit, after it has loaded in a clean process."""
    from backdrop.hub_export.push import push as push_folder

    typer.echo(push_folder(folder, repository, private=private, revision=revision))
