"""Run by test_train.py, alone and under torchrun: the gradient of one step over fixed responses, saved by the main process.

    python tests/two_processes.py OUT CASE        CASE: unequal (both processes tutor), one (only process 0 does)
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from accelerate import Accelerator  # noqa: E402

import train  # noqa: E402
from hints import hinted_messages  # noqa: E402
from ptdpo import PTDPOConfig  # noqa: E402
from rollout import Rollout, encode_prompts, plain_messages  # noqa: E402
from toy import world  # noqa: E402

TUTORED = {"unequal": {0: 4, 1: 1, 2: 2, 3: 0}, "one": {0: 3, 1: 0, 2: 1, 3: 0}}     # question -> tutored responses; process = question % 2


def make_trainer(**settings):
    torch.set_num_threads(1)
    cfg = train.TrainConfig(**{"micro_batch": 3, **settings})
    accelerator = Accelerator(cpu=True)
    return train.Trainer(cfg, PTDPOConfig(lam=2.0, beta_kl=0.1, k=7), accelerator, *train.build(cfg, accelerator))


def make_work(trainer, case: str, questions) -> list:
    """Four questions with four responses each; the same in every process."""
    work = []
    for q in questions:
        generator = torch.Generator().manual_seed(q)
        sample = world.sample(world.make_puzzle("tune", q))
        plain, hinted = (encode_prompts(trainer.processor, [sample], [chat(sample)])[0] for chat in (plain_messages, hinted_messages))
        count = TUTORED[case][q]
        for g in range(4):
            length = int(torch.randint(3, 12, (), generator=generator))
            ids = torch.randint(9, 90, (length,), generator=generator).tolist()
            advantage = float(torch.randn((), generator=generator))
            work.append(train.Work(Rollout(sample, ids, "", False), plain, hinted, advantage, tutored=g < count, kl=count == 0))
    return work


if __name__ == "__main__":
    out, case = sys.argv[1:]
    trainer = make_trainer()
    rank, world_size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    parts = trainer.accumulate(make_work(trainer, case, range(rank, 4, world_size)))
    if trainer.accelerator.is_main_process:
        grads = {name: p.grad for name, p in trainer.policy.named_parameters()}
        torch.save({"grads": grads, "parts": parts, "processes": world_size}, out)
    trainer.accelerator.end_training()
