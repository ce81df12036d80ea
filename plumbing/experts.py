"""A local model or a server as the hint writer."""

from __future__ import annotations

import base64
import io
import os
import time

import torch
from transformers import AutoModelForImageTextToText

from hints import NoReply, Rejected
from plumbing.images import load_processor, open_image
from rollout import Question, encode_prompts, sample_groups


def _load(path: str):
    processor = load_processor(path)
    device, dtype = (
        ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    )
    return processor, AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(
        device
    ).eval()


def local_expert(path: str, max_new_tokens: int):
    """`ask` for build_hint: a vision-language model by hub name or path."""
    processor, model = _load(path)

    def ask(sample: Question, messages: list[dict]) -> str:
        prompts = encode_prompts(processor, [sample], [messages])
        [[reply]] = sample_groups(
            model,
            processor,
            [sample],
            prompts,
            1,
            max_new_tokens=max_new_tokens,
            temperature=0.7,
            keys=[f"{sample.id}-{prompts[0].ids.sum()}"],
        )
        if reply.truncated:
            raise Rejected(f"cut off: the reply reached {max_new_tokens} tokens")
        return reply.text

    return ask


def server_expert(base_url: str, model: str, timeout: float, max_new_tokens: int):
    """`ask` for build_hint: a model behind an OpenAI-compatible server. Time-outs, 408, 409, 429, 5xx and lost connections are tried three times, then NoReply; 401,
    403 and 404 raise ValueError, as no other question can fare better; any other status is Rejected.

    TRAP: without a key of its own InferenceClient sends the user's saved Hugging Face token to whatever server this is.
    """
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    client = InferenceClient(
        base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=timeout
    )

    def part(piece: dict, images) -> dict:
        if piece["type"] == "text":
            return piece
        data = io.BytesIO()
        open_image(next(images)).save(data, "PNG")
        return {
            "type": "image_url",
            "image_url": {
                "url": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
            },
        }

    def ask(sample: Question, messages: list[dict]) -> str:
        images = iter(sample.images)
        chat = [
            {**turn, "content": [part(piece, images) for piece in turn["content"]]}
            for turn in messages
        ]
        for attempt in range(3):
            try:
                choice = client.chat_completion(
                    chat, model=model, max_tokens=max_new_tokens, temperature=0.7
                ).choices[0]
            except HfHubHTTPError as error:
                status, failure = error.response.status_code, f"HTTP {error.response.status_code}"
                if status in (401, 403, 404):
                    raise ValueError(
                        f"{base_url} answers {failure}: check --api-base, --model and the key in OPENAI_API_KEY"
                    ) from None
                if status not in (408, 409, 429) and status < 500:
                    raise Rejected(f"refused by the server: {failure}") from None
            except (
                HTTPError,
                OSError,
                ValueError,
                TypeError,
                LookupError,
            ) as error:  # no connection; a body that is no chat reply
                failure = type(error).__name__
            else:
                if choice.finish_reason == "length":
                    raise Rejected(f"cut off: the reply reached {max_new_tokens} tokens")
                if not choice.message.content:
                    raise Rejected("refused: an empty reply")
                return choice.message.content
            if attempt < 2:
                time.sleep(2**attempt)
        raise NoReply(failure)

    return ask
