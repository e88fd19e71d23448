"""A checkpoint's own chat template, made fit for our processor: what its authors wrote stays, three things are added.

- *Images.* The content of each message is put together before the template sees it, its images as `<image>` placeholders in
  the place where our own template has them; templates of language models, which take text alone, get images that way.
- *Marks.* The answers, with what ends a turn, stand inside `{% generation %}`, which assistant-only loss needs. The template's
  source is not rewritten: its output is cut at two characters that stand around each answer.
- *BOS*, where the tokenizer adds one and the template does not write it: templating first and tokenizing later gives the ids
  of doing both at once.

Both are checked on a trial conversation when the template is made. Calls of tools are the template's own affair and stay unmarked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .template_parts import content_macros, jinja_text, one_line

# Around an answer while the source's template runs: noncharacters, which Unicode keeps for a program's internal use.
START, END = "\ufdd0", "\ufdd1"
_KEPT = "{#- Backdrop: the template of the model's authors, with images and marks -#}"
_FIRST, _IN_PLACE = "{%- set images_first = true -%}", "{%- set images_first = false -%}"

_PRELUDE = r"""
{%- set backdrop = namespace(messages=[]) -%}
{%- if SYSTEM and not (messages and messages[0]['role'] in ('system', 'developer')) -%}
    {%- set backdrop.messages = [{'role': 'system', 'content': AS_CONTENT(SYSTEM)}] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['content'] -%}
        {%- set text = content_of(message) -%}
        {%- if message['role'] == 'assistant' -%}{%- set text = AS_ANSWER -%}{%- endif -%}
        {%- set backdrop.messages = backdrop.messages + [dict(message, content=AS_CONTENT(text))] -%}
    {%- else -%}{%- set backdrop.messages = backdrop.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = backdrop.messages -%}
"""
# An answer that the template changed so that one of its two characters is gone stays without marks.
_MARKED_OUTPUT = r"""
{%- for piece in rendered.split(START) -%}
    {%- set length = piece.find(END) -%}
    {%- if loop.first or length < 0 -%}{{ piece | replace(END, '') }}
    {%- else -%}
        {%- set rest = piece[length + 1:] | replace(END, '') -%}
        {%- set ended = TURN_END | length if rest.startswith(TURN_END) else 0 -%}
        {%- generation -%}{{ piece[:length] + rest[:ended] }}{%- endgeneration -%}
        {{- rest[ended:] }}
    {%- endif -%}
{%- endfor -%}
"""

_TRIAL = (("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))


@dataclass(frozen=True)
class KeptTemplate:
    """A template for our processor, and whether it marks answers for assistant-only loss."""

    text: str
    marked: bool


def keep_template(
    source: str, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None
) -> KeptTemplate:
    """The template of a checkpoint's authors with images, marks and BOS.

    Args:
        source: Jinja, as `chat_template` of a tokenizer or processor.
        tokenizer: the checkpoint's.
        system_prompt: the system message of conversations without one; None: the template's own, if it has one.

    Raises:
        ValueError: the template cannot show a conversation of two turns, or takes no system message and one is asked for.
    """
    source = source.removesuffix("\n")  # as Jinja does
    contents = [form for form in ("text", "parts") if _shows_content(source, tokenizer, form)]
    if not contents:
        raise ValueError(
            "The chat template cannot show a conversation of two questions and answers; wanted one for chats: give "
            "another with --chat-template FILE."
        )
    parts = contents[0] == "parts"
    trial = _conversation(parts, system_prompt)
    try:
        wanted = _render(source, trial, tokenizer)
    except TemplateError as error:
        raise ValueError(f"system_prompt: the chat template takes no system message ({error}).") from error
    if system_prompt and system_prompt.strip() not in wanted:
        raise ValueError("system_prompt: the chat template leaves system messages out.")
    bos = _missing_bos(wanted, tokenizer)
    plain = _assembled(source, parts, system_prompt, bos)
    if _render(plain, _conversation(parts=True), tokenizer) != bos + wanted:
        raise ValueError(
            "The chat template gives another prompt where images are put in; wanted one that takes messages one by one: "
            "give another with --chat-template FILE."
        )
    if "generation" in source and len(_spans(plain, tokenizer)) == 2:
        return KeptTemplate(plain, True)
    end = _turn_end(source, parts, tokenizer)
    if end is None:
        return KeptTemplate(plain, False)
    marked = _assembled(source, parts, system_prompt, bos, end, trims=_trims(source, parts, tokenizer))
    rendered, spans = _render(marked, _conversation(parts=True), tokenizer), _spans(marked, tokenizer)
    if rendered != bos + wanted or [rendered[a:b] for a, b in spans] != [f"a1{end}", f"a2{end}"]:
        return KeptTemplate(plain, False)
    return KeptTemplate(marked, True)


def with_image_position(template: str, images_first: bool) -> str | None:
    """A kept template with its images before the text, or in place; None: this is none that `keep_template` made."""
    if not template.startswith(_KEPT):
        return None
    for switch in (_FIRST, _IN_PLACE):
        template = template.replace(switch, _FIRST if images_first else _IN_PLACE, 1)
    return template


def is_vicuna(source: str, tokenizer: PreTrainedTokenizerBase, own_system: bool = False) -> bool:
    """Whether a template writes LLaVA-1.5's turns (`USER: ... ASSISTANT: ...`) and no system prompt of its own.

    Such templates of llava-hf's leave out the system prompt that LLaVA-1.5 was trained with.

    Args:
        own_system: it may have a system prompt of its own, in front of the first turn.
    """
    for form in ("text", "parts"):
        if _shows_content(source, tokenizer, form):
            rest = _render(source, _conversation(form == "parts"), tokenizer)
            if own_system:
                rest = rest[max(rest.find("USER:"), 0) :]
            words = [
                "USER:",
                "ASSISTANT:",
                tokenizer.bos_token,
                tokenizer.eos_token,
                *(text for _, text in _TRIAL),
            ]
            for word in filter(None, words):
                rest = rest.replace(word, "")
            return not rest.strip()
    return False


# ---- trials


def _conversation(
    parts: bool, system_prompt: str | None = None, texts: Sequence[str] | None = None
) -> list[dict]:
    turns = [(role, text) for role, text in _TRIAL]
    if texts is not None:
        turns = [(role, text) for (role, _), text in zip(_TRIAL, texts, strict=True)]
    if system_prompt:
        turns.insert(0, ("system", system_prompt))
    return [
        {"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in turns
    ]


def _render(template: str, messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=template, **tokenizer.special_tokens_map)
    return rendered[0]


def _spans(template: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Where the answers of the trial conversation are marked."""
    _, spans = render_jinja_template(
        [_conversation(parts=True)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [(start, end) for start, end in spans[0]]


def _shows_content(source: str, tokenizer: PreTrainedTokenizerBase, form: str) -> bool:
    """Whether every turn's text is shown once, and nothing of Python's way to write a list."""
    try:
        rendered = _render(source, _conversation(form == "parts"), tokenizer)
    except (TemplateError, TypeError):
        return False
    return all(rendered.count(text) == 1 for _, text in _TRIAL) and "{'" not in rendered


def _missing_bos(rendered: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The BOS token where the tokenizer begins a text with it and the template does not."""
    bos = tokenizer.bos_token
    adds = bos is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return bos if adds and not rendered.startswith(bos) else ""


def _turn_end(source: str, parts: bool, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What ends an answer, up to its special token: what stands behind both answers. None: they end in none."""
    rendered = _render(source, _conversation(parts), tokenizer)
    behind = [rendered.partition(answer)[2] for answer in ("a1", "a2")]
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    ends = [behind[1].find(token) + len(token) for token in special if token in behind[1]]
    end = behind[1][: min(ends)] if ends else ""
    return end if end and behind[0].startswith(end) else None


def _trims(source: str, parts: bool, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template strips an answer's white space."""
    rendered = _render(source, _conversation(parts, texts=["q1", " a1 ", "q2", " a2 "]), tokenizer)
    return " a1 " not in rendered


def _assembled(
    source: str,
    parts: bool,
    system_prompt: str | None,
    bos: str,
    end: str | None = None,
    trims: bool = False,
) -> str:
    answer = "text | trim" if trims else "text"
    prelude = one_line(_PRELUDE).replace(
        "AS_ANSWER", answer if end is None else f"{jinja_text(START)} + ({answer}) + {jinja_text(END)}"
    )
    for text in ("SYSTEM", "text"):
        shape = f"[{{'type': 'text', 'text': {text}}}]" if parts else text
        prelude = prelude.replace(f"AS_CONTENT({text})", shape)
    prelude = prelude.replace("SYSTEM", jinja_text(system_prompt or ""))
    head = _KEPT + _FIRST + content_macros("images_first") + prelude + ("{{- bos_token }}" if bos else "")
    if end is None:  # the empty expression keeps Jinja from stripping the source's first line break
        return head + "{{- '' }}" + source
    output = one_line(_MARKED_OUTPUT)
    for name, value in {"START": START, "END": END}.items():
        output = output.replace(f"({name}", f"({jinja_text(value)}")
    output = output.replace("TURN_END", jinja_text(end))
    return head + "{%- set rendered %}{{ '' }}" + source + "{{ '' }}{% endset -%}" + output
