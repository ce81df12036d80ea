"""plumbing/check.py: passes on the default, and names what is broken."""

import pytest
import torch

import train
from plumbing import check as check_module
from plumbing.data import QuestionStream
from rollout import collate, encode_prompts, student_messages
from toy import world


def failures(trainer, questions):
    fine, text = check_module.check(trainer, questions)
    bad = [line[5:].partition(":")[0] for line in text.splitlines() if line.startswith("FAIL")]
    assert fine == (not bad) and text.count("\n     -> ") == len(bad)
    return bad


def test_the_check_passes_on_the_default_and_names_what_is_broken(trainer, monkeypatch):
    trainer.config.max_new_tokens, trainer.config.group_size = 40, 2
    puzzles = QuestionStream(None, 3)
    assert failures(trainer, puzzles) == []
    assert all(p.grad is None for p in trainer.policy.parameters())
    noisy = trainer.policy.model.language_model.norm.register_forward_hook(
        lambda module, args, out: out + 0.1 * torch.randn_like(out)
    )
    assert "the ratio is 1 on the first pass" in failures(trainer, puzzles)
    noisy.remove()

    def blind(processor, samples, messages, real=encode_prompts):
        prompts = real(processor, samples, messages)
        for p in prompts:
            p.pixels = torch.zeros_like(p.pixels)
        return prompts

    with monkeypatch.context() as patch:
        for module in (train, check_module):
            patch.setattr(module, "encode_prompts", blind)
        assert failures(trainer, puzzles) == ["the image changes the teacher's distribution"]
    with monkeypatch.context() as patch:
        for module in (train, check_module):
            patch.setattr(
                module, "teacher_messages", lambda sample, context: student_messages(sample)
            )
        assert failures(trainer, puzzles) == [
            "tutoring has a gradient",
            "the hint changes the teacher's distribution",
        ]
    with monkeypatch.context() as patch:

        def unmasked(*args, real=collate):
            batch = real(*args)
            batch.prompts["attention_mask"].fill_(1)
            return batch

        patch.setattr(train, "collate", unmasked)
        assert "padding changes nothing" in failures(trainer, puzzles)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.accelerator, "gather", lambda x: torch.cat([x, x + 1]))
        assert failures(trainer, puzzles) == ["the reference is the same on every process"]
    samples = world.puzzles("tune", 4)
    samples[1].choices, samples[2].choices = ["red", "blue"], [samples[2].answer, "x"]
    assert failures(trainer, QuestionStream(samples, 0)) == [
        "gold answers verify against themselves"
    ]
    samples[1].choices, trainer.config.max_new_tokens = None, 5
    trainer.sampling["max_new_tokens"] = 5
    assert failures(trainer, QuestionStream(samples, 0)) == ["responses end before the limit"]
    for s in samples:
        s.hint = None
    assert failures(trainer, QuestionStream(samples, 0)) == ["hints"]


def test_the_check_from_the_command_line_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv, code in ((["--check"], 0), (["--check", "--max-new-tokens", "4"], 1)):
        with pytest.raises(SystemExit) as stop:
            train.main([*argv, "--group-size", "2"])
        assert stop.value.code == code
    assert (
        "ok   the image changes the teacher's distribution" in capsys.readouterr().out
        and not list(tmp_path.iterdir())
    )
