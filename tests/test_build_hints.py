"""plumbing/build_hints.py and experts.py: the command, against a server that does everything wrong."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image

from plumbing import experts
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
                except OSError:  # the client has gone
                    pass

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def chat_reply(text, finish="stop"):
    return 200, {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "system_fingerprint": "",
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
        ],
    }


@pytest.fixture
def serve(monkeypatch):
    """Start servers; the client does not wait between attempts, and holds no key but a saved hub token that must not leave the machine."""
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


def write_data(folder, questions):
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    (folder / "d.jsonl").write_text(
        "".join(
            json.dumps({"id": f"q{i}", "question": q, "answer": "7", "images": "a.png"}) + "\n"
            for i, q in enumerate(questions)
        )
    )
    return str(folder / "d.jsonl")


def command(server, folder, *more):
    return main(
        [
            "--data",
            str(folder / "d.jsonl"),
            "--out",
            str(folder / "h.jsonl"),
            "--model",
            "m",
            "--api-base",
            server.url,
            *more,
        ]
    )


def test_a_server_that_does_everything_wrong(serve, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    spoiler = json.dumps({"steps": ["count the seven bars"]})

    def behave(question, before):
        if question == "slow once" and not before:
            time.sleep(3)
        return {
            "good": chat_reply(GOOD),
            "slow once": chat_reply(GOOD),
            "spoils once": chat_reply(GOOD if before else spoiler),
            "spoils": chat_reply(spoiler),
            "prose": chat_reply("The bars are nice."),
            "cut": chat_reply(GOOD, "length"),
            "refusal": chat_reply(""),
            "bad request": (400, {"error": "x"}),
            "busy once": chat_reply(GOOD) if before else (429, {}),
            "broken once": chat_reply(GOOD) if before else (500, b"oops"),
            "garbage once": chat_reply(GOOD) if before else (200, b"<html>"),
            "no choices once": chat_reply(GOOD) if before else (200, {"choices": []}),
            "down": (503, {}),
        }[question]

    questions = [
        "good",
        "slow once",
        "spoils once",
        "spoils",
        "prose",
        "cut",
        "refusal",
        "bad request",
        "busy once",
        "broken once",
        "garbage once",
        "no choices once",
        "down",
    ]
    write_data(tmp_path, questions)
    server = serve(behave)
    assert command(server, tmp_path, "--timeout", "1", "--tries", "2", "--parallel", "4") == 0
    records = {
        r["question"]: r for r in map(json.loads, (tmp_path / "h.jsonl").read_text().splitlines())
    }
    assert set(records) == set(questions) - {
        "down"
    }  # nothing was learnt about it: it is asked again by the next run
    assert {q for q, r in records.items() if r["hint"]} == {
        q for q in questions if "once" in q or q == "good"
    }
    assert records["good"]["hint"] == json.loads(GOOD) and records["spoils once"]["rejected"] == [
        ["holds the answer's number: 7"]
    ]
    reasons = {
        q: [reply[0].partition(":")[0] for reply in records[q]["rejected"]]
        for q in ("spoils", "prose", "cut", "refusal", "bad request")
    }
    assert reasons == {
        "spoils": ["holds the answer's number"] * 2,
        "prose": ["not a JSON object"] * 2,
        "cut": ["cut off"] * 2,
        "refusal": ["refused"] * 2,
        "bad request": ["refused by the server"] * 2,
    }
    assert server.asked["down"] == 3 and server.asked["slow once"] == 2
    path, key, body = server.requests[0]
    assert path == "/v1/chat/completions" and key == "Bearer sesame" and body["model"] == "m"
    picture = body["messages"][0]["content"][0]
    assert picture["type"] == "image_url" and picture["image_url"]["url"].startswith(
        "data:image/png;base64,"
    )
    printed = capsys.readouterr()
    assert (
        "questions 13, with a hint 7 (6 at try 1, 1 at try 2), left without 5, not answered yet 1"
        in printed.out
    )
    assert re.search(r"not a JSON object +2\n", printed.out) and re.search(
        r"holds the answer's number +3\n", printed.out
    )
    assert "sesame" not in printed.out + printed.err + (tmp_path / "h.jsonl").read_text()
    before = server.asked.copy()
    assert command(server, tmp_path, "--parallel", "2") == 0  # only what has no line is asked again
    assert {q for q in questions if server.asked[q] != before[q]} == {"down"}


def test_the_hub_token_stays_here_and_a_wrong_key_ends_the_run(serve, tmp_path, capsys):
    write_data(tmp_path, ["a", "b", "c", "d"])
    server = serve(lambda question, before: (401, {"error": "no key"}))
    assert command(server, tmp_path, "--parallel", "1") == 1
    assert len(server.requests) == 1 and server.requests[0][1] == "Bearer none"
    assert "HTTP 401" in capsys.readouterr().err and (tmp_path / "h.jsonl").read_text() == ""


def test_a_dead_server_ends_the_run_and_loses_nothing(serve, tmp_path, capsys):
    write_data(tmp_path, [f"question {i}" for i in range(9)])
    server = serve(
        lambda question, before: chat_reply(GOOD) if question < "question 3" else (502, {})
    )
    assert command(server, tmp_path, "--parallel", "1") == 1
    assert (
        len((tmp_path / "h.jsonl").read_text().splitlines()) == 3
        and "no reply to 2 questions in a row (HTTP 502)" in capsys.readouterr().err
    )
    assert (
        main(
            [
                "--data",
                str(tmp_path / "d.jsonl"),
                "--out",
                str(tmp_path / "new.jsonl"),
                "--model",
                "m",
                "--api-base",
                "http://127.0.0.1:9/v1",
                "--parallel",
                "1",
            ]
        )
        == 1
    )
    assert "ConnectError" in capsys.readouterr().err


def test_single_failures_do_not_end_the_run_and_limit_takes_the_first(serve, tmp_path, capsys):
    write_data(tmp_path, [f"question {i}" for i in range(9)])
    server = serve(
        lambda question, before: chat_reply(GOOD) if int(question[-1]) % 2 else (502, {})
    )
    assert command(server, tmp_path, "--parallel", "1", "--limit", "7") == 0
    assert (
        list(load_hints(tmp_path / "h.jsonl")) == ["q1", "q3", "q5"]
        and "not answered yet 4" in capsys.readouterr().out
    )


def test_killed_at_any_moment_it_goes_on(serve, tmp_path):
    questions = [f"question {i}" for i in range(40)]
    write_data(tmp_path, questions)

    def behave(question, before):
        time.sleep(0.05)
        return chat_reply(GOOD)

    server, out = serve(behave), tmp_path / "h.jsonl"
    args = [
        sys.executable,
        "-m",
        "plumbing.build_hints",
        "--data",
        str(tmp_path / "d.jsonl"),
        "--out",
        str(out),
        "--model",
        "m",
        "--api-base",
        server.url,
        "--parallel",
        "3",
    ]
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 7):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert out.read_bytes().endswith(b"\n") and len(load_hints(out)) >= 7
    out.write_bytes(
        out.read_bytes() + b'{"id": "q39", "hi'
    )  # as a crash of the machine may leave it
    assert (
        subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=True).stderr.count(
            "last line was not whole"
        )
        == 1
    )
    assert sorted(load_hints(out)) == sorted(f"q{i}" for i in range(40))
    assert sum(server.asked.values()) <= 40 + 3  # a kill loses no more than the questions in flight


@pytest.mark.parametrize(
    "args,message",
    [
        (["--source", "attention", "--api-base", "http://x"], "--api-base is for"),
        (["--overlay", "maps"], "--overlay for"),
        (["--tries", "0"], "must be above 0"),
        (["--limit", "0"], "must be above 0"),
        (["--layers", "3"], "FIRST-LAST"),
        (["--data", "none.jsonl"], "no such file"),
    ],
)
def test_bad_options(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["--out", str(tmp_path / "h.jsonl"), "--model", "m", *args])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_local_model_as_the_expert(base, tmp_path, capsys):
    """The embedded model writes no JSON: every reply is rejected and counted."""
    assert (
        main(
            [
                "--out",
                str(tmp_path / "h.jsonl"),
                "--model",
                str(ROOT / "toy" / "base"),
                "--limit",
                "2",
                "--tries",
                "2",
                "--max-new-tokens",
                "3",
            ]
        )
        == 0
    )
    records = [json.loads(line) for line in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(r["hint"] is None and len(r["rejected"]) == 2 for r in records)
    assert {reply[0].partition(":")[0] for r in records for reply in r["rejected"]} == {"cut off"}
    assert "left without 2" in capsys.readouterr().out


def test_the_overlay_is_red_where_the_map_is_hot():
    heat = torch.zeros(4, 4)
    heat[0, 0] = 3
    picture = overlay(Image.new("RGB", (80, 40), "white"), heat, [[40, 20, 80, 40]])
    assert (
        picture.size == (80, 40)
        and picture.getpixel((30, 35)) == (255, 255, 255)
        and picture.getpixel((40, 30)) == (20, 60, 255)
    )
    red, green, _ = picture.getpixel((2, 2))
    assert red > 200 and green < 150


def test_attention_from_the_command(tmp_path, capsys):
    args = [
        "--source",
        "attention",
        "--out",
        str(tmp_path / "h.jsonl"),
        "--model",
        str(ROOT / "toy" / "base"),
        "--limit",
        "3",
        "--overlay",
        str(tmp_path / "maps"),
        "--layers",
        "1-2",
    ]
    assert main(args) == 0
    records = load_hints(tmp_path / "h.jsonl")
    assert len(records) == len(list((tmp_path / "maps").glob("*.png"))) == 3
    assert all(r["hint"].look and r["boxes"][0] for r in records.values() if r["hint"])
    assert main(args) == 0 and "3 of them in" in capsys.readouterr().out
