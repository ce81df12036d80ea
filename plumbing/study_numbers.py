"""Numbers, verdicts and table of --study-hints, from the rows of plumbing.study alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train import TrainConfig

Row = dict  # one question: see plumbing.study.study_questions
# a view without the picture, and its placebo: the same with another question's hint
PLACEBOS = {"question + hint": "question + another's hint", "hint": "another's hint"}
# the contexts of plumbing.study.contexts, in the order of the table
TITLES = {
    "question": "question alone",
    "hint": "+ hint",
    "general hint": "+ its steps alone",
    "another's hint": "+ another's hint",
    "answer": "+ answer",
    "solution": "+ solution and answer",
}
OUTCOMES = ("unsolved", "partly", "mostly", "always")
# Nats per token. In the paper's figure 3 the answer alone gives 0.011, a hint 0.052. The limit
# between them is ours, as are those below.
HARDLY_MOVES = 0.02
# Of the length without a context. In the paper's figure 3 the solution gives 0.41 and a hint 0.86.
SKIPS_REASONING = 0.6
SOLVES_NEARLY_ALL = 0.9  # of the samples
RARE = 0.01  # of the groups


# ------------------------------------------------------------------------------------- estimators
def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k responses is right: 1 - C(n - c, k) / C(n, k), for k <= n.

    The unbiased estimator from n samples of which c are right (Chen et al. 2021,
    arXiv 2107.03374).
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def mean_and_error(values: list[float]) -> tuple[float, float] | None:
    """The mean over questions and its standard error; None of fewer than two values."""
    if len(values) < 2:
        return None
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def group_shares(rows: list[Row], group_size: int) -> dict[str, float]:
    """Shares of groups of this size that all fail, are informative, or all pass (Eq. 5, figure 2).

    Each is the expected share among all groups that can be drawn from a question's samples. Of the
    groups that all fail, GRPO learns nothing; tutored: those whose question has a hint.
    """
    failed, passed, tutored = [], [], []
    for row in rows:
        correct = row["contexts"]["question"]["correct"]
        failed.append(1 - pass_at_k(len(correct), sum(correct), group_size))
        passed.append(1 - pass_at_k(len(correct), correct.count(False), group_size))
        tutored.append(failed[-1] if row["hint"] else 0.0)
    all_failed, all_correct = statistics.mean(failed), statistics.mean(passed)
    return {
        "all_failed": all_failed,
        "informative": 1 - all_failed - all_correct,
        "all_correct": all_correct,
        "only_tutoring": statistics.mean(tutored),
    }


def outcome(correct: list[bool]) -> str:
    """unsolved: never right; partly: up to half of the samples; mostly; always."""
    share = sum(correct) / len(correct)
    if share == 0:
        return "unsolved"
    if share <= 0.5:
        return "partly"
    return "mostly" if share < 1 else "always"


# ---------------------------------------------------------------------------------------- contexts
def accuracy(numbers: dict) -> float:
    """The share of right responses to one question under one context."""
    return statistics.mean(numbers["correct"])


def mean_length(numbers: dict) -> float:
    """Tokens per response to one question under one context."""
    return statistics.mean(numbers["lengths"])


def rows_with(rows: list[Row], *names: str) -> list[Row]:
    """The questions that have all these contexts."""
    return [row for row in rows if all(name in row["contexts"] for name in names)]


def difference(rows: list[Row], a: str, b: str, value: Callable) -> tuple[float, float] | None:
    """value under context a minus value under b, paired by question: mean and standard error."""
    both = [row["contexts"] for row in rows_with(rows, a, b)]
    return mean_and_error([value(contexts[a]) - value(contexts[b]) for contexts in both])


def never_solved(rows: list[Row]) -> list[Row]:
    """The questions that the question-only model never solves."""
    return [row for row in rows if not any(row["contexts"]["question"]["correct"])]


def context_summary(rows: list[Row], name: str) -> dict:
    """All numbers of one context, over the questions that have it."""
    rows = rows_with(rows, name)
    of_context = [row["contexts"][name] for row in rows]
    samples = len(of_context[0]["correct"])
    ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
    rises = [row["contexts"][name]["nll"] - row["contexts"]["question"]["nll"] for row in rows]
    unsolved = [outcome(row["contexts"][name]["correct"]) for row in never_solved(rows)]
    return {
        "questions": len(rows),
        "pass@1": mean_and_error([accuracy(numbers) for numbers in of_context]),
        "pass@k": {
            k: statistics.mean(pass_at_k(samples, sum(n["correct"]), k) for n in of_context)
            for k in ks
        },
        "length": mean_and_error([mean_length(numbers) for numbers in of_context]),
        "truncated": sum(n["truncated"] for n in of_context) / (samples * len(rows)),
        "nll_rise": mean_and_error(rises),
        "kl": mean_and_error([numbers["kl"] for numbers in of_context]),
        "of_unsolved": {kind: unsolved.count(kind) for kind in OUTCOMES},
    }


def view_summary(rows: list[Row]) -> dict[str, list[int]]:
    """The audit's table: view -> [right, questions]."""
    seen = [row["views"] for row in rows if row["views"]]
    if not seen:
        return {}
    return {name: [sum(views[name] for views in seen), len(seen)] for name in seen[0]}


def extremes(rows: list[Row], count: int = 10) -> dict[str, list[str]]:
    """Ids of the questions whose accuracy the hint lowers or raises most, worst and best first.

    Only questions whose accuracy it lowers are worst, or leaves at 0; only those that it raises are
    best.
    """
    gains = {}
    for row in rows_with(rows, "hint"):
        alone, hinted = (accuracy(row["contexts"][name]) for name in ("question", "hint"))
        gains[row["id"]] = hinted - alone, hinted
    ranked = sorted(gains, key=gains.get)
    is_bad = {
        name: gain < 0 or (gain == 0 and hinted == 0) for name, (gain, hinted) in gains.items()
    }
    best = [name for name in reversed(ranked) if gains[name][0] > 0]
    return {"worst": [name for name in ranked if is_bad[name]][:count], "best": best[:count]}


def summary(rows: list[Row], config: TrainConfig) -> dict:
    """What study.json says beside the settings: see the functions that make the parts."""
    names = [name for name in TITLES if rows_with(rows, name)]
    group_size = min(config.group_size, config.study_samples)
    return {
        "questions": len(rows),
        "hinted": len(rows_with(rows, "hint")),
        "samples": config.study_samples,
        "group_size": group_size,
        "groups": group_shares(rows, group_size),
        "contexts": {name: context_summary(rows, name) for name in names},
        "in_words": {name: in_words(rows, name) for name in names if name != "question"},
        "views": view_summary(rows),
        "verdicts": verdicts(rows, group_size),
        "never_solved": [row["id"] for row in never_solved(rows)],
        **extremes(rows),
    }


# ---------------------------------------------------------------------------------------- verdicts
def percent(share: float) -> str:
    """A share as text: 0.125 is "12.5 %"."""
    return f"{100 * share:.1f} %"


def is_above(paired: tuple[float, float] | None) -> bool:
    """Is a mean above 0 by more than two standard errors?"""
    return paired is not None and paired[0] > 2 * paired[1]


def length_ratio(rows: list[Row], name: str) -> float:
    """Mean length under a context, as a share of that without one, on the same questions."""
    both = [row["contexts"] for row in rows_with(rows, name)]
    lengths = [sum(mean_length(contexts[n]) for contexts in both) for n in (name, "question")]
    return lengths[0] / lengths[1]


def mean_kl(rows: list[Row], name: str) -> float:
    """KL(question alone || context) in nats per token, the mean over questions."""
    return statistics.mean(row["contexts"][name]["kl"] for row in rows_with(rows, name))


def in_words(rows: list[Row], name: str) -> str:
    """What a context does to the teacher: how far it moves it, and does it skip the reasoning?"""
    kl, ratio = mean_kl(rows, name), length_ratio(rows, name)
    moves = "hardly moves the teacher" if kl < HARDLY_MOVES else "moves the teacher"
    skips = "makes it skip the reasoning" if ratio < SKIPS_REASONING else "leaves the reasoning"
    return f"{moves} (KL {kl:.3f}) and {skips} (responses {ratio:.2f} times as long)"


def verdicts(rows: list[Row], group_size: int) -> list[dict]:
    """What the study says of the hints: name, holds (bool), and the reason with its counts.

    Of the first three one hopes that they do not hold; of "help" that it does.
    """
    if not rows_with(rows, "hint"):
        return [no_need(rows, group_size)]
    leaks = [leak(rows, own, placebo) for own, placebo in PLACEBOS.items()]
    return [
        *[verdict for verdict in leaks if verdict],
        moves_nothing(rows),
        acts_like_solutions(rows),
        helps(rows),
        no_need(rows, group_size),
    ]


def verdict(name: str, holds: bool, reason: str) -> dict:
    """One entry of `verdicts`."""
    return {"name": name, "holds": holds, "reason": reason}


def leak(rows: list[Row], own: str, placebo: str) -> dict | None:
    """Without the picture, is the own hint right more often than another question's?

    McNemar's test on the questions that are right in one of the two views alone: the difference is
    more than two standard errors.
    """
    seen = {row["id"]: row["views"] for row in rows if row["views"]}
    if not seen:
        return None
    only_own = [name for name, view in seen.items() if view[own] and not view[placebo]]
    only_placebo = [name for name, view in seen.items() if view[placebo] and not view[own]]
    discordant = len(only_own) + len(only_placebo)
    leaks = len(only_own) - len(only_placebo) > 2 * discordant**0.5
    reason = (
        f"without the picture, '{own}' alone is right {len(only_own)} times, '{placebo}' alone "
        f"{len(only_placebo)} times, of {len(seen)}"
    )
    if leaks:
        reason += f"; first: {', '.join(sorted(only_own)[:5])}"
    return verdict("hints leak", leaks, reason)


def moves_nothing(rows: list[Row]) -> dict:
    """The hint does not raise the accuracy, by more than two standard errors."""
    gain = difference(rows, "hint", "question", accuracy)
    kl, count = mean_kl(rows, "hint"), len(rows_with(rows, "hint"))
    if gain is None:
        return verdict("hints move nothing", False, "one hinted question alone: not judged")
    reason = (
        f"with the hint the accuracy changes by {100 * gain[0]:+.1f} points (standard error "
        f"{100 * gain[1]:.1f}, {count} questions)"
    )
    if not is_above(gain):
        if kl < HARDLY_MOVES:
            reason += f": the teacher hardly changes (KL {kl:.4f})"
        else:
            reason += f": the teacher changes (KL {kl:.3f}), but not toward right answers"
    return verdict("hints move nothing", not is_above(gain), reason)


def acts_like_solutions(rows: list[Row]) -> dict:
    """With the hint the teacher skips the reasoning, as it does with a worked solution.

    By length: below SKIPS_REASONING; or, where the solution itself shortens it that far, nearer to
    the solution's length than to the one without a context. By saturation: at least as often right
    as with the solution where that solves nearly all, in responses that are shorter by more than
    two standard errors.
    """
    ratio = length_ratio(rows, "hint")
    reason = f"with the hint responses are {ratio:.2f} times as long"
    limit = SKIPS_REASONING
    with_both = rows_with(rows, "hint", "solution")
    saturated = False
    if with_both:
        of_solution = length_ratio(with_both, "solution")
        reason += f", with the solution {of_solution:.2f} times"
        if of_solution < SKIPS_REASONING:
            limit = max(limit, math.sqrt(of_solution))
        shorter = difference(with_both, "question", "hint", mean_length)
        worse = difference(with_both, "solution", "hint", accuracy)
        right = statistics.mean(accuracy(row["contexts"]["solution"]) for row in with_both)
        saturated = right >= SOLVES_NEARLY_ALL and is_above(shorter) and not is_above(worse)
    if saturated:
        reason += f"; the hint is right as often as the solution ({percent(right)})"
    return verdict("hints act like solutions", ratio < limit or saturated, reason)


def helps(rows: list[Row]) -> dict:
    """Of the questions that the question-only model never solves, does the hint solve some?

    Some are solved by chance in any second sample; another question's hint shows how many.
    """
    unsolved = never_solved(rows_with(rows, "hint"))
    solved = [row for row in unsolved if any(row["contexts"]["hint"]["correct"])]
    reason = f"{len(solved)} of {len(unsolved)} unsolved questions become solvable"
    with_placebo = rows_with(unsolved, "another's hint")
    by_chance = [row for row in with_placebo if any(row["contexts"]["another's hint"]["correct"])]
    if with_placebo:
        reason += f"; with another question's hint {len(by_chance)}"
    gain = difference(unsolved, "hint", "another's hint", accuracy)
    holds = is_above(gain) if with_placebo else bool(solved)
    return verdict("hints help", holds, reason)


def no_need(rows: list[Row], group_size: int) -> dict:
    """Groups that all fail are so rare that GRPO learns from nearly every question."""
    failed = group_shares(rows, group_size)["all_failed"]
    reason = (
        f"{len(never_solved(rows))} of {len(rows)} questions are never solved without a hint; "
        f"{percent(failed)} of groups of {group_size} fail as a whole"
    )
    return verdict("hints are needless", failed < RARE, reason)


# ------------------------------------------------------------------------------------- the table
def with_error(pair: tuple[float, float] | None, scale: float = 1, digits: int = 1) -> str:
    """A mean and its standard error as text; "-" where there is none."""
    if pair is None:
        return "-"
    return f"{scale * pair[0]:.{digits}f} +- {scale * pair[1]:.{digits}f}"


def study_table(numbers: dict) -> str:
    """The study on a terminal: contexts, groups, the audit, verdicts, and ids."""
    groups, samples = numbers["groups"], numbers["samples"]
    titles = ("pass@1, %", f"pass@{samples}, %", "length", "NLL rise", "KL")
    lines = [
        f"{numbers['hinted']} of {numbers['questions']} questions have a hint; {samples} responses "
        "per question and context; mean over questions +- standard error",
        "",
        f"{'the model reads':24s}" + "".join(f"{title:>18s}" for title in titles),
    ]
    for name, context in numbers["contexts"].items():
        cells = [
            with_error(context["pass@1"], 100),
            f"{100 * context['pass@k'][samples]:.1f}",
            with_error(context["length"]),
            with_error(context["nll_rise"], digits=3),
            with_error(context["kl"], digits=3),
        ]
        lines.append(f"{TITLES[name]:24s}" + "".join(f"{cell:>18s}" for cell in cells))
    lines += [
        "",
        f"of {len(numbers['never_solved'])} questions that the question alone never solves",
    ]
    lines.append(f"{'':24s}" + "".join(f"{kind:>18s}" for kind in OUTCOMES))
    for name, context in numbers["contexts"].items():
        cells = [f"{context['of_unsolved'][kind]}" for kind in OUTCOMES]
        lines.append(f"{TITLES[name]:24s}" + "".join(f"{cell:>18s}" for cell in cells))
    lines += ["", f"groups of {numbers['group_size']} responses to the question alone:"]
    for name in ("all_failed", "informative", "all_correct"):
        lines.append(f"{name.replace('_', ' '):24s}{100 * groups[name]:18.1f} %")
    if numbers["views"]:
        lines += ["", f"{'what shows a leak':30s}{'right':>12s}"]
        for name, (right, count) in numbers["views"].items():
            lines.append(f"{name:30s}{100 * right / count:12.1f} %  of {count}")
    lines.append("")
    for name, words in numbers["in_words"].items():
        lines.append(f"{TITLES[name]}: {words}")
    lines.append("")
    for entry in numbers["verdicts"]:
        lines.append(f"{entry['name']}: {'YES' if entry['holds'] else 'no'}; {entry['reason']}")
    for kind in ("worst", "best"):
        lines.append(f"{kind}: {', '.join(numbers[kind]) or 'none'}")
    return "\n".join(lines)
