"""Hints from the model itself: where it looked, and how it went on, when it was right.

The model is the one that is to be trained; no expert is asked. Its verified response to a question
is the data's worked solution, where there is one, or its own right ones among some draws. Where it
looked is read by plumbing.attention, how it went on is asked in words (METHOD). Neither may hold
the answer: the rules for hints are those of any other source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hints import Hint, Rejected, attention_hint, without_thinking
from plumbing.attention import (
    choose_layers,
    layer_count,
    layer_maps,
    layer_scores,
    maps_of_images,
    reasoning_tokens,
)
from plumbing.experts import TEMPERATURE
from plumbing.hint_rules import broken_rules
from plumbing.places import place_words
from plumbing.spoilers import find_spoilers
from rollout import (
    Prompt,
    Question,
    encode_prompts,
    sample_groups,
    student_messages,
    user_turn,
    verify,
)

TOGETHER = 16  # questions that draw at a time
SAME_PLACE = 0.5  # least correlation of maps that look at the same place; ours
LAYER_QUESTIONS = 48  # questions whose responses choose the layers
MAPS_PER_SIDE = 4  # maps of right and of wrong responses per question, for the layers

METHOD = """\
Below is your correct solution of this question. Describe its method to a student who has not seen
it: one to four lines, one step per line, in order, imperative and concise. Say what to look for,
read, compare, count or set in relation. Write no number, no name or value of anything that you
found, and no part of the answer."""
LIST_MARK = re.compile(r"^\s*(?:[-*•]|\(?\d+[.):]|step \d+[.:])\s*", re.I)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


# ------------------------------------------------------------------------------ right responses
@dataclass(frozen=True)
class Drawn:
    """One response of the model to a question. ids: its tokens, EOS included."""

    ids: list[int]
    text: str
    correct: bool


@dataclass
class OwnResponses:
    """A model's own responses to questions, verified, each drawn once.

    model, processor: of the model to be trained. samples: draws per question. max_new_tokens: the
    longest response; a longer one is cut, and then wrong. drawn: by the question's id.
    """

    model: object
    processor: object
    samples: int
    max_new_tokens: int
    drawn: dict[str, list[Drawn]] = field(default_factory=dict)

    def draw(self, questions: list[Question]) -> None:
        """Draw responses to the questions that have none, at temperature 1.

        The draws depend on the question's id alone: order and a second run change nothing.
        """
        questions = [question for question in questions if question.id not in self.drawn]
        prompts = self.prompts(questions)
        groups = sample_groups(
            self.model,
            self.processor,
            prompts,
            self.samples,
            max_new_tokens=self.max_new_tokens,
            keys=[f"{question.id}-own" for question in questions],
        )
        for question, group in zip(questions, groups, strict=True):
            self.drawn[question.id] = [
                Drawn(response.ids, response.text, verify(response.text, question))
                for response in group
            ]

    def prompts(self, questions: list[Question]) -> list[Prompt]:
        """The questions as the student reads them."""
        chats = [student_messages(question) for question in questions]
        return encode_prompts(self.processor, questions, chats)

    def reasonings(self, responses: list[Drawn]) -> list[tuple[int, ...]]:
        """The responses' tokens before the answer: those that differ, and that are two or more."""
        tokens = [reasoning_tokens(self.processor.tokenizer, one.ids) for one in responses]
        return [one for one in dict.fromkeys(map(tuple, tokens)) if len(one) >= 2]

    def maps(
        self, prompt: Prompt, reasonings: list[tuple[int, ...]], layers: tuple | None = None
    ) -> Tensor:
        """plumbing.attention.layer_maps of each: (reasonings, layers, image tokens), on the CPU."""
        pad = self.processor.tokenizer.pad_token_id
        maps = [
            layer_maps(self.model, prompt, list(tokens), pad, layers).cpu() for tokens in reasonings
        ]
        return torch.stack(maps)


# --------------------------------------------------------------------------------- the layers
def scores_of_layers(own: OwnResponses, questions: list[Question]) -> Tensor:
    """plumbing.attention.layer_scores of the model's responses to questions: (questions, layers).

    Those questions count that have images, two different right responses and a wrong one.
    """
    scores = [torch.zeros(0, layer_count(own.model))]
    questions = [question for question in questions if question.images]
    for start in range(0, len(questions), TOGETHER):
        some = questions[start : start + TOGETHER]
        own.draw(some)
        for prompt in own.prompts(some):
            right, wrong = (_some_reasonings(own, prompt, correct) for correct in (True, False))
            if len(right) >= 2 and wrong:
                maps = own.maps(prompt, right), own.maps(prompt, wrong)
                scores.append(layer_scores(*maps)[None])
    return torch.cat(scores)


def _some_reasonings(own: OwnResponses, prompt: Prompt, correct: bool) -> list[tuple[int, ...]]:
    """The first MAPS_PER_SIDE different reasonings of right or of wrong responses."""
    drawn = own.drawn[prompt.question.id]
    return own.reasonings([one for one in drawn if one.correct == correct])[:MAPS_PER_SIDE]


def layers_for(
    own: OwnResponses, questions: list[Question], name: str, cache: Path
) -> tuple[int, ...]:
    """The layers of the model `name`: those in the file `cache`, or chosen now and kept there.

    All layers, and no file, where the responses do not tell them apart. Prints which.
    """
    if cache.exists():
        saved = json.loads(cache.read_text("utf-8"))
        if saved["model"] == name:
            print(f"layers {_listed(saved['layers'])}, from {cache}")
            return tuple(saved["layers"])
    some = questions[:LAYER_QUESTIONS]
    print(f"{own.samples} responses to each of {len(some)} questions choose the layers")
    scores = scores_of_layers(own, some)
    layers = choose_layers(scores)
    if len(layers) == layer_count(own.model):
        print(f"all layers: {len(scores)} questions did not tell them apart")
        return layers
    means = [round(mean, 3) for mean in scores.mean(0).tolist()]
    record = {"model": name, "layers": layers, "questions": len(scores), "scores": means}
    cache.write_text(json.dumps(record) + "\n", "utf-8")
    print(f"layers {_listed(layers)}, chosen by {len(scores)} questions and kept in {cache}")
    return layers


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


# ------------------------------------------------------------------------------------- the hints
@dataclass
class OwnHints:
    """Records of hints from the model itself, for plumbing.hint_file.write_hints.

    own: the responses. layers: those to read. questions: all that will be asked for, in order, as
    some draw together. tries: attempts at the steps in words. name_place: see
    hints.attention_hint. parts: hint_parts(question, response) for a model that cannot be asked
    for the steps (toy.own_hints); None: it is asked.
    """

    own: OwnResponses
    layers: tuple[int, ...]
    questions: list[Question]
    tries: int = 3
    name_place: Callable[..., str] = place_words
    parts: Callable[[Question, str], dict] | None = None

    def record(self, question: Question) -> tuple[dict, list[Tensor]]:
        """The line of a question for the hints file, without its author, and the maps.

        response: the own response that was read, or None, as where the data has a solution.
        """
        record = {"hint": None, "rejected": [], "boxes": [], "response": None}
        try:
            right = self._verified(question)
            if not question.solution:
                record["response"] = right[0].text
            maps = self._maps(question, right)
        except Rejected as reason:
            return record | {"rejected": [[str(reason)]]}, []
        hint, reasons, boxes = attention_hint(question, maps, self.name_place)
        rejected = [reasons] if reasons else []
        if hint:
            hint, rejected = self._with_steps(question, right[0].text, hint)
            record["hint"] = asdict(hint)
        return record | {"rejected": rejected, "boxes": boxes}, maps

    def _verified(self, question: Question) -> list[Drawn]:
        """The data's solution, or the own right responses. Raises Rejected where there is none."""
        if not question.images:
            raise Rejected("no picture to look at")
        if question.solution:
            tokenizer = self.own.processor.tokenizer
            ids = tokenizer(question.solution, add_special_tokens=False)["input_ids"]
            return [Drawn(ids, question.solution, True)]
        if question.id not in self.own.drawn:
            self._draw_with_others(question)
        drawn = self.own.drawn.pop(question.id)
        right = [one for one in drawn if one.correct]
        if not right:
            raise Rejected(f"no right response: none of {len(drawn)}")
        return right

    def _draw_with_others(self, question: Question) -> None:
        """Draw for this question and for those behind it that will need it."""
        ids = [other.id for other in self.questions]
        waiting = [
            other
            for other in self.questions[ids.index(question.id) :]
            if other.images and not other.solution and other.id not in self.own.drawn
        ]
        self.own.draw(waiting[:TOGETHER])

    def _maps(self, question: Question, right: list[Drawn]) -> list[Tensor]:
        """One map per image, the mean of the responses'. Raises Rejected where they disagree.

        A response can be right by chance, from a wrong place. Of two that look at different places
        one did so, and nothing here tells which.
        """
        reasonings = self.own.reasonings(right)
        if not reasonings:
            raise Rejected("no reasoning before the answer")
        [prompt] = self.own.prompts([question])
        heat = self.own.maps(prompt, reasonings, self.layers).mean(1)  # (responses, image tokens)
        if len(heat) > 1 and torch.corrcoef(heat).min() < SAME_PLACE:
            raise Rejected("right responses look at different places")
        merge_size = self.own.processor.image_processor.merge_size
        return maps_of_images(heat.mean(0), prompt.grid, merge_size)

    def _with_steps(
        self, question: Question, response: str, hint: Hint
    ) -> tuple[Hint, list[list[str]]]:
        """The hint with its other parts, or as it is where none of them passes; the reasons."""
        rejected = []
        for number in range(self.tries):
            if self.parts:
                parts = self.parts(question, response)
            else:
                parts = {"steps": ask_for_steps(self.own, question, response, number)}
            fuller, reasons = _fuller_hint(question, hint, parts)
            if not reasons:
                return fuller, rejected
            rejected.append([f"steps: {reason}" for reason in reasons])
            if self.parts:
                break
        return hint, rejected


def _fuller_hint(question: Question, hint: Hint, parts: dict) -> tuple[Hint, list[str]]:
    """The hint with more parts, and why it must not be used, if so."""
    try:
        hint = Hint(look=hint.look, **parts)
    except ValueError as error:
        return hint, [f"wrong fields: {error}"]
    if not hint.steps:
        return hint, ["none"]
    reasons = find_spoilers(hint.text, question.text, question.answer, question.choices)
    reasons += broken_rules(**asdict(hint), question=question.text, images=question.images)
    known = set(NUMBER.findall(question.text))
    numbers = [number for step in hint.steps for number in NUMBER.findall(step)]
    reasons += [f"a number: {number}" for number in numbers if number not in known][:1]
    return hint, reasons


def ask_for_steps(
    own: OwnResponses, question: Question, response: str, number: int
) -> tuple[str, ...]:
    """The method of a right response in general words, by the model itself: one step per line.

    number: of the try, which has its own draws. Empty where the reply is cut off.
    """
    solution = response.replace("<image>", "").replace("<|", "< |")  # they would be read as tokens
    task = "\n\n".join([question.text, METHOD, f"Solution: {solution}"])
    prompts = encode_prompts(own.processor, [question], [[user_turn(question, task)]])
    [[reply]] = sample_groups(
        own.model,
        own.processor,
        prompts,
        1,
        max_new_tokens=own.max_new_tokens,
        temperature=TEMPERATURE,
        keys=[f"{question.id}-method-{number}"],
    )
    if reply.truncated:
        return ()
    lines = [LIST_MARK.sub("", line).strip() for line in without_thinking(reply.text).splitlines()]
    return tuple(line for line in lines if line)
