"""`backdrop scenes`: the made scenes and the small model that learns on them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Json, Seed, examples, known_model, print_figures

app = typer.Typer(
    no_args_is_help=True,
    help="Draw the made scenes, and train and examine the small model on them, from nothing but seeds.",
)

Out = Annotated[Path, typer.Option(help="Folder to write.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]


@app.command(**examples("backdrop scenes sheet --out runs/sheet.png"))
def sheet(
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    backgrounds: Annotated[int, typer.Option(help="Backgrounds of each family.")] = 2,
    frames: Annotated[int, typer.Option(help="Frames of each background.")] = 4,
    seed: Annotated[int, typer.Option(help="First background seed.")] = 0,
) -> None:
    """Draw a contact sheet of scenes of every family, each with a question and its answer."""
    from backdrop.scenes.world import contact_sheet

    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(backgrounds, frames, seed).save(out)
    typer.echo(out)


@app.command(**examples("backdrop scenes recording runs/camera --frames 30"))
def recording(
    out: Annotated[Path, typer.Argument(help="A folder for JPEG frames, or a file .mp4 or .avi.")],
    frames: Annotated[int, typer.Option(help="How many.")] = 300,
    seed: Seed = 0,
) -> None:
    """Write a made recording of a fixed camera: noise, drifting light, moving things, JPEG."""
    from backdrop.scenes.recording import write_recording

    write_recording(out, frames=frames, seed=seed)


@app.command(
    **examples("""backdrop scenes detector --out runs/detector --images 64 --epochs 1 \\
        --test-images 16""")
)
def detector(
    out: Annotated[Path, typer.Option(help="Folder for detector.pt and report.json.")],
    images: Annotated[int, typer.Option(help="Training images.")] = 3000,
    test_images: Annotated[int, typer.Option(help="Images of unseen backgrounds to measure on.")] = 400,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    width: Annotated[float, typer.Option(help="YOLOv8's channels are multiplied by this.")] = 0.125,
    threads: Threads = 2,
    seed: Seed = 0,
    json_output: Json = False,
) -> None:
    """Train a small YOLO detector on the scenes, and measure it on unseen backgrounds."""
    from backdrop.scenes.detector import make_detector

    report = make_detector(
        out,
        images=images,
        test_images=test_images,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        width=width,
        threads=threads,
        seed=seed,
    )
    print_figures(report, json_output)


@app.command(
    **examples(
        """backdrop scenes tower --out runs/tower --images 64 --validation-images 16 \\
        --steps 4 --warmup-steps 1"""
    )
)
def tower(
    out: Annotated[Path, typer.Option(help="Folder for vision_tower/ and report.json.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the folder's checkpoint if there is one.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder for drawn scenes. Default: OUT/scenes.")] = None,
    images: Annotated[int, typer.Option(help="Training scenes.")] = 8000,
    validation_images: Annotated[int, typer.Option(help="Scenes to measure on.")] = 512,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    warmup_steps: Annotated[int, typer.Option(help="Steps in which the learning rate rises.")] = 60,
    batch_size: Annotated[int, typer.Option(help="Scenes in a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.5e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW, on matrices.")] = 0.05,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    hidden_size: Annotated[int, typer.Option(help="Width of the tower.")] = 192,
    intermediate_size: Annotated[int, typer.Option(help="Width of its MLPs.")] = 768,
    num_hidden_layers: Annotated[int, typer.Option(help="Layers.")] = 5,
    num_attention_heads: Annotated[int, typer.Option(help="Heads of a layer.")] = 6,
    threads: Threads = 2,
    seed: Seed = 0,
    json_output: Json = False,
) -> None:
    """Pretrain a small vision tower (CLIP) on labels of every patch of the scenes."""
    from backdrop.scenes.tower import TowerOptions, pretrain

    options = TowerOptions(
        resume=resume,
        images=images,
        validation_images=validation_images,
        steps=steps,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        checkpoint_every=checkpoint_every,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        seed=seed,
    )
    print_figures(pretrain(out, options, cache, threads), json_output)


@app.command(
    "base-model",
    **examples(
        """backdrop scenes base-model --tower-of examples/scenes-model \\
        --detector-of examples/scenes-model --out runs/base"""
    ),
)
def base_model(
    out: Out,
    tower: Annotated[Path | None, typer.Option(help="Folder of a pretrained CLIPVisionModel.")] = None,
    tower_of: Annotated[Path | None, typer.Option(help="Or: model folder whose tower is used.")] = None,
    detector: Annotated[Path | None, typer.Option(help="Ultralytics checkpoint (.pt).")] = None,
    detector_of: Annotated[Path | None, typer.Option(help="Or: model folder whose detector is used.")] = None,
    language_model: Annotated[
        Path | None,
        typer.Option(help="Pretrained Llama: a folder or a .gguf file. Default: a new, small one."),
    ] = None,
    seed: Seed = 0,
    json_output: Json = False,
) -> None:
    """Put a tower, a language model and a detector together: the small model before training."""
    from backdrop.scenes.base_model import make_base

    model, processor = make_base(
        out,
        tower=tower,
        tower_of=tower_of,
        detector=detector,
        detector_of=detector_of,
        language_model=language_model,
        seed=seed,
    )
    figures = {
        "folder": str(out),
        "parameters": model.num_parameters(),
        "vocabulary": len(processor.tokenizer),
    }
    print_figures(figures, json_output)


@app.command(
    "align-words",
    **examples(
        """backdrop scenes base-model --tower-of examples/scenes-model \\
        --detector-of examples/scenes-model --out runs/base""",
        """backdrop scenes align-words --model runs/base --out runs/aligned \\
        --images 64 --steps 20""",
    ),
)
def align_words(
    model: Annotated[Path, typer.Option(help="Folder that `backdrop scenes base-model` wrote.")],
    out: Out,
    images: Annotated[int, typer.Option(help="Training scenes.")] = 2000,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Scenes in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: Seed = 0,
    json_output: Json = False,
) -> None:
    """Train a projector so that a patch lands near the words for what it shows."""
    from backdrop.scenes.align_words import align_words as run

    report = run(
        model,
        out,
        images=images,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    print_figures(report, json_output)


@app.command(**examples("backdrop scenes rows --model examples/scenes-model --out runs/rows --scenes 64"))
def rows(
    model: Annotated[
        Path, typer.Option(help="Model folder whose processor splits the scenes.", callback=known_model)
    ],
    out: Out,
    scenes: Annotated[int, typer.Option(help="Rows to make, one for each scene.")] = 12_000,
    questions: Annotated[int, typer.Option(help="Questions per scene.")] = 8,
    places: Annotated[int, typer.Option(help="Questions for columns per scene.")] = 0,
    split: Annotated[Literal["train", "validation"], typer.Option(help="Which backgrounds.")] = "train",
    seed: Seed = 0,
    whole: Annotated[
        float, typer.Option(help="Share (0-1) of whole images, as plain LLaVA sees them.")
    ] = 0.1,
    pair: Annotated[float, typer.Option(help="Share with another frame's background.")] = 0.35,
    stale: Annotated[
        float, typer.Option(help="Share with another frame's background that still shows its objects.")
    ] = 0.2,
    image_position: Annotated[
        Literal["first", "last"],
        typer.Option(help="last: behind the first question, for a model with image_position in_place."),
    ] = "first",
    families: Annotated[
        str | None, typer.Option(help="How often each family is drawn: NAME=WEIGHT,...")
    ] = None,
    topics: Annotated[
        str | None,
        typer.Option(
            help="How often each topic is asked for where a scene has more than QUESTIONS: NAME=WEIGHT,..."
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Make training rows: scenes as patch groups, with questions and answers."""
    from backdrop.scenes.rows import make_rows

    dataset = make_rows(
        model,
        out,
        scenes=scenes,
        questions=questions,
        places=places,
        split=split,
        seed=seed,
        whole=whole,
        pair=pair,
        stale=stale,
        images_last=image_position == "last",
        families=families,
        topics=topics,
    )
    if json_output:
        print_figures({"folder": str(out), "rows": len(dataset)}, True)
    else:
        typer.echo(f"{out}: {len(dataset):,} rows")


@app.command(
    **examples(
        """backdrop scenes exam --llava examples/scenes-model \\
        --model examples/scenes-model --scenes 40 \\
        --work runs/exam --out runs/exam.json"""
    )
)
def exam(
    llava: Annotated[
        str, typer.Option(help="Model that sees whole images: a folder or a Hub id.", callback=known_model)
    ],
    model: Annotated[
        str, typer.Option(help="Model that sees groups: a folder or a Hub id.", callback=known_model)
    ],
    out: Annotated[Path, typer.Option(help="JSON of the report; a table (.md) goes beside it.")],
    scenes: Annotated[int, typer.Option(help="Scenes to ask about.")] = 4000,
    questions: Annotated[int, typer.Option(help="Questions per scene.")] = 3,
    split: Annotated[Literal["validation", "test"], typer.Option(help="Which unseen backgrounds.")] = "test",
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.")] = 32,
    work: Annotated[
        Path, typer.Option(help="Folder of the answers; a run that was stopped continues there.")
    ] = Path("runs/scenes-accuracy"),
    json_output: Json = False,
) -> None:
    """Score two models on unseen backgrounds in every form: whole, split, cached, matched, stale."""
    from backdrop.scenes.exam import run_exam
    from backdrop.scenes.exam_report import markdown

    report = run_exam(
        llava,
        model,
        out,
        scenes=scenes,
        questions=questions,
        split=split,
        seed=seed,
        batch_size=batch_size,
        work=work,
    )
    if json_output:
        print_figures(report, True)
    else:
        typer.echo(markdown(report))


@app.command(
    **examples(
        """backdrop scenes model --work runs/miniature --size miniature \\
        --detector-of examples/scenes-model --report runs/miniature.json"""
    )
)
def model(
    work: Annotated[Path, typer.Option(help="Folder of everything that is made on the way.")],
    report: Annotated[
        Path | None, typer.Option(help="JSON of the accuracy table; a table (.md) goes beside it.")
    ] = None,
    seed: Seed = 0,
    size: Annotated[
        Literal["full", "reduced", "miniature"],
        typer.Option(help="How much of everything; miniature only shows that the chain runs."),
    ] = "full",
    detector_of: Annotated[
        Path | None,
        typer.Option(
            help="Model folder whose detector is used, instead of training one.", callback=known_model
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="2: both forms of the last stage at the same time.", min=1, max=2)
    ] = 1,
    until: Annotated[
        Literal["scenes_llava_1", "scenes_llava_2", "scenes_llava_3"] | None,
        typer.Option(help="Stop after this stage and make no table: where ladders and ablations start."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Make the small model and its accuracy table from seeds (full size: hours on two cores).

    A run that was stopped continues with the step it was in.
    """
    if (report is None) == (until is None):
        raise typer.BadParameter(
            "wanted either --report (the whole chain and its table) or --until (its first stages)"
        )
    from backdrop.experiments.small_model import SIZES, make, make_table
    from backdrop.scenes.exam_report import markdown

    if report is None:
        (folder,) = make(work, seed, SIZES[size], detector_of, jobs, until)
        if json_output:
            print_figures({"model": str(folder)}, True)
        else:
            typer.echo(f"model: {folder}")
        return
    figures, (llava, groups) = make_table(work, report, seed, SIZES[size], detector_of, jobs)
    if json_output:
        print_figures(figures, True)
    else:
        typer.echo(markdown(figures))
        typer.echo(f"models: {llava} and {groups}")
