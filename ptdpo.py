"""PTD-PO on two pages: who is tutored, and what the loss is. (arXiv 2606.07000)

A question's G responses are verified and get group-relative advantages, as in GRPO. A response that failed, in a group that is not
already good enough and has a usable hint, is also scored by the frozen reference model, which reads the same image and question plus
the hint. The student, who never reads the hint, is pulled toward that distribution token by token. Where a group is tutored, the
tutoring replaces the usual KL penalty toward the unhinted reference:

    L  =  L_PG (all responses)  +  beta_kl * L_KL (untutored groups)  +  lam * L_PTD (failed responses of tutored groups)

Every mean has its own denominator, counted over the whole optimizer step: all micro-batches, all processes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from losses import DIVERGENCES, SUPPORTS, k3_kl, masked_mean, policy_loss
from plumbing.settings import option


@dataclass
class PTDPOConfig:
    """The method's settings; defaults are the paper's or, where it is silent, the released recipe's."""

    tau: float = option(1.0, "tutor groups whose accuracy is below this, in (0, 1] (paper: 1.0)")
    lam: float = option(
        0.05,
        "weight of the tutoring loss; 0 is GRPO (paper: 0.05 for 2B and 8B, 0.5 for 4B)",
        toy=10.0,
    )
    jsd_k: int = option(
        100, "tokens each model puts into the divergence's support (paper: 100)", toy=20
    )
    divergence: str = option(
        "jsd",
        "pull toward the teacher; forward_kl is KL(teacher || student) (paper: jsd)",
        choices=tuple(DIVERGENCES),
    )
    support: str = option(
        "union", "whose top k tokens the divergence keeps apart (paper: union)", choices=SUPPORTS
    )
    ratio: str = option(
        "token",
        "importance ratio: a token, or one a sequence (GSPO; the paper runs both)",
        choices=("token", "sequence"),
    )
    aggregate: str = option(
        "token",
        "policy loss: mean over tokens (released recipe), over sequences' means (GSPO), or fixed length (Dr. GRPO)",
        choices=("token", "sequence", "fixed"),
    )
    beta_kl: float = option(0.01, "weight of the KL penalty in untutored groups (paper: 0.01)")
    clip_low: float = option(0.2, "ratio clipped below at 1 - this (released recipe)")
    clip_high: float = option(0.3, "ratio clipped above at 1 + this (released recipe)")
    dual_clip: float = option(
        3.0, "bound on the loss where the advantage is negative, times |A|, > 1 (released recipe)"
    )

    def __post_init__(self):
        checks = [
            ("tau", 0 < self.tau <= 1, "in (0, 1]"),
            ("lam", self.lam >= 0, ">= 0"),
            ("jsd_k", self.jsd_k >= 1, ">= 1"),
            ("beta_kl", self.beta_kl >= 0, ">= 0"),
            ("clip_low", 0 <= self.clip_low < 1, "in [0, 1)"),
            ("clip_high", self.clip_high >= 0, ">= 0"),
            ("dual_clip", self.dual_clip > 1, "> 1"),
        ]
        for name, fine, rule in checks:
            if not fine:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be {rule}, got {getattr(self, name)}"
                )
        for f in fields(self):
            if "choices" in f.metadata and getattr(self, f.name) not in f.metadata["choices"]:
                raise ValueError(
                    f"--{f.name} must be one of {', '.join(f.metadata['choices'])}, got {getattr(self, f.name)!r}"
                )


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """(N, G) rewards -> (N, G) advantages (r - mean) / (std + eps) within each group of G >= 2 (GRPO, arXiv 2402.03300).

    std is the unbiased one, as in the common implementations. A group with equal rewards gets exactly 0: nothing is learnt from it.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be (questions, group size >= 2), got {tuple(rewards.shape)}"
        )
    centred = rewards - rewards.mean(1, keepdim=True)
    flat = (rewards == rewards[:, :1]).all(
        1, keepdim=True
    )  # a mean in floats need not equal its equal terms
    return torch.where(
        flat, torch.zeros_like(centred), centred / (rewards.std(1, keepdim=True) + eps)
    )


@dataclass
class Route:
    """Who gets which loss: `tutored` (N, G) bool, responses pulled toward the teacher; `kl` (N, G) bool, those with the KL penalty."""

    tutored: Tensor
    kl: Tensor


def route(correct: Tensor, has_hint: Tensor, tau: float = 1.0, lam: float = 1.0) -> Route:
    """Failure routing. correct (N, G) bool, from the verifier and never from the reward, whose scale differs between recipes;
    has_hint (N,) bool: a usable hint exists.

    A group is tutored when its accuracy is below tau and it has a hint; in it the failed responses get the tutoring loss and no
    response gets the KL penalty. With lam 0 nothing is tutored and the KL penalty is everywhere: GRPO.
    """
    correct = correct.bool()
    group = (correct.float().mean(1) < tau) & has_hint.bool() & (lam > 0)  # (N,)
    return Route(tutored=group.unsqueeze(1) & ~correct, kl=~group.unsqueeze(1).expand_as(correct))


def count_tokens(lengths: Tensor, routes: Route) -> Tensor:
    """What the means divide by, as float64 (4,): tokens of all responses, of the tutored, of those with KL; responses.

    lengths (N, G): response lengths, EOS included; 0 for one that is left out. Sum it over the processes before use; a mean is then the
    same however they are spread.
    """
    lengths = lengths.double()
    return torch.stack(
        [
            lengths.sum(),
            lengths[routes.tutored].sum(),
            lengths[routes.kl].sum(),
            (lengths > 0).sum().double(),
        ]
    )


def ptdpo_loss(
    config: PTDPOConfig,
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    counts: Tensor,
    jsd: Tensor | None = None,
    tutored: Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's share of the step's loss: shares over micro-batches and processes add up to L.

    logp, old_logp (B, T): log-probs of the sampled tokens under the student (with gradient) and when sampled; mask (B, T) bool:
    response tokens, EOS included; advantages (B,); counts (4,) from count_tokens, summed over the step; longest: the limit on a
    response's length, which aggregate "fixed" divides by. Tutoring and KL are always means over their tokens.
    jsd (B, T): Top-K JSD to the hinted teacher, read where `tutored` (B,) holds. ref_logp (B, T): the unhinted reference's
    log-probs, read where `kl` (B,) holds. Returns the loss and its three detached parts, unweighted.
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
    if config.aggregate == "token":
        denominator = counts[0]
    else:
        denominator = counts[3] * (
            mask.sum(1, keepdim=True) if config.aggregate == "sequence" else longest
        )
    parts = {"policy_loss": masked_mean(policy, mask, denominator)}
    loss = parts["policy_loss"]
    if jsd is not None:
        parts["tutor_loss"] = masked_mean(jsd, mask & tutored.unsqueeze(1), counts[1])
        loss = loss + config.lam * parts["tutor_loss"]
    if ref_logp is not None:
        kept = mask & kl.unsqueeze(1)
        # elsewhere the reference's value is a filler: exp of it could overflow, and 0 * inf is a NaN gradient
        parts["kl"] = masked_mean(
            k3_kl(logp, torch.where(kept, ref_logp, logp.detach())), kept, counts[2]
        )
        loss = loss + config.beta_kl * parts["kl"]
    return loss, {name: part.detach() for name, part in parts.items()}
