"""Which numbers of a hint give nothing away, although the question does not state them?

`is_innocent` asks one question after the other: is the number a name, a part of a formula, a
general fact, a small count of things, a distractor? The tables of words are data: a new fact or
word goes there. All texts are as `number_words.normal` leaves them.
"""

from __future__ import annotations

import re
from fractions import Fraction

from plumbing.general_statements import is_general
from plumbing.innocent_counts import is_small_count
from plumbing.number_places import Place, units_in
from plumbing.number_words import any_of


def is_innocent(place: Place) -> bool:
    """The number gives nothing away. A form of the gold answer is innocent more rarely."""
    return any(relief(place) for relief in _RELIEFS)


# ------------------------------------------------------------------------------------- names

_NAMED_BY_NUMBER = """
    net angle figure fig picture image step line row column quadrant question problem part option
    case rule equation method group set class team player level stage round chapter section page
    grade day week trial test experiment box circle bus train route lane gate panel block series
    graph chart table diagram example sample category type machine tap zone region state phase
    player circuit resistor house room track plate street exercise shape pattern tank cell
"""
_NAME_BEFORE = re.compile(
    rf"(?:\b(?:{any_of(_NAMED_BY_NUMBER.split())}|like|such as|for example|e\.g\.|nearest"
    rf"|(?:group|step|multiple|bundle|row|power|pair)s? of)s?,? #?|∠ ?|\b[A-Za-z]_?\{{?|#|\bno\. ?)"
    r"(?:\d+(?:, (?:and )?| and | or | to |-| vs\.? ))*$",
    re.I,
)
_NOUN_BEFORE = re.compile(r"\b([A-Za-z]{4,}) (?:\d+(?:, (?:and )?| and | or | to |-))*$")
_ORDINAL_BEHIND = re.compile(r"(?:st|nd|rd|th)\b|-?[Dd]\b(?!')")
# "the second Tuesday is the 10th"; not "the 2nd row"
_DATE_BEHIND = re.compile(r"(?:st|nd|rd|th)(?: *$|[.,;:]| of [JFMASOND][a-z]{2,})")
_ASKS_DATE = re.compile(r"\bdate\b|\bday of the month\b", re.I)
_LETTER_BEFORE = re.compile(r"[A-Za-z](?:_\{?)?$")
_EXPONENT_BEFORE = re.compile(r"[A-Za-z)\]}] ?\^\{?$")
_LIST_MARK_BEFORE = re.compile(r"(?:^|[;.:] )\(?$")
_LIST_MARK_BEHIND = re.compile(r"[.)] ")


def _is_name(place: Place) -> bool:
    """ "net 2", "lines 1, 3 and 6", "R1", "2nd", "3D", "1. Read the bar"."""
    if _DATE_BEHIND.match(place.after) and _ASKS_DATE.search(place.question):
        return False
    if _ORDINAL_BEHIND.match(place.after) or _LETTER_BEFORE.search(place.before[-3:]):
        return True
    if _LIST_MARK_BEHIND.match(place.after) and _LIST_MARK_BEFORE.search(place.before):
        return not place.is_gold
    if place.is_gold:
        return False
    near = place.before[-40:]  # the patterns are costly, and a list of names is short
    if _NAME_BEFORE.search(near):
        return True
    listed = _NOUN_BEFORE.search(near)
    if listed is None:
        return False
    # the question numbers such things itself: "arrow number 3"
    noun = re.escape(listed[1].rstrip("s"))
    if noun.casefold() not in place.question.casefold():
        return False
    return re.search(rf"\b{noun}s? (?:number |no\.? )?\d", place.question, re.I) is not None


# ------------------------------------------------------------------------- formulas and facts

_CONSTANTS = {*map(Fraction, (2, 3, 4, 90, 100, 180, 360))}
_CONSTANTS |= {Fraction(1, 2), Fraction(1, 3), Fraction(1, 4), Fraction(4, 3)}
_FORMULA_BEFORE = re.compile(
    r"(?:[A-Za-z)\]}](?: [-+*/:^] |[-+*/:^])[({]{0,2}|\\sqrt ?\{?|[A-Za-z)}] over "
    r"|(?<!pi)(?<=[A-Za-z)])\}\{|\\frac ?\{[^{}\\]*[A-Za-z][^{}\\]*\}\{|\\sqrt ?\{?\d\}?: ?"
    r"|[A-Za-z] ?[-+] ?[A-Za-z] ?= ?)$"
)
_FORMULA_BEHIND = re.compile(
    r"[)}]? ?(?:[-+*/] ?[({\\]?(?!\d)[A-Za-z(\\]|times (?:[b-zB-Z]|pi)\b)"
    r"| ?(?:\\pi|\\sqrt|\\frac|pi\b|sqrt|\(|\|)"
    r"|(?!nd|rd|st|th)[a-zA-Z](?<![mgslL])(?![a-z]{2})"
    r"|[a-z] ?[-+=] ?[\da-z]| (?:bh|gh|ab|ah|lw|mv)\b"
)
_OVER_LETTER = re.compile(r" ?/ ?[A-Za-z|(\\]")
_FACTORS = {*map(Fraction, (2, 3, 4, 10, 12, 24, 60, 100, 1000))}
_FACTOR_BEFORE = re.compile(
    r"\b(?:divi[ds]\w*|multipl\w*|halve\w*|double\w*|teile\w*)\b[\w ,.'-]{0,40}"
    r" (?:by|par|durch|entre|por|mit|per) $|(?:times|over) $|[除乘]以$",
    re.I,
)
_TIMES_BEHIND = re.compile(r" times (?:the|its|one|a|an|that|this|as|pi|your)\b")
_HALVES = {Fraction(1, 2), Fraction(1, 3), Fraction(1, 4)}
_MEASURES = """
    product sum base difference perimeter diagonal diagonals central arc diameter circumference
    chord coefficient cylinder prism cube sphere
"""
_OF_MEASURE = re.compile(
    r" ?(?:of )?(?:the |its |their |that |this |each |an? )?(?:\w+ )?"
    rf"(?:{'|'.join(_MEASURES.split())})\b"
)


def _is_in_formula(place: Place) -> bool:
    """ "2 * pi * r", "(n - 2) * 180", "divide by 2", "half of the base times the height"."""
    value = place.value
    if _EXPONENT_BEFORE.search(place.before[-4:]):
        return True
    if value == 1 and _OVER_LETTER.match(place.after):
        return True
    if value in _CONSTANTS and not (place.unit and place.is_gold):
        if _FORMULA_BEHIND.match(place.after):
            return True
        if _FORMULA_BEFORE.search(place.before) and not re.match(r"\.?\d|}?\^", place.after):
            return True
        if value <= 4 and _TIMES_BEHIND.match(place.after) and " as" not in place.after[:9]:
            return not place.is_gold
    if value in _FACTORS and _FACTOR_BEFORE.search(place.clause_before):
        return True
    if place.is_gold or value != Fraction(1, 2):
        return value in _HALVES and _OF_MEASURE.match(place.after) is not None
    return "%" not in place.number.text


def _read_facts(rows: list[tuple[str, str]]) -> dict[Fraction, list[re.Pattern]]:
    """The patterns of each value."""
    facts = {}
    for values, pattern in rows:
        for value in values.split():
            facts.setdefault(Fraction(value), []).append(re.compile(pattern, re.I))
    return facts


# Values, then a pattern that their sentence must have.
_SENTENCE_FACTS = [
    ("100", r"%|percent|hundred|whole|out of|\bper 100"),
    ("6 30", r"numeral|minute hand\b.*per minute"),
    ("60", r"equilateral|minute|second|hour"),
    ("30 45 60", r"\b30\b.{1,10}\b60\b.{1,10}\b90\b|\b45\b.{1,10}\b45\b.{1,10}\b90\b|special"),
    ("6 30 0.5 1/2", r"\bhand\b.*(?:each|per|a|an|every|1) (?:minute|hour)\b"),
    (
        "3 6 9 12",
        r"^(?=.*\b(?:minute|long) hand\b).*\b(?:half past|quarter (?:past|to)|full hour)\b",
    ),
    ("15 30 45", r"\b(?:half|quarter|1/2|1/4|3/4)\b.*\b(?:turn|hour|dial)"),
    ("9 18 19", r"\bcarry\b|\bcarries\b"),
    ("1", r"\bslopes?\b.*perpendicular|perpendicular.*\bslopes?\b"),
    ("13", r"\bcolon(?:y|ies)\b"),
    ("1.73", r"\bm ?\^?2|\bm²|GFR"),
    (
        "28 29 30 31",
        r"\bdays\b.*\bdays\b|\bmonth|\bleap\b|\b(?:january|february|march|may|july)\b.*\bdays\b",
    ),
    ("12 24", r"noon|midnight|afternoon|p\.?m|Stunden|hours?\b|horas\b|heures\b|小时"),
    ("60", r"Minuten|\bminut[oi]s?\b|分钟|Sekunden|\bsegundos?\b|秒"),
    ("5", r"大格|\bMonday to Friday\b|\bweekdays\b|\bworking days\b"),
    ("7", r"opposite (?:faces|sides)"),
    ("50 1/2", r"%.*\b(?:more|less|over|under|middle|majority|whole|bar|level|median)\b|\bhalf\b"),
    ("50 1/2", r"\b(?:more|less|over|under|middle|majority)\b.*%"),
    ("1/10 1/100 1/1000", r"%|per ?cent|percent|decimal"),
    ("10 100 1000 10000 100000 1000000", r"等于|换算|=.*(?:米|克|升)"),
    ("0 1 2 3 4 5 6 7 8 9 10", r"\bdigits?\b|\bfrom 1 to 10\b|\b\d from (?:a |an )?\d\b"),
    ("2 3 4 5 6 7 8 9 10 11", r"divisib|multiples|\bprime"),
    (
        "10 100 1000",
        r"power|place value|\btens\b|decimal|centur|decade|factor of 10|\b10 times|\blog"
        r"|hundreds chart|\b100 (?:chart|board)|Richter|decibel|\bpH\b",
    ),
    ("50 25 12.5 75 1/2 1/4 1/8", r"\bhalf-?li(?:fe|ves)\b"),
    ("1 2 3 4", r"\b(?:carbon|nitrogen|oxygen|hydrogen|halogens?) .*\bbonds?\b"),
    ("4 5", r"\bgroups? of 5\b.*\bstroke\b|\bstroke\b.*\b(?:across|through)\b"),
    ("365 366", r"\bdays\b"),
    ("2", r"\beven\b|\bodd\b|binary|\bEuler"),
    ("5 12 30 60", r"\b(?:each|every|jede|full turn|marks)\b.*(?:\bminute|\bhour|dial|Minuten)"),
    ("5 12 30 60", r"(?:\bminute|\bhour|dial|(?<!')clock).*\b(?:each|every|full turn|marks)\b"),
    ("6 8 12", r"\bcubes?\b.*\b(?:edges|faces|corners|vertices)\b"),
    ("6 8", r"\b(?:insect|spider|animal|arachnid)s?\b.*\blegs\b"),
    (
        "1 2 3",
        r"\b(?:oxygen|hydrogen|chlorid|hydroxid|halogen)\w*\b"
        r".*(?:\b(?:charge|state|is|are)\b| [-+]\d)",
    ),
]
# Values, then a pattern that their sentence or the question must have.
_TOPIC_FACTS = [
    (
        "90 180 360",
        r"degree|angle|\bturn|circle|triang|polygon|quadril|straight|\barcs?\b|\bpie\b|sector"
        r"|rotat|bearing|compass|parallel|perpendicular|\bring\b|[∠°度角]|Winkel|\bgrad\b|clock",
    ),
    ("36", r"\b(?:die|dice)\b"),
    ("5 12 60", r"\b(?:clock|dial|hour hand|minute hand)\b"),
    ("12", r"\bmonths?\b|\bMonate?n?\b|\bmeses\b|\bmois\b|个月"),
    ("23.5 66.5", r"tropic|polar circle|latitude|equator|season|\btilt"),
    ("1/2", r"\bcoins?\b"),
    ("270", r"degree|quadrant|turn|angle"),
    ("13 26 52", r"\b(?:cards|deck)\b"),
    ("64", r"chess"),
    ("5 10 50 100 500 1000", r"Roman numeral|in Roman"),
    ("7 14", r"\bpH\b|neutral|week"),
    ("0 32 100 212 273 273.15 1.8 9/5 5/9", r"Celsius|Fahrenheit|Kelvin|°[CF]|freez|boil"),
    ("3.6 1000 3600", r"km/h|m/s|kilomet\w+ per hour|met\w+ per second"),
    ("1.6 1.61 1.609", r"\bmiles?\b"),
    ("2.54", r"\binch"),
    ("9.8 9.81 10", r"gravit|\bg\b|weight|\bfall"),
    ("340 343", r"\bsound\b"),
    ("300000 299792458", r"\blight\b"),
    ("8", r"\bbytes?\b|octet|\bshells?\b"),
    ("26", r"alphabet"),
    ("0.2 0.04 300 1500 25", r"\bE[CK]G\b|\bR(?: peaks?|-R)\b"),
]
_SENTENCE_FACTS = _read_facts(_SENTENCE_FACTS)
_TOPIC_FACTS = _read_facts(_TOPIC_FACTS)
_TURNS = (90, 180, 360)
_PI = re.compile(r"3\.14\d*|22/7")
_CIRCLE = re.compile(r"\bpi\b|circ|radius|diameter|disc|cylind|cone|spher", re.I)
_SAID_OF_ALL = re.compile(
    r"\b(?:adds? up|sum|total|full|straight|right angle|always|every|each|any|whole|complete)\b"
)
_SET_TO = re.compile(
    r"\b(?:set|put|let|where|when|with|if|substitute|plug in|starts?|begins?|at)\b[\w ,()-]{0,30}"
    r"(?:=|to|at|from|equals?|is) $"
)


# A power of ten as such, "10^{-3}"; "4.2 times 10^5" was read off
_POWER_OF_TEN = re.compile(r"10(?:\^|$)")
_POWER_BEHIND = re.compile(r"\^\{?-?\d")
_POWER_BEFORE = re.compile(r"\b10\^\{?-?$")
_MULTIPLIED = re.compile(r"\d ?(?:times|[*x]) ?$")
_SCALE_RUNS = re.compile(
    r"\bscale (?:runs|goes|ranges|reaches|extends) from -?\d+(?: \([^)]*\))? to -?(?:\d+)?$", re.I
)


def _is_of_scale(place: Place) -> bool:
    """A prefix's power of ten, a scale's ends: "the pH scale runs from 0 to 14"."""
    before = place.before
    if _POWER_BEFORE.search(before[-6:]):
        return True
    is_power = "^" in place.number.text or _POWER_BEHIND.match(place.after)
    if is_power and _POWER_OF_TEN.match(place.number.text):
        return _MULTIPLIED.search(before[-12:]) is None
    return "scale" in before.casefold() and _SCALE_RUNS.search(before) is not None


def _is_fact(place: Place) -> bool:
    """ "add up to 180 degrees", "100 %", "60 minutes in an hour", "set x = 0"."""
    if not place.is_gold and _is_of_scale(place):
        return True
    if place.value in (0, 1) and not place.before.endswith((" -", "=-")):
        return not place.is_gold or _SET_TO.search(place.clause_before) is not None
    if _PI.fullmatch(place.number.text) and _CIRCLE.search(f"{place.sentence} {place.question}"):
        return not place.is_gold
    if place.unit and _is_conversion(place):
        return True
    if not place.is_gold and _is_convention(place):
        return True
    if place.value in _THOUSANDS and _ONE_UNIT.search(place.clause_before):
        return True
    if place.unit and place.value in _TURNS and place.unit[0] != "angle":
        return False
    if place.is_gold and not _SAID_OF_ALL.search(place.clause):
        return False
    if _has_fact(place.value, _SENTENCE_FACTS, place.sentence):
        return True
    return _has_fact(place.value, _TOPIC_FACTS, f"{place.sentence} {place.question}")


# What a thing is worth by convention: "a dime is 10 cents", "a flat stands for 100"
_WORTHS = dict(
    quarter=25, dime=10, nickel=5, penny=1, pennie=1, flat=100, rod=10, long=10, block=1000
)
_WORTH_BEFORE = re.compile(
    rf"\b({'|'.join(_WORTHS)})s?\b(?: (?:is|are|as|counts?|stands|worth|each|for|a))* ?[(=:]? ?$",
    re.I,
)
_POINTS_TO_TRY = re.compile(r"\b[a-z] ?= ?-?\d+ (?:or|and) (?:at )?[a-z] ?= ?-?$")
_MONTHS = (
    r"(?:january|february|march|april|may|june|july|august|september|october|november|december)"
)
_OF_MONTH = re.compile(rf"(?:st|th)?(?: of)? {_MONTHS}\b", re.I)
_MONTH_BEFORE = re.compile(rf"\b{_MONTHS} $", re.I)
_LATER_IGNORED = re.compile(r"[^.;]{0,30}[;,] (?:no \w+|nothing)(?: here)? (?:needs|uses)\b")


def _is_convention(place: Place) -> bool:
    """What a coin or a block is worth, a stem of the question's tens, "x = 1 or x = -1"."""
    worth = _WORTH_BEFORE.search(place.clause_before)
    if worth and _WORTHS[worth[1].casefold()] == place.value:
        return True
    if place.value in (28, 29, 30, 31) and (
        _OF_MONTH.match(place.after) or _MONTH_BEFORE.search(place.before)
    ):
        return True  # a month's last day
    if place.value in range(1, 10) and "stem" in place.sentence:
        tens = f"{place.value}0|{place.value + 1}0"  # "below 70" asks for the stem 6
        return re.search(rf"\b(?:{tens})\b", place.question) is not None
    if place.value == 1 and _POINTS_TO_TRY.search(place.before):
        return True
    return _LATER_IGNORED.match(place.after) is not None


def _has_fact(value: Fraction | float, facts: dict, text: str) -> bool:
    return any(pattern.search(text) for pattern in facts.get(value, ()))


def _is_conversion(place: Place) -> bool:
    """The number times its unit is one of another unit in the clause: "an hour has 60 minutes"."""
    dimension, size = place.unit
    larger = (dimension, place.value * size)
    if place.value > 1 and larger in units_in(place.clause):
        return True
    return place.value in _POWERS_OF_TEN and _ONE_UNIT.search(place.clause) is not None


_POWERS_OF_TEN = {Fraction(10**exponent) for exponent in range(1, 10)}
_THOUSANDS = {Fraction(1000**exponent) for exponent in range(1, 4)}
_ONE_UNIT = re.compile(r"\b(?:one|1) [a-z]+", re.I)


# -------------------------------------------------------------------------------------- years

_YEAR = re.compile(r"(?:1[0-9]|20)\d\d")


def _is_year(place: Place) -> bool:
    """A year beside other years: the question or its options have one too, and it is no answer."""
    if place.unit or place.is_gold or not _YEAR.fullmatch(place.number.text):
        return False
    return _YEAR.search(place.question) is not None


# --------------------------------------------------------------------------------- distractors

_IGNORE = re.compile(
    r"\b(?:ignore|skip|disregard|leave out|does not (?:matter|count)"
    r"|(?:do not|don't|never) (?:matter|count|use|compute|take|read|add|confuse|mix|include|stop)"
    r"|not (?:asked|wanted|meant|what is asked|part of the question)"
    r"|not needed|irrelevant|plays? no part)\b",
    re.I,
)
_PITFALL = re.compile(r"\b(?:misread\w*|decoy|trap|pitfall|distract(?:s|or|ion|ing))\b", re.I)


def _is_distractor(place: Place) -> bool:
    """ "ignore the 70 on the wall"; "the height at 2, an easy misread"."""
    if place.is_gold:
        return False
    return bool(_IGNORE.search(place.clause) or _PITFALL.search(place.sentence))


# ---------------------------------------------------------------------------- general statements


def _is_said_of_all(place: Place) -> bool:
    """ "a hexagon has angles of 120 degrees", "remember that a dime is 10 cents", "not 100"."""
    if place.is_gold or (place.number.decimals == 2 and place.unit and place.unit[0] == "money"):
        return False  # "a coffee costs $3.25" is read off
    return is_general(place.sentence_before, place.sentence) or _describes_kinds(place)


_TAKEN_OUT = re.compile(r" {2,}")
_ASKS_TO_COMPARE = re.compile(
    r"\b(?:most|least|more|less|fewer|fewest|first|last|how|\w+est"
    r"|(?:larg|high|small|great|long|tall|low|short|fast|slow|heavi|cheap)er)\b",
    re.I,
)


def _describes_kinds(place: Place) -> bool:
    """A small count in a sentence on several kinds, which were taken out: "2 for sp, 3 for sp2"."""
    if place.unit or place.value not in range(13) or _ASKS_TO_COMPARE.search(place.question):
        return False
    return len(_TAKEN_OUT.findall(place.sentence)) > 1


_FULL_RANGE = re.compile(
    r"1(?<![\d.]1)(?: ?(?:to|through|-|,? ?\\l?dots,?|, ?\.\.\.,?) ?"
    r"|(?:, \d)*(?:,|,? and|,? or) )"
    r"(\d)(?![\d.]\d|\d)"
)


def _is_of_full_range(place: Place) -> bool:
    """ "the digits 1 to 4" of a sudoku: all candidates from 1 up to a number of the question."""
    if place.value not in range(1, 10):
        return False
    text = place.before + place.number.text + place.after
    start = len(place.before)
    for match in _FULL_RANGE.finditer(text):
        last = int(match[1])
        listed = [int(digit) for digit in re.findall(r"\d", match[0])]
        is_range = listed == [1, last] and last > 2 or listed == list(range(1, last + 1))
        if is_range and match.start() <= start < match.end():
            asks = re.search(rf"(?<![\d.]){last}(?![\d.])|sudoku", place.question, re.I)
            return last > 2 and asks is not None
    return False


_RUNS = re.compile(r"[=∈{(] ?-?[01](?: ?, ?\d)* ?, ?(?:\\[lc]?dots|\.\.\.)")


def _is_of_index(place: Place) -> bool:
    """ "k = 1, 2, \\dots": the first values of an index that runs."""
    if place.value not in range(5):
        return False
    text = place.before[-20:] + place.number.text + place.after
    start = len(place.before[-20:])
    return any(run.start() < start < run.end() for run in _RUNS.finditer(text))


_SCALE_BEFORE = re.compile(
    r"(?:\b(?:in|per|by|of|as|from|to|into|times)|\()(?: the| whole| full)? ?$", re.I
)


def _is_scale_word(place: Place) -> bool:
    """ "revenue in million euros", "(thousand units)"."""
    if place.is_gold or place.value not in _SCALE_VALUES:
        return False
    return _SCALE_BEFORE.search(place.before) is not None


_SCALE_VALUES = {Fraction(100), *_THOUSANDS}


_RELIEFS = (
    _is_of_index,
    _is_scale_word,
    _is_of_full_range,
    _is_name,
    _is_in_formula,
    _is_fact,
    is_small_count,
    _is_year,
    _is_distractor,
    _is_said_of_all,
)
