"""All sub-commands, walked over: help with an example that its own parameters take, texts for all options, panels, JSON."""

import shlex
import subprocess
import sys

import pytest
import typer
from command import run
from paths import ROOT
from typer.testing import CliRunner

from backdrop import cli
from backdrop.commands import options

TREE = typer.main.get_command(cli.app)
# Commands that hand all their arguments on to another program.
PASS_ON = {"train", "lmms-eval"}
# What makes or moves files and has no figures to print.
WITHOUT_JSON = {*PASS_ON, "push", "serve", "scenes sheet", "scenes recording"}
WITHOUT_JSON |= {"bench memory", "bench gpu"}  # write JSON into the folder of --docs, of --out
WITHOUT_JSON |= {"results"}  # prints names of pages
WANTED = {
    *("demo", "split", "ask", "convert", "data", "train", "eval", "lmms-eval", "ladder", "ablate"),
    *("export", "push", "serve", "derive groups", "derive pairs", "derive captions"),
    *(
        "bench ttft",
        "bench camera",
        "bench matching",
        "bench serving",
        "bench encode",
        "bench memory",
        "bench gpu",
        "results",
    ),
    *("cache stats", "cache prune", "cache verify"),
    *(
        f"scenes {name}"
        for name in (
            "sheet",
            "recording",
            "detector",
            "tower",
            "base-model",
            "align-words",
            "rows",
            "exam",
            "model",
        )
    ),
}


def walk(command, words=()):
    """Every command below one that does something itself: its words and the command."""
    if not hasattr(command, "commands"):
        yield " ".join(words), command
        return
    for name, child in command.commands.items():
        yield from walk(child, (*words, name))


COMMANDS = dict(walk(TREE))
every_command = pytest.mark.parametrize("name", COMMANDS)


def examples(command) -> list[list[str]]:
    """The example's commands as words; one that is cut with backslashes is one."""
    return [shlex.split(line) for line in command.epilog.replace("\\\n", " ").splitlines()]


def parse(words: list[str]):
    """Parses the words of a command line as far as running it; the command's words and its context."""
    context = TREE.make_context("backdrop", [], resilient_parsing=True)
    command, name = TREE, []
    while hasattr(command, "commands"):
        name.append(words[len(name)])
        command = command.commands[name[-1]]
    return " ".join(name), command.make_context(name[-1], list(words[len(name) :]), parent=context)


def test_the_commands_are_those_of_the_docs():
    assert set(COMMANDS) >= WANTED


@every_command
def test_a_command_says_what_it_does(name):
    command = COMMANDS[name]
    first = (command.help or "").strip().splitlines()[0]
    assert first[0].isupper() and first.endswith((".", ").")) and len(first) <= 110, first
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help text"
        assert parameter.help.endswith((".", "...")), f"{name}: {parameter.name}: {parameter.help!r}"


@every_command
def test_the_example_can_be_pasted(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # examples name the shipped model
    command = COMMANDS[name]
    assert command.epilog, f"{name} has no example"
    assert max(map(len, command.epilog.splitlines())) <= 78, "a terminal of 80 columns would break a line"
    own = [words for words in examples(command) if words[0] == "backdrop"]
    assert name in [parse(words[1:])[0] for words in own]
    if name in PASS_ON and name == "train":
        return  # its help is the training program's
    shown = CliRunner().invoke(cli.app, [*name.split(), "--help"], prog_name="backdrop").output
    for line in command.epilog.splitlines():
        assert line in shown


@every_command
def test_figures_are_to_be_had_as_json(name):
    has_json = any("--json" in parameter.opts for parameter in COMMANDS[name].params)
    assert has_json or name in WITHOUT_JSON


def test_a_command_stands_in_a_panel_and_groups_say_what_they_hold():
    panels = {name: child.rich_help_panel for name, child in TREE.commands.items()}
    assert set(panels.values()) == {cli.USE, cli.TRAIN, cli.MEASURE, cli.PUBLISH, cli.SCENES}
    for name, child in TREE.commands.items():
        assert child.help and child.help[0].isupper(), name


def test_an_example_that_does_not_parse_is_found():
    with pytest.raises(Exception, match="No such option"):
        parse(["scenes", "sheet", "--out", "x.png", "--zoom", "3"])
    with pytest.raises(Exception, match="Missing"):
        parse(["scenes", "sheet"])


def test_help_is_there_at_once():
    """No command imports what is slow before it runs."""
    heavy = ("torch", "transformers", "numpy", "PIL", "datasets", "ultralytics", "trl", "httpx", "vllm")
    code = (
        "import sys\nfrom backdrop.cli import app\nfrom typer.testing import CliRunner\n"
        "for words in (['--help'], ['scenes', 'tower', '--help'], ['bench', 'ttft', '--help'], ['serve', '--help']):\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


def test_train_passes_all_its_arguments_on(monkeypatch, capsys):
    from backdrop.train import sft

    seen = []
    monkeypatch.setattr(sft, "main", lambda words, recipe_folders: seen.append(words))
    for words in (["--help"], ["--config", "finetune_lora", "--max_steps=2", "--dry_run", "true"], []):
        assert run(monkeypatch, capsys, "train", *words)[0] == 0
        assert seen.pop() == words


def test_lmms_eval_is_named_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "backdrop.evaluation.harness", raising=False)
    code, _, err = run(monkeypatch, capsys, "lmms-eval", "--tasks", "pope")
    assert code == 1 and err == "backdrop: lmms-eval is not installed: `pip install lmms-eval`.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo",),
        ("demo", "--model", "examples/scenes-model"),
        ("bench", "serving"),
        ("bench", "serving", "--model", "examples/scenes-model"),
        ("ask", "examples/scenes-model", "x.png", "-q", "?"),
        ("eval", "examples/scenes-model", "--data", "rows", "--source", "rows", "--out", "out"),
        ("serve", "examples/scenes-model"),
    ],
)
def test_without_the_example_one_line_says_where_to_get_it(monkeypatch, capsys, tmp_path, arguments):
    """An installed package has no example; the Hub must not be asked for a repository of its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, "__file__", str(tmp_path / "lib" / "backdrop" / "commands" / "options.py"))
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code != 0 and len(err.splitlines()) == 1
    assert "examples/scenes-model is not here" in err and "Clone the repository" in err


def test_the_example_is_found_from_elsewhere_in_a_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert options.example_model() == "examples/scenes-model"
    monkeypatch.chdir(tmp_path)
    assert options.example_model() == str(ROOT / "examples" / "scenes-model")


def test_figures_are_printed_as_lines_or_json(capsys):
    options.print_figures({"a": {"b": 1, "c": 0.123456}, "d": "x"}, as_json=False)
    assert capsys.readouterr().out == "a.b: 1\na.c: 0.1235\nd: x\n"
    options.print_figures({"a": 1}, as_json=True)
    assert capsys.readouterr().out == '{\n  "a": 1\n}\n'


def test_a_traceback_only_with_debug(monkeypatch, capsys, tmp_path):
    missing = tmp_path / "no.npz"
    code, _, err = run(monkeypatch, capsys, "scenes", "exam", "--llava", "a", "--model", missing)
    assert code == 2 and err == "backdrop: Missing option '--out'.\n"
    monkeypatch.setattr("sys.argv", ["backdrop", "--debug", "bench", "camera", str(missing)])
    with pytest.raises(ValueError, match="no.npz"):
        cli.main()
    assert run(monkeypatch, capsys, "bench", "camera", missing)[0] == 1


def test_no_arguments_print_the_help_and_no_error(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys)
    assert code == 2 and "Usage: backdrop" in out + err and "backdrop: " not in err
