# ruff: noqa: E402
"""The default run and plain GRPO: accuracy, entropy and time per seed.

    python bench/bench_default.py --jobs 2                     # 3 seeds, 2 arms: 20 minutes
    python bench/bench_default.py --figure docs/default.png    # draw what has been measured

The time is for 2 cores and two runs at a time. The figure needs matplotlib. Each finished run adds
one line to bench/results/default.jsonl. A run that is there already is not repeated: remove the
file to measure again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from bench_losses import machine
from common import RESULTS, append_row, load_pyplot, load_rows, markdown_table, share_of_cores

ROWS = RESULTS / "default.jsonl"
ARMS = {"PTD-PO": [], "GRPO (--lam 0)": ["--lam", "0"]}
COLOURS = dict(zip(ARMS, ("#1f6fb4", "#c4552d"), strict=True))
HEADER = [
    "arm",
    "seed",
    "steps",
    "accuracy before, %",
    "after, %",
    "with hint after, %",
    "entropy first -> last step",
    "minutes",
]


def measure(arm: str, seed: int, jobs: int) -> dict:
    """One whole `python train.py`, timed from outside, in its own folder, on its share of cores."""
    command = [sys.executable, str(ROOT / "train.py"), "--seed", str(seed), "--name", "run"]
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        subprocess.run(
            [*command, *ARMS[arm]],
            cwd=folder,
            env=share_of_cores(jobs),
            check=True,
            stderr=subprocess.DEVNULL,
        )
        minutes = (time.time() - began) / 60
        rows = load_rows(Path(folder) / "runs" / "run" / "metrics.jsonl")
    before, *steps = rows
    return {
        "arm": arm,
        "seed": seed,
        "machine": machine("transformers", "accelerate"),
        "steps": len(steps),
        "minutes": round(minutes, 2),
        "jobs": jobs,
        "plain": {str(row["step"]): row["eval_plain"] for row in rows if "eval_plain" in row},
        "hinted": [before["eval_hinted"], steps[-1]["eval_hinted"]],
        "entropy": [steps[0]["entropy"], steps[-1]["entropy"]],
        "entropies": [round(row["entropy"], 4) for row in steps],
        "length": [steps[0]["length"], steps[-1]["length"]],
        "skipped": steps[-1]["skipped_steps"],
    }


def table_row(row: dict) -> list[str]:
    """One run's cells under HEADER."""
    plain = list(row["plain"].values())
    entropy_before, entropy_after = row["entropy"]
    return [
        row["arm"],
        str(row["seed"]),
        str(row["steps"]),
        f"{100 * plain[0]:.1f}",
        f"{100 * plain[-1]:.1f}",
        f"{100 * row['hinted'][1]:.1f}",
        f"{entropy_before:.2f} -> {entropy_after:.2f}",
        f"{row['minutes']:.1f}",
    ]


def table(rows: list[dict]) -> str:
    """Markdown, one line per run."""
    setting = (
        f"Machine: {rows[0]['machine']}; held-out puzzles, plain prompt, greedy; "
        f"{rows[0]['jobs']} runs at a time."
    )
    arms = list(ARMS)
    in_order = sorted(rows, key=lambda row: (arms.index(row["arm"]), row["seed"]))
    return f"{setting}\n\n{markdown_table(HEADER, [table_row(row) for row in in_order])}"


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy over steps, one line per run."""
    plt = load_pyplot("--figure")
    figure, axes = plt.subplots(figsize=(8.6, 3.4), layout="constrained")
    style = {"marker": "o", "markersize": 3.5, "alpha": 0.85}
    named = set()
    for arm in ARMS:
        for row in rows:
            if row["arm"] != arm:
                continue
            steps = [int(step) for step in row["plain"]]
            percent = [100 * accuracy for accuracy in row["plain"].values()]
            label = None if arm in named else arm  # each arm stands once in the legend
            named.add(arm)
            axes.plot(steps, percent, color=COLOURS[arm], label=label, **style)
    axes.set(
        xlabel="optimizer step",
        ylabel="held-out accuracy, %",
        ylim=(0, 102),
        title="Plain questions, no hint: the tutored student learns where to look",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--figure", type=Path, help="draw the measured runs into this PNG and stop")
    args = parser.parse_args()
    rows = load_rows(ROWS)
    if args.figure:
        return draw(rows, args.figure)
    measured = {(row["arm"], row["seed"]) for row in rows}
    wanted = [(arm, seed) for seed in range(args.seeds) for arm in ARMS]
    missing = [run for run in wanted if run not in measured]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(measure, arm, seed, args.jobs) for arm, seed in missing]
        for future in as_completed(futures):
            rows.append(future.result())
            append_row(ROWS, rows[-1])
    print(table(rows))


if __name__ == "__main__":
    main()
