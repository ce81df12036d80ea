"""The default run and the same run as plain GRPO, seed by seed: accuracy, entropy, wall time, as a table.

    python bench/bench_default.py --jobs 2             # 3 seeds x 2 arms, two runs at a time; 20 minutes on 2 cores
    python bench/bench_default.py --figure docs/default.png      # draw what has been measured (pip install matplotlib)

Each finished run adds one line to bench/results/default.jsonl; runs that are there already are not repeated. Remove the file to
measure anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from bench_losses import machine  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "default.jsonl"
ARMS = {"PTD-PO": [], "GRPO (--lam 0)": ["--lam", "0"]}


def measure(arm: str, seed: int, jobs: int) -> dict:
    """One whole `python train.py`, timed from outside, in a folder of its own, on its share of the cores."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs)),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "train.py"),
                "--seed",
                str(seed),
                "--name",
                "run",
                *ARMS[arm],
            ],
            cwd=folder,
            env=env,
            check=True,
            stderr=subprocess.DEVNULL,
        )
        seconds = time.time() - start
        rows = [json.loads(line) for line in open(Path(folder) / "runs" / "run" / "metrics.jsonl")]
    steps = rows[1:]
    return {
        "arm": arm,
        "seed": seed,
        "machine": machine("transformers", "accelerate"),
        "steps": len(steps),
        "minutes": round(seconds / 60, 2),
        "jobs": jobs,
        "plain": {str(r["step"]): r["eval_plain"] for r in rows if "eval_plain" in r},
        "hinted": [rows[0]["eval_hinted"], rows[-1]["eval_hinted"]],
        "entropy": [steps[0]["entropy"], steps[-1]["entropy"]],
        "entropies": [round(r["entropy"], 4) for r in steps],
        "length": [steps[0]["length"], steps[-1]["length"]],
        "skipped": steps[-1]["skipped_steps"],
    }


def table(rows: list[dict]) -> str:
    """Markdown, one line a run."""
    lines = [
        f"Machine: {rows[0]['machine']}; {rows[0]['steps']} steps; held-out puzzles, plain prompt, greedy; "
        f"{rows[0]['jobs']} runs at a time.",
        "",
        "| arm | seed | accuracy before, % | after, % | with hint after, % | entropy first -> last step | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (list(ARMS).index(r["arm"]), r["seed"])):
        plain = list(r["plain"].values())
        lines.append(
            f"| {r['arm']} | {r['seed']} | {100 * plain[0]:.1f} | {100 * plain[-1]:.1f} | {100 * r['hinted'][1]:.1f} | "
            f"{r['entropy'][0]:.2f} -> {r['entropy'][1]:.2f} | {r['minutes']:.1f} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy over steps, a line a run."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("--figure needs matplotlib: python -m pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for arm, colour in zip(ARMS, ("#1f6fb4", "#c4552d")):
        for n, r in enumerate(r for r in rows if r["arm"] == arm):
            steps, values = zip(*((int(s), 100 * v) for s, v in r["plain"].items()))
            axes.plot(
                steps,
                values,
                color=colour,
                marker="o",
                markersize=3.5,
                alpha=0.85,
                label=arm if n == 0 else None,
            )
    axes.set(
        xlabel="optimizer step",
        ylabel="held-out accuracy, %",
        ylim=(0, 100),
        title="Plain questions, no hint: the tutored student learns where to look",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
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
    rows = (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )
    if args.figure:
        draw(rows, args.figure)
        return
    RESULTS.parent.mkdir(exist_ok=True)
    missing = [
        (arm, seed)
        for seed in range(args.seeds)
        for arm in ARMS
        if not any((r["arm"], r["seed"]) == (arm, seed) for r in rows)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in as_completed(
            [pool.submit(measure, arm, seed, args.jobs) for arm, seed in missing]
        ):
            rows.append(done.result())
            with open(RESULTS, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
