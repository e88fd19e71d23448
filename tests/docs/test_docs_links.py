"""Every relative link of README and docs leads to a file."""

import re
from urllib.parse import unquote, urlsplit

import pytest
from doc_pages import inline_code, links, load, pages
from paths import ROOT

GENERATED = {f"docs/{path}" for path in load("hooks").PAGES}
# Files of the checkout that prose names: `processing/detector_backdrop.py`, `train/recipes/`.
_ROOMS = "backdrop|benchmarks|data|docs|evaluation|examples|experiments|hub_export|modeling|processing|scenes|serving|tests|train"
_FILE = re.compile(rf"(?:{_ROOMS})/(?:[\w.-]+/)*(?:[\w-]+\.(?:py|yaml|json|md))?")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page):
    for link in links(page.read_text(encoding="utf-8")):
        parts = urlsplit(link)
        if parts.scheme or not parts.path:
            continue
        target = page.parent / unquote(parts.path)
        assert target.exists() or _is_generated(target), f"{link} leads nowhere"
        if parts.fragment and target.suffix == ".md" and target.exists():
            assert parts.fragment in _anchors(target.read_text(encoding="utf-8")), f"{link}: no such heading"


def _is_generated(target) -> bool:
    """Pages of the reference that `docs/hooks.py` makes when the site is built."""
    return target.resolve().relative_to(ROOT).as_posix() in GENERATED


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_prose_names_are_there(page):
    named = [code for code in inline_code(page.read_text(encoding="utf-8")) if _FILE.fullmatch(code)]
    # `data/textvqa` and the like are somebody's folders, not ours; so is what ends in no file and no slash.
    missing = [name for name in named if not (ROOT / name).exists() and not name.startswith("data/textvqa")]
    assert not missing
