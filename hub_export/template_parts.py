"""What our own chat template and those that we keep of a checkpoint's authors have in common, as Jinja."""

# The loops over `message['content']` are how engines find out that a template takes lists of parts, so the macros' parameter
# is called as the message of a template's main loop is.
_CONTENT_MACROS = r"""
{%- macro kind_of(part) -%}
    {%- if part is string or part['type'] == 'text' -%}text
    {%- elif part['type'] in ('image', 'image_url') -%}image
    {%- else -%}{{ raise_exception('a part has the type ' + part['type'] | string + '; wanted text or image') }}
    {%- endif -%}
{%- endmacro -%}
{%- macro text_of(part) -%}{{ part if part is string else part['text'] }}{%- endmacro -%}

{#- Images stand before the text where all text is on one side of them, and stay in their place where it is not. -#}
{%- macro content_of(message) -%}
    {%- if message['content'] is string -%}{{ message['content'] }}
    {%- elif message['content'] is mapping or (message['content'] and message['content'] is not iterable) -%}
        {{ raise_exception('the content of a message is neither text nor a list of parts') }}
    {%- elif message['content'] -%}
        {%- set seen = namespace(images=0, before=false, after=false, between=false, last='') -%}
        {%- for part in message['content'] -%}
            {%- if kind_of(part) == 'image' -%}
                {%- set seen.between = seen.between or seen.after -%}
                {%- set seen.images = seen.images + 1 -%}
            {%- elif text_of(part) and seen.images -%}{%- set seen.after = true -%}
            {%- elif text_of(part) -%}{%- set seen.before = true -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set first = IMAGES_FIRST and not seen.between and not (seen.before and seen.after) -%}
        {%- if first and seen.images -%}{{ '<image>' * seen.images + '\n' }}{%- endif -%}
        {%- for part in message['content'] -%}
            {%- set kind = kind_of(part) -%}
            {%- if (kind == 'image' and not first) or (kind == 'text' and text_of(part)) -%}
                {%- if seen.last and not kind == seen.last == 'image' -%}{{ '\n' }}{%- endif -%}
                {{ '<image>' if kind == 'image' else text_of(part) }}
                {%- set seen.last = kind -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""


def content_macros(images_first: str) -> str:
    """Macros for the content of a message; `content_of(message)` is its text, with `<image>` for each image.

    Images stand together before the text where all of the text is on one side of them, and where text stands between them
    in their place. A part of another type, and content that is neither text nor parts, raise `jinja2.TemplateError`.

    Args:
        images_first: Jinja expression; false: images stand in their place always.
    """
    return one_line(_CONTENT_MACROS).replace("IMAGES_FIRST", images_first)


def one_line(template: str) -> str:
    """The lines of a template put together without their indentation."""
    return "".join(line.strip() for line in template.splitlines())


def jinja_text(text: str) -> str:
    """A text as a string of Jinja's."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
