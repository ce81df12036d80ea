"""plumbing/spoilers.py: labelled hints, and texts that try to break it."""

import random
from collections import Counter

import pytest
from conftest import ROOT, read_jsonl

from hints import Hint
from plumbing.spoilers import find_spoilers
from toy import world


def labelled():
    """The rows of tests/spoilers.tsv: verdict, answer, question, options, hint."""
    lines = (ROOT / "tests" / "spoilers.tsv").read_text(encoding="utf-8").splitlines()
    for line in lines[1:]:
        verdict, answer, question, options, text = line.split("\t")
        yield verdict, answer, question, options.split(";") if options else None, text


# What no rule sees, and what one sees that is none, by the first words of the hint.
KNOWN_FAULTS = {
    "the left pan is lower",  # "greater than" for a lone sign
    "the cats outnumber the dogs",
    "take the third letter",
    "each new figure gets two sticks",  # "each" makes a two innocent
    "the column of May is taller",  # the month is a common word too
    "months come in order",  # "such charts" are no option
    "a line that falls from left",  # a definition of the answer alone
    "the subtotal at the bottom",  # 10 % as a step
    "the heights of all bars",  # the step of an axis
    "both slopes come out the same",  # other words
    "one calcium needs two",  # a sum for the reader
    "the peak lies one tick after",  # a count from another name
    "the rose has eight points",  # a fact that is in no table
    "the curve's height at",  # "curve s"
    "the label s stands",
    "find north and east on the rose",
    "he bends down to tie",  # Tying
    "he ties a knot",
    "the first one falls on the 3rd",  # the question has a 3, too
    "the first Tuesday is the 3rd",
    "the month begins on Sunday the 1st",
    "it is the seventeenth",
    "A) sides first",  # letters of steps that are letters of options
    "two of the options are too short",
    "step of five per line",  # as "in steps of five"
    "between 3.5 and 5.5",  # as a list of candidates
    "A falls short of B",
    "$c_1 > c_2$",  # names by index
    "only the first jug exceeds half",
    "the claim cannot be upheld",
    "all sectors add up to 100 %",  # "a quarter" of the full angle, where 25 % is sought
    "the line crosses one unit below",  # "one" is read as a pronoun
    "it meets the axis at minus one",
    "work from the inside",  # as an inventory
    "the axis is in hundred thousands",
}


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
    faults = {start for start in KNOWN_FAULTS if any(text.startswith(start) for text in wrong)}
    assert faults == KNOWN_FAULTS and len(wrong) == len(KNOWN_FAULTS)


def test_fresh_hints():
    """Hints by writers who did not know the rules, which were mended on all parts but the tenth."""
    rejected = Counter()
    cases = read_jsonl(ROOT / "tests" / "spoilers_fresh.jsonl")
    for case in cases:
        hint = Hint(**{name: tuple(phrases) for name, phrases in case["hint"].items()})
        reasons = find_spoilers(hint.text, case["question"], case["answer"], case["choices"])
        kind = "honest"
        if case["leak"]:
            kind = "lexical leak" if case["lexical"] else "other leak"
        rejected[kind, bool(reasons)] += 1
        rejected[f"{case['part']} {kind}", bool(reasons)] += 1
    assert len(cases) == 3456
    assert rejected["lexical leak", True] >= 0.88 * 1190
    assert rejected["honest", True] <= 0.01 * 2031
    assert rejected["sixth lexical leak", True] >= 0.9 * 108
    assert rejected["sixth honest", True] <= 0.03 * 140
    assert rejected["seventh lexical leak", True] >= 0.96 * 93
    assert rejected["seventh honest", True] <= 0.01 * 144
    assert rejected["eighth lexical leak", True] >= 0.8 * 186
    assert rejected["eighth honest", True] <= 0.01 * 288
    assert rejected["ninth lexical leak", True] >= 0.83 * 186
    assert rejected["ninth honest", True] <= 0.01 * 288
    # no rule was mended on these
    assert rejected["tenth lexical leak", True] >= 0.8 * 187
    assert rejected["tenth honest", True] <= 0.05 * 288


# One sentence for each class: question, answer, options, hint.
HONEST = [
    (
        "Which kind of rock is it?",
        "sedimentary",
        ["igneous", "sedimentary", "metamorphic"],
        "igneous rock cools from magma. Sedimentary rock is pressed. Metamorphic rock is changed",
    ),
    (
        "Which shop is the cheapest?",
        "Shop C",
        ["Shop A", "Shop B", "Shop C"],
        "shop A sells by weight; for shop B, multiply by the number of bags; shop C takes a fee",
    ),
    (
        "What maps P to Q?",
        "rotation",
        ["translation", "rotation", "reflection"],
        "a translation slides and a reflection flips a figure",
    ),
    ("How long is it?", "45", None, "the answer is a number of minutes, not of hours"),
    ("Which process is arrow number 3?", "red", None, "ignore arrows 1, 2 and 4"),
    ("How much money is it?", "91", None, "count the pennies (1 cent) and quarters (25 cents)"),
    ("What do the blocks show?", "243", None, "a rod is worth 10, a flat stands for 100"),
    ("Find the angle.", "105", None, "the minute hand moves 6 degrees per minute"),
    ("Find x.", "7", None, "in a 45-45-90 triangle the hypotenuse is a leg times \\sqrt{2}"),
    ("Is a + b + c > 0?", "B", None, "look at x = 1 and at x = -1"),
    ("Is the claim true?", "No", ["Yes", "No"], "if so, the statement holds; if not, it fails"),
    ("Find the area.", "1/2", None, "use the formula 1/2 bh with the base on the axis"),
    ("Find v.", "3", None, "the intercept equals 1/V_{max}, the other one -1/K_m"),
    ("Find the period.", "\\pi", None, "in general the period is 2\\pi/|B|"),
    ("Which digit is T?", "1", None, "with a carry no column can exceed 19"),
    ("Which bone is next to B?", "47", ["37", "47"], "what remains is the angle at B."),
    ("Which digit is it?", "6", None, "look at the $3\\times3$ block"),
    ("Which digit is it in the 4 x 4 sudoku?", "1", None, "cross out from the list 1, 2, 3, 4"),
    ("Where does f fall?", "(-1, 2)", None, "test with two sample points inside"),
    ("How many are free?", "4", None, "the answer is |C \\setminus O|"),
    ("What is f(3)?", "7", None, "the height at 2, an easy misread"),
    ("It leaves at 2:40 pm. When is it there?", "5:15 pm", None, "find the column of 14:40"),
    ("How much is 250 ml of it?", "30 g", None, "250 ml are 0.25 l"),
    ("What is the total with 20 % tax?", "144", None, "multiply the net sum by 1.2"),
    ("Which subject is it?", "Budget review", None, "the preview text is grey"),
    ("Find x.", "2", None, "multiply the two segments of AB and the two of CD"),
]
LEAKS = [
    ("Who leads?", "Bea", ["Ann", "Bea", "Cid"], "Bea is ahead of Ann, and Cid trails"),
    (
        "Which kind of rock is it?",
        "sedimentary",
        ["igneous", "sedimentary", "metamorphic"],
        "igneous rock would show crystals, metamorphic rock bands. The layers here are sedimentary",
    ),
    ("Which house is it?", "B", None, "the answer is the house that has the red roof"),
    ("How much money is it?", "95", None, "the quarters make 75 cents"),
    ("Which inequality is it?", "x \\geq -2", None, "x is at least minus two"),
    ("How probable is red?", "1/6", None, "one of the six faces is red"),
    ("By how many percent?", "20%", None, "it rose by a fifth"),
    ("Which criterion?", "SSS", ["SSS", "SAS"], "it is the side-side-side criterion"),
    ("Which gas?", "oxygen", ["oxygen", "hydrogen"], "it feeds the flame, so O2 escapes"),
    ("Which net?", "D", ["A", "B", "C", "D"], "only the last one in the list folds"),
    ("Which net?", "D", ["A", "B", "C", "D"], "the first three candidates fail"),
    ("Which net?", "B", ["A", "B", "C"], "take the one in the middle of the answer row"),
    ("Which way?", "southwest", ["north", "southwest"], "it is to the south and to the west"),
    ("Which movement?", "Cubism", ["Cubism", "Realism"], "it is by a cubist"),
    ("Find the resistance.", "9", None, "here R = 2, then add the rest"),
    ("How many children?", "7", None, "four boys sit on the bench; add the girls"),
    ("What is the bill?", "$9.75", None, "a tea costs $2.25"),
    ("What is the sign of a?", "negative", None, "so a is less than zero"),
    ("Compare.", ">", [">", "<", "="], "the first fraction is greater than the second"),
    (
        "Which type?",
        "cubic",
        ["linear", "quadratic", "cubic"],
        "linear is out; the quadratic one can be dropped",
    ),
    ("Which of the statements is true?", "C", ["a b", "c d", "e f"], "the third claim agrees"),
]


@pytest.mark.parametrize(("question", "answer", "choices", "text"), HONEST)
def test_an_honest_sentence_passes(question, answer, choices, text):
    assert find_spoilers(text, question, answer, choices) == []


@pytest.mark.parametrize(("question", "answer", "choices", "text"), LEAKS)
def test_a_leak_in_other_words_is_found(question, answer, choices, text):
    assert find_spoilers(text, question, answer, choices)


def test_no_good_hint_of_the_worked_solutions_is_refused():
    lines = (ROOT / "tests" / "worked_solutions.tsv").read_text("utf-8").splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    hints = {"; ".join(row[3:]).replace(" | ", "; "): row[2] for row in rows if row[0] == "fine"}
    assert len(hints) == 25
    for text, question in hints.items():
        assert find_spoilers(text, question, "unanswered") == [], text


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


def test_more_options_than_letters_are_read():
    options = [f"town {name}" for name in "abcdefghijkl"]
    others = "; ".join(f"it cannot be {name}" for name in options[:9])
    assert find_spoilers(others, "Which town?", "town l", options) == []
    others = "; ".join(f"it cannot be {name}" for name in options[:11])
    assert find_spoilers(others, "Which town?", "town l", options) == ["excludes all other options"]


def test_long_decimals_and_broken_letters_are_read():
    assert find_spoilers("about 0." + "3" * 350, "How long is it?", "\\sqrt{2}")
    assert find_spoilers("look at the left one", "Which one?", "\n(B") == []
    assert find_spoilers("it is (B)", "Which one?", "\nB)")
