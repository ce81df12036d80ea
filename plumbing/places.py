"""From a map of attention to boxes and words: where is it hot?"""

from __future__ import annotations

from torch import Tensor


def regions(heat: Tensor, at_most: int = 3) -> list[tuple[int, int, int, int]]:
    """The hottest connected areas of a map (h, w), hottest first.

    Boxes (left, top, right, bottom) in cells, right and bottom excluded. A cell is hot above the
    mean plus one standard deviation; the areas are ranked by their summed heat.
    """
    threshold = heat.mean() + heat.std(unbiased=False)
    hot = {tuple(cell) for cell in (heat > threshold).nonzero().tolist()}
    areas = []
    for start in sorted(hot):
        area = _connected(start, hot)
        if area:
            rows, columns = zip(*area, strict=True)
            box = (min(columns), min(rows), max(columns) + 1, max(rows) + 1)
            areas.append((sum(heat[cell].item() for cell in area), box))
    return [box for _, box in sorted(areas, reverse=True)[:at_most]]


def _connected(start: tuple[int, int], hot: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """The hot cells that touch `start` side by side; they are taken out of `hot`."""
    area, waiting = [], [start]
    while waiting:
        row, column = waiting.pop()
        if (row, column) in hot:
            hot.remove((row, column))
            area.append((row, column))
            waiting += [(row + 1, column), (row - 1, column)]
            waiting += [(row, column + 1), (row, column - 1)]
    return area


ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def place_words(box: tuple[int, int, int, int], shape: tuple[int, int], exact: bool = True) -> str:
    """A box of cells in a map of `shape` (h, w) in words.

    Exact: "the third column from the left", where the box is one; otherwise "the upper left".
    """
    left, top, right, bottom = box
    height, width = shape
    full_width, full_height = right - left >= 0.8 * width, bottom - top >= 0.8 * height
    ordinal = ""
    if exact and full_width:
        ordinal = _ordinal(top, bottom, height, "row", "top")
    if exact and full_height and not ordinal:
        ordinal = _ordinal(left, right, width, "column", "left")
    if ordinal:
        return ordinal
    down = "" if full_height else _third(top, bottom, height, ("upper", "middle", "lower"))
    over = "" if full_width else _third(left, right, width, ("left", "middle", "right"))
    if down and over:
        return "the middle of the picture" if down == over else f"the {down} {over}"
    if down:
        return f"the {down} part, from left to right"
    if over:
        return f"the {over} part, from top to bottom"
    return "the whole picture"


def _ordinal(low: int, high: int, size: int, name: str, side: str) -> str:
    """ "the third row from the top", where low to high is one of 2 to 6 equal bands of the size."""
    thickness = high - low
    is_band = size % thickness == low % thickness == 0
    if not is_band or not 2 <= size // thickness <= len(ORDINALS):
        return ""
    return f"the {ORDINALS[low // thickness]} {name} from the {side}"


def _third(low: int, high: int, size: int, names: tuple[str, str, str]) -> str:
    centre = (low + high) / 2 / size
    return names[min(2, int(3 * centre))]


def in_pixels(box: tuple, shape: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """A box of cells in a map of `shape` (h, w), in the pixels of an image of `size` (w, h)."""
    (rows, columns), (width, height) = shape, size
    left, top, right, bottom = box
    horizontal = [round(x * width / columns) for x in (left, right)]
    vertical = [round(y * height / rows) for y in (top, bottom)]
    return [horizontal[0], vertical[0], horizontal[1], vertical[1]]
