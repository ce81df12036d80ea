"""Does a text give the answer away?

`find_spoilers` gives the reasons. Each rule is one function, and all rules read texts that
`_normal` has brought into one form. The rules are strict: they would rather reject a good hint,
which is then written anew, than let an answer through.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from plumbing.answers import (
    ARTICLES,
    DIGIT_OR_COMMAND,
    YES_OR_NO,
    pick_option,
    plain_latex,
    split_unit,
    to_number,
    unboxed,
)


def _not_after(words: str) -> str:
    """A pattern: none of these words, with a blank, stands before this place."""
    return "".join(rf"(?<!{word} )" for word in words.split())


# ------------------------------------------------------------------------------- number words

_ONES = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = {
    **dict(zip(_ONES.split(), range(20), strict=True)),
    **dict(zip(_TENS.split(), range(20, 100, 10), strict=True)),
}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000}

_DENOMINATORS = {
    "half": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
}

# One word of a number: "twenty", "hundred", "a hundred". Longer words first: "seven" must not be
# read where "seventy" stands.
_NUMBER_WORDS = "|".join(sorted([*_SMALL, *_SCALES], key=len, reverse=True))
_NUMBER_WORD = rf"(?:an? (?=dozen|hundred|thousand))?(?:{_NUMBER_WORDS})"

# A number in words: "a hundred and twenty-one".
# TRAP: the repetition is bounded, so that a long run of such words does not cost its square.
_CARDINAL_PATTERN = rf"{_NUMBER_WORD}(?:(?:-| and | )?\b{_NUMBER_WORD}\b){{0,8}}"
_CARDINAL = re.compile(rf"\b{_CARDINAL_PATTERN}\b", re.I)

# "two thirds", "a half", "two halves"
_FRACTION = re.compile(
    rf"\b({_CARDINAL_PATTERN}|an?)[- ]({'|'.join(_DENOMINATORS)}|halve)s?\b", re.I
)
_OF_OR_AS = re.compile(r" (?:of|as)\b")

# "half of", "half the", "half as"; not "the left half of", which is a place
_HALF = re.compile(
    _not_after("left right upper lower top bottom other each first second")
    + r"\bhalf (?:of|the|as)\b",
    re.I,
)

# What stands before a "one" that is the number 1: "exactly one", "= one"
_BEFORE_NUMBER_ONE = re.compile(
    r"(?:exactly|only|just|(?<!there )is|are|equals?|[=:]|makes|gives|number) *$", re.I
)


def _cardinal(words: str) -> int:
    """The value of a number in words: "two thousand and twelve" -> 2012, at most 10**18."""
    total = group = 0
    for word in re.findall("[a-z]+", words.lower()):
        if word in _SCALES:
            group = max(1, group) * _SCALES[word]
        else:
            group += _SMALL.get(word, 0)
        if word == "thousand":
            total, group = total + group, 0
    return min(total + group, 10**18)


def _cardinal_in_digits(match: re.Match) -> str:
    """A match of _CARDINAL in digits; "one" stays where it may be a pronoun: "the blue one"."""
    words = match[0]
    if words.lower() == "one" and not _BEFORE_NUMBER_ONE.search(match.string, 0, match.start()):
        return words
    return str(_cardinal(words))


def _fraction_in_digits(match: re.Match) -> str:
    """A match of _FRACTION in digits: "two thirds" -> "2/3".

    "the left half" is a place. "a fifth line" is a place too, but "a fifth of" is a number.
    """
    top, bottom = match[1], match[2].lower()
    article = top.lower() in ("a", "an")
    if article and not _OF_OR_AS.match(match.string, match.end()):
        return match[0]
    return f"{_cardinal(top) or 1}/{_DENOMINATORS.get(bottom, 2)}"


# ----------------------------------------------------------------------------------- one form

# Mathematics mode, Markdown's bold and code. "$5" keeps its sign.
_MARKUP = re.compile(r"\\\(|\\\)|\\\[|\\\]|(?<!\\)\$(?!\d)|\*\*|`")
_PER_CENT = re.compile(r" ?\bper ?cent\b", re.I)
_POINT = re.compile(r"(\d) point (?=\d)")


def _normal(text: str) -> str:
    """The text without disguises: "**Twó** point five per cent" -> "2.5 %".

    Unicode forms, accents, invisible signs, LaTeX and markup are gone, and number words are digits.
    """
    text = plain_latex(_MARKUP.sub(" ", _without_marks(plain_latex(text))))
    text = _PER_CENT.sub(" %", text)
    text = _FRACTION.sub(_fraction_in_digits, text)
    text = _HALF.sub("1/2", text)
    text = _CARDINAL.sub(_cardinal_in_digits, text)
    return _POINT.sub(r"\1.", text)


def _without_marks(text: str) -> str:
    """The text without accents and invisible signs: Unicode's categories Mn and Cf."""
    return "".join(
        character
        for character in unicodedata.normalize("NFKD", text)
        if unicodedata.category(character) not in ("Mn", "Cf")
    )


_NUMBER = re.compile(
    r"""
    \\frac [ ]? (?: \{[ ]?\d+[ ]?\} | \d ) [ ]? (?: \{[ ]?\d+[ ]?\} | \d )  # \frac{1}{2}, \frac12
    | \d+ [ ] \d+ [ ]? / [ ]? \d+                                           # 1 1/2
    | (?: \d{1,3}(?:,\d{3})+(?!\d) | \d+ )?                                 # 1,200  1200
      (?: (?<=\d) | (?=\.\d) )
      (?: \.\d+ )?                                                          # .5
      (?: [eE][-+]?\d+ | [ ]?/[ ]?\d+ | \^\{?\d+\}? )?                      # 1e5  1/2  2^3
      (?: [ ]?% )?
    """,
    re.VERBOSE,
)


def _values(text: str) -> dict[Fraction | float, int]:
    """The numbers in a normal text, each with the count of characters after its point.

    A number with a percent sign counts without it too: "25 %" -> 1/4 and 25.
    """
    values = {}
    for match in _NUMBER.finditer(text):
        for form in {match[0], match[0].rstrip("% ")}:
            value = to_number(form) if form else None
            if value is not None:
                decimals = len(form.partition(".")[2])
                values[value] = max(values.get(value, 0), decimals)
    return values


# -------------------------------------------------------------------- the question, the answer

_OPTION_LETTERS = "ABCDEFGH"
_OPTION_MARK = re.compile(rf"(?:^|(?<=[\s;,]))\(?([{_OPTION_LETTERS}])[).:]\s")

_PAIR_OF_BRACKETS = re.compile(r"^\s*\$?[(\[{⟨]?(.*?)[)\]⟩]?\$?\s*$")
_BETWEEN_PARTS = re.compile(r"\s*(?:,(?!\d{3}(?!\d))|;|&|\band\b|\bor\b)\s*")  # 1,200 is one part
_NAMED_VALUE = re.compile(r"^[a-zA-Z]\w? ?= ?")

_LONE_LETTER = re.compile(r"\(?[A-Za-z]\)?\.?")


def _inline_choices(question: str) -> tuple[str, list[str]]:
    """A question that lists its options -> what stands before them, and their texts.

    It lists them as "(A) 3 (B) 5" or "A. 3 B. 5". Any other question has no options.
    """
    marks = list(_OPTION_MARK.finditer(question))
    letters = "".join(mark[1] for mark in marks)
    start = letters.find("AB")
    if start < 0:
        return question, []
    in_order = zip(marks[start:], _OPTION_LETTERS, strict=False)
    marks = [mark for mark, letter in in_order if mark[1] == letter]
    ends = [mark.start() for mark in marks[1:]] + [len(question)]
    options = [
        question[mark.end() : end].strip(" ;,\n") for mark, end in zip(marks, ends, strict=True)
    ]
    return question[: marks[0].start()], options


def _letter_and_text(answer: str, options: list[str]) -> tuple[str | None, str]:
    """The letter and the text of the gold answer: "B" of "3", "5" -> "B", "5".

    No letter where the answer is no option; no text where it is a letter without options.
    """
    place = pick_option(answer.strip().rstrip("."), options) if options else None
    if place is not None:
        return chr(ord("A") + place), options[place]
    if _LONE_LETTER.fullmatch(answer.strip()):
        return answer.strip(" ().").upper(), ""
    return None, answer


def _parts(answer: str) -> list[str]:
    """The parts of an answer, none of which a hint may hold: "(3, x = 5)" -> "3", "5"."""
    listed = _BETWEEN_PARTS.split(_PAIR_OF_BRACKETS.sub(r"\1", answer))
    parts = [_NAMED_VALUE.sub("", _normal(part).rstrip(".! ")) for part in listed]
    return [part for part in parts if part]


# -------------------------------------------------------------------------------------- rules


def find_spoilers(
    text: str, question: str, answer: str, choices: list[str] | None = None
) -> list[str]:
    """Reasons why the text of a hint gives something away; an empty list: it may be used.

    text: the hint; question: the question's text, with its options in it or in `choices`; answer:
    the gold answer. The rules, and the order of the reasons: no "the answer is"; no computed result
    ("= 50"); no option's letter; no part of the answer, as its text, as an equal number or as an
    option's text, in any disguise (LaTeX, Unicode, words, letters spaced out or reversed). What the
    question itself states or names outside of its options may be repeated.
    """
    stem, options = (question, choices) if choices else _inline_choices(question)
    text, stem = _normal(text), _normal(stem)
    reasons = []
    if _ANSWER_IS.search(text):
        reasons.append("names the answer")
    if _states_result(text, stem):
        reasons.append("states a computed result")
    letter, answer = _letter_and_text(unboxed(answer), options)
    if letter and _names_option(letter, text, stem):
        reasons.append(f"names the option: {letter}")
    for part in _parts(answer):
        reason = _holds(part, text, stem)
        if reason:
            reasons.append(f"{reason}: {part}")
    return reasons


def _only_in_hint(pattern: str, text: str, stem: str) -> bool:
    """The pattern occurs in the hint, but not in the question."""
    return re.search(pattern, text) is not None and re.search(pattern, stem) is None


# --- the answer is named, a result is stated

# "the answer is", "solution:", "the correct option"
_ANSWER_IS = re.compile(
    r"""
    \b(?:answer|solution) \s* (?: is | : | = | must[ ]be | should[ ]be | equals )
    | \b(?:correct|right) [ ] (?:option|choice|answer)\b
    """,
    re.VERBOSE | re.I,
)

# What stands before a computed result: "= ", "adds up to ", "there are exactly "
_RESULT = re.compile(
    r"""
    (?: = | ≈ | → | \\approx | \\Rightarrow
      | \b(?: equals? | equal[ ]to | gives? | giving | makes? | making | yields? | totals?
            | comes?[ ]to | adds?[ ]up[ ]to | sums?[ ](?:up[ ])?to | sum[ ]is
            | total[ ](?:is|of) | result[ ]is | leaves | get
            | there[ ](?:is|are)(?:[ ]exactly)?
          )\b
    )
    [\s:~]* [-+$€£]? \s*
    (?= \d | \.\d | \\frac )
    """,
    re.VERBOSE | re.I,
)


def _states_result(text: str, stem: str) -> bool:
    """The hint states a result that the question does not: "25 + 25 = 50"."""
    return bool(_results(text, ".,;") - _results(stem, ".,;?"))


def _results(text: str, stops: str) -> set[str]:
    """The results that a normal text states, cut to 12 characters: "25 + 25 = 50." -> "50"."""
    ends = [match.end() for match in _RESULT.finditer(text)]
    return {text[end : end + 12].partition(" ")[0].rstrip(stops) for end in ends}


# --- an option's letter

_NOT_AFTER_LABEL = _not_after("point vertex angle line side label labelled labeled node")
_WORDS_OF_ONE_LETTER = "AI"


def _names_option(letter: str, text: str, stem: str) -> bool:
    """The hint has the option's letter, marked as an option or alone: "(B)", "B is right", "B"."""
    return _marks_letter(letter, text) or _has_lone_letter(letter, text, stem)


def _marks_letter(letter: str, text: str) -> bool:
    """The letter is marked as an option: "(B)", "option B", "pick b.", "B)", "B fits best"."""
    bracketed = rf"\({letter}\)"
    named = rf"\b(?:option|choice|answer|letter|pick|choose|select|mark)s? \(?{letter}\b"
    quoted = rf"(?:^|\s)[\"']?{letter}[\"']?"
    praised = r" (?:is|fits|must be) (?:the )?(?:best|right|correct|true)"
    marked = rf"{bracketed}|{named}|{quoted}(?:\)|\.(?=\s[A-Z]|$)|{praised})"
    small = rf"\b(?:option|choice|pick|choose|select) {letter.lower()}(?=$|[;.,])"
    ignore_case = re.NOFLAG if letter in _WORDS_OF_ONE_LETTER else re.I
    return bool(re.search(marked, text, ignore_case) or re.search(small, text))


def _has_lone_letter(letter: str, text: str, stem: str) -> bool:
    """The capital letter stands alone, and not in the question: "look at B", not "at point B".

    A and I are words, so they do not count.
    """
    if letter in _WORDS_OF_ONE_LETTER:
        return False
    alone = rf"(?<![\w'=+*/^-]){_NOT_AFTER_LABEL}{letter}(?![\w'=+*/^-])"
    return _only_in_hint(alone, text, stem)


# --- a part of the answer


def _holds(part: str, text: str, stem: str) -> str | None:
    """How a hint gives away one part of the answer that the question does not name itself.

    None if it does not. The part is a number, an expression, yes or no, or words; a number that is
    written as LaTeX is an expression too.
    """
    bare = split_unit(part)[0]
    value = _value(part, bare)
    if value is not None:
        if _holds_number(value, "%" in bare, text, stem):
            return "holds the answer's number"
        if _spells_number(bare, text, stem):
            return "spells the answer's number"
        if "\\" not in part:
            return None
    if DIGIT_OR_COMMAND.search(part):
        return "holds the answer's expression" if _holds_expression(part, text, stem) else None
    words = " ".join(word for word in _plain_words(part).split() if word not in ARTICLES)
    if words in YES_OR_NO:
        return "says the answer" if _says_yes_or_no(words, text) else None
    return _holds_words(words, _plain_words(text), _plain_words(stem)) if words else None


_NOUNS = re.compile(r"[A-Za-z\s'-]*")
_VARIABLE = re.compile(r"\b[a-z]\b", re.I)


def _value(part: str, bare: str) -> Fraction | float | None:
    """The number that a part is: "5 cm" -> 5, "12 apples" -> 12; None for others, as "12 x".

    bare: the part without its unit.
    """
    value = to_number(bare)
    if value is not None:
        return value
    values = _values(part)
    counts_nouns = _NOUNS.fullmatch(_NUMBER.sub("", part)) and not _VARIABLE.search(part)
    return next(iter(values)) if len(values) == 1 and counts_nouns else None


def _holds_number(value: Fraction | float, percent: bool, text: str, stem: str) -> bool:
    """The hint has an equal number that the question does not have: "one half" for 0.5.

    A rounded number counts, from two decimals on: 0.33 for 1/3. So does a number without its
    percent sign: 25 for 25 %.
    """
    golds = {abs(value)}
    if percent:
        golds.add(abs(value) * 100)
    known = _values(stem)
    for number, decimals in _values(text).items():
        if number in known:
            continue
        if number in golds or any(_rounds_to(gold, number, decimals) for gold in golds):
            return True
    return False


def _rounds_to(gold: Fraction | float, number: Fraction | float, decimals: int) -> bool:
    """The number is the gold number, rounded to that many decimals, two or more: 0.33 for 1/3."""
    return decimals >= 2 and abs(number - gold) * 10**decimals <= 0.5


_DIGITS = re.compile(r"[-+]?[\d,.]+ ?%?")


def _spells_number(bare: str, text: str, stem: str) -> bool:
    """The hint has the number's digits apart or reversed: "1-2-0" and "021" for 120.

    Reversed digits may be a number of the question. A number of one digit cannot be spelled.
    """
    digits = re.sub(r"\D", "", bare)
    if not _DIGITS.fullmatch(bare) or len(digits) < 2:
        return False
    backwards = digits[::-1]
    reversed_digits = rf"(?<!\d){backwards}(?!\d)"
    if backwards != digits and _only_in_hint(reversed_digits, text, stem):
        return True
    apart = "[-_*|,. ]*".join(digits)
    apart = rf"(?<![\d.])(?<!\d )(?!{digits}){apart}(?![\d.]\d)(?!\d)"
    return bool(re.search(apart, text))


_EXPRESSION_DRESS = re.compile(r"[\s{}\\*]|(?:cdot|times)")


def _holds_expression(part: str, text: str, stem: str) -> bool:
    r"""The hint has the expression, and the question has not: "3 x + 1" for 3x+1.

    Blanks, braces, backslashes and signs of multiplication do not count: \sqrt{3} is sqrt3.
    """
    part, text, stem = (
        _EXPRESSION_DRESS.sub("", formula).casefold() for formula in (part, text, stem)
    )
    return part in text and part not in stem


_END_OF_CLAUSE = re.compile(r"[;.,:!?\"()]")


def _says_yes_or_no(word: str, text: str) -> bool:
    """A clause of the hint ends on the word, or gives a reason for it: "so yes", "it is true as".

    A clause that is the word alone counts too. "there are no gaps" does not.
    """
    said = re.compile(
        rf"""
        (?: ^ | \b(?: is | are | say | says | it's | answer | mark | therefore | so
                    | statement | claim )[ ] )
        {word}
        (?: $ | [ ](?:because|since|as)\b )
        """,
        re.VERBOSE,
    )
    clauses = _END_OF_CLAUSE.split(text.casefold())
    return any(said.search(clause.strip()) for clause in clauses)


def _plain_words(text: str) -> str:
    """A text without case and punctuation, for the two rules on words: "Mon-day!" -> "mon-day "."""
    return re.sub(r"[^\w\s-]+", " ", text.casefold())


def _holds_words(words: str, text: str, stem: str) -> str | None:
    """How a hint gives away an answer in words; None if it does not, or if the question has it.

    All three are as `_plain_words` gives them.
    """
    form = _word_forms(words)
    if re.search(form, text):
        return None if re.search(form, stem) else "holds the answer's text"
    return "spells the answer's text" if _spells_text(words, text) else None


def _word_forms(words: str) -> str:
    """A pattern of the words in other forms: pears as pear, circle as circular, blue as bluish.

    Three letters or fewer must be a whole word, but for an ending: dry as dryness. Six letters or
    more may stand anywhere in a longer word.
    """
    if len(words) >= 5 and words[-1] == "s" and words[-2] != "s":
        words = words[:-1]
    form = re.escape(words)
    if len(words) < 4:
        return rf"\b{form}(?:'?s|er|ed|ing|ish|ly|y|ness)?\b"
    if form.endswith("le"):
        form = form[:-2] + "(?:le|ul)"
    elif form.endswith("e"):
        form = form[:-1] + "(?:e|ish|ing)"
    return form if len(words) >= 6 else r"\b" + form


_GAP = r"[\s.\-_*|]"


def _spells_text(words: str, text: str) -> bool:
    """The hint has the letters apart or reversed: "r-e-d", "mon day" and "yadnom".

    Words of fewer than five letters must have a gap after each letter; others may have one
    anywhere. Fewer than three letters cannot be spelled.
    """
    letters = re.sub(r"\W", "", words)
    if len(letters) < 3:
        return False
    backwards = letters[::-1]
    if letters != backwards and re.search(rf"\b{backwards}\b", text):
        return True
    gap = _GAP + ("+" if len(letters) < 5 else "*")
    return bool(re.search(rf"\b{gap.join(letters)}\b", text))
