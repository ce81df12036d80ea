"""--check: is the machinery right for this model and these questions?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from PIL import Image

from hints import teacher_messages
from losses import scores_from_hidden
from plumbing.answers import pick_option
from plumbing.images import open_image
from rollout import encode_prompts, response_states, student_messages

if TYPE_CHECKING:
    from plumbing.data import QuestionStream
    from train import Trainer


def check(trainer: Trainer, questions: QuestionStream) -> tuple[bool, str]:
    """What goes wrong silently, looked for on the user's own model and data before a long run: -> all fine?, the table.

    Samples four questions, scores them in every way that training does, and grades gold answers against themselves.
    """
    config, accelerator, method = trainer.config, trainer.accelerator, trainer.method
    exact, rows = accelerator.mixed_precision == "no", []

    def expect(name: str, fine: bool, seen: str, advice: str) -> None:
        rows.append(
            f"{'ok  ' if fine else 'FAIL'} {name}: {seen}" + ("" if fine else f"\n     -> {advice}")
        )

    some = [questions[i] for i in range(min(200, len(questions.samples or range(200))))]
    taught = [s for s in some if teacher_messages(s, config.teacher_context) is not None][:4]
    if not taught:
        return (
            False,
            f"FAIL hints: none of the first {len(some)} questions has a {config.teacher_context}\n     -> build hints with plumbing.build_hints; without any, PTD-PO is GRPO",
        )
    groups, row = trainer.rollout(taught)
    work = [group[0] for group in groups]  # one response a question is scored: a micro-batch
    contexts, plain = (
        [teacher_messages(s, config.teacher_context) for s in taught],
        trainer._collate(work, [w.prompt for w in work]),
    )
    grey = [
        replace(s, images=[Image.new("RGB", open_image(i).size, "grey") for i in s.images])
        for s in taught
    ]
    views = {
        name: encode_prompts(trainer.processor, samples, chats)
        for name, samples, chats in (
            ("hint", taught, contexts),
            ("nothing", taught, [student_messages(s) for s in taught]),
            ("grey", grey, contexts),
        )
    }
    with torch.no_grad(), accelerator.autocast():
        states = {
            name: trainer.reference(
                run=lambda model, b=trainer._collate(work, prompts): response_states(model, b)
            )[plain.mask]
            for name, prompts in views.items()
        }
        head = trainer.reference.head
        moved = {
            name: scores_from_hidden(
                states[name],
                head,
                plain.ids[plain.mask],
                states["hint"],
                head,
                k=method.jsd_k,
                **trainer.settings,
            )[2]
            .mean()
            .item()
            for name in ("nothing", "grey")
        }
        together = trainer.student(plain, **trainer.settings)[0]
        alone = [
            trainer.student(trainer._collate([w], [w.prompt]), **trainer.settings)[0][0]
            for w in work
        ]
    trainer.student.train()
    learning = trainer._collate(work, [w.prompt for w in work], apart=config.gradient_checkpointing)
    logp, _, jsd = trainer.student(
        learning,
        tutored=torch.ones_like(plain.rows, dtype=torch.bool),
        teacher_states=states["hint"],
        teacher_head=head,
        k=method.jsd_k,
        **trainer.settings,
    )
    ratio = (logp.detach() - together).exp().sub(1).abs().max().item()
    expect(
        "the ratio is 1 on the first pass",
        ratio < (1e-4 if exact else 1e-2),
        f"largest |ratio - 1| {ratio:.1e}",
        "two passes over the same tokens differ: is there dropout in the model's config, or a kernel that is not deterministic?",
    )
    drawn = [
        max(abs(a - b) for a, b in zip(together[i].tolist(), w.rollout.logp))
        for i, w in enumerate(work)
        if w.rollout.logp
    ]
    expect(
        "the scorer agrees with the sampler",
        max(drawn, default=0) < (1e-3 if exact else 1.0),
        f"largest difference of a log-prob {max(drawn, default=0):.1e}",
        "positions or masks differ between decoding and scoring; try --generate hf, and report the model's class",
    )
    gap = max((a - b[: len(a)]).abs().max().item() for a, b in zip(alone, together))
    expect(
        "padding changes nothing",
        gap < (1e-3 if exact else 0.5),
        f"largest difference of a log-prob, padded and alone, {gap:.1e}",
        "the model reads its padding; report the model's class",
    )
    accelerator.backward(jsd.sum() / plain.mask.sum())
    norm = (
        torch.stack([p.grad.norm() for p in trainer.student.parameters() if p.grad is not None])
        .norm()
        .item()
    )
    trainer.optimizer.zero_grad()
    expect(
        "tutoring has a gradient",
        norm > 1e-8,
        f"norm {norm:.1e}",
        "the teacher's distribution is the student's own, or nothing is trainable: see the two lines below",
    )
    expect(
        f"the {config.teacher_context} changes the teacher's distribution",
        moved["nothing"] > 1e-5,
        f"mean divergence with and without it {moved['nothing']:.1e}",
        "the hint is not read: does the chat template drop it? Or it says nothing new",
    )
    pictured = any(s.images for s in taught)
    expect(
        "the image changes the teacher's distribution",
        not pictured or moved["grey"] > 1e-6,
        f"mean divergence to a grey one {moved['grey']:.1e}" if pictured else "no images here",
        "the teacher does not see the image: check the column 'images' and the processor",
    )
    marks = torch.stack(
        [
            torch.stack([p.detach().double().sum(), p.detach().double().abs().sum()])
            for p in trainer.reference.parameters()
        ]
    ).sum(0)
    everywhere = accelerator.gather(marks.unsqueeze(0))
    expect(
        "the reference is the same on every process",
        bool((everywhere == everywhere[0]).all()),
        f"{len(everywhere)} checksums",
        "the processes loaded different weights: is the model folder the same for all?",
    )
    unread = [
        s.id
        for s in some
        if not trainer.verify(f"\\boxed{{{s.answer}}}", s.answer, s.choices)
        or s.choices
        and pick_option(s.answer, s.choices) is None
    ]
    expect(
        "gold answers verify against themselves",
        not unread,
        f"{len(some) - len(unread)} of {len(some)}, {sum(bool(s.choices) for s in some)} with options"
        + (f"; first that does not: {unread[0]}" if unread else ""),
        "such an answer can never be rewarded: a gold answer that is no option, is too long, or needs --verifier math",
    )
    cut, count = row["truncated"], len(taught) * config.group_size
    expect(
        "responses end before the limit",
        cut <= 0.25,
        f"{100 * cut:.0f} % of {count} cut off at --max-new-tokens {config.max_new_tokens}",
        "raise --max-new-tokens, or --mask-truncated",
    )
    rows.append(
        f"     sampled: {100 * row['accuracy']:.0f} % right, {100 * row['all_failed']:.0f} % in groups that all failed, {row['length']:.0f} tokens long"
    )
    return not any(line.startswith("FAIL") for line in rows), "\n".join(rows)
