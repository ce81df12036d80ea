r"""Find the final answer in a response: a \boxed{}, a tag, or a line that says so."""

from __future__ import annotations

import re

from plumbing.answer_text import LONGEST_ANSWER

_BOXES = ("\\boxed", "\\fbox", "\\framebox")
# opening tags with their closing ones; the second pair is a special token of GLM models
_TAGS = {"<answer>": "</answer>", "<|begin_of_box|>": "<|end_of_box|>"}

# In characters, from the end of the response: where a line may say what the answer is.
_LAST_LINES = 10 * LONGEST_ANSWER
_MOST_BOXES = 12  # in one row


def extract_answer(text: str) -> str | None:
    r"""The final answer of a response, or None where there is none.

    That is what the last container holds: \boxed{...}, whose braces may nest, \fbox{...} or
    <answer>...</answer>. Boxes with "and" or a comma between them are one list; with "or" between
    them they hedge, and there is no answer. Without a container it is what follows the last
    "answer:", "answer is" or "correct option is", on its line or the next one; a last line in bold
    counts too. Thinking is not looked at, whether its tag is closed or not.
    """
    text = _conclusion(text)
    small = _in_small(text)
    box = max(small.rfind(command) for command in _BOXES)
    starts = {tag: small.rfind(tag) for tag in _TAGS}
    tag = max(starts, key=starts.get)
    if starts[tag] > box:
        start = starts[tag] + len(tag)
        end = small.find(_TAGS[tag], start, start + LONGEST_ANSWER)
        return (text[start:end].strip() or None) if end >= 0 else None
    if box >= 0:
        return _boxed(text, small, box)
    return _said(text[-_LAST_LINES:])


def _in_small(text: str) -> str:
    """The text in small letters, as long as before: lower() makes two letters of one, U+0130."""
    return text.replace("\u0130", "I").lower()


def _conclusion(text: str) -> str:
    """What follows the thinking, up to a thinking that is not closed."""
    small = _in_small(text)
    end_tag = "</think>"
    start = small.rfind(end_tag)
    start = 0 if start < 0 else start + len(end_tag)
    reopened = small.find("<think>", start)
    return text[start:] if reopened < 0 else text[start:reopened]


def unboxed(answer: str) -> str:
    r"""A gold answer without its \boxed{} or <answer>; some datasets store it so."""
    if "\\boxed" in answer or "<answer>" in answer:
        return extract_answer(answer) or answer
    return answer


# --------------------------------------------------------------------------------- containers

_BARE = re.compile(r"-?[^\s$\\{}]+")  # of \boxed 4
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;&、]|\\[,;: ]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|\band\b|\bor\b|和|或"
    r"|\\?[a-zA-Z](?:_\{?\w\}?)? ?=)*"
)
_OR = re.compile(r"\bor\b|或")


def _boxed(text: str, small: str, start: int) -> str | None:
    """The last box, which starts there, with the boxes that stand in one row with it."""
    last = _box_at(text, start)
    if last is None:
        return None
    answers = [last[0]]
    for _ in range(_MOST_BOXES):
        before = max(small.rfind(command, 0, start) for command in _BOXES)
        box = _box_at(text, before) if before >= 0 else None
        between = text[box[1] : start] if box else ""
        if not between or len(between) > 40 or not _BETWEEN_BOXES.fullmatch(between):
            break
        if not re.search(r"[,;、&]|and|和|或|or", between):
            break
        if _OR.search(between):
            return None
        answers.insert(0, box[0])
        start = before
    return ", ".join(answers)


def _box_at(text: str, start: int) -> tuple[str, int] | None:
    """What the box that starts there holds, and where it ends; None where it is not closed."""
    start += re.compile(r"\\[a-zA-Z]+\s*").match(text[start : start + 40]).end()
    if not text.startswith("{", start):
        bare = _BARE.match(text[start : start + LONGEST_ANSWER])
        return (bare[0].rstrip(".,;"), start + bare.end()) if bare else None
    length = _length_in_braces(text[start : start + LONGEST_ANSWER])
    inside = text[start + 1 : start + length - 1].strip() if length else ""
    return (inside, start + length) if inside else None


def _length_in_braces(text: str) -> int:
    """Where the brace that opens the text is closed: "{a{b}} c" -> 6; 0 where it is not."""
    depth = 0
    escaped = False
    for place, character in enumerate(text):
        if escaped or character == "\\":
            escaped = not escaped  # \{ and \} are the braces of a set: they do not group
            continue
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth == 0:
            return place + 1
    return 0  # the response was cut off in the middle of its answer


# -------------------------------------------------------------------------------------- lines

# "answer: 12", "the answer is 12", "the correct option is", "答案是", "故选"
_ANSWER_IS = re.compile(
    r"""
    \b(?:answer|(?:correct|right)[ ](?:option|choice))(?:[ ]to[ ](?:the|this)[ ]\w{1,20})?\s*
    (?: is\b(?:[ ](?:therefore|thus|then|simply|just)\b)? | (?:must|should|would|will)[ ]be\b
      | equals\b | [:=] )
    \s* :?
    | (?:答案|选项) \s* (?:是|为|[:：]) \s* [:：]?
    | (?:故|所以|因此|应|故本题)(?:应)?选(?:择)? \s* [:：]?
    | (?:答え|答) \s* (?:は|[:：]) \s*
    """,
    re.VERBOSE | re.I,
)
_IS_CORRECT = re.compile(
    r"\b((?:option|choice|answer) \(?[A-J]\)?) is (?:the )?(?:correct|right)\b", re.I
)
# a line that only announces the answer, which stands on the next one
_HEADING = re.compile(r"[#\s]*(?:the |my |so,? )*(?:final |correct )*answer[\s:.]*", re.I)
_REASON = re.compile(
    r",? (?:because|since|given that|due to)\b.*|, (?:as|so|which|where|but)\b.*|[。；].*", re.I
)
_NEXT_SENTENCE = re.compile(
    r"(?<!\bDr)(?<!\bMr)(?<!\bSt)(?<!\bNo)(?<=[\w)}%$°])[.] +(?=[A-Z][a-z]).*"
)
_BOLD_LINE = re.compile(r"\*\*([^*]{1,80})\*\*[.]?")
_MARKUP = re.compile(r"\*\*|__|`|^#+ ")
_DISPLAY = ("$$", "\\[", "```")


def _said(text: str) -> str | None:
    """What the last line in bold, or the last line with the word "answer", says."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    bold = _BOLD_LINE.fullmatch(lines[-1])
    if bold and not _ANSWER_IS.search(bold[1]) and not bold[1].endswith((":", "!")):
        return bold[1].strip()
    for place in range(len(lines) - 1, -1, -1):
        line = _MARKUP.sub("", lines[place])
        praised = _IS_CORRECT.search(line)
        if praised:
            return praised[1]
        hits = list(_ANSWER_IS.finditer(line))
        if hits or _HEADING.fullmatch(line):
            answer = line[hits[-1].end() :] if hits else ""
            return _first_clause(answer) or _first_clause(_next_line(lines[place + 1 :]))
    return None


def _next_line(lines: list[str]) -> str:
    """The first line, without its markup; of a formula that is displayed, its first line."""
    texts = (_MARKUP.sub("", line) for line in lines if line not in _DISPLAY)
    return next(texts, "")


def _first_clause(text: str) -> str | None:
    """An answer up to its reason or to the next sentence: "5, because it fits" -> "5"."""
    text = _NEXT_SENTENCE.sub("", _REASON.sub("", text))
    return text.strip() or None
