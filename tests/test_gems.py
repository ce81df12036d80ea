"""toy/gems.py: the puzzles of real models, read again from their pixels and their questions."""

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, read_jsonl
from PIL import Image, ImageChops, ImageDraw, ImageFont
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import train
from hints import teacher_messages
from plumbing.hint_rules import broken_rules
from plumbing.images import ImageTextProcessor
from plumbing.inputs import read_inputs
from plumbing.spoilers import find_spoilers
from rollout import encode_prompts, student_messages, verify
from toy import gems, world

SPLITS = ("train", "heldout", "tune")
PLACES = {
    2: ["the top row", "the bottom row"],
    3: ["the top row", "the middle row", "the bottom row"],
    4: [
        "the top row",
        "the row just below the top row",
        "the row just above the bottom row",
        "the bottom row",
    ],
}


@pytest.fixture(scope="module")
def questions():
    return world.puzzles("heldout", 60, embedded=False)


def puzzles(split, count):
    return [gems.make_puzzle(split, index) for index in range(count)]


# ------------------------------------------------------------------ a reader that shares no code
def row_centres(pixels):
    """The rows are the light panels: the places on the vertical line x = 20."""
    light = pixels[:, 20].min(-1) > 235
    edges = np.flatnonzero(np.diff(light.astype(int)))
    return [int(top + bottom) // 2 + 1 for top, bottom in edges.reshape(-1, 2)]


def thing_at(pixels, x, y):
    """What is drawn around a place: the colour of at least 150 pixels names it."""
    red, green, blue = np.moveaxis(pixels[y - 26 : y + 26, x - 26 : x + 26].astype(int), -1, 0)
    neutral = (abs(red - green) < 8) & (abs(green - blue) < 12)
    seen = {
        "yellow star": (red > 230) & (green > 170) & (blue < 60),
        "red": (red > 190) & (green < 150) & (blue < 150),
        "green": (green > 130) & (red < 130) & (blue < 150),
        "blue": (blue > 200) & (red < 140) & (green < 180),
        "coin": neutral & (red > 225) & (red < 245),
        "grey": neutral & (red > 130) & (red < 170),
    }
    [name] = [name for name, mask in seen.items() if mask.sum() > 150] or [None]
    return name


def number_at(image, x, y):
    """The number on a coin: the one that looks most like it when it is printed again."""
    coin = image.convert("L").crop((x - 16, y - 12, x + 16, y + 12))

    def difference(number):
        printed = Image.new("L", (32 * 8, 24 * 8), 236)
        font = ImageFont.load_default(size=26 * 8)
        pen = ImageDraw.Draw(printed)
        pen.text((16 * 8, 12 * 8), str(number), 36, font, anchor="mm")
        return np.sum(ImageChops.difference(printed.reduce(8), coin), dtype=int)

    return min(range(10, 100), key=difference)


def read_picture(image):
    """Marks, and the things in each row."""
    pixels = np.array(image)
    marks, rows = [], []
    for y in row_centres(pixels):
        marks.append(thing_at(pixels, 56, y))
        things = [thing_at(pixels, 132 + 64 * place, y) for place in range(5)]
        coins = [number_at(image, 132, y)] if things[0] == "coin" else []
        rows.append(coins or [thing for thing in things if thing])
    return marks, rows


def points(row, text):
    """What a row is worth by the rules that the question states."""
    if isinstance(row[0], int):
        assert "Which number is on the coin" in text
        return row[0]
    counted = re.search(r"How many (\w+) gems are in the row", text)
    if counted:
        return row.count(counted[1])
    worth = {kind: int(value) for kind, value in re.findall(r"(\w+) gem is worth (\d+)", text)}
    stones = {"grey": 0} if "grey stone is worth nothing" in text else {}
    return sum((worth | stones)[thing] for thing in row)


def test_pixels_and_question_alone_give_the_answer(questions):
    for question in questions:
        marks, rows = read_picture(question.images[0])
        assert marks.count("yellow star") == 1
        totals = [points(row, question.text) for row in rows]
        star_row = marks.index("yellow star")
        assert question.answer == str(totals[star_row])
        # who reads another row is wrong
        assert totals.count(totals[star_row]) == 1
        # the question says how many rows there are, and which other star there is
        assert f"shows {['two', 'three', 'four'][len(rows) - 2]} rows" in question.text
        assert marks.count("grey") == question.text.count("The grey star marks another row.")
        # the hint names the row of the star, and the box surrounds it
        assert question.hint.look[0].startswith(f"{PLACES[len(rows)][star_row]}, because")
        [[[left, top, right, bottom]]] = question.boxes
        [inside] = [y for y in row_centres(np.array(question.images[0])) if top < y < bottom]
        assert inside == row_centres(np.array(question.images[0]))[star_row]
        assert (left, right) == (12, 436)


# ----------------------------------------------------------------------------------- the texts
def test_hints_give_nothing_away_and_break_no_rule():
    for puzzle in puzzles("train", 600):
        hint, text = gems.hint(puzzle), gems.question_text(puzzle)
        assert find_spoilers(hint.text, text, str(puzzle.answer)) == []
        assert broken_rules(hint.look, hint.ignore, hint.steps, text, ["image"]) == []
        assert not any(character.isdigit() for character in hint.render())
        assert not any(kind in hint.render() for kind in ("red ", "green ", "blue "))


def test_hints_do_not_contradict_the_question():
    for puzzle in puzzles("train", 50):
        hint, text = gems.hint(puzzle).text, gems.question_text(puzzle)
        for word in ("grey star,", "grey stones"):
            in_picture = "grey star" in puzzle.marks if "star" in word else puzzle.level.has_stones
            assert (word in hint) == in_picture
        assert ("coin" in hint) == ("coin" in text)
        assert ("sum so far" in hint) == ("points" in text)
        assert "yellow star" in hint


def test_texts_hold_no_special_token(questions):
    for question in questions:
        texts = (question.text, question.hint.render(), question.solution)
        assert not any(sign in text for text in texts for sign in "<>|")


def test_a_good_solver_s_response_is_verified(questions):
    for question in questions:
        assert verify(question.solution, question)


# ---------------------------------------------------------------------------- levels and splits
def test_five_puzzles_in_a_row_have_five_levels():
    levels = [puzzle.level.name for puzzle in puzzles("train", 500)]
    blocks = [levels[start : start + 5] for start in range(0, 500, 5)]
    assert all(len(set(block)) == 5 for block in blocks)
    assert len({tuple(block) for block in blocks}) > 30  # in a random order
    question = world.PuzzleStream(0, embedded=False)[7]
    assert question.family == levels[7]
    assert question.id == f"gems-{levels[7].split()[1].rstrip(',')}-7"


def test_no_answer_and_no_place_of_the_star_is_common():
    drawn = puzzles("tune", 2000)
    for level in gems.LEVELS:
        of_level = [puzzle for puzzle in drawn if puzzle.level == level]
        answers = Counter(puzzle.answer for puzzle in of_level)
        rows = Counter(puzzle.star_row for puzzle in of_level)
        assert max(answers.values()) / len(of_level) < 0.26, level
        assert max(rows.values()) / len(of_level) < 1 / level.rows + 0.1, level


def test_two_splits_never_share_a_puzzle():
    train_puzzles, heldout, tune = (
        {(puzzle.marks, puzzle.rows, puzzle.worth) for puzzle in puzzles(split, 800)}
        for split in SPLITS
    )
    assert not train_puzzles & heldout
    assert not train_puzzles & tune
    assert not heldout & tune


def test_puzzles_are_a_function_of_split_and_index():
    assert gems.make_puzzle("heldout", 3) == gems.make_puzzle("heldout", 3)
    one, other = world.puzzles("tune", 2, embedded=False)
    assert one == world.puzzles("tune", 1, embedded=False)[0] != other
    assert world.puzzles("tune", 1, start=1, embedded=False) == [other]
    with pytest.raises(ValueError, match="splits are"):
        gems.make_puzzle("test", 0)


def test_a_stream_of_these_puzzles_is_not_taken_for_the_embedded_one():
    stream = world.PuzzleStream(3, embedded=False)
    assert stream.first(3) == world.puzzles("train", 3, start=3 * 10**6, embedded=False)
    assert stream.fingerprint() != world.PuzzleStream(3).fingerprint()


# ---------------------------------------------------------------------------- models and runs
# The image settings that the hub's checkpoints have.
HUB_IMAGES = {
    "Qwen2-VL": dict(patch_size=14, shortest_edge=3136, longest_edge=12845056),
    "Qwen2.5-VL": dict(patch_size=14, shortest_edge=3136, longest_edge=12845056),
    "Qwen3-VL": dict(patch_size=16, shortest_edge=65536, longest_edge=16777216),
}


@pytest.mark.parametrize(
    "kind, tokens", [("Qwen2-VL", 256), ("Qwen2.5-VL", 256), ("Qwen3-VL", 196)]
)
def test_image_tokens_of_the_three_classes(kind, tokens, base, questions):
    settings = dict(HUB_IMAGES[kind])
    images = Qwen2VLImageProcessorPil(
        patch_size=settings.pop("patch_size"), merge_size=2, temporal_patch_size=2, size=settings
    )
    tokenizer = base[1].tokenizer
    processor = ImageTextProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    chats = [student_messages(questions[0]), teacher_messages(questions[0])]
    for prompt in encode_prompts(processor, [questions[0]] * 2, chats):
        assert prompt.types.sum() == tokens
    assert {question.images[0].size for question in questions} == {(448, 448)}
    assert {question.images[0].mode for question in questions} == {"RGB"}


@pytest.fixture
def other_model(tmp_path, monkeypatch):
    """A model in another folder. Its tokenizer reads most words of these puzzles as <unk>."""
    monkeypatch.chdir(tmp_path)
    return str(shutil.copytree(ROOT / "toy" / "base", tmp_path / "other"))


def read(model, **settings):
    config = train.TrainConfig(model=model, name="x", eval_questions=6, **settings)
    return read_inputs(config, world, 1)


def test_any_other_model_gets_these_puzzles(other_model):
    inputs = read(other_model, seed=3)
    assert inputs.stream.first(4) == world.PuzzleStream(3, embedded=False).first(4)
    assert inputs.held_out == world.puzzles("heldout", 6, embedded=False)
    assert all(question.hint for question in inputs.held_out)
    note = "questions: built-in puzzles for real models, 448 pixels, all with a hint"
    assert inputs.note == note


def test_the_embedded_model_by_another_path_keeps_its_own(other_model):
    inputs = read(f"{ROOT}/toy/../toy/base")
    assert inputs.held_out == world.puzzles("heldout", 6)
    assert inputs.note == "questions: built-in puzzles, all with a hint"


def test_a_run_of_another_model(other_model, capsys):
    train.main([*TINY, "--model", other_model, "--max-new-tokens", "8", "--name", "run"])
    assert "built-in puzzles for real models" in capsys.readouterr().out
    rows = read_jsonl(Path("runs/run/responses.jsonl"))
    assert rows
    assert all(re.fullmatch(r"gems-[1-5]-\d+", row["id"]) for row in rows)
