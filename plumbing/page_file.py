"""The file of a page (--report, --study-hints): a template of plumbing/pages/, filled with data."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from PIL import Image

from plumbing.images import open_image
from plumbing.runs import write_beside
from rollout import Question

PAGES = Path(__file__).resolve().parent / "pages"


def write_html(path: Path, template: str, page: dict) -> Path:
    """Write one HTML file that needs no network: style, scripts and data are inside it.

    The data stands in it as JSON without any "<", and the scripts never read it as HTML.
    """
    html = (PAGES / template).read_text(encoding="utf-8")
    for mark, part in (
        ("@STYLE@", "style.css"),
        ("@FRAME@", "frame.html"),
        ("@PARTS@", "parts.js"),
    ):
        html = html.replace(mark, (PAGES / part).read_text(encoding="utf-8"))
    data = json.dumps(page).replace("<", "\\u003c")
    write_beside(path, html.replace("@DATA@", data))  # TRAP: last, for data may say "@PARTS@"
    return path


def image_entries(question: Question) -> list[dict]:
    """The question's images as a page shows them, with the boxes of its hint."""
    boxes = question.boxes if question.hint and question.boxes else [[] for _ in question.images]
    return [
        image_entry(open_image(image), image_boxes)
        for image, image_boxes in zip(question.images, boxes, strict=True)
    ]


def image_entry(image: Image.Image, boxes: list) -> dict:
    """A small copy of the image, inside the page, and the boxes as shares of its size."""
    width, height = image.size
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((448, 448))
    small.save(file, "PNG")
    return {
        "src": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
        "width": max(224, small.width),
        "boxes": [
            [left / width, top / height, right / width, bottom / height]
            for left, top, right, bottom in boxes
        ],
    }
