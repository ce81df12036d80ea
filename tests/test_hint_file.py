"""plumbing/hint_file.py: hints joined by id."""

import json
import re

import pytest
from test_build_hints import write_data

from hints import Hint
from plumbing.data import load_questions
from plumbing.hint_file import join_hints, load_hints


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_hints_join_by_id(tmp_path):
    write_data(tmp_path, ["one?", "two?", "three?"])
    path = tmp_path / "h.jsonl"
    boxes = [[[0, 0, 9, 9]]]
    joined = {"id": "q1", "question": "two?", "hint": {"look": ["left"]}, "boxes": boxes}
    without_hint = {"id": "q2", "hint": None}
    of_no_question = {"id": "q7", "hint": "go on"}
    write_rows(path, [joined, without_hint, of_no_question])
    questions = load_questions(tmp_path / "d.jsonl")
    assert join_hints(questions, path) == 1
    hints = [question.hint for question in questions]
    assert hints == [None, Hint(look=("left",)), None]
    assert [question.boxes for question in questions] == [None, boxes, None]
    write_rows(path, [{**joined, "boxes": [[0, 0, 9, 9]]}])
    with pytest.raises(ValueError, match="h.jsonl: the hint of id 'q1': field 'boxes'"):
        join_hints(questions, path)
    write_rows(path, [{**joined, "question": "zwei?"}])
    with pytest.raises(ValueError, match="'q1' was written for another question: 'zwei"):
        join_hints(questions, path)


@pytest.mark.parametrize(
    "line, message",
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
