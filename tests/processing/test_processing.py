"""Images of every kind to groups, and groups to prompts."""

import base64
import copy
import http.server
import io
import pickle
import sys
import threading

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from red_detector import RedDetector
from red_square import groups_of, scene
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import BACKGROUND, OBJECT, save_group
from backdrop.processing.processing_backdrop import SEPARATOR_TOKENS, BackdropProcessor

SIZES = {"size": {"shortest_edge": tiny.SIDE}, "crop_size": {"height": tiny.SIDE, "width": tiny.SIDE}}


# ---- geometry


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_pad": True, "size": {"height": 56, "width": 56}},
        {"do_center_crop": False, "size": {"height": 56, "width": 56}},
        {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(80, 60), (56, 56), (30, 200), (1, 1), (1, 600), (601, 1)])
def test_pixels_equal_transformers_llava_processor(size, options):
    image = tiny.photo(*size)
    ours = BackdropImageProcessor(**{**SIZES, **options}, split=False)(image, return_tensors="pt")
    theirs = LlavaImageProcessorPil(**{**SIZES, **options})(image, return_tensors="pt")
    difference = (ours["pixel_values"] - theirs["pixel_values"]).abs().max()
    # The short cut for extreme shapes may round differently, by a few of 255 grey levels.
    extreme = max(size) > 16 * min(size) and not options.get("do_pad") and "do_center_crop" not in options
    assert difference == 0 or (extreme and difference < 0.06)


MODES = ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBA", "I;16", "I", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(image_processor, mode):
    grey = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1)))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray(
            np.asarray(grey).astype("int32" if mode == "I" else "float32") * (257 if mode == "I" else 1)
        )
    else:
        image = (
            grey.convert("RGB").convert({"LA": "L", "PA": "P", "LAB": "RGB"}.get(mode, mode))
            if mode != "LAB"
            else grey.convert("RGB")
        )
        if mode in ("LA", "PA"):
            image = image.convert("RGBA").convert(mode) if mode == "LA" else image.convert("PA")
    pixels = image_processor.model_images([image])[0]
    assert pixels.shape == (56, 56, 3) and pixels.dtype == np.uint8
    if mode not in ("1", "P", "PA", "F"):
        assert abs(int(pixels[28, 40, 0]) - int(np.asarray(grey.resize((56, 56), 3))[28, 40])) < 12


def test_transparency_is_laid_on_white(image_processor):
    clear = Image.new("RGBA", (56, 56), (255, 0, 0, 0))
    assert (image_processor.model_images([clear])[0] == 255).all()
    palette = Image.new("P", (56, 56), 0)
    palette.info["transparency"] = 0
    assert (image_processor.model_images([palette])[0] == 255).all()


def test_exif_rotation_is_applied(image_processor, tmp_path):
    image = tiny.photo(80, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "r.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    expected = image_processor.model_images([upright])[0]
    assert np.array_equal(image_processor.model_images([str(tmp_path / "r.png")])[0], expected)
    assert np.array_equal(image_processor.model_images([Image.open(tmp_path / "r.png")])[0], expected)


def test_arrays_and_tensors_equal_the_pil_image(image_processor):
    image = tiny.photo()
    expected = image_processor(image, return_tensors="pt")["pixel_values"]
    array = np.asarray(image)
    for same in (
        array,
        array.transpose(2, 0, 1).copy(),
        array.astype(np.float32) / 255,
        array.astype(np.int64),
        torch.from_numpy(array.transpose(2, 0, 1).copy()),
        torch.from_numpy(array.transpose(2, 0, 1).copy()).float() / 255,
    ):
        assert torch.equal(image_processor(same, return_tensors="pt")["pixel_values"], expected)
    grey = image_processor(Image.fromarray(array[..., 0]), return_tensors="pt")["pixel_values"]
    assert torch.equal(image_processor(array[..., :1], return_tensors="pt")["pixel_values"], grey)


def test_a_hundred_megapixels_and_a_pixel_wide(image_processor):
    big = Image.new("RGB", (10_000, 10_000), (10, 20, 30))
    thin = Image.new("RGB", (1, 200_000), (10, 20, 30))
    for image in (big, thin):
        assert (image_processor.model_images([image])[0] == (10, 20, 30)).all()


def test_paths_urls_and_base64_keep_a_groups_alpha(image_processor, tmp_path):
    group = groups_of(image_processor, scene(14, 14))[0]
    save_group(group, tmp_path / "g.png")
    data = (tmp_path / "g.png").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/g.png" else 404)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    expected = image_processor(group, return_tensors="pt")
    coded = base64.b64encode(data).decode()
    for source in (str(tmp_path / "g.png"), url + "/g.png", coded, "data:image/png;base64," + coded):
        found = image_processor(source, return_tensors="pt")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="cannot be fetched"):
        image_processor(url + "/missing.png")
    server.shutdown()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no/such/file.png", "Incorrect image source 'no/such/file.png'"),
        (np.zeros((10, 10, 2), dtype=np.uint8), r"shape \(10, 10, 2\); wanted 1, 3 or 4 channels"),
        (np.full((10, 10, 3), 300, dtype=np.int32), "values from 300 to 300; wanted"),
        (np.full((10, 10, 3), np.nan), "not finite"),
        (np.full((10, 10, 3), -1.0), "values from -1 to -1"),
    ],
    ids=range(5),
)
def test_bad_images_are_named(image_processor, image, message):
    with pytest.raises(ValueError, match=message):
        image_processor(image)


def test_a_truncated_file_is_named(image_processor, tmp_path):
    buffer = io.BytesIO()
    tiny.photo(300, 300).save(buffer, format="JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:500])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.jpg", "text.png"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read"):
            image_processor(str(tmp_path / name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 1.5}, "confidence is 1.5"),
        ({"objects": "some"}, "objects is 'some'"),
        ({"margin": -1}, "margin is -1"),
        ({"min_coverage": 2.0}, "min_coverage is 2.0"),
    ],
)
def test_bad_options_are_named_at_construction_and_at_the_call(image_processor, options, message):
    with pytest.raises(ValueError, match=message):
        BackdropImageProcessor(**SIZES, **options)
    with pytest.raises(ValueError, match=message):
        image_processor(scene(), **options)


# ---- splitting


def test_a_red_square_becomes_the_object_group(image_processor):
    background, objects = image_processor.image_groups([scene(14, 28)])[0]
    assert (background.kind, objects.kind) == (BACKGROUND, OBJECT)
    assert np.flatnonzero(objects.patch_mask).tolist() == [9]
    assert np.array_equal(background.patch_mask, ~objects.patch_mask)
    assert not background.pixels[28:42, 14:28].any() and (objects.pixels[28:42, 14:28] == (255, 0, 0)).all()


def test_margin_overlap_and_whole_images(image_processor):
    options = {"margin": 1, "overlap": True}
    background, objects = image_processor.image_groups([scene(14, 14)], **options)[0]
    assert objects.patch_mask.sum() == 9 and background.patch_mask.sum() == 15
    (whole,) = image_processor.image_groups([scene(14, 14)], split=False)[0]
    assert whole.kind == BACKGROUND and whole.patch_mask.all()


def test_nothing_found_is_one_background_and_everything_one_object(image_processor):
    (nothing,) = image_processor.image_groups([scene(width=0)])[0]
    assert nothing.kind == BACKGROUND and nothing.patch_mask.all()
    (everything,) = image_processor.image_groups([scene(width=56)])[0]
    assert everything.kind == OBJECT and everything.patch_mask.all()


def test_a_batch_runs_the_detector_once_and_equals_single_images(image_processor, detector):
    images = [scene(0, 0), scene(width=0), scene(28, 14)]
    together = image_processor(images, return_tensors="pt")
    assert detector.calls == 3
    assert together["groups_per_image"].tolist() == [2, 1, 2]
    singles = [image_processor(image, return_tensors="pt") for image in images]
    for name in ("pixel_values", "patch_mask", "group_kind"):
        assert torch.equal(together[name], torch.cat([single[name] for single in singles]))


def test_without_a_detector_an_image_is_an_error_and_a_group_is_not(image_processor):
    bare = BackdropImageProcessor(**SIZES)
    with pytest.raises(ValueError, match="holds no detector.safetensors"):
        bare(scene())
    group = groups_of(image_processor, scene())[0]
    assert bare(group, return_tensors="pt")["pixel_values"].shape[0] == 1
    assert bare(scene(), split=False, return_tensors="pt")["patch_mask"].all()


def test_inside_vllm_an_ordinary_image_is_one_group(processor, monkeypatch):
    text = "<image>\nwhat is shown?"
    assert len(processor(scene(), text, return_tensors="pt")["group_kind"]) == 2
    monkeypatch.setitem(sys.modules, "vllm", object())
    assert processor(scene(), text, return_tensors="pt")["group_kind"].tolist() == [BACKGROUND]
    assert len(processor(scene(), text, split=True, return_tensors="pt")["group_kind"]) == 2
    groups = groups_of(processor.image_processor, scene())  # taken as they stand
    assert processor(groups, "<image><image>", return_tensors="pt")["group_kind"].tolist() == [
        BACKGROUND,
        OBJECT,
    ]
    assert "pixel_values" not in processor(text="what is shown?")


# ---- contract 1: an image and its own groups are the same thing


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 42), st.integers(0, 42), st.integers(0, 30))
def test_an_image_and_its_groups_give_identical_inputs(x, y, width):
    processor = BackdropImageProcessor(**SIZES, margin=0)
    processor.set_detector(RedDetector())
    image = scene(x, y, width)
    groups = groups_of(processor, image)
    ordinary, ready = processor(image, return_tensors="pt"), processor(groups, return_tensors="pt")
    for name in ("pixel_values", "patch_mask", "group_kind"):
        assert torch.equal(ordinary[name], ready[name])


def test_through_processor_template_and_collator_too(processor):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    image = scene(14, 14)
    groups = groups_of(processor.image_processor, image)

    def messages(images):
        user = [{"type": "image", "image": i} for i in images] + [{"type": "text", "text": "what?"}]
        return [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": "a bus"}]},
        ]

    def templated(images):
        return processor.apply_chat_template(
            messages(images), tokenize=True, return_dict=True, return_tensors="pt"
        )

    def collated(images):
        collator = DataCollatorForVisionLanguageModeling(processor)
        plain = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a bus"}]
        return collator([{"images": images, "messages": plain}])

    def called(images):
        text = "USER: " + "<image>" * len(images) + "\nwhat? ASSISTANT:"
        return processor(images=images, text=text, return_tensors="pt")

    for make in (templated, collated, called):
        ordinary, ready = make([image]), make(groups)
        assert ordinary.keys() == ready.keys()
        for name in ordinary:
            assert torch.equal(torch.as_tensor(ordinary[name]), torch.as_tensor(ready[name])), (
                make.__name__,
                name,
            )
    collated_labels = collated([image])["labels"]
    assert (collated_labels == -100).sum() == 0 or (collated_labels != -100).any()


# ---- prompts


def test_a_placeholder_expands_to_exactly_the_groups_there_are(processor):
    def text_of(image):
        ids = processor(images=image, text="<image> is", return_tensors="pt")["input_ids"][0]
        return processor.tokenizer.decode(ids)

    assert text_of(scene(0, 0)) == f"[BG_START]{'<image>' * 15}[BG_END][OBJ_START]<image>[OBJ_END] is"
    assert text_of(scene(width=0)) == f"[BG_START]{'<image>' * 16}[BG_END] is"
    assert text_of(scene(width=56)) == f"[OBJ_START]{'<image>' * 16}[OBJ_END] is"


def test_batches_with_different_images_and_text_only_prompts(processor):
    texts = ["<image><image> two", "none", "<image> one"]
    out = processor(
        images=[[scene(0, 0), scene(14, 0)], [], [scene(width=0)]],
        text=texts,
        padding=True,
        return_tensors="pt",
    )
    assert out["pixel_values"].shape[0] == 5
    counts = (out["input_ids"] == processor.image_token_id).sum(-1)
    assert counts.tolist() == [32, 0, 16]
    assert (out["attention_mask"].sum(-1) < out["input_ids"].shape[1]).any()
    assert "pixel_values" not in processor(text="hello", return_tensors="pt")


@pytest.mark.parametrize(
    ("text", "images"), [("<image><image>", 1), ("no placeholder", 1), ("<image>", 2), ("<image>", 0)]
)
def test_placeholders_and_images_must_agree(processor, text, images):
    with pytest.raises(ValueError, match="<image>"):
        processor(images=[scene()] * images if images else None, text=text)


def test_the_template_is_llavas_with_bos_and_marks(processor):
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "what?"}, {"type": "image"}, {"type": "image"}],
        },
        {"role": "assistant", "content": "a bus"},
        {"role": "user", "content": "and now?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<s>USER: <image><image>\nwhat? ASSISTANT: a bus</s>USER: and now? ASSISTANT:"
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert processor.apply_chat_template(messages[:2]).startswith(prompt)


def test_assistant_marks_lie_on_the_answer_and_its_end(processor):
    from transformers.processing_utils import ProcessorMixin

    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": scene(0, 0)}, {"type": "text", "text": "what?"}],
        },
        {"role": "assistant", "content": "a bus"},
    ]
    arguments = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    if not hasattr(ProcessorMixin, "_adjust_assistant_masks_indices"):
        with pytest.raises(ValueError, match="assistant masks at wrong tokens"):
            processor.apply_chat_template(messages, **arguments)
        return
    out = processor.apply_chat_template(messages, return_tensors="pt", **arguments)
    marked = out["input_ids"][0][torch.as_tensor(out["assistant_masks"][0]).bool()]
    assert processor.tokenizer.decode(marked) == " a bus</s>"


def test_separators_are_special_tokens_of_the_saved_tokenizer(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = BackdropProcessor.from_pretrained(tmp_path)
    for token in ("<image>", *SEPARATOR_TOKENS):
        token_id = again.tokenizer.convert_tokens_to_ids(token)
        assert again.tokenizer.tokenize(f"a{token}b")[1] == token
        assert again.tokenizer.decode([token_id], skip_special_tokens=True) == ""
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.chat_template == processor.chat_template


def test_a_tokenizer_without_the_tokens_is_refused(image_processor):
    with pytest.raises(ValueError, match="no token '<image>'"):
        BackdropProcessor(image_processor, tiny.tokenizer())
    tokenizer = tiny.tokenizer()
    BackdropProcessor.add_tokens(tokenizer, use_separators=False)
    with pytest.raises(ValueError, match=r"no token '\[BG_START\]'"):
        BackdropProcessor(image_processor, tokenizer)
    assert BackdropProcessor(image_processor, tokenizer, use_separators=False).separator_token_ids is None


def test_copies_and_pickles_leave_the_live_parts_behind(processor):
    processor.enable_background_matching()
    repr(processor)
    for twin in (
        copy.deepcopy(processor.image_processor),
        pickle.loads(pickle.dumps(processor.image_processor)),
    ):
        assert twin.background_matching is None
        assert twin.to_dict() == processor.image_processor.to_dict()


def test_objects_first_turns_the_groups_around(processor):
    image = scene(14, 14)
    one, two = (
        processor(images=[image], text=["<image>"], return_tensors="pt", background_first=first)
        for first in (True, False)
    )
    assert one["group_kind"].tolist() == [0, 1] and two["group_kind"].tolist() == [1, 0]
    assert torch.equal(one["pixel_values"], two["pixel_values"].flip(0))
    text = processor.tokenizer.decode(two["input_ids"][0])
    assert text.index("[OBJ_START]") < text.index("[BG_START]")
