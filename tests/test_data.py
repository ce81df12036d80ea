"""plumbing/data.py: files and datasets as people bring them, and the stream of a run."""

import json
import random
import re
import shlex
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from hub_rows import ROWS, picture, table_of
from PIL import Image
from test_rollout import student_prompts

from hints import Hint
from plumbing import data
from plumbing.answers import same_answer
from plumbing.data import Columns, QuestionStream, check_boxes, load_questions
from plumbing.hint_file import load_hints
from plumbing.images import StoredImage, open_image
from plumbing.runs import cut_log
from rollout import Question


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    return tmp_path


def write(folder, *rows):
    """A file data.jsonl with a line for each row: a text as it is, or an object as JSON."""
    path = folder / "data.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def load_one(folder, row, **settings):
    [question] = load_questions(write(folder, row), Hint.from_json, **settings)
    return question


PLAIN = {"question": "How many?", "answer": "1"}
PICTURED = {**PLAIN, "image": "a.png"}


# ------------------------------------------------------------------------------------ a .jsonl file
def test_good_lines(folder):
    path = write(
        folder,
        {
            "question": "How many?",
            "answer": 3,
            "images": ["a.png"],
            "id": "q1",
            "hint": {"look": ["left"]},
        },
        "",
        {"problem": "<image>What?", "answer": "blue", "image": "a.png", "hint": "Look left."},
    )
    one, two = load_questions(path, Hint.from_json)
    assert (one.id, one.text, one.answer, one.hint.look) == ("q1", "How many?", "3", ("left",))
    assert (two.id, two.answer, two.hint.steps) == ("data-3", "blue", ("Look left.",))
    assert one.images == two.images == [folder / "a.png"]


@pytest.mark.parametrize(
    "row, values",
    [
        ({"prompt": "How many?", "answer": "1"}, {"text": "How many?"}),
        ({"question": "", "problem": "How many?", "answer": "1"}, {"text": "How many?"}),
        ({**PLAIN, "problem": "What?"}, {"text": "How many?"}),
        ({**PLAIN, "answer": " 1 "}, {"answer": "1"}),
        ({**PLAIN, "answer": 0}, {"answer": "0"}),
        ({**PLAIN, "answer": 2.5}, {"answer": "2.5"}),
        ({**PLAIN, "id": 7}, {"id": "7"}),
        ({**PLAIN, "qid": "r7"}, {"id": "r7"}),
        ({**PLAIN, "id": "q1", "qid": "r7"}, {"id": "q1"}),
        (PLAIN, {"images": [], "hint": None, "choices": None, "solution": None, "boxes": None}),
        ({**PLAIN, "image": ""}, {"images": []}),
        ({**PLAIN, "images": [None, ""]}, {"images": []}),
        ({**PLAIN, "choices": ["red", 7]}, {"choices": ["red", "7"]}),
        ({**PLAIN, "choices": []}, {"choices": None}),
        ({**PLAIN, "solution": "It is 1."}, {"solution": "It is 1."}),
        ({**PLAIN, "solution": ""}, {"solution": None}),
        ({**PICTURED, "boxes": [[[0, 0, 9, 9]]]}, {"boxes": [[[0, 0, 9, 9]]]}),
    ],
)
def test_fields_of_a_line(folder, row, values):
    question = load_one(folder, row)
    assert {name: getattr(question, name) for name in values} == values


def test_without_a_reader_of_hints_they_are_left_alone(folder):
    [question] = load_questions(write(folder, {**PLAIN, "hint": {"where": []}}))
    assert question.hint is None


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "a?", "images": ["a.png"]}, r"data.jsonl:2: no answer"),
        ({"question": "a?", "answer": " "}, "no answer"),
        ({"question": "a?", "answer": True}, "no answer"),
        ({"question": "a?", "answer": ["1"]}, "no answer"),
        ({"answer": "1"}, "no question"),
        ({"question": ["a?"], "answer": "1"}, "no question"),
        ("{oops", "data.jsonl:2"),
        ("[1]", "expected a JSON object, got list"),
        ({**PLAIN, "images": ["broken.png"]}, "cannot read .*broken.png"),
        ({**PLAIN, "images": ["cut.png"]}, "cannot read .*cut.png"),
        ({**PLAIN, "image": "gone.png"}, "cannot read .*gone.png"),
        ({**PLAIN, "image": 7}, "expected a path or an image, got int"),
        ({**PLAIN, "image": {"bytes": None}}, "'images': cannot read it"),
        ({**PICTURED, "question": "<image> and <image>"}, "2 <image> marks but there are 1"),
        ({**PLAIN, "question": "<image>?"}, "1 <image> marks but there are 0"),
        ({**PLAIN, "hint": {"where": []}}, "data.jsonl:2: unknown hint field"),
        ({**PLAIN, "choices": "red"}, "'choices': expected a list of texts"),
        ({**PLAIN, "choices": [["red"]]}, "'choices': expected a list of texts"),
        ({**PICTURED, "boxes": [[[1, 2, 3]]]}, "data.jsonl:2: field 'boxes'"),
    ],
)
def test_bad_lines_name_file_line_and_field(folder, row, message):
    with pytest.raises(ValueError, match=message):
        load_questions(write(folder, {**PLAIN, "id": "good"}, row), Hint.from_json)


def test_bad_lines_can_be_left_out_and_are_listed(folder):
    rows = [
        PICTURED,
        {**PICTURED, "image": "broken.png"},
        "{oops",
        PICTURED,
        {**PICTURED, "id": "data-1"},
    ]
    bad = []
    questions = load_questions(write(folder, *rows), bad=bad)
    assert [question.id for question in questions] == ["data-1", "data-4"]
    assert [message.partition("data.jsonl:")[2][:2] for message in bad] == ["2:", "3:", "5:"]
    assert "is the id of line 1 already" in bad[2]


def test_a_file_with_bad_lines_alone_is_refused_with_the_first(folder):
    path = write(folder, {"question": "a?"}, "{oops")
    with pytest.raises(ValueError, match="no questions in it; first: .*:1: no answer"):
        load_questions(path, bad=[])


def test_missing_and_empty_files(folder):
    with pytest.raises(ValueError, match="no such file"):
        load_questions(folder / "none.jsonl")
    with pytest.raises(ValueError, match="no questions"):
        load_questions(write(folder, ""))


def test_a_file_by_another_name_is_read_as_lines(folder):
    path = write(folder, PLAIN).rename(folder / "data.txt")
    assert [question.id for question in load_questions(path)] == ["data-1"]


# ---------------------------------------------------------------------------------- odd characters
@pytest.mark.parametrize(
    "text",
    [
        # emoji, Hebrew, a combining accent, Chinese
        "\U0001f469\u200d\U0001f467 \u05e9\u05dc\u05d5\u05dd e\u0301 \u4f60",
        "a\0b\x07\x1b[31m\x7f",  # NUL, bell, escape
        "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\rh\ni",  # what ends a line for str.splitlines
        "\ufeffa\ufffd\uffff",
        "long " * 20_000,
    ],
    ids=["unicode", "control", "line ends", "no characters", "long"],
)
@pytest.mark.parametrize("as_escapes", [True, False])
def test_all_characters_are_text(folder, base, text, as_escapes):
    rows = [{**PLAIN, "question": text, "hint": text, "choices": [text]}, PLAIN]
    lines = [json.dumps(row, ensure_ascii=as_escapes) for row in rows]
    question, following = load_questions(write(folder, *lines), Hint.from_json)
    assert (question.text, question.choices, question.id) == (text, [text], "data-1")
    assert question.hint.steps == (text.strip(),)
    assert (following.text, following.id) == ("How many?", "data-2")
    [prompt] = student_prompts(base[1], [question])
    assert len(prompt.ids) > 10


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_files_of_other_systems(folder, ending, mark):
    """A byte order mark, and lines that end in two characters, as Windows writes them."""
    lines = [json.dumps({**PLAIN, "question": text}).encode() for text in ("one?", "two?")]
    (folder / "d.jsonl").write_bytes(mark + ending.join([lines[0], b"", lines[1], b""]))
    questions = load_questions(folder / "d.jsonl")
    assert [(question.id, question.text) for question in questions] == [
        ("d-1", "one?"),
        ("d-3", "two?"),
    ]


@pytest.mark.parametrize("field", ["id", "question", "answer", "choices", "solution", "hint"])
def test_half_a_surrogate_pair_is_refused(folder, field):
    """It is no character: neither the tokenizer nor a log would take it."""
    text = "see \ud83d there"
    row = {**PLAIN, field: [text] if field == "choices" else text}
    message = rf"data.jsonl:2: field '{field}': \\ud83d at place \d+ is half of a surrogate pair"
    with pytest.raises(ValueError, match=message):
        load_questions(write(folder, {**PLAIN, "id": "good"}, row), Hint.from_json)


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"question": "\xe9?", "answer": "1"}', "2: the line is not UTF-8"),
        (b"[" * 100_000, "2: the JSON is nested too deeply"),
        (b'{"question": "a?", "answer": NaN}', "2: no answer"),
        (b'{"question": "a?", "answer": -Infinity}', "2: no answer"),
        (b'{"question": " ", "answer": "1"}', "2: no question"),
        (b'{"question": "a?", "answer": "\\\\boxed{}"}', "2: no answer: .* is empty"),
        (b'{"question": "a?", "answer": "1", "image": "a\\u0000"}', "2: field 'images': .* NUL"),
        (b'{"question": "a?", "answer": "1", "image": "\\ud800"}', "2: field 'images': .*ud800"),
        (b'{"question": "a?", "answer": "1", "hint": "{"}', "2: field 'hint': its JSON"),
    ],
)
def test_odd_lines_are_refused_by_number(folder, line, message):
    path = folder / "data.jsonl"
    good = json.dumps(PLAIN).encode()
    path.write_bytes(b"\n".join([good, line, good, b""]))
    with pytest.raises(ValueError, match=f"data.jsonl:{message}"):
        load_questions(path, Hint.from_json)
    bad = []
    questions = load_questions(path, Hint.from_json, bad=bad)
    assert [question.id for question in questions] == ["data-1", "data-3"]
    assert len(bad) == 1


def test_a_line_separator_does_not_split_a_hint_or_a_log_line(tmp_path):
    """A model may write U+2028, and our own files hold it as it is."""
    rows = [
        {"step": 1, "id": "q1", "hint": "look\u2028left"},
        {"step": 2, "id": "q2", "hint": None},
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    assert load_hints(path)["q1"]["hint"] == Hint(steps=("look\u2028left",))
    cut_log(path, 1)
    assert path.read_text(encoding="utf-8") == lines[0]


def test_a_log_that_ends_inside_a_character_is_cut(tmp_path):
    """As a full disk leaves it."""
    path = tmp_path / "responses.jsonl"
    lines = [json.dumps({"step": n, "text": "\u7b54\u6848"}, ensure_ascii=False) for n in (1, 2)]
    for lost in range(2, 8):
        path.write_bytes("\n".join(lines).encode()[:-lost])
        cut_log(path, 5)
        assert path.read_text(encoding="utf-8") == lines[0] + "\n"


# ------------------------------------------------------------------------------------------- fields
@pytest.mark.parametrize(
    "answer, gold, wrong",
    [
        ("\\boxed{17}", "17", "18"),
        ("\\boxed{17^\\circ}", "17", "18"),
        ("$\\boxed{\\frac{1}{2}}$", "0.5", "2"),
        ("\\boxed{A}", "(a)", "B"),
        ("<think>\\boxed{3}?</think> <answer> 4 </answer>", "4", "3"),
    ],
)
def test_a_gold_answer_is_stored_without_its_box(folder, answer, gold, wrong):
    question = load_one(folder, {**PLAIN, "answer": answer})
    assert "boxed" not in question.answer
    assert same_answer(gold, question.answer)
    assert not same_answer(wrong, question.answer)


def test_without_an_answer_that_of_the_solution_is_taken(folder):
    row = {"question": "a?", "solution": "First 3, then <answer>B</answer>"}
    assert load_one(folder, row).answer == "B"
    assert load_one(folder, {**row, "answer": "C"}).answer == "C"
    with pytest.raises(ValueError, match="data.jsonl:1: no answer"):
        load_one(folder, {**row, "solution": "The answer is B."})


def test_columns_of_other_names(folder):
    row = {"q": "How many?", "question": "What?", "label": 3, "id": "a"}
    columns = Columns("question=q, answer=label")
    question = load_one(folder, row, columns=columns)
    assert (question.text, question.answer) == ("How many?", "3")
    columns.check_seen()
    assert load_one(folder, PLAIN, columns=columns).text == "How many?", "the usual ones still hold"


@pytest.mark.parametrize("text", ["query", "question=", "=query", "title=query"])
def test_columns_that_are_no_pairs_are_refused(text):
    with pytest.raises(ValueError, match="--columns: .* is not FIELD=COLUMN; fields: id, question"):
        Columns(text)


def test_a_misspelt_column_is_refused(folder):
    columns = Columns("question=qery")
    load_one(folder, PLAIN, columns=columns)
    with pytest.raises(ValueError, match="--columns: no row has a column 'qery'"):
        columns.check_seen()


def test_a_check_may_object_to_a_question(folder):
    def check(question):
        if question.text == "bad?":
            raise ValueError("field 'question': bad")

    path = write(folder, PLAIN, {**PLAIN, "question": "bad?"})
    with pytest.raises(ValueError, match="data.jsonl:2: field 'question': bad"):
        load_questions(path, check=check)
    bad = []
    assert len(load_questions(path, check=check, bad=bad)) == 1
    assert len(bad) == 1


def test_images_come_from_one_folder(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert load_one(elsewhere, PICTURED, image_dir=folder).images == [folder / "a.png"]
    for image in (f"../{folder.name}/a.png", str(folder / "a.png")):
        with pytest.raises(ValueError, match="outside .*--image-dir"):
            load_one(elsewhere, {**PLAIN, "image": image})
    absolute = {**PLAIN, "image": str(folder / "a.png")}
    assert load_one(folder, absolute).images == [folder / "a.png"]


def test_links_inside_the_folder_may_lead_anywhere(folder, tmp_path_factory):
    """In the hub's cache each file is a link; a data folder is often one."""
    place = tmp_path_factory.mktemp("links")
    (place / "a.png").symlink_to(folder / "a.png")
    (place / "pictures").symlink_to(folder)
    for image in ("a.png", "pictures/a.png"):
        assert load_one(place, {**PLAIN, "image": image}).images == [place / image]
    with pytest.raises(ValueError, match="outside"):
        load_one(place / "pictures", {**PLAIN, "image": "../a.png"}, image_dir=place / "pictures")


def test_a_cell_without_bytes_is_its_path_or_no_image(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    cell = {"bytes": None, "path": "a.png"}
    question = load_one(elsewhere, {**PLAIN, "images": [cell]}, image_dir=folder)
    assert question.images == [folder / "a.png"]
    assert load_one(folder, {**PLAIN, "image": {"bytes": None, "path": None}}).images == []


def test_base64_is_refused_in_a_short_line(folder):
    with pytest.raises(ValueError, match="a text of 9000 characters is no path") as error:
        load_one(folder, {**PLAIN, "image": "iVBORw0KG" * 1000})
    assert len(str(error.value)) < 300


def test_a_damaged_picture_is_named(folder):
    """Pillow raises SyntaxError at the second chunk of pixels; and floats have no known scale."""
    noise = Image.frombytes("RGB", (300, 300), random.Random(0).randbytes(270_000))
    noise.save(folder / "noise.png")
    start, first, rest = (folder / "noise.png").read_bytes().partition(b"IDAT")
    assert b"IDAT" in rest
    (folder / "noise.png").write_bytes(start + first + rest.replace(b"IDAT", b"\0\0\0\0", 1))
    Image.new("F", (8, 8), 0.5).save(folder / "float.tiff")
    for name in ("noise.png", "float.tiff"):
        with pytest.raises(ValueError, match=f"data.jsonl:1: field 'images': .*{name}"):
            load_one(folder, {**PLAIN, "image": name})


@pytest.mark.parametrize(
    "whole, hint",
    [
        ("<image> How many?\nLook left. ", "Look left."),
        ("Look left.\n<image>How many?", "Look left."),
        ("Look left. How many? Then count.", "Look left. Then count."),
    ],
)
def test_the_hint_of_a_hinted_prompt_is_what_is_not_the_question(folder, whole, hint):
    row = {**PICTURED, "question": "<image>How many?", "prompt_with_hint": whole}
    question = load_one(folder, row)
    assert question.hint == Hint(steps=(hint,))
    assert question.text == "<image>How many?"


def test_a_hinted_prompt_must_hold_the_question(folder):
    row = {**PICTURED, "question": "<image>How many?", "prompt_with_hint": "What?"}
    message = "'prompt_with_hint': the question's text does not stand in it"
    with pytest.raises(ValueError, match=message):
        load_one(folder, row)


def test_a_hinted_prompt_that_adds_nothing_and_a_hint_of_its_own(folder):
    assert load_one(folder, {**PLAIN, "prompt_with_hint": "How many?"}).hint is None
    row = {**PLAIN, "hint": "Count.", "prompt_with_hint": "How many? Look left."}
    assert load_one(folder, row).hint == Hint(steps=("Count.",))


@pytest.mark.parametrize(
    "boxes, images",
    [
        (None, 2),
        ([], 1),
        ([[]], 1),
        ([[[0, 0, 9, 9.5]], []], 2),
        ([[[0, 0, 9, 9], [1, 1, 2, 2]]], 1),
    ],
)
def test_boxes_are_a_list_of_rectangles_for_each_image(boxes, images):
    assert check_boxes(boxes, images) == (boxes or None)


@pytest.mark.parametrize(
    "boxes, images",
    [
        ([[]], 2),
        ([[0, 0, 9, 9]], 1),
        ([[[0, 0, 9]]], 1),
        ([[[0, 0, 9, "9"]]], 1),
        ([{"left": 0}], 1),
        ("left", 1),
        ({"a": []}, 1),
    ],
)
def test_other_boxes_are_refused(boxes, images):
    with pytest.raises(ValueError, match="field 'boxes': expected, for each image"):
        check_boxes(boxes, images)


# ---------------------------------------------------------------------------------------- a dataset
class Table(list):
    """A stand-in for a dataset: a list of rows, which are given out decoded.

    A row that is an exception stands for one that cannot be decoded.
    """

    def __getitem__(self, number):
        row = super().__getitem__(number)
        if isinstance(row, Exception):
            raise row
        return row

    @property
    def column_names(self):
        return list(self[0])

    def select_columns(self, names):
        return Table({name: row[name] for name in names} for row in self)


def test_a_row_of_a_table_that_cannot_be_decoded_is_named(monkeypatch):
    rows = [PLAIN, OSError("image file is truncated")]
    monkeypatch.setattr(data, "_open_table", lambda source, split: Table(rows))
    with pytest.raises(ValueError, match="owner/name:row 1: image file is truncated"):
        load_questions("owner/name")


def test_images_of_a_table_stay_in_it_until_they_are_used(folder, monkeypatch):
    blue = Image.new("L", (40, 30), 9)
    rows = [
        {**PLAIN, "images": [blue]},
        {**PLAIN, "images": [blue, Image.new("RGB", (50, 20))]},
        {**PLAIN, "images": []},
    ]
    monkeypatch.setattr(data, "_open_table", lambda source, split: Table(rows))
    questions = load_questions("owner/name")
    assert [question.id for question in questions] == ["name-0", "name-1", "name-2"]
    [one], two, none = [question.images for question in questions]
    assert isinstance(one, StoredImage)
    assert (one.row, one.column, one.place, one.size) == (0, "images", 0, (40, 30))
    assert one.table == [{"images": row["images"]} for row in rows], "the pictures alone"
    assert [(image.row, image.place, image.size) for image in two] == [
        (1, 0, (40, 30)),
        (1, 1, (50, 20)),
    ]
    assert [open_image(image).size for image in two] == [(40, 30), (50, 20)]
    assert none == []


def test_paths_in_a_table_are_relative_to_image_dir(folder, monkeypatch):
    rows = [{**PLAIN, "image": "a.png"}, {**PLAIN, "image": "gone.png"}]
    monkeypatch.setattr(data, "_open_table", lambda source, split: Table(rows))
    bad = []
    [question] = load_questions("owner/name", image_dir=folder, bad=bad)
    assert question.images == [folder / "a.png"]
    assert len(bad) == 1
    assert bad[0].startswith("owner/name:row 1: field 'images': cannot read")


def test_an_image_behind_an_empty_place_of_a_list(monkeypatch):
    rows = [{**PLAIN, "images": [None, Image.new("L", (40, 30))]}]
    monkeypatch.setattr(data, "_open_table", lambda source, split: Table(rows))
    [question] = load_questions("owner/name")
    assert open_image(question.images[0]).size == (40, 30)


def test_an_id_that_two_rows_of_a_table_have_is_refused(monkeypatch):
    rows = [{**PLAIN, "id": "q"}, {**PLAIN, "id": "q"}]
    monkeypatch.setattr(data, "_open_table", lambda source, split: Table(rows))
    with pytest.raises(ValueError, match="owner/name:row 1: .*'q' is the id of line 0 already"):
        load_questions("owner/name")


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The package, with a cache of its own: it knows a table by its relative path."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return package


def test_a_dataset_s_folder(datasets, folder, base):
    """Images are decoded when they are used."""
    rows = [
        {
            "problem": f"q{i}?",
            "answer": "\\boxed{7}",
            "qid": f"r{i}",
            "images": [Image.new("RGB", (40, 30 + i), "blue")] * (1 + i % 2),
        }
        for i in range(4)
    ]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(folder / "one")
    datasets.DatasetDict({"test": table}).save_to_disk(folder / "many")
    for name, split in (("one", "train"), ("many", "test")):
        questions = load_questions(folder / name, split=split)
        assert [question.id for question in questions] == ["r0", "r1", "r2", "r3"]
        assert [len(question.images) for question in questions] == [1, 2, 1, 2]
        last = questions[3].images[1]
        assert open_image(last).size == (40, 33)
        assert not isinstance(last, Image.Image)
        [prompt] = student_prompts(base[1], questions[:1])
        assert prompt.pixels is not None
    with pytest.raises(ValueError, match="split 'dev'"):
        load_questions(folder / "many", split="dev")


def test_a_broken_image_of_a_dataset_is_found_before_it_is_used(datasets, folder):
    images = [
        {"bytes": (folder / "a.png").read_bytes(), "path": None},
        {"bytes": b"nonsense", "path": None},
    ]
    columns = {"question": ["a?", "b?"], "answer": ["1", "2"], "image": images}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.save_to_disk(folder / "broken")
    bad = []
    assert len(load_questions(folder / "broken", bad=bad)) == 1
    assert len(bad) == 1
    assert "broken:row 1" in bad[0]


def test_a_dataset_without_datasets_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="python -m pip install datasets"):
        load_questions("PAPOGalaxy/PAPO_ViRL39K_train")


# ----------------------------------------------------------------------- rows as the hub has them
def documented_options(name):
    """Source, split and columns in the row of docs/your-model.md about a hub dataset."""
    text = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")
    [options] = re.findall(rf"^\| {name} \| `(.*?)` \|", text, re.M)
    words = shlex.split(options.replace("--eval-", "--"))
    given = dict(zip(words[::2], words[1::2], strict=True))
    return given["--data"], given.get("--split", "train"), given.get("--columns", "")


def load_documented(name, folder, files, monkeypatch):
    """The questions of a hub dataset by the command of the docs, run in `folder`."""
    monkeypatch.chdir(folder)
    source, split, columns = documented_options(name)
    for file in files:
        path = folder / source.rpartition("/")[0] / file
        path.parent.mkdir(parents=True)
        picture().save(path)
    columns = Columns(columns)
    questions = load_questions(source, split=split, columns=columns)
    columns.check_seen()
    return questions


def assert_is_row(questions, row):
    [question] = questions
    assert {name: getattr(question, name) for name in row.fields} == row.fields
    assert [open_image(image).size for image in question.images] == [(40, 30)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_of_the_hub_loads_by_the_command_of_the_docs(row, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_open_table", lambda source, split: Table([row.row]))
    if row.files:
        (tmp_path / "ViRL39K").mkdir()
        (tmp_path / documented_options(row.name)[0]).write_bytes(b"a table")
    assert_is_row(load_documented(row.name, tmp_path, row.files, monkeypatch), row)


def test_the_student_sees_the_options_of_mathvista(tmp_path, monkeypatch):
    [row] = [row for row in ROWS if row.name == "AI4Math/MathVista"]
    monkeypatch.setattr(data, "_open_table", lambda source, split: Table([row.row]))
    [question] = load_documented(row.name, tmp_path, [], monkeypatch)
    assert "(B) 4 cm" in question.text
    verdicts = [same_answer(given, question.answer, question.choices) for given in ("B", "A")]
    assert verdicts == [True, False]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_table_of_the_hub(datasets, row, tmp_path, monkeypatch):
    """The row in a real table: its images cast as its card has them, and written as parquet."""
    source, split, _ = documented_options(row.name)
    source = tmp_path / source
    table = table_of(datasets, row)
    if source.suffix == ".parquet":
        source.parent.mkdir(parents=True)
        table.to_parquet(source)
    else:  # a folder of parquet files stands for the hub
        (source / "data").mkdir(parents=True)
        table.to_parquet(source / "data" / f"{split}-00000-of-00001.parquet")
        card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n"
        (source / "README.md").write_text(f"{card}    path: data/{split}-*\n---\n")
    assert_is_row(load_documented(row.name, tmp_path, row.files, monkeypatch), row)


# -------------------------------------------------------------------------------- a run's questions
QUESTIONS = [Question(str(i), "How many?", "1", []) for i in range(7)]


def epoch(stream, number):
    """The ids of an epoch's questions, in the order in which they come."""
    start = number * len(stream.questions)
    return [stream[i].id for i in range(start, start + len(stream.questions))]


def test_data_is_shuffled_anew_each_epoch_and_nothing_is_left_out():
    stream = QuestionStream(QUESTIONS, seed=3)
    epochs = [epoch(stream, number) for number in range(3)]
    assert all(sorted(ids) == [question.id for question in QUESTIONS] for ids in epochs)
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_the_seed_and_the_number_alone():
    stream = QuestionStream(QUESTIONS, seed=3)
    epochs = [epoch(stream, number) for number in (2, 0)]
    assert [epoch(QuestionStream(QUESTIONS, seed=3), number) for number in (2, 0)] == epochs
    assert epoch(stream, 2) == epochs[0], "also after another epoch"
    assert epoch(QuestionStream(QUESTIONS, seed=4), 2) != epochs[0]


def test_the_first_questions_are_those_of_the_run_and_at_most_all():
    stream = QuestionStream(QUESTIONS, seed=3)
    assert [question.id for question in stream.first(3)] == epoch(stream, 0)[:3]
    assert [question.id for question in stream.first(99)] == epoch(stream, 0)


def test_the_fingerprint_changes_with_ids_texts_and_answers():
    """Without ids of its own, a line has its number, and another question would have the same."""
    fingerprint = QuestionStream(QUESTIONS, seed=3).fingerprint()
    hinted = [replace(question, hint=Hint(steps=("count",))) for question in QUESTIONS]
    assert QuestionStream(hinted, seed=4).fingerprint() == fingerprint
    for change in ({"text": "What?"}, {"answer": "2222"}):
        others = [replace(question, **change) for question in QUESTIONS]
        assert QuestionStream(others, seed=3).fingerprint() != fingerprint
    assert QuestionStream(QUESTIONS[:6], seed=3).fingerprint() != fingerprint
    assert QuestionStream(QUESTIONS[::-1], seed=3).fingerprint() != fingerprint
