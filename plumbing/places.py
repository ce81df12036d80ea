"""From a map of attention to boxes and words: where is it hot?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom excluded

# What makes a region clear; both are ours. See `regions`.
CONTRAST = 1.0
COVERED = 0.6
LEAST_GAIN = 0.3  # of the hottest box's gain


def regions(heat: Tensor, at_most: int = 3) -> list[Box]:
    """The boxes of cells that are hot in a map (h, w), hottest first; none where nothing is clear.

    Hot and cold cells are parted where the two groups differ most (Otsu's threshold). Each box is
    the one that holds most heat above that threshold, less what its cold cells lack. A hot cell
    counts once, but a second box may run over it: a row and a column that cross are two whole
    boxes, and not the whole picture. A map is clear where hot cells are hotter than cold ones by
    CONTRAST on average, in the map's own unit (plumbing.attention.peaks), and where the boxes hold
    the share COVERED of the hot cells' heat above the threshold: heat that is scattered has no
    place.
    """
    threshold, contrast = _otsu(heat.flatten())
    if contrast < CONTRAST:
        return []
    surplus = heat.double() - threshold
    all_hot = surplus.clamp(min=0).sum().item()
    already_counted = 1e-6 * all_hot  # next to nothing, so that a box runs over such cells
    boxes, gains, covered = [], [], 0.0
    for _ in range(at_most):
        gain, (left, top, right, bottom) = _hottest_box(surplus)
        if gain <= 0 or gain < LEAST_GAIN * max(gains, default=0):
            break
        inside = surplus[top:bottom, left:right]
        covered += inside.clamp(min=0).sum().item()
        inside.clamp_(max=already_counted)
        boxes.append((left, top, right, bottom))
        gains.append(gain)
    return boxes if covered >= COVERED * all_hot else []


def _otsu(values: Tensor) -> tuple[float, float]:
    """The threshold that parts the values with the most variance between the two groups.

    Also the difference of the groups' means: (0, 0) for fewer than two values.
    """
    count = len(values)
    if count < 2:
        return 0.0, 0.0
    ordered = values.double().sort(descending=True).values
    hot_counts = torch.arange(1, count)
    sums = ordered.cumsum(0)[:-1]
    hot, cold = sums / hot_counts, (ordered.sum() - sums) / (count - hot_counts)
    last = int((hot_counts * (count - hot_counts) * (hot - cold) ** 2).argmax())  # hot value
    threshold = (ordered[last] + ordered[last + 1]) / 2
    return threshold.item(), (hot[last] - cold[last]).item()


def _hottest_box(surplus: Tensor) -> tuple[float, Box]:
    """The box with the largest sum of a map (h, w), and that sum.

    All strips of whole rows, (h (h + 1) / 2, w), and in each the best stretch, by the smallest sum
    to the left of each end (Kadane's algorithm in two dimensions).
    """
    height, width = surplus.shape
    above = F.pad(surplus.cumsum(0), (0, 0, 1, 0))
    tops, bottoms = torch.triu_indices(height + 1, height + 1, 1)
    sums = F.pad((above[bottoms] - above[tops]).cumsum(1), (1, 0))
    lowest, lefts = sums[:, :-1].cummin(1)
    gains = sums[:, 1:] - lowest
    strip, end = divmod(int(gains.argmax()), width)
    left, top, bottom = int(lefts[strip, end]), int(tops[strip]), int(bottoms[strip])
    return gains[strip, end].item(), (left, top, end + 1, bottom)


ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def place_words(box: Box, shape: tuple[int, int], exact: bool = True) -> str:
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


def in_pixels(box: Box, shape: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """A box of cells in a map of `shape` (h, w), in the pixels of an image of `size` (w, h)."""
    (rows, columns), (width, height) = shape, size
    left, top, right, bottom = box
    horizontal = [round(x * width / columns) for x in (left, right)]
    vertical = [round(y * height / rows) for y in (top, bottom)]
    return [horizontal[0], vertical[0], horizontal[1], vertical[1]]
