"""The arms of bench/claims.py change what they say, and its table reads the stored rows.

An arm that replaces a function of train.py by name would train plain PTD-PO if that name were no
longer called: each such arm must change the gradient of one small step. The step's KL penalty has a
large weight, and its student is no longer the reference, so that the gradient shows who has the
penalty. No timing here.
"""

import copy
import json
import shlex
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, spy, write_jsonl

import toy.settings
import train
from plumbing.images import load_processor
from plumbing.models import build
from plumbing.settings import RunConfig, make_parser, read_settings
from ptdpo import PTDPOConfig
from toy import world

sys.path.insert(0, str(ROOT / "bench"))
import attention  # noqa: E402
import bench_default  # noqa: E402
import claims  # noqa: E402
from arms import ABLATIONS, ARMS, GRIDS, TEACHERS, Patches  # noqa: E402
from claims_report import table  # noqa: E402
from common import load_rows, measured_recipe, rows_of  # noqa: E402

TINY = shlex.split("--questions 3 --group-size 3 --max-new-tokens 28 --beta-kl 1")
PATCHED = [arm for arm in ARMS if ARMS[arm].patch]
PUZZLES = (0, 3, 4)  # not all: one puzzle in six has the same hint as the other puzzle
VERDICTS = ((True, True, True), (True, False, False), (False, False, False))


NO_STORED_RUN = "GRPO, KL penalty off where responses failed"  # it is newer than the rows


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
                response.correct, response.reward = correct, float(correct)

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
    assert flags("no policy loss") == (FAILED, penalised)
    assert flags("all responses") == ([False] * 3 + [True] * 6, penalised)
    assert flags("self-distillation") == ([True] * 9, [False] * 9)
    assert flags("GRPO", patched=False) == ([False] * 9, [True] * 9)
    assert flags(NO_STORED_RUN) == ([False] * 9, ALL_RIGHT)


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_the_release_s_control_is_grpo_with_another_mean_of_the_kl_penalty(step, recipe):
    """Policy loss and advantages are those of GRPO; the KL's weights are those of PTD-PO."""
    with Patches() as patches:
        _, control = step.gradient(NO_STORED_RUN, patches, recipe)
    _, grpo = step.gradient("GRPO", recipe=recipe)
    assert [r.advantage for r in control] == [r.advantage for r in grpo]
    assert [r.weights[0] for r in control] == [r.weights[0] for r in grpo]
    assert all(r.teacher_prompt is None and r.weights[2] == 0 for r in control)
    [group, *_] = step.groups
    tokens = [len(response.ids) for response in group]
    by_hand = {"paper": [1 / (3 * n) for n in tokens], "release": [1 / sum(tokens)] * 3}
    assert [r.weights[1] for r in control] == pytest.approx([*by_hand[recipe], *[0] * 6])


def test_two_updates_with_gspo_are_two_updates_with_gspo_s_ratio_and_clip():
    """The arm's means are those of all arms, so that only ratio and clip differ."""
    expected = {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "recipe": "gspo"}
    assert config_of("two updates, GSPO") == replace(config_of("two updates"), **expected)


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
    job = {"arm": "blind teacher", "recipe": "paper", "seed": 0, "split": "heldout", "steps": 1}
    job["chosen"] = []
    with pytest.raises(RuntimeError, match="'blind teacher'"):
        claims.one_run(job)


# ------------------------------------------------------------------------------------- stored rows
def test_the_table_reads_the_stored_rows():
    """Rows from before an option was renamed show its name of today."""
    rows = claims.stored_rows("release")
    text = table(rows, claims.STEPS)
    assert set(ARMS) - {NO_STORED_RUN} == {row["arm"] for row in rows}
    gspo = "--updates 2 --ratio sequence --aggregate sequence --clip-low 3e-4 --clip-high 4e-4"
    stored_options = {"two updates, GSPO": gspo}  # what is --recipe gspo today
    for arm in set(ABLATIONS) - {NO_STORED_RUN}:
        shown = stored_options.get(arm, ARMS[arm].option_text)
        options = f" (`{shown}`)" if shown else ""
        assert f"| {arm}{options} | 3 |" in text
    for arm in TEACHERS:
        assert any(row["split"] == "teacher" and row["arm"] == arm for row in rows)
    assert table([], claims.STEPS) == "nothing measured on the held-out puzzles yet"


@pytest.fixture
def two_recipes(monkeypatch, tmp_path):
    """The stored rows, and each of them once more as a row of --recipe paper with seed + 50."""
    rows = [row for row in claims.load_rows(claims.ROWS) if "recipe" not in row]
    again = [{**row, "recipe": "paper", "seed": row["seed"] + 50} for row in rows]
    write_jsonl(tmp_path / "claims.jsonl", rows + again)
    monkeypatch.setattr(claims, "ROWS", tmp_path / "claims.jsonl")
    return rows, again


def test_a_table_is_of_one_recipe(two_recipes):
    old, new = two_recipes

    def seeds(rows):
        return {row["seed"] for row in rows}

    assert seeds(claims.stored_rows("release")) == seeds(old)
    assert seeds(claims.stored_rows("paper")) == seeds(new)
    assert seeds(claims.stored_rows()) == seeds(new)
    assert (measured_recipe(old), measured_recipe(new), measured_recipe([])) == (
        "release",
        "paper",
        "release",
    )
    assert rows_of(old, "paper") == []
    assert "; --recipe paper; 240 steps" in table(new, claims.STEPS)
    assert "; --recipe release; 240 steps" in table(old, claims.STEPS)
    with pytest.raises(ValueError, match="too many values"):
        table(old + new, claims.STEPS)


@pytest.mark.parametrize("options, recipe", [([], "paper"), (["--recipe", "release"], "release")])
def test_the_command_shows_one_recipe(two_recipes, monkeypatch, capsys, options, recipe):
    monkeypatch.setattr(sys, "argv", ["claims.py", "--table", *options])
    claims.main()
    assert f"; --recipe {recipe}; " in capsys.readouterr().out
    drawn = spy(monkeypatch, claims, "draw", lambda rows, *_: {row.get("recipe") for row in rows})
    monkeypatch.setattr(sys, "argv", ["claims.py", "--figures", ".", *options])
    monkeypatch.setattr("claims_report.load_pyplot", lambda option: sys.exit(0))
    with pytest.raises(SystemExit):
        claims.main()
    assert drawn == [{"paper"} if recipe == "paper" else {None}]


def test_new_runs_are_of_the_paper_s_recipe_and_known_by_it(two_recipes, monkeypatch, capsys):
    """A run of the release does not stand for the paper's, and a recipe is not chosen for runs."""
    jobs = []
    monkeypatch.setattr(claims, "run_in_child", lambda job, environment: jobs.append(job) or job)
    monkeypatch.setattr(claims, "append_row", lambda path, row: None)
    monkeypatch.setattr(claims, "print_row", lambda row: None)
    monkeypatch.setattr(claims, "table", lambda rows, steps: "")
    monkeypatch.setattr(sys, "argv", ["claims.py", "--arms", "K 1", "--seeds", "1"])
    old, _ = two_recipes
    tuned = [row for row in old if row["split"] == "tune"]
    tuned_again = [{**row, "recipe": "paper"} for row in tuned]
    write_jsonl(claims.ROWS, old + tuned_again)
    claims.main()
    [job] = jobs  # the grid is there; seed 0 of the release does not count
    assert (job["arm"], job["recipe"], job["seed"]) == ("K 1", "paper", 0)
    words = claims.command_line(job)
    assert words[words.index("--recipe") + 1] == "paper"
    assert claims.job_key(job) != claims.job_key({**job, "recipe": "release"})
    jobs.clear()
    write_jsonl(claims.ROWS, [*old, *tuned_again, {**job, "options": []}])
    claims.main()
    assert jobs == []
    monkeypatch.setattr(sys, "argv", ["claims.py", "--recipe", "release"])
    with pytest.raises(SystemExit):
        claims.main()
    assert "--recipe is for --table and --figures" in capsys.readouterr().err


def test_the_default_run_s_figure_is_of_one_recipe(monkeypatch, tmp_path):
    rows = bench_default.load_rows(bench_default.ROWS)
    stored = [row for row in rows if "recipe" not in row]
    assert len(stored) == 6
    write_jsonl(tmp_path / "default.jsonl", [*stored, {**stored[0], "recipe": "paper"}])
    monkeypatch.setattr(bench_default, "ROWS", tmp_path / "default.jsonl")
    drawn = []
    monkeypatch.setattr(bench_default, "draw", lambda rows, path: drawn.extend(rows))
    monkeypatch.setattr(sys, "argv", ["bench_default.py", "--figure", "x.png"])
    bench_default.main()
    assert drawn == [{**stored[0], "recipe": "paper"}]


def test_the_best_of_a_complete_grid_is_chosen():
    rows = claims.stored_rows("release")
    assert claims.chosen(rows, "PTD-PO") == ["--lr", "1e-3", "--lam", "10"]
    assert claims.chosen(rows, "K 1") == ["--lr", "1e-3", "--lam", "10"]
    assert claims.chosen(rows, "GRPO, KL penalty off") == ["--lr", "1e-4"]
    grid = [row for row in rows if row["split"] == "tune" and row["arm"] == "PTD-PO"]
    assert len(grid) == len(GRIDS["PTD-PO"])
    assert claims.chosen(grid[1:], "PTD-PO") is None


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
