"""Texts in one form, and the numbers in them.

`normal` takes the disguise off a text: number words become digits, LaTeX, accents and invisible
signs go away. `numbers` then reads the numbers of such a text, each with its place.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from plumbing.answers import plain_latex, to_number

# ------------------------------------------------------------------------------- English words

_ONES = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = {
    **dict(zip(_ONES.split(), range(20), strict=True)),
    **dict(zip(_TENS.split(), range(20, 100, 10), strict=True)),
}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6}

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
    "hundredth": 100,
}


def any_of(words: Iterable[str]) -> str:
    """A pattern of the words, longer ones first: "seven" must not be read where "seventy" stands.

    Words of one first letter are one branch, so that most places of a text fail after a few looks.
    """
    branches = {}
    for word in sorted(words, key=len, reverse=True):
        branches.setdefault(word[0], []).append(re.escape(word[1:]))
    return "|".join(f"{first}(?:{'|'.join(rest)})" for first, rest in branches.items())


# One word of a number: "twenty", "hundred", "a hundred"
_NUMBER_WORDS = any_of([*_SMALL, *_SCALES])
_SCALE_WORDS = "|".join(_SCALES)
_NUMBER_WORD = rf"(?:an? (?={_SCALE_WORDS}))?(?:{_NUMBER_WORDS})"

# A number in words: "a hundred and twenty-one".
# TRAP: the repetition is bounded, so that a long run of such words does not cost its square.
_CARDINAL_PATTERN = rf"{_NUMBER_WORD}(?:(?:-| and | )?\b{_NUMBER_WORD}\b){{0,8}}"
_CARDINAL = re.compile(rf"\b{_CARDINAL_PATTERN}\b", re.I)
_ONE = re.compile(r"\bone\b(?:(?:-| and | )one\b){0,8}", re.I)  # many texts have no other word

_PARTS = "|".join(_DENOMINATORS)
_ENGLISH_WORDS = {*_SMALL, *_SCALES}
_PART_WORDS = {*_DENOMINATORS, "halves", *(f"{part}s" for part in _DENOMINATORS)}

# "two thirds", "a half", "two halves"
_FRACTION = re.compile(rf"\b({_CARDINAL_PATTERN}|an?)[- ]({_PARTS}|halve)s?\b", re.I)
_OF_OR_AS = re.compile(r" (?:of|as)\b")

# "four and a half"; "an hour and a half" too
_MIXED = re.compile(
    rf"\b({_NUMBER_WORD}|\d+|an?(?= [a-z]+ (?:[a-z]+ )?and))((?: full| whole| good)? [a-z]+)?"
    rf" and (?:an?|one) ({_PARTS})\b",
    re.I,
)

# What "half" and "quarter" are not part of: "the left half of" is a place.
_PLACES = "left right upper lower top bottom other each first second"
_NOT_A_PLACE = "".join(rf"(?<!{word} )" for word in _PLACES.split())
_HALF = re.compile(rf"{_NOT_A_PLACE}\bhalf(?= (?:of|the|as|an?|is|are)\b)", re.I)

# What stands before a "one" that is the number 1: "exactly one", "= one"
_BEFORE_NUMBER_ONE = re.compile(
    r"(?:exactly|only|just|(?<!there )is|are|equals?|[=:]|makes|gives|number) *$", re.I
)
_AFTER_NUMBER_ONE = re.compile(
    r" (?:hour|minute|second|day|week|month|year|gram|kilo"
    r"|(?:centi|kilo)?met(?:er|re)|lit(?:er|re))"
)


def _cardinal(words: str) -> int:
    """The value of a number in words: "two thousand and twelve" -> 2012, at most 10**18."""
    total = group = 0
    for word in re.findall("[a-z]+", words.lower()):
        if word in _SCALES:
            group = max(1, group) * _SCALES[word]
        else:
            group += _SMALL.get(word, 0)
        if word in ("thousand", "million"):
            total, group = total + group, 0
    return min(total + group, 10**18)


def _cardinal_in_digits(match: re.Match) -> str:
    """A match of _CARDINAL in digits; "one" stays where it may be a pronoun: "the blue one"."""
    words = match[0]
    if words.lower() == "one":
        near = max(0, match.start() - 20)  # what comes before "one" is short
        number = _BEFORE_NUMBER_ONE.search(match.string, near, match.start())
        number = number or _AFTER_NUMBER_ONE.match(match.string, match.end())
        return "1" if number else words
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


def _mixed_in_digits(match: re.Match) -> str:
    """A match of _MIXED in digits: "four and a half" -> "4 1/2"."""
    whole, noun = match[1], match[2] or ""
    if not whole.isdigit():
        whole = str(_cardinal(whole) or 1)
    return f"{whole} 1/{_DENOMINATORS[match[3].lower()]}{noun}"


# ---------------------------------------------------------------------------- other languages

# From zero; "-" where the word is missing, or is an English word too. Accents are left out.
_FOREIGN = """
    - - zwei drei vier funf sechs sieben acht neun zehn - zwolf dreizehn vierzehn funfzehn
        sechzehn siebzehn achtzehn neunzehn zwanzig;
    cero - - tres cuatro cinco seis siete ocho nueve diez - - trece catorce quince dieciseis
        diecisiete dieciocho diecinueve veinte;
    - - deux trois quatre cinq - - huit neuf - onze douze treize quatorze quinze - - - - vingt;
    - - - - quattro cinque - sette - nove dieci undici dodici tredici quattordici quindici
        sedici diciassette diciotto diciannove venti;
    - - dois - quatro - - sete oito - dez - - treze quatorze quinze dezesseis dezessete dezoito
        dezenove vinte;
    - - twee drie - vijf zes zeven - negen tien - twaalf dertien veertien vijftien zestien
        zeventien achttien negentien twintig
"""
_FOREIGN_TENS = """
    zwanzig dreißig vierzig funfzig sechzig siebzig achtzig neunzig; veinte treinta cuarenta
    cincuenta sesenta setenta ochenta noventa; vingt trente quarante cinquante soixante - - -;
    venti trenta quaranta cinquanta sessanta settanta ottanta novanta; vinte trinta quarenta
    cinquenta sessenta setenta oitenta noventa; twintig dertig veertig vijftig zestig zeventig
    tachtig negentig
"""


def _foreign_words() -> dict[str, int]:
    """The numbers' words in six languages: "doce" -> 12, "funfundzwanzig" -> 25."""
    words = {"doce": 12, "hundert": 100, "cien": 100, "cento": 100, "tausend": 1000}
    for row, tens_row in zip(_FOREIGN.split(";"), _FOREIGN_TENS.split(";"), strict=True):
        small = dict(zip(row.split(), range(21), strict=True))
        tens = dict(zip(tens_row.split(), range(20, 100, 10), strict=True))
        words |= small | tens
    tens = dict(zip(_FOREIGN_TENS.split(";")[0].split(), range(20, 100, 10), strict=True))
    ones = {"ein": 1, **dict(zip(_FOREIGN.split(";")[0].split()[2:10], range(2, 10), strict=True))}
    for one, value in ones.items():
        words |= {f"{one}und{ten}": value + high for ten, high in tens.items()}
    words.pop("-")
    return words


_FOREIGN_WORDS = _foreign_words()
_WORD = re.compile(r"[^\W\d_]+")

_CJK_DIGITS = dict(zip("零一二三四五六七八九", range(10), strict=True)) | {"两": 2, "〇": 0}
_CJK_SCALES = {"十": 10, "百": 100, "千": 1000}
_CJK_COUNTERS = "个個只條条根米度厘分小天年月元岁歳摄本支块倍次点种種颗棵人つ匹枚円時时"

# "十二", "三个"; not "第二", "三角形"
_CJK_NUMBER = re.compile(
    rf"(?<![第每])(?:[零〇一二两三四五六七八九十百千]{{2,12}}|[二三四五六七八九十](?=[{_CJK_COUNTERS}]))"
)


def _foreign_in_digits(match: re.Match) -> str:
    value = _FOREIGN_WORDS.get(match[0].casefold())
    return match[0] if value is None else str(value)


def _cjk_in_digits(match: re.Match) -> str:
    """ "二十五" -> "25"; "二五" is 25 too."""
    characters = match[0]
    if not any(character in _CJK_SCALES for character in characters):
        return "".join(str(_CJK_DIGITS[character]) for character in characters)
    total = digit = 0
    for character in characters:
        if character in _CJK_SCALES:
            total += (digit or 1) * _CJK_SCALES[character]
            digit = 0
        else:
            digit = _CJK_DIGITS[character]
    return str(total + digit)


# ----------------------------------------------------------------------------------- one form

# Mathematics mode, Markdown's bold and code. "$5" keeps its sign.
_MARKUP = re.compile(r"\\\(|\\\)|\\\[|\\\]|\$(?<!\\\$)(?!\d)|\*\*|`")
# "$31$ days" holds no dollars
_NUMBER_IN_MATHS = re.compile(r"\$(?<!\\\$)(\d(?:[^$;\s]| (?=[\\\d+*/=<>-])){0,40})(?<! )\$(?!\d)")
_LATEX_SIGN = re.compile(r"[\\^~${}`*]")
_PER_CENT = re.compile(r" ?\bper ?cent\b", re.I)
_THRICE = re.compile(r"\bthrice\b", re.I)
_ROOT = re.compile(r"\b(?:square )?root (?:of )?(\d+)\b", re.I)
_POINT = re.compile(r"(\d) point (?=\d)")
_GROUPED = re.compile(r"\d \d{3}")
_THOUSANDS = re.compile(r"(?<![\d.,] )(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d.,]?\d)")


def normal(text: str) -> str:
    """The text without disguises: "**Twó** point five per cent" -> "2.5 %".

    Unicode forms, accents, invisible signs, LaTeX and markup are gone, and number words are digits.
    """
    if text.isascii() and not _LATEX_SIGN.search(text):
        text = " ".join(text.split())
    else:
        text = _NUMBER_IN_MATHS.sub(r"\1", _without_marks(plain_latex(text)))
        text = plain_latex(_MARKUP.sub(" ", text))
    words = set(_WORD.findall(text.casefold()))
    if not words.isdisjoint(("thrice", "cent", "percent")):
        text = _THRICE.sub("three times", _PER_CENT.sub(" %", text))
    if "root" in words:
        text = _ROOT.sub(r"\\sqrt{\1}", text)
    if not words.isdisjoint(_PART_WORDS):
        if "and" in words:
            text = _MIXED.sub(_mixed_in_digits, text)
        text = _FRACTION.sub(_fraction_in_digits, text)
        if "half" in words:
            text = _HALF.sub("1/2", text)
    in_words = words & _ENGLISH_WORDS | ({"three"} if "thrice" in words else set())
    if in_words:
        pattern = _ONE if in_words == {"one"} else _CARDINAL
        text = pattern.sub(_cardinal_in_digits, text)
    if not _FOREIGN_WORDS.keys().isdisjoint(words):
        text = _WORD.sub(_foreign_in_digits, text)
    if not text.isascii():
        text = _CJK_NUMBER.sub(_cjk_in_digits, text)
    if _GROUPED.search(text):
        text = _THOUSANDS.sub(lambda match: match[1] + match[2].replace(" ", ""), text)
    return _POINT.sub(r"\1.", text) if "point" in words else text


def _without_marks(text: str) -> str:
    """The text without accents and invisible signs (Unicode's Mn and Cf), with ASCII's digits."""
    if text.isascii():
        return text
    kept = []
    for character in unicodedata.normalize("NFKD", text):
        category = unicodedata.category(character)
        if category == "Nd":
            kept.append(str(unicodedata.decimal(character)))
        elif category not in ("Mn", "Cf"):
            kept.append(character)
    return "".join(kept)


# ------------------------------------------------------------------------------------ numbers


@dataclass(frozen=True)
class Number:
    """A number in a normal text."""

    values: tuple[Fraction | float, ...]  # two for a percentage: 25 % is 1/4 and 25
    text: str
    decimals: int  # how many characters follow its point
    start: int
    end: int


_NUMBER = re.compile(
    r"""
    (?= [\d.\\] )
    (?:
      \\frac [ ]? (?: \{[ ]?\d+[ ]?\} | \d ) [ ]? (?: \{[ ]?\d+[ ]?\} | \d )  # \frac{1}{2}, \frac12
      | \d+ [ ] \d+ [ ]? / [ ]? \d+                                         # 1 1/2
      | (?: \d{1,3}(?:,\d{3})+(?!\d) | \d+ | (?=\.\d) )                     # 1,200  1200
        (?: \.\d+ )?                                                        # .5
        (?: [eE][-+]?\d+ | [ ]?/[ ]?\d+ | \^\{?\d+\}? )?                    # 1e5  1/2  2^3
    )
    (?: [ ]?% )?
    """,
    re.VERBOSE,
)


_ANY_DIGIT = re.compile(r"\d")
_LONGEST_NUMBER = 60  # in characters; what follows is not read


def numbers(text: str) -> list[Number]:
    """The numbers in a normal text, in order.

    A number with a percent sign counts without it too: "25 %" -> 1/4 and 25.
    """
    found = []
    for match in _NUMBER.finditer(text) if _ANY_DIGIT.search(text) else ():
        bare = match[0][:_LONGEST_NUMBER].rstrip("% ")
        forms = dict.fromkeys((match[0][:_LONGEST_NUMBER], bare))
        values = [Fraction(int(bare)) if form.isdecimal() else to_number(form) for form in forms]
        values = tuple(value for value in values if value is not None)
        if values:
            decimals = len(bare.partition(".")[2])
            found.append(Number(values, match[0], decimals, *match.span()))
    return found
