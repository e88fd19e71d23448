"""A language model's own chat template, with images in its messages and its answers marked for the loss."""

import re

from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\b")
# Contents that are lists become text: `<image>` for each image, every run of images on a line of its own. The loop over
# message['content'] is how engines find out that the template takes lists of parts.
_FLATTEN = """
{%- set flat = namespace(messages=[], text='', last='') -%}
{%- for message in messages -%}
    {%- set flat.text = '' -%}{%- set flat.last = '' -%}
    {%- if message['content'] is string -%}{%- set flat.text = message['content'] -%}
    {%- elif message['content'] -%}
        {%- for part in message['content'] -%}
            {%- set kind = 'image' if part is mapping and part['type'] in ('image', 'image_url') else 'text' -%}
            {%- if kind == 'text' and part is mapping and part['type'] != 'text' -%}
                {{- raise_exception('a part has the type ' + part['type'] | string + '; wanted text or image') }}
            {%- endif -%}
            {%- if flat.last and not kind == flat.last == 'image' -%}{%- set flat.text = flat.text + '\\n' -%}{%- endif -%}
            {%- set flat.text = flat.text + ('<image>' if kind == 'image' else part if part is string else part['text']) -%}
            {%- set flat.last = kind -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
# What the template wrote, cut where answers begin and end.
_MARK = """
{%- for piece in written.split(ANSWER_START) -%}
    {%- if loop.first -%}{{- piece -}}
    {%- else -%}
        {{- ANSWER_START -}}
        {%- if ANSWER_END in piece -%}
            {%- set answer = piece.split(ANSWER_END)[0] + ANSWER_END -%}
            {%- generation -%}{{- answer -}}{%- endgeneration -%}
            {{- piece[answer | length:] -}}
        {%- else -%}{{- piece -}}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
"""
_QUESTION, _ANSWER = "What is it?", "A thing."


def template_with_images(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template around messages that may hold images.

    What it writes for text stays what it was, character for character. An answer and the special token that ends it are
    put between the marks that assistant-only loss needs, wherever the template's own form shows where that is; where
    it does not (`has_answer_marks` is False for the result), the template still works.

    Raises:
        ValueError: the tokenizer has no chat template, or several.
    """
    source = tokenizer.chat_template
    if not isinstance(source, str):
        found = "none" if source is None else f"several ({', '.join(source)})"
        raise ValueError(f"The tokenizer's chat template is {found}; wanted one.")
    flatten = _one_line(_FLATTEN)
    bounds = None if GENERATION.search(source) else answer_bounds(tokenizer)
    if bounds is None:
        return flatten + source
    mark = _one_line(_MARK).replace("ANSWER_START", _literal(bounds[0]))
    written = "{%- set written -%}{{- '' -}}" + source.removesuffix("\n") + "{{- '' -}}{%- endset -%}"
    return flatten + written + mark.replace("ANSWER_END", _literal(bounds[1]))


def has_answer_marks(template: str) -> bool:
    """Whether assistant-only loss can be taken with a template."""
    return GENERATION.search(template) is not None


def answer_bounds(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """The text before each answer and the special token behind it, None where the template shows neither."""
    ask = [{"role": "user", "content": _QUESTION}]
    both = tokenizer.apply_chat_template([*ask, {"role": "assistant", "content": _ANSWER}], tokenize=False)
    prompt = tokenizer.apply_chat_template(ask, tokenize=False)
    prompted = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    before, _, behind = both.partition(_ANSWER)
    start = prompted.removeprefix(prompt) if prompted.startswith(prompt) else ""
    if not start or start not in before:
        start = before.rpartition(_QUESTION)[2]
    specials = [token for token in tokenizer.all_special_tokens if token in behind]
    if not start or not specials or start.strip() == "":
        return None
    return start, min(specials, key=behind.index)


def _one_line(text: str) -> str:
    return "".join(line.strip() for line in text.splitlines())


def _literal(text: str) -> str:
    """A text as a string of Jinja's."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"
