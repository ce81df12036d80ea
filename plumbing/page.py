"""--report: a page to look at, with questions, hints, and responses before and after training."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from hints import teacher_messages
from losses import topk_jsd
from plumbing.memory import CPU_SAMPLE_MB
from plumbing.page_file import image_entries, write_html
from plumbing.runs import whole_lines
from plumbing.settings import EMBEDDED
from rollout import (
    Prompt,
    Question,
    banned_tokens,
    collate,
    encode_prompts,
    response_states,
    sample_groups,
    student_messages,
    verify,
)

if TYPE_CHECKING:
    from plumbing.inputs import Inputs
    from train import TrainConfig

# drawn over the steps, beside the evaluations
CURVES = ("all_failed", "informative", "all_correct", "accuracy", "entropy", "length")


def check_finished(run: Path) -> None:
    """Raises ValueError where a run's folder has not what its page is made of."""
    for name in ("model", "metrics.jsonl"):
        if not (run / name).exists():
            raise ValueError(f"--report {run}: there is no {name} in it; is the run finished?")


def write_page(inputs: Inputs, config: TrainConfig, count: int = 6) -> Path:
    """report.html in a finished run's folder: `count` held-out questions, hinted ones first.

    See `write_html`.
    """
    run = inputs.folder
    log = [json.loads(line) for line in whole_lines(run / "metrics.jsonl")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" and config.precision != "no" else torch.float32
    reference, student = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device).eval()
        for path in (config.model, str(run / "model"))
    )
    shown = sorted(inputs.held_out, key=lambda question: question.hint is None)[:count]
    entries = []
    for question in tqdm(shown, unit="question", desc="report", dynamic_ncols=True):
        entry = question_entry(question)
        for name, model in (("before", reference), ("after", student)):
            entry[name] = explain(model, reference, inputs, config, question)
        entries.append(entry)
    page = {
        "title": f"PTD-PO, before and after: {run.name}",
        "settings": settings_line(log, config, len(entries)),
        "curves": step_curves(log),
        "questions": entries,
    }
    return write_html(run / "report.html", "report.html", page)


def settings_line(log: list[dict], config: TrainConfig, count: int) -> str:
    """What was trained, and how it went, in two sentences. log: the rows of metrics.jsonl."""
    plain = [row["eval_plain"] for row in log if "eval_plain" in row]
    model = "toy/base" if config.model == EMBEDDED else config.model
    temperature = config.eval_temperature
    sampling = f"temperature {temperature}" if temperature else "greedy"
    return (
        f"{model}; {log[-1]['step']} steps; lam {config.lam}, tau {config.tau}, "
        f"K {config.jsd_k}, lr {config.lr}. Held-out questions, plain prompt, {sampling}: "
        f"{100 * plain[0]:.1f} % right before, {100 * plain[-1]:.1f} % after. Below: the first "
        f"{count} of them, sampled at temperature {config.temperature}."
    )


def step_curves(log: list[dict]) -> dict[str, list[list]]:
    """What the page draws over the steps: name -> [step, value]; {} of fewer than two steps.

    Runs of earlier versions did not log "informative".
    """
    steps = [
        {"informative": 1 - row["all_failed"] - row["all_correct"], **row}
        for row in log
        if "entropy" in row  # the row of step 0 is an evaluation alone
    ]
    if len(steps) < 2:
        return {}
    curves = {name: logged_points(steps, name) for name in CURVES}
    return {**curves, "eval_plain": logged_points(log, "eval_plain")}


def logged_points(log: list[dict], name: str) -> list[list]:
    """[step, value] of the rows that log this name. JSON has no NaN: such values are left out."""
    return [[row["step"], row[name]] for row in log if math.isfinite(row.get(name, math.nan))]


def question_entry(question: Question) -> dict:
    """A question as the page shows it, without its responses."""
    return {
        "id": question.id,
        "family": question.family,
        "question": question.text,
        "answer": question.answer,
        "images": image_entries(question),
        "hint": question.hint and asdict(question.hint),
    }


# ------------------------------------------------------------------------- responses token by token
@torch.no_grad()
def explain(
    model,
    reference,
    inputs: Inputs,
    config: TrainConfig,
    question: Question,
    count: int = 4,
    longest: int = 1000,
) -> list[dict]:
    """`count` responses of `model` to the plain prompt, as the page shows them.

    Each has its verdict and, for its first `longest` tokens, the entries of `token_entries`.
    """
    processor = inputs.processor
    [plain] = encode_prompts(processor, [question], [student_messages(question)])
    hinted, messages = None, teacher_messages(question, config.teacher_context)
    if messages is not None:
        [hinted] = encode_prompts(processor, [question], [messages])
    [group] = sample_groups(
        model,
        processor,
        [plain],
        count,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        sample_mb=config.sample_mb or CPU_SAMPLE_MB,
    )
    views = [(model, plain)] + ([(reference, hinted)] if hinted else [])
    shown = []
    for response in group:
        ids = response.ids[:longest]
        shown.append(
            {
                "correct": verify(response.text, question, inputs.same_answer),
                "truncated": response.truncated,
                "more": len(response.ids) - len(ids),
                "tokens": token_entries(views, ids, processor.tokenizer, config),
            }
        )
    return shown


def token_entries(
    views: list[tuple[object, Prompt]], ids: list[int], tokenizer, config: TrainConfig
) -> list[list]:
    """For each token: its text, its divergence, and the five likeliest tokens of each view.

    views: the student with its prompt, and the teacher with the hint, if there is one; without a
    teacher the divergence is 0 and its tokens None.
    """
    states = []
    for model, prompt in views:
        batch = collate([prompt], [ids], tokenizer.pad_token_id, model.device)
        states.append(response_states(model, batch)[0, : len(ids)])  # a batch has 2 places or more
    model = views[0][0]
    banned = torch.tensor(banned_tokens(model, tokenizer), device=model.device)
    entries = []
    for start in range(0, len(ids), 256):  # (256, V) logits at a time
        logits = []
        for (viewer, _), state in zip(views, states, strict=True):
            scores = viewer.get_output_embeddings()(state[start : start + 256]).float()
            logits.append(scores.index_fill_(-1, banned, float("-inf")))
        likeliest = [likeliest_tokens(scores / config.temperature, tokenizer) for scores in logits]
        divergence = [0] * len(logits[0])
        if len(logits) == 2:
            jsd = topk_jsd(
                *logits,
                config.jsd_k,
                config.temperature,
                divergence=config.divergence,
                support=config.support,
            )
            divergence = [round(d, 5) for d in jsd.tolist()]
        else:
            likeliest.append([None] * len(logits[0]))
        for i, entry in enumerate(zip(divergence, *likeliest, strict=True)):
            entries.append([added_text(ids, start + i, tokenizer), *entry])
    return entries


def likeliest_tokens(logits: torch.Tensor, tokenizer) -> list[list]:
    """The five likeliest tokens of each row (n, V), as [text, probability]."""
    top = logits.softmax(-1).topk(min(5, logits.shape[-1]), dim=-1)
    return [
        [[tokenizer.decode([i]), round(p, 5)] for p, i in zip(*row, strict=True)]
        for row in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def added_text(ids: list[int], place: int, tokenizer) -> str:
    """What a token adds to the text. Alone it may be part of a character, or lack its space.

    A character of several tokens appears at the one that completes it.
    """
    before = ids[max(0, place - 8) : place]
    old, new = (
        tokenizer.decode(shown).rstrip("\ufffd") for shown in (before, [*before, ids[place]])
    )
    return new[len(old) :]
