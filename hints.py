"""The privileged side: what the teacher may read and the student never does.

A hint says where to look, what to ignore and how to reason, never the answer. `hinted_messages` is the student's own prompt, same
images, same format instruction, with the hint added to the user turn. `find_spoilers` says why a hint must not be used.
"""
from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from rollout import Sample, plain_messages, to_number


@dataclass(frozen=True)
class Hint:
    """Privileged guidance in three parts, each a tuple of short phrases (any part may be empty, not all).

    look: regions, objects and relations to attend to; ignore: distractors; steps: high-level directions, in order.
    """
    look: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()

    def __post_init__(self):
        for part in ("look", "ignore", "steps"):
            phrases = getattr(self, part)
            if isinstance(phrases, str) or not all(isinstance(p, str) and p.strip() for p in phrases):
                raise ValueError(f"hint field {part!r} must be a list of non-empty texts, got {phrases!r}")
            object.__setattr__(self, part, tuple(p.strip() for p in phrases))
        if not (self.look or self.ignore or self.steps):
            raise ValueError("a hint needs at least one of look, ignore, steps")

    def render(self) -> str:
        """The hint as the teacher reads it. The only template there is."""
        parts = (("Look at", self.look), ("Ignore", self.ignore), ("Steps", self.steps))
        return "\n".join(["Hint:"] + [f"- {name}: {'; '.join(p.rstrip('.') for p in phrases)}." for name, phrases in parts if phrases])

    def to_json(self) -> str:
        """One line of JSON with the three lists."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, value: str | dict) -> "Hint":
        """From an object (or its JSON text) with look, ignore, steps; any other text is taken as one step.

        Raises ValueError naming the field that is wrong.
        """
        if isinstance(value, str):
            if not value.lstrip().startswith("{"):
                return cls(steps=(value,))
            value = json.loads(value)
        if not isinstance(value, dict):
            raise ValueError(f"a hint is a text or an object with look, ignore, steps; got {type(value).__name__}")
        unknown = set(value) - {"look", "ignore", "steps"}
        if unknown:
            raise ValueError(f"unknown hint field {sorted(unknown)[0]!r}; known: look, ignore, steps")
        if not all(isinstance(part, (list, tuple)) for part in value.values()):
            raise ValueError("hint fields look, ignore and steps are lists of texts")
        return cls(**{name: tuple(part) for name, part in value.items()})


def hinted_messages(sample: Sample) -> list[dict]:
    """The teacher's context: the student's prompt with the hint in the user turn."""
    return plain_messages(sample, sample.hint.render())


def answer_context(sample: Sample) -> str:
    """What an answer-conditioned teacher is told instead of a hint (for comparison only)."""
    return f"The answer is {sample.answer}."


_NUMBER = re.compile(r"\\[dt]?frac\{\d+\}\{\d+\}|\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?%?")
_RESULT = re.compile(r"(?:=|\bequals|\bis equal to|\bgives|\bmakes)\s*[-+$]?\s*(?:\d|\\[dt]?frac)", re.I)


def find_spoilers(hint: Hint, question: str, answer: str) -> list[str]:
    """Reasons why the hint gives something away; an empty list means that it may be used.

    Rules: no "the answer is"; no computed result ("= 50"); no part of the answer, as text or as an equal number, except a number that
    already stands in the question; no option letter in an option's dress when the answer is a letter.
    """
    text, reasons = hint.render(), []
    if re.search(r"\b(?:final\s+)?answer\s*(?:is|:|=)|\bcorrect\s+(?:option|choice|answer)\b", text, re.I):
        reasons.append("names the answer")
    if _RESULT.search(text):
        reasons.append("states a computed result")
    cited = {to_number(n) for n in _NUMBER.findall(question)}
    given = {to_number(n) for n in _NUMBER.findall(text)} - cited
    for part in re.split(r"\s*(?:[,;]\s+|\band\b)\s*", answer.strip().strip("$()")):
        number = to_number(part)
        if number is not None:
            if abs(number) in given:
                reasons.append(f"holds the answer's number {part}")
        elif re.fullmatch(r"\(?[A-Za-z]\)?\.?", part):
            letter = part.strip("().").upper()
            if re.search(rf"\({letter}\)|\b(?:option|choice|answer)\s+\(?{letter}\b|\b{letter}[).](?=\s|$)", text, re.I if letter not in "AI" else 0):
                reasons.append(f"names the option {letter}")
        elif part and re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text, re.I):
            reasons.append(f"holds the answer's text {part!r}")
    return reasons
