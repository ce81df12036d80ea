"""plumbing/page.py: the page shows what the loss sees, and reads nothing from the data as HTML."""

import contextlib
import io
import json
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, plain_logits, write_jsonl
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as models_of_tokenizers
from transformers import AutoModelForImageTextToText

import train
from hints import Hint, teacher_messages
from losses import topk_jsd
from plumbing.data import load_questions
from plumbing.inputs import read_inputs
from plumbing.page import CURVES, added_text, explain, step_curves, token_entries
from plumbing.runs import rollout_statistics
from plumbing.settings import EMBEDDED
from rollout import (
    Question,
    Response,
    banned_tokens,
    encode_prompts,
    sample_groups,
    student_messages,
    verify,
)
from toy import world
from toy.settings import SETTINGS

CONFIG = train.TrainConfig(jsd_k=20)
BYTES = pre_tokenizers.ByteLevel.alphabet()
SCRIPT = '<script id="data" type="application/json">'


def read_page(run):
    """The page's text, and the data inside it."""
    html = (run / "report.html").read_text()
    data = html.partition(SCRIPT)[2].partition("</script>")[0]
    return html, json.loads(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with its page: run (its folder), html, data, out (what was printed)."""
    folder = tmp_path_factory.mktemp("page")
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        train.main([*TINY, "--name", "t", "--report"])
    run = folder / "runs" / "t"
    html, data = read_page(run)
    return SimpleNamespace(run=run, html=html, data=data, out=out.getvalue())


@pytest.fixture(scope="module")
def models(finished):
    """name -> the model before and after the run."""
    paths = {"before": EMBEDDED, "after": finished.run / "model"}
    return {
        name: AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in paths.items()
    }


# ------------------------------------------------------------------------------ what the page shows
def test_the_page_shows_the_held_out_questions(finished):
    assert "a page to look at: runs/t/report.html" in finished.out
    assert "://" not in finished.html  # nothing comes from the network
    shown = finished.data["questions"]
    assert [entry["id"] for entry in shown] == [f"puzzle-{10**9 + i}" for i in range(6)]
    [puzzle], entry = world.puzzles("heldout", 1), shown[0]
    assert entry["hint"]["look"] == list(puzzle.hint.look)
    boxes = [[x / 112 for x in box] for box in puzzle.boxes[0]]
    assert entry["images"][0]["boxes"] == boxes
    assert len(entry["before"]) == len(entry["after"]) == 4
    assert entry["before"] != entry["after"]


@pytest.mark.parametrize("name", ["before", "after"])
def test_the_page_shows_what_the_loss_sees(finished, models, base, name):
    """Texts, verdicts, divergences and likeliest tokens, against whole sequences alone."""
    processor, model = base[1], models[name]
    tokenizer, banned = processor.tokenizer, banned_tokens(model, base[1].tokenizer)
    [puzzle] = world.puzzles("heldout", 1)
    chats = [student_messages(puzzle), teacher_messages(puzzle)]
    plain, hinted = encode_prompts(processor, [puzzle] * 2, chats)
    [group] = sample_groups(model, processor, [plain], 4, max_new_tokens=48)
    banned_texts = {tokenizer.decode([i]) for i in banned}
    for shown, response in zip(finished.data["questions"][0][name], group, strict=True):
        texts, jsd, student, teacher = zip(*shown["tokens"], strict=True)
        assert shown["more"] == 0
        assert "".join(texts) == tokenizer.decode(response.ids)
        assert shown["truncated"] == response.truncated
        assert shown["correct"] == verify(response.text, puzzle)
        assert not banned_texts & {text for likeliest in student for text, _ in likeliest}
        with torch.no_grad():
            student_logits = plain_logits(model, plain, response.ids, banned)
            teacher_logits = plain_logits(models["before"], hinted, response.ids, banned)
        expected = topk_jsd(student_logits, teacher_logits, 20)
        torch.testing.assert_close(torch.tensor(jsd), expected, atol=2e-4, rtol=1e-3)
        assert_likeliest(student, student_logits, tokenizer)
        assert_likeliest(teacher, teacher_logits, tokenizer)


def assert_likeliest(shown, logits, tokenizer):
    """Five tokens per place, the likeliest one first, with its probability."""
    for likeliest, p in zip(shown, logits.softmax(-1), strict=True):
        text, probability = likeliest[0]
        assert text == tokenizer.decode([p.argmax()])
        assert abs(probability - p.max()) < 1e-3
        assert len(likeliest) == 5


def test_a_response_of_its_end_alone(models, base):
    processor, model = base[1], models["before"]
    [puzzle] = world.puzzles("heldout", 1)
    [plain] = encode_prompts(processor, [puzzle], [student_messages(puzzle)])
    end = [processor.tokenizer.eos_token_id]
    [[_, divergence, _, _]] = token_entries([(model, plain)], end, processor.tokenizer, CONFIG)
    assert divergence == 0


def test_a_character_of_several_tokens_stands_at_the_last_of_them():
    """As in Qwen's tokenizers, whose tokens are bytes."""
    pieces = Tokenizer(models_of_tokenizers.BPE({c: i for i, c in enumerate(BYTES)}, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    text = "x \u2264 \U0001f600 \u7b54\u6848 \u00e9"
    ids = pieces.encode(text).ids
    assert len(ids) == len(text.encode())
    added = [added_text(ids, place, pieces) for place in range(len(ids))]
    assert "".join(added) == text
    assert max(map(len, added)) == 1


def test_a_long_response_is_cut(finished, models):
    config = train.TrainConfig(**SETTINGS)
    inputs = read_inputs(config, world, 1)
    [puzzle] = world.puzzles("heldout", 1)
    [cut] = explain(models["after"], models["before"], inputs, config, puzzle, 1, longest=9)
    whole = finished.data["questions"][0]["after"][0]["tokens"]
    assert [token[0] for token in cut["tokens"]] == [token[0] for token in whole[:9]]
    assert cut["more"] == len(whole) - 9


# ----------------------------------------------------------------------------------- over the steps
def test_the_curves_are_those_of_the_log(finished):
    lines = (finished.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    curves = finished.data["curves"]
    assert [row["step"] for row in log] == [0, 1, 2]
    for name in CURVES:
        assert curves[name] == [[row["step"], row[name]] for row in log[1:]]
    assert curves["eval_plain"] == [[row["step"], row["eval_plain"]] for row in log]


def test_the_three_shares_of_groups_in_the_log():
    question = Question("a", "How many?", "3", [], Hint(look=("here",)))
    prompt = SimpleNamespace(question=question)
    verdicts = ["000", "000", "111", "010", "110", "100", "000", "111"]
    groups = [
        [Response(prompt, [1], "", False, correct=verdict == "1") for verdict in group]
        for group in verdicts
    ]
    row = rollout_statistics(groups, SimpleNamespace(group_size=3, teacher_context="hint"))
    assert (row["all_failed"], row["informative"], row["all_correct"]) == (3 / 8, 3 / 8, 2 / 8)


LOG = [
    {"step": 0, "eval_plain": 0.25, "eval_hinted": 0.5},
    {"step": 1, "all_failed": 0.5, "all_correct": 0.125, "accuracy": 0.25},
    {"step": 2, "all_failed": 0.25, "informative": 0.5, "all_correct": 0.25, "eval_plain": 0.75},
]
for row in LOG[1:]:
    row |= {"entropy": 0.5 * row["step"], "length": 20.0}


def test_curves_of_a_log_of_an_earlier_version():
    curves = step_curves(LOG)
    assert curves["all_failed"] == [[1, 0.5], [2, 0.25]]
    assert curves["informative"] == [[1, 0.375], [2, 0.5]]
    assert curves["all_correct"] == [[1, 0.125], [2, 0.25]]
    assert curves["accuracy"] == [[1, 0.25]]
    assert curves["eval_plain"] == [[0, 0.25], [2, 0.75]]
    assert curves["entropy"] == [[1, 0.5], [2, 1.0]]
    assert "informative" not in LOG[1]  # the log stays as it is


def test_what_cannot_be_drawn_is_left_out():
    assert step_curves(LOG[:2]) == {}  # one step is no curve
    broken = [*LOG[:2], {**LOG[2], "entropy": float("nan")}]
    assert step_curves(broken)["entropy"] == [[1, 0.5]]  # JSON has no NaN


# ----------------------------------------------------------------------------------- a finished run
def test_the_same_page_from_the_folder_alone(finished):
    before = sorted(finished.run.rglob("*"))
    (finished.run / "report.html").unlink()
    train.main(["--report", str(finished.run)])
    assert read_page(finished.run)[1] == finished.data
    assert sorted(finished.run.rglob("*")) == before


def test_a_page_that_cannot_be_made_is_refused(finished, tmp_path, capsys):
    copy = shutil.copytree(finished.run, tmp_path / "t", ignore=shutil.ignore_patterns("model"))
    for options, message in (
        ([str(copy)], "there is no model in it"),
        ([str(copy), "--lr", "1"], "--lr cannot stand beside --report"),
        (["gone"], "--report gone: no config.json"),
    ):
        with pytest.raises(SystemExit):
            train.main(["--report", *options])
        assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------- data of others
HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>"
ROWS = [
    {"id": HOSTILE, "question": f"How many? {HOSTILE}", "answer": "1", "image": "a.png"},
    {
        "id": "2",
        "question": "And here?",
        "answer": "2",
        "image": "a.png",
        "hint": {"look": [HOSTILE]},
        "boxes": [[[0, 0, 450, 225]]],
    },
]


def test_the_page_reads_nothing_from_the_data_as_html(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (900, 450), "red").save("a.png")
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    options = "--steps 1 --name t --data d.jsonl --eval-data d.jsonl --max-new-tokens 8 --report"
    train.main([*TINY, *shlex.split(options)])
    html, data = read_page(tmp_path / "runs" / "t")
    assert html.count("<script") == html.count("</script") == 2
    assert "<img" not in html
    assert "<!--" not in html
    assert data["curves"] == {}  # of one step
    hinted, plain = data["questions"]  # hinted ones first
    assert (hinted["id"], plain["id"]) == ("2", HOSTILE)
    assert hinted["hint"]["look"] == [HOSTILE]
    [image] = hinted["images"]
    assert image["boxes"] == [[0, 0, 0.5, 0.5]]
    assert image["width"] == 448
    for _, divergence, _, teacher in plain["before"][0]["tokens"]:  # no hint: no teacher
        assert divergence == 0
        assert teacher is None


def test_boxes_that_are_not_one_list_per_image_are_refused(tmp_path):
    Image.new("RGB", (900, 450), "red").save(tmp_path / "a.png")
    write_jsonl(tmp_path / "d.jsonl", [ROWS[0], {**ROWS[1], "boxes": [[0, 0, 450, 225]]}])
    with pytest.raises(ValueError, match="d.jsonl:2: field 'boxes'"):
        load_questions(str(tmp_path / "d.jsonl"))
