"""plumbing/hint_file.py: hints joined by id, and the output of the builder."""

import io
import json
import re

import pytest
from test_build_hints import write_data

from hints import Hint, NoReply
from plumbing.data import load_questions
from plumbing.hint_file import join_hints, load_hints, open_results, write_hints
from rollout import Question


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


def test_blank_lines_and_empty_hints(tmp_path):
    path = tmp_path / "h.jsonl"
    empty = ["{}", '""', '" "', "null", '{"look": [], "ignore": null}']
    lines = [f'{{"id": {number}, "hint": {hint}}}' for number, hint in enumerate(empty)]
    path.write_text("\n\n".join(lines) + "\n \n")
    assert [record["hint"] for record in load_hints(path).values()] == [None] * 5


def test_a_line_ends_at_a_newline_alone(tmp_path):
    """U+2028 and U+0085 may stand in a JSON text as they are."""
    path = tmp_path / "h.jsonl"
    text = "a\u2028b\u0085c"
    path.write_text(f'{{"id": "x", "hint": "{text}"}}\r\n{{"id": "y", "hint": null}}\n', "utf-8")
    assert load_hints(path)["x"]["hint"] == Hint(steps=(text,))
    assert set(load_hints(path)) == {"x", "y"}


# ------------------------------------------------------------------------------------- the output
WHOLE = b'{"id": "x", "hint": null}'


@pytest.mark.parametrize(
    "before, after, ids",
    [
        (b"", b"", set()),
        (WHOLE + b"\n", WHOLE + b"\n", {"x"}),
        (WHOLE, WHOLE + b"\n", {"x"}),  # an editor left out the newline
        (WHOLE + b'\n{"id": "y", "que', WHOLE + b"\n", {"x"}),  # a crash
        (WHOLE + b'\n{"i', WHOLE + b"\n", {"x"}),
        (b'{"id": "x"', b"", set()),
    ],
)
def test_the_output_is_opened_at_the_end_of_its_whole_lines(before, after, ids, tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_bytes(before)
    file, records = open_results(path)
    assert set(records) == ids
    with file:
        file.write(b"next")
    assert path.read_bytes() == after + b"next"


@pytest.mark.parametrize(
    "content",
    [
        b"my only notes",
        b"my only notes\nof today",
        b'{"a": 1}',
        WHOLE + b"\n" + WHOLE,  # an id twice
        WHOLE + b"\nnotes",
        b"\x89PNG\r\n\x1a\n\x00",
    ],
)
def test_a_file_that_is_no_hints_file_is_refused_and_stays(content, tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        open_results(path)
    assert path.read_bytes() == content


def run_write_hints(path, work, count, parallel=1):
    """Reason and lines of a run over the questions q0, q1, ..."""
    questions = [
        Question(id=f"q{number}", text="?", answer="7", images=[]) for number in range(count)
    ]
    with path.open("ab", buffering=0) as file:
        reason = write_hints(questions, work, file, parallel)
    return reason, path.read_text("utf-8").splitlines()


def silent_at(*ids):
    """work that answers all questions but these."""

    def work(question):
        if question.id in ids:
            raise NoReply("HTTP 503")
        return {"hint": None}

    return work


@pytest.mark.parametrize("parallel", [1, 8])
def test_a_run_without_any_reply_has_failed_however_short(parallel, tmp_path):
    reason, lines = run_write_hints(tmp_path / "h.jsonl", silent_at("q0"), 1, parallel)
    assert reason == "no reply to any question that was asked (HTTP 503); run again to go on"
    assert lines == []


def test_a_short_run_with_one_reply_has_not_failed(tmp_path):
    reason, lines = run_write_hints(tmp_path / "h.jsonl", silent_at("q0", "q2"), 3, 8)
    assert reason == ""
    assert [json.loads(line)["id"] for line in lines] == ["q1"]


def test_an_image_that_has_vanished_ends_the_run_in_one_line(tmp_path):
    def work(question):
        if question.id == "q1":
            raise FileNotFoundError("no such file: a.png\nand more")
        return {"hint": None}

    reason, lines = run_write_hints(tmp_path / "h.jsonl", work, 3)
    assert reason == "no such file: a.png"
    assert len(lines) == 1


def test_half_an_emoji_survives_the_file(tmp_path):
    hint = {"look": ["the \ud83d sign", "the \U0001f600 sign"], "ignore": [], "steps": []}
    path = tmp_path / "h.jsonl"
    assert run_write_hints(path, lambda question: {"hint": hint}, 1)[0] == ""
    assert load_hints(path)["q0"]["hint"].look == tuple(hint["look"])


class FullDisk(io.FileIO):
    """A file on a disk with little room, in bytes. A write may take a part, as POSIX allows."""

    room = 100

    def write(self, data):
        written = super().write(data[: self.room])
        self.room -= written
        return written


def test_a_full_disk_ends_the_run_and_the_file_stays_readable(tmp_path):
    path = tmp_path / "h.jsonl"
    questions = [Question(id=name, text="?", answer="7", images=[]) for name in "abcdef"]
    with FullDisk(path, "ab") as file:
        reason = write_hints(questions, lambda question: {"hint": None}, file, 1)
    assert "is the disk full?" in reason
    assert list(load_hints(path)) == ["a", "b"]
