"""ptdpo.py: advantages, routing, weights and the loss, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from ptdpo import (
    PTDPOConfig,
    ResponseWeights,
    group_advantages,
    ptdpo_loss,
    response_weights,
    route,
)

AGGREGATES = ("token", "sequence", "fixed")


# --------------------------------------------------------------------------------------- advantages
def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    advantages = group_advantages(rewards)
    # mean 1/4, unbiased std 1/2
    np.testing.assert_allclose(advantages[0].numpy(), [1.5, -0.5, -0.5, -0.5], rtol=1e-5)
    # exactly: nothing to learn from
    assert torch.equal(advantages[1], torch.zeros(4, dtype=torch.float64))


def test_equal_rewards_whose_mean_is_another_float():
    """Divided by eps, the difference would be an advantage of 0.056."""
    rewards = torch.full((1, 8), 0.9)
    assert rewards.mean() != rewards[0, 0]
    assert torch.equal(group_advantages(rewards), torch.zeros(1, 8))


def test_a_group_has_two_responses_or_more():
    with pytest.raises(ValueError, match="group size >= 2"):
        group_advantages(torch.zeros(3, 1))


# ------------------------------------------------------------------------------------------ routing
CORRECT = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
CAN_TUTOR = torch.tensor([True, True, True, False])


def test_failed_responses_of_groups_with_a_failure_and_a_hint_are_tutored():
    tutored = route(CORRECT, CAN_TUTOR, tau=1.0)
    assert tutored.dtype == torch.bool
    assert tutored.tolist() == [[True] * 4, [False, True, False, False], [False] * 4, [False] * 4]


@pytest.mark.parametrize("tau", [0.2, 0.75])
def test_tau(tau):
    """The second group's accuracy is 0.75: it is tutored below tau, not at it."""
    tutored = route(CORRECT, CAN_TUTOR, tau)
    assert tutored.any(1).tolist() == [True, False, False, False]


# ------------------------------------------------------------------------------------------ weights
# two groups of two; the second response is left out of the loss, though it would be tutored
LENGTHS = torch.tensor([[4, 0], [1, 5]])
TUTORED = torch.tensor([[True, True], [False, False]])
PENALISED = ~TUTORED
POLICY_BY_HAND = {
    "token": [[1 / 10, 0], [1 / 10, 1 / 10]],
    "sequence": [[1 / 12, 0], [1 / 3, 1 / 15]],
    "fixed": [[1 / 24, 0], [1 / 24, 1 / 24]],
}


def assert_equal_tables(ours, expected):
    """ResponseWeights against three tables."""
    for table, by_hand in zip(ours, expected, strict=True):
        torch.testing.assert_close(table, torch.as_tensor(by_hand, dtype=torch.float64))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_weights_by_hand(aggregate):
    config = PTDPOConfig(aggregate=aggregate)
    weights = response_weights(config, LENGTHS, TUTORED, PENALISED, longest=8)
    kl = [[0, 0], [1 / 6, 1 / 6]]
    tutor = [[1 / 4, 0], [0, 0]]
    assert weights._fields == ("policy", "kl", "tutor")
    assert_equal_tables(weights, (POLICY_BY_HAND[aggregate], kl, tutor))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_weights_where_nothing_is_tutored(aggregate):
    config, nobody = PTDPOConfig(aggregate=aggregate), torch.zeros_like(TUTORED)
    weights = response_weights(config, LENGTHS, nobody, ~nobody, longest=8)
    kl = [[1 / 10, 0], [1 / 10, 1 / 10]]
    assert_equal_tables(weights, (POLICY_BY_HAND[aggregate], kl, torch.zeros(2, 2)))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_weights_where_all_responses_are_left_out(aggregate):
    config, lengths = PTDPOConfig(aggregate=aggregate), torch.zeros_like(LENGTHS)
    weights = response_weights(config, lengths, TUTORED, PENALISED, longest=8)
    assert_equal_tables(weights, [torch.zeros(2, 2)] * 3)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_weights_do_not_depend_on_how_processes_share_the_responses(aggregate):
    """Two processes with a group each: the second one has nobody to tutor."""
    config = PTDPOConfig(aggregate=aggregate)
    shares = [(LENGTHS[n], TUTORED[n], PENALISED[n]) for n in range(2)]
    counts = []

    def note(count):
        counts.append(count)
        return count

    for share in shares:
        response_weights(config, *share, longest=8, sum_over_processes=note)
    total = counts[0] + counts[1]
    processes = [
        response_weights(config, *share, longest=8, sum_over_processes=lambda count: total)
        for share in shares
    ]
    whole = response_weights(config, LENGTHS, TUTORED, PENALISED, longest=8)
    joined = ResponseWeights(*(torch.stack(tables) for tables in zip(*processes, strict=True)))
    assert_equal_tables(joined, whole)


def plain_mean(values, lengths, aggregate, longest):
    """The mean of the responses' tokens, written out. values: one array per response."""
    responses = [row[:length] for row, length in zip(values, lengths, strict=True) if length]
    if aggregate == "sequence":
        return np.mean([response.mean() for response in responses])
    total = sum(response.sum() for response in responses)
    if aggregate == "fixed":
        return total / (len(responses) * longest)
    return total / sum(len(response) for response in responses)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("seed", range(5))
def test_weighted_sums_are_the_plain_means(aggregate, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 10, 12)  # some are left out
    values = rng.normal(size=(12, 9))
    tutored = rng.random(12) < 0.4
    penalised = ~tutored & (rng.random(12) < 0.5)
    config = PTDPOConfig(aggregate=aggregate)
    weights = response_weights(
        config, *(torch.tensor(x) for x in (lengths, tutored, penalised)), longest=9
    )
    sums = [
        sum(table[i].item() * values[i, : lengths[i]].sum() for i in range(12)) for table in weights
    ]
    expected = [
        plain_mean(values, lengths, aggregate, 9),
        plain_mean(values[penalised], lengths[penalised], "token", 9),
        plain_mean(values[tutored], lengths[tutored], "token", 9),
    ]
    np.testing.assert_allclose(sums, expected, rtol=1e-12)


# --------------------------------------------------------------------------------------------- loss
RESPONSES, TOKENS, LONGEST = 6, 5, 9
TUTORED_ROWS, PENALISED_ROWS = (0, 2), (3, 4)


def step(seed=0, **settings):
    """Random tensors of a step of 6 responses; two are tutored, two penalised, two neither.

    Returns the config, the arguments of ptdpo_loss, and the counts (tokens, penalised, tutored).
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    config = PTDPOConfig(**settings)
    lengths = torch.randint(1, TOKENS + 1, (RESPONSES,), generator=generator)
    tutored = torch.tensor([b in TUTORED_ROWS for b in range(RESPONSES)])
    penalised = torch.tensor([b in PENALISED_ROWS for b in range(RESPONSES)])
    arguments = dict(
        logp=-rand(RESPONSES, TOKENS),
        old_logp=-rand(RESPONSES, TOKENS),
        advantages=rand(RESPONSES) - 0.5,
        mask=torch.arange(TOKENS) < lengths.unsqueeze(1),
        weights=response_weights(config, lengths, tutored, penalised, LONGEST),
        divergence=rand(RESPONSES, TOKENS),
        reference_logp=-rand(RESPONSES, TOKENS),
    )
    counts = [lengths[chosen].sum().item() for chosen in (lengths > 0, penalised, tutored)]
    return config, arguments, counts


def part_of(arguments, start, end):
    """The arguments of the micro-batch of responses `start` to `end`."""
    part = {name: value[start:end] for name, value in arguments.items() if name != "weights"}
    weights = ResponseWeights(*(table[start:end] for table in arguments["weights"]))
    return {**part, "weights": weights}


def token_loss(ratio, advantage):
    """The clipped surrogate of one token, dual clip included, written out."""
    surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
    return -max(surrogate, 3 * advantage) if advantage < 0 else -surrogate


def test_loss_by_a_loop_over_tokens():
    config, x, (tokens, penalised_tokens, tutored_tokens) = step(lam=0.5, beta_kl=0.1)
    policy = kl = tutor = 0.0
    for b, t in x["mask"].nonzero().tolist():
        ratio = math.exp(x["logp"][b, t] - x["old_logp"][b, t])
        policy += token_loss(ratio, x["advantages"][b].item()) / tokens
        difference = (x["reference_logp"][b, t] - x["logp"][b, t]).item()
        if b in PENALISED_ROWS:
            kl += (math.exp(difference) - 1 - difference) / penalised_tokens
        if b in TUTORED_ROWS:
            tutor += x["divergence"][b, t].item() / tutored_tokens
    loss, parts = ptdpo_loss(config, **x)
    assert abs(loss.item() - (policy + 0.5 * tutor + 0.1 * kl)) < 1e-12
    assert abs(parts["policy_loss"].item() - policy) < 1e-12
    assert abs(parts["tutor_loss"].item() - tutor) < 1e-12
    assert abs(parts["kl"].item() - kl) < 1e-12


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_ratio_and_aggregation_of_the_policy_loss(ratio, aggregate):
    """Per-response sums by hand, divided in the three ways. Tutoring and KL do not change."""
    config, x, (tokens, _, _) = step(seed=7, ratio=ratio, aggregate=aggregate)
    policy = 0.0
    for b in range(RESPONSES):
        length = int(x["mask"][b].sum())
        log_ratios = (x["logp"][b] - x["old_logp"][b])[:length].tolist()
        if ratio == "sequence":
            log_ratios = [sum(log_ratios) / length] * length
        advantage = x["advantages"][b].item()
        total = sum(token_loss(math.exp(log_ratio), advantage) for log_ratio in log_ratios)
        denominators = {
            "token": tokens,
            "sequence": RESPONSES * length,
            "fixed": RESPONSES * LONGEST,
        }
        policy += total / denominators[aggregate]
    _, parts = ptdpo_loss(config, **x)
    assert abs(parts["policy_loss"].item() - policy) < 1e-12
    default_config, same, _ = step(seed=7)
    _, default_parts = ptdpo_loss(default_config, **same)
    assert parts["tutor_loss"] == default_parts["tutor_loss"]
    assert parts["kl"] == default_parts["kl"]


@pytest.mark.parametrize("cuts", [[1, 2, 3], [5, 1], [1] * 6])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_micro_batches_add_up(cuts, aggregate):
    config, x, _ = step(seed=4, lam=2.0, aggregate=aggregate)
    whole, whole_parts = ptdpo_loss(config, **x)
    shares, start = [], 0
    for cut in cuts:  # some of the pieces hold nobody to tutor
        shares.append(ptdpo_loss(config, **part_of(x, start, start + cut)))
        start += cut
    total = sum(loss for loss, _ in shares)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-14)
    for name, value in whole_parts.items():
        total = sum(parts[name] for _, parts in shares)
        torch.testing.assert_close(total, value, rtol=1e-12, atol=1e-14)


def test_a_micro_batch_without_teacher_and_reference_has_the_policy_loss_alone():
    config, x, _ = step(seed=4)
    loss, parts = ptdpo_loss(config, **{**x, "divergence": None, "reference_logp": None})
    assert list(parts) == ["policy_loss"]
    assert loss == parts["policy_loss"]


def test_fillers_outside_the_mask_do_not_reach_the_gradient():
    config, x, _ = step(seed=2)
    penalised = x["mask"] & (x["weights"].kl > 0).unsqueeze(1)
    x["reference_logp"][~penalised] = 1e4  # exp overflows
    x["logp"].requires_grad_()
    loss, _ = ptdpo_loss(config, **x)
    loss.backward()
    assert torch.isfinite(x["logp"].grad).all()
    assert (x["logp"].grad[~x["mask"]] == 0).all()


# ----------------------------------------------------------------------------------------- settings
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
    [name] = bad
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        PTDPOConfig(**bad)
