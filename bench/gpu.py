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
import simulation  # noqa: E402
from bench_losses import GPU, high_water, machine  # noqa: E402
from bench_rollout import generate, generate_compiled, make_model, make_prompts, ours  # noqa: E402
from bench_step import GROUP, Shape, make_folder, make_questions  # noqa: E402
from common import RESULTS, append_row  # noqa: E402

ROWS = RESULTS / "gpu.jsonl"
SHAPE = "2B" if GPU else "tiny"
LIMIT = 300  # seconds per part
DEFAULT = {"questions": 128, "steps": 607, "updates": 3}  # of train.TrainConfig
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


ROWS_TOGETHER = (32, 64, 128)
# at the 2B shape all steps of these read one window of the cache, so that one graph serves them
NEW = 200 if GPU else 24
WARM = 24 if GPU else 3  # tokens before the clock starts: warm-up and capture are over


class Clock:
    """Time per step from token WARM on. The GPU is waited for at both ends alone."""

    def __init__(self):
        self.steps, self.before, self.began = 0, 0, None

    def tick(self, steps: int = 1) -> None:
        """So many steps more."""
        self.steps += steps
        if self.began is None and self.steps >= WARM:
            synchronize()
            self.began, self.before = time.perf_counter(), self.steps

    def ms_per_step(self) -> float:
        synchronize()
        return 1000 * (time.perf_counter() - self.began) / (self.steps - self.before)


def decode(rows: int) -> dict:
    """`rows` responses together: our steps with graphs and without, model.generate, the bound."""
    model, special = make_model(SHAPE)
    prompts = make_prompts(SHAPE, special, model.dtype, rows // GROUP)
    run = ours(model, prompts, special)
    eager_ms, eager_ids = our_step(run, rows, graphs=False)
    row = {"shape": SHAPE, "rows": rows, "prompt_tokens": len(prompts[0].ids), "eager_ms": eager_ms}
    row |= {"graphs": "none, no GPU", "ms_per_step": eager_ms}
    if GPU:
        row["ms_per_step"], ids = our_step(run, rows, graphs=True)
        differ = sum(ours != theirs for ours, theirs in zip(ids, eager_ids, strict=True))
        row["graphs"] = f"{differ} of {rows} responses differ from eager ones"
    row["tokens_per_second"] = 1000 * rows / row["ms_per_step"]
    row |= bound(model, rows, row["prompt_tokens"])
    row["times_bound"] = row["ms_per_step"] / row["bound_ms"]
    row |= counted(run)
    for name, peer in {"generate": generate, "generate_static": generate_compiled}.items():
        row[f"{name}_ms"] = generate_step(peer(model, prompts, special))
    return row


def our_step(run, rows: int, graphs: bool) -> tuple[float, list[list[int]]]:
    """ms per step of all rows, and their tokens."""
    run(WARM, graphs=graphs)
    clock = Clock()
    ids = run(NEW, watch=lambda look: clock.tick(look.slot_steps // rows), graphs=graphs)
    return clock.ms_per_step(), ids


def generate_step(run) -> float | str:
    """ms per step of model.generate, which compiles in a run before; or why there is none."""
    from transformers import StoppingCriteria

    class Ticks(StoppingCriteria):
        def __init__(self):
            self.clock = Clock()

        def __call__(self, input_ids, scores, **_) -> torch.Tensor:
            self.clock.tick()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    try:
        run(NEW)
        ticks = Ticks()
        run(NEW, stopping_criteria=[ticks])
    except RuntimeError as error:  # out of memory, or torch.compile gives up: ours is measured
        return str(error).partition("\n")[0]
    return ticks.clock.ms_per_step()


def bound(model, rows: int, prompt_tokens: int) -> dict:
    """ms in which the memory gives what a step must read: weights once, each row's cache.

    The memory's speed is that of a copy of a large tensor, each byte read and written.
    """
    text, width = model.config.get_text_config(), model.dtype.itemsize
    head_size = text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * width
    numbers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    weights = width * (numbers + model.get_output_embeddings().weight.numel())
    source = torch.zeros(2**28 if GPU else 2**22, device=model.device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds_of(lambda: target.copy_(source))
    window = prompt_tokens + NEW // 2  # the mean
    return {
        "bandwidth": bandwidth,
        "cache_bytes": cache,
        "window": window,
        "bound_ms": 1000 * (weights + rows * window * cache) / bandwidth,
    }


def counted(run) -> dict:
    """By the profiler, per step: launches and host reads of plain steps, ms of the GPU's work."""
    few, many = 8, 24  # whole looks
    usual = plain = averages_of(run, (few, many), graphs=False)
    if GPU:
        usual = averages_of(run, (few, many), graphs=True)

    def per_step(averages: list, value) -> float:
        before, after = (sum(value(event) for event in events) for events in averages)
        return (after - before) / (many - few)

    def count_of(*prefixes: str):
        return lambda event: event.count if event.key.startswith(prefixes) else 0

    return {
        "launches_per_step": per_step(plain, count_of("cudaLaunchKernel", "cuLaunchKernel")),
        "operators_per_step": per_step(plain, count_of("aten::")),
        "host_reads_per_step": per_step(plain, count_of("aten::_local_scalar_dense")),
        "gpu_busy_ms_per_step": per_step(usual, lambda event: event.self_device_time_total) / 1000,
    }


def averages_of(run, lengths: tuple, graphs: bool) -> list:
    """The profiler's sums by name, of a run of each length."""
    return [profile(lambda new=new: run(new, graphs=graphs)).key_averages() for new in lengths]


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
    """Predicted hours of the default run at three mean lengths, from the parts measured before.

    The steps of a rollout are those of bench/simulation.py. A step takes as measured, and besides
    the time to read the longer window; an update's time grows with response tokens; reading images
    overlaps with nothing.
    """
    updated, read = rows["update: default"], rows["images"]
    decoded = max(decode_rows(rows), key=lambda row: row["tokens_per_second"])
    slots, questions = decoded["rows"], DEFAULT["questions"] * DEFAULT["updates"]
    row = {"rows_at_once": slots}
    for mean in simulation.MEANS:
        drawn = simulation.rollouts(simulation.log_normal(mean), questions)
        counted = simulation.over_rollouts(simulation.refilled, drawn, slots)
        longer = counted.window - simulation.PROMPT + decoded["prompt_tokens"] - decoded["window"]
        longer_ms = 1000 * slots * longer * decoded["cache_bytes"] / decoded["bandwidth"]
        steps = counted.steps / len(drawn) / DEFAULT["updates"]
        sampling = steps * (decoded["ms_per_step"] + longer_ms) / 1000
        tokens = counted.used / len(drawn) / DEFAULT["updates"]
        update_seconds = tokens * updated["seconds"] / updated["response_tokens"]
        reading = DEFAULT["questions"] * (read["cpu_ms"] + read["tower_ms"]) / 1000
        step = sampling + update_seconds + reading
        row[f"mean {mean}"] = {
            "sampling_seconds_per_step": sampling,
            "update_seconds_per_step": update_seconds,
            "hours_of_the_run": DEFAULT["steps"] * step / 3600,
        }
    return row


def decode_rows(rows: dict[str, dict]) -> list[dict]:
    """The parts "decode" that went through."""
    decoded = [row for name, row in rows.items() if name.startswith("decode")]
    return [row for row in decoded if "error" not in row]


PARTS = {
    "versions": versions,
    "losses": losses,
    "check": check,
    "kernels": kernels,
    **{f"decode: {count} rows": (lambda count=count: decode(count)) for count in ROWS_TOGETHER},
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
    needed = ("update: default", "images")
    others = all("error" not in rows.get(name, {"error": ""}) for name in needed)
    if others and decode_rows(rows):
        row = {"part": "hours", **hours(rows), "machine": where}
        append_row(ROWS, row)
        print(json.dumps(row))


if __name__ == "__main__":
    main()
