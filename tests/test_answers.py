"""plumbing/answers.py: labelled answers, noise, and answers in other dresses."""

import numpy as np
import pytest
from conftest import ROOT

from plumbing.answers import extract_answer, load_verifier, verify


def labelled():
    """tests/answers.tsv: verdict | gold | given | options."""
    for number, line in enumerate(
        (ROOT / "tests" / "answers.tsv").read_text(encoding="utf-8").splitlines(), 1
    ):
        if line[:1] in ("+", "-"):
            verdict, gold, given, *choices = line.split("|")
            yield number, verdict == "+", gold, given, choices[0].split(";") if choices else None


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
        row for row in rows if verify(f"So it is \\boxed{{{row[3]}}}.", row[2], row[4]) != row[1]
    ]
    assert not wrong and len(rows) >= 400 and 150 < sum(row[1] for row in rows) < len(rows) - 150


def test_the_verifier_never_raises():
    """Noise, half-open LaTeX, endless nesting, powers of powers: False, whatever the gold answer; and True only for what equals it."""
    generator = np.random.default_rng(0)
    pieces = [
        "\\boxed{",
        "}",
        "{",
        "\\frac",
        "\\sqrt",
        "^",
        "(",
        ")",
        "[",
        ",",
        "1",
        "9",
        "e",
        ".",
        "/",
        "-",
        "%",
        "$",
        "\\",
        " ",
        "cm",
        "\\text{",
        "\x00",
        "\ud800",
        "½",
        "√",
        "°",
        "A",
        "yes",
        "<answer>",
        "</answer>",
        "</think>",
        "answer:",
        "\n",
        "and",
        "⟨",
        "\\{",
        "!",
    ]
    golds = ["5", "1/2", "(1, 2)", "B", "yes", "red", "\\sqrt{2}", "5 cm", ""]
    for _ in range(3000):
        text = "".join(generator.choice(pieces, generator.integers(1, 30)))
        for gold in golds:
            assert verify(text, gold) in (True, False) and verify(
                "\\boxed{" + text, gold, ["1", "2"]
            ) in (True, False)
    for monster in (
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
    ):
        assert not any(verify(monster, gold) for gold in golds)


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
def test_extract_answer_in_other_dresses(text, answer):
    assert extract_answer(text) == answer


def test_math_verify_is_optional():
    assert load_verifier("rules") is verify
    try:
        import math_verify  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install 'math-verify"):
            load_verifier("math")
    else:
        check = load_verifier("math")
        assert (
            check("\\boxed{\\frac{2}{4}}", "0.5")
            and check("\\boxed{(x+1)^2}", "x^2+2x+1")
            and check("\\boxed{(B) red}", "B", ["blue", "red"])
        )
        assert (
            not check("\\boxed{5}", "6")
            and not check("nothing", "6")
            and check("\\boxed{(2x, y+1)}", "(x+x, 1+y)")
        )
        assert (
            not check("\\boxed{Pairs}", "Paris")
            and not check("\\boxed{(x+1)^2}", "x^2+1")
            and not check("\\boxed{9^{9^{9^9}}}", "x^2")
        )
        assert all(
            check(f"So it is \\boxed{{{given}}}.", gold, options) == right
            for _, right, gold, given, options in labelled()
        )
