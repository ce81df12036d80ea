"""Make toy/base: a tiny real Qwen2-VL that has the skill but not the insight.

    python toy/make_base.py            # writes toy/base, prints the accuracy table; about 25 minutes on 2 cores

The base reads any row or column that its own text or its prompt names, keeps a running sum, and sees where the star and the ring are
when it is asked. What it was never shown is that "the star row" means the row the star is in: on plain questions its
demonstrations are right in form and read a line out of habit. So it solves a puzzle with the hint and not without it, and what
reinforcement or tutoring can add is the insight. The mix of demonstrations (`episode`):

    hinted  hint names the lines                        -> read them; in a fifth of them the text names other lines and the reading
                                                           follows the text: a teacher must read what its own prefix names
    named   the question names the lines, or says       -> read them
            "the row the star is in" (second stage)
    plain   the puzzle as the student meets it          -> read a line out of habit, right by luck
    told    plain question + "the answer is n"          -> read lines that fit n, drawn by the same habit, then box n: the plain
                                                           solver, conditioned on the told answer
    where   which row / column is the star / ring in    -> the line
    grid    read all rows                               -> every cell: most of the first quarter, where seeing is learnt
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
from plumbing.answers import verify
from plumbing.images import ImageTextProcessor
from rollout import Question, encode_prompts, pad_prompts, sample_groups, student_messages
from toy import world

SPECIAL = [
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
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """One run of supervision. habit: how often a guess names the first, second, third, last line; shares: the mix; grid: share of grid
    reading at the start, gone after a quarter; indirect: named questions may say "the row the star is in"."""

    steps: int
    lr: float
    habit: tuple
    shares: dict
    grid: float
    indirect: bool
    first: int  # its first episode


STAGES = (
    Stage(
        2400,
        2e-3,
        (3, 1, 1, 1),
        {"hinted": 42, "named": 15, "plain": 20, "told": 11, "where": 9, "grid": 3},
        0.9,
        False,
        0,
    ),
    Stage(
        700,
        1e-3,
        (47, 1, 1, 1),
        {"hinted": 35, "named": 25, "plain": 20, "told": 9, "where": 8, "grid": 3},
        0.0,
        True,
        10**8,
    ),
)


# ----------------------------------------------------------------------------------------------------------- episodes
def guessed_lines(
    puzzle: world.Puzzle, rng: random.Random, habit: tuple, fit: bool = False
) -> list:
    """Lines of the right kind at guessed places, right by luck sometimes. fit: redrawn until their points add up to the answer.

    Why a habit and not a uniform guess: with one, the least trace of the star's place decided a greedy reading (45 % right where samples
    were 30 % right), and every second group held a lucky success, so that plain GRPO found the insight as fast as tutoring did
    (66.5 against 68.5 % after 60 steps). Tutoring is for the questions that sampling does not solve.
    """
    while True:
        lines = [(kind, rng.choices(range(world.GRID), habit)[0]) for kind, _ in puzzle.lines]
        if not fit or sum(world.line_points(puzzle.cells, line) for line in lines) == puzzle.answer:
            return lines


def episode(index: int, stage: Stage, grid_share: float) -> tuple[Question, list, str, bool]:
    """Training episode `index` -> (sample, messages, response, mask_lines). mask_lines: no loss on the names of lines."""
    rng = random.Random(f"episode-{index}")
    puzzle = world.make_puzzle("train", 5 * 10**8 + index)  # far from the puzzles that RL trains on
    sample = world.to_question(puzzle)
    kind = (
        "grid"
        if rng.random() < grid_share
        else rng.choices(list(stage.shares), list(stage.shares.values()))[0]
    )
    if kind == "hinted":
        if rng.random() < 0.2:
            wrong = [(kind, rng.randrange(world.GRID)) for kind, _ in puzzle.lines]
            return sample, teacher_messages(sample), world.response(puzzle, rng, wrong), True
        return sample, teacher_messages(sample), world.response(puzzle, rng), False
    if kind == "plain":
        return (
            sample,
            student_messages(sample),
            world.response(puzzle, rng, guessed_lines(puzzle, rng, stage.habit)),
            False,
        )
    if kind == "told":
        lines = guessed_lines(puzzle, rng, stage.habit, fit=True)
        return sample, teacher_messages(sample, "answer"), world.response(puzzle, rng, lines), False
    if kind == "named":
        lines = [(kind, rng.randrange(world.GRID)) for kind, _ in puzzle.lines]
        names = [world.line_name(line) for line in lines]
        if stage.indirect and rng.random() < 0.5:
            lines, names = (
                puzzle.lines,
                [
                    {"row": "the row the star is in", "column": "the column the ring is in"}[kind]
                    for kind, _ in puzzle.lines
                ],
            )
        sample.text = f"How many points are in {' plus '.join(names)}?"
        return sample, student_messages(sample), world.response(puzzle, rng, lines), False
    if kind == "where":
        mark, axis = rng.choice(("star", "ring")), rng.choice(("row", "column"))
        r, c = next(
            (r, c)
            for r in range(world.GRID)
            for c in range(world.GRID)
            if puzzle.cells[r][c] == mark
        )
        name = world.line_name((axis, r if axis == "row" else c))
        sample.text = f"Which {axis} is the {mark} in?"
        return (
            sample,
            student_messages(sample),
            f"{rng.choice(world.OPENINGS)} {name}. \\boxed{{{name.split()[1]}}}",
            False,
        )
    sample.text = "Read every row."
    rows = [
        f"{world.line_name(('row', r))}: {', '.join(puzzle.cells[r])}" for r in range(world.GRID)
    ]
    return (
        sample,
        student_messages(sample),
        f"{rng.choice(world.OPENINGS)} " + ". Next ".join(rows) + ".",
        False,
    )


# -------------------------------------------------------------------------------------------------- processor and model
def make_processor() -> ImageTextProcessor:
    """Word-level tokenizer over the world's words, Qwen's special tokens, and the pillow image processor."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"\\boxed\{|[{}.,:;?-]"), "isolated"),
        ]
    )
    texts = [
        "user assistant system",
        " ".join(str(n) for n in range(28)),
        "Which row column is the star ring in?",
    ]
    for i in range(400):
        for share in (0.0, 1.0):
            sample, messages, response, _ = episode(i, STAGES[0], share)
            texts += [messages[0]["content"][-1]["text"], response]
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocab = {word: i for i, word in enumerate([*SPECIAL, "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = split
    # special tokens are cut out before the pre-tokenizer sees the text: without this, "<|im_start|>user" is one unknown word
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
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
    """A Qwen2-VL of 0.7 M parameters, random weights."""
    ids = processor.tokenizer.convert_tokens_to_ids
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
        eos_token_id=ids("<|im_end|>"),
        pad_token_id=ids("<|endoftext|>"),
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
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>")
    )
    return model


# ------------------------------------------------------------------------------------------------------------ training
class Episodes(torch.utils.data.Dataset):
    """Batch number i of the run, ready for the model: a function of i alone."""

    def __init__(self, processor, batch, stage):
        self.processor, self.batch, self.stage = processor, batch, stage

    def __len__(self):
        return self.stage.steps

    def __getitem__(self, i):
        torch.set_num_threads(1)
        stage = self.stage
        grid_share = max(0.0, stage.grid * (1 - 4 * i / stage.steps))
        episodes = [
            episode(stage.first + i * self.batch + b, stage, grid_share) for b in range(self.batch)
        ]
        tokenizer, items = self.processor.tokenizer, []
        places = set(tokenizer.convert_tokens_to_ids([*world.ROWS, *world.COLUMNS]))
        for sample, messages, response, mask_lines in episodes:
            ids = tokenizer(response, add_special_tokens=False)["input_ids"] + [
                tokenizer.eos_token_id
            ]
            items.append((sample, messages, ids, [not (mask_lines and t in places) for t in ids]))
        samples, chats, responses, keeps = zip(*items)
        T = max(map(len, responses))

        def padded(rows, filler):
            return torch.tensor([row + [filler] * (T - len(row)) for row in rows])

        batch = pad_prompts(encode_prompts(self.processor, samples, chats), tokenizer.pad_token_id)
        more = {
            "input_ids": padded(responses, tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(r) for r in responses], 0),
            "mm_token_type_ids": padded([[]] * len(responses), 0),
        }
        return {
            **batch,
            **{name: torch.cat([batch[name], x], 1) for name, x in more.items()},
        }, padded(keeps, False)


def train(model, processor, stage: Stage, batch_size: int) -> None:
    """One stage of supervision, in place."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, stage.lr, stage.steps, pct_start=0.1)
    loader = torch.utils.data.DataLoader(
        Episodes(processor, batch_size, stage), batch_size=None, num_workers=1, prefetch_factor=8
    )
    start = time.time()
    for step, (batch, mask) in enumerate(loader, 1):
        ids, width = batch["input_ids"], mask.shape[1]
        hidden = model.model(**batch, use_cache=False).last_hidden_state[:, -width - 1 : -1]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[mask]), ids[:, -width:][mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"step {step:5d} of {stage.steps}  loss {loss.item():.3f}  {time.time() - start:.0f} s",
                flush=True,
            )


def table(model, processor, count=400) -> None:
    """Greedy accuracy on held-out puzzles by family and context."""
    samples = world.puzzles("heldout", count)
    contexts = {
        "plain": student_messages,
        "hinted": teacher_messages,
        "told": lambda s: teacher_messages(s, "answer"),
    }
    for name, messages in contexts.items():
        prompts = encode_prompts(processor, samples, [messages(s) for s in samples])
        groups = sample_groups(
            model, processor, samples, prompts, 1, max_new_tokens=48, temperature=0.0
        )
        right = [verify(group[0].text, s.answer) for group, s in zip(groups, samples)]
        by = {f: [r for r, s in zip(right, samples) if s.family == f] for f in world.FAMILIES}
        print(
            f"  {name:7s} {100 * sum(right) / len(right):5.1f} %  "
            + "  ".join(f"{f} {100 * sum(r) / len(r):5.1f}" for f, r in by.items()),
            flush=True,
        )


def main() -> None:
    """Both stages, saved after each; the second starts from what the first saved, rounding to bf16 included."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", default=str(Path(__file__).resolve().parent / "base"), help="folder to write"
    )
    parser.add_argument(
        "--from-stage",
        type=int,
        choices=(1, 2),
        default=1,
        help="2: go on from what stage 1 left in --out",
    )
    args = parser.parse_args()
    torch.set_num_threads(2)  # sums depend on the number of threads
    torch.set_flush_denormal(True)
    processor = make_processor()
    for number, stage in enumerate(STAGES, 1):
        if number < args.from_stage:
            continue
        torch.manual_seed(0)
        model = (
            make_model(processor)
            if number == 1
            else Qwen2VLForConditionalGeneration.from_pretrained(args.out, dtype=torch.float32)
        )
        print(
            f"stage {number}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, vocabulary {len(processor.tokenizer)}"
        )
        train(model.train(), processor, stage, 32)
        table(model, processor)
        model.to(torch.bfloat16).save_pretrained(args.out)
        processor.save_pretrained(args.out)
        print(f"saved {args.out}")


if __name__ == "__main__":
    main()
