"""plumbing/hint_file.py: hints joined by id."""

import json
import re

import pytest
from PIL import Image

from hints import Hint
from plumbing.data import load_questions
from plumbing.hint_file import join_hints, load_hints


def write_data(folder, questions):
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    (folder / "d.jsonl").write_text(
        "".join(
            json.dumps({"id": f"q{i}", "question": q, "answer": "7", "images": "a.png"}) + "\n"
            for i, q in enumerate(questions)
        )
    )
    return str(folder / "d.jsonl")


def test_hints_join_by_id(tmp_path):
    write_data(tmp_path, ["one?", "two?", "three?"])
    path = tmp_path / "h.jsonl"
    rows = [
        {"id": "q1", "question": "two?", "hint": {"look": ["left"]}, "boxes": [[[0, 0, 9, 9]]]},
        {"id": "q2", "hint": None},
        {"id": "q7", "hint": "go on"},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples = load_questions(tmp_path / "d.jsonl")
    assert join_hints(samples, path) == 1 and [s.hint for s in samples] == [
        None,
        Hint(look=("left",)),
        None,
    ]
    assert [s.boxes for s in samples] == [None, [[[0, 0, 9, 9]]], None]
    path.write_text(json.dumps({**rows[0], "boxes": [[0, 0, 9, 9]]}) + "\n")
    with pytest.raises(ValueError, match="h.jsonl: the hint of id 'q1': field 'boxes'"):
        join_hints(samples, path)
    path.write_text(json.dumps({**rows[0], "question": "zwei?"}) + "\n")
    with pytest.raises(ValueError, match="'q1' was written for another question: 'zwei"):
        join_hints(samples, path)


@pytest.mark.parametrize(
    "line,message",
    [
        ("{broken", ":2: "),
        ('{"id": "a"}', ":2: expected an object with id and hint"),
        ('{"id": "x", "hint": null}', ":2: id 'x' stands here twice"),
        ('{"id": "a", "hint": {"look": "left"}}', ":2: hint fields"),
        ("[]", ":2: expected an object"),
    ],
)
def test_bad_hints_files(line, message, tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text('{"id": "x", "hint": null}\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(str(path)) + message):
        load_hints(path)
