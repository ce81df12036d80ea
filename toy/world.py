"""The embedded world: picture puzzles in which the hint, and only the hint, makes the question easy.

A puzzle is a 112x112 picture of 4x4 cells of 28 pixels, so one cell is one merged visual token of a Qwen2-VL with
14-pixel patches. Cells hold red, green and blue gems (1, 2 and 3
points, drawn as pips), one star, one ring, or nothing. Three families:

    row     how many points are in the star row?                        first find the star, then read its row
    column  how many points are in the ring column?                     first find the ring, then read its column
    cross   ... in the star row plus the ring column?                   find both, read both, keep one running sum

The hint names the row or column, what to ignore and how to go on; it holds no number at all, so it can never hold the
answer. In fog the picture is half grey and the base misreads gems: even with the hint it is right only 2 times in 3, so that the
hint alone is not enough and the reward has something to add. Everything is a function of (split, index): the same puzzle on every machine, train and held-out puzzles disjoint.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from hints import Hint
from rollout import Question

FAMILIES = ("row", "column", "cross")
ROWS = ("top", "upper", "lower", "bottom")
COLUMNS = ("leftmost", "left", "right", "rightmost")
POINTS = {"red": 1, "green": 2, "blue": 3, "none": 0, "star": 0, "ring": 0}
OPENINGS = ("I look at", "Here is", "Now read")
CELL, GRID = 28, 4
FOG = 0.5  # share of grey in a foggy picture
FIRST_SEED = {"train": 0, "heldout": 10**9, "tune": 2 * 10**9}  # each split owns 10^9 indices


@dataclass(frozen=True)
class Puzzle:
    """One grid and one question. `cells[r][c]` is a key of POINTS; `row` is the star's, `column` the ring's; foggy: hard to see."""

    seed: int
    family: str
    cells: tuple
    row: int
    column: int
    foggy: bool = False

    @property
    def lines(self) -> list[tuple[str, int]]:
        """The lines to read, in order, as ("row" | "column", index)."""
        return {
            "row": [("row", self.row)],
            "column": [("column", self.column)],
            "cross": [("row", self.row), ("column", self.column)],
        }[self.family]

    @property
    def answer(self) -> int:
        return sum(line_points(self.cells, line) for line in self.lines)


def line_cells(cells, line: tuple[str, int]) -> list[str]:
    """The four cells of one row (left to right) or column (top to bottom)."""
    kind, i = line
    return list(cells[i]) if kind == "row" else [cells[r][i] for r in range(GRID)]


def line_points(cells, line: tuple[str, int]) -> int:
    """Points in one row or column."""
    return sum(POINTS[c] for c in line_cells(cells, line))


def line_name(line: tuple[str, int]) -> str:
    """("row", 0) -> "the top row"."""
    kind, i = line
    return f"the {(ROWS if kind == 'row' else COLUMNS)[i]} {kind}"


def line_box(line: tuple[str, int]) -> list[int]:
    """A row's or column's place in the picture: left, top, right, bottom."""
    kind, i = line
    across, along = (0, CELL * GRID), (CELL * i, CELL * (i + 1))
    (left, right), (top, bottom) = (across, along) if kind == "row" else (along, across)
    return [left, top, right, bottom]


def make_puzzle(split: str, index: int, family: str | None = None, fog: float = 0.0) -> Puzzle:
    """Puzzle number `index` of "train", "heldout" or "tune". `family` overrides the one drawn from the seed; fog: the share of foggy ones."""
    if split not in FIRST_SEED or not 0 <= index < 10**9:
        raise ValueError(
            f"no puzzle {index} in split {split!r}: splits are {', '.join(FIRST_SEED)}, indices 0 to 10^9 - 1"
        )
    seed = FIRST_SEED[split] + index
    rng = random.Random(
        f"puzzle-{seed}"
    )  # a string seed is hashed by SHA-512: stable across versions
    drawn = FAMILIES[rng.randrange(len(FAMILIES))]
    star = (rng.randrange(GRID), rng.randrange(GRID))
    ring = (
        rng.choice([r for r in range(GRID) if r != star[0]]),
        rng.choice([c for c in range(GRID) if c != star[1]]),
    )
    free = [(r, c) for r in range(GRID) for c in range(GRID) if (r, c) not in (star, ring)]
    cells = [["none"] * GRID for _ in range(GRID)]
    cells[star[0]][star[1]], cells[ring[0]][ring[1]] = "star", "ring"
    for r, c in rng.sample(free, rng.randint(6, 14)):  # many or few gems: answers spread out
        cells[r][c] = rng.choice(("red", "green", "blue"))
    return Puzzle(
        seed,
        family or drawn,
        tuple(map(tuple, cells)),
        star[0],
        ring[1],
        random.Random(f"fog-{seed}").random() < fog,
    )


def question_text(puzzle: Puzzle) -> str:
    """The plain question: it names the star or the ring, never the row or column."""
    what = {
        "row": "the star row",
        "column": "the ring column",
        "cross": "the star row plus the ring column",
    }[puzzle.family]
    return f"How many points are in {what}?"


def hint(puzzle: Puzzle) -> Hint:
    """Where to look, what to ignore, how to go on; no number and no gem is named."""
    look = [line_name(line) for line in puzzle.lines]
    ignore = {
        "row": ["the ring", "every other row"],
        "column": ["the star", "every other column"],
        "cross": ["every other row and column"],
    }[puzzle.family]
    return Hint(look=look, ignore=ignore, steps=["name each cell", "add its points to the sum"])


def response(puzzle: Puzzle, rng: random.Random, lines=None, final: int | None = None) -> str:
    """What a careful solver writes: each line's cells with the running sum, then the boxed answer.

    lines: read these instead of the puzzle's own (a solver who guessed). final: box this instead of the sum.
    The opening and the "So" are free choices, so that a good policy keeps some entropy.
    """
    total, parts = 0, []
    for line in puzzle.lines if lines is None else lines:
        cells = []
        for cell in line_cells(puzzle.cells, line):
            total += POINTS[cell]
            cells.append(f"{cell} {total}")
        parts.append(f"{line_name(line)}: {' '.join(cells)}")
    end = total if final is None else final
    return (
        f"{rng.choice(OPENINGS)} "
        + ". Next ".join(parts)
        + rng.choice((".", ". So"))
        + f" \\boxed{{{end}}}"
    )


def draw(puzzle: Puzzle) -> Image.Image:
    """The picture, (112, 112) RGB. Each row and column has its own tint: the picture alone tells where a cell is."""
    rng = random.Random(f"draw-{puzzle.seed}")
    image = Image.new("RGB", (CELL * GRID, CELL * GRID))
    pen = ImageDraw.Draw(image)
    for r in range(GRID):
        for c in range(GRID):
            x, y = c * CELL, r * CELL
            pen.rectangle(
                (x, y, x + CELL - 1, y + CELL - 1),
                fill=(255 - 22 * r, 255 - 22 * c, 205 + 8 * (r + c)),
            )
            cx, cy = x + CELL / 2 + rng.uniform(-2, 2), y + CELL / 2 + rng.uniform(-2, 2)
            _draw_cell(pen, puzzle.cells[r][c], cx, cy, rng.uniform(7.5, 9.5))
    return (
        Image.blend(image, Image.new("RGB", image.size, (200, 200, 200)), FOG)
        if puzzle.foggy
        else image
    )


def _draw_cell(pen: ImageDraw.ImageDraw, cell: str, cx: float, cy: float, radius: float) -> None:
    if cell == "star":
        points = [
            (
                cx + (radius + 2) * (1 if k % 2 == 0 else 0.42) * math.sin(math.pi * k / 5),
                cy - (radius + 2) * (1 if k % 2 == 0 else 0.42) * math.cos(math.pi * k / 5),
            )
            for k in range(10)
        ]
        pen.polygon(points, fill=(250, 190, 0), outline=(90, 60, 0))
    elif cell == "ring":
        pen.ellipse(
            (cx - radius, cy - radius, cx + radius, cy + radius), outline=(20, 20, 20), width=4
        )
    elif cell != "none":
        fill = {"red": (220, 30, 30), "green": (20, 150, 60), "blue": (30, 60, 220)}[cell]
        pen.polygon(
            [(cx, cy - radius), (cx + radius, cy), (cx, cy + radius), (cx - radius, cy)], fill=fill
        )
        for k in range(POINTS[cell]):  # one white pip a point: the picture says what a gem is worth
            x = cx + 4 * k - 2 * (POINTS[cell] - 1)
            pen.ellipse((x - 1.2, cy - 1.2, x + 1.2, cy + 1.2), fill=(255, 255, 255))


def to_question(puzzle: Puzzle) -> Question:
    """The puzzle as the training loop sees it."""
    return Question(
        id=f"puzzle-{puzzle.seed}",
        text=question_text(puzzle),
        answer=str(puzzle.answer),
        images=[draw(puzzle)],
        hint=hint(puzzle),
        family="foggy " * puzzle.foggy + puzzle.family,
        solution=response(puzzle, random.Random(f"solution-{puzzle.seed}")),
        boxes=[[line_box(line) for line in puzzle.lines]],
    )


def puzzles(split: str, count: int, start: int = 0, fog: float = 0.0) -> list[Question]:
    """`count` samples of a split, from index `start`."""
    return [to_question(make_puzzle(split, i, fog=fog)) for i in range(start, start + count)]
