"""plumbing/check.py: passes on the default, and names what is broken."""

import pytest
import torch

import train
from plumbing import check as check_module
from plumbing import engine
from plumbing.data import QuestionStream
from rollout import collate, encode_prompts, student_messages
from toy import world

PUZZLES = world.PuzzleStream(3)
CHATS = (train, check_module)  # the modules that make prompts and the teacher's chats


@pytest.fixture
def trainer(trainer):
    trainer.config.max_new_tokens, trainer.config.group_size = 40, 2
    return trainer


def failures(trainer, stream):
    """The names of the checks that fail. Each has a line of advice."""
    all_right, table = check_module.check(trainer, stream)
    lines = [line for line in table.splitlines() if line.startswith("FAIL")]
    assert all_right == (not lines)
    assert table.count("\n     -> ") == len(lines)
    return [line.removeprefix("FAIL ").partition(":")[0] for line in lines]


def test_all_is_right_by_default_and_no_gradient_is_left(trainer):
    assert failures(trainer, PUZZLES) == []
    assert all(p.grad is None for p in trainer.policy.parameters())


def test_a_model_with_noise(trainer):
    trainer.policy.model.language_model.norm.register_forward_hook(
        lambda module, args, out: out + 0.1 * torch.randn_like(out)
    )
    assert "the ratio is 1 on the first pass" in failures(trainer, PUZZLES)


def test_a_teacher_that_does_not_see_the_image(trainer, monkeypatch):
    def blind(*arguments):
        prompts = encode_prompts(*arguments)
        for prompt in prompts:
            prompt.pixels = torch.zeros_like(prompt.pixels)
        return prompts

    for module in CHATS:
        monkeypatch.setattr(module, "encode_prompts", blind)
    assert failures(trainer, PUZZLES) == ["the image changes the teacher's distribution"]


def test_a_hint_that_is_not_read(trainer, monkeypatch):
    for module in CHATS:
        monkeypatch.setattr(
            module, "teacher_messages", lambda question, context: student_messages(question)
        )
    assert failures(trainer, PUZZLES) == [
        "tutoring has a gradient",
        "the hint changes the teacher's distribution",
    ]


def test_a_model_that_reads_its_padding(trainer, monkeypatch):
    def unmasked(*args):
        batch = collate(*args)
        batch.prompts["attention_mask"].fill_(1)
        return batch

    monkeypatch.setattr(engine, "collate", unmasked)
    assert "padding changes nothing" in failures(trainer, PUZZLES)


def test_processes_with_other_weights(trainer, monkeypatch):
    monkeypatch.setattr(trainer.accelerator, "gather", lambda x: torch.cat([x, x + 1]))
    monkeypatch.setattr(trainer, "stop_if_asked", lambda: None)  # the other one's 1 is no signal
    assert failures(trainer, PUZZLES) == ["the reference is the same on every process"]


def test_gold_answers_that_are_no_option(trainer):
    questions = world.puzzles("tune", 4)
    questions[1].choices = ["red", "blue"]
    questions[2].choices = [questions[2].answer, "x"]
    stream = QuestionStream(questions, 0)
    assert failures(trainer, stream) == ["gold answers verify against themselves"]


def test_responses_that_are_cut_off(trainer):
    trainer.config.max_new_tokens = 5
    stream = QuestionStream(world.puzzles("tune", 4), 0)
    assert failures(trainer, stream) == ["responses end before the limit"]


def test_questions_without_hints(trainer):
    questions = world.puzzles("tune", 4)
    for question in questions:
        question.hint = None
    assert failures(trainer, QuestionStream(questions, 0)) == ["hints"]


@pytest.mark.parametrize(
    "options,code",
    [
        ([], 0),
        (["--precision", "bf16", "--gradient-checkpointing"], 0),
        (["--max-new-tokens", "4"], 1),
    ],
)
def test_the_check_from_the_command_line_writes_nothing(
    options, code, tmp_path, monkeypatch, capsys, any_precision
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(["--check", "--group-size", "2", *options])
    assert stop.value.code == code
    assert "ok   the image changes the teacher's distribution" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
