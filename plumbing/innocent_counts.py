"""Which small counts of a hint give nothing away: "the two lines", "a square has four sides"?

The words before the count decide. A finite verb ("there are", "you find", "shows") states what was
counted; an article, a quantifier or a preposition speaks of things that the reader sees anyway.
"""

from __future__ import annotations

import re

from plumbing.number_places import Place

_NO_NOUN = """
    of on in at is are was were has have and or from to as by for so then than times plus minus more
    less fewer apart away up down left right(?!.angle) over under per with because
    since which that this it its not too each together
"""
_PLURAL = r"(?:\w-)?[^\W\d_]+(?:s|en|ices|ii|foci|loci|ima|[^\W\d_]i|people|dice|mice|geese|feet)"
_NOUN_BEHIND = re.compile(
    rf"[ -](?:(?!(?:{'|'.join(_NO_NOUN.split())})\b)[\w-]+ ){{0,2}}?"
    rf"(?!(?:{'|'.join(_NO_NOUN.split())})\b)({_PLURAL})\b|([一-龥])"
)
DEFINITE_BEFORE = re.compile(
    r"(?:\b(?:the|these|those|both|all|its|their|your|any|other|each|first|last|next|same|remaining"
    r"|los|las|les|die|der|den|le|gli|os|as)|\b[a-z]{3,}'s)(?: [a-z-]+)? $",
    re.I,
)
_PARTITIVE = re.compile(
    r" (?:of (?:the|these|those|them|its|their)\b"
    r"(?!.{0,25}\b(?:are|is|have|lie)\b(?! (?:labelled|labeled|given|printed|known|needed)))"
    r"|or more\b)"
)
_PART_OF = re.compile(
    r" of (?:them\b|(?:the|these|those|its|their) )(?!options|choices|candidates|statements)"
)
_THE_BEFORE = re.compile(r"\b(?:the|these|those|all|other)(?: [a-z]+)? $", re.I)
_GENERAL_BEFORE = re.compile(
    r"(?<!is )(?<!are )(?<!\ba )\b(?:an?|each|every|any) [\w -]{1,30}"
    r" (?:has|have|with|needs?|contains?|consists of|is)(?: exactly| only| at most| at least)? $",
    re.I,
)
# A verb that states the count, with what may stand between: "shows", "you find exactly"
_STATED = r"""
    (?: \b(?: there[ ](?:is|are|were) | total(?:[ ]of)? | making | leaving | namely
        | are | have | had | was | were | find | see | get | count | spot | obtain | remain | reach
        | hold | stand | sit | cover | show | hay | gibt[ ]es | son | sind
        | (?!its\b|this\b|plus\b|minus\b|times\b|as\b|versus\b|across\b|towards\b|besides\b
          |divides\b|separates\b|splits\b|connects\b|joins\b|links\b|forms\b|cuts\b|rests\b)
          [a-z]{2,}s
      ) | [=:≈] )
    (?:[ ](?:about|only|just|exactly|roughly|nearly))?[ ]
"""
_STATED_BEFORE = re.compile(rf"{_STATED}$", re.VERBOSE | re.I)
# "you find 2 flats, 3 rods and": an inventory
_LISTED_BEFORE = re.compile(
    rf"{_STATED} (?:\d[\d/]* [^\d;.]{{1,25}}? (?:,[ ]and|,|[ ]and)[ ])+ $", re.VERBOSE | re.I
)
_OF_EACH = re.compile(r"\b(?:any|each|every|when|if)\b", re.I)
_QUANTIFIED = re.compile(
    r"\b(?:at least|at most|any|no|every|if|when|where|whether|or|which) $", re.I
)
# Counts of these are lengths: "2 squares to the left"
_LENGTH_BEHIND = re.compile(r" (?:small |grid |big |full )?(?:squares|units|boxes|blocks)\b")
_TABLE = r"(?:table|grid|matrix|board|array|square|block|sudoku)"
_GRID = re.compile(rf" ?(?:by|x|\*) ?\d+ {_TABLE}")
_GRID_BEFORE = re.compile(r"\d ?(?:by|x|\*) ?$")
_TABLE_BEHIND = re.compile(rf" {_TABLE}")
_COUNTED_ALOUD = re.compile(
    r"[ -](?:[\w-]+ ){0,2}?[a-z]+s (?:stand|sit|lie|hang|belong|are (?:on|in|at|left|shaded))\b"
)
# The unit only says what they are: "between 2 year marks"
_MARKS_BEHIND = re.compile(
    r" (?:inch|cm|centimet\w+|degree|hour|minute|year|month|week|day|unit|percent)s?"
    r" (?:marks|lines|ticks|labels|columns|bars|rows|entries|hands|names|headings)\b"
)
# "walls shared by 2 squares count once", "belongs to one hull or to 2", "agree in 2"
_SHARED_BEFORE = re.compile(
    r"\b(?:(?:shared|touched|bounded|crossed|hit|covered) (?:by|between|among)|common to"
    r"|(?:belongs?|adjacent|next) to|where|an overlap of) $",
    re.I,
)
_ONE_OR_BEFORE = re.compile(
    r"\b(?:one|1|a single)\b[\w -]{0,25}\b(?:or|nor|not)(?: [a-z]+)? $", re.I
)
_OF_OPTIONS = re.compile(
    r"\b(?:options?|choices|answers|candidates|distractors)\b[^;.]*\b(?:in|only|at least) $", re.I
)
# ", 2 of which overlap"; not "2 of which are dimes"
_OF_WHICH = re.compile(r" of (?:which|whom)\b(?! (?:is|are|was|were|has|have|had|shows?)\b)")
_TWO_TIMES = re.compile(r" (?:years|months|days|times)\b")  # the two years of the question
_BOUND = re.compile(r" at (?:most|least) $")  # "a cubic has at most three roots"
_ONE_OF_BEFORE = re.compile(r"\b(?:one|1|either|each|which|neither|other) of the $", re.I)
_OF_THIS = re.compile(r"\b(?:the|this|these|here|it|they|you|there)\b", re.I)
_AND_THE = re.compile(r"\band the $")  # "the two segments of AB and the two of CD"
_OF_TWO = re.compile(r"\b(?:between|(?:quotient|ratio|sum|difference|product) of) $")


def is_small_count(place: Place) -> bool:
    """ "the two lines", "a square has four sides"; not "there are five bars", "7 squares wide"."""
    if place.value == 2 and _MARKS_BEHIND.match(place.after):
        return True
    if place.value == 2 and _TWO_TIMES.match(place.after) and _THE_BEFORE.search(place.before):
        return not place.is_gold or place.after.startswith(" times")
    if place.value == 2 and not place.is_gold and _says_nothing_of_count(place):
        return True
    if place.unit or place.value not in range(2, 13):
        return False
    return _is_count_of_gold(place) if place.is_gold else _is_count_of_others(place)


# "there are 2 blocks, one for weekdays and one for weekends"
_ONE_BY_ONE = re.compile(r" [a-z][\w -]{2,30}[,:;] one\b[^.;]*\b(?:one|(?:the|an)other)\b", re.I)


def _says_nothing_of_count(place: Place) -> bool:
    """ "shared by two squares", "to one hull or to two", "two of which overlap"."""
    before = place.clause_before
    if any(form.search(before) for form in (_SHARED_BEFORE, _ONE_OR_BEFORE, _OF_OPTIONS)):
        return True
    if _ONE_BY_ONE.match(place.after) and not _is_addend(place):
        return True
    return _OF_WHICH.match(place.after) is not None


def _is_count_of_gold(place: Place) -> bool:
    """The answer is a small number, and the hint counts what nobody asks for: "the two lines"."""
    noun = _NOUN_BEHIND.match(place.after)
    before = place.clause_before
    if _is_grid(place) or _is_anaphoric(place):
        return True
    if place.value == 2 and _ONE_OF_BEFORE.search(before) and _NO_MORE.match(place.after):
        return True
    if place.value == 2 and _AND_THE.search(before) and place.after.startswith(" of "):
        return True
    if _BOUND.search(before) and (
        _GENERAL_BEFORE.search(before) or (noun and not _OF_THIS.search(before))
    ):
        return True
    if not noun or place.value > 4 or _asks_for(noun[1] or noun[2], place.question):
        return False
    if place.value == 2 and (_OF_TWO.search(before) or _begins_phrase(place)):
        return True
    if place.value == 2 and _USED_BEFORE.search(before) and not _MEASURES_BEHIND.match(place.after):
        return True
    return bool(DEFINITE_BEFORE.search(before) or _GENERAL_BEFORE.search(before))


_SAYS_OF_THEM = re.compile(r"[^;.,]*\b(?:is|are|have|has|was|were|can|stand|lie|sit)\b")


def _begins_phrase(place: Place) -> bool:
    """ "Two points of the line" as a place to look at; nothing is said of them."""
    return not place.clause_before.strip() and not _SAYS_OF_THEM.match(place.after)


def _is_grid(place: Place) -> bool:
    """ "a 3 by 3 block"."""
    if place.value > 10:
        return False
    if _GRID.match(place.after):
        return True
    return bool(_GRID_BEFORE.search(place.before) and _TABLE_BEHIND.match(place.after))


# "its row, its column and its block; cells that share none of these three"
_LIST_OF_THREE = re.compile(r"[\w' -]+, [\w' -]+,? (?:and|or) [\w' -]+")
_LIST_OF_TWO = re.compile(r"[\w' -]+ and [\w' -]+")
_ANAPHOR = re.compile(r"\b(?:these|those|all|the|of) $")
_NO_MORE = re.compile(r"(?= (?:with|in|and|or|is|are|have|has|must|can|that|for|to|at)\b|[.,;]|$)")


def _is_anaphoric(place: Place) -> bool:
    """ "none of these three", where the hint has just listed three things."""
    if place.value not in (2, 3) or not _ANAPHOR.search(place.before):
        return False
    listed = _LIST_OF_TWO if place.value == 2 else _LIST_OF_THREE
    return bool(_NO_MORE.match(place.after) and listed.search(place.before[:-6]))


# What is to be used, not what was counted: "test with two points", "find two corners"
_USED_BEFORE = re.compile(
    r"\b(?:with|from|at|which|what|any|use|using|pick|choose|take|compare|select|test|try|mark"
    r"|through|join|connect|substitute|of|in|on)(?: any| some| just| other)? $",
    re.I,
)
_TO_FIND = re.compile(r"\W*(?:(?:then|next|first|now|so) )?(?:find|spot|locate|get) ", re.I)
_ASKS_COUNT = re.compile(
    r"\b(?:how many|how much|number|total|altogether|sum|probabil\w+|fraction|ratio|percent\w*"
    r"|share|chance|difference|more|fewer|average|mean|perimeter|area|volume|slope|value|count)\b",
    re.I,
)
_MEASURES_BEHIND = re.compile(
    r" (?:[a-z]+ )?(?:squares|units|boxes|blocks|ticks|marks|steps|rows|columns|lines|places|spaces"
    r"|gridlines|cells|divisions|times|years|months|days|hours)\b"
)


def _is_count_of_others(place: Place) -> bool:
    """A count that is no answer."""
    value, before = place.value, place.clause_before
    if _is_grid(place):
        return True
    if before.endswith(" other ") or _GENERAL_BEFORE.search(before):
        return True
    noun = _NOUN_BEHIND.match(place.after)
    if _DATE_BEHIND.match(place.after) or _is_addend(place):
        return False
    if noun and DEFINITE_BEFORE.search(before):
        return True
    if value <= 3 and noun and _TO_FIND.fullmatch(before):
        return True
    if _STATED_BEFORE.search(before) or _LISTED_BEFORE.search(place.sentence_before):
        is_open = not place.asks_number or _OF_EACH.search(place.sentence_before)
        if noun and not _ASKS_COUNT.search(place.question):
            is_open = is_open or not _MEASURES_BEHIND.match(place.after)
        return value == 2 and bool(is_open)
    if value > 2 and not before.strip(" ;.,") and _COUNTED_ALOUD.match(place.after):
        return False
    if value == 2 and _PART_OF.match(place.after) and not place.asks_number:
        return _ASKS_COUNT.search(place.question) is None
    if value <= 3 and (_PARTITIVE.match(place.after) or _THE_BEFORE.search(before)):
        return True
    if _QUANTIFIED.search(before):
        return True
    return noun is not None and value <= 6 and not _LENGTH_BEHIND.match(place.after)


_DEFINITE_COUNT = re.compile(r"\b(?:the|these|those|both|all)(?: first| last| next)? $", re.I)
_DATE_BEHIND = re.compile(r"(?:st|nd|rd|th)\b")
# "two cups that touch count as one", "two triangles can share a side"
_IN_GENERAL = re.compile(
    r" [\w-]+(?: [\w-]+)? (?:that|which|who|if|count|can|may|make|exist|share|as)\b"
)
_MORE_OF_THEM = re.compile(r" more (?:[a-z]+s|are|lie|stand|sit|hang)\b")


def _is_addend(place: Place) -> bool:
    """ "left of the clock three cups stand", where the cups are to be counted."""
    before = place.clause_before
    if _DEFINITE_COUNT.search(before) or _OF_TWO.search(before) or _OF_EACH.search(before):
        return False
    if _QUANTIFIED.search(before) and not before.endswith("where "):
        return False
    if _MORE_OF_THEM.match(place.after):
        return re.search(r"\bhow many\b", place.question, re.I) is not None
    noun = _NOUN_BEHIND.match(place.after)
    if noun is None or _IN_GENERAL.match(place.after):
        return False
    stem = (noun[1] or noun[2])[:-1]
    if stem.casefold() not in place.question.casefold():
        return False  # a pattern costs more than this look
    asked = rf"\bhow many (?:[\w-]+ ){{0,2}}?{re.escape(stem)}"
    return re.search(asked, place.question, re.I) is not None


def _asks_for(noun: str, question: str) -> bool:
    """The question asks how many of the noun there are."""
    stem = re.escape(noun[:-1] if len(noun) > 4 else noun)
    return re.search(rf"\b(?:how many|number of)\b.{{0,60}}\b{stem}", question, re.I) is not None
