"""Make toy/base: a tiny real Qwen2-VL that has the skill but not the insight.

    python toy/make_base.py    # writes toy/base, prints the accuracies; 20 to 45 minutes on 2 cores

The skill: the base reads any row or column that its own text or its prompt names, and keeps a
running sum. It also says where the star and the ring are when it is asked. The insight that it was
never shown: "the star row" means the row that the star is in. Its demonstrations for plain
questions are right in form, but read a line out of habit. So it solves a puzzle with the hint and
not without it. What reinforcement or tutoring can add is the insight.

How a context acts on this model was trained in, after what the paper measured on a real one (figure
3): the hint is followed as far as it goes, the answer alone changes nothing, and with the worked
solution the model skips the reading. The mix of demonstrations (`episode`):

    hinted    The hint, whole or with parts left out: see `follow_hint`. In a fifth of these, the
              text names other lines, and the reading follows the text: a teacher must read what its
              own prefix names.
    named     The question names the lines: read them. In the second stage, half of these questions
              say where the line is: "the row the star is in", "the row below the star".
    plain     The puzzle as the student meets it: read a line out of habit, right by luck.
    answer    The plain question and "The answer is n.": as plain.
    solution  The plain question, the worked solution and the answer: name the line and box the
              answer, without reading the cells.
    where     Which row or column is the star or the ring in? Name the line.
    grid      Read all rows: every cell. Here the model learns to see: the share is 90 % at the
              start of stage 1 and falls to 3 % over its first quarter.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass, replace
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

from hints import Hint, teacher_messages
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
    star is in" and the like. first_episode: the index of its first episode, so that no episode
    serves twice.
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
        steps=3000,
        lr=2e-3,
        habit=(3, 1, 1, 1),
        shares={
            "hinted": 50,
            "named": 15,
            "plain": 12,
            "answer": 5,
            "solution": 6,
            "where": 9,
            "grid": 3,
        },
        grid_share=0.9,
        indirect=False,
        first_episode=0,
    ),
    Stage(
        steps=1100,
        lr=1e-3,
        habit=(47, 1, 1, 1),
        shares={
            "hinted": 42,
            "named": 24,
            "plain": 14,
            "answer": 5,
            "solution": 6,
            "where": 6,
            "grid": 3,
        },
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
    puzzle: world.Puzzle, rng: random.Random, habit: tuple, excluded: list | tuple = ()
) -> list[world.Line]:
    """Lines of the right kinds at guessed places, which are right by luck sometimes.

    excluded: lines that are not guessed.

    Why a habit and not a uniform guess: with a uniform guess, the least trace of the star's place
    decided a greedy reading (45 % right, where samples were 30 % right). Every second group held a
    lucky success, so plain GRPO found the insight as fast as tutoring did (66.5 against 68.5 %
    after 60 steps). Tutoring is for the questions that sampling does not solve.
    """
    guesses = []
    for kind, _ in puzzle.lines:
        weights = [0 if (kind, index) in excluded else weight for index, weight in enumerate(habit)]
        guesses.append((kind, rng.choices(range(world.GRID), weights)[0]))
    return guesses


# The parts of a hint that a demonstration shows, as weights. Each subset that an arm of
# bench/arms.py gives to a teacher must be among them.
SHOWN_PARTS = {
    ("look", "ignore", "steps"): 50,
    ("look", "ignore"): 8,
    ("look", "steps"): 8,
    ("ignore", "steps"): 10,
    ("look",): 6,
    ("ignore",): 6,
    ("steps",): 12,
}
SLIP = 0.2  # how often a demonstration errs for the lack of one part
FOUND = 0.5  # how often "find the star" is enough


def follow_hint(
    puzzle: world.Puzzle, parts: tuple, rng: random.Random, stage: Stage
) -> tuple[list[world.Line], bool]:
    """What a solver does with these parts of a hint: -> the lines to read, whether to read them.

    Each part is worth something. "look" names the lines; of two candidates one is drawn evenly.
    Without "ignore" the solver takes the distractor for the line in a fifth of the cases. Without
    "steps" it boxes a number unread in a fifth. Without "look" it guesses, but not what it shall
    ignore, and "find the star" leads to the line in half of the cases.
    """
    named = [rng.choice(lines) for lines in puzzle.candidates]
    if "look" in parts:
        if "ignore" not in parts and rng.random() < SLIP:
            named = puzzle.distractors
        return named, "steps" in parts or rng.random() >= SLIP
    if "steps" in parts and rng.random() < FOUND:
        return named, True
    excluded = puzzle.distractors if "ignore" in parts else ()
    return guessed_lines(puzzle, rng, stage.habit, excluded), True


def hinted_episode(puzzle, question: Question, rng: random.Random, stage: Stage) -> Episode:
    """Follow the hint, or, in a fifth of the cases, read other lines.

    The names of other lines are masked: the model must not learn to choose them, but only to read
    the lines that its text names.
    """
    [parts] = rng.choices(list(SHOWN_PARTS), list(SHOWN_PARTS.values()))
    question.hint = Hint(**{part: getattr(question.hint, part) for part in parts})
    messages = teacher_messages(question)
    if rng.random() < 0.2:
        response = world.response(puzzle, rng, random_lines(puzzle, rng))
        return Episode(question, messages, response, mask_lines=True)
    lines, reads = follow_hint(puzzle, parts, rng, stage)
    write = world.response if reads else world.short_response
    return Episode(question, messages, write(puzzle, rng, lines))


def plain_episode(puzzle, question: Question, rng: random.Random, stage: Stage) -> Episode:
    """The plain question: read lines out of habit."""
    lines = guessed_lines(puzzle, rng, stage.habit)
    return Episode(question, student_messages(question), world.response(puzzle, rng, lines))


def answer_episode(puzzle, question: Question, rng: random.Random, stage: Stage) -> Episode:
    """The question with its answer: what the plain question gets."""
    plain = plain_episode(puzzle, question, rng, stage)
    return Episode(question, teacher_messages(question, "answer"), plain.response)


def solution_episode(puzzle, question: Question, rng: random.Random, stage: Stage) -> Episode:
    """The question with solution and answer: box the answer, do not read."""
    messages = teacher_messages(question, "solution")
    return Episode(question, messages, world.short_response(puzzle, rng))


def named_episode(puzzle, question: Question, rng: random.Random, stage: Stage) -> Episode:
    """The question names the lines, by their names or, where `indirect`, by what is in them."""
    lines = random_lines(puzzle, rng)
    names = [world.line_name(line) for line in lines]
    if stage.indirect and rng.random() < 0.5:
        lines, names = zip(*(described_line(puzzle, kind, rng) for kind, _ in lines), strict=True)
    question.text = f"How many points are in {' plus '.join(names)}?"
    return Episode(question, student_messages(question), world.response(puzzle, rng, lines))


def described_line(puzzle, kind: str, rng: random.Random) -> tuple[world.Line, str]:
    """The star's row or the ring's column and words for it; of "next" also a row beside it."""
    if kind == "column":
        return (kind, puzzle.column), "the column the ring is in"
    if puzzle.family != "next":
        return (kind, puzzle.row), "the row the star is in"
    side, place = rng.choice(((-1, "above"), (1, "below")))
    return (kind, puzzle.row + side), f"the row {place} the star"


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
    "answer": answer_episode,
    "solution": solution_episode,
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
        "the row above below the star",
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


def contexts_of(question: Question, other: Question) -> dict[str, list[dict]]:
    """The chats whose accuracy the table shows. other: another question of the same family."""

    def hinted(hint: Hint) -> list[dict]:
        return teacher_messages(replace(question, hint=hint))

    hint = question.hint
    return {
        "plain": student_messages(question),
        "hint": hinted(hint),
        "hint without look": hinted(replace(hint, look=())),
        "hint without ignore": hinted(replace(hint, ignore=())),
        "hint without steps": hinted(replace(hint, steps=())),
        "look alone": hinted(replace(hint, ignore=(), steps=())),
        "ignore alone": hinted(replace(hint, look=(), steps=())),
        "steps alone": hinted(replace(hint, look=(), ignore=())),
        "another's hint": hinted(other.hint),
        "answer": teacher_messages(question, "answer"),
        "solution": teacher_messages(question, "solution"),
    }


def print_table(model, processor, count: int = 400) -> None:
    """Print the accuracy on held-out puzzles, sampled at temperature 1, per context and family."""
    drawn = [world.make_puzzle("heldout", index) for index in range(count)]
    questions = [world.to_question(puzzle) for puzzle in drawn]
    others = [
        world.to_question(world.make_puzzle("heldout", count + index, puzzle.family))
        for index, puzzle in enumerate(drawn)
    ]
    chats = [contexts_of(*pair) for pair in zip(questions, others, strict=True)]
    for context in chats[0]:
        prompts = encode_prompts(processor, questions, [chat[context] for chat in chats])
        for temperature in (1.0, 0.0) if context in ("plain", "hint") else (1.0,):
            groups = sample_groups(
                model, processor, prompts, 1, max_new_tokens=48, temperature=temperature
            )
            label = context if temperature else f"{context}, greedy"
            print_row(label, questions, [response for [response] in groups])


def print_row(label: str, questions: list[Question], responses: list) -> None:
    """One line of the table."""
    right, right_by_family = [], {family: [] for family in world.FAMILIES}
    for question, response in zip(questions, responses, strict=True):
        correct = verify(response.text, question)
        right.append(correct)
        right_by_family[question.family].append(correct)
    columns = [f"{name} {percent(part):5.1f}" for name, part in right_by_family.items()]
    length = sum(len(response.ids) for response in responses) / len(responses)
    print(
        f"  {label:20s} {percent(right):5.1f} %  {'  '.join(columns)}  {length:.1f} tokens",
        flush=True,
    )


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
