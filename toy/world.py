"""The embedded world: picture puzzles that are easy with the hint, and only with the hint.

A puzzle is a picture of 112x112 pixels: 4x4 cells of 28 pixels. A Qwen2-VL with patches of 14
pixels turns each cell into one visual token after merging. A cell holds a gem, the star, the ring
or nothing. A red gem is worth 1 point, a green one 2, a blue one 3, and it shows its points as
pips. Each picture has one star and one ring. There are four families of questions:

    row     How many points are in the star row?      Find the star, then read its row.
    column  How many points are in the ring column?   Find the ring, then read its column.
    cross   How many points are in the star row plus the ring column?
            Find both, read both, and keep one running sum.
    next    How many points are in the row next to the star row?
            It is the row below. Only the reward says so: the hint names the row above, too.

The hint names the row or column, what to ignore and how to go on. It holds no number, so it cannot
hold the answer.

A puzzle depends on its split and index alone. It is the same on every machine, and the puzzles of
two splits differ.

These puzzles are for the embedded model. `puzzles` and `PuzzleStream` also serve any other model:
with embedded=False they give the puzzles of toy.gems.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from hints import Hint
from rollout import Question
from toy import gems
from toy.splits import seed_of

FAMILIES = ("row", "column", "cross", "next")
ROWS = ("top", "upper", "lower", "bottom")
COLUMNS = ("leftmost", "left", "right", "rightmost")
POINTS = {"red": 1, "green": 2, "blue": 3, "none": 0, "star": 0, "ring": 0}
COLORS = {"red": (220, 30, 30), "green": (20, 150, 60), "blue": (30, 60, 220)}
OPENINGS = ("I look at", "Here is", "Now read")
ENDINGS = (".", ". So")
CELL = 28  # pixels
GRID = 4  # cells

Line = tuple[str, int]  # a row or column: ("row" | "column", index)


# ---------------------------------------------------------------------------------- the puzzle
@dataclass(frozen=True)
class Puzzle:
    """One grid and one question.

    cells[row][column] is a key of POINTS. row: the row of the star; column: the column of the
    ring.
    """

    seed: int
    family: str
    cells: tuple
    row: int
    column: int

    @property
    def lines(self) -> list[Line]:
        """The lines that the question is about, in the order of reading."""
        row, column = ("row", self.row), ("column", self.column)
        below = ("row", self.row + 1)
        lines = {"row": [row], "column": [column], "cross": [row, column], "next": [below]}
        return lines[self.family]

    @property
    def candidates(self) -> list[list[Line]]:
        """Per line of the question, what the hint names: the line, or, of "next", both rows."""
        if self.family == "next":
            return [[("row", self.row - 1), ("row", self.row + 1)]]
        return [[line] for line in self.lines]

    @property
    def distractors(self) -> list[Line]:
        """Per line of the question, a line that is easily taken for it.

        It is the line through the other mark; for "next" it is the star row itself.
        """
        if self.family == "next":
            return [("row", self.row)]
        other = {
            "row": ("row", mark_place(self.cells, "ring")[0]),
            "column": ("column", mark_place(self.cells, "star")[1]),
        }
        return [other[kind] for kind, _ in self.lines]

    @property
    def answer(self) -> int:
        """The points of all these lines."""
        return sum(line_points(self.cells, line) for line in self.lines)


def line_cells(cells, line: Line) -> list[str]:
    """The four cells of a row (left to right) or of a column (top to bottom)."""
    kind, index = line
    if kind == "row":
        return list(cells[index])
    return [row[index] for row in cells]


def line_points(cells, line: Line) -> int:
    """The points in one row or column."""
    return sum(POINTS[cell] for cell in line_cells(cells, line))


def mark_place(cells, mark: str) -> tuple[int, int]:
    """The row and the column of the star or the ring."""
    [row] = [index for index, row in enumerate(cells) if mark in row]
    return row, cells[row].index(mark)


def line_name(line: Line) -> str:
    """The words for a line: ("row", 0) is "the top row"."""
    kind, index = line
    names = ROWS if kind == "row" else COLUMNS
    return f"the {names[index]} {kind}"


def line_box(line: Line) -> list[int]:
    """The place of a line in the picture, in pixels: left, top, right, bottom."""
    kind, index = line
    start, end = CELL * index, CELL * (index + 1)
    if kind == "row":
        return [0, start, CELL * GRID, end]
    return [start, 0, end, CELL * GRID]


def make_puzzle(split: str, index: int, family: str | None = None) -> Puzzle:
    """Puzzle number `index` of a split: "train", "heldout" or "tune".

    family: instead of the one drawn from the seed. Raises ValueError for an
    unknown split or an index outside 0 to 10^9 - 1.
    """
    seed = seed_of(split, index)
    # A text seed is hashed by SHA-512, so the draws are the same in all versions of Python.
    rng = random.Random(f"puzzle-{seed}")
    family = family or FAMILIES[rng.randrange(len(FAMILIES))]
    while True:
        cells = _draw_cells(rng, family)
        star_row, ring_column = mark_place(cells, "star")[0], mark_place(cells, "ring")[1]
        puzzle = Puzzle(seed, family, cells, star_row, ring_column)
        if _answer_is_unique(puzzle):
            return puzzle


def _answer_is_unique(puzzle: Puzzle) -> bool:
    """No other lines of the same kinds have as many points, so who is right has read these."""
    kinds = [kind for kind, _ in puzzle.lines]
    readings = itertools.product(*([(kind, index) for index in range(GRID)] for kind in kinds))
    points = [sum(line_points(puzzle.cells, line) for line in lines) for lines in readings]
    return points.count(puzzle.answer) == 1


def _draw_cells(rng: random.Random, family: str) -> tuple:
    """A random grid.

    The star and the ring never share a row or a column. For "next" the star has a row above and a
    row below.
    """
    rows = range(1, GRID - 1) if family == "next" else range(GRID)
    star_row, star_column = rng.choice(rows), rng.randrange(GRID)
    ring_row = rng.choice([row for row in range(GRID) if row != star_row])
    ring_column = rng.choice([column for column in range(GRID) if column != star_column])
    cells = [["none"] * GRID for _ in range(GRID)]
    cells[star_row][star_column] = "star"
    cells[ring_row][ring_column] = "ring"
    places = [(row, column) for row in range(GRID) for column in range(GRID)]
    free = [(row, column) for row, column in places if cells[row][column] == "none"]
    # Between 6 and 14 gems: with few and with many of them, the answers spread out.
    for row, column in rng.sample(free, rng.randint(6, 14)):
        cells[row][column] = rng.choice(("red", "green", "blue"))
    return tuple(map(tuple, cells))


# ------------------------------------------------------------------------------------ the texts
def question_text(puzzle: Puzzle) -> str:
    """The plain question. It names the star or the ring, never the row or column."""
    lines = {
        "row": "the star row",
        "column": "the ring column",
        "cross": "the star row plus the ring column",
        "next": "the row next to the star row",
    }[puzzle.family]
    return f"How many points are in {lines}?"


def hint(puzzle: Puzzle) -> Hint:
    """Where to look, what to ignore and how to go on. No number and no gem is named.

    Of "next" the hint names two rows, in random order: it narrows the choice and does not make it.
    """
    look = []
    for lines in puzzle.candidates:
        names = [line_name(line) for line in lines]
        random.Random(f"hint-{puzzle.seed}").shuffle(names)
        look.append(" or ".join(names))
    ignore = [line_name(line) for line in puzzle.distractors]
    marks = {"row": "the star", "column": "the ring", "cross": "the star and the ring"}
    find = f"find {marks.get(puzzle.family, 'the star')}"
    return Hint(look=look, ignore=ignore, steps=[find, "name each cell", "add up the points"])


def response(
    puzzle: Puzzle, rng: random.Random, lines: list[Line] | None = None, final: int | None = None
) -> str:
    """What a careful solver writes: the cells of each line with the running sum, then the answer.

    lines: read these instead of the puzzle's own, as a solver does who guessed. final: box this
    instead of the sum. rng chooses the opening and the ending, so that a good policy keeps some
    entropy.
    """
    if lines is None:
        lines = puzzle.lines
    total, readings = 0, []
    for line in lines:
        steps = []
        for cell in line_cells(puzzle.cells, line):
            total += POINTS[cell]
            steps.append(f"{cell} {total}")
        readings.append(f"{line_name(line)}: {' '.join(steps)}")
    boxed = total if final is None else final
    opening = rng.choice(OPENINGS)
    ending = rng.choice(ENDINGS)
    return f"{opening} {'. Next '.join(readings)}{ending} \\boxed{{{boxed}}}"


def short_response(puzzle: Puzzle, rng: random.Random, lines: list[Line] | None = None) -> str:
    """What a solver writes who names the lines, reads no cell and boxes the right sum."""
    if lines is None:
        lines = puzzle.lines
    names = ". Next ".join(line_name(line) for line in lines)
    points = sum(line_points(puzzle.cells, line) for line in lines)
    return f"{rng.choice(OPENINGS)} {names}{rng.choice(ENDINGS)} \\boxed{{{points}}}"


# ---------------------------------------------------------------------------------- the picture
def draw(puzzle: Puzzle) -> Image.Image:
    """The picture, (112, 112) RGB.

    Each row and each column has its own tint, so the picture alone says where a cell is.
    """
    rng = random.Random(f"draw-{puzzle.seed}")
    image = Image.new("RGB", (CELL * GRID, CELL * GRID))
    pen = ImageDraw.Draw(image)
    for row in range(GRID):
        for column in range(GRID):
            left, top = CELL * column, CELL * row
            tint = (255 - 22 * row, 255 - 22 * column, 205 + 8 * (row + column))
            pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=tint)
            x = left + CELL / 2 + rng.uniform(-2, 2)
            y = top + CELL / 2 + rng.uniform(-2, 2)
            _draw_cell(pen, puzzle.cells[row][column], x, y, rng.uniform(7.5, 9.5))
    return image


def _draw_cell(pen: ImageDraw.ImageDraw, cell: str, x: float, y: float, radius: float) -> None:
    """Draw what a cell holds around the point (x, y)."""
    if cell == "star":
        _draw_star(pen, x, y, radius + 2)
    elif cell == "ring":
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(box, outline=(20, 20, 20), width=4)
    elif cell != "none":
        _draw_gem(pen, cell, x, y, radius)


def _draw_star(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    """A star of five points."""
    corners = []
    for number in range(10):
        distance = radius if number % 2 == 0 else radius * 0.42
        angle = math.pi * number / 5
        corners.append((x + distance * math.sin(angle), y - distance * math.cos(angle)))
    pen.polygon(corners, fill=(250, 190, 0), outline=(90, 60, 0))


def _draw_gem(pen: ImageDraw.ImageDraw, color: str, x: float, y: float, radius: float) -> None:
    """A gem with one white pip per point: the picture says what the gem is worth."""
    corners = [(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)]
    pen.polygon(corners, fill=COLORS[color])
    points = POINTS[color]
    for number in range(points):
        pip = x + 4 * number - 2 * (points - 1)
        pen.ellipse((pip - 1.2, y - 1.2, pip + 1.2, y + 1.2), fill=(255, 255, 255))


# -------------------------------------------------------------------------------- the questions
def to_question(puzzle: Puzzle) -> Question:
    """The puzzle as a Question, with hint, solution and the boxes of the lines in the hint."""
    return Question(
        id=f"puzzle-{puzzle.seed}",
        text=question_text(puzzle),
        answer=str(puzzle.answer),
        images=[draw(puzzle)],
        hint=hint(puzzle),
        family=puzzle.family,
        solution=response(puzzle, random.Random(f"solution-{puzzle.seed}")),
        boxes=[[line_box(line) for lines in puzzle.candidates for line in lines]],
    )


def puzzles(split: str, count: int, start: int = 0, embedded: bool = True) -> list[Question]:
    """`count` questions of a split, from index `start` on.

    embedded: for the embedded model; otherwise the puzzles of toy.gems.
    """
    indices = range(start, start + count)
    if not embedded:
        return [gems.to_question(gems.make_puzzle(split, i)) for i in indices]
    return [to_question(make_puzzle(split, i)) for i in indices]


class PuzzleStream:
    """The questions of a run without data: question number i is a puzzle, and there is no end.

    Each seed has its own 10^6 train puzzles. embedded: as in `puzzles`. It serves where
    plumbing.data.QuestionStream serves the questions of --data.
    """

    def __init__(self, seed: int, embedded: bool = True):
        self.seed = seed
        self.embedded = embedded

    def __getitem__(self, i: int) -> Question:
        [question] = puzzles("train", 1, self.seed * 10**6 + i, embedded=self.embedded)
        return question

    def first(self, count: int) -> list[Question]:
        """The first `count` questions."""
        return [self[i] for i in range(count)]

    def fingerprint(self) -> str:
        """The hash of no ids, which says that a run has no data. The config holds the seed.

        The puzzles of toy.gems have another one: older versions gave all models the embedded
        world, and such a run must not go on with other questions.
        """
        data = b"" if self.embedded else b"toy.gems"
        return hashlib.sha256(data).hexdigest()[:16]
