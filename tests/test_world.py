"""toy/: the puzzles are what they say, and the committed base has the skill without the insight."""

import hashlib
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hints import teacher_messages
from rollout import encode_prompts, sample_groups, student_messages, verify
from toy import world


def picture(split, index):
    return world.draw(world.make_puzzle(split, index)).tobytes()


def test_puzzles_are_a_function_of_split_and_index():
    assert world.make_puzzle("train", 5) == world.make_puzzle("train", 5)
    assert world.make_puzzle("train", 5) != world.make_puzzle("train", 6)
    assert picture("heldout", 3) == picture("heldout", 3)
    with pytest.raises(ValueError, match="splits are"):
        world.make_puzzle("test", 0)
    with pytest.raises(ValueError):
        world.make_puzzle("train", 10**9)  # the first held-out seed: the splits cannot meet


def test_the_embedded_puzzles_are_those_that_the_committed_base_and_results_were_made_with():
    """Hashes of an earlier version. If only the pixels differ, look at the version of pillow."""
    texts, pixels = hashlib.sha256(), hashlib.sha256()
    drawn = [*world.puzzles("train", 9), *world.PuzzleStream(3).first(3)]
    drawn += [*world.puzzles("heldout", 9, start=7), *world.puzzles("tune", 9)]
    for question in drawn:
        hint, boxes = question.hint.render(), repr(question.boxes)
        text = [question.id, question.text, question.answer, hint, question.family, boxes]
        texts.update("\n".join([*text, question.solution]).encode())
        pixels.update(question.images[0].tobytes())
    assert texts.hexdigest() == "c542f4c1e2061d9194a8d612fe822eefa8ee55d157a943b1ad57f5626184af1e"
    assert pixels.hexdigest() == "35ee2c2198171a13c996a225ad06732a043baa80ffe38bba49a7b460058f99e8"


def test_train_and_heldout_pictures_differ():
    train, heldout, tune = (
        {world.make_puzzle(split, i).cells for i in range(2000)}
        for split in ("train", "heldout", "tune")
    )
    assert not train & heldout
    assert not train & tune
    assert not heldout & tune


def test_answers_follow_from_the_picture_s_cells():
    worth = {"red": 1, "green": 2, "blue": 3}
    for i in range(500):
        puzzle = world.make_puzzle("heldout", i)
        cells = np.array(puzzle.cells)
        points = np.array([[worth.get(cell, 0) for cell in row] for row in puzzle.cells])
        [[star_row, _]] = np.argwhere(cells == "star")  # there is one star, and one ring
        [[_, ring_column]] = np.argwhere(cells == "ring")
        row, column = points[star_row].sum(), points[:, ring_column].sum()
        answers = {"row": row, "column": column, "cross": row + column}
        if puzzle.family == "next":
            answers["next"] = points[star_row + 1].sum()
        assert puzzle.answer == answers[puzzle.family]
        assert (puzzle.row, puzzle.column) == (star_row, ring_column)


@pytest.mark.parametrize("family", world.FAMILIES)
def test_no_answer_is_common(family):
    counts = Counter(world.make_puzzle("heldout", i, family).answer for i in range(4000))
    assert max(counts.values()) / 4000 < 0.20


def test_no_other_reading_has_the_answer():
    for i in range(600):
        puzzle = world.make_puzzle("tune", i)
        points = np.array([[world.POINTS[cell] for cell in row] for row in puzzle.cells])
        rows, columns = points.sum(1), points.sum(0)
        sums = {"row": rows, "next": rows, "column": columns, "cross": rows[:, None] + columns}
        assert (sums[puzzle.family] == puzzle.answer).sum() == 1


def test_families_are_drawn_equally():
    counts = Counter(world.make_puzzle("train", i).family for i in range(3000))
    assert set(counts) == set(world.FAMILIES)
    assert min(counts.values()) > 670


def test_the_hint_names_the_line_or_two_rows_of_which_the_lower_one_counts():
    first = Counter()
    for i in range(400):
        puzzle = world.make_puzzle("train", i)
        hint = world.hint(puzzle)
        lines = [world.line_name(line) for line in puzzle.lines]
        if puzzle.family != "next":
            assert list(hint.look) == lines
        else:
            [names] = [text.split(" or ") for text in hint.look]
            order = [world.ROWS.index(name.split()[1]) for name in names]
            assert sorted(order) == [puzzle.row - 1, puzzle.row + 1]
            assert lines == [world.line_name(("row", max(order)))]
            first[order[0] < order[1]] += 1
        # a distractor is never the line, nor among the rows of the hint
        assert not set(hint.ignore) & {name for text in hint.look for name in text.split(" or ")}
        assert len(hint.ignore) == len(puzzle.lines)
    assert min(first.values()) > 0.3 * first.total()


def test_the_distractor_is_the_line_of_the_other_mark():
    for i in range(200):
        puzzle = world.make_puzzle("tune", i)
        held = [world.line_cells(puzzle.cells, line) for line in puzzle.distractors]
        marks = {"row": ["ring"], "column": ["star"], "cross": ["ring", "star"], "next": ["star"]}
        for cells, mark in zip(held, marks[puzzle.family], strict=True):
            assert mark in cells


def test_a_short_response_is_verified_and_reads_no_cell():
    for i in range(50):
        puzzle = world.make_puzzle("train", i)
        text = world.short_response(puzzle, random.Random(i))
        assert verify(text, world.to_question(puzzle))
        assert all(world.line_name(line) in text for line in puzzle.lines)
        assert not any(gem in text for gem in world.POINTS)


def test_a_good_solver_s_response_is_verified():
    for i in range(200):
        puzzle = world.make_puzzle("train", i)
        text = world.response(puzzle, random.Random(i))
        assert verify(text, world.to_question(puzzle))
        assert all(world.line_name(line) in text for line in puzzle.lines)


def test_picture():
    image = world.draw(world.make_puzzle("train", 0))
    assert image.size == (112, 112)
    assert image.mode == "RGB"


def responses(base, questions, messages, samples=1, temperature=0.0):
    model, processor = base
    prompts = encode_prompts(processor, questions, [messages(question) for question in questions])
    return sample_groups(
        model, processor, prompts, samples, max_new_tokens=48, temperature=temperature
    )


def accuracy(base, questions, messages):
    """The share of greedy responses that are right, with the chat that messages(question) makes."""
    groups = responses(base, questions, messages)
    return sum(verify(r.text, r.question) for [r] in groups) / len(questions)


@pytest.mark.slow
def test_the_committed_base_has_the_skill_but_not_the_insight(base):
    """Greedy: of two rows that the hint names, it reads one."""
    drawn = [world.make_puzzle("heldout", index) for index in range(10_000, 10_120)]
    named = [world.to_question(puzzle) for puzzle in drawn if puzzle.family != "next"]
    narrowed = [world.to_question(puzzle) for puzzle in drawn if puzzle.family == "next"]
    assert accuracy(base, named + narrowed, student_messages) <= 0.35
    assert accuracy(base, named, teacher_messages) >= 0.95
    assert accuracy(base, narrowed, teacher_messages) <= 0.7
    groups = responses(base, narrowed, teacher_messages, samples=6, temperature=1.0)
    right = [verify(r.text, r.question) for group in groups for r in group]
    assert 0.35 <= sum(right) / len(right) <= 0.65


@pytest.mark.slow
def test_each_part_of_a_hint_is_worth_something_to_the_committed_base(base):
    """Sampled: whole hint, without ignore or steps, plain, and what moves nothing."""

    def right(messages):
        groups = responses(base, questions, messages, samples=4, temperature=1.0)
        verdicts = [verify(r.text, r.question) for group in groups for r in group]
        return sum(verdicts) / len(verdicts)

    def without(*parts):
        return lambda question: teacher_messages(
            replace(question, hint=replace(question.hint, **dict.fromkeys(parts, ())))
        )

    questions = [q for q in world.puzzles("heldout", 80, start=20_000) if q.family != "next"]
    whole, plain = right(teacher_messages), right(student_messages)
    assert whole >= 0.95
    assert plain + 0.2 <= right(without("ignore")) <= whole - 0.05
    assert plain + 0.2 <= right(without("steps")) <= whole - 0.02
    assert plain + 0.04 <= right(without("look", "ignore")) <= plain + 0.2, "a little"
    assert abs(right(lambda question: teacher_messages(question, "answer")) - plain) <= 0.06


def test_with_the_solution_the_committed_base_boxes_the_answer_unread(base):
    questions = world.puzzles("heldout", 60, start=30_000)
    groups = responses(base, questions, lambda question: teacher_messages(question, "solution"))
    assert sum(verify(r.text, r.question) for [r] in groups) >= 57
    read = [gem for [r] in groups for gem in ("red", "green", "blue", "none") if gem in r.text]
    assert len(read) <= 3


def test_boxes_hold_the_lines_and_nothing_else():
    places = [(row, column) for row in range(4) for column in range(4)]
    for puzzle in (world.make_puzzle("tune", i) for i in range(20)):
        boxes = world.to_question(puzzle).boxes[0]
        named = [line for lines in puzzle.candidates for line in lines]
        for (kind, index), (left, top, right, bottom) in zip(named, boxes, strict=True):
            inside = {
                (row, column)
                for row, column in places
                if left <= 28 * column < right and top <= 28 * row < bottom
            }
            rows, columns = {row for row, _ in inside}, {column for _, column in inside}
            if kind == "row":
                assert (rows, columns) == ({index}, {0, 1, 2, 3})
            else:
                assert (rows, columns) == ({0, 1, 2, 3}, {index})


def test_the_stream_of_a_run_is_the_puzzles_of_its_seed():
    stream = world.PuzzleStream(3)
    puzzles = world.puzzles("train", 5, start=3 * 10**6)
    assert stream.first(5) == puzzles
    assert stream[4] == puzzles[4]
    # Checkpoints of runs without data hold this value: another one would refuse to resume them.
    assert stream.fingerprint() == "e3b0c44298fc1c14"
