"""What the rules of plumbing.spoilers read: a hint, its question and its gold answer in one form.

`read_case` finds the options and the gold one among them, the parts of the answer and the numbers
that the question states. It takes out of the hint the candidates that the hint only lists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

from plumbing.answers import DIGIT_OR_COMMAND, pick_option, split_unit, to_number, unboxed
from plumbing.number_words import Number, normal, numbers

LETTERS = "ABCDEFGH"

_ORDINAL_WORDS = "first second third fourth fifth sixth seventh eighth ninth tenth"
ORDINALS = _ORDINAL_WORDS.split()

END_OF_CLAUSE = re.compile(r"[;!?,()。；，]|[.:](?=\s|$)")
# as a set, [;!?], it would not be searched for by its signs, and take four times as long
_END_OF_SENTENCE = re.compile(r"(;|!|\?|。|；|\.(?<!\bvs\.)(?=\s|$))")


def sentences(text: str) -> list[str]:
    """The sentences and phrases of a text."""
    return _END_OF_SENTENCE.split(text)[::2]


_NO_WORD = re.compile(r"[^\w\s-]+")


@lru_cache(maxsize=256)  # the rules ask for the same options and sentences
def plain_words(text: str) -> str:
    """A text without case and punctuation, for the rules on words: "Mon-day!" -> "mon-day "."""
    return _NO_WORD.sub(" ", text.casefold())


def has_word(word: str, text: str) -> bool:
    """The text has the word, or the words in a row. The article "A" is no option's letter."""
    if word not in text:
        return False
    if word == "A":
        return _LETTER_A.search(text) is not None
    # a pattern of each word would have to be compiled anew
    start = text.find(word)
    while start >= 0:
        around = text[max(0, start - 1) : start], text[start + len(word) :][:1]
        if not any(_WORD_SIGN.match(sign) for sign in around):
            return True
        start = text.find(word, start + 1)
    return False


_WORD_SIGN = re.compile(r"\w")
_LETTER_A = re.compile(
    r"(?<=[a-z] )A\b|\bA\b(?! (?!nor|and|or|is|has|to|fits|does|can|cannot)[a-z])"
)


SAYS_EQUAL = re.compile(r"\b(?:equal|equally|same|tie|neither|both|no difference)\b", re.I)
_IS_LABEL = re.compile(r"[A-Za-z]|[A-Za-z]+ (?:[A-Za-z]|\d)")


# What leaves a verdict open
OPEN = re.compile(r"\b(?:if|whether|could|would|might|decide|check|unless|when|either)\b", re.I)
# What tells the reader to do something with things: "fold shapes 1, 2 and 4", "look where"
TO_DO = re.compile(
    r"^\W*(?:now |next )?(?:compare|check|plot|read|count|look|go|fold|draw|see|test|use"
    r"|follow|find|trace|note|weigh|put|judge|mark|match|add|multiply|subtract|take|name)\b"
    r"|\b(?:if|whether|then|recall|remember)\b",
    re.I,
)


@dataclass(frozen=True)
class Gold:
    """A part of the answer that is a number."""

    part: str
    value: Fraction | float  # without its sign
    forms: tuple[Fraction | float, ...]  # for 25 %: 1/4 and 25


@dataclass
class Case:
    """A hint, its question and the gold answer, as the rules read them: all texts are normal."""

    text: str  # the hint without the candidates that it lists
    full: str  # the hint
    stem: str  # the question without its options
    options: list[str]
    place: int | None  # of the gold option; of its letter where there are no options
    answer: str  # its text; empty where it is a letter alone
    parts: list[str]  # of the answer; a hint may hold none of them
    golds: list[Gold]  # those that are numbers
    known: set[Fraction | float]  # what the question states
    variables: set[str]  # the capital letters that the hint has in mathematics mode

    @property
    def letter(self) -> str | None:
        return None if self.place is None else chr(ord("A") + self.place)

    @cached_property
    def labels(self) -> list[str]:
        """Of options that name pictures or things: "2" of "Figure 2", "q" of "line q"; else empty.

        An option that says that things are equal has the label "".
        """
        things = [option for option in self.options if not SAYS_EQUAL.search(option)]
        if len(things) < 2 or not all(_IS_LABEL.fullmatch(option) for option in things):
            return []
        return [option.split()[-1] if option in things else "" for option in self.options]

    @cached_property
    def numbers(self) -> list[Number]:
        return numbers(self.text)

    @cached_property
    def stem_numbers(self) -> list[Number]:
        return numbers(self.stem)

    @cached_property
    def words(self) -> str:
        return plain_words(self.text)

    @cached_property
    def stem_words(self) -> str:
        return plain_words(self.stem)

    @cached_property
    def other_options(self) -> list[str]:
        """The words of each option but the gold one."""
        others = [option for place, option in enumerate(self.options) if place != self.place]
        return [plain_words(option).strip() for option in others]

    @cached_property
    def sentences(self) -> list[str]:
        return sentences(self.text)


def read_case(text: str, question: str, answer: str, choices: list[str] | None) -> Case:
    """All that the rules read. The arguments are those of `spoilers.find_spoilers`."""
    stem, options = (question, choices) if choices else _inline_choices(question)
    place, answer = _place_and_text(unboxed(answer), options)
    text = _without_list_marks(text)
    variables = {letter for piece in _MATHS.findall(text) for letter in _CAPITAL.findall(piece)}
    full, stem, options = normal(text), normal(stem), [normal(option) for option in options]
    parts = _parts(answer)
    plain_answer = normal(answer)
    is_option = place is not None and options and answer
    return Case(
        text=_without_candidates(full, options, place),
        full=full,
        stem=stem,
        options=options,
        place=place,
        answer=plain_answer,
        parts=[plain_answer] if is_option else parts,
        golds=_gold_numbers(parts),
        known=_known(stem, options, place),
        variables=variables,
    )


_MATHS = re.compile(r"\$[^$;]+\$|\\\(.+?\\\)")
_CAPITAL = re.compile(r"[A-Z]")


def is_new(pattern: str, case: Case) -> bool:
    """The pattern occurs in the hint, but not in the question."""
    return re.search(pattern, case.text) is not None and re.search(pattern, case.stem) is None


# --------------------------------------------------------------------------------- list marks

# "2. Read the bar", "(2)", "step 2:", "②"; "b) run", but not "(b) fits"
_CIRCLED = "①②③④⑤⑥⑦⑧⑨⑩"
_LIST_MARK = re.compile(
    r"(?:^|(?<=[;.:!?\n])) *"
    r"(?:(?:[Ss]tep )?[(\[]?(\d\d?|[a-h](?!\) [a-z]+s\b))[.):/\]](?=[ A-Za-z$\\])"
    rf"|([{_CIRCLED}]))"
)


_SECOND_MARK = re.compile(r"2[.):/\]]|b[.):/\]]|②")


def _without_list_marks(text: str) -> str:
    """The text without the numbers or letters of its steps, where they count up from 1 or a."""
    if not _SECOND_MARK.search(text):
        return text
    spans, values = [], [0]
    for match in _LIST_MARK.finditer(text):
        mark = match[1] or str(_CIRCLED.index(match[2]) + 1)
        value = int(mark) if mark.isdigit() else ord(mark) - ord("a") + 1
        if value in (1, values[-1] + 1):
            spans.append(match.span())
            values.append(value)
    if 2 not in values:
        return text
    for start, end in reversed(spans):
        text = f"{text[:start]} {text[end:]}"
    return text


# ------------------------------------------------------------------------------------ options

_OPTION_MARK = re.compile(rf"(?:^|(?<=[\s;,]))\(?([{LETTERS}])[).:]\s")
_LONE_LETTER = re.compile(r"\(?([A-Za-z])\)?\.?")


def _inline_choices(question: str) -> tuple[str, list[str]]:
    """A question that lists its options -> what stands before them, and their texts.

    It lists them as "(A) 3 (B) 5" or "A. 3 B. 5". Any other question has no options.
    """
    marks = list(_OPTION_MARK.finditer(question))
    letters = "".join(mark[1] for mark in marks)
    start = letters.find("AB")
    if start < 0:
        return question, []
    in_order = zip(marks[start:], LETTERS, strict=False)
    marks = [mark for mark, letter in in_order if mark[1] == letter]
    ends = [mark.start() for mark in marks[1:]] + [len(question)]
    options = [
        question[mark.end() : end].strip(" ;,\n") for mark, end in zip(marks, ends, strict=True)
    ]
    return question[: marks[0].start()], options


def _place_and_text(answer: str, options: list[str]) -> tuple[int | None, str]:
    """The place and the text of the gold option: "B" of "3", "5" -> 1, "5".

    No place where the answer is no option; no text where it is a letter alone.
    """
    place = pick_option(answer.strip().rstrip("."), options) if options else None
    if place is not None:
        is_letter = _LONE_LETTER.fullmatch(options[place].strip())
        return place, "" if is_letter else options[place]
    letter = _LONE_LETTER.fullmatch(answer.strip())
    return (ord(letter[1].upper()) - ord("A"), "") if letter else (None, answer)


# ----------------------------------------------------------------------------- parts, numbers

_PAIR_OF_BRACKETS = re.compile(r"^\s*\$?[(\[{⟨]?|[)\]⟩]?\$?\s*$")
_BETWEEN_PARTS = re.compile(r"\s*(?:,(?!\d{3}(?!\d))|;|&|\band\b|\bor\b)\s*")  # 1,200 is one part
_NAMED_VALUE = re.compile(r"^[a-zA-Z]\w? ?= ?")


def _parts(answer: str) -> list[str]:
    """The parts of an answer, none of which a hint may hold: "(3, x = 5)" -> "3", "5".

    An order of letters, "C, A, B", is one part: its letters name things.
    """
    listed = _BETWEEN_PARTS.split(_PAIR_OF_BRACKETS.sub("", answer))
    parts = [_NAMED_VALUE.sub("", normal(part).rstrip(".! ")) for part in listed]
    parts = [part for part in parts if part]
    letters = [part for part in parts if len(part) == 1 and part.isalpha()]
    return [answer] if len(letters) == len(parts) > 1 else parts


def _gold_numbers(parts: list[str]) -> list[Gold]:
    golds = []
    for part in parts:
        value = part_value(part)
        if value is not None:
            value = abs(value)
            is_percent = "%" in split_unit(part)[0]
            golds.append(Gold(part, value, (value, value * 100) if is_percent else (value,)))
    return golds


_NOUNS = re.compile(r"[A-ZΩµμa-z\s'-]*")
_VARIABLE = re.compile(r"\b[a-z]\b", re.I)


# "Figure 2" and "sp2" are names, "about 2" is a number
_QUALIFIERS = "about|around|roughly|nearly|exactly|approximately|only|over|the|all|at|minus"
_LABEL = re.compile(rf"(?!(?:{_QUALIFIERS})\b)[A-Za-z]+ ?\d+", re.I)


def is_label(part: str) -> bool:
    """The part is a name with a number: "Figure 2"."""
    return _LABEL.fullmatch(part) is not None


@lru_cache(maxsize=1024)
def part_value(part: str) -> Fraction | float | None:
    """The number that a part is: "5 cm" -> 5, "12 apples" -> 12; None for "12 x", "Figure 2"."""
    if part.isascii() and not DIGIT_OR_COMMAND.search(part) and "pi" not in part:
        return None
    value = to_number(split_unit(part)[0])
    if value is not None:
        return value
    found = numbers(part)
    if len(found) != 1 or is_label(part):
        return None
    if part[: found[0].start][-1:].isalpha():  # H2O
        return None
    rest = part[: found[0].start] + part[found[0].end :]
    counts_nouns = _NOUNS.fullmatch(rest) and not _VARIABLE.search(rest) and len(rest.split()) < 4
    return found[0].values[0] if counts_nouns else None


# The beginning of a shape's name, and its number of corners or faces.
_CORNERS = """
    triang 3 square 4 rectang 4 quadril 4 parallelogram 4 rhombus 4 trapez 4 pentagon 5 hexagon 6
    heptagon 7 octagon 8 nonagon 9 decagon 10 dodecagon 12 cube 6
"""
# Words of a question that state a number without naming it
_CORNERS += " doubl 2 twice 2 tripl 3 halve 2 percent 100 midnight 12 noon 12"
_CORNERS_OF = dict(zip(_CORNERS.split()[::2], _CORNERS.split()[1::2], strict=True))
_THOUSANDS = {"thousands": 1000, "millions": 10**6}
_AFTERNOON = re.compile(r"\b(\d\d?)(?:[:.]\d\d)? ?p\.?m\b")
_WHOLE = re.compile(r"\d+")


def whole_numbers(text: str) -> set[Fraction]:
    """The digits of a number's text: "3/4" -> 3, 4. What is longer than 20 digits is cut."""
    return {Fraction(int(digits[:20])) for digits in _WHOLE.findall(text)}


def _stated(text: str) -> set[Fraction | float]:
    """The values that a normal text states: "3/4" states 3 and 4 too, "third" 3, "hexagon" 6."""
    found = numbers(text)
    values = {value for number in found for value in number.values}
    values = values.union(*(whole_numbers(number.text) for number in found))
    lower = text.casefold()
    values |= {Fraction(place) for place, word in enumerate(ORDINALS, 1) if word in lower}
    values |= {Fraction(value) for word, value in _THOUSANDS.items() if word in lower}
    values |= {Fraction(int(hour) % 12 + 12) for hour in _AFTERNOON.findall(lower)}
    return values | {Fraction(count) for word, count in _CORNERS_OF.items() if word in lower}


def _known(stem: str, options: list[str], gold: int | None) -> set[Fraction | float]:
    """What the question states; of its options what all state, and what wrong statements state.

    A statement is an option of at least four words.
    """
    known, shared = _stated(stem), None
    for place, option in enumerate(options):
        is_wrong_statement = place != gold and len(option.split()) >= 4
        if shared == set() and not is_wrong_statement:
            continue
        values = _stated(option)
        shared = values if shared is None else shared & values
        if is_wrong_statement:
            known |= values
    return known | (shared or set())


# -------------------------------------------------------------------------------- candidates

_OPEN_CHOICE = re.compile(r"\b(?:or|whether|between|versus|vs)\b", re.I)
_RANGE = re.compile(r"\b(?:to|through)\b|-")
CHOSEN = re.compile(
    r"\b(?:so(?! (?:forth|on)\b)|therefore|thus|hence|leaving|leaves only|than"
    r"|rather|instead|unlike|except|but not"
    r"|must be|but|turns out|is ahead|comes first|followed by"
    r"|outweigh\w*|clearly|visibly|because)\b",
    re.I,
)


def _without_candidates(text: str, options: list[str], gold: int | None) -> str:
    """The text without the options that a sentence lists beside each other and does not judge.

    "decide between red, blue and green" -> "decide between  ,   and  ". Enough are all options
    but one, two of them around "or", or the first and the last one as a range.
    """
    if gold is not None:
        text = _without_described(text, options)
    letters = LETTERS[: len(options) or 4] if gold is not None else ""
    for names in (_option_names(options), {name: place for place, name in enumerate(letters)}):
        lower = text.casefold()
        if sum(name in lower or name in text for name in names) > 1:
            text = _blank_lists(text, names)
    return text


def _option_names(options: list[str]) -> dict[str, int]:
    """What options may be called, and their places: their texts, without units, up to a colon."""
    names = {}
    heads = {option.partition(" ")[0] for option in options}
    # "5a" of "Class 5a"
    shared = f"{heads.pop()} " if len(heads) == 1 and len(options) > 2 else ""
    for place, option in enumerate(options):
        if _NO_CANDIDATE.search(option):
            continue
        head, colon, _ = option.partition(": ")
        short = option[len(shared) :]
        for name in (option, split_unit(option)[0], head if colon else option, short):
            if len(name) > 1 or name.isdigit():
                names.setdefault(name.casefold(), place)
    return names


def _blank_lists(text: str, names: dict[str, int]) -> str:
    """The text without the names, in each sentence that only lists them."""
    pieces = _END_OF_SENTENCE.split(text)
    lists = [index for index, piece in enumerate(pieces) if _may_list(piece, names)]
    if not lists:
        return text  # a pattern costs more than this look
    longest_first = sorted(names, key=len, reverse=True)
    pattern = "|".join(re.escape(name) for name in longest_first)
    is_letters = longest_first[0].isupper()
    ignore_case = re.NOFLAG if is_letters else re.I
    # Chinese has no blanks between words
    named = re.compile(rf"(?<![A-Za-z\d.])(?:{pattern})(?![A-Za-z\d]|\.\d)", ignore_case)
    count = len(set(names.values()))
    for index in lists:
        piece = pieces[index]
        found = named.findall(piece)
        places = {names[name if is_letters else name.casefold()] for name in found}
        if len(places) < 2 or len(found) > len(places):
            continue
        is_range = {0, count - 1} <= places and _RANGE.search(piece)
        if len(places) >= count - 1 or _OPEN_CHOICE.search(piece) or is_range:
            pieces[index] = named.sub(" ", piece)
    return "".join(pieces)


def _may_list(piece: str, names: dict[str, int]) -> bool:
    """The sentence holds names of two options and chooses none."""
    lower = piece.casefold()
    places = {place for name, place in names.items() if name in lower or name in piece}
    return len(places) > 1 and not CHOSEN.search(piece)


_NO_CANDIDATE = re.compile(r"\b(?:both|neither|none|same|equal|cannot|all of)\b", re.I)
# What a sentence has that speaks a verdict on a candidate
_JUDGES = re.compile(
    r"\b(?:rul\w+ out|cannot|can't|fails?|fits|matches|wrong|correct|here|pictured|agrees?"
    r"|as in the|this|isn't|doesn't|nor|shown"
    r"|dropped|too|ahead|behind|leads?|trails?|exceeds?|top|bottom"
    r"|(?:tall|long|short|bigg|great|fast|slow|heavi|light|old|young)e(?:r|st)"
    r"|first|followed|largest|smallest|most|least|higher|lower|more|less|fewer|out)\b",
    re.I,
)


_OF_A_KIND = re.compile(r"\W*(?:an?|any|every) (?!.*\b(?:here|shown|so|because)\b)", re.I)


def _without_described(text: str, options: list[str]) -> str:
    """The text without the candidates, where it describes them all and judges none.

    "Kite: two pairs of equal sides. Rhombus: four equal sides", "for plan B, check the minimum".
    A candidate may go by a word that no other one has: "authentic" of "authentic cadence".
    """
    options = [option for option in options if not _NO_CANDIDATE.search(option)]
    if len(options) < 2 or all(len(option) == 1 for option in options):
        return text
    lower = text.casefold()
    words = [plain_words(option).split() for option in options]
    called = []
    for place, option in enumerate(options):
        names = _names_of(option, place, words)
        if not any(name.casefold() in lower for name in names):
            return text
        called.append(names)
    exact = any(len(option) < 3 for option in options)
    patterns = [
        "|".join(rf"{re.escape(name)}s?" for name in sorted(names, key=len, reverse=True))
        for names in called
    ]
    ignore_case = re.NOFLAG if exact else re.I
    dress = r"(?<![A-Za-z\d.])(?:{})(?![A-Za-z\d]|\.\d)"
    named = re.compile(dress.format("|".join(sorted(patterns, key=len, reverse=True))), ignore_case)
    pieces = _END_OF_SENTENCE.split(text)
    naming = [index for index, piece in enumerate(pieces) if named.search(piece)]
    joined = ". ".join(pieces[index] for index in naming)
    specific = ". ".join(pieces[index] for index in naming if not _OF_A_KIND.match(pieces[index]))
    if CHOSEN.search(specific) or _JUDGES.search(specific):
        return text
    found = [name.casefold() for name in named.findall(joined)]
    for names in called:
        forms = {form for name in names for form in (name.casefold(), f"{name.casefold()}s")}
        if forms.isdisjoint(found):
            return text
    for index in naming:
        pieces[index] = named.sub(" ", pieces[index])
    return "".join(pieces)


def _names_of(option: str, place: int, words: list[list[str]]) -> list[str]:
    """The option's text and the words that only it has; a number is no candidate here.

    words: those of each option.
    """
    if option[:1] in _NUMBER_BEGINS:
        return []
    names = [option] if len(option) > 1 or option.isupper() else []
    if len(words) > 2:
        others = {word for other in words[:place] + words[place + 1 :] for word in other}
        names += [word for word in words[place] if word not in others and len(word) > 2]
    return names


_NUMBER_BEGINS = set("0123456789-+.$€£\\")
