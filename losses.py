"""The losses of PTD-PO. torch only, nothing of ours imported: copy this file alone.

    policy_loss      clipped ratio, token or sequence, with dual clip (PPO, GRPO, DAPO, GSPO)
    k3_kl            the low-variance KL estimator
    topk_jsd         Jensen-Shannon divergence on the union of both top-K sets plus an exact tail bucket (PTD-PO)
    full_jsd         the same over the whole vocabulary: readable, exact, large
    scores_from_hidden      log-prob, entropy and Top-K JSD from hidden states, in one pass over the vocabulary, a chunk of tokens at a time

Everything is per token and unreduced; `masked_mean` reduces. All arithmetic is float32 (float64 stays float64) whatever the
input's type. Logits of -inf (banned tokens) are allowed everywhere.

The released PTD-PO code detaches p in p * (log p - log m) but differentiates m; the two terms of the divergence then cancel
and the student's gradient is exactly zero. Here the gradient is the divergence's own (tests/test_losses.py shows both).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NEG = -1e30  # stands for log 0: exp(NEG) is 0 in value and in gradient, and NEG - x is finite where -inf - -inf is not


def masked_mean(x: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Sum of x (any shape) where mask (same shape, bool) holds, over `denominator` (default: the number of such places).

    The denominator is the aggregation. For x (B, T) of N responses in the whole step, with these the shares of micro-batches add up to
        all tokens of the step       token mean (DAPO, arXiv 2503.14476)
        N * mask.sum(1, True)        mean of the responses' own means, (B, 1): GRPO as published (arXiv 2402.03300), GSPO
        N * longest response         fixed length (Dr. GRPO, arXiv 2503.20783)
    An empty mask gives 0 with zero gradient. Values outside the mask may be anything, NaN included.
    """
    denominator = (
        mask.sum() if denominator is None else torch.as_tensor(denominator, device=x.device)
    )
    return (x.masked_fill(~mask, 0) / denominator.clamp(min=1)).sum()


# --------------------------------------------------------------------------------------------------------- policy gradient
def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float | None = 3.0,
    ratio: str = "token",
) -> Tensor:
    """Clipped surrogate, per token (B, T): -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A) (PPO, arXiv 1707.06347).

    logp, old_logp, advantages (B, T); mask (B, T) bool, the response's tokens; values outside it are not read.
    Gradient flows through logp alone; old_logp and advantages are detached.
    ratio "token": w = exp(logp - old_logp) (GRPO, arXiv 2402.03300). "sequence": one w a response, exp of the mean of logp - old_logp over
    its tokens, repeated at each (GSPO, arXiv 2507.18071: use the sequence mean, and clip at 3e-4 and 4e-4).
    dual_clip: where A < 0 the loss is at most dual_clip * |A|, however far the ratio has grown (arXiv 1912.09729); None: no such bound.
    Asymmetric clipping as in DAPO (arXiv 2503.14476); the defaults are the released recipe's. Raises ValueError for another ratio.
    """
    if ratio not in ("token", "sequence"):
        raise ValueError(f"ratio must be token or sequence, got {ratio!r}")
    advantages = advantages.detach()
    log_w = (logp - old_logp.detach()).masked_fill(
        ~mask, 0
    )  # before exp: 0 * inf in its backward is NaN
    if ratio == "sequence":
        log_w = (log_w.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(
            log_w
        )
    w = log_w.exp()
    loss = torch.max(-w * advantages, -w.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.min(loss, -dual_clip * advantages), loss)


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(student || reference) per sampled token, >= 0: exp(d) - 1 - d with d = ref_logp - logp.

    Unbiased in value when the tokens are the student's own samples (k3 of http://joschu.net/blog/kl-approx.html). Gradient through
    logp; ref_logp is detached.
    """
    d = ref_logp.detach() - logp
    return torch.expm1(d) - d


# ---------------------------------------------------------------------------------------------------- from logits, per token
def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) in float32 or better, with NEG for log 0."""
    return F.log_softmax(_float(logits) / temperature, dim=-1).clamp(min=NEG)


def token_log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (...) of tokens ids (...) under logits (..., V)."""
    return _log_probs(logits, temperature).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Shannon entropy in nats (...) of softmax(logits (..., V) / temperature), differentiable."""
    log_p = _log_probs(logits, temperature)
    return -(log_p.exp() * log_p).sum(-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return log_a.exp() * (log_a - log_b)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


# Terms of D(p, q), one a bucket, of the student's and the teacher's log-probs. Differentiable in both, the mixture m included. The two KL
# are for the ablation; they are unbounded (about 1e30) where one model gives 0 to what the other does not.
DIVERGENCES = {"jsd": _jsd, "forward_kl": lambda log_p, log_q: _kl(log_q, log_p), "reverse_kl": _kl}
SUPPORTS = ("union", "student", "teacher")


def full_jsd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence in nats, (..., V), (..., V) -> (...), in [0, ln 2]. The teacher is detached."""
    return _jsd(
        _log_probs(student_logits, temperature), _log_probs(teacher_logits.detach(), temperature)
    ).sum(-1)


def topk_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int = 100,
    temperature: float = 1.0,
    *,
    divergence: str = "jsd",
    support: str = "union",
) -> Tensor:
    """Top-K Jensen-Shannon divergence with a tail bucket, in nats: (..., V), (..., V) -> (...).

    The support S is the union of the student's and the teacher's k most probable tokens. Both keep their exact probabilities on S
    and put the rest of their mass into one extra bucket; the result is the JSD of these two (|S| + 1)-way distributions. So
    0 <= topk_jsd <= full_jsd <= ln 2, and equality with full_jsd at k >= V. Its gradient in the student's logits is the divergence's
    own (the choice of S is held fixed); the teacher is detached. The tutoring loss of PTD-PO, arXiv 2606.07000.

    For ablations: divergence "forward_kl" is KL(teacher || student), "reverse_kl" KL(student || teacher), on the same buckets; support
    "student" or "teacher" takes only that one's k tokens. Raises ValueError for k < 1, another name, or logits of different shapes.
    """
    _check(k, divergence, support)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ in shape"
        )
    log_p, log_q = (
        _log_probs(student_logits, temperature),
        _log_probs(teacher_logits.detach(), temperature),
    )
    ids, first = _support(log_p, log_q, k, support)

    def buckets(
        x,
    ):  # (..., V) -> (..., S + 1). The tail is exact: 1 - sum_S cancels to nothing where S holds nearly all mass
        tail = x.scatter(-1, ids, NEG).logsumexp(-1, keepdim=True)
        return torch.cat([x.gather(-1, ids).masked_fill(~first, NEG), tail], -1)

    return DIVERGENCES[divergence](buckets(log_p), buckets(log_q)).sum(-1)


def _check(k: int, divergence: str, support: str) -> None:
    if k < 1:
        raise ValueError(f"the Top-K divergence needs k >= 1, got {k}")
    for name, value, allowed in (
        ("divergence", divergence, DIVERGENCES),
        ("support", support, SUPPORTS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _support(student: Tensor, teacher: Tensor, k: int, support: str) -> tuple[Tensor, Tensor]:
    """Token ids (..., S) of the support, ascending, and a mask of the first of each: what both models chose stands there twice."""
    chosen = [
        x.detach().topk(min(k, x.shape[-1])).indices
        for x, name in ((student, "student"), (teacher, "teacher"))
        if support in (name, "union")
    ]
    ids = torch.cat(chosen, -1).sort(-1).values
    return ids, torch.cat(
        [torch.ones_like(ids[..., :1], dtype=torch.bool), ids[..., 1:] != ids[..., :-1]], -1
    )


# ------------------------------------------------------------------------------------------------- from hidden states, chunked
def chunk_tokens(vocab: int, logits_mb: float, dtype: torch.dtype = torch.float32) -> int:
    """Tokens a chunk of scores_from_hidden so that its vocabulary-sized tensors stay within logits_mb MiB: logits_mb * 2^20 / (8 vocab).

    8 bytes a token and vocabulary entry (16 in float64): two float32 tensors live at the worst moment, or one and two in half precision.
    At least 1 token, however small the budget.
    """
    return max(1, int(logits_mb * 2**20) // (vocab * (16 if dtype == torch.float64 else 8)))


def scores_from_hidden(
    hidden: Tensor,
    head: torch.nn.Linear,
    ids: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: torch.nn.Linear | None = None,
    *,
    k: int = 100,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    divergence: str = "jsd",
    support: str = "union",
    logits_mb: float = 512,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per-token scores from hidden states without ever holding (N, V): -> log-prob, entropy, Top-K JSD, each (N,).

    hidden (N, H): the student's states, one before each sampled token ids (N,). teacher_hidden (N, H'): the teacher's states at the
    same tokens; None: no teacher, and None in place of the divergence. The heads are Linear layers over one vocabulary, with bias or
    without; they may be one and the same, or tied to an embedding. banned: ids that could not be sampled, the padding of the vocabulary
    beyond the tokenizer included: -inf in both. Under autocast the heads run in its type, as they would by themselves.
    Gradient: hidden, and the head's weight and bias where they require it, through log-prob and JSD. Entropy and teacher are detached.

    What it costs. Each head multiplies every token once, and all three scores come from that pass: both models' logits at the support S
    and at the sampled token, the log-sum-exp of all others, and, while the student's probabilities are there, the mean of the head's
    rows under them, which is that log-sum-exp's derivative. So backward to `hidden` recomputes nothing; of the teacher nothing is ever
    recomputed. Only the gradient of the head's own weight, if it is trained, multiplies the student's head once more, chunk by chunk.
    Memory: see scores_bytes. Raises ValueError as topk_jsd does or where the vocabularies differ, TypeError for another kind of head.
    """
    _check(k, divergence, support)
    for layer in (head, teacher_head):
        if layer is not None and not isinstance(layer, torch.nn.Linear):
            raise TypeError(
                f"scores_from_hidden needs the output heads as torch.nn.Linear, got {type(layer).__name__}"
            )
    teacher = (
        None if teacher_hidden is None else (teacher_hidden, teacher_head.weight, teacher_head.bias)
    )
    if teacher is not None and head.weight.shape[0] != teacher_head.weight.shape[0]:
        raise ValueError(
            f"the heads' vocabularies differ: {head.weight.shape[0]} and {teacher_head.weight.shape[0]}"
        )
    settings = (
        k,
        divergence,
        support,
        temperature,
        banned,
        chunk_tokens(head.weight.shape[0], logits_mb, hidden.dtype),
    )
    return _ScoresFromHidden.apply(
        hidden, head.weight, head.bias, ids, teacher, settings, torch.is_grad_enabled()
    )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, banned: Tensor | None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return logits if banned is None else logits.index_fill_(-1, banned, -math.inf)


def _others(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of logits (n, V) over the temperature without ids (n, S), as e (n, V), 0 at ids, its sum (n, 1), and the log-sum-exp (n, 1).

    Overwrites `logits`, to hold no second copy. The sum is at least 1, also where ids leave nothing.
    """
    e = _float(logits.scatter_(-1, ids, -math.inf))
    e = e if temperature == 1 else e.div_(temperature)
    top = e.amax(-1, keepdim=True).clamp(min=NEG)
    total = e.sub_(top).exp_().sum(-1, keepdim=True)
    return e, total.clamp(min=1), (total.log() + top).clamp(min=NEG)


class _ScoresFromHidden(torch.autograd.Function):
    """scores_from_hidden. The vocabulary is cut into 1 + S + 1 buckets: the sampled token, the support without it, the rest as one.

    All three scores are functions of the student's and the teacher's logits in these buckets (a log-sum-exp for the rest), and autograd
    differentiates them there, on S numbers a token. What is done by hand is only from the buckets to the vocabulary:
    d logit_s / d hidden = row s of the head; d logsumexp_rest / d hidden = the mean of the rest's rows under the student.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, teacher, settings, grad):
        k, divergence, support, temperature, banned, chunk = settings
        device, count = hidden.device.type, len(tokens)
        half = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        real = torch.float64 if half == torch.float64 else torch.float32
        cast, teacher = (
            [None if x is None else x.to(half) for x in xs or ()]
            for xs in ((weight, bias), teacher)
        )
        size = 2 + (min(k, len(weight)) * (2 if support == "union" else 1) if teacher else 0)
        logp, entropies, jsd = hidden.new_empty(3, count, dtype=real)
        # what backward needs of a token: the bucket's ids, logp's and jsd's gradients in the buckets, the mean row of the rest
        ids = tokens.new_empty(count, size - 1)
        in_buckets = (
            [hidden.new_empty(count, size, dtype=real) for _ in range(2 if teacher else 1)]
            if grad
            else []
        )
        mean_rows = hidden.new_empty(hidden.shape if grad and ctx.needs_input_grad[0] else 0)
        for a in range(0, count, chunk):
            b = slice(a, a + chunk)
            token = tokens[b].unsqueeze(-1)  # (n, 1)
            with torch.autocast(device, enabled=False):
                p = _logits(hidden[b].to(half), *cast, banned)  # (n, V)
                q = _logits(teacher[0][b], *teacher[1:], banned) if teacher else None  # (n, V)
                s, first = (
                    _support(p, q, k, support) if teacher else (token[:, :0], token[:, :0].bool())
                )
                inside = (s == token).any(-1, keepdim=True)
                live = torch.cat(
                    [torch.ones_like(inside), first & (s != token)], -1
                )  # an id's second place gets NEG
                s = ids[b] = torch.cat([token, s], -1)  # (n, 1 + S)
                z_p, z_q = (
                    None
                    if x is None
                    else (_float(x.gather(-1, s)) / temperature)
                    .masked_fill(~live, NEG)
                    .clamp(min=NEG)
                    for x in (p, q)
                )
                if teacher:
                    e, _, log_rest = _others(q, s, temperature)
                    z_q = torch.cat([z_q, log_rest], -1)  # (n, 1 + S + 1)
                    del q, e
                e, total, log_rest = _others(p, s, temperature)
                z_p = torch.cat([z_p, log_rest], -1)  # (n, 1 + S + 1)
                del p
                spread = (
                    total.log() + torch.special.entr(e).sum(-1, keepdim=True) / total
                )  # entropy within the rest
                if len(mean_rows):
                    mean_rows[b] = e.div_(total).to(half) @ cast[0]  # (n, H)
                del e
            with torch.set_grad_enabled(bool(in_buckets)):
                log_p = z_p.requires_grad_(bool(in_buckets)).log_softmax(-1)
                scores = [log_p[:, 0]]
                if teacher:
                    # the sampled token is a bucket of the divergence only where the support holds it
                    pair = [
                        torch.cat(
                            [
                                x[:, :1].masked_fill(~inside, NEG),
                                x[:, 1:-1],
                                torch.where(
                                    inside, x[:, -1:], torch.logaddexp(x[:, :1], x[:, -1:])
                                ),
                            ],
                            -1,
                        )
                        for x in (log_p, z_q.log_softmax(-1))
                    ]
                    scores.append(DIVERGENCES[divergence](*pair).sum(-1))
                for store, score in zip(in_buckets, scores):
                    store[b] = torch.autograd.grad(score.sum(), z_p, retain_graph=True)[0]
            log_p = log_p.detach()
            logp[b], jsd[b] = log_p[:, 0], scores[-1].detach()
            entropies[b] = (
                log_p.exp() * (torch.cat([torch.zeros_like(z_p[:, 1:]), spread], -1) - log_p)
            ).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, ids, mean_rows, banned, *in_buckets)
        ctx.settings = temperature, chunk, half
        ctx.mark_non_differentiable(entropies)
        return logp, entropies, jsd if teacher else None

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logp, _, d_jsd):
        hidden, weight, bias, ids, mean_rows, banned, *in_buckets = ctx.saved_tensors
        temperature, chunk, half = ctx.settings
        grad = d_logp.unsqueeze(-1) * in_buckets[0]
        if len(in_buckets) == 2:
            grad.addcmul_(d_jsd.unsqueeze(-1), in_buckets[1])
        grad /= temperature
        at_ids, at_rest = grad[:, :-1], grad[:, -1:]
        d_hidden = d_weight = d_bias = None
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                d_hidden = _float(
                    F.embedding_bag(
                        ids, weight, per_sample_weights=at_ids.to(weight.dtype), mode="sum"
                    )
                )
                d_hidden = d_hidden.addcmul_(at_rest, _float(mean_rows)).to(hidden.dtype)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                # float32 or better: sums over chunks in half precision would lose small terms
                d_weight, d_bias = (
                    None if x is None else torch.zeros_like(x, dtype=grad.dtype)
                    for x in (weight, bias)
                )
                cast = [None if x is None else x.to(half) for x in (weight, bias)]
                for a in range(0, len(ids), chunk):
                    b = slice(a, a + chunk)
                    h = hidden[b].to(half)
                    e, total, _ = _others(_logits(h, *cast, banned), ids[b], temperature)
                    e = e.mul_(at_rest[b] / total).scatter_add_(
                        -1, ids[b], at_ids[b]
                    )  # (n, V): d loss / d logits
                    if d_bias is not None:
                        d_bias += e.sum(0)
                    if half == grad.dtype:
                        d_weight.addmm_(e.T, h)
                    else:
                        d_weight += e.to(half).T @ h
                    del e  # before the next chunk's logits
        d_weight = d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_bias = d_bias.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return d_hidden, d_weight, d_bias, None, None, None, None
