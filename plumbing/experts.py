"""The expert that writes hints: a local model, or a model behind a server.

Each is a function `ask` for hints.build_hint.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from hints import CutOff, NoReply, Rejected
from plumbing.images import load_processor, open_image
from plumbing.models import load_model
from rollout import Question, encode_prompts, sample_groups

TEMPERATURE = 0.7
ATTEMPTS = 3  # requests per reply; between them the client waits 1 second, then 2
NO_ACCESS = (401, 403, 404)  # HTTP statuses: every other question would fail in the same way
TRY_AGAIN = (408, 409, 429)  # HTTP statuses: the same request may succeed later, as after any 5xx
NO_CONNECTION = (HTTPError, OSError)  # or a time-out
NO_CHAT_REPLY = (ValueError, TypeError, LookupError)  # what a body of another kind raises


def load_expert(path: str):
    """Load a vision-language model by hub name or path, in eval mode -> (processor, model).

    With a GPU the weights are bfloat16, without one they are float32. Raises ValueError where the
    model cannot be loaded.
    """
    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device, dtype = "cuda", torch.bfloat16
    processor = load_processor(path)
    return processor, load_model(path, dtype).to(device).eval()


def local_expert(path: str, max_new_tokens: int):
    """`ask` for build_hint: a vision-language model by hub name or path.

    ask(question, messages) returns the text of the reply. It raises CutOff where the reply reaches
    max_new_tokens tokens.
    """
    processor, model = load_expert(path)

    def ask(question: Question, messages: list[dict]) -> str:
        prompts = encode_prompts(processor, [question], [messages])
        # The prompt is part of the seed: a second try, with a longer chat, gets other draws.
        seed = f"{question.id}-{prompts[0].ids.sum()}"
        [[reply]] = sample_groups(
            model,
            processor,
            prompts,
            1,
            max_new_tokens=max_new_tokens,
            temperature=TEMPERATURE,
            keys=[seed],
        )
        if reply.truncated:
            raise _cut_off(max_new_tokens)
        return reply.text

    return ask


@contextlib.contextmanager
def one_line_errors(option: str, path: str):
    """Where a model cannot be loaded, raise ValueError: one line, with the option and its value."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].removeprefix(f"{path}: ")
        raise ValueError(f"{option} {path}: {reason}") from None


def late_expert(path: str, max_new_tokens: int):
    """`ask` for build_hint: a local_expert that is loaded when it is first asked.

    It may be asked from several threads; it answers one of them at a time. A model that cannot be
    loaded raises ValueError, which ends the run: what was written so far stays.
    """
    lock = threading.Lock()
    loaded: list[Callable] = []

    def ask(question: Question, messages: list[dict]) -> str:
        with lock:
            if not loaded:
                with one_line_errors("--fallback-model", path):
                    loaded.append(local_expert(path, max_new_tokens))
            return loaded[0](question, messages)

    return ask


def server_expert(
    base_url: str, model: str, timeout: float, max_new_tokens: int, key_name: str = "OPENAI_API_KEY"
):
    """`ask` for build_hint: a model behind an OpenAI-compatible server.

    timeout: seconds per request. key_name: the environment variable that holds the server's key.
    ask(question, messages) returns the text of the reply. Time-outs, lost connections, HTTP 408,
    409, 429 and 5xx, and bodies that are no chat reply are tried ATTEMPTS times. Then ask raises
    NoReply. HTTP 401, 403 and 404 raise ValueError, because every other question would fail too.
    A reply of max_new_tokens tokens raises CutOff; any other HTTP error and an empty reply raise
    Rejected. server_expert itself raises NoReply where base_url is no address of a server, and
    ValueError where the key cannot be sent.
    """
    if not _is_address(base_url):
        raise NoReply(f"{base_url}: no address of a server, such as http://localhost:8000/v1")
    # TRAP: without a key of its own, InferenceClient sends the user's saved Hugging Face token to
    # whatever server this is.
    key = os.environ.get(key_name) or "none"
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{key_name} holds a character that no key can have, or a line break")
    client = InferenceClient(base_url=base_url, api_key=key, timeout=timeout)
    options = {"model": model, "max_tokens": max_new_tokens, "temperature": TEMPERATURE}

    def ask(question: Question, messages: list[dict]) -> str:
        chat = _chat_with_images(messages, question.images)
        for attempt in range(ATTEMPTS):
            if attempt > 0:
                time.sleep(2 ** (attempt - 1))
            try:
                choice = client.chat_completion(chat, **options).choices[0]
                finish, text = _read_choice(choice)
            except HfHubHTTPError as error:
                failure = _temporary_failure(error.response.status_code, base_url, key_name)
            except NO_CONNECTION as error:
                failure = f"{type(error).__name__} at {base_url}"
            except NO_CHAT_REPLY as error:
                failure = f"no chat reply from {base_url}: {type(error).__name__}"
            else:
                return _accept_reply(finish, text, max_new_tokens)
        raise NoReply(failure)

    return ask


def _is_address(url: str) -> bool:
    """Is this an address that a client can send to?

    TRAP: InferenceClient takes any other text as the name of a model at Hugging Face.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna"), parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and host != b"" and port != 0 and url.isprintable()


def _chat_with_images(messages: list[dict], images: list) -> list[dict]:
    """The chat as a server takes it: the n-th {"type": "image"} part becomes the n-th image."""
    remaining = iter(images)

    def server_part(part: dict) -> dict:
        if part["type"] == "text":
            return part
        return {"type": "image_url", "image_url": {"url": _data_url(next(remaining))}}

    return [
        {**message, "content": [server_part(part) for part in message["content"]]}
        for message in messages
    ]


def _data_url(image) -> str:
    """An image (a path or a PIL image) as a data URL that holds a PNG."""
    png = io.BytesIO()
    open_image(image).save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def _temporary_failure(status: int, base_url: str, key_name: str) -> str:
    """The name of an HTTP failure that may pass. Raises ValueError or Rejected for any other."""
    failure = f"HTTP {status}"
    if status in NO_ACCESS:
        raise ValueError(
            f"{base_url} answers {failure}: check this address, the model's name and the key in "
            f"{key_name}"
        ) from None
    if status not in TRY_AGAIN and status < 500:
        raise Rejected(f"refused by the server: {failure}") from None
    return failure


def _read_choice(choice) -> tuple[str | None, str]:
    """A chat completion's choice -> why it ended, and its text. TypeError for anything else.

    TRAP: the client does not check a reply's types.
    """
    if not hasattr(choice, "message") or not hasattr(choice.message, "content"):
        raise TypeError("no message")
    text = choice.message.content or ""
    if not isinstance(text, str):
        raise TypeError("a message that is no text")
    return choice.finish_reason, text


def _accept_reply(finish: str | None, text: str, max_new_tokens: int) -> str:
    """The text of a reply. Raises CutOff, or Rejected where it is empty."""
    if finish == "length":
        raise _cut_off(max_new_tokens)
    if not text:
        raise Rejected("refused: an empty reply")
    return text


def _cut_off(max_new_tokens: int) -> CutOff:
    return CutOff(f"cut off: the reply reached {max_new_tokens} tokens")
