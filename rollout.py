"""Questions in, verified responses out: samples, prompts, group sampling, answers and rewards, batches.

The path of one question: `Question` -> `student_messages` -> `encode_prompts` (chat template, image tokens, pixels) -> `sample_groups`
(G responses) -> `verify` and `reward` -> `collate` -> `response_states` (what the losses read).
Traps that cost hours are marked TRAP.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from plumbing.answers import extract_answer
from plumbing.decoding import draw, uniforms
from plumbing.images import open_image
from plumbing.memory import sequence_bytes

FORMAT_PROMPT = "Put the final answer in \\boxed{}."  # ends every user turn, the student's and the teacher's alike


# ---------------------------------------------------------------------------------------------------------------- samples
@dataclass
class Question:
    """One verifiable question. images: PIL images or paths, in the order of the <image> marks in the question, if it has any.
    hint: a hints.Hint or None; family: a free label for tables; choices: the options' texts of a multiple-choice question; solution: a
    worked one, which only a teacher of the comparison reads; boxes: where the hint looks, for each image (left, top, right, bottom) in
    its pixels, to be drawn and no more."""

    id: str
    text: str
    answer: str
    images: list
    hint: object | None = None
    family: str = ""
    choices: list[str] | None = None
    solution: str | None = None
    boxes: list | None = None


# ---------------------------------------------------------------------------------------------------------------- prompts


def user_turn(sample: Question, text: str) -> dict:
    """A chat turn of the sample's images and `text`: the images first, or where the text has its <image> marks."""
    parts = (
        text.split("<image>") if "<image>" in sample.text else [""] * len(sample.images) + [text]
    )
    content = []
    for i, part in enumerate(parts):
        content += ([{"type": "image"}] if i else []) + (
            [{"type": "text", "text": part}] if part else []
        )
    return {"role": "user", "content": content}


def student_messages(sample: Question, context: str = "") -> list[dict]:
    """The chat that the student gets: images, question, format instruction. `context` (a hint) goes between the last two."""
    return [
        user_turn(sample, "\n".join(part for part in (sample.text, context, FORMAT_PROMPT) if part))
    ]


@dataclass
class Prompt:
    """One encoded prompt. ids, types (P,) long: tokens, and 1 at image tokens; pixels, grid: all its images, or None.
    pixels: patches, 4 an image token, or after `encode_images` the features of its image tokens."""

    ids: Tensor
    types: Tensor
    pixels: Tensor | None
    grid: Tensor | None


def encode_prompts(processor, samples: list[Question], messages: list[list[dict]]) -> list[Prompt]:
    """Render the chats, expand image tokens, turn images into patches. One Prompt a sample, on the CPU."""
    prompts = []
    for sample, chat in zip(samples, messages, strict=True):
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = [open_image(i) for i in sample.images]
        got = processor(
            text=[text], images=images or None, return_tensors="pt", return_mm_token_type_ids=True
        )
        prompts.append(
            Prompt(
                got["input_ids"][0],
                got["mm_token_type_ids"][0],
                got.get("pixel_values"),
                got.get("image_grid_thw"),
            )
        )
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
    ids (B, T): response tokens, padded on the right; mask (B, T) bool: the real ones, EOS included; apart: prompt i is response i's."""

    prompts: dict
    rows: Tensor
    ids: Tensor
    mask: Tensor
    apart: bool = False


def collate(
    prompts: list[Prompt],
    responses: list[list[int]],
    pad_id: int,
    device="cpu",
    apart: bool = False,
) -> Batch:
    """B responses, each with its Prompt; one that several responses share (the same object) is held once, unless `apart`.

    TRAP: the mask comes from the responses' lengths, never from `ids == pad`: EOS must be trained, and in some models it is the pad token.
    """
    different = prompts if apart else list({id(p): p for p in prompts}.values())
    place = {id(p): u for u, p in enumerate(different)}
    T = max(map(len, responses))
    ids = torch.tensor([r + [pad_id] * (T - len(r)) for r in responses], device=device)
    mask = torch.arange(T, device=device) < torch.tensor(
        [len(r) for r in responses], device=device
    ).unsqueeze(1)
    rows = torch.tensor(
        range(len(prompts)) if apart else [place[id(p)] for p in prompts], device=device
    )
    return Batch(pad_prompts(different, pad_id, device), rows, ids, mask, apart)


def repeat_rows(x: Tensor, rows: Tensor) -> Tensor:
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
    deltas = (
        model.model.rope_deltas if "pixel_values" in prompts else torch.zeros_like(attended[:, :1])
    )
    for layer in out.past_key_values.layers:
        layer.keys, layer.values = repeat_rows(layer.keys, rows), repeat_rows(layer.values, rows)
    return (
        repeat_rows(out.last_hidden_state[:, -1:], rows),
        out.past_key_values,
        attended[rows],
        (attended.sum(1, keepdim=True) + deltas)[rows],
    )


def response_states(model, batch: Batch) -> Tensor:
    """Final hidden states (B, T, H), differentiable: state t is the one that predicts response token t, given the tokens before it.

    Each prompt runs once, and its keys and values serve all of its responses (gradients add up there). A batch with prompts `apart` runs
    as whole sequences, without a cache: the way for a model that recomputes its activations (gradient checkpointing).
    """
    if batch.apart:
        answer = batch.ids[:, :-1]
        whole = {
            "input_ids": answer,
            "attention_mask": batch.mask[:, :-1].long(),
            "mm_token_type_ids": torch.zeros_like(answer),
        }
        inputs = {
            name: torch.cat([x, whole[name]], 1) if name in whole else x
            for name, x in batch.prompts.items()
        }
        return model.model(**inputs, use_cache=False).last_hidden_state[:, -batch.ids.shape[1] :]
    first, cache, attended, start = prefill(model, batch.prompts, batch.rows)
    T = batch.ids.shape[1]
    if T == 1:
        return first
    positions = (start + torch.arange(T - 1, device=start.device)).expand(
        3, -1, -1
    )  # (3, B, T - 1)
    rest = model.model(
        input_ids=batch.ids[:, :-1],
        attention_mask=torch.cat([attended, batch.mask[:, :-1].long()], 1),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([first, rest.last_hidden_state], 1)


# --------------------------------------------------------------------------------------------------------------- sampling
def eos_tokens(model, tokenizer) -> list[int]:
    """All ids that end a response: the model's generation config may name several."""
    eos = model.generation_config.eos_token_id
    return sorted(
        {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [] if eos is None else [eos])}
    )


def banned_tokens(model, tokenizer) -> list[int]:
    """Ids that must not be sampled: vision and special tokens but EOS, and the rows of a vocabulary padded beyond the tokenizer.

    TRAP: a policy can sample the image placeholder itself, and the next scoring pass then dies of "image features and image tokens do
    not match". The same ban is applied when scoring, so that ratios and divergences are those of the sampled distribution.
    """
    config = model.config
    vision = [
        getattr(config, f"{name}_token_id", None)
        for name in ("image", "video", "vision_start", "vision_end")
    ]
    special = [
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    ] + tokenizer.all_special_ids
    padded = range(len(tokenizer), model.get_output_embeddings().weight.shape[0])
    return sorted(
        ({i for i in vision if i is not None} | set(special) | set(padded))
        - set(eos_tokens(model, tokenizer))
    )


@dataclass
class Rollout:
    """One response: token ids with EOS, decoded text; truncated: the length limit came before EOS; logp: the sampler's own log-probs at the
    sampling temperature (None from model.generate); verdict and reward follow."""

    sample: Question
    ids: list[int]
    text: str
    truncated: bool
    logp: list[float] | None = None
    correct: bool = False
    reward: float = 0.0


@torch.no_grad()
def _decode(
    model,
    prompts: list[Prompt],
    noise: Tensor | None,
    eos: list[int],
    banned: list[int],
    pad: int,
    max_new_tokens: int,
    **how,
) -> tuple[list[list[int]], list[list[float]]]:
    """One response to each of R prompts (the same object runs once), and its log-probs. noise (R, max_new_tokens): see `draw`."""
    device = model.device
    different = list({id(p): p for p in prompts}.values())
    place = {id(p): u for u, p in enumerate(different)}
    live = torch.arange(len(prompts), device=device)  # which response each row of the cache writes
    state, cache, attended, start = prefill(
        model,
        pad_prompts(different, pad, device),
        torch.tensor([place[id(p)] for p in prompts], device=device),
    )
    eos, banned = torch.tensor(eos, device=device), torch.tensor(banned, device=device)
    noise = None if noise is None else noise.to(device)
    ids = torch.full((len(prompts), max_new_tokens), pad, device=device)
    logp, lengths = torch.zeros(ids.shape, device=device), torch.full_like(live, max_new_tokens)
    done = torch.zeros_like(live, dtype=torch.bool)
    head = model.get_output_embeddings()
    for t in range(max_new_tokens):
        # W x^T, not x W^T: for a dozen rows and a large vocabulary a CPU's matrix product is 1.6 times as fast in this order
        logits = (head.weight @ state[:, -1].T).T.float().contiguous()  # (R, V)
        logits.index_fill_(-1, banned, -math.inf)
        token, logp[live, t] = draw(logits, None if noise is None else noise[live, t], **how)
        ids[live, t] = token
        ended = torch.isin(token, eos) & ~done
        lengths[live[ended]] = t + 1
        done |= ended
        if t == max_new_tokens - 1 or done.all():
            break
        if (
            done.float().mean() >= 0.25
        ):  # rows that have ended leave; each time costs a copy of the cache
            keep = (~done).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            live, attended, start, token, done = (
                x[keep] for x in (live, attended, start, token, done)
            )
        attended = torch.cat([attended, torch.ones_like(attended[:, :1])], 1)
        state = model.model(
            input_ids=token.unsqueeze(1),
            attention_mask=attended,
            position_ids=(start + t).expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # (R, 1, H)
    lengths = lengths.tolist()
    return [row[:n] for row, n in zip(ids.tolist(), lengths)], [
        row[:n] for row, n in zip(logp.tolist(), lengths)
    ]


@torch.no_grad()
def _generate(
    model,
    prompts: list[Prompt],
    eos: list[int],
    banned: list[int],
    pad: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
) -> tuple[list[list[int]], None]:
    """The same by model.generate, every prompt as often as it has responses; draws from torch's global random state."""
    drawn = (
        dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k)
        if temperature > 0
        else dict(do_sample=False)
    )
    # TRAP: whatever is left None here is filled in from the model's own generation config; Qwen ships a repetition penalty
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        num_beams=1,
        pad_token_id=pad,
        repetition_penalty=1.0,
        suppress_tokens=banned,
        **drawn,
    )
    inputs = pad_prompts(prompts, pad, model.device)
    out = model.generate(**inputs, generation_config=config)[
        :, inputs["input_ids"].shape[1] :
    ].tolist()
    ends = [next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids)) for ids in out]
    return [ids[:end] for ids, end in zip(out, ends)], [None] * len(out)


def sample_groups(
    model,
    processor,
    samples: list[Question],
    prompts: list[Prompt],
    group_size: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    keys: list[str] | None = None,
    sample_mb: float = 4096,
    generate: str = "own",
) -> list[list[Rollout]]:
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
    rows = sorted(
        ((n, g) for n in range(len(prompts)) for g in range(group_size)),
        key=lambda row: len(prompts[row[0]].ids),
    )
    together = (
        max(
            1,
            int(sample_mb * 2**20)
            // sequence_bytes(model, max(len(p.ids) for p in prompts) + max_new_tokens),
        )
        if rows
        else 1
    )
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
                drawn = _decode(
                    model,
                    chosen,
                    uniforms(names, max_new_tokens) if temperature > 0 else None,
                    *special,
                    max_new_tokens,
                    **how,
                )
        except torch.OutOfMemoryError:
            if halved or len(part) == 1:
                raise
        if drawn is None:  # not within except, where the traceback still holds the tensors
            halved, together = True, len(part) // 2
            print(
                f"out of memory decoding {len(part)} sequences together; going on with {together} (--sample-mb sets this)",
                file=sys.stderr,
            )
            torch.cuda.empty_cache()
            continue
        responses.update(zip(part, zip(*drawn)))
        rows = rows[len(part) :]
    model.train(training)
    eos = set(special[0])
    return [
        [
            Rollout(
                sample,
                ids,
                tokenizer.decode(ids, skip_special_tokens=True),
                ids[-1] not in eos,
                logp,
            )
            for ids, logp in (responses[n, g] for g in range(group_size))
        ]
        for n, sample in enumerate(samples)
    ]


# ------------------------------------------------------------------------------------------------------- answers: finding them


# ------------------------------------------------------------------------------------------------------ answers: comparing them


def reward(response: str, correct: bool, format_weight: float = 0.0, think: bool = False) -> float:
    """(1 - format_weight) * correct + format_weight * (a non-empty \\boxed{} ends the response). Routing never reads it.

    think: the boxed answer must stand behind thinking that is closed once, as the released recipe wants. The opening tag is not asked
    for: a thinking model's template may have written it into the prompt.
    """
    thought, closed, after = response.partition("</think>")
    fine = "\\boxed" in after + thought * (not think) and extract_answer(response) is not None
    if think:
        fine = (
            fine
            and bool(closed)
            and "think>" not in after
            and "<think>" not in thought.strip().removeprefix("<think>")
        )
    return (1 - format_weight) * float(correct) + format_weight * float(fine)
