"""Files and datasets become questions; questions become the stream of a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from plumbing.answers import extract_answer
from plumbing.images import StoredImage, decode_cell
from plumbing.json_lines import parse_line
from rollout import Question

# Each field of a question and the columns that may hold it. The first one that is not empty counts.
# MathVista has the picture in decoded_image, and in image a path into an archive.
COLUMNS = {
    "id": ("id", "qid", "pid"),
    "question": ("question", "problem", "prompt"),
    "answer": ("answer",),
    "images": ("images", "decoded_image", "image"),
    "choices": ("choices",),
    "solution": ("solution",),
    "hint": ("hint",),
    "prompt_with_hint": ("prompt_with_hint",),
    "boxes": ("boxes",),
}

LONGEST_PATH = 4096  # characters: Linux takes no longer one


class Columns:
    """Which column of a row holds which field of a question.

    text: the user's own choice, FIELD=COLUMN with commas between, as --columns has it. Such a
    column is looked at before the usual ones, so that one option serves two sources with different
    columns. Raises ValueError where the text cannot be read.
    """

    def __init__(self, text: str = ""):
        self.names = dict(COLUMNS)
        self.unseen = set()  # columns of the text that no row has had so far
        for pair in filter(None, text.split(",")):
            field, sign, column = (part.strip() for part in pair.partition("="))
            if field not in COLUMNS or not sign or not column:
                raise ValueError(
                    f"--columns: {pair.strip()!r} is not FIELD=COLUMN; fields: {', '.join(COLUMNS)}"
                )
            self.names[field] = (column, *self.names[field])
            self.unseen.add(column)

    def find(self, row: dict, field: str) -> str | None:
        """The name of the row's column that holds the field; None where all are empty."""
        self.unseen.difference_update(row)
        filled = (name for name in self.names[field] if not _is_empty(row.get(name)))
        return next(filled, None)

    def value(self, row: dict, field: str):
        """What the row holds for the field, or None."""
        return row.get(self.find(row, field))

    def check_seen(self) -> None:
        """To be called after all sources were read. Raises ValueError for a misspelt column."""
        if self.unseen:
            raise ValueError(f"--columns: no row has a column {min(self.unseen)!r}")


def _is_empty(value) -> bool:
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


@dataclass
class _Rows:
    """How rows become questions; see load_questions."""

    folder: Path
    stem: str
    columns: Columns
    parse_hint: Callable | None

    def parse(self, row, number: int) -> Question:
        """Raises ValueError that names the field."""
        return _parse_row(row, f"{self.stem}-{number}", self)


def load_questions(
    source: str | Path,
    parse_hint: Callable | None = None,
    *,
    split: str = "train",
    image_dir: str | Path = "",
    bad: list[str] | None = None,
    columns: Columns | None = None,
    check: Callable[[Question], None] | None = None,
) -> list[Question]:
    """Questions of a .jsonl file, or, by `datasets`, of a .parquet file, a folder or the hub.

    Columns: question (or problem, prompt), answer, images (or image: one or a list; the image
    itself, or a path relative to image_dir or else to the file). Optional: id (or qid, pid),
    choices (a list of the options' texts), solution, hint (a text, or an object with look, ignore,
    steps, read by `parse_hint`) or prompt_with_hint (the question's text with the hint around it),
    and boxes (see rollout.Question). Other names: `columns`. An answer in a \\boxed{} or <answer>
    is stored without it; where there is no answer, that of the solution is taken.

    Every line and image is checked before anything is returned. check(question) may object as well,
    by a ValueError. Raises ValueError with file, line and field. If a list `bad` is given, it
    receives these messages instead, and the lines are left out.
    """
    path, columns = Path(source), columns or Columns()
    is_table = path.suffix == ".parquet" or not (path.suffix == ".jsonl" or path.is_file())
    folder = Path(image_dir or (path.parent if path.is_file() else "."))
    rows = _Rows(folder, path.stem, columns, parse_hint)
    read = _table_rows(str(source), split, rows) if is_table else _jsonl_rows(path, rows)
    questions, messages, line_of = [], [], {}
    with contextlib.closing(read):
        for place, result in read:
            if isinstance(result, Question):
                result = _second_look(result, line_of, check)
            if isinstance(result, Question):
                line_of[result.id] = place.removeprefix("row ")
                questions.append(result)
                continue
            messages.append(f"{source}:{place}: {result}")
            if bad is None:
                raise ValueError(messages[0])
    if bad is not None:
        bad += messages
    if not questions:
        reason = f"; first: {messages[0]}" if messages else ""
        raise ValueError(f"{source}: no questions in it{reason}")
    return questions


def _second_look(question: Question, line_of: dict[str, str], check) -> Question | str:
    """The question, or what is wrong with it besides its own row: a second id, or `check`'s word.

    It runs in the main thread: a tokenizer must not be used in several threads.
    """
    if question.id in line_of:
        return f"field 'id': {question.id!r} is the id of line {line_of[question.id]} already"
    try:
        if check:
            check(question)
    except ValueError as error:
        return str(error)
    return question


def _jsonl_rows(path: Path, rows: _Rows) -> Iterator[tuple[str, Question | str]]:
    """For each line: its number, and its Question or what is wrong with it.

    TRAP: str.splitlines also splits at U+2028 and U+0085, which may stand inside a JSON string.
    bytes.splitlines does not.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; --data takes a .jsonl with question, answer, images and hint"
        )
    try:
        lines = enumerate(path.read_bytes().splitlines(), 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    numbered = [(number, line) for number, line in lines if line.strip()]

    def read(numbered_line) -> Question:
        number, line = numbered_line
        return rows.parse(parse_line(line), number)

    for (number, _), result in _in_threads(read, numbered):
        yield str(number), result


def _table_rows(source: str, split: str, rows: _Rows):
    """The same for a dataset. Its images stay in the table and are decoded when they are used."""
    table = _open_table(source, split)
    columns = rows.columns
    pictures = table.select_columns(
        [name for name in columns.names["images"] if name in table.column_names]
    )

    def read(number: int) -> Question:
        row = table[number]
        question = rows.parse(row, number)
        column = columns.find(row, "images")
        cells = [_bare_path(value) for value in _as_list(row.get(column))]
        places = [place for place, value in enumerate(cells) if value]
        for n, image in enumerate(question.images):
            if isinstance(image, Image.Image):
                stored = StoredImage(pictures, number, column, places[n], image.size)
                question.images[n] = stored
        return question

    for number, result in _in_threads(read, range(len(table))):
        yield f"row {number}", result


def _in_threads(read, rows) -> Iterator[tuple]:
    """(row, read(row)) in order; in place of a bad row's Question, what is wrong with it.

    Decoding images is most of the work, and releases the interpreter.
    """

    def attempt(row):
        try:
            return read(row)
        except (ValueError, OSError) as error:  # broken JSON; a broken image in a table
            return str(error)

    pool = ThreadPoolExecutor()
    try:
        yield from zip(rows, pool.map(attempt, rows), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _open_table(source: str, split: str):
    """A dataset's folder or hub name, by `datasets`. No code of the dataset is run.

    Raises ValueError.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"--data {source}: not a .jsonl file; for a .parquet file, a folder or a hub name: "
            "python -m pip install datasets"
        ) from None
    known_errors = (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        saved = ("state.json", "dataset_dict.json")
        if any((Path(source) / name).is_file() for name in saved):
            table = datasets.load_from_disk(source)
            return table[split] if isinstance(table, datasets.DatasetDict) else table
        if source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=source, split="train")
        return datasets.load_dataset(source, split=split)
    except known_errors as error:
        headline = str(error).partition("\n")[0]
        raise ValueError(
            f"--data {source}, split {split!r}: {type(error).__name__}: {headline}"
        ) from None


# --------------------------------------------------------------------------------- one row, checked
def _parse_row(row, default_id: str, rows: _Rows) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")

    def value(field: str):
        return rows.columns.value(row, field)

    text = value("question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            "no question: give a text in the field 'question' (or 'problem', 'prompt')"
        )
    solution = value("solution")
    images = _read_images(value("images"), text, rows.folder)
    hint_source = value("hint") or _hint_around(text, value("prompt_with_hint"))
    row_id = value("id")
    question = Question(
        id=default_id if row_id is None else str(row_id),
        text=text,
        answer=_read_answer(value("answer"), solution),
        images=images,
        hint=_read_hint(hint_source, rows.parse_hint),
        choices=_read_choices(value("choices")),
        solution=str(solution) if solution else None,
        boxes=check_boxes(value("boxes"), len(images)),
    )
    for field, content in texts_of(question):
        check_characters(field, content)
    return question


def texts_of(question: Question) -> Iterator[tuple[str, str]]:
    """All texts of a question, each with the name of its field."""
    yield "id", question.id
    yield "question", question.text
    yield "answer", question.answer
    for choice in question.choices or ():
        yield "choices", choice
    if question.solution:
        yield "solution", question.solution
    if question.hint:
        yield "hint", question.hint.text


def check_characters(field: str, text: str) -> None:
    r"""Raises ValueError for half of a surrogate pair, such as a JSON string's lone "\ud800".

    It is no character: neither a tokenizer nor a log takes it. All other characters, NUL and other
    control characters included, are text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"field '{field}': {code} at place {error.start} is half of a surrogate pair and no "
            "character: remove it"
        ) from None


def _read_answer(answer, solution) -> str:
    """The gold answer, without its box; that of the solution's box where there is none."""
    if answer is None and isinstance(solution, str) and _is_marked(solution):
        answer = solution
    is_value = isinstance(answer, (str, int, float)) and not isinstance(answer, bool)
    if not is_value or (isinstance(answer, float) and not math.isfinite(answer)):
        raise ValueError("no answer: give a text or number in the field 'answer'")
    text = str(answer).strip()
    if _is_marked(text):
        text = extract_answer(text)
    if not text:
        raise ValueError("no answer: the field 'answer' is empty, or its \\boxed{} or <answer> is")
    return text


def _is_marked(text: str) -> bool:
    return "\\boxed" in text or "<answer>" in text


def _read_hint(source, parse_hint: Callable | None):
    if not parse_hint or is_no_hint(source):
        return None
    try:
        return parse_hint(source)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"field 'hint': its JSON cannot be read: {error}") from None


def is_no_hint(source) -> bool:
    """Nothing, a blank text, or an object of empty parts, as a table fills them in."""
    if isinstance(source, dict):
        return source.keys() <= {"look", "ignore", "steps"} and not any(source.values())
    return not (source.strip() if isinstance(source, str) else source)


def _read_images(value, text: str, folder: Path) -> list:
    cells = [_bare_path(cell) for cell in _as_list(value)]
    images = [_check_image(image, folder) for image in cells if image]
    marks = text.count("<image>")
    if marks and marks != len(images):
        raise ValueError(
            f"the question has {marks} <image> marks but there are {len(images)} images"
        )
    return images


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def _bare_path(cell):
    """A table's image cell without bytes as its path, or None where there is none either."""
    has_no_bytes = isinstance(cell, dict) and "path" in cell and not cell.get("bytes")
    return cell["path"] if has_no_bytes else cell


def _read_choices(choices) -> list[str] | None:
    if not choices:
        return None
    if not isinstance(choices, list) or not all(
        isinstance(choice, (str, int, float)) for choice in choices
    ):
        raise ValueError("field 'choices': expected a list of texts")
    return [str(choice) for choice in choices]


def _hint_around(text: str, prompt_with_hint) -> str:
    """What a prompt with a hint holds besides the question's own text."""
    if not prompt_with_hint:
        return ""
    bare = text.replace("<image>", "").strip()
    before, found, after = str(prompt_with_hint).replace("<image>", "").partition(bare)
    if not found:
        raise ValueError("field 'prompt_with_hint': the question's text does not stand in it")
    return " ".join(part.strip() for part in (before, after) if part.strip())


def check_boxes(boxes, images: int) -> list | None:
    """Boxes as a file gives them: for each image a list of (left, top, right, bottom).

    Raises ValueError where they are anything else.
    """
    if not boxes:
        return None
    is_list_per_image = isinstance(boxes, list) and len(boxes) == images
    if not is_list_per_image or not all(_is_list_of_boxes(per_image) for per_image in boxes):
        raise ValueError(
            "field 'boxes': expected, for each image, a list of [left, top, right, bottom]"
        )
    return boxes


def _is_list_of_boxes(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)
        for box in value
    )


def _check_image(image, folder: Path) -> Path | Image.Image:
    """A row's image, opened once and whole: a path inside `folder`, or the image itself."""
    if isinstance(image, str):
        path = folder / image
        if len(image) > LONGEST_PATH:
            raise ValueError(
                f"field 'images': a text of {len(image)} characters is no path; base64 is not read"
            )
        if "\0" in image:
            raise ValueError(f"field 'images': {image!r} is no path: it holds a NUL character")
        check_characters("images", image)
        # links may lead anywhere: in the hub's cache each file is one
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
            raise ValueError(
                f"field 'images': {image} is outside {folder}; --image-dir says where images are"
            )
        _load(lambda: Image.open(path), str(path))
        return path
    if not isinstance(image, (dict, Image.Image)):
        raise ValueError(f"field 'images': expected a path or an image, got {type(image).__name__}")
    return _load(lambda: decode_cell(image), "it")


def _load(open_it: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        with open_it() as opened:
            opened.load()
            if opened.mode == "F":
                raise ValueError("its values are floats of no known scale: save it with 8 bits")
            return opened
    except FileNotFoundError:
        raise ValueError(
            f"field 'images': cannot read {name}: there is no such file; --image-dir says where "
            "images are"
        ) from None
    except Exception as error:  # pillow's decoders raise many kinds, SyntaxError among them
        raise ValueError(f"field 'images': cannot read {name}: {error}") from None


# -------------------------------------------------------------------------------- a run's questions
class QuestionStream:
    """Question number i of a run, for ever: the data, shuffled anew in each epoch by the seed."""

    def __init__(self, questions: list[Question], seed: int):
        self.questions, self.seed = questions, seed
        self.epoch, self.order = -1, []

    def fingerprint(self) -> str:
        """A text that changes where the data's ids, questions or answers do. Hints may change."""
        asked = [[question.id, question.text, question.answer] for question in self.questions]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

    def first(self, count: int) -> list[Question]:
        """The first `count` questions of the run, at most all of the data."""
        return [self[i] for i in range(min(count, len(self.questions)))]

    def __getitem__(self, i: int) -> Question:
        epoch, place = divmod(i, len(self.questions))
        if epoch != self.epoch:  # shuffled once per epoch, not once per question
            self.epoch, self.order = epoch, list(range(len(self.questions)))
            random.Random(f"{self.seed}-{epoch}").shuffle(self.order)
        return self.questions[self.order[place]]
