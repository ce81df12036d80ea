"""Questions in, verified responses out: chats, prompts, group sampling, verification, reward.

The path of one question: `Question` -> `student_messages` (a chat) -> `encode_prompts` (tokens and
pixels) -> `sample_groups` (G responses) -> `verify` and `reward` -> `collate` (a batch of
responses) -> `response_states` (hidden states, which the losses read). TRAP marks what cost us
hours.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing.answers import extract_answer, same_answer
from plumbing.decoding import CastingCache, Prefilled, Slots, uniforms
from plumbing.images import image_tokens_expanded, patches_of_questions
from plumbing.memory import PREFILL_TOKENS, sequence_bytes

FORMAT_PROMPT = "Put the final answer in \\boxed{}."  # ends the student's and the teacher's turn


# ------------------------------------------------------------------------------ questions and chats
@dataclass
class Question:
    """One verifiable question.

    images: PIL images, paths or plumbing.images.StoredImage, in the order of the <image> marks in
    the text, if it has any. hint: a hints.Hint or None. family: a free label for tables. choices:
    the texts of a multiple-choice question's options. solution: a worked one, which only a teacher
    of the comparison reads. boxes: for each image, where the hint looks, a list of (left, top,
    right, bottom) in pixels; they are drawn and not used otherwise.
    """

    id: str
    text: str
    answer: str
    images: list
    hint: object | None = None
    family: str = ""
    choices: list[str] | None = None
    solution: str | None = None
    boxes: list | None = None


def user_turn(question: Question, text: str) -> dict:
    """A chat turn with the question's images and `text`.

    The images stand first, or where the text has its <image> marks.
    """
    if "<image>" in question.text:
        pieces = text.split("<image>")
    else:
        pieces = [""] * len(question.images) + [text]
    content = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        content += [{"type": "image"}, {"type": "text", "text": piece}]
    return {"role": "user", "content": [part for part in content if part.get("text") != ""]}


def chat(question: Question, privileged: str = "") -> list[dict]:
    """Images, question, privileged text if any, format instruction: one user turn.

    The teacher's chat differs from the student's in `privileged` alone.
    """
    parts = [question.text, privileged, FORMAT_PROMPT]
    return [user_turn(question, "\n".join(part for part in parts if part))]


def student_messages(question: Question) -> list[dict]:
    """The student's chat, in training and in evaluation: x of the paper, without any hint."""
    return chat(question)


# ---------------------------------------------------------------------------------------- prompts
@dataclass
class Prompt:
    """One encoded chat about a question.

    ids, types (P,) long: tokens, and 1 at image tokens. pixels (patches, values), 4 patches per
    image token, or, after plumbing.images.encode_images, features; grid (images, 3): time, height
    and width in patches. Both are of all its images, or None.
    """

    question: Question
    ids: Tensor
    types: Tensor
    pixels: Tensor | None
    grid: Tensor | None


def encode_prompts(
    processor, questions: list[Question], chats: list[list[dict]], images: list | None = None
) -> list[Prompt]:
    """Render the chats, turn images into patches, expand image tokens. On the CPU.

    images: a pair (pixels, grid) per question, where a prompt has them already: the teacher's chat
    shows the student's images. Without it they are made here, in threads.
    """
    images = images or patches_of_questions(processor, questions)
    prompts = []
    for question, messages, (pixels, grid) in zip(questions, chats, images, strict=True):
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids, is_image = image_tokens_expanded(processor, text, grid)
        prompts.append(Prompt(question, ids, is_image.long(), pixels, grid))
    return prompts


def pad_prompts(prompts: list[Prompt], pad_id: int, device="cpu") -> dict[str, Tensor]:
    """Model inputs for U prompts, (U, P), padded on the left: every prompt ends in column P - 1."""
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    attended, types = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.ids)
        ids[row, start:] = prompt.ids
        types[row, start:] = prompt.types
        attended[row, start:] = 1
    inputs = {"input_ids": ids, "attention_mask": attended, "mm_token_type_ids": types}
    with_images = [prompt for prompt in prompts if prompt.pixels is not None]
    if with_images:
        inputs["pixel_values"] = torch.cat([prompt.pixels for prompt in with_images])
        inputs["image_grid_thw"] = torch.cat([prompt.grid for prompt in with_images])
    return {name: tensor.to(device) for name, tensor in inputs.items()}


# ----------------------------------------------------------------------- responses on their prompts
@dataclass
class Response:
    """One response y_i to a question. The phases of train.Trainer fill it in turn.

    sample  ids: tokens, EOS included. truncated: the length limit came before EOS. logp: the
            sampler's log-prob of each token at the temperature, before top_p and top_k, or None.
    grade   correct: the verifier's verdict. reward.
    assign  advantage. teacher_prompt: the prompt with the hint. tutored, penalised, in_loss: which
            losses it is in. weights: what a token of it counts in the means of policy loss, KL and
            tutoring. old_logp (T,): log-probs under pi_old; None: pi_old is the current policy.
    """

    prompt: Prompt
    ids: list[int]
    text: str
    truncated: bool
    logp: list[float] | None = None
    correct: bool = False
    reward: float = 0.0
    advantage: float = 0.0
    teacher_prompt: Prompt | None = None
    tutored: bool = False
    penalised: bool = False
    in_loss: bool = True
    weights: tuple[float, float, float] = (0.0, 0.0, 0.0)
    old_logp: Tensor | None = None

    @property
    def question(self) -> Question:
        return self.prompt.question


@dataclass
class Batch:
    """B responses on U prompts.

    prompts: model inputs of the U prompts. prompt_of (B,): which of them a response answers. ids
    (B, T): response tokens, padded on the right. mask (B, T) bool: the real ones, EOS included.
    one_prompt_per_response: prompt i is response i's, repeated where responses share it.
    """

    prompts: dict[str, Tensor]
    prompt_of: Tensor
    ids: Tensor
    mask: Tensor
    one_prompt_per_response: bool = False


def distinct_prompts(prompts: list[Prompt]) -> tuple[list[Prompt], Tensor]:
    """The U prompts that are different objects; for each of the B prompts which one it is (B,)."""
    distinct = list({id(prompt): prompt for prompt in prompts}.values())
    place = {id(prompt): row for row, prompt in enumerate(distinct)}
    return distinct, torch.tensor([place[id(prompt)] for prompt in prompts])


def collate(
    prompts: list[Prompt],
    responses: list[list[int]],
    pad_id: int,
    device="cpu",
    one_prompt_per_response: bool = False,
) -> Batch:
    """B responses (token ids), each with its Prompt. A shared one (the same object) is held once.

    TRAP: the mask comes from the responses' lengths, never from `ids == pad`: EOS must be trained,
    and in some models it is the pad token.

    TRAP: T is at least 2. Responses of one token alone would take one forward pass where others
    take two (response_states), and sharded processes must run the same number.
    """
    if one_prompt_per_response:
        distinct, prompt_of = prompts, torch.arange(len(prompts))
    else:
        distinct, prompt_of = distinct_prompts(prompts)
    lengths = [len(response) for response in responses]
    longest = max(2, *lengths)
    padded = [response + [pad_id] * (longest - len(response)) for response in responses]
    return Batch(
        prompts=pad_prompts(distinct, pad_id, device),
        prompt_of=prompt_of.to(device),
        ids=torch.tensor(padded, device=device),
        mask=torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None],
        one_prompt_per_response=one_prompt_per_response,
    )


def repeat_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] along the first dimension, with a gradient that is the same in every run.

    TRAP: the backward of x[rows], and of a cache's batch_select_indices, adds equal rows by atomics
    on a CPU: with two threads or more their order, and the last bits of a run, are chance.
    index_select does the same on a GPU. An embedding's backward adds in order. We measured that on
    a CPU; for a GPU we rely on the list in torch.use_deterministic_algorithms, which names the
    other two and not this one.
    """
    return F.embedding(rows, x.flatten(1)).view(len(rows), *x.shape[1:])


def prefill(model, prompts: dict[str, Tensor], prompt_of: Tensor):
    """Run each of U prompts once, images included, for the B rows that continue them.

    prompts: of pad_prompts. prompt_of (B,) long: each row's prompt. TRAP: prompts must be padded on
    the left, as the last column is read. Returns, with gradient where it is enabled: the state that
    predicts the first response token (B, 1, H), the cache (B rows), the attention mask (B, P), and
    the position of the first response token (B, 1).

    TRAP: with a cache, position ids must be given: left alone, the model counts an image's tokens
    one by one, and no error says so. rope_deltas is state that the last prefill left on the model,
    so read it at once. After a batch of text alone it is stale; and there the model would count
    padding too, so that a short prompt stands too near its response.
    """
    cache = CastingCache(config=model.config.get_text_config())
    attended = prompts["attention_mask"]
    has_images, places = "pixel_values" in prompts, {}
    if not has_images:
        counted = (attended.cumsum(1) - 1).clamp(min=0)
        places = {"position_ids": counted.expand(3, -1, -1)}  # time, height, width: (3, U, P)
    out = model.model(**prompts, **places, past_key_values=cache, use_cache=True)
    deltas = model.model.rope_deltas if has_images else torch.zeros_like(attended[:, :1])
    for layer in cache.layers:
        layer.keys = repeat_rows(layer.keys, prompt_of)
        layer.values = repeat_rows(layer.values, prompt_of)
    last_state = repeat_rows(out.last_hidden_state[:, -1:], prompt_of)
    positions = (attended.sum(1, keepdim=True) + deltas)[prompt_of]
    return last_state, cache, attended[prompt_of], positions


def response_states(model, batch: Batch) -> Tensor:
    """Final hidden states (B, T, H), differentiable. State t predicts response token t.

    Each prompt runs once, and its keys and values serve all of its responses; gradients add up
    there. With one prompt per response a batch runs as whole sequences, without a cache: the way
    for a model that recomputes its activations (gradient checkpointing).
    """
    response_mask = batch.mask[:, :-1].long()
    if batch.one_prompt_per_response:
        inputs = dict(batch.prompts)
        response = batch.ids[:, :-1]
        for name, tail in (
            ("input_ids", response),
            ("attention_mask", response_mask),
            ("mm_token_type_ids", torch.zeros_like(response)),
        ):
            inputs[name] = torch.cat([inputs[name], tail], 1)
        states = model.model(**inputs, use_cache=False).last_hidden_state
        return states[:, -batch.ids.shape[1] :]
    state, cache, attended, start = prefill(model, batch.prompts, batch.prompt_of)
    positions = start + torch.arange(batch.ids.shape[1] - 1, device=start.device)
    out = model.model(
        input_ids=batch.ids[:, :-1],
        attention_mask=torch.cat([attended, response_mask], 1),
        position_ids=positions.expand(3, -1, -1),  # time, height, width: (3, B, T - 1)
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([state, out.last_hidden_state], 1)


# --------------------------------------------------------------------------------------- sampling
def eos_tokens(model, tokenizer) -> list[int]:
    """All ids that end a response: the model's generation config may name several."""
    configured = model.generation_config.eos_token_id
    if configured is None:
        configured = []
    elif isinstance(configured, int):
        configured = [configured]
    return sorted({tokenizer.eos_token_id, *configured})


def banned_tokens(model, tokenizer) -> list[int]:
    """Ids that must not be sampled: vision and special tokens but EOS, padding rows of the head.

    TRAP: a policy can sample the image placeholder itself, and the next scoring pass then dies of
    "image features and image tokens do not match". The same ban holds when scoring, so that ratios
    and divergences are those of the sampled distribution.
    """
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    vision = {getattr(model.config, name, None) for name in names} - {None}
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond_tokenizer = range(len(tokenizer), model.get_output_embeddings().weight.shape[0])
    banned = vision | added | set(tokenizer.all_special_ids) | set(beyond_tokenizer)
    return sorted(banned - set(eos_tokens(model, tokenizer)))


@torch.no_grad()
def sample_groups(
    model,
    processor,
    prompts: list[Prompt],
    group_size: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    keys: list[str] | None = None,
    sample_mb: float = 4096,
    watch: Callable | None = None,
) -> list[list[Response]]:
    """`group_size` responses to each prompt (Eq. 6); temperature 0 is greedy.

    Each prompt runs once. Its G responses decode from there, in slots beside those to other
    prompts; where a response has ended, the next one begins. EOS is kept. keys: one text per prompt
    that seeds its draws (default: the question's id), so that slots, order and processes do not
    change what is drawn. TRAP: with equal keys a second call draws the same. sample_mb: MiB for the
    slots. Where memory runs out all the same, their number is halved, once, with a message. watch:
    called every few tokens, see plumbing.decoding.Slots.decode. The model's training mode is
    restored.
    """
    keys = keys or [prompt.question.id for prompt in prompts]
    if len(keys) != len(prompts):
        raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts")
    tokenizer = processor.tokenizer
    eos, banned = eos_tokens(model, tokenizer), banned_tokens(model, tokenizer)
    drawn: dict[tuple[int, int], tuple[list[int], list[float]]] = {}

    def prefilled(slots: int) -> Iterator[Prefilled]:
        """The prompts, run together with others of their length, so that none is padded."""
        left = [row for row in all_rows if row not in drawn]  # not all where memory ran out
        lengths = {n: len(prompts[n].ids) for n, _ in left}
        for part in equal_lengths(lengths, max(1, slots // group_size)):
            rows = [(n, g) for n, g in left if n in part]
            inputs = pad_prompts([prompts[n] for n in part], tokenizer.pad_token_id, model.device)
            each_once = torch.arange(len(part), device=model.device)
            state, cache, _, first = prefill(model, inputs, each_once)
            prompt_of = torch.tensor([part.index(n) for n, _ in rows])
            noise = None
            if temperature > 0:
                noise = uniforms([f"{keys[n]}-{g}" for n, g in rows], max_new_tokens)
            yield Prefilled(rows, prompt_of, state[:, 0], cache.layers, first[:, 0], noise)

    def decode(count: int) -> None:
        slots = Slots(model, count, longest, max_new_tokens, eos, banned)
        settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        for row, ids, logp in slots.decode(prefilled(count), watch, **settings):
            drawn[row] = ids, logp

    def finished(n: int, g: int) -> Response:
        ids, logp = drawn[n, g]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return Response(prompts[n], ids, text, truncated=ids[-1] not in eos, logp=logp)

    all_rows = [(n, g) for n in range(len(prompts)) for g in range(group_size)]
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    slots = int(sample_mb * 2**20) // sequence_bytes(model, longest + max_new_tokens)
    with in_eval_mode(model):
        halve_where_memory_ends(decode, max(1, min(slots, len(all_rows))))
    return [[finished(n, g) for g in range(group_size)] for n in range(len(prompts))]


@contextlib.contextmanager
def in_eval_mode(model):
    """The model in eval mode; afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:  # watch may raise, to stop
        model.train(training)


def equal_lengths(lengths: dict[int, int], at_most: int) -> Iterator[list[int]]:
    """The keys with the same length, at most so many together; the shortest first."""
    for length in sorted(set(lengths.values())):
        count = max(1, min(at_most, PREFILL_TOKENS // length))
        numbers = [n for n in lengths if lengths[n] == length]
        for start in range(0, len(numbers), count):
            yield numbers[start : start + count]


def halve_where_memory_ends(decode: Callable[[int], None], slots: int) -> None:
    """decode(slots); where memory runs out, once more with half as many, for what is left."""
    try:
        return decode(slots)
    except torch.OutOfMemoryError:
        if slots == 1:
            raise
    # after the except clause, as the traceback holds the tensors as long as it lasts
    print(
        f"out of memory with {slots} responses decoding together; going on with {slots // 2} "
        "(--sample-mb sets this)",
        file=sys.stderr,
    )
    torch.cuda.empty_cache()
    decode(slots // 2)


# ------------------------------------------------------------------------- verification and reward
def verify(response: str, question: Question, same=same_answer) -> bool:
    """Is the response's final answer the question's? R of Eq. 6.

    same(given, answer, choices) compares two answers: plumbing.answers.load_judge has two ways. An
    answer that is missing or not understood is wrong; nothing raises an exception.
    """
    given = extract_answer(response)
    return given is not None and same(given, question.answer, question.choices)


def reward(response: str, correct: bool, format_weight: float = 0.0, think: bool = False) -> float:
    """(1 - format_weight) * correct + format_weight * well-formed. Routing never reads it.

    Paper, table 3: format_weight 0.1. What is well-formed is ours: a non-empty \\boxed{}. think:
    besides, it stands behind thinking that is closed once, as EasyR1, the release's base, asks for.
    The opening tag is not asked for: a thinking model's template may have put it into the prompt.
    """
    thought, closing_tag, conclusion = response.partition("</think>")
    well_formed = extract_answer(response) is not None
    if think:
        reopened = "<think>" in thought.strip().removeprefix("<think>")
        closed_once = bool(closing_tag) and "think>" not in conclusion
        well_formed &= "\\boxed" in conclusion and closed_once and not reopened
    else:
        well_formed &= "\\boxed" in response
    return (1 - format_weight) * float(correct) + format_weight * float(well_formed)
