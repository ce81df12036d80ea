"""Numbers with what stands around them: a unit, a currency, a counted noun, "million"."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction

from plumbing.answer_numbers import Number, read_number
from plumbing.answer_units import Unit, read_unit

# ------------------------------------------------------------------------------- number words

_ONES = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {
    **dict(zip(_ONES.split(), range(20), strict=True)),
    **dict(zip(_TENS.split(), range(20, 100, 10), strict=True)),
}
_NUMBER_WORD = "|".join(sorted(NUMBER_WORDS, key=len, reverse=True))
_IN_WORDS = re.compile(
    rf"(minus |negative )?({_NUMBER_WORD})(?:[- ]({_NUMBER_WORD}))?(?![\w-])", re.I
)

_SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
    "万": 10**4,
    "亿": 10**8,
}
_SCALE = re.compile(rf" ?({'|'.join(_SCALES)})(?![a-z])", re.I)


def _from_words(text: str) -> tuple[int, str] | None:
    """The number that a text begins with, in words, and the rest: "two dozen" -> 2, " dozen"."""
    match = _IN_WORDS.match(text)
    if not match:
        return None
    minus, tens, ones = match.groups()
    value = NUMBER_WORDS[tens.lower()]
    if ones:
        if value < 20 or NUMBER_WORDS[ones.lower()] not in range(1, 10):
            return None
        value += NUMBER_WORDS[ones.lower()]
    return (-value if minus else value), text[match.end() :]


# -------------------------------------------------------------------------------- quantities

# What a number may consist of; the unit or the noun begins behind it.
_HEAD = re.compile(
    r"(?:[\d.,+\-*/^(){}\[\]\s%!]|\\(?:frac|sqrt|pi|binom|overline|dot|log_(?:\d|\{\d+\}))(?![a-z])"
    r"|(?:sqrt|pi)(?![a-zA-Z])|(?<=\d)[eE](?=[-+]?\d))*"
)
_CURRENCY = re.compile(r"([-+]?) ?(US\$|USD|EUR|RMB|Rs\.?|[$€£¥₹₩]) ?([-+]?)(?=[\d.])")
_DECIMAL = re.compile(r"[-+]?[\d,]*\.(\d+)")
_DECIMAL_COMMA = re.compile(r"^([-+]?\d{1,9}),(\d{1,2})(?!\d)")
_INTRODUCTION = re.compile(
    r"(?:there (?:are|is)|it is|it's|they are|a total of|total of|exactly)(?: a total of)? ", re.I
)

# Behind a number these words make another number, or none.
_NO_NOUNS = """
    or and not to more less fewer plus minus half quarter third thirds times squared cubed below
    under above over negative between at most least than about but nor if e sin cos tan log ln
    hundreds thousands millions billions dozens pair pairs percent approximately roughly cannot
"""
_NO_NOUN = frozenset(_NO_NOUNS.split())
_NOUN = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_NOUNS = re.compile(rf"{_NOUN.pattern}(?: {_NOUN.pattern}){{0,5}}")

Noun = frozenset[str]


@dataclass(frozen=True)
class Quantity:
    """A number and what it counts.

    unit: of measurement, or None. noun: the words of a counted noun, or none. decimals: of a number
    that is written with a point, else None. percent: the value was written with that sign.
    """

    value: Number
    unit: Unit | None = None
    noun: Noun = frozenset()
    decimals: int | None = None
    percent: bool = False


def read_quantity(text: str) -> Quantity | None:
    """The quantity that a tidy text is; None for anything else.

    Examples: -3.5  $5 million  12 cm^2  5 apples  fifteen  45 thousand  1 h 30 min  20% of sales.
    """
    text = _INTRODUCTION.sub("", text, count=1)
    return _one_quantity(text) or _compound(text)


def _one_quantity(text: str) -> Quantity | None:
    currency = _CURRENCY.match(text)
    if currency:
        text = currency[1] + currency[3] + text[currency.end() :]
    split = _number_and_rest(text)
    if split is None:
        return None
    value, head, rest = split
    scale = _SCALE.match(rest)
    if scale:
        value, rest = value * _SCALES[scale[1].lower()], rest[scale.end() :]
    decimal = _DECIMAL.fullmatch(head.strip().removesuffix("%").strip())
    decimals = len(decimal[1]) if decimal and not scale else None
    quantity = Quantity(value, decimals=decimals, percent="%" in head)
    if currency:
        unit = read_unit(currency[2])
        behind = read_unit(rest.strip()) if rest.strip() else unit
        return replace(quantity, unit=unit) if behind == unit else None
    return _with_unit(quantity, rest, head)


def _number_and_rest(text: str) -> tuple[Number, str, str] | None:
    """The number at the head of a text: its value, its own text, and what follows it."""
    head = _HEAD.match(text)[0]
    rest = text[len(head) :]
    if head.endswith("(") and rest.endswith(")"):  # 12 (cm)
        head, rest = head[:-1], rest[:-1]
    value = read_number(head) if head.strip() else None
    if value is not None:
        return value, head, rest
    in_words = None if head.strip() else _from_words(text)
    return in_words and (Fraction(in_words[0]), "", in_words[1])


def _with_unit(quantity: Quantity, rest: str, head: str) -> Quantity | None:
    """The quantity with the unit or the noun that follows it; None where that is neither.

    One letter without a blank before it is no unit: 2m may be 2 * m. Nor is a short word that no
    table knows.
    """
    word = rest.strip()
    if not word:
        return quantity
    has_gap = rest.startswith(" ") or head.endswith((" ", ")", "}")) or not word[0].isalpha()
    unit = read_unit(word)
    if unit and (has_gap or not (word.isascii() and len(word) == 1)):
        return replace(quantity, unit=unit)
    words = word.casefold().split()
    if not _NOUNS.fullmatch(word) or not _NO_NOUN.isdisjoint(words):
        return None
    is_word = not word.isascii() or (has_gap and len(words[0]) > 2)
    return replace(quantity, noun=frozenset(map(_singular, words))) if is_word else None


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") else word


_PART = re.compile(
    r"(\d{1,9}(?:\.\d{1,9})?) ?([a-zA-Z]{1,12}|[\u4e00-\u9fff]{1,3})(?:,? and |,? )?"
)
_LONGEST_COMPOUND = 60  # in characters


def _compound(text: str) -> Quantity | None:
    """Two or three parts with units of one kind: 1 h 30 min, 5 feet 6 inches, 1小时30分."""
    if len(text) > _LONGEST_COMPOUND:
        return None
    parts = _PART.findall(text)
    if not 2 <= len(parts) <= 3 or _PART.sub("", text):
        return None
    total, kinds = Fraction(0), set()
    for number, name in parts:
        unit = read_unit(name)
        if unit is None:
            return None
        kind, worth = unit
        kinds.add(kind)
        total += Fraction(number) * worth
    return Quantity(total, unit=(kinds.pop(), Fraction(1))) if len(kinds) == 1 else None


def split_unit(text: str) -> tuple[str, Unit | None]:
    """A number with its unit -> the number's text and the unit; otherwise the text and None.

    Examples: "5 cm^2" -> "5", (("m", 2),), 1/10000; "$5" -> "5", (("$", 1),), 1.
    """
    currency = _CURRENCY.match(text)
    if currency:
        return currency[1] + currency[3] + text[currency.end() :], read_unit(currency[2])
    head = _HEAD.match(text)[0]
    word = text[len(head) :].strip()
    is_letter = len(word) == 1 and word.isascii() and word.isalpha() and not head.endswith(" ")
    unit = read_unit(word) if head.strip() and word and not is_letter else None
    return (head.strip(), unit) if unit else (text, None)


# ------------------------------------------------------------------------------------ compare


def same_quantity(given: Quantity, gold: Quantity) -> bool:
    """Equal values and no other unit: 0.5 m is 1/2 m, 50 cm and 1/2, not 1/2 cm.

    One of the two may lack its unit or noun. Two rational values must be equal exactly, but for a
    gold value that is rounded. Others are floats, where only rounding may differ.
    """
    if gold.unit and given.unit:
        (kind, worth), (gold_kind, gold_worth) = given.unit, gold.unit
        if kind != gold_kind:
            return False
        given = replace(given, value=given.value * (worth / gold_worth))
    elif not _may_count_the_same(given, gold):
        return False
    return same_value(given.value, gold.value) or _rounds_to(given, gold)


def _may_count_the_same(given: Quantity, gold: Quantity) -> bool:
    """One has a unit or a noun and the other has none, or their nouns agree.

    "5 red apples" are "5 apples"; 20 % is not 0.2 A.
    """
    if given.noun and gold.noun:
        return gold.noun <= given.noun or given.noun <= gold.noun
    if given.unit:
        return not (gold.noun or gold.percent)
    if gold.unit:
        return not (given.noun or given.percent)
    return True


def same_value(value: Number, gold: Number) -> bool:
    """Equal: exactly where both are fractions, else but for the rounding of floats."""
    if isinstance(value, Fraction) and isinstance(gold, Fraction):
        return value == gold
    return math.isclose(value, gold, rel_tol=1e-12)


def _rounds_to(given: Quantity, gold: Quantity) -> bool:
    """The gold value has two decimals or more, and the given one is more precise: 3.14159 for 3.14.

    A gold value with one decimal is as often exact: 0.33 is not 0.3. Both have a percent sign or
    none.
    """
    if gold.decimals is None or gold.decimals < 2 or given.percent != gold.percent:
        return False
    if given.decimals is not None and given.decimals <= gold.decimals:
        return False
    if given.decimals is None and given.value == int(given.value):
        return False
    places = gold.decimals + 2 * gold.percent
    return abs(given.value - gold.value) * 10**places <= Fraction(1, 2)


def with_point(text: str) -> str:
    """A text that begins with a decimal comma with a point instead: "3,5 cm" -> "3.5 cm"."""
    return _DECIMAL_COMMA.sub(r"\1.\2", text)
