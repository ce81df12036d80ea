"""The figures of claims.py, from its rows. They need matplotlib."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from arms import ARMS
from claims_report import KINDS, held_out_rows, mean_of_last
from common import RESULTS, load_pyplot

STUDY = RESULTS / "study.json"  # of python train.py --study-hints --study-questions 384
COLOURS = {
    "PTD-PO": "#1f6fb4",
    "GRPO": "#c4552d",
    "tutoring alone": "#3a9a5b",
    "SFT on solutions": "#7a8794",
    "OPSD": "#8a56b0",
    "HDPO-like": "#b08a1e",
}
GROUP_COLOURS = ("#c4552d", "#b08a1e", "#3a9a5b")
# name in study.json -> label
CONTEXTS = {
    "question": "question\nalone",
    "answer": "answer",
    "hint": "hint",
    "solution": "solution,\nanswer",
}
KIND_COLOURS = {"named": "#1f6fb4", "narrowed": "#7a8794"}
# label of a panel -> label of a point -> arm
SWEEPS = {
    "K": {"1": "K 1", "5": "K 5", "20": "PTD-PO", "all": "K full"},
    "tau": {"0.2": "tau 0.2", "0.4": "tau 0.4", "1.0": "PTD-PO"},
    "lambda": {
        "0:\nGRPO": "GRPO",
        "0.1": "lambda 0.1",
        "1": "lambda 1",
        "3": "lambda 3",
        "10": "PTD-PO",
        "30": "lambda 30",
    },
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
    """claims.png: accuracy, entropy over steps. ablations.png: accuracy by K, tau, lambda, hint.
    paper-figures.png: the paper's figures 2, 3, 5 and 8."""
    plt = load_pyplot("--figures")
    held_out = held_out_rows(rows, steps)
    runs = {arm: [row for row in held_out if row["arm"] == arm] for arm in ARMS}
    figures = {
        "claims.png": draw_curves(plt, runs, steps),
        "ablations.png": draw_sweeps(plt, runs),
        "paper-figures.png": draw_paper_figures(plt, runs, steps),
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
            draw_band(axes, evaluated_after, curves, arm, COLOURS[arm])
        smooth = [running_mean(run["entropy"][:steps], 10) for run in runs[arm]]
        draw_band(entropy, range(1, steps + 1), smooth, arm, COLOURS[arm])
    named.set(title="The hint names the line", ylabel="held-out accuracy, %")
    narrowed.set(title="The hint leaves two rows open")
    entropy.set(title="Entropy of the responses", ylabel="nats a token, mean of 10 steps")
    for axes in panels:
        axes.set(xlabel="optimizer step", ylim=(0, None if axes is entropy else 100))
    entropy.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def running_mean(values: list[float], window: int) -> list[float]:
    """The mean of each value and of up to window - 1 before it."""
    return [statistics.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def draw_band(axes, x, curves: list[list[float]], label: str, colour: str) -> None:
    """The mean of the seeds' curves as a line, and their range as a band."""
    at_each_x = list(zip(*curves, strict=True))
    axes.plot(
        x,
        [statistics.mean(values) for values in at_each_x],
        color=colour,
        label=f"{label} ({len(curves)})",
        linewidth=1.8,
    )
    low = [min(values) for values in at_each_x]
    high = [max(values) for values in at_each_x]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_sweeps(plt, runs: dict[str, list[dict]]):
    """One panel per sweep: accuracy after training, each seed as a point, means as lines."""
    widths = [len(arms) for arms in SWEEPS.values()]
    figure, panels = plt.subplots(
        1, len(SWEEPS), figsize=(13, 3.2), layout="constrained", sharey=True, width_ratios=widths
    )
    for axes, (label, arms) in zip(panels, SWEEPS.items(), strict=True):
        points = {name: runs[arm] for name, arm in arms.items() if runs[arm]}
        for kind in KINDS:
            values = [[mean_of_last(run)[kind] for run in seeds] for seeds in points.values()]
            draw_points(axes, values, kind)
        axes.set_xticks(range(len(points)), list(points), fontsize=8)
        axes.set(xlabel=label, ylim=(0, 103), xlim=(-0.5, len(points) - 0.5))
    panels[0].set_ylabel("accuracy, last 3 evaluations, %")
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
        linewidth=0 if len(values) > 6 else 1,
    )


# ------------------------------------------------------------------------- the paper's own figures
def draw_paper_figures(plt, runs: dict[str, list[dict]], steps: int):
    """Figures 2, 8, 3 and 5 of the paper, from our runs and from the study of the base model."""
    figure, panels = plt.subplots(2, 3, figsize=(11, 6.6), layout="constrained")
    for axes, arm in zip(panels[0], ("GRPO", "PTD-PO"), strict=False):
        draw_groups(axes, runs[arm], steps)
        axes.set(title=f"As figure 2: groups of {arm}", xlabel="optimizer step", ylabel="%")
    panels[0][0].legend(frameon=False, fontsize=8)
    draw_divergences(panels[0][2], runs)
    contexts = json.loads(STUDY.read_text("utf-8"))["contexts"]
    shown = {name: CONTEXTS[name] for name in CONTEXTS if name in contexts}
    kl, length, solved = panels[1]
    moved = [name for name in shown if name != "question"]
    kl.bar([shown[name] for name in moved], [contexts[name]["kl"][0] for name in moved])
    kl.set(title="As figure 3: what a context moves", ylabel="KL(question alone || context), nats")
    length.bar(list(shown.values()), [contexts[name]["length"][0] for name in shown])
    length.set(title="As figure 3: length", ylabel="tokens per response")
    draw_solved(solved, shown, contexts)
    return figure


def draw_groups(axes, runs: list[dict], steps: int) -> None:
    """The shares of all-failed, informative and all-right groups over steps, seeds as a band."""
    names = {"all_failed": "all failed", "informative": "some right", "all_correct": "all right"}
    for (name, label), colour in zip(names.items(), GROUP_COLOURS, strict=True):
        curves = [[100 * v for v in running_mean(run[name][:steps], 10)] for run in runs]
        if curves:
            draw_band(axes, range(1, steps + 1), curves, label, colour)
    axes.set(ylim=(0, 100))


def draw_divergences(axes, runs: dict[str, list[dict]]) -> None:
    """Accuracy over steps with the JSD and with either KL in its place."""
    arms = {"PTD-PO": "JSD", "forward KL": "forward KL", "reverse KL": "reverse KL"}
    for (arm, label), colour in zip(arms.items(), GROUP_COLOURS, strict=True):
        if runs[arm]:
            evaluated_after = [int(step) for step in runs[arm][0]["curve"]]
            curves = [[v["all"] for v in run["curve"].values()] for run in runs[arm]]
            draw_band(axes, evaluated_after, curves, label, colour)
    axes.set(title="As figure 8: the divergence", xlabel="optimizer step", ylim=(0, 100))
    axes.set(ylabel="held-out accuracy, %")
    axes.legend(frameon=False, fontsize=8)


def draw_solved(axes, shown: dict[str, str], contexts: dict) -> None:
    """pass@1 and pass@k of the base model per context."""
    most = max(contexts["question"]["pass@k"], key=int)
    for offset, k, colour in ((-0.2, "1", "#1f6fb4"), (0.2, most, "#a9c9e6")):
        heights = [100 * contexts[name]["pass@k"][k] for name in shown]
        places = [place + offset for place in range(len(shown))]
        axes.bar(places, heights, 0.4, label=f"pass@{k}", color=colour)
    axes.set_xticks(range(len(shown)), list(shown.values()))
    axes.set(title="As figure 5: the base model", ylabel="right, %", ylim=(0, 100))
    axes.legend(frameon=False, fontsize=8)
