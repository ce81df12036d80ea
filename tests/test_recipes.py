"""--recipe: legal values, what wins over what, and what each recipe changes of a step's losses."""

import copy
import json
import math
from dataclasses import asdict, fields

import pytest
import torch
from conftest import flat
from test_settings import QUICK
from two_processes import make_trainer

import train
from plumbing.recipes import RECIPES
from plumbing.settings import RunConfig, flag, make_parser, read_settings
from ptdpo import PTDPOConfig, ptdpo_loss, response_weights
from toy import world
from toy.settings import SETTINGS
from train import TrainConfig

OTHERS = [name for name in RECIPES if name != "paper"]
DEFAULTS = {setting.name: setting for setting in fields(TrainConfig)}
REAL_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
GROUPS = {"the method": PTDPOConfig, "the loop": TrainConfig, "the run": RunConfig}


def read(*argv, embedded=SETTINGS):
    """The config that train.py makes of a command line. embedded: toy.settings.SETTINGS."""
    return read_settings(TrainConfig, make_parser(GROUPS, embedded), embedded, list(argv))


# ------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_changes_known_fields_to_other_legal_values(name):
    recipe = RECIPES[name]
    method = {setting.name for setting in fields(PTDPOConfig)}
    assert set(recipe) <= method
    config = TrainConfig(**recipe)
    for field, value in recipe.items():
        assert type(value).__name__ == DEFAULTS[field].type
        assert value != DEFAULTS[field].default
        assert getattr(config, field) == value


def test_the_paper_s_recipe_is_the_defaults():
    assert RECIPES["paper"] == {}
    assert read("--model", REAL_MODEL, "--recipe", "paper") == TrainConfig(model=REAL_MODEL)
    assert read("--recipe", "paper") == read()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_wins_over_the_defaults_and_over_nothing_else(name):
    config = read("--model", REAL_MODEL, "--recipe", name)
    assert config == TrainConfig(model=REAL_MODEL, recipe=name, **RECIPES[name])
    embedded = read("--recipe", name)
    assert embedded == TrainConfig(recipe=name, **RECIPES[name], **SETTINGS)


def words_for(field, value):
    """An option that sets a field to a value."""
    if isinstance(value, bool):
        return [flag(field) if value else flag(field).replace("--", "--no-")]
    return [flag(field), str(value)]


@pytest.mark.parametrize("model", [[], ["--model", REAL_MODEL]], ids=["embedded", "real"])
@pytest.mark.parametrize(
    "name, field", [(name, field) for name in OTHERS for field in RECIPES[name]]
)
def test_an_option_wins_over_the_recipe(name, field, model):
    default = DEFAULTS[field].default
    for argv in (
        [*model, "--recipe", name, *words_for(field, default)],
        [*model, *words_for(field, default), "--recipe", name],
    ):
        expected = {**asdict(read(*model, "--recipe", name)), field: default}
        assert asdict(read(*argv)) == expected


def test_no_recipe_names_a_field_of_the_embedded_model_s_own_values():
    for name, recipe in RECIPES.items():
        assert not set(recipe) & set(SETTINGS), name


def test_the_embedded_model_s_own_values_would_win_over_the_recipe():
    def clip_high(*argv):
        return read(*argv, embedded={**SETTINGS, "clip_high": 0.7}).clip_high

    assert clip_high("--recipe", "release") == 0.7
    assert clip_high("--recipe", "release", "--clip-high", "0.1") == 0.1
    assert clip_high("--recipe", "release", "--model", REAL_MODEL) == 0.3


# ------------------------------------------------------------------------------- a run and --resume
@pytest.mark.parametrize("name, option", [("release", ["--kl-on", "all"]), ("dr-grpo", [])])
def test_config_json_has_the_recipe_and_its_values_and_resume_keeps_them(
    name, option, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs" / "x" / "config.json"
    train.main([*QUICK, "--name", "x", "--recipe", name, *option])
    saved = json.loads(path.read_text())
    expected = {"recipe": name, **RECIPES[name]}
    if option:
        expected["kl_on"] = "all"
    assert {field: saved[field] for field in expected} == expected
    others = set(DEFAULTS) - set(expected) - set(SETTINGS) - {"name", "eval_questions"}
    assert all(saved[field] == DEFAULTS[field].default for field in others)
    configs = []
    engine = train.Trainer.__init__

    def note_config(trainer, config, *arguments):
        configs.append(config)
        engine(trainer, config, *arguments)

    monkeypatch.setattr(train.Trainer, "__init__", note_config)
    train.main(["--resume", "runs/x", "--steps", "2"])
    [config] = configs
    assert asdict(config) == {**saved, "steps": 2, "resume": "runs/x"}
    assert json.loads(path.read_text()) == {**saved, "steps": 2}


# ----------------------------------------------------------------------------- one step per recipe
VERDICTS = ((True, True, True), (True, False, True), (False, True, False), (False, False, False))
# recipe -> the parts that differ from the paper's on the same responses
DIFFERENT_PARTS = {
    "paper": set(),
    "release": {"policy_loss", "kl", "tutor_loss"},
    "dapo": {"policy_loss", "kl"},
    "gspo": {"policy_loss"},
    "dr-grpo": {"policy_loss", "kl"},
}


class Step:
    """Graded responses, and two students: the one who wrote them and the one who is updated.

    The responses are cut to unequal lengths, so that the means differ. The students differ from
    the reference and from each other, so that ratio, clip and KL differ. Each step starts from
    these.
    """

    def __init__(self):
        self.trainer = make_trainer(group_size=3, questions=4, max_new_tokens=30, updates=2)
        self.writer = self.moved(seed=1)
        questions = world.puzzles("tune", len(VERDICTS))
        self.groups = self.trainer.sample(self.trainer.read(questions))
        verdicts = [correct for row in VERDICTS for correct in row]
        for number, response in enumerate(flat(self.groups)):
            response.correct, response.reward = verdicts[number], float(verdicts[number])
            response.ids = response.ids[: 3 + number]
        self.updated = self.moved(seed=2)

    def moved(self, seed):
        """The student's weights, with noise."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.trainer.policy.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.15 * parameter.std() * noise
        return copy.deepcopy(self.trainer.policy.state_dict())

    def parts(self, recipe, lam):
        """What one optimizer step logs."""
        trainer, groups = self.trainer, copy.deepcopy(self.groups)
        settings = {**asdict(trainer.config), **asdict(TrainConfig(lam=lam)), **RECIPES[recipe]}
        kept = {"group_size": 3, "questions": 4, "max_new_tokens": 30, "updates": 2}
        trainer.config = TrainConfig(**{**settings, **kept})
        trainer.policy.load_state_dict(self.writer)
        trainer.assign(groups)
        trainer.policy.load_state_dict(self.updated)
        return trainer.score(flat(groups)) | trainer.step()


@pytest.fixture(scope="module")
def step():
    return Step()


@pytest.fixture(scope="module")
def of_paper(step):
    """lam -> the parts of the paper's recipe."""
    return {lam: step.parts("paper", lam) for lam in (0.0, 0.05)}


def test_each_recipe_has_its_line_in_the_table():
    assert set(DIFFERENT_PARTS) == set(RECIPES)


@pytest.mark.parametrize("lam", [0.05, 0.0])
@pytest.mark.parametrize("name", RECIPES)
def test_one_step_of_each_recipe_has_its_own_losses(name, lam, step, of_paper):
    parts, paper = step.parts(name, lam), of_paper[lam]
    assert all(math.isfinite(value) for value in parts.values()), parts
    assert parts["grad_norm"] > 0
    assert parts["skipped_steps"] == 0
    tutored = lam > 0
    assert (parts["tutor_loss"] > 0) == tutored
    assert (parts["kl"] > 0) == (RECIPES[name].get("beta_kl") != 0)
    expected = DIFFERENT_PARTS[name] if tutored else DIFFERENT_PARTS[name] - {"tutor_loss"}
    names = ("policy_loss", "kl", "tutor_loss")
    different = {part for part in names if parts[part] != pytest.approx(paper[part], rel=1e-3)}
    assert different == expected, (parts, paper)


# -------------------------------------------------------------------- the release, by plain formula
LENGTHS = torch.tensor([[3, 5, 2], [4, 1, 6], [2, 7, 0]])  # the last one is left out of the loss
CORRECT = torch.tensor([[True, True, True], [False, True, False], [True, False, False]])
ADVANTAGES = torch.tensor([[0.0, 0.0, 0.0], [-0.6, 1.2, -0.6], [1.2, -0.6, -0.6]])


def by_plain_formula(logp, old_logp, reference, divergence):
    """Sums over tokens, one by one. In its mean, the KL penalty of a group with tutoring is 0."""
    policy, kl, tutor = [], [], []
    for n in range(3):
        has_tutoring = not CORRECT[n].all()
        for g in range(3):
            advantage = ADVANTAGES[n, g].item()
            for t in range(LENGTHS[n, g]):
                ratio = math.exp(logp[n, g, t] - old_logp[n, g, t])
                clipped = min(max(ratio, 1 - 0.2), 1 + 0.3)
                loss = max(-ratio * advantage, -clipped * advantage)
                if advantage < 0:
                    loss = min(loss, -3.0 * advantage)
                policy.append(loss)
                gap = (reference[n, g, t] - logp[n, g, t]).item()
                kl.append(0 if has_tutoring else math.exp(gap) - gap - 1)
                if has_tutoring and not CORRECT[n, g]:
                    tutor.append(divergence[n, g, t].item())
    parts = {"policy_loss": policy, "kl": kl, "tutor_loss": tutor}
    return {name: sum(values) / len(values) for name, values in parts.items()}


def test_the_release_has_the_losses_of_its_formulas():
    config = read("--recipe", "release")
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(3, 3, 7, generator=generator, dtype=torch.float64) for _ in range(3)]
    logp, old_logp, reference = tables
    divergence = torch.rand(3, 3, 7, generator=generator, dtype=torch.float64)
    weights = response_weights(config, LENGTHS, ~CORRECT, longest=48)
    mask = torch.arange(7) < LENGTHS.flatten().unsqueeze(1)
    total, parts = ptdpo_loss(
        config,
        logp.flatten(0, 1),
        old_logp.flatten(0, 1),
        ADVANTAGES.flatten(),
        mask,
        type(weights)(*(table.flatten() for table in weights)),
        divergence.flatten(0, 1),
        reference.flatten(0, 1),
    )
    expected = by_plain_formula(logp, old_logp, reference, divergence)
    ratios = (logp - old_logp).exp().flatten(0, 1)[mask]
    assert ratios.min() < 0.8
    assert ratios.max() > 3, "all clips must act"
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected, abs=1e-6)
    by_hand = expected["policy_loss"] + 0.01 * expected["kl"] + config.lam * expected["tutor_loss"]
    assert total.item() == pytest.approx(by_hand, abs=1e-6)
