"""Exported folders: complete, consistent, replaced in one step, and loaded by a process that has nothing of ours."""

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results
from optional import require_ultralytics
from packaging.requirements import Requirement
from paths import EXAMPLE, ROOT
from PIL import Image
from safetensors.torch import save_file

from backdrop.hub_export import export as export_module
from backdrop.hub_export.chat_template import chat_template
from backdrop.hub_export.checkpoint import load_checkpoint, load_model
from backdrop.hub_export.export import EXPORTED_NAMES, export, export_checkpoint
from backdrop.hub_export.extend import extend_model
from backdrop.hub_export.model_card import REPO_PLACEHOLDER, Figure, model_card, read_figures
from backdrop.hub_export.verify import clean_environment
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import group_to_image, save_group
from backdrop.processing.processing_backdrop import IMAGE_TOKEN, SEPARATOR_TOKENS, BackdropProcessor

REPO = "owner/tiny-backdrop"
# transformers keeps the code of a repository by its commit, in the user's own cache: no two runs may share one.
COMMIT = uuid.uuid4().hex + "01234567"
QUESTIONS = ("what is shown?", "a red bus?")


def tiny_pair(rows: int = 320, **changes):
    """A tiny model and the processor that fits it."""
    tokenizer = tiny.tokenizer()
    BackdropProcessor.add_tokens(tokenizer)
    image_id, *separators = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, *SEPARATOR_TOKENS])
    model = tiny.backdrop_model(
        text_config=tiny.text_config(vocab_size=rows),
        image_token_id=image_id,
        separator_token_ids=separators,
        **changes,
    )
    image_processor = BackdropImageProcessor(
        size={"shortest_edge": tiny.SIDE},
        crop_size={"height": tiny.SIDE, "width": tiny.SIDE},
        patch_size=tiny.PATCH,
    )
    return model, BackdropProcessor(image_processor, tokenizer, chat_template=chat_template())


def pretend_detector(processor: BackdropProcessor, folder: Path) -> None:
    """Detector files that are copied but never run."""
    folder.mkdir()
    save_file({"0.weight": torch.ones(2)}, folder / "detector.safetensors")
    (folder / "detector.json").write_text(json.dumps({"source": "yolov8n.pt"}))
    processor.image_processor.find_detector(str(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is written


def test_folder_is_complete(tmp_path):
    model, processor = tiny_pair()
    files = export(model, processor, tmp_path / "out", base_model="owner/base", notes="Trained on *scenes*.")
    found = contents(tmp_path / "out")
    assert files == sorted(found)
    code = {
        path.name
        for package in (export_module.backdrop.modeling, export_module.backdrop.processing)
        for path in Path(package.__file__).parent.glob("*.py")
        if path.name != "__init__.py"
    }
    assert code == {name for name in found if name.endswith(".py")}
    assert set(found) - code == {
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "requirements.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all(EXPORTED_NAMES.fullmatch(name) for name in found)
    assert not any(str(tmp_path).encode() in data for data in found.values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    auto_map = json.loads(found["config.json"])["auto_map"]
    assert auto_map["AutoModel"] == "modeling_backdrop.BackdropModel"
    assert set(auto_map) == set(export_module.MODEL_CLASSES)
    processor_config = json.loads(found["processor_config.json"])
    assert processor_config["auto_map"] == processor_config["image_processor"]["auto_map"]
    requirements = found["requirements.txt"].decode().splitlines()
    assert [Requirement(line).name for line in requirements if not line.startswith("#")] == [
        "numpy",
        "pillow",
        "safetensors",
        "torch",
        "transformers",
        "ultralytics",
    ]
    card = found["README.md"].decode()
    assert card.startswith(
        "---\nlicense: apache-2.0\nbase_model: owner/base\npipeline_tag: image-text-to-text\n"
    )
    assert "Trained on *scenes*." in card
    assert "no detector weights" in card


def test_the_given_objects_get_no_auto_map(tmp_path):
    model, processor = tiny_pair()
    export(model, processor, tmp_path / "out")
    assert "auto_map" not in model.config.to_dict()
    assert "auto_map" not in str(processor.to_dict())


def test_detector_weights_bring_their_licence(tmp_path):
    model, processor = tiny_pair()
    pretend_detector(processor, tmp_path / "detector")
    files = export(model, processor, tmp_path / "out")
    assert {"detector.safetensors", "detector.json", "NOTICE"} <= set(files)
    card, notice, licence = (
        (tmp_path / "out" / name).read_text() for name in ("README.md", "NOTICE", "LICENSE")
    )
    assert all("AGPL-3.0" in text and "detector.safetensors" in text for text in (card, notice, licence))
    assert "license: other\nlicense_name: apache-2.0-with-agpl-3.0-detector\nlicense_link: LICENSE" in card
    assert 'detector = "' in card
    assert "yolov8n.pt" in card and "yolov8n.pt" in notice


def test_card_of_a_model_that_was_only_converted_says_so():
    untrained = tiny.backdrop_config(trained_on_groups=False)
    assert "not yet finetuned" in model_card(untrained, "tiny")
    assert "not yet finetuned" not in model_card(tiny.backdrop_config(), "tiny")


def test_large_weights_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "MAX_SHARD_SIZE", "100KB")
    model, processor = tiny_pair()
    files = export(model, processor, tmp_path / "out")
    assert "model.safetensors.index.json" in files
    again, _ = load_checkpoint(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


# ---- what is refused


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m, p: p.tokenizer.add_tokens([f"new{i}" for i in range(20)]), "325 tokens.*320 rows"),
        (lambda m, p: setattr(p, "chat_template", None), "chat_template is None"),
        (lambda m, p: setattr(m.config, "image_token_id", 7), "image_token_id is 300; wanted the model's, 7"),
        (lambda m, p: setattr(p, "extra_tokens_per_group", 1), "extra_tokens_per_group is 1"),
        (lambda m, p: setattr(p.image_processor, "patch_size", 28), "number of patches is 4; wanted the.*16"),
        (lambda m, p: setattr(p.image_processor, "detector", "/nowhere/yolo.pt"), "'/nowhere/yolo.pt'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, break_it, message):
    model, processor = tiny_pair()
    break_it(model, processor)
    with pytest.raises(ValueError, match=message):
        export(model, processor, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_classes_are_refused(tmp_path):
    _, processor = tiny_pair()
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration cannot be exported; wanted backdrop"):
        export(tiny.llava_model(), processor, tmp_path / "out")
    tiny.llava_model().save_pretrained(tmp_path / "llava")
    with pytest.raises(ValueError, match="is a model of type 'llava'; wanted 'backdrop'"):
        export_checkpoint(tmp_path / "llava", tmp_path / "out")
    with pytest.raises(ValueError, match="neither config.json nor adapter_config.json"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "out")


def test_only_an_earlier_export_is_replaced(tmp_path):
    model, processor = tiny_pair()
    out = tmp_path / "out"
    model.save_pretrained(out)
    checkpoint = contents(out)
    with pytest.raises(ValueError, match="not empty and no earlier export"):
        export(model, processor, out)
    assert contents(out) == checkpoint

    out = tmp_path / "again"
    export(model, processor, out, notes="first")
    (out / "answers.csv").write_text("1")
    with pytest.raises(ValueError, match="'answers.csv' in it is not of the export's making"):
        export(model, processor, out)
    (out / "answers.csv").unlink()
    (out / "old_file_backdrop.py").write_text("# of an earlier version")
    export(model, processor, out, notes="second")
    assert not (out / "old_file_backdrop.py").exists()
    assert "second" in (out / "README.md").read_text()
    (tmp_path / "empty").mkdir()
    export(model, processor, tmp_path / "empty")


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    model, processor = tiny_pair()
    out = tmp_path / "out"
    export(model, processor, out, notes="first")
    before = contents(out)

    def fail(*_, **__):
        raise OSError("the disk is full")

    for name in ("_copy_code", "_requirements"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
            patch.setattr(export_module, name, fail)
            export(model, processor, out, notes="second")
        assert contents(out) == before
    rename = os.rename
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
        # Moving the earlier one aside works, putting the new one in its place does not.
        patch.setattr(
            os, "rename", lambda a, b: fail() if Path(a).suffix != ".old" and b == out else rename(a, b)
        )
        export(model, processor, out, notes="second")
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- checkpoints and adapters


def test_checkpoint_with_resized_embeddings(tmp_path):
    model, processor = tiny_pair()
    processor.tokenizer.add_tokens([f"new{i}" for i in range(20)])
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    again, _ = load_checkpoint(tmp_path / "out")
    assert again.get_input_embeddings().weight.shape[0] == 325
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not any(str(tmp_path).encode() in data for data in contents(tmp_path / "out").values())


def tiny_inputs(processor):
    image = tiny.photo()
    return processor(
        images=[image], text=[f"{IMAGE_TOKEN}\n{QUESTIONS[0]}"], split=False, return_tensors="pt"
    )


def trained_adapter(model, folder, **options):
    """A LoRA adapter with random weights, saved as a trainer does; the model with it, in evaluation mode."""
    peft = pytest.importorskip("peft")
    targets = r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj"
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder)
    return adapted


def test_adapter_is_merged(tmp_path):
    model, processor = tiny_pair(trained_on_groups=False)
    base = tmp_path / "base"
    model.save_pretrained(base)
    processor.save_pretrained(base)
    model, _ = load_checkpoint(base)
    adapted = trained_adapter(
        model,
        tmp_path / "adapter",
        modules_to_save=["multi_modal_projector"],
        trainable_token_indices={"embed_tokens": model.config.separator_token_ids},
    )
    with torch.inference_mode():
        expected = adapted(**tiny_inputs(processor)).logits
        plain = load_checkpoint(base)[0](**tiny_inputs(processor)).logits
    export_checkpoint(tmp_path / "adapter", tmp_path / "out")
    merged, processor = load_checkpoint(tmp_path / "out")
    assert not merged.config.trained_on_groups
    with torch.inference_mode():
        logits = merged(**tiny_inputs(processor)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert (logits - plain).abs().max() > 0.1


def test_adapter_that_added_parts_and_rows(tmp_path):
    model, processor = tiny_pair()
    base = tmp_path / "base"
    model.save_pretrained(base)
    model = load_model(str(base))
    extend_model(model, num_prefusion_layers=1)
    processor.tokenizer.add_tokens([f"new{i}" for i in range(20)])
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    adapted = trained_adapter(
        model, tmp_path / "adapter", modules_to_save=["prefusion", "embed_tokens", "lm_head"]
    )
    processor.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="trained the module 'prefusion', which its base .* does not have"):
        export_checkpoint(tmp_path / "adapter", tmp_path / "out")
    model.config.save_pretrained(tmp_path / "adapter")
    export_checkpoint(tmp_path / "adapter", tmp_path / "out")
    merged, processor = load_checkpoint(tmp_path / "out")
    with torch.inference_mode():
        logits = [m(**tiny_inputs(processor)).logits for m in (merged, adapted)]
    assert logits[0].shape[-1] == 325
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


def test_adapter_whose_base_is_gone(tmp_path):
    model, processor = tiny_pair()
    model.save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    trained_adapter(model, tmp_path / "adapter")
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(ValueError, match="is an adapter of '.*base', which cannot be loaded"):
        export_checkpoint(tmp_path / "adapter", tmp_path / "out")


# ---- a process that has nothing of ours


def load_and_answer(job: dict) -> dict:
    """Runs in the clean process: loads each of `job["sources"]` through every Auto class and answers the chats.

    Only what it imports itself is there.
    """
    import torch
    from PIL import Image
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
        pipeline,
    )

    chats = [
        [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]
        for images, question in zip(
            [[{"type": "image", "image": Image.open(path)} for path in paths] for paths in job["images"]],
            job["questions"],
            strict=True,
        )
    ]
    report = {}
    for source in job["sources"]:
        options = {"trust_remote_code": True}
        model = AutoModelForImageTextToText.from_pretrained(source, **options)
        same = AutoModelForMultimodalLM.from_pretrained(source, **options)
        base = AutoModel.from_pretrained(source, **options)
        processor = AutoProcessor.from_pretrained(source, **options)
        image_processor = AutoImageProcessor.from_pretrained(source, **options)
        found = {
            "classes": [
                type(thing).__name__
                for thing in (
                    AutoConfig.from_pretrained(source, **options),
                    base,
                    model,
                    same,
                    processor,
                    image_processor,
                )
            ]
        }
        try:
            image_processor(chats[0][0]["content"][0]["image"], return_tensors="pt")
            found["split"] = "worked"
        except ImportError as error:
            found["split"] = str(error)
        processor.image_processor.split = False
        asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        kwargs = {"max_new_tokens": 8, "do_sample": False}
        batch = processor.apply_chat_template(chats, processor_kwargs={"padding": True}, **asked)
        found["batch"] = model.generate(**batch, **kwargs)[:, batch["input_ids"].shape[1] :].tolist()
        found["single"] = []
        for chat in chats:
            inputs = processor.apply_chat_template([chat], **asked)
            found["single"] += model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :].tolist()
        hidden = base(**batch).last_hidden_state
        found["base fits head"] = torch.equal(model.lm_head(hidden), model(**batch).logits)
        pipe = pipeline("image-text-to-text", model=source, **options)
        pipe.processor.image_processor.split = False
        answers = pipe(text=chats, return_full_text=False, generate_kwargs=kwargs)
        found["pipeline"] = [answer[0]["generated_text"] for answer in answers]
        report[source] = found
        if job["save_to"]:
            processor.image_processor.split = True
            model.save_pretrained(job["save_to"])
            processor.save_pretrained(job["save_to"])
    for snippet in job["snippets"]:
        exec(snippet, names := job.setdefault("names", {}))
    if job["snippets"]:
        report["snippets"] = names["model"].background_cache.stats()["tokens_hits"]
    return report


def run_clean(home: Path, *jobs: tuple[list[str], dict]) -> dict:
    """Reports of `load_and_answer` for jobs done in turn by a process of its own, in the folder `home`.

    Each job comes with the modules that cannot be imported while it runs.
    """
    lines = [
        "import json, sys",
        inspect.getsource(load_and_answer),
        "report = {}",
        "for blocked, job in json.loads(sys.argv[1]):",
        "    sys.modules.update(dict.fromkeys(blocked))",
        "    report |= load_and_answer(job)",
        "    for name in blocked:",
        "        del sys.modules[name]",
        "print(json.dumps(report))",
    ]
    command = [sys.executable, "-I", "-c", "\n".join(lines), json.dumps(jobs)]
    done = subprocess.run(
        command,
        cwd=home,
        env=clean_environment(home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def put_into_hub_cache(folder: Path, home: Path) -> None:
    """As a download leaves it: blobs by content, a snapshot of links to them, a ref."""
    repository = home / "huggingface" / "hub" / f"models--{REPO.replace('/', '--')}"
    snapshot, blobs, refs = (repository / name for name in (f"snapshots/{COMMIT}", "blobs", "refs"))
    for made in (snapshot, blobs, refs):
        made.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    for path in folder.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))


def answers_here(model, processor, images) -> dict:
    """What the clean process should answer, from the package's own classes."""
    report = {"batch": [], "pipeline": []}
    for paths, question in zip(images, QUESTIONS, strict=True):
        content = [{"type": "image", "image": Image.open(path)} for path in paths]
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        report["batch"].append(tokens.tolist())
        report["pipeline"].append(processor.decode(tokens, skip_special_tokens=True))
    return report


def tiny_detector(folder: Path):
    """A YOLO of a few kilobytes with random weights."""
    from backdrop.processing.detector_backdrop import ObjectDetector

    layers = {
        "nc": 2,
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], *[[-1, 1, "Conv", [8, 3, 2]]] * 4],
        "head": [[[2, 3, 4], 1, "Detect", ["nc"]]],
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(layers))
    return ObjectDetector.from_name_or_path(str(path))


@pytest.mark.parametrize("by", ["the processor", "a recipe"])
def test_a_detector_that_takes_anothers_place_is_the_one_that_is_saved(tmp_path, by):
    """Found by ablations: the folder's own weights were written again, and two other detectors scored exactly like it."""
    own = tiny_detector(tmp_path)
    if by == "a recipe":
        from backdrop.train.arguments import parse
        from backdrop.train.sft import run

        words = [
            "--model",
            str(EXAMPLE),
            "--output_dir",
            str(tmp_path / "out"),
            "--train",
            "false",
            "--use_cpu",
            "true",
        ]
        run(*parse([*words, "--bf16", "false", "--detector", str(tmp_path / "tiny.yaml")]))
    else:
        processor = BackdropProcessor.from_pretrained(EXAMPLE)
        image = Image.new("RGB", (168, 168), (9, 9, 9))
        processor.image_processor.image_groups([image])  # its own detector is loaded
        processor.image_processor.set_detector(own)
        processor.save_pretrained(tmp_path / "out")
    again = BackdropProcessor.from_pretrained(tmp_path / "out").image_processor
    found = again.load_detector()
    assert len(found.names) == 2
    assert json.loads((tmp_path / "out" / "detector.json").read_text())["architecture"]["nc"] == 2


@pytest.mark.slow
def test_clean_process_answers_the_same(tmp_path):
    require_ultralytics()
    home, folder, again = tmp_path / "home", tmp_path / "tiny", tmp_path / "again"
    home.mkdir()
    model, processor = tiny_pair(num_prefusion_layers=1)
    photo = home / "photo.png"
    tiny.photo().save(photo)
    pixels = processor.image_processor.model_images([tiny.photo(seed=1)])[0]
    mask = torch.zeros(tiny.SIDE, tiny.SIDE, dtype=torch.bool)
    mask[5:20, 30:45] = True
    groups = processor.image_processor.split_groups(pixels, mask.numpy(), margin=0)
    images = [[str(photo)], [str(home / f"group-{group.kind}.png") for group in groups]]
    for group, path in zip(groups, images[1], strict=True):
        save_group(group_to_image(group, tiny.PATCH, processor.image_processor.geometry()), path)
    processor.image_processor.set_detector(tiny_detector(tmp_path))
    export(model, processor, folder)
    processor.image_processor.split = False
    expected = answers_here(model, processor, images)

    put_into_hub_cache(folder, home)
    job = {"images": images, "questions": QUESTIONS}
    blocked = ["backdrop", "ultralytics", "peft", "trl", "datasets", "accelerate"]
    card = (folder / "README.md").read_text().replace(REPO_PLACEHOLDER, REPO)
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(snippets) == 4
    for name in ("photo.jpg", "frame-1.jpg", "frame-2.jpg"):
        tiny.photo().save(home / name)
    report = run_clean(
        home,
        (blocked, {"sources": [str(folder), REPO], "save_to": str(again), "snippets": [], **job}),
        (["backdrop"], {"sources": [str(again)], "save_to": None, "snippets": snippets, **job}),
    )

    assert report.pop("snippets") > 0
    assert set(report) == {str(folder), REPO, str(again)}
    for source, found in report.items():
        assert found["classes"] == [
            "BackdropConfig",
            "BackdropModel",
            "BackdropForConditionalGeneration",
            "BackdropForConditionalGeneration",
            "BackdropProcessor",
            "BackdropImageProcessor",
        ]
        assert found["base fits head"]
        assert found["batch"] == found["single"] == expected["batch"]
        assert found["pipeline"] == expected["pipeline"]
        if source == str(again):
            assert found["split"] == "worked"
        else:
            assert "ultralytics is not installed" in found["split"]
    first, second = contents(folder), contents(again)
    assert set(first) - set(second) == {"README.md", "LICENSE", "NOTICE", "requirements.txt"}
    differing = {name for name in second if first.get(name) != second[name]}
    assert differing <= {
        "config.json",
        "processor_config.json",
        "tokenizer_config.json",
        "generation_config.json",
    }


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("licence", ["llama2: x", "other", "no", "a\nb: c", "'\"#", "[x]"])
def test_any_text_may_stand_in_the_cards_front_matter(licence):
    figures = [Figure("made: scenes", "accuracy, 'split'", "accuracy", 0.98234)]
    card = model_card(
        tiny.backdrop_config(), "a: b", "o/base", licence, language=["en", "no"], figures=figures
    )
    found = front_matter(card)
    assert (found["license"], found["base_model"], found["language"]) == (licence, "o/base", ["en", "no"])
    (entry,) = found["model-index"]
    assert entry["name"] == "a: b" and entry["results"][0]["metrics"][0]["value"] == 98.23
    assert len(model_index_to_eval_results(found["model-index"])[1]) == 1  # as the Hub's own client reads it
    with_detector = front_matter(model_card(tiny.backdrop_config(), "a", None, licence, "yolo.pt"))
    assert with_detector["license_name"] == f"{licence}-with-agpl-3.0-detector"


def test_no_place_of_this_machine_ships(tmp_path):
    model, processor = tiny_pair()
    model.config._name_or_path = model.config.vision_config._name_or_path = "runs/v2/tower"
    processor.tokenizer.init_kwargs["name_or_path"] = "runs/v2/tower"
    export(model, processor, tmp_path / "out")
    texts = {path.name: path.read_text() for path in (tmp_path / "out").glob("*.json")}
    assert not [name for name, text in texts.items() if "runs/v2" in text or "name_or_path" in text]
    for path in EXAMPLE.glob("*.json"):
        assert "name_or_path" not in path.read_text(), path.name


def test_the_base_model_is_known_through_the_stages_before(tmp_path):
    model, processor = tiny_pair()
    export(model, processor, tmp_path / "start", base_model="owner/base")
    for name, before in (("align", "start"), ("finetune", "align")):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        note = {"stage": name, "recipe": {"model": str(tmp_path / before)}}
        (tmp_path / name / "backdrop_stage.json").write_text(json.dumps(note))
    export_checkpoint(tmp_path / "finetune", tmp_path / "out")
    assert front_matter((tmp_path / "out" / "README.md").read_text())["base_model"] == "owner/base"


def test_figures_of_a_card_are_those_that_were_measured(tmp_path):
    found = read_figures(ROOT / "docs" / "results" / "data" / "scenes-accuracy.json")
    assert [round(figure.value, 3) for figure in found if "another frame" in figure.name] == [0.980]
    summary = {
        "data": "textvqa",
        "mode": "split",
        "figures": ["accuracy"],
        "overall": {"accuracy": {"value": 0.5}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert [(f.dataset, f.value) for f in read_figures(tmp_path / "summary.json")] == [("textvqa", 0.5)]
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no figures"):
        read_figures(tmp_path / "other.json")


def test_a_sample_picture_ships_with_its_questions(tmp_path):
    picture = tmp_path / "frame.png"
    tiny.photo().save(picture)
    files = export(*tiny_pair(), tmp_path / "out", sample=picture, questions=["what: is it?"])
    card = (tmp_path / "out" / "README.md").read_text()
    (widget,) = front_matter(card)["widget"]
    assert widget == {"src": "sample.png", "text": "what: is it?"} and "sample.png" in files
    assert "![A picture and questions about it](sample.png)" in card and "- what: is it?" in card
    export(*tiny_pair(), tmp_path / "out")  # an earlier export with a picture is replaced
    assert not (tmp_path / "out" / "sample.png").exists()
    with pytest.raises(ValueError, match="belong together"):
        export(*tiny_pair(), tmp_path / "other", questions=["what?"])
