"""Settings: a dataclass field becomes a command-line option and an entry of config.json.

The bounds of an option stand beside its default:

    tau: float = option(1.0, "tutor groups whose accuracy is below this", above=0, at_most=1)

A config of the method, of the loop and of the run (RunConfig, below) are joined by inheritance, so
that a run has one flat config object.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import os
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import Path

from plumbing.recipes import RECIPES

EMBEDDED = str(Path(__file__).resolve().parent.parent / "toy" / "base")
THIS_RUN = "this run"
BOUNDS = {
    "above": (operator.gt, "above"),
    "at_least": (operator.ge, "at least"),
    "below": (operator.lt, "below"),
    "at_most": (operator.le, "at most"),
}
NUMBERS = {"int": (Integral, "a whole number"), "float": (Real, "a number")}


def is_embedded(model: str) -> bool:
    """Whether a model's path is that of the embedded one, however it is written."""
    return Path(model).resolve() == Path(EMBEDDED)


def option(default, text: str, **rules):
    """A dataclass field that is also a command-line option, with its help text.

    rules: above, at_least, below, at_most (bounds of a number); choices (the allowed texts); shown
    (what the help shows as the default); const (the value of a bare option, without an argument).
    """
    return field(default=default, metadata={"help": text, **rules})


def flag(name: str) -> str:
    """group_size -> --group-size"""
    return "--" + name.replace("_", "-")


def check_bounds(config) -> None:
    """Raise ValueError with the option's name where a value breaks the rules of its field.

    A number must be of its field's type, within the field's bounds, and finite.
    """
    for setting in fields(config):
        value, rules = getattr(config, setting.name), setting.metadata
        if setting.type in NUMBERS:
            _check_number(setting, value)
        if "choices" in rules and value not in rules["choices"]:
            allowed = ", ".join(rules["choices"])
            raise ValueError(f"{flag(setting.name)} must be one of {allowed}, got {value!r}")


def _check_number(setting, value) -> None:
    """Raise ValueError unless the value is what a field of type int or float may hold."""
    option_name, rules = flag(setting.name), setting.metadata
    kind, kind_name = NUMBERS[setting.type]
    if not isinstance(value, kind):  # from a config.json, or from code
        raise ValueError(f"{option_name} must be {kind_name}, got {value!r}")
    bounds = {name: rules[name] for name in BOUNDS if name in rules}
    if not all(BOUNDS[name][0](value, limit) for name, limit in bounds.items()):
        text = " and ".join(f"{BOUNDS[name][1]} {limit}" for name, limit in bounds.items())
        raise ValueError(f"{option_name} must be {text}, got {value}")
    # TRAP: infinity passes a bound on one side. math.isfinite raises for an int beyond all floats.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{option_name} must be finite, got {value}")


@dataclass
class RunConfig:
    """Settings that the paper does not speak of: where things come from, go to, and run."""

    model: str = option(
        EMBEDDED, "model, by hub name or path (embedded: toy/base)", shown="toy/base"
    )
    data: str = option(
        "",
        "questions: a .jsonl file, or a dataset's folder or hub name (pip install datasets)",
        shown="puzzles",
    )
    eval_data: str = option("", "held-out questions, as --data", shown="held-out puzzles")
    split: str = option("train", "split of a dataset in --data")
    eval_split: str = option("test", "split of a dataset in --eval-data")
    image_dir: str = option(
        "", "folder that image paths are relative to and must be in", shown="the .jsonl's"
    )
    columns: str = option(
        "",
        "columns of --data and --eval-data with unusual names: FIELD=COLUMN,... such as "
        "question=query,answer=label",
        shown="the usual names",
    )
    skip_bad: bool = option(
        False, "leave out what cannot be read, and list it, instead of stopping at the first"
    )
    max_prompt: int = option(
        8192, "a question with a longer prompt, in tokens, is left out, never cut", at_least=1
    )
    min_pixels: int = option(0, "smallest area of an image, pixels; 0: the model's own", at_least=0)
    max_pixels: int = option(
        0,
        "largest area of an image, pixels; 0: the model's own. One token is 28 * 28 pixels, in "
        "Qwen3-VL 32 * 32",
        at_least=0,
    )
    hints: str = option(
        "", "hints for --data by id, a file of plumbing.build_hints", shown="the data's own"
    )
    max_hint_tokens: int = option(512, "a longer hint is dropped, never cut", at_least=1)
    verifier: str = option(
        "rules",
        "rules: ours; math: math-verify as well, for more LaTeX (pip install math-verify)",
        choices=("rules", "math"),
    )
    recipe: str = option(
        "paper",
        "settings of a method, where no other option sets them: plumbing/recipes.py",
        choices=tuple(RECIPES),
    )
    name: str = option("", "run name: a new folder runs/NAME", shown="date-time")
    lora: int = option(
        0,
        "rank of LoRA adapters, trained instead of the weights; 0: none (pip install peft)",
        at_least=0,
    )
    freeze_vision: bool = option(
        False, "do not train the vision tower (paper: trained); it then sees each image once"
    )
    precision: str = option(
        "auto", "no, bf16, or auto: bf16 on a GPU", choices=("auto", "no", "bf16")
    )
    micro_tokens: int = option(
        4096,
        "most tokens in one forward pass, per process: each prompt once, its responses, padding; "
        "a larger response goes alone and recomputes its activations",
        at_least=1,
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass: less memory, but every response runs its "
        "prompt again",
    )
    logits_mb: float = option(
        512,
        "MiB for logits while scoring, per process: how many tokens meet the output head at once",
        above=0,
    )
    sample_mb: float = option(
        0,
        "MiB for the sequences that decode together, per process; 0: 80 % of what is free (on a "
        "CPU at most 4096 count as free)",
        at_least=0,
    )
    eval_every: int = option(50, "steps between evaluations", at_least=1)
    eval_questions: int = option(400, "held-out questions per evaluation", at_least=1)
    save_every: int = option(
        50, "steps between checkpoints; one more is written at a stop and at the end", at_least=1
    )
    keep: int = option(2, "checkpoints kept, the newest", at_least=1)
    resume: str = option(
        "",
        "go on with the run in this folder, from its newest checkpoint; only --steps may stand "
        "beside it",
        shown="a new run",
    )
    log_with: str = option(
        "none",
        "also send the log to a tracker (pip install tensorboard, or wandb)",
        choices=("none", "tensorboard", "wandb"),
    )
    check: bool = option(
        False,
        "no training: is the machinery right for this model and these questions? Run it before "
        "any long run",
    )
    study_hints: bool = option(
        False,
        "no training: what do the hints do to the frozen model? Do they leak, move nothing, act "
        "like solutions, or help? A table and a page (paper: figures 2, 3, 5)",
    )
    study_questions: int = option(
        128, "questions of --study-hints, the first ones of a run (paper: 384)", at_least=2
    )
    study_samples: int = option(
        16, "responses per question and context of --study-hints (paper: 16)", at_least=2
    )
    plan: int = option(
        0,
        "no training: predicted memory of each part on this many GPUs, sharded if more than one",
        shown="0; 1 if bare",
        const=1,
        at_least=0,
    )
    report: str = option(
        "",
        "also write report.html, a page with questions, hints, and responses before and after, "
        "token by token; with a finished run's folder: only that",
        shown="no; this run if bare",
        const=THIS_RUN,
    )

    def __post_init__(self):
        check_bounds(self)
        trackers = [self.log_with] if self.log_with != "none" else []
        adapters = ["peft"] if self.lora else []
        for package in trackers + adapters:
            if find_spec(package) is None:
                raise ValueError(f"{package} is not installed; python -m pip install {package}")
        if self.name and (Path(self.name).name != self.name or self.name in (".", "..")):
            raise ValueError(f"--name must be a plain folder name, got {self.name!r}")
        if len(os.fsencode(self.name)) > 255:
            raise ValueError(f"--name must have at most 255 bytes, got {self.name[:40]!r}...")


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, instead of every option and then the error."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(groups: dict[str, type], toy: dict) -> Parser:
    """One option for each field that a config class of `groups` (title -> class) itself declares.

    toy: what the embedded model uses instead of the defaults, for the help.
    """
    parser = Parser(
        prog="train.py",
        usage="python train.py [options]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=125),
        description="Train a vision-language model with PTD-PO (arXiv 2606.07000). Defaults in "
        "[brackets]: real models | embedded one. Where no source is named, the choice is ours.",
    )
    for title, config_class in groups.items():
        group = parser.add_argument_group(title)
        for setting in fields(config_class):
            if setting.name in config_class.__annotations__:
                _add_option(group, setting, toy)
    return parser


def _add_option(group, setting, toy: dict) -> None:
    rules = setting.metadata
    shown = rules.get("shown", setting.default)
    if setting.name in toy:
        shown = f"{shown} | {toy[setting.name]}"
    if setting.type == "bool":
        how = {"action": "store_true"}
        text = rules["help"]
        if setting.default or setting.name in toy:
            how = {"action": argparse.BooleanOptionalAction}
            text = f"{text} [{shown}]"
    else:
        choices = rules.get("choices")
        how = {
            "type": {"int": int, "float": float, "str": str}[setting.type],
            "choices": choices,
            "metavar": "|".join(choices) if choices else setting.type.upper(),
        }
        if "const" in rules:
            how |= {"nargs": "?", "const": rules["const"]}
        text = f"{rules['help']} [{shown}]".replace("%", "%%")
    group.add_argument(flag(setting.name), default=None, help=text, **how)


def read_settings(config_class, parser: Parser, toy: dict, argv=None):
    """The command line as a config_class. Bad values end the program: one line, exit code 2.

    Defaults are for real models. With the embedded model, `toy` has values of its own. With
    --resume or --report of a folder, the settings are those in the folder's config.json.
    """
    parsed = vars(parser.parse_args(argv))
    given = {name: value for name, value in parsed.items() if value is not None}
    origin = ""
    if given.get("resume"):
        origin = f"--resume {given['resume']}: "
        given = _settings_of_run(config_class, parser, given, "resume", allowed={"steps"})
    elif given.get("report", THIS_RUN) != THIS_RUN:
        origin = f"--report {given['report']}: "
        given = _settings_of_run(config_class, parser, given, "report", allowed=set())
    embedded = "model" not in given or is_embedded(given["model"])
    recipe = RECIPES.get(given.get("recipe", "paper"), {})  # a config.json may name any recipe
    values = {**recipe, **(toy if embedded else {}), **given}
    try:
        return config_class(**values)
    except ValueError as error:
        parser.error(f"{origin}{error}")


def _settings_of_run(config_class, parser: Parser, given: dict, name: str, allowed: set) -> dict:
    """The settings of the run that option `name` points to, and what may be given beside it."""
    others = sorted(set(given) - allowed - {name})
    if others:
        parser.error(
            f"{flag(others[0])} cannot stand beside {flag(name)}: the run has its own settings"
        )
    try:
        saved = json.loads((Path(given[name]) / "config.json").read_text())
        return {**{setting.name: saved[setting.name] for setting in fields(config_class)}, **given}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        parser.error(
            f"{flag(name)} {given[name]}: no config.json of a run of this version in it ({reason})"
        )
