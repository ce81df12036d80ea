"""The privileged side: what the teacher may read and the student never does.

A hint says where to look, what to ignore and how to reason, never the answer (paper 2.3). It comes
with the data, from an expert model that is shown the answer (`build_hint`), or, ours, from where
the model itself looked while it wrote a right response (`attention_hint`). `teacher_messages` is
the student's own chat, with the same images and the same format instruction, plus the hint.
plumbing.spoilers says why a hint must not be used, plumbing.hint_rules why the builder asks for
another one.

    python -m plumbing.build_hints --data D.jsonl --out hints.jsonl --model NAME --api-base URL
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import Tensor

from plumbing.hint_rules import broken_rules
from plumbing.images import open_image
from plumbing.places import ORDINALS, in_pixels, place_words, regions
from plumbing.spoilers import find_spoilers
from rollout import Question, chat, student_messages, user_turn


# ------------------------------------------------------------------------------------------- hints
@dataclass(frozen=True)
class Hint:
    """Privileged guidance in three parts, each a tuple of short phrases, at least one not empty.

    look: regions, objects and relations to attend to. ignore: distractors. (The paper's spatial
    guidance.) steps: high-level directions, in order (its textual guidance). The split into three
    fields is ours. Raises ValueError for anything else.
    """

    look: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()

    def __post_init__(self):
        for part in ("look", "ignore", "steps"):
            phrases = getattr(self, part)
            is_text = isinstance(phrases, str)
            if is_text or not all(isinstance(p, str) and p.strip() for p in phrases):
                raise ValueError(
                    f"hint field {part!r} must be a list of non-empty texts, got {phrases!r}"
                )
            # they would change how many images the prompt has; |x|<|y| is no token
            if any(re.search(r"<image>|<\|\w{2,}\|>", phrase) for phrase in phrases):
                raise ValueError(f"hint field {part!r} holds a special token: {phrases!r}")
            object.__setattr__(self, part, tuple(phrase.strip() for phrase in phrases))
        if not (self.look or self.ignore or self.steps):
            raise ValueError("a hint needs at least one of look, ignore, steps")

    @property
    def text(self) -> str:
        """All phrases in one line, for the spoiler check."""
        return "; ".join((*self.look, *self.ignore, *self.steps))

    def render(self) -> str:
        """The hint as the teacher reads it. There is no other template."""
        lines = ["Hint:"]
        for name, phrases in (
            ("Look at", self.look),
            ("Ignore", self.ignore),
            ("Steps", self.steps),
        ):
            if phrases:
                lines.append(f"- {name}: {'; '.join(phrase.rstrip('.') for phrase in phrases)}.")
        return "\n".join(lines)

    @classmethod
    def from_json(cls, value: str | dict) -> Hint:
        """From an object (or its JSON text) with look, ignore, steps; another text is one step.

        A part may be missing or None. Raises ValueError that names the wrong field.
        """
        if isinstance(value, str):
            if not value.lstrip().startswith("{"):
                return cls(steps=(value,))
            value = json.loads(value)
        if not isinstance(value, dict):
            raise ValueError(
                "a hint is a text or an object with look, ignore, steps; "
                f"got {type(value).__name__}"
            )
        value = {name: part for name, part in value.items() if part is not None}
        unknown = sorted(set(value) - {"look", "ignore", "steps"})
        if unknown:
            raise ValueError(f"unknown hint field {unknown[0]!r}; known: look, ignore, steps")
        if not all(isinstance(part, (list, tuple)) for part in value.values()):
            raise ValueError("hint fields look, ignore and steps are lists of texts")
        return cls(**{name: tuple(part) for name, part in value.items()})


# What the teacher reads besides the question. All but "hint" are for the paper's comparisons;
# "none" is the student's own chat.
CONTEXTS = ("hint", "answer", "solution", "none")


def teacher_messages(question: Question, context: str = "hint") -> list[dict] | None:
    """The teacher's chat x^h = [x; h] (Eq. 9): the student's, plus the chosen context.

    solution: the worked solution alone; --study-hints adds the answer, as figures 3 and 5 do. None
    where the question lacks what the context needs: it is then never tutored. Raises ValueError for
    an unknown context.
    """
    if context not in CONTEXTS:
        raise ValueError(f"context must be one of {', '.join(CONTEXTS)}, got {context!r}")
    if context == "none":
        return student_messages(question)
    if context == "answer":
        return chat(question, f"The answer is {question.answer}.")
    if context == "solution":
        return chat(question, f"A solution: {question.solution}") if question.solution else None
    return chat(question, question.hint.render()) if question.hint else None


def screen_hints(questions: list[Question], tokenizer, max_tokens: int) -> dict[str, list[str]]:
    """Take away every hint that holds a spoiler or is longer than max_tokens; none is cut.

    Returns the questions' ids by reason. A question without a hint stays and is never tutored. The
    rules of plumbing.hint_rules are the builder's: a hint that comes with the data need not keep
    them.
    """
    dropped = {"spoilers": [], "too long": []}
    for question in questions:
        if question.hint is None:
            continue
        if find_spoilers(question.hint.text, question.text, question.answer, question.choices):
            reason = "spoilers"
        elif len(tokenizer(question.hint.render())["input_ids"]) > max_tokens:
            reason = "too long"
        else:
            continue
        dropped[reason].append(question.id)
        question.hint = None
    return dropped


# --------------------------------------------------------------------------- hints from an expert
# The paper's three constraints and two kinds of guidance (2.3, appendix C), in our own words.
INSTRUCTION = """\
You write hints for a tutor. You are shown a question, its picture if it has one, and its verified
answer. The answer is for your eyes only: whoever reads the hint must still have to find it. Reply
with one JSON object and nothing else:
{"look": [...], "ignore": [...], "steps": [...]}
look: one to three phrases, the regions, objects and relations that matter; with a picture at least
one, never just "the picture". ignore: up to three phrases. steps: one to four phrases in order,
high-level directions: what to compare, read, count or set in relation. Three constraints:
1. Truth: each phrase agrees with a correct way to the verified answer.
2. No spoilers. Never write the answer or any part of it, in any form; an option's letter or text; a
count, value or intermediate result that you found; the name of an object if it tells the answer;
"the answer is". Do not carry out the solution. A number of the question may be cited, and a
relation or formula may be named without its result.
3. No traps: name what distracts in the picture and the usual mistakes, so that they can be ignored.
Concise, imperative, 40 to 120 words; a little more where a step is hard to see or reason."""


class Rejected(Exception):
    """A reply that is no usable hint. str: the reason, "kind: detail"."""


class CutOff(Rejected):
    """A reply that reached the token budget."""


class NoReply(Exception):
    """The expert could not be reached; nothing was learnt about this question."""


def without_thinking(reply: str) -> str:
    """A reply without its closed thinking."""
    return reply.rpartition("</think>")[2].strip()


def parse_reply(reply: str) -> Hint:
    """The hint in an expert's reply. Raises Rejected.

    The reply is a JSON object, alone or in a code fence, behind any closed thinking.
    """
    text = without_thinking(reply)
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", text, re.S)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise Rejected("not a JSON object") from None
    if not isinstance(value, dict):
        raise Rejected("not a JSON object")
    try:
        return Hint.from_json(value)
    except (ValueError, TypeError) as error:
        raise Rejected(f"wrong fields: {error}") from None


def build_hint(
    ask: Callable[[Question, list[dict]], str],
    question: Question,
    max_tries: int = 3,
    retry_cut_off: bool = True,
) -> tuple[Hint | None, list[list[str]]]:
    """Ask an expert for a hint until one passes; None after max_tries. Also the reasons, per reply.

    ask(question, chat) -> reply text. The chat has {"type": "image"} parts. `ask` may raise
    Rejected (a refusal), which costs a try, CutOff, which ends the tries where not retry_cut_off,
    or NoReply, which is passed on. A hint passes if it holds no spoiler (plumbing.spoilers), names
    a place to look at where there is a picture, and is no worked solution (plumbing.hint_rules).
    After a rejection the next chat is the task, the rejected reply and the reasons. As in the
    paper, hints are built offline, the answer is the builder's alone, and a hint that breaks a rule
    is made again (2.3, appendix C).
    """
    options = [f"({chr(65 + i)}) {choice}" for i, choice in enumerate(question.choices or ())]
    task = "\n".join([INSTRUCTION, "", f"Question: {question.text}", *options])
    task += f"\nVerified answer (never in the hint): {question.answer}"
    messages, rejected = [user_turn(question, task)], []
    for _ in range(max_tries):
        reply, give_up = "", False
        try:
            reply = ask(question, messages)
            hint = parse_reply(reply)
            reasons = find_spoilers(hint.text, question.text, question.answer, question.choices)
            reasons += broken_rules(**asdict(hint), question=question.text, images=question.images)
        except Rejected as reason:
            reasons = [str(reason)]
            give_up = isinstance(reason, CutOff) and not retry_cut_off
        if not reasons:
            return hint, rejected
        rejected.append(reasons)
        if give_up:
            break
        messages = [messages[0], *_ask_again(reply, reasons)]
    return None, rejected


def _ask_again(reply: str, reasons: list[str]) -> list[dict]:
    """The rejected reply and the request for another one, as two turns."""
    said = without_thinking(reply) or "(nothing)"
    request = f"Rejected: {'; '.join(reasons)}. Write the JSON object anew, by the rules."
    return [
        {"role": "assistant", "content": [{"type": "text", "text": said}]},
        {"role": "user", "content": [{"type": "text", "text": request}]},
    ]


# ----------------------------------------------------------------- hints from the model's attention
def attention_hint(
    question: Question, maps: list[Tensor], name_place: Callable[..., str] = place_words
) -> tuple[Hint | None, list[str], list[list]]:
    """A hint that names the regions where the model looked while it wrote a right response.

    maps: one (h, w) per image, see plumbing.attention. name_place(box of cells, shape of the map,
    exact) -> words. Returns the hint or None, the reasons against one, and each image's boxes in
    pixels.
    """
    boxes = [regions(heat) for heat in maps]
    hint, reasons = _regions_hint(question, maps, boxes, name_place, exact=True)
    if reasons:  # "the third column" may be the answer
        hint, reasons = _regions_hint(question, maps, boxes, name_place, exact=False)
    pixels = [
        [in_pixels(box, heat.shape, open_image(image).size) for box in image_boxes]
        for image, heat, image_boxes in zip(question.images, maps, boxes, strict=True)
    ]
    return (None if reasons else hint), reasons, pixels


def _regions_hint(
    question: Question, maps: list[Tensor], boxes: list[list], name_place, exact: bool
) -> tuple[Hint | None, list[str]]:
    """The regions in words as a hint, and why it must not be used, if so."""
    places = []
    for number, (heat, image_boxes) in enumerate(zip(maps, boxes, strict=True)):
        of_picture = f" of the {ORDINALS[min(number, 5)]} picture" if len(maps) > 1 else ""
        places += [name_place(box, heat.shape, exact) + of_picture for box in image_boxes]
    look = [place for place in dict.fromkeys(places) if "whole picture" not in place]
    if not look:
        return None, ["no region stands out"]
    hint = Hint(look=tuple(look))
    return hint, find_spoilers(hint.text, question.text, question.answer, question.choices)
