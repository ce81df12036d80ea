"""One whole optimizer step by phase, time and peak memory, ours and TRL's GRPOTrainer, each in a process of its own.

    python -m pip install -r bench/requirements.txt
    python bench/bench_step.py                  # on a CPU: the embedded model's shape, and a 0.5B's; on a GPU: a 2B's
    python bench/bench_step.py --shapes 2B      # needs a GPU of 80 GB; the rows that do not fit say so

Random weights in real shapes, random pictures, the embedded tokenizer. No response ends early, so that all make the same number of tokens.
"PTD-PO": half of every group has failed and is tutored. "GRPO": the same responses with the KL penalty instead, which is TRL's work.
Phases: sample, score (the student's forward), teacher (the reference's), update (backward, clipping, AdamW). One step is not counted
before. Each finished run adds a line to bench/results/step.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from bench_losses import GPU, high_water, machine  # noqa: E402
from bench_rollout import config_of  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "step.jsonl"
GROUP, SPECIAL = (
    8,
    (6, 3, 4, 7, 0),
)  # image, vision start, vision end, video, padding in the embedded tokenizer


@dataclass
class Shape:
    """side: of the picture, in merged patches of 28 pixels; new: tokens a response."""

    model: str
    side: int
    questions: int
    new: int
    options: dict


SHAPES = {
    "tiny": Shape("tiny", 4, 8, 48, {}),
    "0.5B": Shape("0.5B", 16, 1, 32, {}),
    "2B": Shape("2B", 32, 8, 512, {}),
    "2B lean": Shape("2B", 32, 8, 512, {"gradient_checkpointing": True, "micro_tokens": 4096}),
    "2B LoRA 32": Shape(
        "2B", 32, 8, 512, {"gradient_checkpointing": True, "micro_tokens": 4096, "lora": 32}
    ),
}
WORDS = "How many points are in the star row plus the ring column ? look at the top row and read each cell".split()


def make_folder(shape: Shape) -> str:
    """A model folder without weights; loading it makes random ones."""
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    folder = tempfile.mkdtemp()
    for path in (ROOT / "toy" / "base").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    settings = json.loads((Path(folder) / "processor_config.json").read_text())
    settings["image_processor"]["size"] = {
        "shortest_edge": 28 * 28,
        "longest_edge": (28 * shape.side) ** 2,
    }
    (Path(folder) / "processor_config.json").write_text(json.dumps(settings))
    if shape.model != "tiny":
        config = config_of(shape.model, SPECIAL)
        config.architectures = [
            "Qwen2VLForConditionalGeneration"
        ]  # TRL makes its reference by this name
        config.save_pretrained(folder)

    def random_weights(cls, path, *_, dtype=None, **__):
        torch.manual_seed(0)
        with torch.device("cuda" if GPU else "cpu"):
            return cls._from_config(AutoConfig.from_pretrained(path), dtype=dtype or torch.float32)

    Qwen2VLForConditionalGeneration.from_pretrained = classmethod(random_weights)
    return folder


def make_samples(shape: Shape) -> list:
    from hints import Hint
    from rollout import Question

    rng = random.Random(0)
    size = 28 * shape.side
    return [
        Question(
            str(i),
            " ".join(rng.choices(WORDS, k=40)),
            "1",
            [Image.frombytes("RGB", (size, size), rng.randbytes(3 * size * size))],
            Hint(look=(" ".join(rng.choices(WORDS, k=40)),)),
        )
        for i in range(shape.questions)
    ]


class Phases:
    """Seconds and, on a GPU, peak MiB by phase; a call inside another phase's call counts for the outer one."""

    def __init__(self):
        self.seconds, self.mib, self.inside = {}, {}, False

    def wrap(self, name: str, call):
        def timed(*args, **settings):
            phase = name(*args) if callable(name) else name
            if self.inside:
                return call(*args, **settings)
            self.inside, start = True, self.clock()
            try:
                return call(*args, **settings)
            finally:
                self.inside = False
                self.seconds[phase] = self.seconds.get(phase, 0) + self.clock() - start
                if GPU:
                    self.mib[phase] = max(
                        self.mib.get(phase, 0), torch.cuda.max_memory_allocated() / 2**20
                    )
                    torch.cuda.reset_peak_memory_stats()

        return timed

    @staticmethod
    def clock() -> float:
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter()


def measure_ours(shape: Shape, lam: float) -> dict:
    """Two steps of Trainer.rollout and Trainer.update; the second counts."""
    from accelerate import Accelerator

    import rollout
    import train
    from ptdpo import PTDPOConfig

    rollout.eos_tokens = lambda *_: []  # nothing ends early
    config = train.TrainConfig(
        model=make_folder(shape),
        questions=shape.questions,
        group_size=GROUP,
        max_new_tokens=shape.new,
        warmup=0,
        **shape.options,
    )
    method = PTDPOConfig(lam=lam)
    bf16 = GPU and config.precision != "no"
    accelerator, phases, samples = (
        Accelerator(mixed_precision="bf16" if bf16 else "no"),
        Phases(),
        make_samples(shape),
    )
    trainer = train.Trainer(
        config,
        method,
        accelerator,
        rollout.load_processor(config.model),
        *train.build(config, accelerator),
    )
    calls = iter(range(10**9))
    trainer.verify = lambda *_: next(calls) % 2 == 0  # every second response has failed
    trainer.sample = phases.wrap("sample", trainer.sample)
    train.LoraReference.__call__ = phases.wrap("teacher", train.LoraReference.__call__)
    if not config.lora:
        trainer.reference.forward = phases.wrap("teacher", trainer.reference.forward)
    trainer.student.forward = phases.wrap("score", trainer.student.forward)
    for owner, call in (
        (accelerator, "backward"),
        (accelerator, "clip_grad_norm_"),
        (trainer.optimizer, "step"),
    ):
        setattr(owner, call, phases.wrap("update", getattr(owner, call)))
    for _ in range(2):
        phases.seconds.clear()
        phases.mib.clear()
        start = phases.clock()
        work, row = trainer.rollout(samples)
        trainer.update([w for group in work for w in group])
        total = phases.clock() - start
    assert (
        row["length"] == shape.new
        and row["accuracy"] == 0.5
        and row["tutored"] == (0.5 if lam else 0)
    ), row
    phases.seconds["rest"] = total - sum(phases.seconds.values())
    return {
        "seconds": total,
        "phases": phases.seconds,
        "phase_mib": phases.mib,
        "mib": max(phases.mib.values()) if GPU else high_water(),
        "predicted_gib": train.plan(config, method, 1, bf16)["peak"],
    }


def measure_trl(shape: Shape, micro: int) -> dict:
    """Two steps of GRPOTrainer.train on the same questions, KL penalty on, tower frozen; the second counts. micro: responses a forward."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from plumbing.images import load_processor
    from rollout import FORMAT_PROMPT

    folder, samples, phases, lora = (
        make_folder(shape),
        make_samples(shape),
        Phases(),
        shape.options.get("lora"),
    )
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16 if lora else torch.float32
    )
    model.model.visual.requires_grad_(False)
    config = GRPOConfig(
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
        generation_kwargs={"suppress_tokens": [*SPECIAL, 1, 2, 5]},
        disable_tqdm=True,
        model_init_kwargs=None,
    )
    peft = None
    if lora:
        from peft import LoraConfig

        peft = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=r".*language_model.*_proj")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{s.text}\n{FORMAT_PROMPT}"}],
            "image": s.images[0],
        }
        for s in samples
    ]
    calls, starts, totals = iter(range(10**9)), [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            phases.seconds.clear()
            starts.append(phases.clock())

        def on_step_end(self, *_, **__):
            totals.append(phases.clock() - starts[-1])

    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(next(calls) % 2 == 0) for _ in completions],
        args=config,
        callbacks=[Clock()],
        train_dataset=Dataset.from_list(rows),
        processing_class=load_processor(folder),
        peft_config=peft,
    )
    trainer.generation_config.eos_token_id = None
    trainer._generate_single_turn = phases.wrap("sample", trainer._generate_single_turn)
    trainer.train()
    lengths = trainer._metrics["train"]["completions/mean_length"]
    assert len(totals) == 2 and all(n == shape.new for n in lengths), (totals, lengths)
    phases.seconds["rest"] = totals[-1] - sum(phases.seconds.values())
    return {
        "seconds": totals[-1],
        "phases": phases.seconds,
        "phase_mib": phases.mib,
        "mib": max(torch.cuda.max_memory_allocated() / 2**20, *phases.mib.values())
        if GPU
        else high_water(),
        "micro": micro,
    }


CONTENDERS = {"TRL GRPOTrainer": None, "ours, GRPO": 0.0, "ours, PTD-PO": 0.05}


def measure(name: str, label: str) -> dict:
    """One contender in this process. TRL gets the largest micro-batch that fits."""
    shape, errors = SHAPES[label], 0
    sizes = [GROUP] if name.startswith("ours") else [GROUP, GROUP // 2, GROUP // 4]
    for micro in sizes:
        with contextlib.redirect_stdout(sys.stderr):
            try:
                got = (
                    measure_trl(shape, micro)
                    if name.startswith("TRL")
                    else measure_ours(shape, CONTENDERS[name])
                )
                return {
                    "name": name,
                    "shape": label,
                    **got,
                    "machine": machine("transformers", "trl"),
                }
            except torch.OutOfMemoryError:
                errors += 1
        torch.cuda.empty_cache()
    return {
        "name": name,
        "shape": label,
        "seconds": None,
        "machine": machine("transformers", "trl"),
    }


def line(row: dict, peer: float | None) -> str:
    if row["seconds"] is None:
        return f"| {row['name']} | does not fit | | | | | | | |"
    cells = [
        f"{row['phases'][p]:.1f}" if p in row["phases"] else ""
        for p in ("sample", "score", "teacher", "update", "rest")
    ]
    ratio = f"{peer / row['seconds']:.2f}" if peer else ""
    guess = f"{row['predicted_gib']:.1f}" if GPU and "predicted_gib" in row else ""
    return f"| {row['name']} | {row['seconds']:.1f} | {ratio} | {' | '.join(cells)} | {row['mib'] / 1024:.1f} | {guess} |"


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
    env = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
    for label in args.shapes:
        shape, rows = SHAPES[label], []
        for name in CONTENDERS:
            got = subprocess.run(
                [sys.executable, __file__, "--run", name, label],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=env,
            )
            rows.append(json.loads(got.stdout.splitlines()[-1]))
            RESULTS.parent.mkdir(exist_ok=True)
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        print(
            f"\n{label}: {shape.questions} questions x {GROUP} responses of {shape.new} tokens, pictures of {shape.side**2} tokens. {rows[0]['machine']}.\n\n"
            "| | seconds a step | x TRL | sample | score | teacher | update | rest | peak, GiB | predicted |\n|---|---|---|---|---|---|---|---|---|---|"
        )
        for row in rows:
            print(line(row, rows[0]["seconds"]), flush=True)


if __name__ == "__main__":
    main()
