"""--audit-hints: do the hints leak the answer?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hints import Hint, teacher_messages
from rollout import Question, student_messages

if TYPE_CHECKING:
    from plumbing.data import QuestionStream
    from train import Trainer

# a view without the picture, and its placebo: the same with another question's hint
PLACEBOS = {"question + hint": "question + another's hint", "hint": "another's hint"}


def audit(trainer: Trainer, stream: QuestionStream) -> str:
    """How often the frozen model is right from what a hint says, with and without the picture.

    A set of hints leaks where, without the picture, more questions are right with their own hint
    than with another question's, by more than two standard errors of the difference (McNemar's
    test). The other question is alike where there is one. Returns the table.
    """
    questions = stream.first(trainer.config.eval_questions)
    hinted = sorted((q for q in questions if q.hint), key=lambda question: question.text)
    if len(hinted) < 2:
        return f"{len(hinted)} of {len(questions)} questions have a hint: nothing to audit"
    neighbours = hinted[1:] + hinted[:1]
    views = [audit_views(q, other.hint) for q, other in zip(hinted, neighbours, strict=True)]
    lines = [f"{'what the frozen model reads':30s}{'right':>7s}   of {len(hinted)}"]
    right = {}
    for name, (_, messages) in views[0].items():
        evaluation = trainer.evaluate([view[name][0] for view in views], messages)
        right[name] = set(evaluation["right"])
        lines.append(f"{name:30s}{100 * len(right[name]) / len(hinted):7.1f} %")
    lines += [leak_line(own, placebo, right) for own, placebo in PLACEBOS.items()]
    return "\n".join(lines)


def leak_line(own: str, placebo: str, right: dict[str, set[str]]) -> str:
    """McNemar's test on the ids that are right in one of two views alone."""
    only_own, only_placebo = right[own] - right[placebo], right[placebo] - right[own]
    discordant = len(only_own) + len(only_placebo)
    leaks = len(only_own) - len(only_placebo) > 2 * discordant**0.5
    line = (
        f"{'LEAK' if leaks else 'no leak seen'}: without the picture, '{own}' alone is right "
        f"{len(only_own)} times, '{placebo}' alone {len(only_placebo)} times"
    )
    if leaks:
        line += f"; first: {', '.join(sorted(only_own)[:5])}"
    return line


def audit_views(question: Question, other: Hint) -> dict:
    """What the audit asks about one question: name -> (question, the function that makes its chat).

    A hint that lets the answer through helps where there is no picture, more than `other`, the hint
    of another question, does. No hint at all would be the wrong baseline: any hint makes a model
    answer in form, and then it is right now and then by chance.
    """
    blind = replace(question, images=[], text=question.text.replace("<image>", ""))
    alone = replace(blind, text="")
    return {
        "picture + question": (question, student_messages),
        "picture + question + hint": (question, teacher_messages),
        "question": (blind, student_messages),
        "question + hint": (blind, teacher_messages),
        "question + another's hint": (replace(blind, hint=other), teacher_messages),
        "hint": (alone, teacher_messages),
        "another's hint": (replace(alone, hint=other), teacher_messages),
    }
