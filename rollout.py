"""Questions in, verified responses out: samples, prompts, group sampling, answers and rewards, batches.

The path of one question: `Sample` -> `plain_messages` -> `encode_prompts` (chat template, image tokens, pixels) -> `sample_groups`
(G responses) -> `verify` and `reward` -> `collate` -> `response_states` (what the losses read).
Traps that cost hours are marked TRAP.
"""
from __future__ import annotations

import hashlib
import io
import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, Qwen2VLProcessor
from transformers import logging as transformers_logging
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

FORMAT_PROMPT = "Put the final answer in \\boxed{}."      # ends every user turn, the student's and the teacher's alike


# ---------------------------------------------------------------------------------------------------------------- samples
@dataclass
class Sample:
    """One verifiable question. images: PIL images or paths, in the order of the <image> marks in the question, if it has any.
    hint: a hints.Hint or None; family: a free label for tables; choices: the options' texts of a multiple-choice question; solution: a
    worked one, which only a teacher of the comparison reads; boxes: where the hint looks, for each image (left, top, right, bottom) in
    its pixels, to be drawn and no more."""
    id: str
    question: str
    answer: str
    images: list
    hint: object | None = None
    family: str = ""
    choices: list[str] | None = None
    solution: str | None = None
    boxes: list | None = None


@dataclass
class StoredImage:
    """An image in a `datasets` table, decoded when it is used: a large table does not fit into memory. size: width, height."""
    table: object
    row: int
    column: str
    place: int
    size: tuple[int, int]

    def open(self) -> Image.Image:
        value = self.table[self.row][self.column]
        return _picture(value[self.place] if isinstance(value, list) else value)


def _picture(value) -> Image.Image:
    """A table's image: decoded already, or as stored, {"bytes", "path"}."""
    return Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]) if isinstance(value, dict) else value


def load_samples(source: str | Path, parse_hint=None, *, split: str = "train", image_dir: str | Path = "", bad: list[str] | None = None) -> list[Sample]:
    """Read questions from a .jsonl file, or, by `datasets`, from a saved dataset's folder or the hub.

    A line or row has question (or problem, prompt), answer, images (or image: one or a list; a path relative to image_dir or else to the
    file, or the image itself), and optionally id (or qid), choices (a list of the options' texts), solution, and hint (text, or an object with look,
    ignore, steps; read by `parse_hint`) or prompt_with_hint (the question's text with the hint around it), and boxes (see Sample).

    Every line and image is checked before anything is returned. Raises ValueError naming file, line and field; with a list `bad` it is
    filled with these messages instead, and the lines are left out.
    """
    path, messages, samples, ids = Path(source), [], [], {}
    if path.suffix == ".jsonl" or path.is_file():
        if not path.is_file():
            raise ValueError(f"{path}: no such file; --data takes a .jsonl with question, answer, images and hint")
        rows = [(number, line) for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
        folder, column, unit = Path(image_dir or path.parent), None, ""
    else:
        table = _open_table(str(source), split)
        rows, folder, unit = [(i, table) for i in range(len(table))], Path(image_dir or "."), "row "
        column = next((name for name in ("images", "image") if name in table.column_names), None)
        pictures = table.select_columns([column]) if column else None

    def read(numbered) -> Sample | str:
        number, value = numbered
        try:
            row = value[number] if unit else json.loads(value)  # a table's row comes with its images decoded
            sample = _parse_row(row, f"{path.stem}-{number}", folder, parse_hint)
            sample.images = [StoredImage(pictures, number, column, i, image.size) if isinstance(image, Image.Image) else image
                             for i, image in enumerate(sample.images)]
            return sample
        except (ValueError, OSError) as error:                  # JSONDecodeError is a ValueError, a broken image in a table an OSError
            return str(error)
    with ThreadPoolExecutor() as pool:                          # decoding images is most of the work, and releases the interpreter
        for (number, _), got in zip(rows, pool.map(read, rows)):
            if isinstance(got, Sample) and ids.setdefault(got.id, number) != number:
                got = f"field 'id': {got.id!r} is the id of line {ids[got.id]} already"
            if isinstance(got, Sample):
                samples.append(got)
                continue
            messages.append(f"{source}:{unit}{number}: {got}")
            if bad is None:
                pool.shutdown(cancel_futures=True)
                raise ValueError(messages[0])
    if bad is not None:
        bad += messages
    if not samples:
        raise ValueError(f"{source}: no samples in it" + (f"; first: {messages[0]}" if messages else ""))
    return samples


def _open_table(source: str, split: str):
    """A dataset's folder or hub name by `datasets`. No code that comes with a dataset is run. Raises ValueError."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"--data {source}: not a .jsonl file; for a dataset's folder or hub name: python -m pip install datasets") from None
    try:
        if any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(source)
            return table[split] if isinstance(table, datasets.DatasetDict) else table
        return datasets.load_dataset(source, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--data {source}, split {split!r}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from None


def _parse_row(row, default_id: str, folder: Path, parse_hint) -> Sample:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    question = next((row[key] for key in ("question", "problem", "prompt") if row.get(key)), None)
    if not isinstance(question, str):
        raise ValueError("no question: give a text in the field 'question' (or 'problem', 'prompt')")
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError("no answer: give a text or number in the field 'answer'")
    value = row.get("images") or row.get("image")
    images = [_check_image(image, folder) for image in (value if isinstance(value, list) else [value]) if image is not None and image != ""]
    marks = question.count("<image>")
    if marks and marks != len(images):
        raise ValueError(f"the question has {marks} <image> marks but there are {len(images)} images")
    choices = row.get("choices") or None
    if choices is not None and not (isinstance(choices, list) and all(isinstance(c, (str, int, float)) for c in choices)):
        raise ValueError("field 'choices': expected a list of texts")
    hint = row.get("hint")
    if not hint and (whole := row.get("prompt_with_hint")):
        bare = question.replace("<image>", "").strip()
        before, found, after = str(whole).replace("<image>", "").partition(bare)
        hint = " ".join(part for part in (before.strip(), after.strip()) if part)
        if not found:
            raise ValueError("field 'prompt_with_hint': the question's text does not stand in it")
    hint = parse_hint(hint) if parse_hint and hint else None
    return Sample(str(row.get("id", row.get("qid", default_id))), question, str(answer).strip(), images, hint,
                  choices=choices and [str(c) for c in choices], solution=str(row["solution"]) if row.get("solution") else None,
                  boxes=check_boxes(row.get("boxes"), len(images)))


def check_boxes(boxes, images: int) -> list | None:
    """Boxes as a file gives them, found to be a list an image of (left, top, right, bottom). Raises ValueError."""
    fine = not boxes or (isinstance(boxes, list) and len(boxes) == images and all(
        isinstance(found, list) and all(isinstance(b, list) and len(b) == 4 and all(isinstance(x, (int, float)) for x in b) for b in found) for found in boxes))
    if not fine:
        raise ValueError("field 'boxes': expected, for each image, a list of [left, top, right, bottom]")
    return boxes or None


def _check_image(image, folder: Path) -> Path | Image.Image:
    """A row's image, opened once and found whole: the path that it stands for, inside `folder`, or the image itself."""
    if isinstance(image, str):
        path = folder / image
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"field 'images': {image} is outside {folder}; --image-dir says where images are")
        image = path
    elif not isinstance(image, (dict, Image.Image)):
        raise ValueError(f"field 'images': expected a path or an image, got {type(image).__name__}")
    try:
        with Image.open(image) if isinstance(image, Path) else _picture(image) as opened:
            opened.load()
    except (OSError, TypeError, KeyError, Image.DecompressionBombError) as error:
        raise ValueError(f"field 'images': cannot read {image if isinstance(image, Path) else 'it'}: {error}") from None
    return image if isinstance(image, Path) else opened


# ---------------------------------------------------------------------------------------------------------------- prompts
class ImageTextProcessor(Qwen2VLProcessor):
    """A Qwen-VL processor for images and text alone: no video processor, so no torchvision. Works for Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


def load_processor(path: str, min_pixels: int = 0, max_pixels: int = 0) -> ImageTextProcessor:
    """The processor of a saved model, by pillow; min_pixels, max_pixels: an image's smallest and largest area, 0: the model's own.
    Raises ValueError where there is no chat template.

    TRAP: AutoProcessor on an image-only processor silently returns a tokenizer, and AutoImageProcessor wants torchvision in some
    versions; so each part is loaded by its class, which the three model families share.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise ValueError(f"{path}: its tokenizer has no chat template, which ptdpo needs to build prompts")
    images = Qwen2VLImageProcessorPil.from_pretrained(path)
    images.size = {"shortest_edge": min_pixels or images.size["shortest_edge"], "longest_edge": max_pixels or images.size["longest_edge"]}
    return ImageTextProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def quiet_loading() -> None:
    """No progress bars and warnings of transformers while models are loaded."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def prompt_tokens(processor, sample: Sample) -> int:
    """Length of the sample's plain prompt in tokens, from the images' sizes: nothing is decoded."""
    text = processor.apply_chat_template(plain_messages(sample), tokenize=False, add_generation_prompt=True)
    images = processor.image_processor
    sizes = [Image.open(i).size if isinstance(i, (str, Path)) else i.size for i in sample.images]
    patches = [images.get_number_of_image_patches(height, width) for width, height in sizes]
    return len(processor.tokenizer(text)["input_ids"]) + sum(n // images.merge_size**2 - 1 for n in patches)


def user_turn(sample: Sample, text: str) -> dict:
    """A chat turn of the sample's images and `text`: the images first, or where the text has its <image> marks."""
    parts = text.split("<image>") if "<image>" in sample.question else [""] * len(sample.images) + [text]
    content = []
    for i, part in enumerate(parts):
        content += ([{"type": "image"}] if i else []) + ([{"type": "text", "text": part}] if part else [])
    return {"role": "user", "content": content}


def plain_messages(sample: Sample, context: str = "") -> list[dict]:
    """The chat that the student gets: images, question, format instruction. `context` (a hint) goes between the last two."""
    return [user_turn(sample, "\n".join(part for part in (sample.question, context, FORMAT_PROMPT) if part))]


@dataclass
class Prompt:
    """One encoded prompt. ids, types (P,) long: tokens, and 1 at image tokens; pixels, grid: all its images, or None.
    pixels: patches, 4 an image token, or after `encode_images` the features of its image tokens."""
    ids: Tensor
    types: Tensor
    pixels: Tensor | None
    grid: Tensor | None


def open_image(image: Image.Image | StoredImage | str | Path) -> Image.Image:
    """A sample's image, in RGB."""
    if not isinstance(image, Image.Image):
        image = image.open() if isinstance(image, StoredImage) else Image.open(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def encode_prompts(processor, samples: list[Sample], messages: list[list[dict]]) -> list[Prompt]:
    """Render the chats, expand image tokens, turn images into patches. One Prompt a sample, on the CPU."""
    prompts = []
    for sample, chat in zip(samples, messages, strict=True):
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = [open_image(i) for i in sample.images]
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


def take_features(model) -> None:
    """Let a model with a frozen vision tower take an image's features where it is given its patches, in every pass over a prompt."""
    tower = model.model.visual
    run, width = tower.forward, model.config.text_config.hidden_size

    def forward(pixels, grid_thw, **how):
        if len(pixels) == grid_thw.prod(-1).sum():              # patches; of features there is one where there are four of these
            return run(pixels, grid_thw, **how)
        first, *deeper = pixels.split(width, -1)                # Qwen3-VL has more than one feature a token
        return SimpleNamespace(pooler_output=first, deepstack_features=deeper)
    tower.forward = forward


@torch.no_grad()
def encode_images(model, prompts: list[Prompt]) -> None:
    """Run the vision tower once over the images of prompts that still hold patches, and keep its features (tokens, features) in their place, on
    the CPU. The model, and any other with the same frozen tower, must `take_features`."""
    for prompt in prompts:
        if prompt.pixels is not None and len(prompt.pixels) == prompt.grid.prod(-1).sum():
            out = model.model.visual(prompt.pixels.to(model.device, model.dtype), grid_thw=prompt.grid.to(model.device))
            prompt.pixels = torch.cat([out.pooler_output, *(getattr(out, "deepstack_features", None) or [])], -1).cpu()


@dataclass
class Batch:
    """Responses on their prompts. prompts: inputs of the U different prompts; rows (B,): which of them each response answers;
    ids (B, T): response tokens, padded on the right; mask (B, T) bool: the real ones, EOS included; apart: prompt i is response i's."""
    prompts: dict
    rows: Tensor
    ids: Tensor
    mask: Tensor
    apart: bool = False


def collate(prompts: list[Prompt], responses: list[list[int]], pad_id: int, device="cpu", apart: bool = False) -> Batch:
    """B responses, each with its Prompt; one that several responses share (the same object) is held once, unless `apart`.

    TRAP: the mask comes from the responses' lengths, never from `ids == pad`: EOS must be trained, and in some models it is the pad token.
    """
    different = prompts if apart else list({id(p): p for p in prompts}.values())
    place = {id(p): u for u, p in enumerate(different)}
    T = max(map(len, responses))
    ids = torch.tensor([r + [pad_id] * (T - len(r)) for r in responses], device=device)
    mask = torch.arange(T, device=device) < torch.tensor([len(r) for r in responses], device=device).unsqueeze(1)
    rows = torch.tensor(range(len(prompts)) if apart else [place[id(p)] for p in prompts], device=device)
    return Batch(pad_prompts(different, pad_id, device), rows, ids, mask, apart)


def share(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] along the first dimension, with a gradient that is the same every time.

    TRAP: the backward of x[rows], and so of a cache's batch_select_indices, adds up equal rows by atomics on a CPU: with two threads or more the order,
    and the last bits of a run, are chance. index_select's does so on a GPU. An embedding's adds in order (measured on a CPU; for a GPU the source is the
    list in torch.use_deterministic_algorithms, which names the other two and not this one).
    """
    return F.embedding(rows, x.flatten(1)).view(len(rows), *x.shape[1:])


def prefill(model, prompts: dict, rows: Tensor) -> tuple[Tensor, object, Tensor, Tensor]:
    """Run each prompt once, its images included, for the rows (B,) that continue it, with gradient where it is enabled.

    -> the state that predicts the first response token (B, 1, H), the cache (B rows), the attention mask (B, P), and the position of the
    first response token (B, 1).
    TRAP: with a cache, position ids must be given: left to itself, the model counts the image's tokens one by one, and no error
    says so. rope_deltas is state that the last prefill left on the model: read it at once. After text alone it is stale.
    """
    out = model.model(**prompts, use_cache=True)
    attended = prompts["attention_mask"]
    deltas = model.model.rope_deltas if "pixel_values" in prompts else torch.zeros_like(attended[:, :1])
    for layer in out.past_key_values.layers:
        layer.keys, layer.values = share(layer.keys, rows), share(layer.values, rows)
    return share(out.last_hidden_state[:, -1:], rows), out.past_key_values, attended[rows], (attended.sum(1, keepdim=True) + deltas)[rows]


def response_states(model, batch: Batch) -> Tensor:
    """Final hidden states (B, T, H), differentiable: state t is the one that predicts response token t, given the tokens before it.

    Each prompt runs once, and its keys and values serve all of its responses (gradients add up there). A batch with prompts `apart` runs
    as whole sequences, without a cache: the way for a model that recomputes its activations (gradient checkpointing).
    """
    if batch.apart:
        answer = batch.ids[:, :-1]
        whole = {"input_ids": answer, "attention_mask": batch.mask[:, :-1].long(), "mm_token_type_ids": torch.zeros_like(answer)}
        inputs = {name: torch.cat([x, whole[name]], 1) if name in whole else x for name, x in batch.prompts.items()}
        return model.model(**inputs, use_cache=False).last_hidden_state[:, -batch.ids.shape[1]:]
    first, cache, attended, start = prefill(model, batch.prompts, batch.rows)
    T = batch.ids.shape[1]
    if T == 1:
        return first
    positions = (start + torch.arange(T - 1, device=start.device)).expand(3, -1, -1)                # (3, B, T - 1)
    rest = model.model(input_ids=batch.ids[:, :-1], attention_mask=torch.cat([attended, batch.mask[:, :-1].long()], 1),
                       position_ids=positions, past_key_values=cache, use_cache=True)
    return torch.cat([first, rest.last_hidden_state], 1)


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
    """One response: token ids with EOS, decoded text; truncated: the length limit came before EOS; logp: the sampler's own log-probs at the
    sampling temperature (None from model.generate); verdict and reward follow."""
    sample: Sample
    ids: list[int]
    text: str
    truncated: bool
    logp: list[float] | None = None
    correct: bool = False
    reward: float = 0.0


def draw(logits: Tensor, uniform: Tensor | None, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> tuple[Tensor, Tensor]:
    """Next tokens (R,) and their log-probs (R,) at `temperature`, before truncation. logits (R, V) float32; None for uniform is greedy.

    uniform (R,) float64 in [0, 1): the token is where the cumulative probability passes it, so that a draw depends on its own row
    alone. top_k > 0 keeps the k most probable tokens, top_p < 1 the fewest that hold this mass (nucleus sampling, arXiv 1904.09751).
    """
    p = (logits if uniform is None else logits / temperature).softmax(-1)
    if uniform is None:
        token = logits.argmax(-1, keepdim=True)
    else:
        kept, order = p, None
        if top_k or top_p < 1:
            kept, order = torch.sort(p, dim=-1, descending=True, stable=True)
            outside = kept.cumsum(-1) - kept >= top_p
            if top_k:
                outside[:, top_k:] = True
            kept = kept.masked_fill(outside, 0)
        mass = kept.cumsum(-1, dtype=torch.float64)     # float32 sums over 150,000 tokens would move the borders
        token = torch.searchsorted(mass, uniform.clamp(max=1 - 1e-9).unsqueeze(-1) * mass[:, -1:], right=True)
        token = token if order is None else order.gather(-1, token)
    return token.squeeze(-1), p.gather(-1, token).log().squeeze(-1)


def uniforms(keys: list[str], length: int) -> Tensor:
    """(len(keys), length) float64 numbers in [0, 1), each row from its key alone: neither batches nor processes change what is drawn."""
    rows = []
    for key in keys:
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
        rows.append(torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


def sequence_bytes(model, length: int) -> int:
    """Memory that one sequence of `length` tokens takes while it is decoded: keys, values, and a few copies of its next token's logits."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize * length
    return cache + 32 * model.get_output_embeddings().weight.shape[0]


@torch.no_grad()
def _decode(model, prompts: list[Prompt], noise: Tensor | None, eos: list[int], banned: list[int], pad: int, max_new_tokens: int,
            **how) -> tuple[list[list[int]], list[list[float]]]:
    """One response to each of R prompts (the same object runs once), and its log-probs. noise (R, max_new_tokens): see `draw`."""
    device = model.device
    different = list({id(p): p for p in prompts}.values())
    place = {id(p): u for u, p in enumerate(different)}
    live = torch.arange(len(prompts), device=device)            # which response each row of the cache writes
    state, cache, attended, start = prefill(model, pad_prompts(different, pad, device), torch.tensor([place[id(p)] for p in prompts], device=device))
    eos, banned = torch.tensor(eos, device=device), torch.tensor(banned, device=device)
    noise = None if noise is None else noise.to(device)
    ids = torch.full((len(prompts), max_new_tokens), pad, device=device)
    logp, lengths = torch.zeros(ids.shape, device=device), torch.full_like(live, max_new_tokens)
    done = torch.zeros_like(live, dtype=torch.bool)
    head = model.get_output_embeddings()
    for t in range(max_new_tokens):
        # W x^T, not x W^T: for a dozen rows and a large vocabulary a CPU's matrix product is 1.6 times as fast in this order
        logits = (head.weight @ state[:, -1].T).T.float().contiguous()                                              # (R, V)
        logits.index_fill_(-1, banned, -math.inf)
        token, logp[live, t] = draw(logits, None if noise is None else noise[live, t], **how)
        ids[live, t] = token
        ended = torch.isin(token, eos) & ~done
        lengths[live[ended]] = t + 1
        done |= ended
        if t == max_new_tokens - 1 or done.all():
            break
        if done.float().mean() >= 0.25:                         # rows that have ended leave; each time costs a copy of the cache
            keep = (~done).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            live, attended, start, token, done = (x[keep] for x in (live, attended, start, token, done))
        attended = torch.cat([attended, torch.ones_like(attended[:, :1])], 1)
        state = model.model(input_ids=token.unsqueeze(1), attention_mask=attended, position_ids=(start + t).expand(3, -1, -1),
                            past_key_values=cache, use_cache=True).last_hidden_state                                # (R, 1, H)
    lengths = lengths.tolist()
    return [row[:n] for row, n in zip(ids.tolist(), lengths)], [row[:n] for row, n in zip(logp.tolist(), lengths)]


@torch.no_grad()
def _generate(model, prompts: list[Prompt], eos: list[int], banned: list[int], pad: int, max_new_tokens: int, temperature: float,
              top_p: float, top_k: int) -> tuple[list[list[int]], None]:
    """The same by model.generate, every prompt as often as it has responses; draws from torch's global random state."""
    drawn = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k) if temperature > 0 else dict(do_sample=False)
    # TRAP: whatever is left None here is filled in from the model's own generation config; Qwen ships a repetition penalty
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=eos, num_beams=1, pad_token_id=pad, repetition_penalty=1.0,
                              suppress_tokens=banned, **drawn)
    inputs = pad_prompts(prompts, pad, model.device)
    out = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1]:].tolist()
    ends = [next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids)) for ids in out]
    return [ids[:end] for ids, end in zip(out, ends)], [None] * len(out)


def sample_groups(model, processor, samples: list[Sample], prompts: list[Prompt], group_size: int, *, max_new_tokens: int,
                  temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, keys: list[str] | None = None,
                  sample_mb: float = 4096, generate: str = "own") -> list[list[Rollout]]:
    """`group_size` responses to each prompt; temperature 0 is greedy. EOS is kept; vision and special tokens are never drawn.

    A prompt runs once for all of its responses that decode together. keys: one a question, what its draws are seeded with (default: the
    samples' ids); batches and processes do not change them. sample_mb: MiB for the sequences that decode together; where memory runs out
    all the same, their number is halved, once, with a message. generate: "own", or "hf" for model.generate, which draws from torch's
    global random state. The model's mode is restored.
    """
    tokenizer, training, responses = processor.tokenizer, model.training, {}
    special = eos_tokens(model, tokenizer), banned_tokens(model, tokenizer), tokenizer.pad_token_id
    how = dict(temperature=temperature, top_p=top_p, top_k=top_k)
    # like lengths together: less padding
    rows = sorted(((n, g) for n in range(len(prompts)) for g in range(group_size)), key=lambda row: len(prompts[row[0]].ids))
    together = max(1, int(sample_mb * 2**20) // sequence_bytes(model, max(len(p.ids) for p in prompts) + max_new_tokens)) if rows else 1
    halved = False
    model.eval()
    while rows:
        part = rows[:together]
        chosen, drawn = [prompts[n] for n, _ in part], None
        try:
            if generate == "hf":
                drawn = _generate(model, chosen, *special, max_new_tokens, **how)
            else:
                names = [f"{keys[n] if keys else samples[n].id}-{g}" for n, g in part]
                drawn = _decode(model, chosen, uniforms(names, max_new_tokens) if temperature > 0 else None, *special, max_new_tokens, **how)
        except torch.OutOfMemoryError:
            if halved or len(part) == 1:
                raise
        if drawn is None:                   # not within except, where the traceback still holds the tensors
            halved, together = True, len(part) // 2
            print(f"out of memory decoding {len(part)} sequences together; going on with {together} (--sample-mb sets this)", file=sys.stderr)
            torch.cuda.empty_cache()
            continue
        responses.update(zip(part, zip(*drawn)))
        rows = rows[len(part):]
    model.train(training)
    eos = set(special[0])
    return [[Rollout(sample, ids, tokenizer.decode(ids, skip_special_tokens=True), ids[-1] not in eos, logp)
             for ids, logp in (responses[n, g] for g in range(group_size))] for n, sample in enumerate(samples)]


# ------------------------------------------------------------------------------------------------------- answers: finding them
LONGEST = 400       # characters of an answer that are read; what is longer is no answer. Keeps every pattern below cheap


def extract_answer(text: str) -> str | None:
    """The final answer of a response: its last \\boxed{...} (braces may nest), else the last <answer>...</answer>, else what follows
    "answer:" or "answer is" on the last line that has it. Thinking, closed or not, is not looked at. None where there is nothing."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    start = text.rfind("\\boxed")
    if start >= 0:
        return _braced(text[start + len("\\boxed"):][:LONGEST].lstrip())
    before, tag, rest = text.rpartition("<answer>")
    if tag:
        inside, closed, _ = rest[:LONGEST].partition("</answer>")
        return inside.strip() or None if closed else None
    for line in reversed(text[-10 * LONGEST:].splitlines()):
        found = re.search(r"\banswer\s*(?:is\b|:)\s*:?(.*)", line.replace("*", ""), re.I)
        if found:
            return found[1].strip() or None
    return None


def _braced(text: str) -> str | None:
    """What stands between the brace that text starts with and its partner; None if there is no such pair."""
    depth, skip = 0, False
    for i, c in enumerate(text):
        if skip or c == "\\":
            skip = not skip             # \{ and \} are set braces, not grouping
            continue
        depth += {"{": 1, "}": -1}.get(c, 0)
        if depth == 0:
            return text[1:i].strip() or None if i else None
    return None                         # never closed: cut off in the middle of its answer


# ------------------------------------------------------------------------------------------------------ answers: comparing them
_PLAIN = {"−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "⁄": "/", "π": "\\pi ", "√": "\\sqrt ", "∞": "\\infty",
          "∪": "\\cup ", "∩": "\\cap ", "≤": "\\le ", "≥": "\\ge ", "°": " degrees ", "²": "^{2}", "³": "^{3}", "½": " 1/2", "⅓": " 1/3",
          "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅛": " 1/8", "\u00a0": " ", "’": "'", "‘": "'", "“": '"', "”": '"'}
_LATEX = [(r"(?<=\d)\\[,!] ?(?=\d{3}(?!\d))", ""),                                               # 1\,200
          (r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\[,;!: ]|\\q?quad|~", " "),
          (r"\\[dtc]frac", r"\\frac"), (r"\\(?:times|cdot)(?![a-z])", "*"), (r"\\div(?![a-z])", "/"), (r"\{,\}", ","), (r"\\%", "%"),
          (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", " degrees"), (r"\\\{|\\lbrace", "⟨"), (r"\\\}|\\rbrace", "⟩"),
          (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
          (r"^\s*(?:\$\$|\\\(|\\\[)|(?:\$\$|\\\)|\\\])\s*$", " "), (r"^\s*\$([^$]*)\$\s*$", r"\1"), (r"\\\$", "$")]
_TOKEN = re.compile(r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?|\\[a-zA-Z]+|sqrt|pi|\S")


def plain_latex(text: str) -> str:
    """One spelling: LaTeX's spacing, text and mathematics commands gone, Unicode signs as LaTeX, blanks single."""
    text = "".join(_PLAIN.get(c, c) for c in text)
    for pattern, new in _LATEX:
        text = re.sub(pattern, new, text)
    return " ".join(text.split())


def _tidy(text: str) -> str:
    """An answer in plain_latex without a leading `x =` and a final stop."""
    text = plain_latex(text).rstrip(".,;:! ")
    return re.sub(r"^\\?[a-zA-Z]{1,8}(?:_\{?\w\}?)? ?= ?(?=[^=])", "", text).strip()


def to_number(text: str) -> Fraction | float | None:
    """The value of a number as people write it, exact (a Fraction) where it is rational: 1,200  -3.5  2/4  50%  1 1/2  1.5e3
    2\\sqrt{3}  \\frac{\\pi}{2}  3^{-2}; None for anything else. No eval; powers and lengths are bounded."""
    try:
        tokens = _TOKEN.findall(_tidy(text[:LONGEST]))
        value, rest = _sum(tokens[:100] + [""])
        return value if rest == [""] and len(tokens) <= 100 and abs(value) < 1e300 else None
    except (ValueError, ArithmeticError, IndexError, RecursionError):       # not a number, or one out of all bounds
        return None


def _sum(tokens):
    """value, remaining tokens; as do the three functions below. Raises ValueError where the grammar has no such number."""
    value, tokens = _product(tokens)
    while tokens[0] in ("+", "-"):
        sign = 1 if tokens[0] == "+" else -1
        other, tokens = _product(tokens[1:])
        value += sign * other
    return value, tokens


def _product(tokens):
    if tokens[0] in ("+", "-") and tokens[1] not in ("+", "-"):
        value, rest = _product(tokens[1:])
        return (value if tokens[0] == "+" else -value), rest
    value, tokens = _power(tokens)
    while tokens[0] in ("*", "/", "(", "{", "\\frac", "\\sqrt", "sqrt", "\\pi", "pi"):
        if tokens[0] in ("*", "/"):
            other, rest = _power(tokens[2:] if tokens[1] == "-" else tokens[1:])
            other = -other if tokens[1] == "-" else other
            value, tokens = (value * other if tokens[0] == "*" else value / other), rest
        else:                           # 2\pi
            other, tokens = _power(tokens)
            value *= other
    return value, tokens


def _power(tokens):
    value, rest = _atom(tokens)
    if tokens[0].isdigit():             # mixed numbers: 1 1/2, 1\frac{1}{2}
        if rest[0] == "\\frac":
            part, rest = _atom(rest)
            value += part
        elif rest[0].isdigit() and rest[1] == "/" and rest[2].isdigit():
            value, rest = value + Fraction(int(rest[0]), int(rest[2])), rest[3:]
    if rest[0] == "^":
        negative = rest[1] == "-"
        exponent, rest = _atom(rest[2:] if negative else rest[1:])
        exponent = -exponent if negative else exponent
        if abs(exponent) > 64 or abs(value) > 10**18:
            raise ValueError("out of bounds")
        value = value ** (int(exponent) if exponent == int(exponent) else float(exponent))
        if isinstance(value, complex):
            raise ValueError("not real")
    if rest[0] == "%":
        value, rest = value / 100, rest[1:]
    return value, rest


def _atom(tokens):
    head, rest = tokens[0], tokens[1:]
    if head in ("(", "{"):
        value, rest = _sum(rest)
        if rest[0] != (")" if head == "(" else "}"):
            raise ValueError("not closed")
        return value, rest[1:]
    if head == "\\frac":
        if rest[0].isdigit() and len(rest[0]) > 1:                  # \frac12
            rest = [rest[0][0], rest[0][1:], *rest[1:]]
        top, rest = _atom(rest)
        bottom, rest = _atom(rest)
        return top / bottom, rest
    if head in ("\\sqrt", "sqrt"):
        degree = 2
        if rest[0] == "[":
            degree, rest = int(rest[1]), rest[3:]
        value, rest = _atom(rest)
        if value < 0 or not 2 <= degree <= 9:
            raise ValueError("not real")
        roots = [round(float(x) ** (1 / degree)) for x in Fraction(value).as_integer_ratio()]
        exact = Fraction(*roots) if roots[1] else None
        return (exact if exact is not None and exact**degree == value else float(value) ** (1 / degree)), rest
    if head in ("\\pi", "pi"):
        return math.pi, rest
    if not head[:1].isdigit() and head[:1] != ".":
        raise ValueError(f"not a number: {head!r}")
    return Fraction(head.replace(",", "")), rest


# Each unit and its other names. Only these may stand behind a number that the gold answer has without a unit
_UNITS = """cm centimeter centimeters centimetre centimetres; mm millimeter millimeters millimetre millimetres;
    m meter meters metre metres; km kilometer kilometers kilometre kilometres; inch in inches; ft foot feet; yd yard yards; mile miles mi;
    g gram grams; kg kilogram kilograms kilo kilos; mg milligram milligrams; lb lbs pound pounds; oz ounce ounces;
    L l liter liters litre litres; ml mL milliliter milliliters millilitre millilitres;
    s sec secs second seconds; min mins minute minutes; h hr hrs hour hours; day days; week weeks; month months; year years;
    degrees degree deg; degrees_C degrees_Celsius Celsius; degrees_F degrees_Fahrenheit Fahrenheit; rad radian radians;
    unit units; point points; $ dollar dollars USD; € euro euros EUR; £ GBP; cent cents; mph; J joule joules; N newton newtons; W watt watts;
    V volt volts; A ampere amperes amps; Hz hertz; Pa pascal pascals; K kelvin; mol moles"""
_UNIT_OF = {name.replace("_", " "): names.split()[0] for names in _UNITS.split(";") for name in names.split()}
_NAMES = "|".join(re.escape(name) for name in sorted(_UNIT_OF, key=len, reverse=True))
_UNIT = re.compile(rf"(?P<gap>^|(?<=[\d}})%])| )(?P<power>square |sq |cubic )?(?P<unit>{_NAMES})"
                   rf"(?: ?\^ ?\{{?(?P<exponent>[23])\}}?)?(?: ?(?:/|per) ?(?P<per>{_NAMES}))?$")


def split_unit(text: str) -> tuple[str, tuple | None]:
    """"5 cm^2" -> "5", ("cm", "2", None); "$5" -> "5", ("$", None, None); without a unit the text and None."""
    if text[:1] in ("$", "€", "£"):
        return text[1:].strip(), (text[0], None, None)
    found = _UNIT.search(text)
    if not found or not found.start() or (len(found["unit"]) == 1 and found["unit"].isalpha() and not found["gap"]):      # 2m may be 2 * m
        return text, None
    power = {"square ": "2", "sq ": "2", "cubic ": "3"}.get(found["power"], found["exponent"])
    return text[:found.start()].strip(), (_UNIT_OF[found["unit"]], power, _UNIT_OF.get(found["per"]))


def _parts(text: str) -> tuple[str, list[str]] | None:
    """A tuple, interval, set or list -> its brackets ("" for a bare list) and its elements; None for anything else."""
    bare = re.sub(r",? (?:and|or) ", ", ", text)
    kind = ""
    if text[:1] in ("(", "[", "⟨", "{") and text[-1:] in (")", "]", "⟩", "}"):
        kind, bare = {"⟨": "{"}.get(text[0], text[0]) + {"⟩": "}"}.get(text[-1], text[-1]), text[1:-1]
    depth, start, parts = 0, 0, []
    for i, c in enumerate(bare):
        depth += (c in "([{⟨") - (c in ")]}⟩")
        if depth < 0:
            return None                 # (1, 2) \cup (3, 4) has no outer pair
        if c == "," and depth == 0:
            parts.append(bare[start:i].strip())
            start = i + 1
    return (kind, [*parts, bare[start:].strip()]) if parts else None


_YES = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_LETTER = re.compile(r"(?i:(?:the )?(?:correct )?(?:option|choice|answer)?:? ?(?:is )?)[(\[]?([A-Za-z])[)\]]?(?:[.:)] ?(.*))?$", re.S)


def _letter(text: str) -> tuple[str, str] | None:
    """"(B)", "B.", "option b", "B: 12 cm" -> the letter and what follows it; None for anything else, several options included."""
    found = _LETTER.match(text)
    if not found or re.search(r"(?:^|[\s,;(])[A-Z][).:]", found[2] or ""):
        return None
    return found[1].upper(), (found[2] or "").strip()


def _words(text: str) -> str:
    if re.search(r"\d|\\", text):
        return re.sub(r"\{(\w)\}", r"\1", text.replace(" ", "")).casefold()
    return " ".join(w for w in re.sub(r"[\W_]+", " ", text.casefold()).split() if w not in ("a", "an", "the"))


def same_answer(given: str, answer: str, choices: list[str] | None = None) -> bool:
    """Is `given` the gold `answer`? As numbers (exact value; the same unit, or one of them without), sets, tuples and intervals element by
    element, yes/no, option letters or, with `choices`, an option's own text, and otherwise as text up to case, articles and punctuation.

    Strict on purpose: a wrong answer that passes is learnt. What hedges ("5 or 6"), negates or lists every option is no answer.
    """
    if len(given) > LONGEST or len(answer) > LONGEST:
        return False
    if "\\boxed" in answer or "<answer>" in answer:
        answer = extract_answer(answer) or answer
    a, b = _tidy(given), _tidy(answer)
    if choices:
        picked, gold = pick_option(a, choices), pick_option(b, choices)
        if gold is not None:
            return picked == gold
    elif re.fullmatch(r"[(\[]?[A-Za-z][)\]]?", b):
        found = _letter(a)
        return found is not None and found[0] == b.strip("()[]").upper()
    return _same(a, b, 3)


def pick_option(text: str, choices: list[str]) -> int | None:
    """Which option a text picks: by its letter, alone or with the option's own text, or by that text if only one option has it."""
    same = [i for i, choice in enumerate(choices) if _same(text, _tidy(str(choice)), 3)]
    if len(same) == 1:
        return same[0]
    found = _letter(text)
    if not found or not (place := ord(found[0]) - ord("A")) < len(choices):
        return None
    return place if not found[1] or _same(found[1], _tidy(str(choices[place])), 3) else None


def _same(a: str, b: str, depth: int) -> bool:
    (x, unit_a), (y, unit_b) = split_unit(a), split_unit(b)
    value, gold = to_number(x), to_number(y)
    if value is not None and gold is not None:
        exact = isinstance(value, Fraction) and isinstance(gold, Fraction)
        equal = value == gold if exact else math.isclose(value, gold, rel_tol=1e-12)
        return equal and (unit_a is None or unit_b is None or unit_a == unit_b)
    if value is not None or gold is not None:
        return False
    several, wanted = _parts(a), _parts(b)
    if depth and several and wanted:
        (kind, items), (gold_kind, golds) = several, wanted
        if len(items) != len(golds) or {kind, gold_kind} - {"", "{}"} and kind != gold_kind:
            return False
        if kind not in ("", "{}"):
            return all(_same(i, g, depth - 1) for i, g in zip(items, golds))
        left = list(golds)
        for item in items:              # unordered: each gold element is used once
            match = next((g for g in left if _same(item, g, depth - 1)), None)
            if match is None:
                return False
            left.remove(match)
        return True
    a, b = _words(a), _words(b)
    return bool(b) and _YES.get(a, a) == _YES.get(b, b)


def verify(response: str, answer: str, choices: list[str] | None = None) -> bool:
    """Is the response's final answer the gold answer? No answer found, or one not understood, is False; never an exception."""
    given = extract_answer(response)
    return given is not None and same_answer(given, answer, choices)


def load_verifier(name: str):
    """"rules": `verify`. "math": where the rules say no to a formula that they cannot read, math-verify decides.

    Not to anything else: of the labelled answers in tests/, math-verify by itself passes 12 wrong ones (50% for 50, 5 m for 5 cm, a set for a
    tuple) and fails 55 right ones. Raises ValueError where it is not installed."""
    if name == "rules":
        return verify
    try:
        import math_verify
    except ImportError:
        raise ValueError("--verifier math needs math-verify: python -m pip install 'math-verify[antlr4_13_2]'") from None

    def check(response: str, answer: str, choices: list[str] | None = None) -> bool:
        given = extract_answer(response)
        if choices or given is None or len(given) > LONGEST or verify(response, answer):
            return verify(response, answer, choices)
        gold = _tidy(extract_answer(answer) or answer)
        parts = _parts(gold)
        if all(to_number(split_unit(part)[0]) is not None for part in (parts[1] if parts else [gold])) or not re.search(r"[\\\d=+*/^<>]", gold):
            return False                # numbers and words: the rules read them, and their no is a no
        return bool(math_verify.verify(math_verify.parse(f"${answer}$"), math_verify.parse(f"${given}$")))
    return check


def reward(response: str, correct: bool, format_weight: float = 0.0, think: bool = False) -> float:
    """(1 - format_weight) * correct + format_weight * (a non-empty \\boxed{} ends the response). Routing never reads it.

    think: the boxed answer must stand behind thinking that is closed once, as the released recipe wants. The opening tag is not asked
    for: a thinking model's template may have written it into the prompt.
    """
    thought, closed, after = response.partition("</think>")
    fine = "\\boxed" in after + thought * (not think) and extract_answer(response) is not None
    if think:
        fine = fine and bool(closed) and "think>" not in after and "<think>" not in thought.strip().removeprefix("<think>")
    return (1 - format_weight) * float(correct) + format_weight * float(fine)
