"""The embedded model's hints from itself: a rule in the place of what a real model says in words.

The embedded model has a hundred words and follows no instruction. So it cannot describe the method
of its own response, and it would not understand "the second row from the top". The rule here reads
the *form* of its response, never a number or a gem of it, and gives the hint the words and the
parts that toy.world's hints have. Where to look is not decided here.
"""

from __future__ import annotations

import re

from plumbing.places import Box, place_words
from rollout import Question
from toy.world import COLORS, GRID, line_name

# "red 1" or "none 4": a cell's content and the running sum
READING = re.compile(rf"\b(?:{'|'.join(COLORS)}|none|star|ring) \d+\b")


def name_place(box: Box, shape: tuple[int, int], exact: bool = True) -> str:
    """A box of cells in the world's words, where it is one row or column: "the upper row".

    Otherwise as plumbing.places.place_words says it.
    """
    left, top, right, bottom = box
    if exact and shape == (GRID, GRID):
        if (left, right) == (0, GRID) and bottom - top == 1:
            return line_name(("row", top))
        if (top, bottom) == (0, GRID) and right - left == 1:
            return line_name(("column", left))
    return place_words(box, shape, exact)


def hint_parts(question: Question, response: str) -> dict[str, tuple[str, ...]]:
    """The part "steps" of a hint; empty for a response of another form.

    A response that reads cells with a running sum gets the three steps of doing so. The rule knows
    no distractor, so there is no "ignore".
    """
    if len(READING.findall(response)) < GRID:
        return {}
    marks = [f"the {mark}" for mark in ("star", "ring") if mark in question.text.split()]
    return {"steps": (f"find {' and '.join(marks)}", "name each cell", "add up the points")}
