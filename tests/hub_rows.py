"""One row of each hub dataset that docs/your-model.md names, in the columns and types of its card.

The columns, their types and the splits were read from the datasets' cards or from public code that
reads them. The contents are invented: a row of 40 x 30 pixels is enough. ViRL39K has its pictures
in an archive beside the table, so its rows hold paths.
"""

import io
from dataclasses import dataclass, field

from PIL import Image


def picture() -> Image.Image:
    return Image.new("RGB", (40, 30), "blue")


def png() -> bytes:
    file = io.BytesIO()
    picture().save(file, "PNG")
    return file.getvalue()


@dataclass
class HubRow:
    """row: as `datasets` gives it out. image: the type of its column of images. fields: what the
    Question must hold. files: pictures beside the table."""

    name: str
    row: dict
    image: str
    fields: dict
    files: list = field(default_factory=list)


STORED = {"bytes": png(), "path": None}

ROWS = [
    # dataset_info of its card, main: images is a sequence of image
    HubRow(
        "PAPOGalaxy/PAPO_ViRL39K_train",
        {
            "images": [picture()],
            "problem": "<image>\nHow high is the bar?\nA. 3 cm\nB. 4 cm",
            "answer": "B",
        },
        "images: sequence of image",
        {"answer": "B", "id": "PAPO_ViRL39K_train-0", "choices": None},
    ),
    # the same dataset by its card's pull request 2: an id, and images as structs
    HubRow(
        "PAPOGalaxy/PAPO_ViRL39K_train",
        {
            "id": "Geo-7",
            "problem": "<image>How high is the bar?",
            "answer": "4",
            "images": [STORED],
        },
        "images: sequence of struct",
        {"answer": "4", "id": "Geo-7"},
    ),
    HubRow(
        "TIGER-Lab/ViRL39K",
        {
            "question": "<image>How high is the bar?",
            "answer": "\\boxed{4}",
            "PassRate_32BTrained": 0.5,
            "PassRate_7BBase": -1.0,
            "category": "(GradeSchool) Geometric",
            "source": "Processed",
            "qid": "Processed-7",
            "image": ["images/Processed-7-0.png"],
        },
        "image: sequence of string",
        {"answer": "4", "id": "Processed-7"},
        ["images/Processed-7-0.png"],
    ),
    HubRow(
        "hiyouga/geometry3k",
        {"images": [picture()], "problem": "<image>Find $x$.", "answer": "2 \\sqrt { 221 }"},
        "images: sequence of image",
        {"answer": "2 \\sqrt { 221 }", "id": "geometry3k-0"},
    ),
    HubRow(
        "lmms-lab/multimodal-open-r1-8k-verified",
        {
            "image": picture(),
            "problem": "How high is the bar?\nChoices:\nA: 3\nB: 4",
            "solution": "<think>It ends at 4.</think>\n\n<answer>B</answer>",
            "original_question": "How high is the bar?\nChoices:\nA: 3\nB: 4",
            "original_answer": "The bar ends at 4. The answer is B.",
        },
        "image: image",
        {
            "answer": "B",
            "solution": "<think>It ends at 4.</think>\n\n<answer>B</answer>",
            "text": "How high is the bar?\nChoices:\nA: 3\nB: 4",
        },
    ),
    HubRow(
        "AI4Math/MathVista",
        {
            "pid": "2",
            "question": "How high is the bar?",
            "image": "images/2.jpg",
            "decoded_image": picture(),
            "choices": ["3 cm", "4 cm"],
            "unit": None,
            "precision": None,
            "answer": "4 cm",
            "question_type": "multi_choice",
            "answer_type": "text",
            "metadata": {
                "category": "math-targeted-vqa",
                "context": "bar chart",
                "grade": "elementary school",
                "img_height": 30,
                "img_width": 40,
                "language": "english",
                "skills": ["statistical reasoning"],
                "source": "invented",
                "split": "testmini",
                "task": "figure question answering",
            },
            "query": "Hint: Please answer the question and provide the correct option letter, "
            "e.g., A, B, C, D, at the end.\nQuestion: How high is the bar?\nChoices:\n(A) 3 cm\n"
            "(B) 4 cm",
        },
        "decoded_image: image",
        {"answer": "4 cm", "id": "2", "choices": ["3 cm", "4 cm"]},
    ),
]


def table_of(datasets, row: HubRow):
    """A datasets.Dataset of the one row, its images stored as the card says."""
    column, _, kind = row.image.partition(": ")
    table = datasets.Dataset.from_list([row.row])
    if kind == "image":
        return table.cast_column(column, datasets.Image())
    if kind == "sequence of image":
        return table.cast_column(column, datasets.Sequence(datasets.Image()))
    return table
