"""hints.py: the structure, the one template, and the spoiler check."""

import json

import pytest
import torch
from PIL import Image

import hints
from hints import Hint, NoReply, Rejected, build_hint, teacher_messages
from rollout import FORMAT_PROMPT, Question, encode_prompts, student_messages
from toy import world

HINT = Hint(
    look=("the red bar", "its label"),
    ignore=("the legend.",),
    steps=("read the height", "compare it"),
)


def test_json_both_ways():
    assert Hint.from_json(HINT.to_json()) == HINT
    assert Hint.from_json(json.loads(HINT.to_json())) == HINT
    assert Hint.from_json("Compare the two bars.") == Hint(steps=("Compare the two bars.",))


@pytest.mark.parametrize(
    "bad,message",
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


def test_render_has_every_phrase_once_and_no_empty_part():
    text = HINT.render()
    assert (
        text
        == "Hint:\n- Look at: the red bar; its label.\n- Ignore: the legend.\n- Steps: read the height; compare it."
    )
    assert "Ignore" not in Hint(look=("a",)).render()


def test_the_teacher_reads_the_student_s_prompt_plus_the_hint():
    sample = Question("a", "How high is it?", "12", ["one.png", "two.png"], HINT)
    plain, hinted = student_messages(sample)[0]["content"], teacher_messages(sample)[0]["content"]
    assert plain[:2] == hinted[:2] == [{"type": "image"}] * 2
    assert HINT.render() not in plain[-1]["text"] and plain[-1]["text"].endswith(FORMAT_PROMPT)
    assert HINT.render() in hinted[-1]["text"]
    assert hinted[-1]["text"].replace(HINT.render() + "\n", "") == plain[-1]["text"]


def test_the_other_teachers_of_the_comparison():
    sample = Question("a", "How high is it?", "12", ["one.png"], HINT, solution="It is 12.")
    texts = {c: teacher_messages(sample, c)[0]["content"][-1]["text"] for c in hints.CONTEXTS}
    assert all(
        teacher_messages(sample, c)[0]["content"][0] == {"type": "image"} for c in hints.CONTEXTS
    )
    assert texts["hint"] == teacher_messages(sample)[0]["content"][-1]["text"]
    assert "The answer is 12." in texts["answer"] and "It is 12." not in texts["answer"]
    assert "A solution: It is 12." in texts["solution"]
    assert teacher_messages(sample, "none") == student_messages(sample)
    bare = Question("a", "How high is it?", "12", ["one.png"])
    assert [teacher_messages(bare, c) is None for c in hints.CONTEXTS] == [True, False, True, False]


def test_spoilers_and_long_hints_are_taken_away_whole(base):
    samples = world.puzzles("tune", 4)
    samples[1].hint = Hint(steps=(f"the sum is {samples[1].answer}",))
    samples[2].hint = Hint(steps=("read " * 60,))
    assert hints.screen_hints(samples, base[1].tokenizer, 60) == {
        "spoilers": [samples[1].id],
        "too long": [samples[2].id],
    }
    assert [s.hint is not None for s in samples] == [True, False, False, True]
    assert samples[0].hint == world.hint(world.make_puzzle("tune", 0))


# ------------------------------------------------------------------------------------------------------------------ experts
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
    assert hints.parse_reply(reply) == Hint.from_json(GOOD)


@pytest.mark.parametrize(
    "reply,reason",
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
        (json.dumps({"look": ["word " * 201]}), "too long"),
        (f"<think>{GOOD}", "not a JSON object"),
    ],
)
def test_replies_that_are_none(reply, reason):
    with pytest.raises(Rejected, match=reason):
        hints.parse_reply(reply)


def scripted(*replies):
    """An expert that gives these replies in turn, and the list of the chats that it was shown."""
    chats, left = [], list(replies)

    def ask(sample, messages):
        chats.append(messages)
        reply = left.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    return ask, chats


QUESTION = Question("q", "How many bars are red?", "7", ["a.png", "b.png"], choices=["7", "9"])


def test_a_spoiling_hint_is_asked_for_again_with_the_reasons():
    bad = json.dumps({"look": ["the seven red bars"]})
    ask, chats = scripted(bad, Rejected("cut off: the reply reached 9 tokens"), GOOD)
    hint, rejected = build_hint(ask, QUESTION, 3)
    assert hint == Hint.from_json(GOOD) and rejected == [
        ["holds the answer's number: 7"],
        ["cut off: the reply reached 9 tokens"],
    ]
    first, second, third = chats
    assert [turn["role"] for turn in first] == ["user"] and [turn["role"] for turn in second] == [
        "user",
        "assistant",
        "user",
    ]
    assert first[0]["content"][:2] == [{"type": "image"}] * 2
    text = first[0]["content"][-1]["text"]
    assert (
        QUESTION.text in text
        and "answer (never in the hint): 7" in text
        and "(B) 9" in text
        and "zero" not in text
    )
    assert second[0] == third[0] == first[0] and second[1]["content"][0]["text"] == bad
    assert (
        "holds the answer's number: 7" in second[2]["content"][0]["text"]
        and "cut off" in third[2]["content"][0]["text"]
    )


def test_after_the_last_try_the_question_stays_without_a_hint():
    ask, chats = scripted("no", "no", GOOD)
    assert build_hint(ask, QUESTION, 2) == (None, [["not a JSON object"]] * 2) and len(chats) == 2
    with pytest.raises(NoReply):
        build_hint(scripted(NoReply("x"))[0], QUESTION)


# --------------------------------------------------------------------------------------------------------------- attention
def test_attention_maps_are_the_attention_of_a_plain_forward(tiny):
    """Against one uncached forward a prompt with output_attentions."""
    model, processor = tiny
    sample = world.puzzles("tune", 1)[0]
    sample.images, sample.answer = [sample.images[0].resize((140, 84)), sample.images[0]], "1 2"
    implementation = model.config.text_config._attn_implementation
    maps = hints.attention_maps(model, processor, sample, (0, 1))
    assert [m.shape for m in maps] == [
        (3, 5),
        (4, 4),
    ] and model.config.text_config._attn_implementation == implementation
    rows = []
    model.set_attn_implementation("eager")
    for question in (sample.text, "Describe the image."):
        chat = student_messages(Question("", question, "", sample.images))
        [prompt] = encode_prompts(processor, [sample], [chat])
        answer = processor.tokenizer("1 2")["input_ids"]
        ids = torch.cat([prompt.ids, torch.tensor(answer)]).unsqueeze(0)
        types = torch.cat([prompt.types, torch.zeros(2, dtype=torch.long)]).unsqueeze(0)
        with torch.no_grad():
            out = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=types,
                pixel_values=prompt.pixels,
                image_grid_thw=prompt.grid,
                output_attentions=True,
                use_cache=False,
            )
        rows.append(torch.stack(out.attentions).mean((0, 1, 2))[-2:, types[0].bool()].mean(0))
    model.set_attn_implementation(implementation)
    ratio = rows[0] / rows[1]
    for got, part in zip(maps, (ratio[:15].view(3, 5), ratio[15:].view(4, 4))):
        torch.testing.assert_close(got, part / part.mean(), rtol=1e-3, atol=1e-4)


def test_attention_layers_are_checked(base):
    with pytest.raises(ValueError, match="layers 1-9: the model has layers 0 to 2"):
        hints.attention_maps(*base, world.puzzles("tune", 1)[0], (1, 9))


def test_regions_are_the_hot_areas_hottest_first():
    heat = torch.zeros(6, 8)
    heat[1:3, 1:4] = 5
    heat[5, 7] = 9
    heat[4, 0] = 8
    heat[0, 7] = 7
    assert hints.regions(heat) == [(1, 1, 4, 3), (7, 5, 8, 6), (0, 4, 1, 5)]
    assert hints.regions(torch.ones(3, 3)) == []


@pytest.mark.parametrize(
    "box,exact,vague",
    [
        ((0, 0, 2, 2), "the upper left", None),
        ((6, 6, 8, 8), "the lower right", None),
        ((3, 3, 5, 5), "the middle of the picture", None),
        ((4, 0, 6, 8), "the third column from the left", "the middle part, from top to bottom"),
        ((0, 6, 8, 8), "the fourth row from the top", "the lower part, from left to right"),
        ((0, 0, 8, 8), "the whole picture", None),
        ((0, 3, 8, 6), "the middle part, from left to right", None),
        ((5, 3, 8, 4), "the middle right", None),
    ],
)
def test_places_in_words(box, exact, vague):
    assert hints.place_words(box, (8, 8)) == exact and hints.place_words(
        box, (8, 8), exact=False
    ) == (vague or exact)


def test_an_attention_hint_that_would_name_the_answer_says_it_without_ordinals(base, monkeypatch):
    heat = torch.zeros(4, 4)
    heat[:, 2] = 9
    monkeypatch.setattr(hints, "attention_maps", lambda *args: [heat])
    sample = Question("a", "Which column holds the star?", "third", [Image.new("RGB", (100, 200))])
    hint, reasons, _, boxes = hints.attention_hint(None, None, sample)
    assert (
        hint.look == ("the middle part, from top to bottom",)
        and not reasons
        and boxes == [[[50, 0, 75, 200]]]
    )
    sample.answer = "fifth"
    assert hints.attention_hint(None, None, sample)[0].look == ("the third column from the left",)
    monkeypatch.setattr(hints, "attention_maps", lambda *args: [torch.ones(4, 4)])
    assert hints.attention_hint(None, None, sample)[:2] == (None, ["no region stands out"])
