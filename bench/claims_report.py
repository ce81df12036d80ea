"""The tables of claims.py, from its rows."""

from __future__ import annotations

import statistics

from arms import ABLATIONS, MAIN
from common import markdown_table

KINDS = ("named", "narrowed")
LAST = 20  # steps whose mean the table shows
EVALUATIONS = 3  # likewise


def mean_of_last(row: dict) -> dict[str, float]:
    """Accuracy of all puzzles and by kind: the mean of a run's last evaluations, %."""
    late = list(row["curve"].values())[-EVALUATIONS:]
    return {kind: statistics.mean(percent[kind] for percent in late) for kind in ("all", *KINDS)}


def held_out_rows(rows: list[dict], steps: int) -> list[dict]:
    """The finished runs that the page speaks of."""
    return [row for row in rows if row["split"] == "heldout" and row["steps"] == steps]


def table(rows: list[dict], steps: int) -> str:
    """Markdown: the arms, the main arms by family, the teachers, the gradients."""
    held_out = held_out_rows(rows, steps)
    if not held_out:
        return "nothing measured on the held-out puzzles yet"
    hours = sum(row["cpu_seconds"] for row in rows) / 3600
    setting = (
        f"{held_out[0]['machine']}; {steps} steps; plain prompt, greedy; 200 held-out puzzles, "
        f"mean of the last {EVALUATIONS} evaluations; mean (lowest - highest) over seeds. "
        f"{len(rows)} runs, {hours:.1f} hours of one core in all."
    )
    teachers = [row for row in rows if row["split"] == "teacher"]
    parts = [
        setting,
        arms_table("arm", list(MAIN), held_out),
        arms_table("PTD-PO, but", list(ABLATIONS), held_out),
        families_table(held_out),
        teachers_table(teachers, held_out),
        gradients_table(held_out),
    ]
    return "\n\n".join(part for part in parts if part.count("\n") != 1)  # no head without lines


def arms_table(title: str, arms: list[str], held_out: list[dict]) -> str:
    """One line per arm that has been measured."""
    header = [
        title,
        "seeds",
        *[f"{kind}, %" for kind in ("all", *KINDS)],
        "pass@8 named / narrowed, %",
        "with the hint, before -> after, %",
        "entropy, last 20 steps",
        "length",
        "all-failed groups, last 20, %",
        "steps clipped, %",
        "CPU minutes",
    ]
    runs_of = {arm: [row for row in held_out if row["arm"] == arm] for arm in arms}
    return markdown_table(header, [arm_cells(arm, runs) for arm, runs in runs_of.items() if runs])


def arm_cells(arm: str, runs: list[dict]) -> list[str]:
    """One arm's cells, from its runs (one per seed)."""
    options = " ".join(runs[0]["chosen" if arm in MAIN else "options"])
    accuracy = [mean_of_last(run) for run in runs]
    all_failed = statistics.mean(last_steps(runs, "all_failed"))
    minutes = statistics.mean(run["cpu_seconds"] for run in runs) / 60
    return [
        f"{arm} (`{options}`)" if options else arm,
        str(len(runs)),
        *[spread([percent[kind] for percent in accuracy]) for kind in ("all", *KINDS)],
        by_kind([run["final"]["pass@8"] for run in runs]),
        " -> ".join(mean_text(run["final"]["hinted"][i] for run in runs) for i in (0, 1)),
        spread(last_steps(runs, "entropy"), 2),
        spread(last_steps(runs, "length"), 0),
        f"{100 * all_failed:.0f}",
        f"{100 * statistics.mean(run['clipped'] for run in runs):.0f}",
        f"{minutes:.1f}",
    ]


def families_table(held_out: list[dict]) -> str:
    """The main arms by family of puzzles, and what another puzzle's answer does to them."""
    families = list(held_out[0]["final"]["families"])
    told = "told another puzzle's answer: says that, named / narrowed, %"
    header = ["arm", *families, told, "is right nevertheless, %"]
    rows = []
    for arm in MAIN:
        finals = [row["final"] for row in held_out if row["arm"] == arm]
        if finals:
            right = [
                mean_text(final["families"][family] for final in finals) for family in families
            ]
            said = [final["told another answer"] for final in finals]
            says_it = by_kind([percent["says it"] for percent in said])
            is_right = by_kind([percent["is right"] for percent in said])
            rows.append([arm, *right, says_it, is_right])
    return markdown_table(header, rows)


def teachers_table(teachers: list[dict], held_out: list[dict]) -> str:
    """How often each teacher is right, and its student after training."""
    header = [
        "what the teacher reads",
        "teacher right, named / narrowed, %",
        "student after training",
    ]
    rows = []
    for row in teachers:
        students = [mean_of_last(run) for run in held_out if run["arm"] == row["arm"]]
        student = by_kind(students) if students else ""
        rows.append([row["arm"], by_kind([row["final"]["teacher"]]), student])
    return markdown_table(header, rows)


def gradients_table(held_out: list[dict]) -> str:
    """PTD-PO's two gradients over the steps."""
    header = [
        "PTD-PO, step",
        "tutoring gradient / policy gradient",
        "KL penalty's / policy gradient",
        "cosine of the first two",
    ]
    by_step = {}
    for row in held_out:
        for compared in row["gradients"] if row["arm"] == "PTD-PO" else []:
            if compared["cosine"] is not None:
                by_step.setdefault(compared["step"], []).append(compared)
    rows = []
    for step, pairs in sorted(by_step.items()):
        ratios = [
            spread([pair[part] / pair["policy"] for pair in pairs]) for part in ("tutor", "kl")
        ]
        rows.append([str(step), *ratios, spread([pair["cosine"] for pair in pairs], 2)])
    return markdown_table(header, rows)


def spread(values: list[float], digits: int = 1) -> str:
    """A mean, with the lowest and the highest where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def mean_text(values) -> str:
    return f"{statistics.mean(values):.0f}"


def by_kind(percents: list[dict[str, float]]) -> str:
    """Means, "named / narrowed"."""
    return " / ".join(mean_text(percent[kind] for percent in percents) for kind in KINDS)


def last_steps(runs: list[dict], name: str) -> list[float]:
    """Each run's mean over its last steps."""
    return [statistics.mean(run[name][-LAST:]) for run in runs]
