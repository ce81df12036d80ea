"""A number of a hint with what stands around it: its unit, its clause, its sentence.

All texts are as `number_words.normal` leaves them.
"""

from __future__ import annotations

import re
from functools import cached_property

from plumbing.number_words import Number

# -------------------------------------------------------------------------------------- units

# The dimension, then each unit's size and names. "month" has no exact size in days.
_UNITS = """
    time 1 s sec second seconds; time 60 min minute minutes; time 3600 h hr hour hours;
    time 86400 day days; time 604800 week weeks;
    years 1 month months; years 12 year years;
    length 1 mm millimeter millimeters millimetre millimetres;
    length 10 cm centimeter centimeters centimetre centimetres;
    length 1000 m meter meters metre metres;
    length 1000000 km kilometer kilometers kilometre kilometres;
    feet 1 inch inches; feet 12 foot feet ft; feet 36 yard yards; feet 63360 mile miles;
    mass 1 mg milligram milligrams; mass 1000 g gram grams; mass 1000000 kg kilogram kilograms;
    mass 1000000000 t tonne tonnes ton tons;
    pounds 1 ounce ounces oz; pounds 16 pound pounds lb lbs;
    volume 1 ml mL milliliter milliliters millilitre millilitres; volume 10 cl;
    volume 1000 l L liter liters litre litres;
    length 10 厘米; length 1000 米; time 60 分钟; time 3600 小时; money 100 元; angle 1 度;
    mass 1000 克; mass 1000000 千克; money 1 cent cents ct;
    money 100 $ dollar dollars € euro euros £;
    angle 1 degree degrees °; percent 1 % percent; squares 1 square squares; units 1 unit units;
    force 1 N newton newtons; power 1 W watt watts; voltage 1 V volt volts; current 1 A ampere
    amperes; resistance 1 ohm ohms Ω; heat 1 °C °F celsius; energy 1 J joule joules;
    calories 1 calorie calories kcal
"""


def _read_units() -> dict[str, tuple[str, int]]:
    """Each name of a unit with its dimension and size: "hours" -> "time", 3600."""
    units = {}
    for row in _UNITS.split(";"):
        dimension, size, *names = row.split()
        units |= {name: (dimension, int(size)) for name in names}
    return units


UNITS = _read_units()
_NAMES = "|".join(re.escape(name) for name in sorted(UNITS, key=len, reverse=True))
# not the s of "2s + 7 = 31", and no "2 square numbers"
_NO_UNIT = r"(?![^\W\d_]| ?[-+*=/^] ?[\d(]| (?:number|root)s?\b)"
_UNIT_BEHIND = re.compile(rf"-? ?(?:square |cubic )?({_NAMES}){_NO_UNIT}")
_ANY_UNIT = re.compile(rf"(?<![^\W_])({_NAMES})(?![^\W_])")


def unit_of(number: Number, text: str) -> tuple[str, int] | None:
    """The dimension and size of the unit behind a number: the "hours" of "2 hours"."""
    if number.text.endswith("%"):
        return UNITS["%"]
    match = _UNIT_BEHIND.match(text, number.end)
    if match:
        return UNITS[match[1]]
    before = text[max(0, number.start - 3) : number.start].rstrip()[-1:]
    return UNITS.get(before) if before in ("$", "€", "£") else None


def units_in(text: str) -> list[tuple[str, int]]:
    """The dimension and size of all units that a text names, in order."""
    return [UNITS[match[1]] for match in _ANY_UNIT.finditer(text)]


# ----------------------------------------------------------------------------------- the place

_END_OF_CLAUSE = re.compile(r"[;!?。；]|[.,:](?=\s|$)")
END_OF_SENTENCE = re.compile(r";|!|\?|。|；|\.(?=\s|$)")


class Place:
    """A number of a hint with what stands around it. Most questions need only a little of it."""

    def __init__(self, number: Number, text: str, question: str, is_gold: bool, asks_number: bool):
        self.number = number
        self.value = number.values[-1]
        self.before = text[max(0, number.start - 160) : number.start]
        self.after = text[number.end : number.end + 80]
        self.is_gold = is_gold  # it is a form of the gold answer
        self.asks_number = asks_number  # the gold answer has a number
        self.question = question
        self.unit = unit_of(number, text)

    @cached_property
    def clause_before(self) -> str:
        return _END_OF_CLAUSE.split(self.before)[-1]

    @cached_property
    def clause(self) -> str:
        return self.clause_before + self.number.text + _END_OF_CLAUSE.split(self.after, 1)[0]

    @cached_property
    def sentence_before(self) -> str:
        return END_OF_SENTENCE.split(self.before)[-1]

    @cached_property
    def sentence(self) -> str:
        return self.sentence_before + self.number.text + END_OF_SENTENCE.split(self.after, 1)[0]
