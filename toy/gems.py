"""The built-in puzzles of real models: rows of gems, in plain English.

The embedded model has a world of its own, toy.world. Any other model that is trained without --data
gets these puzzles. A picture has 448 x 448 pixels: 256 visual tokens in Qwen2-VL and Qwen2.5-VL,
196 in Qwen3-VL. It shows two to four rows. A mark stands at the left end of each row, and the
yellow star is the mark that counts.

Picture and question determine the answer: the question states all rules. The hint helps to apply
them. It says which row the star is in, what to ignore and how to go on. It holds no number, so it
cannot hold the answer.

There are five levels, from reading one number to a sum over five gems of three kinds. Each block of
five puzzles has all of them, so each batch has easy and hard questions. The levels are designed,
not measured: no real model has answered these questions yet.

A puzzle depends on its split and index alone. Two splits never share a puzzle: a hash of the puzzle
says which split it may be in.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from hints import Hint
from rollout import Question
from toy.splits import FIRST_SEED, seed_of

KINDS = ("red", "green", "blue")
OTHER_MARKS = ("moon", "ring", "heart")
ROW_NAMES = {
    2: ("the top row", "the bottom row"),
    3: ("the top row", "the middle row", "the bottom row"),
    4: (
        "the top row",
        "the row just below the top row",
        "the row just above the bottom row",
        "the bottom row",
    ),
}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}


# ---------------------------------------------------------------------------------- the puzzle
@dataclass(frozen=True)
class Level:
    """What the puzzles of one level have in common.

    rows: their number. cells: per row, without the mark. gems: the fewest and the most gems in a
    row; grey stones fill the other cells; no gems: each row has one coin with a number. kinds: how
    many kinds of gem there are, all of them in the star's row. worth: the least and the most points
    of a gem; (1, 1): the question asks for a count. grey_star: it marks one of the other rows.
    """

    name: str
    rows: int
    cells: int
    gems: tuple[int, int] = (0, 0)
    kinds: int = 0
    worth: tuple[int, int] = (1, 1)
    grey_star: bool = False

    @property
    def has_stones(self) -> bool:
        return self.gems[1] > 0 and self.gems[0] < self.cells


LEVELS = (
    Level("level 1, read", rows=2, cells=1),
    Level("level 2, count", rows=3, cells=5, gems=(1, 5), kinds=1),
    Level("level 3, add", rows=2, cells=3, gems=(3, 3), kinds=2, worth=(1, 5)),
    Level("level 4, skip", rows=3, cells=5, gems=(3, 4), kinds=3, worth=(1, 5)),
    Level("level 5, decoy", rows=4, cells=5, gems=(5, 5), kinds=3, worth=(2, 9), grey_star=True),
)


@dataclass(frozen=True)
class Puzzle:
    """One picture and its question.

    marks: of each row, from top to bottom: "star", "grey star" or one of OTHER_MARKS. rows: the
    cells of each row, from left to right: one of KINDS, "stone", or a coin's number in digits.
    worth: (kind, points) of the kinds that count.
    """

    seed: int
    level: Level
    marks: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    worth: tuple[tuple[str, int], ...]

    @property
    def star_row(self) -> int:
        """The row of the yellow star, from 0 at the top."""
        return self.marks.index("star")

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of the star's row."""
        return self.rows[self.star_row]

    @property
    def answer(self) -> int:
        """The points in the star's row."""
        return self.total(self.star_row)

    def points(self, cell: str) -> int:
        """What a cell counts: a coin its number, a gem its worth, a stone nothing."""
        return int(cell) if cell.isdigit() else dict(self.worth).get(cell, 0)

    def total(self, row: int) -> int:
        """The points in one row."""
        return sum(self.points(cell) for cell in self.rows[row])


def make_puzzle(split: str, index: int) -> Puzzle:
    """Puzzle number `index` of a split: "train", "heldout" or "tune". Raises ValueError.

    Draws again until all kinds of gem are in the star's row, no other row has the same answer, and
    the puzzle may be in this split.
    """
    seed = seed_of(split, index)
    level = _level_of(seed)
    rng = random.Random(f"gems-{seed}")
    for _ in itertools.count():
        puzzle = _draw_puzzle(seed, level, rng)
        totals = [puzzle.total(row) for row in range(level.rows)]
        kinds = set(puzzle.cells) & set(KINDS)
        is_fair = len(kinds) == level.kinds and totals.count(puzzle.answer) == 1
        if is_fair and split_of(puzzle) == split:
            return puzzle


def _level_of(seed: int) -> Level:
    """Five puzzles in a row have five levels, in a random order."""
    block, place = divmod(seed, len(LEVELS))
    return random.Random(f"levels-{block}").sample(LEVELS, len(LEVELS))[place]


def split_of(puzzle: Puzzle) -> str:
    """The split that a puzzle may be in, whatever its seed: picture and question decide."""
    content = repr((puzzle.marks, puzzle.rows, puzzle.worth))
    digest = hashlib.sha256(content.encode()).digest()
    return list(FIRST_SEED)[digest[0] % len(FIRST_SEED)]


def _draw_puzzle(seed: int, level: Level, rng: random.Random) -> Puzzle:
    """Random marks, rows and worths, which need not be fair."""
    others = ["grey star"] if level.grey_star else []
    others += rng.sample(OTHER_MARKS, level.rows - 1 - len(others))
    marks = ["star", *others]
    rng.shuffle(marks)
    drawn = set(rng.sample(KINDS, level.kinds))
    kinds = [kind for kind in KINDS if kind in drawn]
    least, most = level.worth
    points = [1] * len(kinds) if most == 1 else rng.sample(range(least, most + 1), len(kinds))
    rows = tuple(_draw_row(level, kinds, rng) for _ in range(level.rows))
    return Puzzle(seed, level, tuple(marks), rows, tuple(zip(kinds, points, strict=True)))


def _draw_row(level: Level, kinds: list[str], rng: random.Random) -> tuple[str, ...]:
    if not kinds:
        return (str(rng.randint(10, 99)),)
    gems = [rng.choice(kinds) for _ in range(rng.randint(*level.gems))]
    cells = gems + ["stone"] * (level.cells - len(gems))
    rng.shuffle(cells)
    return tuple(cells)


# ------------------------------------------------------------------------------------ the texts
def question_text(puzzle: Puzzle) -> str:
    """The rules and the question. It names the star, never the place of its row."""
    level = puzzle.level
    sentences = [
        f"The picture shows {NUMBER_WORDS[level.rows]} rows.",
        "A mark stands at the left end of each row.",
    ]
    if not level.kinds:
        sentences.append("Which number is on the coin in the row of the yellow star?")
    elif level.kinds == 1:
        [(kind, _)] = puzzle.worth
        sentences.append(f"How many {kind} gems are in the row of the yellow star?")
        sentences.append("Do not count the grey stones.")
    else:
        sentences.append(_worth_sentence(puzzle))
        if level.has_stones:
            sentences.append("A grey stone is worth nothing.")
        if level.grey_star:
            sentences.append("The grey star marks another row.")
        sentences.append("How many points are the gems in the row of the yellow star worth in all?")
    return " ".join(sentences)


def _worth_sentence(puzzle: Puzzle) -> str:
    """What each kind is worth: "A red gem is worth 1 point and a blue gem is worth 5 points." """
    clauses = []
    for kind, points in puzzle.worth:
        clauses.append(f"a {kind} gem is worth {points} point{'' if points == 1 else 's'}")
    before = ", ".join(clauses[:-1])
    comma = "," if len(clauses) > 2 else ""
    return f"{before}{comma} and {clauses[-1]}.".capitalize()


def row_name(puzzle: Puzzle) -> str:
    """The place of the star's row: "the middle row"."""
    return ROW_NAMES[puzzle.level.rows][puzzle.star_row]


def hint(puzzle: Puzzle) -> Hint:
    """Where to look, what to ignore and how to go on. It holds no number and no gem of the row."""
    level = puzzle.level
    ignore = ["the other row and its mark" if level.rows == 2 else "the other rows and their marks"]
    if level.grey_star:
        ignore.append("the grey star, because it marks another row")
    if level.has_stones:
        reason = "are not gems" if level.kinds == 1 else "are worth nothing"
        ignore.append(f"the grey stones, because they {reason}")
    return Hint(
        look=[f"{row_name(puzzle)}, because the yellow star is at its left end"],
        ignore=ignore,
        steps=_steps(level),
    )


def _steps(level: Level) -> list[str]:
    if not level.kinds:
        return ["find the coin in this row", "read the number on it from left to right"]
    if level.kinds == 1:
        return ["go through this row from left to right", "count its gems and skip its stones"]
    return [
        "go through this row from left to right and name the colour of each gem",
        "look up in the question how many points a gem of this colour is worth",
        "add these points to the sum so far before you go on to the next gem",
    ]


def solution(puzzle: Puzzle) -> str:
    """What a careful solver writes: the row, its cells with the running sum, the answer."""
    start = f"The yellow star is in {row_name(puzzle)}."
    end = f"\\boxed{{{puzzle.answer}}}"
    if not puzzle.level.kinds:
        return f"{start} The number on its coin is {puzzle.answer}. {end}"
    total, steps = 0, []
    for cell in puzzle.cells:
        points = puzzle.points(cell)
        total += points
        is_first = total == points
        reading = f"{total}" if is_first else f"{total - points} + {points} = {total}"
        steps.append("a stone" if cell == "stone" else f"a {cell} gem, {reading}")
    return f"{start} From left to right: {'; '.join(steps)}. {end}"


# ---------------------------------------------------------------------------------- the picture
SIZE = 448  # pixels
MARGIN = 24  # left of the marks
GAP = 12  # between the marks and the cells, with a line in its middle
ROW_HEIGHT = 96
CELL = 64  # width of a mark or a gem with its space
RADIUS = 24  # of gems, stones and coins
SCALE = 3  # drawn larger by this, then reduced: smooth edges

TABLE = (222, 212, 196)
PANEL = (252, 251, 247)
LINE = (170, 160, 145)
INK = (35, 35, 40)
GREY = (150, 150, 150)
GOLD = (250, 190, 0)
COLORS = {"red": (215, 35, 45), "green": (25, 150, 65), "blue": (35, 80, 220)}
FACETS = {"red": (240, 120, 120), "green": (110, 205, 135), "blue": (125, 160, 250)}
CORNERS = {"red": 4, "green": 6, "blue": 40}  # a diamond, a hexagon, a disc


def row_box(puzzle: Puzzle, row: int) -> list[int]:
    """The place of a row in the picture, in pixels: left, top, right, bottom."""
    top = (SIZE - ROW_HEIGHT * puzzle.level.rows) // 2 + ROW_HEIGHT * row
    return [12, top + 6, SIZE - 12, top + ROW_HEIGHT - 6]


def draw(puzzle: Puzzle) -> Image.Image:
    """The picture, (448, 448) RGB: a panel per row, its mark, a line, its cells."""
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), TABLE)
    pen = Pen(image)
    for row, (mark, cells) in enumerate(zip(puzzle.marks, puzzle.rows, strict=True)):
        left, top, right, bottom = row_box(puzzle, row)
        pen.panel((left, top, right, bottom))
        x, y = MARGIN + CELL / 2, (top + bottom) / 2
        pen.mark(mark, x, y)
        for number, cell in enumerate(cells, 1):
            pen.cell(cell, x + GAP + CELL * number, y)
    return image.reduce(SCALE)


class Pen:
    """Draws on an image that is SCALE times as large. All places and sizes are the small one's."""

    def __init__(self, image: Image.Image):
        self.pen = ImageDraw.Draw(image)
        self.font = ImageFont.load_default(size=26 * SCALE)

    def panel(self, box: tuple[int, int, int, int]) -> None:
        """The ground of a row, and the line that parts the mark from the cells."""
        left, top, right, bottom = box
        self.pen.rounded_rectangle(_large(left, top, right, bottom), 12 * SCALE, PANEL)
        x = MARGIN + CELL + GAP / 2
        self.pen.line(_large(x, top + 12, x, bottom - 12), LINE, 2 * SCALE)

    def mark(self, mark: str, x: float, y: float) -> None:
        """A mark around the point (x, y)."""
        if mark == "moon":
            self.disc(x, y, 22, INK)
            self.disc(x + 10, y - 5, 19, PANEL)
        elif mark == "ring":
            self.disc(x, y, 21, INK)
            self.disc(x, y, 14, PANEL)
        elif mark == "heart":
            self.disc(x - 10, y - 7, 11, INK)
            self.disc(x + 10, y - 7, 11, INK)
            self.polygon([(x - 20, y - 2), (x + 20, y - 2), (x, y + 22)], INK)
        else:
            color = GOLD if mark == "star" else GREY
            self.polygon(_star(x, y, 28), INK)
            self.polygon(_star(x, y, 23), color)

    def cell(self, cell: str, x: float, y: float) -> None:
        """A gem, a stone or a coin around the point (x, y)."""
        if cell.isdigit():
            self.disc(x, y, RADIUS + 6, INK)
            self.disc(x, y, RADIUS + 4, (235, 235, 240))
            self.pen.text(_large(x, y), cell, INK, self.font, anchor="mm")
        elif cell == "stone":
            stone = [(-22, 6), (-14, -14), (6, -18), (21, -4), (18, 13), (-4, 18)]
            self.polygon([(x + right, y + down) for right, down in stone], GREY)
        else:
            corners = CORNERS[cell]
            self.polygon(_corners(x, y, RADIUS, corners), COLORS[cell])
            self.polygon(_corners(x, y, RADIUS / 2.2, corners), FACETS[cell])

    def disc(self, x: float, y: float, radius: float, color: tuple) -> None:
        box = _large(x - radius, y - radius, x + radius, y + radius)
        self.pen.ellipse(box, color)

    def polygon(self, corners: list[tuple[float, float]], color: tuple) -> None:
        self.pen.polygon([tuple(_large(*corner)) for corner in corners], color)


def _large(*lengths: float) -> list[float]:
    """Lengths in the large image."""
    return [length * SCALE for length in lengths]


def _corners(x: float, y: float, radius: float, count: int) -> list[tuple[float, float]]:
    """The corners of a regular polygon, the highest one straight above (x, y)."""
    angles = [2 * math.pi * number / count for number in range(count)]
    return [(x + radius * math.sin(angle), y - radius * math.cos(angle)) for angle in angles]


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The corners of a star of five points."""
    outer, inner = _corners(x, y, radius, 10), _corners(x, y, radius * 0.42, 10)
    return [(inner if number % 2 else outer)[number] for number in range(10)]


# -------------------------------------------------------------------------------- the questions
def to_question(puzzle: Puzzle) -> Question:
    """The puzzle as a Question, with hint, solution and the box of the star's row.

    Its id starts with the level's number, so that the log of responses shows the level too.
    """
    return Question(
        id=f"gems-{LEVELS.index(puzzle.level) + 1}-{puzzle.seed}",
        text=question_text(puzzle),
        answer=str(puzzle.answer),
        images=[draw(puzzle)],
        hint=hint(puzzle),
        family=puzzle.level.name,
        solution=solution(puzzle),
        boxes=[[row_box(puzzle, puzzle.star_row)]],
    )
