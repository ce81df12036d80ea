"""What runs where: the table of docs/your-model.md, as Markdown.

    python bench/ran_where.py                     # all cells, 10 minutes on two cores
    python bench/ran_where.py fsdp-bf16 Qwen3VL   # those of a place, of a class

A cell is a tiny random model in the hub's own files (tests/hub.py): two steps of two updates per
rollout, a resumed run to step 4, and --check, on the built-in puzzles. "runs" means that each ended
with exit code 0, and that all logged numbers are finite. Otherwise the cell says what ended it.
Without peft, --lora does not run. All processes use the CPU and gloo.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shlex
import socket
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# TRAP: without the last one accelerate sees no other process on a CPU
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
import hub  # noqa: E402
import torch  # noqa: E402
from two_processes import sharding_accelerator  # noqa: E402

import train  # noqa: E402
from plumbing import runs  # noqa: E402

CLASSES = {"Qwen2VL": "Qwen2-VL", "Qwen2_5_VL": "Qwen2.5-VL", "Qwen3VL": "Qwen3-VL"}
MODES = ("", "--freeze-vision", "--gradient-checkpointing", "--lora 4")
PLACES = {  # name -> (processes, --precision, sharded)
    "float32": (1, "no", False),
    "bf16": (1, "bf16", False),
    "ddp-float32": (2, "no", False),
    "ddp-bf16": (2, "bf16", False),
    "fsdp-bf16": (2, "bf16", True),
}
OPTIONS = shlex.split(
    "--updates 2 --questions 4 --group-size 2 --max-new-tokens 16 --micro-tokens 1200 --lr 1e-4 "
    "--beta-kl 0.1 --eval-questions 2 --eval-every 9 --save-every 2"
)
LIMIT = 120  # seconds per command
FORK = multiprocessing.get_context("fork")  # torch and transformers are imported once


def one_process(rank: int, port: int, folder: Path, place: str, options: list[str]) -> None:
    """train.py as one of the processes that torchrun would start; what it prints goes to a file."""
    processes, _, sharded = PLACES[place]
    with open(folder / f"printed-{rank}", "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sharded:
        runs.Accelerator = sharding_accelerator
    train.main(options)


def run(folder: Path, place: str, options: list[str]) -> str:
    """ "" where all processes ended with exit code 0; or else what ended one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        FORK.Process(target=one_process, args=(rank, port, folder, place, options))
        for rank in range(PLACES[place][0])
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(LIMIT)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    if codes == [0] * len(codes):
        return ""
    printed = [(folder / f"printed-{rank}").read_text() for rank in range(len(codes))]
    lines = "\n".join(printed).splitlines()
    errors = [line for line in lines if "rror: " in line or line.startswith("FAIL")]
    return errors[-1] if errors else f"exit codes {codes}"


def cell(folder: Path, kind: str, mode: str, place: str) -> str:
    """ "runs", or what ended it."""
    name = f"{kind}-{MODES.index(mode)}-{place}"
    options = ["--model", kind, "--precision", PLACES[place][1], *OPTIONS, *mode.split()]
    for command in (
        [*options, "--steps", "2", "--name", name],
        ["--resume", f"runs/{name}", "--steps", "4"],
        [*options, "--check"],
    ):
        error = run(folder, place, command)
        if error:
            return error
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row["step"] for row in rows]
    finite = all(math.isfinite(value) for row in rows for value in row.values())
    return "runs" if steps == [0, 1, 2, 3, 4] and finite else f"steps {steps}, finite: {finite}"


def write_models(folder: Path) -> None:
    """One of each class. Many tokens end a response, so that a random model passes --check."""
    for kind in CLASSES:
        (folder / kind).mkdir()
        hub.write_checkpoint(folder / kind, kind)
        path = folder / kind / "generation_config.json"
        settings = json.loads(path.read_text())
        settings["eos_token_id"] += range(32, 80)
        hub.write_json(path, settings)


def main(chosen: list[str]) -> None:
    """Print a row per place and mode, as soon as it is known."""
    kinds = [kind for kind in CLASSES if kind in chosen] or list(CLASSES)
    places = [place for place in PLACES if place in chosen] or list(PLACES)
    print(f"| place | mode | {' | '.join(CLASSES[kind] for kind in kinds)} |")
    print("|---|---|" + "---|" * len(kinds), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder)
        for place in places:
            for mode in MODES:
                results = [cell(folder, kind, mode, place) for kind in kinds]
                label = f"`{mode}`" if mode else "full"
                print(f"| {place} | {label} | {' | '.join(results)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
