"""PTD-PO on two pages: who is tutored, and what the loss is. (arXiv 2606.07000)

A question's G responses are verified and get group-relative advantages, as in GRPO. A response that
failed is tutored if its group is not already good enough and its question has a usable hint. The
teacher then scores that response: the frozen reference model, which reads the same image and
question plus the hint. The student, who never reads the hint, is pulled toward the teacher's
distribution, token by token. The KL penalty uses the same frozen model without the hint.

    L  =  policy loss  +  beta_kl * KL penalty  +  lam * tutoring loss                     Eq. 3, 12

Each of the three terms is a mean, and each mean is a weighted sum over tokens whose weight depends
on the response alone. So three tables of weights are computed once per optimizer step, over all
micro-batches and all processes, and a micro-batch only multiplies. The defaults are the paper's;
plumbing/recipes.py lists the settings of the release and of related methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from losses import DIVERGENCES, SUPPORTS, k3_kl, policy_loss, weighted_sum
from plumbing.settings import check_bounds, option


@dataclass
class PTDPOConfig:
    """The method's settings. The defaults are the paper's."""

    tau: float = option(
        1.0, "tutor groups whose accuracy is below this (paper: 1.0)", above=0, at_most=1
    )
    lam: float = option(
        0.05, "weight of the tutoring loss; 0: none (paper: 0.05 or 0.5)", at_least=0
    )
    tutor_mean: str = option(
        "question",
        "tutoring loss: mean per question, then over questions (paper: Eq. 11), or one mean over "
        "all tutored tokens of the step",
        choices=("question", "step"),
    )
    jsd_k: int = option(
        100, "tokens that each model puts into the divergence's support (paper: 100)", at_least=1
    )
    divergence: str = option(
        "jsd",
        "pull toward the teacher; forward_kl is KL(teacher || student) (paper: jsd)",
        choices=tuple(DIVERGENCES),
    )
    support: str = option(
        "union", "whose top K tokens the divergence keeps apart (paper: union)", choices=SUPPORTS
    )
    ratio: str = option(
        "token",
        "importance ratio: one per token (paper: Eq. 2), or one per sequence (GSPO)",
        choices=("token", "sequence"),
    )
    aggregate: str = option(
        "response",
        "policy loss and KL: mean per response, then over responses (paper: Eq. 3), over all "
        "tokens (DAPO, release), or over a fixed length (Dr. GRPO)",
        choices=("response", "token", "fixed"),
    )
    scale_advantages: bool = option(
        True, "divide advantages by the group's standard deviation (paper: Eq. 1; not Dr. GRPO)"
    )
    beta_kl: float = option(0.01, "weight of the KL penalty (paper: 0.01)", at_least=0)
    kl_on: str = option(
        "all",
        "KL penalty on all responses (paper: Eq. 3), or in groups without tutoring (release)",
        choices=("all", "untutored"),
    )
    clip_low: float = option(
        0.2, "ratio clipped below at 1 - this (paper: symmetric; 0.2 is ours)", at_least=0, below=1
    )
    clip_high: float = option(
        0.2, "ratio clipped above at 1 + this (paper: symmetric; 0.2 is ours)", at_least=0
    )
    dual_clip: float = option(
        0.0,
        "where A < 0, the loss is at most this times |A|; 0: no such bound (release: 3)",
        at_least=0,
    )

    def __post_init__(self):
        check_bounds(self)
        if 0 < self.dual_clip <= 1:
            raise ValueError(f"--dual-clip must be 0 or above 1, got {self.dual_clip}")


def group_advantages(rewards: Tensor, scale: bool = True, eps: float = 1e-6) -> Tensor:
    """(N, G) rewards -> (N, G) advantages, (r - mean) / (std + eps) within each group (Eq. 1).

    std is the unbiased one, as in the common implementations of GRPO (arXiv 2402.03300). scale
    False: r - mean (Dr. GRPO, arXiv 2503.20783). A group with equal rewards gets exactly 0: nothing
    is learnt from its rewards (Eq. 67-69). Raises ValueError where G < 2.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be (questions, group size >= 2), got {tuple(rewards.shape)}"
        )
    centred = rewards - rewards.mean(1, keepdim=True)
    # asked of the rewards: the mean of equal floats need not equal them
    all_equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    advantages = centred / (rewards.std(1, keepdim=True) + eps) if scale else centred
    return torch.where(all_equal, torch.zeros_like(advantages), advantages)


def route(correct: Tensor, can_tutor: Tensor, tau: float = 1.0) -> Tensor:
    """Which responses are tutored, (N, G) bool: the failed ones of groups below tau (Eq. 7, 8).

    correct (N, G) bool, from the verifier and never from the reward: with its format share, 0.1 by
    default, a failed response can have 0.1 and a right one 0.9. can_tutor (N,) bool: the teacher
    has a chat for the question, and lam is not 0. With tau 1 every group with a failure is tutored.
    """
    correct = correct.bool()
    below = correct.float().mean(1) < tau
    tutored_group = below & can_tutor.bool()
    return tutored_group.unsqueeze(1) & ~correct


class ResponseWeights(NamedTuple):
    """What each token of a response counts in the three means; 0: the response is not in it.

    Three float tensors of one shape: (n, G) for a process's n questions of an optimizer step, (B,)
    for a micro-batch.
    """

    policy: Tensor
    kl: Tensor
    tutor: Tensor


def response_weights(
    config: PTDPOConfig,
    lengths: Tensor,
    tutored: Tensor,
    longest: int,
    sum_over_processes: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> ResponseWeights:
    """The weights (n, G) of this process's n questions in an optimizer step of N questions.

    lengths (n, G): tokens T_i per response, EOS included; 0 for a response that is left out of the
    loss. tutored (n, G) bool: from `route`. longest: the limit on a response's length, T_max.
    sum_over_processes: sums a tensor of counts over the processes that share the step, so that the
    means do not depend on how the N questions are spread.

        policy  Eq. 3      1 / (R T_i) for R responses in the loss, N G of them if none is left out
        kl      Eq. 3      the same; kl_on "untutored" puts 0 in groups with a tutored response,
                           and leaves R as it is (release)
        tutor   Eq. 8, 11  1 / (N |F_x|), F_x the tutored tokens of the question; 0 if it has none

    The other settings of `aggregate` and `tutor_mean` are in `mean_weights`.
    """
    in_loss = lengths > 0
    in_tutored_group = tutored.any(1, keepdim=True)
    tutored = in_loss & tutored

    def weights(kind: str, responses: Tensor) -> Tensor:
        return mean_weights(kind, lengths, responses, longest, sum_over_processes)

    if config.tutor_mean == "question":
        questions = sum_over_processes(torch.tensor(float(len(lengths))))
        tutored_tokens = (lengths * tutored).sum(1, keepdim=True).clamp(min=1)  # (n, 1)
        tutor = tutored / (questions * tutored_tokens.double())
    else:
        tutor = weights("token", tutored)
    policy = weights(config.aggregate, in_loss)
    kl = policy * ~in_tutored_group if config.kl_on == "untutored" else policy
    return ResponseWeights(policy, kl, tutor)


def mean_weights(
    kind: str,
    lengths: Tensor,
    responses: Tensor,
    longest: int,
    sum_over_processes: Callable[[Tensor], Tensor],
) -> Tensor:
    """Weights (n, G) of a mean over the tokens of some responses, (n, G) bool; 0 for the others.

    "response": 1 / (their number * own tokens). "token": 1 / all their tokens. "fixed": 1 / (their
    number * longest). Arguments as in `response_weights`.
    """
    counts = torch.stack([responses.sum(), (lengths * responses).sum()]).double()
    number, tokens = sum_over_processes(counts).clamp(min=1)
    denominators = {
        "response": number * lengths.clamp(min=1),
        "token": tokens,
        "fixed": number * longest,
    }
    return responses / denominators[kind]


def ptdpo_loss(
    config: PTDPOConfig,
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: ResponseWeights,
    teacher_divergence: Tensor | None = None,
    reference_logp: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's share of the step's loss (Eq. 12); shares add up to L over the step.

    logp (B, T): log-probs of the sampled tokens under the student, with gradient. old_logp (B, T):
    those under the policy that sampled, scored as logp is and not the sampler's own; up to rounding
    it equals logp in the first step after a rollout, where no clip acts. advantages (B,). mask (B,
    T) bool: response tokens, EOS included. weights: of these B responses. teacher_divergence (B,
    T): Top-K JSD to the teacher, with gradient, read where weights.tutor > 0; None: nothing is
    tutored. reference_logp (B, T): log-probs under the reference without a hint, read where
    weights.kl > 0; None: no penalty.

    Returns the loss and, detached and before lam and beta_kl, its parts: policy_loss, and
    tutor_loss and kl where their input is given.
    """
    policy = policy_loss(
        logp,
        old_logp,
        advantages.unsqueeze(1).expand_as(logp),
        mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip or None,
        ratio=config.ratio,
    )
    parts = {"policy_loss": weighted_sum(policy, mask, weights.policy)}
    loss = parts["policy_loss"]
    if teacher_divergence is not None:
        parts["tutor_loss"] = weighted_sum(teacher_divergence, mask, weights.tutor)
        loss = loss + config.lam * parts["tutor_loss"]
    if reference_logp is not None:
        penalised = mask & (weights.kl > 0).unsqueeze(1)
        # elsewhere the reference's value is a filler: exp of it could overflow, and 0 * inf is a
        # NaN gradient
        reference_logp = torch.where(penalised, reference_logp, logp.detach())
        parts["kl"] = weighted_sum(k3_kl(logp, reference_logp), mask, weights.kl)
        loss = loss + config.beta_kl * parts["kl"]
    return loss, {name: part.detach() for name, part in parts.items()}
