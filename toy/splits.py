"""The splits of the built-in puzzles: each has seeds of its own, so that no two splits meet."""

from __future__ import annotations

INDICES = 10**9  # puzzles per split
FIRST_SEED = {"train": 0, "heldout": INDICES, "tune": 2 * INDICES}


def seed_of(split: str, index: int) -> int:
    """The seed of puzzle number `index` of a split: "train", "heldout" or "tune".

    Raises ValueError for an unknown split or an index outside 0 to 10^9 - 1.
    """
    if split not in FIRST_SEED or not 0 <= index < INDICES:
        raise ValueError(
            f"no puzzle {index} in split {split!r}: "
            f"splits are {', '.join(FIRST_SEED)}, indices 0 to 10^9 - 1"
        )
    return FIRST_SEED[split] + index
