"""A rule of plumbing.spoilers: all options but the gold one are excluded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from plumbing.number_places import END_OF_SENTENCE
from plumbing.spoiler_case import LETTERS, OPEN, ORDINALS, TO_DO, Case, has_word, plain_words
from plumbing.spoiler_words import holds_form
from plumbing.verdicts import COMMON_WORDS

_OUT = re.compile(
    r"\b(?:rul\w+ out|eliminat\w+|discard\w*|exclud\w+|reject\w*|cross\w* out|cannot|can't|fails?"
    r"|drop\w*|strike|struck|impossible|wrong|false|nor|neither|not|no|nobody|none|too|out"
    r"|contradict\w*|conflict\w*|doesn't|don't|isn't|aren't)\b",
    re.I,
)
_LISTED_TO_CHOOSE = re.compile(r"\b(?:among|between|whether|pick|choose|select)\b.*\bor\b", re.I)
# "a dilation changes lengths, a translation keeps directions" tells no picture
_OF_ANY = re.compile(r"\W*(?:an?|any|every) ", re.I)


def excludes_others(case: Case) -> Iterator[str]:
    """All options but the gold one are excluded, in one sentence or one by one.

    "A, B and D cannot be it"; "not A; B fails; nor is it D"; "the first two and the last leak". A
    sentence that names all of them, and not the gold one, needs no word of exclusion.
    """
    if case.place is None or len(case.options) == 2:
        return
    others = set(range(len(case.options) or 4)) - {case.place}
    left = others | {case.place}
    text = f"{case.full} {plain_words(case.full)}"
    readings = [reading for reading in _readings(case) if _may_name(reading.names, others, text)]
    # "neither" and "no correlation" may be options themselves
    one_by_one = readings and not any(_denies(option) for option in case.options)
    for sentence in END_OF_SENTENCE.split(case.full) if readings else ():
        is_out = _OUT.search(sentence) is not None
        words = plain_words(sentence)
        for reading in readings:
            if not (is_out or reading.is_sure):
                continue
            named = _named(reading.names, sentence, words)
            if not named or _LISTED_TO_CHOOSE.search(sentence):
                continue
            if is_out and one_by_one and not OPEN.search(sentence):
                left -= named
            if named == others and (is_out or (reading.is_sure and not _leaves_open(sentence))):
                yield "excludes all other options"
    if left == {case.place} or _excludes_by_place(others, case):
        yield "excludes all other options"


def _denies(option: str) -> bool:
    return len(option.split()) < 3 and _OUT.search(option) is not None


class _Reading(NamedTuple):
    """A way to call the options."""

    names: list[list[str]]  # of each option; a name of one sign is taken as it stands
    is_sure: bool  # such a name can be nothing but an option


def _leaves_open(sentence: str) -> bool:
    """The sentence names things without a word of exclusion and says nothing of this picture."""
    return bool(_OF_ANY.match(sentence) or TO_DO.search(sentence))


def _readings(case: Case) -> list[_Reading]:
    """The ways to call the options: by letters, by their words, by those that no other one has."""
    letters = [[letter] for letter in LETTERS[: len(case.options) or 4]]
    by_letter = _Reading(letters, not case.answer)
    if not case.options:
        return [by_letter]
    marked = _Reading([[f"({letter})"] for [letter] in letters], True)
    options = [plain_words(option).strip() for option in case.options]
    words = [option.split() for option in options]
    names = []
    for place, option in enumerate(options):
        raw = case.options[place].strip()
        others = {word for other in words[:place] + words[place + 1 :] for word in other}
        own = [word for word in words[place] if word not in others and word not in COMMON_WORDS]
        own = [word for word in own if len(word) > 2 and word.isalpha()]
        if own and _denies(raw):
            own = []
        label = [case.labels[place]] if case.labels else []
        names.append([name for name in (raw if len(raw) == 1 else option, *own, *label) if name])
    return [by_letter, marked, _Reading(names, not case.answer.isdecimal())]


def _may_name(names: list[list[str]], others: set[int], text: str) -> bool:
    """The text may name all the others; this is cheap."""
    for place in others:
        if not any(
            has_word(name, text) if len(name) == 1 else name[:5] in text for name in names[place]
        ):
            return False
    return True


def _named(names: list[list[str]], sentence: str, words: str) -> set[int]:
    """The places of the options that the sentence names."""
    return {
        place
        for place, called in enumerate(names)
        if any(_is_named(name, sentence, words) for name in called)
    }


def _is_named(name: str, sentence: str, words: str) -> bool:
    if name[0] == "(":
        return name in sentence
    if len(name) == 1:
        return has_word(name, sentence)
    return has_word(name, words) or (len(name) > 3 and " " not in name and holds_form(name, words))


_ANY_PLACE = re.compile(r"first|last")
_RUN = re.compile(r"\b(first|last) ([2-9])\b", re.I)
_ORDINAL = re.compile(rf"\b(?:{'|'.join(ORDINALS)}|last)\b(?! [2-9])", re.I)


def _excludes_by_place(others: set[int], case: Case) -> bool:
    """ "the first three candidates fail", "the first, the second and the last have a hole"."""
    if not case.options or not _ANY_PLACE.search(case.text):
        return False
    last = len(case.options) - 1
    for sentence in END_OF_SENTENCE.split(case.text):
        if TO_DO.search(sentence) or not (case.labels or _OUT.search(sentence)):
            continue
        named = set()
        for end, number in _RUN.findall(sentence):
            start = 0 if end.casefold() == "first" else last + 1 - int(number)
            named |= set(range(start, start + int(number)))
        if named == others:
            return True
        for word in _ORDINAL.findall(sentence):
            named.add(last if word.casefold() == "last" else ORDINALS.index(word.casefold()))
        if named == others:
            return True
    return False
