"""plumbing/build_hints.py and experts.py: the command, also against a server that does it wrong."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image

from plumbing import build_hints, experts
from plumbing.build_hints import main, overlay
from plumbing.hint_file import load_hints

GOOD = json.dumps(
    {
        "look": ["the tallest bar"],
        "ignore": ["the legend"],
        "steps": ["read its top against the axis"],
    }
)


class Server:
    """A real HTTP server that speaks the chat-completions dialect.

    behave(question text, how often it was asked before) -> (status, body as dict or bytes). It may
    sleep first. asked: requests per question text; requests: (path, authorization header, body).
    """

    def __init__(self, behave):
        self.behave = behave
        self.asked = Counter()
        self.requests = []
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, path, authorization, body):
        """Note the request -> status and reply."""
        text = body["messages"][0]["content"][-1]["text"]
        question = re.search(r"Question: (.*)", text)[1]
        with self.lock:
            before = self.asked[question]
            self.asked[question] += 1
            self.requests.append((path, authorization, body))
        return self.behave(question, before)

    def handler(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                authorization = self.headers.get("Authorization")
                status, reply = outer.answer(self.path, authorization, body)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                with suppress(OSError):  # the client has gone
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        return Handler


def chat_reply(text, finish="stop"):
    message = {"role": "assistant", "content": text}
    return 200, {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "system_fingerprint": "",
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        "choices": [{"index": 0, "finish_reason": finish, "message": message}],
    }


@pytest.fixture
def serve(monkeypatch):
    """Start servers. The client does not wait between attempts.

    It has no key but a saved hub token, which must not leave the machine.
    """
    servers = []
    monkeypatch.setattr(experts, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def start(behave):
        servers.append(Server(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()


def write_data(folder, texts):
    """d.jsonl with the questions q0, q1, ..., all with the same picture."""
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    rows = [
        {"id": f"q{number}", "question": text, "answer": "7", "images": "a.png"}
        for number, text in enumerate(texts)
    ]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(url, folder, out="h.jsonl"):
    """The command line for the questions of write_data and a server at this address."""
    data, out = str(folder / "d.jsonl"), str(folder / out)
    return ["--data", data, "--out", out, "--model", "m", "--api-base", url]


def command(server, folder, *options):
    return main([*arguments(server.url, folder), *options])


def hints_lines(folder):
    """The lines of the hints file as they stand there."""
    return [json.loads(line) for line in (folder / "h.jsonl").read_text().splitlines()]


def kind(reasons):
    """What kind of reason a reply was rejected for."""
    return reasons[0].partition(":")[0]


# Behaviour of the server: question text -> replies to the first and to every later request.
SPOILER = chat_reply(json.dumps({"look": ["the bars"], "steps": ["count the seven bars"]}))
FINE = chat_reply(GOOD)
CUT = chat_reply(GOOD, "length")
EMPTY = chat_reply("")
BEHAVIOUR = {
    "good": (FINE, FINE),
    "slow once": (FINE, FINE),
    "spoils once": (SPOILER, FINE),
    "spoils": (SPOILER, SPOILER),
    "prose": (chat_reply("The bars are nice."),) * 2,
    "cut": (CUT, CUT),
    "refusal": (EMPTY, EMPTY),
    "bad request": ((400, {"error": "x"}),) * 2,
    "busy once": ((429, {}), FINE),
    "broken once": ((500, b"oops"), FINE),
    "garbage once": ((200, b"<html>"), FINE),
    "no choices once": ((200, {"choices": []}), FINE),
    "down": ((503, {}),) * 2,
}


def misbehave(question, before):
    if question == "slow once" and before == 0:
        time.sleep(3)
    return BEHAVIOUR[question][min(before, 1)]


def check_first_request(server):
    path, authorization, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert authorization == "Bearer sesame"
    assert body["model"] == "m"
    picture = body["messages"][0]["content"][0]
    assert picture["type"] == "image_url"
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_server_that_does_everything_wrong(serve, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    texts = list(BEHAVIOUR)
    write_data(tmp_path, texts)
    server = serve(misbehave)
    assert command(server, tmp_path, "--timeout", "1", "--tries", "2", "--parallel", "4") == 0

    records = {record["question"]: record for record in hints_lines(tmp_path)}
    # Nothing was learnt about "down": the next run asks for it again.
    assert set(records) == set(texts) - {"down"}
    with_hint = {text for text, record in records.items() if record["hint"]}
    assert with_hint == {text for text in texts if "once" in text or text == "good"}
    assert records["good"]["hint"] == json.loads(GOOD)
    assert records["spoils once"]["rejected"] == [["holds the answer's number: 7"]]
    kinds = {
        text: [kind(reasons) for reasons in record["rejected"]]
        for text, record in records.items()
        if text not in with_hint
    }
    assert kinds == {
        "spoils": ["holds the answer's number"] * 2,
        "prose": ["not a JSON object"] * 2,
        "cut": ["cut off"] * 2,
        "refusal": ["refused"] * 2,
        "bad request": ["refused by the server"] * 2,
    }
    assert server.asked["down"] == 3
    assert server.asked["slow once"] == 2
    check_first_request(server)

    printed = capsys.readouterr()
    tries = "questions 13, with a hint 7 (6 at try 1, 1 at try 2)"
    assert f"{tries}, left without 5, not answered yet 1" in printed.out
    assert re.search(r"written by +hints\nm +7\n", printed.out)
    assert re.search(r"not a JSON object +2\n", printed.out)
    assert re.search(r"holds the answer's number +3\n", printed.out)
    assert "sesame" not in printed.out + printed.err + (tmp_path / "h.jsonl").read_text()

    before = server.asked.copy()
    assert command(server, tmp_path, "--parallel", "2") == 1  # only what has no line is asked again
    assert {text for text in texts if server.asked[text] != before[text]} == {"down"}


def test_the_hub_token_stays_here_and_a_wrong_key_ends_the_run(serve, tmp_path, capsys):
    write_data(tmp_path, ["a", "b", "c", "d"])
    server = serve(lambda question, before: (401, {"error": "no key"}))
    assert command(server, tmp_path, "--parallel", "1") == 1
    assert len(server.requests) == 1
    assert server.requests[0][1] == "Bearer none"
    assert "HTTP 401" in capsys.readouterr().err
    assert (tmp_path / "h.jsonl").read_text() == ""


def test_a_dead_server_ends_the_run_and_loses_nothing(serve, tmp_path, capsys):
    def dies(question, before):
        return chat_reply(GOOD) if question < "question 3" else (502, {})

    write_data(tmp_path, [f"question {i}" for i in range(9)])
    assert command(serve(dies), tmp_path, "--parallel", "1") == 1
    assert len(hints_lines(tmp_path)) == 3
    assert "no reply to 2 questions in a row (HTTP 502)" in capsys.readouterr().err
    nobody = arguments("http://127.0.0.1:9/v1", tmp_path, "new.jsonl")
    assert main([*nobody, "--parallel", "1"]) == 1
    assert "ConnectError" in capsys.readouterr().err


def test_single_failures_do_not_end_the_run_and_limit_takes_the_first(serve, tmp_path, capsys):
    def fails_for_even(question, before):
        return chat_reply(GOOD) if int(question[-1]) % 2 else (502, {})

    write_data(tmp_path, [f"question {i}" for i in range(9)])
    assert command(serve(fails_for_even), tmp_path, "--parallel", "1", "--limit", "7") == 0
    assert list(load_hints(tmp_path / "h.jsonl")) == ["q1", "q3", "q5"]
    assert "not answered yet 4" in capsys.readouterr().out


def last_error(capsys):
    """The one line of stderr besides the progress bar."""
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line and "question/s" not in line]
    [line] = lines
    return line


def test_a_server_that_never_answers_is_a_failure_for_one_question_too(serve, tmp_path, capsys):
    write_data(tmp_path, ["a"])
    server = serve(lambda question, before: time.sleep(0.5) or FINE)
    assert command(server, tmp_path, "--timeout", "0.1") == 1
    reason = r"no reply to any question that was asked \(\w*Timeout\w* at " + re.escape(server.url)
    assert re.fullmatch(f"stopped: {reason}\\); run again to go on", last_error(capsys))


@pytest.mark.parametrize(
    "body",
    [
        b"<!doctype html><title>It works</title>",
        b"",
        b"null",
        b"\xff\xfe",
        b'{"error": "busy"}',
        b'{"choices": "x"}',
        b'{"choices": [[]]}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": "hello"}]}',
        b'{"choices": [{"message": {"content": [{"type": "text", "text": "a"}]}}]}',
    ],
)
def test_a_body_that_is_no_chat_reply_is_no_reply(body, serve, tmp_path, capsys):
    write_data(tmp_path, ["a", "b"])
    server = serve(lambda question, before: (200, body))
    assert command(server, tmp_path) == 1
    assert server.asked == {"a": 3, "b": 3}
    assert f"(no chat reply from {server.url}: " in last_error(capsys)


@pytest.mark.parametrize("option", ["--api-base", "--fallback-api-base"])
@pytest.mark.parametrize(
    "address",
    [
        "nonsense",
        "localhost:8000/v1",
        "ftp://localhost/v1",
        "http://",
        "http://x:port/v1",
        "http://x:0",
        "http://[::1/v1",
        "http://a..b/v1",
        "http://x\0",
    ],
)
def test_an_address_that_is_no_url_is_one_line(option, address, serve, tmp_path, capsys):
    write_data(tmp_path, ["a"])
    server = serve(lambda question, before: FINE)
    fallback = ["--fallback-model", "f"] if option == "--fallback-api-base" else []
    assert command(server, tmp_path, *fallback, option, address) == 1
    reason = "no address of a server, such as http://localhost:8000/v1"
    assert last_error(capsys) == f"build_hints: error: {address}: {reason}"
    assert not server.requests
    assert not (tmp_path / "h.jsonl").exists()


def test_a_key_with_a_line_break_is_one_line_without_the_key(serve, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame\n")
    write_data(tmp_path, ["a"])
    server = serve(lambda question, before: FINE)
    with pytest.raises(SystemExit) as stop:
        command(server, tmp_path)
    assert stop.value.code == 2
    line = last_error(capsys)
    assert "OPENAI_API_KEY" in line and "sesame" not in line


# ------------------------------------------------------------------------- a second expert
OMITS = chat_reply(json.dumps({"steps": ["compare the bars"]}))
FIVE_STEPS = chat_reply(
    json.dumps({"look": ["the bars"], "steps": ["see", "read", "note", "go"] * 2})
)


def fallback_command(first, second, folder, *options):
    """Run the command with two servers; two tries per expert."""
    fallback = ["--fallback-model", "second", "--fallback-api-base", second.url]
    return command(first, folder, "--tries", "2", *fallback, *options)


def test_the_second_expert_answers_what_the_first_cannot(serve, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    monkeypatch.setenv("FALLBACK_API_KEY", "thyme")
    replies = {
        "good": FINE,
        "refuses": EMPTY,
        "cuts off": CUT,
        "spoils": SPOILER,
        "omits": OMITS,
        "solves": FIVE_STEPS,
        "both fail": SPOILER,
    }
    write_data(tmp_path, list(replies))
    first = serve(lambda question, before: replies[question])
    second = serve(lambda question, before: CUT if question == "both fail" else FINE)
    assert fallback_command(first, second, tmp_path) == 0

    records = {record["question"]: record for record in hints_lines(tmp_path)}
    authors = {text: record["by"] for text, record in records.items()}
    assert authors == {text: "m" if text == "good" else "second" for text in replies}
    kinds = {
        text: [kind(reasons) for reasons in record["rejected"]] for text, record in records.items()
    }
    assert kinds == {
        "good": [],
        "refuses": ["refused"] * 2,
        "cuts off": ["cut off"],  # a second reply of that length would cost too much
        "spoils": ["holds the answer's number"] * 2,
        "omits": ["omits the visual evidence"] * 2,
        "solves": ["is a worked solution"] * 2,
        "both fail": ["holds the answer's number"] * 2 + ["cut off"] * 2,
    }
    assert {text for text, record in records.items() if not record["hint"]} == {"both fail"}
    assert set(second.asked) == set(replies) - {"good"}

    # the same prompt, without the first expert's replies, and each server with its own key
    prompts = {body["messages"][0]["content"][-1]["text"] for _, _, body in first.requests}
    assert {body["messages"][0]["content"][-1]["text"] for _, _, body in second.requests} < prompts
    assert [len(body["messages"]) for _, _, body in second.requests].count(1) == 6
    assert {authorization for _, authorization, _ in first.requests} == {"Bearer sesame"}
    assert {authorization for _, authorization, _ in second.requests} == {"Bearer thyme"}
    assert {body["model"] for _, _, body in second.requests} == {"second"}
    assert {body["max_tokens"] for _, _, body in first.requests + second.requests} == {16384}

    printed = capsys.readouterr()
    assert re.search(r"written by +hints\nsecond +5\nm +1\n", printed.out)
    asked = first.asked.total(), second.asked.total()
    assert fallback_command(first, second, tmp_path) == 0  # nothing is left to do
    assert (first.asked.total(), second.asked.total()) == asked


def test_an_expert_that_is_down_leaves_the_question_for_the_next_run(serve, tmp_path, capsys):
    write_data(tmp_path, ["first down", "second down", "fine"])
    up = []

    def first_expert(question, before):
        if question == "first down" and not up:
            return 503, {}
        return EMPTY if question == "second down" else FINE

    def second_expert(question, before):
        return FINE if up else (503, {})

    first, second = serve(first_expert), serve(second_expert)
    assert fallback_command(first, second, tmp_path) == 0
    assert [record["question"] for record in hints_lines(tmp_path)] == ["fine"]
    assert set(second.asked) == {"second down"}
    assert "not answered yet 2" in capsys.readouterr().out
    up.append(True)
    assert fallback_command(first, second, tmp_path) == 0
    authors = {record["question"]: record["by"] for record in hints_lines(tmp_path)}
    assert authors == {"fine": "m", "first down": "m", "second down": "second"}


def test_a_second_expert_without_access_ends_the_run(serve, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    monkeypatch.delenv("FALLBACK_API_KEY", raising=False)
    write_data(tmp_path, ["a", "b", "c"])
    first = serve(lambda question, before: EMPTY)
    second = serve(lambda question, before: (401, {"error": "no key"}))
    assert fallback_command(first, second, tmp_path, "--parallel", "1") == 1
    assert second.requests[0][1] == "Bearer none"  # the first server's key stays there
    printed = capsys.readouterr().err
    assert second.url in printed
    assert "HTTP 401" in printed and "FALLBACK_API_KEY" in printed


@pytest.mark.parametrize("options, longest", [(["--max-new-tokens", "99"], 99), ([], 16384)])
def test_a_local_second_expert_is_loaded_once_and_only_if_needed(
    serve, tmp_path, monkeypatch, options, longest
):
    loaded = []

    def load(path, max_new_tokens):
        loaded.append((path, max_new_tokens))
        time.sleep(0.2)
        return lambda question, messages: GOOD

    monkeypatch.setattr(experts, "local_expert", load)
    write_data(tmp_path, [f"question {i}" for i in range(4)])
    fallback = ["--fallback-model", "local", *options]
    good = serve(lambda question, before: FINE)
    assert command(good, tmp_path, *fallback) == 0
    assert loaded == []
    (tmp_path / "h.jsonl").unlink()
    refuses = serve(lambda question, before: EMPTY)
    assert command(refuses, tmp_path, *fallback, "--parallel", "4") == 0
    assert loaded == [("local", longest)]
    assert [record["by"] for record in hints_lines(tmp_path)] == ["local"] * 4


TOY_BASE = str(ROOT / "toy" / "base")


def local_arguments(folder):
    data, out = str(folder / "d.jsonl"), str(folder / "h.jsonl")
    return ["--data", data, "--out", out, "--model", TOY_BASE]


def test_a_local_first_expert_has_the_same_limit(tmp_path, monkeypatch):
    asked = []

    def load(path, max_new_tokens):
        asked.append((path, max_new_tokens))
        return lambda question, messages: GOOD

    monkeypatch.setattr(build_hints, "local_expert", load)
    write_data(tmp_path, ["question"])
    assert main(local_arguments(tmp_path)) == 0
    assert asked == [(TOY_BASE, 16384)]


def test_what_a_local_model_cannot_be_shown_is_refused_by_its_line(tmp_path, monkeypatch, capsys):
    """Before the model is loaded. With --skip-bad it is left out, and the others get hints."""
    monkeypatch.setattr(build_hints, "local_expert", lambda path, longest: lambda *asked: GOOD)
    write_data(tmp_path, ["first", "one more <|image_pad|>", "third"])
    with pytest.raises(SystemExit) as stop:
        main(local_arguments(tmp_path))
    assert stop.value.code == 2
    assert "d.jsonl:2: field 'question': it holds '<|image_pad|>'" in capsys.readouterr().err
    assert main([*local_arguments(tmp_path), "--skip-bad"]) == 0
    assert "left out: " in capsys.readouterr().out
    assert [record["id"] for record in hints_lines(tmp_path)] == ["q0", "q2"]


def test_a_second_expert_that_cannot_be_loaded_ends_the_run_in_one_line(
    serve, tmp_path, capsys, monkeypatch
):
    write_data(tmp_path, ["fine", "refused"])
    server = serve(lambda question, before: FINE if question == "fine" else EMPTY)
    options = ["--fallback-model", str(tmp_path / "no-model"), "--parallel", "1"]
    assert command(server, tmp_path, *options) == 1
    assert [record["question"] for record in hints_lines(tmp_path)] == ["fine"]
    stopped = capsys.readouterr().err.splitlines()[-1]
    assert stopped.startswith(f"stopped: --fallback-model {tmp_path / 'no-model'}: ")

    def load(path, max_new_tokens):
        raise OSError("no model\nand a page of advice")

    monkeypatch.setattr(experts, "local_expert", load)
    assert command(server, tmp_path, *options) == 1
    assert capsys.readouterr().err.endswith("no-model: no model\n")


# ------------------------------------------------------------------------------- the command
@pytest.mark.slow
def test_ctrl_c_writes_the_hints_in_work_and_asks_for_no_more(serve, tmp_path):
    asked = threading.Event()

    def slow(question, before):
        asked.set()
        time.sleep(1)
        return chat_reply(GOOD)

    write_data(tmp_path, [f"question {i}" for i in range(9)])
    options = [*arguments(serve(slow).url, tmp_path), "--parallel", "3"]
    args = [sys.executable, "-m", "plumbing.build_hints", *options]
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert asked.wait(60)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped: interrupted; run again to go on" in printed
    assert len(hints_lines(tmp_path)) == 3


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(serve, tmp_path, capsys):
    def slow(question, before):
        time.sleep(0.05)
        return chat_reply(GOOD)

    write_data(tmp_path, [f"question {i}" for i in range(40)])
    server, out = serve(slow), tmp_path / "h.jsonl"
    options = [*arguments(server.url, tmp_path), "--parallel", "3"]
    args = [sys.executable, "-m", "plumbing.build_hints", *options]
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 7):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert out.read_bytes().endswith(b"\n")
    assert len(load_hints(out)) >= 7
    # A crash of the machine may leave half a line.
    out.write_bytes(out.read_bytes() + b'{"id": "q39", "hi')
    assert main(options) == 0
    assert capsys.readouterr().err.count("last line was not whole") == 1
    assert sorted(load_hints(out)) == sorted(f"q{i}" for i in range(40))
    assert sum(server.asked.values()) <= 40 + 3  # a kill loses no more than the questions in flight


SERVER = ["--api-base", "http://x"]  # no model is loaded to check the questions


@pytest.mark.parametrize(
    "options, message",
    [
        (["--source", "attention", "--api-base", "http://x"], "--api-base is for"),
        (["--overlay", "maps"], "--overlay for"),
        (["--fallback-api-base", "http://x"], "--fallback-api-base needs --fallback-model"),
        (["--source", "attention", "--fallback-model", "m"], "--fallback-model is for"),
        (["--tries", "0"], "must be above 0"),
        (["--limit", "0"], "must be above 0"),
        (["--samples", "0"], "must be above 0"),
        (["--max-new-tokens", "0"], "must be above 0"),
        (["--limit", "two"], "argument --limit: invalid int value: 'two'"),
        (["--timeout", "0"], "--timeout must be above 0 and at most 86400, got 0.0"),
        (["--timeout", "inf"], "--timeout must be above 0 and at most 86400, got inf"),
        (["--timeout", "nan"], "--timeout must be above 0 and at most 86400, got nan"),
        (["--layers", "3"], "FIRST-LAST"),
        (["--data", "none.jsonl", *SERVER], "no such file"),
        (["--data", "empty.jsonl", *SERVER], "empty.jsonl: no questions in it"),
        (["--out", "."], ".: not a file"),
        (["--out", "no/folder/h.jsonl"], "No such file or directory: 'no/folder/h.jsonl'"),
        (["--out", "/dev/null"], "/dev/null: not a file"),
        (["--out", "README.md"], "README.md:1: the line is not one JSON object"),
        (["--model", "/no/model"], "--model /no/model: "),
        (["--model", "/no/model", "--source", "attention"], "--model /no/model: "),
        (["--model", "."], "--model .: "),
    ],
)
def test_bad_options(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = {"README.md": "# no hints file", "empty.jsonl": ""}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as error:
        main(["--out", "h.jsonl", "--model", "m", *options])
    assert error.value.code == 2
    line = last_error(capsys)
    assert line.startswith("build_hints: error: ") and message in line
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == contents


def test_the_data_is_not_the_output(tmp_path, capsys):
    write_data(tmp_path, ["a"])
    data = (tmp_path / "d.jsonl").read_bytes()
    with pytest.raises(SystemExit) as error:
        main(arguments("http://x/v1", tmp_path, out="d.jsonl"))
    assert error.value.code == 2
    assert "is the file of --data" in last_error(capsys)
    assert (tmp_path / "d.jsonl").read_bytes() == data


def test_a_model_that_cannot_be_loaded_leaves_an_older_output_as_it_is(tmp_path):
    out = tmp_path / "h.jsonl"
    lines = '{"id": "of another run", "hint": null}\n'
    for content in (lines, ""):
        out.write_text(content)
        with pytest.raises(SystemExit):
            main(["--out", str(out), "--model", "/no/model", "--limit", "1"])
        assert out.read_text() == content


def test_a_local_model_as_the_expert(base, tmp_path, capsys):
    """The embedded model writes no JSON: every reply is rejected and counted."""
    out, model = str(tmp_path / "h.jsonl"), str(ROOT / "toy" / "base")
    limits = ["--limit", "2", "--tries", "2", "--max-new-tokens", "3"]
    assert main(["--out", out, "--model", model, *limits]) == 0
    records = hints_lines(tmp_path)
    assert [record["hint"] for record in records] == [None, None]
    assert [len(record["rejected"]) for record in records] == [2, 2]
    kinds = {kind(reasons) for record in records for reasons in record["rejected"]}
    assert kinds == {"cut off"}
    assert "left without 2" in capsys.readouterr().out


def test_the_overlay_is_red_where_the_map_is_hot():
    heat = torch.zeros(4, 4)
    heat[0, 0] = 3
    picture = overlay(Image.new("RGB", (80, 40), "white"), heat, [[40, 20, 80, 40]])
    assert picture.size == (80, 40)
    assert picture.getpixel((30, 35)) == (255, 255, 255)
    assert picture.getpixel((40, 30)) == (20, 60, 255)
    red, green, _ = picture.getpixel((2, 2))
    assert red > 200
    assert green < 150


def attention_command(folder, *options):
    args = ["--source", "attention", "--model", str(ROOT / "toy" / "base"), "--samples", "32"]
    return main([*args, "--out", str(folder / "h.jsonl"), *options])


@pytest.mark.slow
def test_attention_from_the_command(tmp_path, capsys):
    maps = tmp_path / "maps"
    options = ["--limit", "12", "--overlay", str(maps), "--layers", "2-2"]
    assert attention_command(tmp_path, *options) == 0
    printed = capsys.readouterr().out
    rows = hints_lines(tmp_path)
    assert len(rows) == 12
    with_hint = [row for row in rows if row["hint"]]
    assert len(with_hint) >= 3
    assert all(row["hint"]["look"] and row["boxes"][0] and row["response"] for row in with_hint)
    assert len(list(maps.glob("*.png"))) >= len(with_hint)
    right = [row for row in rows if row["response"]]
    without = 12 - len(right)
    assert re.search(rf"no right response +{without}\n", printed)
    assert f"with a hint {len(with_hint)} " in printed
    assert not (tmp_path / "h.layers.json").exists()
    # With nothing to do, no model is loaded: a model that does not exist is no error.
    assert attention_command(tmp_path, *options, "--model", "no such model") == 0
    assert "12 of them in" in capsys.readouterr().out


@pytest.mark.slow
def test_the_layers_of_the_command_stand_beside_the_output(tmp_path, capsys):
    assert attention_command(tmp_path, "--limit", "24") == 0
    cache = tmp_path / "h.layers.json"
    assert json.loads(cache.read_text())["layers"] == [2]
    assert f"kept in {cache}" in capsys.readouterr().out
    assert attention_command(tmp_path, "--limit", "25") == 0
    assert f"layers 2, from {cache}" in capsys.readouterr().out


def test_layers_that_the_model_does_not_have_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        attention_command(tmp_path, "--layers", "1-9")
    assert error.value.code == 2
    assert "layers 1-9: the model has layers 0 to 2" in last_error(capsys)
    assert not (tmp_path / "h.jsonl").exists()
