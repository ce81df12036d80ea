"""What the measuring scripts share: result files, child processes, Markdown tables. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def load_rows(path: Path) -> list[dict]:
    """The rows of a results file, one JSON object per line; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append_row(path: Path, row: dict) -> None:
    """Add a row to a results file, at once: a script that is stopped keeps what has finished."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def share_of_cores(jobs: int) -> dict[str, str]:
    """The environment of one of `jobs` processes at a time: it gets its share of the cores."""
    threads = max(1, os.cpu_count() // jobs)
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


def measure_in_child(script: str, arguments: list[str], **environment: str) -> dict:
    """The last line that `script --run ARGUMENTS` prints, which is JSON, from a new process."""
    done = subprocess.run(
        [sys.executable, script, "--run", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", **environment},
    )
    return json.loads(done.stdout.splitlines()[-1])


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def load_pyplot(option: str):
    """matplotlib.pyplot without a screen. Ends the program where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"{option} needs matplotlib: python -m pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot
