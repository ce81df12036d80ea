"""plumbing/runs.py: what a run leaves behind, checkpoints, resuming."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, logged

import train

LONGER = [
    "--steps",
    "8",
    "--questions",
    "2",
    "--group-size",
    "4",
    "--eval-questions",
    "4",
    "--eval-every",
    "3",
    "--save-every",
    "2",
]


def start(folder, *args):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, os.path.join(os.path.dirname(train.__file__), "train.py"), *args],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys):
    """SIGKILL at a random moment, SIGTERM in the resumed run, resumed again: the same metrics and weights, bit for bit, as a run left alone."""
    whole, broken = tmp_path / "runs" / "whole", tmp_path / "runs" / "broken"
    monkeypatch.chdir(tmp_path)
    train.main([*LONGER, "--name", "whole"])
    seed = random.randrange(10**6)
    process, log = start(tmp_path, *LONGER, "--name", "broken"), broken / "metrics.jsonl"
    wait_for(process, (broken / "checkpoints" / "step-00000002").is_dir)
    time.sleep(random.Random(seed).random() / 3)
    process.kill()
    process.wait()
    last, old = (
        max(int(p.name[5:]) for p in (broken / "checkpoints").glob("step-????????")),
        log.stat().st_ino,
    )
    process = start(tmp_path, "--resume", "runs/broken")
    wait_for(
        process, lambda: log.stat().st_ino != old and logged(broken)[-1]["step"] > last
    )  # resuming writes the log anew
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    if process.returncode == 143:  # 0: the last step was over before the signal came
        assert "stopped by SIGTERM after step" in out and "--resume runs/broken" in out
        done = logged(broken)[-1]["step"]
        assert (broken / "checkpoints" / f"step-{done:08d}").is_dir() and not (
            broken / "model"
        ).exists()
        last = start(tmp_path, "--resume", "runs/broken")
        out, err = last.communicate()
        assert (
            last.returncode == 0 and f"going on from runs/broken/checkpoints/step-{done:08d}" in out
        ), err
    else:
        assert process.returncode == 0, err
    assert logged(broken) == logged(whole), seed
    assert (broken / "responses.jsonl").read_text() == (whole / "responses.jsonl").read_text()
    for name in (
        "model/model.safetensors",
        "checkpoints/step-00000008/model.safetensors",
        "checkpoints/step-00000008/optimizer.bin",
    ):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), (seed, name)
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000008",
    ]  # --keep 2
    assert "has done all 8 steps; give a larger --steps" in refuse(capsys, "--resume", "runs/whole")


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run of two steps, in a folder to go on from."""
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--name", "t", "--save-every", "1"])
    return tmp_path / "runs" / "t"


def refuse(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(list(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1, error
    return error


def test_a_checkpoint_that_is_not_whole_or_not_ours_is_refused_by_name(finished, capsys):
    again = ["--resume", "runs/t", "--steps", "3"]
    newest = finished / "checkpoints" / "step-00000002"
    weights = (newest / "optimizer.bin").read_bytes()
    (newest / "optimizer.bin").write_bytes(weights[:-1])
    assert "step-00000002 is not whole: optimizer.bin is missing or has another size" in refuse(
        capsys, *again
    )
    (newest / "optimizer.bin").write_bytes(weights)
    state = (newest / "state.json").read_text()
    (newest / "state.json").write_text(state[:40])
    assert "step-00000002 is not a checkpoint of ptdpo" in refuse(capsys, *again)
    (newest / "state.json").write_text(state)
    (
        finished / "checkpoints" / "step-00000009.part"
    ).mkdir()  # what a kill while saving leaves: not looked at
    assert "--lr cannot stand beside --resume" in refuse(capsys, *again, "--lr", "1")
    assert "no config.json of a run of this version" in refuse(capsys, "--resume", "runs")
    for path in sorted(newest.parent.iterdir()):
        path.rename(finished / path.name)
    assert "no checkpoint in" in refuse(capsys, *again)


def test_other_data_than_the_run_s_own_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": str(i), "question": "How many?", "answer": "7"} for i in range(4)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train.main([*TINY, "--name", "t", "--data", "d.jsonl"])
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    assert "are not those that" in refuse(capsys, "--resume", "runs/t", "--steps", "3")


def test_a_full_disk_ends_the_run_and_spares_the_last_checkpoint(finished, monkeypatch, capsys):
    before = {
        p: p.read_bytes() for p in sorted((finished / "checkpoints" / "step-00000002").iterdir())
    }

    def full(self, folder):
        (Path(folder) / "optimizer.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.Accelerator, "save_state", full)
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "runs/t", "--steps", "4"])
    assert (
        "No space left on device" in stop.value.code
        and "last good one is runs/t/checkpoints/step-00000002" in stop.value.code
    )
    assert {p: p.read_bytes() for p in before} == before
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert "wandb is not installed; python -m pip install wandb" in refuse(
        capsys, "--log-with", "wandb"
    )
    assert "peft is not installed; python -m pip install peft" in refuse(capsys, "--lora", "4")
