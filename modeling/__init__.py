"""Model side of Backdrop. Importing it teaches transformers' Auto classes the `backdrop` model type."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .configuration_backdrop import BackdropConfig
from .modeling_backdrop import BackdropForConditionalGeneration, BackdropModel

# Without this a checkpoint of ours is "a model of type ``", and loading its tokenizer asks about remote code.
AutoConfig.register("backdrop", BackdropConfig, exist_ok=True)
AutoModel.register(BackdropConfig, BackdropModel, exist_ok=True)
AutoModelForImageTextToText.register(BackdropConfig, BackdropForConditionalGeneration, exist_ok=True)

__all__ = ["BackdropConfig", "BackdropForConditionalGeneration", "BackdropModel"]
