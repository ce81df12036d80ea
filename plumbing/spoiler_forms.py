"""Rules of plumbing.spoilers on answers of one form that a hint says in other words.

A time, a ratio, an inequality, a line, a share, a sign: each rule first asks whether the answer has
that form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from plumbing.answers import to_number
from plumbing.spoiler_case import Case, is_new
from plumbing.verdicts import UNDECIDED, decided_clauses

_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?: ?[ap]\.?m\.?)?", re.I)


def says_time(case: Case) -> Iterator[str]:
    """A clock time in words: "a quarter to 8" for 7:45, "half past 2" for 2:30."""
    time = _CLOCK.fullmatch(case.answer)
    if not time:
        return
    hour, minute = int(time[1]) % 12 or 12, int(time[2])
    ways = []
    for minutes, direction in ((minute, "past"), (60 - minute, "to")):
        spoken = {15: "(?:a )?(?:quarter|1/4)", 30: "(?:half|1/2)"}.get(minutes, rf"0?{minutes}")
        full_hour = hour if direction == "past" else hour % 12 + 1
        ways.append(rf"(?:{spoken}|{minutes})(?: minutes?)? {direction} {full_hour}\b")
    if minute and is_new(rf"\b(?:{'|'.join(ways)})", case):
        yield f"says the time: {case.answer}"


_RATIO = re.compile(r"(\d+) ?(?::|/|to|\\colon) ?(\d+)")
_ASKS_FACTOR = re.compile(r"\b(?:factor|ratio|scale|times)\b", re.I)
_MULTIPLE_WORDS = {2: "twice|doubled?|1/2|2 times", 3: "triple[ds]?|3 times"}
_FOR_EVERY = re.compile(r"\b(?:for every|for each|per) (\d+) [^;.]{0,40}?\b(\d+)\b", re.I)


def says_ratio(case: Case) -> Iterator[str]:
    """ "twice as long" for the ratio 1:2 or the factor 2, "for every 2 cats 3 dogs" for 2:3."""
    match = _RATIO.fullmatch(case.answer)
    if match and 0 not in (int(match[1]), int(match[2])):
        ratio = Fraction(int(match[1]), int(match[2]))
        pairs = {frozenset(pair) for pair in _FOR_EVERY.findall(case.text)}
        is_pair = frozenset(match.groups()) in pairs
    elif case.golds and case.golds[0].value and _ASKS_FACTOR.search(case.stem):
        ratio, is_pair = case.golds[0].value, False
    else:
        return
    factor = max(ratio, 1 / ratio)
    # "double it at the end" at the start of a sentence is a step
    words = _MULTIPLE_WORDS.get(factor, f"{factor} times")
    said = re.compile(rf"(?<=[\w,] )(?:{words}) (?:as|the|of|that|its)\b", re.I)
    if is_pair or (said.search(case.text) and not said.search(case.stem)):
        yield f"says the ratio: {case.answer}"


_RELATION = re.compile(r"[a-zA-Z] ?(<|>|\\leq?|\\geq?|<=|>=) ?(-?[\d./]+)")
_RELATION_WORDS = {
    "<": r"(?:less|smaller) than|below|under",
    ">": r"(?:greater|larger|more|bigger) than|above|over",
    "le": r"(?:less|smaller) than or equal to|at most|not (?:greater|more) than|up to",
    "ge": r"(?:greater|larger|more) than or equal to|at least|not (?:less|smaller) than",
}
_SIGN_NAMES = {"<": "<", ">": ">", "<=": "le", "\\le": "le", "\\leq": "le"}
_SIGN_NAMES |= {">=": "ge", "\\ge": "ge", "\\geq": "ge"}


_BELOW = "less|smaller|lower|below|down"
_MINUS = re.compile(r"\bminus (one\b|\d+)")


def _with_minus(text: str) -> str:
    """The text with signs: "minus 3" -> "-3"."""
    return _MINUS.sub(lambda match: "-1" if match[1] == "one" else f"-{match[1]}", text)


def says_relation(case: Case) -> Iterator[str]:
    """An inequality in words: "at least -3" for x >= -3."""
    relation = _RELATION.fullmatch(case.answer)
    if not relation:
        return
    words = _RELATION_WORDS[_SIGN_NAMES[relation[1]]]
    bound = re.escape(relation[2])
    beyond = "more|larger|greater|above|up" if ">" in relation[1] or "g" in relation[1] else _BELOW
    after = rf"|\b{bound} (?:or|and) (?:anything |everything |all )?(?:{beyond})\b"
    text = _with_minus(case.text)
    said = re.compile(rf"\b(?:{words}) {bound}(?!\d){after}")
    if said.search(text) and not said.search(case.stem):
        yield f"says the answer's expression: {case.answer}"


_LINE = re.compile(r"(?:y ?= ?)?(-?[\d./]*) ?\*? ?x(?: ?([-+] ?[\d./]+))?")
_SLOPE_OR_INTERCEPT = re.compile(
    r"\b(slope|gradient|intercept)\b(?: lies| is)?(?: (?:is|of|equals|at|equal to))? ?[=:]? ?"
    r"(-?\d[\d./]*)",
    re.I,
)
# "climbs 2 units for each unit to the right", "y is double the x-value"
_CLIMBS = re.compile(
    r"\b(?:(?:climbs?|rises?|up|grows?|increases?)|(falls?|drops?|down|sinks?|decreases?))(?: by)? "
    r"(\d+)(?: [a-z]+)? (?:for|per|with|at)\b",
    re.I,
)
_TIMES_X = re.compile(r"\b(?:(\d+) times|(double)|twice|(triple)) (?:the |that of |of )?x\b", re.I)
_CROSSES = re.compile(
    r"\b(?:vertical axis|y-axis|axis of y)(?: at)? (\d+) (?:[a-z]+ )?(above|below|under|over)\b",
    re.I,
)


def says_line(case: Case) -> Iterator[str]:
    """A line in words: "slope 2 and intercept -1" for y = 2x - 1."""
    line = _LINE.fullmatch(case.answer)
    if not line:
        return
    slope = line[1] + "1" if line[1] in ("", "-") else line[1]
    intercept = (line[2] or "0").replace(" ", "").lstrip("+")
    text = _with_minus(case.text)
    stated = set(_SLOPE_OR_INTERCEPT.findall(text))
    for falls, steps in _CLIMBS.findall(text):
        stated.add(("slope", f"-{steps}" if falls else steps))
    for factor, _, triple in _TIMES_X.findall(text):
        stated.add(("slope", factor or ("3" if triple else "2")))
    for steps, side in _CROSSES.findall(text):
        stated.add(("intercept", steps if side.casefold() in ("above", "over") else f"-{steps}"))
    for name, value in stated - set(_SLOPE_OR_INTERCEPT.findall(case.stem)):
        gold = intercept if name.casefold() == "intercept" else slope
        if to_number(value.rstrip(".")) == to_number(gold):
            yield f"says the answer's expression: {case.answer}"


_ABBREVIATED = {"S": "side", "A": "angle", "H": "hypotenuse", "L": "leg"}
_FORMULAS = {"oxygen": "O2", "hydrogen": "H2", "nitrogen": "N2", "chlorine": "Cl2"}
_FORMULAS |= {"carbon dioxide": "CO2", "water": "H2O", "ammonia": "NH3", "methane": "CH4"}
_FORMULAS |= {"northeast": "NE", "northwest": "NW", "southeast": "SE", "southwest": "SW"}
# Shades that have names of their own, and whose colour is the answer
_SHADES = """
    red crimson scarlet ruby vermilion cherry burgundy; blue navy azure cobalt indigo sapphire;
    green emerald olive jade; yellow lemon canary golden; purple violet lilac lavender mauve;
    violet purple lilac lavender mauve; brown chestnut hazel chocolate; pink magenta fuchsia rose;
    orange tangerine apricot; black ebony jet; white ivory snow; gray ashen slate; grey ashen slate
"""
_SHADES = {row.split()[0]: row.split()[1:] for row in _SHADES.split(";")}


def says_otherwise(case: Case) -> Iterator[str]:
    """ "angle-side-angle" for ASA, "O2" for oxygen, "a deep crimson" for red."""
    shades = _SHADES.get(case.answer.casefold())
    if shades and is_new(rf"(?i)\b(?:{'|'.join(shades)})\b", case):
        yield f"says the answer otherwise: {case.answer}"
    spelled = [_ABBREVIATED.get(letter, "") for letter in case.answer]
    if len(spelled) > 1 and all(spelled) and is_new(rf"(?i)\b{'[- ]'.join(spelled)}\b", case):
        yield f"says the answer otherwise: {case.answer}"
    formula = _FORMULAS.get(case.answer.casefold())
    if formula and is_new(rf"(?<![A-Za-z\d]){formula}(?![A-Za-z\d])", case):
        yield f"says the answer otherwise: {case.answer}"


_SHARE = re.compile(r"\b(one|1|\d+)(?: [a-z]+)? (?:out )?of (?:the )?(\d+)\b", re.I)
_PART = re.compile(
    r"\b(?:by|exactly|only|just|about) (?:a|one) (third|quarter|fifth|tenth)\b", re.I
)
_PARTS_OF_ONE = {"third": 3, "quarter": 4, "fifth": 5, "tenth": 10}
_REST = re.compile(
    r"\b(?:left|rest|remain\w*|stays?|not|un\w+ed|white|blank|empty|missing|gone|without)\b", re.I
)


def says_share(case: Case) -> Iterator[str]:
    """ "one box out of four" for 1/4, "just one of the four parts is left" for 3/4."""
    if not any(form < 1 for gold in case.golds for form in gold.forms):
        return
    said = set()
    for sentence in case.sentences:
        shares = {Fraction(1, _PARTS_OF_ONE[word.casefold()]) for word in _PART.findall(sentence)}
        for top, bottom in _SHARE.findall(sentence):
            if int(bottom[:9]) and f"of {bottom}" not in case.stem:
                shares.add(
                    Fraction(1 if top.casefold() == "one" else int(top[:9]), int(bottom[:9]))
                )
        said |= shares
        if _REST.search(sentence):
            said |= {1 - share for share in shares}
    for gold in case.golds:
        if said.intersection(gold.forms):
            yield f"says the share: {gold.part}"


# A trend or a direction, and what says it of this picture
_RISES = "rises climbs grows increases rose grew climbed"
_FALLS = "falls drops declines decreases sinks fell dropped declined sank"


def _said_of(verbs: str, stems: str, way: str, side: str) -> re.Pattern:
    """A pattern: "rises", "keeps rising", "points up", "is higher"."""
    return re.compile(
        rf"\b(?:{'|'.join(verbs.split())}|(?:keeps?|is|are|was|steadily) (?:{stems})ing"
        rf"|(?:goes|go|went|points?|runs?|opens?) {way}\w*|(?:is|are|was|lies) {side})\b",
        re.I,
    )


_TRENDS = [
    (
        re.compile(r"(?:it )?(?:increas\w+|ris\w+|rose|grow\w*|grew|upwards?|up)\.?", re.I),
        _said_of(_RISES, "ris|climb|grow|increas", "up", "higher"),
    ),
    (
        re.compile(r"(?:it )?(?:decreas\w+|f[ae]ll\w*|drop\w*|declin\w+|downwards?|down)\.?", re.I),
        _said_of(_FALLS, "fall|dropp|declin|decreas|sink", "down", "lower"),
    ),
]
_WHILE = re.compile(r"\b(?:as|while|with) (?:\w+ ){1,3}?(?:grows|rises|increases|falls|drops)\b")
_SLOPED = re.compile(r"\b(?:slope|correlation|trend|gradient)\b", re.I)
_OF_ANY_LINE = re.compile(r"^\W*(?:an?|any|every|each) |\b(?:where|that|which)\b", re.I)


def says_trend(case: Case) -> Iterator[str]:
    """ "the line keeps rising" for increasing; not "see whether it rises or falls"."""
    answer = case.answer
    if _SLOPED.search(case.stem):
        answer = {"positive": "up", "negative": "down"}.get(answer.casefold(), answer)
    gold = [place for place, (form, _) in enumerate(_TRENDS) if form.fullmatch(answer)]
    if not gold:
        return
    said, opposite = _TRENDS[gold[0]][1], _TRENDS[1 - gold[0]][1]
    for clause in decided_clauses(case.text):
        clause = _WHILE.sub(" ", clause)
        if _OF_ANY_LINE.search(clause) or not said.search(clause):
            continue
        if not opposite.search(clause):
            yield f"says the trend: {case.answer}"


_SIGN_SAID = {
    "negative": re.compile(
        r"\b(?:so|thus|hence|therefore)\b[^.;]*\bis (?:less than|below) 0\b", re.I
    ),
    ">": re.compile(r"\b(?:first|upper)\b[\w ]*\bis (?:greater|larger|more) than", re.I),
    "<": re.compile(r"\b(?:first|upper)\b[\w ]*\bis (?:less|smaller) than", re.I),
}


def says_sign(case: Case) -> Iterator[str]:
    """ "so a is less than zero" for negative, "the first is greater than the second" for ">"."""
    said = _SIGN_SAID.get(case.answer)
    if said is None:
        return
    for sentence in case.sentences:
        if not UNDECIDED.search(sentence) and said.search(sentence):
            yield f"says the sign: {case.answer}"
