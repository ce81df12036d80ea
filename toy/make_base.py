"""Make toy/base: a tiny real Qwen2-VL that has the skill but not the insight.

    python toy/make_base.py    # writes toy/base, prints the accuracies; 25 minutes on 2 cores

The skill: the base reads any row or column that its own text or its prompt names, and keeps a
running sum. It also says where the star and the ring are when it is asked. The insight that it was
never demonstration: "the star row" means the row that the star is in. Its demonstrations for plain
questions are right in form, but read a line out of habit. So it solves a puzzle with the hint and
not without it. What reinforcement or tutoring can add is the insight.

The mix of demonstrations (`episode`):

    hinted  The hint names the lines: read them. In a fifth of these, the text names other lines,
            and the reading follows the text: a teacher must read what its own prefix names.
    named   The question names the lines: read them. In the second stage, half of these questions
            say "the row the star is in".
    plain   The puzzle as the student meets it: read a line out of habit, which is right by luck.
    told    The plain question and "The answer is n.": read lines that fit n, drawn by the same
            habit, then box n. This is the plain solver, conditioned on the answer it was told.
    where   Which row or column is the star or the ring in? Name the line.
    grid    Read all rows: every cell. Here the model learns to see: the share is 90 % at the start
            of stage 1 and falls to 3 % over its first quarter.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hints import teacher_messages
from plumbing.images import ImageTextProcessor
from rollout import Question, encode_prompts, pad_prompts, sample_groups, student_messages, verify
from toy import world

BATCH_SIZE = 32
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """One run of supervision.

    habit: how often a guess names the first, second, third and last line, as weights. shares: the
    mix of demonstrations, as weights. grid_share: the share of further grid readings at the start;
    it falls to 0 over the first quarter. indirect: whether a named question may say "the row the
    star is in". first_episode: the index of its first episode, so that no episode serves twice.
    """

    steps: int
    lr: float
    habit: tuple[int, ...]
    shares: dict[str, int]
    grid_share: float
    indirect: bool
    first_episode: int


STAGES = (
    Stage(
        steps=2400,
        lr=2e-3,
        habit=(3, 1, 1, 1),
        shares={"hinted": 42, "named": 15, "plain": 20, "told": 11, "where": 9, "grid": 3},
        grid_share=0.9,
        indirect=False,
        first_episode=0,
    ),
    Stage(
        steps=700,
        lr=1e-3,
        habit=(47, 1, 1, 1),
        shares={"hinted": 35, "named": 25, "plain": 20, "told": 9, "where": 8, "grid": 3},
        grid_share=0.0,
        indirect=True,
        first_episode=10**8,
    ),
)


# -------------------------------------------------------------------------------- the episodes
@dataclass
class Episode:
    """One demonstration: a question, its chat, and the response to learn.

    mask_lines: the names of lines in the response carry no loss.
    """

    question: Question
    messages: list[dict]
    response: str
    mask_lines: bool = False


def random_lines(puzzle: world.Puzzle, rng: random.Random) -> list[world.Line]:
    """Lines of the kinds that the question asks for, at uniform places."""
    return [(kind, rng.randrange(world.GRID)) for kind, _ in puzzle.lines]


def guessed_lines(
    puzzle: world.Puzzle, rng: random.Random, habit: tuple, fit: bool = False
) -> list[world.Line]:
    """Lines of the right kinds at guessed places, which are right by luck sometimes.

    fit: draw again until their points add up to the answer.

    Why a habit and not a uniform guess: with a uniform guess, the least trace of the star's place
    decided a greedy reading (45 % right, where samples were 30 % right). Every second group held a
    lucky success, so plain GRPO found the insight as fast as tutoring did (66.5 against 68.5 %
    after 60 steps). Tutoring is for the questions that sampling does not solve.
    """
    while True:
        lines = [(kind, rng.choices(range(world.GRID), habit)[0]) for kind, _ in puzzle.lines]
        points = sum(world.line_points(puzzle.cells, line) for line in lines)
        if not fit or points == puzzle.answer:
            return lines


def hinted_episode(puzzle, question: Question, rng: random.Random, stage: Stage) -> Episode:
    """Read the lines of the hint, or, in a fifth of the cases, other lines.

    The names of other lines are masked: the model must not learn to choose them, but only to read
    the lines that its text names.
    """
    other_lines = rng.random() < 0.2
    lines = random_lines(puzzle, rng) if other_lines else puzzle.lines
    response = world.response(puzzle, rng, lines)
    return Episode(question, teacher_messages(question), response, mask_lines=other_lines)


def plain_episode(puzzle, question: Question, rng: random.Random, stage: Stage) -> Episode:
    """The plain question: read lines out of habit."""
    lines = guessed_lines(puzzle, rng, stage.habit)
    return Episode(question, student_messages(question), world.response(puzzle, rng, lines))


def told_episode(puzzle, question: Question, rng: random.Random, stage: Stage) -> Episode:
    """The question with its answer: read lines that fit the answer."""
    lines = guessed_lines(puzzle, rng, stage.habit, fit=True)
    messages = teacher_messages(question, "answer")
    return Episode(question, messages, world.response(puzzle, rng, lines))


def named_episode(puzzle, question: Question, rng: random.Random, stage: Stage) -> Episode:
    """The question names the lines, by their place or, where `indirect`, by what is in them."""
    lines = random_lines(puzzle, rng)
    names = [world.line_name(line) for line in lines]
    if stage.indirect and rng.random() < 0.5:
        lines = puzzle.lines
        indirect = {"row": "the row the star is in", "column": "the column the ring is in"}
        names = [indirect[kind] for kind, _ in lines]
    question.text = f"How many points are in {' plus '.join(names)}?"
    return Episode(question, student_messages(question), world.response(puzzle, rng, lines))


def where_episode(puzzle, question: Question, rng: random.Random, stage: Stage) -> Episode:
    """Say which row or column the star or the ring is in."""
    mark = rng.choice(("star", "ring"))
    kind = rng.choice(("row", "column"))
    candidates = [(kind, index) for index in range(world.GRID)]
    [place] = [line for line in candidates if mark in world.line_cells(puzzle.cells, line)]
    name = world.line_name(place)
    word = name.split()[1]  # "top" of "the top row"
    question.text = f"Which {kind} is the {mark} in?"
    response = f"{rng.choice(world.OPENINGS)} {name}. \\boxed{{{word}}}"
    return Episode(question, student_messages(question), response)


def grid_episode(puzzle, question: Question, rng: random.Random, stage: Stage) -> Episode:
    """Name each cell of the picture."""
    question.text = "Read every row."
    rows = [
        f"{world.line_name(('row', index))}: {', '.join(cells)}"
        for index, cells in enumerate(puzzle.cells)
    ]
    response = f"{rng.choice(world.OPENINGS)} {'. Next '.join(rows)}."
    return Episode(question, student_messages(question), response)


EPISODES = {
    "hinted": hinted_episode,
    "named": named_episode,
    "plain": plain_episode,
    "told": told_episode,
    "where": where_episode,
    "grid": grid_episode,
}


def episode(index: int, stage: Stage, grid_share: float) -> Episode:
    """Episode number `index`: a function of the arguments alone.

    grid_share: the share of grid readings; the other episodes follow stage.shares.
    """
    rng = random.Random(f"episode-{index}")
    puzzle = world.make_puzzle("train", 5 * 10**8 + index)  # far from the puzzles of the RL runs
    kind = "grid"
    if rng.random() >= grid_share:
        kind = rng.choices(list(stage.shares), list(stage.shares.values()))[0]
    return EPISODES[kind](puzzle, world.to_question(puzzle), rng, stage)


# ------------------------------------------------------------------------- processor and model
def vocabulary(split: pre_tokenizers.PreTokenizer) -> dict[str, int]:
    """Token -> id: the special tokens, <unk>, and the words of the world in alphabetical order.

    The words are those of 800 episodes, and the few that these may miss.
    """
    texts = [
        "user assistant system",
        " ".join(str(number) for number in range(28)),
        "Which row column is the star ring in?",
    ]
    for index in range(400):
        for grid_share in (0.0, 1.0):
            demonstration = episode(index, STAGES[0], grid_share)
            texts += [demonstration.messages[0]["content"][-1]["text"], demonstration.response]
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    tokens = [*SPECIAL_TOKENS, "<unk>", *sorted(words)]
    return {token: number for number, token in enumerate(tokens)}


def make_processor() -> ImageTextProcessor:
    """A tokenizer with one token per word of the world, and the image processor of pillow."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"\\boxed\{|[{}.,:;?-]"), "isolated"),
        ]
    )
    backend = Tokenizer(models.WordLevel(vocabulary(split), unk_token="<unk>"))
    backend.pre_tokenizer = split
    # TRAP: special tokens must be cut out before the pre-tokenizer sees the text. Otherwise
    # "<|im_start|>user" is one unknown word.
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    image_processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)
    return ImageTextProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def make_model(processor: ImageTextProcessor) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL of 0.7 M parameters with random weights."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    eos, pad = token_id("<|im_end|>"), token_id("<|endoftext|>")
    text = dict(
        vocab_size=len(processor.tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    vision = dict(
        depth=1,
        embed_dim=64,
        num_heads=2,
        mlp_ratio=2,
        hidden_size=128,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    return model


# -------------------------------------------------------------------------------- the training
def pad_right(rows: list[list], filler) -> torch.Tensor:
    """Rows of different lengths as one tensor (B, T)."""
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def encode_episodes(processor, episodes: list[Episode]) -> tuple[dict, torch.Tensor]:
    """B episodes -> model inputs (prompts padded on the left, responses on the right), loss mask.

    The mask (B, T) bool covers the responses: True at the tokens to learn, EOS included.
    """
    tokenizer = processor.tokenizer
    line_names = set(tokenizer.convert_tokens_to_ids([*world.ROWS, *world.COLUMNS]))
    responses, learnt = [], []
    for demonstration in episodes:
        ids = tokenizer(demonstration.response, add_special_tokens=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id]
        masked = line_names if demonstration.mask_lines else set()
        responses.append(ids)
        learnt.append([token not in masked for token in ids])
    questions = [demonstration.question for demonstration in episodes]
    chats = [demonstration.messages for demonstration in episodes]
    prompts = encode_prompts(processor, questions, chats)
    inputs = pad_prompts(prompts, tokenizer.pad_token_id)
    ids = pad_right(responses, tokenizer.pad_token_id)
    attended = pad_right([[1] * len(response) for response in responses], 0)
    added = {
        "input_ids": ids,
        "attention_mask": attended,
        "mm_token_type_ids": torch.zeros_like(ids),
    }
    for name, columns in added.items():
        inputs[name] = torch.cat([inputs[name], columns], 1)
    return inputs, pad_right(learnt, False)


class Episodes(torch.utils.data.Dataset):
    """Batch number i of a stage, ready for the model: a function of i alone."""

    def __init__(self, processor, batch_size: int, stage: Stage):
        self.processor = processor
        self.batch_size = batch_size
        self.stage = stage

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, i: int) -> tuple[dict, torch.Tensor]:
        grid_share = max(0.0, self.stage.grid_share * (1 - 4 * i / self.stage.steps))
        start = self.stage.first_episode + i * self.batch_size
        indices = range(start, start + self.batch_size)
        episodes = [episode(index, self.stage, grid_share) for index in indices]
        return encode_episodes(self.processor, episodes)


def make_optimizer(model) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone. The learning rate comes from the schedule."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def train(model, processor, stage: Stage, batch_size: int) -> None:
    """One stage of supervision, in place: cross-entropy on the responses."""
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, stage.lr, stage.steps, pct_start=0.1)
    episodes = Episodes(processor, batch_size, stage)
    loader = torch.utils.data.DataLoader(
        episodes, batch_size=None, num_workers=1, prefetch_factor=8
    )
    start = time.time()
    for step, (inputs, mask) in enumerate(loader, 1):
        width = mask.shape[1]
        states = model.model(**inputs, use_cache=False).last_hidden_state
        predicting = states[:, -width - 1 : -1]  # (B, T, H): state t predicts response token t
        targets = inputs["input_ids"][:, -width:]  # (B, T)
        logits = model.lm_head(predicting[mask])
        loss = torch.nn.functional.cross_entropy(logits, targets[mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            progress = f"step {step:5d} of {stage.steps}  loss {loss.item():.3f}"
            print(f"{progress}  {time.time() - start:.0f} s", flush=True)


def percent(right: list[bool]) -> float:
    """The share of True, in percent."""
    return 100 * sum(right) / len(right)


def print_table(model, processor, count: int = 400) -> None:
    """Print the greedy accuracy on held-out puzzles, per context and family."""
    questions = world.puzzles("heldout", count)
    contexts = {
        "plain": [student_messages(question) for question in questions],
        "hinted": [teacher_messages(question) for question in questions],
        "told": [teacher_messages(question, "answer") for question in questions],
    }
    for context, chats in contexts.items():
        prompts = encode_prompts(processor, questions, chats)
        groups = sample_groups(model, processor, prompts, 1, max_new_tokens=48, temperature=0.0)
        right, right_by_family = [], {family: [] for family in world.FAMILIES}
        for question, [response] in zip(questions, groups, strict=True):
            correct = verify(response.text, question)
            right.append(correct)
            right_by_family[question.family].append(correct)
        columns = [f"{name} {percent(part):5.1f}" for name, part in right_by_family.items()]
        print(f"  {context:7s} {percent(right):5.1f} %  {'  '.join(columns)}", flush=True)


# -------------------------------------------------------------------------------------- the run
def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    base = str(Path(__file__).resolve().parent / "base")
    parser.add_argument("--out", default=base, help="folder to write")
    parser.add_argument(
        "--from-stage",
        type=int,
        choices=(1, 2),
        default=1,
        help="2: go on from what stage 1 left in --out",
    )
    return parser.parse_args()


def main() -> None:
    """Run both stages and save the model after each.

    The second stage starts from what the first one saved, rounding to bfloat16 included.
    """
    args = parse_args()
    torch.set_num_threads(2)  # sums depend on the number of threads
    torch.set_flush_denormal(True)
    processor = make_processor()
    for number, stage in enumerate(STAGES, 1):
        if number < args.from_stage:
            continue
        torch.manual_seed(0)
        if number == 1:
            model = make_model(processor)
        else:
            model = Qwen2VLForConditionalGeneration.from_pretrained(args.out, dtype=torch.float32)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        vocabulary_size = len(processor.tokenizer)
        print(f"stage {number}: {millions:.2f} M parameters, vocabulary {vocabulary_size}")
        train(model.train(), processor, stage, BATCH_SIZE)
        print_table(model, processor)
        model.to(torch.bfloat16).save_pretrained(args.out)
        processor.save_pretrained(args.out)
        print(f"saved {args.out}")


if __name__ == "__main__":
    main()
