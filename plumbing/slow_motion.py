"""One step in slow motion: all numbers of one optimizer step on one question, as docs/one-step.md.

    python -m plumbing.slow_motion

The step is made by the phases of train.Trainer, with the embedded model and its settings. This file
makes the step and measures it; slow_motion_page.py writes it down.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from losses import topk_jsd
from plumbing.images import load_processor, quiet_loading
from plumbing.models import build
from plumbing.runs import write_beside
from plumbing.slow_motion_page import page_text
from rollout import Prompt, Response, response_states
from toy import settings, world
from train import TrainConfig, Trainer

PARTS = ("policy", "kl", "tutor")  # in the order of ptdpo.ResponseWeights
SCALE = 3  # of the picture


# ------------------------------------------------------------------------------------- the step
@dataclass
class Measured:
    """What one state of the student gives.

    loss, parts (policy, kl, tutor; without their factors): of the group. student: log-probs (T, V)
    of each tutored response, float64, by its number in the group. divergence: D (T,), likewise.
    """

    loss: float
    parts: dict[str, float]
    student: dict[int, Tensor]
    divergence: dict[int, Tensor]


@dataclass
class Step:
    """One optimizer step on one question.

    puzzle: its index in the split "tune". group: its responses. teacher: log-probs (T, V) of each
    tutored response, float64, by its number in the group. gradients: of each part of the loss with
    its factor, all weights in one row. update: what Trainer.step returns.
    """

    trainer: Trainer
    puzzle: int
    group: list[Response]
    teacher: dict[int, Tensor]
    before: Measured
    gradients: dict[str, Tensor]
    update: dict[str, float]
    after: Measured

    @property
    def shown(self) -> int:
        """The number of the failed response that holds the token with the largest divergence."""
        divergence = self.before.divergence
        return max(divergence, key=lambda number: divergence[number].max().item())

    @property
    def texts(self) -> list[str]:
        """The text of each token of the response that is shown."""
        decode = self.trainer.processor.tokenizer.decode
        return [decode([i]).strip() for i in self.group[self.shown].ids]

    @property
    def places(self) -> list[int]:
        """Three of its tokens: the largest divergence, the median, the number in the box."""
        order = self.before.divergence[self.shown].argsort().tolist()
        numbers = [place for place, text in enumerate(self.texts) if text.isdigit()]
        return [order[-1], order[(len(order) - 1) // 2], numbers[-1]]

    @property
    def routed(self) -> int:
        """The number of routed tokens, |F| of Eq. 8 and 11."""
        return sum(len(response.ids) for response in self.group if response.tutored)


def make_trainer() -> Trainer:
    """The embedded model and its settings, but one question per step and no warm-up."""
    config = TrainConfig(**{**settings.SETTINGS, "questions": 1, "warmup": 0})
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    student, reference = build(config, accelerator)
    return Trainer(config, accelerator, load_processor(config.model), student, reference)


def choose_group(trainer: Trainer) -> tuple[int, list[Response]]:
    """The first puzzle of "tune" on a star row with one or two right responses; these, graded."""
    for puzzle in itertools.count():
        question = world.to_question(world.make_puzzle("tune", puzzle))
        if question.family != "row":
            continue
        [group] = trainer.sample(trainer.read([question]), [f"{trainer.config.seed}-{puzzle}"])
        trainer.grade([group])
        if sum(response.correct for response in group) in (1, 2):
            return puzzle, group


@torch.no_grad()
def log_probs(trainer: Trainer, model, prompt: Prompt, response: Response) -> Tensor:
    """What a model expects at each token of a response, given a prompt: (T, V) float64.

    At temperature 1, which is the embedded model's, and without the tokens that are never sampled.
    """
    batch = trainer.collate([response], prompts=[prompt])
    logits = model.get_output_embeddings()(response_states(model, batch)[0])
    return logits.index_fill(-1, trainer.scoring["banned"], -math.inf).double().log_softmax(-1)


def measure(trainer: Trainer, group: list[Response], teacher: dict[int, Tensor]) -> Measured:
    """The loss of the group, and p and D of its tutored responses, with the student as it is."""
    loss, parts = trainer.loss(group)
    student = {n: log_probs(trainer, trainer.policy, group[n].prompt, group[n]) for n in teacher}
    return Measured(
        loss=loss.item(),
        parts={
            "policy": parts["policy_loss"].item(),
            "kl": parts["kl"].item(),
            "tutor": parts["tutor_loss"].item(),
        },
        student=student,
        divergence={n: topk_jsd(student[n], teacher[n], trainer.config.jsd_k) for n in teacher},
    )


def gradient(trainer: Trainer, group: list[Response], part: str) -> Tensor:
    """The gradient of one part of the loss, with its factor; all weights in one row.

    The other two parts are switched off: what a response counts in them is set to 0.
    """

    def alone(weights: tuple[float, ...]) -> tuple[float, ...]:
        pairs = zip(PARTS, weights, strict=True)
        return tuple(weight if name == part else 0.0 for name, weight in pairs)

    loss, _ = trainer.loss([replace(r, weights=alone(r.weights)) for r in group])
    loss.backward()
    trained = [weight for weight in trainer.student.parameters() if weight.requires_grad]
    row = torch.cat([weight.grad.flatten() for weight in trained])
    trainer.optimizer.zero_grad()
    return row


def take_step(trainer: Trainer) -> Step:
    """Sample, grade, assign, score and step; measured before and after."""
    puzzle, group = choose_group(trainer)
    trainer.assign([group])
    trainer.record_old_logp(group)  # pi_old, so that the loss after the step has a ratio
    trainer.student.train()
    reference = trainer.reference.model
    tutored = [number for number, response in enumerate(group) if response.tutored]
    teacher = {n: log_probs(trainer, reference, group[n].teacher_prompt, group[n]) for n in tutored}
    before = measure(trainer, group, teacher)
    gradients = {part: gradient(trainer, group, part) for part in PARTS}
    trainer.score(group)
    update = trainer.step()
    after = measure(trainer, group, teacher)
    return Step(trainer, puzzle, group, teacher, before, gradients, update, after)


# ------------------------------------------------------------------------------------- the page
def write_page(folder: Path) -> Step:
    """Write one-step.md and one-step.png into the folder, and return what they show."""
    step = take_step(make_trainer())
    folder.mkdir(parents=True, exist_ok=True)
    [picture] = step.group[0].question.images
    size = (SCALE * picture.width, SCALE * picture.height)
    picture.resize(size, Image.Resampling.NEAREST).save(folder / "one-step.png")
    write_beside(folder / "one-step.md", page_text(step, settings.SETTINGS))
    return step


def main(argv: list[str] | None = None) -> None:
    """The command line. One thread, so that sums have one order."""
    parser = argparse.ArgumentParser(
        usage="python -m plumbing.slow_motion [--out FOLDER]",
        description="One optimizer step on one question, with all numbers, as a page.",
    )
    parser.add_argument("--out", default="docs", help="folder of the page and its picture [docs]")
    folder = Path(parser.parse_args(argv).out)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    quiet_loading()
    write_page(folder)
    print(f"written: {folder / 'one-step.md'}, {folder / 'one-step.png'}")


if __name__ == "__main__":
    main()
