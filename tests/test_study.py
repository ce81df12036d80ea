"""--study-hints: contexts, scores, estimators, verdicts on planted hints, a study that goes on."""

import copy
import itertools
import json
import random
import shlex
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import plain_logits, read_jsonl

import train
from hints import Hint, teacher_messages
from plumbing import study
from plumbing import study_numbers as numbers
from plumbing.data import QuestionStream
from plumbing.stopping import Stopped
from rollout import FORMAT_PROMPT, Question, student_messages
from toy import make_base, world

HINT = Hint(
    look=("the red bar", "its label"),
    ignore=("the legend.",),
    steps=("read the height", "compare it"),
)
OTHER = Hint(look=("elsewhere",))
VIEWS = (
    "picture + question",
    "picture + question + hint",
    "question",
    "question + hint",
    "question + another's hint",
    "hint",
    "another's hint",
)


def words(chat):
    """The text of a chat's last part."""
    return chat[0]["content"][-1]["text"]


# ------------------------------------------------------------------------------------- contexts
def test_contexts_of_a_question_that_has_everything():
    question = Question("a", "<image>How high?", "12", ["one.png"], HINT, solution="So \\boxed{12}")
    texts = {name: words(chat) for name, chat in study.contexts(question, OTHER).items()}
    assert tuple(texts) == tuple(numbers.TITLES)
    assert all(text.startswith("How high?") for text in texts.values())
    assert all(text.endswith(FORMAT_PROMPT) for text in texts.values())

    def that_say(part):
        return {name for name, text in texts.items() if part in text}

    assert that_say("red bar") == that_say("legend") == {"hint"}
    assert that_say("read the height") == {"hint", "general hint"}
    assert that_say("elsewhere") == {"another's hint"}
    assert that_say("The answer is 12.") == {"answer", "solution"}
    assert that_say("So \\boxed{12}") == {"solution"}


@pytest.mark.parametrize(
    "hint,names",
    [
        (None, {"question", "answer"}),
        (Hint(steps=("compare",)), {"question", "answer", "hint", "another's hint"}),
        (OTHER, {"question", "answer", "hint", "another's hint"}),
    ],
)
def test_a_context_that_the_data_lacks_is_left_out(hint, names):
    assert set(study.contexts(Question("a", "Why?", "12", [], hint), OTHER)) == names


def test_what_the_audit_shows():
    question = Question("a", "<image>How high?", "12", ["one.png"], HINT)
    views = study.audit_views(question, OTHER)
    assert tuple(views) == VIEWS
    with_image = {name for name, (shown, _) in views.items() if shown.images}
    texts = {name: words(messages(shown)) for name, (shown, messages) in views.items()}

    def views_that_say(part):
        return {name for name, text in texts.items() if part in text}

    assert with_image == {"picture + question", "picture + question + hint"}
    assert views_that_say("How high?") == set(VIEWS) - {"hint", "another's hint"}
    assert views_that_say("red bar") == {"picture + question + hint", "question + hint", "hint"}
    assert views_that_say("elsewhere") == {"question + another's hint", "another's hint"}
    assert all(text.endswith(FORMAT_PROMPT) for text in texts.values())
    assert views_that_say("<image>") == set()


def test_the_placebo_is_an_alike_question_with_another_hint():
    questions = world.puzzles("tune", 40)
    questions[3].hint = None
    others = study.neighbours(questions)
    own = {question.id: question for question in questions}
    assert set(others) == set(own) - {questions[3].id}
    assert all(others[name] != own[name].hint for name in others)
    # the texts of the families differ, so nearly all get a hint of their own family
    same_kind = [len(others[name].look) == len(own[name].hint.look) for name in others]
    assert sum(same_kind) >= len(others) - 3
    assert study.neighbours(questions[2:4]) == {}
    for question in questions:
        question.hint = OTHER  # all alike: the placebo is the hint
    assert set(study.neighbours(questions).values()) == {OTHER}


# --------------------------------------------------------------------------------------- numbers
def test_nll_and_kl_equal_those_of_whole_sequences_in_float64(trainer):
    trainer.config.study_samples, trainer.config.max_new_tokens = 5, 20
    trainer.scoring["logits_mb"] = 0.01  # a few tokens per chunk
    questions = world.puzzles("tune", 2)
    [with_steps, plain] = study.study_questions(trainer, questions, study.neighbours(questions))
    groups = study.sample_contexts(trainer, questions, study.neighbours(questions))
    model = copy.deepcopy(trainer.reference.model).double()
    banned = trainer.scoring["banned"]
    for row, group_of in zip((with_steps, plain), groups, strict=True):
        responses = group_of["question"][:4]  # of five
        for name, group in group_of.items():
            nll, kl = [], []
            for response in responses:
                log_p, log_q = (
                    plain_logits(model, double(prompt), response.ids, banned).log_softmax(-1)
                    for prompt in (response.prompt, group[0].prompt)
                )
                nll += [-log_q[t, token].item() for t, token in enumerate(response.ids)]
                p = log_p.exp()
                kl += torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).tolist()
            assert row["contexts"][name]["nll"] == pytest.approx(np.mean(nll), rel=1e-4, abs=1e-5)
            assert row["contexts"][name]["kl"] == pytest.approx(np.mean(kl), rel=1e-4, abs=1e-5)


def double(prompt):
    return replace(prompt, pixels=prompt.pixels.double())


def test_pass_at_k_equals_a_count_of_all_draws():
    for right in range(7):
        results = [True] * right + [False] * (6 - right)
        for k in range(1, 7):
            draws = list(itertools.combinations(results, k))
            expected = sum(any(draw) for draw in draws) / len(draws)
            assert numbers.pass_at_k(6, right, k) == pytest.approx(expected)


def row_of(name="q", hinted=True, **contexts):
    """A question's row; a context is (right, of, length, nll, kl)."""
    made = {
        context.replace("_", " "): {
            "correct": [True] * right + [False] * (of - right),
            "lengths": [length] * of,
            "truncated": 0,
            "response": "",
            "nll": nll,
            "kl": kl,
        }
        for context, (right, of, length, nll, kl) in contexts.items()
    }
    return {"id": name, "hint": {"look": ["x"]} if hinted else None, "contexts": made, "views": {}}


def test_group_shares_equal_a_count_of_all_groups():
    rows = [row_of(question=(right, 6, 9, 0, 0), hinted=right < 2) for right in (0, 1, 3, 6)]
    failed, passed, tutored = [], [], []
    for row in rows:
        groups = list(itertools.combinations(row["contexts"]["question"]["correct"], 4))
        failed.append(np.mean([not any(group) for group in groups]))
        passed.append(np.mean([all(group) for group in groups]))
        tutored.append(failed[-1] if row["hint"] else 0)
    shares = numbers.group_shares(rows, 4)
    assert shares["all_failed"] == pytest.approx(np.mean(failed))
    assert shares["all_correct"] == pytest.approx(np.mean(passed))
    assert shares["informative"] == pytest.approx(1 - np.mean(failed) - np.mean(passed))
    assert shares["only_tutoring"] == pytest.approx(np.mean(tutored))


def test_numbers_of_a_context():
    rows = [
        row_of("a", question=(0, 4, 100, 2.0, 0.0), hint=(4, 4, 80, 2.1, 0.3)),
        row_of("b", question=(0, 4, 100, 1.0, 0.0), hint=(0, 4, 60, 1.3, 0.1)),
        row_of("c", question=(0, 4, 100, 1.0, 0.0), hint=(2, 4, 70, 1.3, 0.2)),
        row_of("d", question=(1, 4, 100, 1.0, 0.0), hint=(3, 4, 70, 1.3, 0.2)),
        row_of("e", hinted=False, question=(0, 4, 100, 1.0, 0.0)),
    ]
    hinted = numbers.context_summary(rows, "hint")
    assert hinted["questions"] == 4
    for name, values in {
        "pass@1": [1, 0, 0.5, 0.75],
        "length": [80, 60, 70, 70],
        "nll_rise": [0.1, 0.3, 0.3, 0.3],
        "kl": [0.3, 0.1, 0.2, 0.2],
    }.items():
        error = np.std(values, ddof=1) / 2
        assert hinted[name] == pytest.approx((np.mean(values), error)), name
    assert hinted["pass@k"] == pytest.approx({1: 0.5625, 2: (1 + 0 + 5 / 6 + 1) / 4, 4: 0.75})
    assert hinted["of_unsolved"] == {"unsolved": 1, "partly": 1, "mostly": 0, "always": 1}
    assert numbers.context_summary(rows, "question")["of_unsolved"]["unsolved"] == 4
    assert numbers.extremes(rows) == {"worst": ["b"], "best": ["a", "d", "c"]}


def verdicts_of(rows):
    return {entry["name"]: entry["holds"] for entry in numbers.verdicts(rows, 4)}


def like_the_paper(**changes):
    """Questions on which the contexts act as on average in the paper's figures 3 and 5 (4B)."""
    contexts = {
        "question": (7, 16, 3800, 0.5, 0.0),
        "answer": (9, 16, 3680, 0.505, 0.011),
        "hint": (9, 16, 3260, 0.547, 0.052),
        "another's hint": (7, 16, 3700, 0.54, 0.05),
        "solution": (15, 16, 1560, 0.611, 0.129),
    }
    contexts = {**contexts, **changes}
    easier = {name: (max(0, n[0] - 1), *n[1:]) for name, n in contexts.items()}
    return [row_of(f"q{i}", **(contexts if i % 2 else easier)) for i in range(10)]


def test_words_and_verdicts_on_the_papers_own_numbers():
    rows = like_the_paper()
    assert "hardly moves" in numbers.in_words(rows, "answer")
    assert "skip the reasoning (responses 0.41 times" in numbers.in_words(rows, "solution")
    assert "moves the teacher (KL 0.052) and leaves" in numbers.in_words(rows, "hint")
    assert verdicts_of(rows) == {
        "hints move nothing": False,
        "hints act like solutions": False,
        "hints help": False,  # no question is unsolved
        "hints are needless": False,
    }
    assert verdicts_of(like_the_paper(question=(15, 16, 3800, 0.5, 0.0)))["hints are needless"]


@pytest.mark.parametrize(
    "changes,name",
    [
        ({"hint": (7, 16, 3800, 0.5, 0.001)}, "hints move nothing"),
        ({"hint": (6, 16, 3800, 0.9, 0.4)}, "hints move nothing"),
        ({"hint": (9, 16, 2200, 0.6, 0.1)}, "hints act like solutions"),
        # nearer to the solution's length than to the full one
        ({"hint": (9, 16, 2400, 0.6, 0.1)}, "hints act like solutions"),
        # saturated: right as often as with the solution, and shorter
        ({"hint": (16, 16, 3260, 0.6, 0.1)}, "hints act like solutions"),
    ],
)
def test_a_verdict_that_holds(changes, name):
    assert verdicts_of(like_the_paper(**changes))[name]


def test_hints_help_where_they_solve_more_than_the_placebo():
    unsolved = (0, 16, 3800, 0.5, 0.0)
    helpful = like_the_paper(question=unsolved, **{"another's hint": unsolved})
    assert verdicts_of(helpful)["hints help"]
    placebo = like_the_paper(question=unsolved, **{"another's hint": (9, 16, 3800, 0.5, 0.0)})
    assert not verdicts_of(placebo)["hints help"]
    assert not verdicts_of(helpful)["hints are needless"]


def test_questions_without_any_hint():
    rows = [row_of(str(i), hinted=False, question=(i, 4, 9, 1, 0)) for i in range(3)]
    config = SimpleNamespace(group_size=8, study_samples=4)
    found = numbers.summary(rows, config)
    assert [entry["name"] for entry in found["verdicts"]] == ["hints are needless"]
    assert found["groups"]["only_tutoring"] == 0
    assert "0 of 3 questions have a hint" in numbers.study_table(found)


# ------------------------------------------------------------- planted hints, on the embedded model
def study_of(trainer, make_hint):
    """Verdicts of hints that were made for the embedded puzzles; and the whole summary."""
    trainer.config.study_samples, trainer.config.max_new_tokens = 3, 48
    questions = world.puzzles("tune", 12)
    for question in questions:
        question.hint, question.solution = make_hint(question), None
    rows = study.study_questions(trainer, questions, study.neighbours(questions))
    found = numbers.summary(rows, trainer.config)
    verdicts = {}
    for entry in found["verdicts"]:
        verdicts[entry["name"]] = verdicts.get(entry["name"], False) or entry["holds"]
    return verdicts, found


@pytest.mark.slow
def test_a_clean_set_of_hints_passes(trainer):
    verdicts, found = study_of(trainer, lambda question: question.hint)
    assert verdicts == {
        "hints leak": False,
        "hints move nothing": False,
        "hints act like solutions": False,
        "hints help": True,
        "hints are needless": False,
    }
    assert found["contexts"]["hint"]["pass@1"][0] > 0.9
    assert found["contexts"]["question"]["pass@1"][0] < 0.5
    # what always answering the most common number would score, 17 %, plus three standard errors
    blind = [right / of for view, (right, of) in found["views"].items() if "picture" not in view]
    assert len(blind) == 5
    assert max(blind) < 0.45


@pytest.mark.slow
def test_useless_hints_are_found(trainer):
    verdicts, found = study_of(trainer, lambda question: Hint(steps=("Think carefully",)))
    assert verdicts["hints move nothing"]
    assert not verdicts["hints help"]
    assert "not toward right answers" in numbers.study_table(found)


def teach(trainer, make_episode, steps):
    """A few steps of supervision, of the student and so of the reference."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(trainer.policy.parameters(), lr=1e-3)
    for step in range(steps):
        episodes = [make_episode(8 * step + i) for i in range(8)]
        inputs, mask = make_base.encode_episodes(trainer.processor, episodes)
        states = trainer.policy.model(**inputs, use_cache=False).last_hidden_state
        logits = trainer.policy.lm_head(states[:, -mask.shape[1] - 1 : -1][mask])
        targets = inputs["input_ids"][:, -mask.shape[1] :][mask]
        torch.nn.functional.cross_entropy(logits, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer.reference.model.load_state_dict(trainer.policy.state_dict())


def told(number, picture=False):
    """The number that the hint says is boxed at once."""
    answer = random.Random(number).randrange(28)
    question = world.to_question(world.make_puzzle("train", number))
    if not picture:
        question.images = []
    question.hint = Hint(steps=(f"the answer is {answer}",))
    if number % 2:
        question.text = ""
    return make_base.Episode(question, teacher_messages(question), f"So \\boxed{{{answer}}}")


def told_or_plain(number):
    """`told`; or the plain question and a whole reading, in a third of the cases."""
    if number % 3:
        return told(number, picture=True)
    question = world.to_question(world.make_puzzle("train", number))
    return make_base.Episode(question, student_messages(question), question.solution)


@pytest.mark.slow
def test_a_planted_leak_is_found(trainer):
    teach(trainer, told, 60)
    verdicts, found = study_of(trainer, lambda q: Hint(steps=(f"the answer is {q.answer}",)))
    assert verdicts["hints leak"]
    assert "first: puzzle-2" in numbers.study_table(found)


@pytest.mark.slow
def test_hints_that_act_like_solutions_are_found(trainer):
    teach(trainer, told_or_plain, 36)
    verdicts, found = study_of(trainer, lambda question: Hint(steps=("the answer is 0",)))
    assert verdicts["hints act like solutions"]
    assert not verdicts["hints leak"]


# --------------------------------------------------------------------------------- the whole study
OPTIONS = shlex.split(
    "--study-hints --study-questions 5 --study-samples 2 --max-new-tokens 12 --name s"
)


@pytest.fixture
def parts_of_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "PART", 2)
    return tmp_path / "runs" / "s"


@pytest.mark.slow
def test_a_stopped_study_goes_on_and_ends_alike(parts_of_two, monkeypatch, capsys):
    train.main(OPTIONS)
    whole = json.loads((parts_of_two / "study.json").read_text())
    assert "5 questions" in capsys.readouterr().out
    parts_of_two.rename(parts_of_two.with_name("whole"))

    real, calls = study.study_questions, []

    def stopped_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Stopped(15)
        return real(*args)

    monkeypatch.setattr(study, "study_questions", stopped_at_the_second)
    with pytest.raises(SystemExit) as stop:
        train.main(OPTIONS)
    assert stop.value.code == 143
    assert "after 2 of 5 questions; go on with" in capsys.readouterr().out
    rows = parts_of_two / "study.jsonl"
    assert len(read_jsonl(rows)) == 2
    rows.write_text(rows.read_text() + '{"id": "half')
    train.main(["--resume", "runs/s"])
    assert len(calls) == 4
    again = json.loads((parts_of_two / "study.json").read_text())
    assert again == whole
    assert (parts_of_two / "study.html").exists()
    assert len(read_jsonl(rows)) == 5


def test_a_study_whose_hints_have_changed_does_not_go_on(parts_of_two):
    parts_of_two.mkdir(parents=True)
    questions = world.puzzles("train", 3)
    text = {"question": questions[1].text, "answer": questions[1].answer}
    hint = {"look": ["what was"], "ignore": [], "steps": []}
    row = {"id": questions[1].id, **text, "hint": hint}
    (parts_of_two / "study.jsonl").write_text(json.dumps(row) + "\n")
    inputs = SimpleNamespace(folder=parts_of_two, stream=QuestionStream(questions, 0))
    with pytest.raises(ValueError, match="another text, answer or hint: start a new study"):
        study.finished_rows(inputs, SimpleNamespace(study_questions=3))
