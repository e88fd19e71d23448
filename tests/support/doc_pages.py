"""What a Markdown page holds, for the tests of README and docs: code, links, numbers, headings."""

import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from paths import ROOT

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
_NUMBER = re.compile(r"[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?%?")
_PROGRAM = re.compile(r"^(?:\S*/)?backdrop$")
_ENVIRONMENT = re.compile(r"^[A-Z_]+=")
_END = ("|", "||", "&&", ";", "&", ">", ">>", "<", "--")


@dataclass(frozen=True)
class Command:
    """A `backdrop` command of a page: its words after the program's name; `whole` where it is meant to be pasted."""

    page: str
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.page}: backdrop {' '.join(self.words)}"


def pages() -> list[Path]:
    """README in both languages, and every page of the documentation."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def fences(text: str) -> list[tuple[str, str]]:
    """(language and attributes, code) of every fenced block."""
    return [(match["info"].strip(), match["code"]) for match in _FENCE.finditer(text)]


def without_code(text: str) -> str:
    """The prose: neither fenced blocks nor inline code."""
    return _INLINE.sub(" ", _FENCE.sub("", text))


def inline_code(text: str) -> list[str]:
    return _INLINE.findall(_FENCE.sub("", text))


def links(text: str) -> list[str]:
    """Targets of links and pictures, without those of fenced blocks."""
    return _LINK.findall(_FENCE.sub("", text))


def numbers(text: str) -> list[str]:
    """Numbers of the prose, without link targets."""
    return _NUMBER.findall(re.sub(r"\]\([^)]*\)", "]", without_code(text)))


def sections(text: str) -> list[str]:
    """The parts of a page between its headings."""
    return re.split(r"^#+ .*$", text, flags=re.M)


def commands(page: Path) -> list[Command]:
    """Every `backdrop` command of a page; of what follows `--`, a pipe or a comment nothing is taken."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    found = []
    for info, code in fences(text):
        if info.split(" ")[0] in ("bash", "console", "sh"):
            for line in re.sub(r"\\\n", " ", re.sub(r"^ *\$ ", "", code, flags=re.M)).splitlines():
                found += [Command(name, words, True) for words in _words(line, comments=True)]
    for code in inline_code(text):
        found += [Command(name, words, False) for words in _words(code, comments=False)]
    return found


def _words(line: str, comments: bool) -> list[tuple[str, ...]]:
    try:
        words = shlex.split(line, comments=comments)
    except ValueError:  # a quotation that goes on in the next line
        words = line.split()
    while words and _ENVIRONMENT.match(words[0]):
        words = words[1:]
    if not words or not _PROGRAM.match(words[0]):
        return []
    ends = [i for i, word in enumerate(words) if word in _END or word in ("...", "…")]
    return [tuple(words[1 : min(ends, default=len(words))])]


def load(name: str):
    """A script of `docs/`, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
