"""Pages that mkdocs makes at every build from the code, so that they cannot go stale.

`reference/configuration.md`, `command-line.md`, `recipes.md`, `gateway.md`, `request-fields.md`, and `design/files.md`. The functions that make them return
Markdown and can be called without mkdocs (`tests/docs/test_reference.py` does).
"""

import ast
import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FOLDERS_OF_RECIPES = ("train/recipes", "experiments/recipes", "experiments/recipes/ladder")
ROOMS = (
    "modeling",
    "processing",
    "hub_export",
    "data",
    "train",
    "evaluation",
    "scenes",
    "experiments",
    "serving",
    "benchmarks",
    "backdrop",
)
SECTIONS = ("Fields:", "Attributes:", "Args:")


def on_files(files, config):
    """Called by mkdocs once the files of the folder are known."""
    from mkdocs.structure.files import File

    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    return files


def configuration_page() -> str:
    """Fields of the model's configuration; options of the processor, of the matcher and of the cache."""
    from backdrop.modeling.background_cache_backdrop import BackgroundCache
    from backdrop.modeling.configuration_backdrop import BackdropConfig
    from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
    from backdrop.processing.background_matching_backdrop import BackgroundMatcher
    from backdrop.processing.image_options_backdrop import BackdropImagesKwargs
    from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
    from backdrop.processing.processing_backdrop import BackdropProcessor

    config_values = {name: getattr(BackdropConfig, name, None) for name in BackdropConfig.__annotations__}
    options = {
        name: getattr(BackdropImageProcessor, name, None) for name in BackdropImagesKwargs.__annotations__
    }
    enable = BackdropForConditionalGeneration.enable_background_cache
    return "\n".join(
        [
            "# Configuration",
            "",
            "Made from the code at every build of this site.",
            "",
            "## `BackdropConfig`",
            "",
            "What decides which function the model computes; in `config.json` of a model's folder.",
            "",
            _table(descriptions(BackdropConfig), config_values),
            "",
            "## Options of the processor",
            "",
            "In `processor_config.json`, and for a single call: `processor(images=..., text=..., margin=0)`. All options of "
            "transformers' image processors (`size`, `crop_size`, `do_pad`, ...) are there too.",
            "",
            _table(descriptions(BackdropImagesKwargs), options),
            "",
            "`BackdropProcessor` itself:",
            "",
            _table(descriptions(BackdropProcessor), _defaults(BackdropProcessor.__init__)),
            "",
            "## `enable_background_matching`",
            "",
            _table(descriptions(BackgroundMatcher), _defaults(BackgroundMatcher.__init__)),
            "",
            "## `enable_background_cache`",
            "",
            inspect.getdoc(BackgroundCache).split("\n\nArgs:")[0],
            "",
            _table(descriptions(enable), _defaults(enable)),
            "",
        ]
    )


def command_line_page() -> str:
    """Every sub-command with its arguments, options and example, from the command tree."""
    import typer

    from backdrop.cli import app

    tree = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "Made from the commands at every build of this site; `backdrop COMMAND --help` says the same. Errors are one line, "
        "`backdrop --debug ...` shows the traceback.",
        "",
    ]
    for path, command in sorted(_commands(tree, ("backdrop",))):
        lines += [f"## {' '.join(path)}", "", _first_paragraph(command), ""]
        rows = [_parameter(p) for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
        if rows:
            lines += ["| Option | What | Default |", "|---|---|---|", *rows, ""]
        if getattr(command, "epilog", None):
            lines += [command.epilog, ""]
    return "\n".join(lines)


def recipes_page() -> str:
    """The comment at the head of every recipe, and its text."""
    lines = [
        "# Recipes",
        "",
        "Made from the recipes' files at every build of this site. `backdrop train --config` takes a path, or the name of one "
        "of `train/recipes/`.",
        "",
    ]
    for folder in FOLDERS_OF_RECIPES:
        lines += [f"## `{folder}/`", ""]
        for path in sorted((ROOT / folder).glob("*.yaml")):
            head, body = split_head(path.read_text(encoding="utf-8"))
            lines += [f"### {path.stem}", "", head, "", "```yaml", body.rstrip(), "```", ""]
    return "\n".join([*lines, *_recipe_options()])


def _recipe_options() -> list[str]:
    """What a recipe can say beyond TRL's own options, as a table."""
    from backdrop.train.arguments import BackdropArguments

    told, values = {}, {}
    for field in dataclasses.fields(BackdropArguments):
        told[field.name] = field.metadata.get("help", "")
        made = field.default_factory is not dataclasses.MISSING
        values[field.name] = field.default_factory() if made else field.default
    values = {name: inspect.Parameter.empty if v is dataclasses.MISSING else v for name, v in values.items()}
    return [
        "## Options of a recipe",
        "",
        "Beside all of TRL's `SFTConfig` and `ModelConfig`:",
        "",
        _table(told, values),
        "",
    ]


def gateway_page() -> str:
    """The keys of the gateway's YAML file."""
    from backdrop.serving import settings

    lines = [
        "# Gateway settings",
        "",
        "Made from `serving/settings.py` at every build of this site. Keys of the file that `backdrop serve --config FILE` "
        "reads; an unknown key is an error. [Serving](../guides/serve.md) has an example.",
        "",
    ]
    for title, model in (
        ("Top level", "GatewaySettings"),
        ("`matching:`", "Matching"),
        ("`limits:`", "Limits"),
    ):
        cls = getattr(settings, model)
        values = {name: _default_of(field) for name, field in cls.model_fields.items()}
        told = descriptions(cls)
        if model == "Matching":
            from backdrop.processing.background_matching_backdrop import BackgroundMatcher

            matcher = descriptions(BackgroundMatcher)
            told = {name: told.get(name) or matcher.get(name, "") for name in values}
        told |= {name: f"see `{name}:` below" for name in ("matching", "limits") if name in values}
        lines += [f"## {title}", "", _table({name: told.get(name, "") for name in values}, values), ""]
    return "\n".join(lines)


def request_fields_page() -> str:
    """What the gateway does with each field of a request."""
    from backdrop.serving import fields

    def remark(field: fields.Field) -> str:
        harmless = ", ".join(f"`{json.dumps(value)}`" for value in field.harmless)
        words = field.reason or "a value of the wrong type is an error"
        return words + (f"; ignored where it changes nothing: {harmless}" if harmless else "")

    def named(names) -> str:
        return ", ".join(f"`{name}`" for name in names)

    lines = [
        "# Request fields",
        "",
        "Made from `serving/fields.py` at every build of this site: what the gateway does with the fields of "
        "`POST /v1/chat/completions`. Null means unset everywhere. A field that is in no table is ignored, unless its name is "
        "nearly that of one that counts: then the request is refused, and the message says which one is meant. The header "
        "`X-Backdrop-Ignored` of a response names what was ignored of its request.",
    ]
    for handling in fields.Handling:
        rows = {name: f for name, f in fields.REQUEST_FIELDS.items() if f.handling is handling}
        title = handling.value[0].upper() + handling.value[1:]
        lines += ["", f"## {title}", "", "| Field | | |", "|---|---|---|"]
        lines += [
            f"| `{name}` | {handling.name.lower().replace('_', ' ')} | {remark(f)} |"
            for name, f in rows.items()
        ]
    read_as = fields.ALIASES | {old: f"structured_outputs.{new}" for old, new in fields.GUIDED.items()}
    shown = [name for name, f in fields.MESSAGE_FIELDS.items() if f.handling is fields.Handling.CHECKED]
    notes = [name for name, f in fields.MESSAGE_FIELDS.items() if f.handling is fields.Handling.IGNORED]
    return "\n".join(
        [
            *lines,
            "",
            "## Other names",
            "",
            "| Field | | Read as |",
            "|---|---|---|",
            *(f"| `{old}` | checked | `{new}` |" for old, new in read_as.items()),
            "",
            "## Messages and their parts",
            "",
            f"Of a message are shown: {named(shown)}. Ignored: {named(notes)}. In parts ignored: "
            f"{named(sorted(fields.PART_NOTES))}. Any other field of a message or a part is an error where it holds a text, a "
            "list or an object, since that would be lost; a part's `uuid` always is.",
            "",
        ]
    )


def files_page() -> str:
    """The first line of every module's docstring, by room."""
    lines = [
        "# Every file in a line",
        "",
        "Made from the files' own first lines at every build of this site.",
        "",
    ]
    for room in ROOMS:
        lines += [f"## `{room}/`", "", "| File | What |", "|---|---|"]
        for path in sorted((ROOT / room).rglob("*.py")):
            # The command line's folder has a link to every other room.
            inside = path.relative_to(ROOT / room)
            if any(
                (ROOT / room).joinpath(*inside.parts[:i]).is_symlink() for i in range(1, len(inside.parts))
            ):
                continue
            told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            if told:
                lines.append(f"| `{inside.as_posix()}` | {_cell(told.split(chr(10) + chr(10))[0])} |")
        lines.append("")
    return "\n".join(lines)


# ---- reading docstrings and signatures


def descriptions(thing) -> dict[str, str]:
    """`name: text` entries of a docstring's section of fields or arguments; a text goes on in indented lines."""
    lines = inspect.getdoc(thing).splitlines()
    start = next((i + 1 for i, line in enumerate(lines) if line in SECTIONS), None)
    if start is not None:
        end = next(
            (i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines)
        )
        lines = inspect.cleandoc("\n" + "\n".join(lines[start:end])).splitlines()
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        match = re.match(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)", line)
        if match:
            names = match[1].split(", ")
            found |= {name: match[2] for name in names}
        elif line.startswith(" ") and names:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found


def split_head(text: str) -> tuple[str, str]:
    """The comment that a recipe begins with as Markdown (its indented lines as a block of code), and the rest."""
    lines = text.splitlines()
    size = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    head, commands = [], []
    for line in (line[1:] for line in lines[:size]):
        if line.startswith("   "):
            commands.append(line.strip())
        else:
            head.append(line.strip())
    block = ["", "```text", *commands, "```"] if commands else []
    return "\n".join([*head, *block]), "\n".join(lines[size:])


def _defaults(function) -> dict[str, object]:
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


def _default_of(field):
    if field.is_required():
        return inspect.Parameter.empty
    return field.get_default(call_default_factory=True)


def _table(told: dict[str, str], values: dict[str, object]) -> str:
    lines = ["| Name | Default | What |", "|---|---|---|"]
    lines += [f"| `{name}` | {_value(values.get(name))} | {_cell(text)} |" for name, text in told.items()]
    return "\n".join(lines)


def _value(value) -> str:
    if value is inspect.Parameter.empty:
        return "(needed)"
    if type(value).__module__ not in ("builtins", "typing"):
        return ""
    return f"`{value!r}`"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _commands(command, path):
    """(path, command) of every command that does something."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        yield from _commands(child, (*path, name))


def _first_paragraph(command) -> str:
    return _cell((command.help or "").split("\n\n")[0].replace("\f", ""))


def _parameter(parameter) -> str:
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        names = [(getattr(parameter, "metavar", None) or parameter.name).upper()]
    default = (
        "(needed)" if parameter.required else ("" if parameter.default is None else f"`{parameter.default}`")
    )
    if callable(parameter.default) or parameter.default is False or "Sentinel" in default:
        default = ""
    shown = ", ".join(f"`{name}`" for name in names)
    return f"| {shown} | {_cell(getattr(parameter, 'help', None) or '')} | {default} |"


PAGES = {
    "design/files.md": files_page,
    "reference/configuration.md": configuration_page,
    "reference/command-line.md": command_line_page,
    "reference/recipes.md": recipes_page,
    "reference/gateway.md": gateway_page,
    "reference/request-fields.md": request_fields_page,
}
