"""Find the final answer of a response, and compare it with the gold answer.

`extract_answer` finds it, `same_answer` compares it by rules, and `load_judge` gives the comparison
that a run asked for. Nothing is evaluated, and all work is bounded: a response is text that a model
wrote, so it may have any length and any form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

# In characters. What is longer is no answer, so no pattern below reads more than this.
LONGEST_ANSWER = 400

# ------------------------------------------------------------------------------ find an answer

# "answer: 12", "the answer is 12", "answer is: 12"
_ANSWER_LINE = re.compile(r"\banswer\s*(?:is\b|:)\s*:?(.*)", re.I)


def extract_answer(text: str) -> str | None:
    r"""The final answer of a response, or None where there is none.

    That is the last \boxed{...}, whose braces may nest. Without one it is the last
    <answer>...</answer>. Without that it is what follows "answer:" or "answer is" on the last line
    that has these words. Thinking is not looked at, whether its tag is closed or not.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    start = text.rfind("\\boxed")
    if start >= 0:
        start += len("\\boxed")
        return _inside_braces(text[start : start + LONGEST_ANSWER].lstrip())
    _, tag, rest = text.rpartition("<answer>")
    if tag:
        inside, closing_tag, _ = rest[:LONGEST_ANSWER].partition("</answer>")
        return (inside.strip() or None) if closing_tag else None
    for line in reversed(text[-10 * LONGEST_ANSWER :].splitlines()):
        match = _ANSWER_LINE.search(line.replace("*", ""))
        if match:
            return match[1].strip() or None
    return None


def _inside_braces(text: str) -> str | None:
    """What stands between the brace that opens the text and its partner: "{a{b}} c" -> "a{b}".

    None where there is no such pair, or nothing in it.
    """
    depth = 0
    escaped = False
    for place, character in enumerate(text):
        if escaped or character == "\\":
            escaped = not escaped  # \{ and \} are the braces of a set: they do not group
            continue
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth == 0:
            return text[1:place].strip() or None
    return None  # the response was cut off in the middle of its answer


def unboxed(answer: str) -> str:
    r"""A gold answer without its \boxed{} or <answer>; some datasets store it so."""
    if "\\boxed" in answer or "<answer>" in answer:
        return extract_answer(answer) or answer
    return answer


# ------------------------------------------------------------------------------- one spelling

_PLAIN = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "—": "-",
        "×": "*",
        "·": "*",
        "⋅": "*",
        "÷": "/",
        "⁄": "/",
        "π": "\\pi ",
        "√": "\\sqrt ",
        "∞": "\\infty",
        "∪": "\\cup ",
        "∩": "\\cap ",
        "≤": "\\le ",
        "≥": "\\ge ",
        "°": " degrees ",
        "²": "^{2}",
        "³": "^{3}",
        "½": " 1/2",
        "⅓": " 1/3",
        "⅔": " 2/3",
        "¼": " 1/4",
        "¾": " 3/4",
        "⅕": " 1/5",
        "⅛": " 1/8",
        "\u00a0": " ",
        "’": "'",
        "‘": "'",
        "“": '"',
        "”": '"',
    }
)

_SPACING = r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\[,;!: ]|\\q?quad|~"
_TEXT = r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"

# Applied in this order.
_LATEX = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(?<=\d)\\[,!] ?(?=\d{3}(?!\d))", ""),  # 1\,200
        (_SPACING, " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:times|cdot)(?![a-z])", "*"),
        (r"\\div(?![a-z])", "/"),
        (r"\{,\}", ","),
        (r"\\%", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", " degrees"),
        (r"\\\{|\\lbrace", "⟨"),  # the braces of a set: from here on { and } only group
        (r"\\\}|\\rbrace", "⟩"),
        (_TEXT, r" \1 "),
        (r"^\s*(?:\$\$|\\\(|\\\[)|(?:\$\$|\\\)|\\\])\s*$", " "),  # $$...$$, \(...\), \[...\]
        (r"^\s*\$([^$]*)\$\s*$", r"\1"),  # $...$
        (r"\\\$", "$"),
    )
]

# "x = ", "y_1 = ", "\theta=", but not "x == "
_NAMED_VALUE = re.compile(r"^\\?[a-zA-Z]{1,8}(?:_\{?\w\}?)? ?= ?(?=[^=])")


def plain_latex(text: str) -> str:
    r"""The text in one spelling: "\text{about}~\dfrac{1}{2}²" -> "about \frac{1}{2}^{2}".

    LaTeX's commands for spacing, text and mathematics mode are gone, Unicode signs are as LaTeX
    writes them, and there are no double blanks.
    """
    text = text.translate(_PLAIN)
    for pattern, new in _LATEX:
        text = pattern.sub(new, text)
    return " ".join(text.split())


def _tidy(text: str) -> str:
    """An answer as plain_latex, without a leading "x =" and without a final stop."""
    return _NAMED_VALUE.sub("", plain_latex(text).rstrip(".,;:! ")).strip()


# ------------------------------------------------------------------------------------ numbers

_TOKEN = re.compile(
    r"""
    \d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?                 # 1,200  1,200.50
    | (?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?      # 3  3.5  .5  1.5e3
    | \\[a-zA-Z]+                                         # \frac  \sqrt  \pi
    | sqrt | pi
    | \S
    """,
    re.VERBOSE,
)

_TOKEN_LIMIT = 100  # bounds how deep the grammar below nests
_SIGNS = ("+", "-")
_ROOTS = ("\\sqrt", "sqrt")
_PI = ("\\pi", "pi")
_FACTORS = ("(", "{", "\\frac", *_ROOTS, *_PI)  # they may follow a number without a "*": 2\pi

Number = Fraction | float
Tokens = list[str]


def to_number(text: str) -> Number | None:
    r"""The value of a number as people write it; None for anything else.

    It is exact, a Fraction, where the number is rational. Examples: 1,200  -3.5  2/4  50%  1 1/2
    1.5e3  2\sqrt{3}  \frac{\pi}{2}  3^{-2}. A parser reads it, no eval; powers and lengths are
    bounded.
    """
    tokens = _TOKEN.findall(_tidy(text[:LONGEST_ANSWER]))
    if len(tokens) > _TOKEN_LIMIT:
        return None
    try:
        value, rest = _sum([*tokens, ""])
        return value if rest == [""] and abs(value) < 1e300 else None
    except (ValueError, ArithmeticError, IndexError, RecursionError):
        return None  # no number, or one out of bounds


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
    """power = mixed ["^" ["-"] atom] ["%"]. Examples: 3^{-2}, 50%."""
    value, tokens = _mixed(tokens)
    if tokens[0] == "^":
        exponent, tokens = _negated(_atom, tokens[1:])
        value = _raised(value, exponent)
    if tokens[0] == "%":
        value, tokens = value / 100, tokens[1:]
    return value, tokens


def _raised(value: Number, exponent: Number) -> Number:
    """value to the power of exponent. ValueError where that is not real or would be too large."""
    if abs(exponent) > 64 or abs(value) > 10**18:
        raise ValueError("out of bounds")
    whole = exponent == int(exponent)
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
    if head in _PI:
        return math.pi, rest
    if not head[:1].isdigit() and head[:1] != ".":
        raise ValueError(f"not a number: {head!r}")
    return Fraction(head.replace(",", "")), rest


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


# -------------------------------------------------------------------------------------- units

# Each unit, then its other names; "_" is a blank. Only these may stand behind a number that the
# gold answer has without a unit.
_UNITS = """
    cm centimeter centimeters centimetre centimetres; mm millimeter millimeters millimetre
    millimetres; m meter meters metre metres; km kilometer kilometers kilometre kilometres;
    inch in inches; ft foot feet; yd yard yards; mile miles mi;
    g gram grams; kg kilogram kilograms kilo kilos; mg milligram milligrams;
    lb lbs pound pounds; oz ounce ounces;
    L l liter liters litre litres; ml mL milliliter milliliters millilitre millilitres;
    s sec secs second seconds; min mins minute minutes; h hr hrs hour hours;
    day days; week weeks; month months; year years;
    degrees degree deg; degrees_C degrees_Celsius Celsius;
    degrees_F degrees_Fahrenheit Fahrenheit; rad radian radians;
    unit units; point points; $ dollar dollars USD; € euro euros EUR; £ GBP; cent cents;
    mph; J joule joules; N newton newtons; W watt watts; V volt volts; A ampere amperes amps;
    Hz hertz; Pa pascal pascals; K kelvin; mol moles
"""

_UNIT_OF = {
    name.replace("_", " "): names.split()[0]
    for names in _UNITS.split(";")
    for name in names.split()
}

# Longer names first: "in" must not be read where "inches" stands.
_UNIT_NAME = "|".join(re.escape(name) for name in sorted(_UNIT_OF, key=len, reverse=True))

_UNIT = re.compile(
    rf"""
    (?P<gap> ^ | (?<=[\d}})%]) | [ ])                   # nothing behind a number, or one blank
    (?P<power> square[ ] | sq[ ] | cubic[ ] )?          # square cm
    (?P<unit>{_UNIT_NAME})
    (?: [ ]? \^ [ ]? \{{? (?P<exponent>[23]) \}}? )?    # cm^2
    (?: [ ]? (?:/|per) [ ]? (?P<per>{_UNIT_NAME}) )?    # km/h, km per hour
    $
    """,
    re.VERBOSE,
)

_POWERS = {"square ": "2", "sq ": "2", "cubic ": "3"}
_CURRENCIES = ("$", "€", "£")

# The unit itself, its power and the unit that it is per.
Unit = tuple[str, str | None, str | None]


def split_unit(text: str) -> tuple[str, Unit | None]:
    """A number with its unit -> the number and the unit; without a unit the text and None.

    Examples: "5 cm^2" -> "5", ("cm", "2", None); "$5" -> "5", ("$", None, None).
    """
    if text.startswith(_CURRENCIES):
        return text[1:].strip(), (text[0], None, None)
    match = _UNIT.search(text)
    if not match or match.start() == 0 or _may_be_variable(match):
        return text, None
    power = _POWERS.get(match["power"], match["exponent"])
    unit = _UNIT_OF[match["unit"]], power, _UNIT_OF.get(match["per"])
    return text[: match.start()].strip(), unit


def _may_be_variable(match: re.Match) -> bool:
    """One letter without a blank before it is no unit: 2m may be 2 * m."""
    unit = match["unit"]
    return len(unit) == 1 and unit.isalpha() and not match["gap"]


# ------------------------------------------------------------------------------------ several

_OPENING, _CLOSING = ("(", "[", "⟨", "{"), (")", "]", "⟩", "}")
_SET_BRACES = {"⟨": "{", "⟩": "}"}
_UNORDERED = ("", "{}")  # a bare list and a set
_CONJUNCTION = re.compile(r",? (?:and|or) ")


def _elements(text: str) -> tuple[str, list[str]] | None:
    """A tuple, interval, set or list -> its brackets and its elements; None for anything else.

    Examples: "(1, 2]" -> "(]", ["1", "2"]; "1 and 2" -> "", ["1", "2"].
    """
    if text.startswith(_OPENING) and text.endswith(_CLOSING):
        left, right = text[0], text[-1]
        kind = _SET_BRACES.get(left, left) + _SET_BRACES.get(right, right)
        parts = _split_at_commas(text[1:-1])
    else:
        kind = ""
        parts = _split_at_commas(_CONJUNCTION.sub(", ", text))
    return (kind, parts) if len(parts) > 1 else None


def _split_at_commas(text: str) -> list[str]:
    r"""The text between the commas that stand outside of brackets: "1, (2, 3)" -> "1", "(2, 3)".

    Nothing where a bracket closes that is not open: (1, 2) \cup (3, 4) has no outer pair.
    """
    depth = 0
    start = 0
    parts = []
    for place, character in enumerate(text):
        if character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
            if depth < 0:
                return []
        elif character == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


# ------------------------------------------------------------------------------ words, options

YES_OR_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
ARTICLES = ("a", "an", "the")
DIGIT_OR_COMMAND = re.compile(r"\d|\\")  # what tells a formula from words

_BRACED_CHARACTER = re.compile(r"\{(\w)\}")
_NO_WORD = re.compile(r"[\W_]+")

_LONE_LETTER = re.compile(r"[(\[]?[A-Za-z][)\]]?")

_LETTER = re.compile(
    r"""
    (?i: (?:the[ ])? (?:correct[ ])? (?:option|choice|answer)? :? [ ]? (?:is[ ])? )
    [(\[]? ([A-Za-z]) [)\]]?
    (?: [.:)] [ ]? (.*) )?                # what follows the letter
    $
    """,
    re.VERBOSE | re.DOTALL,
)

_FURTHER_OPTION = re.compile(r"(?:^|[\s,;(])[A-Z][).:]")


def _letter(text: str) -> tuple[str, str] | None:
    """An option's letter and what follows it; None for anything else, several options included.

    Examples: "(B)" and "option b" -> "B", ""; "B: 12 cm" -> "B", "12 cm".
    """
    match = _LETTER.match(text)
    if not match:
        return None
    letter, following = match[1].upper(), match[2] or ""
    if _FURTHER_OPTION.search(following):
        return None
    return letter, following.strip()


def pick_option(text: str, choices: list[str]) -> int | None:
    """The place of the option that a text picks; None where it picks none, or several.

    It picks by the option's text if only that option has it, or by the letter, alone or with the
    option's text behind it.
    """
    options = [_tidy(str(choice)) for choice in choices]
    places = [place for place, option in enumerate(options) if _same(text, option)]
    if len(places) == 1:
        return places[0]
    named = _letter(text)
    if named is None:
        return None
    letter, following = named
    place = ord(letter) - ord("A")
    if place >= len(options):
        return None
    return place if not following or _same(following, options[place]) else None


# ------------------------------------------------------------------------------------ compare


def same_answer(given: str, answer: str, choices: list[str] | None = None) -> bool:
    """Is `given` the gold `answer`?

    Numbers: the same exact value, and the same unit or one of the two without a unit. Sets, tuples
    and intervals: element by element. Yes or no: "true" is yes, "false" is no. Options: by letter
    or, with `choices`, by an option's own text. Anything else: as text, up to case, articles and
    punctuation.

    Strict on purpose: the model learns a wrong answer that passes. An answer that hedges
    ("5 or 6"), negates, or lists all options is not right. An answer longer than LONGEST_ANSWER is
    not right either.
    """
    if len(given) > LONGEST_ANSWER or len(answer) > LONGEST_ANSWER:
        return False
    given, gold = _tidy(given), _tidy(unboxed(answer))
    if choices:
        place = pick_option(gold, choices)
        if place is not None:
            return pick_option(given, choices) == place
    elif _LONE_LETTER.fullmatch(gold):
        named = _letter(given)
        return named is not None and named[0] == gold.strip("()[]").upper()
    return _same(given, gold)


def _same(given: str, gold: str, depth: int = 3) -> bool:
    """Two tidy answers: as numbers, else by their elements, else as words.

    depth: how deep elements may still nest.
    """
    verdict = _same_number(given, gold)
    if verdict is None and depth > 0:
        verdict = _same_elements(given, gold, depth - 1)
    if verdict is None:
        verdict = _same_words(given, gold)
    return verdict


def _same_number(given: str, gold: str) -> bool | None:
    """Equal value and no other unit: 0.5 m is 1/2 m and 1/2, not 1/2 cm. None: neither is a number.

    Two rational numbers must be equal exactly. Others are floats, where only rounding may differ.
    """
    (given, given_unit), (gold, gold_unit) = split_unit(given), split_unit(gold)
    value, gold_value = to_number(given), to_number(gold)
    if value is None and gold_value is None:
        return None
    if value is None or gold_value is None:
        return False
    if isinstance(value, Fraction) and isinstance(gold_value, Fraction):
        equal = value == gold_value
    else:
        equal = math.isclose(value, gold_value, rel_tol=1e-12)
    return equal and (given_unit is None or gold_unit is None or given_unit == gold_unit)


def _same_elements(given: str, gold: str, depth: int) -> bool | None:
    """Equal elements: (1, 2) is (1, 2), not (2, 1); {1, 2} is {2, 1} and 2, 1. None: one has none.

    A set and a bare list may stand for each other; otherwise the brackets must be the same.
    """
    given_parts, gold_parts = _elements(given), _elements(gold)
    if given_parts is None or gold_parts is None:
        return None
    (kind, items), (gold_kind, gold_items) = given_parts, gold_parts
    unordered = kind in _UNORDERED and gold_kind in _UNORDERED
    if len(items) != len(gold_items) or (kind != gold_kind and not unordered):
        return False
    if unordered:
        return _same_set(items, gold_items, depth)
    return all(_same(*pair, depth) for pair in zip(items, gold_items, strict=True))


def _same_set(items: list[str], gold_items: list[str], depth: int) -> bool:
    """Each item is a gold item, and no gold item is used twice."""
    left = list(gold_items)
    for item in items:
        partners = (gold for gold in left if _same(item, gold, depth))
        partner = next(partners, None)
        if partner is None:
            return False
        left.remove(partner)
    return True


def _same_words(given: str, gold: str) -> bool:
    """Equal words: "The Cat!" is "cat", "True" is "yes". No words are equal to nothing."""
    given, gold = _words(given), _words(gold)
    return bool(gold) and YES_OR_NO.get(given, given) == YES_OR_NO.get(gold, gold)


def _words(text: str) -> str:
    """A text for comparison: "The red-ish cat!" -> "red ish cat"; a formula keeps its signs."""
    if DIGIT_OR_COMMAND.search(text):
        return _BRACED_CHARACTER.sub(r"\1", text.replace(" ", "")).casefold()
    words = _NO_WORD.sub(" ", text.casefold()).split()
    return " ".join(word for word in words if word not in ARTICLES)


# ------------------------------------------------------------------------------------- judges

_FORMULA_SIGN = re.compile(r"[\\\d=+*/^<>]")


def load_judge(name: str) -> Callable[..., bool]:
    """The comparison of that name, a function same(given, answer, choices=None) -> bool.

    "rules" is `same_answer`. "math" asks math-verify too, but only where the rules say no to a
    formula that they cannot read. On anything else math-verify is worse: of the labelled answers in
    tests/ it passes, alone, 12 wrong ones (50% for 50, 5 m for 5 cm, a set for a tuple) and fails
    55 right ones. Raises ValueError where math-verify is not installed.
    """
    if name == "rules":
        return same_answer
    try:
        import math_verify
    except ImportError:
        raise ValueError(
            "--verifier math needs math-verify: python -m pip install 'math-verify[antlr4_13_2]'"
        ) from None

    def same(given: str, answer: str, choices: list[str] | None = None) -> bool:
        if choices or len(given) > LONGEST_ANSWER or same_answer(given, answer):
            return same_answer(given, answer, choices)
        if not _is_unread_formula(_tidy(extract_answer(answer) or answer)):
            return False  # the rules can read this gold answer, so their no is a no
        gold_formula, given_formula = (math_verify.parse(f"${text}$") for text in (answer, given))
        return bool(math_verify.verify(gold_formula, given_formula))

    return same


def _is_unread_formula(gold: str) -> bool:
    """A formula that is neither a number nor several numbers: (x+1)^2. Words are no formula."""
    parts = _elements(gold)
    items = parts[1] if parts else [gold]
    numbers = [to_number(split_unit(item)[0]) for item in items]
    return None in numbers and _FORMULA_SIGN.search(gold) is not None
