"""--report: a page to look at."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from hints import teacher_messages
from losses import topk_jsd
from plumbing.answers import load_verifier
from plumbing.images import open_image
from plumbing.runs import write_beside
from plumbing.settings import EMBEDDED
from ptdpo import PTDPOConfig
from rollout import (
    Question,
    banned_tokens,
    collate,
    encode_prompts,
    response_states,
    sample_groups,
    student_messages,
)

if TYPE_CHECKING:
    from train import TrainConfig


@torch.no_grad()
def explain(
    model,
    reference,
    processor,
    config: TrainConfig,
    method: PTDPOConfig,
    sample: Question,
    count: int = 4,
    most: int = 1000,
) -> list[dict]:
    """`count` responses of `model` to the plain prompt, as the page shows them: verdict, and for each of the first `most` tokens its text, its
    divergence from the teacher (the reference with the hint), and the five tokens that student and teacher found likeliest there."""
    context = teacher_messages(sample, config.teacher_context)
    chats = [student_messages(sample)] + [context] * (context is not None)
    prompts = encode_prompts(processor, [sample] * len(chats), chats)
    [group] = sample_groups(
        model,
        processor,
        [sample],
        prompts[:1],
        count,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        sample_mb=config.sample_mb,
    )
    tokenizer, verify = processor.tokenizer, load_verifier(config.verifier)
    banned = torch.tensor(banned_tokens(model, tokenizer), device=model.device)

    def likeliest(logits):
        top = (logits / config.temperature).softmax(-1).topk(min(5, logits.shape[-1]), dim=-1)
        return [
            [[tokenizer.decode([i]), round(p, 5)] for p, i in zip(*row)]
            for row in zip(top.values.tolist(), top.indices.tolist())
        ]

    shown = []
    for rollout in group:
        ids, tokens = rollout.ids[:most], []
        states = [
            (m, response_states(m, collate([prompt], [ids], tokenizer.pad_token_id, m.device))[0])
            for m, prompt in zip((model, reference), prompts)
        ]
        for a in range(0, len(ids), 256):  # (256, V) logits at a time
            logits = [
                m.get_output_embeddings()(x[a : a + 256])
                .float()
                .index_fill_(-1, banned, float("-inf"))
                for m, x in states
            ]
            d = (
                topk_jsd(
                    *logits,
                    method.jsd_k,
                    config.temperature,
                    divergence=method.divergence,
                    support=method.support,
                ).tolist()
                if context
                else None
            )
            tops = [likeliest(x) for x in logits]
            for i in range(len(logits[0])):
                # what the token adds to the text: a token alone may be part of a character, or lack its space
                near, end = max(0, a + i - 8), a + i
                text = tokenizer.decode(ids[near : end + 1])[len(tokenizer.decode(ids[near:end])) :]
                tokens.append(
                    [text, round(d[i], 5) if d else 0, tops[0][i], tops[1][i] if d else None]
                )
        shown.append(
            {
                "correct": verify(rollout.text, sample.answer, sample.choices),
                "truncated": rollout.truncated,
                "more": len(rollout.ids) - len(ids),
                "tokens": tokens,
            }
        )
    return shown


def write_page(
    run: Path,
    config: TrainConfig,
    method: PTDPOConfig,
    held_out: list[Question],
    processor,
    count: int = 6,
) -> Path:
    """runs/NAME/report.html from a finished run: its first `count` held-out questions, those with a hint first. One file, no network; what comes
    from the data stands in it as JSON without any "<", and the page never reads it as HTML."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" and config.precision != "no" else torch.float32
    reference, student = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device).eval()
        for path in (config.model, str(run / "model"))
    )
    questions = []
    for sample in tqdm(
        sorted(held_out, key=lambda s: s.hint is None)[:count],
        unit="question",
        desc="report",
        dynamic_ncols=True,
    ):
        images = []
        for n, image in enumerate(map(open_image, sample.images)):
            (width, height), small, file = image.size, image.copy(), io.BytesIO()
            small.thumbnail((448, 448))
            small.save(file, "PNG")
            boxes = sample.boxes[n] if sample.hint and sample.boxes else []
            images.append(
                {
                    "src": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
                    "width": max(224, small.width),
                    "boxes": [
                        [left / width, top / height, right / width, bottom / height]
                        for left, top, right, bottom in boxes
                    ],
                }
            )
        before, after = (
            explain(model, reference, processor, config, method, sample)
            for model in (reference, student)
        )
        questions.append(
            {
                "id": sample.id,
                "family": sample.family,
                "question": sample.text,
                "answer": sample.answer,
                "images": images,
                "hint": sample.hint and asdict(sample.hint),
                "before": before,
                "after": after,
            }
        )
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    plain = [row["eval_plain"] for row in rows if "eval_plain" in row]
    settings = (
        f"{'toy/base' if config.model == EMBEDDED else config.model}; {rows[-1]['step']} steps; lam {method.lam}, tau {method.tau}, K {method.jsd_k}, lr {config.lr}. Held-out questions, plain prompt, greedy: "
        f"{100 * plain[0]:.1f} % right before, {100 * plain[-1]:.1f} % after. Below: the first {len(questions)} of them, sampled at temperature {config.temperature}."
    )
    data = json.dumps(
        {
            "title": f"PTD-PO, before and after: {run.name}",
            "settings": settings,
            "questions": questions,
        }
    ).replace("<", "\\u003c")
    write_beside(
        run / "report.html",
        (Path(__file__).resolve().parent / "page.html")
        .read_text(encoding="utf-8")
        .replace("@DATA@", data),
    )
    return run / "report.html"
