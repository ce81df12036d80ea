r"""Is a hint without spoilers still no good? Two rules of appendix C, which give reasons.

1. A question with a picture needs a hint with at least one place to look at. "the picture" alone is
   no place.
2. A hint is no worked solution. It is one if it has more than four steps, or more than 150 words,
   or if it chains results: at least two results, or at least three conclusions.

A *result* is one of:

- a number directly behind "=" or a word such as "is", "gives" or "leaves": "the angles are 140
  degrees". A number of the question counts only behind arithmetic ("12 + 5 = 17"). Right angles,
  straight ones and full turns (90, 180, 360) do not count: everybody knows them. Nor does a number
  that goes on as an expression ("= 2 * r") or that compares ("is 2 times as long").
- an equation behind a conclusion word, with a single name on the left and something to compute on
  the right: "so h = r\sqrt{3}/2". A relation is none: "area A - B = B - C", "so AB = CD".

A *conclusion* starts with "so", "thus", "hence", "therefore", "which means" or "it follows".

The numbers, the words and the limits are ours; the paper only names the two faults. Not seen are a
long chain of thought without numbers and without these words, and number words above twenty.
"""

from __future__ import annotations

import re

from plumbing.answers import plain_latex

MOST_STEPS = 4
MOST_WORDS = 150
CHAINED_RESULTS = 2
CHAINED_CONCLUSIONS = 3

_WHOLE_PICTURE = re.compile(
    r"(?:at )?(?:the |this )?(?:whole |entire |given )?(?:image|picture|figure|diagram|photo)s?\.?",
    re.I,
)
_NUMBERED_STEP = re.compile(r"(?:^|\s)\(?\d[.)]\s")

# "one" and "two" are left out: "the blue one", "makes two triangles".
_WORDS = """
    three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty
"""
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_WORDS.split(), 3)}
_KNOWN = {"90", "180", "360"}

_NUMBER = r"""
    \\frac\{\d+\}\{\d+\}
    | \d{1,3}(?:,\d{3})+(?!\d)
    | \d+(?:\.\d+)?(?:[ ]?/[ ]?\d+)?
"""
_ANY_NUMBER = re.compile(_NUMBER, re.VERBOSE)

# A sign or a word, then a number that is no part of an expression.
# TRAP: without (?! [.,]?\d ) a number gives back its last digits and passes: "1" of "= 12 + 5".
_NUMBER_RESULT = re.compile(
    rf"""
    (?: = | ≈ | → | \\approx | \\to | \\Rightarrow | \\rightarrow
      | \b(?: is | are | was | were | equals? | gives? | giving | makes? | making | leaves?
            | leaving | yields? | takes? | totals? | get | gets | comes[ ]to | goes[ ]to | up[ ]to
            | equal[ ]to | (?:increase | decrease | rise | drop)[ ]of
          )\b
    )
    [\s:~$€£+-]*
    (?: (?:about|only|exactly|now|then|therefore)[ ] )?
    ( {_NUMBER} )
    (?! [.,]?\d
      | \s* [-+*/^(] | (?-i: [A-Z] | [a-z](?![a-z]) )     # 2 * r, 1/2(a + b), 2AB, 2r
      | \s* \\ (?! sqrt | pi\b (?! \s* [a-z]\b) )         # 2\pi r, but not 15\pi
      | [ ]times\b
    )
    """,
    re.VERBOSE | re.I,
)

# "12 + 5" or "sqrt(25 - 9)" at the end of the text
_ARITHMETIC = re.compile(r"\d[)}]*\s*[-+*/^]\s*[({]*\d[\d.]*[)}]*\s*$")

_CONCLUSION = r"\b(?:so(?! that| far| as)|thus|hence|therefore|which means|it follows)\b"
_ANY_CONCLUSION = re.compile(_CONCLUSION, re.I)

# "hence its area is A = r^2\sqrt{3}/4": no sign of an operation before "=", at least one behind it.
# TRAP: the repetitions are bounded, so that a long row of "so" does not cost its square.
_EQUATION_RESULT = re.compile(
    rf"{_CONCLUSION}[^;,.=<>+*/-]{{0,80}}=(?=[^;,=]{{0,80}}?(?:[-+*/^\\]|\d[a-z]))[^;,=]{{1,80}}",
    re.I,
)


def broken_rules(
    look: tuple[str, ...],
    ignore: tuple[str, ...],
    steps: tuple[str, ...],
    question: str,
    images: list,
) -> list[str]:
    """Reasons why a hint breaks one of the rules above; an empty list: it may be used.

    look, ignore, steps: the phrases of the hint. question: the question's text; images: its
    images, of which only the number counts. A reason is "omits
    the visual evidence", or "is a worked solution: " with what was seen. The paper rejects a hint
    for the same two faults (appendix C). For the third one, spoilers, see plumbing.spoilers.
    """
    reasons = []
    if images and all(_WHOLE_PICTURE.fullmatch(place) for place in look):
        reasons.append("omits the visual evidence")
    phrases = [*look, *ignore, *steps]
    seen = [_too_many_steps(steps), _too_many_words(phrases), _chain(phrases, question)]
    reasons += [f"is a worked solution: {fault}" for fault in seen if fault]
    return reasons


def _too_many_steps(steps: tuple[str, ...]) -> str:
    """ "5 steps", or "". A phrase "1. Read the bar. 2. Add." holds two."""
    count = sum(max(1, len(_NUMBERED_STEP.findall(phrase))) for phrase in steps)
    return f"{count} steps" if count > MOST_STEPS else ""


def _too_many_words(phrases: list[str]) -> str:
    count = sum(len(phrase.split()) for phrase in phrases)
    return f"{count} words" if count > MOST_WORDS else ""


def _chain(phrases: list[str], question: str) -> str:
    """The results or conclusions that a hint chains, for the expert to read; "" for no chain."""
    text = _with_digits("; ".join(phrases))
    results = _results(text, _with_digits(question))
    if len(results) >= CHAINED_RESULTS:
        return "chained results: " + ", ".join(results)
    conclusions = len(_ANY_CONCLUSION.findall(text))
    return f"{conclusions} chained conclusions" if conclusions >= CHAINED_CONCLUSIONS else ""


def _with_digits(text: str) -> str:
    """The text in one spelling of LaTeX, with number words as digits."""
    words = rf"\b(?:{'|'.join(_NUMBER_WORDS)})\b"
    return re.sub(words, lambda word: _NUMBER_WORDS[word[0].lower()], plain_latex(text), flags=re.I)


def _results(text: str, question: str) -> list[str]:
    """The results that the text states, each as it stands there, in order."""
    known = _KNOWN | {_plain(number) for number in _ANY_NUMBER.findall(question)}
    spans = []
    for match in _NUMBER_RESULT.finditer(text):
        before = text[max(0, match.start() - 40) : match.start()]
        if _plain(match[1]) not in known or _ARITHMETIC.search(before):
            spans.append(match.span())
    numbers = list(spans)
    for match in _EQUATION_RESULT.finditer(text):
        if not any(match.start() <= start < match.end() for start, _ in numbers):
            spans.append(match.span())
    return [_clause(text, start) + text[start:end] for start, end in sorted(spans)]


def _clause(text: str, end: int) -> str:
    """What stands before a place in the text: the words of its clause, at most seven."""
    clause = re.split(r"[;,] ", text[max(0, end - 100) : end])[-1]
    return " ".join(clause.split(" ")[-7:]).lstrip()


def _plain(number: str) -> str:
    return number.replace(",", "").replace(" ", "")
