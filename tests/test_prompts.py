"""rollout.encode_prompts: chats with their images become token ids and patches."""

import os
import threading

import pytest
import torch
import transformers
from conftest import TINY, rollout, spy
from PIL import Image
from test_rollout import mixed_questions, student_prompts

import train
from hints import teacher_messages
from plumbing import images
from plumbing.images import open_image, patches_of_questions
from rollout import Question, chat, encode_prompts, student_messages
from toy import world

CLASSES = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor")


def without_videos(name, processor):
    """A processor class of transformers, which would want a video processor from torchvision."""
    real = getattr(transformers, name)

    class WithoutVideos(real):
        def check_argument_for_proper_class(self, argument_name, argument):
            pass

    template = processor.chat_template
    return WithoutVideos(processor.image_processor, processor.tokenizer, chat_template=template)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("hinted", [False, True])
def test_prompts_are_those_of_the_model_s_own_processor(base, name, hinted):
    """Ids, types, patches and grid, with one image, two and none, marks in the text included."""
    processor = without_videos(name, base[1])
    questions = mixed_questions()
    questions[1].text = "Is <image> like <image> ?"
    chats = [chat(question, "Look left." if hinted else "") for question in questions]
    for prompt, question, messages in zip(
        encode_prompts(base[1], questions, chats), questions, chats, strict=True
    ):
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        shown = [open_image(image) for image in question.images] or None
        expected = processor(
            text=[text], images=shown, return_tensors="pt", return_mm_token_type_ids=True
        )
        assert torch.equal(prompt.ids, expected["input_ids"][0])
        assert torch.equal(prompt.types, expected["mm_token_type_ids"][0])
        assert prompt.types.dtype == expected["mm_token_type_ids"].dtype
        for ours, theirs in ((prompt.pixels, "pixel_values"), (prompt.grid, "image_grid_thw")):
            assert (ours is None) == (theirs not in expected)
            assert ours is None or torch.equal(ours, expected[theirs])


def processed_images(monkeypatch, processor):
    """A list to which each call of the image processor adds its number of images."""
    kind, seen = type(processor.image_processor), []
    real = kind.preprocess

    def preprocess(self, images, **settings):
        seen.append(len(images))
        return real(self, images, **settings)

    monkeypatch.setattr(kind, "preprocess", preprocess)
    return seen


def test_the_images_of_a_hinted_prompt_are_not_processed_again(base, monkeypatch):
    processor, questions = base[1], mixed_questions()
    seen = processed_images(monkeypatch, processor)
    plain = student_prompts(processor, questions)
    assert sorted(seen) == [1, 1, 2]
    chats = [chat(question, "Look left.") for question in questions]
    again = encode_prompts(processor, questions, chats)
    seen.clear()
    hinted = encode_prompts(
        processor, questions, chats, [(prompt.pixels, prompt.grid) for prompt in plain]
    )
    assert seen == []
    for ours, expected, prompt in zip(hinted, again, plain, strict=True):
        assert torch.equal(ours.ids, expected.ids)
        assert torch.equal(ours.types, expected.types)
        assert ours.pixels is prompt.pixels
        assert ours.grid is prompt.grid


def test_a_rollout_processes_each_image_once(trainer, monkeypatch):
    """Student and teacher read the same patches; all responses of these puzzles fail."""
    seen = processed_images(monkeypatch, trainer.processor)
    trainer.config.tau = 1.0
    questions = world.puzzles("train", 3)
    for question in questions:
        question.answer = "none of them"
    groups = rollout(trainer, questions)
    assert seen == [1, 1, 1]
    for [response, *_] in groups:
        [expected] = encode_prompts(
            trainer.processor, [response.question], [teacher_messages(response.question)]
        )
        assert torch.equal(response.teacher_prompt.ids, expected.ids)
        assert response.teacher_prompt.pixels is response.prompt.pixels


def test_the_number_of_threads_changes_nothing(base, tmp_path, monkeypatch):
    paths = [tmp_path / f"{n}.png" for n in range(12)]
    for n, path in enumerate(paths):
        Image.effect_noise((60 + 20 * n, 90), 50).save(path)
    questions = [Question(path.name, "What?", "1", [path]) for path in paths]
    results = []
    for count in (1, 2, 8):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        results.append(patches_of_questions(base[1], questions))
    for one, *others in zip(*results, strict=True):
        for other in others:
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
    assert len({len(pixels) for pixels, _ in results[0]}) > 3, "each question has its own image"


def test_an_image_that_is_gone_is_an_error_with_the_question_s_id(base, tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    there = Question("here", "What?", "1", [tmp_path / "a.png"])
    gone = Question("q17", "What?", "1", [tmp_path / "gone.png"])
    with pytest.raises(ValueError, match="the images of question 'q17': .*gone.png"):
        patches_of_questions(base[1], [there, gone, there])


def test_a_chat_with_another_number_of_images_is_an_error(base):
    question = Question("a", "What?", "1", [Image.new("RGB", (60, 60))])
    [shown] = encode_prompts(base[1], [question], [student_messages(question)])
    question.text = "What is <|image_pad|> ?"
    with pytest.raises(ValueError, match="the chat shows 2 images, but there are 1"):
        encode_prompts(
            base[1], [question], [student_messages(question)], [(shown.pixels, shown.grid)]
        )


def test_images_of_the_coming_rollout_are_encoded_in_a_thread(tmp_path, monkeypatch):
    """Each question is drawn and encoded once; those after the first rollout, in another thread."""
    monkeypatch.chdir(tmp_path)
    encoded, drawn = [], spy(monkeypatch, world.PuzzleStream, "__getitem__", lambda _, i: i)
    real = images.patches_of_questions

    def noted(processor, questions):
        in_main = threading.current_thread() is threading.main_thread()
        encoded.append((in_main, [question.id for question in questions]))
        return real(processor, questions)

    monkeypatch.setattr(images, "patches_of_questions", noted)
    train.main([*TINY, "--steps", "3", "--eval-every", "9", "--name", "t"])
    assert sorted(drawn) == list(range(6))
    training = [(in_main, ids) for in_main, ids in encoded if len(ids) == 2]
    assert [in_main for in_main, _ in training] == [True, False, False]
    assert len({question_id for _, ids in training for question_id in ids}) == 6
