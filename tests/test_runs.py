"""plumbing/runs.py: what a run leaves behind, checkpoints, resuming."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, logged, write_jsonl
from safetensors import SafetensorError

import train
from plumbing import runs, settings

LONGER = shlex.split(
    "--steps 8 --questions 2 --group-size 4 --eval-questions 4 --eval-every 3 --save-every 2"
)


# ------------------------------------------------------------------------------- killed and resumed
def start(folder, *args):
    """train.py in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(process, condition):
    """Until the condition holds; the process must still run then."""
    while process.poll() is None and not condition():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


def finished_checkpoints(run):
    """Their folders, oldest first."""
    return sorted((run / "checkpoints").glob("step-????????"))


def kill_a_new_run(folder, run, delay):
    """SIGKILL `delay` seconds after the first checkpoint."""
    process = start(folder, *LONGER, "--name", run.name)
    wait_for(process, (run / "checkpoints" / "step-00000002").is_dir)
    time.sleep(delay)
    process.kill()
    process.wait()


def terminate_resumed_run(folder, run):
    """SIGTERM in the run that goes on, after its first step. Returns exit code, output, errors."""
    last = int(finished_checkpoints(run)[-1].name.removeprefix("step-"))
    log = run / "metrics.jsonl"
    killed_log = log.stat().st_ino
    process = start(folder, "--resume", f"runs/{run.name}")

    def has_gone_on():
        rewritten = log.stat().st_ino != killed_log  # resuming writes the log anew
        return rewritten and logged(run)[-1]["step"] > last

    wait_for(process, has_gone_on)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys):
    """SIGKILL at a random moment, SIGTERM in the resumed run, resumed again.

    Metrics and weights are those of a run left alone, bit for bit.
    """
    monkeypatch.chdir(tmp_path)
    whole, broken = tmp_path / "runs" / "whole", tmp_path / "runs" / "broken"
    train.main([*LONGER, "--name", "whole"])
    seed = random.randrange(10**6)
    kill_a_new_run(tmp_path, broken, delay=random.Random(seed).random() / 3)
    code, out, err = terminate_resumed_run(tmp_path, broken)
    assert code in (0, 143), err  # 0: the last step was over before the signal came
    if code == 143:
        assert "stopped by SIGTERM after step" in out
        assert "--resume runs/broken" in out
        done = logged(broken)[-1]["step"]
        assert (broken / "checkpoints" / f"step-{done:08d}").is_dir()
        assert not (broken / "model").exists()
        train.main(["--resume", "runs/broken"])
        out = capsys.readouterr().out
        assert f"going on from runs/broken/checkpoints/step-{done:08d}" in out
    assert_same_run(broken, whole, seed)
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == [
        "step-00000006",
        "step-00000008",
    ]  # --keep 2
    error = refuse(capsys, "--resume", "runs/whole")
    assert "has done all 8 steps; give a larger --steps" in error


def assert_same_run(run, expected, seed):
    """Bit for bit, but for the seconds. seed: of the moment of the kill, for the message."""
    assert logged(run) == logged(expected), seed
    for name in (
        "responses.jsonl",
        "model/model.safetensors",
        "checkpoints/step-00000008/model.safetensors",
        "checkpoints/step-00000008/optimizer.bin",
    ):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), (seed, name)


# ---------------------------------------------------------------------------------- what is refused
@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("two_steps")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*TINY, "--name", "t", "--save-every", "1"])
    return folder / "runs" / "t"


@pytest.fixture
def finished(two_steps, tmp_path, monkeypatch):
    """A copy of it to go on from, and the folder to do so in."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(two_steps, tmp_path / "runs" / "t")


def refuse(capsys, *argv):
    """The message of a command that is refused: one line, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(list(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1, error
    return error


AGAIN = ("--resume", "runs/t", "--steps", "3")


def test_a_checkpoint_that_is_not_whole_is_refused(finished, capsys):
    optimizer = finished / "checkpoints" / "step-00000002" / "optimizer.bin"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    error = refuse(capsys, *AGAIN)
    assert "step-00000002 is not whole: optimizer.bin is missing or has another size" in error


def test_a_checkpoint_that_is_not_ours_is_refused(finished, capsys):
    state = finished / "checkpoints" / "step-00000002" / "state.json"
    state.write_text(state.read_text()[:40])
    assert "step-00000002 is not a checkpoint of ptdpo" in refuse(capsys, *AGAIN)


def test_options_beside_resume_are_refused(finished, capsys):
    assert "--lr cannot stand beside --resume" in refuse(capsys, *AGAIN, "--lr", "1")


def test_a_folder_without_a_run_or_a_checkpoint_is_refused(finished, capsys):
    error = refuse(capsys, "--resume", "runs")
    assert "no config.json of a run of this version" in error
    # what a kill while saving leaves: it is not looked at
    (finished / "checkpoints" / "step-00000009.part").mkdir()
    for path in finished_checkpoints(finished):
        path.rename(finished / path.name)
    assert "no checkpoint in" in refuse(capsys, *AGAIN)


def test_other_data_than_the_run_s_own_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": str(i), "question": "How many?", "answer": "7"} for i in range(4)]
    write_jsonl(tmp_path / "d.jsonl", rows)
    train.main([*TINY, "--name", "t", "--data", "d.jsonl"])
    write_jsonl(tmp_path / "d.jsonl", rows[1:])
    assert "are not those that" in refuse(capsys, *AGAIN)


def test_the_model_of_an_earlier_end_does_not_pass_for_the_last_one(finished, capsys):
    """Killed between the last checkpoint and the model, the run would end with the old weights."""
    old = (finished / "model" / "model.safetensors").read_bytes()
    folder = runs.RunFolder(finished, {"steps": 3}, True, {"step": 2})
    assert (finished / "model-2" / "model.safetensors").read_bytes() == old
    assert not (finished / "model").exists()
    folder.lock.close()
    (finished / "model").mkdir()
    runs.RunFolder(finished, {"steps": 3}, True, {"step": 3})
    assert (finished / "model").exists()


def test_a_folder_that_another_process_writes_is_left_alone(finished):
    holds = "import fcntl,sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    holds += "; print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holds, str(finished / "lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    log = (finished / "metrics.jsonl").read_bytes()
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SystemExit) as stop:
            train.main(list(AGAIN))
        other.stdin.close()
    assert stop.value.code == "runs/t is in use by another process"
    assert (finished / "metrics.jsonl").read_bytes() == log


def test_a_full_disk_at_the_start_leaves_the_name_free(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_beside", full)
    with pytest.raises(SystemExit) as stop:
        runs.RunFolder(tmp_path / "t", {"steps": 1}, True)
    assert stop.value.code.startswith(f"cannot write the run's folder {tmp_path / 't'}: ")
    assert not (tmp_path / "t").exists()


def test_a_stop_in_the_last_evaluation_is_over_once_it_is_made_up_for(finished, capsys):
    """The state of the checkpoint says so: else each further --resume evaluated again."""
    file = finished / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(file.read_text())
    del state["summary"]
    file.write_text(json.dumps({**state, "unlogged": logged(finished)[2]}))
    shutil.rmtree(finished / "model")
    train.main(["--resume", "runs/t"])
    assert [row["step"] for row in logged(finished)] == [0, 1, 2]
    assert "has done all 2 steps" in refuse(capsys, "--resume", "runs/t")


def test_a_name_with_a_space_is_quoted():
    assert runs.resume_command(Path("runs/my run")) == "python train.py --resume 'runs/my run'"


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_full_disk_ends_the_run_and_spares_the_last_checkpoint(finished, monkeypatch, error):
    last = finished / "checkpoints" / "step-00000002"
    before = {path: path.read_bytes() for path in sorted(last.iterdir())}

    def full(self, folder):
        (Path(folder) / "optimizer.bin").write_bytes(b"half")
        raise error("No space left on device")

    monkeypatch.setattr(runs.Accelerator, "save_state", full)
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "runs/t", "--steps", "4"])
    assert "No space left on device" in stop.value.code
    assert "last good one is runs/t/checkpoints/step-00000002" in stop.value.code
    assert {path: path.read_bytes() for path in before} == before
    names = [path.name for path in sorted((finished / "checkpoints").iterdir())]
    assert names == ["step-00000001", "step-00000002"]


def test_a_full_disk_ends_the_run_at_a_log(finished, monkeypatch):
    """Here the log cannot be opened, in the place of a disk without room."""
    (finished / "responses.jsonl").unlink()
    (finished / "responses.jsonl").mkdir()
    monkeypatch.setattr(runs, "cut_log", lambda log, step: None)
    with pytest.raises(SystemExit) as stop:
        train.main(list(AGAIN))
    assert stop.value.code.startswith("cannot write runs/t/responses.jsonl: ")
    assert "\n" not in stop.value.code


@pytest.mark.slow
def test_a_run_that_could_not_write_its_model_writes_it_when_resumed(tmp_path, monkeypatch, capsys):
    """The model and the summary are those of the run that could; nothing is trained again."""
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--name", "t"])
    finished = tmp_path / "runs" / "t"
    expected = (finished / "model" / "model.safetensors").read_bytes()
    log = (finished / "metrics.jsonl").read_bytes()
    before = table_of(capsys.readouterr().out)
    shutil.rmtree(finished / "model")

    def full(self, folder, **_):
        Path(folder).mkdir()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(SystemExit) as stop:
            train.main(["--resume", "runs/t"])
    assert "cannot write the model runs/t/model: [Errno 28] No space left" in stop.value.code
    assert "python train.py --resume runs/t" in stop.value.code
    assert not (finished / "model.part").exists()
    capsys.readouterr()
    monkeypatch.setattr(train.Trainer, "score", lambda *_: pytest.fail("a step"))
    train.main(["--resume", "runs/t"])
    assert (finished / "model" / "model.safetensors").read_bytes() == expected
    assert (finished / "metrics.jsonl").read_bytes() == log
    assert table_of(capsys.readouterr().out) == before


def table_of(out):
    """The lines of a run's summary that hold its numbers."""
    lines = out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.split() == ["before", "after"])
    return lines[start : start + 5]


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    error = refuse(capsys, "--log-with", "wandb")
    assert "wandb is not installed; python -m pip install wandb" in error
    error = refuse(capsys, "--lora", "4")
    assert "peft is not installed; python -m pip install peft" in error
