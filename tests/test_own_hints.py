"""plumbing/own_hints.py and toy/own_hints.py: hints from the model's own right responses."""

import json
from dataclasses import replace
from random import Random

import pytest
import torch
from conftest import spy
from PIL import Image

from hints import Hint
from plumbing import own_hints
from plumbing.answers import extract_answer
from plumbing.own_hints import Drawn, OwnHints, OwnResponses, layers_for, scores_of_layers
from rollout import Question, encode_prompts, sample_groups, student_messages
from toy import own_hints as toy_hints
from toy import world

SAMPLES = 32
LAST = (2,)  # the layer of toy/base that looks at evidence


def puzzles(count, split="heldout"):
    """Puzzles without the world's solution."""
    return [replace(puzzle, solution=None) for puzzle in world.puzzles(split, count)]


def source(base, questions, **settings):
    own = OwnResponses(*base, SAMPLES, 48)
    words = {"name_place": toy_hints.name_place, "parts": toy_hints.hint_parts}
    return OwnHints(own, LAST, questions, **{**words, **settings})


@pytest.fixture(scope="module")
def records(base):
    """question -> record, of 16 puzzles."""
    questions = puzzles(16)
    hints = source(base, questions)
    return [(question, hints.record(question)[0]) for question in questions]


def test_a_hint_names_the_lines_that_the_right_response_has_read(records):
    """On two held-out puzzles in three or more; the model itself names its lines."""
    hinted = [(question, record) for question, record in records if record["hint"]]
    assert len(hinted) >= 4
    faithful = 0
    for question, record in hinted:
        read = {name for name in all_lines() if name in record["response"].replace(" :", "")}
        faithful += set(record["hint"]["look"]) == read
        assert extract_answer(record["response"]) == question.answer
        assert record["hint"]["steps"] == question.hint.steps
    assert faithful >= len(hinted) - 1


def all_lines():
    return [world.line_name((kind, index)) for kind in ("row", "column") for index in range(4)]


def test_a_question_without_a_right_response_says_so(records):
    reasons = [record["rejected"] for _, record in records if not record["hint"]]
    assert [["no right response: none of 32"]] in reasons
    known = ("no right response: none of 32", "right responses look at different places")
    assert {reason for [[reason]] in reasons} <= {*known, "no region stands out"}


def test_the_draws_of_a_question_depend_on_its_id_alone(base, records):
    """Not on the questions it is drawn with, nor on how many of them are drawn."""
    question, record = next((q, r) for q, r in records if r["response"])
    alone = source(base, [question])
    assert alone.record(question)[0]["response"] == record["response"]


def read_line(processor, line, draw=0):
    """A response to the first held-out puzzle that reads this line, as if it had been right."""
    text = world.response(world.make_puzzle("heldout", 0), Random(draw), lines=[line])
    return Drawn(processor.tokenizer(text)["input_ids"], text, True)


def test_right_responses_that_look_at_different_places_give_no_hint(base):
    [question] = puzzles(1)
    hints = source(base, [question])
    top, lower = (read_line(base[1], ("row", index)) for index in (0, 2))
    hints.own.drawn[question.id] = [top, lower]
    record, maps = hints.record(question)
    assert record["rejected"] == [["right responses look at different places"]]
    assert (record["hint"], maps) == (None, [])
    again = read_line(base[1], ("row", 0), draw=3)
    assert again.text != top.text
    hints.own.drawn[question.id] = [top, again]
    record, _ = hints.record(question)
    assert record["hint"]["look"] == ("the top row",)
    assert record["response"] == top.text
    assert record["boxes"] == [[[0, 0, 112, 28]]]


def test_a_response_that_only_answers_shows_no_place(base):
    [question] = puzzles(1)
    hints = source(base, [question])
    answer = "\\boxed{ 2 }"
    ids = base[1].tokenizer(answer)["input_ids"]
    hints.own.drawn[question.id] = [Drawn(ids, answer, True)]
    assert hints.record(question)[0]["rejected"] == [["no reasoning before the answer"]]
    blind = replace(question, images=[])
    assert hints.record(blind)[0]["rejected"] == [["no picture to look at"]]


def test_a_solution_of_the_data_is_read_and_nothing_is_drawn(base, monkeypatch):
    monkeypatch.setattr(own_hints, "sample_groups", None)
    right = 0
    for question in world.puzzles("heldout", 8):
        record, maps = source(base, [question]).record(question)
        assert record["response"] is None
        assert [heat.shape for heat in maps] == [(4, 4)]
        read = {name for name in all_lines() if name in question.solution}
        right += record["hint"] is not None and set(record["hint"]["look"]) == read
    assert right >= 7


@torch.no_grad()
def test_any_model_class_any_number_of_images_and_any_shape(tiny):
    """A random model looks anywhere, so a hint may be missing; but boxes lie in their images."""
    images = [Image.new("RGB", (140, 84), "red"), Image.new("RGB", (56, 112), "blue")]
    question = Question("a", "Which?", "9", images, solution="the top row is red . So \\boxed{ 9 }")
    hints = OwnHints(OwnResponses(*tiny, 2, 4), (0, 1), [question])
    hints.parts = lambda question, response: {"steps": ("compare the pictures",)}
    record, maps = hints.record(question)
    assert [heat.shape for heat in maps] == [(3, 5), (4, 2)]
    assert record["hint"] or record["rejected"] == [["no region stands out"]]
    for boxes, image in zip(record["boxes"], images, strict=True):
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= image.width and 0 <= top < bottom <= image.height


# ------------------------------------------------------------------------------------- the layers
@pytest.mark.slow
def test_the_layers_are_chosen_once_per_model_and_kept(base, tmp_path, monkeypatch, capsys):
    drawn = spy(monkeypatch, own_hints, "sample_groups", lambda *args, **kwargs: len(args[2]))
    monkeypatch.setattr(own_hints, "LAYER_QUESTIONS", 24)
    cache = tmp_path / "h.layers.json"
    questions = puzzles(40)
    assert layers_for(OwnResponses(*base, SAMPLES, 48), questions, "a", cache) == LAST
    assert drawn == [16, 8]
    saved = json.loads(cache.read_text())
    assert saved["model"] == "a" and saved["layers"] == [2] and saved["questions"] >= 2
    assert saved["scores"][2] > 0.5 > max(saved["scores"][:2])
    assert layers_for(OwnResponses(*base, SAMPLES, 48), questions, "a", cache) == LAST
    assert len(drawn) == 2
    assert capsys.readouterr().out.count(str(cache)) == 2
    layers_for(OwnResponses(*base, SAMPLES, 48), questions, "another", cache)
    assert len(drawn) == 4


def test_where_nothing_tells_the_layers_apart_all_are_read(base, tmp_path, capsys):
    cache = tmp_path / "h.layers.json"
    own = OwnResponses(*base, 1, 48)  # no question can have two right responses
    assert layers_for(own, puzzles(2), "a", cache) == (0, 1, 2)
    assert not cache.exists()
    assert "0 questions did not tell them apart" in capsys.readouterr().out
    assert scores_of_layers(own, []).shape == (0, 3)


# -------------------------------------------------------------------------------------- the steps
QUESTION = Question("a", "Which of the 3 bars is highest?", "7", [Image.new("RGB", (90, 90))])
LOOK = Hint(look=("the upper left",))
PROSE = "- Find the bars.\n2. Compare their heights against the axis.\n"


@pytest.fixture
def say(base, monkeypatch):
    """say(*replies) -> OwnHints whose model writes these texts in turn; asked: its prompts."""

    def set_replies(*replies):
        waiting = list(replies)

        def reply(model, processor, prompts, count, **settings):
            asked.append(processor.tokenizer.decode(prompts[0].ids))
            [[response]] = sample_groups(model, processor, prompts, 1, max_new_tokens=1)
            response.text, response.truncated = waiting.pop(0), False
            return [[response]]

        monkeypatch.setattr(own_hints, "sample_groups", reply)
        hints = source(base, [QUESTION], parts=None, tries=len(replies))
        return hints, asked

    asked = []
    return set_replies


def test_steps_are_asked_for_in_words_and_screened(say):
    replies = ["The highest bar is 7.", "Read the 2 bars.", "", PROSE]
    hints, asked = say(*replies)
    hint, rejected = hints._with_steps(QUESTION, "So \\boxed{7}", LOOK)
    steps = ("Find the bars.", "Compare their heights against the axis.")
    assert hint == Hint(look=LOOK.look, steps=steps)
    assert len(asked) == 4
    kinds = [[reason.partition(":")[0] for reason in reasons] for reasons in rejected]
    assert all(set(reasons) == {"steps"} for reasons in kinds)
    assert "holds the answer" in rejected[0][0]
    assert rejected[1] == ["steps: a number: 2"]
    assert rejected[2] == ["steps: none"]


def test_steps_that_never_pass_leave_the_hint_without_them(say):
    hints, _ = say("It is 7.", "1. look\n2. turn\n3. go\n4. see\n5. read")
    hint, rejected = hints._with_steps(QUESTION, "So \\boxed{7}", LOOK)
    assert hint == LOOK
    assert len(rejected) == 2
    assert rejected[1] == ["steps: is a worked solution: 5 steps"]


def test_a_number_of_the_question_may_stand_in_a_step(say):
    hints, _ = say("Compare the 3 bars.")
    hint, rejected = hints._with_steps(QUESTION, "So \\boxed{7}", LOOK)
    assert hint.steps == ("Compare the 3 bars.",) and rejected == []


def test_a_response_with_special_text_is_asked_about_as_text(say):
    hints, _ = say(PROSE)
    hint, _ = hints._with_steps(QUESTION, "<image> or <|image_pad|>, so \\boxed{7}", LOOK)
    assert len(hint.steps) == 2


def test_a_thinking_model_s_steps_stand_behind_its_thinking(say):
    hints, _ = say(f"I see 7 bars.</think>\n{PROSE}")
    assert len(hints._with_steps(QUESTION, "So \\boxed{7}", LOOK)[0].steps) == 2


# ------------------------------------------------------------------- the embedded model's own rule
def test_the_rule_gives_the_parts_of_the_world_s_own_hints():
    for puzzle in world.puzzles("tune", 12):
        parts = toy_hints.hint_parts(puzzle, puzzle.solution)
        assert parts == {"steps": puzzle.hint.steps}
        assert toy_hints.hint_parts(puzzle, "The answer is \\boxed{ 7 }") == {}


def test_places_have_the_world_s_words():
    for line in [(kind, index) for kind in ("row", "column") for index in range(4)]:
        box = tuple(side // world.CELL for side in world.line_box(line))
        assert toy_hints.name_place(box, (4, 4)) == world.line_name(line)
    assert toy_hints.name_place((0, 0, 2, 2), (4, 4)) == "the upper left"
    assert toy_hints.name_place((0, 0, 8, 2), (8, 8)) == "the first row from the top"
    assert toy_hints.name_place((0, 0, 4, 1), (4, 4), exact=False) == (
        "the upper part, from left to right"
    )


def test_the_student_reads_the_same_prompt(base):
    """Responses are drawn where no hint is shown."""
    [question] = puzzles(1)
    [ours] = OwnResponses(*base, 1, 4).prompts([question])
    [plain] = encode_prompts(base[1], [question], [student_messages(question)])
    assert torch.equal(ours.ids, plain.ids)
