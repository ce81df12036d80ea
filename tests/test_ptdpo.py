"""ptdpo.py: advantages, routing, weights and the loss, against numbers worked out by hand."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from plumbing.recipes import RECIPES
from ptdpo import (
    PTDPOConfig,
    ResponseWeights,
    group_advantages,
    ptdpo_loss,
    response_weights,
    route,
)

AGGREGATES = ("response", "token", "fixed")
KL_ON = ("all", "untutored")
TUTOR_MEANS = ("question", "step")
MEANS = [
    {"aggregate": aggregate, "kl_on": kl_on, "tutor_mean": tutor_mean}
    for aggregate, kl_on, tutor_mean in product(AGGREGATES, KL_ON, TUTOR_MEANS)
]
of_all_means = pytest.mark.parametrize("means", MEANS, ids=lambda means: "-".join(means.values()))


# --------------------------------------------------------------------------------------- advantages
def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    advantages = group_advantages(rewards)
    # mean 1/4, unbiased std 1/2
    np.testing.assert_allclose(advantages[0].numpy(), [1.5, -0.5, -0.5, -0.5], rtol=1e-5)
    # exactly: nothing to learn from
    assert torch.equal(advantages[1], torch.zeros(4, dtype=torch.float64))


def test_a_failed_group_of_mixed_format_learns_the_format():
    """Eq. 67-69 are about accuracy; the format's share of the reward still has a contrast."""
    [advantages] = group_advantages(torch.tensor([[0.1, 0.0, 0.0, 0.0]], dtype=torch.float64))
    np.testing.assert_allclose(advantages.numpy(), [1.5, -0.5, -0.5, -0.5], rtol=1e-4)


def test_equal_rewards_whose_mean_is_another_float():
    """Divided by eps, the difference would be an advantage of 0.056."""
    rewards = torch.full((1, 8), 0.9)
    assert rewards.mean() != rewards[0, 0]
    assert torch.equal(group_advantages(rewards), torch.zeros(1, 8))


def test_advantages_without_the_standard_deviation():
    """Dr. GRPO: r - mean r; still exactly 0 where all rewards are equal."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.9] * 4, [0.0, 0.5, 1.0, 0.5]])
    advantages = group_advantages(rewards, scale=False)
    expected = [[0.75, -0.25, -0.25, -0.25], [0.0] * 4, [-0.5, 0.0, 0.5, 0.0]]
    assert torch.equal(advantages, torch.tensor(expected))
    eight_equal = torch.full((1, 8), 0.9)  # their mean is another float
    assert torch.equal(group_advantages(eight_equal, scale=False), torch.zeros(1, 8))


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
# four questions, three responses each; length 0: left out of the loss. Question 0: all failed, and
# one is left out. 1: nothing is tutored. 2: its one tutored response is left out. 3: one is tutored
LENGTHS = torch.tensor([[4, 0, 2], [1, 5, 3], [0, 2, 6], [2, 3, 4]])
TUTORED = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.bool)
LONGEST = 8
# 10 responses in the loss, with 32 tokens
POLICY = {
    "response": [
        [1 / 40, 0, 1 / 20],
        [1 / 10, 1 / 50, 1 / 30],
        [0, 1 / 20, 1 / 60],
        [1 / 20, 1 / 30, 1 / 40],
    ],
    "token": [[1 / 32, 0, 1 / 32], [1 / 32] * 3, [0, 1 / 32, 1 / 32], [1 / 32] * 3],
    "fixed": [[1 / 80, 0, 1 / 80], [1 / 80] * 3, [0, 1 / 80, 1 / 80], [1 / 80] * 3],
}
# question 1 alone, in a mean over all 10 responses with 32 tokens
KL_UNTUTORED = {
    "response": [[0] * 3, [1 / 10, 1 / 50, 1 / 30], [0] * 3, [0] * 3],
    "token": [[0] * 3, [1 / 32] * 3, [0] * 3, [0] * 3],
    "fixed": [[0] * 3, [1 / 80] * 3, [0] * 3, [0] * 3],
}
# 6 tutored tokens in question 0, and 3 in question 3; 4 questions, and 9 tutored tokens
TUTOR = {
    "question": [[1 / 24, 0, 1 / 24], [0] * 3, [0] * 3, [0, 1 / 12, 0]],
    "step": [[1 / 9, 0, 1 / 9], [0] * 3, [0] * 3, [0, 1 / 9, 0]],
}


def assert_equal_tables(ours, expected):
    """ResponseWeights against three tables."""
    for table, by_hand in zip(ours, expected, strict=True):
        torch.testing.assert_close(table, torch.as_tensor(by_hand, dtype=torch.float64))


@of_all_means
def test_weights_by_hand(means):
    weights = response_weights(PTDPOConfig(**means), LENGTHS, TUTORED, LONGEST)
    policy = POLICY[means["aggregate"]]
    kl = policy if means["kl_on"] == "all" else KL_UNTUTORED[means["aggregate"]]
    assert weights._fields == ("policy", "kl", "tutor")
    assert_equal_tables(weights, (policy, kl, TUTOR[means["tutor_mean"]]))


def test_weights_of_the_paper_and_of_the_release():
    """The defaults are the first; --recipe release is the second."""
    paper = response_weights(PTDPOConfig(), LENGTHS, TUTORED, LONGEST)
    assert_equal_tables(paper, (POLICY["response"], POLICY["response"], TUTOR["question"]))
    config = PTDPOConfig(**RECIPES["release"])
    release = response_weights(config, LENGTHS, TUTORED, LONGEST)
    assert_equal_tables(release, (POLICY["token"], KL_UNTUTORED["token"], TUTOR["step"]))


@of_all_means
def test_weights_where_nothing_is_tutored(means):
    """Then kl_on makes no difference."""
    nobody = torch.zeros_like(TUTORED)
    weights = response_weights(PTDPOConfig(**means), LENGTHS, nobody, LONGEST)
    policy = POLICY[means["aggregate"]]
    assert_equal_tables(weights, (policy, policy, torch.zeros(4, 3)))


@of_all_means
def test_weights_where_all_responses_are_left_out(means):
    lengths = torch.zeros_like(LENGTHS)
    weights = response_weights(PTDPOConfig(**means), lengths, TUTORED, LONGEST)
    assert_equal_tables(weights, [torch.zeros(4, 3)] * 3)


@of_all_means
def test_weights_of_all_tokens_add_up_to_1(means):
    """Except those of "fixed", which no mean divides, of "question": half the questions, and of a
    KL penalty on question 1 alone: 3 of 10 responses, 9 of 32 tokens."""
    weights = response_weights(PTDPOConfig(**means), LENGTHS, TUTORED, LONGEST)
    policy, kl, tutor = ((LENGTHS * table).sum().item() for table in weights)
    fixed = means["aggregate"] == "fixed"
    of_question_1 = {"response": 3 / 10, "token": 9 / 32, "fixed": 9 / 80}
    assert policy == pytest.approx(32 / 80 if fixed else 1)
    assert kl == pytest.approx(
        policy if means["kl_on"] == "all" else of_question_1[means["aggregate"]]
    )
    assert tutor == pytest.approx(1 / 2 if means["tutor_mean"] == "question" else 1)


def weights_of_processes(config, shares):
    """ResponseWeights of each process. shares: its (lengths, tutored).

    Each process says what it would send; then each gets the sums, in the order of its calls.
    """

    def sent(share):
        counts = []

        def note(count):
            counts.append(count)
            return count

        response_weights(config, *share, LONGEST, note)
        return counts

    # strict: a process that sums once less than another one would wait for ever
    totals = [sum(counts) for counts in zip(*map(sent, shares), strict=True)]

    def received(share):
        remaining = iter(totals)
        return response_weights(config, *share, LONGEST, lambda count: next(remaining))

    return [received(share) for share in shares]


@pytest.mark.parametrize("cut", [1, 2, 3])
@of_all_means
def test_weights_do_not_depend_on_how_processes_share_the_questions(means, cut):
    """Two processes, also with 1 and 3 questions. With cut 2 the second one tutors less."""
    config = PTDPOConfig(**means)
    shares = [(LENGTHS[:cut], TUTORED[:cut]), (LENGTHS[cut:], TUTORED[cut:])]
    processes = weights_of_processes(config, shares)
    whole = response_weights(config, LENGTHS, TUTORED, LONGEST)
    joined = ResponseWeights(*(torch.cat(tables) for tables in zip(*processes, strict=True)))
    assert_equal_tables(joined, whole)


# -------------------------------------------------------------------------- means, without our code
def plain_mean(values, lengths, kind, longest):
    """The mean over the responses' tokens, written out. values: one array per response."""
    responses = [row[:length] for row, length in zip(values, lengths, strict=True) if length]
    if not responses:
        return 0.0
    if kind == "response":
        return np.mean([response.mean() for response in responses])
    total = sum(response.sum() for response in responses)
    if kind == "fixed":
        return total / (len(responses) * longest)
    return total / sum(len(response) for response in responses)


def plain_question_mean(values, lengths, tutored):
    """Eq. 8, 11, 80: mean over a question's tutored tokens, else 0; then over all questions."""
    means = []
    for of_question in zip(values, lengths, tutored, strict=True):
        tokens = []
        for row, length, is_tutored in zip(*of_question, strict=True):
            if is_tutored:
                tokens += row[:length].tolist()
        means.append(sum(tokens) / len(tokens) if tokens else 0.0)
    return sum(means) / len(means)


def plain_means(means, values, lengths, tutored, longest):
    """Policy, KL and tutoring: the means of one table of values (N, G, T)."""
    penalised = values.copy()
    if means["kl_on"] == "untutored":
        penalised[tutored.any(1)] = 0
    everything = np.full_like(tutored, True)
    plain = {
        "policy": plain_mean(values[everything], lengths[everything], means["aggregate"], longest),
        "kl": plain_mean(penalised[everything], lengths[everything], means["aggregate"], longest),
        "tutor": plain_mean(values[tutored], lengths[tutored], "token", longest),
    }
    if means["tutor_mean"] == "question":
        plain["tutor"] = plain_question_mean(values, lengths, tutored)
    return plain


def weighted_sums(weights, values, lengths):
    """Each table's sum over the tokens of values (N, G, T)."""
    sums = {}
    for name, table in weights._asdict().items():
        responses = [
            table[n, g].item() * values[n, g, : lengths[n, g]].sum()
            for n, g in np.ndindex(*lengths.shape)
        ]
        sums[name] = sum(responses)
    return sums


@of_all_means
@pytest.mark.parametrize("seed", range(5))
def test_weighted_sums_are_the_plain_means(means, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 10, (5, 4))  # some are left out
    values = rng.normal(size=(5, 4, 9))
    correct, can_tutor = rng.random((5, 4)) < 0.5, rng.random(5) < 0.6
    tutored = ~correct & can_tutor[:, None]
    lengths[0], tutored[0, 0], tutored[1] = 0, True, False  # one is left out, one has no failure
    weights = response_weights(
        PTDPOConfig(**means), torch.tensor(lengths), torch.tensor(tutored), longest=9
    )
    sums = weighted_sums(weights, values, lengths)
    assert sums == pytest.approx(plain_means(means, values, lengths, tutored, 9), rel=1e-12)


@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_means_of_eq_3_and_of_eq_8_11_80(seed, tau):
    """The defaults: 1/N 1/G sum 1/T sum; and E_x of sum_F D / |F|, with F from Eq. 8."""
    rng = np.random.default_rng(seed)
    lengths, values = rng.integers(1, 10, (6, 4)), rng.normal(size=(6, 4, 9))
    correct = rng.random((6, 4)) < rng.random((6, 1))
    correct[0] = True  # nothing failed
    per_question, tutoring = [], []
    for n in range(6):
        responses = [values[n, g, : lengths[n, g]] for g in range(4)]
        per_question.append(sum(response.mean() for response in responses) / 4)
        failed = [responses[g] for g in range(4) if not correct[n, g]]
        if correct[n].mean() < tau and failed:
            tutoring.append(np.concatenate(failed).mean())
    tutored = route(torch.tensor(correct), torch.ones(6, dtype=torch.bool), tau)
    weights = response_weights(PTDPOConfig(tau=tau), torch.tensor(lengths), tutored, longest=9)
    sums = weighted_sums(weights, values, lengths)
    assert sums["policy"] == pytest.approx(sum(per_question) / 6, rel=1e-12)
    assert sums["kl"] == pytest.approx(sum(per_question) / 6, rel=1e-12)
    assert sums["tutor"] == pytest.approx(sum(tutoring) / 6, rel=1e-12)


# --------------------------------------------------------------------------------------------- loss
# three questions, two responses each: both tutored, none tutored, one tutored
TUTORED_OF_STEP = torch.tensor([[True, True], [False, False], [False, True]])
RESPONSES, TOKENS, LONGEST_OF_STEP = 6, 5, 9


def step(seed=0, **settings):
    """Random tensors of a step of 6 responses: the config, and the arguments of ptdpo_loss."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    config = PTDPOConfig(**settings)
    lengths = torch.randint(1, TOKENS + 1, (RESPONSES,), generator=generator)
    of_group = response_weights(config, lengths.view(3, 2), TUTORED_OF_STEP, LONGEST_OF_STEP)
    arguments = dict(
        logp=-2 * rand(RESPONSES, TOKENS),
        old_logp=-2 * rand(RESPONSES, TOKENS),
        advantages=rand(RESPONSES) - 0.5,
        mask=torch.arange(TOKENS) < lengths.unsqueeze(1),
        weights=ResponseWeights(*(table.flatten() for table in of_group)),
        teacher_divergence=rand(RESPONSES, TOKENS),
        reference_logp=-rand(RESPONSES, TOKENS),
    )
    return config, arguments


def part_of(arguments, start, end):
    """The arguments of the micro-batch of responses `start` to `end`."""
    part = {name: value[start:end] for name, value in arguments.items() if name != "weights"}
    weights = ResponseWeights(*(table[start:end] for table in arguments["weights"]))
    return {**part, "weights": weights}


def token_loss(ratio, advantage, config):
    """The clipped surrogate of one token, dual clip included, written out."""
    clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
    surrogate = min(ratio * advantage, clipped * advantage)
    if config.dual_clip and advantage < 0:
        surrogate = max(surrogate, config.dual_clip * advantage)
    return -surrogate


def token_tables(config, x):
    """Policy loss, k3 and divergence of each token, (6, 5) each, by a loop; 0 outside the mask."""
    tables = {name: np.zeros((RESPONSES, TOKENS)) for name in ("policy", "kl", "tutor")}
    for b, t in x["mask"].nonzero().tolist():
        log_ratio = x["logp"][b] - x["old_logp"][b]
        if config.ratio == "sequence":
            log_ratio = log_ratio[x["mask"][b]].mean().expand(TOKENS)
        advantage = x["advantages"][b].item()
        tables["policy"][b, t] = token_loss(math.exp(log_ratio[t]), advantage, config)
        difference = (x["reference_logp"][b, t] - x["logp"][b, t]).item()
        tables["kl"][b, t] = math.exp(difference) - 1 - difference
        tables["tutor"][b, t] = x["teacher_divergence"][b, t].item()
    return tables


def loss_by_a_loop(config, x):
    """The three parts of the loss, as plain means of token_tables."""
    means = {name: getattr(config, name) for name in ("aggregate", "kl_on", "tutor_mean")}
    lengths, tutored = x["mask"].sum(1).view(3, 2).numpy(), TUTORED_OF_STEP.numpy()
    parts = {}
    for name, table in token_tables(config, x).items():
        values = table.reshape(3, 2, TOKENS)
        parts[name] = plain_means(means, values, lengths, tutored, LONGEST_OF_STEP)[name]
    return parts


# the release's dual clip is 3, which few of the random ratios reach
@pytest.mark.parametrize(
    "settings", [*RECIPES.values(), {**RECIPES["release"], "dual_clip": 1.5}], ids=[*RECIPES, "1.5"]
)
def test_loss_by_a_loop_over_tokens(settings):
    config, x = step(**{"lam": 0.5, "beta_kl": 0.1, **settings})
    expected = loss_by_a_loop(config, x)
    loss, parts = ptdpo_loss(config, **x)
    total = expected["policy"] + config.lam * expected["tutor"] + config.beta_kl * expected["kl"]
    assert abs(loss.item() - total) < 1e-12
    assert abs(parts["policy_loss"].item() - expected["policy"]) < 1e-12
    assert abs(parts["tutor_loss"].item() - expected["tutor"]) < 1e-12
    assert abs(parts["kl"].item() - expected["kl"]) < 1e-12


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_ratio_and_aggregation_of_the_policy_loss(ratio, aggregate):
    """The ratio does not change tutoring and KL, nor the aggregation tutoring."""
    config, x = step(seed=7, ratio=ratio, aggregate=aggregate)
    _, parts = ptdpo_loss(config, **x)
    assert abs(parts["policy_loss"].item() - loss_by_a_loop(config, x)["policy"]) < 1e-12
    token_config, same = step(seed=7, aggregate=aggregate)
    assert parts["kl"] == ptdpo_loss(token_config, **same)[1]["kl"]
    default_config, same = step(seed=7)
    assert parts["tutor_loss"] == ptdpo_loss(default_config, **same)[1]["tutor_loss"]


@pytest.mark.parametrize("dual_clip, expected", [(0.0, 5.0), (3.0, 3.0), (7.0, 5.0)])
def test_dual_clip_bounds_the_loss_and_0_is_no_bound(dual_clip, expected):
    """One token with A = -1 and ratio 5: the loss is 5, and at most dual_clip."""
    one, mask = torch.ones(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    old_logp = torch.full((1, 1), -3.0, dtype=torch.float64)
    weights = ResponseWeights(policy=one, kl=one, tutor=one)
    logp = old_logp + math.log(5)
    loss, _ = ptdpo_loss(PTDPOConfig(dual_clip=dual_clip), logp, old_logp, -one, mask, weights)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cuts", [[1, 2, 3], [5, 1], [1] * 6])
@of_all_means
def test_micro_batches_add_up(cuts, means):
    """Also where a question's responses are in several."""
    config, x = step(seed=4, lam=2.0, **means)
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
    config, x = step(seed=4)
    loss, parts = ptdpo_loss(config, **{**x, "teacher_divergence": None, "reference_logp": None})
    assert list(parts) == ["policy_loss"]
    assert loss == parts["policy_loss"]


@pytest.mark.parametrize("kl_on", KL_ON)
def test_fillers_outside_the_mask_do_not_reach_the_gradient(kl_on):
    config, x = step(seed=2, kl_on=kl_on)
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
        dict(dual_clip=-1.0),
        dict(dual_clip=0.5),
        dict(dual_clip=1.0),
        dict(divergence="kl"),
        dict(support="both"),
        dict(ratio="word"),
        dict(aggregate="sequence"),
        dict(kl_on="none"),
        dict(tutor_mean="token"),
    ],
)
def test_config_names_the_option(bad):
    [name] = bad
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        PTDPOConfig(**bad)


def test_dual_clip_is_0_or_above_1():
    with pytest.raises(ValueError, match="--dual-clip must be 0 or above 1, got 0.5"):
        PTDPOConfig(dual_clip=0.5)
    assert PTDPOConfig().dual_clip == 0
    assert PTDPOConfig(dual_clip=1.1).dual_clip == 1.1
