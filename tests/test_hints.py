"""hints.py: the structure, the one template, and the spoiler check."""
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import hints
from hints import Hint, NoReply, Rejected, build_hint, find_spoilers, hinted_messages, teacher_messages
from rollout import FORMAT_PROMPT, Sample, encode_prompts, load_samples, plain_messages
from toy import world

ROOT = Path(__file__).resolve().parent.parent

HINT = Hint(look=("the red bar", "its label"), ignore=("the legend.",), steps=("read the height", "compare it"))


def test_json_both_ways():
    assert Hint.from_json(HINT.to_json()) == HINT
    assert Hint.from_json(json.loads(HINT.to_json())) == HINT
    assert Hint.from_json("Compare the two bars.") == Hint(steps=("Compare the two bars.",))


@pytest.mark.parametrize("bad,message", [({"look": "x"}, "lists of texts"), ({"where": ["x"]}, "unknown hint field 'where'"),
                                         ({"look": [""]}, "'look'"), ({"steps": [3]}, "'steps'"), ({}, "at least one"),
                                         ({"look": ["the <image>"]}, "special token"), ({"look": ["<|image_pad|>"]}, "special token"), ([1], "got list"), ("{broken", "property name")])
def test_bad_hints(bad, message):
    with pytest.raises(ValueError, match=message):
        Hint.from_json(bad)


def test_render_has_every_phrase_once_and_no_empty_part():
    text = HINT.render()
    assert text == "Hint:\n- Look at: the red bar; its label.\n- Ignore: the legend.\n- Steps: read the height; compare it."
    assert "Ignore" not in Hint(look=("a",)).render()


def test_the_teacher_reads_the_student_s_prompt_plus_the_hint():
    sample = Sample("a", "How high is it?", "12", ["one.png", "two.png"], HINT)
    plain, hinted = plain_messages(sample)[0]["content"], hinted_messages(sample)[0]["content"]
    assert plain[:2] == hinted[:2] == [{"type": "image"}] * 2
    assert HINT.render() not in plain[-1]["text"] and plain[-1]["text"].endswith(FORMAT_PROMPT)
    assert HINT.render() in hinted[-1]["text"]
    assert hinted[-1]["text"].replace(HINT.render() + "\n", "") == plain[-1]["text"]


def spoiler_cases():
    for line in (ROOT / "tests" / "spoilers.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        verdict, answer, question, options, text = line.split("\t")
        yield verdict, answer, question, options.split(";") if options else None, text


def test_labelled_spoilers(capsys):
    """Precision: of the hints called spoilers, how many are; recall: of the spoilers, how many are found."""
    counts, wrong = Counter(), []
    for verdict, answer, question, options, text in spoiler_cases():
        found = find_spoilers(Hint(steps=(text,)), question, answer, options)
        counts[verdict, bool(found)] += 1
        if (verdict == "spoiler") != bool(found):
            wrong.append(f"{verdict}: {text!r} for {answer!r}: {found}")
    hits, missed, false, passed = (counts[key] for key in (("spoiler", True), ("spoiler", False), ("clean", True), ("clean", False)))
    precision, recall = hits / (hits + false), hits / (hits + missed)
    with capsys.disabled():
        print(f"\nfind_spoilers: {hits + missed} spoilers and {false + passed} clean hints; precision {precision:.3f}, recall {recall:.3f}",
              *wrong, sep="\n  ")
    assert hits + missed >= 100 and false + passed >= 100
    assert precision >= 0.97 and recall >= 0.97
    # each rule has few cases: one that stops working does not move the two numbers much
    assert {w.split("'")[1] for w in wrong} == {"half past two", "30 minutes past 2"}


def test_a_number_of_the_question_may_be_cited_but_not_computed():
    assert find_spoilers(Hint(steps=("start at 50",)), "Is 50 more?", "50") == []
    assert find_spoilers(Hint(steps=("25 + 25 = 50",)), "Is 50 more?", "50")


def test_three_thousand_puzzle_hints_hold_no_spoiler():
    for i in range(3000):
        puzzle = world.make_puzzle("train", i)
        hint, question = world.hint(puzzle), world.question(puzzle)
        assert find_spoilers(hint, question, str(puzzle.answer)) == []
        assert not any(c.isdigit() for c in hint.render())                      # no count, sum or intermediate result in any form
        assert not any(gem in hint.render() for gem in ("red", "green", "blue"))


def test_no_text_breaks_the_spoiler_check():
    rng = random.Random(0)
    pieces = ["\\frac{", "}", "{", "(A) ", "hundred ", "one half ", "1/0", "9" * 400, "\x00", "½", "\U0001d7d9", "e9999", "^", "=", "-", " and ", ";", "\\boxed{", "ⅷ", "\ud800", "B."]
    for i in range(100):
        text, question, answer = ("x" + "".join(rng.choices(pieces, k=rng.randint(0, 12))) for _ in range(3))
        assert isinstance(find_spoilers(Hint(look=(text,)), question, answer.lstrip("x")), list)
    find_spoilers(Hint(look=("hundred " * 3000,)), "?", "7")


def test_the_other_teachers_of_the_comparison():
    sample = Sample("a", "How high is it?", "12", ["one.png"], HINT, solution="It is 12.")
    texts = {c: teacher_messages(sample, c)[0]["content"][-1]["text"] for c in hints.CONTEXTS}
    assert all(teacher_messages(sample, c)[0]["content"][0] == {"type": "image"} for c in hints.CONTEXTS)
    assert texts["hint"] == hinted_messages(sample)[0]["content"][-1]["text"]
    assert "The answer is 12." in texts["answer"] and "It is 12." not in texts["answer"]
    assert "A solution: It is 12." in texts["solution"]
    assert teacher_messages(sample, "none") == plain_messages(sample)
    bare = Sample("a", "How high is it?", "12", ["one.png"])
    assert [teacher_messages(bare, c) is None for c in hints.CONTEXTS] == [True, False, True, False]


def test_spoilers_and_long_hints_are_taken_away_whole(base):
    samples = world.puzzles("tune", 4)
    samples[1].hint = Hint(steps=(f"the sum is {samples[1].answer}",))
    samples[2].hint = Hint(steps=("read " * 60,))
    assert hints.screen_hints(samples, base[1].tokenizer, 60) == {"spoilers": [samples[1].id], "too long": [samples[2].id]}
    assert [s.hint is not None for s in samples] == [True, False, False, True]
    assert samples[0].hint == world.hint(world.make_puzzle("tune", 0))


def test_what_the_audit_shows():
    sample = Sample("a", "<image>How high?", "12", ["one.png"], HINT)
    views = hints.audit_views(sample, Hint(look=("elsewhere",)))
    seen = {name: (s.images, messages(s)[0]["content"][-1]["text"]) for name, (s, messages) in views.items()}
    assert [bool(images) for images, _ in seen.values()] == [True, True] + [False] * 5
    assert ["How high?" in text for _, text in seen.values()] == [True, True, True, True, True, False, False]
    assert ["red bar" in text for _, text in seen.values()] == [False, True, False, True, False, True, False]
    assert ["elsewhere" in text for _, text in seen.values()] == [False] * 4 + [True, False, True]
    assert all(text.endswith(FORMAT_PROMPT) and "<image>" not in text for _, text in seen.values())


# ------------------------------------------------------------------------------------------------------------------ experts
GOOD = json.dumps({"look": ["the tallest bar"], "ignore": ["the legend"], "steps": ["read its top against the axis"]})


@pytest.mark.parametrize("reply", [GOOD, f"```json\n{GOOD}\n```", f"```\n{GOOD}\n```", f"<think>the answer is 7 {{</think>\n{GOOD}", f"so {{...</think>{GOOD}"])
def test_replies_that_are_hints(reply):
    assert hints.parse_reply(reply) == Hint.from_json(GOOD)


@pytest.mark.parametrize("reply,reason", [("", "not a JSON object"), ("I cannot help with that.", "not a JSON object"), (GOOD[:-9], "not a JSON object"), (f"Here it is: {GOOD}", "not a JSON object"),
                                          (f"[{GOOD}]", "not a JSON object"), ('"look"', "not a JSON object"), ("{}", "wrong fields"), ('{"look": "the bar"}', "wrong fields"),
                                          ('{"look": [7]}', "wrong fields"), ('{"look": ["a"], "answer": ["7"]}', "wrong fields"), ("[" * 10**5, "not a JSON object"),
                                          (json.dumps({"look": ["word " * 201]}), "too long"), (f"<think>{GOOD}", "not a JSON object")])
def test_replies_that_are_none(reply, reason):
    with pytest.raises(Rejected, match=reason):
        hints.parse_reply(reply)


def scripted(*replies):
    """An expert that gives these replies in turn, and the list of the chats that it was shown."""
    chats, left = [], list(replies)

    def ask(sample, messages):
        chats.append(messages)
        reply = left.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply
    return ask, chats


QUESTION = Sample("q", "How many bars are red?", "7", ["a.png", "b.png"], choices=["7", "9"])


def test_a_spoiling_hint_is_asked_for_again_with_the_reasons():
    bad = json.dumps({"look": ["the seven red bars"]})
    ask, chats = scripted(bad, Rejected("cut off: the reply reached 9 tokens"), GOOD)
    hint, rejected = build_hint(ask, QUESTION, 3)
    assert hint == Hint.from_json(GOOD) and rejected == [["holds the answer's number: 7"], ["cut off: the reply reached 9 tokens"]]
    first, second, third = chats
    assert [turn["role"] for turn in first] == ["user"] and [turn["role"] for turn in second] == ["user", "assistant", "user"]
    assert first[0]["content"][:2] == [{"type": "image"}] * 2
    text = first[0]["content"][-1]["text"]
    assert QUESTION.question in text and "answer (never in the hint): 7" in text and "(B) 9" in text and "zero" not in text
    assert second[0] == third[0] == first[0] and second[1]["content"][0]["text"] == bad
    assert "holds the answer's number: 7" in second[2]["content"][0]["text"] and "cut off" in third[2]["content"][0]["text"]


def test_after_the_last_try_the_question_stays_without_a_hint():
    ask, chats = scripted("no", "no", GOOD)
    assert build_hint(ask, QUESTION, 2) == (None, [["not a JSON object"]] * 2) and len(chats) == 2
    with pytest.raises(NoReply):
        build_hint(scripted(NoReply("x"))[0], QUESTION)


class Server:
    """A real HTTP server that speaks the chat-completions dialect. behave(question, how often asked before) -> (status, body dict or bytes), or
    seconds to wait before a good reply."""

    def __init__(self, behave):
        self.asked, self.requests, self.behave, lock = Counter(), [], behave, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][0]["content"][-1]["text"]
                question = re.search(r"Question: (.*)", text)[1]
                with lock:
                    before = outer.asked[question]
                    outer.asked[question] += 1
                    outer.requests.append((self.path, self.headers.get("Authorization"), body))
                status, reply = outer.behave(question, before)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:             # the client has gone
                    pass

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def chat_reply(text, finish="stop"):
    return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "system_fingerprint": "", "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
                 "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def serve(monkeypatch):
    """Start servers; the client does not wait between attempts, and holds no key but a saved hub token that must not leave the machine."""
    servers = []
    monkeypatch.setattr(hints, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def start(behave):
        servers.append(Server(behave))
        return servers[-1]
    yield start
    for server in servers:
        server.http.shutdown()


def write_data(folder, questions):
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    (folder / "d.jsonl").write_text("".join(json.dumps({"id": f"q{i}", "question": q, "answer": "7", "images": "a.png"}) + "\n" for i, q in enumerate(questions)))
    return str(folder / "d.jsonl")


def command(server, folder, *more):
    return hints.main(["--data", str(folder / "d.jsonl"), "--out", str(folder / "h.jsonl"), "--model", "m", "--api-base", server.url, *more])


def test_a_server_that_does_everything_wrong(serve, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    spoiler = json.dumps({"steps": ["count the seven bars"]})

    def behave(question, before):
        if question == "slow once" and not before:
            time.sleep(3)
        return {"good": chat_reply(GOOD), "slow once": chat_reply(GOOD), "spoils once": chat_reply(GOOD if before else spoiler), "spoils": chat_reply(spoiler),
                "prose": chat_reply("The bars are nice."), "cut": chat_reply(GOOD, "length"), "refusal": chat_reply(""), "bad request": (400, {"error": "x"}),
                "busy once": chat_reply(GOOD) if before else (429, {}), "broken once": chat_reply(GOOD) if before else (500, b"oops"),
                "garbage once": chat_reply(GOOD) if before else (200, b"<html>"), "no choices once": chat_reply(GOOD) if before else (200, {"choices": []}),
                "down": (503, {})}[question]
    questions = ["good", "slow once", "spoils once", "spoils", "prose", "cut", "refusal", "bad request", "busy once", "broken once", "garbage once", "no choices once", "down"]
    write_data(tmp_path, questions)
    server = serve(behave)
    assert command(server, tmp_path, "--timeout", "1", "--tries", "2", "--parallel", "4") == 0
    records = {r["question"]: r for r in map(json.loads, (tmp_path / "h.jsonl").read_text().splitlines())}
    assert set(records) == set(questions) - {"down"}                        # nothing was learnt about it: it is asked again by the next run
    assert {q for q, r in records.items() if r["hint"]} == {q for q in questions if "once" in q or q == "good"}
    assert records["good"]["hint"] == json.loads(GOOD) and records["spoils once"]["rejected"] == [["holds the answer's number: 7"]]
    reasons = {q: [reply[0].partition(":")[0] for reply in records[q]["rejected"]] for q in ("spoils", "prose", "cut", "refusal", "bad request")}
    assert reasons == {"spoils": ["holds the answer's number"] * 2, "prose": ["not a JSON object"] * 2, "cut": ["cut off"] * 2, "refusal": ["refused"] * 2,
                       "bad request": ["refused by the server"] * 2}
    assert server.asked["down"] == 3 and server.asked["slow once"] == 2
    path, key, body = server.requests[0]
    assert path == "/v1/chat/completions" and key == "Bearer sesame" and body["model"] == "m"
    picture = body["messages"][0]["content"][0]
    assert picture["type"] == "image_url" and picture["image_url"]["url"].startswith("data:image/png;base64,")
    printed = capsys.readouterr()
    assert "questions 13, with a hint 7 (6 at try 1, 1 at try 2), left without 5, not answered yet 1" in printed.out
    assert re.search(r"not a JSON object +2\n", printed.out) and re.search(r"holds the answer's number +3\n", printed.out)
    assert "sesame" not in printed.out + printed.err + (tmp_path / "h.jsonl").read_text()
    before = server.asked.copy()
    assert command(server, tmp_path, "--parallel", "2") == 0                # only what has no line is asked again
    assert {q for q in questions if server.asked[q] != before[q]} == {"down"}


def test_the_hub_token_stays_here_and_a_wrong_key_ends_the_run(serve, tmp_path, capsys):
    write_data(tmp_path, ["a", "b", "c", "d"])
    server = serve(lambda question, before: (401, {"error": "no key"}))
    assert command(server, tmp_path, "--parallel", "1") == 1
    assert len(server.requests) == 1 and server.requests[0][1] == "Bearer none"
    assert "HTTP 401" in capsys.readouterr().err and (tmp_path / "h.jsonl").read_text() == ""


def test_a_dead_server_ends_the_run_and_loses_nothing(serve, tmp_path, capsys):
    write_data(tmp_path, [f"question {i}" for i in range(9)])
    server = serve(lambda question, before: chat_reply(GOOD) if question < "question 3" else (502, {}))
    assert command(server, tmp_path, "--parallel", "1") == 1
    assert len((tmp_path / "h.jsonl").read_text().splitlines()) == 3 and "no reply to 2 questions in a row (HTTP 502)" in capsys.readouterr().err
    assert hints.main(["--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "new.jsonl"), "--model", "m", "--api-base", "http://127.0.0.1:9/v1",
                       "--parallel", "1"]) == 1
    assert "ConnectError" in capsys.readouterr().err


def test_single_failures_do_not_end_the_run_and_limit_takes_the_first(serve, tmp_path, capsys):
    write_data(tmp_path, [f"question {i}" for i in range(9)])
    server = serve(lambda question, before: chat_reply(GOOD) if int(question[-1]) % 2 else (502, {}))
    assert command(server, tmp_path, "--parallel", "1", "--limit", "7") == 0
    assert list(hints.load_hints(tmp_path / "h.jsonl")) == ["q1", "q3", "q5"] and "not answered yet 4" in capsys.readouterr().out


def test_killed_at_any_moment_it_goes_on(serve, tmp_path):
    questions = [f"question {i}" for i in range(40)]
    write_data(tmp_path, questions)

    def behave(question, before):
        time.sleep(0.05)
        return chat_reply(GOOD)
    server, out = serve(behave), tmp_path / "h.jsonl"
    args = [sys.executable, str(ROOT / "hints.py"), "--data", str(tmp_path / "d.jsonl"), "--out", str(out), "--model", "m", "--api-base", server.url, "--parallel", "3"]
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 7):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert out.read_bytes().endswith(b"\n") and len(hints.load_hints(out)) >= 7
    out.write_bytes(out.read_bytes() + b'{"id": "q39", "hi')                # as a crash of the machine may leave it
    assert subprocess.run(args, capture_output=True, text=True, check=True).stderr.count("last line was not whole") == 1
    assert sorted(hints.load_hints(out)) == sorted(f"q{i}" for i in range(40))
    assert sum(server.asked.values()) <= 40 + 3                             # a kill loses no more than the questions in flight


@pytest.mark.parametrize("args,message", [(["--source", "attention", "--api-base", "http://x"], "--api-base is for"), (["--overlay", "maps"], "--overlay for"),
                                          (["--tries", "0"], "must be above 0"), (["--limit", "0"], "must be above 0"), (["--layers", "3"], "FIRST-LAST"),
                                          (["--data", "none.jsonl"], "no such file")])
def test_bad_options(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        hints.main(["--out", str(tmp_path / "h.jsonl"), "--model", "m", *args])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_local_model_as_the_expert(base, tmp_path, capsys):
    """The embedded model writes no JSON: every reply is rejected and counted."""
    assert hints.main(["--out", str(tmp_path / "h.jsonl"), "--model", str(ROOT / "toy" / "base"), "--limit", "2", "--tries", "2", "--max-new-tokens", "3"]) == 0
    records = [json.loads(line) for line in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(r["hint"] is None and len(r["rejected"]) == 2 for r in records)
    assert {reply[0].partition(":")[0] for r in records for reply in r["rejected"]} == {"cut off"}
    assert "left without 2" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ hints files
def test_hints_join_by_id(tmp_path):
    write_data(tmp_path, ["one?", "two?", "three?"])
    path = tmp_path / "h.jsonl"
    rows = [{"id": "q1", "question": "two?", "hint": {"look": ["left"]}, "boxes": [[[0, 0, 9, 9]]]}, {"id": "q2", "hint": None}, {"id": "q7", "hint": "go on"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples = load_samples(tmp_path / "d.jsonl")
    assert hints.join_hints(samples, path) == 1 and [s.hint for s in samples] == [None, Hint(look=("left",)), None]
    assert [s.boxes for s in samples] == [None, [[[0, 0, 9, 9]]], None]
    path.write_text(json.dumps({**rows[0], "boxes": [[0, 0, 9, 9]]}) + "\n")
    with pytest.raises(ValueError, match="h.jsonl: the hint of id 'q1': field 'boxes'"):
        hints.join_hints(samples, path)
    path.write_text(json.dumps({**rows[0], "question": "zwei?"}) + "\n")
    with pytest.raises(ValueError, match="'q1' was written for another question: 'zwei"):
        hints.join_hints(samples, path)


@pytest.mark.parametrize("line,message", [("{broken", ":2: "), ('{"id": "a"}', ":2: expected an object with id and hint"), ('{"id": "x", "hint": null}', ":2: id 'x' stands here twice"),
                                          ('{"id": "a", "hint": {"look": "left"}}', ":2: hint fields"), ("[]", ":2: expected an object")])
def test_bad_hints_files(line, message, tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text('{"id": "x", "hint": null}\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(str(path)) + message):
        hints.load_hints(path)


# --------------------------------------------------------------------------------------------------------------- attention
def test_attention_maps_are_the_attention_of_a_plain_forward(tiny):
    """Against one uncached forward a prompt with output_attentions."""
    model, processor = tiny
    sample = world.puzzles("tune", 1)[0]
    sample.images, sample.answer = [sample.images[0].resize((140, 84)), sample.images[0]], "1 2"
    implementation = model.config.text_config._attn_implementation
    maps = hints.attention_maps(model, processor, sample, (0, 1))
    assert [m.shape for m in maps] == [(3, 5), (4, 4)] and model.config.text_config._attn_implementation == implementation
    rows = []
    model.set_attn_implementation("eager")
    for question in (sample.question, "Describe the image."):
        chat = plain_messages(Sample("", question, "", sample.images))
        [prompt] = encode_prompts(processor, [sample], [chat])
        answer = processor.tokenizer("1 2")["input_ids"]
        ids = torch.cat([prompt.ids, torch.tensor(answer)]).unsqueeze(0)
        types = torch.cat([prompt.types, torch.zeros(2, dtype=torch.long)]).unsqueeze(0)
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, pixel_values=prompt.pixels,
                        image_grid_thw=prompt.grid, output_attentions=True, use_cache=False)
        rows.append(torch.stack(out.attentions).mean((0, 1, 2))[-2:, types[0].bool()].mean(0))
    model.set_attn_implementation(implementation)
    ratio = rows[0] / rows[1]
    for got, part in zip(maps, (ratio[:15].view(3, 5), ratio[15:].view(4, 4))):
        torch.testing.assert_close(got, part / part.mean(), rtol=1e-3, atol=1e-4)


def test_attention_layers_are_checked(base):
    with pytest.raises(ValueError, match="layers 1-9: the model has layers 0 to 2"):
        hints.attention_maps(*base, world.puzzles("tune", 1)[0], (1, 9))


def test_regions_are_the_hot_areas_hottest_first():
    heat = torch.zeros(6, 8)
    heat[1:3, 1:4] = 5
    heat[5, 7] = 9
    heat[4, 0] = 8
    heat[0, 7] = 7
    assert hints.regions(heat) == [(1, 1, 4, 3), (7, 5, 8, 6), (0, 4, 1, 5)]
    assert hints.regions(torch.ones(3, 3)) == []


@pytest.mark.parametrize("box,exact,vague", [((0, 0, 2, 2), "the upper left", None), ((6, 6, 8, 8), "the lower right", None), ((3, 3, 5, 5), "the middle of the picture", None),
                                             ((4, 0, 6, 8), "the third column from the left", "the middle part, from top to bottom"),
                                             ((0, 6, 8, 8), "the fourth row from the top", "the lower part, from left to right"), ((0, 0, 8, 8), "the whole picture", None),
                                             ((0, 3, 8, 6), "the middle part, from left to right", None), ((5, 3, 8, 4), "the middle right", None)])
def test_places_in_words(box, exact, vague):
    assert hints.place_words(box, (8, 8)) == exact and hints.place_words(box, (8, 8), exact=False) == (vague or exact)


def test_an_attention_hint_that_would_name_the_answer_says_it_without_ordinals(base, monkeypatch):
    heat = torch.zeros(4, 4)
    heat[:, 2] = 9
    monkeypatch.setattr(hints, "attention_maps", lambda *args: [heat])
    sample = Sample("a", "Which column holds the star?", "third", [Image.new("RGB", (100, 200))])
    hint, reasons, _, boxes = hints.attention_hint(None, None, sample)
    assert hint.look == ("the middle part, from top to bottom",) and not reasons and boxes == [[[50, 0, 75, 200]]]
    sample.answer = "fifth"
    assert hints.attention_hint(None, None, sample)[0].look == ("the third column from the left",)
    monkeypatch.setattr(hints, "attention_maps", lambda *args: [torch.ones(4, 4)])
    assert hints.attention_hint(None, None, sample)[:2] == (None, ["no region stands out"])


def test_the_overlay_is_red_where_the_map_is_hot():
    heat = torch.zeros(4, 4)
    heat[0, 0] = 3
    picture = hints.overlay(Image.new("RGB", (80, 40), "white"), heat, [[40, 20, 80, 40]])
    assert picture.size == (80, 40) and picture.getpixel((30, 35)) == (255, 255, 255) and picture.getpixel((40, 30)) == (20, 60, 255)
    red, green, _ = picture.getpixel((2, 2))
    assert red > 200 and green < 150


def test_attention_from_the_command(tmp_path, capsys):
    args = ["--source", "attention", "--out", str(tmp_path / "h.jsonl"), "--model", str(ROOT / "toy" / "base"), "--limit", "3", "--overlay", str(tmp_path / "maps"), "--layers", "1-2"]
    assert hints.main(args) == 0
    records = hints.load_hints(tmp_path / "h.jsonl")
    assert len(records) == len(list((tmp_path / "maps").glob("*.png"))) == 3
    assert all(r["hint"].look and r["boxes"][0] for r in records.values() if r["hint"])
    assert hints.main(args) == 0 and "3 of them in" in capsys.readouterr().out
