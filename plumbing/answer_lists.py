r"""How an answer is built: labels ("x ="), relations, brackets and lists, intervals."""

from __future__ import annotations

import re

from plumbing.answer_numbers import Number, read_number
from plumbing.answer_quantities import same_value

_OPENING, _CLOSING = ("(", "[", "⟨", "{"), (")", "]", "⟩", "}")
_ANY_BRACKET = re.compile(r"[(\[⟨{)\]⟩}]")
_SET_BRACES = {"⟨": "{", "⟩": "}"}


def split_outside(text: str, pattern: re.Pattern) -> tuple[list[str], list[str]] | None:
    r"""The text between the matches that stand outside of brackets, and the matches.

    "1, (2, 3)" at commas -> ["1", "(2, 3)"], [","]. None where brackets do not match: the halves of
    (1, 2) \cup (3, 4) have no outer pair.
    """
    if not _ANY_BRACKET.search(text):
        return _split_at(list(pattern.finditer(text)), text)
    depth = start = place = 0
    parts, signs = [], []
    while place < len(text):
        match = pattern.match(text, place) if depth == 0 else None
        if match and match.end() > place:
            parts.append(text[start:place].strip())
            signs.append(match[0].strip())
            start = place = match.end()
            continue
        if text[place] in _OPENING:
            depth += 1
        elif text[place] in _CLOSING:
            depth -= 1
            if depth < 0:
                return None
        place += 1
    return ([*parts, text[start:].strip()], signs) if depth == 0 else None


def _split_at(matches: list[re.Match], text: str) -> tuple[list[str], list[str]]:
    ends = [0, *(match.end() for match in matches)]
    starts = [*(match.start() for match in matches), len(text)]
    parts = [text[end:start].strip() for end, start in zip(ends, starts, strict=True)]
    return parts, [match[0].strip() for match in matches]


# ------------------------------------------------------------------------ relations and labels

_RELATION = re.compile(r"\\(?:le|ge|ne|approx|equiv)(?![a-zA-Z])|[<>=]")
_HAS_RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|approx|equiv)(?![a-zA-Z])")

Relation = tuple[list[str], list[str]]  # the sides, and the signs between them


def read_relation(text: str) -> Relation | None:
    r"""The sides and signs of an equation or inequality: "2 < x \le 5"; None for anything else."""
    if not _HAS_RELATION.search(text):
        return None
    split = split_outside(text, _RELATION)
    return split if split and split[1] and "" not in split[0][1:] else None


# x  y_1  f(2)  P(A|B)  AB  a + b  \angle ABC  \angle 1  S_{ABC}  total cost  (x, y)
_LABEL = re.compile(
    r"(?!-)(?:[^\W\d_]|_(?:\{[^{}]{1,12}\}|\w)|\([^()]{1,20}\)|\\(?:angle|triangle) ?\d"
    r"|[\s'|+*/:{}-]|\\(?!sqrt|pm|mp)[a-zA-Z]+(?![a-zA-Z]))+"
)
_NO_LABEL = re.compile(
    r"\b(?:or|and|not|no|never|isn't|cannot|neither|nor|if|than)\b|[不非或和]", re.I
)
_COPULA = re.compile(r"^(.{0,80}) (?:is|are|equals?|was|were)(?: equal to)? (?!not\b)", re.I)
_COLON = re.compile(r"^([A-Za-z][a-z]{2,}[A-Za-z ]{0,60}): ")
_POINT_NAME = re.compile(r"^([A-Z]'?) ?(?=\([^()]*,)")
_MAY_HAVE_LABEL = re.compile(r"[a-z]: |[a-z] |[A-Z]'? ?\(")
_SEPARATOR = re.compile(r"[,;]|\b(?:or|and)\b|[和或]")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]?[a-z]{3,}|[\u4e00-\u9fff]")
_ONE_NAME = re.compile(r"[+*/:-]")


def split_label(text: str) -> tuple[str, str]:
    """The label of a value, and the value: "AB = 2 + 3 = 5" -> "AB", "5"; without one "", text.

    A label is a name, a sum of names or a phrase: "P(A)", "x + y", "The area is". A worked sum,
    "2 + 3 = 5", has the label "2 + 3" if it is true. "2x = 10" has no label: 10 is not x.
    """
    relation = read_relation(text)
    if relation:
        return _label_of_relation(text, *relation)
    if not _MAY_HAVE_LABEL.search(text):
        return "", text
    for pattern in (_COPULA, _COLON, _POINT_NAME):
        match = pattern.match(text)
        if match and _is_label(match[1]):
            return match[1], text[match.end() :].strip()
    return "", text


def _label_of_relation(text: str, sides: list[str], signs: list[str]) -> tuple[str, str]:
    label, value = sides[0], sides[-1]
    is_equation = all(sign in ("=", r"\approx") for sign in signs)
    is_chain = any(_SEPARATOR.search(side) for side in sides[1:-1])
    if not is_equation or is_chain:
        return "", text
    if _is_label(label) or (label == "" and signs[0] in ("=", r"\approx")):
        return label, value
    return (label, value) if _is_true_sum(label, value) else ("", text)


def _is_label(text: str) -> bool:
    return bool(_LABEL.fullmatch(text)) and not _NO_LABEL.search(text)


def _is_true_sum(text: str, value_text: str) -> bool:
    value, result = read_number(text), read_number(value_text)
    return value is not None and result is not None and same_value(value, result)


def is_name(label: str) -> bool:
    """The label is one name or a phrase, no sum of names."""
    return not _ONE_NAME.search(label)


def has_words(label: str) -> bool:
    """The label holds a word, and not symbols alone."""
    return bool(_WORD.search(label))


def labels_agree(label: str, gold: str) -> bool:
    """Two symbols must be the same one; a phrase may stand for any symbol: "Area" for "A"."""
    if not label or not gold or has_words(label) or has_words(gold):
        return True
    return _bare(label) == _bare(gold)


def _bare(label: str) -> str:
    return re.sub(r"[\s{}_]", "", label)


# -------------------------------------------------------------------------------------- lists

_COMMA = re.compile(r",")
_LIST_COMMA = re.compile(r",(?!\d{3}(?!\d))")  # the comma of 1,200 is none
_SEMICOLON = re.compile(r";")
_AND = re.compile(r"(?:, ?| )?(?:\band\b|&|和|与|及) ?", re.I)
_OR = re.compile(r"(?:, ?| )?(?:\bor\b|或者?) ?", re.I)
_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])")
_MINUS_PLUS = re.compile(r"\\mp(?![a-zA-Z])")
_LISTED = re.compile(r"[,;&和与及或]|\\pm|\b(?:and|or)\b", re.I)
_HEDGED = re.compile(r"[\d\\=]")

List = tuple[str, list[str]]  # the brackets, "" for a bare list, and the elements


def read_lists(text: str) -> list[List]:
    r"""The tuple, interval, set or list that a text is, read in each way that makes sense.

    "(1, 2]" -> "(]", ["1", "2"]; "1 and 2" -> "", ["1", "2"]; "1 \pm 2" -> "", ["1 + 2", "1 - 2"];
    "1,200" is a list of two, and "1,200, 5" is a list of three or of two. Inside of brackets each
    comma separates. Words with "or" between them are no list: they hedge.
    """
    if not _LISTED.search(text):
        return []
    kind, inside = _brackets(text)
    if not kind:
        inside = _AND.sub(", ", inside)
        without_or = _OR.sub(", ", inside)
        if without_or != inside:
            items = _split(without_or, _COMMA) or []
            if not all(_HEDGED.search(item) for item in items):
                return []
            inside = without_or
    separators = [_SEMICOLON] if ";" in inside else [_COMMA]
    if not kind and ";" not in inside:
        separators.append(_LIST_COMMA)
    readings = [_split(inside, separator) for separator in separators]
    lists = [(kind, items) for items in readings if items and len(items) > 1]
    if not lists and not kind and _PLUS_MINUS.search(text):
        return [("", _both_signs(text))]
    return [(kind, _expanded(items)) for kind, items in lists]


def _brackets(text: str) -> tuple[str, str]:
    """The outer brackets of a text and what they hold; "" and the text where it has none."""
    if text.startswith(_OPENING) and text.endswith(_CLOSING):
        inside = text[1:-1]
        if split_outside(inside, _COMMA) is not None:
            left, right = text[0], text[-1]
            return _SET_BRACES.get(left, left) + _SET_BRACES.get(right, right), inside
    return "", text


def _split(text: str, separator: re.Pattern) -> list[str] | None:
    split = split_outside(text, separator)
    return split and [part for part in split[0] if part]


def _expanded(items: list[str]) -> list[str]:
    signs = [_both_signs(item) if _PLUS_MINUS.search(item) else [item] for item in items]
    return [item for pair in signs for item in pair]


def _both_signs(text: str) -> list[str]:
    plus = _MINUS_PLUS.sub("-", _PLUS_MINUS.sub("+", text))
    minus = _MINUS_PLUS.sub("+", _PLUS_MINUS.sub("-", text))
    return [plus, minus]


_COLUMN = re.compile(r"\[\[([^\[\],]+)\](?:, \[[^\[\],]+\])+\]")


def column_as_tuple(text: str) -> str:
    """A matrix of one column as a tuple: "[[1], [2]]" -> "(1, 2)"; any other text as it is."""
    if not _COLUMN.fullmatch(text):
        return text
    return "(" + text[2:-2].replace("], [", ", ") + ")"


# ------------------------------------------------------------------- intervals and inequalities

_UNION = re.compile(r" ?\\cup ?| U (?=[(\[])|,? (?:or|OR) | ?或者? ?")
_MEMBER = re.compile(r"^([a-zA-Z]|\\[a-z]+) ?\\in ?(?=[(\[])")
_BUILDER = re.compile(r"^⟨ ?([a-zA-Z]|\\[a-z]+) ?[|:] ?(.*)⟩$")
_BOTH = re.compile(r" and |且|, ?(?=[a-zA-Z] ?(?:[<>]|\\(?:le|ge)))")
_NAME = re.compile(r"[a-zA-Z](?:_\{?\w\}?)?|\\(?:theta|alpha|beta|lambda|phi)|[a-zA-Z]\([a-z]\)")
_ENDS = ("-\\infty", "\\infty")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
_REALS = re.compile(r"(?:all )?real numbers?|all reals?|\\R", re.I)

# the lower end, is it in, the upper end, is it in
Interval = tuple[str, bool, str, bool]
Solution = tuple[str, list[Interval]]  # the variable's name, "" without one


def read_solution(text: str) -> Solution | None:
    r"""The intervals that a text names, by brackets or by an inequality; None for anything else.

    Examples: (1, 2) \cup [3, \infty)   x < 1 or x \ge 3   2 < x \le 5   x \ne 0   {x | x > 3}.
    """
    builder = _BUILDER.match(text)
    text = builder[2].strip() if builder else text
    member = _MEMBER.match(text)
    names = {member[1]} if member else set()
    text = text[member.end() :] if member else text
    if _REALS.fullmatch(text):
        return (member[1] if member else ""), [("-\\infty", False, "\\infty", False)]
    union = split_outside(text, _UNION)
    intervals = []
    for piece in union[0] if union else [text]:
        read = _bracket_interval(piece) or _inequalities(piece)
        if read is None:
            return None
        name, pieces = read
        names |= {name} - {""}
        intervals += pieces
    return (names.pop() if names else "", intervals) if len(names) < 2 else None


def _bracket_interval(text: str) -> Solution | None:
    kind, inside = _brackets(text)
    ends = _split(inside, _COMMA)
    if kind not in ("()", "(]", "[)", "[]") or not ends or len(ends) != 2:
        return None
    return "", [(ends[0], kind[0] == "[", ends[1].removeprefix("+"), kind[1] == "]")]


def _inequalities(text: str) -> Solution | None:
    """One inequality, or two that bound a name from both sides: "x > 2 and x < 5"."""
    both = [_inequality(part) for part in _BOTH.split(text)]
    if None in both or len(both) > 2:
        return None
    if len(both) == 1:
        return both[0]
    (name, pieces), (second_name, second) = both
    if name != second_name or len(pieces) != 1 or len(second) != 1:
        return None
    [(low, low_in, high, high_in)], [(low2, low2_in, high2, high2_in)] = pieces, second
    if low == _ENDS[0] and high2 == _ENDS[1]:
        return name, [(low2, low2_in, high, high_in)]
    if low2 == _ENDS[0] and high == _ENDS[1]:
        return name, [(low, low_in, high2, high2_in)]
    return None


def _inequality(text: str) -> Solution | None:
    relation = read_relation(text)
    if relation is None or len(relation[1]) > 2:
        return None
    sides, signs = relation
    if len(signs) == 2:
        return _double_inequality(sides, signs)
    left, sign, right = sides[0], signs[0], sides[1]
    if _NAME.fullmatch(right) and not _NAME.fullmatch(left):
        left, sign, right = right, _FLIPPED.get(sign, ""), left
    if (left and not _NAME.fullmatch(left)) or _NAME.fullmatch(right):
        return None
    low, high = _ENDS
    return {
        "<": (left, [(low, False, right, False)]),
        "\\le": (left, [(low, False, right, True)]),
        ">": (left, [(right, False, high, False)]),
        "\\ge": (left, [(right, True, high, False)]),
        "\\ne": (left, [(low, False, right, False), (right, False, high, False)]),
    }.get(sign)


def _double_inequality(sides: list[str], signs: list[str]) -> Solution | None:
    """2 < x <= 5, or 5 >= x > 2."""
    if signs[0] in (">", "\\ge"):
        sides, signs = sides[::-1], [_FLIPPED.get(sign, "") for sign in signs[::-1]]
    if not {*signs} <= {"<", "\\le"} or not _NAME.fullmatch(sides[1]):
        return None
    return sides[1], [(sides[0], signs[0] == "\\le", sides[2], signs[1] == "\\le")]


def end_value(end: str) -> Number | str:
    """The end of an interval as a number; infinity and letters as text without blanks."""
    value = read_number(end)
    return end.replace(" ", "").removeprefix("+") if value is None else value
