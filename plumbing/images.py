"""An image from file to features: opened, processed without torchvision, encoded once if frozen."""

from __future__ import annotations

import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from jinja2 import TemplateError, TemplateSyntaxError
from PIL import ExifTags, Image
from transformers import AutoTokenizer, Qwen2VLProcessor
from transformers import logging as transformers_logging
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

if TYPE_CHECKING:
    from rollout import Prompt, Question


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
    """A question's image as a person sees it: upright, in RGB, on white where it is transparent.

    TRAP: convert("RGB") alone gives the colours behind a transparent pixel, mostly black: a drawing
    in black lines disappears. And it turns most of 16 bits of grey into white.
    """
    if isinstance(image, StoredImage):
        image = image.open()
    elif not isinstance(image, Image.Image):
        image = Image.open(image)
    turn = UPRIGHT.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        is_deep = image.mode != "I" or grey.max() > 255  # a PGM of 16 bits has mode I
        image = Image.fromarray((grey >> 8 if is_deep else grey).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        drawing = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(drawing)
    return image if image.mode == "RGB" else image.convert("RGB")


# EXIF orientation -> what turns the picture upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """From the EXIF data; 1, upright, where they are damaged: viewers show such a picture too.

    TRAP: getexif and exif_transpose raise errors of many kinds there.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


class ImageTextProcessor(Qwen2VLProcessor):
    """A processor of Qwen2-VL, Qwen2.5-VL and Qwen3-VL for images and text alone.

    It has no video processor, so it does not need torchvision. hub_class: the name of the
    model's own processor class, which is the one that is saved.
    """

    hub_class = Qwen2VLProcessor.__name__

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    def to_dict(self) -> dict:
        # TRAP: where the saved class is unknown, AutoProcessor silently returns a tokenizer
        return {**super().to_dict(), "processor_class": self.hub_class}

    def save_pretrained(self, save_directory, **kwargs):
        """Save it with preprocessor_config.json, the file that older versions and others read."""
        files = super().save_pretrained(save_directory, **kwargs)
        return [*files, *self.image_processor.save_pretrained(save_directory)]


def first_line(error: Exception) -> str:
    """What a message to the user says of an exception: transformers' texts have many lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_reachable(model: str) -> None:
    """Raise ValueError where a hub name is neither in the local cache nor found on the hub.

    One request without a second attempt: transformers itself tries for half a minute, and prints
    each failure. A folder passes.
    """
    if Path(model).exists() or isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json"))
    except (HTTPError, OSError) as error:  # OSError: switched to offline
        raise ValueError(
            f"{model}: is not in the local cache and cannot be reached on the hub: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from None


def load_processor(path: str, min_pixels: int = 0, max_pixels: int = 0) -> ImageTextProcessor:
    """The processor of a saved model, by pillow. path: a folder or hub name.

    min_pixels, max_pixels: smallest and largest area of an image; 0: the model's own. Raises
    ValueError where a file cannot be read, where the tokenizer is empty or has no image token or
    end-of-sequence token, and where there is no chat template or one that leaves images out.

    TRAP: AutoProcessor on an image-only processor silently returns a tokenizer, and
    AutoImageProcessor wants torchvision in some versions. So each part is loaded by its class,
    which the three model families share.
    """
    check_reachable(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        settings, _ = Qwen2VLImageProcessorPil.get_image_processor_dict(path)
        saved, _ = ImageTextProcessor.get_processor_dict(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot read its processor: {first_line(error)}") from None
    images = _image_processor(settings, min_pixels, max_pixels)
    template, owner = _chat_template(saved, tokenizer)
    if not template:
        raise ValueError(f"{path}: it has no chat template, which ptdpo needs to build prompts")
    processor = ImageTextProcessor(images, tokenizer, chat_template=template)
    named = saved.get("processor_class") or settings.get("processor_class")
    if named and named != ImageTextProcessor.__name__:  # our exports had this name once
        processor.hub_class = named
    # TRAP: where the tokenizer's files are missing, transformers silently makes an empty tokenizer,
    # to which all text is nothing
    ids = tokenizer("a" + processor.image_token)["input_ids"]
    if len(ids) < 2 or ids[-1] != processor.image_token_id:
        raise ValueError(
            f"{path}: its tokenizer is empty or has no {processor.image_token}: are its files "
            "there?"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: its tokenizer names no eos_token, which ends a response")
    if tokenizer.pad_token_id is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    if not _shows_image(processor, path):
        raise ValueError(
            f"{path}: the chat template of its {owner} leaves images out: in a chat with one image "
            f"there must be one {processor.image_token}"
        )
    return processor


def _image_processor(settings: dict, min_pixels: int, max_pixels: int) -> Qwen2VLImageProcessorPil:
    """An image processor from its file. Pixels: those asked for, else the file's, else `size`.

    Hub files of Qwen2-VL and Qwen2.5-VL have min_pixels and max_pixels, those of Qwen3-VL `size`.

    TRAP: without a `size` of its own, transformers 5.17 writes a model's pixels into the class, and
    the next model starts from them. So it always gets a copy.
    """
    size = dict(settings.get("size") or Qwen2VLImageProcessorPil.size)
    limits = {
        "min_pixels": min_pixels or settings.get("min_pixels"),
        "max_pixels": max_pixels or settings.get("max_pixels"),
    }
    return Qwen2VLImageProcessorPil(**{**settings, **limits, "size": size})


def _chat_template(saved: dict, tokenizer) -> tuple[str | None, str]:
    """The chat template, and what it belongs to with the file's names, for messages.

    The processor's own comes first, in transformers' order. A hub model's tokenizer may have
    another one, for text and tools alone.
    """
    template = saved.get("chat_template")
    owner = "processor (processor_config.json, chat_template.json or chat_template.jinja)"
    if not template:
        template = tokenizer.chat_template
        owner = "tokenizer (tokenizer_config.json)"
    if isinstance(template, list):  # several, as a file may hold them
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    return template, owner


def _shows_image(processor: ImageTextProcessor, path: str) -> bool:
    """Does the chat template give one image token for one image?

    Raises ValueError where it is no template.
    """
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    try:
        text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"{path}: its chat template is broken: {first_line(error)}") from None
    except (TemplateError, TypeError):  # made for texts, it gets a list of parts
        return False
    return text.count(processor.image_token) == 1


def quiet_loading() -> None:
    """No progress bars and warnings of transformers while models are loaded.

    One warning of later passes goes too: transformers 5.24 names the argument past_key_values
    `cache`, but takes both names until 5.40. 5.17 knows only the former.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)


def patches_of_questions(
    processor, questions: list[Question]
) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """pixels (patches, values) and grid (images, 3) of each question's images; None without any.

    In order, and the same bit for bit whatever the number of threads. Decoding, resizing and numpy
    release the interpreter. Raises ValueError with the id of a question whose image is no longer
    readable.
    """

    def encode(question: Question):
        if not question.images:
            return None, None
        try:
            opened = [open_image(image) for image in question.images]
            inputs = processor.image_processor(images=opened, return_tensors="pt")
        except (OSError, ValueError) as error:
            raise ValueError(f"the images of question {question.id!r}: {error}") from error
        return inputs["pixel_values"], inputs["image_grid_thw"]

    # each thread holds one question's decoded images
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(encode, questions))


class QuestionsAhead:
    """The questions of the coming rollout, whose images are encoded while this one is scored.

    They wait in main memory: for 384 images of 1000 tokens 7 GB, beside as much of this rollout.
    """

    def __init__(self, processor):
        self.processor, self.pool = processor, ThreadPoolExecutor(1)
        self.indices, self.questions, self.images = range(0), [], None

    def start(self, stream, indices: range) -> None:
        """Draw these questions of the stream, and begin to encode their images."""
        self.indices, self.questions = indices, [stream[i] for i in indices]
        self.images = self.pool.submit(patches_of_questions, self.processor, self.questions)

    def draw(self, stream, indices: range) -> list[Question]:
        """Questions of the stream: those that were drawn ahead, or others."""
        return self.questions if indices == self.indices else [stream[i] for i in indices]

    def images_of(self, questions: list[Question]) -> list[tuple]:
        """patches_of_questions; once, those of the questions that were drawn ahead."""
        if self.images is None or questions is not self.questions:
            return patches_of_questions(self.processor, questions)
        waiting, self.images = self.images, None
        return waiting.result()


def image_tokens_expanded(
    processor, text: str, grid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids (P,) of a rendered chat, one per image token, and bool (P,): the image tokens.

    The text holds one image token per image; the prompt holds one per 4 patches. Raises ValueError
    where the text has another number of images than the grid (images, 3).
    """
    ids = torch.tensor(processor.tokenizer(text)["input_ids"])
    is_image = ids == processor.image_token_id
    shown = 0 if grid is None else len(grid)
    if is_image.sum() != shown:
        raise ValueError(f"the chat shows {is_image.sum()} images, but there are {shown}")
    counts = torch.ones_like(ids)
    if grid is not None:
        counts[is_image] = grid.prod(-1) // processor.image_processor.merge_size**2
    return ids.repeat_interleave(counts), is_image.repeat_interleave(counts)


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
        # transformers 5.24 calls its to_tuple, so it must be one of transformers' outputs
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=final, deepstack_features=deeper or None
        )

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
