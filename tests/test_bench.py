"""The arms of bench/claims.py change what they say, and its table reads the stored rows.

An arm that replaces a function of train.py by name would train plain PTD-PO if that name were no
longer called: each such arm must change the gradient of one small step. No timing here.
"""

import copy
import sys

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT

import toy.settings
import train
from plumbing.images import load_processor
from plumbing.models import build
from plumbing.settings import RunConfig, make_parser, read_settings
from ptdpo import PTDPOConfig
from toy import world

sys.path.insert(0, str(ROOT / "bench"))
import claims  # noqa: E402
from arms import ABLATIONS, ARMS, GRIDS, TEACHERS, Patches  # noqa: E402
from claims_report import table  # noqa: E402

TINY = ["--questions", "3", "--group-size", "3", "--max-new-tokens", "28"]
PATCHED = [arm for arm in ARMS if ARMS[arm].patch]
PUZZLES = (0, 3, 4)  # not all: one puzzle in six has the same hint as the other puzzle
VERDICTS = ((True, True, True), (True, False, False), (False, False, False))


def config_of(arm):
    """The settings of an arm, as train.py reads them."""
    groups = {"the method": PTDPOConfig, "the loop": train.TrainConfig, "the run": RunConfig}
    parser = make_parser(groups, toy.settings.SETTINGS)
    words = [*TINY, *ARMS[arm].options]
    return read_settings(train.TrainConfig, parser, toy.settings.SETTINGS, words)


class Step:
    """A trainer with the sampled responses of one small step; each gradient starts from these.

    Their verdicts are given, so that one group is right, one is mixed and one has failed.
    """

    def __init__(self):
        config = config_of("PTD-PO")
        processor = load_processor(config.model)
        accelerator = Accelerator(cpu=True)
        models = build(config, accelerator)
        self.trainer = train.Trainer(config, accelerator, processor, *models)
        questions = [world.puzzles("train", 1, start=index)[0] for index in PUZZLES]
        self.groups = self.trainer.sample(self.trainer.read(questions))
        for group, verdicts in zip(self.groups, VERDICTS, strict=True):
            for response, correct in zip(group, verdicts, strict=True):
                response.correct, response.reward = correct, float(correct)

    def gradient(self, arm, patches=None):
        """The flat gradient of the arm's step, with its options and with or without its patch."""
        trainer, groups = self.trainer, copy.deepcopy(self.groups)
        trainer.config = config_of(arm)
        if patches is not None:
            ARMS[arm].patch(patches, train)
        trainer.assign(groups)
        responses = [response for group in groups for response in group]
        trainer.score(responses)
        gradients = [p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None]
        trainer.optimizer.zero_grad()
        return torch.cat(gradients), responses


@pytest.fixture(scope="module")
def step():
    return Step()


@pytest.fixture(scope="module")
def unpatched(step):
    """Gradient and responses by option text, without any patch."""
    return {ARMS[arm].option_text: step.gradient(arm) for arm in PATCHED}


@pytest.mark.parametrize("arm", PATCHED)
def test_a_patch_is_called_and_changes_the_gradient(arm, step, unpatched):
    plain, _ = unpatched[ARMS[arm].option_text]
    names = ("route", "group_advantages", "teacher_messages", "encode_prompts", "Trainer")
    before = {name: getattr(train, name) for name in names}
    with Patches() as patches:
        patched, _ = step.gradient(arm, patches)
    patches.check(arm)
    assert (patched - plain).abs().max() > 1e-3 * plain.abs().max()
    assert {name: getattr(train, name) for name in names} == before
    torch.testing.assert_close(step.gradient(arm)[0], plain, rtol=0, atol=0)


def test_who_is_tutored_and_who_has_the_kl_penalty(step, unpatched):
    def flags(arm):
        with Patches() as patches:
            _, responses = step.gradient(arm, patches)
        return [r.tutored for r in responses], [r.penalised for r in responses]

    penalised = [True] * 3 + [False] * 6  # the group that is all right
    _, plain = unpatched[""]
    assert [r.tutored for r in plain] == [not correct for row in VERDICTS for correct in row]
    assert [r.penalised for r in plain] == penalised
    assert flags("no policy loss") == ([r.tutored for r in plain], penalised)
    assert flags("all responses") == ([False] * 3 + [True] * 6, penalised)
    assert flags("self-distillation") == ([True] * 9, [False] * 9)


def test_the_blind_teacher_sees_no_image(step):
    with Patches() as patches:
        _, responses = step.gradient("blind teacher", patches)
    teachers = [r.teacher_prompt for r in responses if r.tutored]
    assert teachers
    assert all(prompt.pixels is None and not prompt.types.any() for prompt in teachers)
    assert all(response.prompt.pixels is not None for response in responses)


@pytest.mark.parametrize("arm", [arm for arm in ABLATIONS if ARMS[arm].options])
def test_the_options_of_an_arm_change_the_settings(arm):
    assert config_of(arm) != config_of("PTD-PO")


def test_a_patch_that_is_never_called_ends_the_run():
    with Patches() as patches:
        ARMS["all responses"].patch(patches, train)
    with pytest.raises(RuntimeError, match="'all responses'.*train.route"):
        patches.check("all responses")


def test_one_run_names_the_arm_whose_patch_is_not_called(monkeypatch):
    monkeypatch.setattr(train, "main", lambda words: None)  # a train.py that calls nothing
    monkeypatch.setattr(claims, "load_rows", lambda path: [{}])
    job = {"arm": "blind teacher", "seed": 0, "split": "heldout", "steps": 1, "chosen": []}
    with pytest.raises(RuntimeError, match="'blind teacher'"):
        claims.one_run(job)


# ------------------------------------------------------------------------------------- stored rows
def test_the_table_reads_the_stored_rows():
    """Rows from before an option was renamed show its name of today."""
    rows = claims.stored_rows()
    text = table(rows, claims.STEPS)
    assert set(ARMS) <= {row["arm"] for row in rows}
    for arm in ABLATIONS:
        options = f" (`{ARMS[arm].option_text}`)" if ARMS[arm].options else ""
        assert f"| {arm}{options} | 3 |" in text
    for arm in TEACHERS:
        assert any(row["split"] == "teacher" and row["arm"] == arm for row in rows)
    assert table([], claims.STEPS) == "nothing measured on the held-out puzzles yet"


def test_the_best_of_a_complete_grid_is_chosen():
    rows = claims.stored_rows()
    assert claims.chosen(rows, "PTD-PO") == ["--lr", "1e-3", "--lam", "10"]
    assert claims.chosen(rows, "K 1") == ["--lr", "1e-3", "--lam", "10"]
    assert claims.chosen(rows, "GRPO, KL penalty off") == ["--lr", "1e-4"]
    grid = [row for row in rows if row["split"] == "tune" and row["arm"] == "PTD-PO"]
    assert len(grid) == len(GRIDS["PTD-PO"])
    assert claims.chosen(grid[1:], "PTD-PO") is None
