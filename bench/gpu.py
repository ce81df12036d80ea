"""The first ten minutes on a GPU: does it run, how fast, and does it need what --plan predicts?

    python bench/gpu.py                    # all parts; 2B shape, 80 GB
    python bench/gpu.py losses decode      # some of them

Each part runs in a process of its own. One that fails or takes too long gives a line with "error",
and the next part goes on. One JSON line per part is printed and added to bench/results/gpu.jsonl.
Weights are random. Without a GPU all parts run on a CPU, in the shape of the embedded model: that
shows that the script works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import bench_losses  # noqa: E402
from bench_losses import GPU, high_water, machine  # noqa: E402
from bench_rollout import make_model, make_prompts, ours  # noqa: E402
from bench_step import GROUP, Shape, make_folder, make_questions  # noqa: E402
from common import RESULTS, append_row  # noqa: E402

ROWS = RESULTS / "gpu.jsonl"
SHAPE = "2B" if GPU else "tiny"
LIMIT = 300  # seconds per part
DEFAULT = {"questions": 128, "group": 8, "steps": 607, "updates": 3}  # of train.TrainConfig
# the rows of the planner's table in docs/your-model.md
UPDATES = {
    "default": {},
    "--micro-tokens 8192": {"micro_tokens": 8192},
    "--freeze-vision": {"freeze_vision": True},
    "--gradient-checkpointing": {"gradient_checkpointing": True},
    "--gradient-checkpointing --lora 32": {"gradient_checkpointing": True, "lora": 32},
}


def seconds_of(run, repeats: int = 3) -> float:
    """The best time of a few calls, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------- parts
def versions() -> dict:
    """What is installed, and the card."""
    names = ("torch", "transformers", "accelerate", "huggingface_hub", "numpy", "pillow")
    row = {name: importlib.metadata.version(name) for name in names}
    row["cuda"] = torch.version.cuda
    if GPU:
        card = torch.cuda.get_device_properties(0)
        row |= {"gib": card.total_memory / 2**30, "capability": [card.major, card.minor]}
    return row


def losses() -> dict:
    """scores_from_hidden against float64: error of value and gradient, peak against prediction."""
    tokens = 512
    with tempfile.TemporaryDirectory() as folder:
        reference, result = f"{folder}/reference", f"{folder}/ours"
        bench_losses.references(tokens, reference)
        row = bench_losses.run(bench_losses.OURS, tokens, True, 3, result)
        expected = torch.load(reference)["union"]
        got = torch.load(result)
    gradient, exact = got["grad"].double(), expected["grad"].double()
    row["value_error"] = abs(got["value"] - expected["value"]) / abs(expected["value"])
    row["gradient_error"] = ((gradient - exact).norm() / exact.norm()).item()
    return row


def check() -> dict:
    """--check of the embedded model: in float32, in bf16, and with recomputed activations."""
    row = {}
    for options in (
        ["--precision", "no"],
        ["--precision", "bf16"],
        ["--precision", "bf16", "--gradient-checkpointing"],
    ):
        done = train_command([*options, "--updates", "2"], "--check")
        lines = done.stdout.splitlines()
        failed = [line for line in lines if line.startswith("FAIL")]
        row[" ".join(options)] = failed or ("ok" if done.returncode == 0 else done.stderr[-500:])
    return row


def train_command(options: list[str], *more: str, launch: tuple = (), folder=None):
    """train.py in a new process, in an empty folder."""
    command = [sys.executable, *launch, str(ROOT / "train.py"), *options, *more]
    return subprocess.run(
        command, cwd=folder or tempfile.mkdtemp(), capture_output=True, text=True, timeout=LIMIT
    )


def kernels() -> dict:
    """Which attention kernels run: in a prefill, in a decoding step, in an update."""
    trainer, groups = make_step({}, answer_tokens=64)
    responses = [response for group in groups for response in group]
    batch = trainer.training_batch(responses[:GROUP])
    prompts = [group[0].prompt for group in groups]
    row = {}
    with torch.no_grad():
        row["score, no gradient"] = attention_kernels(lambda: trainer.student_scores(batch))
    row["update"] = attention_kernels(lambda: trainer.score(responses[:GROUP]))
    row["sample"] = attention_kernels(lambda: trainer.sample(prompts))
    return row


def attention_kernels(run) -> list[str]:
    """Names of the kernels, or on a CPU of the operators, that look like attention."""
    words = ("attention", "flash", "fmha", "softmax", "cudnn_generated")
    names = {event.key for event in profile(run).key_averages()}
    return sorted(name[:90] for name in names if any(word in name.lower() for word in words))


def profile(run):
    """torch's profiler over one call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if GPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    run()
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        synchronize()
    return profiler


def decode() -> dict:
    """Our sampler: ms per step of all rows together, launches, host reads, share of GPU busy."""
    model, special = make_model(SHAPE)
    prompts = make_prompts(SHAPE, special, model.dtype)
    run = ours(model, prompts, special)
    few, many = 8, 40
    step = (seconds_of(lambda: run(many)) - seconds_of(lambda: run(few))) / (many - few)
    events, more_events = (profile(lambda new=new: run(new)).key_averages() for new in (few, many))

    def per_step(*prefixes: str) -> float:
        counts = [
            sum(event.count for event in averages if event.key.startswith(prefixes))
            for averages in (events, more_events)
        ]
        return (counts[1] - counts[0]) / (many - few)

    busy = [
        sum(event.self_device_time_total for event in averages) / 1e6
        for averages in (events, more_events)
    ]
    rows = len(prompts) * GROUP
    return {
        "shape": SHAPE,
        "rows": rows,
        "ms_per_step": 1000 * step,
        "tokens_per_second": rows / step,
        "launches_per_step": per_step("cudaLaunchKernel", "cuLaunchKernel"),
        "operators_per_step": per_step("aten::"),
        "host_reads_per_step": per_step("aten::_local_scalar_dense", "aten::nonzero"),
        "gpu_busy": (busy[1] - busy[0]) / (many - few) / step,
    }


def make_step(options: dict, answer_tokens: int):
    """A trainer, and groups of random responses to questions with an image; half are tutored."""
    from accelerate import Accelerator

    import train
    from plumbing.images import load_processor
    from plumbing.models import build
    from rollout import Response

    shape = Shape(SHAPE, side=32 if GPU else 4, questions=2, new=answer_tokens)
    config = train.TrainConfig(
        model=make_folder(shape), max_new_tokens=answer_tokens, questions=2, updates=1, **options
    )
    accelerator = Accelerator(mixed_precision="bf16" if GPU else "no")
    processor = load_processor(config.model)
    trainer = train.Trainer(config, accelerator, processor, *build(config, accelerator))
    generator = torch.Generator().manual_seed(0)
    groups = []
    for prompt in trainer.read(make_questions(shape)):
        ids = torch.randint(9, 90, (config.group_size, answer_tokens), generator=generator)
        groups.append([Response(prompt, row.tolist(), "", truncated=False) for row in ids])
    for group in groups:
        for number, response in enumerate(group):
            response.correct = number % 2 == 0
            response.reward = float(response.correct)
    trainer.assign(groups)
    return trainer, groups


def update(name: str) -> dict:
    """One optimizer step whose micro-batches are full: seconds, peak memory against --plan."""
    from plumbing.memory import plan

    options = UPDATES[name]
    token_limit = options.get("micro_tokens", 4096)
    answer_tokens = (token_limit - 1200) // GROUP if GPU else 40
    trainer, groups = make_step(options, answer_tokens)
    responses = [response for group in groups for response in group]

    def step() -> None:
        trainer.score(responses)
        trainer.step()

    high_water(reset=True)
    seconds = seconds_of(step, repeats=2)
    predicted = plan(trainer.config, 1, trainer.accelerator.mixed_precision == "bf16")["peak"]
    return {
        "shape": SHAPE,
        "options": name,
        "seconds": seconds,
        "response_tokens": len(responses) * answer_tokens,
        "peak_gib": high_water() / 1024,
        "predicted_gib": predicted,
    }


def fsdp() -> dict:
    """FSDP2 with one process over nccl: two steps, resumed for a third, --check."""
    if not GPU:
        return {"skipped": "needs a GPU: accelerate shards over nccl only"}
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "fsdp.yaml"))
    launch = (*launch, "--num_processes", "1")
    folder, row = tempfile.mkdtemp(), {}
    options = ["--eval-questions", "8", "--gradient-checkpointing"]
    for name, words in {
        "train": [*options, "--steps", "2", "--save-every", "1", "--name", "sharded"],
        "resume": ["--resume", "runs/sharded", "--steps", "3"],
        "check": [*options, "--check"],
    }.items():
        done = train_command(words, launch=launch, folder=folder)
        row[name] = "ok" if done.returncode == 0 else (done.stdout + done.stderr)[-800:]
    return row


def images() -> dict:
    """Milliseconds per image: on the CPU from pixels to patches, and in the vision tower."""
    trainer, groups = make_step({}, answer_tokens=16)
    questions = [group[0].question for group in groups]
    prompt = groups[0][0].prompt
    tower, device = trainer.policy.model.visual, trainer.accelerator.device
    pixels, grid = prompt.pixels.to(device), prompt.grid.to(device)

    @torch.no_grad()
    def encode() -> None:
        with trainer.accelerator.autocast():
            tower(pixels, grid_thw=grid)

    return {
        "tokens": int(prompt.types.sum()),
        "cpu_ms": 1000 * seconds_of(lambda: trainer.read(questions)) / len(questions),
        "tower_ms": 1000 * seconds_of(encode),
    }


def hours(rows: dict[str, dict]) -> dict:
    """Predicted hours of the default run at two mean lengths, from the parts measured before.

    Assumed: a decoding step takes as long with any number of rows up to the measured one; the rows
    of a round wait for the longest, 2.5 times the mean but at most 4096 tokens; an update's time
    grows with response tokens; reading images overlaps with nothing.
    """
    decoded, updated, read = (rows[name] for name in ("decode", "update: default", "images"))
    responses = DEFAULT["questions"] * DEFAULT["group"]
    rounds = math.ceil(responses / decoded["rows"])
    row = {"rows_at_once": decoded["rows"]}
    for mean in (400, 4096):
        sampling = rounds * min(4096, 2.5 * mean) * decoded["ms_per_step"] / 1000
        update_seconds = responses * mean * updated["seconds"] / updated["response_tokens"]
        reading = DEFAULT["questions"] * (read["cpu_ms"] + read["tower_ms"]) / 1000
        step = sampling + update_seconds + reading
        row[f"mean {mean}"] = {
            "sampling_seconds_per_step": sampling,
            "update_seconds_per_step": update_seconds,
            "hours_of_the_run": DEFAULT["steps"] * step / 3600,
        }
    return row


PARTS = {
    "versions": versions,
    "losses": losses,
    "check": check,
    "kernels": kernels,
    "decode": decode,
    **{f"update: {name}": (lambda name=name: update(name)) for name in UPDATES},
    "fsdp": fsdp,
    "images": images,
}


# ------------------------------------------------------------------------------------------ the run
def measure(name: str) -> dict:
    """One part in a new process: its row, or "error" with the last lines of what went wrong."""
    began = time.perf_counter()
    row = {"part": name}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--run", name],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"},
        )
        row |= json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        row["error"] = f"stopped after {LIMIT} seconds"
    except (IndexError, ValueError):
        row["error"] = done.stderr[-1500:]
    return row | {"part_seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} [all]")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        with contextlib.redirect_stdout(sys.stderr):
            row = PARTS[args.run]()
        return print(json.dumps(row))
    chosen = [name for name in PARTS if not args.parts or name.partition(":")[0] in args.parts]
    where, rows = machine("transformers", "accelerate"), {}
    for name in chosen:
        rows[name] = measure(name) | {"machine": where}
        append_row(ROWS, rows[name])
        print(json.dumps(rows[name]), flush=True)
    needed = ("decode", "update: default", "images")
    if all("error" not in rows.get(name, {"error": ""}) for name in needed):
        row = {"part": "hours", **hours(rows), "machine": where}
        append_row(ROWS, row)
        print(json.dumps(row))


if __name__ == "__main__":
    main()
