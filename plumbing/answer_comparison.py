"""Is the given answer the gold answer? One ladder of typed readings, then text."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from plumbing.answer_extraction import extract_answer, unboxed
from plumbing.answer_lists import (
    column_as_tuple,
    end_value,
    is_name,
    labels_agree,
    read_lists,
    read_relation,
    read_solution,
    split_label,
)
from plumbing.answer_numbers import sample_formula
from plumbing.answer_parts import (
    read_date,
    read_parts,
    read_time,
    same_parts,
    same_ratio,
    same_time,
)
from plumbing.answer_quantities import read_quantity, same_quantity, same_value, with_point
from plumbing.answer_text import LONGEST_ANSWER
from plumbing.answer_text import tidy as _tidy
from plumbing.answer_words import same_text

# A gold answer and an option are read once for all responses to their question.
tidy = lru_cache(4096)(_tidy)

# ------------------------------------------------------------------------------------- options

_LONE_LETTER = re.compile(r"[(\[]?[A-Za-z][)\]]?")

_LETTER = re.compile(
    r"""
    (?i: (?:the[ ])? (?:correct[ ]|right[ ]|best[ ])? (?:option|choice|answer|选项|答案)?
         [ ]? :? [ ]? (?:is[ ]|为|是)? (?:option[ ]|choice[ ])? )
    [(\[]? [ ]? ([A-Za-z]) [ ]? [)\]]?
    (?i: [ ]is[ ](?:the[ ])? (?:correct|right|best)? [ ]? (?:answer|option|choice)? )?
    (?: (?: [.:)] | (?<=[)\]]) | [ ]- ) [ ]? (.*) )?                # what follows the letter
    $
    """,
    re.VERBOSE | re.DOTALL,
)
_LONE_CAPITAL = re.compile(r"[(\[]?[A-Z][)\]]?")
_LETTER_BEHIND = re.compile(r"(.+?) ?\(([A-Z])\)$")
_LETTER_COMMA = re.compile(r"^([A-Z]), (?=\S{2})")  # C、14 cm
_FURTHER_OPTION = re.compile(r"(?:^|[\s,;(])[A-Z][).:]")


def _letter(text: str) -> tuple[str, str] | None:
    """An option's letter and what follows it; None for anything else, several options included.

    Examples: "(B)", "option b" and "B is correct" -> "B", ""; "B: 12 cm" and "12 cm (B)" -> "B",
    "12 cm".
    """
    match = _LETTER.match(text)
    if not match:
        behind = _LETTER_BEHIND.match(text)
        return (behind[2], behind[1]) if behind else None
    letter, following = match[1].upper(), match[2] or ""
    if _FURTHER_OPTION.search(following) or _LONE_CAPITAL.fullmatch(following.strip()):
        return None
    return letter, following.strip()


_OWN_LETTER = re.compile(r"\(?([A-Z])(?:\)|[.:]) ?(?=\S)")


def _options(choices: list[str]) -> list[str]:
    """The options in one spelling, without the letters that some data sets write before them."""
    options = [tidy(str(choice)) for choice in choices]
    marks = [_OWN_LETTER.match(option) for option in options]
    letters = "".join(mark[1] for mark in marks if mark)
    if len(options) > 1 and letters == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]:
        return [option[mark.end() :] for option, mark in zip(options, marks, strict=True)]
    return options


def pick_option(text: str, choices: list[str]) -> int | None:
    """The place of the option that a text picks; None where it picks none, or several.

    It picks by the letter, alone or with the option's text beside it, or by the option's text, if
    only that option has it.
    """
    return _pick(tidy(text), _options(choices))


def _pick(text: str, options: list[str]) -> int | None:
    named = _letter(_LETTER_COMMA.sub(r"\1. ", text))
    if named is not None:
        letter, following = named
        place = ord(letter) - ord("A")
        if place < len(options) and not following:
            return place
        if place < len(options) and _same(following, options[place]):
            return place
    for same in (same_text, _same):
        places = [place for place, option in enumerate(options) if same(text, option)]
        if places:
            return places[0] if len(places) == 1 else None
    return None


_LETTERS = re.compile(r"[A-J]+(?:(?: ?[,;&/、] ?| and |, and | ?和 ?| )[A-J]+)*")
_BRACKETED_LETTER = re.compile(r"\(([A-J])\)")


def _pick_several(text: str, options: list[str]) -> frozenset[int] | None:
    """The places of the options that a text picks, two or more: "A and C", "AC", "(A)(C)"."""
    letters = _several_letters(text)
    if letters and all(ord(letter) - ord("A") < len(options) for letter in letters):
        return frozenset(ord(letter) - ord("A") for letter in letters)
    for kind, items in read_lists(text):
        if len(items) > len(options):
            continue
        places = [_pick(item, options) for item in items]
        if not kind and None not in places and len(set(places)) == len(places):
            return frozenset(places)
    return None


def _several_letters(text: str) -> str | None:
    """The letters of several options in order, "ACD"; None for anything else, "A or C" included."""
    text = _BRACKETED_LETTER.sub(r" \1 ", text).strip("{}⟨⟩[]() ")
    text = " ".join(text.split())
    if not _LETTERS.fullmatch(text):
        return None
    letters = re.findall("[A-J]", text.replace(" and ", " "))
    if len(letters) < 2 or len(set(letters)) < len(letters):
        return None
    return "".join(sorted(letters))


def names_options(text: str, choices: list[str]) -> bool:
    """The text picks one option, or several that are all there."""
    options = _options(choices)
    text = tidy(text)
    return _pick(text, options) is not None or _pick_several(text, options) is not None


def _same_option(given: str, gold: str, choices: list[str]) -> bool | None:
    """The verdict where the gold answer is one option or several; None where it is no option."""
    options = _options(choices)
    place = _pick(gold, options)
    if place is not None:
        return _pick(given, options) == place
    places = _pick_several(gold, options)
    return None if places is None else _pick_several(given, options) == places


# ------------------------------------------------------------------------------------- compare


def same_answer(given: str, answer: str, choices: list[str] | None = None) -> bool:
    """Is `given` the gold `answer`?

    Options: by letter or, with `choices`, by an option's own text. Numbers: the same exact value,
    in units of one kind, or one of the two without a unit. Ranges, scores, dates: part by part.
    Ratios, intervals and inequalities, sets, tuples, matrices: element by element. Formulas: the
    same value wherever their variables are put. Anything else: as text.

    Strict on purpose: the model learns a wrong answer that passes. An answer that hedges
    ("5 or 6"), negates, or lists all options is not right. An answer longer than LONGEST_ANSWER is
    not right either.
    """
    if len(given) > LONGEST_ANSWER or len(answer) > LONGEST_ANSWER:
        return False
    given, gold = _tidy(given), tidy(unboxed(answer))
    if max(len(given), len(gold)) > LONGEST_ANSWER:
        return False  # one sign may become a long command
    if choices:
        verdict = _same_option(given, gold, choices)
        if verdict is not None:
            return verdict
    elif _LONE_LETTER.fullmatch(gold):
        named = _letter(given)
        return named is not None and named[0] == gold.strip("()[]").upper()
    elif _several_letters(gold) and _is_selection(gold):
        return _several_letters(given) == _several_letters(gold)
    return _same(given, gold)


def fault_of_gold(answer: str, choices: list[str] | None, same: Callable = same_answer) -> str:
    """Why no response to a question can be right; "" where one can.

    The gold answer, in a box, must be right, and with choices it must be one of them. same: the
    comparison, as `load_judge` gives it.
    """
    if choices and not names_options(answer, choices):
        return "the gold answer is none of the options"
    given = extract_answer(f"\\boxed{{{answer}}}")
    if given is None or not same(given, answer, choices):
        return "the gold answer does not verify against itself"
    return ""


def _is_selection(gold: str) -> bool:
    """Letters of options, rather than a word: in order, or with something between them."""
    return not gold.isalpha() or list(gold) == sorted(gold)


def _same(given: str, gold: str, depth: int = 3) -> bool:
    """Two tidy answers. depth: how deep elements may still nest.

    Each reading says yes, no, or None where it does not apply. One yes is enough, as "1,200" may be
    a number or a list. Only where no reading applies are the answers compared as texts.
    """
    if given == gold:
        return bool(gold)
    if depth <= 0:
        return same_text(given, gold)
    label, value = split_label(given)
    gold_label, gold_value = _split_label(gold)
    if _is_value(gold_value) and is_name(gold_label) and (label or gold_label):
        agree = labels_agree(label, gold_label)
        if agree and _same(value, gold_value, depth - 1):
            return True
    verdicts = []
    for same in _READINGS:
        verdict = same(given, gold, depth - 1)
        if verdict:
            return True
        verdicts.append(verdict)
    return False not in verdicts and same_text(given, gold)


_split_label = lru_cache(4096)(split_label)
_VALUE = re.compile(r"[\d\\(\[⟨]|[^\W\d_] ?[*/^+-] ?[^\W\d_]")


def _is_value(text: str) -> bool:
    """A number, a tuple or a formula, rather than a word: a label before it may fall away."""
    return _VALUE.search(text) is not None


# Each of the following functions is one reading: None unless it can read both answers.


def _same_quantity(given: str, gold: str, _depth: int) -> bool | None:
    if _parts(gold) or read_parts(given):
        return None  # 25-34 and 2-1 are never computed
    gold_quantity, quantity = _quantity(gold), read_quantity(given)
    if gold_quantity and "." in gold and "," in given:
        pointed = read_quantity(with_point(given))  # 3,5 for 3.5
        if pointed and same_quantity(pointed, gold_quantity):
            return True
    if gold_quantity is None or quantity is None:
        return None
    return same_quantity(quantity, gold_quantity)


def _same_parts(given: str, gold: str, _depth: int) -> bool | None:
    parts, gold_parts = read_parts(given), _parts(gold)
    return same_parts(parts, gold_parts) if parts and gold_parts else None


def _same_ratio(given: str, gold: str, _depth: int) -> bool | None:
    return same_ratio(given, gold) if ":" in given or ":" in gold else None


def _same_time(given: str, gold: str, _depth: int) -> bool | None:
    gold_time = _time(gold)
    time = gold_time and read_time(given)
    return same_time(time, gold_time) if time else None


def _same_date(given: str, gold: str, _depth: int) -> bool | None:
    gold_date = _date(gold)
    date = gold_date and read_date(given)
    return date == gold_date if date else None


def _same_solution(given: str, gold: str, _depth: int) -> bool | None:
    """Intervals and inequalities. Two pairs in brackets are left to _same_lists."""
    if not _SOLUTION.search(given + gold):
        return None
    solution, gold_solution = read_solution(given), read_solution(gold)
    if solution is None or gold_solution is None:
        return None
    (name, intervals), (gold_name, gold_intervals) = solution, gold_solution
    if name and gold_name and name != gold_name:
        return False
    return _same_set(intervals, gold_intervals, _same_interval)


_SOLUTION = re.compile(r"[<>]|\\(?:le|ge|ne|in|cup)(?![a-z])|(?i:\breals?\b)|\\R\b")


def _same_interval(given: tuple, gold: tuple) -> bool:
    ends, gold_ends = given[::2], gold[::2]
    closed, gold_closed = given[1::2], gold[1::2]
    pairs = zip(ends, gold_ends, strict=True)
    return closed == gold_closed and all(_same_end(*pair) for pair in pairs)


def _same_end(given: str, gold: str) -> bool:
    value, gold_value = end_value(given), end_value(gold)
    if isinstance(value, str) or isinstance(gold_value, str):
        return value == gold_value
    return same_value(value, gold_value)


def _same_lists(given: str, gold: str, depth: int) -> bool | None:
    """Tuples, sets, lists and matrices. A column of a matrix may stand for a tuple."""
    if gold.startswith("("):
        given = column_as_tuple(given)
    elif given.startswith("("):
        gold = column_as_tuple(gold)
    lists, gold_lists = read_lists(given), _lists(gold)
    if not lists or not gold_lists:
        return None
    return any(_same_list(one, gold_one, depth) for one in lists for gold_one in gold_lists)


_UNORDERED = ("", "{}")  # a bare list and a set


def _same_list(one: tuple, gold_one: tuple, depth: int) -> bool:
    """Equal elements: (1, 2) is (1, 2), not (2, 1); {1, 2} is {2, 1} and 2, 1.

    A set and a bare list may stand for each other; otherwise the brackets must be the same. But
    "x = 1, y = 2" may stand for (1, 2) and for "1, 2": its names are put in order.
    """
    (kind, items), (gold_kind, gold_items) = one, gold_one
    if len(items) != len(gold_items):
        return False

    def same(item: str, gold_item: str) -> bool:
        return _same(_unwrapped(item), _unwrapped(gold_item), depth)

    named, gold_named = _names_its_items(items), _names_its_items(gold_items)
    if named != gold_named:
        items = sorted(items) if named else items
        gold_items = sorted(gold_items) if gold_named else gold_items
        in_order = {kind, gold_kind} <= {"", "()"}
    else:
        in_order = kind == gold_kind and kind not in _UNORDERED
    if in_order:
        return all(same(*pair) for pair in zip(items, gold_items, strict=True))
    if named != gold_named or {kind, gold_kind} - set(_UNORDERED):
        return False
    return _same_set(_unnumbered(items), _unnumbered(gold_items), same)


_SINGLE = re.compile(r"\[([^\[\],]*)\]")


def _unwrapped(item: str) -> str:
    """The element of a matrix row of one: "[1]" -> "1"."""
    single = _SINGLE.fullmatch(item)
    return single[1] if single else item


def _names_its_items(items: list[str]) -> bool:
    """Each element has a name, and not all the same: x = 1, y = 2; but not x_1 = 1, x_2 = 2."""
    labels = [split_label(item)[0] for item in items]
    return "" not in labels and len({label[0] for label in labels}) > 1


def _unnumbered(items: list[str]) -> list[str]:
    """The values of names that a list only numbers: x_1 = 1, x_2 = 2 -> 1, 2."""
    labels = [split_label(item)[0] for item in items]
    if "" in labels or len(set(labels)) < 2 or _names_its_items(items):
        return items
    return [split_label(item)[1] for item in items]


def _same_set(items: list, gold_items: list, same: Callable) -> bool:
    """Each item is a gold item, and no gold item is used twice."""
    if len(items) != len(gold_items):
        return False
    left = list(gold_items)
    for item in items:
        partners = (gold for gold in left if same(item, gold))
        partner = next(partners, None)
        if partner is None:
            return False
        left.remove(partner)
    return True


def _same_formula(given: str, gold: str, _depth: int) -> bool | None:
    values = _samples(gold)
    given_values = values and sample_formula(given)
    if not given_values:
        return None
    pairs = zip(given_values, values, strict=True)
    return all(same_value(*pair) for pair in pairs)


def _same_equation(given: str, gold: str, depth: int) -> bool | None:
    """The same curve, 3x + 4y = 24 for y = 6 - 3/4 x; or the same two sides.

    An equation in one variable is no answer to another one: 2x = 10 does not say what x is.
    """
    relation, gold_relation = read_relation(given), read_relation(gold)
    if not relation or not gold_relation or relation[1] != ["="] or gold_relation[1] != ["="]:
        return None
    (left, right), (gold_left, gold_right) = relation[0], gold_relation[0]
    for pair in ((left, right), (right, left)):
        if same_text(pair[0], gold_left) and _same(pair[1], gold_right, depth):
            return True
    values, gold_values = _samples(f"({left})-({right})"), _samples(f"({gold_left})-({gold_right})")
    if not values or not gold_values or 0 in values or 0 in gold_values:
        return None
    if len(set(_VARIABLE.findall(gold))) < 2:
        return None
    return same_value(values[0] * gold_values[1], values[1] * gold_values[0])


_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]|\\[a-z]+")

_quantity = lru_cache(4096)(read_quantity)
_parts = lru_cache(4096)(read_parts)
_time = lru_cache(4096)(read_time)
_date = lru_cache(4096)(read_date)
_lists = lru_cache(4096)(read_lists)
_samples = lru_cache(4096)(sample_formula)

_READINGS = (
    _same_quantity,
    _same_parts,
    _same_ratio,
    _same_time,
    _same_date,
    _same_solution,
    _same_lists,
    _same_formula,
    _same_equation,
)

# ------------------------------------------------------------------------------------- judges

_FORMULA_SIGN = re.compile(r"[\\\d=+*/^<>]")


def load_judge(name: str) -> Callable[..., bool]:
    """The comparison of that name, a function same(given, answer, choices=None) -> bool.

    "rules" is `same_answer`. "math" asks math-verify too, but only where the rules say no to a
    formula that they cannot read. On anything else math-verify is worse: it passes 50% for 50, 5 m
    for 5 cm, and a set for a tuple. Raises ValueError where math-verify is not installed.
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
        if not _is_unread_formula(tidy(extract_answer(answer) or answer)):
            return False  # the rules can read this gold answer, so their no is a no
        gold_formula, given_formula = (math_verify.parse(f"${text}$") for text in (answer, given))
        return bool(math_verify.verify(gold_formula, given_formula))

    return same


def _is_unread_formula(gold: str) -> bool:
    r"""A formula that no reading knows: \sin 2x. Numbers, ranges and words are none."""
    if read_parts(gold) or _FORMULA_SIGN.search(gold) is None:
        return False
    lists = read_lists(gold)
    items = lists[0][1] if lists else [gold]
    return any(read_quantity(item) is None for item in items)
