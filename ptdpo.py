"""PTD-PO on two pages: who is tutored, and what the loss is. (arXiv 2606.07000)

A question's G responses are verified and get group-relative advantages, as in GRPO. A response that
failed is tutored if its group is not already good enough and its question has a usable hint: the
frozen reference model reads the same image and question plus the hint and scores that response. The
student, who never reads the hint, is pulled toward the reference's distribution, token by token.

    L  =  policy loss (all responses)
        + beta_kl * KL penalty (responses of groups without tutoring)
        + lam * tutoring loss (tutored responses)                                          Eq. 12

Each of the three terms is a mean, and each mean is a weighted sum over tokens whose weight depends
on the response alone. So three tables of weights are computed once per optimizer step, over all
micro-batches and all processes, and a micro-batch only multiplies.
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
    """The method's settings. Defaults are the paper's or, where it is silent, the release's."""

    tau: float = option(
        1.0, "tutor groups whose accuracy is below this (paper: 1.0)", above=0, at_most=1
    )
    lam: float = option(
        0.05,
        "weight of the tutoring loss; 0 is GRPO (paper: 0.05 for 2B and 8B, 0.5 for 4B)",
        at_least=0,
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
        "importance ratio: one per token, or one per sequence (GSPO; the paper runs both)",
        choices=("token", "sequence"),
    )
    aggregate: str = option(
        "token",
        "policy loss: mean over tokens (release), over sequences' means (GSPO), or over a fixed "
        "length (Dr. GRPO)",
        choices=("token", "sequence", "fixed"),
    )
    beta_kl: float = option(
        0.01, "weight of the KL penalty in groups without tutoring (paper: 0.01)", at_least=0
    )
    clip_low: float = option(
        0.2, "the ratio is clipped below at 1 - this (release)", at_least=0, below=1
    )
    clip_high: float = option(0.3, "the ratio is clipped above at 1 + this (release)", at_least=0)
    dual_clip: float = option(
        3.0, "bound on the loss where the advantage is negative, times |A| (release)", above=1
    )

    def __post_init__(self):
        check_bounds(self)


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """(N, G) rewards -> (N, G) advantages, (r - mean) / (std + eps) within each group (Eq. 1).

    std is the unbiased one, as in the common implementations of GRPO (arXiv 2402.03300). A group
    with equal rewards gets exactly 0: nothing is learnt from it (Eq. 67-69). Raises ValueError
    where G < 2.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be (questions, group size >= 2), got {tuple(rewards.shape)}"
        )
    centred = rewards - rewards.mean(1, keepdim=True)
    # asked of the rewards: the mean of equal floats need not equal them
    all_equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    scaled = centred / (rewards.std(1, keepdim=True) + eps)
    return torch.where(all_equal, torch.zeros_like(scaled), scaled)


def route(correct: Tensor, can_tutor: Tensor, tau: float = 1.0) -> Tensor:
    """Which responses are tutored, (N, G) bool: the failed ones of groups below tau (Eq. 7, 8).

    correct (N, G) bool, from the verifier and never from the reward, whose scale differs between
    recipes. can_tutor (N,) bool: the teacher has something to read that the student has not. A
    group is tutored where its accuracy is below tau, so with tau 1 wherever a response failed.
    """
    correct = correct.bool()
    below = correct.float().mean(1) < tau
    tutored_group = below & can_tutor.bool()
    return tutored_group.unsqueeze(1) & ~correct


class ResponseWeights(NamedTuple):
    """What each token of a response counts in the three means; 0: the response is not in it.

    Three float tensors of one shape: (N, G) for an optimizer step, (B,) for a micro-batch.
    """

    policy: Tensor
    kl: Tensor
    tutor: Tensor


def response_weights(
    config: PTDPOConfig,
    lengths: Tensor,
    tutored: Tensor,
    penalised: Tensor,
    longest: int,
    sum_over_processes: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> ResponseWeights:
    """The weights of all responses of an optimizer step. All arguments have one shape, (N, G).

    lengths: tokens per response, EOS included; 0 for a response that is left out of the loss.
    tutored, penalised: bool, the responses with the tutoring loss and with the KL penalty. longest:
    the limit on a response's length. sum_over_processes: sums a tensor of counts over the processes
    that share the step, so that the means do not depend on how the responses are spread.

        policy   "token": 1 / tokens of all responses      "sequence": 1 / (responses * own tokens)
                 "fixed": 1 / (responses * longest)
        kl       1 / tokens of all penalised responses
        tutor    1 / tokens of all tutored responses
    """
    lengths = lengths.double()
    in_loss = lengths > 0
    tutored, penalised = tutored & in_loss, penalised & in_loss
    local_counts = [lengths.sum(), in_loss.sum(), lengths[penalised].sum(), lengths[tutored].sum()]
    counts = sum_over_processes(torch.stack(local_counts)).clamp(min=1)
    tokens, responses, penalised_tokens, tutored_tokens = counts
    if config.aggregate == "token":
        denominator = tokens
    elif config.aggregate == "sequence":
        denominator = responses * lengths.clamp(min=1)
    else:
        denominator = responses * longest
    return ResponseWeights(
        policy=in_loss / denominator,
        kl=penalised / penalised_tokens,
        tutor=tutored / tutored_tokens,
    )


def ptdpo_loss(
    config: PTDPOConfig,
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: ResponseWeights,
    divergence: Tensor | None = None,
    reference_logp: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's share of the step's loss (Eq. 12); shares add up to L over the step.

    logp (B, T): log-probs of the sampled tokens under the student, with gradient. old_logp (B, T):
    the same when they were sampled. advantages (B,). mask (B, T) bool: response tokens, EOS
    included. weights: of these B responses. divergence (B, T): Top-K JSD to the teacher who read
    the hint, with gradient, read where weights.tutor > 0 (Eq. 11); None: nothing is tutored.
    reference_logp (B, T): log-probs under the reference without a hint, read where weights.kl > 0;
    None: no penalty.

    Returns the loss and its three parts, unweighted and detached.
    """
    policy = policy_loss(
        logp,
        old_logp,
        advantages.unsqueeze(1).expand_as(logp),
        mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        ratio=config.ratio,
    )
    parts = {"policy_loss": weighted_sum(policy, mask, weights.policy)}
    loss = parts["policy_loss"]
    if divergence is not None:
        parts["tutor_loss"] = weighted_sum(divergence, mask, weights.tutor)
        loss = loss + config.lam * parts["tutor_loss"]
    if reference_logp is not None:
        penalised = mask & (weights.kl > 0).unsqueeze(1)
        # elsewhere the reference's value is a filler: exp of it could overflow, and 0 * inf is a
        # NaN gradient
        reference_logp = torch.where(penalised, reference_logp, logp.detach())
        parts["kl"] = weighted_sum(k3_kl(logp, reference_logp), mask, weights.kl)
        loss = loss + config.beta_kl * parts["kl"]
    return loss, {name: part.detach() for name, part in parts.items()}
