"""hints.py: the structure, the one template, and the spoiler check."""
import json

import pytest

from hints import Hint, find_spoilers, hinted_messages
from rollout import FORMAT_PROMPT, Sample, plain_messages
from toy import world

HINT = Hint(look=("the red bar", "its label"), ignore=("the legend.",), steps=("read the height", "compare it"))


def test_json_both_ways():
    assert Hint.from_json(HINT.to_json()) == HINT
    assert Hint.from_json(json.loads(HINT.to_json())) == HINT
    assert Hint.from_json("Compare the two bars.") == Hint(steps=("Compare the two bars.",))


@pytest.mark.parametrize("bad,message", [({"look": "x"}, "lists of texts"), ({"where": ["x"]}, "unknown hint field 'where'"),
                                         ({"look": [""]}, "'look'"), ({"steps": [3]}, "'steps'"), ({}, "at least one"),
                                         ([1], "got list"), ("{broken", "property name")])
def test_bad_hints(bad, message):
    with pytest.raises(ValueError, match=message):
        Hint.from_json(bad)


def test_render_has_every_phrase_once_and_no_empty_part():
    text = HINT.render()
    assert text == "Hint:\n- Look at: the red bar; its label.\n- Ignore: the legend.\n- Steps: read the height; compare it."
    assert "Ignore" not in Hint(look=("a",)).render()


def test_the_teacher_reads_the_student_s_prompt_plus_the_hint():
    sample = Sample("a", "How high is it?", "12", ["one.png", "two.png"], HINT)
    plain, hinted = plain_messages(sample)[0]["content"], hinted_messages(sample)[0]["content"]
    assert plain[:2] == hinted[:2] == [{"type": "image"}] * 2
    assert HINT.render() not in plain[-1]["text"] and plain[-1]["text"].endswith(FORMAT_PROMPT)
    assert HINT.render() in hinted[-1]["text"]
    assert hinted[-1]["text"].replace(HINT.render() + "\n", "") == plain[-1]["text"]


SPOILED = [("It is 12 cm high", "12"), ("the value is 0.5", "1/2"), ("half, so 50% of it", "0.5"), ("choose (B)", "B"), ("option c fits", "C"),
           ("B. is best", "B"), ("look at the red house", "Red House"), ("so 3 x 4 = 77", "90"), ("the answer is near the top", "7"),
           ("the correct option is the first", "A"), ("it is 1,200 wide", "1200"), ("use \\frac{1}{2} here", "0.5"),
           ("first Paris then go on", "Rome, Paris"), ("add 3 to the rest", "(3, 4)"), ("which gives 8", "9")]
CLEAN = [("count the bars from the left", "12"), ("look at a tall tree", "A"), ("the bottom row", "7"), ("see figure 5", "5"),
         ("a blue line crosses it", "B"), ("compare the redder bars", "red"), ("read the 120 label", "12"), ("I would start left", "I"),
         ("use the rule for angles", "30")]


@pytest.mark.parametrize("step,answer", SPOILED)
def test_spoilers_are_found(step, answer):
    assert find_spoilers(Hint(steps=(step,)), "What is in figure 5?", answer)


@pytest.mark.parametrize("step,answer", CLEAN)
def test_honest_hints_pass(step, answer):
    assert find_spoilers(Hint(steps=(step,)), "What is in figure 5?", answer) == []


def test_a_number_of_the_question_may_be_cited_but_not_computed():
    assert find_spoilers(Hint(steps=("start at 50",)), "Is 50 more?", "50") == []
    assert find_spoilers(Hint(steps=("25 + 25 = 50",)), "Is 50 more?", "50")


def test_ten_thousand_puzzle_hints_hold_no_spoiler():
    for i in range(10_000):
        puzzle = world.make_puzzle("train", i)
        hint, question = world.hint(puzzle), world.question(puzzle)
        assert find_spoilers(hint, question, str(puzzle.answer)) == []
        assert not any(c.isdigit() for c in hint.render())                      # no count, sum or intermediate result in any form
        assert not any(gem in hint.render() for gem in ("red", "green", "blue"))
