"""Files and datasets become questions; the stream of a run."""

from __future__ import annotations

import hashlib
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from plumbing.images import StoredImage, _picture
from rollout import Question
from toy import world


def load_questions(
    source: str | Path,
    parse_hint=None,
    *,
    split: str = "train",
    image_dir: str | Path = "",
    bad: list[str] | None = None,
) -> list[Question]:
    """Read questions from a .jsonl file, or, by `datasets`, from a saved dataset's folder or the hub.

    A line or row has question (or problem, prompt), answer, images (or image: one or a list; a path relative to image_dir or else to the
    file, or the image itself), and optionally id (or qid), choices (a list of the options' texts), solution, and hint (text, or an object with look,
    ignore, steps; read by `parse_hint`) or prompt_with_hint (the question's text with the hint around it), and boxes (see Question).

    Every line and image is checked before anything is returned. Raises ValueError naming file, line and field; with a list `bad` it is
    filled with these messages instead, and the lines are left out.
    """
    path, messages, samples, ids = Path(source), [], [], {}
    if path.suffix == ".jsonl" or path.is_file():
        if not path.is_file():
            raise ValueError(
                f"{path}: no such file; --data takes a .jsonl with question, answer, images and hint"
            )
        rows = [
            (number, line)
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if line.strip()
        ]
        folder, column, unit = Path(image_dir or path.parent), None, ""
    else:
        table = _open_table(str(source), split)
        rows, folder, unit = [(i, table) for i in range(len(table))], Path(image_dir or "."), "row "
        column = next((name for name in ("images", "image") if name in table.column_names), None)
        pictures = table.select_columns([column]) if column else None

    def read(numbered) -> Question | str:
        number, value = numbered
        try:
            row = (
                value[number] if unit else json.loads(value)
            )  # a table's row comes with its images decoded
            sample = _parse_row(row, f"{path.stem}-{number}", folder, parse_hint)
            sample.images = [
                StoredImage(pictures, number, column, i, image.size)
                if isinstance(image, Image.Image)
                else image
                for i, image in enumerate(sample.images)
            ]
            return sample
        except (
            ValueError,
            OSError,
        ) as error:  # JSONDecodeError is a ValueError, a broken image in a table an OSError
            return str(error)

    with (
        ThreadPoolExecutor() as pool
    ):  # decoding images is most of the work, and releases the interpreter
        for (number, _), got in zip(rows, pool.map(read, rows)):
            if isinstance(got, Question) and ids.setdefault(got.id, number) != number:
                got = f"field 'id': {got.id!r} is the id of line {ids[got.id]} already"
            if isinstance(got, Question):
                samples.append(got)
                continue
            messages.append(f"{source}:{unit}{number}: {got}")
            if bad is None:
                pool.shutdown(cancel_futures=True)
                raise ValueError(messages[0])
    if bad is not None:
        bad += messages
    if not samples:
        raise ValueError(
            f"{source}: no samples in it" + (f"; first: {messages[0]}" if messages else "")
        )
    return samples


def _open_table(source: str, split: str):
    """A dataset's folder or hub name by `datasets`. No code that comes with a dataset is run. Raises ValueError."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"--data {source}: not a .jsonl file; for a dataset's folder or hub name: python -m pip install datasets"
        ) from None
    try:
        if any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(source)
            return table[split] if isinstance(table, datasets.DatasetDict) else table
        return datasets.load_dataset(source, split=split)
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise ValueError(
            f"--data {source}, split {split!r}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from None


def _parse_row(row, default_id: str, folder: Path, parse_hint) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    question = next((row[key] for key in ("question", "problem", "prompt") if row.get(key)), None)
    if not isinstance(question, str):
        raise ValueError(
            "no question: give a text in the field 'question' (or 'problem', 'prompt')"
        )
    answer = row.get("answer")
    if (
        isinstance(answer, bool)
        or not isinstance(answer, (str, int, float))
        or not str(answer).strip()
    ):
        raise ValueError("no answer: give a text or number in the field 'answer'")
    value = row.get("images") or row.get("image")
    images = [
        _check_image(image, folder)
        for image in (value if isinstance(value, list) else [value])
        if image is not None and image != ""
    ]
    marks = question.count("<image>")
    if marks and marks != len(images):
        raise ValueError(
            f"the question has {marks} <image> marks but there are {len(images)} images"
        )
    choices = row.get("choices") or None
    if choices is not None and not (
        isinstance(choices, list) and all(isinstance(c, (str, int, float)) for c in choices)
    ):
        raise ValueError("field 'choices': expected a list of texts")
    hint = row.get("hint")
    if not hint and (whole := row.get("prompt_with_hint")):
        bare = question.replace("<image>", "").strip()
        before, found, after = str(whole).replace("<image>", "").partition(bare)
        hint = " ".join(part for part in (before.strip(), after.strip()) if part)
        if not found:
            raise ValueError("field 'prompt_with_hint': the question's text does not stand in it")
    hint = parse_hint(hint) if parse_hint and hint else None
    return Question(
        str(row.get("id", row.get("qid", default_id))),
        question,
        str(answer).strip(),
        images,
        hint,
        choices=choices and [str(c) for c in choices],
        solution=str(row["solution"]) if row.get("solution") else None,
        boxes=check_boxes(row.get("boxes"), len(images)),
    )


def check_boxes(boxes, images: int) -> list | None:
    """Boxes as a file gives them, found to be a list an image of (left, top, right, bottom). Raises ValueError."""
    fine = not boxes or (
        isinstance(boxes, list)
        and len(boxes) == images
        and all(
            isinstance(found, list)
            and all(
                isinstance(b, list) and len(b) == 4 and all(isinstance(x, (int, float)) for x in b)
                for b in found
            )
            for found in boxes
        )
    )
    if not fine:
        raise ValueError(
            "field 'boxes': expected, for each image, a list of [left, top, right, bottom]"
        )
    return boxes or None


def _check_image(image, folder: Path) -> Path | Image.Image:
    """A row's image, opened once and found whole: the path that it stands for, inside `folder`, or the image itself."""
    if isinstance(image, str):
        path = folder / image
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"field 'images': {image} is outside {folder}; --image-dir says where images are"
            )
        image = path
    elif not isinstance(image, (dict, Image.Image)):
        raise ValueError(f"field 'images': expected a path or an image, got {type(image).__name__}")
    try:
        with Image.open(image) if isinstance(image, Path) else _picture(image) as opened:
            opened.load()
    except (OSError, TypeError, KeyError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"field 'images': cannot read {image if isinstance(image, Path) else 'it'}: {error}"
        ) from None
    return image if isinstance(image, Path) else opened


class QuestionStream:
    """Question number i of the run, for ever: a stream of puzzles, or the data shuffled anew each epoch by the seed."""

    def __init__(self, samples: list[Question] | None, seed: int, fog: float = 0.0):
        self.samples, self.seed, self.fog, self.epoch, self.order = samples, seed, fog, -1, []

    def fingerprint(self) -> str:
        """Changes where the data's ids do."""
        return hashlib.sha256("\n".join(s.id for s in self.samples or ()).encode()).hexdigest()[:16]

    def __getitem__(self, i: int) -> Question:
        if self.samples is None:
            return world.to_question(
                world.make_puzzle("train", self.seed * 10**6 + i, fog=self.fog)
            )
        epoch, place = divmod(i, len(self.samples))
        if epoch != self.epoch:  # shuffled once an epoch, not once a question
            self.epoch, self.order = epoch, list(range(len(self.samples)))
            random.Random(f"{self.seed}-{epoch}").shuffle(self.order)
        return self.samples[self.order[place]]
