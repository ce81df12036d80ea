"""plumbing/spoilers.py: labelled hints, and texts that try to break it."""

import random
from collections import Counter

from conftest import ROOT

from plumbing.spoilers import find_spoilers
from toy import world


def labelled():
    """The rows of tests/spoilers.tsv: verdict, answer, question, options, hint."""
    lines = (ROOT / "tests" / "spoilers.tsv").read_text(encoding="utf-8").splitlines()
    for line in lines[1:]:
        verdict, answer, question, options, text = line.split("\t")
        yield verdict, answer, question, options.split(";") if options else None, text


def test_labelled_spoilers(capsys):
    """Precision: the share of spoilers in what is rejected. Recall: the share of spoilers that is.

    Each rule has few cases, so a rule that stops working hardly moves the two numbers. So the test
    names the cases with a wrong verdict too.
    """
    counts = Counter()
    wrong = {}
    for verdict, answer, question, choices, text in labelled():
        reasons = find_spoilers(text, question, answer, choices)
        counts[verdict, bool(reasons)] += 1
        if (verdict == "spoiler") != bool(reasons):
            wrong[text] = f"{verdict}: {text!r} for {answer!r}: {reasons}"
    hits, missed = counts["spoiler", True], counts["spoiler", False]
    false_alarms, passed = counts["clean", True], counts["clean", False]
    precision, recall = hits / (hits + false_alarms), hits / (hits + missed)
    with capsys.disabled():
        print(
            f"\nfind_spoilers: {hits + missed} spoilers and {false_alarms + passed} clean hints;",
            f"precision {precision:.3f}, recall {recall:.3f}",
        )
        print(*(f"  {case}" for case in wrong.values()), sep="\n")
    assert hits + missed >= 100 and false_alarms + passed >= 100
    assert precision >= 0.97 and recall >= 0.97
    assert set(wrong) == {"half past two", "30 minutes past 2"}


def test_a_number_of_the_question_may_be_cited_but_not_computed():
    assert find_spoilers("start at 50", "Is 50 more?", "50") == []
    assert find_spoilers("25 + 25 = 50", "Is 50 more?", "50")


def test_three_thousand_puzzle_hints_hold_no_spoiler():
    for index in range(3000):
        puzzle = world.make_puzzle("train", index)
        hint, question = world.hint(puzzle), world.question_text(puzzle)
        assert find_spoilers(hint.text, question, str(puzzle.answer)) == []
        # no count, sum or intermediate result in any form
        assert not any(character.isdigit() for character in hint.render())
        assert not any(gem in hint.render() for gem in ("red", "green", "blue"))


PIECES = [
    *("\\frac{", "}", "{", "^", "=", "-", "\\boxed{", ";"),
    *("(A) ", "B.", "hundred ", "one half ", " and "),
    *("1/0", "9" * 400, "e9999"),
    *("\x00", "½", "\U0001d7d9", "ⅷ", "\ud800"),
]


def test_no_text_breaks_the_spoiler_check():
    rng = random.Random(0)

    def noise():
        return "".join(rng.choices(PIECES, k=rng.randint(0, 12)))

    for _ in range(100):
        text, question, answer = "x" + noise(), "x" + noise(), noise()
        assert isinstance(find_spoilers(text, question, answer), list)
    find_spoilers("hundred " * 3000, "?", "7")
