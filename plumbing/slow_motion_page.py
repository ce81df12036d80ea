"""The text of docs/one-step.md: the template slow_motion.md, filled with the numbers of a step."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hints import teacher_messages
from losses import full_jsd
from rollout import student_messages

if TYPE_CHECKING:
    from plumbing.slow_motion import Step

TEMPLATE = Path(__file__).resolve().parent / "slow_motion.md"
SHOWN = 5  # likeliest tokens in a table
PER_LINE = 10  # tokens in a line of part 6


def page_text(step: Step, settings: dict) -> str:
    """The page as markdown. settings: of an ordinary run of the embedded model."""
    values = dict(settings)
    for part in (
        question_values,
        response_values,
        routing_values,
        token_values,
        bucket_values,
        support_values,
        sentence_values,
        loss_values,
        gradient_values,
        update_values,
    ):
        values |= part(step)
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"@(\w+)@", lambda name: str(values[name[1]]), template)


# ------------------------------------------------------------------------------------ markdown
def digits(value: float | Tensor) -> str:
    """Four digits; two of a small number, as 1.2e-05."""
    if value == 0:
        return "0"
    return f"{float(value):#.4g}" if abs(value) >= 1e-3 else f"{float(value):.1e}"


def fixed(value: float | Tensor) -> str:
    """Four decimals, and no -0.0000."""
    return f"{round(float(value), 4) + 0.0:.4f}"


def table(head: list[str], rows: list[list]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def likeliest(step: Step, log_p: Tensor) -> list[str]:
    """The likeliest tokens of log-probs (V,), each as text and probability."""
    top = log_p.exp().topk(SHOWN)
    decode = step.trainer.processor.tokenizer.decode
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [f"`{decode([i])}` {digits(p)}" for i, p in pairs]


# ----------------------------------------------------------------------------- parts of the page
def question_values(step: Step) -> dict:
    """Parts 1 and 2: question and prompts."""
    response = step.group[step.shown]
    question = response.question
    render = step.trainer.processor.apply_chat_template
    chats = [student_messages(question), teacher_messages(question)]
    texts = [render(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    student, teacher = (text.splitlines() for text in texts)
    difference = [line.rstrip() for line in difflib.ndiff(student, teacher) if line[0] != "?"]
    return {
        "puzzle": step.puzzle,
        "question": question.text,
        "answer": question.answer,
        "prompts": "\n".join(difference),
        "image_tokens": int(response.prompt.types.sum()),
        "student_tokens": len(response.prompt.ids),
        "teacher_tokens": len(response.teacher_prompt.ids),
    }


def response_values(step: Step) -> dict:
    """Part 3: responses, rewards, advantages."""
    group = step.group
    rewards = torch.tensor([response.reward for response in group])
    mean, std = rewards.mean().item(), rewards.std().item()
    right = sum(response.correct for response in group)
    rows = []
    for i, r in enumerate(group, 1):
        verdict = "yes" if r.correct else "no"
        rows.append(
            [i, f"`{r.text}`", len(r.ids), verdict, f"{r.reward:.3g}", f"{r.advantage:.3g}"]
        )
    return {
        "responses": table(["$i$", "response", "$T_i$", "right", "reward $r_i$", "$A_i$"], rows),
        "group_size": len(group),
        "right": right,
        "accuracy": right / len(group),
        "reward_mean": f"{mean:.3g}",
        "reward_std": f"{std:.3g}",
        "reward_1": f"{group[0].reward:.3g}",
        "advantage_1": f"{(group[0].reward - mean) / std:.3g}",
    }


def routing_values(step: Step) -> dict:
    """Part 4: routing and weights."""
    lengths = [str(len(response.ids)) for response in step.group if response.tutored]
    rows = [[i, *map(digits, response.weights)] for i, response in enumerate(step.group, 1)]
    head = ["$i$", "policy (Eq. 3)", "KL penalty (Eq. 3)", "tutoring (Eq. 11)"]
    return {
        "tau": f"{step.trainer.config.tau:g}",
        "tutored": ", ".join(str(number + 1) for number in step.teacher),
        "tutored_sum": " + ".join(lengths),
        "routed": step.routed,
        "weights": table(head, rows),
        "length_1": len(step.group[0].ids),
    }


def token_values(step: Step) -> dict:
    """Part 5: the likeliest tokens at the three places."""
    values = {"shown": step.shown + 1, "word": step.texts[step.places[0]]}
    for number, place in enumerate(step.places):
        before = " ".join(step.texts[:place])
        word = f"the student wrote `{step.texts[place]}`."
        values[f"seen_{number}"] = f"After `{before}` {word}" if before else f"First {word}"
        models = (step.before.student, step.teacher)
        columns = [likeliest(step, of_model[step.shown][place]) for of_model in models]
        values[f"top_{number}"] = table(
            ["student $p$", "teacher $q^h$"], [list(row) for row in zip(*columns, strict=True)]
        )
    return values


def buckets(step: Step, place: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids of S (Eq. 14); p and q^h on S and the tail (Eq. 15, 16); what each adds to D."""
    models = [step.before.student[step.shown][place], step.teacher[step.shown][place]]
    ids = torch.cat([log_p.topk(min(k, len(log_p))).indices for log_p in models]).unique()
    outside = torch.ones(len(models[0]), dtype=torch.bool).index_fill(0, ids, False)
    # the tail as a sum: 1 minus the sum over S would lose its digits
    p, q = (
        torch.cat([log_p[ids].exp(), log_p[outside].exp().sum().unsqueeze(0)]) for log_p in models
    )
    m = ((p + q) / 2).clamp(min=1e-30)  # an empty tail adds 0
    return ids, p, q, (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)) / 2


def bucket_values(step: Step) -> dict:
    """Part 5: the divergence at the first place, bucket by bucket."""
    k, decode = step.trainer.config.jsd_k, step.trainer.processor.tokenizer.decode
    ids, p, q, terms = buckets(step, step.places[0], k)
    largest = terms[:-1].topk(3).indices.tolist()
    others = [bucket for bucket in range(len(ids)) if bucket not in largest]
    named = [(f"`{decode([int(ids[bucket])])}`", [bucket]) for bucket in largest]
    named += [(f"the other {len(others)} of $S$", others), ("tail", [len(ids)])]
    named += [("sum", list(range(len(p))))]
    rows = []
    for name, members in named:
        sums = [values[members].sum() for values in (p, q, (p + q) / 2, terms)]
        rows.append([name, *map(digits, sums)])
    return {
        "k": k,
        "overlap": 2 * k - len(ids),
        "support_size": len(ids),
        "buckets": table(["bucket", "$p$", "$q^h$", "$m$", "adds to $D$"], rows),
    }


def support_values(step: Step) -> dict:
    """Part 5: support, tails and bound at the three places; and K."""
    student, teacher = step.before.student[step.shown], step.teacher[step.shown]
    divergence, vocabulary = step.before.divergence[step.shown], int(student[0].isfinite().sum())
    places, k_rows = [], []
    for place in step.places:
        ids, p, q, terms = buckets(step, place, step.trainer.config.jsd_k)
        row = [
            p[-1],
            q[-1],
            terms.sum(),
            divergence[place],
            full_jsd(student[place], teacher[place]),
        ]
        places.append([f"`{step.texts[place]}`", len(ids), *map(digits, row)])
    for k in (1, 2, step.trainer.config.jsd_k, vocabulary):
        ids, p, q, terms = buckets(step, step.places[0], k)
        k_rows.append([k, len(ids), digits(p[-1]), digits(q[-1]), fixed(terms.sum())])
    head = ["size of $S$", "student's tail", "teacher's tail", "$D$ by hand"]
    return {
        "supports": table(["token", *head, "`topk_jsd`", "`full_jsd`"], places),
        "vocabulary": vocabulary,
        "bound": fixed(math.log(2)),
        "share": f"{100 * divergence.max().item() / math.log(2):.0f}",
        "ks": table(["$K$", *head], k_rows),
    }


def sentence_values(step: Step) -> dict:
    """Part 6: the whole response with D below each token."""
    divergence = step.before.divergence[step.shown].tolist()
    lines = []
    for start in range(0, len(divergence), PER_LINE):
        words, numbers = step.texts[start : start + PER_LINE], divergence[start : start + PER_LINE]
        lines += ["".join(word.ljust(10) for word in words).rstrip()]
        lines += ["".join(fixed(number).ljust(10) for number in numbers).rstrip(), ""]
    return {
        "sentence": "\n".join(lines[:-1]),
        "largest_share": f"{100 * max(divergence) / sum(divergence):.2f}",
        "shown_sum": fixed(sum(divergence)),
    }


def loss_values(step: Step) -> dict:
    """Part 7: the loss, by the training code and by hand."""
    config, parts = step.trainer.config, step.before.parts
    advantages = [response.advantage for response in step.group]
    sums = [divergence.sum().item() for divergence in step.before.divergence.values()]
    policy, tutor = -sum(advantages) / len(advantages), sum(sums) / step.routed
    total = policy + config.lam * tutor
    terms = " ".join(f"{advantage:+.2f}" for advantage in advantages)
    terms_of_total = f"{fixed(policy)} + {config.lam:g} * {fixed(tutor)} + {config.beta_kl:g} * 0"
    rows = [
        ["policy", f"-({terms}) / {len(advantages)} = {fixed(policy)}", fixed(parts["policy"])],
        [
            "tutoring",
            f"({' + '.join(map(fixed, sums))}) / {step.routed} = {fixed(tutor)}",
            fixed(parts["tutor"]),
        ],
        ["KL penalty", "0", fixed(parts["kl"])],
        ["total", f"{terms_of_total} = {fixed(total)}", fixed(step.before.loss)],
    ]
    return {
        "lam": f"{config.lam:g}",
        "beta": f"{config.beta_kl:g}",
        "losses": table(["part", "by hand", "`Trainer.loss`"], rows),
    }


def gradient_values(step: Step) -> dict:
    """Part 8: norms and cosine."""
    policy, tutor = step.gradients["policy"], step.gradients["tutor"]
    cosine = torch.cosine_similarity(policy, tutor, dim=0).item()
    a, b = policy.norm().item(), tutor.norm().item()
    rows = [
        ["policy", fixed(a)],
        [r"$\lambda$ * tutoring", fixed(b)],
        [r"$\beta$ * KL penalty", fixed(step.gradients["kl"].norm())],
        ["all together, in `Trainer.step`", fixed(step.update["grad_norm"])],
    ]
    teacher = step.teacher[step.shown][step.places[0]]
    return {
        "gradients": table([f"gradient, over all {len(policy):,} weights", "norm"], rows),
        "cosine": f"{cosine:.3f}",
        "policy_norm": fixed(a),
        "tutor_norm": fixed(b),
        "total_norm": fixed(math.sqrt(a * a + b * b + 2 * cosine * a * b)),
        "wanted": likeliest(step, teacher)[0].split()[0],
    }


def update_values(step: Step) -> dict:
    """Part 9: the student before and after the step."""
    place, config = step.places[0], step.trainer.config
    states = (step.before, step.after)
    views = [state.student[step.shown][place] for state in states]
    columns = [likeliest(step, log_p) for log_p in (*views, step.teacher[step.shown][place])]
    divergences = [state.divergence[step.shown] for state in states]
    grown = int((divergences[1] - divergences[0]).argmax())
    rows = [[f"$D$ of `{step.texts[place]}`", *(fixed(row[place]) for row in divergences)]]
    for name, part in (("policy", "policy"), ("tutoring", "tutor"), ("KL penalty", "kl")):
        rows.append([name, *(fixed(state.parts[part]) for state in states)])
    rows.append(["total", *(fixed(state.loss) for state in states)])
    return {
        "grad_norm": fixed(step.update["grad_norm"]),
        "grad_clip": f"{config.grad_clip:g}",
        "lr": f"{config.lr:g}",
        "top_after": table(
            ["student before", "student after", "teacher"],
            [list(row) for row in zip(*columns, strict=True)],
        ),
        "after": table(["", "before", "after"], rows),
        "grown": step.texts[grown],
        "grown_before": digits(divergences[0][grown]),
        "grown_after": digits(divergences[1][grown]),
    }
