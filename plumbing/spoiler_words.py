"""Rules of plumbing.spoilers on the words of the answer: other forms, spelled, one of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from plumbing.answers import ARTICLES, DIGIT_OR_COMMAND, YES_OR_NO
from plumbing.spoiler_case import (
    CHOSEN,
    END_OF_CLAUSE,
    Case,
    has_word,
    is_label,
    part_value,
    plain_words,
)
from plumbing.verdicts import COMMON_WORDS, UNDECIDED

_HINT_TALK = """
    left right upper lower top bottom middle centre center front back number value amount total kind
    type line point side picture figure axis table graph chart bar label part area answer such
"""
_HINT_TALK = set(_HINT_TALK.split())
# "a second hatched area" says nothing of "military area"
_GENERAL_NOUNS = "side picture line point area part label number value amount kind type"
_GENERAL_NOUNS = set(_GENERAL_NOUNS.split())
_SIDES = {"left", "right", "upper", "lower"}


def holds_words(case: Case) -> Iterator[str]:
    """The answer's words, in other forms too, or spelled; not where the question has them.

    Words that are offered beside another candidate are fine: "decide whether it is X or Y".
    """
    for part in case.parts:
        is_formula = DIGIT_OR_COMMAND.search(part) and not is_label(part)
        if (is_formula and not case.options) or part_value(part) is not None:
            continue
        words = " ".join(word for word in plain_words(part).split() if word not in ARTICLES)
        words = words.removesuffix(" one")
        if not words or words in YES_OR_NO:
            continue
        if holds_form(words, case.stem_words):
            if _chooses(words, case):
                yield f"holds the answer's text: {part}"
        elif holds_form(words, case.words):
            if not all(_offers(sentence) for sentence in _with_form(words, case)):
                yield f"holds the answer's text: {part}"
        elif _spells_text(words, case.words):
            yield f"spells the answer's text: {part}"


_VERDICT = (
    r"(?:leads|wins|beats|exceeds|comes out|(?:is|are|has|have|was|were) (?:the )?"
    r"(?P<comparison>more|most|less|least|fewe\w+|\w+er|\w+est))"
)


def _chooses(words: str, case: Case) -> bool:
    """The hint chooses a word that the question offers: "must be odd", "the red one is longer"."""
    lower = case.text.casefold()
    if words not in case.words and words not in lower:
        return False  # a pattern costs more than this look
    name = re.escape(words)
    if re.search(rf"\b(?:must be|has to be) {name}\b", case.words):
        return True
    verdict = re.compile(rf"\b{name}\b(?: \w+){{0,2}} {_VERDICT}\b")
    for clause in END_OF_CLAUSE.split(lower):
        match = None if UNDECIDED.search(clause) else verdict.search(clause)
        if match and (match["comparison"] or "") in case.stem_words:
            return True
    return False


_OFFER = re.compile(r"\b(?:whether|between|either|decide|could be)\b.*\b(?:or|and)\b", re.I)


def _offers(sentence: str) -> bool:
    """The sentence offers several candidates and chooses none."""
    return _OFFER.search(sentence) is not None and CHOSEN.search(sentence) is None


def word_of_answer(case: Case) -> Iterator[str]:
    """Only the gold option has the word, and the hint uses it: the surname of "Claude Monet".

    Without options, any word of an answer of at most three words, but for what hints are made of.
    """
    answer = plain_words(case.answer).split()
    if not case.options and (len(answer) > 3 or DIGIT_OR_COMMAND.search(case.answer)):
        return
    others = " ".join(case.other_options)
    taken = COMMON_WORDS if case.options else COMMON_WORDS | _HINT_TALK
    if len(answer) > 1:
        taken = taken | _SIDES | _GENERAL_NOUNS  # "the patient's left" for "left kidney"
    for word in dict.fromkeys(answer):
        if word in taken or word in YES_OR_NO or len(word) < 3 or not word.isalpha():
            continue
        if not holds_form(word, case.words) or holds_form(word, f"{others} {case.stem_words}"):
            continue
        told = [sentence for sentence in _with_form(word, case) if not _is_general(word, sentence)]
        if not all(_lists(sentence, others) for sentence in told):
            yield f"holds a word of the answer: {word}"


def _is_general(word: str, sentence: str) -> bool:
    """The sentence has the word in another thing's name alone: "the loyalty-card number".

    Or it tells of all things of that kind: "cards leave a terminal number".
    """
    if CHOSEN.search(sentence):
        return False
    lower = sentence.casefold()
    if re.match(rf"\W*(?:(?:and|but|while) )?{re.escape(word)}s (?!here\b)[a-z]+(?<!ed)\b", lower):
        return not re.match(rf"\W*\w*\W*{re.escape(word)}s (?:is|are|was|were)\b", lower)
    if f"-{word}" not in lower and f"{word}-" not in lower:
        return False  # the sentence has the word, and not in a compound
    compound = rf"\b(?:[a-z]+-{re.escape(word)}|{re.escape(word)}-[a-z]{{4,}})\b"
    return not holds_form(word, plain_words(re.sub(compound, " ", lower)))


def _lists(sentence: str, others: str) -> bool:
    """The sentence has words of other options too and chooses none."""
    words = set(plain_words(sentence).split()) - COMMON_WORDS
    return not words.isdisjoint(others.split()) and CHOSEN.search(sentence) is None


def holds_form(words: str, text: str) -> bool:
    """The text has the words in some form. All forms start with the same three letters."""
    # no form changes more than the last three letters
    if words[:3] not in text or (words[: len(words) - 3] not in text and not _is_cut(words)):
        return False
    return _form_pattern(words).search(text) is not None


def _with_form(words: str, case: Case) -> list[str]:
    """The sentences of the hint that have the words in some form."""
    found = [sentence for sentence in case.sentences if words[:3] in sentence.casefold()]
    return [sentence for sentence in found if holds_form(words, plain_words(sentence))]


_MONTHS_AND_DAYS = """
    january february march april june july august september october november december
    monday tuesday wednesday thursday friday saturday sunday
"""


def _is_cut(words: str) -> bool:
    """Months and days may be cut to three letters."""
    return words in _MONTHS_AND_DAYS.split()


@lru_cache(maxsize=4096)
def _form_pattern(words: str) -> re.Pattern:
    return re.compile(_word_forms(words))


def _word_forms(words: str) -> str:
    """A pattern of the words in other forms: pears as pear, circle as circular, blue as bluish.

    Three letters or fewer must be a whole word, but for an ending: dry as dryness. Six letters or
    more may stand anywhere in a longer word. Months and days may be cut to three letters.
    """
    if len(words) >= 5 and words[-1] == "s" and words[-2] not in "s ":
        words = words[:-1]
    form = re.escape(words)
    if _is_cut(words):
        return rf"\b(?:{form}|{words[:3]}\b)"
    if not words.isascii():
        return form
    if len(words) < 4:
        return rf"\b{form}(?:'?s|er|ed|ing|ish|ly|y|ness)?\b"
    if form.endswith("le"):
        form = form[:-2] + "(?:le|ul)"
    elif form.endswith(("ism", "ent")) and len(words) >= 6:
        form = form[:-1] + ("[mt]" if form.endswith("m") else "[tc]")
    elif form.endswith("ia"):
        form = form[:-1]
    elif form.endswith("e"):
        form = form[:-1] + "(?:e|ish|ing)"
    # "sandstones" for stones, but not "preview" for review
    return (r"(?:\b|(?<=[a-z]{2}))" if len(words) >= 6 else r"\b") + form


_COMPASS = re.compile(r"(north|south)[ -]?(east|west)")
_NO_LETTER = re.compile(r"\W")
_GAP = r"[\s.\-_*|]"
_GAPS = re.compile(_GAP)
_LETTER_LABEL = re.compile(r"[a-z]+ [a-z]")
_AND = re.compile(r"\band\b|\s")


def _spells_text(words: str, text: str) -> bool:
    """The hint has the letters apart or reversed: "r-e-d", "mon day" and "yadnom".

    Words of fewer than five letters must have a gap after each letter; others may have one
    anywhere, from eight letters on an "and" too: "south and west". Fewer than three letters cannot
    be spelled.
    """
    compass = _COMPASS.fullmatch(words)
    if compass and re.search(
        rf"\b{compass[1]}[ -]?{compass[2]}(?:er|ward)"
        # not "a north-south part and an east-west part", "north or south, and east or west"
        rf"|(?<![-/])(?<!or )\b{compass[1]}\b(?![-/]| or\b| vs\b)"
        r"(?:(?!\bnot\b|\bneed)[^.;]){1,25}\band\b[\w ]{1,20}"
        rf"(?<!or ){compass[2]}\b(?![-/]| or\b)",
        text,
    ):
        return True
    letters = _NO_LETTER.sub("", words)
    if len(letters) < 3 or _LETTER_LABEL.fullmatch(words):  # "curves" is not "curve s"
        return False
    backwards = letters[::-1]
    if letters != backwards and has_word(backwards, text):
        return True
    if len(letters) >= 8 and letters in _AND.sub("", text):
        return True
    if letters not in _GAPS.sub("", text):
        return False
    gap = _GAP + ("+" if len(letters) < 5 else "*")
    return re.search(rf"\b{gap.join(letters)}\b", text) is not None


_BEGINS_OR_ENDS = re.compile(
    r"\b(begins?|starts?|ends?) (?:with|in) (?:the )?(?:letters? |syllable )?[\"']?(\w+)", re.I
)


def says_beginning(case: Case) -> Iterator[str]:
    """The first or last letters of an answer in one word: "begins with 'alba'"."""
    word = plain_words(case.answer).strip()
    if not word.isalpha():
        return
    for verb, piece in _BEGINS_OR_ENDS.findall(case.text.casefold()):
        is_end = verb.startswith("end")
        fits = word.endswith(piece) if is_end else word.startswith(piece)
        if fits and piece not in case.stem_words.split():
            yield f"spells the answer's text: {case.answer}"
