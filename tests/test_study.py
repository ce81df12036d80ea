"""plumbing/study.py: leaks in hints."""

import pytest

from hints import Hint
from plumbing import study
from plumbing.data import QuestionStream
from rollout import FORMAT_PROMPT, Question, student_messages
from toy import world

HINT = Hint(
    look=("the red bar", "its label"),
    ignore=("the legend.",),
    steps=("read the height", "compare it"),
)
VIEWS = (
    "picture + question",
    "picture + question + hint",
    "question",
    "question + hint",
    "question + another's hint",
    "hint",
    "another's hint",
)


def test_what_the_audit_shows():
    question = Question("a", "<image>How high?", "12", ["one.png"], HINT)
    views = study.audit_views(question, Hint(look=("elsewhere",)))
    assert tuple(views) == VIEWS
    with_image = {name for name, (shown, _) in views.items() if shown.images}
    texts = {
        name: messages(shown)[0]["content"][-1]["text"] for name, (shown, messages) in views.items()
    }

    def views_that_say(words):
        return {name for name, text in texts.items() if words in text}

    assert with_image == {"picture + question", "picture + question + hint"}
    assert views_that_say("How high?") == set(VIEWS) - {"hint", "another's hint"}
    assert views_that_say("red bar") == {"picture + question + hint", "question + hint", "hint"}
    assert views_that_say("elsewhere") == {"question + another's hint", "another's hint"}
    assert all(text.endswith(FORMAT_PROMPT) for text in texts.values())
    assert views_that_say("<image>") == set()


def test_the_audit_finds_no_leak_in_the_puzzles(trainer):
    trainer.config.eval_questions, trainer.config.max_new_tokens = 100, 48
    table = study.audit(trainer, world.PuzzleStream(7))
    rows = [line for line in table.splitlines() if line.endswith("%")]
    percent = {line[:30].strip(): float(line[30:].split()[0]) for line in rows}
    assert tuple(percent) == VIEWS
    assert percent["picture + question + hint"] > 90
    assert table.count("no leak seen") == 2
    assert "LEAK" not in table
    # what always answering the most common number would score, 17 %, plus three standard errors
    assert max(value for name, value in percent.items() if "picture" not in name) < 28


@pytest.fixture
def repeating(trainer, monkeypatch):
    """A trainer whose model repeats the number that the hint says."""

    def evaluate(questions, messages):
        if messages is student_messages:
            return {"right": []}
        said = {question.id: question.hint.steps[0].split()[-1] for question in questions}
        return {"right": [q.id for q in questions if said[q.id] == q.answer]}

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    return trainer


def test_the_audit_finds_a_leak_that_is_there(repeating):
    questions = world.puzzles("tune", 20)
    for question in questions:
        question.hint = Hint(steps=(f"it is {question.answer}",))
    questions[3].hint = None
    table = study.audit(repeating, QuestionStream(questions, 0))
    assert table.count("LEAK") == 2
    assert "of 19" in table
    assert "first: puzzle-2" in table


def test_nothing_to_audit(repeating):
    [question] = world.puzzles("tune", 1)
    question.hint = None
    table = study.audit(repeating, QuestionStream([question], 0))
    assert table == "0 of 1 questions have a hint: nothing to audit"
