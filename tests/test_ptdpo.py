"""ptdpo.py: advantages, routing, denominators and the loss, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from ptdpo import PTDPOConfig, Route, count_tokens, group_advantages, ptdpo_loss, route


def test_advantages_by_hand():
    adv = group_advantages(
        torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    )
    np.testing.assert_allclose(
        adv[0].numpy(), [1.5, -0.5, -0.5, -0.5], rtol=1e-5
    )  # mean 1/4, unbiased std 1/2
    assert torch.equal(
        adv[1], torch.zeros(4, dtype=torch.float64)
    )  # exactly: nothing to learn from
    same = torch.full(
        (1, 8), 0.9
    )  # in float32 their mean is not 0.9: divided by eps, that would be an advantage of 0.056
    assert same.mean() != same[0, 0] and torch.equal(group_advantages(same), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="group size >= 2"):
        group_advantages(torch.zeros(3, 1))


CORRECT = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
HINT = torch.tensor([True, True, True, False])


def test_failed_responses_of_groups_with_a_failure_and_a_hint_are_tutored():
    r = route(CORRECT, HINT, tau=1.0)
    assert r.tutored.tolist() == [[True] * 4, [False, True, False, False], [False] * 4, [False] * 4]
    assert r.kl[:, 0].tolist() == [False, False, True, True] and (r.kl == r.kl[:, :1]).all()


def test_tau_and_lam():
    assert route(CORRECT, HINT, tau=0.2).tutored.any(1).tolist() == [True, False, False, False]
    assert route(CORRECT, HINT, tau=0.75).tutored.any(1).tolist() == [
        True,
        False,
        False,
        False,
    ]  # below tau, not at it
    off = route(CORRECT, HINT, tau=1.0, lam=0.0)
    assert not off.tutored.any() and off.kl.all()


def test_counts():
    lengths = torch.arange(1, 17).view(4, 4)
    assert count_tokens(lengths, route(CORRECT, HINT)).tolist() == [
        136,
        1 + 2 + 3 + 4 + 6,
        9 + 10 + 11 + 12 + 13 + 14 + 15 + 16,
        16,
    ]


def batch(seed=0, b=6, t=5):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    lengths = torch.randint(1, t + 1, (b,), generator=g)
    mask = torch.arange(t) < lengths.unsqueeze(1)
    tutored = torch.tensor([True, False, True, False, False, False])
    kl = torch.tensor([False, False, False, True, True, False])
    return dict(
        logp=-rand(b, t),
        old_logp=-rand(b, t),
        advantages=rand(b) - 0.5,
        mask=mask,
        jsd=rand(b, t),
        tutored=tutored,
        ref_logp=-rand(b, t),
        kl=kl,
    ), count_tokens(lengths, Route(tutored, kl))


def test_loss_by_a_loop_over_tokens():
    x, counts = batch()
    config = PTDPOConfig(lam=0.5, beta_kl=0.1)
    pg = kl = tutor = 0.0
    for b in range(6):
        for t in range(5):
            if x["mask"][b, t]:
                w, a = math.exp(x["logp"][b, t] - x["old_logp"][b, t]), x["advantages"][b].item()
                term = min(w * a, min(max(w, 0.8), 1.3) * a)
                pg -= max(term, 3 * a) if a < 0 else term
                d = (x["ref_logp"][b, t] - x["logp"][b, t]).item()
                kl += (math.exp(d) - 1 - d) if x["kl"][b] else 0.0
                tutor += x["jsd"][b, t].item() if x["tutored"][b] else 0.0
    loss, parts = ptdpo_loss(config, counts=counts, **x)
    n = counts.tolist()
    assert abs(loss.item() - (pg / n[0] + 0.5 * tutor / n[1] + 0.1 * kl / n[2])) < 1e-12
    assert (
        abs(parts["tutor_loss"].item() - tutor / n[1]) < 1e-12
        and abs(parts["kl"].item() - kl / n[2]) < 1e-12
    )


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregate", ["token", "sequence", "fixed"])
def test_ratio_and_aggregation_of_the_policy_loss(ratio, aggregate):
    """Two loops: per-response sums by hand, divided in the three ways; tutoring and KL stay means over tokens."""
    x, counts = batch(seed=7)
    total = 0.0
    for b in range(6):
        n, a = int(x["mask"][b].sum()), x["advantages"][b].item()
        log_w = (x["logp"][b] - x["old_logp"][b])[:n].tolist()
        if ratio == "sequence":
            log_w = [sum(log_w) / n] * n
        terms = [min(math.exp(w) * a, min(max(math.exp(w), 0.8), 1.3) * a) for w in log_w]
        share = -sum(max(term, 3 * a) if a < 0 else term for term in terms)
        total += share / {"token": counts[0].item(), "sequence": 6 * n, "fixed": 6 * 9}[aggregate]
    config = PTDPOConfig(ratio=ratio, aggregate=aggregate)
    parts = ptdpo_loss(config, counts=counts, longest=9, **x)[1]
    assert abs(parts["policy_loss"].item() - total) < 1e-12
    others = ptdpo_loss(PTDPOConfig(), counts=counts, **x)[1]
    assert parts["tutor_loss"] == others["tutor_loss"] and parts["kl"] == others["kl"]


@pytest.mark.parametrize("cuts", [[1, 2, 3], [5, 1], [1] * 6])
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_micro_batches_add_up(cuts, aggregate):
    x, counts = batch(seed=4)
    config = PTDPOConfig(lam=2.0, aggregate=aggregate)
    whole = ptdpo_loss(config, counts=counts, **x)[0]
    parts, start = 0.0, 0
    for cut in cuts:  # some of the pieces hold nobody to tutor
        parts += ptdpo_loss(
            config, counts=counts, **{k: v[start : start + cut] for k, v in x.items()}
        )[0]
        start += cut
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


def test_fillers_outside_the_mask_do_not_reach_the_gradient():
    x, counts = batch(seed=2)
    outside = ~(x["mask"] & x["kl"].unsqueeze(1))
    x["ref_logp"] = torch.where(
        outside, torch.full_like(x["ref_logp"], 1e4), x["ref_logp"]
    )  # exp overflows
    x["logp"].requires_grad_()
    ptdpo_loss(PTDPOConfig(), counts=counts, **x)[0].backward()
    assert torch.isfinite(x["logp"].grad).all() and (x["logp"].grad[~x["mask"]] == 0).all()


@pytest.mark.parametrize(
    "bad",
    [
        dict(tau=0.0),
        dict(tau=1.1),
        dict(jsd_k=0),
        dict(lam=-1.0),
        dict(beta_kl=-0.1),
        dict(dual_clip=1.0),
        dict(divergence="kl"),
        dict(support="both"),
        dict(ratio="word"),
        dict(aggregate="mean"),
    ],
)
def test_config_names_the_option(bad):
    with pytest.raises(ValueError, match="--" + next(iter(bad)).replace("_", "-")):
        PTDPOConfig(**bad)
