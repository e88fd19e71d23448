"""The chat template of a new model: LLaVA-1.5's prompt, with the marks that assistant-only loss needs.

Nothing of a conversation is left out in silence. LLaVA-1.5 knows a system prompt and turns of USER and ASSISTANT; what other
clients send is written beside them: further system messages, tools, calls and their results (in Hermes' form, which
engines can parse back into calls), a speaker's name, reasoning. What cannot be shown is an error.
"""

from .template_parts import content_macros, jinja_text, one_line

# Prompt of the Vicuna models that LLaVA-1.5 is built on (vicuna_v1 in LLaVA's conversation.py).
VICUNA_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)

_TEMPLATE = r"""
CONTENT_MACROS
{%- macro calls_of(message) -%}
    {%- for call in message['tool_calls'] -%}
        {%- set function = call['function'] or call -%}
        {%- set arguments = function['arguments'] or {} -%}
        {%- if message['content'] or not loop.first -%}{{ '\n' }}{%- endif -%}
        {{ '<tool_call>\n{"name": ' + function['name'] | tojson + ', "arguments": ' }}
        {{- arguments if arguments is string else arguments | tojson -}}
        {{ '}\n</tool_call>' }}
    {%- endfor -%}
{%- endmacro -%}

{%- macro label_of(message, role) -%}
    {{ role + (' (' + message['name'] + ')' if message['name'] else '') + ':' }}
{%- endmacro -%}

{{- bos_token }}
{%- set head = namespace(text=DEFAULT_SYSTEM, length=0, ended=false) -%}
{%- for message in messages -%}
    {%- if message['role'] not in ('system', 'developer') -%}{%- set head.ended = true -%}
    {%- elif not head.ended -%}
        {%- set text = content_of(message) -%}
        {%- set head.text = text if head.length == 0 else head.text + ('\n' if head.text and text else '') + text -%}
        {%- set head.length = head.length + 1 -%}
    {%- endif -%}
{%- endfor -%}
{{- head.text }}
{%- if tools -%}
    {{- ('\n' if head.text else '') + TOOLS_INTRODUCTION }}
    {%- for tool in tools -%}
        {%- set function = tool['function'] or tool -%}
        {{ '\n{"name": ' + function['name'] | tojson + ', "description": ' + (function['description'] or '') | tojson }}
        {{- ', "parameters": ' + (function['parameters'] or {}) | tojson + '}' }}
    {%- endfor -%}
    {{ '\n</tools>' }}
{%- endif -%}
{%- if head.text or tools -%}{{ ' ' }}{%- endif -%}

{%- for message in messages -%}
    {%- if message['role'] in ('system', 'developer') -%}
        {%- if loop.index0 >= head.length -%}{{ 'SYSTEM: ' + content_of(message) + ' ' }}{%- endif -%}
    {%- elif message['role'] == 'user' -%}{{ label_of(message, 'USER') + ' ' + content_of(message) + ' ' }}
    {%- elif message['role'] in ('tool', 'function') -%}{{ label_of(message, 'TOOL') + ' ' + content_of(message) + ' ' }}
    {%- elif message['role'] == 'assistant' -%}
        {{- label_of(message, 'ASSISTANT') }}
        {%- generation -%}
            {%- set thoughts = message['reasoning_content'] or message['reasoning'] -%}
            {{ ' ' + ('<think>\n' + thoughts + '\n</think>\n' if thoughts else '') }}
            {{- content_of(message) + calls_of(message) + eos_token }}
        {%- endgeneration -%}
    {%- else -%}
        {{ raise_exception('a message has the role ' + message['role'] | string + '; wanted system, developer, user, assistant or tool') }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
_TOOLS_INTRODUCTION = (
    "You may call these functions. To call one, answer with a JSON object of its name and arguments:\n"
    '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>\n<tools>'
)


def chat_template(system_prompt: str = VICUNA_SYSTEM_PROMPT, images_first: bool = True) -> str:
    """LLaVA-1.5's prompt as a Jinja template with BOS and `{% generation %}` marks around answers.

    `<bos>SYSTEM USER: <image>\\nquestion ASSISTANT: answer</s>USER: ...`; the answer's marks include its EOS.

    - Images stand together before the text where all of a message's text is on one side of them. Where text stands
      between them ("Image 1:", image, "Image 2:", image), or with `images_first` False, they stay in their place, on
      lines of their own. Texts of a message are put on lines of their own.
    - `developer` is `system`. The system messages at the beginning replace `system_prompt`, one a line; later ones stand
      where they are, as `SYSTEM: ...`.
    - `tools` are listed after the system prompt; an assistant's calls are part of its answer, `<tool_call>\\n{...}`; their
      results are turns of their own, `TOOL: ...`. A message's `name` stands behind its role, `USER (Ann): ...`.
    - Another role, another type of part and content that is neither text nor parts raise `jinja2.TemplateError`.
    """
    values = {
        "CONTENT_MACROS": content_macros("true" if images_first else "false"),
        "DEFAULT_SYSTEM": jinja_text(system_prompt),
        "TOOLS_INTRODUCTION": jinja_text(_TOOLS_INTRODUCTION),
    }
    template = one_line(_TEMPLATE)
    for name, value in values.items():
        template = template.replace(name, value)
    return template
