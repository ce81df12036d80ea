"""plumbing/models.py: several processes, FSDP."""

import os
import shlex
import subprocess
import sys

import hub
import pytest
import torch
import two_processes
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, assert_close, logged
from transformers import AutoModelForImageTextToText

import train
from rollout import collate, encode_prompts, student_messages
from toy import world

SCRIPT = str(ROOT / "tests" / "two_processes.py")
OPTIONS = shlex.split(
    "--questions 6 --group-size 4 --eval-questions 5 --eval-every 1 --save-every 1 --lr 1e-4"
)

SHORT = shlex.split("--group-size 2 --eval-questions 1 --eval-every 9 --name equal")


def run_script(folder, processes, *args, torchrun=False, script=SCRIPT):
    """tests/two_processes.py, or another script, in `folder`, in so many joined processes."""
    launch = [str(ROOT / "tests" / "forked.py"), str(processes)]
    if torchrun:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launch, script, *args],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def start_two(folder):
    """tests/two_processes.py in two processes."""
    run_script(folder, 2, "out")


def saved_by_two(folder):
    """What tests/two_processes.py has saved."""
    saved = torch.load(folder / "out")
    assert saved["processes"] == 2
    return saved


def assert_weights_close(ours, expected, rtol):
    """Each weight relative to the largest of its own matrix."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert (ours[name] - value).abs().max() <= rtol * value.abs().max(), name


@pytest.mark.beside(program=start_two)
@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(beside):
    """gloo, with other numbers of tutored tokens per process; in case "one" a process has none."""
    both = saved_by_two(beside)["ddp"]
    one = two_processes.gradients(two_processes.make_trainer())
    for case in ("unequal", "one"):
        assert one[case]["parts"]["kl"] > 0
        assert_close(both[case]["grads"], one[case]["grads"], 1e-5)
        assert both[case]["parts"] == pytest.approx(one[case]["parts"], rel=1e-5, abs=1e-9)


@pytest.mark.beside(program=start_two)
@pytest.mark.slow
def test_two_sharded_processes_do_three_steps_as_one_does(beside, tmp_path):
    """FSDP2 over gloo, student and reference sharded.

    One process has nothing to tutor and fewer micro-batches; the other has no image in one of its
    questions. Losses, weights, what the trained student samples, and a checkpoint.
    """
    both = saved_by_two(beside)["fsdp"]
    trainer = two_processes.make_trainer(**two_processes.SHARDED_RUN)
    one = two_processes.sharded_run(trainer, str(tmp_path / "alone"))
    assert not one["sharded"]
    assert both["sharded"] == [4, 4]  # three layers and the root
    for alone, sharded in zip(one["parts"], both["parts"], strict=True):
        assert sharded == pytest.approx(alone, rel=1e-4, abs=1e-6)
    # Adam magnifies noise in small gradients
    assert_weights_close(both["weights"], one["weights"], 1e-4)
    assert both["responses"] == one["responses"]
    assert both["evaluation"] == one["evaluation"]
    assert_same_study(both["study"], one["study"])
    assert both["loaded"]


def assert_same_study(rows, expected):
    assert rows.keys() == expected.keys()
    for name, row in expected.items():
        for context, numbers in row["contexts"].items():
            ours = rows[name]["contexts"][context]
            scores = [numbers.pop("nll"), numbers.pop("kl")]
            assert [ours.pop("nll"), ours.pop("kl")] == pytest.approx(scores, abs=1e-4)
            assert ours == numbers
        assert rows[name]["views"] == row["views"]
    assert len(expected) == 3
    assert sum(bool(row["views"]) for row in expected.values()) == 2


def test_the_committed_fsdp_settings_are_ones_that_accelerate_knows():
    config = load_config_from_file(str(ROOT / "fsdp.yaml"))  # raises on a key it does not know
    assert config.num_processes == 8
    assert config.mixed_precision == "bf16"
    assert config.fsdp_config["fsdp_version"] == 2


# what a GPU run has and the tests above have not
HALF_PRECISION = shlex.split("--precision bf16 --gradient-checkpointing --updates 2 --beta-kl 0.1")


def start_bf16(folder):
    """Two steps in two sharded processes that torchrun starts; three go on for two more."""
    words = ("train", *OPTIONS, *HALF_PRECISION, "--steps", "2", "--name", "sharded")
    run_script(folder, 2, *words, torchrun=True)
    run_script(folder, 3, "train", "--resume", "runs/sharded", "--steps", "4")


@pytest.mark.beside(program=start_bf16)
@pytest.mark.slow
def test_fsdp_bf16_trains_as_one_process_does(beside, tmp_path, monkeypatch, any_precision):
    """accelerate's own policy of mixed precision casts log-probs to bfloat16: the run ended there.

    Two updates on a rollout, vision tower trained, two processes; three go on from their
    checkpoint. The log is that of one process, and the model loads.
    """
    monkeypatch.chdir(tmp_path)
    train.main([*OPTIONS, *HALF_PRECISION, "--steps", "4", "--name", "alone"])
    alone, sharded = tmp_path / "runs" / "alone", beside / "runs" / "sharded"
    assert [row["step"] for row in logged(sharded)] == [0, 1, 2, 3, 4]
    for expected, row in zip(logged(alone)[1:], logged(sharded)[1:], strict=True):
        for name in ("reward", "tutored", "length", "tutor_loss", "entropy", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=0.03), name
    for first_of_rollout in (logged(sharded)[1], logged(sharded)[3]):
        assert first_of_rollout["ratio_max"] < 2e-6, "old log-probs are scored as the update scores"
    assert logged(sharded)[1]["kl"] < 2e-5, "student and reference start equal"
    weights = [
        AutoModelForImageTextToText.from_pretrained(run / "model").state_dict()
        for run in (alone, sharded)
    ]
    largest_change = 4 * 1e-4  # four steps of AdamW; noise decides the sign of small gradients
    for name, value in weights[0].items():
        assert (weights[1][name] - value).abs().mean() <= 0.2 * largest_change, name


@pytest.mark.parametrize("kind", hub.KINDS)
def test_bf16_starts_with_equal_student_and_reference(kind, tmp_path, monkeypatch, any_precision):
    """The reference's weights are bfloat16, the student's float32; all weights differ from 1."""
    monkeypatch.chdir(tmp_path)
    hub.write_checkpoint(tmp_path, kind)
    options = ["--precision", "bf16", "--beta-kl", "0.1", "--steps", "1", "--updates", "1"]
    train.main(["--model", ".", *options, "--questions", "2", "--max-new-tokens", "12", *SHORT])
    assert 0 <= logged(tmp_path / "runs" / "equal")[1]["kl"] < 1e-10


def test_responses_of_one_token_take_as_many_passes_as_others(base):
    """Sharded, each pass gathers weights: with fewer of them a process leaves the others behind."""
    model, processor = base
    question = world.to_question(world.make_puzzle("tune", 0))
    [prompt] = encode_prompts(processor, [question], [student_messages(question)])
    passes = []
    hook = model.model.register_forward_hook(lambda *call: passes.append(1))
    counts, logp = [], []
    for responses in ([[9], [12]], [[9], [12, 13, 14]]):
        batch = collate([prompt, prompt], responses, processor.tokenizer.pad_token_id)
        with torch.no_grad():
            logp.append(train.token_scores(model, batch)[0][:, 0])
        counts.append(len(passes))
        passes.clear()
    hook.remove()
    assert counts[0] == counts[1]
    assert torch.allclose(*logp, atol=1e-5)


def start_check(folder):
    """--check in two sharded processes: it raises where the exit code is not 0."""
    run_script(folder, 2, "train", "--check", *HALF_PRECISION, "--group-size", "2")


@pytest.mark.beside(program=start_check)
@pytest.mark.slow
def test_fsdp_check_in_bf16_passes(beside):
    """--check collects norms of sharded gradients; its bounds hold in bfloat16."""
    assert not (beside / "runs").exists()
