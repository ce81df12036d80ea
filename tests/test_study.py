"""plumbing/study.py: leaks in hints."""

import train
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


def test_what_the_audit_shows():
    sample = Question("a", "<image>How high?", "12", ["one.png"], HINT)
    views = study.audit_views(sample, Hint(look=("elsewhere",)))
    seen = {
        name: (s.images, messages(s)[0]["content"][-1]["text"])
        for name, (s, messages) in views.items()
    }
    assert [bool(images) for images, _ in seen.values()] == [True, True] + [False] * 5
    assert ["How high?" in text for _, text in seen.values()] == [
        True,
        True,
        True,
        True,
        True,
        False,
        False,
    ]
    assert ["red bar" in text for _, text in seen.values()] == [
        False,
        True,
        False,
        True,
        False,
        True,
        False,
    ]
    assert ["elsewhere" in text for _, text in seen.values()] == [False] * 4 + [True, False, True]
    assert all(text.endswith(FORMAT_PROMPT) and "<image>" not in text for _, text in seen.values())


def test_the_audit_finds_no_leak_in_the_puzzles_and_finds_one_that_is_there(trainer):
    trainer.config.eval_questions, trainer.config.max_new_tokens = 100, 48
    text = study.audit(trainer, QuestionStream(None, 7), train.evaluate)
    rows = {
        line[:30].strip(): float(line[30:].split()[0])
        for line in text.splitlines()
        if line.endswith("%")
    }
    assert list(rows) == [
        "picture + question",
        "picture + question + hint",
        "question",
        "question + hint",
        "question + another's hint",
        "hint",
        "another's hint",
    ]
    assert (
        rows["picture + question + hint"] > 90
        and text.count("no leak seen") == 2
        and "LEAK" not in text
    )
    # what always answering the most common number would score, 17 %, plus three standard errors
    assert max(rows[name] for name in rows if "picture" not in name) < 28
    # hints that say the answer, read by a model that repeats it
    samples = world.puzzles("tune", 20)
    for s in samples:
        s.hint = Hint(steps=(f"it is {s.answer}",))
    samples[3].hint = None

    def repeat(trainer, samples, messages):
        return {
            "right": [
                s.id
                for s in samples
                if messages is not student_messages and s.hint.steps[0].split()[-1] == s.answer
            ]
        }

    text = study.audit(trainer, QuestionStream(samples, 0), repeat)
    assert text.count("LEAK") == 2 and "of 19" in text and "first: puzzle-2" in text
    assert "nothing to audit" in study.audit(trainer, QuestionStream(samples[3:4], 0), repeat)
