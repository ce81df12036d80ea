"""The losses of PTD-PO. torch only, nothing of ours imported: copy this file alone.

    policy_loss      clipped ratio with dual clip, per token (PPO, arXiv 1707.06347; dual clip, arXiv 1912.09729)
    k3_kl            the low-variance KL estimator (http://joschu.net/blog/kl-approx.html)
    topk_jsd         Jensen-Shannon divergence on the union of both top-K sets plus an exact tail bucket (PTD-PO)
    full_jsd         the same over the whole vocabulary: readable, exact, large
    head_scores      log-prob, entropy and Top-K JSD from hidden states, one chunk of tokens at a time

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
from torch.utils.checkpoint import checkpoint

NEG = -1e30     # stands for log 0: exp(NEG) is 0 in value and in gradient, and NEG - x is finite where -inf - -inf is not


def masked_mean(x: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Sum of x (any shape) where mask (same shape, bool) holds, over `denominator` (default: the number of such places).

    An empty mask gives 0 with zero gradient. Values outside the mask may be anything, NaN included.
    """
    total = x.masked_fill(~mask, 0).sum()
    return total / (mask.sum() if denominator is None else torch.as_tensor(denominator)).clamp(min=1)


# --------------------------------------------------------------------------------------------------------- policy gradient
def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.3,
                dual_clip: float | None = 3.0) -> Tensor:
    """Clipped surrogate, per token: -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A), w = exp(logp - old_logp).

    logp, old_logp, advantages: one shape. Gradient flows through logp alone; old_logp and advantages are detached.
    dual_clip: where A < 0 the loss is at most dual_clip * |A|, however far the ratio has grown; None switches it off.
    Asymmetric clipping as in DAPO (arXiv 2503.14476); the defaults are the released recipe's.
    """
    advantages = advantages.detach()
    ratio = torch.exp(logp - old_logp.detach())
    loss = torch.max(-ratio * advantages, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.min(loss, -dual_clip * advantages), loss)


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(student || reference) per sampled token, >= 0: exp(d) - 1 - d with d = ref_logp - logp.

    Unbiased in value when the tokens are the student's own samples. Gradient through logp; ref_logp is detached.
    """
    d = ref_logp.detach() - logp
    return torch.expm1(d) - d


# ---------------------------------------------------------------------------------------------------- from logits, per token
def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) in float32 or better, with NEG for log 0."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(logits / temperature, dim=-1).clamp(min=NEG)


def token_log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (...) of tokens ids (...) under logits (..., V)."""
    return _log_probs(logits, temperature).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Shannon entropy in nats (...) of softmax(logits (..., V) / temperature)."""
    return _entropy(_log_probs(logits, temperature))


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Elementwise terms of 1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2; differentiable in both, m included."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m))


def full_jsd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence in nats, (..., V), (..., V) -> (...), in [0, ln 2]. The teacher is detached."""
    return _jsd(_log_probs(student_logits, temperature), _log_probs(teacher_logits.detach(), temperature)).sum(-1)


def topk_jsd(student_logits: Tensor, teacher_logits: Tensor, k: int = 100, temperature: float = 1.0) -> Tensor:
    """Top-K Jensen-Shannon divergence with a tail bucket, in nats: (..., V), (..., V) -> (...).

    The support S is the union of the student's and the teacher's k most probable tokens. Both keep their exact probabilities on S
    and put the rest of their mass into one extra bucket; the result is the JSD of these two (|S| + 1)-way distributions. So
    0 <= topk_jsd <= full_jsd <= ln 2, and equality with full_jsd at k >= V. Its gradient in the student's logits is the divergence's
    own (the choice of S is held fixed); the teacher is detached. The tutoring loss of PTD-PO, arXiv 2606.07000.

    Raises ValueError for k < 1 or logits of different shapes.
    """
    if k < 1:
        raise ValueError(f"topk_jsd needs k >= 1, got {k}")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ in shape")
    return _topk_jsd(_log_probs(student_logits, temperature), _log_probs(teacher_logits.detach(), temperature), k)


def _topk_jsd(log_p: Tensor, log_q: Tensor, k: int) -> Tensor:
    k = min(k, log_p.shape[-1])
    p_ids, q_ids = log_p.detach().topk(k).indices, log_q.topk(k).indices                 # (..., K) each
    ids = torch.cat([p_ids, q_ids], -1)                                                  # (..., 2K)
    chosen = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, p_ids, True)
    twice = chosen.gather(-1, q_ids)                                                     # (..., K) teacher ids that S has already
    first = torch.cat([torch.ones_like(twice), ~twice], -1)
    head = (_jsd(log_p.gather(-1, ids), log_q.gather(-1, ids)) * first).sum(-1)

    def tail(x):    # log of the mass outside S. Exact: 1 - sum_S cancels to nothing where S holds nearly all mass
        return x.scatter(-1, ids, NEG).logsumexp(-1)
    return head + _jsd(tail(log_p), tail(log_q))


# ------------------------------------------------------------------------------------------------- from hidden states, chunked
def head_logits(hidden: Tensor, head: torch.nn.Linear, banned: Tensor | None = None) -> Tensor:
    """Logits (N, V) in float32 or better of hidden states (N, H); tokens `banned` (ids) get -inf, as they do while sampling."""
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if banned is None else logits.index_fill(-1, banned, -math.inf)


def head_scores(hidden: Tensor, head: torch.nn.Linear, ids: Tensor, teacher_hidden: Tensor | None = None,
                teacher_head: torch.nn.Linear | None = None, *, k: int = 100, temperature: float = 1.0,
                banned: Tensor | None = None, chunk: int = 256) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per-token scores from hidden states without ever holding (N, V): -> log-prob, entropy, Top-K JSD, each (N,).

    hidden (N, H): the student's states, one before each sampled token ids (N,). teacher_hidden (N, H'): the teacher's states at the
    same tokens; None: no teacher, and None in place of the divergence. banned: ids that could not be sampled.
    Gradient: hidden and the head's weights, through log-prob and JSD; the entropy and the teacher are detached.
    Memory: the logits of one chunk of tokens at a time, chunk * V floats a copy; backward recomputes them, the teacher's included.
    """
    def scores(h, i, t):
        log_p = _log_probs(head_logits(h, head, banned), temperature)
        out = log_p.gather(-1, i.unsqueeze(-1)).squeeze(-1), _entropy(log_p.detach())
        if t is None:
            return out
        with torch.no_grad():
            log_q = _log_probs(head_logits(t, teacher_head, banned), temperature)
        return *out, _topk_jsd(log_p, log_q, k)

    # an empty batch still gives one (empty) chunk, attached to the graph: every process runs the same backward
    starts = range(0, max(len(ids), 1), chunk)
    parts = [checkpoint(scores, hidden[a:a + chunk], ids[a:a + chunk], None if teacher_hidden is None else teacher_hidden[a:a + chunk],
                        use_reentrant=False) for a in starts]
    columns = [torch.cat(column) for column in zip(*parts)]
    return columns[0], columns[1], (columns[2] if teacher_hidden is not None else None)
