"""Find the final answer of a response, and compare it with the gold answer.

`extract_answer` finds it, `same_answer` compares it by rules, and `load_judge` gives the comparison
that a run asked for. Nothing is evaluated, and all work is bounded: a response is text that a model
wrote, so it may have any length and any form.
"""

from __future__ import annotations

from plumbing.answer_comparison import load_judge, pick_option, same_answer
from plumbing.answer_extraction import extract_answer, unboxed
from plumbing.answer_numbers import to_number
from plumbing.answer_quantities import split_unit
from plumbing.answer_text import LONGEST_ANSWER, plain_latex
from plumbing.answer_words import ARTICLES, DIGIT_OR_COMMAND, YES_OR_NO

__all__ = [
    "ARTICLES",
    "DIGIT_OR_COMMAND",
    "LONGEST_ANSWER",
    "YES_OR_NO",
    "extract_answer",
    "load_judge",
    "pick_option",
    "plain_latex",
    "same_answer",
    "split_unit",
    "to_number",
    "unboxed",
]
