"""The paper's statements beside the arms of claims.py, and the verdict on each. No torch.

A verdict follows one rule. "agrees": every seed of the arm that should be better lies above every
seed of the other. "does not agree": every seed lies below. Otherwise the seeds overlap, and nothing
is shown. Chance alone gives one of the two first verdicts in 1 of 126 comparisons of five seeds
with five, in 1 of 28 of five with three, and in 1 of 10 of three with three.
"""

from __future__ import annotations

from dataclasses import dataclass

from claims_report import mean_of_last, spread
from common import markdown_table


@dataclass(frozen=True)
class Statement:
    """One arm ends above another.

    where: in the paper. numbers: the paper's, of the first arm against the second. kind: of the
    puzzles that are compared.
    """

    text: str
    where: str
    numbers: str
    better: str
    worse: str
    kind: str = "all"


STATEMENTS = (
    Statement(
        "PTD-PO is better than GRPO",
        "table 1",
        "61.2, 71.2, 71.9 against 50.6, 68.1, 68.8 (2B, 4B, 8B)",
        "PTD-PO",
        "GRPO",
    ),
    Statement(
        "It is better than supervision on solutions",
        "table 1",
        "against 45.2, 59.0, 59.3",
        "PTD-PO",
        "SFT on solutions",
    ),
    Statement(
        "It is better than OPSD: the solution shown, all responses, no reward",
        "table 1",
        "against 44.1, 57.2, 60.8",
        "PTD-PO",
        "OPSD",
    ),
    Statement(
        "It is better than HDPO", "table 1", "against 57.7, 68.3, 69.9", "PTD-PO", "HDPO-like"
    ),
    Statement(
        "Reward and tutoring do more than tutoring alone",
        "Eq. 12, D.1",
        "none",
        "PTD-PO",
        "tutoring alone",
    ),
    Statement(
        "The same, where the hint leaves two rows open",
        "Eq. 12, D.1",
        "none",
        "PTD-PO",
        "tutoring alone",
        "narrowed",
    ),
    Statement(
        "tau 1 is better than tau 0.2",
        "table 2",
        "58.1, 69.1, 72.6 against 56.7, 67.1, 69.0",
        "PTD-PO",
        "tau 0.2",
    ),
    Statement(
        "tau 1 is better than tau 0.4", "table 2", "against 56.4, 67.9, 69.9", "PTD-PO", "tau 0.4"
    ),
    Statement(
        "Failed responses alone are better tutored than all",
        "table 2, Eq. 76-78",
        "against 58.0, 67.5, 71.0",
        "PTD-PO",
        "all responses",
    ),
    Statement(
        "The same, where the hint leaves two rows open",
        "table 2, Eq. 76-78",
        "none",
        "PTD-PO",
        "all responses",
        "narrowed",
    ),
    Statement(
        "A structured hint is better than a general one",
        "table 2",
        "69.1, 72.6 against 67.8, 69.5 (4B, 8B)",
        "PTD-PO",
        "unstructured hint",
    ),
    Statement(
        "The hint names where to look, and that is worth something",
        "2.3",
        "none",
        "PTD-PO",
        "hint without look",
    ),
    Statement(
        "It names what to ignore, and that is worth something",
        "2.3",
        "none",
        "PTD-PO",
        "hint without ignore",
    ),
    Statement(
        "It says how to go on, and that is worth something",
        "2.3",
        "none",
        "PTD-PO",
        "hint without steps",
    ),
    Statement(
        "A hint is a better context than the answer alone",
        "2.2, figure 3",
        "none of training",
        "PTD-PO",
        "teacher told the answer",
    ),
    Statement(
        "A hint is a better context than the solution",
        "2.2, figure 3",
        "none of training",
        "PTD-PO",
        "teacher told the solution",
    ),
    Statement("DAPO gains by tutoring", "table 4", "65.8 against 63.9 (4B)", "DAPO", "GRPO, DAPO"),
    Statement("GSPO gains by tutoring", "table 4", "70.6 against 69.3 (4B)", "GSPO", "GRPO, GSPO"),
    Statement(
        "A larger K is better: 20 than 1",
        "table 5",
        "K 50, 100, 200: 69.7, 71.3, 71.9 (4B)",
        "PTD-PO",
        "K 1",
    ),
    Statement(
        "A larger K is better: the whole vocabulary than 20",
        "table 5",
        "K 50, 100, 200: 73.8, 76.6, 76.6 (8B)",
        "K full",
        "PTD-PO",
    ),
    Statement(
        "The JSD is better than the forward KL",
        "figure 8",
        "the forward KL ends near a reward of .10; no curve of the JSD",
        "PTD-PO",
        "forward KL",
    ),
    Statement(
        "The JSD is better than the reverse KL",
        "figure 8",
        "the reverse KL ends at 0",
        "PTD-PO",
        "reverse KL",
    ),
    Statement(
        "The paper's mean of the tutoring loss is better than one mean per step",
        "Eq. 11; the second mean is ours",
        "none",
        "PTD-PO",
        "tutoring mean per step",
    ),
    Statement(
        "PTD-PO's gain is not that of a KL penalty that is off where responses failed",
        "release",
        "none",
        "PTD-PO",
        "GRPO, KL penalty off where responses failed",
    ),
    Statement(
        "The teacher must see the picture",
        "Eq. 9; in the release it does not",
        "none",
        "PTD-PO",
        "blind teacher",
    ),
    Statement(
        "The divergence must have a gradient",
        "Eq. 41, 42; in the release it has none",
        "none",
        "PTD-PO",
        "released formula",
    ),
    Statement(
        "PTD-PO's gain is not speed alone: GRPO has twice the steps",
        "ours",
        "none",
        "PTD-PO",
        "GRPO, 240 steps",
    ),
    Statement("The hint must be the question's own", "2.3", "none", "PTD-PO", "another's hint"),
    Statement(
        "An expert's hints are better than the model's own",
        "the own ones are ours",
        "none",
        "1,000 puzzles",
        "1,000 puzzles, the model's own hints",
    ),
)


def statements_table(held_out: list[dict]) -> str:
    """Markdown: one line per statement whose two arms have been measured."""
    header = ["statement", "in the paper", "the paper's numbers", "ours, %", "verdict"]
    cells = []
    for statement in STATEMENTS:
        better, worse = (
            [mean_of_last(row)[statement.kind] for row in held_out if row["arm"] == arm]
            for arm in (statement.better, statement.worse)
        )
        if better and worse:
            ours = f"{spread(better)} against {spread(worse)}"
            texts = [statement.text, statement.where, statement.numbers]
            cells.append([*texts, ours, verdict(better, worse)])
    return markdown_table(header, cells)


def verdict(better: list[float], worse: list[float]) -> str:
    """The rule at the top of this file. With one seed there is no verdict."""
    if min(len(better), len(worse)) < 2:
        return "too few seeds"
    if min(better) > max(worse):
        return "agrees"
    if max(better) < min(worse):
        return "does not agree"
    return "seeds overlap"
