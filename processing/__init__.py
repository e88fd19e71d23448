"""Processing side of Backdrop: images to patch groups, detector, matching, prompts."""

# The processor loads its tokenizer by the model's configuration, which must be known for that.
import backdrop.modeling  # noqa: F401
