"""Every way of generating that the installed transformers offers, as rows for the matrix that holds contract 7.

A row is named after what it exercises: a generation mode, a cache, an option of `GenerationConfig`, an argument of
`generate`. What no row exercises stands in `WITHOUT_MEANING` with the reason, so that a new release of transformers shows up
as a name that is in neither.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS, GenerationMode

NEW_TOKENS = 5


@dataclass(frozen=True)
class Row:
    """One way of generating.

    Attributes:
        options: of a model, the keyword arguments of `generate`; made anew for every call.
        covers: names of what it exercises, see `offered`.
        rows: of the batch: 1 where transformers takes no more.
        logits: whether the answer can carry its logits.
        same_cache_off: False where no two calls are alike (time runs out).
    """

    options: Callable[[torch.nn.Module], dict]
    covers: tuple[str, ...]
    rows: int = 2
    logits: bool = True


class RoundingLayer(DynamicLayer):
    """Hands back what was written rounded, as a quantised layer does."""

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return (keys * 4).round() / 4, (values * 4).round() / 4


class RoundingCache(DynamicCache):
    """A cache that does not hand back what was written: what a quantised one is, without the libraries it needs."""

    def __init__(self, config):
        super().__init__(config=config)
        self.layers = [RoundingLayer() for _ in self.layers]


def text_model(model) -> torch.nn.Module:
    """A text-only draft that knows the vocabulary."""
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(tiny.text_config(num_hidden_layers=1)).eval().to(model.dtype)


def draft_of_the_same_kind(model) -> torch.nn.Module:
    """A draft that sees the images too."""
    torch.manual_seed(6)
    return type(model)(model.config).eval().to(model.dtype)


def own_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """What a user hands over as `custom_generate`: transformers' own loop, called by name."""
    return GenerationMixin._sample(
        model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
    )


def options(**values) -> Callable[[torch.nn.Module], dict]:
    """A row's options that are the same for every model and call."""
    return lambda model: dict(values)


ROWS = {
    "greedy": Row(options(), ("mode:greedy_search", "option:max_new_tokens", "option:do_sample")),
    "sampling": Row(
        options(do_sample=True, temperature=0.7, top_k=20, top_p=0.9),
        ("mode:sample", "option:temperature", "option:top_k", "option:top_p"),
    ),
    "rare samplers": Row(
        options(do_sample=True, min_p=0.01, typical_p=0.95, epsilon_cutoff=1e-4, eta_cutoff=1e-4),
        ("option:min_p", "option:typical_p", "option:epsilon_cutoff", "option:eta_cutoff"),
    ),
    "top h": Row(options(do_sample=True, top_h=0.8), ("option:top_h",)),
    "beams": Row(
        options(num_beams=3, length_penalty=0.8, early_stopping=True),
        ("mode:beam_search", "option:num_beams", "option:length_penalty", "option:early_stopping"),
    ),
    "several sequences": Row(options(num_beams=3, num_return_sequences=2), ("option:num_return_sequences",)),
    "several samples": Row(options(do_sample=True, num_return_sequences=2), ()),
    "sampled beams": Row(options(do_sample=True, num_beams=2), ("mode:beam_sample",)),
    "prompt lookup": Row(
        options(prompt_lookup_num_tokens=2, max_matching_ngram_size=2),
        ("mode:assisted_generation", "option:prompt_lookup_num_tokens", "option:max_matching_ngram_size"),
        rows=1,
    ),
    "text-only draft": Row(
        lambda model: {"assistant_model": text_model(model)}, ("argument:assistant_model",), rows=1
    ),
    "draft with images": Row(lambda model: {"assistant_model": draft_of_the_same_kind(model)}, (), rows=1),
    "no cache": Row(options(use_cache=False), ("option:use_cache",)),
    "cache given": Row(
        lambda model: {"past_key_values": DynamicCache(config=model.config.text_config)},
        ("argument:past_key_values",),
    ),
    "static cache given": Row(
        lambda model: {"past_key_values": StaticCache(config=model.config.text_config, max_cache_len=96)}, ()
    ),
    "rounding cache": Row(
        lambda model: {"past_key_values": RoundingCache(model.config.text_config)}, ("cache:quantized",)
    ),
    **{
        f"{name} cache": Row(options(cache_implementation=name), (f"cache:{name}",))
        for name in ALL_CACHE_IMPLEMENTATIONS
        if name not in ("quantized", "offloaded", "offloaded_static") and "offloaded" not in name
    },
    "longer static cache": Row(
        options(cache_implementation="static", max_cache_len=128),
        ("option:cache_implementation", "option:max_cache_len"),
    ),
    "repetition": Row(
        options(repetition_penalty=1.5, no_repeat_ngram_size=2, exponential_decay_length_penalty=(2, 1.1)),
        (
            "option:repetition_penalty",
            "option:no_repeat_ngram_size",
            "option:exponential_decay_length_penalty",
        ),
    ),
    "repetition of the prompt": Row(
        options(encoder_repetition_penalty=1.5, encoder_no_repeat_ngram_size=2),
        ("option:encoder_repetition_penalty", "option:encoder_no_repeat_ngram_size"),
    ),
    "banned": Row(
        options(suppress_tokens=[5, 6, 7, 8], begin_suppress_tokens=[9, 10], bad_words_ids=[[11], [12, 13]]),
        ("option:suppress_tokens", "option:begin_suppress_tokens", "option:bad_words_ids"),
    ),
    "biased": Row(
        options(
            sequence_bias={(14,): 3.0, (15, 16): -2.0}, renormalize_logits=True, remove_invalid_values=True
        ),
        ("option:sequence_bias", "option:renormalize_logits", "option:remove_invalid_values"),
    ),
    "bounded": Row(
        options(min_new_tokens=3, min_length=5, forced_bos_token_id=4, forced_eos_token_id=2),
        (
            "option:min_new_tokens",
            "option:min_length",
            "option:forced_bos_token_id",
            "option:forced_eos_token_id",
        ),
    ),
    "length in all": Row(options(max_length=64, max_new_tokens=None), ("option:max_length",)),
    "time": Row(options(max_time=600.0), ("option:max_time",)),
    "watermark": Row(
        options(watermarking_config={"greenlist_ratio": 0.5, "bias": 2.0, "seeding_scheme": "lefthash"}),
        ("option:watermarking_config",),
    ),
    "stop strings": Row(
        lambda model: {"stop_strings": ["a"], "tokenizer": tiny.tokenizer()}, ("option:stop_strings",)
    ),
    "guidance": Row(options(guidance_scale=1.5), ("option:guidance_scale",)),
    "guidance by a negative prompt": Row(
        lambda model: {
            "guidance_scale": 1.5,
            "negative_prompt_ids": torch.tensor([[3, 4, 5]] * 2),
            "negative_prompt_attention_mask": torch.ones(2, 3, dtype=torch.long),
        },
        ("argument:negative_prompt_ids", "argument:negative_prompt_attention_mask"),
    ),
    "everything returned": Row(
        options(
            output_attentions=True,
            output_hidden_states=True,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
        ),
        (
            "option:output_attentions",
            "option:output_hidden_states",
            "option:output_scores",
            "option:output_logits",
            "option:return_dict_in_generate",
        ),
    ),
    "token ids": Row(
        options(pad_token_id=0, bos_token_id=1, eos_token_id=[2, 3], decoder_start_token_id=1),
        (
            "option:pad_token_id",
            "option:bos_token_id",
            "option:eos_token_id",
            "option:decoder_start_token_id",
        ),
    ),
    "streamed": Row(
        lambda model: {"streamer": TextIteratorStreamer(tiny.tokenizer())}, ("argument:streamer",), rows=1
    ),
    "configuration": Row(
        lambda model: {
            "generation_config": GenerationConfig(
                max_new_tokens=NEW_TOKENS, do_sample=False, suppress_tokens=[5, 6], pad_token_id=0
            )
        },
        ("argument:generation_config",),
    ),
    "own processors": Row(
        lambda model: {
            "logits_processor": LogitsProcessorList([lambda ids, scores: scores + 0.5 * scores.roll(1, -1)]),
            "stopping_criteria": StoppingCriteriaList([lambda ids, scores, **kw: ids[:, -1] == 30]),
            "prefix_allowed_tokens_fn": lambda row, ids: list(range(2, 90)),
        },
        ("argument:logits_processor", "argument:stopping_criteria", "argument:prefix_allowed_tokens_fn"),
    ),
    "own loop": Row(lambda model: {"custom_generate": own_loop}, ("argument:custom_generate",)),
    "not compiled": Row(
        options(disable_compile=True, cache_implementation="static"), ("option:disable_compile",)
    ),
}

# Earlier versions feed a prompt with images in pieces and give none of them its vision tokens.
if "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters:
    ROWS["prefill in pieces"] = Row(options(prefill_chunk_size=7), ("option:prefill_chunk_size",))
    CHUNKS: dict[str, str] = {}
else:
    CHUNKS = {"option:prefill_chunk_size": "this transformers cannot feed a prompt with images in pieces"}

# What transformers offers and no row can exercise here.
WITHOUT_MEANING = {
    **CHUNKS,
    "mode:contrastive_search": "moved to the Hub: needs a network",
    "mode:dola_generation": "moved to the Hub: needs a network",
    "mode:group_beam_search": "moved to the Hub: needs a network",
    "mode:constrained_beam_search": "moved to the Hub: needs a network",
    "option:penalty_alpha": "contrastive search",
    "option:low_memory": "contrastive search",
    "option:dola_layers": "DoLa",
    "option:diversity_penalty": "group beams",
    "option:num_beam_groups": "group beams",
    "option:constraints": "constrained beams",
    "option:force_words_ids": "constrained beams",
    "cache:offloaded": "needs an accelerator: backdrop bench gpu",
    "cache:offloaded_static": "needs an accelerator: backdrop bench gpu",
    "cache:offloaded_hybrid": "needs an accelerator",
    "cache:offloaded_hybrid_chunked": "needs an accelerator",
    "option:cache_config": "of the quantised cache, which the rounding cache stands for",
    "option:token_healing": "replaces the prompt's ids by those of its decoded text, so its images, in LLaVA too",
    "option:is_assistant": "set by transformers on a draft",
    "option:num_assistant_tokens": "of the draft's own configuration",
    "option:num_assistant_tokens_schedule": "of the draft's own configuration",
    "option:assistant_confidence_threshold": "of the draft's own configuration",
    "option:assistant_early_exit": "needs a model trained to exit early",
    "option:assistant_lookbehind": "drafts with another tokenizer",
    "option:target_lookbehind": "drafts with another tokenizer",
    "option:assistant_ensemble_weight": "of the draft's own configuration",
    "option:speculation_type": "needs a model trained to predict several tokens",
    "option:use_mtp": "needs a model trained to predict several tokens",
    "option:compile_config": "of the compiled decoding on an accelerator",
    "option:continuous_batching_config": "of generate_batch, which takes no images",
    "option:transformers_version": "no option",
    "option:_from_model_config": "no option",
    "argument:inputs": "input_ids by another name",
    "argument:synced_gpus": "of several processes with sharded weights",
    "argument:use_model_defaults": "whose defaults fill the configuration",
    "argument:kwargs": "the inputs of the model",
}


def offered() -> set[str]:
    """Names of all that the installed transformers offers: modes, caches, options, arguments."""
    modes = {f"mode:{mode.value}" for mode in GenerationMode}
    caches = {f"cache:{name}" for name in ALL_CACHE_IMPLEMENTATIONS}
    fields = {f"option:{name}" for name in GenerationConfig().to_dict()}
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self"}
    return modes | caches | fields | {f"argument:{name}" for name in parameters}
