"""plumbing/hint_rules.py and the builder that obeys it: labelled hints, and each rule by itself."""

import json
import time
from collections import Counter

import pytest
from conftest import ROOT

from hints import Hint, build_hint
from plumbing.hint_rules import broken_rules
from rollout import Question
from toy import world


def labelled():
    """The rows of tests/worked_solutions.tsv: verdict, half, question, look, ignore, steps."""
    lines = (ROOT / "tests" / "worked_solutions.tsv").read_text(encoding="utf-8").splitlines()
    for line in lines[1:]:
        verdict, half, question, *parts = line.split("\t")
        yield verdict, half, question, *(part.split(" | ") for part in parts)


def worked(*steps, question="How long is x?"):
    """What the rule on worked solutions says about these steps."""
    return broken_rules(("the bar",), (), steps, question, ["a.png"])


def test_labelled_worked_solutions(capsys):
    """The rule was made on the half "tune"; the half "test" was judged once, when it was done.

    Precision: the share of worked solutions in what is rejected. Recall: the share of worked
    solutions that is. The test names the cases with a wrong verdict too.
    """
    counts, wrong = Counter(), []
    for verdict, half, question, look, ignore, steps in labelled():
        reasons = broken_rules(look, ignore, steps, question, ["a.png"])
        assert "omits the visual evidence" not in reasons
        counts[half, verdict, bool(reasons)] += 1
        if (verdict == "worked") != bool(reasons):
            wrong.append((half, verdict, steps[0]))
    for half in ("tune", "test"):
        hits, missed = counts[half, "worked", True], counts[half, "worked", False]
        false_alarms, passed = counts[half, "fine", True], counts[half, "fine", False]
        assert hits + missed >= 12 and false_alarms + passed >= 12
        precision, recall = hits / (hits + false_alarms), hits / (hits + missed)
        with capsys.disabled():
            print(
                f"\nworked solutions, {half}: {hits + missed} and {false_alarms + passed} fine;",
                f"precision {precision:.3f}, recall {recall:.3f}",
            )
    assert wrong == [("test", "worked", "the slope is m = (11 - 7)/(4 - 2) = 2")]


@pytest.mark.parametrize(
    "look, images, omits",
    [
        ((), ["a.png"], True),
        (("the picture", "the whole image."), ["a.png"], True),
        (("the picture", "the top row"), ["a.png"], False),
        (("the top of the picture",), ["a.png"], False),
        (("the picture's top row",), ["a.png"], False),
        ((), [], False),
    ],
)
def test_a_hint_on_a_picture_names_a_place(look, images, omits):
    reasons = broken_rules(look, (), ("compare them",), "Which?", images)
    assert reasons == (["omits the visual evidence"] if omits else [])


def test_four_steps_and_150_words_are_the_limit():
    assert worked("a", "b", "c", "d") == []
    assert worked("a", "b", "c", "d", "e") == ["is a worked solution: 5 steps"]
    numbered = "1. Read it. 2. Note it. (3) Add. 4) Halve."
    assert worked(numbered) == []
    assert worked(numbered, "state it") == ["is a worked solution: 5 steps"]
    assert worked("word " * 148) == []  # with "the bar": 150
    assert worked("word " * 149) == ["is a worked solution: 151 words"]


def test_a_chain_names_what_was_seen():
    reasons = worked("add them: 12 + 5 = 17", "then 17 * 2 = 34")
    expected = "add them: 12 + 5 = 17, then 17 * 2 = 34"
    assert reasons == [f"is a worked solution: chained results: {expected}"]


@pytest.mark.parametrize(
    "steps",
    [
        "so x = 3, so y = 6",
        "the angles are 140 degrees, each is 70 degrees",
        "the bowl makes nine apples and the table gives five",
        "it is 1,200 and drops to a total, which equals 0.5",
        "so AB = 2r, hence A = r^2\\sqrt{3}",
        "the area is 15\\pi, the other one is \\frac{1}{3}",
        "so A grows, hence B shrinks, therefore C stays",
    ],
)
def test_chains(steps):
    assert len(worked(steps)) == 1


@pytest.mark.parametrize(
    "steps",
    [
        "12 + 5 = 17",  # one result is no chain; find_spoilers rejects it
        "the areas form a progression, ABCD - EFGH = EFGH - IJKL, so that IJKL = KLMN",
        "so AB = CD, hence BC = DA",
        "c = 12 + x, d = 2.5 * y, a = 35 - z",
        "a = 2b, b = 3c",
        "a right angle is 90 degrees, the sum is 180 degrees",
        "use C = 2\\pi r, V = 4\\pi r^3, A = 1/2 (a + b), AB = 2AC, x = 2y and c = 2 * r",
        "the first is 3 times as long, the second is 5 times as long",
        "the first one is the blue one, the second gives two triangles, the third makes two more",
        "so far so good, but go on so that none is counted twice",
    ],
)
def test_no_chains(steps):
    assert worked(steps) == []


def test_numbers_of_the_question_count_only_behind_arithmetic():
    question = "The sides are 3 and 1,200. How long is the third?"
    assert worked("one is 3, the next is 1200, the last is 1200", question=question) == []
    assert worked("sqrt(25 - 16) = 3, 600 * 2 = 1200", question=question)


def test_no_text_takes_long():
    begin = time.monotonic()
    for text in ("so " * 60000, "=1" * 60000, "1" * 90000, "12 + 5 = 17, " * 9000, "= " * 60000):
        worked(text)
    assert time.monotonic() - begin < 20


def test_the_hints_of_puzzles_break_no_rule():
    for puzzle in world.puzzles("train", 200):
        hint = puzzle.hint
        assert broken_rules(hint.look, hint.ignore, hint.steps, puzzle.text, puzzle.images) == []


GOOD = {"look": ["the tallest bar"], "ignore": ["the legend"], "steps": ["read its top"]}


@pytest.mark.parametrize(
    "faulty, reason",
    [
        ({**GOOD, "look": []}, "omits the visual evidence"),
        ({**GOOD, "steps": ["read", "note", "add", "halve", "round"]}, "is a worked solution"),
        ({**GOOD, "steps": ["one is 30 high, so the other is 45 high"]}, "is a worked solution"),
        ({**GOOD, "ignore": ["word " * 150]}, "is a worked solution"),
    ],
)
def test_the_builder_asks_again_with_the_reason(faulty, reason):
    replies, chats = [json.dumps(faulty), json.dumps(GOOD)], []

    def ask(question, messages):
        chats.append(messages)
        return replies[len(chats) - 1]

    question = Question("q", "How high is it?", "7", ["a.png"])
    hint, [reasons] = build_hint(ask, question)
    assert hint == Hint.from_json(GOOD)
    [rejected] = [text for text in reasons if text.startswith(reason)]
    assert rejected in chats[1][2]["content"][0]["text"]
