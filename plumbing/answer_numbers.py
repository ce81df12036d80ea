"""Numbers as people write them, read exactly by a small grammar: no eval, and bounded work."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from zlib import crc32

from plumbing.answer_text import LONGEST_ANSWER, tidy

_TOKEN = re.compile(
    r"""
    [1-9]\d{0,2}(?:,\d{3})+(?![\d,])(?:\.\d+)?            # 1,200  1,200.50
    | \d{1,3}(?:[ ]\d{3})+(?![\d,/]|[ ]\d)                # 12 345
    | (?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?      # 3  3.5  .5  1.5e3
    | \\[a-zA-Z]+ (?:_\{?\w{1,2}\}?)?                    # \frac  \sqrt  \pi  \theta_1
    | [a-zA-Z] _ \{?\w{1,2}\}?                            # x_1
    | sqrt | pi
    | \S
    """,
    re.VERBOSE,
)

_TOKEN_LIMIT = 100  # bounds how deep the grammar below nests
_DIGIT_LIMIT = 100  # of one literal; TRAP: a difference times 10**308 is too large for a float
_FACTORIAL_LIMIT = 50
_BIT_LIMIT = 4096  # of a power
_SIGNS = ("+", "-")
_ROOTS = ("\\sqrt", "sqrt")
_PI = ("\\pi", "pi")
_FACTORS = ("(", "{", "\\frac", *_ROOTS, *_PI)  # they may follow a number without a "*": 2\pi

Number = Fraction | float
Tokens = list[str]


_PLAIN_NUMBER = re.compile(r" ?(-?\d{1,20}(?:\.\d{1,20})?) ?")
_COMMA_IN_BRACKETS = re.compile(r"[(\[][^()\[\]]*,")

# 0.\overline{3} and 0.1\dot{6}: the whole part, the digits before the period, the period
_PERIODIC = re.compile(r"(\d{0,9})\.(\d{0,9})\\(?:overline|dot|bar)\s*\{?(\d{1,9})\}?")

# "x = ", "y_1 = ", "\theta=", but not "x == "
_NAMED_VALUE = re.compile(r"^\\?[a-zA-Z]{1,8}(?:_\{?\w\}?)? ?= ?(?=[^=])")


def to_number(text: str) -> Number | None:
    r"""The value of a number as people write it; None for anything else.

    It is exact, a Fraction, where the number is rational. Examples: 1,200  -3.5  2/4  50%  1 1/2
    1.5e3  2\sqrt{3}  \frac{\pi}{2}  3^{-2}  x = 5. A parser reads it, no eval; powers and lengths
    are bounded.
    """
    return read_number(_NAMED_VALUE.sub("", tidy(text[:LONGEST_ANSWER])))


def read_number(text: str) -> Number | None:
    """As to_number, for a text that is tidy already and has no name before it."""
    plain = _PLAIN_NUMBER.fullmatch(text)
    if plain:
        return Fraction(plain[1])
    if "," in text and _COMMA_IN_BRACKETS.search(text):
        return None  # (1,200) is a pair
    if "." in text and "\\" in text:
        text = _PERIODIC.sub(_period_as_fraction, text)
    tokens = _TOKEN.findall(text)
    if not tokens or len(tokens) > _TOKEN_LIMIT:
        return None
    return _value_of(tokens)


def _value_of(tokens: Tokens) -> Number | None:
    """The value of all the tokens; None where they are no number, or one out of bounds."""
    try:
        value, rest = _sum([*tokens, ""])
        return value if rest == [""] and abs(value) < 1e300 else None
    except (ValueError, ArithmeticError, IndexError, RecursionError):
        return None


_BARE = str.maketrans("", "", "{}")  # x_{1} is x_1
_VARIABLE = re.compile(
    r"(?:[a-zA-Z]|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|omega|sigma|rho))"
    r"(?:_\{?\w{1,2}\}?)?"
)
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")


def sample_formula(text: str) -> list[Number] | None:
    """The values of a tidy formula at two points; None where it is no formula with variables.

    Two formulas with equal values are the same polynomial, root or fraction, written in two ways:
    (x+1)^2 and x^2+2x+1. A chance hit has a probability of about 1 in 10**6. Each letter is one
    variable; a word of three letters or more makes the text no formula.
    """
    if _WORD.sub("", text.replace("sqrt", "")) != text.replace("sqrt", ""):
        return None
    tokens = _TOKEN.findall(text)
    names = {token for token in tokens if _VARIABLE.fullmatch(token)}
    if not names or len(tokens) > _TOKEN_LIMIT or names == set(tokens):
        return None
    values = [_value_at(tokens, names, point) for point in range(2)]
    return None if None in values else values


def _value_at(tokens: Tokens, names: set[str], point: int) -> Number | None:
    """The value of the tokens where each variable has a value of that point, its own one."""
    filled = []
    for token in tokens:
        if token in names:
            seed = crc32(f"{token} {point}".translate(_BARE).encode())
            filled += ["(", str(2 + seed % 997), "/", str(2 + seed // 997 % 991), ")"]
        else:
            filled.append(token)
    return _value_of(filled)


def _period_as_fraction(match: re.Match) -> str:
    r"""A match of _PERIODIC as a fraction: 0.1\overline{6} is (16 - 1) / 90."""
    whole, before, period = match.groups()
    top = int(whole + before + period) - int(whole + before or "0")
    bottom = (10 ** len(period) - 1) * 10 ** len(before)
    return f"({top}/{bottom})"


# The grammar, from the loosest to the tightest binding. Each function reads what it can at the
# head of the tokens, which "" ends, and returns its value and the tokens that remain. Each raises
# ValueError, ArithmeticError or IndexError where no such number stands there.


def _sum(tokens: Tokens) -> tuple[Number, Tokens]:
    """sum = product {("+" | "-") product}. Example: 1 + 2 - 3."""
    value, tokens = _product(tokens)
    while tokens[0] in _SIGNS:
        sign = tokens[0]
        other, tokens = _product(tokens[1:])
        value = value + other if sign == "+" else value - other
    return value, tokens


def _product(tokens: Tokens) -> tuple[Number, Tokens]:
    r"""product = ("+" | "-") product | power {("*" | "/") ["-"] power | factor}.

    A factor is a power that starts with a bracket, \frac, a root or pi. Two signs in a row are no
    number. Examples: -2 * 3, 2 / -3, 2\pi.
    """
    if tokens[0] in _SIGNS and tokens[1] not in _SIGNS:
        value, rest = _product(tokens[1:])
        return (value if tokens[0] == "+" else -value), rest
    value, tokens = _power(tokens)
    while True:
        operator = tokens[0]
        if operator == "*":
            other, tokens = _negated(_power, tokens[1:])
            value = value * other
        elif operator == "/":
            other, tokens = _negated(_power, tokens[1:])
            value = value / other
        elif operator in _FACTORS:
            other, tokens = _power(tokens)
            value = value * other
        else:
            return value, tokens


def _negated(read: Callable, tokens: Tokens) -> tuple[Number, Tokens]:
    """["-"] and what `read` reads. Example: the -3 of 2 * -3."""
    if tokens[0] != "-":
        return read(tokens)
    value, tokens = read(tokens[1:])
    return -value, tokens


def _power(tokens: Tokens) -> tuple[Number, Tokens]:
    """power = mixed ["!"] ["^" ["-"] atom] ["%"]. Examples: 3^{-2}, 50%, 5!."""
    value, tokens = _mixed(tokens)
    if tokens[0] == "!":
        value, tokens = _factorial(value), tokens[1:]
    if tokens[0] == "^":
        exponent, tokens = _negated(_atom, tokens[1:])
        value = _raised(value, exponent)
    if tokens[0] == "%":
        value, tokens = value / 100, tokens[1:]
    return value, tokens


def _factorial(value: Number) -> Number:
    """value!, exact. ValueError where value is not whole, is negative or too large."""
    if value != int(value) or not 0 <= value <= _FACTORIAL_LIMIT:
        raise ValueError("out of bounds")
    return Fraction(math.factorial(int(value)))


def _raised(value: Number, exponent: Number) -> Number:
    """value to the power of exponent. ValueError where that is not real or would be too large.

    TRAP: a small value may have a large denominator: ((1/9)^64)^64 is bounded by its bits.
    """
    if abs(exponent) > 64 or abs(value) > 10**18:
        raise ValueError("out of bounds")
    whole = exponent == int(exponent)
    if whole and isinstance(value, Fraction):
        bits = value.numerator.bit_length() + value.denominator.bit_length()
        if bits * abs(exponent) > _BIT_LIMIT:
            raise ValueError("out of bounds")
    result = value ** (int(exponent) if whole else float(exponent))
    if isinstance(result, complex):
        raise ValueError("not real")
    return result


def _mixed(tokens: Tokens) -> tuple[Number, Tokens]:
    r"""mixed = atom | whole "\frac" atom atom | whole whole "/" whole.

    A whole is a token of digits alone. Examples: 1\frac{1}{2}, 1 1/2.
    """
    value, rest = _atom(tokens)
    if not tokens[0].isdigit():
        return value, rest
    if rest[0] == "\\frac":
        part, rest = _atom(rest)
        return value + part, rest
    if rest[0].isdigit() and rest[1] == "/" and rest[2].isdigit():
        return value + Fraction(int(rest[0]), int(rest[2])), rest[3:]
    return value, rest


def _atom(tokens: Tokens) -> tuple[Number, Tokens]:
    r"""atom = "(" sum ")" | "{" sum "}" | "\frac" fraction | "\sqrt" root | "\pi" | digits.

    Also "\binom" atom atom, and "\log_" base atom.

    "sqrt" and "pi" may stand without a backslash.
    """
    head, rest = tokens[0], tokens[1:]
    if head in ("(", "{"):
        value, rest = _sum(rest)
        if rest[0] != (")" if head == "(" else "}"):
            raise ValueError("not closed")
        return value, rest[1:]
    if head == "\\frac":
        return _fraction(rest)
    if head in _ROOTS:
        return _root(rest)
    if head == "\\binom":
        return _binomial(rest)
    if head.startswith("\\log_"):
        return _logarithm(head, rest)
    if head in _PI:
        return math.pi, rest
    if not head[:1].isdigit() and head[:1] != ".":
        raise ValueError(f"not a number: {head!r}")
    if len(head) > _DIGIT_LIMIT:
        raise ValueError("out of bounds")
    return Fraction(head.replace(",", "").replace(" ", "")), rest


def _binomial(tokens: Tokens) -> tuple[Number, Tokens]:
    r"""binomial = atom atom, both whole and small. Example: \binom{5}{2}."""
    total, tokens = _atom(tokens)
    part, tokens = _atom(tokens)
    is_whole = total == int(total) and part == int(part)
    if not is_whole or not 0 <= part <= total <= _FACTORIAL_LIMIT:
        raise ValueError("out of bounds")
    return Fraction(math.comb(int(total), int(part))), tokens


def _logarithm(head: str, tokens: Tokens) -> tuple[Number, Tokens]:
    r"""logarithm = "\log_" base atom. Example: \log_{2} 8. Exact where it is whole."""
    base = int(head.removeprefix("\\log_").strip("{}"))
    value, tokens = _atom(tokens)
    result = math.log(value) / math.log(base)
    whole = round(result)
    if abs(whole) < 64 and base**whole == value:
        return Fraction(whole), tokens
    return result, tokens


def _fraction(tokens: Tokens) -> tuple[Number, Tokens]:
    r"""fraction = atom atom, or two digits in one token. Examples: \frac{1}{2}, \frac12."""
    if tokens[0].isdigit() and len(tokens[0]) > 1:
        tokens = [tokens[0][0], tokens[0][1:], *tokens[1:]]
    top, tokens = _atom(tokens)
    bottom, tokens = _atom(tokens)
    return top / bottom, tokens


def _root(tokens: Tokens) -> tuple[Number, Tokens]:
    r"""root = ["[" degree "]"] atom. Examples: \sqrt{12}, \sqrt[3]{8}."""
    degree = 2
    if tokens[0] == "[":
        degree, tokens = int(tokens[1]), tokens[3:]
    value, tokens = _atom(tokens)
    if value < 0 or not 2 <= degree <= 9:
        raise ValueError("not real")
    return _root_of(value, degree), tokens


def _root_of(value: Number, degree: int) -> Number:
    """The root of that degree: exact where it is rational, else a float."""
    ratio = Fraction(value).as_integer_ratio()
    top, bottom = (round(float(part) ** (1 / degree)) for part in ratio)
    if bottom and Fraction(top, bottom) ** degree == value:
        return Fraction(top, bottom)
    return float(value) ** (1 / degree)
