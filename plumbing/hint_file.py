"""The hints file: one JSON line per question, joined to the questions by id.

The command that writes it can be stopped at any moment and goes on from what the file holds.
"""

from __future__ import annotations

import io
import json
import os
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from hints import Hint, NoReply
from plumbing.data import check_boxes, is_no_hint, parse_line
from rollout import Question

LINE_START = b'{"id": '  # of a line that the command writes


def load_hints(path: str | Path) -> dict[str, dict]:
    """Read a hints file, one JSON object per line -> the records by id.

    A record needs only id and hint. Its "hint" becomes a Hint, or None where no hint was found for
    the question. Raises ValueError, with file and line, for a bad line or an id that stands twice.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    return _parse_lines(path, text)


def _parse_lines(path: str | Path, text: bytes) -> dict[str, dict]:
    """The text of a hints file -> the records by id. path: the file's name, for the errors."""
    # TRAP: str.splitlines also splits at U+2028 and U+0085, which may stand inside a JSON text.
    lines = text.split(b"\n")
    if not lines[-1]:
        lines.pop()
    records = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question_id, record = _parse_record(line)
            if question_id in records:
                raise ValueError(f"id {record['id']!r} stands here twice")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        records[question_id] = record
    return records


def _parse_record(line: bytes) -> tuple[str, dict]:
    """One line of a hints file -> the id as text, and the record with its hint as a Hint."""
    record = parse_line(line)
    if not isinstance(record, dict) or "id" not in record or "hint" not in record:
        raise ValueError("expected an object with id and hint")
    hint = None if is_no_hint(record["hint"]) else Hint.from_json(record["hint"])
    return str(record["id"]), {**record, "hint": hint}


def join_hints(questions: list[Question], path: str | Path) -> int:
    """Give the questions the hints and boxes of a file, by id.

    -> the number of lines that belong to none of the questions. Raises ValueError where a line was
    written for another question with the same id, or where its boxes are wrong.
    """
    records = load_hints(path)
    for question in questions:
        record = records.pop(question.id, None)
        if record is None:
            continue
        if record.get("question", question.text) != question.text:
            raise ValueError(
                f"{path}: the hint of id {question.id!r} was written for another question: "
                f"{record['question'][:60]!r}"
            )
        question.hint = record["hint"]
        try:
            question.boxes = check_boxes(record.get("boxes"), len(question.images))
        except ValueError as error:
            raise ValueError(f"{path}: the hint of id {question.id!r}: {error}") from None
    return len(records)


def open_results(path: Path) -> tuple[io.RawIOBase, dict[str, dict]]:
    """Open the output to go on -> the file, unbuffered and at its end, and the records it holds.

    A last line that is not whole is cut off, and its question is asked for again. Only a crash of
    the machine leaves such a line. A killed process leaves none, because each line is one write.
    Raises ValueError where the path is no hints file, and OSError where it cannot be written; the
    file then stays as it is.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file")
    text = path.read_bytes() if path.exists() else b""
    end_of_lines = text.rfind(b"\n") + 1
    last_line = text[end_of_lines:]
    if last_line and _is_torn(last_line):
        records = _parse_lines(path, text[:end_of_lines])
        file = path.open("ab", buffering=0)
        print(f"{path}: its last line was not whole and is asked for again", file=sys.stderr)
        file.truncate(end_of_lines)
        return file, records
    records = _parse_lines(path, text)
    file = path.open("ab", buffering=0)
    if last_line:
        file.write(b"\n")
    return file, records


def _is_torn(line: bytes) -> bool:
    """Is this the beginning of a line that `_Results` writes?

    TRAP: any other line must stay. The file may not be a hints file, or an editor may have left out
    the newline behind the last record.
    """
    try:
        parse_line(line)
    except ValueError:
        return line[: len(LINE_START)] == LINE_START[: len(line)]
    return False


@dataclass
class _Results:
    """What write_hints has written so far, and why it must stop, if it must.

    patience: the number of questions in a row without a reply that ends the run. silent: how many
    have had none since the last record. failure: why the last of them had none.
    """

    file: io.RawIOBase
    patience: int
    accepted: int = 0
    finished: int = 0
    silent: int = 0
    failure: str = ""
    stop: str = ""

    def add(self, question: Question, future: Future) -> None:
        """Write the record of one question, or note why there is none."""
        try:
            record = {"id": question.id, "question": question.text, **future.result()}
            self._write(record)
        except NoReply as error:
            self._count_silence(error)
        except (ValueError, OSError) as error:
            self.stop = str(error).partition("\n")[0]

    def outcome(self) -> str:
        """Why the run stopped early, or, at its end, that not one question got a reply; else ""."""
        if self.silent and not self.finished and not self.stop:
            return f"no reply to any question that was asked ({self.failure}); run again to go on"
        return self.stop

    def _count_silence(self, error: NoReply) -> None:
        self.silent += 1
        self.failure = str(error)
        if self.silent >= self.patience:
            self.stop = (
                f"no reply to {self.silent} questions in a row ({error}); run again to go on"
            )

    def _write(self, record: dict) -> None:
        # A lone surrogate, as in half an emoji of a reply, becomes its JSON escape.
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        written = self.file.write(line)
        if written < len(line):  # the disk is full
            self.file.truncate(self.file.tell() - written)
            raise OSError("the last line could not be written whole; is the disk full?")
        self.silent = 0
        self.finished += 1
        if record["hint"] is not None:
            self.accepted += 1


def write_hints(questions: list[Question], work, file: io.RawIOBase, parallel: int) -> str:
    """Run work(question) -> record for all questions, and write each record when it is ready.

    `parallel` questions are in work at a time. -> "", or the reason why the run has failed. A
    question whose work raises NoReply gets no line, so the next run asks for it again. The run
    stops after 2 * parallel of these in a row, and after a ValueError or OSError. It has also
    failed if it came to its end and not one question got a reply. After Ctrl-C the questions in
    work are waited for and written; a second one ends the process at once.
    """
    todo, running = iter(questions), {}
    results = _Results(file, patience=2 * parallel)
    pool = ThreadPoolExecutor(parallel)

    def go_on() -> bool:
        """Begin with the next questions and write what is ready. False at the end."""
        if not results.stop:
            for question in islice(todo, parallel - len(running)):
                running[pool.submit(work, question)] = question
        if not running:
            return False
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            results.add(running.pop(future), future)
            bar.update()
            bar.set_postfix_str(f"accepted {results.accepted}/{results.finished}")
        return True

    more = True
    with pool, tqdm(total=len(questions), unit="question", dynamic_ncols=True) as bar:
        while more:
            try:
                more = go_on()
            except KeyboardInterrupt:
                if results.stop:
                    os._exit(1)  # Python itself would wait for the threads
                results.stop = "interrupted; run again to go on"
                bar.write(f"waiting for {len(running)} questions; Ctrl-C again ends at once")
    return results.outcome()
