"""--audit-hints: do the hints leak?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hints import Hint, teacher_messages
from rollout import Question, student_messages

if TYPE_CHECKING:
    from plumbing.data import QuestionStream
    from train import Trainer


def audit(trainer: Trainer, questions: QuestionStream, evaluate) -> str:
    """How often the frozen model finds the answer from what a hint says, with the picture and without it, as a table.

    A hint set leaks where, without the picture, more questions are right with their own hint than with that of another question, alike
    where there is one, by more than two standard errors of the difference (McNemar's test).
    """
    count = min(trainer.config.eval_questions, len(questions.samples or range(10**9)))
    samples = sorted(
        (s for s in (questions[i] for i in range(count)) if s.hint), key=lambda s: s.text
    )
    if len(samples) < 2:
        return f"{len(samples)} of {count} questions have a hint: nothing to audit"
    views = [audit_views(s, other.hint) for s, other in zip(samples, samples[1:] + samples[:1])]
    right, lines = {}, [f"{'what the frozen model reads':30s}{'right':>7s}   of {len(samples)}"]
    for name in views[0]:
        right[name] = set(
            evaluate(trainer, [view[name][0] for view in views], views[0][name][1])["right"]
        )
        lines.append(f"{name:30s}{100 * len(right[name]) / len(samples):7.1f} %")
    for own, placebo in (
        ("question + hint", "question + another's hint"),
        ("hint", "another's hint"),
    ):
        more, less = right[own] - right[placebo], right[placebo] - right[own]
        leaks = len(more) - len(less) > 2 * (len(more) + len(less)) ** 0.5
        lines.append(
            f"{'LEAK' if leaks else 'no leak seen'}: without the picture, '{own}' alone is right {len(more)} times, '{placebo}' alone {len(less)} times"
            + (f"; first: {', '.join(sorted(more)[:5])}" if leaks else "")
        )
    return "\n".join(lines)


def audit_views(sample: Question, other: Hint) -> dict:
    """What a leak audit asks the frozen model about one question, as name -> (sample, its chat's maker): with the picture, then without.

    A hint that lets the answer through helps where there is no picture, more than `other`, the hint of another question, does. (Not: more
    than no hint at all. Any hint makes a model answer in form, and then it is right now and then by chance.)
    """
    blind = replace(sample, images=[], text=sample.text.replace("<image>", ""))
    alone = replace(blind, text="")
    return {
        "picture + question": (sample, student_messages),
        "picture + question + hint": (sample, teacher_messages),
        "question": (blind, student_messages),
        "question + hint": (blind, teacher_messages),
        "question + another's hint": (replace(blind, hint=other), teacher_messages),
        "hint": (alone, teacher_messages),
        "another's hint": (replace(alone, hint=other), teacher_messages),
    }
