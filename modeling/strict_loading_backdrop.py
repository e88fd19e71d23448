"""Strict loading: a checkpoint that does not fit the configuration is an error, never a random weight."""

SHOWN_NAMES = 8


def counted_names(title: str, names: list[str]) -> str:
    """How many weights have a fault, and the first of their names: `3 missing (a, b, c)`."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f"{len(names)} {title} ({', '.join(names[:SHOWN_NAMES])}{more})"


class StrictLoadingMixin:
    """`from_pretrained` and `save_pretrained` for a `PreTrainedModel`, which stands behind this class in the bases.

    Attributes:
        head_prefix: names of weights that begin so may be left over: a class without a head loads a checkpoint that
            has one. They are not among the keys to ignore, because vLLM, which puts a head of its own on the class
            without one, would not load them then.
    """

    head_prefix: str | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs
    ):
        """As transformers', but a weight that is missing, left over or of another shape is an error that names it.

        Raises:
            ValueError: the checkpoint does not fit the configuration.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        problems = []
        for title in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(title) or ())
            if title == "unexpected_keys" and cls.head_prefix:
                names = [name for name in names if not name.startswith(cls.head_prefix)]
            if names:
                problems.append(counted_names(title.replace("_", " "), names))
        if problems:
            raise ValueError(
                f"The checkpoint {pretrained_model_name_or_path!r} does not fit {cls.__name__}: {'; '.join(problems)}. "
                "No weight is ever left at random silently."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """As transformers', always under our own names.

        A model that was converted in this process would otherwise be written in LLaVA's layout, which does not load
        again.
        """
        return super().save_pretrained(
            save_directory, *args, save_original_format=save_original_format, **kwargs
        )
