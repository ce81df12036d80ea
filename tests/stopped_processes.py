"""Run by test_stopping.py under torchrun: two processes, and a signal for one of them alone.

python tests/stopped_processes.py ddp|fsdp   writes report-RANK.json, and a run in runs/two
"""

import json
import os
import shlex
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from two_processes import make_trainer, responses_of_step, sharding_accelerator

import train
from plumbing import engine, runs
from plumbing.stopping import Stopped
from toy import world

RUN = shlex.split(
    "--steps 4 --questions 4 --group-size 4 --eval-questions 4 --save-every 4 --name two"
)


def stopped_while_scoring(trainer, process: int, at: int) -> list:
    """Score micro-batches of unequal numbers; one process gets SIGTERM during number `at`.

    Returns the number of micro-batches, how many were scored, and whether Stopped came.
    """
    responses = responses_of_step(trainer, 1)
    count, scored, is_stopped = len(trainer.micro_batches(responses)), [], False
    scores_of = trainer.loss

    def loss(batch):
        scored.append(len(batch))
        if trainer.accelerator.process_index == process and len(scored) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return scores_of(batch)

    trainer.loss = loss
    try:
        trainer.score(responses)
        trainer.stop_if_asked()  # the next step's first micro-batch
    except Stopped:
        is_stopped = True
    trainer.loss = scores_of
    trainer.signals.number = 0
    trainer.optimizer.zero_grad()
    return [count, len(scored), is_stopped]


def signal_while_sampling(call: int) -> None:
    """Process 1 gets SIGTERM after its first token in the given call of the sampler."""
    calls, sample_groups = [], engine.sample_groups

    def watched(*args, watch, **settings):
        calls.append(True)

        def noted(look):
            if len(calls) == call and look.tokens and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            watch(look)

        return sample_groups(*args, watch=noted, **settings)

    engine.sample_groups = watched


def timeout_seconds() -> float:
    """How long torch.distributed lets one process wait for another."""
    group = torch.distributed.group.WORLD
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def main(sharded: bool) -> None:
    runs.Accelerator = sharding_accelerator if sharded else partial(Accelerator, cpu=True)
    runs.make_accelerator(train.TrainConfig())  # it starts torch.distributed
    trainer = make_trainer(sharded, micro_tokens=90)
    with trainer.signals.noted(prints=False):
        scored = [stopped_while_scoring(trainer, 1, at=1), stopped_while_scoring(trainer, 0, at=6)]
    questions = world.puzzles("tune", 2)  # the models are of use after a stop
    evaluation = trainer.evaluate(questions)
    report = {"scored": scored, "questions": evaluation["questions"], "code": 0}
    report["timeout"] = timeout_seconds()
    signal_while_sampling(call=5)  # after two evaluations and two rollouts
    try:
        train.main(RUN)
    except SystemExit as stop:
        report["code"] = stop.code
    Path(f"report-{os.environ['RANK']}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sharded=sys.argv[1] == "fsdp")
