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
LINE = re.compile(r"\b(row|column)\b")


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
    """The parts "ignore" and "steps" of a hint; empty for a response of another form.

    A response that reads cells with a running sum has the two steps of doing so. To ignore are the
    other lines of the kinds that it reads, and the mark that the question does not name.
    """
    if len(READING.findall(response)) < GRID:
        return {}
    marks = [mark for mark in ("star", "ring") if mark not in question.text.split()]
    kinds = dict.fromkeys(LINE.findall(response))
    ignore = [f"the {mark}" for mark in marks] + [f"every other {' and '.join(kinds)}"]
    return {"ignore": tuple(ignore), "steps": ("name each cell", "add its points to the sum")}
