"""Find and compare final answers."""

from __future__ import annotations

import math
import re
from fractions import Fraction

LONGEST = 400  # characters of an answer that are read; what is longer is no answer. Keeps every pattern below cheap


def extract_answer(text: str) -> str | None:
    """The final answer of a response: its last \\boxed{...} (braces may nest), else the last <answer>...</answer>, else what follows
    "answer:" or "answer is" on the last line that has it. Thinking, closed or not, is not looked at. None where there is nothing."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    start = text.rfind("\\boxed")
    if start >= 0:
        return _braced(text[start + len("\\boxed") :][:LONGEST].lstrip())
    before, tag, rest = text.rpartition("<answer>")
    if tag:
        inside, closed, _ = rest[:LONGEST].partition("</answer>")
        return inside.strip() or None if closed else None
    for line in reversed(text[-10 * LONGEST :].splitlines()):
        found = re.search(r"\banswer\s*(?:is\b|:)\s*:?(.*)", line.replace("*", ""), re.I)
        if found:
            return found[1].strip() or None
    return None


def _braced(text: str) -> str | None:
    """What stands between the brace that text starts with and its partner; None if there is no such pair."""
    depth, skip = 0, False
    for i, c in enumerate(text):
        if skip or c == "\\":
            skip = not skip  # \{ and \} are set braces, not grouping
            continue
        depth += {"{": 1, "}": -1}.get(c, 0)
        if depth == 0:
            return text[1:i].strip() or None if i else None
    return None  # never closed: cut off in the middle of its answer


_PLAIN = {
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

_LATEX = [
    (r"(?<=\d)\\[,!] ?(?=\d{3}(?!\d))", ""),  # 1\,200
    (r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\[,;!: ]|\\q?quad|~", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:times|cdot)(?![a-z])", "*"),
    (r"\\div(?![a-z])", "/"),
    (r"\{,\}", ","),
    (r"\\%", "%"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", " degrees"),
    (r"\\\{|\\lbrace", "⟨"),
    (r"\\\}|\\rbrace", "⟩"),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"^\s*(?:\$\$|\\\(|\\\[)|(?:\$\$|\\\)|\\\])\s*$", " "),
    (r"^\s*\$([^$]*)\$\s*$", r"\1"),
    (r"\\\$", "$"),
]

_TOKEN = re.compile(
    r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?|\\[a-zA-Z]+|sqrt|pi|\S"
)


def plain_latex(text: str) -> str:
    """One spelling: LaTeX's spacing, text and mathematics commands gone, Unicode signs as LaTeX, blanks single."""
    text = "".join(_PLAIN.get(c, c) for c in text)
    for pattern, new in _LATEX:
        text = re.sub(pattern, new, text)
    return " ".join(text.split())


def _tidy(text: str) -> str:
    """An answer in plain_latex without a leading `x =` and a final stop."""
    text = plain_latex(text).rstrip(".,;:! ")
    return re.sub(r"^\\?[a-zA-Z]{1,8}(?:_\{?\w\}?)? ?= ?(?=[^=])", "", text).strip()


def to_number(text: str) -> Fraction | float | None:
    """The value of a number as people write it, exact (a Fraction) where it is rational: 1,200  -3.5  2/4  50%  1 1/2  1.5e3
    2\\sqrt{3}  \\frac{\\pi}{2}  3^{-2}; None for anything else. No eval; powers and lengths are bounded."""
    try:
        tokens = _TOKEN.findall(_tidy(text[:LONGEST]))
        value, rest = _sum(tokens[:100] + [""])
        return value if rest == [""] and len(tokens) <= 100 and abs(value) < 1e300 else None
    except (
        ValueError,
        ArithmeticError,
        IndexError,
        RecursionError,
    ):  # not a number, or one out of all bounds
        return None


def _sum(tokens):
    """value, remaining tokens; as do the three functions below. Raises ValueError where the grammar has no such number."""
    value, tokens = _product(tokens)
    while tokens[0] in ("+", "-"):
        sign = 1 if tokens[0] == "+" else -1
        other, tokens = _product(tokens[1:])
        value += sign * other
    return value, tokens


def _product(tokens):
    if tokens[0] in ("+", "-") and tokens[1] not in ("+", "-"):
        value, rest = _product(tokens[1:])
        return (value if tokens[0] == "+" else -value), rest
    value, tokens = _power(tokens)
    while tokens[0] in ("*", "/", "(", "{", "\\frac", "\\sqrt", "sqrt", "\\pi", "pi"):
        if tokens[0] in ("*", "/"):
            other, rest = _power(tokens[2:] if tokens[1] == "-" else tokens[1:])
            other = -other if tokens[1] == "-" else other
            value, tokens = (value * other if tokens[0] == "*" else value / other), rest
        else:  # 2\pi
            other, tokens = _power(tokens)
            value *= other
    return value, tokens


def _power(tokens):
    value, rest = _atom(tokens)
    if tokens[0].isdigit():  # mixed numbers: 1 1/2, 1\frac{1}{2}
        if rest[0] == "\\frac":
            part, rest = _atom(rest)
            value += part
        elif rest[0].isdigit() and rest[1] == "/" and rest[2].isdigit():
            value, rest = value + Fraction(int(rest[0]), int(rest[2])), rest[3:]
    if rest[0] == "^":
        negative = rest[1] == "-"
        exponent, rest = _atom(rest[2:] if negative else rest[1:])
        exponent = -exponent if negative else exponent
        if abs(exponent) > 64 or abs(value) > 10**18:
            raise ValueError("out of bounds")
        value = value ** (int(exponent) if exponent == int(exponent) else float(exponent))
        if isinstance(value, complex):
            raise ValueError("not real")
    if rest[0] == "%":
        value, rest = value / 100, rest[1:]
    return value, rest


def _atom(tokens):
    head, rest = tokens[0], tokens[1:]
    if head in ("(", "{"):
        value, rest = _sum(rest)
        if rest[0] != (")" if head == "(" else "}"):
            raise ValueError("not closed")
        return value, rest[1:]
    if head == "\\frac":
        if rest[0].isdigit() and len(rest[0]) > 1:  # \frac12
            rest = [rest[0][0], rest[0][1:], *rest[1:]]
        top, rest = _atom(rest)
        bottom, rest = _atom(rest)
        return top / bottom, rest
    if head in ("\\sqrt", "sqrt"):
        degree = 2
        if rest[0] == "[":
            degree, rest = int(rest[1]), rest[3:]
        value, rest = _atom(rest)
        if value < 0 or not 2 <= degree <= 9:
            raise ValueError("not real")
        roots = [round(float(x) ** (1 / degree)) for x in Fraction(value).as_integer_ratio()]
        exact = Fraction(*roots) if roots[1] else None
        return (
            exact if exact is not None and exact**degree == value else float(value) ** (1 / degree)
        ), rest
    if head in ("\\pi", "pi"):
        return math.pi, rest
    if not head[:1].isdigit() and head[:1] != ".":
        raise ValueError(f"not a number: {head!r}")
    return Fraction(head.replace(",", "")), rest


# Each unit and its other names. Only these may stand behind a number that the gold answer has without a unit
_UNITS = """cm centimeter centimeters centimetre centimetres; mm millimeter millimeters millimetre millimetres;
    m meter meters metre metres; km kilometer kilometers kilometre kilometres; inch in inches; ft foot feet; yd yard yards; mile miles mi;
    g gram grams; kg kilogram kilograms kilo kilos; mg milligram milligrams; lb lbs pound pounds; oz ounce ounces;
    L l liter liters litre litres; ml mL milliliter milliliters millilitre millilitres;
    s sec secs second seconds; min mins minute minutes; h hr hrs hour hours; day days; week weeks; month months; year years;
    degrees degree deg; degrees_C degrees_Celsius Celsius; degrees_F degrees_Fahrenheit Fahrenheit; rad radian radians;
    unit units; point points; $ dollar dollars USD; € euro euros EUR; £ GBP; cent cents; mph; J joule joules; N newton newtons; W watt watts;
    V volt volts; A ampere amperes amps; Hz hertz; Pa pascal pascals; K kelvin; mol moles"""


_UNIT_OF = {
    name.replace("_", " "): names.split()[0]
    for names in _UNITS.split(";")
    for name in names.split()
}

_NAMES = "|".join(re.escape(name) for name in sorted(_UNIT_OF, key=len, reverse=True))

_UNIT = re.compile(
    rf"(?P<gap>^|(?<=[\d}})%])| )(?P<power>square |sq |cubic )?(?P<unit>{_NAMES})"
    rf"(?: ?\^ ?\{{?(?P<exponent>[23])\}}?)?(?: ?(?:/|per) ?(?P<per>{_NAMES}))?$"
)


def split_unit(text: str) -> tuple[str, tuple | None]:
    """ "5 cm^2" -> "5", ("cm", "2", None); "$5" -> "5", ("$", None, None); without a unit the text and None."""
    if text[:1] in ("$", "€", "£"):
        return text[1:].strip(), (text[0], None, None)
    found = _UNIT.search(text)
    if (
        not found
        or not found.start()
        or (len(found["unit"]) == 1 and found["unit"].isalpha() and not found["gap"])
    ):  # 2m may be 2 * m
        return text, None
    power = {"square ": "2", "sq ": "2", "cubic ": "3"}.get(found["power"], found["exponent"])
    return text[: found.start()].strip(), (
        _UNIT_OF[found["unit"]],
        power,
        _UNIT_OF.get(found["per"]),
    )


def _parts(text: str) -> tuple[str, list[str]] | None:
    """A tuple, interval, set or list -> its brackets ("" for a bare list) and its elements; None for anything else."""
    bare = re.sub(r",? (?:and|or) ", ", ", text)
    kind = ""
    if text[:1] in ("(", "[", "⟨", "{") and text[-1:] in (")", "]", "⟩", "}"):
        kind, bare = (
            {"⟨": "{"}.get(text[0], text[0]) + {"⟩": "}"}.get(text[-1], text[-1]),
            text[1:-1],
        )
    depth, start, parts = 0, 0, []
    for i, c in enumerate(bare):
        depth += (c in "([{⟨") - (c in ")]}⟩")
        if depth < 0:
            return None  # (1, 2) \cup (3, 4) has no outer pair
        if c == "," and depth == 0:
            parts.append(bare[start:i].strip())
            start = i + 1
    return (kind, [*parts, bare[start:].strip()]) if parts else None


_YES = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}

_LETTER = re.compile(
    r"(?i:(?:the )?(?:correct )?(?:option|choice|answer)?:? ?(?:is )?)[(\[]?([A-Za-z])[)\]]?(?:[.:)] ?(.*))?$",
    re.S,
)


def _letter(text: str) -> tuple[str, str] | None:
    """ "(B)", "B.", "option b", "B: 12 cm" -> the letter and what follows it; None for anything else, several options included."""
    found = _LETTER.match(text)
    if not found or re.search(r"(?:^|[\s,;(])[A-Z][).:]", found[2] or ""):
        return None
    return found[1].upper(), (found[2] or "").strip()


def _words(text: str) -> str:
    if re.search(r"\d|\\", text):
        return re.sub(r"\{(\w)\}", r"\1", text.replace(" ", "")).casefold()
    return " ".join(
        w for w in re.sub(r"[\W_]+", " ", text.casefold()).split() if w not in ("a", "an", "the")
    )


def same_answer(given: str, answer: str, choices: list[str] | None = None) -> bool:
    """Is `given` the gold `answer`? As numbers (exact value; the same unit, or one of them without), sets, tuples and intervals element by
    element, yes/no, option letters or, with `choices`, an option's own text, and otherwise as text up to case, articles and punctuation.

    Strict on purpose: a wrong answer that passes is learnt. What hedges ("5 or 6"), negates or lists every option is no answer.
    """
    if len(given) > LONGEST or len(answer) > LONGEST:
        return False
    if "\\boxed" in answer or "<answer>" in answer:
        answer = extract_answer(answer) or answer
    a, b = _tidy(given), _tidy(answer)
    if choices:
        picked, gold = pick_option(a, choices), pick_option(b, choices)
        if gold is not None:
            return picked == gold
    elif re.fullmatch(r"[(\[]?[A-Za-z][)\]]?", b):
        found = _letter(a)
        return found is not None and found[0] == b.strip("()[]").upper()
    return _same(a, b, 3)


def pick_option(text: str, choices: list[str]) -> int | None:
    """Which option a text picks: by its letter, alone or with the option's own text, or by that text if only one option has it."""
    same = [i for i, choice in enumerate(choices) if _same(text, _tidy(str(choice)), 3)]
    if len(same) == 1:
        return same[0]
    found = _letter(text)
    if not found or not (place := ord(found[0]) - ord("A")) < len(choices):
        return None
    return place if not found[1] or _same(found[1], _tidy(str(choices[place])), 3) else None


def _same(a: str, b: str, depth: int) -> bool:
    (x, unit_a), (y, unit_b) = split_unit(a), split_unit(b)
    value, gold = to_number(x), to_number(y)
    if value is not None and gold is not None:
        exact = isinstance(value, Fraction) and isinstance(gold, Fraction)
        equal = value == gold if exact else math.isclose(value, gold, rel_tol=1e-12)
        return equal and (unit_a is None or unit_b is None or unit_a == unit_b)
    if value is not None or gold is not None:
        return False
    several, wanted = _parts(a), _parts(b)
    if depth and several and wanted:
        (kind, items), (gold_kind, golds) = several, wanted
        if len(items) != len(golds) or {kind, gold_kind} - {"", "{}"} and kind != gold_kind:
            return False
        if kind not in ("", "{}"):
            return all(_same(i, g, depth - 1) for i, g in zip(items, golds))
        left = list(golds)
        for item in items:  # unordered: each gold element is used once
            match = next((g for g in left if _same(item, g, depth - 1)), None)
            if match is None:
                return False
            left.remove(match)
        return True
    a, b = _words(a), _words(b)
    return bool(b) and _YES.get(a, a) == _YES.get(b, b)


def verify(response: str, answer: str, choices: list[str] | None = None) -> bool:
    """Is the response's final answer the gold answer? No answer found, or one not understood, is False; never an exception."""
    given = extract_answer(response)
    return given is not None and same_answer(given, answer, choices)


def load_verifier(name: str):
    """ "rules": `verify`. "math": where the rules say no to a formula that they cannot read, math-verify decides.

    Not to anything else: of the labelled answers in tests/, math-verify by itself passes 12 wrong ones (50% for 50, 5 m for 5 cm, a set for a
    tuple) and fails 55 right ones. Raises ValueError where it is not installed."""
    if name == "rules":
        return verify
    try:
        import math_verify
    except ImportError:
        raise ValueError(
            "--verifier math needs math-verify: python -m pip install 'math-verify[antlr4_13_2]'"
        ) from None

    def check(response: str, answer: str, choices: list[str] | None = None) -> bool:
        given = extract_answer(response)
        if choices or given is None or len(given) > LONGEST or verify(response, answer):
            return verify(response, answer, choices)
        gold = _tidy(extract_answer(answer) or answer)
        parts = _parts(gold)
        if all(
            to_number(split_unit(part)[0]) is not None for part in (parts[1] if parts else [gold])
        ) or not re.search(r"[\\\d=+*/^<>]", gold):
            return False  # numbers and words: the rules read them, and their no is a no
        return bool(
            math_verify.verify(math_verify.parse(f"${answer}$"), math_verify.parse(f"${given}$"))
        )

    return check
