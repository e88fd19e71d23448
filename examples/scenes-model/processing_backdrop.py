"""The processor: images and text to the model's inputs, with each `<image>` expanded to its groups' placeholders."""

import inspect
import os
import sys

import transformers
from transformers import AutoTokenizer
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.tokenization_utils_base import AddedToken

from .call_arguments_backdrop import (
    LOADING_ARGUMENTS,
    check_images_per_prompt,
    check_processor_arguments,
    check_template_arguments,
    is_nested,
)
from .image_processing_backdrop import BackdropImageProcessor

IMAGE_TOKEN = "<image>"
SEPARATOR_TOKENS = ("[BG_START]", "[BG_END]", "[OBJ_START]", "[OBJ_END]")


class BackdropProcessor(ProcessorMixin):
    """Image processor and tokenizer in one.

    Each `<image>` of a prompt stands for an ordinary image or for a patch group. It expands to
    `[BG_START]<image>*n[BG_END][OBJ_START]<image>*m[OBJ_END]`, with exactly the groups that the image became.

    Args:
        image_processor: a `BackdropImageProcessor`.
        tokenizer: its vocabulary holds `<image>` and, with separators, their four tokens, as special tokens.
        use_separators: False expands groups without separators.
        extra_tokens_per_group: placeholders of a group beyond its patches (1 where the model keeps the CLS token).
        chat_template: Jinja.

    Raises:
        ValueError: the tokenizer lacks one of the tokens.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        use_separators=True,
        extra_tokens_per_group=0,
        chat_template=None,
    ):
        self.use_separators = use_separators
        self.extra_tokens_per_group = extra_tokens_per_group
        self.image_token = IMAGE_TOKEN
        self.image_token_id = _token_id(tokenizer, IMAGE_TOKEN)
        self.separator_token_ids = (
            [_token_id(tokenizer, token) for token in SEPARATOR_TOKENS] if use_separators else None
        )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    # ---- matching

    @property
    def background_matching(self):
        """The `BackgroundMatcher`, None while matching is off."""
        return self.image_processor.background_matching

    def enable_background_matching(self, preset: str | float | None = None, **options):
        """See `BackdropImageProcessor.enable_background_matching`."""
        return self.image_processor.enable_background_matching(preset, **options)

    def disable_background_matching(self) -> None:
        """See `BackdropImageProcessor.disable_background_matching`."""
        self.image_processor.disable_background_matching()

    # ---- hooks of ProcessorMixin.__call__

    def __call__(self, images=None, text=None, **kwargs):
        """As `ProcessorMixin`'s. Inside vLLM an ordinary image is one background group (plain LLaVA).

        The engine takes one entry of `pixel_values` for each image, so clients split (`backdrop.serving`).

        A text that begins with BOS, as the chat template writes it, gets no second one from the tokenizer: a template
        applied first and tokenized here gives the ids of `apply_chat_template(tokenize=True)`.

        Args:
            images: a list of images for each prompt; or one flat list, dealt out in order, to each prompt as many as it
                has placeholders.
            text: one prompt or several.
            kwargs: options of the tokenizer and of the image processor.

        Raises:
            ValueError: a prompt has another number of placeholders than images.
            TypeError: an argument that neither takes, videos and audio among them.
        """
        check_processor_arguments(self, kwargs)
        if images is not None and "vllm" in sys.modules:
            kwargs.setdefault("split", False)
        texts = [text] if isinstance(text, str) else text or []
        bos = getattr(self.tokenizer, "bos_token", None)
        given = "add_special_tokens" in kwargs.get("text_kwargs", {})
        if bos and texts and not given and all(isinstance(t, str) and t.startswith(bos) for t in texts):
            kwargs.setdefault("add_special_tokens", False)
        return super().__call__(images=images, text=text, **kwargs)

    def validate_inputs(self, images=None, text=None, **kwargs):
        """Checks that there is one `<image>` for each image or patch group, before any work is done.

        Raises:
            ValueError: the numbers differ.
        """
        if text is None:
            super().validate_inputs(images=images, text=text, **kwargs)
            return
        texts = [text] if isinstance(text, str) else list(text)
        parts = images if is_nested(images) else [images]
        counted = [self.image_processor.num_images(part) if part else 0 for part in parts]
        check_images_per_prompt(images, counted, texts, self.image_token)
        super().validate_inputs(images=images, text=text, **kwargs)

    def apply_chat_template(self, conversation, *args, return_assistant_tokens_mask: bool = False, **kwargs):
        """As transformers'. A mask of assistant tokens needs a version that moves it as placeholders expand.

        Raises:
            ValueError: the mask is asked for and this version of transformers would misplace it.
            TypeError: an argument that is neither the processor's nor named in the template.
        """
        named = inspect.signature(ProcessorMixin.apply_chat_template).parameters
        template = args[0] if args else kwargs.get("chat_template")
        kwargs = check_template_arguments(self, template, kwargs, named)
        check_processor_arguments(self, kwargs.get("processor_kwargs") or {})
        if return_assistant_tokens_mask and not hasattr(ProcessorMixin, "_adjust_assistant_masks_indices"):
            raise ValueError(
                f"transformers {transformers.__version__} puts assistant masks at wrong tokens where placeholders are "
                "expanded; upgrade it, or train on prompt/completion rows (completion_only_loss)."
            )
        return super().apply_chat_template(
            conversation, *args, return_assistant_tokens_mask=return_assistant_tokens_mask, **kwargs
        )

    def _adjust_assistant_masks_indices(self, processed_dict, generation_indices):
        # The base class reads the offsets one by one, which on a tensor takes most of a collator's time.
        offsets = processed_dict["offset_mapping"]
        processed_dict["offset_mapping"] = offsets if isinstance(offsets, list) else offsets.tolist()
        return super()._adjust_assistant_masks_indices(processed_dict, generation_indices)

    def _process_images(self, images, **kwargs):
        processed = self.image_processor(images, **kwargs)
        replacements = [
            self.replace_image_token(processed, image_idx=i)
            for i in range(len(processed["groups_per_image"]))
        ]
        return processed, replacements

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that the `<image>` of one image or patch group expands to.

        Args:
            image_inputs: the image processor's output.
            image_idx: which of the images that went in.
        """
        counts = [int(count) for count in image_inputs["groups_per_image"]]
        first = sum(counts[:image_idx])
        return "".join(
            self.expand_group(int(image_inputs["patch_mask"][g].sum()), int(image_inputs["group_kind"][g]))
            for g in range(first, first + counts[image_idx])
        )

    def expand_group(self, num_patches: int, kind: int) -> str:
        """Placeholders and separators of one group; the one place that counts tokens.

        Args:
            num_patches: patches that the group owns.
            kind: 0 background, 1 object.
        """
        placeholders = self.image_token * (num_patches + self.extra_tokens_per_group)
        if not self.use_separators:
            return placeholders
        start, end = SEPARATOR_TOKENS[2 * kind : 2 * kind + 2]
        return f"{start}{placeholders}{end}"

    @property
    def unused_input_names(self) -> list[str]:
        """Outputs of the image processor that the model does not take: the number of groups of each image."""
        return ["groups_per_image"]

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Upper bound of the tokens per image: two layers of a background and a fresh group, each with extras and separators."""
        if image_sizes is None:
            return MultiModalData()
        # A patch can be in every group: one that both layers show otherwise than a matched image.
        groups = 3
        images = self.image_processor
        around = groups * (self.extra_tokens_per_group + 2 * self.use_separators)
        tokens = [
            groups * images.num_picture_patches(width, height) + around for height, width in image_sizes
        ]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(image_sizes))

    # ---- saving and loading

    @staticmethod
    def add_tokens(tokenizer, use_separators: bool = True) -> int:
        """Adds the placeholder and the separators as special tokens; returns how many were new."""
        names = (IMAGE_TOKEN, *(SEPARATOR_TOKENS if use_separators else ()))
        return tokenizer.add_tokens(
            [AddedToken(name, special=True, normalized=False) for name in names], True
        )

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As transformers', and the detector's weights with it."""
        os.makedirs(save_directory, exist_ok=True)
        self.image_processor.save_detector(save_directory)
        auto_map = self.image_processor.save_code(save_directory)
        if auto_map:  # AutoProcessor reads the processor's own entry, which loading drops
            self.auto_map = auto_map
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # AutoImageProcessor would load a second copy of the class from an exported folder, and does not know the class
        # without one. Every argument but the image processor's may be the tokenizer's, which takes any.
        options = LOADING_ARGUMENTS | set(BackdropImageProcessor.valid_kwargs.__annotations__)
        of_images = {name: value for name, value in kwargs.items() if name in options or name[0] == "_"}
        image_processor = BackdropImageProcessor.from_pretrained(pretrained_model_name_or_path, **of_images)
        return [image_processor, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)]


def _token_id(tokenizer, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if (
        token_id is None
        or token_id == tokenizer.unk_token_id
        or tokenizer.convert_ids_to_tokens(token_id) != token
    ):
        raise ValueError(
            f"The tokenizer has no token {token!r}; add it with BackdropProcessor.add_tokens(tokenizer), resize the "
            "model's token embeddings, and save both."
        )
    return token_id


__all__ = ["BackdropProcessor"]
