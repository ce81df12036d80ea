"""A rollout by counting: slot steps used and paid, and its predicted time on an H100.

    python bench/bench_rollout.py --simulate
    python bench/bench_rollout.py --simulate --lengths FILE

No model runs here and no code of the sampler: tests/test_simulation.py compares both. FILE holds
measured response lengths in tokens, separated by blanks or newlines.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from common import markdown_table

LIMIT = 4096  # tokens per response: train.TrainConfig.max_new_tokens
PROMPT = 1000  # tokens per prompt
GROUP, STEPS, UPDATES, QUESTIONS = 8, 607, 3, 128  # of train.TrainConfig
MEANS = (400, 1000, 2000)  # tokens, before the cut at LIMIT
SIGMA = 0.7  # standard deviation of a length's logarithm
SLOTS = (32, 64, 128, 256)
REPEATS = 5  # rollouts per line


# ----------------------------------------------------------------------------------- slot steps
@dataclass
class Decoded:
    """What a rollout's decoding took.

    steps: tokens one after another. used: slot steps that gave a token of a response. computed:
    slot steps that ran. reserved: steps times the slots that memory was taken for. read: cache
    places read per row, summed over steps.
    """

    steps: int = 0
    used: int = 0
    computed: int = 0
    reserved: int = 0
    read: int = 0

    def __add__(self, other: Decoded) -> Decoded:
        names = [field.name for field in fields(self)]
        return Decoded(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def busy(self) -> float:
        """Slot steps used over slot steps paid."""
        return self.used / self.reserved

    @property
    def window(self) -> float:
        """Places of the cache that each row reads, the mean over steps."""
        return self.read / self.steps


def rounds(lengths: list[int], slots: int) -> Iterator[list[int]]:
    """The lengths of responses that decode together until the last of them has ended."""
    for start in range(0, len(lengths), slots):
        yield lengths[start : start + slots]


def lock_step(lengths: list[int], slots: int) -> Decoded:
    """Rounds that wait for their longest response; rows that have ended go on."""
    total = Decoded(used=sum(lengths))
    for part in rounds(lengths, slots):
        total += Decoded(max(part), 0, len(part) * max(part), slots * max(part))
    return total


def shrinking(lengths: list[int], slots: int) -> Decoded:
    """The sampler before the slots: rows that ended leave once they are a quarter of the batch.

    Fewer rows then run, but no response begins in their memory before the round is over.
    """
    total = Decoded(used=sum(lengths))
    for part in rounds(lengths, slots):
        rows, ended, step, computed = len(part), 0, 0, 0
        for length in sorted(part):
            computed += rows * (length - step)
            step = length
            ended += 1
            if ended >= 0.25 * rows:
                rows, ended = rows - ended, 0
        total += Decoded(step, 0, computed, slots * step)
    return total


def refilled(
    lengths: list[int],
    slots: int,
    *,
    look: int = 8,
    behind: int = 1,
    shrinks: bool = False,
    prompt: int = PROMPT,
    limit: int = LIMIT,
    bucket: int = 256,
) -> Decoded:
    """Slots: the next response begins where one has ended.

    look: steps between two looks at which rows have ended. behind: looks that a copy is old. The
    slots of a GPU are the defaults. shrinks: free rows are left out once they are a quarter and
    nothing waits (on a CPU). Prompts of `prompt` tokens; the cache is read up to the row that is
    farthest, in buckets.
    """
    total, waiting, ages, ends = Decoded(used=sum(lengths)), lengths[::-1], [], []
    rows = min(slots, len(lengths))
    while waiting or ages:
        while waiting and len(ages) < rows:
            ages.append(0)
            ends.append((math.ceil(waiting.pop() / look) + behind) * look)
        farthest = prompt + max(ages)
        windows = [
            min(math.ceil((farthest + step + 1) / bucket) * bucket, prompt + limit)
            for step in range(1, look + 1)
        ]
        total += Decoded(look, 0, look * rows, look * slots, sum(windows))
        ages = [age + look for age in ages]
        still = [row for row, age in enumerate(ages) if age < ends[row]]
        ages, ends = [ages[row] for row in still], [ends[row] for row in still]
        if shrinks and not waiting and len(ages) <= 0.75 * rows:
            rows = len(ages)
    return total


# ---------------------------------------------------------------------------------------- lengths
def log_normal(mean: float) -> Callable[[random.Random], int]:
    """Draws lengths whose mean is `mean` before the cut at LIMIT."""
    center = math.log(mean) - SIGMA**2 / 2
    return lambda rng: min(LIMIT, max(1, round(rng.lognormvariate(center, SIGMA))))


def measured(path: str) -> Callable[[random.Random], int]:
    """Draws lengths from a file of them, with replacement."""
    lengths = [int(word) for word in Path(path).read_text("utf-8").split()]
    return lambda rng: min(LIMIT, rng.choice(lengths))


def rollouts(draw: Callable[[random.Random], int], questions: int) -> list[list[int]]:
    """Lengths of REPEATS rollouts. Lengths within a group are as independent as all others."""
    rng = random.Random(0)
    return [[draw(rng) for _ in range(questions * GROUP)] for _ in range(REPEATS)]


def over_rollouts(count: Callable[..., Decoded], drawn: list[list[int]], slots: int) -> Decoded:
    """The sum over rollouts."""
    return sum((count(lengths, slots) for lengths in drawn), Decoded())


# ------------------------------------------------------------------------------------- prediction
@dataclass
class H100:
    """Assumptions: nothing of this was measured by us."""

    bandwidth: float = 3.35e12  # bytes per second
    bandwidth_share: float = 0.70
    flops: float = 990e12  # bf16
    product_share: float = 0.40  # of matrix products in prefill, and in a step of many rows
    update_share: float = 0.35
    processors: int = 132
    kernels: int = 600  # per step
    kernel_seconds: float = 1.5e-6  # from one kernel of a graph to the next

    def lines(self) -> list[str]:
        return [
            f"memory: {self.bandwidth / 1e12} TB/s, a step gets {self.bandwidth_share:.0%} of it",
            f"matrix products in bf16: {self.flops / 1e12:.0f} TFLOP/s, of which prompts and steps "
            f"get {self.product_share:.0%} and updates {self.update_share:.0%}",
            f"kernels per step: {self.kernels}, in a CUDA graph, {1e6 * self.kernel_seconds} us "
            "each on top of their bytes",
            f"attention: one block per row and key head ({MODEL.key_heads} S blocks) on "
            f"{self.processors} multiprocessors; with fewer blocks the memory's share falls",
        ]


@dataclass
class Qwen2VL2B:
    """Counted from the shape."""

    layer_weights: float = 28 * 46.80e6  # the text decoder's layers
    head_weights: float = 151_936 * 1536  # tied to the embedding
    tower_weights: float = 665e6
    vocab: int = 151_936
    cache_bytes: int = 28_672  # keys and values of a token: 28 layers x 2 x 256 x 2 bytes
    key_heads: int = 2
    text_width: int = 28 * 1536  # layers times hidden size: of attention's FLOPs
    tower_width: int = 32 * 1280
    logits_passes: int = 11  # reads and writes of (S, V) float32 from the head to the draw

    @property
    def weights(self) -> float:
        return self.layer_weights + self.head_weights

    def lines(self) -> list[str]:
        return [
            f"weights of the text decoder and the head: {self.weights / 1e9:.2f} billion, "
            "2 bytes each, read once per step",
            f"keys and values: {self.cache_bytes:,} bytes per token; each row reads the window of "
            "the farthest row, in buckets of 256 (the mean is printed)",
            f"logits: {self.vocab:,} x S x 4 bytes, {self.logits_passes} passes",
            f"prompts: {PROMPT:,} tokens, 4 patches per token; a prompt runs once per rollout, "
            "vision tower included, and nothing decodes meanwhile",
        ]


GPU, MODEL = H100(), Qwen2VL2B()


def step_seconds(slots: int, window: float) -> dict[str, float]:
    """One token in each of the slots: seconds by part."""
    rate = GPU.bandwidth * GPU.bandwidth_share
    weights = 2 * MODEL.weights / rate
    products = 2 * MODEL.weights * slots / (GPU.flops * GPU.product_share)
    blocks = min(1.0, MODEL.key_heads * slots / GPU.processors)
    return {
        "weights": max(weights, products),
        "cache": slots * window * MODEL.cache_bytes / (rate * blocks),
        "logits": MODEL.logits_passes * slots * MODEL.vocab * 4 / rate,
        "kernels": GPU.kernels * GPU.kernel_seconds,
    }


def text_flops(keys: float) -> float:
    """A token's forward through the text decoder, with so many keys to look at."""
    return 2 * MODEL.weights + 4 * keys * MODEL.text_width


def tower_flops() -> float:
    """A prompt's forward through the vision tower."""
    patches = 4 * PROMPT
    return patches * (2 * MODEL.tower_weights + 4 * patches * MODEL.tower_width)


def prefill_seconds(questions: int) -> float:
    flops = PROMPT * text_flops(PROMPT / 2) + tower_flops()
    return questions * flops / (GPU.flops * GPU.product_share)


UPDATE_LINES = [
    "update, in forwards: student 3 (forward and backward), its log-probs before the update 1, "
    "reference 1, teacher 0.5 (half of the responses are tutored)",
    "the vision tower is trained and recomputes its activations: student 4 forwards",
    "a prompt runs once per micro-batch of 4,096 tokens that holds responses to it",
    "left out: reading images, evaluations, checkpoints, AdamW, the copy of weights per rollout",
]


def update_seconds(mean: float) -> float:
    """One optimizer step of QUESTIONS x GROUP responses of `mean` tokens."""
    together = min(GROUP, max(1, int((4096 - PROMPT) / mean)))
    prompts = QUESTIONS * math.ceil(GROUP / together)
    responses = QUESTIONS * GROUP * mean * text_flops(PROMPT + mean / 2)
    text = 5.5 * (responses + prompts * PROMPT * text_flops(PROMPT / 2))
    return (text + 6.5 * prompts * tower_flops()) / (GPU.flops * GPU.update_share)


# ----------------------------------------------------------------------------------------- tables
def busy_table(lengths_of: dict[str, Callable]) -> str:
    """Slot steps used over slot steps paid."""
    cells = []
    for name, draw in lengths_of.items():
        for questions in (QUESTIONS, UPDATES * QUESTIONS):
            drawn = rollouts(draw, questions)
            for slots in SLOTS:
                old = over_rollouts(shrinking, drawn, slots)
                shares = [
                    over_rollouts(lock_step, drawn, slots).busy,
                    old.used / old.computed,
                    old.busy,
                    over_rollouts(refilled, drawn, slots).busy,
                ]
                row = [name, f"{questions} x {GROUP}", str(slots)]
                cells.append([*row, *(f"{100 * share:.0f} %" for share in shares)])
    header = ["lengths", "responses", "S", "lock-step", "shrinking: of the rows computed"]
    return markdown_table([*header, "shrinking: of the memory", "slots"], cells)


def lengths_table(lengths_of: dict[str, Callable]) -> str:
    """What the cut does to the lengths."""
    cells = []
    for name, draw in lengths_of.items():
        drawn = sum(rollouts(draw, UPDATES * QUESTIONS), [])
        cut = drawn.count(LIMIT) / len(drawn)
        middle = sorted(drawn)[len(drawn) // 2]
        cells.append([name, f"{sum(drawn) / len(drawn):.0f}", str(middle), f"{100 * cut:.1f} %"])
    return markdown_table(["lengths", "mean", "median", f"cut off at {LIMIT}"], cells)


def rollout_table(lengths_of: dict[str, Callable]) -> str:
    """Predicted minutes of a rollout of QUESTIONS x GROUP."""
    cells = []
    for name, draw in lengths_of.items():
        drawn = rollouts(draw, QUESTIONS)
        for slots in SLOTS:
            decoded = over_rollouts(refilled, drawn, slots)
            parts = step_seconds(slots, decoded.window)
            step, steps = sum(parts.values()), decoded.steps / REPEATS
            minutes = (steps * step + prefill_seconds(QUESTIONS)) / 60
            memory = slots * (PROMPT + LIMIT) * MODEL.cache_bytes / 2**30
            cells.append(
                [name, str(slots), f"{memory:.0f}", f"{steps:.0f}", f"{decoded.window:.0f}"]
                + [f"{1000 * seconds:.1f}" for seconds in (*parts.values(), step)]
                + [f"{decoded.used / REPEATS / (60 * minutes):.0f}", f"{minutes:.1f}"]
            )
    header = ["lengths", "S", "cache, GiB", "steps", "window", "ms: weights", "cache", "logits"]
    return markdown_table([*header, "kernels", "a step", "tokens/s", "minutes"], cells)


def run_hours(draw: Callable, slots: int) -> tuple[float, float]:
    """Predicted hours of the default run: sampling, updates."""
    questions = UPDATES * QUESTIONS
    drawn = rollouts(draw, questions)
    decoded = over_rollouts(refilled, drawn, slots)
    step = sum(step_seconds(slots, decoded.window).values())
    sampling = decoded.steps / REPEATS * step + prefill_seconds(questions)
    mean = decoded.used / REPEATS / (questions * GROUP)
    return STEPS / UPDATES * sampling / 3600, STEPS * update_seconds(mean) / 3600


def run_table(lengths_of: dict[str, Callable]) -> str:
    """Predicted days of the default run: STEPS steps, UPDATES of them per rollout."""
    cells = []
    for name, draw in lengths_of.items():
        for slots in SLOTS:
            sampling, updates = run_hours(draw, slots)
            days = (sampling + updates) / 24
            cells.append([name, str(slots), f"{sampling:.0f}", f"{updates:.0f}", f"{days:.1f}"])
    return markdown_table(["lengths", "S", "hours sampling", "hours updating", "days"], cells)


def report(path: str | None) -> str:
    """All tables and assumptions. path: a file of measured lengths, instead of drawn ones."""
    if path:
        lengths_of = {Path(path).name: measured(path)}
    else:
        lengths_of = {f"mean {mean}": log_normal(mean) for mean in MEANS}
    lengths = f"Lengths: log-normal, sigma {SIGMA}; the mean is before the cut at {LIMIT} tokens."
    if path:
        lengths = f"Lengths: drawn with replacement from {path}."
    assumptions = [*GPU.lines(), *MODEL.lines(), *UPDATE_LINES]
    parts = [
        f"{lengths} {REPEATS} rollouts per line.",
        lengths_table(lengths_of),
        "Slot steps used over slot steps paid. Slots: refilled, a look every 8 steps, one behind.",
        busy_table(lengths_of),
        "Predicted for an H100 and Qwen2-VL-2B; nothing ran on a GPU. Assumed:",
        "\n".join(f"- {line}" for line in assumptions),
        f"A rollout of {QUESTIONS} x {GROUP} responses, slots:",
        rollout_table(lengths_of),
        f"The default run: {STEPS} steps of {QUESTIONS} questions x {GROUP}, rollouts of "
        f"{UPDATES * QUESTIONS} questions:",
        run_table(lengths_of),
    ]
    return "\n\n".join(parts)
