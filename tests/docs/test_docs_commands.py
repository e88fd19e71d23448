"""Every `backdrop` command of README and docs parses against the real command tree."""

import pytest
import typer
from doc_pages import Command, commands, pages

from backdrop.cli import app

TREE = typer.main.get_command(app)
ALL = list(dict.fromkeys(command for page in pages() for command in commands(page)))


def test_there_are_commands_to_check():
    assert len(ALL) > 30


@pytest.mark.parametrize("command", ALL, ids=str)
def test_command_parses(command):
    missing = parse(command)
    if missing is None:
        return
    pytest.fail(f"{command}: there is no command {' '.join(missing)!r}")


def parse(command: Command) -> tuple[str, ...] | None:
    """None if the command parses; the path of the sub-command that is not there, if one is not."""
    node, path, words = TREE, (), list(command.words)
    context = node.context_class(node, info_name="backdrop")
    while hasattr(node, "commands"):
        options = {"--help", *(name for parameter in node.params for name in parameter.opts)}
        while words and words[0].startswith("-"):  # options of the group itself
            assert words.pop(0) in options, str(command)
        if not words:
            return None
        path = (*path, words.pop(0))
        if path[-1] not in node.commands:
            return path
        parent, node = context, node.commands[path[-1]]
        context = node.context_class(node, info_name=path[-1], parent=parent, **node.context_settings)
    if "--help" in words:
        return None
    if command.whole:
        node.make_context(path[-1], words, parent=context.parent)
    else:
        node.make_parser(context).parse_args(words)
    return None
