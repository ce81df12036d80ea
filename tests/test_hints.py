"""hints.py: the hint, the teacher's chat, hints from an expert and from attention."""

import json
from dataclasses import asdict

import pytest
import torch
from PIL import Image

from hints import (
    CONTEXTS,
    INSTRUCTION,
    Hint,
    NoReply,
    Rejected,
    attention_hint,
    build_hint,
    parse_reply,
    screen_hints,
    teacher_messages,
)
from rollout import FORMAT_PROMPT, Question, student_messages
from toy import world

HINT = Hint(
    look=("the red bar", "its label"),
    ignore=("the legend.",),
    steps=("read the height", "compare it"),
)
RENDERED = """\
Hint:
- Look at: the red bar; its label.
- Ignore: the legend.
- Steps: read the height; compare it."""


# -------------------------------------------------------------------------------------------- hints
def test_json_both_ways():
    assert Hint.from_json(json.dumps(asdict(HINT))) == HINT
    assert Hint.from_json(asdict(HINT)) == HINT
    assert Hint.from_json("Compare the two bars.") == Hint(steps=("Compare the two bars.",))
    filled = {"look": None, "ignore": None, "steps": ["count"]}  # as a table fills in what lacks
    assert Hint.from_json(filled) == Hint(steps=("count",))


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"look": "x"}, "lists of texts"),
        ({"where": ["x"]}, "unknown hint field 'where'"),
        ({"look": [""]}, "'look'"),
        ({"steps": [3]}, "'steps'"),
        ({}, "at least one"),
        ({"look": ["the <image>"]}, "special token"),
        ({"look": ["<|image_pad|>"]}, "special token"),
        ([1], "got list"),
        ("{broken", "property name"),
    ],
)
def test_bad_hints(bad, message):
    with pytest.raises(ValueError, match=message):
        Hint.from_json(bad)


def test_a_comparison_of_absolute_values_is_no_special_token():
    assert Hint(steps=("use |x|<|y|",)).steps == ("use |x|<|y|",)


def test_a_text_is_no_part_of_a_hint():
    with pytest.raises(ValueError, match="'look' must be a list of non-empty texts"):
        Hint(look="the bar")


def test_render_has_every_phrase_once_and_no_empty_part():
    assert HINT.render() == RENDERED
    assert "Ignore" not in Hint(look=("a",)).render()


def test_the_text_for_the_spoiler_check_has_every_phrase():
    assert HINT.text == "the red bar; its label; the legend.; read the height; compare it"


# ------------------------------------------------------------------------------- the teacher's chat
def test_the_teacher_reads_the_student_s_prompt_plus_the_hint():
    question = Question("a", "How high is it?", "12", ["one.png", "two.png"], HINT)
    plain = student_messages(question)[0]["content"]
    hinted = teacher_messages(question)[0]["content"]
    assert plain[:2] == hinted[:2] == [{"type": "image"}] * 2
    plain_text, hinted_text = plain[-1]["text"], hinted[-1]["text"]
    assert RENDERED not in plain_text
    assert plain_text.endswith(FORMAT_PROMPT)
    assert RENDERED in hinted_text
    assert hinted_text.replace(RENDERED + "\n", "") == plain_text


def test_the_other_teachers_of_the_comparison():
    question = Question("a", "How high is it?", "12", ["one.png"], HINT, solution="It is 12.")
    contents = {context: teacher_messages(question, context)[0]["content"] for context in CONTEXTS}
    texts = {context: content[-1]["text"] for context, content in contents.items()}
    assert all(content[0] == {"type": "image"} for content in contents.values())
    assert texts["hint"] == teacher_messages(question)[0]["content"][-1]["text"]
    assert "The answer is 12." in texts["answer"]
    assert "It is 12." not in texts["answer"]
    assert "A solution: It is 12." in texts["solution"]
    assert teacher_messages(question, "none") == student_messages(question)
    with pytest.raises(ValueError, match="one of hint, answer, solution, none, got 'answers'"):
        teacher_messages(question, "answers")


@pytest.mark.parametrize(
    "context, has_one", [("hint", False), ("answer", True), ("solution", False), ("none", True)]
)
def test_a_teacher_that_lacks_its_context_has_no_chat(context, has_one):
    bare = Question("a", "How high is it?", "12", ["one.png"])
    assert (teacher_messages(bare, context) is not None) == has_one


def test_spoilers_and_long_hints_are_taken_away_whole(base):
    questions = world.puzzles("tune", 5)
    questions[1].hint = Hint(steps=(f"the sum is {questions[1].answer}",))
    questions[2].hint = Hint(steps=("read " * 60,))
    questions[4].hint = None
    assert screen_hints(questions, base[1].tokenizer, 60) == {
        "spoilers": [questions[1].id],
        "too long": [questions[2].id],
    }
    assert [bool(question.hint) for question in questions] == [True, False, False, True, False]
    assert questions[0].hint == world.hint(world.make_puzzle("tune", 0))


# ----------------------------------------------------------------------------- hints from an expert
GOOD = json.dumps(
    {
        "look": ["the tallest bar"],
        "ignore": ["the legend"],
        "steps": ["read its top against the axis"],
    }
)


@pytest.mark.parametrize(
    "reply",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}\n```",
        f"<think>the answer is 7 {{</think>\n{GOOD}",
        f"so {{...</think>{GOOD}",
    ],
)
def test_replies_that_are_hints(reply):
    assert parse_reply(reply) == Hint.from_json(GOOD)


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("", "not a JSON object"),
        ("I cannot help with that.", "not a JSON object"),
        (GOOD[:-9], "not a JSON object"),
        (f"Here it is: {GOOD}", "not a JSON object"),
        (f"[{GOOD}]", "not a JSON object"),
        ('"look"', "not a JSON object"),
        ("{}", "wrong fields"),
        ('{"look": "the bar"}', "wrong fields"),
        ('{"look": [7]}', "wrong fields"),
        ('{"look": ["a"], "answer": ["7"]}', "wrong fields"),
        ("[" * 10**5, "not a JSON object"),
        (f"<think>{GOOD}", "not a JSON object"),
    ],
)
def test_replies_that_are_none(reply, reason):
    with pytest.raises(Rejected, match=reason):
        parse_reply(reply)


QUESTION = Question("q", "How many bars are red?", "7", ["a.png", "b.png"], choices=["7", "9"])
SPOILING = json.dumps({"look": ["the seven red bars"]})


def scripted(*replies):
    """An expert that gives these replies in turn, and the list of the chats that it was shown."""
    chats, left = [], list(replies)

    def ask(question, messages):
        chats.append(messages)
        reply = left.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    return ask, chats


def texts(chat):
    """The last text of each turn."""
    return [turn["content"][-1]["text"] for turn in chat]


def test_an_expert_is_shown_images_question_options_and_answer():
    ask, chats = scripted(GOOD)
    assert build_hint(ask, QUESTION) == (Hint.from_json(GOOD), [])
    [[turn]] = chats
    assert turn["role"] == "user"
    assert turn["content"][:2] == [{"type": "image"}] * 2
    text = turn["content"][-1]["text"]
    assert text.startswith(INSTRUCTION)
    assert QUESTION.text in text
    assert "answer (never in the hint): 7" in text
    assert "(B) 9" in text
    assert "zero" not in text


def test_a_spoiling_hint_is_asked_for_again_with_the_reasons():
    cut_off = Rejected("cut off: the reply reached 9 tokens")
    ask, chats = scripted(f"<think>7</think>{SPOILING}", cut_off, GOOD)
    hint, rejected = build_hint(ask, QUESTION, max_tries=3)
    assert hint == Hint.from_json(GOOD)
    assert rejected == [["holds the answer's number: 7"], [str(cut_off)]]
    opening, after_one, after_two = chats
    assert [turn["role"] for turn in opening] == ["user"]
    assert [turn["role"] for turn in after_one] == ["user", "assistant", "user"]
    assert [turn["role"] for turn in after_two] == ["user", "assistant", "user"]
    assert after_one[0] == after_two[0] == opening[0]
    assert texts(after_one)[1] == SPOILING, "the thinking is not shown again"
    assert "holds the answer's number: 7" in texts(after_one)[2]
    assert texts(after_two)[1] == "(nothing)"
    assert "cut off" in texts(after_two)[2]
    assert "answer's number" not in texts(after_two)[2]


def test_after_the_last_try_the_question_stays_without_a_hint():
    ask, chats = scripted("no", "no", GOOD)
    assert build_hint(ask, QUESTION, 2) == (None, [["not a JSON object"]] * 2)
    assert len(chats) == 2


def test_an_expert_that_is_not_reached_costs_no_try():
    ask, _ = scripted(NoReply("x"))
    with pytest.raises(NoReply):
        build_hint(ask, QUESTION)


# ----------------------------------------------------------------- hints from the model's attention
def column_heat(column):
    """A map (4, 4) that is hot in one column."""
    heat = torch.zeros(4, 4)
    heat[:, column] = 9
    return heat


COLUMN = Question("a", "Which column holds the star?", "fifth", [Image.new("RGB", (100, 200))])


def test_an_attention_hint_that_would_name_the_answer_says_it_without_ordinals():
    question = Question("a", COLUMN.text, "third", COLUMN.images)
    hint, reasons, boxes = attention_hint(question, [column_heat(2)])
    assert hint.look == ("the middle part, from top to bottom",)
    assert not reasons
    assert boxes == [[[50, 0, 75, 200]]]
    hint, *_ = attention_hint(COLUMN, [column_heat(2)])
    assert hint.look == ("the third column from the left",)


def test_an_attention_hint_without_a_region_is_none():
    hint, reasons, boxes = attention_hint(COLUMN, [torch.ones(4, 4)])
    assert (hint, reasons, boxes) == (None, ["no region stands out"], [[]])


def test_an_attention_hint_that_spoils_in_any_words_is_none():
    question = Question("a", "Where is the star?", "left", COLUMN.images)
    # "the first column from the left", "the left part"
    hint, reasons, boxes = attention_hint(question, [column_heat(0)])
    assert hint is None
    assert len(reasons) == 1
    assert "left" in reasons[0]
    assert boxes == [[[0, 0, 25, 200]]]


def test_an_attention_hint_names_the_picture_where_there_are_several():
    images = [Image.new("RGB", (100, 200)), Image.new("RGB", (40, 40))]
    maps = [column_heat(2), column_heat(0)]
    hint, _, boxes = attention_hint(Question("a", "Which?", "9", images), maps)
    assert hint.look == (
        "the third column from the left of the first picture",
        "the first column from the left of the second picture",
    )
    assert boxes == [[[50, 0, 75, 200]], [[0, 0, 10, 40]]]
