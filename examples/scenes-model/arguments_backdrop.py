"""Keyword arguments that a forward pass hands on: whoever takes them is asked, and what nobody takes is refused by name.

A `**kwargs` that swallows a misspelt or unsupported argument answers as if it had not been given.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs

# What transformers' own loops and its flash attention may send to any model.
TRANSFORMERS_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | {
    "debug_io",
    # Of `generate` with stop strings, which hands them to every step of some loops.
    "tokenizer",
    "assistant_tokenizer",
    # Continuous batching (`generate_batch`): the attention functions take these without naming them.
    "cache",
    "block_table",
    "read_index",
    "write_index",
    "logits_indices",
    "logits_processor_args",
    "max_seqlen_q",
    "max_seqlen_k",
}
# Those of them that say where the sequences of a packed row begin, and which way attention looks.
ATTENTION_ARGUMENTS = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "is_causal",
    "seq_idx",
)


def taken_by(arguments: Mapping[str, Any], takers: Callable[[], Iterable[Callable]]) -> set[str]:
    """The arguments that not every model of transformers takes, but one of the functions does.

    Args:
        arguments: None is as good as not given.
        takers: gives the functions; only asked where there is such an argument.
    """
    names = _unusual(arguments)
    return {name for name in names for taker in takers() if name in _parameters(taker)} if names else set()


def refuse_unknown(
    owner: str, arguments: Mapping[str, Any], takers: Callable[[], Iterable[Callable]]
) -> None:
    """Refuses what neither every model of transformers takes nor one of the functions, see `taken_by`.

    Raises:
        TypeError: there is such an argument; it says which.
    """
    names = _unusual(arguments)
    if names:
        refuse_arguments(owner, set(names) - taken_by(arguments, takers))


def attention_function(implementation: str | None) -> list[Callable]:
    """The registered attention function of that name; none where the modules have one of their own ("eager")."""
    function = ALL_ATTENTION_FUNCTIONS.get(implementation) if implementation else None
    return [] if function is None else [function]


def refuse_arguments(owner: str, names: Iterable[str]) -> None:
    """Refuses arguments as Python does.

    Raises:
        TypeError: there is a name; it says which.
    """
    names = sorted(names)
    if names:
        raise TypeError(
            f"{owner}() got an unexpected keyword argument {', '.join(map(repr, names))}; neither the model nor its "
            "language model takes it."
        )


def _unusual(arguments: Mapping[str, Any]) -> list[str]:
    return [
        name for name, value in arguments.items() if value is not None and name not in TRANSFORMERS_ARGUMENTS
    ]


@lru_cache(maxsize=64)
def _parameters(function: Callable) -> frozenset[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind in kinds)
