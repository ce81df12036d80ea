"""Run by test_train.py, alone and under torchrun: the gradient of one step over fixed responses, saved by the main process.

python tests/two_processes.py OUT [fsdp]            cases: unequal (both processes tutor), one (only process 0 does)
python tests/two_processes.py train OPTIONS         train.py with FSDP2 on a CPU
"""

import os
import sys
from pathlib import Path

import torch
import yaml  # accelerate needs it

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import accelerate  # noqa: E402
from accelerate import Accelerator, FullyShardedDataParallelPlugin  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402

import train  # noqa: E402
from hints import teacher_messages  # noqa: E402
from plumbing.images import load_processor  # noqa: E402
from ptdpo import PTDPOConfig  # noqa: E402
from rollout import Rollout, encode_prompts, student_messages  # noqa: E402
from toy import world  # noqa: E402

TUTORED = {
    "unequal": {0: 4, 1: 1, 2: 2, 3: 0},
    "one": {0: 3, 1: 0, 2: 1, 3: 0},
}  # question -> tutored responses; process = question % 2


def sharding_accelerator(*args, **settings) -> Accelerator:
    """On a CPU accelerate would fall back from FSDP to DDP. Shards in one process too."""
    accelerator = Accelerator(*args, **{"cpu": True, **settings})
    for state in (
        accelerator.state,
        accelerate.PartialState(),
    ):  # each new AcceleratorState copies the second one over the first
        state.distributed_type = DistributedType.FSDP
    config = yaml.safe_load((Path(train.__file__).parent / "fsdp.yaml").read_text())["fsdp_config"]
    names = (
        "auto_wrap_policy",
        "reshard_after_forward",
        "state_dict_type",
        "cpu_ram_efficient_loading",
    )
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=config["fsdp_version"], **{name: config[f"fsdp_{name}"] for name in names}
    )
    return accelerator


def make_trainer(fsdp: bool = False, **settings):
    torch.set_num_threads(1)
    config = train.TrainConfig(**{"micro_tokens": 200, **settings})
    accelerator = (
        sharding_accelerator if fsdp and int(os.environ.get("WORLD_SIZE", 1)) > 1 else Accelerator
    )(cpu=True)
    return train.Trainer(
        config,
        PTDPOConfig(lam=2.0, beta_kl=0.1, jsd_k=7),
        accelerator,
        load_processor(config.model),
        *train.build(config, accelerator),
    )


def make_work(trainer, case: str, questions) -> list:
    """Four questions with four responses each; the same in every process."""
    work = []
    for q in questions:
        generator = torch.Generator().manual_seed(q)
        sample = world.to_question(world.make_puzzle("tune", q))
        plain, hinted = (
            encode_prompts(trainer.processor, [sample], [chat(sample)])[0]
            for chat in (student_messages, teacher_messages)
        )
        count = TUTORED[case][q]
        for g in range(4):
            length = int(torch.randint(3, 12, (), generator=generator))
            ids = torch.randint(9, 90, (length,), generator=generator).tolist()
            advantage = float(torch.randn((), generator=generator))
            work.append(
                train.Work(
                    Rollout(sample, ids, "", False),
                    plain,
                    hinted,
                    advantage,
                    tutored=g < count,
                    kl=count == 0,
                )
            )
    return work


def sharded_run(trainer, out: str) -> None:
    """Three optimizer steps over fixed responses, a checkpoint, and what the trained student samples."""
    accelerator = trainer.accelerator
    rank, world_size = accelerator.process_index, accelerator.num_processes
    parts = []
    for step in range(3):
        work = make_work(trainer, "one", range(rank, 4, world_size))
        if rank == 1:
            work = (
                work[:-4] + work[-4:][:1] if step else work
            )  # fewer micro-batches than the other has
        elif world_size == 1 and step:
            work = work[:-3]  # the same responses
        parts.append(trainer.update(work))
    samples = world.puzzles("tune", 4)
    samples[2].images, samples[2].text = (
        [],
        "How many points ?",
    )  # a question without an image beside one that has one
    groups, _ = trainer.rollout(samples[rank::world_size])
    texts = accelerate.utils.gather_object(
        [(w.rollout.sample.id, w.rollout.text) for group in groups for w in group]
    )
    evaluation = train.evaluate(trainer, samples[:3])  # an odd number: one process has more
    weights = accelerator.get_state_dict(trainer.student)
    accelerator.save_state(f"{out}-checkpoint")
    for p in trainer.student.parameters():
        p.data.zero_()
    accelerator.load_state(f"{out}-checkpoint")
    again = accelerator.get_state_dict(trainer.student)
    if accelerator.is_main_process:
        sharded = (
            [
                sum(isinstance(m, FSDPModule) for m in scorer.modules())
                for scorer in (trainer.student, trainer.reference)
            ]
            if world_size > 1
            else []
        )
        torch.save(
            {
                "parts": parts,
                "weights": weights,
                "responses": sorted(texts),
                "processes": world_size,
                "sharded": sharded,
                "evaluation": {k: sorted(v) if k == "right" else v for k, v in evaluation.items()},
                "loaded": all(torch.equal(again[name], weights[name]) for name in weights),
            },
            out,
        )


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train.Accelerator = sharding_accelerator
        train.main(sys.argv[2:])
        sys.exit()
    out, *fsdp = sys.argv[1:]
    trainer = make_trainer(
        bool(fsdp),
        **({"lr": 1e-4, "warmup": 0, "group_size": 2, "max_new_tokens": 30} if fsdp else {}),
    )
    rank, world_size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    if fsdp:
        sharded_run(trainer, out)
    else:
        saved = {"processes": world_size}
        for case in TUTORED:
            parts = trainer.accumulate(make_work(trainer, case, range(rank, 4, world_size)))
            saved[case] = {
                "grads": {
                    name: p.grad.clone()
                    for name, p in trainer.policy.named_parameters()
                    if p.grad is not None
                },
                "parts": parts,
            }
            trainer.optimizer.zero_grad()
        if trainer.accelerator.is_main_process:
            torch.save(saved, out)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
