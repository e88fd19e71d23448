"""The chat template of a new model: LLaVA-1.5's prompt, with the marks that assistant-only loss needs."""

# Prompt of the Vicuna models that LLaVA-1.5 is built on (vicuna_v1 in LLaVA's conversation.py).
VICUNA_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)

_IMAGES_FIRST = (
    "{%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{%- for image in images %}{{- '<image>' }}{%- endfor %}"
    "{%- if images %}{{- '\\n' }}{%- endif %}"
    "{{- text_of(message) }}"
)
_IMAGES_IN_PLACE = (
    "{%- for part in message['content'] %}"
    "{%- if not loop.first and (part['type'] == 'image') != (loop.previtem['type'] == 'image') %}{{- '\\n' }}{%- endif %}"
    "{%- if part['type'] == 'image' %}{{- '<image>' }}{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}"
)


def chat_template(system_prompt: str = VICUNA_SYSTEM_PROMPT, images_first: bool = True) -> str:
    """LLaVA-1.5's prompt as a Jinja template with BOS and `{% generation %}` marks around answers.

    `<bos>SYSTEM USER: <image>\\nquestion ASSISTANT: answer</s>USER: ...`; the answer's marks include its EOS. Images
    stand together before the text, or, with `images_first` False, where the message has them, on a line of their own.
    """
    default = system_prompt.replace("\\", "\\\\").replace("'", "\\'")
    return (
        "{{- bos_token }}"
        "{%- set ns = namespace(system='" + default + "') %}"
        "{%- macro text_of(message) -%}"
        "{%- if message['content'] is string -%}{{ message['content'] }}"
        "{%- else -%}{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
        "{%- endif -%}{%- endmacro -%}"
        "{%- for message in messages if message['role'] == 'system' %}"
        "{%- set ns.system = text_of(message) %}{%- endfor %}"
        "{%- if ns.system %}{{- ns.system + ' ' }}{%- endif %}"
        "{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}"
        "{{- 'USER: ' }}"
        "{%- if message['content'] is string %}{{- message['content'] }}"
        "{%- else %}" + (_IMAGES_FIRST if images_first else _IMAGES_IN_PLACE) + "{%- endif %}"
        "{{- ' ' }}"
        "{%- elif message['role'] == 'assistant' %}"
        "{{- 'ASSISTANT:' }}"
        "{%- generation %}{{- ' ' + text_of(message) + eos_token }}{%- endgeneration %}"
        "{%- endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"
    )
