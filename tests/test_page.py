"""plumbing/page.py: the page shows what the loss sees, and reads nothing from the data as HTML."""

import json
import shutil

import pytest
import torch
from conftest import TINY
from PIL import Image
from transformers import AutoModelForImageTextToText

import train
from hints import teacher_messages
from losses import topk_jsd
from plumbing.answers import load_verifier
from plumbing.data import load_questions
from plumbing.images import load_processor
from plumbing.page import explain
from plumbing.settings import EMBEDDED
from rollout import banned_tokens, encode_prompts, sample_groups, student_messages
from toy import world


def page_data(path):
    html = path.read_text()
    return html, json.loads(
        html.partition('<script id="data" type="application/json">')[2].partition("</script>")[0]
    )


def test_the_page_shows_the_finished_run(tmp_path, monkeypatch, capsys):
    """Text, divergence and likeliest tokens are those that the loss sees; the same page again from the folder alone."""
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--name", "t", "--report"])
    run = tmp_path / "runs" / "t"
    assert "a page to look at: runs/t/report.html" in capsys.readouterr().out
    html, data = page_data(run / "report.html")
    assert [q["id"] for q in data["questions"]] == [
        f"puzzle-{10**9 + i}" for i in range(6)
    ] and "://" not in html
    first = world.puzzles("heldout", 1)[0]
    question = data["questions"][0]
    assert (
        question["hint"]["look"] == list(first.hint.look)
        and len(question["before"]) == len(question["after"]) == 4
    )
    assert (
        question["images"][0]["boxes"] == [[x / 112 for x in box] for box in first.boxes[0]]
        and question["before"] != question["after"]
    )
    models = {
        name: AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in (("before", EMBEDDED), ("after", run / "model"))
    }
    processor = load_processor(EMBEDDED)
    plain, hinted = encode_prompts(
        processor, [first] * 2, [student_messages(first), teacher_messages(first)]
    )
    for name, model in models.items():
        [group] = sample_groups(model, processor, [first], [plain], 4, max_new_tokens=48)
        for shown, rollout in zip(question[name], group):
            texts, jsd, student, teacher = zip(*shown["tokens"])
            assert shown["more"] == 0
            assert (
                "".join(texts) == processor.tokenizer.decode(rollout.ids)
                and shown["truncated"] == rollout.truncated
            )
            assert shown["correct"] == load_verifier("rules")(rollout.text, first.answer)
            logits = []
            for m, prompt in (
                (model, plain),
                (models["before"], hinted),
            ):  # without any of the machinery: one whole sequence
                ids = torch.cat([prompt.ids, torch.tensor(rollout.ids)])[None]
                types = torch.cat([prompt.types, torch.zeros(len(rollout.ids), dtype=torch.long)])[
                    None
                ]
                with torch.no_grad():
                    z = m(
                        input_ids=ids,
                        mm_token_type_ids=types,
                        pixel_values=prompt.pixels,
                        image_grid_thw=prompt.grid,
                    ).logits[0, len(prompt.ids) - 1 : -1]
                logits.append(
                    z.index_fill(
                        -1, torch.tensor(banned_tokens(m, processor.tokenizer)), -torch.inf
                    )
                )
            torch.testing.assert_close(
                torch.tensor(jsd), topk_jsd(*logits, 20), atol=2e-4, rtol=1e-3
            )
            assert not {
                processor.tokenizer.decode([i]) for i in banned_tokens(model, processor.tokenizer)
            } & {text for top in student for text, _ in top}
            for tops, z in zip((student, teacher), logits):
                for top, p in zip(tops, z.softmax(-1)):
                    assert (
                        top[0][0] == processor.tokenizer.decode([p.argmax()])
                        and abs(top[0][1] - p.max()) < 1e-3
                        and len(top) == 5
                    )
    [cut] = explain(
        models["after"], models["before"], processor, *train.parse_args([])[:2], first, 1, most=9
    )
    assert [t[0] for t in cut["tokens"]] == [
        t[0] for t in question["after"][0]["tokens"][:9]
    ] and cut["more"] == len(question["after"][0]["tokens"]) - 9
    before = sorted(run.rglob("*"))
    (run / "report.html").unlink()
    train.main(["--report", str(run)])
    assert page_data(run / "report.html")[1] == data and sorted(run.rglob("*")) == before
    shutil.rmtree(run / "model")
    for argv, message in (
        (["--report", str(run)], "there is no trained model in it"),
        (["--report", str(run), "--lr", "1"], "--lr cannot stand beside --report"),
        (["--report", "gone"], "--report gone: no config.json"),
    ):
        with pytest.raises(SystemExit):
            train.main(argv)
        assert message in capsys.readouterr().err


def test_the_page_reads_nothing_from_the_data_as_html(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>"
    Image.new("RGB", (900, 450), "red").save("a.png")
    rows = [
        {"id": bad, "question": f"How many? {bad}", "answer": "1", "image": "a.png"},
        {
            "id": "2",
            "question": "And here?",
            "answer": "2",
            "image": "a.png",
            "hint": {"look": [bad]},
            "boxes": [[[0, 0, 450, 225]]],
        },
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train.main(
        [
            *TINY,
            "--steps",
            "1",
            "--name",
            "t",
            "--data",
            "d.jsonl",
            "--eval-data",
            "d.jsonl",
            "--max-new-tokens",
            "8",
            "--report",
        ]
    )
    html, data = page_data(tmp_path / "runs" / "t" / "report.html")
    assert (
        html.count("<script") == 2 == html.count("</script")
        and "<img" not in html
        and "<!--" not in html
    )
    assert [q["id"] for q in data["questions"]] == ["2", bad] and data["questions"][0]["hint"][
        "look"
    ] == [bad]  # hinted ones first
    assert (
        data["questions"][0]["images"][0]["boxes"] == [[0, 0, 0.5, 0.5]]
        and data["questions"][0]["images"][0]["width"] == 448
    )
    assert all(
        token[3] is None and token[1] == 0 for token in data["questions"][1]["before"][0]["tokens"]
    )  # no hint: no teacher
    rows[1]["boxes"] = [[0, 0, 450, 225]]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="d.jsonl:2: field 'boxes'"):
        load_questions("d.jsonl")
