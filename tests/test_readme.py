"""README, docs/ and CONTRIBUTING do what stands there.

Every command runs in this process on a tiny model and a few questions. A measurement of hours does
not run; its options are looked up in the script. Links, functions and tests that the pages name
must exist.
"""

import importlib
import json
import re
import shlex

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, make_tiny, write_jsonl
from PIL import Image
from test_build_hints import GOOD, chat_reply, serve  # noqa: F401

import train
from plumbing.answers import main as answers
from plumbing.build_hints import main as build_hints
from plumbing.hint_file import load_hints
from plumbing.slow_motion import main as slow_motion

INSTALL = "python -m pip install -r requirements.txt && "
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
FEW = shlex.split(
    "--steps 1 --questions 2 --group-size 2 --max-new-tokens 6 --eval-questions 2 "
    "--study-questions 3 --study-samples 2"
)


def read(path):
    return path.read_text(encoding="utf-8")


def without_code(text):
    return FENCE.sub("", text)


def commands_of(text):
    """Lines of code blocks without a language, and inline code, that start like a command."""
    commands = []
    for language, body in FENCE.findall(text):
        if not language:
            commands += [line.partition(" #")[0].strip() for line in body.splitlines()]
    commands += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_code(text))]
    starts = ("python ", "accelerate ", "ruff ")
    return [command for command in commands if command.startswith(starts)]


README_COMMANDS = commands_of(read(PAGES[0]))
COMMANDS = sorted({command for page in PAGES for command in commands_of(read(page))})


# ----------------------------------------------------------------------------------- commands
def test_the_commands_were_found():
    assert README_COMMANDS[:2] == [INSTALL + "python train.py", INSTALL + "python -m pytest -q"]
    assert len(README_COMMANDS) >= 6
    assert len(COMMANDS) >= 25
    # .ci/run runs the second one, word for word
    ci = read(ROOT / ".ci" / "run")
    assert "^python -m pip install -r requirements.txt && python -m pytest" in ci


@pytest.fixture
def place(tmp_path, monkeypatch, base):
    """What a reader would have: a model that is not the embedded one, questions, hints."""
    monkeypatch.chdir(tmp_path)
    make_tiny("Qwen2VL", base[1]).save_pretrained("model")
    base[1].save_pretrained("model")
    Image.new("RGB", (112, 112), "red").save("a.png")
    rows, hints = [], []
    for i in range(4):
        question = f"How many points in row {i} ?"
        row = {"id": str(i), "question": question, "answer": "7", "images": ["a.png"]}
        rows.append({**row, "hint": "look at the top row"})
        hints.append({"id": str(i), "hint": {"look": ["the top row"]}})
    for name, lines in (("questions", rows), ("heldout", rows), ("hints", hints)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def stand_in(word):
    """The tiny model for a hub model, the four questions for a hub dataset."""
    if word.startswith("Qwen/"):
        return "model"
    if word.startswith("PAPOGalaxy/"):
        return "questions.jsonl"
    return word


def check_options(script, args):
    """A script that takes minutes or hours: it compiles and knows the options."""
    source = read(ROOT / script)
    compile(source, script, "exec")
    known = re.findall(r'add_argument\(\s*"(--[\w-]+)"', source)
    assert set(known) >= {word for word in args if word.startswith("--")}


def run_build_hints(args, place, server):
    (place / "hints.jsonl").unlink()
    if "--api-base" in args:
        args[args.index("--api-base") + 1] = server.url
    else:  # by the model itself, which is random and never ends its response
        args += ["--samples", "1", "--max-new-tokens", "4"]
    assert build_hints(args) == 0
    assert len(load_hints(place / "hints.jsonl")) == 4


STOPS = {"--help": 0, "--check": 1}  # a random model of 6 tokens per response is not all right
PRINTED = {
    "--plan": "predicted memory, each of",
    "--check": "ok   the ratio is 1",
    "--study-hints": "hints leak: no",
    "--help": "--tau",
    "--report": "report.html",
}


def run_train(args, capsys):
    if "runs/NAME" in args:
        train.main([*FEW, "--name", "NAME"])
        if "--resume" in args:
            args = [*args, "--steps", "2"]
    elif "--plan" not in args:
        args = [*args, *FEW]
    stops = [code for word, code in STOPS.items() if word in args]
    if stops:
        with pytest.raises(SystemExit) as stop:
            train.main(args)
        assert stop.value.code == stops[0]
    else:
        train.main(args)
    expected = [text for word, text in PRINTED.items() if word in args]
    expected = expected or ["accuracy, plain prompt"]
    assert expected[0] in capsys.readouterr().out


def slow_where_it_is(command):
    return pytest.param(command, marks=pytest.mark.slow) if "slow_motion" in command else command


@pytest.mark.parametrize("command", [slow_where_it_is(command) for command in COMMANDS])
def test_command(command, place, serve, capsys):  # noqa: F811
    if command == "ruff check . && ruff format --check .":
        return  # CI's, and not in requirements.txt
    words = [stand_in(word) for word in shlex.split(command.removeprefix(INSTALL))]
    if words[:3] == ["python", "-m", "pip"]:
        return  # an install
    if words[:3] == ["python", "-m", "pytest"]:
        files = [word for word in words[3:] if word not in ("-q", "-m", "slow")]
        assert all((ROOT / name).is_file() for name in files)
        return  # this run itself
    if words[:3] == ["python", "-m", "plumbing.build_hints"]:
        server = serve(lambda question, before: chat_reply(GOOD))
        return run_build_hints(words[3:], place, server)
    if words[:3] == ["python", "-m", "plumbing.answers"]:
        write_jsonl(place / words[3], [{"answer": "5", "response": "\\boxed{5}"}])
        assert answers(words[3:]) == 0
        return None
    if words[:3] == ["python", "-m", "plumbing.slow_motion"]:
        return slow_motion(words[3:])
    if words[0] == "accelerate":
        launch = launch_command_parser().parse_args(words[2:])
        assert launch.training_script == "train.py"
        assert (ROOT / launch.config_file).is_file()
        words = ["python", *words[words.index("train.py") :]]
    script, args = words[1], words[2:]
    if script.startswith(("bench/", "toy/")):
        return check_options(script, args)
    assert script == "train.py", command
    run_train(args, capsys)


# -------------------------------------------------------------------------------------- README
def test_the_readme_is_short():
    lines = read(PAGES[0]).splitlines()
    assert len(lines) <= 150
    for line in lines:
        assert len(line) <= 120 or line.startswith("|"), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile(page):
    for language, body in FENCE.findall(read(page)):
        if language == "python":
            compile(body, page.name, "exec")


def test_the_torch_for_the_cpu_is_one_that_the_requirements_allow():
    [cap] = re.findall(r"^torch\b.*<([\d.]+)", read(ROOT / "requirements.txt"), re.M)
    assert f'"torch<{cap}" --index-url https://download.pytorch.org/whl/cpu' in read(PAGES[0])


# --------------------------------------------------------------------------------------- links
def anchors(path):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(read(path)), re.M)
    words = [re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in words}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_point_to_something(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(read(page)))
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_each_page_of_docs_is_linked_from_the_readme():
    text = read(PAGES[0])
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text, page.name


# ---------------------------------------------------------------------------- names in the code
PAPER_MAP = read(ROOT / "docs" / "paper-map.md")
MODULES = r"losses|ptdpo|rollout|hints|train|plumbing\.\w+|toy\.\w+"
FUNCTIONS = sorted(set(re.findall(rf"`((?:{MODULES})(?:\.[A-Za-z_]\w*)+)`", PAPER_MAP)))
TESTS = sorted(set(re.findall(r"`(test_\w+\.py::test_\w+)`", PAPER_MAP)))


def test_the_map_was_read():
    assert len(FUNCTIONS) >= 20
    assert len(TESTS) >= 20


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_map_names_functions_that_exist(name):
    """`losses.topk_jsd`, `plumbing.memory.scores_bytes`, `train.Trainer.score`."""
    parts = name.split(".")
    depth = 2 if parts[0] in ("plumbing", "toy") else 1
    value = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:]:
        value = getattr(value, part)


@pytest.mark.parametrize("name", TESTS)
def test_the_map_names_tests_that_exist(name):
    file, _, test = name.partition("::")
    assert re.search(rf"^def {test}\(", read(ROOT / "tests" / file), re.M)


PHASES = re.findall(r"`Trainer\.(\w+)`", read(PAGES[0]))


def test_the_readme_names_the_phases():
    assert PHASES == ["read", "sample", "grade", "assign", "score", "step", "evaluate"]
    missing = [method for method in PHASES if not hasattr(train.Trainer, method)]
    assert missing == []


@pytest.mark.parametrize("file", ["losses", "ptdpo", "rollout", "hints", "train"])
def test_the_readme_gives_the_size_of_each_file(file):
    assert re.search(rf"^\| \[{file}\.py\]\({file}\.py\) \| \d+ \|", read(PAGES[0]), re.M)
