"""--check: is the machinery right for this model and these questions?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from PIL import Image

from hints import teacher_messages
from losses import scores_from_hidden
from plumbing.answers import fault_of_gold
from plumbing.engine import old_log_probs
from plumbing.images import open_image
from plumbing.runs import rollout_statistics
from rollout import Prompt, Question, Response, encode_prompts, response_states

if TYPE_CHECKING:
    from plumbing.data import QuestionStream
    from train import Trainer


def check(trainer: Trainer, stream: QuestionStream) -> tuple[bool, str]:
    """What goes wrong silently, looked for on the user's own model and data before a long run.

    Samples groups of four questions, scores one response of each in every way that training does,
    and grades gold answers against themselves. Returns whether all is right, and the table.
    """
    config = trainer.config
    questions = stream.first(200)
    context = config.teacher_context
    teachable = [q for q in questions if teacher_messages(q, context) is not None][:4]
    if not teachable:
        return False, (
            f"FAIL hints: none of the first {len(questions)} questions has a {context}\n"
            "     -> build hints with plumbing.build_hints; without any, PTD-PO is GRPO"
        )
    groups = trainer.sample(trainer.read(teachable))
    trainer.grade(groups)
    trainer.assign(groups)
    responses = [group[0] for group in groups]
    table = Table(exact=trainer.accelerator.mixed_precision == "no")
    check_scores(trainer, responses, table)
    check_reference(trainer, table)
    check_gold_answers(trainer, questions, table)
    check_lengths(trainer, groups, table)
    return not table.failed, "\n".join(table.lines)


class Table:
    """The lines of the report. exact: float32, so that scores must agree closely."""

    def __init__(self, exact: bool):
        self.exact, self.failed, self.lines = exact, False, []

    def expect(self, name: str, is_right: bool, seen: str, advice: str) -> None:
        """One check: what was seen, and advice where it is not right."""
        self.lines.append(f"{'ok  ' if is_right else 'FAIL'} {name}: {seen}")
        if not is_right:
            self.failed = True
            self.lines.append(f"     -> {advice}")


def check_scores(trainer: Trainer, responses: list[Response], table: Table) -> None:
    """The responses scored in every way that training does: do the scores agree?"""
    ratio, norm = first_update(trainer, responses)
    gaps = score_gaps(trainer, responses)
    _expect_equal_scores(table, ratio, gaps)
    table.expect(
        "tutoring has a gradient",
        norm > 1e-8,
        f"norm {norm:.1e}",
        "the teacher's distribution is the student's own, or nothing is trainable: see the two "
        "lines below",
    )
    table.expect(
        f"the {trainer.config.teacher_context} changes the teacher's distribution",
        gaps["nothing"] > 1e-5,
        f"mean divergence with and without it {gaps['nothing']:.1e}",
        "the hint is not read: does the chat template drop it? Or it says nothing new",
    )
    has_images = any(response.question.images for response in responses)
    table.expect(
        "the image changes the teacher's distribution",
        not has_images or gaps["grey"] > 1e-6,
        f"mean divergence to a grey one {gaps['grey']:.1e}" if has_images else "no images here",
        "the teacher does not see the image: check the column 'images' and the processor",
    )


def first_update(trainer: Trainer, responses: list[Response]) -> tuple[float, float]:
    """The first update after a rollout: largest |ratio - 1|, and the norm of tutoring's gradient.

    All responses are tutored, whether they failed or not. No weight changes.
    """
    context, tutored = trainer.config.teacher_context, []
    for response in responses:
        chat = teacher_messages(response.question, context)
        hinted = trainer.hinted_prompt(response.prompt, chat)
        tutored.append(replace(response, tutored=True, in_loss=True, teacher_prompt=hinted))
    trainer.record_old_logp(tutored)
    ratios = []
    for part in trainer.micro_batches(tutored):
        batch, teacher = trainer.training_batch(part), trainer.teacher_arguments(part)
        logp, _, divergence = trainer.student_scores(batch, **teacher)
        trainer.accelerator.backward(divergence.sum() / batch.mask.sum())
        log_ratio = logp.detach() - old_log_probs(part, logp, batch.mask)
        ratios.append(log_ratio.exp().sub(1).abs().max().item())
    norm = trainer.clip_gradient().item()
    trainer.optimizer.zero_grad()
    return max(ratios), norm


@torch.no_grad()
def score_gaps(trainer: Trainer, responses: list[Response]) -> dict[str, float]:
    """How far the ways to score the responses are apart: means over their tokens.

    |difference| of a log-prob: sampler (between sampler and scorer), padding (in a batch and
    alone), reference (between student and reference without the hint, which start equal).
    Divergence between the teacher's view with the hint and another: nothing, grey (teacher_views).
    """
    trainer.student.eval()  # TRAP: in training mode, gradient checkpointing allows no cache
    batch, views = trainer.collate(responses), teacher_views(trainer, responses)
    together = trainer.student_scores(batch)[0][batch.mask]
    batches_of_one = [trainer.collate([response]) for response in responses]
    alone = [trainer.student_scores(one)[0][one.mask] for one in batches_of_one]
    head, ids = trainer.reference.head, batch.ids[batch.mask]
    settings = {"k": trainer.config.jsd_k, **trainer.scoring}
    with trainer.accelerator.autocast():
        plain_logp, _, nothing = scores_from_hidden(
            views["nothing"], head, ids, views["hint"], head, **settings
        )
        _, _, grey = scores_from_hidden(views["grey"], head, ids, views["hint"], head, **settings)
    gaps = {"nothing": nothing, "grey": grey, "reference": (plain_logp - together).abs()}
    gaps["padding"] = (torch.cat(alone) - together).abs()
    if responses[0].logp is not None:
        drawn = [logp for response in responses for logp in response.logp]
        gaps["sampler"] = (together - trainer.tensor(drawn)).abs()
    return {name: gap.mean().item() for name, gap in gaps.items()}


def teacher_views(trainer: Trainer, responses: list[Response]) -> dict[str, torch.Tensor]:
    """The reference's states at all response tokens, (tokens, H), by what it reads.

    "hint": the teacher's chat. "nothing": the student's. "grey": the teacher's, with grey images.
    """
    questions = [response.question for response in responses]
    grey = [replace(q, images=[grey_copy(image) for image in q.images]) for q in questions]
    images = [(response.prompt.pixels, response.prompt.grid) for response in responses]
    context = trainer.config.teacher_context
    hinted = [teacher_messages(question, context) for question in questions]

    def states(prompts: list[Prompt]) -> torch.Tensor:
        batch = trainer.collate(responses, prompts=prompts)
        return trainer.ask_reference(lambda model: response_states(model, batch))[batch.mask]

    return {
        "hint": states(encode_prompts(trainer.processor, questions, hinted, images)),
        "nothing": states([response.prompt for response in responses]),
        "grey": states(encode_prompts(trainer.processor, grey, hinted)),
    }


def grey_copy(image) -> Image.Image:
    """A grey image of the same size."""
    return Image.new("RGB", open_image(image).size, "grey")


def _expect_equal_scores(table: Table, ratio: float, gaps: dict[str, float]) -> None:
    """The lines on scores that must agree.

    In bfloat16 a logit near 27 is off by up to 0.06, which is the noise of a log-prob.
    """
    table.expect(
        "the ratio is 1 on the first pass",
        ratio < 1e-3,
        f"largest |ratio - 1| {ratio:.1e}",
        "two passes over the same tokens differ: is there dropout in the model's config, or a "
        "kernel that is not deterministic?",
    )
    gaps_and_advice = {
        "student and reference start equal": (
            gaps["reference"],
            "both have the model's weights, and neither reads the hint here; report its class",
        ),
        "the scorer agrees with the sampler": (
            gaps.get("sampler", 0.0),
            "positions or masks differ between decoding and scoring; report the model's class",
        ),
        "padding changes nothing": (
            gaps["padding"],
            "the model reads its padding; report the model's class",
        ),
    }
    for name, (gap, advice) in gaps_and_advice.items():
        is_right = gap < (1e-4 if table.exact else 0.1)
        table.expect(name, is_right, f"mean difference of a log-prob {gap:.1e}", advice)


def check_reference(trainer: Trainer, table: Table) -> None:
    """The frozen reference has the same weights on every process, by two sums of them.

    Sharded, each process holds a part of its own, and there is nothing to compare.
    """
    if trainer.sharded:
        return
    sums = torch.zeros(2, dtype=torch.float64, device=trainer.accelerator.device)
    for parameter in trainer.reference.parameters():
        values = parameter.detach().double()
        sums += torch.stack([values.sum(), values.abs().sum()])
    of_processes = trainer.accelerator.gather(sums.unsqueeze(0))
    table.expect(
        "the reference is the same on every process",
        bool((of_processes == of_processes[0]).all()),
        f"{len(of_processes)} checksums",
        "the processes loaded different weights: is the model folder the same for all?",
    )


def check_gold_answers(trainer: Trainer, questions: list[Question], table: Table) -> None:
    """Each gold answer, in a box, is right; with options it is one of them."""
    unreadable = [
        question.id
        for question in questions
        if fault_of_gold(question.answer, question.choices, trainer.same_answer)
    ]
    with_options = sum(bool(question.choices) for question in questions)
    seen = f"{len(questions) - len(unreadable)} of {len(questions)}, {with_options} with options"
    if unreadable:
        seen += f"; first that does not: {unreadable[0]}"
    table.expect(
        "gold answers verify against themselves",
        not unreadable,
        seen,
        "such an answer can never be rewarded: a gold answer that is no option, is too long, or "
        "needs --verifier math",
    )


def check_lengths(trainer: Trainer, groups: list[list[Response]], table: Table) -> None:
    """Most responses end before the limit; and what was sampled, in one line."""
    config, row = trainer.config, rollout_statistics(groups, trainer.config)
    count = len(groups) * config.group_size
    table.expect(
        "responses end before the limit",
        row["truncated"] <= 0.25,
        f"{100 * row['truncated']:.0f} % of {count} cut off at --max-new-tokens "
        f"{config.max_new_tokens}",
        "raise --max-new-tokens, or --mask-truncated; if all are cut off, does the model's "
        "generation_config.json name the token that ends a turn?",
    )
    table.lines.append(
        f"     sampled: {100 * row['accuracy']:.0f} % right, {100 * row['all_failed']:.0f} % in "
        f"groups that all failed, {row['length']:.0f} tokens long"
    )
