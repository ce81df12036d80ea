"""runs/NAME/: logs, summary, checkpoints, resume."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from plumbing.memory import plan

if TYPE_CHECKING:
    from plumbing.data import QuestionStream
    from train import TrainConfig, Trainer, Work


class RunFolder:
    """runs/NAME/: config.json, metrics.jsonl (one line a step), responses.jsonl, checkpoints/, model/. Only the main process writes.

    step: the one a resumed run goes on from; what was logged after it is cut off, as it will be done again.
    """

    def __init__(self, path: Path, config: dict, active: bool, step: int | None = None):
        self.path, self.active = path, active
        if active and step is None:
            path.mkdir(parents=True)
        if active:
            write_beside(
                path / "config.json", json.dumps({**config, "resume": ""}, indent=2) + "\n"
            )
        for log in (
            (path / "metrics.jsonl", path / "responses.jsonl")
            if active and step is not None
            else ()
        ):
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            write_beside(
                log,
                "".join(
                    line
                    for line in lines
                    if line.endswith("\n") and json.loads(line)["step"] <= step
                ),
            )

    def append(self, name: str, row: dict) -> None:
        if self.active:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def save_model(self, trainer: Trainer) -> None:
        """The student's weights, or its LoRA adapters alone. Written beside and renamed: model/ is there whole or not at all."""
        trainer.accelerator.wait_for_everyone()
        weights = (
            None if trainer.config.lora else trainer.accelerator.get_state_dict(trainer.student)
        )
        if self.active:
            part = self.path / "model.part"
            shutil.rmtree(part, ignore_errors=True)
            trainer.policy.save_pretrained(
                part,
                state_dict=weights
                and {name.removeprefix("model."): value for name, value in weights.items()},
            )
            trainer.processor.save_pretrained(part)
            shutil.rmtree(self.path / "model", ignore_errors=True)
            os.rename(part, self.path / "model")


def write_beside(path: Path, text: str) -> None:
    """Replace a file at once: it holds the old text or the new, never half of one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class Checkpoints:
    """runs/NAME/checkpoints/step-N: weights, optimizer, schedule and random states, as accelerate writes them, and state.json: step,
    what the final table needs, the data's fingerprint, and every file's size. Written beside and renamed."""

    def __init__(self, accelerator: Accelerator, folder: Path, keep: int):
        self.accelerator, self.folder, self.keep = accelerator, folder / "checkpoints", keep

    def found(self) -> list[Path]:
        """The finished ones, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.suffix != ".part")

    def save(self, state: dict) -> None:
        """After a whole rollout batch. A full disk ends the run with a message; the checkpoints before are untouched."""
        accelerator, target = self.accelerator, self.folder / f"step-{state['step']:08d}"
        part = target.with_suffix(".part")
        accelerator.wait_for_everyone()
        try:
            if accelerator.is_main_process:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(part))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                sizes = {
                    str(p.relative_to(part)): p.stat().st_size
                    for p in sorted(part.rglob("*"))
                    if p.is_file()
                }
                (part / "state.json").write_text(json.dumps({**state, "files": sizes}))
                os.rename(part, target)
                for old in self.found()[: -self.keep]:
                    shutil.rmtree(old)
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch.save tells of a full disk by a RuntimeError
            shutil.rmtree(part, ignore_errors=True)
            last = self.found()
            sys.exit(
                f"cannot write the checkpoint {target}: {error}\n"
                + (f"the last good one is {last[-1]}" if last else "there is none before it")
            )

    def newest(self, questions: QuestionStream, config: TrainConfig) -> tuple[Path, dict]:
        """The newest checkpoint and its state. Raises ValueError where there is none, where it is not whole, and where the run cannot go on from it."""
        if not self.found():
            raise ValueError(f"--resume: no checkpoint in {self.folder}")
        path = self.found()[-1]
        try:
            state = json.loads((path / "state.json").read_text())
            short = [
                name
                for name, size in state["files"].items()
                if not (path / name).is_file() or (path / name).stat().st_size != size
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--resume: {path} is not a checkpoint of ptdpo ({type(error).__name__}: {error})"
            ) from None
        if short:
            raise ValueError(
                f"--resume: {path} is not whole: {short[0]} is missing or has another size; remove the folder to go on from the one before"
            )
        if state["data"] != questions.fingerprint():
            raise ValueError(
                f"--resume: the questions in {config.data} are not those that {path} was trained on"
            )
        if state["step"] >= config.steps:
            raise ValueError(
                f"--resume: {path} has done all {config.steps} steps; give a larger --steps to go on"
            )
        return path, state


def sample_row(step: int, group: list[Work]) -> dict:
    """One question of a step for responses.jsonl."""
    sample = group[0].rollout.sample
    return {
        "step": step,
        "id": sample.id,
        "question": sample.text,
        "answer": sample.answer,
        "hint": sample.hint and asdict(sample.hint),
        "responses": [
            {
                "text": w.rollout.text,
                "correct": w.rollout.correct,
                "reward": round(w.rollout.reward, 4),
                "tutored": w.tutored,
                "truncated": w.rollout.truncated,
            }
            for w in group
        ],
    }


def report(table: dict, folder: RunFolder, trainer: Trainer) -> None:
    """The table that a run ends with, and on a GPU the memory it took."""
    before, after = table["before"], table["after"]
    print(f"\n{'':30s}{'before':>9s}{'after':>9s}")
    for label, key, scale, unit in (
        ("accuracy, plain prompt", "plain", 100, "%"),
        ("accuracy, with the hint", "hinted", 100, "%"),
        ("entropy, nats a token", "entropy", 1, ""),
        ("response length, tokens", "length", 1, ""),
    ):
        digits = 2 if key == "entropy" else 1
        print(
            f"{label:30s}{scale * before[key]:9.{digits}f}{scale * after[key]:9.{digits}f} {unit}"
        )
    print(
        f"({before['questions']} held-out questions, greedy; entropy of the sampled responses, first and last step; "
        f"{table['seconds'] / 60:.1f} minutes; {trainer.skipped} steps skipped for a non-finite gradient)"
    )
    print(
        f"\nwritten to {folder.path}/: config.json, metrics.jsonl, responses.jsonl, checkpoints/, model/. Load the model with\n"
        f'  AutoModelForImageTextToText.from_pretrained("{folder.path}/model")   # the processor: rollout.load_processor'
    )
    if torch.cuda.is_available():
        gpus = trainer.accelerator.num_processes if trainer.sharded else 1
        print(
            f"peak memory of this process: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB; predicted (--plan): "
            f"{plan(trainer.config, trainer.method, gpus, trainer.accelerator.mixed_precision == 'bf16')['peak']:.1f}"
        )
