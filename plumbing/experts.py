"""The expert that writes hints: a local model, or a model behind a server.

Each is a function `ask` for hints.build_hint.
"""

from __future__ import annotations

import base64
import io
import os
import threading
import time
from collections.abc import Callable

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
# HTTPError, OSError: no connection, or a time-out. The others: a body that is no chat reply.
NO_CHAT_REPLY = (HTTPError, OSError, ValueError, TypeError, LookupError)


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
                try:
                    loaded.append(local_expert(path, max_new_tokens))
                except (OSError, ValueError) as error:
                    reason = str(error).partition("\n")[0]
                    raise ValueError(f"--fallback-model {path}: {reason}") from None
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
    Rejected.
    """
    # TRAP: without a key of its own, InferenceClient sends the user's saved Hugging Face token to
    # whatever server this is.
    key = os.environ.get(key_name) or "none"
    client = InferenceClient(base_url=base_url, api_key=key, timeout=timeout)
    options = {"model": model, "max_tokens": max_new_tokens, "temperature": TEMPERATURE}

    def ask(question: Question, messages: list[dict]) -> str:
        chat = _chat_with_images(messages, question.images)
        for attempt in range(ATTEMPTS):
            if attempt > 0:
                time.sleep(2 ** (attempt - 1))
            try:
                choice = client.chat_completion(chat, **options).choices[0]
            except HfHubHTTPError as error:
                failure = _temporary_failure(error.response.status_code, base_url, key_name)
            except NO_CHAT_REPLY as error:
                failure = type(error).__name__
            else:
                return _reply_text(choice, max_new_tokens)
        raise NoReply(failure)

    return ask


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


def _reply_text(choice, max_new_tokens: int) -> str:
    """The text of a chat completion's choice. Raises CutOff, or Rejected where it is empty."""
    if choice.finish_reason == "length":
        raise _cut_off(max_new_tokens)
    if not choice.message.content:
        raise Rejected("refused: an empty reply")
    return choice.message.content


def _cut_off(max_new_tokens: int) -> CutOff:
    return CutOff(f"cut off: the reply reached {max_new_tokens} tokens")
