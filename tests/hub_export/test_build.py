"""New models from towers and decoders that never met: what each part computes stays, the rest is as a new model's is."""

import json
import re

import llava_layouts as layouts
import model_families as families
import pytest
import tiny
import torch
from datasets import Dataset
from paths import ROOT
from red_detector import RedDetector
from red_square import groups_of, scene
from safetensors.torch import load_file, save_file
from trainings import CPU, FEATURES

from backdrop.hub_export.build import build, save_outline
from backdrop.hub_export.checkpoint import load_checkpoint
from backdrop.hub_export.export import export
from backdrop.hub_export.tokens import SEPARATOR_WORDS
from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.train.arguments import parse
from backdrop.train.sft import run

LLAMA, CLIP = families.DECODERS[0], families.TOWERS[0]
PAGE = (ROOT / "docs/guides/build.md").read_text(encoding="utf-8")


def by_name(entries):
    return pytest.mark.parametrize("family", entries, ids=lambda family: family.name)


@by_name(families.TOWERS)
def test_a_tower_is_as_the_table_says(tmp_path, family):
    row = families.tower_row(tmp_path, family)
    assert "bit for bit" in row and "no" not in row.split("|")[4].split()
    assert row in PAGE.splitlines(), f"run tests/support/model_families.py: {row}"


@by_name(families.DECODERS)
def test_a_decoder_is_as_the_table_says(tmp_path, family):
    row = families.decoder_row(tmp_path, family)
    assert "bit for bit" in row or "refused: " in row
    assert row in PAGE.splitlines(), f"run tests/support/model_families.py: {row}"


def test_towers_and_models_that_cannot_be_parts_are_refused_by_name(tmp_path):
    families.write_decoder(tmp_path / "llama", LLAMA)
    families.write_tower(tmp_path / "clip", CLIP)
    for model_type, message in (
        ("siglip2", "'siglip2_vision_model'; groups can be encoded apart by"),  # NaFlex: any resolution
        ("swin", "'swin'; groups can be encoded apart by"),
        ("dinov3_convnext", "'dinov3_convnext'; groups can be encoded apart by"),
        ("pixtral", "'pixtral'; groups can be encoded apart by"),
    ):
        layouts.write_json(tmp_path / model_type / "config.json", {"model_type": model_type})
        with pytest.raises(ValueError, match=message):
            build(tmp_path / model_type, tmp_path / "llama")
    for model_type, message in (
        ("gemma3", "is a 'gemma3' model with a vision_config; wanted a language model that reads text alone"),
        ("t5", "is a 't5' model; wanted a language model"),
        ("mystery", "is of model type 'mystery'; wanted one that transformers knows"),
    ):
        layouts.write_json(tmp_path / model_type / "config.json", {"model_type": model_type})
        tiny.tokenizer().save_pretrained(tmp_path / model_type)
        with pytest.raises(ValueError, match=message):
            build(tmp_path / "clip", tmp_path / model_type)


def test_missing_and_left_over_weights_are_named(tmp_path):
    families.write_decoder(tmp_path / "llama", LLAMA)
    families.write_tower(tmp_path / "clip", CLIP)
    path = tmp_path / "llama" / "model.safetensors"
    state = load_file(path)
    save_file({**state, "model.layers.0.extra": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 left over \(model\.layers\.0\.extra\)"):
        build(tmp_path / "clip", tmp_path / "llama")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        build(tmp_path / "clip", tmp_path / "llama")


def test_the_parts_are_the_models_own_and_not_copied(tmp_path, monkeypatch):
    from backdrop.hub_export import build as module

    seen = []
    join = module.join
    monkeypatch.setattr(module, "join", lambda *parts, **more: seen.extend(parts) or join(*parts, **more))
    _, _, model, _ = families.built(tmp_path, CLIP, LLAMA)
    tower, language, projector = seen
    assert projector is None
    assert model.model.vision_tower is tower and model.model.language_model is language.base_model
    assert model.lm_head is language.get_output_embeddings()


def test_the_projector_is_new_and_the_same_for_a_seed(tmp_path):
    *_, first, _ = families.built(tmp_path / "a", CLIP, LLAMA)
    torch.rand(3)
    *_, same, _ = families.built(tmp_path / "b", CLIP, LLAMA)
    *_, other, _ = families.built(tmp_path / "c", CLIP, LLAMA, seed=1)
    one, two, three = (m.model.multi_modal_projector.linear_1.weight for m in (first, same, other))
    assert torch.equal(one, two) and not torch.equal(one, three) and 0.01 < one.std() < 0.03


def test_the_prompt_is_the_language_models_own_with_images_and_separators_in_it(tmp_path):
    _, stock, model, processor = families.built(tmp_path, CLIP, LLAMA)
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\n"
    processor.image_processor.set_detector(RedDetector())
    inputs = processor(images=[scene(14, 14)], text=prompt, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert all(token_id in ids for token_id in model.config.separator_token_ids)
    table = model.get_input_embeddings().weight
    for (_, words), token_id in zip(SEPARATOR_WORDS.items(), model.config.separator_token_ids, strict=True):
        rows = processor.tokenizer(words, add_special_tokens=False).input_ids
        torch.testing.assert_close(table[token_id], stock.get_input_embeddings().weight[rows].mean(0))
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_a_language_model_without_a_template_gets_llavas(tmp_path):
    families.write_tower(tmp_path / "clip", CLIP)
    families.write_decoder(tmp_path / "llama", LLAMA, template=None)
    _, processor = build(tmp_path / "clip", tmp_path / "llama")
    assert "'USER'" in processor.chat_template


def test_a_template_whose_answers_cannot_be_told_is_warned_of(tmp_path, caplog):
    families.write_tower(tmp_path / "clip", CLIP)
    plain = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    )
    families.write_decoder(tmp_path / "llama", LLAMA, template=plain)
    build(tmp_path / "clip", tmp_path / "llama")
    assert "assistant_only_loss is off for this model" in caplog.text


def test_dinov3s_positions_do_not_move_in_training(tmp_path):
    dinov3 = families.TOWERS[-1]
    torch.manual_seed(0)
    tower = families.write_tower(tmp_path / "tower", dinov3)
    config = json.loads((tmp_path / "tower" / "config.json").read_text())
    layouts.write_json(
        tmp_path / "tower" / "config.json", {**config, "pos_embed_rescale": 2.0, "pos_embed_jitter": 1.1}
    )
    families.write_decoder(tmp_path / "llama", LLAMA)
    model, _ = build(tmp_path / "tower", tmp_path / "llama")
    assert families.same_features(tower, model)
    assert families.same_features(tower, model.train())


def test_a_side_smaller_than_a_patch_and_one_that_a_tower_has_not_are_refused(tmp_path):
    families.write_decoder(tmp_path / "llama", LLAMA)
    families.write_tower(tmp_path / "clip", CLIP)
    with pytest.raises(
        ValueError, match="Images would be 84 x 84, but a 'clip_vision_model' tower has one resolution, 56"
    ):
        build(tmp_path / "clip", tmp_path / "llama", image_side=84)
    families.write_tower(tmp_path / "dino", families.TOWERS[2])
    with pytest.raises(ValueError, match="image_side is 7; wanted at least one patch, 14 pixels"):
        build(tmp_path / "dino", tmp_path / "llama", image_side=7)


@by_name([CLIP, families.TOWERS[2], families.TOWERS[-1]])
def test_an_exported_build_loads_again_bit_for_bit(tmp_path, family):
    _, _, model, processor = families.built(tmp_path, family, families.DECODERS[4])
    export(model, processor, tmp_path / "out")
    again = BackdropForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert families.same_features(model.model.vision_tower, again)
    assert BackdropProcessor.from_pretrained(tmp_path / "out").chat_template == processor.chat_template


def rows_for(processor, folder):
    examples = [
        {
            "images": groups_of(processor.image_processor, scene(14 * (i % 4), 14)),
            "messages": [
                {"role": "user", "content": "what is shown?"},
                {"role": "assistant", "content": ["a red bus", "a bus"][i % 2]},
            ],
        }
        for i in range(8)
    ]
    Dataset.from_list(examples, features=FEATURES).save_to_disk(folder)


def test_from_a_build_through_both_stages_of_the_small_chain(tmp_path):
    """The shipped recipes, one after the other, from what `build` wrote; the merged model holds what was trained."""
    _, _, model, processor = families.built(tmp_path, families.TOWERS[1], families.DECODERS[4])
    processor.image_processor.set_detector(RedDetector())
    export(model, processor, tmp_path / "small")
    rows_for(processor, tmp_path / "rows")
    for recipe, start, out in (("small_align", "small", "aligned"), ("small_lora", "aligned", "lora")):
        words = [
            "--config",
            recipe,
            "--model",
            tmp_path / start,
            "--output_dir",
            tmp_path / out,
            "--max_steps",
            2,
        ]
        words += ["--dataset", tmp_path / "rows", "--dataset_name", "rows", "--dtype", "float32", *CPU]
        words += [
            "--save_strategy",
            "no",
            "--per_device_train_batch_size",
            2,
            "--gradient_accumulation_steps",
            1,
        ]
        run(*parse([str(word) for word in words]))
    aligned, _ = load_checkpoint(tmp_path / "aligned")
    merged, _ = load_checkpoint(tmp_path / "lora")

    def moved(one, two, part):
        before, after = (dict(m.named_parameters()) for m in (one, two))
        return {n for n in after if part in n and not torch.equal(before[n], after[n])}

    assert moved(model, aligned, "multi_modal_projector") and not moved(
        model, aligned, "language_model.layers"
    )
    assert moved(aligned, merged, "language_model.layers.0.self_attn.q_proj")
    assert not moved(model, merged, "vision_tower")


# Published configurations; the vocabulary is the tiny tokenizer's neighbour's.
SIGLIP2_BASE_384 = {
    "model_type": "siglip",
    "architectures": ["SiglipModel"],
    "vision_config": {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 16},
    "text_config": {"model_type": "siglip_text_model", "vocab_size": 256000},
}
QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 28,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "dtype": "bfloat16",
}


def write_outline(folder):
    """SigLIP 2 base at 384 px and Qwen3-1.7B, of which nothing but configurations and a tokenizer is there."""
    layouts.write_json(folder / "siglip2" / "config.json", SIGLIP2_BASE_384)
    square = {"height": 384, "width": 384}
    layouts.SiglipImageProcessorPil(size=square).save_pretrained(folder / "siglip2")
    layouts.write_json(folder / "qwen3" / "config.json", QWEN3)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = families.CHATML
    tokenizer.save_pretrained(folder / "qwen3")
    model, processor = build(folder / "siglip2", folder / "qwen3", weights=False)
    return model, processor, save_outline(model, processor, folder / "small")


@pytest.mark.slow
def test_without_weights_the_small_chain_is_tried_in_a_dry_run_and_fits_24_gb(tmp_path, capsys):
    model, processor, files = write_outline(tmp_path)
    assert not [name for name in files if name.endswith((".safetensors", ".bin"))]
    assert 1.8e9 < model.num_parameters() < 2.0e9 and model.config.num_patches == 576
    messages = [
        {
            "role": "user",
            "content": "what is shown? " * 242,
        },  # 2,048 tokens, as in LLaVA, with the 576 of the image
        {"role": "assistant", "content": "a bus"},
    ]
    Dataset.from_list([{"images": [scene(14, 14)], "messages": messages}], features=FEATURES).save_to_disk(
        tmp_path / "rows"
    )
    for recipe in ("small_align", "small_lora"):
        words = [
            "--config",
            recipe,
            "--model",
            tmp_path / "small",
            "--output_dir",
            tmp_path / "out",
            "--dry_run",
            "true",
        ]
        words += [
            "--dataset",
            tmp_path / "rows",
            "--dataset_name",
            "rows",
            "--dry_run_device",
            "cuda",
            "--use_cpu",
            "true",
        ]
        words += ["--split", "false"]  # there is no detector here
        if recipe == "small_lora":
            layouts.write_json(tmp_path / "small" / "backdrop_stage.json", {"stage": "small_align"})
        run(*parse([str(word) for word in words]))
        printed = capsys.readouterr().out
        peak = float(re.search(r"total\s*│\s*([\d.]+)", printed)[1])
        assert 3 < peak < 22, printed


def test_an_outline_is_what_the_weights_would_be(tmp_path):
    *_, model, processor = families.built(tmp_path, families.TOWERS[2], LLAMA)
    outline, bare = build(tmp_path / "tower", tmp_path / "decoder", weights=False)
    assert {n: v.shape for n, v in outline.state_dict().items()} == {
        n: v.shape for n, v in model.state_dict().items()
    }
    save_outline(outline, bare, tmp_path / "outline")
    config = BackdropConfig.from_pretrained(tmp_path / "outline")
    assert config.vision_config.image_size == model.config.vision_config.image_size == tiny.SIDE
    assert config.separator_token_ids == model.config.separator_token_ids
    assert bare.chat_template == processor.chat_template
    with pytest.raises(ValueError, match="is not empty; wanted a new folder"):
        save_outline(outline, bare, tmp_path / "outline")
