"""An image from file to features: opened, processed without torchvision, encoded once if frozen."""

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
    """An image in a table of `datasets`, decoded when it is used: a large table exceeds the memory.

    size: width, height. place: which image of a row that has a list.
    """

    table: object
    row: int
    column: str
    place: int
    size: tuple[int, int]

    def open(self) -> Image.Image:
        value = self.table[self.row][self.column]
        return decode_cell(value[self.place] if isinstance(value, list) else value)


def decode_cell(value) -> Image.Image:
    """The image of a table's cell: decoded already, or as stored, {"bytes", "path"}."""
    if not isinstance(value, dict):
        return value
    return Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"])


def open_image(image: Image.Image | StoredImage | str | Path) -> Image.Image:
    """A question's image, in RGB."""
    if isinstance(image, StoredImage):
        image = image.open()
    elif not isinstance(image, Image.Image):
        image = Image.open(image)
    return image if image.mode == "RGB" else image.convert("RGB")


class ImageTextProcessor(Qwen2VLProcessor):
    """A processor of Qwen2-VL, Qwen2.5-VL and Qwen3-VL for images and text alone.

    It has no video processor, so it does not need torchvision.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


def load_processor(path: str, min_pixels: int = 0, max_pixels: int = 0) -> ImageTextProcessor:
    """The processor of a saved model, by pillow.

    min_pixels, max_pixels: smallest and largest area of an image; 0: the model's own. Raises
    ValueError where there is no chat template.

    TRAP: AutoProcessor on an image-only processor silently returns a tokenizer, and
    AutoImageProcessor wants torchvision in some versions. So each part is loaded by its class,
    which the three model families share.
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


def _holds_patches(pixels: torch.Tensor, grid: torch.Tensor) -> bool:
    """Patches, or features? There is one feature where there are four patches."""
    return len(pixels) == grid.prod(-1).sum()


def take_features(model) -> None:
    """Let a model with a frozen tower accept an image's features in the place of its patches.

    It holds for every later pass over a prompt: the tower's forward is replaced.
    """
    tower = model.model.visual
    run, width = tower.forward, model.config.text_config.hidden_size

    def forward(pixels, grid_thw, **settings):
        if _holds_patches(pixels, grid_thw):
            return run(pixels, grid_thw, **settings)
        final, *deeper = pixels.split(width, -1)  # Qwen3-VL has more than one feature per token
        return SimpleNamespace(pooler_output=final, deepstack_features=deeper)

    tower.forward = forward


@torch.no_grad()
def encode_images(model, prompts: list[Prompt]) -> None:
    """Run the vision tower once over the images of the prompts that still hold patches.

    Its features (tokens, features) take the patches' place in the prompts, on the CPU. The model,
    and any other with the same frozen tower, must `take_features` first.
    """
    for prompt in prompts:
        if prompt.pixels is None or not _holds_patches(prompt.pixels, prompt.grid):
            continue
        pixels = prompt.pixels.to(model.device, model.dtype)
        out = model.model.visual(pixels, grid_thw=prompt.grid.to(model.device))
        deeper = getattr(out, "deepstack_features", None) or []
        prompt.pixels = torch.cat([out.pooler_output, *deeper], -1).cpu()
