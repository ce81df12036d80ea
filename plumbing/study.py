"""--study-hints: what hints do to the frozen model, before any training.

The paper's three analyses of its own data (figures 2, 3 and 5) on the user's model and questions.
Each question is asked alone and with something more to read: its hint, the general part of it,
another question's hint, the answer, or the solution. Hints are also read without the picture: does
the answer leak? This file asks, samples and scores; plumbing.study_numbers makes the numbers and
the verdicts of it, plumbing.study_page the page.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from hints import Hint, teacher_messages
from losses import chunk_tokens
from plumbing.progress import duration
from plumbing.runs import RunFolder, resume_command, whole_lines, write_beside
from plumbing.stopping import Stopped
from plumbing.study_numbers import study_table, summary
from plumbing.study_page import write_study_page
from rollout import (
    Question,
    Response,
    chat,
    encode_prompts,
    response_states,
    student_messages,
    verify,
)

if TYPE_CHECKING:
    from plumbing.inputs import Inputs
    from train import TrainConfig, Trainer

FILE = "study.jsonl"
PART = 16  # questions per process that are asked together, and lost if the study is killed
SCORED = 4  # responses per question whose tokens are scored under each context


# --------------------------------------------------------------------------------------- contexts
def contexts(question: Question, other: Hint | None) -> dict[str, list[dict]]:
    """The chats about a question: name -> chat. `other`: another question's hint, the placebo.

    A context that the data does not have is left out. The general hint is the steps alone, without
    places and distractors: the "unstructured hint" of the paper's table 2.
    """
    hint, solution = question.hint, question.solution
    chats = {"question": student_messages(question)}
    if hint:
        chats["hint"] = teacher_messages(question)
        if hint.steps and (hint.look or hint.ignore):
            general = replace(question, hint=Hint(steps=hint.steps))
            chats["general hint"] = teacher_messages(general)
        if other:
            chats["another's hint"] = teacher_messages(replace(question, hint=other))
    chats["answer"] = teacher_messages(question, "answer")
    if solution:
        text = f"A solution: {solution}\nThe answer is {question.answer}."
        chats["solution"] = chat(question, text)
    return chats


def audit_views(question: Question, other: Hint) -> dict[str, tuple[Question, Callable]]:
    """What shows a leak: name -> (question, the function that makes its chat).

    A hint that lets the answer through helps where there is no picture, more than `other`, the hint
    of another question, does. No hint at all would be the wrong baseline: any hint makes a model
    answer in form, and then it is right now and then by chance.
    """
    blind = replace(question, images=[], text=question.text.replace("<image>", ""))
    alone = replace(blind, text="")
    return {
        "picture + question": (question, student_messages),
        "picture + question + hint": (question, teacher_messages),
        "question": (blind, student_messages),
        "question + hint": (blind, teacher_messages),
        "question + another's hint": (replace(blind, hint=other), teacher_messages),
        "hint": (alone, teacher_messages),
        "another's hint": (replace(alone, hint=other), teacher_messages),
    }


def neighbours(questions: list[Question]) -> dict[str, Hint]:
    """Another question's hint for each hinted one: id -> hint. {} where fewer than two have one.

    It belongs to the next question in the order of their texts, which is alike where there is one,
    and says something else where there is such a hint.
    """
    hinted = sorted((q for q in questions if q.hint), key=lambda question: question.text)
    if len(hinted) < 2:
        return {}
    others = {}
    for place, question in enumerate(hinted):
        following = [q.hint for q in hinted[place + 1 :] + hinted[:place]]
        different = [hint for hint in following if hint != question.hint]
        others[question.id] = (different or following)[0]
    return others


# ----------------------------------------------------------------------------- asked and scored
def study_questions(
    trainer: Trainer, questions: list[Question], others: dict[str, Hint]
) -> list[dict]:
    """What the frozen model does with each question: one row per question, for study.jsonl.

    contexts: per context, of --study-samples responses, correct, lengths in tokens, how many were
    truncated, and the text of the first one; nll and kl, of responses to the question alone, see
    `score_contexts`. views: whether one response per view of the audit is right. To be called by
    all processes.
    """
    groups = sample_contexts(trainer, questions, others)
    views = ask_views(trainer, groups, others)
    scores = score_contexts(trainer, groups)
    rows = []
    for group_of, seen in zip(groups, views, strict=True):
        question = group_of["question"][0].question
        rows.append(
            {
                "id": question.id,
                "family": question.family,
                "question": question.text,
                "answer": question.answer,
                "hint": question.hint and asdict(question.hint),
                "contexts": {
                    name: group_numbers(trainer, group) | scores[question.id, name]
                    for name, group in group_of.items()
                },
                "views": seen,
            }
        )
    return rows


def sample_contexts(
    trainer: Trainer, questions: list[Question], others: dict[str, Hint]
) -> list[dict[str, list[Response]]]:
    """context -> --study-samples responses, one dict per question.

    They are sampled as in training. Their draws depend on question and context alone.
    """
    config = trainer.config
    prompts_of = []
    for question, prompt in zip(questions, trainer.read(questions), strict=True):
        chats = contexts(question, others.get(question.id))
        del chats["question"]  # its prompt is at hand
        prompts = {name: trainer.hinted_prompt(prompt, words) for name, words in chats.items()}
        prompts_of.append({"question": prompt, **prompts})
    named = [(name, prompt) for prompts in prompts_of for name, prompt in prompts.items()]
    groups = trainer.respond(
        [prompt for _, prompt in named],
        config.study_samples,
        keys=[f"study-{name}-{prompt.question.id}" for name, prompt in named],
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
    )
    remaining = iter(groups)
    return [{name: next(remaining) for name in prompts} for prompts in prompts_of]


def group_numbers(trainer: Trainer, group: list[Response]) -> dict:
    """What the study keeps of one question's responses under one context."""
    same = trainer.same_answer
    return {
        "correct": [verify(response.text, response.question, same) for response in group],
        "lengths": [len(response.ids) for response in group],
        "truncated": sum(response.truncated for response in group),
        "response": group[0].text,
    }


def ask_views(
    trainer: Trainer, groups: list[dict[str, list[Response]]], others: dict[str, Hint]
) -> list[dict[str, bool]]:
    """Per question, whether one response per view of the audit is right; {} without a hint."""
    asked = []  # (which question, view, prompt)
    for number, group_of in enumerate(groups):
        plain = group_of["question"][0].prompt
        question = plain.question
        if question.id not in others:
            continue
        for name, (shown, messages) in audit_views(question, others[question.id]).items():
            images = (plain.pixels, plain.grid) if shown.images else (None, None)
            [prompt] = encode_prompts(trainer.processor, [shown], [messages(shown)], [images])
            asked.append((number, name, prompt))
    prompts = [prompt for _, _, prompt in asked]
    answers = trainer.respond(prompts, 1, temperature=trainer.config.eval_temperature)
    views = [{} for _ in groups]
    for (number, name, prompt), [response] in zip(asked, answers, strict=True):
        views[number][name] = verify(response.text, prompt.question, trainer.same_answer)
    return views


@torch.no_grad()
def score_contexts(trainer: Trainer, groups: list[dict[str, list[Response]]]) -> dict:
    """(question id, context) -> {"nll", "kl"}, means per token of responses to the question alone.

    nll: the negative log-probability of the token under the context. kl: KL(question alone ||
    context) over the whole vocabulary at this place. (Paper, figure 3.) Of each question, SCORED
    responses are read by the frozen reference.
    """
    pairs, names = [], {}
    for group_of in groups:
        for name, group in group_of.items():
            prompt = group[0].prompt
            names[id(prompt)] = name
            for response in group_of["question"][:SCORED]:
                pairs.append(replace(response, prompt=prompt, teacher_prompt=response.prompt))
    sums = {(pair.question.id, names[id(pair.prompt)]): torch.zeros(3) for pair in pairs}
    for part in trainer.until_stopped(trainer.micro_batches(pairs)):
        for pair, scores in zip(part, score_pairs(trainer, part), strict=True):
            if pair.in_loss:  # else it stands in for another process's pair
                sums[pair.question.id, names[id(pair.prompt)]] += scores.cpu()
    return {
        key: {"nll": float(nll / tokens), "kl": float(kl / tokens)}
        for key, (nll, kl, tokens) in sums.items()
    }


def score_pairs(trainer: Trainer, pairs: list[Response]) -> Tensor:
    """Per response, sums over its tokens: NLL under its prompt, KL, and the tokens: (B, 3).

    prompt of a pair: with the context; teacher_prompt: the question alone.
    """
    alone = trainer.collate(pairs, prompts=[pair.teacher_prompt for pair in pairs])
    shown = trainer.collate(pairs)

    def run(model) -> Tensor:
        states = [response_states(model, batch)[batch.mask] for batch in (alone, shown)]
        head, ids = model.get_output_embeddings(), shown.ids[shown.mask]
        scores = context_scores(*states, head, ids, **trainer.scoring)
        zeros = torch.zeros(shown.mask.shape, device=ids.device)
        sums = [zeros.masked_scatter(shown.mask, values).sum(1) for values in scores]
        return torch.stack([*sums, shown.mask.sum(1).float()], 1)

    return trainer.ask_reference(run)


def context_scores(
    alone: Tensor,
    shown: Tensor,
    head: torch.nn.Linear,
    ids: Tensor,
    *,
    temperature: float,
    banned: Tensor,
    logits_mb: float,
) -> tuple[Tensor, Tensor]:
    """NLL of the tokens ids (N,) with the context, and KL(alone || with the context), (N,) each.

    alone, shown (N, H): states before the tokens, of the same model. The KL is over the whole
    vocabulary, chunk by chunk: the logits (N, V) are never in memory together. The head multiplies
    in float32, also under autocast: in bf16 it would add an error as large as a small KL.
    """
    weight = head.weight.float()
    bias = None if head.bias is None else head.bias.float()
    chunk = max(1, chunk_tokens(len(weight), logits_mb) // 2)  # four (chunk, V) tensors at a time

    def log_probs(states: Tensor) -> Tensor:
        logits = F.linear(states.float(), weight, bias).index_fill_(-1, banned, -torch.inf)
        return (logits / temperature).log_softmax(-1).clamp(min=-1e30)  # 0 * inf would be NaN

    nll, kl = torch.empty(2, len(ids), device=ids.device)
    with torch.autocast(ids.device.type, enabled=False):
        for start in range(0, len(ids), chunk):
            rows = slice(start, start + chunk)
            log_p, log_q = log_probs(alone[rows]), log_probs(shown[rows])
            nll[rows] = -log_q.gather(-1, ids[rows].unsqueeze(-1)).squeeze(-1)
            kl[rows] = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)  # but for rounding
    return nll, kl


# ------------------------------------------------------------------------------------- the whole
def finished_rows(inputs: Inputs, config: TrainConfig) -> dict[str, dict]:
    """The rows of a study that goes on, by question: id -> row.

    A last line without its end is left out. Raises ValueError where the questions are others now.
    """
    path = inputs.folder / FILE
    rows = {row["id"]: row for row in map(json.loads, whole_lines(path))}
    asked = {
        q.id: [q.text, q.answer, asdict(q.hint) if q.hint else None]
        for q in questions_of(inputs, config)
    }
    asked = json.loads(json.dumps(asked))  # tuples become lists, as in the file
    for name, row in rows.items():
        if [row["question"], row["answer"], row["hint"]] != asked.get(name):
            raise ValueError(
                f"--resume: question {name} of {path} is not in the data any more, or has another "
                "text, answer or hint: start a new study"
            )
    return rows


def questions_of(inputs: Inputs, config: TrainConfig) -> list[Question]:
    """The questions of a study: the first ones of a run with this seed."""
    return inputs.stream.first(config.study_questions)


def study(trainer: Trainer, inputs: Inputs, rows: dict[str, dict]) -> None:
    """Study the questions that are left, print the table, write study.json and study.html.

    rows: of the questions that are done, by id. Each part of the questions is kept as soon as it
    is done; a signal drops the part under way.
    """
    config, accelerator = trainer.config, trainer.accelerator
    accelerator.wait_for_everyone()  # every process has read what is done
    state = {"step": 0} if config.resume else None
    folder = RunFolder(inputs.folder, asdict(config), accelerator.is_main_process, state)
    if config.resume and accelerator.is_main_process:  # a last line without its end goes
        write_beside(folder.path / FILE, "".join(whole_lines(folder.path / FILE)))
    questions = questions_of(inputs, config)
    with trainer.signals.noted(prints=accelerator.is_main_process):
        try:
            ask_the_rest(trainer, questions, rows, folder)
        except Stopped as stopped:
            accelerator.print(
                f"stopped by {stopped.name} after {len(rows)} of {len(questions)} questions; go on "
                f"with: {resume_command(folder.path)}"
            )
            # TRAP: torchrun ends all processes as soon as one has ended, so all wait here
            accelerator.wait_for_everyone()
            accelerator.end_training()
            sys.exit(stopped.exit_code)
    if accelerator.is_main_process:
        in_order = [rows[question.id] for question in questions]
        numbers = summary(in_order, config)
        print(f"\n{study_table(numbers)}")
        text = json.dumps(
            {"config": {**asdict(config), "resume": ""}, **numbers}, indent=2, ensure_ascii=False
        )
        write_beside(folder.path / "study.json", text + "\n")
        page = write_study_page(folder.path, numbers, in_order, questions)
        print(
            f"\nwritten to {folder.path}/: study.json, {FILE} (one line per question), {page.name}"
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()


def ask_the_rest(
    trainer: Trainer, questions: list[Question], rows: dict[str, dict], folder: RunFolder
) -> None:
    """Study the questions that have no row yet, part by part; their rows go to the file."""
    accelerator = trainer.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes
    others = neighbours(questions)
    left = [question for question in questions if question.id not in rows]
    bar = tqdm(
        total=len(questions),
        initial=len(rows),
        unit="question",
        desc="study",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )
    began = time.time()
    with bar:
        for start in range(0, len(left), PART * processes):
            part = left[start : start + PART * processes]
            # a process that has none of them repeats one: all must run the same forwards
            mine = part[rank::processes] or part[:1]
            for row in gather_object(study_questions(trainer, mine, others)):
                if row["id"] not in rows:
                    rows[row["id"]] = row
                    folder.append(FILE, row)
            bar.update(len(part))
            if start == 0 and len(part) < len(left):
                predicted = (time.time() - began) * len(left) / len(part)
                accelerator.print(
                    f"{len(part)} questions took {duration(time.time() - began)}: all "
                    f"{len(left)} take about {duration(predicted)} (--study-questions, "
                    "--study-samples)"
                )
