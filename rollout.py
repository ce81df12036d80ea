"""Questions in, verified responses out: samples, prompts, group sampling, answers and rewards, batches.

The path of one question: `Sample` -> `plain_messages` -> `encode_prompts` (chat template, image tokens, pixels) -> `sample_groups`
(G responses) -> `verify` and `reward` -> `collate` -> `response_states` (what the losses read).
Traps that cost hours are marked TRAP.
"""
from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

FORMAT_PROMPT = "Put the final answer in \\boxed{}."      # ends every user turn, the student's and the teacher's alike


# ---------------------------------------------------------------------------------------------------------------- samples
@dataclass
class Sample:
    """One verifiable question. images: PIL images or paths, in the order of the <image> marks in the question, if it has any.
    hint: a hints.Hint or None; family: a free label for tables."""
    id: str
    question: str
    answer: str
    images: list
    hint: object | None = None
    family: str = ""


def load_samples(path: str | Path, parse_hint=None) -> list[Sample]:
    """Read a .jsonl file: one object a line with question (or problem, prompt), answer, images (or image: a path or a list of paths,
    relative to the file), and optionally id and hint (text, or an object with look, ignore, steps; read by `parse_hint`).

    Every line and image is checked before anything is returned. Raises ValueError naming file, line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --data takes a .jsonl with question, answer, images and hint")
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                samples.append(_parse_line(json.loads(line), f"{path.stem}-{number}", path.parent, parse_hint))
            except ValueError as error:                       # JSONDecodeError is one
                raise ValueError(f"{path}:{number}: {error}") from None
    if not samples:
        raise ValueError(f"{path}: no samples in it")
    return samples


def _parse_line(row, default_id: str, folder: Path, parse_hint) -> Sample:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    question = next((row[key] for key in ("question", "problem", "prompt") if row.get(key)), None)
    if not isinstance(question, str):
        raise ValueError("no question: give a text in the field 'question' (or 'problem', 'prompt')")
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError("no answer: give a text or number in the field 'answer'")
    images = row.get("images", row.get("image")) or []
    images = [folder / image for image in ([images] if isinstance(images, str) else images)]
    for image in images:
        try:
            with Image.open(image) as opened:
                opened.load()
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"field 'images': cannot read {image}: {error}") from None
    marks = question.count("<image>")
    if marks and marks != len(images):
        raise ValueError(f"the question has {marks} <image> marks but there are {len(images)} images")
    hint = parse_hint(row["hint"]) if parse_hint and row.get("hint") else None
    return Sample(str(row.get("id", default_id)), question, str(answer).strip(), images, hint)


# ---------------------------------------------------------------------------------------------------------------- prompts
class ImageTextProcessor(Qwen2VLProcessor):
    """A Qwen-VL processor for images and text alone: no video processor, so no torchvision. Works for Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


def load_processor(path: str) -> ImageTextProcessor:
    """The processor of a saved model, by pillow. Raises ValueError where there is no chat template.

    TRAP: AutoProcessor on an image-only processor silently returns a tokenizer, and AutoImageProcessor wants torchvision in some
    versions; so each part is loaded by its class, which the three model families share.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise ValueError(f"{path}: its tokenizer has no chat template, which ptdpo needs to build prompts")
    return ImageTextProcessor(Qwen2VLImageProcessorPil.from_pretrained(path), tokenizer, chat_template=tokenizer.chat_template)


def plain_messages(sample: Sample, context: str = "") -> list[dict]:
    """The chat that the student gets: images, question, format instruction. `context` (a hint) goes between the last two."""
    text = "\n".join(part for part in (sample.question, context, FORMAT_PROMPT) if part)
    parts = text.split("<image>") if "<image>" in sample.question else [""] * len(sample.images) + [text]
    content = []
    for i, part in enumerate(parts):
        content += ([{"type": "image"}] if i else []) + ([{"type": "text", "text": part}] if part else [])
    return [{"role": "user", "content": content}]


@dataclass
class Prompt:
    """One encoded prompt. ids, types (P,) long: tokens, and 1 at image tokens; pixels, grid: all its images, or None."""
    ids: Tensor
    types: Tensor
    pixels: Tensor | None
    grid: Tensor | None


def encode_prompts(processor, samples: list[Sample], messages: list[list[dict]]) -> list[Prompt]:
    """Render the chats, expand image tokens, turn images into patches. One Prompt a sample, on the CPU."""
    prompts = []
    for sample, chat in zip(samples, messages, strict=True):
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = [i if isinstance(i, Image.Image) else Image.open(i).convert("RGB") for i in sample.images]
        got = processor(text=[text], images=images or None, return_tensors="pt", return_mm_token_type_ids=True)
        prompts.append(Prompt(got["input_ids"][0], got["mm_token_type_ids"][0], got.get("pixel_values"), got.get("image_grid_thw")))
    return prompts


def pad_prompts(prompts: list[Prompt], pad_id: int, device="cpu") -> dict:
    """Model inputs for U prompts, padded on the left, so that every prompt ends in the last column."""
    P = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), P), pad_id)
    attended, types = torch.zeros_like(ids), torch.zeros_like(ids)
    for u, prompt in enumerate(prompts):
        start = P - len(prompt.ids)
        ids[u, start:], types[u, start:], attended[u, start:] = prompt.ids, prompt.types, 1
    inputs = {"input_ids": ids, "attention_mask": attended, "mm_token_type_ids": types}
    pictured = [p for p in prompts if p.pixels is not None]
    if pictured:
        inputs["pixel_values"] = torch.cat([p.pixels for p in pictured])
        inputs["image_grid_thw"] = torch.cat([p.grid for p in pictured])
    return {name: x.to(device) for name, x in inputs.items()}


@dataclass
class Batch:
    """Responses on their prompts. prompts: inputs of the U different prompts; rows (B,): which of them each response answers;
    ids (B, T): response tokens, padded on the right; mask (B, T) bool: the real ones, EOS included."""
    prompts: dict
    rows: Tensor
    ids: Tensor
    mask: Tensor


def collate(prompts: list[Prompt], responses: list[list[int]], pad_id: int, device="cpu") -> Batch:
    """B responses, each with its Prompt; one that several responses share (the same object) is held once.

    TRAP: the mask comes from the responses' lengths, never from `ids == pad`: EOS must be trained, and in some models it is the pad token.
    """
    different = list({id(p): p for p in prompts}.values())
    place = {id(p): u for u, p in enumerate(different)}
    T = max(map(len, responses))
    ids = torch.tensor([r + [pad_id] * (T - len(r)) for r in responses], device=device)
    mask = torch.arange(T, device=device) < torch.tensor([len(r) for r in responses], device=device).unsqueeze(1)
    return Batch(pad_prompts(different, pad_id, device), torch.tensor([place[id(p)] for p in prompts], device=device), ids, mask)


def response_states(model, batch: Batch) -> Tensor:
    """Final hidden states (B, T, H), differentiable: state t is the one that predicts response token t, given the tokens before it.

    Each prompt, its image included, runs once, and its keys and values serve all of its responses (gradients add up there).
    TRAP: with a cache, position ids must be given: left to itself, the model counts the image's tokens one by one, and no error
    says so. rope_deltas is state that the last prefill left on the model: read it at once.
    """
    out = model.model(**batch.prompts, use_cache=True)
    deltas, attended = model.model.rope_deltas, batch.prompts["attention_mask"]
    states = out.last_hidden_state[:, -1:][batch.rows]                                              # (B, 1, H): predicts token 0
    T = batch.ids.shape[1]
    if T == 1:
        return states
    out.past_key_values.batch_select_indices(batch.rows)
    if "pixel_values" not in batch.prompts:
        deltas = torch.zeros_like(attended[:, :1])      # text alone: the model has not set them, what is there is stale
    start = (attended.sum(1, keepdim=True) + deltas)[batch.rows]                                    # (B, 1)
    positions = (start + torch.arange(T - 1, device=start.device)).expand(3, -1, -1)                # (3, B, T - 1)
    rest = model.model(input_ids=batch.ids[:, :-1], attention_mask=torch.cat([attended[batch.rows], batch.mask[:, :-1].long()], 1),
                       position_ids=positions, past_key_values=out.past_key_values, use_cache=True)
    return torch.cat([states, rest.last_hidden_state], 1)


# --------------------------------------------------------------------------------------------------------------- sampling
def eos_tokens(model, tokenizer) -> list[int]:
    """All ids that end a response: the model's generation config may name several."""
    eos = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [] if eos is None else [eos])})


def banned_tokens(model, tokenizer) -> list[int]:
    """Ids that must not be sampled: vision and special tokens but EOS, and the rows of a vocabulary padded beyond the tokenizer.

    TRAP: a policy can sample the image placeholder itself, and the next scoring pass then dies of "image features and image tokens do
    not match". The same ban is applied when scoring, so that ratios and divergences are those of the sampled distribution.
    """
    config = model.config
    vision = [getattr(config, f"{name}_token_id", None) for name in ("image", "video", "vision_start", "vision_end")]
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special] + tokenizer.all_special_ids
    padded = range(len(tokenizer), model.get_output_embeddings().weight.shape[0])
    return sorted(({i for i in vision if i is not None} | set(special) | set(padded)) - set(eos_tokens(model, tokenizer)))


@dataclass
class Rollout:
    """One response: token ids with EOS, decoded text; truncated: the length limit came before EOS; verdict and reward follow."""
    sample: Sample
    ids: list[int]
    text: str
    truncated: bool
    correct: bool = False
    reward: float = 0.0


@torch.no_grad()
def sample_groups(model, processor, samples: list[Sample], prompts: list[Prompt], group_size: int, *, max_new_tokens: int,
                  temperature: float = 1.0, top_p: float = 1.0, batch: int = 256) -> list[list[Rollout]]:
    """`group_size` responses to each prompt; temperature 0 is greedy. `batch`: sequences decoded together.

    The draw depends on torch's global random state. The model's mode is restored.
    """
    tokenizer, training = processor.tokenizer, model.training
    eos = eos_tokens(model, tokenizer)
    drawn = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0) if temperature > 0 else dict(do_sample=False)
    # TRAP: whatever is left None here is filled in from the model's own generation config; Qwen ships a repetition penalty
    config = GenerationConfig(max_new_tokens=max_new_tokens, num_return_sequences=group_size, eos_token_id=eos, num_beams=1,
                              pad_token_id=tokenizer.pad_token_id, repetition_penalty=1.0,
                              suppress_tokens=banned_tokens(model, tokenizer), **drawn)
    model.eval()
    groups = []
    step = max(1, batch // group_size)
    for a in range(0, len(prompts), step):
        inputs = pad_prompts(prompts[a:a + step], tokenizer.pad_token_id, model.device)
        out = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1]:].tolist()
        for i, sample in enumerate(samples[a:a + step]):
            groups.append([_cut(sample, ids, eos, tokenizer) for ids in out[i * group_size:(i + 1) * group_size]])
    model.train(training)
    return groups


def _cut(sample: Sample, ids: list[int], eos: list[int], tokenizer) -> Rollout:
    """Cut generated ids behind the first EOS, which stays."""
    end = next((i for i, token in enumerate(ids) if token in eos), None)
    ids = ids if end is None else ids[:end + 1]
    return Rollout(sample, ids, tokenizer.decode(ids, skip_special_tokens=True), truncated=end is None)


# ---------------------------------------------------------------------------------------------------- answers and rewards
def extract_answer(text: str) -> str | None:
    """The final answer of a response: its last \\boxed{...} (braces may nest), else <answer>...</answer>, else "answer: ..." on the last
    line that has it. What comes before the last </think> is not looked at. None where there is nothing."""
    text = text.rpartition("</think>")[2]
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, begin = 1, start + len("\\boxed{")
        for i in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[begin:i].strip() or None
        return None                                          # never closed: cut off in the middle of its answer
    before, tag, rest = text.rpartition("<answer>")
    if tag and "</answer>" in rest:
        return rest.partition("</answer>")[0].strip() or None
    found = [line[len("answer:"):] for line in map(str.strip, text.lower().splitlines()) if line.startswith("answer:")]
    return (found[-1].strip() or None) if found else None


def to_number(text: str) -> Fraction | None:
    """The exact value of a number as people write it: 1,200  -3.5  2/4  50%  \\frac{1}{2}; None for anything else."""
    text = re.sub(r"[\s$]|\\[,!; ]", "", text[:80]).rstrip(".")
    text = re.sub(r"^([-+]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1\2/\3", text)
    match = re.fullmatch(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?(?:/(\d+))?(\\?%)?", text)
    if not match or not (match[2] or match[3]) or (match[4] and int(match[4]) == 0):
        return None
    value = Fraction((match[2] or "0").replace(",", "") + (match[3] or "")) / int(match[4] or 1)
    return (-value if match[1] == "-" else value) / (100 if match[5] else 1)


def same_answer(given: str, answer: str) -> bool:
    """Equal as numbers, as option letters ("(B)", "option B", "B."), or as text up to case, blanks and a final full stop."""
    a, b = to_number(given), to_number(answer)
    if a is not None or b is not None:
        return a == b

    def tidy(text):
        text = re.sub(r"^\\(?:text|mathrm|textbf)\{(.*)\}$", r"\1", text.strip().strip("$").strip(), flags=re.S)
        return " ".join(text.casefold().rstrip(".").split())
    a, b = tidy(given), tidy(answer)
    if re.fullmatch(r"\(?[a-z]\)?", b):
        a, b = re.sub(r"^(?:option|choice)\s+", "", a).strip("()."), b.strip("()")
    return a == b


def verify(response: str, answer: str) -> bool:
    """Is the response's final answer the gold answer? No answer found, or one not understood, is False."""
    given = extract_answer(response)
    return given is not None and same_answer(given, answer)


def reward(response: str, correct: bool, format_weight: float = 0.0) -> float:
    """(1 - format_weight) * correct + format_weight * (a non-empty \\boxed{} ends the response). Routing never reads it."""
    boxed = "\\boxed{" in response and extract_answer(response) is not None
    return (1 - format_weight) * float(correct) + format_weight * float(boxed)
