"""Numbers that stand together and are never computed: ranges, scores, dates, times, ratios."""

from __future__ import annotations

import re
from fractions import Fraction

from plumbing.answer_numbers import Number, read_number
from plumbing.answer_quantities import NUMBER_WORDS, same_value
from plumbing.answer_units import Unit, read_unit

# ------------------------------------------------------------------------------------- ranges

_PLAIN_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
# what may stand before the first number, between two numbers, and behind the last one
_BEFORE = re.compile(r"(?:from |between )?(-?) ?(?:[$€£¥₹] ?)?", re.I)
_BETWEEN = re.compile(
    r" ?([^\d:/*+^()=<>\\]*?) ?(-|:|/|\bto\b|\buntil\b|至|到) ?(-?)[$€£¥₹]? ?", re.I
)
_AND = re.compile(r" ?([^\d:/*+^()=<>\\]*?) ?\b(and) ?(-?)[$€£¥₹]? ?", re.I)
_HAS_SEPARATOR = re.compile(r"(?<!^)-|/|to\b|until|至|到|and\b")
_SAME_SEPARATOR = {"to": "-", "until": "-", "至": "-", "到": "-", "and": "-"}

# the separator, the numbers, and the unit: its text where no table knows it
Parts = tuple[str, tuple[Fraction, ...], str]


def read_parts(text: str) -> Parts | None:
    """Plain numbers with one separator: 25-34, $5 to $10, 2-1, 3/4/2020; None for anything else.

    A fraction, 3/4, is no such thing, nor is a ratio, 3:4.
    """
    if not _HAS_SEPARATOR.search(text):
        return None
    numbers = list(_PLAIN_NUMBER.finditer(text))
    if not 2 <= len(numbers) <= 6:
        return None
    before = _BEFORE.fullmatch(text[: numbers[0].start()])
    if not before:
        return None
    between = _AND if before[0].lower().startswith("between") else _BETWEEN
    signs, separators, units = [before[1]], set(), {_unit_name(text[numbers[-1].end() :])}
    for left, right in zip(numbers, numbers[1:], strict=False):
        gap = between.fullmatch(text, left.end(), right.start())
        if not gap:
            return None
        units.add(_unit_name(gap[1]))
        separators.add(_SAME_SEPARATOR.get(gap[2].lower(), gap[2]))
        signs.append(gap[3])
    units -= {""}
    if len(separators) != 1 or len(units) > 1 or None in units:
        return None
    [separator] = separators
    if separator == ":" or (separator == "/" and len(numbers) == 2):
        return None
    plain = [Fraction(number[0].replace(",", "")) for number in numbers]
    values = [-value if sign else value for value, sign in zip(plain, signs, strict=True)]
    return separator, tuple(values), units.pop() if units else ""


_UNIT_TEXT = re.compile(r"(?:[^\W\d_]|[ %$€£¥₹'^{}.])*")


def _unit_name(text: str) -> str | None:
    """A unit's or a noun's name, as short as it may be; None where a text is neither."""
    name = text.strip(" ()").casefold()
    if not _UNIT_TEXT.fullmatch(name) or len(name) > 30:
        return None
    if len(name) == 1 and name.isascii() and name.isalpha() and not read_unit(name):
        return None  # 1.5e-3
    return name if len(name) < 4 else name.removesuffix("s")


def same_parts(given: Parts, gold: Parts) -> bool:
    """Equal part by part; one of the two may lack its unit."""
    (separator, values, unit), (gold_separator, gold_values, gold_unit) = given, gold
    if separator != gold_separator or values != gold_values:
        return False
    return not unit or not gold_unit or unit == gold_unit or _same_unit(unit, gold_unit)


def _same_unit(name: str, gold_name: str) -> bool:
    unit: Unit | None = read_unit(name)
    return unit is not None and unit == read_unit(gold_name)


# ------------------------------------------------------------------------------------- ratios

_FRACTION = re.compile(r"\(?(\d+)\)?/\(?(\d+)\)?|\\frac ?\{?(\d+)\}? ?\{?(\d+)\}?")
_RATIO_WORD = re.compile(r"(?<=[\d}]) to (?=[\d\\])", re.I)
_CLOCK_LIKE = re.compile(r"(?:[01]?\d|2[0-4]):[0-5]\d(?::[0-5]\d)?")


def read_ratio(text: str) -> tuple[Number, ...] | None:
    r"""The terms of a ratio, 3:4 or \sqrt{3} : 1 : 2; None for anything else."""
    terms = text.split(":")
    if not 2 <= len(terms) <= 5:
        return None
    values = tuple(read_number(term.strip()) for term in terms)
    return None if None in values or 0 in values else values


def same_ratio(given: str, gold: str) -> bool | None:
    """2:4 is 1:2 and 1/2. None where neither is a ratio.

    A gold answer that may be a time of day, as 4:20, is compared term by term.
    """
    ratio, gold_ratio = read_ratio(given), read_ratio(gold)
    if ratio is None and gold_ratio is None:
        return None
    ratio = ratio or read_ratio(_RATIO_WORD.sub(":", given)) or _as_ratio(given)
    gold_ratio = gold_ratio or read_ratio(_RATIO_WORD.sub(":", gold)) or _as_ratio(gold)
    if ratio is None or gold_ratio is None or len(ratio) != len(gold_ratio):
        return False
    if _CLOCK_LIKE.fullmatch(gold):
        return ratio == gold_ratio
    if _CLOCK_LIKE.fullmatch(given) and ratio != gold_ratio and ":" not in gold:
        return False
    return all(
        same_value(term * gold_ratio[0], gold_term * ratio[0])
        for term, gold_term in zip(ratio, gold_ratio, strict=True)
    )


def _as_ratio(text: str) -> tuple[Number, ...] | None:
    """A fraction or a decimal as a ratio of two terms; a whole number is none."""
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        top, bottom = (Fraction(term) for term in fraction.groups() if term)
        return (top, bottom) if top and bottom else None
    value = read_number(text)
    if value is None or value == int(value) or "%" in text:
        return None
    return value, Fraction(1)


# --------------------------------------------------------------------------- times and dates

_HOUR_WORD = "|".join(sorted(NUMBER_WORDS, key=len, reverse=True))
_DAY_HALF = r"(?: ?([ap])\.? ?m\b\.?)?"
_CLOCK = re.compile(rf"(?:at )?(\d{{1,2}})[:.](\d\d)(?::00)?{_DAY_HALF}(?: ?o'clock)?", re.I)
_HOUR = re.compile(rf"(?:at )?(\d{{1,2}}|{_HOUR_WORD})(?: ?o'clock)?{_DAY_HALF}", re.I)
_PAST = re.compile(
    rf"(?:a )?(half|quarter|\d{{1,2}}|{_HOUR_WORD}) (?:minutes? )?(past|after|to|before) "
    rf"(\d{{1,2}}|{_HOUR_WORD})(?: ?o'clock)?{_DAY_HALF}",
    re.I,
)
_HALVES = {"half": 30, "quarter": 15}


def _whole(word: str) -> int:
    word = word.lower()
    return int(word) if word.isdigit() else NUMBER_WORDS.get(word) or _HALVES.get(word, 0)


def read_time(text: str) -> tuple[int, str] | None:
    """The minutes since midnight, and "a" or "p" where the half of the day is named; else None.

    Examples: 3:15  3:15 p.m.  15:15  quarter past three  3 o'clock.
    """
    clock, past = _CLOCK.fullmatch(text), _PAST.fullmatch(text)
    if clock and ":" in text:
        hour, minute, half = int(clock[1]), int(clock[2]), clock[3]
    elif past:
        minute, hour, half = _whole(past[1]), _whole(past[3]), past[4]
        if past[2].lower() in ("to", "before"):
            hour, minute = hour - 1, 60 - minute
    else:
        full = _HOUR.fullmatch(text)
        if not full or not ("clock" in text or full[2]):
            return None
        hour, minute, half = _whole(full[1]), 0, full[2]
    if not 0 <= hour <= 24 or not 0 <= minute < 60:
        return None
    half = (half or "").lower()
    if half:
        hour = hour % 12 + (12 if half == "p" else 0)
    elif hour > 12 or (hour == 0 and clock):
        half = "p" if hour > 12 else "a"
    return 60 * hour + minute, half


def same_time(given: tuple[int, str], gold: tuple[int, str]) -> bool:
    """Equal times; where one does not name the half of the day, equal on a clock's face."""
    (minutes, half), (gold_minutes, gold_half) = given, gold
    if half and gold_half:
        return minutes == gold_minutes
    return minutes % 720 == gold_minutes % 720


_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = re.compile(
    r"(jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?",
    re.I,
)
_DAY = re.compile(r"(\d{1,4})(?:st|nd|rd|th)?\b")
_NUMERIC_DATE = re.compile(r"(\d{4})(?:-|/|年)(\d{1,2})(?:-|/|月)(\d{1,2})日?")

Date = tuple[int | None, int, int | None]  # year, month, day


def read_date(text: str) -> Date | None:
    """A day or a month of a year: March 4, 2020; 4th of March; 2020-03-04; March 2020."""
    numeric = _NUMERIC_DATE.fullmatch(text)
    if numeric:
        return tuple(int(part) for part in numeric.groups())
    month = _MONTH.search(text)
    if not month:
        return None
    rest = text[: month.start()] + " " + text[month.end() :]
    numbers = [int(number) for number in _DAY.findall(rest)]
    left = re.sub(r"\b(?:of|the)\b|[\s,.]", "", _DAY.sub("", rest))
    years = [number for number in numbers if number > 31]
    days = [number for number in numbers if 0 < number <= 31]
    if left or len(years) > 1 or len(days) > 1 or not numbers:
        return None
    month_number = _MONTHS.index(month[1][:3].lower()) + 1
    return years[0] if years else None, month_number, days[0] if days else None
