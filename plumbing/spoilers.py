"""Does a text give the answer away?

`find_spoilers` climbs a ladder of rules, `_RULES`. Each rule is one function that reads a
`spoiler_case.Case` and yields reasons. The central rule, `_states_number`, asks of each number of
the hint whether the question states it. If not, it was read off the picture or computed: a leak,
unless plumbing.innocent_numbers knows better. The rules are strict: a good hint that they reject is
written anew.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import cache, lru_cache

from plumbing.answers import ARTICLES, DIGIT_OR_COMMAND, YES_OR_NO, split_unit, to_number
from plumbing.innocent_numbers import Place, is_innocent, unit_of, units_in
from plumbing.number_words import Number
from plumbing.spoiler_case import (
    CHOSEN,
    END_OF_CLAUSE,
    LETTERS,
    ORDINALS,
    Case,
    Gold,
    has_word,
    part_value,
    plain_words,
    read_case,
    sentences,
    whole_numbers,
)
from plumbing.verdicts import (
    COMMON_WORDS,
    UNDECIDED,
    decides_between_two,
    excludes_one_by_one,
    says_equal,
    says_yes_or_no,
)


def find_spoilers(
    text: str, question: str, answer: str, choices: list[str] | None = None
) -> list[str]:
    """Reasons why the text of a hint gives something away; an empty list: it may be used.

    text: the hint; question: the question's text, with its options in it or in `choices`; answer:
    the gold answer. The reasons come in the order of `_RULES`. What the question itself states or
    names outside of its options may be repeated.
    """
    case = read_case(text, question, answer, choices)
    return list(dict.fromkeys(reason for rule in _RULES for reason in rule(case)))


# ------------------------------------------------------------------------ the answer is named

# "the answer is", "solution:", "the correct option has"; not "choose the correct option"
_VERBS = "choose select find pick mark identify"
_NOT_SOUGHT = "".join(rf"(?<!{verb} the )" for verb in _VERBS.split())
_ANSWER_IS = re.compile(
    r"\b(?:answer|solution)\s*(?:is|:|=|must be|should be|equals)"
    rf"|{_NOT_SOUGHT}\b(?:correct|right) (?:option|choice|answer) (?!and\b|among\b|by\b)",
    re.I,
)
_ANSWER_WORDS = ("answer", "solution", "option", "choice")
# "the answer is an amount of money", "the answer is the figure that disagrees with the others"
_IS_OF_KIND = re.compile(
    r"\banswer (?:is|must be|should be) (?:"
    r"an? (?:whole |single |simple |positive |mixed )?"
    r"(?:amount|number|fraction|percentage|length|angle|area|word|name|ratio|price|year|date"
    r"|decimal|quantity|probability|time|measure|difference|sum|product|count|total|colou?r|letter"
    r"|month|day|place|volume|distance|speed|interval|expression)\b(?! (?:near|close|that|which))"
    r"|the (?:figure|one|item|name|option|value|number|word) (?:that|which|whose)\b"
    r"(?=.*\b(?:others|all|asked|same|remains)\b))",
    re.I,
)
_ANY_DIGIT = re.compile(r"\d")
_DEPENDS = re.compile(r"\b(?:if|whether|unless|otherwise|when|depending)\b", re.I)


def _names_answer(case: Case) -> Iterator[str]:
    """ "the answer is the second one"; not "the answer is yes if both agree"."""
    if not any(word in case.words for word in _ANSWER_WORDS):
        return
    for sentence in case.sentences:
        if _IS_OF_KIND.search(sentence) and not _ANY_DIGIT.search(sentence):
            continue
        if _ANSWER_IS.search(sentence) and not _DEPENDS.search(sentence):
            yield "names the answer"


# ------------------------------------------------------------------------------------ numbers


def _states_number(case: Case) -> Iterator[str]:
    """The hint states a number that the question does not: read off, computed, or the answer."""
    question = " ".join((case.stem, *case.options))
    for number in case.numbers:
        if _is_known(number, case):
            continue
        gold = _gold_of(number, case)
        if not gold and _combines_known(number, case):
            continue
        if is_innocent(Place(number, case.text, question, gold is not None)):
            continue
        yield (
            f"holds the answer's number: {gold.part}" if gold else f"states a number: {number.text}"
        )


_COUNTED = re.compile(
    r"\b(?:the|these|all|of|die|der|den|alle|las|los|les|des|i|gli|as|os) $", re.I
)


def _is_known(number: Number, case: Case) -> bool:
    """The question states the number, or it counts the options: "the four years"."""
    if any(value in case.known for value in number.values):
        return True
    if number.values[0] != len(case.options):
        return False
    return _COUNTED.search(case.text, max(0, number.start - 8), number.start) is not None


_PLAIN_FACTORS = {*map(Fraction, (1, 2, 3, 4, 90, 100, 180, 360))}


def _combines_known(number: Number, case: Case) -> bool:
    """An expression of stated and general numbers, not worked out: "60/360"."""
    pieces = whole_numbers(number.text)
    if len(pieces) < 2 or "." in number.text:
        return False
    return pieces <= case.known | _PLAIN_FACTORS and not pieces.isdisjoint(case.known)


def _gold_of(number: Number, case: Case) -> Gold | None:
    """The part of the answer that a number is a form of: 0.33 of 1/3, 2 hours of 120 minutes."""
    for gold in case.golds:
        for value in number.values:
            if any(_is_rounded(form, value, number.decimals) for form in gold.forms):
                return gold
        if _converts(number, gold, case):
            return gold
    return None


def _is_rounded(gold: Fraction | float, value: Fraction | float, decimals: int) -> bool:
    """The value is the gold value, exactly or rounded to at least two decimals."""
    if value == gold:
        return True
    if decimals < 2 or max(value, gold) > 1e15:
        return False
    return abs(float(value) - float(gold)) * 10**decimals <= 0.5


def _converts(number: Number, gold: Gold, case: Case) -> bool:
    """The number is the gold one in another unit of the same dimension."""
    unit = unit_of(number, case.text)
    if unit is None or not isinstance(gold.value, Fraction):
        return False
    gold_units = units_in(gold.part) or units_in(case.stem)
    if not gold_units or gold_units[-1][0] != unit[0] or gold_units[-1][1] == unit[1]:
        return False
    return any(value * unit[1] == gold.value * gold_units[-1][1] for value in number.values)


# What stands before a computed result: "= ", "adds up to "
_RESULT = re.compile(
    r"""
    (?: = | ≈ | → | \\approx | \\Rightarrow
      | \b(?: equals? | equal[ ]to | gives? | giving | makes? | making | yields? | totals?
            | comes?[ ]to | adds?[ ]up[ ]to | sums?[ ](?:up[ ])?to | sum[ ]is
            | total[ ](?:is|of) | result[ ]is | leaves | get | there[ ](?:is|are)
          )\b
    )
    [\s:~]* (?:exactly|only|about)? \s* [-+$€£]? \s* $
    """,
    re.VERBOSE | re.I,
)


_GOES_ON = re.compile(r" ?[-+*/^(\\]|[A-Za-z]\b")  # "= 3k + 2" is no result


def _repeats_result(case: Case) -> Iterator[str]:
    """The answer is a number of the question, and the hint states it as a result: "25 + 25 = 50".

    A result that the question states itself may be repeated.
    """
    for number in case.numbers:
        if not _is_known(number, case):
            continue
        gold = _gold_of(number, case)
        if gold is None or _GOES_ON.match(case.text, number.end):
            continue
        result = _RESULT.search(case.text[max(0, number.start - 30) : number.start])
        if result and f"{result[0].strip()} {number.text}" not in case.stem:
            yield f"states the answer as a result: {gold.part}"


_TERM = r"\(?(?:\d[\d,]*(?:\.\d+)?|\.\d+|\\sqrt ?\{?\d+\}?)(?: ?%)?(?:\^\{?\d\}?)?\)?"
_WORKED = re.compile(
    rf"(?<![\d.,]){_TERM}(?: ?(?:[-+*/:^x]|times|plus|minus|divided by|over) ?{_TERM})+"
)
_GOES_ON_IN_LETTERS = re.compile(r"(?<=/\d) ?(?:bh|gh|ab|ah|lw|mv)\b")  # "1/2 bh" is a formula
_DEGREES = re.compile(r" ?(?:°|\^\{?\\circ\}?|degrees?\b)")
_OPERATORS = {"times": "*", "x": "*", "plus": "+", "minus": "-", "divided by": "/", "over": "/"}


def _works_out(case: Case) -> Iterator[str]:
    """An expression of numbers whose value is the answer: "4 times 4 euros" for 16."""
    if not case.golds:
        return
    for match in _WORKED.finditer(_DEGREES.sub("", case.text)):
        expression = match[0]
        if expression in case.stem or _GOES_ON_IN_LETTERS.search(case.text, match.end()):
            continue
        for word, sign in _OPERATORS.items():
            expression = expression.replace(word, sign)
        value = to_number(expression)
        for gold in case.golds if value is not None else ():
            if any(math.isclose(abs(value), form, rel_tol=1e-12) for form in gold.forms):
                yield f"works out the answer: {gold.part}"


_DIGITS = re.compile(r"[-+]?[\d,.]+ ?%?")
_NO_DIGIT = re.compile(r"\D")
_BETWEEN_DIGITS = re.compile(r"[-_*|,. ]")


def _spells_number(case: Case) -> Iterator[str]:
    """The hint has the number's digits apart or reversed: "1-2-0" and "021" for 120.

    Reversed digits may be a number of the question. A number of one digit cannot be spelled.
    """
    for part in case.parts:
        bare = split_unit(part)[0]
        digits = _NO_DIGIT.sub("", bare)
        if not _DIGITS.fullmatch(bare) or len(digits) < 2:
            continue
        backwards = digits[::-1]
        spelled = rf"(?<!\d){backwards}(?!\d)"
        if backwards != digits and backwards in case.text and _is_new(spelled, case):
            yield f"spells the answer's number: {part}"
        apart = "[-_*|,. ]*".join(digits)
        spelled = rf"(?<![\d.])(?<!\d )(?!{digits}){apart}(?![\d.]\d)(?!\d)"
        if digits in _BETWEEN_DIGITS.sub("", case.text) and _is_new(spelled, case):
            yield f"spells the answer's number: {part}"


def _is_new(pattern: str, case: Case) -> bool:
    """The pattern occurs in the hint, but not in the question."""
    return re.search(pattern, case.text) is not None and re.search(pattern, case.stem) is None


_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?: ?[ap]\.?m\.?)?", re.I)


def _says_time(case: Case) -> Iterator[str]:
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
    if minute and _is_new(rf"\b(?:{'|'.join(ways)})", case):
        yield f"says the time: {case.answer}"


_RATIO = re.compile(r"(\d+) ?(?::|/|to|\\colon) ?(\d+)")
_TWICE = re.compile(r"\b(?:twice|doubled?|1/2|2 times) (?:as|the|of|that)\b", re.I)
_FOR_EVERY = re.compile(r"\b(?:for every|for each|per) (\d+) [^;.]{0,40}?\b(\d+)\b")


def _says_ratio(case: Case) -> Iterator[str]:
    """ "twice as long" for the ratio 1:2, "for every 2 cats there are 3 dogs" for 2:3."""
    match = _RATIO.fullmatch(case.answer)
    if not match or 0 in (int(match[1]), int(match[2])):
        return
    ratio = Fraction(int(match[1]), int(match[2]))
    factor = max(ratio, 1 / ratio)
    said = _TWICE if factor == 2 else re.compile(rf"\b{factor} times (?:as|the|that)\b")
    pairs = {frozenset(pair) for pair in _FOR_EVERY.findall(case.text)}
    is_factor = said.search(case.text) and not said.search(case.stem)
    if is_factor or frozenset(match.groups()) in pairs:
        yield f"says the ratio: {case.answer}"


# ------------------------------------------------- an option's letter, its place, all other options

# "point B" names a point, not the option; "label B" does so too, unless letters are the options.
_POINTS = """
    point vertex angle line side node vertices segment ray arc circle centre center triangle
"""
_POINTS = set(_POINTS.split())
_LABELS = {"label", "labelled", "labeled", "shop", "team", "layer", "region", "bar", "set"}
_ASKED = re.compile(r"\b(?:which|what)(?: of the(?: \w+)?)? ((?!of|is|are\b)[a-z]{3,})", re.I)
_LONE_CAPITAL = re.compile(r"(?<![\w'=+*/^-])[B-HJ-Z](?![\w'=+*/^-])")
_WORD_BEFORE = re.compile(r"(\w+) $")
_CAPITALS = re.compile(r"(?<![A-Za-z])[A-Z]{1,4}(?![A-Za-z])")
_WORDS_OF_ONE_LETTER = "AI"


def _names_option(case: Case) -> Iterator[str]:
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
    if letter in _WORDS_OF_ONE_LETTER:
        return False
    if any(letter in name for name in _CAPITALS.findall(case.stem)):
        return False
    asked = {noun.casefold().rstrip("s") for noun in _ASKED.findall(case.stem)}
    are_options = bool(case.options) and not case.answer
    labels = (_POINTS if are_options else _POINTS | _LABELS | {"at", "and"}) - asked
    for match in _LONE_CAPITAL.finditer(case.text):
        before = _WORD_BEFORE.search(case.text[max(0, match.start() - 20) : match.start()])
        is_name = before and before[1].casefold().rstrip("s") in labels
        if match[0] == letter and not is_name:
            return True
    return False


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
        rf"\b{_ORDINAL} of (?:those|the ones) listed\b",
        rf"\bonly the {_ORDINAL} one\b",
        rf"\b{_LIST}\b.*\bthe {_ORDINAL}(?! [a-z])",
    )
]
_PLACED_THING = re.compile(rf"\b{_ORDINAL} (?P<noun>[a-z]+)", re.I)
_AGREES = re.compile(
    rf"\b{_ORDINAL} (?:claim|statement|sentence) (?:agrees|holds|is true|is right|is correct)\b",
    re.I,
)
_ANY_ORDINAL = re.compile(rf"\b(?:{'|'.join(ORDINALS)}|last)\b", re.I)
_PLACE_WORD = re.compile(rf"\b(?:{_ORDINAL}|{_LIST})\b", re.I)
_NEIGHBOUR = re.compile(
    r"\b(?:after|before|above|below|between|next to)\b[^,;]*\b(?:the|list of) (?:options|choices)\b"
)


def _names_place(case: Case) -> Iterator[str]:
    """ "the second choice", "option 2", "listed last"; "the second word" of "Which word ...?"."""
    if case.place is None:
        return
    asked = {noun.casefold() for noun in _ASKED.findall(case.stem)} if case.options else set()
    for sentence in case.sentences:
        if not _PLACE_WORD.search(sentence):
            continue
        if _NEIGHBOUR.search(sentence):
            yield f"names the option's place: {case.letter}"
        if _leaves_one_place(sentence, case):
            yield f"names the option's place: {case.letter}"
        if len(_ANY_ORDINAL.findall(sentence)) > 1:
            continue
        matches = [match for name in _PLACE_NAMES for match in name.finditer(sentence)]
        things = _PLACED_THING.finditer(sentence)
        matches += [match for match in things if match["noun"].casefold() in asked]
        if case.options and "statement" in case.stem_words:
            matches += list(_AGREES.finditer(sentence))
        if any(_is_gold_place(match["ordinal"].casefold(), case) for match in matches):
            yield f"names the option's place: {case.letter}"


_RUN = re.compile(rf"\b(first|last) (\d) {_LIST}", re.I)
_IN_MIDDLE = re.compile(rf"\bin the middle of the (?:answer|option|choice)|\bmiddle {_LIST}", re.I)


def _leaves_one_place(sentence: str, case: Case) -> bool:
    """ "the first three candidates fail" of four; "the one in the middle of the answer row"."""
    last = len(case.options) - 1
    run = _RUN.search(sentence)
    if run and int(run[2]) == last and _OUT.search(sentence):
        return case.place == (last if run[1].casefold() == "first" else 0)
    return last % 2 == 0 and case.place == last // 2 and bool(_IN_MIDDLE.search(sentence))


def _is_gold_place(ordinal: str, case: Case) -> bool:
    """The gold option stands in that place; where the options are unknown, "last" may be it."""
    if ordinal in ("last", "final"):
        return not case.options or case.place == len(case.options) - 1
    place = int(ordinal) - 1 if ordinal.isdecimal() else ORDINALS.index(ordinal)
    return place == case.place


_OUT = re.compile(
    r"\b(?:rul\w+ out|eliminat\w+|discard\w*|exclud\w+|reject\w*|cross\w* out|cannot|can't|fails?"
    r"|drop\w*|strike|struck|impossible|wrong|nor|not|out)\b",
    re.I,
)


# "a dilation changes lengths, a translation keeps directions" tells no picture
_OF_A_KIND = re.compile(r"\W*(?:an?|any|every) ", re.I)
_LISTED_TO_CHOOSE = re.compile(r"\b(?:among|between|whether|pick|choose|select)\b.*\bor\b", re.I)


def _excludes_others(case: Case) -> Iterator[str]:
    """A sentence names all options but the gold one: "A, B and D cannot be it".

    Letters count only with such a word, or where they can be nothing but options.
    """
    if case.place is None or len(case.options) == 2:
        return
    letters = list(LETTERS[: len(case.options) or 4])
    are_options = not case.answer and not _CAPITALS.search(case.stem)
    gold = plain_words(case.answer).strip()
    others = [letter for letter in letters if letter != case.letter]
    by_letter = all(letter in case.full for letter in others)
    full_words = plain_words(case.full)
    by_words = gold and all(name in full_words for name in case.other_options)
    if not (by_letter or by_words):
        return
    for sentence in sentences(case.full):
        if _LISTED_TO_CHOOSE.search(sentence):
            continue
        is_out = _OUT.search(sentence)
        if not is_out and (_OF_A_KIND.match(sentence) or gold.isdecimal()):
            continue
        if (are_options or is_out) and _only(others, case.letter, sentence):
            yield "excludes all other options"
        if gold and case.options and _only(case.other_options, gold, plain_words(sentence)):
            yield "excludes all other options"


def _only(others: list[str], gold: str, sentence: str) -> bool:
    """The sentence names all others, but not the gold one."""
    return all(has_word(name, sentence) for name in others) and not has_word(gold, sentence)


# -------------------------------------------------------------------------------- expressions

_EXPRESSION_DRESS = re.compile(r"[\s{}\\*_]|(?:cdot|times)")


_IS_PI = re.compile(r"(?:=|is|equals|exactly|length)pi(?![a-z/])")


def _holds_expression(case: Case) -> Iterator[str]:
    r"""The hint has the expression, and the question has not: "3 x + 1" for 3x+1.

    Blanks, braces, backslashes and signs of multiplication do not count: \sqrt{3} is sqrt3.
    """
    parts = [part for part in case.parts if DIGIT_OR_COMMAND.search(part)]
    parts = [part for part in parts if "\\" in part or part_value(part) is None]
    if not parts:
        return
    text, stem = (_EXPRESSION_DRESS.sub("", side).casefold() for side in (case.text, case.stem))
    for part in parts:
        bare = _EXPRESSION_DRESS.sub("", part).casefold()
        if bare == "pi" and not _IS_PI.search(text):
            continue
        if bare in text and bare not in stem:
            yield f"holds the answer's expression: {part}"


_RELATION = re.compile(r"[a-zA-Z] ?(<|>|\\leq?|\\geq?|<=|>=) ?(-?[\d./]+)")
_RELATION_WORDS = {
    "<": r"(?:less|smaller) than|below|under",
    ">": r"(?:greater|larger|more|bigger) than|above|over",
    "le": r"(?:less|smaller) than or equal to|at most|not (?:greater|more) than|up to",
    "ge": r"(?:greater|larger|more) than or equal to|at least|not (?:less|smaller) than",
}
_SIGN_NAMES = {"<": "<", ">": ">", "<=": "le", "\\le": "le", "\\leq": "le"}
_SIGN_NAMES |= {">=": "ge", "\\ge": "ge", "\\geq": "ge"}


_MINUS = re.compile(r"\bminus (one\b|\d+)")


def _says_relation(case: Case) -> Iterator[str]:
    """An inequality in words: "at least -3" for x >= -3."""
    relation = _RELATION.fullmatch(case.answer)
    if not relation:
        return
    words = _RELATION_WORDS[_SIGN_NAMES[relation[1]]]
    bound = re.escape(relation[2])
    sign = _RELATION_WORDS[_SIGN_NAMES[relation[1]]].split("|")[0].split(")")[0].removeprefix("(?:")
    after = rf"|{bound} or (?:anything )?(?:{sign}|larger|more|up)\b" if ">" in relation[1] else ""
    text = _MINUS.sub(lambda match: "-1" if match[1] == "one" else f"-{match[1]}", case.text)
    said = re.compile(rf"\b(?:{words}) {bound}(?!\d){after}")
    if said.search(text) and not said.search(case.stem):
        yield f"says the answer's expression: {case.answer}"


_LINE = re.compile(r"(?:y ?= ?)?(-?[\d./]*) ?\*? ?x(?: ?([-+] ?[\d./]+))?")
_SLOPE_OR_INTERCEPT = re.compile(
    r"\b(slope|gradient|intercept)\b(?: (?:is|of|equals|at|equal to))? ?[=:]? ?(-?\d[\d./]*)", re.I
)


def _says_line(case: Case) -> Iterator[str]:
    """A line in words: "slope 2 and intercept -1" for y = 2x - 1."""
    line = _LINE.fullmatch(case.answer)
    if not line:
        return
    slope = line[1] + "1" if line[1] in ("", "-") else line[1]
    intercept = (line[2] or "0").replace(" ", "").lstrip("+")
    stated = set(_SLOPE_OR_INTERCEPT.findall(case.text))
    for name, value in stated - set(_SLOPE_OR_INTERCEPT.findall(case.stem)):
        gold = intercept if name.casefold() == "intercept" else slope
        if to_number(value.rstrip(".")) == to_number(gold):
            yield f"says the answer's expression: {case.answer}"


# -------------------------------------------------------------------------------------- words

_HINT_TALK = """
    left right upper lower top bottom middle centre center front back number value amount total kind
    type line point side picture figure axis table graph chart bar label part area answer such
"""
_HINT_TALK = set(_HINT_TALK.split())


def _holds_words(case: Case) -> Iterator[str]:
    """The answer's words, in other forms too, or spelled; not where the question has them.

    Words that are offered beside another candidate are fine: "decide whether it is X or Y".
    """
    for part in case.parts:
        if (DIGIT_OR_COMMAND.search(part) and not case.options) or part_value(part) is not None:
            continue
        words = " ".join(word for word in plain_words(part).split() if word not in ARTICLES)
        words = words.removesuffix(" one")
        if not words or words in YES_OR_NO:
            continue
        if _holds_form(words, case.stem_words):
            if _chooses(words, case):
                yield f"holds the answer's text: {part}"
        elif _holds_form(words, case.words):
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
    name = re.escape(words)
    if re.search(rf"\b(?:must be|has to be) {name}\b", case.words):
        return True
    verdict = re.compile(rf"\b{name}\b(?: \w+){{0,2}} {_VERDICT}\b")
    for clause in END_OF_CLAUSE.split(case.text.casefold()):
        match = None if UNDECIDED.search(clause) else verdict.search(clause)
        if match and (match["comparison"] or "") in case.stem_words:
            return True
    return False


_OFFER = re.compile(r"\b(?:whether|between|either|decide|could be)\b.*\b(?:or|and)\b", re.I)


def _offers(sentence: str) -> bool:
    """The sentence offers several candidates and chooses none."""
    return _OFFER.search(sentence) is not None and CHOSEN.search(sentence) is None


def _word_of_answer(case: Case) -> Iterator[str]:
    """Only the gold option has the word, and the hint uses it: the surname of "Claude Monet".

    Without options, any word of an answer of at most three words, but for what hints are made of.
    """
    answer = plain_words(case.answer).split()
    if not case.options and (len(answer) > 3 or DIGIT_OR_COMMAND.search(case.answer)):
        return
    others = " ".join(case.other_options)
    taken = COMMON_WORDS if case.options else COMMON_WORDS | _HINT_TALK
    for word in dict.fromkeys(answer):
        if word in taken or word in YES_OR_NO or len(word) < 3 or not word.isalpha():
            continue
        if not _holds_form(word, case.words) or _holds_form(word, f"{others} {case.stem_words}"):
            continue
        if not all(_lists(sentence, others) for sentence in _with_form(word, case)):
            yield f"holds a word of the answer: {word}"


def _lists(sentence: str, others: str) -> bool:
    """The sentence has words of other options too and chooses none."""
    words = set(plain_words(sentence).split()) - COMMON_WORDS
    return not words.isdisjoint(others.split()) and CHOSEN.search(sentence) is None


def _holds_form(words: str, text: str) -> bool:
    """The text has the words in some form. All forms start with the same three letters."""
    # no form changes more than the last three letters
    if words[:3] not in text or (words[: len(words) - 3] not in text and not _is_cut(words)):
        return False
    return _form_pattern(words).search(text) is not None


def _with_form(words: str, case: Case) -> list[str]:
    """The sentences of the hint that have the words in some form."""
    found = [sentence for sentence in case.sentences if words[:3] in sentence.casefold()]
    return [sentence for sentence in found if _holds_form(words, plain_words(sentence))]


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
    if len(words) >= 5 and words[-1] == "s" and words[-2] != "s":
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
    return form if len(words) >= 6 else r"\b" + form


_COMPASS = re.compile(r"(north|south)[ -]?(east|west)")
_NO_LETTER = re.compile(r"\W")
_GAP = r"[\s.\-_*|]"
_GAPS = re.compile(_GAP)
_AND = re.compile(r"\band\b|\s")


def _spells_text(words: str, text: str) -> bool:
    """The hint has the letters apart or reversed: "r-e-d", "mon day" and "yadnom".

    Words of fewer than five letters must have a gap after each letter; others may have one
    anywhere, from eight letters on an "and" too: "south and west". Fewer than three letters cannot
    be spelled.
    """
    compass = _COMPASS.fullmatch(words)
    if compass and re.search(
        rf"\b{compass[1]}\b[^.;]{{1,25}}\band\b[\w ]{{1,20}}{compass[2]}\b", text
    ):
        return True
    letters = _NO_LETTER.sub("", words)
    if len(letters) < 3:
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


def _says_beginning(case: Case) -> Iterator[str]:
    """The first or last letters of an answer in one word: "begins with 'alba'"."""
    word = plain_words(case.answer).strip()
    if not word.isalpha():
        return
    for verb, piece in _BEGINS_OR_ENDS.findall(case.text.casefold()):
        is_end = verb.startswith("end")
        fits = word.endswith(piece) if is_end else word.startswith(piece)
        if fits and piece not in case.stem_words.split():
            yield f"spells the answer's text: {case.answer}"


_ABBREVIATED = {"S": "side", "A": "angle", "H": "hypotenuse", "L": "leg"}
_FORMULAS = {"oxygen": "O2", "hydrogen": "H2", "nitrogen": "N2", "chlorine": "Cl2"}
_FORMULAS |= {"carbon dioxide": "CO2", "water": "H2O", "ammonia": "NH3", "methane": "CH4"}


def _says_otherwise(case: Case) -> Iterator[str]:
    """ "angle-side-angle" for ASA, "O2" for oxygen."""
    spelled = [_ABBREVIATED.get(letter, "") for letter in case.answer]
    if len(spelled) > 1 and all(spelled) and _is_new(rf"(?i)\b{'[- ]'.join(spelled)}\b", case):
        yield f"says the answer otherwise: {case.answer}"
    formula = _FORMULAS.get(case.answer.casefold())
    if formula and _is_new(rf"(?<![A-Za-z\d]){formula}(?![A-Za-z\d])", case):
        yield f"says the answer otherwise: {case.answer}"


_SHARE = re.compile(r"\b(one|1|\d+)(?: [a-z]+)? (?:out )?of (?:the )?(\d+)\b", re.I)
_GROWTH = re.compile(r"\b(?:by|exactly) a (third|quarter|fifth|tenth)\b", re.I)
_PARTS_OF_ONE = {"third": 3, "quarter": 4, "fifth": 5, "tenth": 10}


def _says_share(case: Case) -> Iterator[str]:
    """ "one box out of four" for 1/4, "exceeds it by exactly a quarter" for 25 %."""
    if not any(form < 1 for gold in case.golds for form in gold.forms):
        return
    said = {Fraction(1, _PARTS_OF_ONE[word.casefold()]) for word in _GROWTH.findall(case.text)}
    for top, bottom in _SHARE.findall(case.text):
        if int(bottom[:9]) and f"of {bottom}" not in case.stem:
            said.add(Fraction(1 if top.casefold() == "one" else int(top[:9]), int(bottom[:9])))
    for gold in case.golds:
        if said.intersection(gold.forms):
            yield f"says the share: {gold.part}"


_SIGN_SAID = {
    "negative": re.compile(
        r"\b(?:so|thus|hence|therefore)\b[^.;]*\bis (?:less than|below) 0\b|"
        r"\b(?:so|thus|hence|therefore)\b[^.;]*\bis less than zero\b",
        re.I,
    ),
    ">": re.compile(r"\b(?:first|upper)\b[\w ]*\bis (?:greater|larger|more) than", re.I),
    "<": re.compile(r"\b(?:first|upper)\b[\w ]*\bis (?:less|smaller) than", re.I),
}


def _says_sign(case: Case) -> Iterator[str]:
    """ "so a is less than zero" for negative, "the first is greater than the second" for ">"."""
    said = _SIGN_SAID.get(case.answer)
    if said is None:
        return
    for sentence in case.sentences:
        if not UNDECIDED.search(sentence) and said.search(sentence):
            yield f"says the sign: {case.answer}"


_RULES = (
    _names_answer,
    _states_number,
    _repeats_result,
    _works_out,
    _spells_number,
    _says_time,
    _says_ratio,
    _names_option,
    _names_place,
    _excludes_others,
    _holds_expression,
    _says_relation,
    _says_line,
    _says_otherwise,
    _says_share,
    _says_sign,
    says_yes_or_no,
    decides_between_two,
    excludes_one_by_one,
    says_equal,
    _holds_words,
    _word_of_answer,
    _says_beginning,
)
