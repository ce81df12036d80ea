"""plumbing/models.py: several processes, FSDP."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import assert_close, logged
from transformers import AutoModelForImageTextToText

import train


def alone_and_in_two(root, tmp_path, *args):
    """What tests/two_processes.py saves: run alone, and by torchrun in two processes."""
    script, env = (
        str(root / "tests" / "two_processes.py"),
        {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    for name, start in (("a", [sys.executable]), ("b", launch)):
        done = subprocess.run(
            [*start, script, str(tmp_path / name), *args],
            env=env,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = torch.load(tmp_path / "a"), torch.load(tmp_path / "b")
    assert (one["processes"], two["processes"]) == (1, 2)
    return one, two


def test_two_processes_give_the_gradient_of_one(root, tmp_path):
    """gloo, two processes with different numbers of tutored tokens; in case "one" a process has none."""
    one, two = alone_and_in_two(root, tmp_path)
    for case in ("unequal", "one"):
        assert_close(two[case]["grads"], one[case]["grads"], 1e-5)
        for name, value in one[case]["parts"].items():
            assert two[case]["parts"][name] == pytest.approx(value, rel=1e-5, abs=1e-9)


def test_two_sharded_processes_do_three_steps_as_one_does(root, tmp_path):
    """FSDP2 over gloo, student and reference sharded; a process has nothing to tutor and fewer micro-batches, the other no image in one of
    its questions. Losses, weights, the responses that the result samples, and a checkpoint that was written and loaded."""
    one, two = alone_and_in_two(root, tmp_path, "fsdp")
    assert not one["sharded"] and two["sharded"] == [4, 4]  # three layers and the root
    for alone, sharded in zip(one["parts"], two["parts"]):
        for name, value in alone.items():
            assert sharded[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert one["weights"].keys() == two["weights"].keys()
    for name, value in one["weights"].items():
        assert (two["weights"][name] - value).abs().max() <= 1e-4 * value.abs().max(), (
            name
        )  # Adam magnifies noise in small gradients
    assert two["responses"] == one["responses"] and two["evaluation"] == one["evaluation"]
    assert two["loaded"]


def test_the_committed_fsdp_settings_are_ones_that_accelerate_knows(root):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(root / "fsdp.yaml"))  # raises on a key it does not know
    assert (config.num_processes, config.mixed_precision, config.fsdp_config["fsdp_version"]) == (
        8,
        "bf16",
        2,
    )


def test_a_sharded_run_goes_on_with_another_number_of_processes(root, tmp_path, monkeypatch):
    """train.py with FSDP2 in two processes, resumed in three: the log of one process on the same questions, and a model that loads."""
    options = [
        "--questions",
        "6",
        "--group-size",
        "4",
        "--eval-questions",
        "5",
        "--eval-every",
        "1",
        "--save-every",
        "1",
        "--lr",
        "1e-4",
    ]
    monkeypatch.chdir(tmp_path)
    train.main([*options, "--steps", "3", "--name", "alone"])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for processes, more in (
        (2, [*options, "--steps", "2", "--name", "sharded"]),
        (3, ["--resume", "runs/sharded", "--steps", "3"]),
    ):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(processes),
                str(root / "tests" / "two_processes.py"),
                "train",
                *more,
            ],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, several = logged(tmp_path / "runs" / "alone"), logged(tmp_path / "runs" / "sharded")
    for row, other in zip(one, several, strict=True):
        # the run of two steps ended with an evaluation with the hint, which the one of three does not have there
        assert {k: v for k, v in other.items() if k in row} == pytest.approx(
            row, rel=1e-3, abs=1e-5
        )
    weights = [
        AutoModelForImageTextToText.from_pretrained(tmp_path / "runs" / name / "model").state_dict()
        for name in ("alone", "sharded")
    ]
    for name, value in weights[0].items():
        assert (weights[1][name] - value).abs().max() <= 1e-3 * value.abs().max(), name
