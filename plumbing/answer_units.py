"""Units of measurement: their names in several languages, and what they are worth in each other."""

from __future__ import annotations

import re
from fractions import Fraction

# Each unit, then its other names; "_" is a blank. An English name may also end in "s".
_NAMES = r"""
    m meter metre 米; inch in inches; ft foot feet; yd yard; mile mi;
    g gram gramme 克; t ton tonne 吨; lb lbs pound; oz ounce;
    L l liter litre 升; s sec second 秒; min minute 分钟 分; h hr hour 小时 时;
    day 天; week 周; month; year yr 年 岁; km 公里 千米; cm 厘米; dm 分米; mm 毫米;
    kg 千克 公斤 kilo; mL 毫升;
    degrees degree 度; degrees_C degrees_Celsius Celsius C 摄氏度;
    degrees_F degrees_Fahrenheit Fahrenheit; rad radian; unit; point pt;
    $ dollar USD US$ US_dollar; € euro EUR 欧元; £ GBP pounds_sterling; cent ¢;
    ¥ 元 yuan RMB CNY 块 yen 円 JPY; ₹ rupee Rs INR; ₩ won KRW;
    mph miles_per_hour; J joule; N newton; W watt; V volt; A amp ampere; Hz hertz; Pa pascal;
    K kelvin; mol mole; \Omega ohm; F farad; cal calorie; eV; B byte; dB; ha hectare
"""

# a prefix's sign and name, and its power of ten
_PREFIXES = {
    ("n", "nano"): -9,
    ("\\mu", "micro"): -6,
    ("u", "micro"): -6,
    ("m", "milli"): -3,
    ("c", "centi"): -2,
    ("d", "deci"): -1,
    ("k", "kilo"): 3,
    ("M", "mega"): 6,
    ("G", "giga"): 9,
}
_WITH_PREFIX = "m g L s J W V A N Hz Pa \\Omega F mol eV cal B"

# what a unit is worth in another one
_WORTH = {
    "min": (60, "s"),
    "h": (3600, "s"),
    "day": (86400, "s"),
    "week": (604800, "s"),
    "t": (1000000, "g"),
    "ft": (12, "inch"),
    "yd": (36, "inch"),
    "mile": (63360, "inch"),
    "cent": (Fraction(1, 100), "$"),
}

Worth = tuple[Fraction, str]  # so many of that unit
# A unit: its bases with their powers, and how many of them it is. cm^2 -> (("m", 2),), 1/10000
Unit = tuple[tuple[tuple[str, int], ...], Fraction]


def _with_plurals(names: list[str]) -> list[str]:
    """The names, and the longer ASCII ones with an s: "meter", "meters"."""
    plurals = [f"{name}s" for name in names if len(name) > 1 and name.isascii()]
    return [*names, *plurals]


def _table() -> dict[str, Worth]:
    """Each name of a unit, with what it is worth: "centimeters" -> 1/100, "m"."""
    groups = [[name.replace("_", " ") for name in names.split()] for names in _NAMES.split(";")]
    worths = {}
    with_prefix = _WITH_PREFIX.split()
    for group in groups:
        if group[0] not in with_prefix:
            continue
        for (sign, word), power in _PREFIXES.items():
            worth = Fraction(10) ** power, group[0]
            short = [f"{sign} {name}" if sign == "\\mu" else sign + name for name in group]
            long = [word + name for name in group[1:]]
            worths |= dict.fromkeys(_with_plurals([*short[:1], *long]), worth)
    worths["ml"] = worths["mL"]
    for group in groups:
        # 厘米 stands in the group of cm, which has a prefix already
        factor, base = worths.get(group[0]) or _WORTH.get(group[0], (1, group[0]))
        worths |= dict.fromkeys(_with_plurals(group), (Fraction(factor), base))
    return worths


_TABLE = _table()
# Names in small letters, for "Meters" and "KG". "mw" could be mW and MW: such names are left out.
_SMALL_TABLE = {
    name.lower(): worth
    for name, worth in _TABLE.items()
    if len(name) > 2 or name in ("kg", "cm", "km", "in", "ft", "hr", "yd", "oz", "lb")
}

_BLANKS = sorted((name for name in _TABLE if " " in name), key=len, reverse=True)
_NAME = re.compile(
    "|".join(re.escape(name) for name in _BLANKS)
    + r"|US\$|[A-Za-z]\\Omega|\\?[A-Za-z]+|[$€£¥₹₩¢]|[\u3040-\u9fff]+"
)
_POWER = re.compile(r" ?(?:\^ ?\{? ?(-?[1-4]) ?\}?|(squared|cubed)\b|([23])(?![\d.]))")
_POWER_WORDS = {"squared": 2, "cubed": 3}
_BEFORE = re.compile(r"(square|sq\.?|cubic|cu\.?|平方|立方) ?", re.I)
_BEFORE_POWERS = {"s": 2, "c": 3, "平": 2, "立": 3}
_BETWEEN = re.compile(r" ?(/|\bper\b|每|\*| ) ?")
_MOST_FACTORS = 4


def read_unit(text: str) -> Unit | None:
    """The unit that a tidy text names; None for anything else.

    Examples: cm  square meters  m/s^2  km per hour  mol*L^{-1}  degrees C  平方厘米.
    """
    powers, factor, sign = {}, Fraction(1), 1
    for _ in range(_MOST_FACTORS):
        part = _unit_and_power(text)
        if part is None:
            return None
        (worth, base), power, text = part
        powers[base] = powers.get(base, 0) + sign * power
        factor *= worth ** (sign * power)
        if not text:
            return tuple(sorted(powers.items())), factor
        between = _BETWEEN.match(text)
        if not between:
            return None
        sign = 1 if between[1] in ("*", " ") else -1
        text = text[between.end() :]
    return None


def _unit_and_power(text: str) -> tuple[Worth, int, str] | None:
    """The unit at the head of a text, its power, and the rest of the text; None without a unit."""
    power = 1
    before = _BEFORE.match(text)
    if before:
        power, text = _BEFORE_POWERS[before[1][0].lower()], text[before.end() :]
    name = _NAME.match(text)
    worth = name and _worth(name[0])
    if not worth:
        return None
    text = text[name.end() :]
    behind = _POWER.match(text)
    if behind:
        digits = behind[1] or behind[3]
        power *= int(digits) if digits else _POWER_WORDS[behind[2]]
        text = text[behind.end() :]
    return worth, power, text


def _worth(name: str) -> Worth | None:
    return _TABLE.get(name) or _SMALL_TABLE.get(name.lower())
