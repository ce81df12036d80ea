"""The arms of claims.py: PTD-PO and what it is compared with, on the embedded world. No torch.

An arm is options of train.py, or, for what nobody should train with, a patch: functions of train.py
that are replaced for the length of a run. Each arm differs from PTD-PO in what its name says.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock


class Patches(contextlib.ExitStack):
    """Replaced functions, as they were again after the `with` block. The calls are counted.

    TRAP: a function is replaced by its name. Where train.py calls it by another name, or no longer
    calls it, the arm would train plain PTD-PO and nothing would fail: hence `check`.
    """

    def __init__(self):
        super().__init__()
        self.calls = {}

    def replace(self, owner, name: str, function: Callable) -> None:
        """Put `function` in the place of the attribute `name` of a module or a class."""
        counted = self._count(f"{owner.__name__}.{name}", function)
        self.enter_context(mock.patch.object(owner, name, counted))

    def replace_item(self, table: dict, name: str, function: Callable) -> None:
        """Put `function` in the place of table[name]."""
        self.enter_context(mock.patch.dict(table, {name: self._count(name, function)}))

    def check(self, arm: str) -> None:
        """Raises RuntimeError where a replacement has never been called."""
        unused = [name for name, calls in self.calls.items() if calls == 0]
        if unused:
            raise RuntimeError(f"arm {arm!r}: replaced but never called: {', '.join(unused)}")

    def _count(self, label: str, function: Callable) -> Callable:
        self.calls[label] = 0

        def counted(*args, **settings):
            self.calls[label] += 1
            return function(*args, **settings)

        return counted


# ----------------------------------------------------------------------------------------- patches
# Each takes Patches and the module train. The KL penalty is where --kl-on puts it, unless the patch
# says otherwise.
def no_policy_loss(patches: Patches, train) -> None:
    """All advantages are 0, and so is the policy loss."""
    original = train.group_advantages

    def group_advantages(rewards, *settings):
        return 0 * original(rewards, *settings)

    patches.replace(train, "group_advantages", group_advantages)


def all_responses(patches: Patches, train) -> None:
    """The right responses of a tutored group are tutored as well."""
    original = train.route

    def route(correct, can_tutor, tau):
        failed_of_tutored_groups = original(correct, can_tutor, tau)
        return failed_of_tutored_groups.any(1, keepdim=True).expand_as(correct)

    patches.replace(train, "route", route)


def self_distillation(patches: Patches, train) -> None:
    """All responses of all questions are tutored, and there is no reward."""
    no_policy_loss(patches, train)

    def route(correct, can_tutor, tau):
        return can_tutor.unsqueeze(1).expand_as(correct)

    patches.replace(train, "route", route)


def no_kl_where_responses_failed(patches: Patches, train) -> None:
    """The KL penalty only in groups without a failed response: the control of the release.

    The release drops the penalty in the groups that it tutors, and trains no GRPO that drops it
    there too. For --lam 0, where nothing is tutored: failed responses stand for tutored ones while
    the weights are made, and no longer.
    """
    weigh = train.Trainer.weigh

    def weigh_failed_as_tutored(trainer, groups):
        responses = [response for group in groups for response in group]
        for response in responses:
            response.tutored = not response.correct
        config = trainer.config
        trainer.config = replace(config, kl_on="untutored")
        weigh(trainer, groups)
        trainer.config = config
        for response in responses:
            policy_weight, kl_weight, _ = response.weights
            response.weights, response.tutored = (policy_weight, kl_weight, 0.0), False

    patches.replace(train.Trainer, "weigh", weigh_failed_as_tutored)


def change_hint(change: Callable) -> Callable:
    """The patch that gives the teacher the hint change(question)."""

    def patch(patches: Patches, train) -> None:
        original = train.teacher_messages

        def teacher_messages(question, context="hint"):
            return original(replace(question, hint=change(question)), context)

        patches.replace(train, "teacher_messages", teacher_messages)

    return patch


def hint_without(part: str) -> Callable:
    """The patch that takes one part of the hint away: look, ignore or steps."""
    return change_hint(lambda question: replace(question.hint, **{part: ()}))


def hint_of_another_puzzle(question):
    """The hint of another puzzle of the same family."""
    from toy import world
    from toy.splits import INDICES

    seed = int(question.id.removeprefix("puzzle-"))
    family = question.family.split()[-1]  # "foggy row" is a row
    return world.hint(world.make_puzzle("train", (seed + 7919) % INDICES, family))


def blind_teacher(patches: Patches, train) -> None:
    """The teacher's chat has no image, as in the released code."""
    messages, encode = train.teacher_messages, train.encode_prompts

    def teacher_messages(question, context="hint"):
        return [without_images(turn) for turn in messages(question, context)]

    def encode_prompts(processor, questions, chats):
        shown = list(questions)
        for n, chat in enumerate(chats):
            if not any(shows_image(turn) for turn in chat):
                shown[n] = replace(questions[n], images=[])
        return encode(processor, shown, chats)

    def hinted_prompt(trainer, prompt, chat):
        # Trainer.hinted_prompt would give it the student's images
        [encoded] = train.encode_prompts(trainer.processor, [prompt.question], [chat])
        return encoded

    patches.replace(train, "teacher_messages", teacher_messages)
    patches.replace(train, "encode_prompts", encode_prompts)
    patches.replace(train.Trainer, "hinted_prompt", hinted_prompt)


def without_images(turn: dict) -> dict:
    return {**turn, "content": [part for part in turn["content"] if part["type"] != "image"]}


def shows_image(turn: dict) -> bool:
    return any(part["type"] == "image" for part in turn["content"])


def released_formula(patches: Patches, train) -> None:
    """The released code's gradient: p is detached before the logarithms, not in the mixture.

    The code here is ours, from a description of theirs.
    """
    import torch

    import losses

    def released_jsd(log_p, log_q):
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        student_terms = log_p.exp().detach() * (log_p - log_m)
        teacher_terms = log_q.exp() * (log_q - log_m)
        return 0.5 * (student_terms + teacher_terms)

    patches.replace_item(losses.DIVERGENCES, "jsd", released_jsd)


# -------------------------------------------------------------------------------------------- arms
@dataclass(frozen=True)
class Arm:
    """option_text: what follows the chosen options on train.py's command line."""

    option_text: str = ""
    patch: Callable | None = None

    @property
    def options(self) -> list[str]:
        return self.option_text.split()


# Each main arm has its own learning rate, and PTD-PO its own lambda: the best of its grid.
MAIN = {
    "GRPO": Arm("--lam 0"),
    "PTD-PO": Arm(),
    "tutoring alone": Arm(patch=no_policy_loss),
    "teacher told the answer": Arm("--teacher-context answer"),
    "self-distillation": Arm("--teacher-context solution --beta-kl 0", self_distillation),
}
# These take PTD-PO's, or GRPO's where the name begins so.
ABLATIONS = {
    "all responses": Arm(patch=all_responses),
    "released formula": Arm("--support student", released_formula),
    "blind teacher": Arm(patch=blind_teacher),
    "shuffled hint": Arm(patch=change_hint(hint_of_another_puzzle)),
    "hint without look": Arm(patch=hint_without("look")),
    "hint without ignore": Arm(patch=hint_without("ignore")),
    "hint without steps": Arm(patch=hint_without("steps")),
    "tau 0.2": Arm("--tau 0.2"),
    "K 1": Arm("--jsd-k 1"),
    "K 5": Arm("--jsd-k 5"),
    "K full": Arm("--jsd-k 1000"),
    "student's support": Arm("--support student"),
    "forward KL": Arm("--divergence forward_kl"),
    "reverse KL": Arm("--divergence reverse_kl"),
    "lambda 0.1": Arm("--lam 0.1"),
    "lambda 0.5": Arm("--lam 0.5"),
    "lambda 1": Arm("--lam 1"),
    "KL penalty off": Arm("--beta-kl 0"),
    "GRPO, KL penalty off": Arm("--lam 0 --beta-kl 0"),
    "GRPO, KL penalty off where responses failed": Arm("--lam 0", no_kl_where_responses_failed),
    # on the split "tune" this rate is as good as the chosen one
    "GRPO, three times the lr": Arm("--lam 0 --lr 3e-4"),
    # tutoring alone, with PTD-PO's learning rate and lambda
    "no policy loss": Arm(patch=no_policy_loss),
    "two updates": Arm("--updates 2"),
    "two updates, GSPO": Arm("--updates 2 --recipe gspo"),
}
ARMS = {**MAIN, **ABLATIONS}
# The arms whose teachers read different things: how often each teacher is right is measured too.
TEACHERS = (
    "PTD-PO",
    "hint without look",
    "hint without ignore",
    "hint without steps",
    "shuffled hint",
    "blind teacher",
    "teacher told the answer",
    "self-distillation",
)
RATES = ("1e-4", "3e-4", "1e-3")
GRIDS = {arm: [["--lr", rate] for rate in RATES] for arm in MAIN}
GRIDS["PTD-PO"] = [["--lr", rate, "--lam", lam] for rate in RATES for lam in ("1", "10")]


def main_arm(arm: str) -> str:
    """The arm whose learning rate and lambda this one takes."""
    if arm in MAIN:
        return arm
    return "GRPO" if arm.startswith("GRPO") else "PTD-PO"
