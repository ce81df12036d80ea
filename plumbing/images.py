"""An image from file to features: opened, processed without torchvision, run through a frozen tower once."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLProcessor
from transformers import logging as transformers_logging
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

if TYPE_CHECKING:
    from rollout import Prompt


@dataclass
class StoredImage:
    """An image in a `datasets` table, decoded when it is used: a large table does not fit into memory. size: width, height."""

    table: object
    row: int
    column: str
    place: int
    size: tuple[int, int]

    def open(self) -> Image.Image:
        value = self.table[self.row][self.column]
        return _picture(value[self.place] if isinstance(value, list) else value)


def _picture(value) -> Image.Image:
    """A table's image: decoded already, or as stored, {"bytes", "path"}."""
    return (
        Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"])
        if isinstance(value, dict)
        else value
    )


def open_image(image: Image.Image | StoredImage | str | Path) -> Image.Image:
    """A sample's image, in RGB."""
    if not isinstance(image, Image.Image):
        image = image.open() if isinstance(image, StoredImage) else Image.open(image)
    return image if image.mode == "RGB" else image.convert("RGB")


class ImageTextProcessor(Qwen2VLProcessor):
    """A Qwen-VL processor for images and text alone: no video processor, so no torchvision. Works for Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


def load_processor(path: str, min_pixels: int = 0, max_pixels: int = 0) -> ImageTextProcessor:
    """The processor of a saved model, by pillow; min_pixels, max_pixels: an image's smallest and largest area, 0: the model's own.
    Raises ValueError where there is no chat template.

    TRAP: AutoProcessor on an image-only processor silently returns a tokenizer, and AutoImageProcessor wants torchvision in some
    versions; so each part is loaded by its class, which the three model families share.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{path}: its tokenizer has no chat template, which ptdpo needs to build prompts"
        )
    images = Qwen2VLImageProcessorPil.from_pretrained(path)
    images.size = {
        "shortest_edge": min_pixels or images.size["shortest_edge"],
        "longest_edge": max_pixels or images.size["longest_edge"],
    }
    return ImageTextProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def quiet_loading() -> None:
    """No progress bars and warnings of transformers while models are loaded."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def take_features(model) -> None:
    """Let a model with a frozen vision tower take an image's features where it is given its patches, in every pass over a prompt."""
    tower = model.model.visual
    run, width = tower.forward, model.config.text_config.hidden_size

    def forward(pixels, grid_thw, **how):
        if (
            len(pixels) == grid_thw.prod(-1).sum()
        ):  # patches; of features there is one where there are four of these
            return run(pixels, grid_thw, **how)
        first, *deeper = pixels.split(width, -1)  # Qwen3-VL has more than one feature a token
        return SimpleNamespace(pooler_output=first, deepstack_features=deeper)

    tower.forward = forward


@torch.no_grad()
def encode_images(model, prompts: list[Prompt]) -> None:
    """Run the vision tower once over the images of prompts that still hold patches, and keep its features (tokens, features) in their place, on
    the CPU. The model, and any other with the same frozen tower, must `take_features`."""
    for prompt in prompts:
        if prompt.pixels is not None and len(prompt.pixels) == prompt.grid.prod(-1).sum():
            out = model.model.visual(
                prompt.pixels.to(model.device, model.dtype), grid_thw=prompt.grid.to(model.device)
            )
            prompt.pixels = torch.cat(
                [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])], -1
            ).cpu()
