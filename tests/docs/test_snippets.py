"""The snippets of the documentation that are marked with `<!-- run -->` run, in order, in one namespace a page."""

import re

import pytest
from doc_pages import pages
from paths import ROOT

_RUN = re.compile(r"^<!-- run -->\n```python\n(.*?)^```", re.M | re.S)
SNIPPETS = {page: _RUN.findall(page.read_text(encoding="utf-8")) for page in pages()}
MARKED = [page for page, found in SNIPPETS.items() if found]


def test_some_pages_have_snippets_that_run():
    assert {page.stem for page in MARKED} >= {"detector", "tower", "language-model", "dataset"}


@pytest.mark.parametrize("page", MARKED, ids=lambda page: page.stem)
def test_the_snippets_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for code in SNIPPETS[page]:
        exec(compile(code, str(page.relative_to(ROOT)), "exec"), namespace)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_of_a_page_is_python(page):
    for info, code in re.findall(r"^```(python)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        compile(code, f"{page.name} ({info})", "exec")
