"""The paper's identities, one test each. The equation's number is in the test's name.

All numbers are float64; sizes and logits are random. The references are numpy in probability space
and share no code with losses.py and ptdpo.py. p is the student, q the teacher, m = (p + q) / 2, and
z are the student's logits.
"""

import math
import weakref

import numpy as np
import pytest
import torch

from losses import (
    SUPPORTS,
    full_jsd,
    policy_loss,
    scores_from_hidden,
    token_log_probs,
    topk_jsd,
    weighted_sum,
)
from ptdpo import (
    PTDPOConfig,
    ResponseWeights,
    group_advantages,
    ptdpo_loss,
    response_weights,
    route,
)

seeds = pytest.mark.parametrize("seed", range(6))


# --------------------------------------------------------------------- random cases, and references
def random_pair(seed):
    """Logits (n, V) of student and teacher, and a k so small that the tail has three tokens."""
    rng = np.random.default_rng(seed)
    rows, vocab, scale = rng.integers(1, 6), rng.integers(9, 80), rng.uniform(0.5, 4)
    student, teacher = scale * torch.from_numpy(rng.standard_normal((2, rows, vocab)))
    return student, teacher, int(rng.integers(1, vocab // 3 + 1))


def probabilities(logits):
    """Softmax over the last axis, as a numpy array."""
    scores = logits.detach().numpy()
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def bucket_labels(p, q, k, support="union"):
    """The bucket of each token (V,): its own in the support of Eq. 14, else V, the tail."""
    top = {"student": np.argsort(-p)[:k], "teacher": np.argsort(-q)[:k]}
    top["union"] = np.union1d(top["student"], top["teacher"])
    labels = np.full(len(p), len(p))
    labels[top[support]] = top[support]
    return labels


def bucket_jsd_gradient(p, q, k):
    """d D_TopK / dz (V,): 1/2 p_v (log p_b/m_b - E_{b~p} log p_b/m_b), b the bucket of v."""
    labels = bucket_labels(p, q, k)
    p_bucket, q_bucket = (np.bincount(labels, weights=probs)[labels] for probs in (p, q))
    log_ratio = np.log(p_bucket / ((p_bucket + q_bucket) / 2))
    return 0.5 * p * (log_ratio - (p * log_ratio).sum())


def gradient(loss, at):
    """Autograd's gradient of the sum of loss(at)."""
    at = at.clone().requires_grad_()
    return torch.autograd.grad(loss(at).sum(), at)[0]


def assert_equal(actual, expected, rtol=1e-9, atol=1e-13):
    if isinstance(actual, torch.Tensor):
        actual = actual.detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


# --------------------------------------------------------------------- gradients of the divergences
@seeds
def test_eq_36_gradient_of_forward_kl(seed):
    """Eq. 36: d KL(q || p) / dz_v = p_v - q_v."""
    student, teacher, _ = random_pair(seed)
    vocab = student.shape[1]
    ours = gradient(lambda z: topk_jsd(z, teacher, vocab, divergence="forward_kl"), student)
    assert_equal(ours, probabilities(student) - probabilities(teacher))


@seeds
def test_eq_38_gradient_of_reverse_kl(seed):
    """Eq. 38: d KL(p || q) / dz_v = p_v (log p_v/q_v - E_p log p/q)."""
    student, teacher, _ = random_pair(seed)
    vocab = student.shape[1]
    ours = gradient(lambda z: topk_jsd(z, teacher, vocab, divergence="reverse_kl"), student)
    p, q = probabilities(student), probabilities(teacher)
    assert_equal(ours, p * (np.log(p / q) - kl(p, q)[:, None]))


@seeds
def test_eq_41_gradient_of_the_jsd_in_the_probabilities(seed):
    """Eq. 41: d JSD / dp_v = 1/2 log(p_v / m_v), up to one constant per row.

    full_jsd normalises, so p stays on the simplex and a constant has no effect there.
    """
    student, teacher, _ = random_pair(seed)
    p, q = probabilities(student), probabilities(teacher)
    ours = gradient(lambda x: full_jsd(x.log(), teacher), torch.from_numpy(p)).numpy()
    expected = 0.5 * np.log(p / ((p + q) / 2))
    centred = [x - x.mean(-1, keepdims=True) for x in (ours, expected)]
    assert_equal(*centred)


@seeds
def test_eq_42_gradient_of_the_full_jsd(seed):
    """Eq. 42: d JSD / dz_v = 1/2 p_v (log p_v/m_v - E_{u~p} log p_u/m_u)."""
    student, teacher, _ = random_pair(seed)
    p, q = probabilities(student), probabilities(teacher)
    log_ratio = np.log(p / ((p + q) / 2))
    expected = 0.5 * p * (log_ratio - (p * log_ratio).sum(-1, keepdims=True))
    assert_equal(gradient(lambda z: full_jsd(z, teacher), student), expected)


@seeds
def test_eq_42_gradient_of_the_topk_jsd(seed):
    """Eq. 42 on buckets: 1/2 p_v (log p_b/m_b - E_{b~p} log p_b/m_b), b the bucket of token v.

    A token outside the support gets its share p_v / p_tail of the tail bucket's gradient.
    """
    student, teacher, k = random_pair(seed)
    pairs = zip(probabilities(student), probabilities(teacher), strict=True)
    expected = [bucket_jsd_gradient(p, q, k) for p, q in pairs]
    assert_equal(gradient(lambda z: topk_jsd(z, teacher, k), student), expected)


@seeds
def test_eq_42_gradient_from_hidden_states(seed):
    """Eq. 42 through z = W h: d D / dh = (d D / dz) W and d D / dW = sum over tokens dz_t h_t."""
    torch.manual_seed(seed)
    tokens, width, vocab, k = 7, 5, 20 + 3 * seed, 2 + seed
    head, teacher_head = (torch.nn.Linear(width, vocab, dtype=torch.float64) for _ in range(2))
    hidden, teacher_hidden = 3 * torch.randn(2, tokens, width, dtype=torch.float64)
    hidden.requires_grad_()
    ids = torch.randint(vocab, (tokens,))
    four_tokens = 4 * vocab * 16 / 2**20  # MiB per chunk, 16 bytes per token and vocabulary entry
    _, _, jsd = scores_from_hidden(
        hidden, head, ids, teacher_hidden, teacher_head, k=k, logits_mb=four_tokens
    )
    of_hidden, of_weight = torch.autograd.grad(jsd.sum(), [hidden, head.weight])
    p, q = probabilities(head(hidden)), probabilities(teacher_head(teacher_hidden))
    of_logits = np.stack([bucket_jsd_gradient(*row, k) for row in zip(p, q, strict=True)])
    assert_equal(of_hidden, of_logits @ head.weight.detach().numpy())
    assert_equal(of_weight, of_logits.T @ hidden.detach().numpy())


# ------------------------------------------------------------------------------ bounds and the tail
@seeds
def test_eq_43_the_jsd_lies_between_0_and_log_2(seed):
    """Eq. 43: 0 <= D <= log 2; 0 where p = q, log 2 where no token has both p > 0 and q > 0."""
    student, teacher, k = random_pair(seed)
    half = student.shape[1] // 2
    disjoint_student, disjoint_teacher = student.clone(), teacher.clone()
    disjoint_student[:, :half] = -math.inf
    disjoint_teacher[:, half:] = -math.inf
    for divergence in (full_jsd, lambda a, b: topk_jsd(a, b, k)):
        value = divergence(student, teacher)
        assert (value > 0).all() and (value < math.log(2)).all()
        assert_equal(divergence(student, student), 0, atol=1e-14)
    # half of the vocabulary and one more, so that the tail is empty
    for divergence in (full_jsd, lambda a, b: topk_jsd(a, b, half + 1)):
        assert_equal(divergence(disjoint_student, disjoint_teacher), math.log(2), rtol=1e-14)


@seeds
@pytest.mark.parametrize("support", SUPPORTS)
def test_eq_62_the_topk_jsd_is_a_lower_bound(seed, support):
    """Eq. 62: D_TopK <= D_full; equal where K is the vocabulary."""
    student, teacher, k = random_pair(seed)
    full = full_jsd(student, teacher)
    assert (topk_jsd(student, teacher, k, support=support) < full).all()
    assert_equal(topk_jsd(student, teacher, student.shape[1], support=support), full, rtol=1e-12)


@seeds
@pytest.mark.parametrize("support", SUPPORTS)
def test_eq_63_what_the_tail_bucket_loses(seed, support):
    """Eq. 63: D_full - D_TopK = 1/2 q_tail KL(q' || m') + 1/2 p_tail KL(p' || m').

    p', q', m' are p, q, m outside the support, normalised there.
    """
    student, teacher, k = random_pair(seed)
    lost = full_jsd(student, teacher) - topk_jsd(student, teacher, k, support=support)
    expected = []
    for p, q in zip(probabilities(student), probabilities(teacher), strict=True):
        outside = bucket_labels(p, q, k, support) == len(p)
        p, q = p[outside], q[outside]
        m = (p + q) / 2
        p_tail, q_tail, m = p.sum(), q.sum(), m / m.sum()
        expected.append(0.5 * q_tail * kl(q / q_tail, m) + 0.5 * p_tail * kl(p / p_tail, m))
    assert_equal(lost, expected, rtol=1e-8, atol=1e-14)


@seeds
@pytest.mark.parametrize("support", SUPPORTS)
def test_eq_62_the_topk_jsd_grows_with_k(seed, support):
    """Eq. 62 between two supports: S in S' gives D_S <= D_S', because S' only splits the tail."""
    student, teacher, _ = random_pair(seed)
    values = [
        topk_jsd(student, teacher, k, support=support) for k in range(1, student.shape[1] + 1)
    ]
    assert (torch.stack(values).diff(dim=0) > -1e-14).all()
    assert (values[0] < values[-1]).all()


# ------------------------------------------------------------------------------------------- memory
def kept_bytes(forward, inputs):
    """Bytes that the graph of forward() keeps for backward, without the inputs' own."""
    saved = []

    def pack(tensor):
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    alive = [reference().untyped_storage() for reference in saved if reference() is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
    for tensor in inputs:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def kept_by_both(tokens, vocab, k, width=4):
    """Bytes kept by full_jsd from logits, and by scores_from_hidden with a frozen head."""
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocab, dtype=torch.float64).requires_grad_(False)
    hidden, teacher_hidden = torch.randn(2, tokens, width, dtype=torch.float64)
    hidden.requires_grad_()
    ids = torch.randint(vocab, (tokens,))
    inputs = [hidden, teacher_hidden, ids, head.weight, head.bias]

    def topk():
        scores = scores_from_hidden(hidden, head, ids, teacher_hidden, head, k=k, logits_mb=0.1)
        return scores[0] + scores[2]

    def full():
        return full_jsd(head(hidden), head(teacher_hidden))

    return kept_bytes(full, inputs), kept_bytes(topk, inputs)


def test_eq_65_66_memory_of_the_full_and_of_the_topk_jsd():
    """Eq. 65, 66: what backward keeps is O(B T V) for the full JSD and O(B T K) for Top-K."""
    full, topk = kept_by_both(tokens=40, vocab=500, k=5)
    full_wide, topk_wide = kept_by_both(tokens=40, vocab=2000, k=5)
    assert full >= 40 * 500 * 8 and full_wide == pytest.approx(4 * full, rel=0.01)
    assert 0 < topk < full and topk_wide == topk
    per_k = [kept_by_both(tokens=40, vocab=500, k=k)[1] for k in (10, 15)]
    assert per_k[1] - per_k[0] == per_k[0] - topk > 0
    assert kept_by_both(tokens=80, vocab=500, k=5)[1] == pytest.approx(2 * topk, rel=0.01)


# ----------------------------------------------------------------------- advantages and policy loss
@seeds
def test_eq_1_advantage_within_a_group(seed):
    """Eq. 1: A_i = (r_i - mean r) / (std r + eps), unbiased std; A(r + c) = A(r)."""
    rng = np.random.default_rng(seed)
    rewards, eps = rng.uniform(size=(rng.integers(1, 6), rng.integers(2, 10))), rng.uniform(1e-6, 1)
    expected = []
    for group in rewards.tolist():
        mean = sum(group) / len(group)
        std = math.sqrt(sum((reward - mean) ** 2 for reward in group) / (len(group) - 1))
        expected.append([(reward - mean) / (std + eps) for reward in group])
    assert_equal(group_advantages(torch.from_numpy(rewards), eps=eps), expected)
    assert_equal(group_advantages(torch.from_numpy(rewards + 5), eps=eps), expected)


@seeds
def test_eq_2_the_ratio_is_1_on_the_first_pass(seed):
    """Eq. 2, 3 at rho = exp(logp - old_logp) = 1: loss -A, d loss / d logp = -A, per token."""
    rng = np.random.default_rng(seed)
    logp, advantages = torch.from_numpy(rng.standard_normal((2, 4, 7)))
    mask = torch.ones(4, 7, dtype=torch.bool)
    assert_equal(policy_loss(logp, logp, advantages, mask), -advantages.numpy())
    of_logp = gradient(lambda x: policy_loss(x, logp, advantages, mask), logp)
    assert_equal(of_logp, -advantages.numpy())


@seeds
def test_eq_3_the_clip_stops_the_gradient_on_one_side_only(seed):
    """Eq. 3: d/d logp of -min(rho A, clip(rho) A) is 0 beyond the clip if A pushes away from 1.

    That is A > 0 and rho > 1 + eps_c, or A < 0 and rho < 1 - eps_c. Elsewhere it is -rho A, also
    beyond the clip on the other side.
    """
    rng = np.random.default_rng(seed)
    eps = rng.uniform(0.05, 0.5)
    below, inside, above = 1 - 1.5 * eps, rng.uniform(1 - eps, 1 + eps), 1 + 1.5 * eps
    rho = np.array([[below, inside, above], [below, inside, above]])
    advantages = rng.uniform(0.1, 2) * np.array([[1.0] * 3, [-1.0] * 3])
    value = -rho * advantages
    value[0, 2], value[1, 0] = -(1 + eps) * advantages[0, 2], -(1 - eps) * advantages[1, 0]
    slope = -rho * advantages
    slope[0, 2] = slope[1, 0] = 0
    old_logp = torch.from_numpy(rng.standard_normal((2, 3)))

    def loss(logp):
        given = logp, old_logp, torch.from_numpy(advantages), torch.ones(2, 3, dtype=torch.bool)
        return policy_loss(*given, clip_low=eps, clip_high=eps, dual_clip=None)

    logp = old_logp + torch.from_numpy(np.log(rho))
    assert_equal(loss(logp), value)
    assert_equal(gradient(loss, logp), slope)


@seeds
def test_eq_67_69_groups_without_contrast_teach_by_tutoring_alone(seed):
    """Eq. 67-69: r_1 = ... = r_G gives A = 0 and a policy gradient of exactly 0; d D_TopK is not 0.

    Rewards are 0.1 (failed, right format), 1.0 (right), and a mixed group. In floating point the
    mean of three times 0.1 is not 0.1, and the advantage must be 0 all the same.
    """
    torch.manual_seed(seed)
    rewards = torch.tensor([[0.1] * 3, [1.0] * 3, [0.1, 0.1, 1.0]], dtype=torch.float64)
    advantages = group_advantages(rewards)
    assert torch.equal(advantages[:2], torch.zeros(2, 3, dtype=torch.float64))
    logits, teacher = torch.randn(2, 9, 4, 11, dtype=torch.float64)
    ids, mask = torch.randint(11, (9, 4)), torch.ones(9, 4, dtype=torch.bool)
    old_logp = token_log_probs(logits, ids) + torch.empty(9, 4).uniform_(-0.1, 0.1)
    weights = torch.full((9,), 1 / 36, dtype=torch.float64)

    def policy(z):
        given = token_log_probs(z, ids), old_logp, advantages.view(9, 1).expand(9, 4), mask
        return weighted_sum(policy_loss(*given), mask, weights)

    of_policy = gradient(policy, logits)
    assert (of_policy[:6] == 0).all() and (of_policy[6:] != 0).all()
    of_tutoring = gradient(lambda z: weighted_sum(topk_jsd(z, teacher, 3), mask, weights), logits)
    assert (of_tutoring != 0).all()


@seeds
def test_eq_18_30_the_policy_gradient_pulls_toward_a_target(seed):
    """Eq. 18-26, 30: d KL(pi+ || pi) = (1/T) d policy loss + O(1/T^2), pi+ ~ pi_old exp(A/T).

    One softmax; the expectation over actions is exact, and pi = pi_old. pi+ has the logits
    z + A/T. The difference falls by 4 where T doubles.
    """
    rng = np.random.default_rng(seed)
    vocab = int(rng.integers(3, 20))
    logits, advantages = torch.from_numpy(rng.standard_normal((2, vocab)))
    actions, mask = torch.arange(vocab), torch.ones(vocab, 1, dtype=torch.bool)
    pi = torch.from_numpy(probabilities(logits))

    def policy(z):
        logp = token_log_probs(z.expand(vocab, vocab), actions).unsqueeze(1)
        return weighted_sum(policy_loss(logp, logp, advantages.unsqueeze(1), mask), mask, pi)

    of_policy = gradient(policy, logits)
    assert_equal(of_policy, -pi * (advantages - (pi * advantages).sum()))
    distances = []
    for temperature in (200, 400):
        target = logits + advantages / temperature
        pull = gradient(
            lambda z, to=target: topk_jsd(z, to, vocab, divergence="forward_kl"), logits
        )
        distances.append((pull - of_policy / temperature).norm())
        assert distances[-1] < 0.05 * pull.norm()
    assert distances[0] / distances[1] == pytest.approx(4, rel=0.05)


# ----------------------------------------------------------------------------------- who is tutored
@seeds
def test_eq_8_routed_responses(seed):
    """Eq. 8: F = {(i, t): mean r < tau, r_i = 0, m_it = 1}, in questions with a usable hint.

    tau = j / G, so that some groups lie exactly at tau: these are not tutored.
    """
    rng = np.random.default_rng(seed)
    questions, size = 40, int(rng.integers(2, 10))
    correct = rng.uniform(size=(questions, size)) < rng.uniform(size=(questions, 1))
    has_hint, lengths = rng.uniform(size=questions) < 0.8, rng.integers(1, 6, (questions, size))
    for needed in range(1, size + 1):
        tutored = route(torch.from_numpy(correct), torch.from_numpy(has_hint), needed / size)
        in_tokens = torch.from_numpy(lengths)
        weights = response_weights(PTDPOConfig(), in_tokens, tutored, longest=5).tutor
        expected = set()
        for question in range(questions):
            if not has_hint[question] or correct[question].sum() >= needed:
                continue
            for i in np.flatnonzero(~correct[question]).tolist():
                expected |= {(question, i, t) for t in range(lengths[question, i])}
        mask = torch.arange(5) < in_tokens.unsqueeze(-1)
        routed = mask & (weights > 0).unsqueeze(-1)
        assert {tuple(position) for position in routed.nonzero().tolist()} == expected


@seeds
def test_eq_76_78_84_tutoring_of_failures_and_of_successes_add_up(seed):
    """Eq. 76-78, 84: d L_all / dW = (|F| g_F + |R| g_R) / (|F| + |R|); routed alone: g_F.

    g_F and g_R are the mean gradients over the tokens of failed and of right responses. One
    question: Eq. 80, the mean over questions, is then the mean over its tutored tokens.
    """
    torch.manual_seed(seed)
    config, rows, length, width, vocab, k = PTDPOConfig(lam=1.0), 6, 5, 4, 15, 3
    hidden = torch.randn(rows, length, width, dtype=torch.float64)
    teacher = torch.randn(rows, length, vocab, dtype=torch.float64)
    head = torch.randn(vocab, width, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (rows,))
    correct = torch.tensor([[True, False, False, True, True, False]])
    failed = route(correct, torch.tensor([True]))
    mask = torch.arange(length) < lengths.unsqueeze(1)

    def tutoring_gradient(tutored):
        def loss(weight):
            jsd, logp = topk_jsd(hidden @ weight.T, teacher, k), torch.zeros(rows, length)
            weights = response_weights(config, lengths.view(1, rows), tutored, longest=length)
            weights = ResponseWeights(*(table.view(rows) for table in weights))
            given = logp, logp, torch.zeros(rows), mask, weights, jsd
            return ptdpo_loss(config, *given)[0]

        return gradient(loss, head)

    sums = {True: np.zeros((vocab, width)), False: np.zeros((vocab, width))}
    p, q = probabilities(hidden @ head.T), probabilities(teacher)
    for i, t in mask.nonzero().tolist():
        of_logits = bucket_jsd_gradient(p[i, t], q[i, t], k)
        sums[failed[0, i].item()] += np.outer(of_logits, hidden[i, t])
    count, count_failed = lengths.sum().item(), lengths[failed[0]].sum().item()
    assert_equal(tutoring_gradient(failed), sums[True] / count_failed)
    assert_equal(tutoring_gradient(~failed), sums[False] / (count - count_failed))
    assert_equal(tutoring_gradient(failed | ~failed), (sums[True] + sums[False]) / count)


# -------------------------------------------------------------------------------------- the release
@seeds
@pytest.mark.parametrize("topk", [True, False])
def test_eq_42_does_not_hold_in_the_release(seed, topk):
    """Release: p is detached in p (log p - log m), m is not: 1/2 dp - 1/2 (p + q)/m dm = 0.

    Its Top-K branch and its full-vocabulary JSD alike. Their values do change with z, as finite
    differences show. Our gradient along the same direction is the finite difference of our value.
    """
    student, teacher, k = random_pair(seed)
    kept = student.topk(k if topk else student.shape[1]).indices

    def released(z):
        p, q = (x.softmax(-1).gather(-1, kept) for x in (z, teacher))
        m = (p + q) / 2
        return 0.5 * (p.detach() * (p / m).log() + q * (q / m).log()).sum(-1)

    def ours(z):
        return topk_jsd(z, teacher, k) if topk else full_jsd(z, teacher)

    torch.manual_seed(seed)
    direction, step = torch.randn_like(student), 1e-6

    def change(loss):
        return (loss(student + step * direction) - loss(student - step * direction)) / (2 * step)

    assert gradient(released, student).abs().max() < 1e-12
    assert change(released).abs().max() > 1e-4
    along = (gradient(ours, student) * direction).sum(-1)
    assert_equal(along, change(ours), rtol=1e-5, atol=1e-8)
    assert along.abs().max() > 1e-4
