"""Makes the model and the processor of a recipe: loads weights (whole or in 8 or 4 bits), adds parts, sets switches.

The same steps run on the meta device first, so that a recipe that does not fit its model fails before a weight is
read, and a dry run needs no memory.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
from trl import ModelConfig

from backdrop.hub_export.chat_template import chat_template
from backdrop.hub_export.checkpoint import load_checkpoint
from backdrop.hub_export.extend import extend_model
from backdrop.hub_export.source_template import is_vicuna, with_image_position
from backdrop.hub_export.tokens import prepare_tokens
from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.detector_choice_backdrop import load_detector
from backdrop.processing.processing_backdrop import BackdropProcessor

SEPARATORS = ("keep", "meaning", "random", "none")
IMAGE_POSITIONS = ("first", "in_place")
# What is not quantised: everything but the linear layers inside the language model's layers.
# transformers matches these as regular expressions from the start of a module's full name.
NOT_QUANTIZED = [r".*vision_tower", r".*multi_modal_projector", r".*prefusion", r".*lm_head"]


@dataclass(kw_only=True)
class ModelArguments:
    """What a recipe does to the model that it starts from. A switch left out stays as the model has it."""

    model: str = field(
        metadata={"help": "Folder of a Backdrop model (from convert, export or an earlier stage), or Hub id."}
    )
    split: bool | None = field(
        default=None,
        metadata={"help": "Split images into background and objects; false: one group, as in LLaVA."},
    )
    separators: str = field(
        default="keep",
        metadata={
            "help": "Separator tokens: keep them, have none, or initialise them by meaning or at random.",
            "choices": list(SEPARATORS),
        },
    )
    num_prefusion_layers: int = field(
        default=0, metadata={"help": "Give a model without prefusion layers so many."}
    )
    separate_vision_towers: bool = field(
        default=False, metadata={"help": "Give object groups a tower of their own."}
    )
    separate_projectors: bool = field(
        default=False, metadata={"help": "Give object groups a projector of their own."}
    )
    margin: int | None = field(
        default=None, metadata={"help": "Patches by which the object region grows when an image is split."}
    )
    detector: str | None = field(
        default=None,
        metadata={
            "help": "Name or path of a detector (ultralytics or transformers) that replaces the model's."
        },
    )
    background_first: bool | None = field(
        default=None, metadata={"help": "False: the object group before the background (for ablations)."}
    )
    masked_attention: bool | None = field(
        default=None,
        metadata={"help": "False: the tower sees patches of other groups as black (for ablations)."},
    )
    raster_order: bool | None = field(
        default=None,
        metadata={"help": "True: groups are encoded apart, but their tokens keep the grid's order (ladder)."},
    )
    image_position: str | None = field(
        default=None,
        metadata={
            "help": "Images before the text of a message (first), or where the message has them (in_place).",
            "choices": list(IMAGE_POSITIONS),
        },
    )
    int8_threshold: float = field(
        default=6.0, metadata={"help": "Outlier threshold of load_in_8bit; 0: outliers are not kept apart."}
    )

    def __post_init__(self) -> None:
        # A recipe's values are argparse's defaults, which it does not check against `choices`.
        for options, name in ((SEPARATORS, "separators"), (IMAGE_POSITIONS, "image_position")):
            value = getattr(self, name)
            if value is not None and value not in options:
                raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(options)}.")


def build_config(arguments: ModelArguments) -> BackdropConfig:
    """The configuration of the model that the recipe starts from, the recipe's switches set."""
    config = BackdropConfig.from_pretrained(arguments.model)
    if arguments.separators == "none":
        config.separator_token_ids = None
    for name in ("masked_attention", "raster_order"):
        if getattr(arguments, name) is not None:
            setattr(config, name, getattr(arguments, name))
    config.check_fields()
    return config


def outline(
    arguments: ModelArguments, attn_implementation: str | None = None, dtype: torch.dtype = torch.float32
) -> BackdropForConditionalGeneration:
    """The recipe's model on the meta device, without weights."""
    with torch.device("meta"):
        model = BackdropForConditionalGeneration._from_config(
            build_config(arguments), attn_implementation=attn_implementation, dtype=dtype
        )
        _extend(model, arguments)
        if arguments.separators in ("meaning", "random"):
            rows = len(_tokenizer_with_separators(arguments))
            if rows > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def assemble(
    arguments: ModelArguments, options: ModelConfig
) -> tuple[BackdropForConditionalGeneration, BackdropProcessor]:
    """The recipe's model with its weights, and its processor."""
    processor = build_processor(arguments)
    if Path(arguments.model, "adapter_config.json").is_file():
        model = _merged(arguments, options)
    else:
        model = BackdropForConditionalGeneration.from_pretrained(
            arguments.model,
            config=build_config(arguments),
            dtype=options.dtype or "auto",
            attn_implementation=options.attn_implementation,
            quantization_config=quantization(arguments, options),
        )
    _extend(model, arguments)
    if arguments.separators in ("meaning", "random"):
        prepare_tokens(model, processor.tokenizer, meaning=arguments.separators == "meaning")
        processor.separator_token_ids = model.config.separator_token_ids
    return model, processor


def build_processor(arguments: ModelArguments) -> BackdropProcessor:
    """The processor of the model that the recipe starts from, the recipe's switches set."""
    processor = BackdropProcessor.from_pretrained(arguments.model)
    _set_up(processor, arguments)
    return processor


def _merged(arguments: ModelArguments, options: ModelConfig) -> BackdropForConditionalGeneration:
    """A LoRA stage's checkpoint, its adapter merged into the base model."""
    if options.load_in_4bit or options.load_in_8bit:
        raise ValueError(
            f"model is {arguments.model!r}, an adapter, which cannot be merged into a quantised base; wanted the "
            "merged model (backdrop export)."
        )
    model, _ = load_checkpoint(arguments.model)
    if options.dtype not in (None, "auto"):
        model = model.to(getattr(torch, options.dtype))
    if options.attn_implementation is not None:
        model.set_attn_implementation(options.attn_implementation)
    wanted = build_config(arguments)
    for name in ("separator_token_ids", "masked_attention", "raster_order"):
        setattr(model.config, name, getattr(wanted, name))
    return model


def quantization(arguments: ModelArguments, options: ModelConfig) -> BitsAndBytesConfig | None:
    """The quantisation that `load_in_4bit` or `load_in_8bit` asks for: of the language model's layers, nothing else.

    Dettmers et al. 2022 (LLM.int8(), outlier threshold 6) and 2023 (QLoRA, NF4).
    """
    if options.load_in_4bit and options.load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are both true; wanted one of them.")
    if options.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=options.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=None if options.dtype in (None, "auto") else options.dtype,
            llm_int8_skip_modules=NOT_QUANTIZED,
        )
    if options.load_in_8bit:
        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=float(arguments.int8_threshold),  # YAML has whole numbers
            llm_int8_skip_modules=NOT_QUANTIZED,
        )
    return None


def _extend(model: BackdropForConditionalGeneration, arguments: ModelArguments) -> None:
    extend_model(
        model,
        num_prefusion_layers=arguments.num_prefusion_layers,
        separate_vision_towers=arguments.separate_vision_towers,
        separate_projectors=arguments.separate_projectors,
    )


def _set_up(processor: BackdropProcessor, arguments: ModelArguments) -> None:
    images = processor.image_processor
    for name in ("split", "margin", "background_first"):
        if getattr(arguments, name) is not None:
            setattr(images, name, getattr(arguments, name))
    if arguments.detector is not None:
        images.set_detector(load_detector(arguments.detector))
    if arguments.separators == "none":
        processor.use_separators, processor.separator_token_ids = False, None
    elif arguments.separators != "keep":
        processor.use_separators = True
        BackdropProcessor.add_tokens(processor.tokenizer)
    if arguments.image_position is not None:
        first = arguments.image_position == "first"
        kept = with_image_position(processor.chat_template, first)
        processor.chat_template = kept or chat_template(_system_prompt(processor), images_first=first)


def _system_prompt(processor: BackdropProcessor) -> str:
    """The default system prompt of a processor's template: the text before the user's turn.

    Raises:
        ValueError: the template is not LLaVA-1.5's.
    """
    if not is_vicuna(processor.chat_template, processor.tokenizer, own_system=True):
        raise ValueError(
            "image_position: the model's chat template is neither LLaVA-1.5's nor one that `backdrop convert` kept; wanted "
            "image_position left out."
        )
    text = processor.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    bos = processor.tokenizer.bos_token or ""
    return text.removeprefix(bos).split("USER: ", 1)[0].strip()


def _tokenizer_with_separators(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    tokenizer = BackdropProcessor.from_pretrained(arguments.model).tokenizer
    BackdropProcessor.add_tokens(tokenizer)
    return tokenizer
