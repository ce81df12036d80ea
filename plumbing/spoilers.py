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

from plumbing.answers import DIGIT_OR_COMMAND, split_unit, to_number
from plumbing.innocent_counts import DEFINITE_BEFORE
from plumbing.innocent_numbers import is_innocent
from plumbing.number_places import Place, unit_of, units_in
from plumbing.number_words import Number
from plumbing.spoiler_case import Case, Gold, is_label, is_new, part_value, read_case, whole_numbers
from plumbing.spoiler_exclusion import excludes_others
from plumbing.spoiler_forms import (
    says_line,
    says_otherwise,
    says_ratio,
    says_relation,
    says_share,
    says_sign,
    says_time,
    says_trend,
)
from plumbing.spoiler_options import COUNTED, names_option, names_place, singles_out
from plumbing.spoiler_words import holds_words, says_beginning, word_of_answer
from plumbing.verdicts import decides_between_two, says_equal, says_yes_or_no


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
    r"\b(?:answer|(?<!an )(?<!a )solution)\s*(?:is|:|=|must be|should be|equals)"
    rf"|{_NOT_SOUGHT}\b(?:correct|right) (?:option|choice|answer) (?!and\b|among\b|by\b)",
    re.I,
)
_ANSWER_WORDS = ("answer", "solution", "option", "choice")
# "the answer is an amount of money", "the answer is the figure that disagrees with the others"
_IS_OF_KIND = re.compile(
    r"\banswer(?: is| must be| should be|:) (?:"
    r"(?:fine|allowed|acceptable|accepted|expected|wanted|required|enough|impossible|possible"
    r"|rounded|to be|not an?|already|asked|measured|expressed|reported|counted|quoted|stated in"
    r"|given in|in (?:\w+ )?(?:units|thousands?|millions?|percent|cents|degrees|met\w+|\w+s)|due)\b"
    r"(?! \d)|"
    r"an? (?:whole |single |simple |positive |mixed |short |full |common )?"
    r"(?:amount|number|fraction|percentage|length|angle|area|word|name|ratio|price|year|date"
    r"|decimal|quantity|probability|time|measure|difference|sum|product|count|total|colou?r|letter"
    r"|month|day|place|volume|distance|speed|interval|expression)\b(?! (?:near|close|that|which))"
    r"|the (?:figure|one|item|name|option|value|number|word) (?:that|which|whose|with|without)\b"
    r"(?=.*\b(?:others|all|asked|same|remains|tick|mark|tally)\b)"
    r"|(?:the|their|its) (?:(?!first|second|third|fourth|last|middle|\w+est\b)\w+ )?(?:number of"
    r"|difference|sum|product|ratio|quotient|total|share|length|distance|gap|result|remainder"
    r"|count)\b(?! (?:is|of \d))"
    r"|[|(]*(?:\\frac ?\{)?[A-Z](?![a-z]) ?[+*/\\^])",
    re.I,
)
_DEPENDS = re.compile(r"\b(?:if|whether|unless|otherwise|when|depending)\b", re.I)


def _names_answer(case: Case) -> Iterator[str]:
    """ "the answer is the second one"; not "the answer is yes if both agree"."""
    if not any(word in case.words for word in _ANSWER_WORDS):
        return
    for sentence in case.sentences:
        if _IS_OF_KIND.search(sentence):
            continue
        if _ANSWER_IS.search(sentence) and not _DEPENDS.search(sentence):
            yield "names the answer"


# ------------------------------------------------------------------------------------ numbers


def _states_number(case: Case) -> Iterator[str]:
    """The hint states a number that the question does not: read off, computed, or the answer."""
    question = " ".join((case.stem, *case.options))
    asks_number = any(map(str.isdigit, case.answer)) and not is_label(case.answer)
    for number in case.numbers:
        if _is_known(number, case):
            continue
        gold = _gold_of(number, case)
        if gold and (_is_determiner(number, gold, case) or _counts_things(number, case)):
            continue
        if not gold and (_combines_known(number, case) or _converts_known(number, case)):
            continue
        place = Place(number, case.text, question, gold is not None, asks_number)
        if is_innocent(place):
            continue
        yield (
            f"holds the answer's number: {gold.part}" if gold else f"states a number: {number.text}"
        )


_NOUN = re.compile(
    r" (?!of\b|and\b|or\b|is\b|on\b|at\b|unit|square|step|below|above|down|left)[a-z]{3,}"
)


def _is_determiner(number: Number, gold: Gold, case: Case) -> bool:
    """ "one option lists the domain", "only one equation each", where the answer has a -1."""
    if number.values[0] != 1 or not gold.part.startswith("-"):
        return False
    before = case.text[max(0, number.start - 8) : number.start]
    if re.search(r"(?:[-−=]|minus|by) ?$", before):
        return False
    return unit_of(number, case.text) is None and _NOUN.match(case.text, number.end) is not None


_ASKS_LABEL = re.compile(
    r"\b(?:which|what) (?:labell?ed |numbered )?(?:label|structure|arrow|number|part|organ|region"
    r"|layer|stage|position|bone|figure|picture|panel|diagram|graph)\b(?! of\b)",
    re.I,
)


def _counts_things(number: Number, case: Case) -> bool:
    """ "three kinds of dots", where the answer is the label 3."""
    if not case.answer.isdecimal() or not _ASKS_LABEL.search(case.stem):
        return False
    if number.text != case.answer:
        return False
    return any(match.start() == number.start for match in COUNTED.finditer(case.text))


def _is_known(number: Number, case: Case) -> bool:
    """The question states the number, or it counts the options: "the four years"."""
    if any(value in case.known for value in number.values):
        return True
    if number.values[0] != len(case.options):
        return False
    if case.labels and _BEGINS.search(case.text[max(0, number.start - 3) : number.start]):
        return True  # "Four dials hang side by side"
    return DEFINITE_BEFORE.search(case.text[max(0, number.start - 24) : number.start]) is not None


_BEGINS = re.compile(r"(?:^|[;.] )$")
_PLAIN_FACTORS = {*map(Fraction, (1, 2, 3, 4, 90, 100, 180, 360))}


def _combines_known(number: Number, case: Case) -> bool:
    """An expression of stated and general numbers, not worked out: "60/360"."""
    pieces = whole_numbers(number.text)
    if len(pieces) < 2 or "." in number.text:
        return False
    return pieces <= case.known | _PLAIN_FACTORS and not pieces.isdisjoint(case.known)


def _converts_known(number: Number, case: Case) -> bool:
    """A number of the question in another form: "0.25 l" for 250 ml, "times 1.2" for 20 % more."""
    unit = unit_of(number, case.text)
    for stated in case.stem_numbers:
        if stated.text.endswith("%") and abs(number.values[-1] - 1) == stated.values[0]:
            return True
        if unit is None:
            continue
        other = unit_of(stated, case.stem)
        if other is None or other[0] != unit[0] or other[1] == unit[1]:
            continue
        if any(value * unit[1] == stated.values[0] * other[1] for value in number.values):
            return True
    return False


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
    rf"(?<![\w.,])(?<!_\{{){_TERM}(?: ?(?:[-+*/:^x]|times|plus|minus|divided by|over) ?{_TERM})+"
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
        if backwards != digits and backwards in case.text and is_new(spelled, case):
            yield f"spells the answer's number: {part}"
        apart = "[-_*|,. ]*".join(digits)
        spelled = rf"(?<![\d.])(?<!\d )(?!{digits}){apart}(?![\d.]\d)(?!\d)"
        if digits in _BETWEEN_DIGITS.sub("", case.text) and is_new(spelled, case):
            yield f"spells the answer's number: {part}"


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


_RULES = (
    _names_answer,
    _states_number,
    _repeats_result,
    _works_out,
    _spells_number,
    says_time,
    says_ratio,
    names_option,
    names_place,
    singles_out,
    excludes_others,
    _holds_expression,
    says_relation,
    says_line,
    says_otherwise,
    says_share,
    says_sign,
    says_trend,
    says_yes_or_no,
    decides_between_two,
    says_equal,
    holds_words,
    word_of_answer,
    says_beginning,
)
