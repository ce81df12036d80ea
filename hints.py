"""The privileged side: what the teacher may read and the student never does.

A hint says where to look, what to ignore and how to reason, never the answer. It comes with the data, from an expert that is shown the answer
(`build_hint`), or from the frozen model's own attention (`attention_maps`); `find_spoilers` says why one must not be used;
`teacher_messages` is the student's own prompt, same images, same format instruction, with the hint added to the user turn.

    python hints.py --data D.jsonl --out hints.jsonl --model NAME --api-base URL        # an expert behind an OpenAI-compatible server
    python hints.py --data D.jsonl --out hints.jsonl --model NAME_OR_PATH               # a local vision-language model as the expert
    python hints.py --data D.jsonl --out hints.jsonl --model NAME_OR_PATH --source attention        # no expert: where the model itself looks
    python train.py --data D.jsonl --hints hints.jsonl ...

Run it again to go on where it stopped. Each line of the output is one question: its hint, or null with the reasons.
"""
from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import sys
import time
import unicodedata
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from rollout import (Sample, check_boxes, collate, encode_prompts, extract_answer, load_processor, load_samples, open_image, pick_option,
                     plain_latex, plain_messages, quiet_loading, response_states, sample_groups, split_unit, to_number, user_turn)


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
            if isinstance(phrases, str) or not all(isinstance(p, str) and p.strip() for p in phrases):
                raise ValueError(f"hint field {part!r} must be a list of non-empty texts, got {phrases!r}")
            if any("<image>" in p or "<|" in p for p in phrases):       # they would change how many images the prompt has
                raise ValueError(f"hint field {part!r} holds a special token: {phrases!r}")
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


# What the teacher reads instead of a hint, for the paper's comparisons; "none": the student's own prompt
CONTEXTS = ("hint", "answer", "solution", "none")


def teacher_messages(sample: Sample, context: str = "hint") -> list[dict] | None:
    """The teacher's prompt: the student's, images and format instruction included, with `context` in the user turn. None where the sample
    lacks what the context needs: it is then never tutored."""
    text = {"hint": sample.hint and sample.hint.render(), "answer": f"The answer is {sample.answer}.",
            "solution": sample.solution and f"A solution: {sample.solution}", "none": ""}[context]
    return None if text is None else plain_messages(sample, text)


def hinted_messages(sample: Sample) -> list[dict]:
    """The teacher's prompt with the hint, which the sample must have."""
    return teacher_messages(sample)


def audit_views(sample: Sample, other: Hint) -> dict:
    """What a leak audit asks the frozen model about one question, as name -> (sample, its chat's maker): with the picture, then without.

    A hint that lets the answer through helps where there is no picture, more than `other`, the hint of another question, does. (Not: more
    than no hint at all. Any hint makes a model answer in form, and then it is right now and then by chance.)
    """
    blind = replace(sample, images=[], question=sample.question.replace("<image>", ""))
    alone = replace(blind, question="")
    return {"picture + question": (sample, plain_messages), "picture + question + hint": (sample, hinted_messages),
            "question": (blind, plain_messages), "question + hint": (blind, hinted_messages),
            "question + another's hint": (replace(blind, hint=other), hinted_messages),
            "hint": (alone, hinted_messages), "another's hint": (replace(alone, hint=other), hinted_messages)}


def screen_hints(samples: list[Sample], tokenizer, max_tokens: int) -> dict[str, list[str]]:
    """Take from the samples every hint that holds a spoiler or is longer than max_tokens: -> the ids, by reason. Never cuts a hint."""
    dropped = {"spoilers": [], "too long": []}
    for sample in samples:
        if sample.hint and find_spoilers(sample.hint, sample.question, sample.answer, sample.choices):
            dropped["spoilers"].append(sample.id)
        elif sample.hint and len(tokenizer(sample.hint.render())["input_ids"]) > max_tokens:
            dropped["too long"].append(sample.id)
        else:
            continue
        sample.hint = None
    return dropped


# ---------------------------------------------------------------------------------------------------------- the spoiler check
_SMALL = dict(zip("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
                  "nineteen".split(), range(20))) | dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10)))
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10}
_CARDINAL = rf"(?:an? (?=dozen|hundred|thousand))?(?:{'|'.join(sorted([*_SMALL, *_SCALES], key=len, reverse=True))})"
_CARDINAL = rf"{_CARDINAL}(?:(?:-| and | )?\b{_CARDINAL}\b){{0,8}}"            # bounded: a long run of such words must not cost its square
_FRACTION = re.compile(rf"\b({_CARDINAL}|an?)[- ]({'|'.join(_PARTS)}|halve)s?\b", re.I)
_NUMBER = re.compile(r"\\frac ?(?:\{ ?\d+ ?\}|\d) ?(?:\{ ?\d+ ?\}|\d)|\d+ \d+ ?/ ?\d+|"
                     r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+| ?/ ?\d+|\^\{?\d+\}?)?(?: ?%)?")
_RESULT = re.compile(r"(?:=|≈|→|\\approx|\\Rightarrow|\b(?:equals?|equal to|gives?|giving|makes?|making|yields?|totals?|comes? to|adds? up to|"
                     r"sums? (?:up )?to|sum is|total (?:is|of)|result is|leaves|get|there (?:is|are)(?: exactly)?)\b)[\s:~]*[-+$€£]?\s*(?=\d|\.\d|\\frac)", re.I)
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
    text = "".join(c for c in unicodedata.normalize("NFKD", plain_latex(text)) if unicodedata.category(c) not in ("Mn", "Cf"))
    text = plain_latex(re.sub(r"\\\(|\\\)|\\\[|\\\]|(?<!\\)\$(?!\d)|\*\*|`", " ", text))
    text = re.sub(r" ?\bper ?cent\b", " %", text, flags=re.I)
    # "the left half" is a place; "a fifth line" is a place too, "a fifth of" is not
    text = _FRACTION.sub(lambda m: m[0] if m[1].lower() in ("a", "an") and not re.match(r" (?:of|as)\b", m.string[m.end():])
                         else f"{_cardinal(m[1]) or 1}/{_PARTS.get(m[2].lower(), 2)}", text)
    text = re.sub(r"(?<!left )(?<!right )(?<!upper )(?<!lower )(?<!top )(?<!bottom )(?<!other )(?<!each )(?<!first )(?<!second )\bhalf (?:of|the|as)\b",
                  "1/2", text, flags=re.I)

    def digits(m):
        pronoun = m[0].lower() == "one" and not re.search(r"(?:exactly|only|just|(?<!there )is|are|equals?|[=:]|makes|gives|number) *$", m.string[:m.start()], re.I)
        return m[0] if pronoun else str(_cardinal(m[0]))
    return re.sub(r"(\d) point (?=\d)", r"\1.", re.sub(rf"\b{_CARDINAL}\b", digits, text, flags=re.I))


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
    start = next((i for i in range(len(marks) - 1) if [m[1] for m in marks[i:i + 2]] == ["A", "B"]), None)
    if start is None:
        return question, []
    marks = [m for i, m in enumerate(marks[start:]) if m[1] == "ABCDEFGH"[i:i + 1]]
    ends = [m.start() for m in marks[1:]] + [len(question)]
    return question[:marks[0].start()], [question[m.end():end].strip(" ;,\n") for m, end in zip(marks, ends)]


def find_spoilers(hint: Hint, question: str, answer: str, choices: list[str] | None = None) -> list[str]:
    """Reasons why the hint gives something away; an empty list means that it may be used.

    Rules: no "the answer is"; no computed result ("= 50"), unless the question states it; no part of the answer, as text, as an equal
    number or as an option's letter or text, in any disguise (LaTeX, Unicode, words, letters spaced out or reversed), except what the question itself names
    outside its options. Strict rather than kind: a hint that is rejected is written anew. Order: by rule.
    """
    stem, listed = (question, choices) if choices else _inline_choices(question)
    text, stem = _normal("; ".join((*hint.look, *hint.ignore, *hint.steps))), _normal(stem)
    if "\\boxed" in answer or "<answer>" in answer:
        answer = extract_answer(answer) or answer
    reasons = []
    if re.search(r"\b(?:answer|solution)\s*(?:is|:|=|must be|should be|equals)|\b(?:correct|right) (?:option|choice|answer)\b", text, re.I):
        reasons.append("names the answer")
    stated = {text[m.end():][:12].partition(" ")[0].rstrip(".,;") for m in _RESULT.finditer(text)}
    if stated - {stem[m.end():][:12].partition(" ")[0].rstrip(".,;?") for m in _RESULT.finditer(stem)}:
        reasons.append("states a computed result")
    answers = [answer]
    place = pick_option(answer.strip().rstrip("."), listed) if listed else None
    if place is not None or re.fullmatch(r"\(?[A-Za-z]\)?\.?", answer.strip()):
        letter = answer.strip(" ().").upper() if place is None else chr(ord("A") + place)
        answers = [] if place is None else [listed[place]]
        if _names_option(letter, text, stem):
            reasons.append(f"names the option: {letter}")
    for part in (p for one in answers for p in re.split(r"\s*(?:,(?!\d{3}(?!\d))|;|&|\band\b|\bor\b)\s*",
                                                           re.sub(r"^\s*\$?[(\[{⟨]?(.*?)[)\]⟩]?\$?\s*$", r"\1", one))):
        part = re.sub(r"^[a-zA-Z]\w? ?= ?", "", _normal(part).rstrip(".! "))
        if part and (reason := _holds(part, text, stem)):
            reasons.append(f"{reason}: {part}")
    return reasons


def _names_option(letter: str, text: str, stem: str) -> bool:
    dress = (rf"\({letter}\)|\b(?:option|choice|answer|letter|pick|choose|select|mark)s? \(?{letter}\b|"
             rf"(?:^|\s)[\"']?{letter}[\"']?(?:\)|\.(?=\s[A-Z]|$)| (?:is|fits|must be) (?:the )?(?:best|right|correct|true))")
    if re.search(dress, text, re.I if letter not in "AI" else 0) or re.search(rf"\b(?:option|choice|pick|choose|select) {letter.lower()}(?=$|[;.,])", text):
        return True
    # alone, as a capital: unless it labels a point or line, or the question has it
    alone = rf"(?<![\w'=+*/^-])(?<!point )(?<!vertex )(?<!angle )(?<!line )(?<!side )(?<!label )(?<!labelled )(?<!labeled )(?<!node ){letter}(?![\w'=+*/^-])"
    return letter not in "AI" and bool(re.search(alone, text)) and not re.search(alone, stem)


def _holds(part: str, text: str, stem: str) -> str | None:
    """How `text` gives away one part of the answer that `stem`, the question, does not name itself; None if it does not."""
    bare = split_unit(part)[0]
    value = to_number(bare)
    numbers = _values(part)
    if value is None and len(numbers) == 1 and re.fullmatch(r"[A-Za-z\s'-]*", _NUMBER.sub("", part)) and not re.search(r"\b[a-z]\b", part, re.I):
        value = next(iter(numbers))                                                                 # 12 apples
    if value is not None:
        golds = {abs(value), *([abs(value) * 100] if "%" in bare else ())}
        known, given = _values(stem), _values(text)
        for number, digits in given.items():
            near = digits >= 2 and any(abs(number - gold) * 10**digits <= 0.5 for gold in golds)    # 0.33 for 1/3
            if number not in known and (number in golds or near):
                return "holds the answer's number"
        plain = re.sub(r"\D", "", bare) if re.fullmatch(r"[-+]?[\d,.]+ ?%?", bare) else ""
        if len(plain) > 1:
            apart = rf"(?<![\d.])(?<!\d )(?!{plain}){'[-_*|,. ]*'.join(plain)}(?![\d.]\d)(?!\d)"
            back = plain[::-1] != plain and re.search(rf"(?<!\d){plain[::-1]}(?!\d)", text) and not re.search(rf"(?<!\d){plain[::-1]}(?!\d)", stem)
            if back or re.search(apart, text):
                return "spells the answer's number"
        if "\\" not in part:
            return None
    if re.search(r"\d|\\", part):                                                                   # an expression: 3x + 1, 2\sqrt{3}
        squeezed, short, asked = (re.sub(r"[\s{}\\*]|(?:cdot|times)", "", x).casefold() for x in (part, text, stem))
        return "holds the answer's expression" if squeezed in short and squeezed not in asked else None
    clauses = re.split(r"[;.,:!?\"()]", text.casefold())
    word, text, stem = (re.sub(r"[^\w\s-]+", " ", x.casefold()) for x in (part, text, stem))
    word = " ".join(w for w in word.split() if w not in ("a", "an", "the"))
    if not word:
        return None
    if word in ("yes", "no", "true", "false"):
        said = rf"(?:^|\b(?:is|are|say|says|it's|answer|mark|therefore|so|statement|claim) ){word}(?:$| (?:because|since|as)\b)"
        return "says the answer" if any(re.search(said, clause.strip()) for clause in clauses) else None
    letters = re.sub(r"\W", "", word)
    word = word[:-1] if len(word) >= 5 and word[-1] == "s" and word[-2] != "s" else word      # pears: a pear
    if len(word) >= 4:                                                      # circle: circular; blue: bluish
        inside = "" if len(word) >= 6 else r"\b"
        inside += re.sub("le$", "(?:le|ul)", re.sub("(?<!l)e$", "(?:e|ish|ing)", re.escape(word)))
    else:
        inside = rf"\b{re.escape(word)}(?:'?s|er|ed|ing|ish|ly|y|ness)?\b"
    if re.search(inside, text):
        return None if re.search(inside, stem) else "holds the answer's text"
    backwards = letters != letters[::-1] and re.search(rf"\b{letters[::-1]}\b", text)
    gap = _GAP if len(letters) < 5 else _GAP[:-1] + "*"                     # mon day
    return "spells the answer's text" if len(letters) >= 3 and (backwards or re.search(rf"\b{gap.join(letters)}\b", text)) else None


# ------------------------------------------------------------------------------------------------------- hints from an expert
INSTRUCTION = """You write hints for a tutor. You are shown a picture, a question and its verified answer. The answer is for your eyes
only: whoever reads the hint must still have to find it. Reply with one JSON object and nothing else:
{"look": [...], "ignore": [...], "steps": [...]}
look: one to three phrases, the regions, objects and relations that matter. ignore: up to three phrases, what distracts. steps: one to
four phrases in order, what to compare, read or count; directions, not a worked solution. Imperative, 40 to 150 words in all.
Never write: the answer or any part of it, in any form; an option's letter or text; a count, value or intermediate result that you
found; the name of an object if that name is the answer; "the answer is". A number that stands in the question may be cited."""
LONGEST_HINT = 200                  # words; the instruction asks for at most 150


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


def build_hint(ask, sample: Sample, max_tries: int = 3) -> tuple[Hint | None, list[list[str]]]:
    """Ask an expert for a hint until one passes: -> the hint, or None after max_tries, and for each rejected reply its reasons.

    ask(sample, messages) -> reply text; messages are a chat with {"type": "image"} parts. It may raise Rejected (a refusal, a reply cut
    off), which costs a try, or NoReply, which is passed on. After a rejection the chat goes on with the reasons. PAPER: hints are built
    offline, the answer is private to the builder, and what breaks a rule is asked for again.
    """
    task = f"{INSTRUCTION}\n\nQuestion: {sample.question}\n"
    task += "".join(f"({chr(65 + i)}) {choice}\n" for i, choice in enumerate(sample.choices or ()))
    messages, rejected = [user_turn(sample, f"{task}Verified answer (never in the hint): {sample.answer}")], []
    for _ in range(max_tries):
        reply = ""
        try:
            reply = ask(sample, messages)
            hint = parse_reply(reply)
            if not (found := find_spoilers(hint, sample.question, sample.answer, sample.choices)):
                return hint, rejected
        except Rejected as reason:
            found = [str(reason)]
        rejected.append(found)
        again = {"role": "user", "content": [{"type": "text", "text": f"Rejected: {'; '.join(found)}. Write the JSON object anew, by the rules."}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": reply.rpartition("</think>")[2].strip() or "(nothing)"}]}
        messages = [*messages[:1], said, again]
    return None, rejected


def _load(path: str):
    processor = load_processor(path)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    return processor, AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device).eval()


def local_expert(path: str, max_new_tokens: int):
    """`ask` for build_hint: a vision-language model by hub name or path."""
    processor, model = _load(path)

    def ask(sample: Sample, messages: list[dict]) -> str:
        prompts = encode_prompts(processor, [sample], [messages])
        [[reply]] = sample_groups(model, processor, [sample], prompts, 1, max_new_tokens=max_new_tokens, temperature=0.7,
                                  keys=[f"{sample.id}-{prompts[0].ids.sum()}"])
        if reply.truncated:
            raise Rejected(f"cut off: the reply reached {max_new_tokens} tokens")
        return reply.text
    return ask


def server_expert(base_url: str, model: str, timeout: float, max_new_tokens: int):
    """`ask` for build_hint: a model behind an OpenAI-compatible server. Time-outs, 408, 409, 429, 5xx and lost connections are tried three times, then NoReply; 401,
    403 and 404 raise ValueError, as no other question can fare better; any other status is Rejected.

    TRAP: without a key of its own InferenceClient sends the user's saved Hugging Face token to whatever server this is.
    """
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    client = InferenceClient(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=timeout)

    def part(piece: dict, images) -> dict:
        if piece["type"] == "text":
            return piece
        data = io.BytesIO()
        open_image(next(images)).save(data, "PNG")
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"}}

    def ask(sample: Sample, messages: list[dict]) -> str:
        images = iter(sample.images)
        chat = [{**turn, "content": [part(piece, images) for piece in turn["content"]]} for turn in messages]
        for attempt in range(3):
            try:
                choice = client.chat_completion(chat, model=model, max_tokens=max_new_tokens, temperature=0.7).choices[0]
            except HfHubHTTPError as error:
                status, failure = error.response.status_code, f"HTTP {error.response.status_code}"
                if status in (401, 403, 404):
                    raise ValueError(f"{base_url} answers {failure}: check --api-base, --model and the key in OPENAI_API_KEY") from None
                if status not in (408, 409, 429) and status < 500:
                    raise Rejected(f"refused by the server: {failure}") from None
            except (HTTPError, OSError, ValueError, TypeError, LookupError) as error:       # no connection; a body that is no chat reply
                failure = type(error).__name__
            else:
                if choice.finish_reason == "length":
                    raise Rejected(f"cut off: the reply reached {max_new_tokens} tokens")
                if not choice.message.content:
                    raise Rejected("refused: an empty reply")
                return choice.message.content
            if attempt < 2:
                time.sleep(2**attempt)
        raise NoReply(failure)
    return ask


# ---------------------------------------------------------------------------------------------- hints from the model's attention
@torch.no_grad()
def attention_maps(model, processor, sample: Sample, layers: tuple[int, int] | None = None) -> list[Tensor]:
    """Where the model looks when it reads question and answer: one map (h, w) an image, a cell a visual token, the mean over cells 1.

    Attention from the answer's tokens to the image's, averaged over tokens, heads and `layers` (first, last; default: the middle half),
    divided by the same for a neutral question: what any prompt draws, borders above all, cancels (the relative attention of
    arXiv 2502.17422). Costs one pass over each prompt; the weights of one layer, (heads, P, P), are in memory at a time.
    """
    decoder = model.model.language_model
    first, last = layers or (len(decoder.layers) // 4, (3 * len(decoder.layers) - 1) // 4)
    if not 0 <= first <= last < len(decoder.layers):
        raise ValueError(f"layers {first}-{last}: the model has layers 0 to {len(decoder.layers) - 1}")
    neutral = replace(sample, question="Describe the image.")
    prompts = encode_prompts(processor, [sample, neutral], [plain_messages(sample), plain_messages(neutral)])
    tokens = processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    ids = [*tokens, processor.tokenizer.eos_token_id]           # the last one is not read: it makes all of the answer's be
    seen, before = [], model.config.text_config._attn_implementation
    hooks = [layer.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[1][:, :, -len(tokens):].float().mean((1, 2))))
             for layer in decoder.layers[first:last + 1]]
    model.set_attn_implementation({"text_config": "eager"})     # the only one that returns weights
    try:
        batch = collate(prompts, [ids, ids], processor.tokenizer.pad_token_id, model.device)
        response_states(model, batch)
    finally:
        model.set_attn_implementation({"text_config": before})
        for hook in hooks:
            hook.remove()
    weights = torch.stack(seen[len(hooks):]).mean(0)            # (2, P + A): the second pass, over the answer, comes after the prompts'
    asked, ground = (row[:types.shape[0]][types.bool()] for row, types in zip(weights, batch.prompts["mm_token_type_ids"]))
    heat, maps, merge = (asked / ground.clamp(min=1e-9)).cpu(), [], processor.image_processor.merge_size
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
                found.append((sum(heat[y, x].item() for y, x in area), (min(xs), min(ys), max(xs) + 1, max(ys) + 1)))
    return [box for _, box in sorted(found, reverse=True)[:most]]


_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def place_words(box: tuple[int, int, int, int], shape: tuple[int, int], exact: bool = True) -> str:
    """A box of cells in a map of `shape` (h, w) in words: "the upper left", "the third column from the left". exact False: no ordinals."""
    (left, top, right, bottom), (h, w) = box, shape
    for low, high, size, across, name, side in ((top, bottom, h, right - left >= 0.8 * w, "row", "top"),
                                                (left, right, w, bottom - top >= 0.8 * h, "column", "left")):
        if across and exact and size % (high - low) == low % (high - low) == 0 and 2 <= size // (high - low) <= len(_ORDINALS):
            return f"the {_ORDINALS[low // (high - low)]} {name} from the {side}"
    y, x = ((low + high) / 2 / size for low, high, size in ((top, bottom, h), (left, right, w)))
    down = "" if bottom - top >= 0.8 * h else ("upper", "middle", "lower")[min(2, int(3 * y))]
    over = "" if right - left >= 0.8 * w else ("left", "middle", "right")[min(2, int(3 * x))]
    if down and over:
        return "the middle of the picture" if down == over else f"the {down} {over}"
    return f"the {down or over} part, from {'left to right' if down else 'top to bottom'}" if down or over else "the whole picture"


def attention_hint(model, processor, sample: Sample, layers=None) -> tuple[Hint | None, list[str], list[Tensor], list[list]]:
    """A hint that names the regions of attention_maps: -> hint or None, reasons, maps, and the boxes of each image in its pixels."""
    maps = attention_maps(model, processor, sample, layers)
    boxes = [regions(heat) for heat in maps]
    for exact in (True, False):                                 # "the third column" may be the answer: then without ordinals
        look = [f"{place_words(box, heat.shape, exact)}{f' of the {_ORDINALS[min(n, 5)]} picture' if len(maps) > 1 else ''}"
                for n, (heat, found) in enumerate(zip(maps, boxes)) for box in found]
        look = [words for words in dict.fromkeys(look) if "whole picture" not in words]
        hint = Hint(look=look) if look else None
        reasons = find_spoilers(hint, sample.question, sample.answer, sample.choices) if hint else ["no region stands out"]
        if not reasons:
            break
    pixels = []
    for image, heat, found in zip(sample.images, maps, boxes):
        (width, height), (h, w) = open_image(image).size, heat.shape
        pixels.append([[round(left * width / w), round(top * height / h), round(right * width / w), round(bottom * height / h)]
                       for left, top, right, bottom in found])
    return (None if reasons else hint), reasons, maps, pixels


def overlay(image: Image.Image, heat: Tensor, boxes: list[list[int]]) -> Image.Image:
    """The image with the map (h, w) laid over it in red, hotter is denser, and the boxes (left, top, right, bottom) drawn."""
    strength = (160 * (heat / heat.max()).clamp(0, 1)).byte().numpy()
    mask = Image.fromarray(strength, "L").resize(image.size, Image.Resampling.BILINEAR)
    out = Image.composite(Image.new("RGB", image.size, (230, 30, 30)), image.convert("RGB"), mask)
    for box in boxes:
        ImageDraw.Draw(out).rectangle([box[0], box[1], box[2] - 1, box[3] - 1], outline=(20, 60, 255), width=max(2, image.width // 150))
    return out


# ------------------------------------------------------------------------------------------------------- the file and the command
def load_hints(path: str | Path) -> dict[str, dict]:
    """A hints file, one JSON object a line: -> id -> its record, with "hint" a Hint or None (a question left without one).

    Only id and hint are needed. Raises ValueError naming file and line; an id that stands twice is an error.
    """
    records = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "id" not in record or "hint" not in record:
                raise ValueError("expected an object with id and hint")
            if str(record["id"]) in records:
                raise ValueError(f"id {record['id']!r} stands here twice")
            records[str(record["id"])] = {**record, "hint": Hint.from_json(record["hint"]) if record["hint"] else None}
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return records


def join_hints(samples: list[Sample], path: str | Path) -> int:
    """Give the samples the hints of a file, by id: -> how many of the file's lines belong to none of them.

    Raises ValueError where a line was written for another question of the same id.
    """
    records = load_hints(path)
    for sample in samples:
        record = records.pop(sample.id, None)
        if record and record.get("question", sample.question) != sample.question:
            raise ValueError(f"{path}: the hint of id {sample.id!r} was written for another question: {record['question'][:60]!r}")
        if record:
            sample.hint = record["hint"]
            try:
                sample.boxes = check_boxes(record.get("boxes"), len(sample.images))
            except ValueError as error:
                raise ValueError(f"{path}: the hint of id {sample.id!r}: {error}") from None
    return len(records)


def open_results(path: Path) -> tuple[io.RawIOBase, dict[str, dict]]:
    """Open the output to go on: -> the file, unbuffered, at its end, and what it holds. A last line without its end, from a crash of
    the machine, is cut off; a kill leaves none, as each line is one write."""
    file = open(path, "ab+", buffering=0)
    file.seek(0)
    text = file.readall()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        print(f"{path}: its last line was not whole and is asked for again", file=sys.stderr)
        file.truncate(whole)
    return file, load_hints(path)


def write_hints(samples: list[Sample], work, file, parallel: int) -> str:
    """Run work(sample) -> record for all samples, `parallel` at a time, and write each record as it comes. -> "", or why it stopped early.

    What raises NoReply is not written, so that the next run asks again; 2 * parallel of these in a row, or a ValueError, end the run.
    """
    todo, running, stop, silent, accepted, finished = iter(samples), {}, "", 0, 0, 0
    pool = ThreadPoolExecutor(parallel)
    try:
        with tqdm(total=len(samples), unit="question", dynamic_ncols=True) as bar:
            while True:
                while not stop and len(running) < parallel and (sample := next(todo, None)):
                    running[pool.submit(work, sample)] = sample
                if not running:
                    return stop
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    sample = running.pop(future)
                    try:
                        record = {"id": sample.id, "question": sample.question, **future.result()}
                    except NoReply as error:
                        silent += 1
                        if silent >= 2 * parallel:
                            stop = f"no reply to {silent} questions in a row ({error}); run again to go on"
                    except ValueError as error:
                        stop = str(error)
                    else:
                        file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                        silent, accepted, finished = 0, accepted + (record["hint"] is not None), finished + 1
                    bar.update()
                    bar.set_postfix_str(f"accepted {accepted}/{finished}")
    except KeyboardInterrupt:
        return "interrupted; run again to go on"
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def results_table(records: dict[str, dict], wanted: int) -> str:
    """What the command ends with: acceptance by try, and the reasons of all rejected replies."""
    rows = records.values()
    tries = Counter(len(r.get("rejected", [])) + 1 for r in rows if r["hint"])
    reasons = Counter(kind for r in rows for reply in r.get("rejected", []) for kind in {reason.partition(":")[0] for reason in reply})
    lines = [f"questions {wanted}, with a hint {sum(tries.values())} ({', '.join(f'{n} at try {t}' for t, n in sorted(tries.items())) or 'none'}), "
             f"left without {len(records) - sum(tries.values())}, not answered yet {max(0, wanted - len(records))}"]
    if reasons:
        lines += ["", f"{'replies rejected because':40s}{'replies':>8s}", *(f"{kind:40s}{n:8d}" for kind, n in reasons.most_common())]
    return "\n".join(lines)


def main(argv=None) -> int:
    """The command: check, load, build, report."""
    parser = argparse.ArgumentParser(usage="python hints.py --out FILE --model NAME [options]", description="Build hints, one JSON line a question; resumable.")
    parser.add_argument("--data", default="", help="questions, as train.py takes them (default: built-in puzzles)")
    parser.add_argument("--split", default="train", help="split of a dataset in --data [train]")
    parser.add_argument("--image-dir", default="", help="folder that image paths are relative to and must be in [the .jsonl's]")
    parser.add_argument("--out", required=True, help="the hints file; what it holds already is not asked for again")
    parser.add_argument("--model", required=True, help="the expert, by its name at the server, hub name or path; with --source attention the model to be trained")
    parser.add_argument("--api-base", default="", help="an OpenAI-compatible server, such as http://localhost:8000/v1; its key is read from OPENAI_API_KEY")
    parser.add_argument("--source", choices=("expert", "attention"), default="expert", help="expert: a model that is shown the answer writes the hint; "
                        "attention: no expert, the regions the model itself looks at")
    parser.add_argument("--tries", type=int, default=3, help="replies asked for until one passes [3]")
    parser.add_argument("--parallel", type=int, default=8, help="questions at a time, with --api-base [8]")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for the server [300]")
    parser.add_argument("--max-new-tokens", type=int, default=4096, help="longest reply, thinking included [4096]")
    parser.add_argument("--limit", type=int, help="only the first questions [100 puzzles, or all of --data]")
    parser.add_argument("--layers", default="", help="FIRST-LAST, with --source attention [the middle half]")
    parser.add_argument("--overlay", default="", help="folder for a picture of each map, with --source attention")
    args = parser.parse_args(argv)
    attention, out = args.source == "attention", Path(args.out)
    try:
        if attention and args.api_base or args.overlay and not attention:
            raise ValueError("--api-base is for --source expert, --overlay for --source attention")
        if min(args.tries, args.parallel, args.timeout, args.max_new_tokens, 1 if args.limit is None else args.limit) <= 0:
            raise ValueError("--tries, --parallel, --timeout, --max-new-tokens and --limit must be above 0")
        layers = re.fullmatch(r"(\d+)-(\d+)|", args.layers)
        if not layers:
            raise ValueError(f"--layers must be FIRST-LAST, such as 10-18, got {args.layers!r}")
        if args.data:
            samples = load_samples(args.data, split=args.split, image_dir=args.image_dir)[:args.limit]
        else:
            from toy import world                               # it imports this module
            samples = world.puzzles("train", args.limit or 100)
        file, done = open_results(out)
    except (ValueError, OSError) as error:
        parser.exit(2, f"hints.py: error: {error}\n")
    todo = [sample for sample in samples if sample.id not in done]
    print(f"{len(samples)} questions, {len(samples) - len(todo)} of them in {out} already")
    quiet_loading()
    if attention:
        processor, model = _load(args.model)
        layers = tuple(map(int, layers.groups())) if args.layers else None

        def work(sample: Sample) -> dict:
            hint, reasons, maps, boxes = attention_hint(model, processor, sample, layers)
            for n, (image, heat, found) in enumerate(zip(sample.images, maps, boxes) if args.overlay else ()):
                Path(args.overlay).mkdir(parents=True, exist_ok=True)
                overlay(open_image(image), heat, found).save(Path(args.overlay) / f"{re.sub(r'[^A-Za-z0-9-]', '_', sample.id)}-{n}.png")
            return {"hint": hint and asdict(hint), "rejected": [reasons] if reasons else [], "boxes": boxes, "by": f"attention of {args.model}"}
    else:
        ask = (server_expert(args.api_base, args.model, args.timeout, args.max_new_tokens) if args.api_base
               else local_expert(args.model, args.max_new_tokens)) if todo else None

        def work(sample: Sample) -> dict:
            hint, rejected = build_hint(ask, sample, args.tries)
            return {"hint": hint and asdict(hint), "rejected": rejected, "by": args.model}
    with file:
        stopped = write_hints(todo, work, file, args.parallel if args.api_base else 1)
    asked = {sample.id for sample in samples}
    print(results_table({key: record for key, record in load_hints(out).items() if key in asked}, len(samples)))
    if stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
    return 1 if stopped else 0


if __name__ == "__main__":
    from hints import main as command       # the module under its own name: toy.world must see the same Hint
    sys.exit(command())
