"""The small model before its finetuning: a tokenizer, the pretrained tower, a language model, a detector.

    backdrop scenes base-model --tower runs/tower/vision_tower --detector runs/scene_detector/detector.pt --out runs/scene_base

The language model is fresh and small, or, with `--language-model`, a pretrained Llama with its own tokenizer: a folder or
a GGUF file, such as SmolLM2-135M-Instruct's.
"""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from backdrop.hub_export.chat_template import chat_template
from backdrop.hub_export.tokens import SEPARATOR_WORDS, prepare_tokens
from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.detector_backdrop import ObjectDetector
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.processing_backdrop import BackdropProcessor

from .world import sample_scenes


def scene_tokenizer(num_scenes: int = 400, seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a question is a few words, while digits and capitals stay single, as they are seen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]| ?[A-Z](?![a-z])"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    questions = (
        question for scene in sample_scenes("train", num_scenes, seed) for question in scene.questions
    )
    corpus = [f"\n{q.question} {q.question} {q.answer}" for q in questions] + list(SEPARATOR_WORDS.values())
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(["USER:", "ASSISTANT:"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def load_language_model(source: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A pretrained Llama in fp32 and its tokenizer, from a folder or a GGUF file (needs `gguf`)."""
    where: dict[str, str | Path] = {"pretrained_model_name_or_path": source}
    if source.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = LlamaForCausalLM.from_pretrained(**where, dtype=torch.float32)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model, tokenizer


def build(
    vision: CLIPVisionModel, detector: ObjectDetector, seed: int = 0, language_model: Path | None = None
) -> tuple[BackdropForConditionalGeneration, BackdropProcessor]:
    """Model and processor; without `language_model` a Llama of 4 layers of width 192, from scratch."""
    torch.manual_seed(seed)
    side, patch_size = vision.config.image_size, vision.config.patch_size
    if language_model is None:
        pretrained, tokenizer = None, scene_tokenizer(seed=seed)
        BackdropProcessor.add_tokens(tokenizer)
        text_config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    else:
        pretrained, tokenizer = load_language_model(language_model)
        # As plain values: a GGUF file leaves its quantisation in the configuration.
        text_config = LlamaConfig.from_dict(
            {k: v for k, v in pretrained.config.to_dict().items() if k != "quantization_config"}
        )
    config = BackdropConfig(
        vision_config=vision.config,
        text_config=text_config,
        # Only until `prepare_tokens` has given the placeholder its row.
        image_token_id=tokenizer.convert_tokens_to_ids("<image>") if pretrained is None else 0,
        vision_feature_layer=-1,
    )
    model = BackdropForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    if pretrained is not None:
        model.model.language_model.load_state_dict(pretrained.model.state_dict())
        model.lm_head.load_state_dict(pretrained.lm_head.state_dict())
    prepare_tokens(model, tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.max_new_tokens = 16
    size = {"height": side, "width": side}
    image_processor = BackdropImageProcessor(
        size={"shortest_edge": side}, crop_size=size, patch_size=patch_size
    )
    image_processor.set_detector(detector)
    processor = BackdropProcessor(image_processor, tokenizer, chat_template=chat_template(system_prompt=""))
    return model, processor


def make_base(
    out: Path,
    *,
    tower: Path | None = None,
    tower_of: Path | None = None,
    detector: Path | None = None,
    detector_of: Path | None = None,
    language_model: Path | None = None,
    seed: int = 0,
) -> tuple[BackdropForConditionalGeneration, BackdropProcessor]:
    """Builds the model and writes its folder.

    Args:
        tower, tower_of: folder of the pretrained CLIPVisionModel, or a model folder whose tower is taken.
        detector, detector_of: an ultralytics checkpoint (.pt), or a model folder whose detector is taken.
        language_model: see `build`.

    Raises:
        ValueError: both or neither of a pair were given.
    """
    for name, pair in (("tower", (tower, tower_of)), ("detector", (detector, detector_of))):
        if (pair[0] is None) == (pair[1] is None):
            raise ValueError(f"Wanted either --{name} or --{name}-of, and not both.")
    if detector is not None:
        found = ObjectDetector.from_name_or_path(str(detector))
    else:
        found = ObjectDetector.from_folder(str(detector_of))
    if tower is not None:
        vision = CLIPVisionModel.from_pretrained(tower)
    else:
        vision = BackdropForConditionalGeneration.from_pretrained(tower_of).model.vision_tower
    model, processor = build(vision, found, seed, language_model)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return model, processor
