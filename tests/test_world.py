"""toy/: the puzzles are what they say, and the committed base has the skill without the insight."""

from collections import Counter

import numpy as np
import pytest

import hints
from plumbing.answers import verify
from rollout import encode_prompts, sample_groups, student_messages
from toy import world


def test_puzzles_are_a_function_of_split_and_index():
    assert (
        world.make_puzzle("train", 5)
        == world.make_puzzle("train", 5)
        != world.make_puzzle("train", 6)
    )
    assert (
        world.draw(world.make_puzzle("heldout", 3)).tobytes()
        == world.draw(world.make_puzzle("heldout", 3)).tobytes()
    )
    with pytest.raises(ValueError, match="splits are"):
        world.make_puzzle("test", 0)
    with pytest.raises(ValueError):
        world.make_puzzle("train", 10**9)  # the first held-out seed: the splits cannot meet


def test_train_and_heldout_pictures_differ():
    grids = [
        {world.make_puzzle(split, i).cells for i in range(2000)}
        for split in ("train", "heldout", "tune")
    ]
    assert not grids[0] & grids[1] and not grids[0] & grids[2] and not grids[1] & grids[2]


def test_answers_follow_from_the_picture_s_cells():
    worth = {"red": 1, "green": 2, "blue": 3}
    for i in range(500):
        p = world.make_puzzle("heldout", i)
        grid = np.array([[worth.get(c, 0) for c in row] for row in p.cells])
        where = {mark: np.argwhere(np.array(p.cells) == mark) for mark in ("star", "ring")}
        assert len(where["star"]) == len(where["ring"]) == 1
        row, column = grid[where["star"][0, 0]].sum(), grid[:, where["ring"][0, 1]].sum()
        assert p.answer == {"row": row, "column": column, "cross": row + column}[p.family]
        assert (p.row, p.column) == (where["star"][0, 0], where["ring"][0, 1])


@pytest.mark.parametrize("family", world.FAMILIES)
def test_no_answer_is_common(family):
    counts = Counter(world.make_puzzle("heldout", i, family).answer for i in range(4000))
    assert max(counts.values()) / 4000 < 0.20


def test_families_are_drawn_equally():
    counts = Counter(world.make_puzzle("train", i).family for i in range(3000))
    assert set(counts) == set(world.FAMILIES) and min(counts.values()) > 900


def test_a_good_solver_s_response_is_verified():
    import random

    for i in range(200):
        p = world.make_puzzle("train", i)
        text = world.response(p, random.Random(i))
        assert verify(text, str(p.answer))
        assert all(world.line_name(line) in text for line in p.lines)


def test_picture():
    image = world.draw(world.make_puzzle("train", 0))
    assert image.size == (112, 112) and image.mode == "RGB"


def test_the_committed_base_has_the_skill_but_not_the_insight(base):
    model, processor = base
    clear, foggy = (world.puzzles("heldout", 150, start=10_000, fog=fog) for fog in (0.0, 1.0))
    rate = {}
    for name, chat, samples in (
        ("plain", student_messages, clear),
        ("hinted", hints.teacher_messages, clear),
        ("foggy", hints.teacher_messages, foggy),
    ):
        prompts = encode_prompts(processor, samples, [chat(s) for s in samples])
        groups = sample_groups(
            model, processor, samples, prompts, 1, max_new_tokens=48, temperature=0.0
        )
        rate[name] = sum(verify(g[0].text, s.answer) for g, s in zip(groups, samples)) / len(
            samples
        )
    assert rate["hinted"] >= 0.95 and rate["plain"] <= 0.35 and 0.6 <= rate["foggy"] <= 0.8, rate


def test_fog_changes_the_picture_alone_and_its_share_is_the_one_asked_for():
    clear, foggy = world.puzzles("tune", 40), world.puzzles("tune", 40, fog=1.0)
    assert all(
        (a.text, a.answer, a.hint, a.id) == (b.text, b.answer, b.hint, b.id)
        and b.family == f"foggy {a.family}"
        for a, b in zip(clear, foggy)
    )
    assert all(
        max(abs(x - (y + 200) / 2) for x, y in zip(b.images[0].tobytes(), a.images[0].tobytes()))
        <= 1
        for a, b in zip(clear[:5], foggy)
    )
    half = [world.make_puzzle("train", i, fog=0.5).foggy for i in range(400)]
    assert 170 <= sum(half) <= 230 and not any(
        world.make_puzzle("train", i).foggy for i in range(50)
    )


def test_boxes_hold_the_lines_and_nothing_else():
    for puzzle in (world.make_puzzle("tune", i) for i in range(20)):
        for (kind, n), (left, top, right, bottom) in zip(
            puzzle.lines, world.to_question(puzzle).boxes[0]
        ):
            inside = {
                (r, c)
                for r in range(4)
                for c in range(4)
                if left <= 28 * c < right and top <= 28 * r < bottom
            }
            assert inside == {(n, i) if kind == "row" else (i, n) for i in range(4)}
