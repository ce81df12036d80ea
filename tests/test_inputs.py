"""plumbing/inputs.py and the command line: what is refused before a model is loaded."""

import json

import pytest
from PIL import Image

import train
from hints import Hint
from plumbing import inputs
from plumbing.inputs import prompt_tokens
from plumbing.settings import EMBEDDED
from rollout import encode_prompts, student_messages
from toy import world


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--nonsense", "1"], "unrecognized arguments: --nonsense"),
        (["--model", "no/such/folder"], "no such folder"),
        (["--model", "./nowhere"], "no such folder"),
        (["--group-size", "1"], "--group-size must be at least 2"),
        (["--tau", "0"], "--tau must be in (0, 1]"),
        (["--tau", "1.5"], "--tau must be in (0, 1]"),
        (["--jsd-k", "0"], "--jsd-k must be >= 1"),
        (["--steps", "many"], "invalid int value"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--name", "a/b"], "plain folder name"),
        (["--data", "gone.jsonl"], "gone.jsonl: no such file"),
        (["--data", "bad.jsonl"], "bad.jsonl:2: no answer"),
        (["--data", "image.jsonl"], "image.jsonl:1: field 'images': cannot read"),
        (["--name", "taken"], "exists already"),
        (["--seed", "400"], "--seed must be at most 399"),
        (["--hints", "h.jsonl"], "--hints needs --data"),
        (["--teacher-context", "oracle"], "invalid choice: 'oracle'"),
        (["--data", "good.jsonl", "--hints", "h.jsonl"], "h.jsonl:1: hint fields"),
        (["--fog", "2"], "--fog must be at most 1"),
        (["--fog", "0.5", "--data", "good.jsonl"], "--fog is for the built-in puzzles"),
    ],
)
def test_bad_input_is_one_clear_line_before_a_model_is_loaded(
    argv, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "build", lambda *a: pytest.fail("a model was loaded"))
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "bad.jsonl").write_text('{"question": "a?", "answer": "1"}\n{"question": "a?"}\n')
    (tmp_path / "good.jsonl").write_text('{"question": "a?", "answer": "1"}\n')
    (tmp_path / "h.jsonl").write_text('{"id": "good-1", "hint": {"look": "left"}}\n')
    (tmp_path / "image.jsonl").write_text(
        '{"question": "a?", "answer": "1", "image": "none.png"}\n'
    )
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and message in error, error


def test_a_model_without_vision_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SystemExit):
        train.main(["--model", str(tmp_path)])
    assert "is a gpt2 model; supported: qwen2_vl" in capsys.readouterr().err


def test_unusable_hints_are_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"question": "How many?", "answer": "7", "hint": h}
        for h in ("count to 7", "count the left ones", "read " * 40)
    ]
    rows += [
        {"question": "b?", "answer": "1", "solution": "it is 1"},
        {"question": "c?", "answer": "1"},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "h.jsonl").write_text(
        '{"id": "d-4", "hint": {"look": ["the top"]}}\n{"id": "other", "hint": null}\n'
    )

    def read(**settings):
        config = train.TrainConfig(
            model=EMBEDDED,
            data="d.jsonl",
            name="x",
            eval_questions=1,
            max_hint_tokens=30,
            **settings,
        )
        questions, _, note, *_ = inputs.read_inputs(config, 1)
        return [s.hint for s in questions.samples], note

    left = Hint(steps=("count the left ones",))
    got, note = read()
    assert got == [None, left, None, None, None]
    assert note == (
        "questions: 5 from d.jsonl; 1 with a hint, 1 hints dropped (spoilers; first: d-1), 1 hints dropped (too long; first: d-3); "
        "4 are never tutored, for want of a hint"
    )
    got, note = read(hints="h.jsonl")
    assert (
        got == [None, left, None, Hint(look=("the top",)), None]
        and "2 with a hint" in note
        and "1 lines of h.jsonl belong to no question here" in note
    )
    assert note.endswith(
        "1 lines of h.jsonl belong to no question here; 3 are never tutored, for want of a hint"
    )
    assert read(eval_data="d.jsonl")[1].endswith(
        "\nleft out: 2 unusable hints of held-out questions"
    )
    assert "4 are never tutored, for want of a solution" in read(teacher_context="solution")[1]
    assert "never tutored" not in read(teacher_context="answer")[1]


def test_prompt_lengths_without_decoding(base):
    samples = world.puzzles("tune", 2)
    samples[1].images = [Image.new("RGB", (200, 90)), Image.new("L", (56, 56))]
    for sample, prompt in zip(
        samples, encode_prompts(base[1], samples, [student_messages(s) for s in samples])
    ):
        assert prompt_tokens(base[1], sample) == len(prompt.ids)
