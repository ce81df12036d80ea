"""One whole optimizer step by phase: time and peak memory, ours and TRL's GRPOTrainer.

    python -m pip install -r bench/requirements.txt
    python bench/bench_step.py                # on a CPU tiny and 0.5B, on a GPU 2B
    python bench/bench_step.py --shapes 2B    # a GPU of 80 GB; what does not fit says so

Random weights in the shape of the embedded model, a 0.5B or a 2B; random images; the embedded
tokenizer. No response ends early, so that all make the same number of tokens. "GRPO" is TRL's work:
all responses have the KL penalty. In "PTD-PO" half of each group has failed and is tutored as well.
Phases: sample, score (the student's forward), teacher (the reference's), update (backward,
clipping, AdamW). Each contender has a process of its own and makes two steps; the second counts.
Each finished run adds a line to bench/results/step.jsonl. Rows of ours without the field "recipe"
were measured with the release's settings: groups with tutoring had no KL penalty. Those without the
field "sampler" sampled in rounds, without slots.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from bench_losses import GPU, high_water, machine  # noqa: E402
from bench_rollout import EMBEDDED, config_of  # noqa: E402
from common import RESULTS, append_row, markdown_table, measure_in_child  # noqa: E402

ROWS = RESULTS / "step.jsonl"
GROUP = 8
TOKEN = 28  # pixels on a side of an image token


@dataclass
class Shape:
    """side: of the image, in tokens; new: tokens per response; options: of TrainConfig."""

    model: str
    side: int
    questions: int
    new: int
    options: dict = field(default_factory=dict)


LEAN = {"gradient_checkpointing": True, "micro_tokens": 4096}
SHAPES = {
    "tiny": Shape("tiny", side=4, questions=8, new=48),
    "0.5B": Shape("0.5B", side=16, questions=1, new=32),
    "2B": Shape("2B", side=32, questions=8, new=512),
    "2B lean": Shape("2B", side=32, questions=8, new=512, options=LEAN),
    "2B LoRA 32": Shape("2B", side=32, questions=8, new=512, options={**LEAN, "lora": 32}),
}
WORDS = [
    "How",
    "many",
    "points",
    "are",
    "in",
    "the",
    "star",
    "row",
    "plus",
    "the",
    "ring",
    "column",
    "?",
    "look",
    "at",
    "the",
    "top",
    "row",
    "and",
    "read",
    "each",
    "cell",
]


# ------------------------------------------------------------------------------ model and questions
def make_folder(shape: Shape) -> str:
    """A model's folder without weights. From now on a load makes random ones."""
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    folder = Path(tempfile.mkdtemp())
    for path in (ROOT / "toy" / "base").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    processor = json.loads((folder / "processor_config.json").read_text())
    largest_area = (TOKEN * shape.side) ** 2
    processor["image_processor"]["size"] = {"shortest_edge": TOKEN**2, "longest_edge": largest_area}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    if shape.model != "tiny":
        config = config_of(shape.model, EMBEDDED)
        # TRL makes its reference by this name
        config.architectures = ["Qwen2VLForConditionalGeneration"]
        config.save_pretrained(folder)

    def random_weights(cls, path, *_, dtype=None, output_loading_info=False, **__):
        torch.manual_seed(0)
        with torch.device("cuda" if GPU else "cpu"):
            model = cls._from_config(AutoConfig.from_pretrained(path), dtype=dtype or torch.float32)
        report = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return (model, report) if output_loading_info else model

    Qwen2VLForConditionalGeneration.from_pretrained = classmethod(random_weights)
    return str(folder)


def make_questions(shape: Shape) -> list:
    """Questions of random words and a random image, with hints of random words."""
    from hints import Hint
    from rollout import Question

    rng = random.Random(0)
    size = TOKEN * shape.side
    questions = []
    for number in range(shape.questions):
        text = " ".join(rng.choices(WORDS, k=40))
        image = Image.frombytes("RGB", (size, size), rng.randbytes(3 * size * size))
        hint = Hint(look=(" ".join(rng.choices(WORDS, k=40)),))
        questions.append(Question(str(number), text, answer="1", images=[image], hint=hint))
    return questions


class Phases:
    """Seconds and, on a GPU, peak MiB by phase.

    A call inside another phase's call counts for the outer one.
    """

    def __init__(self):
        self.seconds, self.mib, self.inside = {}, {}, False

    def watch(self, owner, name: str, phase: str) -> None:
        """The method `name` of an object or a class counts for the phase."""
        method = getattr(owner, name)

        def timed(*args, **settings):
            if self.inside:
                return method(*args, **settings)
            self.inside, began = True, self.clock()
            try:
                return method(*args, **settings)
            finally:
                self.inside = False
                self.add(phase, self.clock() - began)

        setattr(owner, name, timed)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0) + seconds
        if GPU:
            peak = torch.cuda.max_memory_allocated() / 2**20
            self.mib[phase] = max(self.mib.get(phase, 0), peak)
            torch.cuda.reset_peak_memory_stats()

    def clear(self) -> None:
        self.seconds.clear()
        self.mib.clear()

    @staticmethod
    def clock() -> float:
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter()


# -------------------------------------------------------------------------------------------- ours
def make_trainer(shape: Shape, lam: float):
    """Our Trainer. Nothing ends early, and each second response has failed."""
    from accelerate import Accelerator

    import rollout
    import train
    from plumbing.images import load_processor
    from plumbing.models import build

    config = train.TrainConfig(
        model=make_folder(shape),
        lam=lam,
        questions=shape.questions,
        group_size=GROUP,
        max_new_tokens=shape.new,
        updates=1,  # and the tower frozen: TRL's work
        freeze_vision=True,
        **shape.options,
    )
    calls = itertools.count()
    rollout.eos_tokens = lambda *_: []
    train.verify = lambda *_: next(calls) % 2 == 0
    bf16 = GPU and config.precision != "no"
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
    processor = load_processor(config.model)
    return train.Trainer(config, accelerator, processor, *build(config, accelerator))


def watch_phases(trainer) -> Phases:
    """The phases of our Trainer, by the calls that make them."""
    from plumbing.models import LoraReference

    phases = Phases()
    phases.watch(trainer, "sample", "sample")
    if trainer.config.lora:
        phases.watch(LoraReference, "__call__", "teacher")
    else:
        phases.watch(trainer.reference, "forward", "teacher")
    phases.watch(trainer.student, "forward", "score")
    phases.watch(trainer.accelerator, "backward", "update")
    phases.watch(trainer.accelerator, "clip_grad_norm_", "update")
    phases.watch(trainer.optimizer, "step", "update")
    return phases


def measure_ours(shape: Shape, lam: float) -> dict:
    """Two steps of our Trainer; the second counts."""
    from plumbing.memory import plan
    from plumbing.runs import rollout_statistics

    trainer, questions = make_trainer(shape, lam), make_questions(shape)
    config, phases = trainer.config, watch_phases(trainer)
    for _ in range(2):
        phases.clear()
        began = phases.clock()
        groups = trainer.sample(trainer.read(questions))
        trainer.grade(groups)
        trainer.assign(groups)
        trainer.score([response for group in groups for response in group])
        trainer.step()
        total = phases.clock() - began
    numbers = rollout_statistics(groups, config)
    assert numbers["length"] == shape.new, numbers
    assert numbers["accuracy"] == 0.5, numbers
    assert numbers["tutored"] == (0.5 if lam else 0), numbers
    phases.seconds["rest"] = total - sum(phases.seconds.values())
    return {
        "recipe": config.recipe,
        "sampler": "slots",
        "seconds": total,
        "phases": phases.seconds,
        "phase_mib": phases.mib,
        "mib": max(phases.mib.values()) if GPU else high_water(),
        "predicted_gib": plan(config, 1, trainer.accelerator.mixed_precision == "bf16")["peak"],
    }


# ------------------------------------------------------------------------------------------- TRL's
def trl_settings(shape: Shape, micro: int):
    """Two steps of our GRPO: KL penalty, the same questions per step."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        num_generations=GROUP,
        per_device_train_batch_size=micro,
        max_completion_length=shape.new,
        gradient_accumulation_steps=shape.questions * GROUP // micro,
        max_steps=2,
        beta=0.01,
        learning_rate=1e-6,
        report_to=[],
        use_cpu=not GPU,
        bf16=GPU,
        save_strategy="no",
        logging_strategy="no",
        gradient_checkpointing=shape.options.get("gradient_checkpointing", False),
        optim="adamw_torch",
        generation_kwargs={"suppress_tokens": [*EMBEDDED.banned(), 1, 5]},
        disable_tqdm=True,
        model_init_kwargs=None,
    )


def make_trl_trainer(shape: Shape, micro: int, callback):
    """TRL's GRPOTrainer with a frozen vision tower. Each second response has failed."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText
    from trl import GRPOTrainer

    from plumbing.images import load_processor
    from rollout import FORMAT_PROMPT

    folder, lora = make_folder(shape), shape.options.get("lora")
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16 if lora else torch.float32
    )
    model.model.visual.requires_grad_(False)
    adapters = None
    if lora:
        from peft import LoraConfig

        targets = r".*language_model.*_proj"
        adapters = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=targets)
    rows = []
    for question in make_questions(shape):
        turn = {"role": "user", "content": f"{question.text}\n{FORMAT_PROMPT}"}
        rows.append({"prompt": [turn], "image": question.images[0]})
    calls = itertools.count()
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(next(calls) % 2 == 0) for _ in completions],
        args=trl_settings(shape, micro),
        callbacks=[callback],
        train_dataset=Dataset.from_list(rows),
        processing_class=load_processor(folder),
        peft_config=adapters,
    )
    trainer.generation_config.eos_token_id = None
    return trainer


def measure_trl(shape: Shape, micro: int) -> dict:
    """Two steps of GRPOTrainer.train; the second counts. micro: responses per forward."""
    from transformers import TrainerCallback

    phases, begins, totals = Phases(), [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            phases.seconds.clear()
            begins.append(phases.clock())

        def on_step_end(self, *_, **__):
            totals.append(phases.clock() - begins[-1])

    trainer = make_trl_trainer(shape, micro, Clock())
    phases.watch(trainer, "_generate_single_turn", "sample")
    trainer.train()
    lengths = trainer._metrics["train"]["completions/mean_length"]
    assert len(totals) == 2, totals
    assert all(length == shape.new for length in lengths), lengths
    phases.seconds["rest"] = totals[-1] - sum(phases.seconds.values())
    if GPU:
        mib = max(torch.cuda.max_memory_allocated() / 2**20, *phases.mib.values())
    else:
        mib = high_water()
    return {
        "seconds": totals[-1],
        "phases": phases.seconds,
        "phase_mib": phases.mib,
        "mib": mib,
        "micro": micro,
    }


# ------------------------------------------------------------------------------------ measurements
def attempts(name: str, shape: Shape) -> list[Callable[[], dict]]:
    """How to measure a contender: TRL with smaller and smaller micro-batches, until one fits."""
    if name == "ours, GRPO":
        return [lambda: measure_ours(shape, lam=0.0)]
    if name == "ours, PTD-PO":
        return [lambda: measure_ours(shape, lam=0.05)]
    sizes = (GROUP, GROUP // 2, GROUP // 4)
    return [lambda micro=micro: measure_trl(shape, micro) for micro in sizes]


CONTENDERS = ("TRL GRPOTrainer", "ours, GRPO", "ours, PTD-PO")


def measure(name: str, label: str) -> dict:
    """One contender in this process; "seconds" is None where it does not fit."""
    row = {"name": name, "shape": label, "seconds": None}
    for attempt in attempts(name, SHAPES[label]):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                row |= attempt()
            break
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()  # after the except clause, whose traceback holds the tensors
    return row | {"machine": machine("transformers", "trl")}


HEADER = ["", "seconds a step", "x TRL", "sample", "score", "teacher", "update", "rest"]
HEADER += ["peak, GiB", "predicted"]


def table_row(row: dict, peer_seconds: float | None) -> list[str]:
    """One contender's cells under HEADER."""
    if row["seconds"] is None:
        return [row["name"], "does not fit", *[""] * (len(HEADER) - 2)]
    phases = []
    for phase in ("sample", "score", "teacher", "update", "rest"):
        seconds = row["phases"].get(phase)
        phases.append("" if seconds is None else f"{seconds:.1f}")
    has_prediction = GPU and "predicted_gib" in row
    return [
        row["name"],
        f"{row['seconds']:.1f}",
        f"{peer_seconds / row['seconds']:.2f}" if peer_seconds else "",
        *phases,
        f"{row['mib'] / 1024:.1f}",
        f"{row['predicted_gib']:.1f}" if has_prediction else "",
    ]


def table(rows: list[dict], label: str) -> str:
    """Markdown, one line per contender; the first is the peer."""
    shape = SHAPES[label]
    setting = (
        f"{label}: {shape.questions} questions x {GROUP} responses of {shape.new} tokens, pictures "
        f"of {shape.side**2} tokens. {rows[0]['machine']}."
    )
    cells = [table_row(row, rows[0]["seconds"]) for row in rows]
    return f"{setting}\n\n{markdown_table(HEADER, cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=list(SHAPES),
        default=["2B", "2B lean", "2B LoRA 32"] if GPU else ["tiny", "0.5B"],
    )
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return print(json.dumps(measure(*args.run)))
    for label in args.shapes:
        rows = []
        for name in CONTENDERS:
            rows.append(measure_in_child(__file__, [name, label]))
            append_row(ROWS, rows[-1])
        print(f"\n{table(rows, label)}", flush=True)


if __name__ == "__main__":
    main()
