"""Special tokens in what clients write: taken apart, so that the tokenizer reads them as text.

An engine renders a chat as one text and tokenizes it, so a client's `</s>` would end its message and its `<image>` would
stand for a picture. A space behind the first character, `< /s>`, is the smallest change that every tokenizer reads as text:
normalizers may drop invisible characters, but not a space within a word.
"""

import re
from bisect import bisect_right
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from .problems import ApiError

ROUNDS = 4  # of taking apart; what a space leaves together is whole after one


class SpecialTokens:
    """The special tokens of a tokenizer: texts that only the chat template may write.

    Args:
        tokenizer: the served model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        tokens = {token for token in (*tokenizer.all_special_tokens, *added) if token}
        # Of two that begin alike the longer one is found.
        self._pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

    def text(self, text: str) -> str:
        """A text in which no special token is left.

        Raises:
            ApiError: 400, one cannot be taken apart.
        """
        return self.texts([text])[0]

    def texts(self, texts: list[str]) -> list[str]:
        """Texts in which no special token is left, not even where a chat template puts them together without a space.

        Raises:
            ApiError: 400, one cannot be taken apart.
        """
        for _ in range(ROUNDS):
            joined = "".join(texts)
            cuts = [match.start() + 1 for match in self._pattern.finditer(joined)]
            if not cuts:
                return texts
            texts = _with_spaces(texts, cuts)
        match = self._pattern.search("".join(texts))
        if match is None:
            return texts
        raise ApiError(
            400, f"a text has {match[0]!r:.40}, which only the chat template may write", "special_token"
        )

    def value(self, value: Any) -> Any:
        """A JSON value in whose texts, names of fields included, no special token is left; raises as `text`."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(each) for each in value]
        if isinstance(value, dict):
            return {self.text(name): self.value(each) for name, each in value.items()}
        return value


def _with_spaces(texts: list[str], cuts: list[int]) -> list[str]:
    """Texts with a space at positions of what they are together, in ascending order."""
    ends = list(accumulate(map(len, texts)))
    at: dict[int, list[int]] = {}
    for cut in cuts:
        index = bisect_right(ends, cut - 1)  # the text that has the character before the cut
        at.setdefault(index, []).append(cut - (ends[index] - len(texts[index])))
    found = list(texts)
    for index, places in at.items():
        text = texts[index]
        bounds = [0, *places, len(text)]
        found[index] = " ".join(text[a:b] for a, b in zip(bounds, bounds[1:], strict=False))
    return found
