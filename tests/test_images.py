"""plumbing/images.py: opening images, the processor, and a frozen tower's features."""

import io
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from conftest import greedy_of_transformers
from PIL import Image, ImageOps
from test_rollout import ids_of, mixed_questions, student_prompts

from hints import teacher_messages
from plumbing.images import (
    StoredImage,
    encode_images,
    load_processor,
    open_image,
    quiet_loading,
    take_features,
)
from plumbing.settings import EMBEDDED
from rollout import collate, encode_prompts, response_states, sample_groups
from toy import world


# ----------------------------------------------------------------------------------- opening images
def picture(mode="RGB"):
    return Image.new(mode, (30, 20), 200)


def png(image):
    """The bytes of a .png file."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16"])
def test_an_image_is_opened_in_rgb(mode):
    opened = open_image(picture(mode))
    assert (opened.mode, opened.size) == ("RGB", (30, 20))


def test_an_image_in_rgb_is_itself():
    image = picture()
    assert open_image(image) is image


def drawing(mode, path):
    """A black line on a ground that is transparent, as such drawings are saved in each mode."""
    ground = {"RGBA": (0, 0, 0, 0), "LA": (0, 0), "RGB": (0, 255, 0), "P": 1}[mode]
    line = {"RGBA": (0, 0, 0, 255), "LA": (0, 255), "RGB": (0, 0, 0), "P": 0}[mode]
    image = Image.new(mode, (30, 20), ground)
    if mode == "P":
        image.putpalette([0, 0, 0, 0, 255, 0])
    image.paste(line, (10, 0, 20, 20))
    one_colour = {"transparency": ground} if mode in ("RGB", "P") else {}
    image.save(path, **one_colour)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "P"])
def test_what_is_transparent_is_white(mode, tmp_path):
    path = tmp_path / "drawing.png"
    drawing(mode, path)
    assert Image.open(path).mode == mode
    opened = open_image(path)
    assert (opened.mode, opened.getpixel((5, 10))) == ("RGB", (255, 255, 255))
    assert opened.getpixel((15, 10)) == (0, 0, 0)


def test_a_photo_is_turned_as_its_camera_was_held(tmp_path):
    image = Image.new("RGB", (32, 16), (255, 255, 255))
    image.paste((200, 0, 0), (0, 0, 16, 16))  # red on the left; upright it is at the top
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    opened = open_image(tmp_path / "photo.png")
    assert opened.size == (16, 32)
    assert (opened.getpixel((8, 4)), opened.getpixel((8, 28))) == ((200, 0, 0), (255, 255, 255))


def test_a_photo_with_damaged_exif_data_is_shown(tmp_path):
    """Its orientation, 6, can be read; the resolution is a text. Then: all of it is garbage."""
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 2)
    exif += struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"72/1")
    Image.new("RGB", (32, 16)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif + b"\0" * 4)
    assert open_image(tmp_path / "a.jpg").size == (16, 32)
    Image.new("RGB", (32, 16)).save(tmp_path / "b.png", exif=b"Exif\0\0no TIFF at all")
    assert open_image(tmp_path / "b.png").size == (32, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_turned_as_pillow_turns_it(orientation, tmp_path):
    image = Image.frombytes("RGB", (3, 2), bytes(range(18)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert open_image(tmp_path / "a.png").tobytes() == expected.tobytes()


def test_16_bits_of_grey_are_scaled(tmp_path):
    """A PGM has mode I, as has a picture of 8 bits that was widened."""
    Image.new("I;16", (30, 20), 128 * 256 + 77).save(tmp_path / "scan.png")
    assert open_image(tmp_path / "scan.png").getpixel((0, 0)) == (128, 128, 128)
    pixel = (128 * 256 + 77).to_bytes(2, "big")
    (tmp_path / "scan.pgm").write_bytes(b"P5 2 1 65535\n" + 2 * pixel)
    assert open_image(tmp_path / "scan.pgm").getpixel((0, 0)) == (128, 128, 128)
    assert open_image(Image.new("I", (2, 1), 200)).getpixel((0, 0)) == (200, 200, 200)


@pytest.mark.parametrize("kind", [str, Path])
def test_an_image_is_opened_from_its_path(kind, tmp_path):
    picture("L").save(tmp_path / "a.png")
    opened = open_image(kind(tmp_path / "a.png"))
    assert (opened.mode, opened.size) == ("RGB", (30, 20))
    assert opened.getpixel((0, 0)) == (200, 200, 200)


@pytest.mark.parametrize(
    "as_cell",
    [
        lambda image, path: image,
        lambda image, path: {"bytes": png(image), "path": None},
        lambda image, path: {"bytes": png(image), "path": "gone.png"},
        lambda image, path: {"bytes": None, "path": path},
    ],
    ids=["decoded", "bytes", "bytes and a path", "path"],
)
@pytest.mark.parametrize("in_list", [False, True])
def test_an_image_is_opened_from_its_table(as_cell, in_list, tmp_path):
    picture("L").save(tmp_path / "a.png")
    cell, place = as_cell(picture("L"), str(tmp_path / "a.png")), 0
    if in_list:
        cell, place = [Image.new("L", (1, 1)), cell], 1
    table = [{"pictures": None}, {"pictures": cell}]
    opened = open_image(StoredImage(table, 1, "pictures", place, (30, 20)))
    assert (opened.mode, opened.size) == ("RGB", (30, 20))
    assert opened.getpixel((0, 0)) == (200, 200, 200)


# ------------------------------------------------------------------------------------ the processor
@pytest.mark.parametrize(
    "limits, fewest, most",
    [
        ({"max_pixels": 56 * 56}, 4, 4),
        ({}, 16, 16),
        ({"min_pixels": 28 * 28 * 25, "max_pixels": 10**6}, 25, 99),
    ],
)
def test_pixels_limit_the_image_tokens(limits, fewest, most):
    processor = load_processor(EMBEDDED, **limits)
    [prompt] = student_prompts(processor, world.puzzles("tune", 1))
    assert fewest <= prompt.types.sum().item() <= most


def test_processor_survives_saving(base, tmp_path):
    _, processor = base
    processor.save_pretrained(tmp_path)
    questions = world.puzzles("heldout", 2)
    chats = [teacher_messages(question) for question in questions]
    before = encode_prompts(processor, questions, chats)
    after = encode_prompts(load_processor(str(tmp_path)), questions, chats)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.types, other.types)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    folder = shutil.copytree(EMBEDDED, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load_processor(str(folder))


def test_one_cell_is_one_image_token_and_nothing_is_unknown(base):
    model, processor = base
    questions = world.puzzles("train", 50)
    chats = [teacher_messages(question) for question in questions]
    for prompt in encode_prompts(processor, questions, chats):
        assert prompt.types.sum() == 16
        assert (prompt.ids == model.config.image_token_id).sum() == 16
        assert not (prompt.ids == processor.tokenizer.unk_token_id).any()


# ---------------------------------------------------------------------------- features of the tower
def states_both_ways(model, prompts):
    """The states of three tokens on each prompt: with prompts that run once, as whole sequences."""
    responses = [[30, 31, 32]] * len(prompts)
    return [
        response_states(model, collate(prompts, responses, 0, one_prompt_per_response=whole))
        for whole in (False, True)
    ]


def greedy(model, processor, prompts):
    """By our sampler, and by model.generate, which reads the tower's output in its own way."""
    own = sample_groups(model, processor, prompts, 1, max_new_tokens=6, temperature=0)
    return ids_of(own), [greedy_of_transformers(model, processor, prompt, 6) for prompt in prompts]


@torch.no_grad()
def test_features_in_the_place_of_patches_change_nothing(tiny):
    """One image, two and none: states, and greedy responses, from what the tower made once."""
    model, processor = tiny
    patches = student_prompts(processor, mixed_questions())
    features = student_prompts(processor, mixed_questions())
    states = states_both_ways(model, patches)
    responses = greedy(model, processor, patches)

    take_features(model)
    encode_images(model, features)
    model.model.visual.blocks[0].forward = None  # the tower is not run again
    encode_images(model, features)
    lengths = [None if prompt.pixels is None else len(prompt.pixels) for prompt in features]
    assert lengths == [16, 22, None, 16]
    for before, after in zip(states, states_both_ways(model, features), strict=True):
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
    assert greedy(model, processor, features) == responses


@torch.no_grad()
def test_a_model_that_takes_features_still_takes_patches(tiny):
    model, processor = tiny
    prompts = student_prompts(processor, mixed_questions())
    before = states_both_ways(model, prompts)
    take_features(model)
    for expected, states in zip(before, states_both_ways(model, prompts), strict=True):
        torch.testing.assert_close(states, expected, rtol=0, atol=0)


def test_the_new_name_of_an_argument_is_no_news_to_the_user():
    """The text is the one of transformers 5.24."""
    text = (
        "`past_key_values` is deprecated and will be removed in version 5.40.0 for "
        "`Qwen2VLModel.forward`. Use `cache` instead."
    )
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_loading()
        warnings.warn(text, FutureWarning, stacklevel=1)
        warnings.warn("another one", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["another one"]
