"""plumbing/study_page.py: the page holds the study's numbers, and nothing in it is read as HTML."""

import json
from dataclasses import asdict

import pytest
from PIL import Image

from hints import Hint
from plumbing.study_numbers import OUTCOMES, PLACEBOS, TITLES, verdicts
from plumbing.study_page import HOPED, write_study_page
from rollout import Question

SCRIPT = '<script id="data" type="application/json">'
HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>@PARTS@"
NUMBERS = {
    "questions": 3,
    "hinted": 2,
    "samples": 2,
    "group_size": 2,
    "groups": {"all_failed": 0.5, "informative": 0.25, "all_correct": 0.25, "only_tutoring": 0.5},
    "contexts": {"question": {"questions": 3, "pass@1": None, "pass@k": {1: 0.25, 2: 0.5}}},
    "in_words": {},
    "views": {"question": [1, 2], "question + hint": [2, 2]},
    "verdicts": [{"name": "hints leak", "holds": True, "reason": f"for {HOSTILE}"}],
    "never_solved": ["b"],
    "worst": [HOSTILE],
    "best": ["b"],
}


def context(*correct, response="so it is 3"):
    return {
        "correct": list(correct),
        "lengths": [7 for _ in correct],
        "truncated": 0,
        "response": response,
        "nll": 0.5,
        "kl": 0.25,
    }


@pytest.fixture
def study(tmp_path):
    """(folder, questions, rows) of three questions, the last one without a hint."""
    folder = tmp_path / "s"
    folder.mkdir()
    config = {"model": f"some/model {HOSTILE}", "temperature": 0.5, "seed": 7}
    (folder / "config.json").write_text(json.dumps(config))
    image = tmp_path / "a.png"
    Image.new("RGB", (900, 450), "red").save(image)
    hint = Hint(look=(HOSTILE,), steps=("count",))
    questions = [
        Question(HOSTILE, f"How many? {HOSTILE}", "3", [str(image)], hint, family="row"),
        Question("b", "And here?", HOSTILE, [str(image)], hint, boxes=[[[0, 0, 450, 225]]]),
        Question("c", "And there?", "3", [str(image)]),
    ]
    rows = [
        {"contexts": {"question": context(True, False), "hint": context(False, False)}},
        {"contexts": {"question": context(False, False), "hint": context(True, True)}},
        {"contexts": {"question": context(False, True, response="x" * 1999 + "<yz")}},
    ]
    return folder, questions, rows


def read_page(study, numbers=NUMBERS):
    """The page's text, and the data inside it."""
    folder, questions, rows = study
    page = write_study_page(folder, numbers, rows, questions)
    assert page == folder / "study.html"
    html = page.read_text(encoding="utf-8")
    return html, json.loads(html.partition(SCRIPT)[2].partition("</script>")[0])


def test_the_page_holds_the_study(study):
    _, data = read_page(study)
    assert data["numbers"] == json.loads(json.dumps(NUMBERS))
    assert data["title"].endswith(": s")
    for words in ("some/model", "3 questions (2 of them with a hint)", "2 times", "0.5", "seed 7"):
        assert words in data["asked"]
    shown = data["questions"]
    questions = study[1]
    for entry, question in zip(shown, questions, strict=True):
        assert entry["id"] == question.id
        assert entry["question"] == question.text
        assert entry["answer"] == question.answer
        assert entry["family"] == question.family
    assert shown[0]["hint"] == json.loads(json.dumps(asdict(questions[0].hint)))
    assert shown[2]["hint"] is None
    of_b = {"samples": 2, "response": "so it is 3", "more": 0}
    assert shown[1]["contexts"] == {
        "question": {"right": 0, "is_correct": False, **of_b},
        "hint": {"right": 2, "is_correct": True, **of_b},
    }


def test_the_verdict_is_that_of_the_response_shown(study):
    _, data = read_page(study)
    contexts = [entry["contexts"]["question"] for entry in data["questions"]]
    assert [shown["is_correct"] for shown in contexts] == [True, False, False]
    assert [shown["right"] for shown in contexts] == [1, 0, 1]


def test_a_long_response_is_cut(study):
    _, data = read_page(study)
    shown = data["questions"][2]["contexts"]["question"]
    assert shown["response"] == "x" * 1999 + "<"
    assert shown["more"] == 2


def test_the_best_and_the_worst_have_their_pictures(study):
    _, data = read_page(study)
    worst, best, other = (entry["images"] for entry in data["questions"])
    [picture] = best
    assert picture["src"].startswith("data:image/png;base64,")
    assert picture["boxes"] == [[0, 0, 0.5, 0.5]]
    assert picture["width"] == 448
    assert worst[0]["boxes"] == []
    assert other == []


def test_the_page_reads_nothing_from_the_data_as_html(study):
    html, data = read_page(study)
    assert data["questions"][0]["question"] == f"How many? {HOSTILE}"
    assert html.count("<script") == html.count("</script") == 2
    assert "<img" not in html
    assert "<!--" not in html
    for reader in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert reader not in html


def test_nothing_comes_from_the_network(study):
    html, _ = read_page(study)
    assert "default-src 'none'" in html
    assert html.count("url(") == html.count("url(#hatch)") > 0
    ours = html.replace(json.dumps(HOSTILE)[1:-1].replace("<", "\\u003c"), "")
    for words in ("://", "src=", "href", "@import", "@STYLE@", "@PARTS@", "@DATA@"):
        assert words not in ours


def test_contexts_and_outcomes_have_their_own_colours(study):
    html, data = read_page(study)
    assert list(data["titles"]) == list(TITLES)
    assert data["outcomes"] == list(OUTCOMES)
    for kind, names in (("context", TITLES), ("outcome", OUTCOMES)):
        for number in range(len(names)):
            assert html.count(f".{kind}-{number} {{ --own:") == 1


def test_what_one_hopes_is_said_of_verdicts_that_there_are(study):
    views = dict.fromkeys([*PLACEBOS, *PLACEBOS.values()], True)
    rows = [{**row, "id": "a", "hint": {}, "views": views} for row in study[2]]
    assert HOPED.keys() < {entry["name"] for entry in verdicts(rows, 2)}


def test_a_study_without_hints_has_a_page(study):
    folder, questions, rows = study
    numbers = {**NUMBERS, "hinted": 0, "views": {}, "verdicts": [], "worst": [], "best": []}
    _, data = read_page((folder, questions[2:], rows[2:]), numbers)
    [entry] = data["questions"]
    assert entry["images"] == []
    assert list(entry["contexts"]) == ["question"]
