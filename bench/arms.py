"""The arms of claims.py: PTD-PO and what it is compared with, on the embedded world. No torch.

An arm is options of train.py, or, for what nobody should train with, a patch: functions of train.py
that are replaced for the length of a run. Each arm differs from PTD-PO in what its name says.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

from common import RESULTS, load_rows

OWN_HINTS = RESULTS / "own_hints.jsonl"


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


def hint_without(*parts: str) -> Callable:
    """The patch that takes parts of the hint away: look, ignore or steps."""
    return change_hint(lambda question: replace(question.hint, **dict.fromkeys(parts, ())))


def hint_of_another_puzzle(question):
    """The hint of another puzzle of the same family, the next one that names other lines."""
    from toy import world
    from toy.splits import INDICES

    seed = int(question.id.removeprefix("puzzle-"))
    for index in itertools.count(seed + 7919):
        hint = world.hint(world.make_puzzle("train", index % INDICES, question.family))
        if hint.look != question.hint.look:
            return hint


FIXED_PUZZLES = 1000  # the first ones of the split "train"


def fixed_puzzles(hint_of: Callable) -> Callable:
    """The patch that trains on FIXED_PUZZLES, again and again, with hint_of(question) or None."""

    def patch(patches: Patches, train) -> None:
        from toy import world

        def puzzle(stream, i):
            [question] = world.puzzles("train", 1, i % FIXED_PUZZLES)
            return replace(question, hint=hint_of(question))

        patches.replace(world.PuzzleStream, "__getitem__", puzzle)

    return patch


def own_hint(question):
    """The base model's own hint, from where it looked when it was right; None where it has none."""
    from hints import Hint

    hint = own_hints()[question.id]
    return Hint(**hint) if hint else None


@functools.cache
def own_hints() -> dict[str, dict | None]:
    """The stored hints by question."""
    if not OWN_HINTS.exists():
        raise FileNotFoundError(f"{OWN_HINTS}: run python bench/attention.py --write-hints")
    return {row["id"]: row["hint"] for row in load_rows(OWN_HINTS)}


def blind_teacher(patches: Patches, train) -> None:
    """The teacher's chat has no image, as in the released code."""
    messages, encode = train.teacher_messages, train.encode_prompts

    def teacher_messages(question, context="hint"):
        return [without_images(turn) for turn in messages(question, context)]

    def encode_prompts(processor, questions, chats, images=None):
        shown = list(questions)
        for n, chat in enumerate(chats):
            if not any(shows_image(turn) for turn in chat):
                shown[n], images = replace(questions[n], images=[]), None
        return encode(processor, shown, chats, images)

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


def supervised(patches: Patches, train) -> None:
    """Cross-entropy on the solution: it takes the place of the responses, and of the loss."""

    def sample(trainer, prompts, keys=None):
        return [[solved(trainer, prompt)] * trainer.config.group_size for prompt in prompts]

    def solution_loss(config, logp, old_logp, advantages, mask, weights, *_):
        loss = -(logp * mask * weights.policy.unsqueeze(1)).sum()
        zero = loss.detach() * 0
        return loss, {"policy_loss": loss.detach(), "kl": zero, "tutor_loss": zero}

    patches.replace(train.Trainer, "sample", sample)
    patches.replace(train, "ptdpo_loss", solution_loss)


def solved(trainer, prompt):
    """The question's solution as a response."""
    from rollout import Response

    tokenizer, text = trainer.processor.tokenizer, prompt.question.solution
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Response(prompt, ids, text, truncated=False)


def distil_right_responses(patches: Patches, train) -> None:
    """As HDPO (arXiv 2603.23871): what is right with the answer shown is distilled.

    Where a whole group failed, the student answers again and reads the answer. What is right takes
    the place of failed responses and is tutored by the reference, which reads the answer, too. It
    has no advantage. Nothing else is tutored.
    """
    assign, masks = train.Trainer.assign, []

    def assign_distilled(trainer, groups):
        import torch

        failed = [n for n, group in enumerate(groups) if not any(r.correct for r in group)]
        mask = torch.zeros(len(groups), trainer.config.group_size, dtype=torch.bool)
        questions = [groups[n][0].question for n in failed]
        prompts = trainer.read(questions, lambda q: train.teacher_messages(q, "answer"))
        # TRAP: the log's sampling times are those of the last call, which needs a prompt
        drawn_again = trainer.respond(prompts, mask.shape[1]) if prompts else []
        for n, drawn in zip(failed, drawn_again, strict=True):
            right = [r for r in drawn if train.verify(r.text, r.question, trainer.same_answer)]
            for g, response in enumerate(right):
                # drawn with the answer shown, so its log-probs make the logged sampler_gap large
                taken = groups[n][g]
                # TRAP: with a reward of 0 beside format rewards of 0.1 it would be unlearnt
                groups[n][g] = replace(response, prompt=taken.prompt, reward=taken.reward)
                mask[n, g] = True
        masks[:] = [mask]
        assign(trainer, groups)
        for n, g in mask.nonzero().tolist():
            groups[n][g].advantage = 0.0

    def route(correct, can_tutor, tau):
        return masks[0] & can_tutor.unsqueeze(1)

    patches.replace(train.Trainer, "assign", assign_distilled)
    patches.replace(train, "route", route)


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


# Each main arm has its own learning rate, and the two that have reward and tutoring their own
# lambda: the best of its grid.
MAIN = {
    "GRPO": Arm("--lam 0"),
    "PTD-PO": Arm(),
    "tutoring alone": Arm(patch=no_policy_loss),
    "SFT on solutions": Arm("--lam 0 --beta-kl 0", supervised),
    "OPSD": Arm("--teacher-context solution --beta-kl 0 --jsd-k 1000", self_distillation),
    "HDPO-like": Arm("--teacher-context answer", distil_right_responses),
}
# These take PTD-PO's, or GRPO's where the name begins so. Two that one might miss are main arms,
# as the grids chose one rate for all three: lambda 0 is GRPO, no policy loss is tutoring alone.
ABLATIONS = {
    "tutoring mean per step": Arm("--tutor-mean step"),
    "all responses": Arm(patch=all_responses),
    "tau 0.2": Arm("--tau 0.2"),
    "tau 0.4": Arm("--tau 0.4"),
    "teacher told the answer": Arm("--teacher-context answer"),
    "teacher told the solution": Arm("--teacher-context solution"),
    "unstructured hint": Arm(patch=hint_without("look", "ignore")),
    "hint without look": Arm(patch=hint_without("look")),
    "hint without ignore": Arm(patch=hint_without("ignore")),
    "hint without steps": Arm(patch=hint_without("steps")),
    "another's hint": Arm(patch=change_hint(hint_of_another_puzzle)),
    "blind teacher": Arm(patch=blind_teacher),
    "1,000 puzzles": Arm(patch=fixed_puzzles(lambda question: question.hint)),
    "1,000 puzzles, the model's own hints": Arm(patch=fixed_puzzles(own_hint)),
    "released formula": Arm("--support student", released_formula),
    "K 1": Arm("--jsd-k 1"),
    "K 5": Arm("--jsd-k 5"),
    "K full": Arm("--jsd-k 1000"),
    "student's support": Arm("--support student"),
    "forward KL": Arm("--divergence forward_kl"),
    "reverse KL": Arm("--divergence reverse_kl"),
    "lambda 0.1": Arm("--lam 0.1"),
    "lambda 1": Arm("--lam 1"),
    "lambda 3": Arm("--lam 3"),
    "lambda 30": Arm("--lam 30"),
    "three updates": Arm("--updates 3"),
    "DAPO": Arm("--recipe dapo"),
    "GSPO": Arm("--recipe gspo"),
    "GRPO, KL penalty off where responses failed": Arm("--lam 0", no_kl_where_responses_failed),
    "GRPO, 240 steps": Arm("--lam 0 --steps 240"),
    "GRPO, rate 1e-4": Arm("--lam 0 --lr 1e-4"),
    "GRPO, DAPO": Arm("--recipe dapo --lam 0"),
    "GRPO, GSPO": Arm("--recipe gspo --lam 0"),
}
ARMS = {**MAIN, **ABLATIONS}
# The arms whose teachers read different things: how often each teacher is right is measured too.
TEACHERS = (
    "PTD-PO",
    "unstructured hint",
    "hint without look",
    "hint without ignore",
    "hint without steps",
    "another's hint",
    "blind teacher",
    "teacher told the answer",
    "teacher told the solution",
)
RATES = ("1e-4", "3e-4", "7e-4")
GRIDS = {arm: [["--lr", rate] for rate in RATES] for arm in MAIN}
GRIDS["PTD-PO"] = [
    ["--lr", rate, "--lam", lam]
    for rate, lam in (("3e-4", "3"), ("3e-4", "10"), ("3e-4", "30"), ("7e-4", "10"))
]
GRIDS["HDPO-like"] += [["--lr", "3e-4", "--lam", lam] for lam in ("0.1", "1")]  # 10 is PTD-PO's


def main_arm(arm: str) -> str:
    """The arm whose learning rate and lambda this one takes."""
    if arm in MAIN:
        return arm
    return "GRPO" if arm.startswith("GRPO") else "PTD-PO"
