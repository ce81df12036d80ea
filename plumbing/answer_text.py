r"""One spelling for answers: Unicode, LaTeX and ASCII write the same sign in many ways.

`plain_latex` is for any text, also a long one. `tidy` is for one answer: it goes further, and all
readings of an answer (numbers, ranges, sets, words, ...) start from what it gives.
"""

from __future__ import annotations

import re
import unicodedata

# In characters. What is longer is no answer, so no pattern below reads more than this.
LONGEST_ANSWER = 400

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

Rules = list[tuple[str, re.Pattern, str]]


def _rules(*rows: tuple[str, str, str]) -> Rules:
    """Rules of spelling; for speed, a pattern is tried only where its first text occurs."""
    return [(needle, re.compile(pattern), new) for needle, pattern, new in rows]


_SPACING = r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\[,;!: ]|\\q?quad"
_TEXT = r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"

# Applied in this order.
_LATEX = _rules(
    ("\\", r"(?<=\d)\\[,!] ?(?=\d{3}(?!\d))", ""),  # 1\,200
    ("\\", _SPACING, " "),
    ("~", r"~", " "),
    ("frac", r"\\[dtc]frac", r"\\frac"),
    ("\\", r"\\(?:times|cdot)(?![a-z])", "*"),
    ("\\div", r"\\div(?![a-z])", "/"),
    ("{,}", r"\{,\}", ","),
    ("\\%", r"\\%", "%"),
    ("\\", r"\^\s*\{?\s*\\circ\s*\}?|\\degree", " degrees"),
    ("\\", r"\\\{|\\lbrace", "⟨"),  # the braces of a set: from here on { and } only group
    ("\\", r"\\\}|\\rbrace", "⟩"),
    ("\\", _TEXT, r" \1 "),
    ("$$", r"^\s*\$\$|\$\$\s*$", " "),
    ("\\", r"^\s*(?:\\\(|\\\[)|(?:\\\)|\\\])\s*$", " "),  # \(...\), \[...\]
    ("$", r"^\s*\$([^$]*)\$\s*$", r"\1"),
    ("\\$", r"\\\$", "$"),
)


def _apply(rules: Rules, text: str) -> str:
    for needle, pattern, new in rules:
        if needle in text:
            text = pattern.sub(new, text)
    return text


def plain_latex(text: str) -> str:
    r"""The text in one spelling: "\text{about}~\dfrac{1}{2}²" -> "about \frac{1}{2}^{2}".

    LaTeX's commands for spacing, text and mathematics mode are gone, Unicode signs are as LaTeX
    writes them, and there are no double blanks.
    """
    text = text if text.isascii() else text.translate(_PLAIN)
    return " ".join(_apply(_LATEX, text).split())


# ------------------------------------------------------------------------------- Unicode's signs

# What NFKC leaves or spoils, and plain_latex does not know.
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("‐‑‒―﹣", "-"),
        **dict.fromkeys("º˚∘", "°"),
        **dict.fromkeys("∙•∗✕✖", "*"),
        **dict.fromkeys("、،", ", "),
        **dict.fromkeys("「」『』《》", '"'),
        **dict.fromkeys("∶∷", ":"),
        **dict.fromkeys("∥‖", " \\parallel "),
        **dict.fromkeys("⊥⟂", " \\perp "),
        **dict.fromkeys("△▲Δ∆", " \\triangle "),
        **dict.fromkeys("∠∡", " \\angle "),
        **dict.fromkeys("∽∼", " \\sim "),
        **dict.fromkeys("→⟶", " \\to "),
        **dict.fromkeys("⇒⟹", " \\Rightarrow "),
        **dict.fromkeys("∅⌀", " \\emptyset "),
        **dict.fromkeys("⩽≦", "≤"),
        **dict.fromkeys("⩾≧", "≥"),
        **dict.fromkeys("′ʹ", "'"),
        **dict.fromkeys("\N{MICRO SIGN}\N{GREEK SMALL LETTER MU}", "\\mu "),
        **dict.fromkeys("\N{OHM SIGN}\N{GREEK CAPITAL LETTER OMEGA}", "\\Omega "),
        "。": ".",
        "″": '"',
        "≈": " \\approx ",
        "≃": " \\approx ",
        "≅": " \\cong ",
        "≌": " \\cong ",
        "≠": " \\ne ",
        "±": " \\pm ",
        "∓": " \\mp ",
        "∈": " \\in ",
        "∉": " \\notin ",
        "⇔": " \\iff ",
        "¬": " \\neg ",
        "ℝ": "\\R ",
        "∛": "\\sqrt[3]",
        "θ": "\\theta ",
        "α": "\\alpha ",
        "β": "\\beta ",
        "γ": "\\gamma ",
        "δ": "\\delta ",
        "λ": "\\lambda ",
        "φ": "\\phi ",
        "ω": "\\omega ",
        "σ": "\\sigma ",
        "ρ": "\\rho ",
    }
)

_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")


def _ascii_signs(text: str) -> str:
    """Unicode's signs as LaTeX or ASCII: "３．５ｃｍ²" -> "3.5cm^{2}"."""
    text = _INVISIBLE.sub("", text)
    text = _RAISED.sub(lambda run: "^{" + unicodedata.normalize("NFKC", run[0]) + "}", text)
    text = text.translate(_SIGNS).translate(_PLAIN)
    return unicodedata.normalize("NFKC", text).translate(_SIGNS).translate(_PLAIN)


# ---------------------------------------------------------------------------- LaTeX's spellings

_SYNONYMS = {
    **dict.fromkeys(("leq", "leqslant", "leqq"), "\\le "),
    **dict.fromkeys(("geq", "geqslant", "geqq"), "\\ge "),
    **dict.fromkeys(("neq",), "\\ne "),
    **dict.fromkeys(("lt",), "<"),
    **dict.fromkeys(("gt",), ">"),
    **dict.fromkeys(("simeq", "thickapprox", "approxeq"), "\\approx "),
    **dict.fromkeys(("rightarrow", "longrightarrow"), "\\to "),
    **dict.fromkeys(("implies", "Longrightarrow"), "\\Rightarrow "),
    **dict.fromkeys(("Leftrightarrow", "leftrightarrow"), "\\iff "),
    **dict.fromkeys(("bot",), "\\perp "),
    **dict.fromkeys(("measuredangle",), "\\angle "),
    **dict.fromkeys(("Delta", "bigtriangleup"), "\\triangle "),
    **dict.fromkeys(("varnothing",), "\\emptyset "),
    **dict.fromkeys(("mid", "vert", "lvert", "rvert"), "|"),
    **dict.fromkeys(("lbrack",), "["),
    **dict.fromkeys(("rbrack",), "]"),
    **dict.fromkeys(("langle",), "("),
    **dict.fromkeys(("rangle",), ")"),
    **dict.fromkeys(("ast",), "*"),
    **dict.fromkeys(("colon",), ":"),
    **dict.fromkeys(("Reals", "reals"), "\\R "),
    **dict.fromkeys(("prime",), "'"),
    **dict.fromkeys(("deg", "degrees"), " degrees "),
    **dict.fromkeys(("ohm",), "\\Omega "),
    **dict.fromkeys(("varphi",), "\\phi "),
    **dict.fromkeys(("varepsilon",), "\\epsilon "),
    **dict.fromkeys(("euro",), "€"),
    **dict.fromkeys(("pounds",), "£"),
    **dict.fromkeys(("yen",), "¥"),
    **dict.fromkeys(
        (
            *("big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "biggl", "biggr"),
            *("textstyle", "scriptstyle", "limits", "rm", "bf", "it", "boldmath", "middle"),
            *("thinspace", "enspace", "nobreakspace", "space", "hfill", "limits", "nolimits"),
        ),
        " ",
    ),
}
_COMMAND = re.compile(r"\\([a-zA-Z]+) ?")

# What only changes the look of what stands in its braces.
_DRESS = re.compile(
    r"\\(?:text\w*|math(?:rm|bf|it|sf|tt|bb|cal|frak|normal)|bm|boldsymbol|pmb|emph|underline|ce"
    r"|mbox|hbox|operatorname\*?|boxed|fbox|ensuremath|vec|overrightarrow)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_REALS = re.compile(r"\\mathbb ?\{? ?R ?\}?")  # R alone may be an option's letter
# a line over letters names a segment; over digits behind a point it repeats them
_OVERLINE = re.compile(r"\\(?:overline|bar)\s*\{([A-Za-z ]{1,6})\}")

# Mathematics mode anywhere in the text. "$5 to $10" has none: no blank stands before a closing $.
_MATHEMATICS = re.compile(r"(?<!\\)\$\$?(?=\S)([^$]*?)(?<=[^\s\\])\$\$?(?!\d)")
_WIDE_MATHEMATICS = re.compile(r"^\s*\$\$?([^$]*)\$\$?\s*$")
_MARKUP = re.compile(r"\*\*|__|`|</?(?:b|i|strong|em|answer|sub)>|\\[()]|\\\[|\\\](?!\d)", re.I)
_MARKUP_SIGN = re.compile(r"[*_`<\\]")

_ROWS = re.compile(
    r"\\begin\{([pbvBV]?)(?:small)?(?:matrix|array)\}(?:\{[lcr| ]*\})?(.*?)"
    r"\\end\{[pbvBV]?(?:small)?(?:matrix|array)\}",
    re.S,
)
_ROW_END = re.compile(r"\\\\(?:\[[^\]]{0,9}\])?|\\cr\b")


def _matrix_in_brackets(match: re.Match) -> str:
    """A match of _ROWS as nested brackets: [[1, 2], [3, 4]]; a determinant in bars."""
    rows = [row for row in _ROW_END.split(match[2].replace("\\hline", "")) if row.strip()]
    inside = ", ".join(f"[{', '.join(row.split('&'))}]" for row in rows)
    return f"|{inside}|" if match[1] in ("v", "V") else f"[{inside}]"


# a system of equations, or one equation over several lines, is a list
_CASES = re.compile(r"\\begin\{(?:cases|aligned|array|gathered)\}(.*?)\\end\{\w+\}", re.S)


def _cases_as_list(match: re.Match) -> str:
    return ", ".join(row.replace("&", "").strip(" ,") for row in _ROW_END.split(match[1]))


def _undressed(text: str) -> str:
    """The text without commands that only change its look, three deep."""
    for _ in range(3):
        text, changes = _DRESS.subn(r" \1 ", text)
        if not changes:
            break
    return text


def _synonym(match: re.Match) -> str:
    return _SYNONYMS.get(match[1], match[0])


def _one_latex(text: str) -> str:
    """LaTeX in one spelling, beyond what plain_latex does."""
    if "\\begin" in text:
        text = _CASES.sub(_cases_as_list, _ROWS.sub(_matrix_in_brackets, text))
    if "$" in text:
        text = _MATHEMATICS.sub(r" \1 ", _WIDE_MATHEMATICS.sub(r"\1", text))
    if _MARKUP_SIGN.search(text):
        text = _MARKUP.sub(" ", text)
    if "\\" in text:
        text = _undressed(_REALS.sub(r"\\R ", text))
        text = _COMMAND.sub(_synonym, text)
        text = text.replace("\\|", " \\parallel ").replace("\\:", " ").replace("\\&", " & ")
        text = _OVERLINE.sub(r"\1", text.replace("\\_", "_").replace("\\#", "#"))
    return text


# ----------------------------------------------------------------------------- ASCII's spellings

# Applied in this order, to what plain_latex gives.
_RELATIONS = _rules(
    ("<=>", r" ?<=> ?", r" \\iff "),
    ("=", r"<=|=<", r"\\le "),
    (">=", r">=", r"\\ge "),
    ("!=", r"!=", r"\\ne "),
    ("=/=", r"=/=", r"\\ne "),
    ("<>", r"<>", r"\\ne "),
    ("\\not", r"\\not ?=", r"\\ne "),
    ("\\not", r"\\not ?>", r"\\ngtr "),
    ("\\not", r"\\not ?<", r"\\nless "),
    ("\\not", r"\\not ?\\(?=[a-z])", r"\\not"),
    ("->", r"-+>", r" \\to "),
    ("+/-", r"\+/-", r"\\pm "),
    ("+-", r"\+-(?=[\d\\ ])", r"\\pm "),
    ("//", r"(?<=[A-Za-z]) ?// ?(?=[A-Za-z])", r" \\parallel "),
    ("||", r"(?<=[A-Za-z]) ?\|\| ?(?=[A-Za-z])", r" \\parallel "),
    (":", r"(?<=\d)\{?:\}?(?=\d)|\{:\}", ":"),
    ("degrees", r"degrees(?=[CF]\b)", "degrees "),
    (" -", r"(?<=\w) -(?=[a-z]{3})", "-"),  # \text{the } y\text{-axis}
    ("infty", r"(?<![\w)}\\ ]) ?\+ ?(?=\\infty)", ""),
    ("\\", r"\\(?=[$%&#_])", ""),
)
_WORDS = _rules(
    ("", r"\b(?i:plus or minus)\b", r"\\pm "),
    ("", r"(?i:\bis )?(?<!\\)\b(?i:parallel)(?i: (?:to|with))? (?=[A-Z])", r" \\parallel "),
    ("", r"(?i:\bis )?(?<!\\)\b(?i:perpendicular)(?i: to)? (?=[A-Z])", r" \\perp "),
    ("", r"(?<!\\)(?i:\b(?:m ?)?(?:the )?angle )(?=[A-Z]{1,3}\b|\d\b)", r"\\angle "),
    ("", r"\bm ?\\angle ?", r"\\angle "),
    ("", r"(?<!\\)(?i:\b(?:the )?triangle )(?=[A-Z]{3}\b)", r"\\triangle "),
    ("", r"(?<!\\)(?i:\b[+]?infinity\b)", r"\\infty "),
    ("", r"(?i: ?\bper ?cent\b|\bpct\b)", "%"),
    ("", r"(?<=\d) [xX] (?=\d)", "*"),
)
_HAS_WORDS = re.compile(r"parallel|perpend|angle|infinity|per ?cent|pct|plus or|\d x \d", re.I)
_TIE = re.compile(r"(?<=\d)\s?~\s?(?=\d)")
_SIMILAR = re.compile(r"(?<=[A-Z]) ~ ?(?=[A-Z\\])")


_PLAIN_ALREADY = re.compile(r"[\d.,() -]+|[A-Za-z]{1,2}|[(]?[A-Za-z][).]?|\d+ [a-z]{1,3}")


def tidy(text: str) -> str:
    """One answer in one spelling, without quotes around it and without a final stop."""
    if _PLAIN_ALREADY.fullmatch(text):  # most answers: a number, a letter, a word
        return _without_stop(" ".join(text.split()))
    if not text.isascii():
        text = _ascii_signs(text)
    if "~" in text:
        text = _SIMILAR.sub(r" \\sim ", _TIE.sub("-", text))
    text = _apply(_RELATIONS, plain_latex(_one_latex(text)))
    if _HAS_WORDS.search(text):
        text = _apply(_WORDS, text)
    return _without_stop(" ".join(text.split()))


def _without_stop(text: str) -> str:
    """The text without a final stop and quotes around it; "12!" and "n!" keep their sign."""
    text = text.strip().rstrip(".,;: ").lstrip(": ")
    if text.endswith("!") and text[-3:-1].isalpha():
        text = text.rstrip("!")
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip(".,;: ")
    return text.strip()
