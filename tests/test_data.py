"""plumbing/data.py: files and datasets as people bring them."""

import json
import sys

import pytest
from PIL import Image

from hints import Hint
from plumbing.data import QuestionStream, load_questions
from plumbing.images import open_image
from rollout import encode_prompts, student_messages


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    return tmp_path


def write(folder, *rows):
    path = folder / "data.jsonl"
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    )
    return path


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
    assert (two.id, two.answer, two.hint.steps) == ("data-3", "blue", ("Look left.",)) and len(
        two.images
    ) == 1


@pytest.mark.parametrize(
    "row,message",
    [
        ({"question": "a?", "images": ["a.png"]}, r"data.jsonl:2: no answer"),
        ({"question": "a?", "answer": " "}, "no answer"),
        ({"answer": "1"}, "no question"),
        ("{oops", "data.jsonl:2"),
        ("[1]", "expected a JSON object"),
        ({"question": "a?", "answer": "1", "images": ["broken.png"]}, "cannot read .*broken.png"),
        ({"question": "a?", "answer": "1", "image": "gone.png"}, "cannot read .*gone.png"),
        (
            {"question": "<image> and <image>", "answer": "1", "image": "a.png"},
            "2 <image> marks but there are 1",
        ),
        (
            {"question": "a?", "answer": "1", "hint": {"where": []}},
            "data.jsonl:2: unknown hint field",
        ),
    ],
)
def test_bad_lines_name_file_line_and_field(folder, row, message):
    with pytest.raises(ValueError, match=message):
        load_questions(write(folder, {"question": "fine?", "answer": "1"}, row), Hint.from_json)


def test_bad_lines_can_be_left_out_and_are_listed(folder):
    fine, bad = {"question": "a?", "answer": "1", "image": "a.png"}, []
    samples = load_questions(
        write(
            folder, fine, {**fine, "image": "broken.png"}, "{oops", fine, {**fine, "id": "data-1"}
        ),
        bad=bad,
    )
    assert [s.id for s in samples] == ["data-1", "data-4"]
    assert [b.partition("data.jsonl:")[2][:2] for b in bad] == [
        "2:",
        "3:",
        "5:",
    ] and "is the id of line 1 already" in bad[2]
    with pytest.raises(ValueError, match="no samples in it; first: .*:1: no answer"):
        load_questions(write(folder, {"question": "a?"}), bad=[])


def test_images_come_from_one_folder(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write(elsewhere, {"question": "a?", "answer": "1", "image": "a.png"})
    assert load_questions(path, image_dir=folder)[0].images == [folder / "a.png"]
    for image in (f"../{folder.name}/a.png", str(folder / "a.png")):
        with pytest.raises(ValueError, match="outside .*--image-dir"):
            load_questions(write(elsewhere, {"question": "a?", "answer": "1", "image": image}))
    assert load_questions(
        write(folder, {"question": "a?", "answer": "1", "image": str(folder / "a.png")})
    )


def test_the_hint_of_a_hinted_prompt_is_what_is_not_the_question(folder):
    row = {"problem": "<image>How many?", "answer": "1", "image": "a.png"}
    [sample] = load_questions(
        write(folder, {**row, "prompt_with_hint": "<image> How many?\nLook left. "}), Hint.from_json
    )
    assert sample.hint == Hint(steps=("Look left.",)) and sample.text == "<image>How many?"
    with pytest.raises(
        ValueError, match="'prompt_with_hint': the question's text does not stand in it"
    ):
        load_questions(write(folder, {**row, "prompt_with_hint": "What?"}), Hint.from_json)


def test_a_dataset_s_folder(folder, base):
    """Images are decoded when they are used; broken ones are found before."""
    datasets = pytest.importorskip("datasets")
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
        samples = load_questions(folder / name, split=split)
        assert [s.id for s in samples] == ["r0", "r1", "r2", "r3"] and [
            len(s.images) for s in samples
        ] == [1, 2, 1, 2]
        assert open_image(samples[3].images[1]).size == (40, 33) and not isinstance(
            samples[3].images[1], Image.Image
        )
        assert (
            encode_prompts(base[1], samples[:1], [student_messages(samples[0])])[0].pixels
            is not None
        )
    with pytest.raises(ValueError, match="split 'dev'"):
        load_questions(folder / "many", split="dev")
    raw = [
        {"bytes": (folder / "a.png").read_bytes(), "path": None},
        {"bytes": b"nonsense", "path": None},
    ]
    table = datasets.Dataset.from_dict(
        {"question": ["a?", "b?"], "answer": ["1", "2"], "image": raw}
    ).cast_column("image", datasets.Image())
    table.save_to_disk(folder / "broken")
    bad = []
    assert (
        len(load_questions(folder / "broken", bad=bad)) == 1
        and len(bad) == 1
        and "broken:row 1" in bad[0]
    )


def test_a_dataset_without_datasets_is_one_line(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="python -m pip install datasets"):
        load_questions("PAPOGalaxy/PAPO_ViRL39K_train")


def test_missing_and_empty_files(folder):
    with pytest.raises(ValueError, match="no such file"):
        load_questions(folder / "none.jsonl")
    with pytest.raises(ValueError, match="no samples"):
        load_questions(write(folder, ""))


def test_data_is_shuffled_anew_each_epoch_and_nothing_is_left_out():
    samples = [str(i) for i in range(7)]
    stream = QuestionStream(samples, seed=3)
    epochs = [[stream[i] for i in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(e) == samples for e in epochs) and epochs[0] != epochs[1]
