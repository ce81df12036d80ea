"""Rules of plumbing.spoilers on the gold option: its letter, its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from plumbing.spoiler_case import LETTERS, OPEN, ORDINALS, TO_DO, Case, has_word

# "point B" names a point, not the option; "label B" does so too, unless letters are the options.
_POINTS = """
    point vertex angle line side node vertices segment ray arc circle centre center triangle
"""
_POINTS = set(_POINTS.split())
_LABELS = {"label", "labelled", "labeled", "shop", "team", "layer", "region", "bar", "set"}
_ASKED = re.compile(r"\b(?:which|what)(?: of the(?: \w+)?)? ((?!of|is|are\b)[a-z]{3,})", re.I)
# not "G + B", "B \\cup R", "\\frac{B}{T}"
_LONE_CAPITAL = re.compile(
    r"(?<![\w'=+*/^-])(?<![+*/^∩∪] )(?<!frac\{)(?<!\}\{)(?<!cup )(?<!cap )[B-HJ-Z]"
    r"(?![\w'=+*/^-]| (?:[+*/^∩∪]|\\c[au]p))"
)
_WORD_BEFORE = re.compile(r"(\w+) $")
_CAPITALS = re.compile(r"(?<![A-Za-z])[A-Z]{1,4}(?![A-Za-z])")
_WORDS_OF_ONE_LETTER = "AI"


def names_option(case: Case) -> Iterator[str]:
    """The hint has the option's letter, marked as an option or alone: "(B)", "B is right", "B"."""
    letter = case.letter
    if letter is None:
        return
    marks = _letter_marks(letter)
    if any(mark.search(case.text) for mark in marks) or _has_lone_letter(letter, case):
        yield f"names the option: {letter}"


@cache
def _letter_marks(letter: str) -> tuple[re.Pattern, re.Pattern]:
    """Patterns of a marked letter: "(B)", "option B", "pick b.", "B)", "B fits best"."""
    bracketed = rf"(?<![\w)])\({letter}\)"
    named = rf"\b(?:option|choice|answer|pick|choose|select)s? \(?{letter}\b"
    verdict = (
        r"(?:is|fits|must be|remains|matches|satisfies|shows|works|completes|agrees|continues)"
        r" (?:the )?(?:best|right|correct|true|only|one|answer|option|choice|pattern|match)"
    )
    # "the angle at B." ends a sentence with a name
    listed = (
        rf"(?:^|\s)[\"']?(?-i:{letter})[\"']?(?:\)|(?<!at {letter})(?<!and {letter})"
        rf"\.(?=\s[A-Z]|$)| {verdict})"
    )
    small = rf"\b(?:option|choice|pick|choose|select) {letter.lower()}(?=$|[;.,])"
    ignore_case = re.NOFLAG if letter in _WORDS_OF_ONE_LETTER else re.I
    return re.compile(rf"{bracketed}|{named}|{listed}", ignore_case), re.compile(small)


def _has_lone_letter(letter: str, case: Case) -> bool:
    """The capital letter stands alone, and not in the question: "look at B", not "at point B".

    A and I are words, so they do not count. "label B" counts if the question asks which label.
    """
    if letter in _WORDS_OF_ONE_LETTER or letter not in case.text:
        return False
    if any(letter in name for name in _CAPITALS.findall(case.stem)):
        return False
    names_all = case.labels and all(has_word(label, case.text) for label in case.labels if label)
    if names_all and not _SETS_APART.search(case.text):
        return False  # "go round A, then round B"
    asked = {noun.casefold().rstrip("s") for noun in _ASKED.findall(case.stem)}
    are_options = bool(case.options) and not case.answer
    if letter in case.variables and case.answer and not case.labels:
        return False  # "let $C$ be the top vertex"
    labels = (_POINTS if are_options else _POINTS | _LABELS | {"at", "and"}) - asked
    for match in _LONE_CAPITAL.finditer(case.text):
        before = _WORD_BEFORE.search(case.text[max(0, match.start() - 20) : match.start()])
        is_name = before and before[1].casefold().rstrip("s") in labels
        if match[0] == letter and not is_name:
            return True
    return False


# What sets one of several things apart from the rest
_SETS_APART = re.compile(
    r"\b(?:unlike|whereas|while|only|alone|others?|than|exactly|fits?|match\w*|works?|agrees?"
    r"|satisf\w*|perfectly|nicely)\b",
    re.I,
)


# "2 labels stand close"; not "label 2 stands", "2 shows a hole", "2 points to the dots"
COUNTED = re.compile(
    r"(?<!label )(?<!number )(?<!only )\b(?!1 )\d+"
    r"(?= (?!shows\b)(?:[a-z]+ )?(?!is\b|has\b|was\b|does\b|fits\b)[a-z]{2,}(?<![us])s\b"
    r"(?! (?:to|the|an?|at|its|on|in|it|all|both|every|best|here)\b))"
)


def singles_out(case: Case) -> Iterator[str]:
    """Of options that are labels a sentence names one: "in C the star fits, unlike in the others".

    What names other labels too, asks the reader to do something or leaves it open is passed over.
    """
    if case.place is None or not (case.labels or not case.answer):
        return
    labels = list(case.labels or LETTERS[: len(case.options) or 4])
    if case.place >= len(labels) or not labels[case.place]:
        return
    asked = {label for label in labels if label in case.stem.split()}
    gold = labels.pop(case.place)
    if gold in (*_WORDS_OF_ONE_LETTER, "a") or (gold in asked and not asked.issuperset(labels)):
        return
    for sentence in case.sentences:
        if gold.isdigit():
            sentence = COUNTED.sub(" ", sentence)  # "2 labels stand close" counts labels
        if not has_word(gold, sentence) or any(
            label and has_word(label, sentence) for label in labels
        ):
            continue
        if _SETS_APART.search(sentence) and not (OPEN.search(sentence) or TO_DO.search(sentence)):
            yield f"singles out the option: {gold}"


_LIST = r"(?:option|choice|answer|alternative|candidate|possibility|entry (?:in|of) the \w+)s?"
_ORDINAL = rf"(?P<ordinal>{'|'.join(ORDINALS)}|\d(?=st|nd|rd|th)|last|final)(?:st|nd|rd|th)?"
_PLACE_NAMES = [
    re.compile(pattern, re.I)
    for pattern in (
        rf"\b{_ORDINAL} (?:{_LIST}|one listed|listed)\b",
        rf"\b{_ORDINAL} (?:one |place )?(?:of|in|among) (?:the )?(?:\w+ ){{0,3}}{_LIST}\b",
        rf"\b{_LIST} (?:number |no\.? ?)?(?P<ordinal>\d)\b",
        rf"\b(?:listed|comes|stands|printed) {_ORDINAL}\b",
        rf"\b{_ORDINAL} (?:one |entry )?(?:in|on) the list\b",
        rf"\b{_ORDINAL} of (?:those|the)(?: \w+)? (?:listed|offered|given)\b",
        rf"\bonly the {_ORDINAL} one\b",
        rf"\bonly (?:one|1) {_LIST}, the {_ORDINAL}\b",
    )
]
_PLACED_THING = re.compile(rf"\b{_ORDINAL} (?P<noun>[a-z]+)", re.I)
_PICTURED = """
    panel picture image figure graph drawing diagram net table story sketch plot curve line bar
    reaction shape pattern map chart card tile one
"""
_SAID = "statement claim sentence description explanation conclusion"
# "the third panel satisfies", "the second of the pictures keeps"; not "the first bar stands for"
_VERDICT_ON = re.compile(
    rf"\bthe {_ORDINAL} (?:(?P<noun>[a-z]+)|of (?:the|these|those|all)(?: \w+){{1,3}}),?"
    r" (?!(?:stands for|represents|belongs|comes|follows|begins|starts|ends|depends)\b)"
    r"(?:is|has|[a-z]{2,}s)\b",
    re.I,
)
_ANY_ORDINAL = re.compile(rf"\b(?:{'|'.join(ORDINALS)}|last)\b", re.I)
_PLACE_WORD = re.compile(rf"\b(?:{_ORDINAL}|{_LIST})\b", re.I)
# Without one of these a hint names no place, and a look for them is cheap.
# TRAP: a word that is added to _LIST or _ORDINAL belongs here, too.
_PLACE_STEMS = """
    1st 2nd 3rd 4th 5th 6th 7th 8th 9th last final
    option choice answer alternative candidate possibility entry
"""
_PLACE_STEMS = (*ORDINALS, *_PLACE_STEMS.split())
_NEIGHBOUR = re.compile(
    r"\b(?:after|before|above|below|between|next to)\b"
    r"(?! (?:\w+ing|you|that|the (?:options|choices))\b)"
    r"(?![^,;]*\b(?:each|every|all)\b)"
    r"[^,;]*\b(?:in|among|of) (?:the |list of )+(?:options|choices)\b"
)


# "the weekday column stands first"
_PART_STANDS = re.compile(
    r"\b(?:columns?|rows?|lines?|axis|legend|bars?|curves?|panels?|units?|steps?|terms?|headings?"
    r"|labels?|cells?|factors?|prices?|totals?|operations?|numbers?|powers?|coordinates?)"
    r"(?: (?!belongs|that|which)\w+){0,3} "
    rf"(?:listed|comes|stands|printed) {_ORDINAL}$",
    re.I,
)


def names_place(case: Case) -> Iterator[str]:
    """ "the second choice", "option 2", "listed last"; "the second word" of "Which word ...?"."""
    if case.place is None:
        return
    if not any(word in case.words for word in _PLACE_STEMS):
        return
    asked = {noun.casefold() for noun in _ASKED.findall(case.stem)} if case.options else set()
    for sentence in case.sentences:
        if not _PLACE_WORD.search(sentence):
            continue
        if _NEIGHBOUR.search(sentence):
            yield f"names the option's place: {case.letter}"
        if _is_in_middle(sentence, case) or _is_last_but_one(sentence, case):
            yield f"names the option's place: {case.letter}"
        if len(_ANY_ORDINAL.findall(sentence)) > 1:
            continue
        matches = [match for name in _PLACE_NAMES for match in name.finditer(sentence)]
        if not case.labels and case.answer:
            matches = [
                match for match in matches if not _PART_STANDS.search(sentence[: match.end()])
            ]
        things = _PLACED_THING.finditer(sentence)
        matches += [match for match in things if match["noun"].casefold() in asked]
        matches += [match for match in _VERDICT_ON.finditer(sentence) if _is_option(match, case)]
        if any(_is_gold_place(match["ordinal"].casefold(), case) for match in matches):
            yield f"names the option's place: {case.letter}"


def _is_option(match: re.Match, case: Case) -> bool:
    """What stands in that place is an option: the options are pictures, or it is a statement."""
    noun = (match["noun"] or "one").casefold()
    if case.options and noun in _SAID.split():
        return True
    return (bool(case.labels) or not case.answer) and noun in _PICTURED.split()


_IN_MIDDLE = re.compile(rf"\bin the middle of the (?:answer|option|choice)|\bmiddle {_LIST}", re.I)


def _is_in_middle(sentence: str, case: Case) -> bool:
    """ "the one in the middle of the answer row"."""
    last = len(case.options) - 1
    return last % 2 == 0 and case.place == last // 2 and bool(_IN_MIDDLE.search(sentence))


_LAST_BUT_ONE = re.compile(
    rf"\b(?:last but one|next to last|second to last|penultimate)(?: one of the)? {_LIST}", re.I
)


def _is_last_but_one(sentence: str, case: Case) -> bool:
    """ "the last but one option"."""
    return case.place == len(case.options) - 2 and bool(_LAST_BUT_ONE.search(sentence))


def _is_gold_place(ordinal: str, case: Case) -> bool:
    """The gold option stands in that place; where the options are unknown, "last" may be it."""
    if ordinal in ("last", "final"):
        return not case.options or case.place == len(case.options) - 1
    place = int(ordinal) - 1 if ordinal.isdecimal() else ORDINALS.index(ordinal)
    return place == case.place
