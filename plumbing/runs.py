"""runs/NAME/: logs, summary, checkpoints, resume, and a stop by a signal."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from safetensors import SafetensorError
from tqdm import tqdm

from hints import teacher_messages
from plumbing.memory import plan
from plumbing.progress import pace_of_sampling, pace_of_steps

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from plumbing.data import QuestionStream
    from plumbing.decoding import Look
    from plumbing.stopping import Stopped
    from rollout import Question, Response
    from train import TrainConfig, Trainer


class RunFolder:
    """runs/NAME/: config.json, metrics.jsonl, responses.jsonl, checkpoints/, model/.

    metrics.jsonl has one line per step. Only the main process writes (active). state: of the
    checkpoint that a resumed run goes on from; what was logged after it is cut off, as it will be
    done again. The model of an earlier end is kept as model-STEP. Ends the program with one line
    where the folder cannot be written, or is in use by another process.
    """

    def __init__(self, path: Path, config: dict, active: bool, state: dict | None = None):
        self.path, self.active = path, active
        if not active:
            return
        made = False
        try:
            if state is None:
                path.mkdir(parents=True)
                made = True
            self.lock = locked(path / "lock")
            settings = json.dumps({**config, "resume": ""}, indent=2)
            write_beside(path / "config.json", settings + "\n")
            if state is not None:
                self._go_back_to(state, config["steps"])
        except OSError as error:
            if made:
                shutil.rmtree(path, ignore_errors=True)
            sys.exit(f"cannot write the run's folder {path}: {error}")

    def _go_back_to(self, state: dict, steps: int) -> None:
        step = state["step"]
        cut_log(self.path / "metrics.jsonl", step - 1 if "unlogged" in state else step)
        cut_log(self.path / "responses.jsonl", step)
        model = self.path / "model"
        if step < steps and model.is_dir():  # else it would pass for the model of the last step
            kept = self.path / f"model-{step}"
            shutil.rmtree(kept, ignore_errors=True)
            os.rename(model, kept)

    def append(self, name: str, row: dict) -> None:
        """One more line of a log. A full disk ends the run with a message."""
        if not self.active:
            return
        try:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            sys.exit(f"cannot write {self.path / name}: {error}")

    def save_model(self, trainer: Trainer) -> None:
        """The student's weights, or its LoRA adapters alone.

        Written beside and renamed: model/ is there whole or not at all. A full disk ends the run
        with a message: a resumed run then saves the model alone.
        """
        accelerator = trainer.accelerator
        accelerator.wait_for_everyone()
        weights = None
        if not trainer.config.lora:
            named = accelerator.get_state_dict(trainer.student).items()
            weights = {name.removeprefix("model."): value for name, value in named}
        if not self.active:
            return
        target, part = self.path / "model", self.path / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            trainer.policy.save_pretrained(part, state_dict=weights or None)
            trainer.processor.save_pretrained(part)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(part, ignore_errors=True)
            sys.exit(
                f"cannot write the model {target}: {error}\nmake room, then: "
                f"{resume_command(self.path)}"
            )
        shutil.rmtree(target, ignore_errors=True)
        os.rename(part, target)

    def remove(self) -> None:
        """Remove the folder of a run that has trained nothing: its name is free again."""
        if self.active:
            shutil.rmtree(self.path)


def locked(path: Path):
    """The open file, locked until it is closed or the process ends, in whatever way.

    Ends the program where another process has the lock. On Windows, and on a file system without
    locks, there is none.
    """
    file = path.open("w")
    if fcntl:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            sys.exit(f"{path.parent} is in use by another process")
        except OSError:
            pass
    return file


def resume_command(path: Path) -> str:
    """What the user types to go on with a run, as a shell reads it."""
    return f"python train.py --resume {shlex.quote(str(path))}"


def write_beside(path: Path, text: str) -> None:
    """Replace a file at once: it holds the old text or the new, never half of one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def whole_lines(log: Path) -> list[str]:
    """The lines of a log, but for a last one without its end; none where there is no file yet."""
    if not log.exists():
        return []
    # TRAP: str.splitlines would split at U+2028 too. And the last line may end inside a character.
    *whole, _ = log.read_bytes().split(b"\n")
    return [f"{line.decode()}\n" for line in whole]


def cut_log(log: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line without its end."""
    kept = [line for line in whole_lines(log) if json.loads(line)["step"] <= step]
    if kept or log.exists():  # no file: the run stopped before its first line
        write_beside(log, "".join(kept))


# ------------------------------------------------------------------------------------ checkpoints
class Checkpoints:
    """runs/NAME/checkpoints/step-N: all that a run needs to go on bit for bit.

    Weights, optimizer, schedule and random states, as accelerate writes them, and state.json: the
    step, what the summary needs, the data's fingerprint, and every file's size. Written beside and
    renamed. Step 0 has state.json alone, as its weights are the model's own.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, keep: int):
        self.accelerator, self.folder, self.keep = accelerator, folder / "checkpoints", keep

    def finished(self) -> list[Path]:
        """Those that were written whole, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".part")

    def save(self, state: dict) -> None:
        """Write one, and remove all but the newest `keep`.

        A full disk ends the run with a message; the checkpoints before stay as they are.
        """
        accelerator, target = self.accelerator, self.folder / f"step-{state['step']:08d}"
        part = target.with_suffix(".part")
        accelerator.wait_for_everyone()
        try:
            if accelerator.is_main_process:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            accelerator.wait_for_everyone()
            if state["step"]:
                accelerator.save_state(str(part))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (part / "state.json").write_text(json.dumps({**state, "files": _file_sizes(part)}))
                os.rename(part, target)
                for outdated in self.finished()[: -self.keep]:
                    shutil.rmtree(outdated)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is one of the three
            shutil.rmtree(part, ignore_errors=True)
            finished = self.finished()
            rest = f"the last good one is {finished[-1]}" if finished else "there is none before it"
            free = shutil.disk_usage(self.folder.parent).free / 2**20
            sys.exit(
                f"cannot write the checkpoint {target}, {free:.0f} MiB are free: {error}\n{rest}"
            )

    def amend(self, state: dict) -> None:
        """Write the state of the newest one anew, as its step has been logged since."""
        if self.accelerator.is_main_process:
            file = self.finished()[-1] / "state.json"
            files = json.loads(file.read_text())["files"]
            write_beside(file, json.dumps({**state, "files": files}))

    def newest(self, stream: QuestionStream, config: TrainConfig) -> tuple[Path, dict]:
        """The newest checkpoint and its state.

        Raises ValueError where there is none, where it is not whole, and where the run cannot go on
        from it.
        """
        if not self.finished():
            raise ValueError(f"--resume: no checkpoint in {self.folder}")
        path = self.finished()[-1]
        try:
            state = json.loads((path / "state.json").read_text())
            sizes = _file_sizes(path)
            broken = [name for name, size in state["files"].items() if sizes.get(name) != size]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"--resume: {path} is not a checkpoint of ptdpo ({reason})") from None
        if broken:
            raise ValueError(
                f"--resume: {path} is not whole: {broken[0]} is missing or has another size; "
                "remove the folder to go on from the one before"
            )
        if state["data"] != stream.fingerprint():
            raise ValueError(
                f"--resume: the questions in {config.data} are not those that {path} was trained on"
            )
        # a run that ended between its last checkpoint and its model goes on to save the model
        has_model = (self.folder.parent / "model").is_dir()
        is_unsaved = "summary" in state and state["step"] == config.steps and not has_model
        if state["step"] >= config.steps and "unlogged" not in state and not is_unsaved:
            raise ValueError(
                f"--resume: {path} has done all {config.steps} steps; give a larger --steps to go "
                "on"
            )
        return path, state


def _file_sizes(folder: Path) -> dict[str, int]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def load_checkpoint(path: Path, state: dict, accelerator: Accelerator) -> None:
    """Bring back what Checkpoints.save wrote."""
    if state["step"]:
        accelerator.load_state(str(path))
    accelerator.print(f"going on from {path}")


# ---------------------------------------------------------------------------------- where it stands
class Run:
    """A run on its way: folder, checkpoints, state, progress, and a stop by a signal.

    state: what a checkpoint keeps (see Checkpoints); None: the run is new. Its "step" is that of
    the last checkpoint; "unlogged" are the numbers of a step whose evaluation a signal cut short;
    "summary" is that of the last step.
    done: the last optimizer step that was finished; saved: the last one that is on disk.
    """

    def __init__(self, folder: RunFolder, checkpoints: Checkpoints, state: dict | None):
        self.folder, self.checkpoints, self.state = folder, checkpoints, state
        self.summary, self.began, self.bar = {}, time.time(), None
        self.saved = None if state is None else state["step"]

    def start(self, trainer: Trainer, held_out: list[Question], stream: QuestionStream) -> None:
        """Evaluate before the first step of a new run, or where a stop cut an evaluation short."""
        self.config, self.accelerator = trainer.config, trainer.accelerator
        if self.state is None:
            before = evaluate_both(trainer, held_out)
            self.state = {"step": 0, "before": before, "seconds": 0.0, "skipped": 0}
            self.state["data"] = stream.fingerprint()
            self.folder.append("metrics.jsonl", {"step": 0, **evaluation_row(before)})
            self.print(pace_of_sampling(before, self.config))
        trainer.skipped = self.state["skipped"]
        self.summary = self.state.get("summary", {})
        self.done = self.state["step"]
        self.first_step = self.done + 1  # of this start of the run
        self.bar = tqdm(
            range(self.first_step, self.config.steps + 1),
            initial=self.done,
            total=self.config.steps,
            disable=not self.accelerator.is_main_process,
            unit="step",
            dynamic_ncols=True,
        )
        if "unlogged" in self.state:
            self.log(trainer, held_out, self.state["unlogged"])
            self.checkpoints.amend(self.state)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left, with a progress bar on the main process."""
        return iter(self.bar)

    def print(self, line: str) -> None:
        """Print above the bars, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(line)

    def questions_of_rollout(self, step: int) -> range:
        """Which questions of the stream this process reads for the rollout that begins at `step`.

        The last rollout is for the steps that are left, so that the run ends on a checkpoint.
        """
        config, accelerator = self.config, self.accelerator
        steps = min(config.updates, config.steps + 1 - step)
        begin = (step - 1) * config.questions
        end = begin + steps * config.questions
        return range(begin + accelerator.process_index, end, accelerator.num_processes)

    def log(self, trainer: Trainer, held_out: list[Question], metrics: dict) -> None:
        """Evaluate where it is time for it, and log the step's numbers.

        A stop while evaluating leaves them in the state as "unlogged": the resumed run evaluates.
        """
        step, config = metrics["step"], self.config
        metrics["lr"] = trainer.schedule.get_last_lr()[0]
        self.state.setdefault("first_entropy", metrics["entropy"])
        self.state["unlogged"], self.done = metrics, step
        if step == self.first_step:
            self.print(pace_of_steps(metrics, self.state["before"], config))
        if step == config.steps:
            after = evaluate_both(trainer, held_out)
            metrics |= evaluation_row(after)
            before = {**self.state["before"], "entropy": self.state["first_entropy"]}
            after["entropy"] = metrics["entropy"]
            self.summary = {"before": before, "after": after, "seconds": self.seconds()}
            self.state["summary"] = self.summary
        elif step % config.eval_every == 0:
            metrics["eval_plain"] = trainer.evaluate(held_out)["accuracy"]
            percent = 100 * metrics["eval_plain"]
            self.print(
                f"step {step}: {percent:.1f} % of the held-out questions right, plain prompt"
            )
        del self.state["unlogged"]
        self.folder.append("metrics.jsonl", metrics)
        numbers = {name: value for name, value in metrics.items() if name != "step"}
        self.accelerator.log(numbers, step=step)
        self.bar.set_postfix_str(
            f"reward {metrics['reward']:.2f} acc {metrics['accuracy']:.2f} "
            f"entropy {metrics['entropy']:.2f} all-failed {metrics['all_failed']:.2f} "
            f"tutor {metrics['tutor_loss']:.3f}"
        )

    def save(self, trainer: Trainer, step: int) -> None:
        """Write a checkpoint where one is due. To be called between two rollouts.

        Raises Stopped if a signal asked for it, but not after the last step: the run is over then.
        """
        is_last = step == self.config.steps
        if is_last or step - self.state["step"] >= self.config.save_every:
            self.write_checkpoint(trainer)
        if not is_last:
            trainer.stop_if_asked()

    def write_checkpoint(self, trainer: Trainer) -> None:
        """Save the last finished step."""
        self.state |= {"step": self.done, "skipped": trainer.skipped, "seconds": self.seconds()}
        self.began = time.time()
        self.checkpoints.save(self.state)
        self.saved = self.done

    def seconds(self) -> float:
        """How long the run has taken, earlier parts of it included."""
        return self.state["seconds"] + time.time() - self.began

    def stop(self, trainer: Trainer, stopped: Stopped) -> NoReturn:
        """Save the last finished step, say how to go on, and end the program.

        What was sampled or scored after that step is dropped. A run that has not finished its first
        evaluation leaves nothing.
        """
        accelerator, path = self.accelerator, self.folder.path
        if self.bar is not None:
            self.bar.close()
        nothing_to_keep = self.state is None
        if nothing_to_keep:
            accelerator.print(
                f"stopped by {stopped.name} in the first evaluation: nothing was trained, and "
                f"{path} is removed; start again with the same command"
            )
        else:
            trainer.optimizer.zero_grad()
            if self.saved != self.done:
                self.write_checkpoint(trainer)
            trained = "" if self.done else " (nothing was trained; the first evaluation is kept)"
            accelerator.print(
                f"stopped by {stopped.name} after step {self.done}{trained}; go on with: "
                f"{resume_command(path)}"
            )
        # TRAP: torchrun ends all processes as soon as one has ended, so all wait for the main one
        accelerator.wait_for_everyone()
        accelerator.end_training()
        if nothing_to_keep:
            self.folder.remove()
        sys.exit(stopped.exit_code)


def evaluate_both(trainer: Trainer, held_out: list[Question]) -> dict:
    """The student on plain prompts, which is the measure, and its accuracy with the hint.

    hinted: None where no held-out question has a hint. length, questions and seconds: of the
    evaluation on plain prompts.
    """
    began = time.time()
    plain = trainer.evaluate(held_out)
    seconds = time.time() - began
    hinted = trainer.evaluate(held_out, teacher_messages)
    return {
        "plain": plain["accuracy"],
        "hinted": hinted["accuracy"] if hinted["questions"] else None,
        "length": plain["length"],
        "questions": plain["questions"],
        "seconds": seconds,
    }


def split(groups: list, count: int) -> tuple[list, list]:
    """The first `count` groups, and the rest."""
    return groups[:count], groups[count:]


# ------------------------------------------------------------------------------- start and progress
# How long processes wait for each other. The library's 10 minutes (NCCL) are too short: who has
# sampled his part of a rollout waits for who has the longest responses. By our arithmetic a whole
# rollout of the paper's size with 4096 tokens per response takes an 8B model about 3 hours on 8
# GPUs; this is twice as much. A process that dies is noticed at once, by torchrun.
PROCESS_TIMEOUT = timedelta(hours=6)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's Accelerator with the run's precision, tracker and PROCESS_TIMEOUT."""
    set_expandable_segments()
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "no"
    # at each checkpoint it would say that tied weights are saved once
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    tracker = None if config.log_with == "none" else config.log_with
    return Accelerator(
        cpu=not torch.cuda.is_available(),  # mps has no float64, and its sampler is not written
        mixed_precision=precision,
        log_with=tracker,
        project_dir="runs",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
    )


def set_expandable_segments() -> None:
    """Let CUDA's allocator grow its segments, so that less memory lies idle between tensors.

    The allocator reads this once, when CUDA starts. A value that the user has set stays.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if not any(name in os.environ for name in names):
        release = tuple(int(part) for part in torch.__version__.split(".")[:2])
        name = names[0] if release >= (2, 9) else names[1]  # the first is unknown up to torch 2.8
        os.environ[name] = "expandable_segments:True"


def describe(student, config: TrainConfig, accelerator: Accelerator) -> str:
    """What runs, and where."""
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad) / 1e6
    total = sum(p.numel() for p in student.parameters()) / 1e6
    return (
        f"model: {config.model}, {total:.2f} M parameters, {trained:.2f} M of them trained, on "
        f"{accelerator.device} x {accelerator.num_processes}, mixed precision: "
        f"{accelerator.mixed_precision}"
    )


def start_trackers(accelerator: Accelerator, folder: Path, config: TrainConfig) -> None:
    """Start the tracker, if any, and say what the run is going to do."""
    accelerator.project_configuration.logging_dir = str(folder)
    accelerator.init_trackers("ptdpo", config=asdict(config))
    accelerator.print(
        f"{config.steps} steps of {config.questions} questions x {config.group_size} responses; "
        f"lam {config.lam}, tau {config.tau}, K {config.jsd_k}, lr {config.lr}; log in {folder}"
    )


# ----------------------------------------------------------------------------------- what is logged
def evaluation_row(both: dict) -> dict:
    """The numbers of evaluate_both as the log names them; not one that was not measured."""
    row = {"eval_plain": both["plain"], "eval_hinted": both["hinted"]}
    return {name: value for name, value in row.items() if value is not None}


def rollout_statistics(groups: list[list[Response]], config: TrainConfig) -> dict[str, float]:
    """What the log says of a rollout: shares of its responses, mean reward and length.

    untaught: the question has nothing for the teacher to read. all_failed, informative,
    all_correct: the response belongs to such a group (paper, Eq. 5 and figure 2); in an informative
    one some responses are correct and some fail. The three shares sum to 1.
    """
    responses = [response for group in groups for response in group]
    rewards = torch.tensor([response.reward for response in responses])
    correct = torch.tensor([[response.correct for response in group] for group in groups])
    contexts = [teacher_messages(group[0].question, config.teacher_context) for group in groups]
    sums = {
        "reward": rewards.sum(),
        "accuracy": correct.sum(),
        "all_failed": (~correct).all(1).sum() * config.group_size,
        "informative": (correct.any(1) & ~correct.all(1)).sum() * config.group_size,
        "all_correct": correct.all(1).sum() * config.group_size,
        "tutored": sum(response.tutored for response in responses),
        "untaught": contexts.count(None) * config.group_size,
        "length": sum(len(response.ids) for response in responses),
        "truncated": sum(response.truncated for response in responses),
    }
    return {name: float(value) / len(responses) for name, value in sums.items()}


def sampling_row(looks: list[Look]) -> dict[str, float]:
    """What the log says of the sampler of one process, by its looks.

    busy_slots: the share of slot steps that drew a token of a response.
    """
    tokens = sum(look.tokens for look in looks)
    prefill = sum(look.prefill_seconds for look in looks)
    decode = sum(look.decode_seconds for look in looks)
    return {
        "tokens_per_second": tokens / (prefill + decode),
        "busy_slots": tokens / sum(look.slot_steps for look in looks),
        "prefill_seconds": prefill,
        "decode_seconds": decode,
    }


def group_row(step: int, group: list[Response]) -> dict:
    """One question of a step, with its responses, for responses.jsonl."""
    question = group[0].question
    return {
        "step": step,
        "id": question.id,
        "question": question.text,
        "answer": question.answer,
        "hint": question.hint and asdict(question.hint),
        "responses": [
            {
                "text": response.text,
                "correct": response.correct,
                "reward": round(response.reward, 4),
                "tutored": response.tutored,
                "truncated": response.truncated,
            }
            for response in group
        ],
    }


def print_summary(table: dict, folder: RunFolder, trainer: Trainer) -> None:
    """The table that a run ends with, and on a GPU the memory that it took."""
    before, after = table["before"], table["after"]
    temperature = trainer.config.eval_temperature
    sampling = f"temperature {temperature}" if temperature else "greedy"
    print(f"\n{'':30s}{'before':>9s}{'after':>9s}")
    for label, key, scale, unit in (
        ("accuracy, plain prompt", "plain", 100, "%"),
        ("accuracy, with the hint", "hinted", 100, "%"),
        ("entropy, nats per token", "entropy", 1, ""),
        ("response length, tokens", "length", 1, ""),
    ):
        digits = 2 if key == "entropy" else 1
        numbers = [
            f"{'-':>9s}" if values[key] is None else f"{scale * values[key]:9.{digits}f}"
            for values in (before, after)
        ]
        print(f"{label:30s}{numbers[0]}{numbers[1]} {unit}")
    print(
        f"({before['questions']} held-out questions, {sampling}; entropy of the sampled responses, "
        f"first and last step; {table['seconds'] / 60:.1f} minutes; {trainer.skipped} steps "
        "skipped for a non-finite gradient)"
    )
    print(
        f"\nwritten to {folder.path}/: config.json, metrics.jsonl, responses.jsonl, checkpoints/, "
        "model/. Load the model with\n"
        f'  AutoModelForImageTextToText.from_pretrained("{folder.path}/model")'
        "   # the processor: plumbing.images.load_processor"
    )
    if torch.cuda.is_available():
        accelerator = trainer.accelerator
        gpus = accelerator.num_processes if trainer.sharded else 1
        parts = plan(trainer.config, gpus, accelerator.mixed_precision == "bf16")
        print(
            f"peak memory of this process while updating: {trainer.update_peak / 2**30:.1f} GiB; "
            f"predicted (--plan) at most: {parts['peak']:.1f} GiB"
        )
