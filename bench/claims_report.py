"""The tables and figures of claims.py, from its rows."""

from __future__ import annotations

import statistics
from pathlib import Path

from arms import ABLATIONS, ARMS, MAIN
from common import load_pyplot, markdown_table

KINDS = ("named", "narrowed")
LAST = 20  # steps whose mean the table shows
EVALUATIONS = 3  # likewise


def mean_of_last(row: dict) -> dict[str, float]:
    """Accuracy by kind of puzzle: the mean of a run's last evaluations, %."""
    late = list(row["curve"].values())[-EVALUATIONS:]
    return {kind: statistics.mean(percent[kind] for percent in late) for kind in KINDS}


# ------------------------------------------------------------------------------------------- tables
def table(rows: list[dict], steps: int) -> str:
    """Markdown: the arms, the main arms by family, the teachers, the gradients."""
    held_out = [row for row in rows if row["split"] == "heldout" and row["steps"] == steps]
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
    return "\n\n".join(parts)


def arms_table(title: str, arms: list[str], held_out: list[dict]) -> str:
    """One line per arm that has been measured."""
    header = [
        title,
        "seeds",
        *[f"{kind}, %" for kind in KINDS],
        "pass@8 named / narrowed, %",
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
        *[spread([percent[kind] for percent in accuracy]) for kind in KINDS],
        by_kind([run["final"]["pass@8"] for run in runs]),
        spread(last_steps(runs, "entropy"), 2),
        spread(last_steps(runs, "length"), 0),
        f"{100 * all_failed:.0f}",
        f"{100 * statistics.mean(run['clipped'] for run in runs):.0f}",
        f"{minutes:.1f}",
    ]


def families_table(held_out: list[dict]) -> str:
    """The main arms by family of puzzles, and what another puzzle's answer does to them."""
    families = list(held_out[0]["final"]["families"])
    told = "told another answer: says it, named / narrowed"
    header = ["arm", *families, told, "is right all the same"]
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


# ------------------------------------------------------------------------------------------ figures
COLOURS = {
    "PTD-PO": "#1f6fb4",
    "GRPO": "#c4552d",
    "tutoring alone": "#3a9a5b",
    "SFT on solutions": "#7a8794",
    "OPSD": "#8a56b0",
    "HDPO-like": "#b08a1e",
}
KIND_COLOURS = {"named": "#1f6fb4", "narrowed": "#7a8794"}
# label of a panel -> label of a point -> arm
SWEEPS = {
    "K": {"1": "K 1", "5": "K 5", "20": "PTD-PO", "all": "K full"},
    "tau": {"0.2": "tau 0.2", "0.4": "tau 0.4", "1.0": "PTD-PO"},
    "what the teacher reads": {
        "none:\nGRPO": "GRPO",
        "other's\nhint": "another's hint",
        "no\npicture": "blind teacher",
        "steps\nalone": "unstructured hint",
        "no\nlook": "hint without look",
        "no\nignore": "hint without ignore",
        "no\nsteps": "hint without steps",
        "the\nhint": "PTD-PO",
    },
}


def draw(rows: list[dict], folder: Path, steps: int) -> None:
    """claims.png: accuracy and entropy over steps. ablations.png: accuracy against K, tau, hint."""
    plt = load_pyplot("--figures")
    held_out = [row for row in rows if row["split"] == "heldout" and row["steps"] == steps]
    runs = {arm: [row for row in held_out if row["arm"] == arm] for arm in ARMS}
    figures = {
        "claims.png": draw_curves(plt, runs, steps),
        "ablations.png": draw_sweeps(plt, runs, steps),
    }
    for name, figure in figures.items():
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.3)
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)


def draw_curves(plt, runs: dict[str, list[dict]], steps: int):
    """Accuracy by kind of puzzle, and entropy: means over seeds, and the seeds' range."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    named, narrowed, entropy = panels
    for arm in COLOURS:
        if not runs[arm]:
            continue
        evaluated_after = [int(step) for step in runs[arm][0]["curve"]]
        for kind, axes in zip(KINDS, (named, narrowed), strict=True):
            curves = [[v[kind] for v in run["curve"].values()] for run in runs[arm]]
            draw_band(axes, evaluated_after, curves, arm)
        smooth = [running_mean(run["entropy"][:steps], 10) for run in runs[arm]]
        draw_band(entropy, range(1, steps + 1), smooth, arm)
    named.set(title="The hint names the line", ylabel="held-out accuracy, %")
    narrowed.set(title="The hint names two rows, the reward one")
    entropy.set(title="Entropy of the responses", ylabel="nats a token, mean of 10 steps")
    for axes in panels:
        axes.set(xlabel="optimizer step", ylim=(0, None if axes is entropy else 100))
    named.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def running_mean(values: list[float], window: int) -> list[float]:
    """The mean of each value and of up to window - 1 before it."""
    return [statistics.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def draw_band(axes, x, curves: list[list[float]], arm: str) -> None:
    """The mean of the seeds' curves as a line, and their range as a band."""
    at_each_x = list(zip(*curves, strict=True))
    colour = COLOURS[arm]
    axes.plot(
        x,
        [statistics.mean(values) for values in at_each_x],
        color=colour,
        label=f"{arm} ({len(curves)})",
        linewidth=1.8,
        linestyle="-" if arm in MAIN else "--",
    )
    low = [min(values) for values in at_each_x]
    high = [max(values) for values in at_each_x]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_sweeps(plt, runs: dict[str, list[dict]], steps: int):
    """One panel per sweep: accuracy after training, each seed as a point, means as lines."""
    figure, panels = plt.subplots(
        1, 3, figsize=(11, 3.2), layout="constrained", sharey=True, width_ratios=(4, 2, 6)
    )
    for axes, (label, arms) in zip(panels, SWEEPS.items(), strict=True):
        points = {name: runs[arm] for name, arm in arms.items() if runs[arm]}
        for kind in KINDS:
            values = [[mean_of_last(run)[kind] for run in seeds] for seeds in points.values()]
            draw_points(axes, values, kind)
        axes.set_xticks(range(len(points)), list(points), fontsize=8)
        axes.set(xlabel=label, ylim=(0, 100), xlim=(-0.5, len(points) - 0.5))
    panels[0].set_ylabel(f"accuracy after {steps} steps, %")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def draw_points(axes, values: list[list[float]], kind: str) -> None:
    """Each arm's seeds as dots and their mean as a dash; few arms are joined by a line."""
    colour = KIND_COLOURS[kind]
    for x, seeds in enumerate(values):
        axes.scatter([x] * len(seeds), seeds, s=14, color=colour, alpha=0.6, linewidths=0)
    axes.plot(
        range(len(values)),
        [statistics.mean(seeds) for seeds in values],
        color=colour,
        label=kind,
        marker="_",
        markersize=14,
        linewidth=0 if len(values) > 4 else 1,
    )
