"""The losses of PTD-PO (arXiv 2606.07000). Needs torch alone: copy this file into your project.

    weighted_sum        sum over tokens with one weight per response: all means of the paper
    policy_loss         clipped policy-gradient loss per token                            Eq. 2, 3
    k3_kl               estimate of the KL divergence to the reference per token          Eq. 3
    full_jsd            Jensen-Shannon divergence over the whole vocabulary               Eq. 13
    topk_jsd            the same on the union of both top-K sets and a tail               Eq. 14-17
    scores_from_hidden  log-probability, entropy and topk_jsd from hidden states, chunk by chunk;
                        the logits of all tokens are never in memory together

Each loss returns one value per token; `weighted_sum` reduces. Softmax and divergences are computed
in float32, whatever the type of the logits (float64 stays float64). policy_loss and k3_kl keep the
type of their inputs. Logits of -inf (banned tokens) are allowed.

Equation numbers are the paper's. Where the released code differs from the paper, the docstring
says "release". Two differences matter most. The release takes the support from the student alone.
And it detaches p in p (log p - log m) but differentiates m: the two halves of the divergence then
cancel, and the student's gradient is exactly zero (shown in tests/test_losses.py). Here the
gradient is the divergence's own, as the paper derives it (Eq. 36, 38, 41, 42).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Stands for log 0. exp(NEG) is 0 in value and in gradient. NEG - x is finite, where -inf - -inf
# is NaN.
NEG = -1e30
# The largest x of an exp(x). Where exp is inf, above 88 in float32 and above 11 in float16, 0 * inf
# in its backward is NaN.
LARGEST_LOG = 10.0


# -------------------------------------------------------------------------------------- reduction
def weighted_sum(values: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Sum of values (B, T) where mask (B, T) bool holds, each response's tokens times its weight.

    weights (B,), >= 0, one per response; detached. Values outside the mask and in rows of weight 0
    are never read: they may be NaN or inf, and their gradient is 0. Returns a scalar.

    Every mean of the paper, and of the methods close to it, is such a sum. With N questions, R
    responses in the whole step and T_i tokens in response i, the weights are

        1 / (R T_i)     mean per response, then over responses: Eq. 3 of the paper; also GRPO
                        (arXiv 2402.03300) and GSPO (arXiv 2507.18071)
        1 / sum_i T_i   mean over all tokens of the step: DAPO (arXiv 2503.14476)
        1 / (R T_max)   fixed length: Dr. GRPO (arXiv 2503.20783); T_max is the longest response
                        that the settings allow
        1 / (N |F|)     mean over the tutored tokens F of a question, then over the N questions of
                        the step: Eq. 11; weight 0 for a response that is not tutored

    The weights refer to the whole step. So the sums of its micro-batches and processes add up to
    the mean, however the responses are spread.
    """
    weights = weights.detach()
    kept = mask & (weights > 0).unsqueeze(1)
    return (values.masked_fill(~kept, 0) * weights.unsqueeze(1)).sum()


# --------------------------------------------------------------------------------- policy gradient
def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio: str = "token",
) -> Tensor:
    """Clipped policy-gradient loss per token, (B, T): the negative of the min in Eq. 3.

        -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),    rho = exp(logp - old_logp), Eq. 2

    logp, old_logp, advantages (B, T); mask (B, T) bool: the response's tokens. Values of logp and
    old_logp outside the mask are not read; the loss there is -A, so reduce with the mask. The
    gradient flows through logp alone; old_logp and advantages are detached. Raises ValueError for
    an unknown `ratio`.

    clip_low, clip_high: the paper has one symmetric clip, without a number; 0.2 is ours. The
    release has 0.2 and 0.3; two different bounds come from DAPO (arXiv 2503.14476).
    dual_clip: where A < 0, the loss is at most dual_clip * |A|, however large rho is
    (arXiv 1912.09729). None, not 0: no such bound, as in the paper. The release has 3.
    ratio: "token" is Eq. 2. "sequence" is one ratio per response, exp of the mean of
    logp - old_logp over its tokens (GSPO, arXiv 2507.18071); GSPO clips at 3e-4 and 4e-4.
    """
    if ratio not in ("token", "sequence"):
        raise ValueError(f"ratio must be token or sequence, got {ratio!r}")
    advantages = advantages.detach()
    # TRAP: mask before exp. A value outside may be inf, and 0 * inf in exp's backward is NaN.
    log_rho = (logp - old_logp.detach()).masked_fill(~mask, 0)
    if ratio == "sequence":
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        log_rho = (log_rho.sum(1, keepdim=True) / lengths).expand_as(log_rho)
    rho = log_rho.clamp(max=LARGEST_LOG).exp()
    loss = torch.max(-rho * advantages, -rho.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.min(loss, -dual_clip * advantages), loss)


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(student || reference) per sampled token, >= 0: exp(d) - 1 - d.

    d = ref_logp - logp, any shape. Its expectation is the KL divergence when the tokens are the
    student's own samples (k3 in http://joschu.net/blog/kl-approx.html; used by GRPO, arXiv
    2402.03300). It stands for D_KL in Eq. 3. The gradient flows through logp; ref_logp is detached.

    TRAP: only the value is unbiased. The gradient in logp is 1 - exp(d); its expectation is the
    gradient of KL(reference || student). No ratio corrects for samples of an older policy.
    """
    difference = (ref_logp.detach() - logp).clamp(max=LARGEST_LOG)
    return torch.expm1(difference) - difference


# ------------------------------------------------------------------------- from logits, per token
def token_log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (...) of tokens ids (...) under softmax(logits (..., V) / temperature)."""
    return _log_probs(logits, temperature).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Shannon entropy in nats (...) of softmax(logits (..., V) / temperature), differentiable."""
    log_p = _log_probs(logits, temperature)
    return -(log_p.exp() * log_p).sum(-1)


def full_jsd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence in nats, Eq. 13: (..., V), (..., V) -> (...).

        1/2 KL(q || m) + 1/2 KL(p || m),    m = (p + q) / 2,    p student, q teacher

    It lies in [0, ln 2] (Eq. 43). The teacher is detached. The gradient in z, the student's logits
    after the temperature, is Eq. 42: 1/2 p_v (log(p_v / m_v) - E_{u ~ p} log(p_u / m_u)).
    """
    log_p = _log_probs(student_logits, temperature)
    log_q = _log_probs(teacher_logits.detach(), temperature)
    return _jsd(log_p, log_q).sum(-1)


def topk_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int = 100,
    temperature: float = 1.0,
    *,
    divergence: str = "jsd",
    support: str = "union",
) -> Tensor:
    """Top-K Jensen-Shannon divergence in nats, Eq. 14-17: (..., V), (..., V) -> (...).

    The support S is the union of the student's and the teacher's k most probable tokens. Both
    models keep their exact probabilities on S; all their other mass goes into one more bucket, the
    tail. The result is the JSD of these two (|S| + 1)-way distributions. Therefore
    0 <= topk_jsd <= full_jsd <= ln 2 (Eq. 43, 62; up to rounding), and topk_jsd equals full_jsd if
    k >= V. The temperature divides both models' logits.

    The gradient is the divergence's own (Eq. 41, 42, on the buckets), with S held fixed; the
    teacher is detached. Raises ValueError for k < 1, for an unknown `divergence` or `support`, and
    for logits of different shapes.

    Paper: JSD, union, k = 100. For ablations: "forward_kl" is KL(teacher || student) and
    "reverse_kl" is KL(student || teacher) on the same buckets; support "student" (as the release)
    or "teacher" takes the k tokens of that model alone.
    """
    _check_options(k, divergence, support)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"logits differ in shape: {student_logits.shape}, {teacher_logits.shape}")
    log_p = _log_probs(student_logits, temperature)
    log_q = _log_probs(teacher_logits.detach(), temperature)
    ids, is_duplicate = _topk_support(log_p, log_q, k, support)
    buckets = [_bucket_log_probs(log_probs, ids, is_duplicate) for log_probs in (log_p, log_q)]
    return DIVERGENCES[divergence](*buckets).sum(-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) in float32 or better, with NEG for log 0."""
    return F.log_softmax(_at_least_float32(logits) / temperature, dim=-1).clamp(min=NEG)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Terms of KL(a || b), one per bucket."""
    return log_a.exp() * (log_a - log_b)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Terms of Eq. 13. TRAP: with p detached and m not, the gradient is exactly zero (release)."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


# The divergence's terms, one per bucket, from the log-probabilities of student and teacher. The two
# KL are for ablations. Their gradients in the student's logits are Eq. 36 (forward): p - q, and
# Eq. 38 (reverse): p_v (log p_v/q_v - E_p log p/q). They have no bound: about 1e30 where one model
# gives probability 0 to a bucket and the other does not.
DIVERGENCES = {"jsd": _jsd, "forward_kl": lambda log_p, log_q: _kl(log_q, log_p), "reverse_kl": _kl}
SUPPORTS = ("union", "student", "teacher")


def _check_options(k: int, divergence: str, support: str) -> None:
    if k < 1:
        raise ValueError(f"the Top-K divergence needs k >= 1, got {k}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if support not in SUPPORTS:
        raise ValueError(f"support must be one of {', '.join(SUPPORTS)}, got {support!r}")


def _topk_support(student: Tensor, teacher: Tensor, k: int, support: str) -> tuple[Tensor, Tensor]:
    """The support S of Eq. 14 from logits or log-probabilities (..., V): ids and is_duplicate.

    Both are (..., S), S the number of places: 2 k for the union. ids are ascending. A token that
    both models chose stands there twice, and is_duplicate (bool) marks the second place.
    """
    models = {"union": (student, teacher), "student": (student,), "teacher": (teacher,)}[support]
    chosen = [scores.topk(min(k, scores.shape[-1])).indices for scores in models]
    ids = torch.cat(chosen, -1).sort(-1).values
    return ids, F.pad(ids[..., 1:] == ids[..., :-1], (1, 0))


def _bucket_log_probs(log_probs: Tensor, ids: Tensor, is_duplicate: Tensor) -> Tensor:
    """Eq. 15-17: log-probabilities (..., V) -> those of the support and of the tail (..., S + 1).

    Paper: the tail is 1 - sum over S. Ours sums the tail itself: where S holds nearly all mass, the
    difference would cancel to nothing.
    """
    at_support = log_probs.gather(-1, ids).masked_fill(is_duplicate, NEG)
    tail = log_probs.scatter(-1, ids, NEG).logsumexp(-1, keepdim=True)
    return torch.cat([at_support, tail], -1)


# --------------------------------------------------------------------- from hidden states, chunked
def chunk_tokens(vocab: int, logits_mb: float, dtype: torch.dtype = torch.float32) -> int:
    """Tokens per chunk of scores_from_hidden, so that its (chunk, V) tensors fit in logits_mb MiB.

    At the worst moment two float32 tensors are alive, or one float32 and two in half precision: 8
    bytes per token and vocabulary entry (16 in float64). At least 1 token.
    """
    return max(1, int(logits_mb * 2**20) // (vocab * 2 * max(4, dtype.itemsize)))


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
    """Log-probability, entropy and Top-K JSD, each (N,), from hidden states of N tokens.

    The same values as token_log_probs, entropy and topk_jsd of the logits, but the logits (N, V)
    are never in memory together. So memory grows with N K, not with N V (Eq. 65, 66).

    hidden (N, H): the student's state before each sampled token ids (N,). teacher_hidden (N, H'):
    the teacher's states at the same tokens, and teacher_head; None: no teacher, and the third
    result is None. The heads are Linear layers over one vocabulary, with or without bias. They may
    be the same layer or tied to an embedding. banned: token ids that cannot be sampled, also those
    that only pad the vocabulary; both models get -inf there. Under autocast the heads multiply in
    its type, as usual: bfloat16 rounds logits near 27 by up to 0.06.

    The gradient flows through log-probability and JSD to hidden and to the student's head, where
    they require it. Entropy and teacher are detached. Raises ValueError as topk_jsd does and for
    heads of different vocabularies or inputs of different lengths, TypeError for a head that is no
    Linear layer.

    Cost: two products of each token with the student's head, for the logits and for the gradient in
    `hidden`, and one with the teacher's. Backward multiplies again only where the head is trained.
    Memory: chunk_tokens for the logits; the rest depends on K and H.
    """
    _check_options(k, divergence, support)
    _check_heads(head, teacher_head)
    # TRAP: a chunk is a slice, and a slice beyond the end is short or empty, not an error
    if len({len(x) for x in (hidden, ids, teacher_hidden) if x is not None}) > 1:
        raise ValueError(f"lengths differ: hidden {len(hidden)}, ids {len(ids)} or teacher_hidden")
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    teacher = None
    if teacher_hidden is not None:
        teacher = _Model(teacher_hidden, teacher_head.weight, teacher_head.bias, dtype)
    chunk = chunk_tokens(len(head.weight), logits_mb, hidden.dtype)
    with_grad = torch.is_grad_enabled()
    settings = _Settings(k, divergence, support, temperature, banned, chunk, dtype, with_grad)
    return _ScoresFromHidden.apply(hidden, head.weight, head.bias, ids, teacher, settings)


def _check_heads(head: torch.nn.Module, teacher_head: torch.nn.Module | None) -> None:
    for layer in (head, teacher_head):
        if not isinstance(layer, torch.nn.Linear | None):
            raise TypeError(f"the heads must be torch.nn.Linear, got {type(layer).__name__}")
    if teacher_head is not None and len(head.weight) != len(teacher_head.weight):
        raise ValueError(f"vocabularies differ: {len(head.weight)} and {len(teacher_head.weight)}")


@dataclass(frozen=True)
class _Settings:
    """What forward and backward need beside tensors."""

    k: int
    divergence: str
    support: str
    temperature: float
    banned: Tensor | None
    chunk: int  # tokens per chunk
    dtype: torch.dtype  # the heads multiply in it: autocast's where it is on, else the weight's own
    with_grad: bool  # False under no_grad: nothing is kept for backward


class _Model:
    """The end of a model: hidden states (N, H) and the head's weight (V, H) and bias (V,) or None.

    The head is cast to `dtype`, the type that it multiplies in.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.hidden, self.weight = hidden, weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)

    def logits(self, rows: slice, banned: Tensor | None) -> Tensor:
        """(n, V), with -inf at banned ids."""
        logits = F.linear(self.hidden[rows].to(self.weight.dtype), self.weight, self.bias)
        return logits if banned is None else logits.index_fill_(-1, banned, -math.inf)


class _ScoresFromHidden(torch.autograd.Function):
    """scores_from_hidden, chunk by chunk: vocabulary -> buckets -> scores.

    Each token's vocabulary is cut into C = 1 + S + 1 buckets: the sampled token, the support
    without it, and all other tokens as one, the rest. Log-probability and JSD depend on the logits
    of these buckets alone; autograd differentiates them there, on a few numbers per token. (The
    entropy also needs the entropy within the rest. It has no gradient.) Only the step from `hidden`
    to the buckets is differentiated by hand: d logit_s / d hidden is row s of the head. The rest's
    logit is a log-sum-exp, so d logit_rest / d hidden is the mean of the rest's rows under the
    student; forward computes it while the student's probabilities are in memory.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, token_ids, teacher, settings):
        student = _Model(hidden, weight, bias, settings.dtype)
        inputs = token_ids, student, teacher, settings
        with torch.autocast(hidden.device.type, enabled=False):
            # allocated once, to the shapes of an empty chunk: joining chunks would hold all twice
            empty = _score_chunk(slice(0, 0), *inputs)
            out = {name: x.new_empty(len(hidden), *x.shape[1:]) for name, x in empty.items()}
            for rows in _chunks(len(hidden), settings.chunk):
                for name, values in _score_chunk(rows, *inputs).items():
                    out[name][rows] = values
        kept = [out.get(name) for name in ("ids", "d_logp", "d_jsd", "mean_rows")]
        ctx.save_for_backward(hidden, weight, bias, *kept)
        ctx.settings = settings
        ctx.mark_non_differentiable(out["entropy"])
        return out["logp"], out["entropy"], out.get("jsd")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, _, grad_jsd):
        hidden, weight, bias, ids, d_logp, d_jsd, mean_rows = ctx.saved_tensors
        grad = grad_logp.unsqueeze(-1) * d_logp  # (N, C): d loss / d bucket logits
        if d_jsd is not None:
            grad.addcmul_(grad_jsd.unsqueeze(-1), d_jsd)
        grad /= ctx.settings.temperature
        grad_weight = grad_bias = None
        with torch.autocast(hidden.device.type, enabled=False):
            grad_hidden = _hidden_gradient(grad, ids, mean_rows, weight)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                student = _Model(hidden, weight, bias, ctx.settings.dtype)
                grad_weight, grad_bias = _head_gradient(grad, ids, student, ctx.settings)
        # autograd drops what an input does not need and casts the others to the input's type
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


# ------------------------------------------------------------------- forward, for a chunk of tokens
def _score_chunk(
    rows: slice, token_ids: Tensor, student: _Model, teacher: _Model | None, settings: _Settings
) -> dict[str, Tensor]:
    """The scores of the chunk's n tokens (n,), and what backward needs of them.

    For backward: ids (n, 1 + S) of the buckets; d_logp and d_jsd (n, C), the gradients in the
    student's bucket logits; mean_rows (n, H), the gradient of the rest's logit in the hidden state.

    TRAP: at most two float32 tensors of (n, V) may be alive (see chunk_tokens). A name that still
    holds one that is no longer needed costs a third. Hence each `del`, and hence functions that
    overwrite.
    """
    token, temperature = token_ids[rows].unsqueeze(-1), settings.temperature  # token (n, 1)
    p = student.logits(rows, settings.banned)  # (n, V)
    teacher_buckets = None
    if teacher is None:
        ids, is_duplicate = token, torch.zeros_like(token, dtype=torch.bool)
    else:
        q = teacher.logits(rows, settings.banned)  # (n, V)
        support, is_duplicate = _topk_support(p, q, settings.k, settings.support)
        ids = torch.cat([token, support], -1)
        is_duplicate = F.pad(is_duplicate | (support == token), (1, 0))
        teacher_buckets, outside, _ = _bucket_logits_(q, ids, is_duplicate, temperature)
        del q, outside
    buckets, outside, total = _bucket_logits_(p, ids, is_duplicate, temperature)
    del p
    chunk = {"ids": ids, "entropy": _entropy(buckets, outside, total)}
    if settings.with_grad:
        chunk["mean_rows"] = outside.div_(total).to(settings.dtype) @ student.weight
    del outside
    with torch.set_grad_enabled(settings.with_grad):
        buckets.requires_grad_(settings.with_grad)
        scores = _bucket_scores(buckets, teacher_buckets, ids, settings.divergence)
    if settings.with_grad:
        for name, score in scores.items():
            ones = torch.ones_like(score)
            chunk[f"d_{name}"] = torch.autograd.grad(score, buckets, ones, retain_graph=True)[0]
    return chunk | scores


def _bucket_logits_(logits: Tensor, ids: Tensor, is_duplicate: Tensor, temperature: float) -> tuple:
    """Logits (n, V) -> bucket logits (n, C) after temperature; outside and total of the rest.

    A duplicate gets NEG, so that each token counts once. For outside and total see
    `_softmax_outside_`. Overwrites `logits`.
    """
    at_ids = _at_least_float32(logits.gather(-1, ids)) / temperature
    at_ids = at_ids.masked_fill(is_duplicate, NEG).clamp(min=NEG)
    outside, total, log_sum_exp = _softmax_outside_(logits, ids, temperature)
    return torch.cat([at_ids, log_sum_exp], -1), outside, total


def _softmax_outside_(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Softmax of logits (n, V) / temperature over all tokens but ids (n, 1 + S): the rest.

    Returns outside (n, V), which is 0 at ids; its sum total (n, 1), at least 1, also where ids
    leave no token; and the log-sum-exp (n, 1). The softmax is outside / total. Overwrites `logits`,
    in half precision at ids alone, so that there is no second copy in float32.
    """
    outside = _at_least_float32(logits.scatter_(-1, ids, -math.inf)).div_(temperature)
    largest = outside.amax(-1, keepdim=True).clamp(min=NEG)
    total = outside.sub_(largest).exp_().sum(-1, keepdim=True)
    return outside, total.clamp(min=1), (total.log() + largest).clamp(min=NEG)


def _entropy(buckets: Tensor, outside: Tensor, total: Tensor) -> Tensor:
    """Entropy (n,), in nats: the sum over the buckets of p (entropy within the bucket - log p).

    buckets (n, C): logits. outside, total: the softmax within the rest, see `_softmax_outside_`.
    """
    log_p = buckets.log_softmax(-1)
    within_rest = total.log() + torch.special.entr(outside).sum(-1, keepdim=True) / total
    within = F.pad(within_rest, (log_p.shape[-1] - 1, 0))  # 0 in a bucket of one token
    return (log_p.exp() * (within - log_p)).sum(-1)


def _bucket_scores(student: Tensor, teacher: Tensor | None, ids: Tensor, divergence: str) -> dict:
    """Log-probability of the sampled token and, with a teacher, JSD, each (n,).

    student, teacher (n, C): bucket logits; ids (n, 1 + S). Differentiable in `student`.
    """
    log_p = student.log_softmax(-1)
    if teacher is None:
        return {"logp": log_p[:, 0]}
    in_support = (ids[:, 1:] == ids[:, :1]).any(-1, keepdim=True)
    pair = [_divergence_buckets(x, in_support) for x in (log_p, teacher.log_softmax(-1))]
    return {"logp": log_p[:, 0], "jsd": DIVERGENCES[divergence](*pair).sum(-1)}


def _divergence_buckets(log_probs: Tensor, in_support: Tensor) -> Tensor:
    """The buckets of Eq. 14-17, (n, C): a sampled token outside the support joins the rest."""
    token, support, rest = log_probs[:, :1], log_probs[:, 1:-1], log_probs[:, -1:]
    tail = torch.where(in_support, rest, torch.logaddexp(token, rest))
    return torch.cat([token.masked_fill(~in_support, NEG), support, tail], -1)


# ------------------------------------------------- backward: from the buckets to states and head
# grad (N, C): the loss's gradient in the bucket logits as the head gives them, before temperature.
def _hidden_gradient(grad: Tensor, ids: Tensor, mean_rows: Tensor, weight: Tensor) -> Tensor:
    """(N, H), in float32 or better: the head's rows at ids and the rest's mean row, weighted."""
    at_ids, at_rest = grad[:, :-1].to(weight.dtype), grad[:, -1:]
    # TRAP: nested, so that no name holds the half-precision sum beside its float32 copy
    hidden = _at_least_float32(F.embedding_bag(ids, weight, per_sample_weights=at_ids, mode="sum"))
    return hidden.addcmul_(at_rest, _at_least_float32(mean_rows))


def _head_gradient(grad: Tensor, ids: Tensor, student: _Model, settings: _Settings) -> tuple:
    """Gradients of the head's weight (V, H) and bias (V,) or None, summed over chunks.

    The sums are in float32 or better: half precision would lose small terms.
    """
    at_ids, at_rest, temperature = grad[:, :-1], grad[:, -1:], settings.temperature
    of_weight = torch.zeros_like(student.weight, dtype=grad.dtype)
    of_bias = None if student.bias is None else torch.zeros_like(student.bias, dtype=grad.dtype)
    for rows in _chunks(len(ids), settings.chunk):
        at, hidden = ids[rows], student.hidden[rows].to(settings.dtype)
        # TRAP: nested, so that no name holds half-precision logits beside their float32 copy
        rest, total, _ = _softmax_outside_(student.logits(rows, settings.banned), at, temperature)
        # the rest's gradient is spread over its tokens by their softmax
        of_logits = rest.mul_(at_rest[rows] / total).scatter_add_(-1, at, at_ids[rows])
        if of_bias is not None:
            of_bias += of_logits.sum(0)
        if settings.dtype == of_weight.dtype:
            of_weight.addmm_(of_logits.T, hidden)
        else:
            of_weight += of_logits.to(settings.dtype).T @ hidden
        del rest, of_logits  # TRAP: (n, V), else alive beside the next chunk's logits
    return of_weight, of_bias
