"""plumbing/settings.py: options, defaults, bounds and their help."""

import json
import math
from dataclasses import asdict, fields

import pytest

import train
from plumbing import settings
from plumbing.settings import BOUNDS, EMBEDDED, THIS_RUN, flag, make_parser, read_settings
from ptdpo import PTDPOConfig
from toy.settings import SETTINGS
from train import TrainConfig

ALL = {setting.name: setting for setting in fields(TrainConfig)}
NUMBERS = [setting for setting in ALL.values() if setting.type in ("int", "float")]
NUMBER_NAMES = {setting.name for setting in NUMBERS}
CHOICES = [setting for setting in ALL.values() if "choices" in setting.metadata]


@pytest.fixture
def read(monkeypatch):
    """read(*argv): the config that train.py makes of a command line."""
    configs = []

    def keep_config(config_class, trainer_class, loop, toy, groups, argv):
        parser = make_parser(groups, toy.settings.SETTINGS)
        configs.append(read_settings(config_class, parser, toy.settings.SETTINGS, argv))

    def read_argv(*argv):
        train.main(list(argv))
        return configs[-1]

    monkeypatch.setattr(train, "run_command", keep_config)
    return read_argv


@pytest.fixture
def error_of(read, capsys):
    """error_of(*argv): the one line that train.py says of a command line before it ends."""

    def error(*argv):
        with pytest.raises(SystemExit) as stop:
            read(*argv)
        assert stop.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    return error


# ----------------------------------------------------------------------------------------- defaults
def test_toy_values_are_for_the_embedded_model(read):
    config = read()
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
    assert read("--model", EMBEDDED) == config
    others = set(ALL) - set(SETTINGS)
    assert all(getattr(config, name) == ALL[name].default for name in others)


def test_another_model_has_the_defaults_of_real_ones(read):
    name = "Qwen/Qwen2-VL-2B-Instruct"
    config = read("--model", name)
    assert (config.lr, config.questions, config.max_new_tokens) == (1e-6, 128, 4096)
    assert (config.lam, config.jsd_k, config.tau) == (0.05, 100, 1.0)
    assert (config.updates, config.warmup, config.eval_temperature) == (3, 0, 1.0)
    assert config == TrainConfig(model=name)


def test_a_given_value_goes_before_the_toy_value(read):
    config = read("--lam", "0", "--lr", "0.25", "--updates", "3")
    assert (config.lr, config.lam, config.updates) == (0.25, 0.0, 3)


@pytest.mark.parametrize(
    "argv, name, value",
    [
        ([], "plan", 0),
        (["--plan"], "plan", 1),
        (["--plan", "8"], "plan", 8),
        ([], "report", ""),
        (["--report"], "report", THIS_RUN),
        ([], "check", False),
        (["--check"], "check", True),
        ([], "freeze_vision", False),
        (["--freeze-vision"], "freeze_vision", True),
        ([], "scale_advantages", True),
        (["--scale-advantages"], "scale_advantages", True),
        (["--no-scale-advantages"], "scale_advantages", False),
    ],
)
def test_bare_options(read, argv, name, value):
    assert getattr(read(*argv), name) == value


# ------------------------------------------------------------------------------------------- bounds
def next_value(setting, limit, direction):
    """A value of a setting that is next to a limit: above it, or, for direction -1, below it.

    Not the next float: next to 0 the tests' processor flushes it to 0.
    """
    return limit + direction * (1 if setting.type == "int" else 1e-6)


def values_at_bounds(inside):
    """(name, value) for each rule of each setting: the last value inside of it, or outside."""
    cases = []
    for setting in NUMBERS:
        for rule, limit in setting.metadata.items():
            if rule not in BOUNDS:
                continue
            upward = 1 if rule in ("above", "at_least") else -1
            allowed = rule in ("at_least", "at_most")
            if inside:
                value = limit if allowed else next_value(setting, limit, upward)
            else:
                value = next_value(setting, limit, -upward) if allowed else limit
            cases.append((setting.name, value))
    return cases


def test_every_number_has_a_bound():
    unbounded = [setting.name for setting in NUMBERS if not set(setting.metadata) & set(BOUNDS)]
    assert not unbounded
    assert len(values_at_bounds(inside=True)) >= len(NUMBERS) == 37


@pytest.mark.parametrize("name, value", values_at_bounds(inside=True))
def test_a_value_just_inside_a_bound_is_taken(name, value, monkeypatch):
    monkeypatch.setattr(settings, "find_spec", lambda package: True)
    assert getattr(TrainConfig(**{name: value}), name) == value


@pytest.mark.parametrize("name, value", values_at_bounds(inside=False))
def test_a_value_just_outside_a_bound_is_refused_by_the_option_s_name(name, value):
    with pytest.raises(ValueError, match=f"^{flag(name)} must be .*, got {value}$"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", [setting.name for setting in NUMBERS])
def test_nan_is_refused(name):
    with pytest.raises(ValueError, match=f"^{flag(name)} must be .*, got nan$"):
        TrainConfig(**{name: math.nan})


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", [setting.name for setting in NUMBERS])
def test_infinity_is_refused(name, sign):
    value = sign * math.inf
    with pytest.raises(ValueError, match=f"^{flag(name)} must be .*, got {value}$"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("text", ["inf", "nan", "1e400", "-inf"])
@pytest.mark.parametrize("name", [setting.name for setting in NUMBERS if setting.type == "float"])
def test_a_float_that_is_not_finite_is_one_line_on_the_command_line(name, text, error_of):
    line = error_of(f"{flag(name)}={text}")
    assert line.startswith(f"train.py: error: {flag(name)} must be ")


METHOD_NUMBERS = [setting.name for setting in fields(PTDPOConfig) if setting.name in NUMBER_NAMES]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", METHOD_NUMBERS)
def test_the_method_s_config_alone_refuses_what_is_not_finite(name, value):
    with pytest.raises(ValueError, match=f"^{flag(name)} must be .*, got {value}$"):
        PTDPOConfig(**{name: value})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"lr": math.inf}, "--lr must be finite, got inf"),
        ({"lr": "fast"}, "--lr must be a number, got 'fast'"),
        ({"lr": None}, "--lr must be a number, got None"),
        ({"steps": 2.5}, "--steps must be a whole number, got 2.5"),
        ({"steps": math.inf}, "--steps must be a whole number, got inf"),
    ],
)
def test_the_message_says_what_the_number_must_be(values, message):
    with pytest.raises(ValueError) as error:
        TrainConfig(**values)
    assert str(error.value) == message


def test_an_int_beyond_all_floats_is_finite():
    assert TrainConfig(steps=10**400).steps == 10**400


@pytest.mark.parametrize(
    "name, choice",
    [(setting.name, choice) for setting in CHOICES for choice in setting.metadata["choices"]],
)
def test_each_choice_is_taken(name, choice, monkeypatch):
    monkeypatch.setattr(settings, "find_spec", lambda package: True)
    assert getattr(TrainConfig(**{name: choice}), name) == choice


@pytest.mark.parametrize("setting", CHOICES, ids=lambda setting: setting.name)
def test_another_text_than_the_choices_is_refused_by_the_option_s_name(setting, error_of):
    allowed = ", ".join(setting.metadata["choices"])
    with pytest.raises(ValueError) as error:
        TrainConfig(**{setting.name: "neither"})
    option = flag(setting.name)
    assert str(error.value) == f"{option} must be one of {allowed}, got 'neither'"
    assert f"argument {option}: invalid choice: 'neither'" in error_of(option, "neither")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--tau", "0"], "--tau must be above 0 and at most 1, got 0.0"),
        (["--tau", "nan"], "--tau must be above 0 and at most 1, got nan"),
        (["--clip-low", "1"], "--clip-low must be at least 0 and below 1, got 1.0"),
        (["--jsd-k", "0"], "--jsd-k must be at least 1, got 0"),
        (["--dual-clip", "0.5"], "--dual-clip must be 0 or above 1, got 0.5"),
        (["--dual-clip", "1"], "--dual-clip must be 0 or above 1, got 1.0"),
        (["--seed", "1000"], "--seed must be at least 0 and at most 999, got 1000"),
        (["--name", ".."], "--name must be a plain folder name, got '..'"),
        (["--name", "a/b"], "--name must be a plain folder name, got 'a/b'"),
    ],
)
def test_a_bad_value_is_one_line(error_of, argv, message):
    assert error_of(*argv) == f"train.py: error: {message}"


@pytest.mark.parametrize(
    "values, package",
    [
        ({"lora": 4}, "peft"),
        ({"log_with": "wandb"}, "wandb"),
        ({"log_with": "tensorboard"}, "tensorboard"),
    ],
)
def test_a_package_that_is_missing_is_named(values, package, monkeypatch):
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"{package} is not installed; python -m pip install"):
        TrainConfig(**values)


# --------------------------------------------------------------------------------------------- help
@pytest.fixture
def help_text(read, capsys):
    with pytest.raises(SystemExit):
        read("--help")
    return capsys.readouterr().out


def test_help_names_every_option(help_text):
    assert len(help_text.splitlines()) <= 100
    for name in ALL:
        lines = [line for line in help_text.splitlines() if line.startswith(f"  {flag(name)} ")]
        is_switch = f"\n  {flag(name)}, --no-" in help_text or f"\n  {flag(name)}\n" in help_text
        assert is_switch or len(lines) == 1, name


def entry(help_text, name):
    """The help of one option in one line: from its name to the next option or group."""
    start = help_text.index(f"\n  {flag(name)}") + len("\n  --")
    text = help_text[start:].partition("\n  --")[0].partition("\n\n")[0]
    return " ".join(text.split())


@pytest.mark.parametrize("name", SETTINGS)
def test_help_shows_the_real_and_the_embedded_default(help_text, name):
    shown = entry(help_text, name)
    assert shown.endswith(f"[{ALL[name].default} | {SETTINGS[name]}]")
    assert ALL[name].metadata["help"] in shown


@pytest.mark.parametrize("name", [s.name for s in NUMBERS if s.name not in SETTINGS])
def test_help_shows_one_default_where_there_is_one(help_text, name):
    default = ALL[name].metadata.get("shown", ALL[name].default)
    assert entry(help_text, name).endswith(f"[{default}]")


# ----------------------------------------------------------------------------- config.json of a run
QUICK = [
    *("--steps", "1"),
    *("--questions", "1"),
    *("--group-size", "2"),
    *("--eval-questions", "1"),
    *("--max-new-tokens", "2"),
]


def test_config_json_of_a_run_holds_exactly_the_fields(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*QUICK, "--name", "x", "--tau", "0.5"])
    saved = json.loads((tmp_path / "runs" / "x" / "config.json").read_text())
    assert sorted(saved) == sorted(ALL)
    assert TrainConfig(**saved).tau == 0.5
    assert (saved["steps"], saved["model"], saved["lam"]) == (1, EMBEDDED, 10.0)


@pytest.fixture
def finished(tmp_path):
    """The folder of a run with settings of its own."""
    config = TrainConfig(model="a/b", lam=0.5, steps=7, name="x")
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    return tmp_path


def test_a_resumed_run_has_its_own_settings_and_only_more_steps(read, error_of, finished):
    folder = str(finished)
    saved = json.loads((finished / "config.json").read_text())
    assert read("--resume", folder) == TrainConfig(**{**saved, "resume": folder})
    config = read("--resume", folder, "--steps", "9")
    assert config == TrainConfig(**{**saved, "resume": folder, "steps": 9})
    message = error_of("--resume", folder, "--steps", "9", "--lam", "0.5")
    assert "--lam cannot stand beside --resume: the run has its own settings" in message


def test_a_page_of_a_finished_run_has_the_run_s_settings(read, error_of, finished):
    folder = str(finished)
    config = read("--report", folder)
    assert (config.report, config.lam, config.steps) == (folder, 0.5, 7)
    assert "--steps cannot stand beside --report" in error_of("--report", folder, "--steps", "9")


@pytest.mark.parametrize("option", ["--resume", "--report"])
@pytest.mark.parametrize(
    "name, text, message",
    [
        ("lr", "Infinity", "--lr must be finite, got inf"),
        ("weight_decay", "NaN", "--weight-decay must be at least 0, got nan"),
        ("lam", "1e999", "--lam must be finite, got inf"),
        ("temperature", '"warm"', "--temperature must be a number, got 'warm'"),
        ("recipe", '"cake"', "--recipe must be one of paper, "),
    ],
)
def test_a_bad_value_in_config_json_is_one_line(error_of, finished, option, name, text, message):
    file = finished / "config.json"
    saved = json.loads(file.read_text())
    others = json.dumps({key: value for key, value in saved.items() if key != name})
    file.write_text(f'{others[:-1]}, "{name}": {text}}}')
    line = error_of(option, str(finished))
    assert line.startswith(f"train.py: error: {option} {finished}: {message}")


@pytest.mark.parametrize("option", ["--resume", "--report"])
@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "FileNotFoundError"),
        ("{oops", "JSONDecodeError"),
        ('{"steps": 7}', "KeyError"),
        ("[]", "TypeError"),
    ],
)
def test_a_folder_without_settings_of_this_version_is_refused(
    error_of, tmp_path, option, text, reason
):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    message = f"{option} {tmp_path}: no config.json of a run of this version in it ({reason}"
    assert message in error_of(option, str(tmp_path))
