"""Run by test_models.py in several processes; the main one saves what came out.

tests/two_processes.py OUT            "ddp": the gradient of one step over fixed responses; "fsdp":
                                      three steps, a checkpoint and samples, sharded
tests/two_processes.py train OPTIONS  train.py with FSDP2 on a CPU
"""

import os
import sys
from types import SimpleNamespace

import accelerate
import torch
import yaml  # accelerate needs it
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import ROOT, flat, gradient, rollout  # it puts the repository's root on the path
from torch.distributed.fsdp import FSDPModule

import train
from hints import teacher_messages
from plumbing import runs, study
from plumbing.images import load_processor
from plumbing.models import build
from rollout import Response, encode_prompts, student_messages
from toy import world

# question -> tutored responses; question q belongs to process q % 2. unequal: both processes tutor;
# one: only process 0 does
TUTORED = {"unequal": {0: 4, 1: 1, 2: 2, 3: 0}, "one": {0: 3, 1: 0, 2: 1, 3: 0}}
SHARDED_RUN = {"lr": 1e-4, "warmup": 0, "group_size": 2, "max_new_tokens": 30}


def sharding_accelerator(*args, **settings) -> Accelerator:
    """What accelerate makes of fsdp.yaml on a GPU. Shards in one process too.

    On a CPU it would fall back from FSDP to DDP. Its policy of mixed precision is set as its
    AcceleratorState does.
    """
    accelerator = Accelerator(*args, **{"cpu": True, **settings})
    # both, as each new AcceleratorState copies the second one over the first
    for state in (accelerator.state, accelerate.PartialState()):
        state.distributed_type = DistributedType.FSDP
    config = yaml.safe_load((ROOT / "fsdp.yaml").read_text())["fsdp_config"]
    names = (
        "auto_wrap_policy",
        "reshard_after_forward",
        "state_dict_type",
        "cpu_ram_efficient_loading",
    )
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=config["fsdp_version"], **{name: config[f"fsdp_{name}"] for name in names}
    )
    if accelerator.mixed_precision != "no":
        accelerator.state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    return accelerator


def make_trainer(fsdp: bool = False, **settings) -> train.Trainer:
    """A trainer of the embedded model, with micro-batches of a few responses."""
    torch.set_num_threads(1)
    method = {"lam": 2.0, "beta_kl": 0.1, "jsd_k": 7}
    config = train.TrainConfig(**{"micro_tokens": 200, **method, **settings})
    sharded = fsdp and int(os.environ.get("WORLD_SIZE", 1)) > 1
    precision = "bf16" if config.precision == "bf16" else "no"
    make_accelerator = sharding_accelerator if sharded else Accelerator
    accelerator = make_accelerator(cpu=True, mixed_precision=precision)
    student, reference = build(config, accelerator)
    processor = load_processor(config.model)
    return train.Trainer(config, accelerator, processor, student, reference)


def move_student(trainer) -> None:
    """Adds noise to the weights, the same in every process.

    A student that equals the reference has a KL penalty of 0, with gradient 0.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


# ---------------------------------------------------------------------------------- fixed responses
def make_groups(trainer, case: str, questions) -> list[list[Response]]:
    """Four random responses per question, not yet weighed; the same in every process."""
    return [make_group(trainer, q, tutored=TUTORED[case][q]) for q in questions]


def make_group(trainer, number: int, tutored: int) -> list[Response]:
    """Four responses to puzzle `number`; the first `tutored` of them are tutored."""
    generator = torch.Generator().manual_seed(number)
    question = world.to_question(world.make_puzzle("tune", number))
    chats = [student_messages(question), teacher_messages(question)]
    plain, hinted = encode_prompts(trainer.processor, [question] * 2, chats)
    group = []
    for g in range(4):
        length = int(torch.randint(3, 12, (), generator=generator))
        ids = torch.randint(9, 90, (length,), generator=generator).tolist()
        response = Response(plain, ids, text="", truncated=False, teacher_prompt=hinted)
        response.advantage = float(torch.randn((), generator=generator))
        response.tutored = g < tutored
        group.append(response)
    return group


def score(trainer, groups: list[list[Response]]) -> dict:
    """Phase 5, of groups that are an optimizer step of their own: weigh them, then score."""
    trainer.weigh(groups)
    return trainer.score(flat(groups))


def update(trainer, groups: list[list[Response]]) -> dict:
    """`score`, then phase 6."""
    return score(trainer, groups) | trainer.step()


# ------------------------------------------------------------------------------ what comes out, OUT
def gradients(trainer) -> dict:
    """Gradient and loss parts of one step over each case's responses."""
    rank, world_size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    saved = {}
    move_student(trainer)
    for case in TUTORED:
        parts = score(trainer, make_groups(trainer, case, range(rank, 4, world_size)))
        saved[case] = {"grads": gradient(trainer), "parts": parts}
        trainer.optimizer.zero_grad()
    return saved


def sharded_run(trainer, out: str) -> dict:
    """Three optimizer steps, what the student samples then, its evaluation, a checkpoint."""
    accelerator = trainer.accelerator
    rank, world_size = accelerator.process_index, accelerator.num_processes
    parts = [trainer.score(responses_of_step(trainer, step)) | trainer.step() for step in range(3)]
    questions = world.puzzles("tune", 4)
    # a question without an image beside one that has one
    questions[2].images, questions[2].text = [], "How many points ?"
    groups = rollout(trainer, questions[rank::world_size])
    texts = [(r.question.id, r.text) for group in groups for r in group]
    texts = accelerate.utils.gather_object(texts)
    rows = study_rows(trainer)
    evaluation = trainer.evaluate(questions[:3])  # an odd number: one process has more
    evaluation["right"].sort()
    models = (trainer.student, trainer.reference) if world_size > 1 else ()
    weights, loaded = save_and_load(trainer, f"{out}-checkpoint")
    return {
        "parts": parts,
        "weights": weights,
        "loaded": loaded,
        "responses": sorted(texts),
        "evaluation": evaluation,
        "study": rows,
        "sharded": [sum(isinstance(m, FSDPModule) for m in model.modules()) for model in models],
    }


def study_rows(trainer) -> dict[str, dict]:
    """A study of three questions, which is an odd number; one has no hint."""
    trainer.config.study_samples = 2
    questions = world.puzzles("tune", 3)
    questions[1].hint = None
    rows = {}
    study.ask_the_rest(trainer, questions, rows, SimpleNamespace(append=lambda *row: None))
    return rows


def responses_of_step(trainer, step: int) -> list[Response]:
    """Those of the case "one", weighed; after the first step question 3 has one, not four.

    So process 1 has fewer micro-batches than process 0. One process alone gets the same responses.
    """
    rank, world_size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    groups = make_groups(trainer, "one", range(rank, 4, world_size))
    has_question_3 = rank == world_size - 1
    if step and has_question_3:
        for response in groups[-1][1:]:
            response.in_loss = False
    trainer.weigh(groups)  # whole groups; what is left out counts nothing, and can go only now
    return [response for response in flat(groups) if response.in_loss]


def save_and_load(trainer, folder: str) -> tuple[dict, bool]:
    """The student's weights, and whether a checkpoint brings them back once they are zeroed."""
    accelerator = trainer.accelerator
    weights = accelerator.get_state_dict(trainer.student)
    accelerator.save_state(folder)
    for parameter in trainer.student.parameters():
        parameter.data.zero_()
    accelerator.load_state(folder)
    again = accelerator.get_state_dict(trainer.student)
    return weights, all(torch.equal(again[name], weights[name]) for name in weights)


def main(out: str) -> None:
    saved = {"ddp": gradients(make_trainer())}
    AcceleratorState._reset_state(reset_partial_state=True)  # the next trainer is sharded
    trainer = make_trainer(fsdp=True, **SHARDED_RUN)
    accelerator = trainer.accelerator
    saved |= {"fsdp": sharded_run(trainer, out), "processes": accelerator.num_processes}
    if accelerator.is_main_process:
        torch.save(saved, out)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    if sys.argv[1] == "train":
        runs.Accelerator = sharding_accelerator
        train.main(sys.argv[2:])
    else:
        main(sys.argv[1])
