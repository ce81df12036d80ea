"""Which small counts of a hint give nothing away: "the two lines", "a square has four sides"?

XX
"""

from __future__ import annotations

import re

from plumbing.number_places import Place

_NO_NOUN = """
    of on in at is are was were has have and or from to as by for so then than times plus minus more
    less fewer wide long high tall deep apart away up down left right over under per with because
    since which that this it its not too each together
"""
_PLURAL = r"[^\W\d_]+(?:s|en|ices|ii|foci|loci|[^\W\d_]i|people|dice|mice|geese|feet)"
_NOUN_BEHIND = re.compile(
    rf"[ -](?:(?!(?:{'|'.join(_NO_NOUN.split())})\b)[\w-]+ ){{0,2}}?"
    rf"(?!(?:{'|'.join(_NO_NOUN.split())})\b)({_PLURAL})\b|([一-龥])"
)
_DEFINITE_BEFORE = re.compile(
    r"\b(?:the|these|those|both|all|its|their|your|any|other|each|first|last|next|same|remaining"
    r"|los|las|les|die|der|den|le|gli|os|as)(?: [a-z-]+)? $",
    re.I,
)
_PARTITIVE = re.compile(
    r" (?:of (?:the|these|those|them)\b(?!.{0,25}\b(?:are|is|have|lie)\b)|or more\b)"
)
_THE_BEFORE = re.compile(r"\b(?:the|these|those|all|other) $", re.I)
_GENERAL_BEFORE = re.compile(
    r"(?<!is )(?<!are )(?<!\ba )\b(?:an?|each|every|any) [\w -]{2,30}"
    r" (?:has|have|with|needs?|contains?|consists of|is)(?: exactly| only)? $",
    re.I,
)
_STATED_BEFORE = re.compile(
    r"(?:\b(?:there (?:is|are|were)|shows?|sees?|counts?|total(?: of)?|gives?|makes?|making|equals?"
    r"|is|are|has|have|reach(?:es)?|contains?|you (?:get|find)|leaves?|leaving|remain\w*|exactly"
    r"|namely|only|hay|gibt es|son|sind)|[=:≈])(?: about| only| just| exactly)? $",
    re.I,
)
_GRID = re.compile(r" (?:by|x) \d+ (?:table|grid|matrix|board|array|square)")
_GRID_BEFORE = re.compile(r"\d (?:by|x) $")
_ONE_OR = re.compile(r"\b(?:one|1|2)\b.*\bor $")
_CONDITION = re.compile(r"\b(?:if|when|even|odd|always|any|every|each|whenever)\b", re.I)


_MARKS_BEHIND = re.compile(r" (?:inch|cm|centimet\w+|degree|hour|minute) (?:marks|lines|ticks)\b")


def is_small_count(place: Place) -> bool:
    """ "the two lines", "a square has four sides"; not "there are five bars", "7 squares wide"."""
    if place.value == 2 and _MARKS_BEHIND.match(place.after):
        return True
    if place.unit or place.value not in range(2, 13):
        return False
    return _is_count_of_gold(place) if place.is_gold else _is_count_of_others(place)


_AND_THE = re.compile(r"\band the $")  # "the two segments of AB and the two of CD"
_OF_TWO = re.compile(r"\b(?:between|(?:quotient|ratio|sum|difference|product) of) $")


def _is_count_of_gold(place: Place) -> bool:
    """The answer is a small number, and the hint counts what nobody asks for: "the two lines"."""
    noun = _NOUN_BEHIND.match(place.after)
    before = place.clause_before
    if place.value == 2 and _AND_THE.search(before) and place.after.startswith(" of "):
        return True
    if not noun or place.value > 4 or _asks_for(noun[1] or noun[2], place.question):
        return False
    if place.value == 2 and _OF_TWO.search(before):
        return True
    return bool(_DEFINITE_BEFORE.search(before) or _GENERAL_BEFORE.search(before))


_NAMED_RESULT = re.compile(r"\bhere [A-Z]_?\{?\w*\}? ?= ?$")  # "here R_p = 2"
_COUNTED_ALOUD = re.compile(
    r"[ -](?:[\w-]+ ){0,2}?[a-z]+s (?:stand|sit|lie|hang|are (?:on|in|at|left|shaded))\b"
)


def _is_count_of_others(place: Place) -> bool:
    """A count that is no answer. Two always passes; three may stand without a noun."""
    value, before = place.value, place.clause_before
    if _NAMED_RESULT.search(before) and not _CONDITION.search(place.clause):
        return False
    if value == 2 or before.endswith(" other "):
        return True
    if _GRID.match(place.after) or _GRID_BEFORE.search(before):
        return value <= 10
    without_noun = (
        _ONE_OR.search(before) or _PARTITIVE.match(place.after) or _THE_BEFORE.search(before)
    )
    if without_noun and value <= 3:
        return True
    if _GENERAL_BEFORE.search(before):
        return True
    if not _NOUN_BEHIND.match(place.after):
        return False
    if _DEFINITE_BEFORE.search(before):
        return True
    if not before.strip(" ;.,") and _COUNTED_ALOUD.match(place.after):
        return False
    if _STATED_BEFORE.search(before):
        return value <= 4 and _CONDITION.search(place.clause) is not None
    return value <= 6


def _asks_for(noun: str, question: str) -> bool:
    """The question asks how many of the noun there are."""
    stem = re.escape(noun[:-1] if len(noun) > 4 else noun)
    return re.search(rf"\b(?:how many|number of)\b.{{0,60}}\b{stem}", question, re.I) is not None
