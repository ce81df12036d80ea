"""SIGTERM and Ctrl-C: where a run stops, what it keeps, and how it goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
from datetime import timedelta

import pytest
import test_models
import torch
from conftest import ROOT, logged, read_jsonl, spy
from safetensors.torch import load_file

import train
from plumbing import command, engine, runs
from plumbing.stopping import Stopped
from rollout import encode_prompts, sample_groups, student_messages
from toy import world

STOPPED = str(ROOT / "tests" / "stopped_processes.py")
RUN = shlex.split(
    "--steps 3 --questions 2 --group-size 4 --eval-questions 6 --eval-every 2 --micro-tokens 300"
)
# what the calls of the sampler are for in RUN
SAMPLED_FOR = ("first evaluation", "its hinted half", "step 1", "step 2", "evaluation", "step 3")
SAMPLED_FOR += ("last evaluation", "its hinted half")


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture
def signal_while_sampling(monkeypatch):
    """signal_while_sampling(number, call): a signal after the first tokens of that call.

    Returns a list with the tokens that each look of the sampler's callback reported after it.
    """

    def arrange(number, call):
        calls, later, sample_groups = [], [], engine.sample_groups

        def watched(*args, watch, **settings):
            calls.append(True)

            def noted(look):
                if later:
                    later.append(look.tokens)
                elif len(calls) == call and look.tokens:
                    later.append(look.tokens)
                    send(number)
                watch(look)

            return sample_groups(*args, watch=noted, **settings)

        monkeypatch.setattr(engine, "sample_groups", watched)
        return later

    return arrange


def stopped(*argv):
    """The exit code of a run that a signal stops."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(argv))
    return stop.value.code


def checkpoint_names(run):
    return [path.name for path in sorted((run / "checkpoints").iterdir())]


# ----------------------------------------------------------------------------- sampling, evaluating
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """RUN, left alone."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*RUN, "--name", "t"])
    return folder / "runs" / "t"


@pytest.mark.parametrize("call, step", [(3, 0), (5, 2), (6, 2), (8, 3)])
@pytest.mark.slow
def test_a_stop_while_sampling_costs_nothing_but_that(
    call, step, whole, tmp_path, monkeypatch, capsys, signal_while_sampling
):
    """Within a few tokens; the resumed run is the one that was left alone, bit for bit.

    Also in an evaluation of a step that is finished: the resumed run makes up for it.
    """
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "t"
    later = signal_while_sampling(signal.SIGINT, call)
    assert stopped(*RUN, "--name", "t") == 130
    assert len(later) == 1, SAMPLED_FOR[call - 1]  # no later look of the sampler
    out = capsys.readouterr().out
    assert f"stopped by Ctrl-C after step {step}" in out
    assert ("nothing was trained" in out) == (step == 0)
    assert "go on with: python train.py --resume runs/t" in out
    assert checkpoint_names(run) == [f"step-{step:08d}"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "runs/t"])
    assert logged(run) == logged(whole)
    if step == 3:  # once more: the run is over
        with pytest.raises(SystemExit):
            train.main(["--resume", "runs/t"])
        assert "has done all 3 steps" in capsys.readouterr().err
    for name in ("responses.jsonl", "model/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_a_stop_in_the_first_evaluation_leaves_nothing(
    tmp_path, monkeypatch, capsys, signal_while_sampling
):
    """So the same command can be given again."""
    monkeypatch.chdir(tmp_path)
    signal_while_sampling(signal.SIGTERM, 2)
    assert stopped(*RUN, "--name", "t") == 143
    out = capsys.readouterr().out
    assert "stopped by SIGTERM in the first evaluation: nothing was trained" in out
    assert "runs/t is removed" in out
    assert list((tmp_path / "runs").iterdir()) == []


# ----------------------------------------------------------------------------------------- updating
@pytest.mark.slow
def test_a_stop_while_scoring_drops_the_rest_of_the_rollout(tmp_path, monkeypatch, capsys):
    """At the next micro-batch, in the second of three steps on one rollout.

    The checkpoint is the policy after the first step. The resumed run samples the questions of the
    other steps anew, and no question is skipped.
    """
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "t"
    keys = spy(monkeypatch, engine, "sample_groups", lambda *args, **more: more.get("keys"))
    steps, weights, real_step, real_loss = [], [], train.Trainer.step, train.Trainer.loss

    def step(self):
        numbers = real_step(self)
        weights.append({n: p.detach().clone() for n, p in self.policy.named_parameters()})
        return numbers

    def loss(self, responses):
        steps.append(len(weights) + 1)
        if steps.count(2) == 1:
            send(signal.SIGTERM)
        return real_loss(self, responses)

    monkeypatch.setattr(train.Trainer, "step", step)
    monkeypatch.setattr(train.Trainer, "loss", loss)
    options = [
        *RUN,
        "--updates",
        "3",
        "--steps",
        "5",
        "--eval-every",
        "9",
        "--micro-tokens",
        "100",
        "--name",
        "t",
    ]
    assert stopped(*options) == 143
    assert steps.count(1) > 1
    assert steps.count(2) == 1
    assert "stopped by SIGTERM after step 1; go on" in capsys.readouterr().out
    assert checkpoint_names(run) == ["step-00000001"]
    saved = load_file(run / "checkpoints" / "step-00000001" / "model.safetensors")
    assert len(saved) > 20
    for name, value in saved.items():
        assert torch.equal(value, weights[0][name.removeprefix("model.")]), name
    monkeypatch.setattr(train.Trainer, "loss", real_loss)
    train.main(["--resume", "runs/t"])
    rollouts = [[int(key.removeprefix("0-")) for key in of_call] for of_call in keys if of_call]
    assert rollouts == [list(range(6)), list(range(2, 8)), [8, 9]]
    assert [row["step"] for row in logged(run)] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in read_jsonl(run / "responses.jsonl")] == [1, 2, 5]


def test_a_stop_after_a_checkpoint_does_not_write_it_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = spy(monkeypatch, runs.Checkpoints, "save", lambda self, state: state["step"])
    monkeypatch.setattr(runs.Run, "print", lambda self, line: None)
    real_save = runs.Run.write_checkpoint

    def write_checkpoint(self, trainer):
        real_save(self, trainer)
        send(signal.SIGTERM)

    monkeypatch.setattr(runs.Run, "write_checkpoint", write_checkpoint)
    assert stopped(*RUN, "--name", "t", "--save-every", "2") == 143
    assert saved == [2]


def start_ddp(folder):
    """Two processes, not sharded, of which one gets a signal."""
    test_models.run_script(folder, 2, "ddp", script=STOPPED)


def start_fsdp(folder):
    """Two sharded processes, of which one gets a signal."""
    test_models.run_script(folder, 2, "fsdp", script=STOPPED)


def assert_both_stopped(folder, scored):
    """Both processes ended alike, with a checkpoint; and torch.distributed has our time-out."""
    reports = [json.loads((folder / f"report-{rank}.json").read_text()) for rank in (0, 1)]
    assert [report["scored"] for report in reports] == scored
    for report in reports:
        assert report["questions"] == 2
        assert report["code"] == 143
        assert timedelta(seconds=report["timeout"]) == runs.PROCESS_TIMEOUT
    assert checkpoint_names(folder / "runs" / "two") == ["step-00000002"]


@pytest.mark.beside(program=start_ddp)
@pytest.mark.slow
def test_two_processes_stop_together_where_one_got_the_signal(beside):
    """gloo, unequal numbers of micro-batches: no process is left waiting for the other.

    The signal in micro-batch 6 of process 0 waits: process 1 has five.
    """
    assert_both_stopped(beside, [[[7, 1, True], [7, 7, True]], [[5, 1, True], [5, 5, True]]])


@pytest.mark.beside(program=start_fsdp)
@pytest.mark.slow
def test_two_sharded_processes_stop_together_where_one_got_the_signal(beside):
    assert_both_stopped(beside, [[[7, 1, True], [7, 6, True]]] * 2)


# ---------------------------------------------------------------------------- at once, or too early
def test_a_second_signal_ends_the_process_at_once_but_not_an_echo_of_the_first():
    """An echo: torchrun and the terminal send one Ctrl-C twice within milliseconds."""
    program = (
        "import os, signal\n"
        "from plumbing import stopping\n"
        "signals = stopping.StopSignals()\n"
        "with signals.noted(prints=True):\n"
        "    for _ in range(3):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('goes on', signals.number, flush=True)\n"
        "    stopping.SAME_REQUEST_SECONDS = -1\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('never')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stdout.split() == ["goes", "on", "15"]
    assert done.stderr.split("\n\n") == [
        "\nSIGTERM: stopping soon, and keeping what is done; again: at once",
        "Ctrl-C again: stopped at once, without a checkpoint\n",
    ]


def test_ctrl_c_before_the_loop_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "build", interrupted)
    assert stopped(*RUN, "--name", "t") == 130
    assert capsys.readouterr().err.strip() == "stopped by Ctrl-C"
    assert not (tmp_path / "runs").exists()


def test_after_a_run_the_handlers_are_those_from_before(whole):
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # a shell that starts the tests in the background has them ignore Ctrl-C
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)


# -------------------------------------------------------------------------------- what a user sees
def sampled(base, **settings):
    """Ten responses to five puzzles, a few at a time."""
    questions = world.puzzles("tune", 5)
    chats = [student_messages(question) for question in questions]
    prompts = encode_prompts(base[1], questions, chats)
    return sample_groups(*base, prompts, 2, max_new_tokens=20, sample_mb=0.4, **settings)


def test_the_callback_learns_of_each_token_and_each_response_once(base):
    """Also where the sequences do not fit into memory together."""
    tokens, lengths = [], []

    def watch(look):
        tokens.append(look.tokens)
        lengths.extend(look.lengths)

    groups = sampled(base, watch=watch)
    drawn = [len(response.ids) for group in groups for response in group]
    assert sorted(lengths) == sorted(drawn)
    assert sum(tokens) == sum(drawn)
    assert len([number for number in tokens if number]) > 1


def test_an_exception_of_the_callback_ends_the_sampling(base):
    looks = []

    def watch(look):
        looks.append(look)
        if len(looks) == 2:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        sampled(base, watch=watch)
    assert len(looks) == 2
