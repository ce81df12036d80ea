"""The privileged side: what the teacher may read and the student never does.

A hint says where to look, what to ignore and how to reason, never the answer. It comes with the data, from an expert that is shown the answer
(`build_hint`), or from the frozen model's own attention (`attention_maps`); `find_spoilers` says why one must not be used;
`teacher_messages` is the student's own prompt, same images, same format instruction, with the hint added to the user turn.

    python -m plumbing.build_hints --data D.jsonl --out hints.jsonl --model NAME --api-base URL        # an expert behind an OpenAI-compatible server
    python -m plumbing.build_hints --data D.jsonl --out hints.jsonl --model NAME_OR_PATH               # a local vision-language model as the expert
    python -m plumbing.build_hints --data D.jsonl --out hints.jsonl --model NAME_OR_PATH --source attention        # no expert: where the model itself looks
    python train.py --data D.jsonl --hints hints.jsonl ...

Run it again to go on where it stopped. Each line of the output is one question: its hint, or null with the reasons.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from plumbing.images import open_image
from plumbing.spoilers import find_spoilers
from rollout import Question, collate, encode_prompts, response_states, student_messages, user_turn


# ------------------------------------------------------------------------------------------------------------------- hints
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
            if isinstance(phrases, str) or not all(
                isinstance(p, str) and p.strip() for p in phrases
            ):
                raise ValueError(
                    f"hint field {part!r} must be a list of non-empty texts, got {phrases!r}"
                )
            if any(
                "<image>" in p or "<|" in p for p in phrases
            ):  # they would change how many images the prompt has
                raise ValueError(f"hint field {part!r} holds a special token: {phrases!r}")
            object.__setattr__(self, part, tuple(p.strip() for p in phrases))
        if not (self.look or self.ignore or self.steps):
            raise ValueError("a hint needs at least one of look, ignore, steps")

    def render(self) -> str:
        """The hint as the teacher reads it. The only template there is."""
        parts = (("Look at", self.look), ("Ignore", self.ignore), ("Steps", self.steps))
        return "\n".join(
            ["Hint:"]
            + [
                f"- {name}: {'; '.join(p.rstrip('.') for p in phrases)}."
                for name, phrases in parts
                if phrases
            ]
        )

    @property
    def text(self) -> str:
        """All phrases, for the spoiler check."""
        return "; ".join((*self.look, *self.ignore, *self.steps))

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
            raise ValueError(
                f"a hint is a text or an object with look, ignore, steps; got {type(value).__name__}"
            )
        unknown = set(value) - {"look", "ignore", "steps"}
        if unknown:
            raise ValueError(
                f"unknown hint field {sorted(unknown)[0]!r}; known: look, ignore, steps"
            )
        if not all(isinstance(part, (list, tuple)) for part in value.values()):
            raise ValueError("hint fields look, ignore and steps are lists of texts")
        return cls(**{name: tuple(part) for name, part in value.items()})


# What the teacher reads instead of a hint, for the paper's comparisons; "none": the student's own prompt
CONTEXTS = ("hint", "answer", "solution", "none")


def teacher_messages(sample: Question, context: str = "hint") -> list[dict] | None:
    """The teacher's prompt: the student's, images and format instruction included, with `context` in the user turn. None where the sample
    lacks what the context needs: it is then never tutored."""
    text = {
        "hint": sample.hint and sample.hint.render(),
        "answer": f"The answer is {sample.answer}.",
        "solution": sample.solution and f"A solution: {sample.solution}",
        "none": "",
    }[context]
    return None if text is None else student_messages(sample, text)


def screen_hints(samples: list[Question], tokenizer, max_tokens: int) -> dict[str, list[str]]:
    """Take from the samples every hint that holds a spoiler or is longer than max_tokens: -> the ids, by reason. Never cuts a hint."""
    dropped = {"spoilers": [], "too long": []}
    for sample in samples:
        if sample.hint and find_spoilers(
            sample.hint.text, sample.text, sample.answer, sample.choices
        ):
            dropped["spoilers"].append(sample.id)
        elif sample.hint and len(tokenizer(sample.hint.render())["input_ids"]) > max_tokens:
            dropped["too long"].append(sample.id)
        else:
            continue
        sample.hint = None
    return dropped


# ---------------------------------------------------------------------------------------------------------- the spoiler check


# ------------------------------------------------------------------------------------------------------- hints from an expert
INSTRUCTION = """You write hints for a tutor. You are shown a picture, a question and its verified answer. The answer is for your eyes
only: whoever reads the hint must still have to find it. Reply with one JSON object and nothing else:
{"look": [...], "ignore": [...], "steps": [...]}
look: one to three phrases, the regions, objects and relations that matter. ignore: up to three phrases, what distracts. steps: one to
four phrases in order, what to compare, read or count; directions, not a worked solution. Imperative, 40 to 150 words in all.
Never write: the answer or any part of it, in any form; an option's letter or text; a count, value or intermediate result that you
found; the name of an object if that name is the answer; "the answer is". A number that stands in the question may be cited."""
LONGEST_HINT = 200  # words; the instruction asks for at most 150


class Rejected(Exception):
    """A reply that is no usable hint. str: the reason, "kind: detail"."""


class NoReply(Exception):
    """The expert could not be reached; nothing was learnt about this question."""


def parse_reply(reply: str) -> Hint:
    """The hint in an expert's reply: a JSON object, alone or in a code fence, behind any closed thinking. Raises Rejected."""
    text = reply.rpartition("</think>")[2].strip()
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", text, re.S)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise Rejected("not a JSON object") from None
    if not isinstance(value, dict):
        raise Rejected("not a JSON object")
    try:
        hint = Hint.from_json(value)
    except (ValueError, TypeError) as error:
        raise Rejected(f"wrong fields: {error}") from None
    if (words := len(hint.render().split())) > LONGEST_HINT:
        raise Rejected(f"too long: {words} words")
    return hint


def build_hint(ask, sample: Question, max_tries: int = 3) -> tuple[Hint | None, list[list[str]]]:
    """Ask an expert for a hint until one passes: -> the hint, or None after max_tries, and for each rejected reply its reasons.

    ask(sample, messages) -> reply text; messages are a chat with {"type": "image"} parts. It may raise Rejected (a refusal, a reply cut
    off), which costs a try, or NoReply, which is passed on. After a rejection the chat goes on with the reasons. PAPER: hints are built
    offline, the answer is private to the builder, and what breaks a rule is asked for again.
    """
    task = f"{INSTRUCTION}\n\nQuestion: {sample.text}\n"
    task += "".join(f"({chr(65 + i)}) {choice}\n" for i, choice in enumerate(sample.choices or ()))
    messages, rejected = (
        [user_turn(sample, f"{task}Verified answer (never in the hint): {sample.answer}")],
        [],
    )
    for _ in range(max_tries):
        reply = ""
        try:
            reply = ask(sample, messages)
            hint = parse_reply(reply)
            if not (found := find_spoilers(hint.text, sample.text, sample.answer, sample.choices)):
                return hint, rejected
        except Rejected as reason:
            found = [str(reason)]
        rejected.append(found)
        again = {
            "role": "user",
            "content": [
                {
                    "type": "text",
                    "text": f"Rejected: {'; '.join(found)}. Write the JSON object anew, by the rules.",
                }
            ],
        }
        said = {
            "role": "assistant",
            "content": [
                {"type": "text", "text": reply.rpartition("</think>")[2].strip() or "(nothing)"}
            ],
        }
        messages = [*messages[:1], said, again]
    return None, rejected


# ---------------------------------------------------------------------------------------------- hints from the model's attention
@torch.no_grad()
def attention_maps(
    model, processor, sample: Question, layers: tuple[int, int] | None = None
) -> list[Tensor]:
    """Where the model looks when it reads question and answer: one map (h, w) an image, a cell a visual token, the mean over cells 1.

    Attention from the answer's tokens to the image's, averaged over tokens, heads and `layers` (first, last; default: the middle half),
    divided by the same for a neutral question: what any prompt draws, borders above all, cancels (the relative attention of
    arXiv 2502.17422). Costs one pass over each prompt; the weights of one layer, (heads, P, P), are in memory at a time.
    """
    decoder = model.model.language_model
    first, last = layers or (len(decoder.layers) // 4, (3 * len(decoder.layers) - 1) // 4)
    if not 0 <= first <= last < len(decoder.layers):
        raise ValueError(
            f"layers {first}-{last}: the model has layers 0 to {len(decoder.layers) - 1}"
        )
    neutral = replace(sample, text="Describe the image.")
    prompts = encode_prompts(
        processor, [sample, neutral], [student_messages(sample), student_messages(neutral)]
    )
    tokens = processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    ids = [
        *tokens,
        processor.tokenizer.eos_token_id,
    ]  # the last one is not read: it makes all of the answer's be
    seen, before = [], model.config.text_config._attn_implementation
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda module, args, out: seen.append(out[1][:, :, -len(tokens) :].float().mean((1, 2)))
        )
        for layer in decoder.layers[first : last + 1]
    ]
    model.set_attn_implementation({"text_config": "eager"})  # the only one that returns weights
    try:
        batch = collate(prompts, [ids, ids], processor.tokenizer.pad_token_id, model.device)
        response_states(model, batch)
    finally:
        model.set_attn_implementation({"text_config": before})
        for hook in hooks:
            hook.remove()
    weights = torch.stack(seen[len(hooks) :]).mean(
        0
    )  # (2, P + A): the second pass, over the answer, comes after the prompts'
    asked, ground = (
        row[: types.shape[0]][types.bool()]
        for row, types in zip(weights, batch.prompts["mm_token_type_ids"])
    )
    heat, maps, merge = (
        (asked / ground.clamp(min=1e-9)).cpu(),
        [],
        processor.image_processor.merge_size,
    )
    for _, h, w in prompts[0].grid.tolist():
        size = h * w // merge**2
        maps.append(heat[:size].view(h // merge, w // merge))
        heat = heat[size:]
    return [m / m.mean() for m in maps]


def regions(heat: Tensor, most: int = 3) -> list[tuple[int, int, int, int]]:
    """The hottest connected areas of a map (h, w) as boxes (left, top, right, bottom) in cells, right and bottom excluded, hottest first.

    A cell is hot above the mean plus one standard deviation; the areas are ranked by their summed heat.
    """
    hot = (heat > heat.mean() + heat.std(unbiased=False)).tolist()
    found = []
    for r, row in enumerate(hot):
        for c in range(len(row)):
            area, todo = [], [(r, c)]
            while todo:
                y, x = todo.pop()
                if 0 <= y < len(hot) and 0 <= x < len(row) and hot[y][x]:
                    hot[y][x] = False
                    area.append((y, x))
                    todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
            if area:
                ys, xs = zip(*area)
                found.append(
                    (
                        sum(heat[y, x].item() for y, x in area),
                        (min(xs), min(ys), max(xs) + 1, max(ys) + 1),
                    )
                )
    return [box for _, box in sorted(found, reverse=True)[:most]]


_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def place_words(box: tuple[int, int, int, int], shape: tuple[int, int], exact: bool = True) -> str:
    """A box of cells in a map of `shape` (h, w) in words: "the upper left", "the third column from the left". exact False: no ordinals."""
    (left, top, right, bottom), (h, w) = box, shape
    for low, high, size, across, name, side in (
        (top, bottom, h, right - left >= 0.8 * w, "row", "top"),
        (left, right, w, bottom - top >= 0.8 * h, "column", "left"),
    ):
        if (
            across
            and exact
            and size % (high - low) == low % (high - low) == 0
            and 2 <= size // (high - low) <= len(_ORDINALS)
        ):
            return f"the {_ORDINALS[low // (high - low)]} {name} from the {side}"
    y, x = ((low + high) / 2 / size for low, high, size in ((top, bottom, h), (left, right, w)))
    down = "" if bottom - top >= 0.8 * h else ("upper", "middle", "lower")[min(2, int(3 * y))]
    over = "" if right - left >= 0.8 * w else ("left", "middle", "right")[min(2, int(3 * x))]
    if down and over:
        return "the middle of the picture" if down == over else f"the {down} {over}"
    return (
        f"the {down or over} part, from {'left to right' if down else 'top to bottom'}"
        if down or over
        else "the whole picture"
    )


def attention_hint(
    model, processor, sample: Question, layers=None
) -> tuple[Hint | None, list[str], list[Tensor], list[list]]:
    """A hint that names the regions of attention_maps: -> hint or None, reasons, maps, and the boxes of each image in its pixels."""
    maps = attention_maps(model, processor, sample, layers)
    boxes = [regions(heat) for heat in maps]
    for exact in (True, False):  # "the third column" may be the answer: then without ordinals
        look = [
            f"{place_words(box, heat.shape, exact)}{f' of the {_ORDINALS[min(n, 5)]} picture' if len(maps) > 1 else ''}"
            for n, (heat, found) in enumerate(zip(maps, boxes))
            for box in found
        ]
        look = [words for words in dict.fromkeys(look) if "whole picture" not in words]
        hint = Hint(look=look) if look else None
        reasons = (
            find_spoilers(hint.text, sample.text, sample.answer, sample.choices)
            if hint
            else ["no region stands out"]
        )
        if not reasons:
            break
    pixels = []
    for image, heat, found in zip(sample.images, maps, boxes):
        (width, height), (h, w) = open_image(image).size, heat.shape
        pixels.append(
            [
                [
                    round(left * width / w),
                    round(top * height / h),
                    round(right * width / w),
                    round(bottom * height / h),
                ]
                for left, top, right, bottom in found
            ]
        )
    return (None if reasons else hint), reasons, maps, pixels


# ------------------------------------------------------------------------------------------------------- the file and the command
