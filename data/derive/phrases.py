"""What a caption says of the objects, and what of the background: noun phrases, sorted by what can be seen where.

A phrase that names a category lies where that category's pixels lie; a phrase that depends on another (its part, what
it holds or wears) goes with it; any other noun phrase is background. What is uncertain is said of neither. Verbs and
pronouns link phrases of the objects only.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backdrop.processing.patch_groups_backdrop import BACKGROUND, OBJECT

from .words import (
    CONTACT_VERBS,
    PERSON,
    PERSON_ENDINGS,
    PLACES_AND_PICTURES,
    QUANTITIES,
    categories_named,
)

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Span, Token

NEITHER = -1
# Where the pixels of some categories lie: BACKGROUND, OBJECT, or NEITHER (seen in no group, or in both).
# None: no category among them is in the image.
Place = Callable[[frozenset[str]], int | None]

_LINK_WORDS = ("ADP", "ADV", "DET", "PART")  # parts of speech that may stand between two phrases
_LONGEST_LINK = 6
_COVERING_VERBS = frozenset(
    [
        "cover",
        "top",
        "dress",
        "clothe",
        "fill",
        "wrap",
        "decorate",
        "load",
        "stuff",
        "garnish",
        "smother",
        "coat",
    ]
)
_PREPOSITIONS = frozenset(
    [
        "above",
        "across",
        "against",
        "along",
        "alongside",
        "amid",
        "among",
        "around",
        "at",
        "atop",
        "behind",
        "below",
        "beneath",
        "beside",
        "between",
        "beyond",
        "by",
        "down",
        "for",
        "from",
        "in",
        "inside",
        "into",
        "near",
        "of",
        "off",
        "on",
        "onto",
        "out",
        "outside",
        "over",
        "past",
        "through",
        "to",
        "toward",
        "towards",
        "under",
        "underneath",
        "up",
        "upon",
        "with",
        "within",
    ]
)
# Words that stand in links of marked captions, between prepositions: "in front of", "on top of the", "next to".
_LINK_NOUNS = frozenset(
    [
        "a",
        "an",
        "the",
        "front",
        "top",
        "side",
        "middle",
        "edge",
        "back",
        "next",
        "left",
        "right",
        "corner",
        "end",
    ]
)
_MARK = re.compile(r"\[/EN#(?P<id>\d+)(?P<types>(?:/\w+)+) (?P<text>[^\]]*)\]")
_PRONOUNS = frozenset(
    [
        "he",
        "she",
        "it",
        "they",
        "him",
        "her",
        "them",
        "his",
        "hers",
        "its",
        "their",
        "theirs",
        "himself",
        "herself",
        "itself",
        "themselves",
        "who",
        "whom",
        "whose",
        "which",
        "that",
        "this",
        "these",
        "those",
        "one",
        "ones",
        "another",
        "other",
        "others",
        "each",
        "both",
        "all",
        "some",
        "someone",
        "somebody",
        "everyone",
    ]
)


@dataclass(frozen=True)
class Phrase:
    """A noun phrase and where what it names is seen.

    Attributes:
        text: as written.
        group: BACKGROUND, OBJECT or NEITHER.
        link: the words between the phrase before this one and this one, "" where the two cannot be said together.
    """

    text: str
    group: int
    link: str = ""


def caption_of(phrases: list[Phrase], group: int) -> str | None:
    """What phrases in the order of the text say of a group; None: nothing.

    >>> caption_of([Phrase("tall grass", 0), Phrase("a dog", 1), Phrase("a fence", 0, "by")], 0)
    'Tall grass and a fence.'
    >>> caption_of([Phrase("a dog", 1), Phrase("a red ball", 1), Phrase("grass", 0)], 1)
    'A dog and a red ball.'
    """
    parts: list[str] = []
    before = None
    for phrase in phrases:
        if phrase.group == group and phrase.link and before == group:
            parts[-1] += f" {phrase.link} {phrase.text}"
        elif phrase.group == group:
            parts.append(phrase.text)
        before = phrase.group
    if not parts:
        return None
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{text[:1].upper()}{text[1:]}."


# ---- captions whose phrases are marked (Flickr30k Entities)


def marked_phrases(sentence: str, place: Callable[[str, list[str]], int]) -> list[Phrase]:
    """Phrases of a sentence of Flickr30k Entities, such as `[/EN#1/people A man] on [/EN#2/scene a beach] .`

    Needs no tagger: what is a phrase, and what kind of thing it names, was marked by people (Plummer et al. 2015,
    "Flickr30k Entities"). Phrases are said together where nothing but prepositions stands between them.

    Args:
        place: group of a phrase, given the id of what it names and the types of its mark.
    """
    phrases, end = [], 0
    for mark in _MARK.finditer(sentence):
        between = sentence[end : mark.start()].split()
        end = mark.end()
        words = mark["text"].split()
        group = place(mark["id"], mark["types"].strip("/").split("/"))
        if all(word.lower() in _PRONOUNS for word in words):
            group = NEITHER
        if group == BACKGROUND and len(words) > 1 and words[0].lower() in _PRONOUNS:
            words = words[1:]  # "his house"
        phrases.append(Phrase(_decapitalized(" ".join(words)), group, _plain_link(between)))
    return phrases


def marks_of_things(sentences: list[str]) -> dict[str, list[tuple[list[str], list[str]]]]:
    """The marks of each thing by its id: their types, and their words in lower case."""
    marks: dict[str, list[tuple[list[str], list[str]]]] = {}
    for mark in (mark for sentence in sentences for mark in _MARK.finditer(sentence)):
        types = mark["types"].strip("/").split("/")
        marks.setdefault(mark["id"], []).append((types, mark["text"].lower().split()))
    return marks


def unmarked(sentence: str) -> str:
    """A sentence of Flickr30k Entities as it was written, but for its tokens standing apart."""
    return _MARK.sub(lambda mark: mark["text"], sentence).strip()


def _plain_link(words: list[str]) -> str:
    lower = [word.lower() for word in words]
    fits = any(word in _PREPOSITIONS for word in lower) and all(
        word in _PREPOSITIONS or word in _LINK_NOUNS for word in lower
    )
    return " ".join(lower) if fits and len(words) <= _LONGEST_LINK else ""


def _decapitalized(text: str) -> str:
    """An article or any other word at the start of a sentence in lower case; a word all in capitals stays."""
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


# ---- captions that a spaCy pipeline parses


def load_pipeline(name: str) -> "Language":
    """A trained spaCy pipeline that tags and parses English.

    Raises:
        ImportError: spaCy, or the pipeline, is not installed.
        ValueError: the pipeline has no tagger or parser.
    """
    try:
        import spacy
    except ImportError:
        raise ImportError("Splitting captions needs spaCy: `pip install spacy`.") from None
    try:
        pipeline = spacy.load(name, exclude=["ner"])
    except OSError:
        raise ImportError(
            f"The spaCy pipeline {name!r} is not installed: `python -m spacy download {name}` (or another "
            "trained English pipeline, by --spacy)."
        ) from None
    missing = {"tagger", "parser"} - set(pipeline.pipe_names)
    if missing:
        raise ValueError(
            f"The spaCy pipeline {name!r} has no {' and no '.join(sorted(missing))}; wanted both."
        )
    return pipeline


@dataclass(frozen=True)
class _Chunk:
    """A noun phrase of a parse; `head` is what it names ("people" in "a group of people")."""

    span: "Span"
    head: "Token"
    categories: frozenset[str]


def parsed_phrases(doc: "Doc", place: Place) -> list[Phrase]:
    """Phrases of a parsed caption, in order.

    Args:
        doc: of a pipeline with tagger, parser and lemmatizer.
        place: where the pixels of categories lie.
    """
    chunks = _chunks(doc)
    by_token = {token.i: chunk for chunk in chunks for token in chunk.span}
    phrases = []
    for i, chunk in enumerate(chunks):
        group = _group(chunk, by_token, place)
        link = _link(chunks[i - 1], chunk, group) if i else ""
        phrases.append(Phrase(_text(chunk, group), group, link))
    return phrases


def _chunks(doc: "Doc") -> list[_Chunk]:
    """Noun phrases that name something: quantities joined with what they count, places and pictures left out."""
    chunks: list[_Chunk] = []
    for span in doc.noun_chunks:
        root = span.root
        if root.lemma_.lower() in PLACES_AND_PICTURES or root.lower_ in PLACES_AND_PICTURES:
            continue
        categories = categories_named(
            [token.lower_ for token in span if token.i < root.i] + [root.lemma_.lower()]
        )
        categories = categories or categories_named([token.lower_ for token in span if token.i <= root.i])
        counts = chunks[-1] if chunks else None
        of = root.head
        if (
            counts is not None
            and of.lower_ == "of"
            and of.head == counts.head
            and counts.head.lemma_.lower() in QUANTITIES
        ):
            chunks[-1] = _Chunk(doc[counts.span.start : span.end], root, counts.categories | categories)
        else:
            chunks.append(_Chunk(span, root, categories))
    return chunks


def _group(chunk: _Chunk, by_token: dict[int, _Chunk], place: Place) -> int:
    if chunk.head.pos_ in ("PRON", "NUM"):
        return NEITHER
    placed = place(chunk.categories) if chunk.categories else None
    if placed is not None:
        return placed
    owner, certain = _owner(chunk, by_token)
    if owner is not None and owner is not chunk:
        of_owner = _group(owner, by_token, place)
        if of_owner == OBJECT:
            return OBJECT if certain else NEITHER
        if of_owner == NEITHER:
            return NEITHER
    for possessor in (token for token in chunk.span if token.dep_ == "poss"):
        if possessor.pos_ == "PRON" or place(categories_named([possessor.lemma_.lower()])) not in (
            None,
            BACKGROUND,
        ):
            return NEITHER
    if _acts(chunk.head) and chunk.head.lower_.endswith(PERSON_ENDINGS):
        people = place(frozenset([PERSON]))
        if people not in (None, BACKGROUND):
            return NEITHER  # likely a person by a name that the table lacks
    return BACKGROUND


def _owner(chunk: _Chunk, by_token: dict[int, _Chunk]) -> tuple[_Chunk | None, bool]:
    """The phrase that a phrase is a part or a possession of, and whether it surely lies within it."""
    for of in (child for child in chunk.head.children if child.lower_ == "of"):
        for whole in of.children:
            if whole.i in by_token:
                return by_token[whole.i], True
    head = _first_conjunct(chunk.head)
    governor = head.head
    if head.dep_ in ("dobj", "obj") and governor.lemma_.lower() in CONTACT_VERBS:
        return _chunk_of(_subject(governor), by_token), True
    if head.dep_ == "pobj":
        bearer = governor.head
        covering = bearer.lemma_.lower() in _COVERING_VERBS and governor.lower_ in ("with", "in", "by")
        if governor.lower_ == "with" or covering:
            subject = bearer if bearer.pos_ in ("NOUN", "PROPN", "PRON") else _subject(bearer)
            return _chunk_of(subject, by_token), False
    return None, False


def _chunk_of(token: "Token | None", by_token: dict[int, _Chunk]) -> _Chunk | None:
    return None if token is None else by_token.get(token.i)


def _first_conjunct(token: "Token") -> "Token":
    while token.dep_ == "conj":
        token = token.head
    return token


def _subject(verb: "Token") -> "Token | None":
    """Who does it: the verb's own subject, the noun that it modifies, or the subject of the verb it depends on."""
    if verb.dep_ in ("acl", "relcl"):
        return verb.head
    for child in verb.children:
        if child.dep_ in ("nsubj", "nsubjpass"):
            return child
    if verb.dep_ in ("conj", "advcl", "xcomp", "ccomp", "prep", "pcomp", "aux") and verb.head != verb:
        return _subject(verb.head)
    return None


def _acts(noun: "Token") -> bool:
    return noun.dep_ == "nsubj" or any(child.tag_ == "VBG" and child.dep_ == "acl" for child in noun.children)


def _link(before: _Chunk, chunk: _Chunk, group: int) -> str:
    """Words between two phrases, if they say how the second is related to the first and nothing else."""
    between = chunk.span.doc[before.span.end : chunk.span.start]
    if not 0 < len(between) <= _LONGEST_LINK:
        return ""
    if not all(_may_link(token, group) for token in between):
        return ""
    token = chunk.span.root if chunk.span.root.i in _tokens(chunk) else chunk.head
    for _ in range(len(between) + len(chunk.span)):
        if token.pos_ in ("VERB", "AUX") and (doer := _subject(token)) is not None:
            return between.text if doer.i in _tokens(before) else ""
        token = token.head
        if token.i in _tokens(before):
            return between.text
        if token.i not in _tokens(chunk) and not between.start <= token.i < between.end:
            return ""
    return ""


def _tokens(chunk: _Chunk) -> range:
    return range(chunk.span.start, chunk.span.end)


def _may_link(token: "Token", group: int) -> bool:
    if token.pos_ in _LINK_WORDS or token.lemma_.lower() in PLACES_AND_PICTURES:
        return True
    # What objects do is theirs; of the background only states are said ("a street lined with trees").
    return token.pos_ in ("VERB", "AUX") and (group == OBJECT or token.tag_ == "VBN")


def _text(chunk: _Chunk, group: int) -> str:
    span = chunk.span
    if group == BACKGROUND:  # whose it is may not be seen
        words = [token for token in span if token.dep_ != "poss" and token.tag_ != "POS"]
        if words != list(span):
            span = span.doc[words[0].i : span.end]
    text = span.text
    return text if span[0].pos_ == "PROPN" else _decapitalized(text)
