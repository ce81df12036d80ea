"""The arms of bench/claims.py change what they say, and its table reads the stored rows.

An arm that replaces a function of train.py by name would train plain PTD-PO if that name were no
longer called: each such arm must change the gradient of one small step. The step's KL penalty has a
large weight, and its student is no longer the reference, so that the gradient shows who has the
penalty. No timing here.
"""

import copy
import json
import re
import shlex
import sys
from dataclasses import replace

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
import arms  # noqa: E402
import attention  # noqa: E402
import claims  # noqa: E402
import statements  # noqa: E402
from arms import ABLATIONS, ARMS, GRIDS, MAIN, Patches, solved  # noqa: E402
from claims_report import mean_of_last, table  # noqa: E402
from common import load_rows  # noqa: E402
from statements import STATEMENTS  # noqa: E402

TINY = shlex.split("--questions 3 --group-size 3 --max-new-tokens 28 --beta-kl 1")
# these arms change the puzzles or take the place of the responses, which the tests of patches keep:
# they have tests of their own
OWN_TESTS = ("SFT on solutions", "1,000 puzzles", "1,000 puzzles, the model's own hints")
PATCHED = [arm for arm in ARMS if ARMS[arm].patch and arm not in OWN_TESTS]
PUZZLES = (0, 3, 4)
VERDICTS = ((True, True, True), (True, False, False), (False, False, False))
CONTROL = "GRPO, KL penalty off where responses failed"


def config_of(arm, *more_options):
    """The settings of an arm, as train.py reads them."""
    groups = {"the method": PTDPOConfig, "the loop": train.TrainConfig, "the run": RunConfig}
    parser = make_parser(groups, toy.settings.SETTINGS)
    words = [*TINY, *more_options, *ARMS[arm].options]
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
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in self.trainer.policy.parameters():
                parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
        questions = [world.puzzles("train", 1, start=index)[0] for index in PUZZLES]
        self.groups = self.trainer.sample(self.trainer.read(questions))
        for group, verdicts in zip(self.groups, VERDICTS, strict=True):
            for response, correct in zip(group, verdicts, strict=True):
                response.correct, response.reward = correct, 0.1 + 0.9 * correct  # 0.1: the format

    def gradient(self, arm, patches=None, recipe="paper"):
        """The flat gradient of the arm's step, with its options and with or without its patch."""
        trainer, groups = self.trainer, copy.deepcopy(self.groups)
        trainer.config = config_of(arm, "--recipe", recipe)
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
    methods = dict(vars(train.Trainer))
    with Patches() as patches:
        patched, _ = step.gradient(arm, patches)
    patches.check(arm)
    assert (patched - plain).abs().max() > 1e-3 * plain.abs().max()
    assert {name: getattr(train, name) for name in names} == before
    assert dict(vars(train.Trainer)) == methods
    torch.testing.assert_close(step.gradient(arm)[0], plain, rtol=0, atol=0)


FAILED = [not correct for row in VERDICTS for correct in row]
ALL_RIGHT = [True] * 3 + [False] * 6  # responses of the group that is all right


@pytest.mark.parametrize("recipe, penalised", [("paper", [True] * 9), ("release", ALL_RIGHT)])
def test_who_is_tutored_and_who_has_the_kl_penalty(step, recipe, penalised):
    def flags(arm, patched=True):
        with Patches() as patches:
            _, responses = step.gradient(arm, patches if patched else None, recipe)
        return [r.tutored for r in responses], [r.penalised for r in responses]

    assert flags("PTD-PO", patched=False) == (FAILED, penalised)
    assert flags("tutoring alone") == (FAILED, penalised)
    assert flags("all responses") == ([False] * 3 + [True] * 6, penalised)
    assert flags("OPSD") == ([True] * 9, [False] * 9)
    assert flags("GRPO", patched=False) == ([False] * 9, [True] * 9)
    assert flags(CONTROL) == ([False] * 9, ALL_RIGHT)


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_the_release_s_control_is_grpo_with_less_of_the_kl_penalty(step, recipe):
    """Policy loss and advantages are those of GRPO; the KL's weights are those of PTD-PO."""
    with Patches() as patches:
        _, control = step.gradient(CONTROL, patches, recipe)
    _, grpo = step.gradient("GRPO", recipe=recipe)
    assert [r.advantage for r in control] == [r.advantage for r in grpo]
    assert [r.weights[0] for r in control] == [r.weights[0] for r in grpo]
    assert all(r.teacher_prompt is None and r.weights[2] == 0 for r in control)
    [group, *_] = step.groups
    tokens = [len(response.ids) for response in group]
    of_all = sum(len(response.ids) for of_step in step.groups for response in of_step)
    by_hand = {"paper": [1 / (9 * n) for n in tokens], "release": [1 / of_all] * 3}
    assert [r.weights[1] for r in control] == pytest.approx([*by_hand[recipe], *[0] * 6])


def test_the_blind_teacher_sees_no_image(step):
    with Patches() as patches:
        _, responses = step.gradient("blind teacher", patches)
        questions = [group[0].question for group in step.groups]
        read = step.trainer.read(questions, train.teacher_messages)  # as an evaluation reads them
    assert all(prompt.pixels is None for prompt in read)
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
    logged = [{"eval_hinted": 1.0}, {"grad_norm": 1.0, "eval_hinted": 1.0}]
    monkeypatch.setattr(claims, "load_rows", lambda path: logged)
    monkeypatch.setattr(claims.Path, "read_text", lambda path, encoding: '{"grad_clip": 1}')
    job = {"arm": "blind teacher", "seed": 0, "split": "heldout", "steps": 1, "chosen": []}
    with pytest.raises(RuntimeError, match="'blind teacher'"):
        claims.one_run(job)


def test_supervision_learns_the_solutions(step):
    """The gradient is that of the mean cross-entropy of the three solutions."""
    with Patches() as patches:
        trainer = step.trainer
        trainer.config = config_of("SFT on solutions")
        ARMS["SFT on solutions"].patch(patches, train)
        prompts = [group[0].prompt for group in step.groups]
        groups = trainer.sample(prompts)
        trainer.grade(groups)
        assert all(response.correct for group in groups for response in group)
        trainer.assign(groups)
        numbers = trainer.score([response for group in groups for response in group])
    patches.check("SFT on solutions")
    expected = []
    for prompt, group in zip(prompts, groups, strict=True):
        assert group[0].text == prompt.question.solution
        batch = trainer.collate(group[:1])
        hidden = train.response_states(trainer.policy, batch)[batch.mask]
        logits = trainer.policy.get_output_embeddings()(hidden)
        logits[:, trainer.scoring["banned"]] = -torch.inf
        target = torch.tensor(group[0].ids)
        expected.append(torch.nn.functional.cross_entropy(logits, target).item())
    trainer.optimizer.zero_grad()
    assert numbers["policy_loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_the_hdpo_like_arm_tutors_right_responses_alone(step, monkeypatch):
    """Where a group failed, what is right with the answer shown takes the place of responses."""
    asked = []

    def respond(prompts, count):
        asked.extend(prompt.question for prompt in prompts)
        groups = []
        for prompt in prompts:
            right = solved(step.trainer, prompt)
            right = replace(right, logp=[0.0] * len(right.ids))
            wrong = replace(right, text="So \\boxed{99}")
            groups.append([wrong, right, wrong])
        return groups

    monkeypatch.setattr(step.trainer, "respond", respond)
    with Patches() as patches:
        _, responses = step.gradient("HDPO-like", patches)
    assert [question.id for question in asked] == [step.groups[2][0].question.id]
    taken = [r for r in responses if r.tutored]
    assert [r.text for r in taken] == [asked[0].solution]
    assert responses[6:].index(taken[0]) == 0
    assert all(response.advantage == 0 for response in responses[6:])
    assert "The answer is" in step.trainer.processor.tokenizer.decode(taken[0].teacher_prompt.ids)


def test_the_hdpo_like_arm_asks_nothing_where_no_group_failed(step, monkeypatch):
    monkeypatch.setattr(step.trainer, "respond", None)
    for group in step.groups:
        monkeypatch.setattr(group[0], "correct", True)
    with Patches() as patches:
        _, responses = step.gradient("HDPO-like", patches)
    assert not any(response.tutored for response in responses)


def test_the_arms_of_1000_puzzles_give_them_again_and_again():
    puzzles = world.puzzles("train", 4)
    for arm in OWN_TESTS[1:]:
        with Patches() as patches:
            ARMS[arm].patch(patches, train)
            stream = world.PuzzleStream(seed=7)
            given = [stream[i] for i in (3, 1003)]
        patches.check(arm)
        assert [question.id for question in given] == [puzzles[3].id] * 2
        assert world.PuzzleStream(seed=0)[1003].id != puzzles[3].id
        if arm == "1,000 puzzles":
            assert [question.hint for question in given] == [puzzles[3].hint] * 2


def test_the_model_s_own_hints_are_those_of_the_file(monkeypatch, tmp_path):
    """The puzzles without a hint are there, too: they are not tutored."""
    first, second = world.puzzles("train", 2)
    hint = {"look": ["the top row"], "ignore": [], "steps": []}
    rows = [{"id": first.id, "hint": hint}, {"id": second.id, "hint": None}]
    monkeypatch.setattr(arms, "OWN_HINTS", tmp_path / "own.jsonl")
    arms.own_hints.cache_clear()
    with pytest.raises(FileNotFoundError, match="--write-hints"):
        arms.own_hints()
    arms.OWN_HINTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(arms.own_hint(first).look) == ["the top row"]
    assert arms.own_hint(second) is None
    arms.own_hints.cache_clear()


def test_each_puzzle_of_the_arm_has_a_line_in_the_file():
    stored = arms.own_hints()
    assert list(stored) == [q.id for q in world.puzzles("train", arms.FIXED_PUZZLES)]
    assert 0.2 < sum(hint is not None for hint in stored.values()) / len(stored) < 0.9


# ------------------------------------------------------------------------------------- stored rows
def test_the_table_reads_the_stored_rows():
    rows = load_rows(claims.ROWS)
    text = table(rows, claims.STEPS)
    held_out = [row for row in rows if row["split"] == "heldout"]
    for arm in ARMS:
        seeds = sum(row["arm"] == arm for row in held_out)
        line = re.search(rf"^\| {re.escape(arm)}(?: \(`.*?`\))? \| (\d) \|", text, re.M)
        assert (int(line[1]) if line else 0) == seeds
    assert {row["arm"] for row in rows} <= set(ARMS)
    assert table([], claims.STEPS) == "nothing measured on the held-out puzzles yet"


def test_each_stored_curve_ends_at_the_last_step():
    held_out = [row for row in load_rows(claims.ROWS) if row["split"] == "heldout"]
    assert held_out
    for row in held_out:
        arm = row["arm"]
        steps = config_of(arm).steps if "--steps" in ARMS[arm].options else claims.STEPS
        assert int(list(row["curve"])[-1]) == steps


def test_the_page_of_the_claims_holds_the_tables_of_the_stored_rows(tmp_path):
    page, copy_of_page = ROOT / "docs" / "claims.md", tmp_path / "claims.md"
    copy_of_page.write_text(page.read_text("utf-8"), "utf-8")
    claims.write_page(copy_of_page, claims.tables_of(load_rows(claims.ROWS), claims.STEPS))
    assert copy_of_page.read_text("utf-8") == page.read_text("utf-8")
    copy_of_page.write_text("no marks", "utf-8")
    with pytest.raises(ValueError, match="<!-- statements -->"):
        claims.write_page(copy_of_page, {"statements": ""})


@pytest.mark.parametrize(
    "better, worse, expected",
    [
        ([70, 80, 75], [69, 60], "agrees"),
        ([70, 80, 75], [81, 90], "does not agree"),
        ([70, 80, 75], [70, 60], "seeds overlap"),
        ([70, 80, 75], [78, 90], "seeds overlap"),
        ([70, 80, 75], [10], "too few seeds"),
    ],
)
def test_a_verdict_needs_all_seeds_on_one_side(better, worse, expected):
    assert statements.verdict(better, worse) == expected


def test_the_arms_of_the_statements_exist():
    named = {arm for one in STATEMENTS for arm in (one.better, one.worse)}
    assert named <= set(ARMS)
    assert set(MAIN) <= named


def test_a_cell_is_the_mean_of_the_last_three_evaluations():
    curve = {"0": 10, "15": 40, "30": 50, "45": 60}
    row = {"curve": {s: {"all": n + 1, "named": n, "narrowed": n / 2} for s, n in curve.items()}}
    assert mean_of_last(row) == {"all": 51, "named": 50, "narrowed": 25}


def test_a_run_that_is_stored_is_not_repeated(monkeypatch, tmp_path):
    jobs = []
    monkeypatch.setattr(claims, "ROWS", tmp_path / "arms.jsonl")
    monkeypatch.setattr(claims, "run_in_child", lambda job, environment: {**job, **CURVE})
    monkeypatch.setattr(claims, "print_row", jobs.append)
    monkeypatch.setattr(claims, "tables_of", lambda rows, steps: {})
    monkeypatch.setattr(sys, "argv", ["claims.py", "--arms", "K 1", "--seeds", "2"])
    claims.main()
    splits = [job["split"] for job in jobs]
    assert splits == ["tune"] * len(GRIDS["PTD-PO"]) + ["heldout"] * 2
    assert [job["seed"] for job in jobs[-2:]] == [0, 1]
    words = claims.command_line(jobs[-1])
    assert words[words.index("--jsd-k") + 1] == "1"
    jobs.clear()
    claims.main()
    assert jobs == []


KINDS = ("all", "named", "narrowed")
CURVE = {"curve": {"0": {"all": 27, "named": 30, "narrowed": 20}}}


def test_the_best_of_a_complete_grid_is_chosen():
    grid = [
        {
            "arm": "PTD-PO",
            "split": "tune",
            "steps": 9,
            "chosen": options,
            "curve": {"0": dict.fromkeys(KINDS, n)},
        }
        for n, options in enumerate(GRIDS["PTD-PO"])
    ]
    assert claims.chosen(grid, "PTD-PO", 9) == claims.chosen(grid, "K 1", 9) == GRIDS["PTD-PO"][-1]
    assert claims.chosen(grid[1:], "PTD-PO", 9) is claims.chosen(grid, "PTD-PO", 8) is None
    assert claims.chosen(grid, "GRPO, DAPO", 9) is None


# --------------------------------------------------------------------- where the model looks
def test_the_attention_tables_of_the_docs_are_those_of_the_stored_rows():
    page = (ROOT / "docs" / "hints.md").read_text("utf-8")
    section = page.partition("### How good these hints are")[2].partition("\n## ")[0]
    measured = attention.tables(load_rows(attention.ROWS)).splitlines()
    shown = [line for line in section.splitlines() if "±" in line]
    assert len(shown) >= 10
    assert set(shown) <= set(measured)


def test_a_few_puzzles_of_the_attention_bench(tmp_path, monkeypatch):
    """The world's own solution points at its lines; the rows replace those of another run."""
    monkeypatch.setattr(attention, "ROWS", tmp_path / "attention.jsonl")
    monkeypatch.setattr(attention, "SAMPLES", (2, 4))
    monkeypatch.setattr(attention, "LAYER_QUESTIONS", 16)
    attention.ROWS.write_text("{}\n")
    rows = attention.measure(6)
    assert load_rows(attention.ROWS) == json.loads(json.dumps(rows))
    of_solutions = [row for row in rows if row.get("source") == "solution" and row["layer"] == "2"]
    assert sum(row["questions"] for row in of_solutions) == 6
    assert all(row["hottest"] == 1 for row in of_solutions)
    counts = [row for row in rows if row["kind"] == "hint" and row["samples"] == 4]
    assert sum(row["questions"] for row in counts) == 6
    assert "| own | 4 |" in attention.tables(rows)
