r"""The last way to compare two answers: as texts. Operators, signs and relations stay in them."""

from __future__ import annotations

import re

from plumbing.answer_lists import split_outside

YES_OR_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
ARTICLES = ("a", "an", "the")
DIGIT_OR_COMMAND = re.compile(r"\d|\\")  # what tells a formula from words

_CHINESE_YES_OR_NO = {
    **dict.fromkeys(("是", "对", "正确", "是的"), "yes"),
    **dict.fromkeys(("否", "错", "错误", "不正确", "不是", "不对"), "no"),
}

# A sign that means something, a lone capital's prime, or a hyphen that is a minus: x-y, B-
_SIGN = re.compile(
    r"[\d\\=+*/^<>|~%#$€£¥&@_{}\[\]]|[^\W\d_]\(|\b[^\W\d_]'(?![^\W\d_]{2})|\b[A-Za-z]!"
    r"|\b[^\W\d_] ?: ?[^\W\d_]\b|(?<![^\W\d_])-|-(?![^\W\d_])|\b[^\W\d_]-[^\W\d_]\b"
)
_PUNCTUATION = re.compile(r"[^\w\s'-]+")
_APOSTROPHE = re.compile(r"['_]")


def same_text(given: str, gold: str) -> bool:
    """Equal words or formulas: "The Cat!" is "cat", a+b is not a-b. Empty texts are not equal."""
    if _SIGN.search(given) or _SIGN.search(gold):
        formula = formula_text(gold)
        return bool(formula) and (formula_text(given) == formula or _same_sides(given, gold))
    words, gold_words = plain_words(given), plain_words(gold)
    if not gold_words:
        return False
    if "-" in given or "-" in gold:
        return _joined(words) == _joined(gold_words)
    return _verdict(words) == _verdict(gold_words)


def _verdict(words: str) -> str:
    return YES_OR_NO.get(words) or _CHINESE_YES_OR_NO.get(words) or words


def _joined(words: str) -> str:
    return words.replace(" ", "")


def plain_words(text: str) -> str:
    """Words for comparison: "The red-ish cat!" -> "red ish cat".

    An article falls away before a word of at least two letters: "a cat" is "cat", but "vitamin A"
    keeps its letter, and so does "A or B".
    """
    words = _APOSTROPHE.sub("", _PUNCTUATION.sub(" ", text)).split()
    kept = []
    for place, word in enumerate(words):
        is_article = word.casefold() in ARTICLES and (place == 0 or word.islower())
        following = words[place + 1] if place + 1 < len(words) else ""
        if not is_article or len(following) < 2 or following.casefold() in ("and", "or"):
            kept += word.casefold().split("-")
    return " ".join(kept)


# ----------------------------------------------------------------------------------- formulas

_FRACTION = re.compile(r"\\frac ?(?:\{([^{}]*)\}|(\w)) ?(?:\{([^{}]*)\}|(\w))")
_ROOT = re.compile(r"\\?sqrt ?(?:\{([^{}]*)\}|\(([^()]*)\)|(\w))")
_ATOM = re.compile(r"\w+|\([^()]*\)")
_LEADING_ARTICLE = re.compile(r"^(?:the|an?) (?=\S{2,})", re.I)
_CHARGE = re.compile(r"\^ ?(?:\{ ?(\d*[+-]) ?\}|(\d?[+-])(?=$|[\s)\]]))")
_SUBSCRIPT = re.compile(r"_ ?(?:\{ ?(\w+) ?\}|(?=\w))")
_BRACED = re.compile(r"\{ ?(\w+) ?\}(?!\w)")
_ARGUMENT = re.compile(r"(\\[a-z]{2,6}) ?\((\w{1,3}|\\[a-z]+ ?)\)")  # \sin(x)
_POINTLESS_STAR = re.compile(r"(?<!\d)\*|\*(?!\d)")
_BLANK = re.compile(r"(?<=[0-9]) (?=[0-9])|( )")
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|(?<=\d) ?[AaPp]\.? ?[Mm]\b")
_OPERATOR = re.compile(r"[=+*/^<>|\\_{}-]")


def formula_text(text: str) -> str:
    r"""A formula for comparison: "\frac{x}{2} + 1" -> "x/2+1", "\text{H}_{2}O" -> "H2O".

    Small and capital letters are different, but for words and for a text without operators.
    """
    text = _CHARGE.sub(r"\1\2", _LEADING_ARTICLE.sub("", text))
    text = _SUBSCRIPT.sub(lambda index: index[1] or "", text)
    text = text.casefold() if not _OPERATOR.search(text) else _LONG_WORD.sub(_in_small, text)
    for _ in range(3):
        text, changes = _FRACTION.subn(_slashed, text)
        if not changes:
            break
    text = _ROOT.sub(lambda root: f"\\sqrt({root[1] or root[2] or root[3]})", text)
    text = _ARGUMENT.sub(r"\1 \2", _BRACED.sub(r"\1", text))
    text = _BLANK.sub(lambda blank: "" if blank[1] else " ", text)
    text = _POINTLESS_STAR.sub("", text).replace("{", "(").replace("}", ")")
    return text.replace("p.m", "pm").replace("a.m", "am")


def _in_small(match: re.Match) -> str:
    return match[0].casefold()


def _slashed(match: re.Match) -> str:
    # TRAP: a group that matched may be empty, as in \frac{}{2}
    top = match[2] if match[1] is None else match[1].strip()
    bottom = match[4] if match[3] is None else match[3].strip()
    return f"{_as_atom(top)}/{_as_atom(bottom)}"


def _as_atom(text: str) -> str:
    return text if _ATOM.fullmatch(text) else f"({text})"


_RELATION = re.compile(r"\\(?:parallel|perp|cong|sim|ne|le|ge)(?![a-zA-Z])|[=<>]")
_OTHER_WAY = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


def _same_sides(given: str, gold: str) -> bool:
    r"""One relation, its sides exchanged: b > a and a < b, CD \parallel AB and AB \parallel CD."""
    split, gold_split = split_outside(given, _RELATION), split_outside(gold, _RELATION)
    if not split or not gold_split or len(split[1]) != 1 or len(gold_split[1]) != 1:
        return False
    [sign], [gold_sign] = split[1], gold_split[1]
    sides = [formula_text(side) for side in split[0]]
    gold_sides = [formula_text(side) for side in gold_split[0]]
    return _OTHER_WAY.get(sign, sign) == gold_sign and sides == gold_sides[::-1]
