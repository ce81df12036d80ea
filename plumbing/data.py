"""Files and datasets become questions; questions become the stream of a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from plumbing.images import StoredImage, decode_cell
from rollout import Question


def load_questions(
    source: str | Path,
    parse_hint: Callable | None = None,
    *,
    split: str = "train",
    image_dir: str | Path = "",
    bad: list[str] | None = None,
) -> list[Question]:
    """Questions of a .jsonl file, or, by `datasets`, of a saved dataset's folder or the hub.

    Columns: question (or problem, prompt), answer, images (or image: one or a list; the image
    itself, or a path relative to image_dir or else to the file). Optional: id (or qid), choices (a
    list of the options' texts), solution, hint (a text, or an object with look, ignore, steps, read
    by `parse_hint`) or prompt_with_hint (the question's text with the hint around it), and boxes
    (see rollout.Question).

    Every line and image is checked before anything is returned. Raises ValueError with file, line
    and field. If a list `bad` is given, it receives these messages instead, and the lines are left
    out.
    """
    if Path(source).suffix == ".jsonl" or Path(source).is_file():
        read = _jsonl_rows(Path(source), image_dir, parse_hint)
    else:
        read = _table_rows(str(source), split, image_dir, parse_hint)
    questions, messages, line_of = [], [], {}
    with contextlib.closing(read):
        for place, result in read:
            if isinstance(result, Question) and result.id in line_of:
                taken_by = line_of[result.id]
                result = f"field 'id': {result.id!r} is the id of line {taken_by} already"
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


def _jsonl_rows(path: Path, image_dir, parse_hint) -> Iterator[tuple[str, Question | str]]:
    """For each line: its number, and its Question or what is wrong with it."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; --data takes a .jsonl with question, answer, images and hint"
        )
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    numbered = [(number, line) for number, line in lines if line.strip()]
    folder = Path(image_dir or path.parent)

    def read(numbered_line) -> Question:
        number, line = numbered_line
        return _parse_row(json.loads(line), f"{path.stem}-{number}", folder, parse_hint)

    for (number, _), result in _in_threads(read, numbered):
        yield str(number), result


def _table_rows(source: str, split: str, image_dir, parse_hint):
    """The same for a dataset. Its images stay in the table and are decoded when they are used."""
    table = _open_table(source, split)
    image_columns = [name for name in ("images", "image") if name in table.column_names]
    pictures = table.select_columns(image_columns[:1]) if image_columns else None
    folder, stem = Path(image_dir or "."), Path(source).stem

    def read(number: int) -> Question:
        question = _parse_row(table[number], f"{stem}-{number}", folder, parse_hint)
        for place, image in enumerate(question.images):
            if isinstance(image, Image.Image):
                stored = StoredImage(pictures, number, image_columns[0], place, image.size)
                question.images[place] = stored
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
            f"--data {source}: not a .jsonl file; for a dataset's folder or hub name: "
            "python -m pip install datasets"
        ) from None
    known_errors = (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        saved = ("state.json", "dataset_dict.json")
        if any((Path(source) / name).is_file() for name in saved):
            table = datasets.load_from_disk(source)
            return table[split] if isinstance(table, datasets.DatasetDict) else table
        return datasets.load_dataset(source, split=split)
    except known_errors as error:
        headline = str(error).partition("\n")[0]
        raise ValueError(
            f"--data {source}, split {split!r}: {type(error).__name__}: {headline}"
        ) from None


# --------------------------------------------------------------------------------- one row, checked
def _parse_row(row, default_id: str, folder: Path, parse_hint) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    text = row.get("question") or row.get("problem") or row.get("prompt")
    if not text or not isinstance(text, str):
        raise ValueError(
            "no question: give a text in the field 'question' (or 'problem', 'prompt')"
        )
    answer = _read_answer(row.get("answer"))
    images = _read_images(row, text, folder)
    hint_source = row.get("hint") or _hint_around(text, row.get("prompt_with_hint"))
    return Question(
        id=str(row.get("id", row.get("qid", default_id))),
        text=text,
        answer=answer,
        images=images,
        hint=parse_hint(hint_source) if parse_hint and hint_source else None,
        choices=_read_choices(row.get("choices")),
        solution=str(row["solution"]) if row.get("solution") else None,
        boxes=check_boxes(row.get("boxes"), len(images)),
    )


def _read_answer(answer) -> str:
    is_value = isinstance(answer, (str, int, float)) and not isinstance(answer, bool)
    if not is_value or not str(answer).strip():
        raise ValueError("no answer: give a text or number in the field 'answer'")
    return str(answer).strip()


def _read_images(row: dict, text: str, folder: Path) -> list:
    value = row.get("images") or row.get("image")
    values = value if isinstance(value, list) else [value]
    images = [_check_image(image, folder) for image in values if image is not None and image != ""]
    marks = text.count("<image>")
    if marks and marks != len(images):
        raise ValueError(
            f"the question has {marks} <image> marks but there are {len(images)} images"
        )
    return images


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
        if not path.resolve().is_relative_to(folder.resolve()):
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
            return opened
    except (OSError, TypeError, KeyError, Image.DecompressionBombError) as error:
        raise ValueError(f"field 'images': cannot read {name}: {error}") from None


# -------------------------------------------------------------------------------- a run's questions
class QuestionStream:
    """Question number i of a run, for ever: the data, shuffled anew in each epoch by the seed."""

    def __init__(self, questions: list[Question], seed: int):
        self.questions, self.seed = questions, seed
        self.epoch, self.order = -1, []

    def fingerprint(self) -> str:
        """A text that changes where the data's ids do."""
        ids = "\n".join(question.id for question in self.questions)
        return hashlib.sha256(ids.encode()).hexdigest()[:16]

    def first(self, count: int) -> list[Question]:
        """The first `count` questions of the run, at most all of the data."""
        return [self[i] for i in range(min(count, len(self.questions)))]

    def __getitem__(self, i: int) -> Question:
        epoch, place = divmod(i, len(self.questions))
        if epoch != self.epoch:  # shuffled once per epoch, not once per question
            self.epoch, self.order = epoch, list(range(len(self.questions)))
            random.Random(f"{self.seed}-{epoch}").shuffle(self.order)
        return self.questions[self.order[place]]
