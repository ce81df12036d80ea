"""The resumable hints file."""

from __future__ import annotations

import io
import json
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from hints import Hint, NoReply
from plumbing.data import check_boxes
from rollout import Question


def load_hints(path: str | Path) -> dict[str, dict]:
    """A hints file, one JSON object a line: -> id -> its record, with "hint" a Hint or None (a question left without one).

    Only id and hint are needed. Raises ValueError naming file and line; an id that stands twice is an error.
    """
    records = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "id" not in record or "hint" not in record:
                raise ValueError("expected an object with id and hint")
            if str(record["id"]) in records:
                raise ValueError(f"id {record['id']!r} stands here twice")
            records[str(record["id"])] = {
                **record,
                "hint": Hint.from_json(record["hint"]) if record["hint"] else None,
            }
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return records


def join_hints(samples: list[Question], path: str | Path) -> int:
    """Give the samples the hints of a file, by id: -> how many of the file's lines belong to none of them.

    Raises ValueError where a line was written for another question of the same id.
    """
    records = load_hints(path)
    for sample in samples:
        record = records.pop(sample.id, None)
        if record and record.get("question", sample.text) != sample.text:
            raise ValueError(
                f"{path}: the hint of id {sample.id!r} was written for another question: {record['question'][:60]!r}"
            )
        if record:
            sample.hint = record["hint"]
            try:
                sample.boxes = check_boxes(record.get("boxes"), len(sample.images))
            except ValueError as error:
                raise ValueError(f"{path}: the hint of id {sample.id!r}: {error}") from None
    return len(records)


def open_results(path: Path) -> tuple[io.RawIOBase, dict[str, dict]]:
    """Open the output to go on: -> the file, unbuffered, at its end, and what it holds. A last line without its end, from a crash of
    the machine, is cut off; a kill leaves none, as each line is one write."""
    file = open(path, "ab+", buffering=0)
    file.seek(0)
    text = file.readall()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        print(f"{path}: its last line was not whole and is asked for again", file=sys.stderr)
        file.truncate(whole)
    return file, load_hints(path)


def write_hints(samples: list[Question], work, file, parallel: int) -> str:
    """Run work(sample) -> record for all samples, `parallel` at a time, and write each record as it comes. -> "", or why it stopped early.

    What raises NoReply is not written, so that the next run asks again; 2 * parallel of these in a row, or a ValueError, end the run.
    """
    todo, running, stop, silent, accepted, finished = iter(samples), {}, "", 0, 0, 0
    pool = ThreadPoolExecutor(parallel)
    try:
        with tqdm(total=len(samples), unit="question", dynamic_ncols=True) as bar:
            while True:
                while not stop and len(running) < parallel and (sample := next(todo, None)):
                    running[pool.submit(work, sample)] = sample
                if not running:
                    return stop
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    sample = running.pop(future)
                    try:
                        record = {"id": sample.id, "question": sample.text, **future.result()}
                    except NoReply as error:
                        silent += 1
                        if silent >= 2 * parallel:
                            stop = f"no reply to {silent} questions in a row ({error}); run again to go on"
                    except ValueError as error:
                        stop = str(error)
                    else:
                        file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                        silent, accepted, finished = (
                            0,
                            accepted + (record["hint"] is not None),
                            finished + 1,
                        )
                    bar.update()
                    bar.set_postfix_str(f"accepted {accepted}/{finished}")
    except KeyboardInterrupt:
        return "interrupted; run again to go on"
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
