"""Grade a file of responses, and list what the verifier cannot read in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from plumbing.answer_comparison import fault_of_gold, same_answer
from plumbing.answer_extraction import extract_answer, unboxed
from plumbing.json_lines import parse_line

_EXCERPT = 60  # characters of an answer or a response, in a list


@dataclass(frozen=True)
class Row:
    """One line of the file: a question's gold answer, and responses to it."""

    id: str
    answer: str
    choices: list[str] | None
    responses: list[str]


@dataclass
class Grades:
    """What was counted in a file, and a line for each thing that cannot be read."""

    questions: int = 0
    bad_golds: int = 0
    right: int = 0
    wrong: int = 0
    unanswered: int = 0
    unread: list[str] = field(default_factory=list)

    @property
    def responses(self) -> int:
        return self.right + self.wrong + self.unanswered

    def table(self) -> str:
        """The counts with their shares; the last lines of the command."""
        counts = [
            ("right", self.right, self.responses),
            ("wrong", self.wrong, self.responses),
            ("no answer found", self.unanswered, self.responses),
            ("gold answers that do not verify", self.bad_golds, self.questions),
        ]
        lines = [f"questions {self.questions}, responses {self.responses}"]
        for name, count, total in counts:
            lines.append(f"{name:35s}{count:8d}{_share(count, total):>9s}")
        return "\n".join(lines)


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %" if total else "-"


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a .jsonl file with their line numbers; blank lines are left out.

    Raises ValueError with file and line where a line is no such row, or where the file has none.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    number = rows = 0
    with open(path, "rb") as file:  # lines of bytes end at "\n" alone
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = _parse_row(parse_line(line), number)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            rows += 1
            yield number, row
    if not rows:
        raise ValueError(f"{path}: no rows in it")


def _parse_row(row, number: int) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    answer = row.get("answer")
    if not _is_value(answer) or not str(answer).strip():
        raise ValueError("field 'answer': expected a text or a number")
    choices = row.get("choices")
    if choices and not (isinstance(choices, list) and all(map(_is_value, choices))):
        raise ValueError("field 'choices': expected a list of texts")
    row_id = row.get("id")
    return Row(
        id=str(number if row_id is None else row_id),
        answer=unboxed(str(answer).strip()),
        choices=[str(choice) for choice in choices] if choices else None,
        responses=_parse_responses(row),
    )


def _is_value(value) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _parse_responses(row: dict) -> list[str]:
    """The texts of "response" or "responses"; none where a row has neither."""
    response, responses = row.get("response"), row.get("responses")
    if response is not None and responses is not None:
        raise ValueError("fields 'response' and 'responses': give one of them")
    if response is not None:
        responses = [response]
    if responses is None:
        return []
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        raise ValueError("field 'response': expected a text; 'responses': a list of texts")
    return responses


def grade(path: Path) -> Grades:
    """Grade all responses of a file. Raises ValueError with file and line."""
    grades = Grades()
    for number, row in read_rows(path):
        grades.questions += 1
        fault = fault_of_gold(row.answer, row.choices)
        if fault:
            grades.bad_golds += 1
            grades.unread.append(f"{path}:{number}: id {row.id}: {fault}: {_excerpt(row.answer)}")
        for place, response in enumerate(row.responses, 1):
            given = extract_answer(response)
            if given is None:
                grades.unanswered += 1
                grades.unread.append(
                    f"{path}:{number}: id {row.id}: response {place}: no answer found: "
                    f"{_excerpt(response)}"
                )
            elif same_answer(given, row.answer, row.choices):
                grades.right += 1
            else:
                grades.wrong += 1
    return grades


def _excerpt(text: str) -> str:
    """The end of a text on one line, as a literal: an answer stands at the end of a response."""
    text = " ".join(text.split())
    return repr(text if len(text) <= _EXCERPT else "..." + text[-_EXCERPT:])
