"""Every command in the README does what stands there: run in this process on a tiny model and a few questions, or, where it is a measurement of
hours, its options are looked up in the script."""

import json
import re
import shlex

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, make_tiny
from PIL import Image
from test_build_hints import GOOD, chat_reply, serve  # noqa: F401

import train
from plumbing.build_hints import main as build_hints
from plumbing.hint_file import load_hints

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.S | re.M) if not kind
]
COMMANDS = [
    line.partition("#")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.startswith(("python ", "accelerate "))
]
COMMANDS += [
    " ".join(span.split())
    for span in re.findall(
        r"`((?:python|accelerate) [^`]*)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.S | re.M)
    )
]
FEW = [
    "--steps",
    "1",
    "--questions",
    "2",
    "--group-size",
    "2",
    "--max-new-tokens",
    "6",
    "--eval-questions",
    "2",
]


def test_the_commands_were_found():
    assert len(COMMANDS) >= 14 and [
        c.startswith("python -m pip install -r requirements.txt && ") for c in COMMANDS[:3]
    ] == [True, True, False]
    # .ci/run runs the second one, word for word
    assert re.search(
        r"\^python -m pip install -r requirements.txt && python -m pytest",
        (ROOT / ".ci" / "run").read_text(),
    )


@pytest.fixture
def place(tmp_path, monkeypatch, base):
    """What a reader would have: a model of another name than the embedded one, questions, hints, a finished run."""
    monkeypatch.chdir(tmp_path)
    make_tiny("Qwen2VL", base[1]).save_pretrained("model")
    base[1].save_pretrained("model")
    Image.new("RGB", (112, 112), "red").save("a.png")
    rows = [
        {
            "id": str(i),
            "question": f"How many points in row {i} ?",
            "answer": "7",
            "images": ["a.png"],
            "hint": "look at the top row",
        }
        for i in range(4)
    ]
    for name in ("questions.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "hints.jsonl").write_text(
        "".join(
            json.dumps({"id": str(i), "hint": {"look": ["the top row"]}}) + "\n" for i in range(4)
        )
    )
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, place, serve, capsys):  # noqa: F811
    words = shlex.split(command.removeprefix("python -m pip install -r requirements.txt && "))
    if words[:3] in (["python", "-m", "pytest"], ["python", "-m", "pip"]):
        return  # this run itself; an install
    words = [
        re.sub(
            r"^Qwen/.*|^PAPOGalaxy/.*",
            lambda m: "model" if m[0].startswith("Qwen") else "questions.jsonl",
            word,
        )
        for word in words
    ]
    if words[0] == "accelerate":
        assert (
            launch_command_parser().parse_args(words[2:]).training_script == "train.py"
            and (ROOT / words[3]).is_file()
        )
        words = ["python", *words[words.index("train.py") :]]
    script, args = words[1], words[2:]
    if script.startswith("bench/"):
        source = (ROOT / script).read_text(encoding="utf-8")
        compile(source, script, "exec")
        known = re.findall(r'add_argument\(\s*"(--[\w-]+)"', source)
        assert set(known) >= {word for word in args if word.startswith("--")}
        return
    if words[:3] == ["python", "-m", "plumbing.build_hints"]:
        args = words[3:]
        (place / "hints.jsonl").unlink()
        args[args.index("--api-base") + 1] = serve(lambda question, before: chat_reply(GOOD)).url
        assert build_hints(args) == 0 and len(load_hints(place / "hints.jsonl")) == 4
        return
    assert script == "train.py", command
    if "runs/NAME" in args:
        train.main([*FEW, "--name", "NAME"])
        args += ["--steps", "2"] if "--resume" in args else []
    elif "--plan" not in args:
        args = [*args, *FEW]
    stops = {"--help": 0, "--check": 1}.get(
        next((word for word in args if word in ("--help", "--check")), None)
    )
    if stops is None:
        train.main(args)
    else:  # the check: a random model of 6 tokens a response is not all right
        with pytest.raises(SystemExit) as stop:
            train.main(args)
        assert stop.value.code == stops
    out = capsys.readouterr().out
    expected = {
        "--plan": "predicted memory, each of 8 GPUs",
        "--check": "ok   the ratio is 1",
        "--audit-hints": "what the frozen model reads",
        "--help": "--tau",
        "--report": "report.html",
    }
    assert (
        next((text for word, text in expected.items() if word in args), "accuracy, plain prompt")
        in out
    )
