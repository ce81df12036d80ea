"""study.html: numbers and verdicts of --study-hints as figures, and the questions behind them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from plumbing.page_file import image_entries, write_html
from plumbing.settings import EMBEDDED
from plumbing.study_numbers import OUTCOMES, PLACEBOS, TITLES, Row
from rollout import Question

LONGEST = 2000  # characters of a response
# What one hopes of a verdict. Of the others one hopes nothing.
HOPED = {
    "hints leak": False,
    "hints move nothing": False,
    "hints act like solutions": False,
    "hints help": True,
}


def write_study_page(
    folder: Path, numbers: dict, rows: list[Row], questions: list[Question]
) -> Path:
    """study.html in the study's folder: see `write_html`.

    numbers: of plumbing.study_numbers.summary. rows: one per question, in the order of questions.
    The pictures of the best and the worst questions stand in the page, no others: they are large.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    pictured = {*numbers["worst"], *numbers["best"]}
    page = {
        "title": f"Hints before any training: {folder.name}",
        "asked": what_was_asked(numbers, config),
        "titles": TITLES,
        "outcomes": OUTCOMES,
        "placebos": PLACEBOS,
        "hoped": HOPED,
        "numbers": numbers,
        "questions": [
            study_entry(row, question, question.id in pictured)
            for row, question in zip(rows, questions, strict=True)
        ],
    }
    return write_html(folder / "study.html", "study.html", page)


def what_was_asked(numbers: dict, config: dict) -> str:
    """Model, questions, samples and seed in a sentence. config: of the study's config.json."""
    model = "toy/base" if config["model"] == EMBEDDED else config["model"]
    return (
        f"{model}, frozen, answered {numbers['questions']} questions ({numbers['hinted']} of them "
        f"with a hint), {numbers['samples']} times under each context, at temperature "
        f"{config['temperature']}, with seed {config['seed']}."
    )


def study_entry(row: Row, question: Question, is_pictured: bool) -> dict:
    """A question as the page shows it.

    contexts: name -> right (of how many samples), and the first response with its verdict.
    """
    return {
        "id": question.id,
        "family": question.family,
        "question": question.text,
        "answer": question.answer,
        "hint": question.hint and asdict(question.hint),
        "images": image_entries(question) if is_pictured else [],
        "contexts": {
            name: {
                "right": sum(context["correct"]),
                "samples": len(context["correct"]),
                "is_correct": context["correct"][0],
                "response": context["response"][:LONGEST],
                "more": max(0, len(context["response"]) - LONGEST),
            }
            for name, context in row["contexts"].items()
        },
    }
