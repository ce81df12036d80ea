"""Train a vision-language model with PTD-PO. (arXiv 2606.07000)

GRPO, plus one thing: a response that failed is also scored by the frozen starting model, which reads the same image and question and
a hint; the student, who never reads the hint, is pulled toward it token by token. Sampling, the ratio and the evaluation that counts use
the plain prompt; the hint is read by the teacher in phase 5, and in the row "with the hint" of the table that a run ends with.

    python train.py                                              # embedded tiny Qwen2-VL, built-in puzzles, CPU, minutes
    python train.py --lam 0                                      # the same run as plain GRPO
    python train.py --model Qwen/Qwen2-VL-2B-Instruct            # one GPU
    accelerate launch --num_processes 8 train.py --model ...     # data-parallel

The numbered phases, in `Trainer.rollout` and `Trainer.update`, are the method; the rest is reading and writing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from hints import CONTEXTS, teacher_messages
from plumbing.answers import load_verifier
from plumbing.check import check
from plumbing.data import QuestionStream
from plumbing.images import encode_images, quiet_loading
from plumbing.inputs import read_inputs
from plumbing.memory import plan, plan_table
from plumbing.models import build, frozen_tower, weights_whole
from plumbing.page import write_page
from plumbing.runs import Checkpoints, RunFolder, report, sample_row
from plumbing.settings import EMBEDDED, flag, option
from plumbing.study import audit
from ptdpo import PTDPOConfig, Route, count_tokens, group_advantages, ptdpo_loss, route
from rollout import (
    Batch,
    Prompt,
    Question,
    Rollout,
    banned_tokens,
    collate,
    encode_prompts,
    response_states,
    reward,
    sample_groups,
    student_messages,
)

THIS_RUN = "this run"


# --------------------------------------------------------------------------------------------------------------- settings
@dataclass
class TrainConfig:
    """The run's settings; the method's own are PTDPOConfig."""

    model: str = option(
        EMBEDDED, "model, by hub name or path (embedded: toy/base)", shown="toy/base"
    )
    data: str = option(
        "",
        "questions: a .jsonl file, or a dataset's folder or hub name (pip install datasets)",
        shown="puzzles",
    )
    eval_data: str = option("", "held-out questions, as --data", shown="held-out puzzles")
    split: str = option("train", "split of a dataset in --data")
    eval_split: str = option("test", "split of a dataset in --eval-data")
    image_dir: str = option(
        "", "folder that image paths are relative to and must be in", shown="the .jsonl's"
    )
    skip_bad: bool = option(
        False, "leave out what cannot be read, and list it, instead of stopping at the first"
    )
    max_prompt: int = option(
        8192, "a question with a longer prompt, in tokens, is left out, never cut (paper: 8192)"
    )
    min_pixels: int = option(0, "smallest area of an image, pixels; 0: the model's own")
    max_pixels: int = option(
        0,
        "largest area of an image, pixels: 28 * 28 pixels, in Qwen3-VL 32 * 32, are a token; 0: the model's own",
    )
    fog: float = option(
        0.0,
        "share of the built-in puzzles that are in fog: there the hinted teacher is right only 2 times in 3",
    )
    hints: str = option(
        "", "hints for --data by id, as hints.py writes them", shown="the data's own"
    )
    max_hint_tokens: int = option(512, "a longer hint is dropped, never cut")
    teacher_context: str = option(
        "hint",
        "what the teacher reads besides the question; all but hint are for comparison",
        choices=CONTEXTS,
    )
    audit_hints: bool = option(
        False,
        "no training: how often the frozen model is right from hints without the picture, on --eval-questions",
    )
    check: bool = option(
        False,
        "no training: is the machinery right for this model and these questions? Run it before any long run",
    )
    plan: int = option(
        0,
        "no training: predicted memory of each part on this many GPUs, sharded if more than one",
        shown="0; 1 if bare",
        const=1,
    )
    report: str = option(
        "",
        "also write report.html, a page to look at: questions, hints, responses before and after, token by token; with a "
        "finished run's folder: only that",
        shown="no; this run if bare",
        const=THIS_RUN,
    )
    name: str = option("", "run name: a new folder runs/NAME", shown="date-time")
    steps: int = option(607, "optimizer steps (paper: 2 epochs of 38,870 questions / 128)", toy=250)
    questions: int = option(
        128, "questions an optimizer step, all processes together (paper: 128)", toy=24
    )
    updates: int = option(
        1, "optimizer steps a rollout batch; the paper's 384 questions a rollout are 3"
    )
    group_size: int = option(8, "responses a question, >= 2 (paper: 8)", toy=4)
    max_new_tokens: int = option(4096, "longest response, tokens (paper: 4096)", toy=48)
    temperature: float = option(1.0, "sampling temperature, also in the losses (paper: 1.0)")
    top_p: float = option(
        1.0, "sample from this much mass (paper: 0.99; 1 keeps scorer and sampler equal)"
    )
    top_k: int = option(0, "sample from this many tokens; 0: all")
    format_weight: float = option(
        0.1, "share of the reward that is for the format (released recipe: 0.1)"
    )
    format: str = option(
        "boxed",
        "boxed answer; think: closed thinking, then a boxed answer (released recipe)",
        choices=("boxed", "think"),
    )
    lr: float = option(1e-6, "AdamW learning rate (paper: 1e-6)", toy=1e-3)
    weight_decay: float = option(0.01, "AdamW weight decay (paper: 0.01)")
    warmup: int = option(10, "steps of linear warm-up, then constant")
    grad_clip: float = option(1.0, "largest gradient norm (paper: 1.0)")
    lora: int = option(
        0, "rank of LoRA adapters, trained instead of the weights; 0: none (pip install peft)"
    )
    train_vision: bool = option(False, "train the vision tower as well, but under --lora", toy=True)
    micro_tokens: int = option(
        8192,
        "tokens in one forward pass, a process: prompts, once for all their responses, responses, padding",
        toy=4096,
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute activations while going back: less memory, but every response runs its prompt again",
    )
    logits_mb: float = option(
        512,
        "memory for logits while scoring, MiB, a process: how many tokens meet the output head at once",
    )
    sample_mb: float = option(8192, "memory for the sequences that decode together, MiB, a process")
    generate: str = option(
        "own",
        "own sampler, or model.generate: slower, and draws depend on batches and processes",
        choices=("own", "hf"),
    )
    mask_truncated: bool = option(
        False, "leave responses that reach --max-new-tokens out of the loss"
    )
    verifier: str = option(
        "rules",
        "rules: ours; math: math-verify, for more LaTeX (pip install math-verify)",
        choices=("rules", "math"),
    )
    precision: str = option(
        "auto", "no, bf16, or auto: bf16 on a GPU", choices=("auto", "no", "bf16")
    )
    save_every: int = option(
        50, "steps between checkpoints; one more is written at SIGTERM and at the end", toy=50
    )
    keep: int = option(2, "checkpoints kept, the newest")
    resume: str = option(
        "",
        "go on with the run in this folder, from its newest checkpoint; only --steps may stand beside",
        shown="a new run",
    )
    log_with: str = option(
        "none",
        "also send the log to a tracker (pip install tensorboard, or wandb)",
        choices=("none", "tensorboard", "wandb"),
    )
    eval_every: int = option(50, "steps between evaluations", toy=50)
    eval_questions: int = option(400, "held-out questions an evaluation")
    seed: int = option(0, "seed of questions and sampling, 0 to 399")

    def __post_init__(self):
        least = dict(
            steps=1,
            questions=1,
            updates=1,
            group_size=2,
            max_new_tokens=1,
            warmup=0,
            micro_tokens=1,
            top_k=0,
            eval_every=1,
            eval_questions=1,
            max_prompt=1,
            min_pixels=0,
            max_pixels=0,
            lora=0,
            plan=0,
            max_hint_tokens=1,
            save_every=1,
            keep=1,
            seed=0,
            weight_decay=0,
            format_weight=0,
            fog=0,
        )
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{flag(name)} must be at least {low}, got {getattr(self, name)}")
        for name in ("lr", "temperature", "top_p", "grad_clip", "logits_mb", "sample_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{flag(name)} must be above 0, got {getattr(self, name)}")
        for name, high in (("top_p", 1), ("format_weight", 1), ("fog", 1), ("seed", 399)):
            if getattr(self, name) > high:
                raise ValueError(f"{flag(name)} must be at most {high}, got {getattr(self, name)}")
        for needed, package in ((self.log_with != "none", self.log_with), (self.lora, "peft")):
            if needed and find_spec(package) is None:
                raise ValueError(f"{package} is not installed; python -m pip install {package}")
        if self.name and (Path(self.name).name != self.name or self.name in (".", "..")):
            raise ValueError(f"--name must be a plain folder name, got {self.name!r}")


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, instead of every option and then the error."""

    def error(self, message):
        self.exit(2, f"train.py: error: {message}\n")


def parse_args(argv=None) -> tuple[TrainConfig, PTDPOConfig, argparse.ArgumentParser]:
    """The command line. Defaults are for real models; with the embedded one, options that name a toy value use it.

    Bad values end the program with one line and exit code 2.
    """
    parser = Parser(
        usage="python train.py [options]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=125),
        description=__doc__.partition("\n\n")[0]
        + " Defaults in [brackets]: real models | embedded one. "
        "Where no source is named, the choice is ours.",
    )
    kinds = {"int": int, "float": float, "str": str}
    for config in (TrainConfig, PTDPOConfig):
        group = parser.add_argument_group("the method" if config is PTDPOConfig else "the run")
        for f in fields(config):
            toy = f.metadata["toy"]
            shown = f.metadata.get("shown", f.default if toy is None else f"{f.default} | {toy}")
            choices = f.metadata.get("choices")
            if f.type == "bool":
                action = "store_true" if toy is None else argparse.BooleanOptionalAction
                group.add_argument(
                    flag(f.name),
                    action=action,
                    default=None,
                    help=f.metadata["help"] + ("" if toy is None else f" [{shown}]"),
                )
                continue
            bare = {"nargs": "?", "const": f.metadata["const"]} if "const" in f.metadata else {}
            group.add_argument(
                flag(f.name),
                type=kinds[f.type],
                default=None,
                choices=choices,
                **bare,
                metavar="|".join(choices) if choices else f.type.upper(),
                help=f"{f.metadata['help']} [{shown}]".replace("%", "%%"),
            )
    given = {
        name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None
    }
    old = (
        "resume"
        if given.get("resume")
        else "report"
        if given.get("report", THIS_RUN) != THIS_RUN
        else None
    )
    if old:
        if more := sorted(set(given) - ({"resume", "steps"} if old == "resume" else {"report"})):
            parser.error(
                f"{flag(more[0])} cannot stand beside {flag(old)}: the run has its own settings"
            )
        try:
            saved = json.loads((Path(given[old]) / "config.json").read_text())
            given = {
                **{
                    name: saved[name]
                    for config in (TrainConfig, PTDPOConfig)
                    for name in config.__dataclass_fields__
                },
                **given,
            }
        except (OSError, ValueError, KeyError) as error:
            parser.error(
                f"{flag(old)} {given[old]}: no config.json of a run of this version in it ({type(error).__name__}: {error})"
            )
    toy = "model" not in given or Path(given["model"]).resolve() == Path(EMBEDDED)
    made = []
    for config in (TrainConfig, PTDPOConfig):
        values = {
            f.name: f.metadata["toy"]
            for f in fields(config)
            if toy and f.metadata["toy"] is not None
        }
        values.update({f.name: given[f.name] for f in fields(config) if f.name in given})
        try:
            made.append(config(**values))
        except ValueError as error:
            parser.error(str(error))
    return *made, parser


# ------------------------------------------------------------------------------------------------------- reading the input


# ------------------------------------------------------------------------------------------------------------------ models


# ------------------------------------------------------------------------------------------------------------------- step
@dataclass
class Work:
    """One response on its way through an optimizer step. used False (a truncated one, with --mask-truncated): in no loss."""

    rollout: Rollout
    prompt: Prompt
    hinted: Prompt | None
    advantage: float
    tutored: bool
    kl: bool
    used: bool = True
    old_logp: torch.Tensor | None = None


class Trainer:
    """What one process holds during a run; `rollout` and `update` are the method."""

    def __init__(self, config, method, accelerator, processor, student, reference):
        self.config, self.method, self.accelerator, self.processor, self.reference = (
            config,
            method,
            accelerator,
            processor,
            reference,
        )
        self.policy, self.sharded = (
            student.model,
            accelerator.distributed_type == DistributedType.FSDP,
        )
        trained = [p for p in student.parameters() if p.requires_grad]
        decay, rest = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": config.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=config.lr,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1.0, (s + 1) / max(1, config.warmup))
        )
        self.student, self.optimizer = accelerator.prepare(student, optimizer)
        accelerator.register_for_checkpointing(self.schedule)
        banned = torch.tensor(
            banned_tokens(self.policy, processor.tokenizer), device=accelerator.device
        )
        self.settings = dict(
            temperature=config.temperature, banned=banned, logits_mb=config.logits_mb
        )
        self.verify = load_verifier(config.verifier)
        self.sampling = dict(
            max_new_tokens=config.max_new_tokens,
            sample_mb=config.sample_mb,
            generate=config.generate,
        )
        self.skipped = 0

    def sample(
        self, samples: list[Question], prompts: list[Prompt], group_size: int, **settings
    ) -> list[list[Rollout]]:
        """sample_groups with the student."""

        def run(model):
            with weights_whole(self.student):
                if frozen_tower(self.config):
                    encode_images(model, prompts)
                return sample_groups(
                    model, self.processor, samples, prompts, group_size, **self.sampling, **settings
                )

        with torch.no_grad(), self.accelerator.autocast():
            return self.student(run=run) if self.sharded else run(self.policy)

    def rollout(
        self, samples: list[Question], keys: list[str] | None = None
    ) -> tuple[list[list[Work]], dict]:
        """Phases 1 to 4 for this process's questions: -> one list of Work a question, and what the log says of them.

        keys: one a question, what its draws are seeded with (default: the samples' ids).
        """
        config, method = self.config, self.method
        # 1 read
        prompts = encode_prompts(self.processor, samples, [student_messages(s) for s in samples])
        # 2 sample: the student acts on the plain prompt
        groups = self.sample(
            samples,
            prompts,
            config.group_size,
            keys=keys,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        # 3 verify
        for rollout in (r for group in groups for r in group):
            rollout.correct = self.verify(
                rollout.text, rollout.sample.answer, rollout.sample.choices
            )
            rollout.reward = reward(
                rollout.text, rollout.correct, config.format_weight, think=config.format == "think"
            )
        rewards = torch.tensor([[r.reward for r in group] for group in groups])  # (N, G)
        correct = torch.tensor([[r.correct for r in group] for group in groups])  # (N, G)
        # 4 route
        contexts = [teacher_messages(s, config.teacher_context) for s in samples]
        routes = route(
            correct, torch.tensor([c is not None for c in contexts]), method.tau, method.lam
        )
        advantages = group_advantages(rewards)
        work = []
        for n, (sample, prompt, group) in enumerate(zip(samples, prompts, groups)):
            hinted = (
                encode_prompts(self.processor, [sample], [contexts[n]])[0]
                if routes.tutored[n].any()
                else None
            )
            if hinted and hinted.pixels is not None:
                hinted.pixels = (
                    prompt.pixels
                )  # the same images; where the tower is frozen, their features
            used = [not (config.mask_truncated and r.truncated) for r in group]
            work.append(
                [
                    Work(
                        r,
                        prompt,
                        hinted,
                        advantages[n, g].item(),
                        routes.tutored[n, g].item() and used[g],
                        routes.kl[n, g].item() and used[g],
                        used[g],
                    )
                    for g, r in enumerate(group)
                ]
            )
        if (
            config.updates > 1
        ):  # with one update a batch the sampling policy is the current one: ratio 1
            flat = [w for group in work for w in group]
            self.student.eval()  # without gradient, so with a cache: see LoraReference
            for batch in self._micro_batches(flat):
                with torch.no_grad():
                    logp = self.student(
                        self._collate(batch, [w.prompt for w in batch]), **self.settings
                    )[0]
                for w, row in zip(batch, logp):
                    w.old_logp = row[: len(w.rollout.ids)]
        every = [r for group in groups for r in group]
        sums = {
            "reward": rewards.sum(),
            "accuracy": correct.sum(),
            "all_failed": (~correct).all(1).sum() * config.group_size,
            "all_correct": correct.all(1).sum() * config.group_size,
            "tutored": routes.tutored.sum(),
            "untaught": contexts.count(None) * config.group_size,
            "length": sum(len(r.ids) for r in every),
            "truncated": sum(r.truncated for r in every),
        }
        return work, {name: float(value) / len(every) for name, value in sums.items()}

    def _micro_batches(self, work: list[Work]):
        # a question's responses together, so that its prompt runs once, and tutored ones together; like lengths near: less padding
        work = sorted(work, key=lambda w: (len(w.prompt.ids), w.rollout.sample.id, not w.tutored))
        batches = []
        for w in work:
            if batches and self._tokens([*batches[-1], w]) <= self.config.micro_tokens:
                batches[-1].append(w)
            else:
                batches.append([w])  # one that is larger than the budget goes alone
        if (
            self.sharded
        ):  # as many forwards on every process: a response that is in no loss, again and again
            [most] = self._largest(len(batches))
            batches += [[replace(work[0], used=False, tutored=False, kl=False)]] * (
                most - len(batches)
            )
        return batches

    def _tokens(self, work: list[Work]) -> int:
        """Tokens of one micro-batch, padding included, in the larger of the student's and the teacher's pass."""
        prompts = (
            len(work) if self.config.gradient_checkpointing else len({id(w.prompt) for w in work})
        )
        return prompts * max(len(p.ids) for w in work for p in (w.prompt, w.hinted) if p) + len(
            work
        ) * max(len(w.rollout.ids) for w in work)

    def _largest(self, *numbers: float) -> list[float]:
        """Each number's largest value over all processes."""
        return (
            self.accelerator.gather(torch.tensor([numbers], device=self.accelerator.device))
            .amax(0)
            .tolist()
        )

    def _collate(self, work: list[Work], prompts: list[Prompt], apart: bool = False) -> Batch:
        return collate(
            prompts,
            [w.rollout.ids for w in work],
            self.processor.tokenizer.pad_token_id,
            self.accelerator.device,
            apart,
        )

    def accumulate(self, work: list[Work]) -> dict:
        """Phase 5: the gradient of one optimizer step, over micro-batches and processes. Returns the step's loss parts."""
        accelerator = self.accelerator
        tutored, kl = torch.tensor([w.tutored for w in work]), torch.tensor([w.kl for w in work])
        lengths = torch.tensor([len(w.rollout.ids) * w.used for w in work])
        counts = accelerator.reduce(
            count_tokens(lengths, Route(tutored, kl)).to(accelerator.device)
        )
        names, worst = (
            ("policy_loss", "tutor_loss", "kl", "entropy"),
            torch.zeros(2, device=accelerator.device),
        )
        sums = torch.zeros(len(names), dtype=torch.float64, device=accelerator.device)
        self.student.train()
        batches = self._micro_batches(work)
        for i, batch in enumerate(batches):
            # one sum over processes, at the end; sharded, gradients that wait for it would be whole ones
            with (
                contextlib.nullcontext()
                if self.sharded or i == len(batches) - 1
                else accelerator.no_sync(self.student)
            ):
                loss, parts = self.loss(batch, counts)
                # gradients are averaged over processes, and the denominators are already global: undo the average
                accelerator.backward(loss * accelerator.num_processes)
            worst = torch.maximum(worst, parts["worst"])
            sums += torch.stack([parts.get(name, loss.new_zeros(())).double() for name in names])
        ratio, gap = self._largest(*worst.tolist())
        return {
            **dict(zip(names, accelerator.reduce(sums).tolist())),
            "ratio_max": ratio,
            "sampler_gap": gap,
        }

    def update(self, work: list[Work]) -> dict:
        """Phases 5 and 6: accumulate, then step unless the gradient is not finite."""
        # 5 accumulate
        parts = self.accumulate(work)
        # 6 step
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), self.config.grad_clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if torch.isfinite(norm):
            self.optimizer.step()
            self.schedule.step()
        else:
            self.skipped += 1  # counted, logged and reported at the end, never silent
        self.optimizer.zero_grad()
        return {**parts, "grad_norm": float(norm), "skipped_steps": self.skipped}

    def loss(self, batch: list[Work], counts: torch.Tensor):
        """This micro-batch's share of the step's loss, and its parts: shares as well, but `worst`: the largest |ratio - 1|, and the largest difference
        between the scorer's and the sampler's log-probs of a token at the time of sampling (0 from model.generate, which gives none)."""
        device, method = self.accelerator.device, self.method
        tutored, kl = (
            torch.tensor([getattr(w, name) for w in batch], device=device)
            for name in ("tutored", "kl")
        )
        taught, penalised = [w for w in batch if w.tutored], [w for w in batch if w.kl]
        student_batch = self._collate(
            batch, [w.prompt for w in batch], apart=self.config.gradient_checkpointing
        )
        student_batch.mask &= torch.tensor([w.used for w in batch], device=device).unsqueeze(1)
        mask, teacher, ref_logp = student_batch.mask, {}, None
        teach, penalise = (
            self._largest(len(taught), len(penalised)) if self.sharded else (taught, penalised)
        )
        with torch.no_grad(), self.accelerator.autocast():
            if teach:  # the teacher: same image, same question, plus the hint; scores, never writes
                hinted = self._collate(
                    taught or batch[:1], [w.hinted or w.prompt for w in taught or batch[:1]]
                )
                states = self.reference(run=lambda model: response_states(model, hinted))[
                    hinted.mask
                ]
                if taught:
                    teacher = dict(
                        tutored=tutored,
                        teacher_states=states,
                        teacher_head=self.reference.head,
                        k=method.jsd_k,
                        divergence=method.divergence,
                        support=method.support,
                    )
            if penalise and method.beta_kl:  # the reference without the hint
                plain = self._collate(
                    penalised or batch[:1], [w.prompt for w in penalised or batch[:1]]
                )
                scores = self.reference(plain, **self.settings)[0]
                if penalised:
                    ref_logp = torch.zeros(mask.shape, device=device).masked_scatter(
                        mask & kl.unsqueeze(1), scores[plain.mask]
                    )
        logp, entropy, jsd = self.student(student_batch, **teacher, **self.settings)
        old = logp.detach()
        if batch[0].old_logp is not None:
            old = old.masked_scatter(mask, torch.cat([w.old_logp for w in batch if w.used]))
        advantages = torch.tensor([w.advantage for w in batch], device=device)
        loss, parts = ptdpo_loss(
            method,
            logp,
            old,
            advantages,
            mask,
            counts,
            jsd,
            tutored,
            ref_logp,
            kl,
            longest=self.config.max_new_tokens,
        )
        parts["entropy"] = entropy.sum() / counts[0]
        sampler = old
        if batch[0].rollout.logp is not None:
            drawn = torch.tensor(
                [x for w in batch if w.used for x in w.rollout.logp], device=device
            )
            sampler = old.masked_scatter(mask, drawn)
        parts["worst"] = torch.stack(
            [(torch.exp(logp.detach() - old) - 1).abs().max(), (old - sampler).abs().max()]
        )
        return loss, parts


# -------------------------------------------------------------------------------------------------------------- evaluation
def evaluate(trainer: Trainer, samples: list[Question], messages=student_messages) -> dict:
    """Greedy accuracy and mean length over all processes, and the ids of what was right. messages: student_messages (the measure) or
    teacher_messages (the teacher's view)."""
    accelerator = trainer.accelerator
    mine = [s for s in samples if messages is student_messages or s.hint][
        accelerator.process_index :: accelerator.num_processes
    ]
    prompts = encode_prompts(trainer.processor, mine, [messages(s) for s in mine])
    groups = trainer.sample(mine, prompts, 1, temperature=0.0)
    right = [trainer.verify(g[0].text, s.answer, s.choices) for s, g in zip(mine, groups)]
    total = accelerator.reduce(
        torch.tensor(
            [sum(right), sum(len(g[0].ids) for g in groups), len(mine)],
            dtype=torch.float64,
            device=accelerator.device,
        )
    ).tolist()
    return {
        "accuracy": total[0] / max(1, total[2]),
        "length": total[1] / max(1, total[2]),
        "questions": int(total[2]),
        "right": gather_object([s.id for s, fine in zip(mine, right) if fine]),
    }


# --------------------------------------------------------------------------------------------------------------------- run


def train(
    trainer: Trainer,
    questions: QuestionStream,
    held_out: list[Question],
    folder: RunFolder,
    checkpoints: Checkpoints,
    state: dict | None,
) -> dict:
    """All steps with evaluations before, during and after: -> {"before": ..., "after": ...} for the table. state: of the checkpoint that
    a resumed run goes on from."""
    config, accelerator = trainer.config, trainer.accelerator
    rank, world_size = accelerator.process_index, accelerator.num_processes

    def both():
        plain, hinted = evaluate(trainer, held_out), evaluate(trainer, held_out, teacher_messages)
        return {
            "plain": plain["accuracy"],
            "hinted": hinted["accuracy"],
            "length": plain["length"],
            "questions": plain["questions"],
        }

    stopping, began = [], time.time()
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    if state is None:
        state = {
            "step": 0,
            "before": both(),
            "entropies": [],
            "seconds": 0.0,
            "skipped": 0,
            "data": questions.fingerprint(),
        }
        folder.append(
            "metrics.jsonl",
            {
                "step": 0,
                "eval_plain": state["before"]["plain"],
                "eval_hinted": state["before"]["hinted"],
            },
        )
    trainer.skipped, entropies, before, work = (
        state["skipped"],
        state["entropies"],
        state["before"],
        [],
    )
    bar = tqdm(
        range(state["step"] + 1, config.steps + 1),
        initial=state["step"],
        total=config.steps,
        disable=not accelerator.is_main_process,
        unit="step",
        dynamic_ncols=True,
    )
    for step in bar:
        start = time.time()
        if not work:
            first, per = (step - 1) * config.questions, config.questions // world_size
            updates = min(
                config.updates, config.steps + 1 - step
            )  # the last rollout batch is for the steps that are left, so the run ends on a checkpoint
            indices = range(first + rank, first + config.questions * updates, world_size)
            work, row = trainer.rollout(
                [questions[i] for i in indices], [f"{config.seed}-{i}" for i in indices]
            )
            folder.append("responses.jsonl", sample_row(step, work[0]))
        sampled = time.time()
        losses = trainer.update([w for group in work[:per] for w in group])
        work = work[per:]
        # 7 log and save
        shared = accelerator.reduce(
            torch.tensor(list(row.values()), dtype=torch.float64, device=accelerator.device), "mean"
        ).tolist()
        metrics = {
            "step": step,
            **dict(zip(row, shared)),
            **losses,
            "lr": trainer.schedule.get_last_lr()[0],
            "sample_seconds": sampled - start,
            "update_seconds": time.time() - sampled,
        }
        entropies.append(metrics["entropy"])
        if step % config.eval_every == 0 and step < config.steps:
            metrics["eval_plain"] = evaluate(trainer, held_out)["accuracy"]
            bar.write(
                f"step {step}: {100 * metrics['eval_plain']:.1f} % of the held-out questions right, plain prompt"
            )
        elif step == config.steps:
            after = both()
            metrics.update(eval_plain=after["plain"], eval_hinted=after["hinted"])
        folder.append("metrics.jsonl", metrics)
        accelerator.log(
            {name: value for name, value in metrics.items() if name != "step"}, step=step
        )
        bar.set_postfix_str(
            f"reward {metrics['reward']:.2f} acc {metrics['accuracy']:.2f} entropy {metrics['entropy']:.2f} "
            f"all-failed {metrics['all_failed']:.2f} tutor {metrics['tutor_loss']:.3f}"
        )
        [asked] = trainer._largest(len(stopping))  # all stop, or none
        if not work and (
            step - state["step"] >= config.save_every or asked or step == config.steps
        ):
            state = {
                **state,
                "step": step,
                "entropies": entropies,
                "skipped": trainer.skipped,
                "seconds": state["seconds"] + time.time() - began,
            }
            began = time.time()
            checkpoints.save(state)
            if asked and step < config.steps:
                bar.close()
                accelerator.print(
                    f"stopped by SIGTERM after step {step}; go on with: python train.py --resume {folder.path}"
                )
                accelerator.end_training()
                sys.exit(143)
    return {
        "before": {**before, "entropy": entropies[0]},
        "after": {**after, "entropy": entropies[-1]},
        "seconds": state["seconds"],
    }


# --------------------------------------------------------------------------------------------------------- a page to look at


def main(argv=None) -> None:
    """Read, build, train, report."""
    config, method, parser = parse_args(argv)
    finished = Path(config.report) if config.report not in ("", THIS_RUN) else None
    if finished:  # its training questions are not read again
        config = replace(config, data="", hints="", resume=config.report)
    precision = (
        config.precision
        if config.precision != "auto"
        else "bf16"
        if torch.cuda.is_available()
        else "no"
    )
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=None if config.log_with == "none" else config.log_with,
        project_dir="runs",
    )
    try:
        questions, held_out, note, path, processor = read_inputs(config, accelerator.num_processes)
        if finished and not (finished / "model").is_dir():
            raise ValueError(
                f"--report {finished}: there is no trained model in it; is the run finished?"
            )
        checkpoints = Checkpoints(accelerator, path, config.keep)
        checkpoint, state = (
            checkpoints.newest(questions, config)
            if config.resume and not finished
            else (None, None)
        )
    except ValueError as error:
        parser.error(str(error))
    if config.plan:
        return accelerator.print(
            plan_table(plan(config, method, config.plan, config.precision != "no"), config.plan)
        )
    quiet_loading()
    if finished:
        return print(f"written: {write_page(finished, config, method, held_out, processor)}")
    set_seed(config.seed, device_specific=True)
    torch.set_flush_denormal(True)  # denormal floats make CPU matrix products several times slower
    logging.getLogger("accelerate").setLevel(
        logging.ERROR
    )  # at each checkpoint: that tied weights are saved once
    try:
        student, reference = build(config, accelerator)
    except ValueError as error:
        parser.error(str(error))
    accelerator.wait_for_everyone()  # every process has seen that the run folder is new before one makes it
    settings = {**asdict(config), **asdict(method)}
    folder = RunFolder(
        path,
        settings,
        accelerator.is_main_process and not (config.audit_hints or config.check),
        state and state["step"],
    )
    trainer = Trainer(config, method, accelerator, processor, student, reference)
    count, trained = (
        sum(p.numel() for p in student.parameters() if p.requires_grad or every) / 1e6
        for every in (True, False)
    )
    accelerator.print(
        f"model: {config.model}, {count:.2f} M parameters, {trained:.2f} M of them trained, on "
        f"{accelerator.device} x {accelerator.num_processes}, mixed precision: {precision}\n{note}"
    )
    if config.audit_hints:
        return accelerator.print(audit(trainer, questions, evaluate))
    if config.check:
        fine, text = check(trainer, questions)
        accelerator.print(text)
        sys.exit(0 if fine else 1)
    if state:
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"going on from {checkpoint}")
    accelerator.project_configuration.logging_dir = str(path)
    accelerator.init_trackers("ptdpo", config=settings)
    accelerator.print(
        f"{config.steps} steps of {config.questions} questions x {config.group_size} responses; lam {method.lam}, tau {method.tau}, "
        f"k {method.jsd_k}, lr {config.lr}; log in {path}"
    )
    table = train(trainer, questions, held_out, folder, checkpoints, state)
    folder.save_model(trainer)
    if accelerator.is_main_process:
        report(table, folder, trainer)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if config.report:
        trainer, student, reference = accelerator.free_memory(
            trainer, student, reference
        )  # the page loads its own two models
        print(f"a page to look at: {write_page(path, config, method, held_out, processor)}")


if __name__ == "__main__":
    main()
