"""Find the final answer of a response, and compare it with the gold answer.

`extract_answer` finds it, `same_answer` compares it by rules, and `load_judge` gives the comparison
that a run asked for. Nothing is evaluated, and all work is bounded: a response is text that a model
wrote, so it may have any length and any form.

The rules stand in files of their own: answer_extraction (find it), answer_text (one spelling),
answer_numbers, answer_units, answer_quantities, answer_parts (ranges, ratios, times, dates),
answer_lists (labels, brackets, intervals), answer_words (texts), answer_comparison (the ladder).

As a command it grades a file of responses and lists what it cannot read:

    python -m plumbing.answers FILE.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from plumbing.answer_comparison import fault_of_gold, load_judge, pick_option, same_answer
from plumbing.answer_extraction import extract_answer, unboxed
from plumbing.answer_file import grade
from plumbing.answer_numbers import to_number
from plumbing.answer_quantities import split_unit
from plumbing.answer_text import LONGEST_ANSWER, plain_latex
from plumbing.answer_words import ARTICLES, DIGIT_OR_COMMAND, YES_OR_NO
from plumbing.settings import Parser

__all__ = [
    "ARTICLES",
    "DIGIT_OR_COMMAND",
    "LONGEST_ANSWER",
    "YES_OR_NO",
    "extract_answer",
    "fault_of_gold",
    "load_judge",
    "pick_option",
    "plain_latex",
    "same_answer",
    "split_unit",
    "to_number",
    "unboxed",
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="answers",
        usage="python -m plumbing.answers FILE.jsonl",
        description="Grade a file of responses by the rules, and list what they cannot read: "
        "responses without an answer, and gold answers that do not verify against themselves.",
    )
    parser.add_argument(
        "file",
        metavar="FILE.jsonl",
        help="one JSON object per line: answer (the gold answer, a text or a number); response (a "
        "text) or responses (a list of texts), or neither, to check the gold answer alone; "
        "optional: choices (a list of the options' texts), id (default: the line's number)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Grade the file, print what cannot be read and the shares -> exit status.

    0: all gold answers verify against themselves; 1: some do not, so no response to them can be
    right. Exits with 2 where the file cannot be read; the reason is one line of stderr.
    """
    args = parse_args(argv)
    try:
        grades = grade(Path(args.file))
    except (ValueError, OSError) as error:
        print(f"answers: error: {error}", file=sys.stderr)
        sys.exit(2)
    for line in grades.unread:
        print(line)
    print(grades.table())
    return 1 if grades.bad_golds else 0


if __name__ == "__main__":
    sys.exit(main())
