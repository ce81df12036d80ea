"""The hints file: one JSON line per question, joined to the questions by id.

The command that writes it can be stopped at any moment and goes on from what the file holds.
"""

from __future__ import annotations

import io
import json
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from hints import Hint, NoReply
from plumbing.data import check_boxes, parse_line
from rollout import Question


def load_hints(path: str | Path) -> dict[str, dict]:
    """Read a hints file, one JSON object per line -> the records by id.

    A record needs only id and hint. Its "hint" becomes a Hint, or None where no hint was found for
    the question. Raises ValueError, with file and line, for a bad line or an id that stands twice.
    """
    records = {}
    # TRAP: str.splitlines would also split at U+2028, which a hint may hold
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
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
    hint = None
    if record["hint"]:
        hint = Hint.from_json(record["hint"])
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

    A last line without its end is cut off, and its question is asked for again. Only a crash of
    the machine leaves such a line. A killed process leaves none, because each line is one write.
    """
    file = path.open("ab+", buffering=0)
    file.seek(0)
    text = file.readall()
    end_of_lines = text.rfind(b"\n") + 1
    if end_of_lines < len(text):
        print(f"{path}: its last line was not whole and is asked for again", file=sys.stderr)
        file.truncate(end_of_lines)
    return file, load_hints(path)


@dataclass
class _Results:
    """What write_hints has written so far, and why it must stop, if it must.

    patience: the number of questions in a row without a reply that ends the run.
    """

    file: io.RawIOBase
    patience: int
    accepted: int = 0
    finished: int = 0
    silent: int = 0
    stop: str = ""

    def add(self, question: Question, future: Future) -> None:
        """Write the record of one question, or note why there is none."""
        try:
            record = {"id": question.id, "question": question.text, **future.result()}
        except NoReply as error:
            self._count_silence(error)
        except ValueError as error:
            self.stop = str(error)
        else:
            self._write(record)

    def _count_silence(self, error: NoReply) -> None:
        self.silent += 1
        if self.silent >= self.patience:
            self.stop = (
                f"no reply to {self.silent} questions in a row ({error}); run again to go on"
            )

    def _write(self, record: dict) -> None:
        self.file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        self.silent = 0
        self.finished += 1
        if record["hint"] is not None:
            self.accepted += 1


def write_hints(questions: list[Question], work, file: io.RawIOBase, parallel: int) -> str:
    """Run work(question) -> record for all questions, and write each record when it is ready.

    `parallel` questions are in work at a time. -> "", or the reason why the run stopped early.
    A question whose work raises NoReply gets no line, so the next run asks for it again. The run
    stops after 2 * parallel of these in a row, or after a ValueError.
    """
    todo = iter(questions)
    running = {}
    results = _Results(file, patience=2 * parallel)
    pool = ThreadPoolExecutor(parallel)
    try:
        with tqdm(total=len(questions), unit="question", dynamic_ncols=True) as bar:
            while True:
                if not results.stop:
                    for question in islice(todo, parallel - len(running)):
                        running[pool.submit(work, question)] = question
                if not running:
                    return results.stop
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    results.add(running.pop(future), future)
                    bar.update()
                    bar.set_postfix_str(f"accepted {results.accepted}/{results.finished}")
    except KeyboardInterrupt:
        return "interrupted; run again to go on"
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
