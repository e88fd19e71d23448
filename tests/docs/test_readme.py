"""README says the same in both languages, stays short, and its code is what stands in the other one."""

import pytest
from doc_pages import fences, inline_code, numbers, sections
from paths import ROOT

ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")


def test_readme_has_at_most_130_lines():
    assert len(ENGLISH.splitlines()) <= 130


def test_the_first_sentence_names_yolo():
    first = ENGLISH.split("\n\n")[1].split(". ")[0]
    assert "YOLO" in first


def test_limits_come_before_praise():
    assert ENGLISH.index("What is not known") < ENGLISH.index("## Why") < ENGLISH.index("## Results")


def test_both_languages_have_as_many_sections():
    assert len(sections(ENGLISH)) == len(sections(CHINESE))


def test_both_languages_have_the_same_blocks_of_code():
    assert fences(ENGLISH) == fences(CHINESE)


@pytest.mark.parametrize("i", range(len(sections(ENGLISH))))
def test_both_languages_have_the_same_commands_and_figures(i):
    english, chinese = sections(ENGLISH)[i], sections(CHINESE)[i]
    assert sorted(inline_code(english)) == sorted(inline_code(chinese))
    assert sorted(numbers(english)) == sorted(numbers(chinese))
