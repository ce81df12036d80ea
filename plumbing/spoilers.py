"""Does a text give the answer away?"""

from __future__ import annotations

import re
import unicodedata

from plumbing.answers import extract_answer, pick_option, plain_latex, split_unit, to_number

_SMALL = dict(
    zip(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
        "nineteen".split(),
        range(20),
    )
) | dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10)))

_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000}

_PARTS = {
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

_CARDINAL = rf"(?:an? (?=dozen|hundred|thousand))?(?:{'|'.join(sorted([*_SMALL, *_SCALES], key=len, reverse=True))})"

_CARDINAL = rf"{_CARDINAL}(?:(?:-| and | )?\b{_CARDINAL}\b){{0,8}}"  # bounded: a long run of such words must not cost its square

_FRACTION = re.compile(rf"\b({_CARDINAL}|an?)[- ]({'|'.join(_PARTS)}|halve)s?\b", re.I)

_NUMBER = re.compile(
    r"\\frac ?(?:\{ ?\d+ ?\}|\d) ?(?:\{ ?\d+ ?\}|\d)|\d+ \d+ ?/ ?\d+|"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+| ?/ ?\d+|\^\{?\d+\}?)?(?: ?%)?"
)

_RESULT = re.compile(
    r"(?:=|≈|→|\\approx|\\Rightarrow|\b(?:equals?|equal to|gives?|giving|makes?|making|yields?|totals?|comes? to|adds? up to|"
    r"sums? (?:up )?to|sum is|total (?:is|of)|result is|leaves|get|there (?:is|are)(?: exactly)?)\b)[\s:~]*[-+$€£]?\s*(?=\d|\.\d|\\frac)",
    re.I,
)

_GAP = r"[\s.\-_*|]+"


def _cardinal(words: str) -> int:
    total = group = 0
    for word in re.findall("[a-z]+", words.lower()):
        group = max(1, group) * _SCALES[word] if word in _SCALES else group + _SMALL.get(word, 0)
        if word == "thousand":
            total, group = total + group, 0
    return min(total + group, 10**18)


def _normal(text: str) -> str:
    """Disguises off: Unicode forms, accents and invisible signs, LaTeX dress, and number words written as digits."""
    text = "".join(
        c
        for c in unicodedata.normalize("NFKD", plain_latex(text))
        if unicodedata.category(c) not in ("Mn", "Cf")
    )
    text = plain_latex(re.sub(r"\\\(|\\\)|\\\[|\\\]|(?<!\\)\$(?!\d)|\*\*|`", " ", text))
    text = re.sub(r" ?\bper ?cent\b", " %", text, flags=re.I)
    # "the left half" is a place; "a fifth line" is a place too, "a fifth of" is not
    text = _FRACTION.sub(
        lambda m: (
            m[0]
            if m[1].lower() in ("a", "an") and not re.match(r" (?:of|as)\b", m.string[m.end() :])
            else f"{_cardinal(m[1]) or 1}/{_PARTS.get(m[2].lower(), 2)}"
        ),
        text,
    )
    text = re.sub(
        r"(?<!left )(?<!right )(?<!upper )(?<!lower )(?<!top )(?<!bottom )(?<!other )(?<!each )(?<!first )(?<!second )\bhalf (?:of|the|as)\b",
        "1/2",
        text,
        flags=re.I,
    )

    def digits(m):
        pronoun = m[0].lower() == "one" and not re.search(
            r"(?:exactly|only|just|(?<!there )is|are|equals?|[=:]|makes|gives|number) *$",
            m.string[: m.start()],
            re.I,
        )
        return m[0] if pronoun else str(_cardinal(m[0]))

    return re.sub(
        r"(\d) point (?=\d)", r"\1.", re.sub(rf"\b{_CARDINAL}\b", digits, text, flags=re.I)
    )


def _values(text: str) -> dict:
    """The numbers in a normal text: value -> digits after the point; with a percent sign the number without it counts too."""
    found = {}
    for m in _NUMBER.finditer(text):
        for form in {m[0], m[0].rstrip("% ")}:
            value = to_number(form) if form else None
            if value is not None:
                found[value] = max(found.get(value, 0), len(form.partition(".")[2]))
    return found


def _inline_choices(question: str) -> tuple[str, list[str]]:
    """A question that lists its options, "(A) 3 (B) 5" or "A. 3 B. 5" -> what stands before them, and their texts."""
    marks = [m for m in re.finditer(r"(?:^|(?<=[\s;,]))\(?([A-H])[).:]\s", question)]
    start = next(
        (i for i in range(len(marks) - 1) if [m[1] for m in marks[i : i + 2]] == ["A", "B"]), None
    )
    if start is None:
        return question, []
    marks = [m for i, m in enumerate(marks[start:]) if m[1] == "ABCDEFGH"[i : i + 1]]
    ends = [m.start() for m in marks[1:]] + [len(question)]
    return question[: marks[0].start()], [
        question[m.end() : end].strip(" ;,\n") for m, end in zip(marks, ends)
    ]


def find_spoilers(
    text: str, question: str, answer: str, choices: list[str] | None = None
) -> list[str]:
    """Reasons why the text of a hint gives something away; an empty list means that it may be used.

    Rules: no "the answer is"; no computed result ("= 50"), unless the question states it; no part of the answer, as text, as an equal
    number or as an option's letter or text, in any disguise (LaTeX, Unicode, words, letters spaced out or reversed), except what the question itself names
    outside its options. Strict rather than kind: a hint that is rejected is written anew. Order: by rule.
    """
    stem, listed = (question, choices) if choices else _inline_choices(question)
    text, stem = _normal(text), _normal(stem)
    if "\\boxed" in answer or "<answer>" in answer:
        answer = extract_answer(answer) or answer
    reasons = []
    if re.search(
        r"\b(?:answer|solution)\s*(?:is|:|=|must be|should be|equals)|\b(?:correct|right) (?:option|choice|answer)\b",
        text,
        re.I,
    ):
        reasons.append("names the answer")
    stated = {text[m.end() :][:12].partition(" ")[0].rstrip(".,;") for m in _RESULT.finditer(text)}
    if stated - {
        stem[m.end() :][:12].partition(" ")[0].rstrip(".,;?") for m in _RESULT.finditer(stem)
    }:
        reasons.append("states a computed result")
    answers = [answer]
    place = pick_option(answer.strip().rstrip("."), listed) if listed else None
    if place is not None or re.fullmatch(r"\(?[A-Za-z]\)?\.?", answer.strip()):
        letter = answer.strip(" ().").upper() if place is None else chr(ord("A") + place)
        answers = [] if place is None else [listed[place]]
        if _names_option(letter, text, stem):
            reasons.append(f"names the option: {letter}")
    for part in (
        p
        for one in answers
        for p in re.split(
            r"\s*(?:,(?!\d{3}(?!\d))|;|&|\band\b|\bor\b)\s*",
            re.sub(r"^\s*\$?[(\[{⟨]?(.*?)[)\]⟩]?\$?\s*$", r"\1", one),
        )
    ):
        part = re.sub(r"^[a-zA-Z]\w? ?= ?", "", _normal(part).rstrip(".! "))
        if part and (reason := _holds(part, text, stem)):
            reasons.append(f"{reason}: {part}")
    return reasons


def _names_option(letter: str, text: str, stem: str) -> bool:
    dress = (
        rf"\({letter}\)|\b(?:option|choice|answer|letter|pick|choose|select|mark)s? \(?{letter}\b|"
        rf"(?:^|\s)[\"']?{letter}[\"']?(?:\)|\.(?=\s[A-Z]|$)| (?:is|fits|must be) (?:the )?(?:best|right|correct|true))"
    )
    if re.search(dress, text, re.I if letter not in "AI" else 0) or re.search(
        rf"\b(?:option|choice|pick|choose|select) {letter.lower()}(?=$|[;.,])", text
    ):
        return True
    # alone, as a capital: unless it labels a point or line, or the question has it
    alone = rf"(?<![\w'=+*/^-])(?<!point )(?<!vertex )(?<!angle )(?<!line )(?<!side )(?<!label )(?<!labelled )(?<!labeled )(?<!node ){letter}(?![\w'=+*/^-])"
    return letter not in "AI" and bool(re.search(alone, text)) and not re.search(alone, stem)


def _holds(part: str, text: str, stem: str) -> str | None:
    """How `text` gives away one part of the answer that `stem`, the question, does not name itself; None if it does not."""
    bare = split_unit(part)[0]
    value = to_number(bare)
    numbers = _values(part)
    if (
        value is None
        and len(numbers) == 1
        and re.fullmatch(r"[A-Za-z\s'-]*", _NUMBER.sub("", part))
        and not re.search(r"\b[a-z]\b", part, re.I)
    ):
        value = next(iter(numbers))  # 12 apples
    if value is not None:
        golds = {abs(value), *([abs(value) * 100] if "%" in bare else ())}
        known, given = _values(stem), _values(text)
        for number, digits in given.items():
            near = digits >= 2 and any(
                abs(number - gold) * 10**digits <= 0.5 for gold in golds
            )  # 0.33 for 1/3
            if number not in known and (number in golds or near):
                return "holds the answer's number"
        plain = re.sub(r"\D", "", bare) if re.fullmatch(r"[-+]?[\d,.]+ ?%?", bare) else ""
        if len(plain) > 1:
            apart = rf"(?<![\d.])(?<!\d )(?!{plain}){'[-_*|,. ]*'.join(plain)}(?![\d.]\d)(?!\d)"
            back = (
                plain[::-1] != plain
                and re.search(rf"(?<!\d){plain[::-1]}(?!\d)", text)
                and not re.search(rf"(?<!\d){plain[::-1]}(?!\d)", stem)
            )
            if back or re.search(apart, text):
                return "spells the answer's number"
        if "\\" not in part:
            return None
    if re.search(r"\d|\\", part):  # an expression: 3x + 1, 2\sqrt{3}
        squeezed, short, asked = (
            re.sub(r"[\s{}\\*]|(?:cdot|times)", "", x).casefold() for x in (part, text, stem)
        )
        return (
            "holds the answer's expression" if squeezed in short and squeezed not in asked else None
        )
    clauses = re.split(r"[;.,:!?\"()]", text.casefold())
    word, text, stem = (re.sub(r"[^\w\s-]+", " ", x.casefold()) for x in (part, text, stem))
    word = " ".join(w for w in word.split() if w not in ("a", "an", "the"))
    if not word:
        return None
    if word in ("yes", "no", "true", "false"):
        said = rf"(?:^|\b(?:is|are|say|says|it's|answer|mark|therefore|so|statement|claim) ){word}(?:$| (?:because|since|as)\b)"
        return (
            "says the answer"
            if any(re.search(said, clause.strip()) for clause in clauses)
            else None
        )
    letters = re.sub(r"\W", "", word)
    word = (
        word[:-1] if len(word) >= 5 and word[-1] == "s" and word[-2] != "s" else word
    )  # pears: a pear
    if len(word) >= 4:  # circle: circular; blue: bluish
        inside = "" if len(word) >= 6 else r"\b"
        inside += re.sub("le$", "(?:le|ul)", re.sub("(?<!l)e$", "(?:e|ish|ing)", re.escape(word)))
    else:
        inside = rf"\b{re.escape(word)}(?:'?s|er|ed|ing|ish|ly|y|ness)?\b"
    if re.search(inside, text):
        return None if re.search(inside, stem) else "holds the answer's text"
    backwards = letters != letters[::-1] and re.search(rf"\b{letters[::-1]}\b", text)
    gap = _GAP if len(letters) < 5 else _GAP[:-1] + "*"  # mon day
    return (
        "spells the answer's text"
        if len(letters) >= 3 and (backwards or re.search(rf"\b{gap.join(letters)}\b", text))
        else None
    )
