"""plumbing/answers.py: labelled answers, noise, answers in other forms, and the two judges."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, read_jsonl, write_jsonl

from plumbing import answers
from plumbing.answers import LONGEST_ANSWER, extract_answer, load_judge, same_answer


def labelled():
    """The rows of tests/answers.tsv: line number, right or not, gold answer, given one, options."""
    lines = (ROOT / "tests" / "answers.tsv").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith(("+", "-")):
            verdict, gold, given, *options = line.split("|")
            choices = options[0].split(";") if options else None
            yield number, verdict == "+", gold, given, choices


def boxed(answer):
    return f"So it is \\boxed{{{answer}}}."


def is_right(response, gold, choices=None, same=same_answer):
    """The verdict on a response: what rollout.verify does with a question's answer."""
    given = extract_answer(response)
    return given is not None and same(given, gold, choices)


@pytest.mark.parametrize(
    "text,answer",
    [
        ("so \\boxed{7}", "7"),
        ("\\boxed{1} no, \\boxed{ 2 }.", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("<answer> B </answer>", "B"),
        ("it is so\nAnswer: 12\n", "12"),
        ("\\boxed{3", None),
        ("7", None),
        ("", None),
        ("\\boxed{}", None),
        ("<think>\\boxed{1}</think> hm", None),
        ("<think>\\boxed{1}</think> \\boxed{4}", "4"),
        ("}{\\boxed{{a}{b}}}", "{a}{b}"),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_labelled_answers():
    rows = list(labelled())
    wrong = [
        (number, gold, given)
        for number, right, gold, given, choices in rows
        if is_right(boxed(given), gold, choices) != right
    ]
    assert not wrong
    rights = sum(right for _, right, *_ in rows)
    assert len(rows) >= 400 and 150 < rights < len(rows) - 150


SIGNS = r"\boxed{ } { \frac \sqrt ^ ( ) [ , 1 9 e . / - % $ \ cm \text{ ½ √ ° A yes and ⟨ \{ !"
NOISE = [
    *SIGNS.split(" "),
    *("<answer>", "</answer>", "</think>", "answer:", "\n", " ", "\x00", "\ud800"),
]
GOLDS = ["5", "1/2", "(1, 2)", "B", "yes", "red", "\\sqrt{2}", "5 cm", ""]
MONSTERS = [
    "\\boxed{" * 100_000,
    "\\boxed{" + "{" * 10**6,
    "\\boxed{" + "(" * 10**6,
    "answer " * 10**5,
    "<answer>" * 10**5,
    "\n" * 10**6,
    "\\boxed{" + "-" * 390 + "1}",
    "\\boxed{" + "(9^64)" * 60 + "}",
    "\\boxed{((((9^64)^64)^64)^64)}",
    "\\boxed{1e999}",
    "\\boxed{" + "(1," * 90 + "}",
    "\\boxed{5" + " " * 10**6 + "}",
]


def test_noise_never_raises():
    """Half-open LaTeX, endless nesting, powers of powers: a verdict for each gold answer."""
    generator = np.random.default_rng(0)
    for _ in range(3000):
        text = "".join(generator.choice(NOISE, generator.integers(1, 30)))
        for gold in GOLDS:
            assert is_right(text, gold) in (True, False)
            assert is_right("\\boxed{" + text, gold, ["1", "2"]) in (True, False)


@pytest.mark.parametrize("text", ["{}{2}", "{2}{}", "{}{}", "{}x", " {}2"])
def test_a_fraction_without_a_part_is_wrong(text):
    for gold in ("5", "x+1", "\\frac12", "A"):
        for response in ("\\boxed{\\frac%s}", "The answer is \\frac%s"):
            assert not is_right(response % text, gold)
            assert not is_right(response % text, gold, ["1", "2"])


@pytest.mark.parametrize("monster", MONSTERS, ids=lambda text: text[:20])
def test_monsters_are_wrong(monster):
    assert not any(is_right(monster, gold) for gold in GOLDS)


@pytest.mark.parametrize(
    "text,answer",
    [
        ("**Final answer:** 12 cm\n", "12 cm"),
        ("The answer is 12.\nDone.", "12."),
        ("the answer is: 7", "7"),
        ("Answer: 1\nAnswer: 2", "2"),
        ("\\boxed {5}", "5"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("<answer>5", None),
        ("<think> \\boxed{5}", None),
        ("\\boxed{1} <think> \\boxed{2}", "1"),
        ("a</think>b</think>\\boxed{3}", "3"),
        ("answers: none", None),
        ("\\boxed{" + "1" * 500 + "}", None),
        ("\\boxed{5} and \\boxed{6", None),
    ],
)
def test_extract_answer_in_other_forms(text, answer):
    assert extract_answer(text) == answer


def fresh_verdicts(half):
    """(verdict, label) per case of one half of tests/answers_fresh.jsonl."""
    cases = read_jsonl(ROOT / "tests" / "answers_fresh.jsonl")
    return [
        (is_right(case["response"], case["gold"], case["choices"]), case["right"])
        for case in cases
        if case["half"] == half
    ]


def test_fresh_answers_that_the_rules_were_made_on():
    verdicts = fresh_verdicts("open")
    assert len(verdicts) == 287
    assert [verdict for verdict, label in verdicts] == [label for verdict, label in verdicts]


def test_fresh_answers_that_were_kept_apart():
    verdicts = fresh_verdicts("apart")
    passed = [label for verdict, label in verdicts if verdict]
    right = [verdict for verdict, label in verdicts if label]
    assert len(verdicts) == 574
    assert np.mean(passed) >= 0.995  # precision
    assert np.mean(right) >= 0.93  # recall


# ------------------------------------------------------------------------------------- a whole file
def test_a_file_of_responses_is_graded(tmp_path, capsys):
    rows = [
        {"answer": "12", "response": "so \\boxed{12}"},
        {"answer": 3, "responses": ["\\boxed{3.0}", "\\boxed{4}", "I do not know"], "id": "b"},
        {"answer": "D", "choices": ["red", "blue"], "id": "c"},
    ]
    write_jsonl(tmp_path / "r.jsonl", rows)
    assert answers.main([str(tmp_path / "r.jsonl")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "r.jsonl:2: id b: response 3: no answer found: 'I do not know'" in lines[0]
    assert "r.jsonl:3: id c: the gold answer is none of the options: 'D'" in lines[1]
    assert lines[2] == "questions 3, responses 4"
    counts = [line.split()[-3] for line in lines[3:]]
    assert counts == ["2", "1", "1", "1"]
    write_jsonl(tmp_path / "r.jsonl", rows[:2])
    assert answers.main([str(tmp_path / "r.jsonl")]) == 0


@pytest.mark.parametrize(
    "line,message",
    [
        ("{", "r.jsonl:1: "),
        ("[]", "r.jsonl:1: expected a JSON object, got list"),
        ('{"response": "5"}', "r.jsonl:1: field 'answer'"),
        ('{"answer": "5", "responses": "5"}', "r.jsonl:1: field 'response'"),
        ('{"answer": "5", "choices": "AB"}', "r.jsonl:1: field 'choices'"),
        ("", "r.jsonl: no rows in it"),
    ],
)
def test_a_file_that_cannot_be_graded_is_refused_by_its_line(tmp_path, capsys, line, message):
    (tmp_path / "r.jsonl").write_text(line)
    with pytest.raises(SystemExit) as stop:
        answers.main([str(tmp_path / "r.jsonl")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ judges
def test_rules_are_a_judge():
    assert load_judge("rules") is same_answer


def test_math_verify_is_optional():
    if importlib.util.find_spec("math_verify"):
        pytest.skip("math-verify is installed")
    with pytest.raises(ValueError, match="pip install 'math-verify"):
        load_judge("math")


def test_math_verify_decides_on_formulas():
    pytest.importorskip("math_verify")
    same = load_judge("math")
    assert same("\\frac{2}{4}", "0.5")
    assert same("(x+1)^2", "x^2+2x+1")
    assert same("(2x, y+1)", "(x+x, 1+y)")
    assert same("(B) red", "B", ["blue", "red"])
    assert not same("5", "6")
    assert not is_right("nothing", "6", same=same)
    assert not same("Pairs", "Paris")
    assert not same("(x+1)^2", "x^2+1")
    assert not same("9^{9^{9^9}}", "x^2")
    for _, right, gold, given, choices in labelled():
        assert is_right(boxed(given), gold, choices, same) == right


@pytest.mark.parametrize(
    "given,gold,asked",
    [
        ("2/4", "0.5", False),  # the rules say yes
        ("5", "6", False),  # numbers: the rules read them
        ("(1, 2)", "(2, 1)", False),
        ("Pairs", "Paris", False),  # words
        ("x" * (LONGEST_ANSWER + 1), "x^2", False),
        ("(x+1)^2", "x^2+2x+1", False),  # the rules say yes
        ("\\sin(2x)", "2\\sin x\\cos x", True),
        ("(\\ln x^2, y+1)", "(2\\ln x, 1+y)", True),
    ],
)
def test_math_verify_is_asked_about_unread_formulas_alone(monkeypatch, given, gold, asked):
    """A stand-in for math-verify, which says yes and remembers what it was asked."""
    questions = []
    stand_in = SimpleNamespace(
        parse=lambda text: text, verify=lambda gold, given: questions.append((gold, given)) or True
    )
    monkeypatch.setitem(sys.modules, "math_verify", stand_in)
    same = load_judge("math")
    assert same(given, gold) == (asked or same_answer(given, gold))
    assert questions == ([(f"${gold}$", f"${given}$")] if asked else [])
    questions.clear()
    assert same(given, gold, ["1", "2"]) == same_answer(given, gold, ["1", "2"])
    assert not questions  # an option is compared by rules alone
