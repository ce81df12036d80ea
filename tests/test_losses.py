"""losses.py against an independent reference, and at the places where such losses break.

The reference works in float64, with probabilities and sets of tokens. It shares no code with
losses.py.
"""

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from losses import (
    entropy,
    full_jsd,
    k3_kl,
    policy_loss,
    scores_from_hidden,
    token_log_probs,
    topk_jsd,
    weighted_sum,
)


# ---------------------------------------------------- the reference: numpy, probabilities, sets
def np_probs(logits, temperature=1.0):
    z = np.asarray(logits, dtype=np.float64) / temperature
    e = np.exp(z - z.max())
    return e / e.sum()


def np_jsd(p, q):
    middle = (p + q) / 2
    return (np_kl(p, middle) + np_kl(q, middle)) / 2


def np_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


NP_DIVERGENCES = {"jsd": np_jsd, "forward_kl": lambda p, q: np_kl(q, p), "reverse_kl": np_kl}


def np_topk_jsd(student, teacher, k, temperature=1.0, divergence="jsd", support="union"):
    p, q = np_probs(student, temperature), np_probs(teacher, temperature)
    student_top, teacher_top = set(np.argsort(-p)[:k].tolist()), set(np.argsort(-q)[:k].tolist())
    supports = {"student": student_top, "teacher": teacher_top, "union": student_top | teacher_top}
    inside = sorted(supports[support])
    outside = sorted(set(range(len(p))) - supports[support])
    p_buckets, q_buckets = (np.append(x[inside], x[outside].sum()) for x in (p, q))
    return NP_DIVERGENCES[divergence](p_buckets, q_buckets)


def pair(count, vocab, seed=0, scale=2.0, dtype=torch.float64):
    """Random logits (count, vocab) of a student and a teacher."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, count, vocab, generator=generator, dtype=torch.float64)
    return tuple(logits.to(dtype))


# ------------------------------------------------------------------------------------ divergences
@pytest.mark.parametrize(
    "vocab,k,temperature",
    [(5, 1, 1.0), (5, 3, 0.7), (40, 5, 1.0), (40, 17, 2.0), (300, 100, 1.0), (7, 7, 1.0)],
)
def test_topk_jsd_equals_the_reference(vocab, k, temperature):
    s, t = pair(6, vocab, seed=vocab + k)
    rows = list(zip(s.numpy(), t.numpy(), strict=True))
    expected = [np_topk_jsd(a, b, k, temperature) for a, b in rows]
    np.testing.assert_allclose(topk_jsd(s, t, k, temperature).numpy(), expected, rtol=1e-10)
    full = [np_jsd(np_probs(a, temperature), np_probs(b, temperature)) for a, b in rows]
    np.testing.assert_allclose(full_jsd(s, t, temperature).numpy(), full, rtol=1e-10)


@pytest.mark.parametrize("divergence", ["jsd", "forward_kl", "reverse_kl"])
@pytest.mark.parametrize("support", ["union", "student", "teacher"])
def test_ablations_equal_the_reference(divergence, support):
    s, t = pair(6, 40, seed=8)
    ours = topk_jsd(s, t, 5, 0.9, divergence=divergence, support=support)
    expected = [
        np_topk_jsd(a, b, 5, 0.9, divergence, support)
        for a, b in zip(s.numpy(), t.numpy(), strict=True)
    ]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10)
    assert torch.autograd.gradcheck(
        lambda x: topk_jsd(x, t[:2], 5, divergence=divergence, support=support),
        s[:2].clone().requires_grad_(),
    )


@pytest.mark.parametrize("case", range(60))
def test_random_sizes(case):
    """Random shape, k, temperature and scale.

    The value is compared with the reference, the gradient with finite differences along one
    direction.
    """
    generator = torch.Generator().manual_seed(case)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    count, vocab, temperature, scale = draw(1, 5), draw(2, 80), 0.3 + draw(0, 30) / 10, draw(1, 30)
    k, scale = draw(1, vocab + 5), scale / 3
    s, t = pair(count, vocab, seed=100 + case, scale=scale)
    rows = zip(s.numpy(), t.numpy(), strict=True)
    expected = [np_topk_jsd(a, b, k, temperature) for a, b in rows]
    ours = topk_jsd(s, t, k, temperature).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-12)

    x = s.clone().requires_grad_()
    topk_jsd(x, t, k, temperature).sum().backward()
    direction = torch.randn(count, vocab, generator=generator, dtype=torch.float64)
    step = 1e-6
    up = topk_jsd(s + step * direction, t, k, temperature).sum()
    down = topk_jsd(s - step * direction, t, k, temperature).sum()
    error = (up - down) / (2 * step) - (x.grad * direction).sum()
    assert abs(error) < 1e-5 * (1 + scale / temperature)


def test_bounds_symmetry_and_growth_in_k():
    s, t = pair(50, 60, seed=1, scale=4.0)
    full = full_jsd(s, t)
    previous = torch.zeros(50, dtype=torch.float64)
    for k in (1, 2, 5, 10, 30, 59, 60, 100):
        d = topk_jsd(s, t, k)
        assert (d >= 0).all() and (d <= math.log(2)).all() and (d <= full + 1e-12).all()
        # a larger support refines the partition: the data-processing inequality
        assert (d >= previous - 1e-12).all()
        torch.testing.assert_close(d, topk_jsd(t, s, k), rtol=1e-12, atol=1e-14)
        previous = d
    torch.testing.assert_close(topk_jsd(s, t, 60), full, rtol=1e-12, atol=0)
    assert topk_jsd(s, s, 5).abs().max() < 1e-12


@pytest.mark.parametrize("k", [1, 4, 12])
def test_gradient_is_the_divergence_s_own(k):
    s, t = pair(3, 12, seed=5)
    assert torch.autograd.gradcheck(lambda x: topk_jsd(x, t, k), s.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: full_jsd(x, t), s)


def test_teacher_is_detached_and_inputs_are_untouched():
    s, t = pair(4, 30)
    s.requires_grad_(), t.requires_grad_()
    before = s.detach().clone(), t.detach().clone()
    (topk_jsd(s, t, 5).sum() + full_jsd(s, t).sum()).backward()
    assert t.grad is None and s.grad.norm() > 0
    assert torch.equal(s, before[0]) and torch.equal(t, before[1])


def test_released_formula_has_no_gradient_where_ours_has():
    """Re-derived from what the release does: it detaches the weight p, but not the mixture m."""
    s, t = pair(4, 2000, seed=3)

    def released(x):
        top = x.log_softmax(-1).topk(100)
        log_p, log_q = top.values, t.log_softmax(-1).gather(-1, top.indices)
        p, q = log_p.exp(), log_q.exp()
        m = (p + q) / 2
        return (0.5 * p.detach() * (log_p - m.log()) + 0.5 * q * (log_q - m.log())).sum()

    x = s.clone().requires_grad_()
    released(x).backward()
    y = s.clone().requires_grad_()
    topk_jsd(y, t, 100).sum().backward()
    z = s.clone().requires_grad_()
    full_jsd(z, t).sum().backward()
    assert x.grad.norm() < 1e-12 * z.grad.norm()
    assert torch.nn.functional.cosine_similarity(y.grad.flatten(), z.grad.flatten(), dim=0) > 0.9


def test_peaked_pair_is_finite_and_pulls():
    """Each model puts all mass but 1e-9 on one token of its own.

    A tail that is clamped would lose its gradient here.
    """
    s, t = torch.zeros(1, 50), torch.zeros(1, 50)
    s[0, 3] = t[0, 7] = math.log(1e9 * 49)
    s.requires_grad_()
    d = topk_jsd(s, t, 5)
    d.sum().backward()
    assert abs(d.item() - math.log(2)) < 1e-6 and torch.isfinite(s.grad).all()
    near = torch.zeros(1, 50, dtype=torch.float64)
    near[0, 3] = math.log(1e9 * 49)
    near.requires_grad_()
    topk_jsd(near, torch.zeros(1, 50, dtype=torch.float64), 5).sum().backward()
    exact = near.detach().clone().requires_grad_()
    full_jsd(exact, torch.zeros(1, 50, dtype=torch.float64)).sum().backward()
    assert near.grad[0, 3] > 0 and abs(near.grad[0, 3] / exact.grad[0, 3] - 1) < 0.05


@pytest.mark.parametrize("who", ["student", "teacher", "both", "all but three"])
def test_banned_tokens(who):
    s, t = pair(4, 20, seed=9, dtype=torch.float32)
    ban = torch.arange(17) if who == "all but three" else torch.tensor([0, 5, 11])
    if who != "teacher":
        s[:, ban] = -math.inf
    if who != "student":
        t[:, ban] = -math.inf
    expected = [
        np_topk_jsd(a, b, 6) for a, b in zip(s.double().numpy(), t.double().numpy(), strict=True)
    ]
    s.requires_grad_()
    d = topk_jsd(s, t, 6) + 0 * entropy(s)
    d.sum().backward()
    np.testing.assert_allclose(d.detach().numpy(), expected, rtol=1e-5, atol=1e-7)
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    s, t = pair(5, 200, seed=2, dtype=dtype)
    d = topk_jsd(s, t, 20)
    assert d.dtype == torch.float32
    np.testing.assert_allclose(
        d.numpy(),
        [
            np_topk_jsd(a, b, 20)
            for a, b in zip(s.double().numpy(), t.double().numpy(), strict=True)
        ],
        rtol=1e-4,
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match="k >= 1"):
        topk_jsd(*pair(1, 4), k=0)
    with pytest.raises(ValueError, match="differ in shape"):
        topk_jsd(torch.zeros(2, 4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="support must be one of union, student, teacher"):
        topk_jsd(*pair(1, 4), support="both")
    with pytest.raises(ValueError, match="divergence must be one of jsd"):
        topk_jsd(*pair(1, 4), divergence="kl")
    h, ids = torch.zeros(1, 4), torch.zeros(1, dtype=torch.long)
    five, six = torch.nn.Linear(4, 5), torch.nn.Linear(4, 6)
    with pytest.raises(ValueError, match="vocabularies differ: 5 and 6"):
        scores_from_hidden(h, five, ids, h, six)
    with pytest.raises(ValueError, match="k >= 1"):
        scores_from_hidden(h, five, ids, h, five, k=0)
    with pytest.raises(TypeError, match="got Sequential"):
        scores_from_hidden(h, torch.nn.Sequential(five), ids)


@pytest.mark.parametrize("lengths", [(4, 6, 4), (4, 2, 4), (4, 4, 6), (4, 4, 2), (6, 4, None)])
def test_inputs_of_different_lengths(lengths):
    """Each pair differs by whole chunks of 2, whose slices would be cut without an error."""
    states, ids, teacher = lengths
    head = torch.nn.Linear(3, 5)
    teacher_states = None if teacher is None else torch.zeros(teacher, 3)
    with pytest.raises(ValueError, match=f"lengths differ: hidden {states}, ids {ids}"):
        scores_from_hidden(
            torch.zeros(states, 3),
            head,
            torch.zeros(ids, dtype=torch.long),
            teacher_states,
            head,
            logits_mb=budget(2, 5),
            k=2,
        )


# ------------------------------------------------------------------------- scores_from_hidden
def budget(chunk, vocab, bytes_each=8):
    """--logits-mb for `chunk` tokens per chunk; exact, because 2^20 is a power of two."""
    return chunk * vocab * bytes_each / 2**20


def head_pair(bias=True, teacher="other", dtype=torch.float64, vocab=31):
    """Output heads of student and teacher; of the same vocabulary, or one and the same."""
    torch.manual_seed(0)
    student = torch.nn.Linear(8, vocab, bias=bias, dtype=dtype)
    if teacher == "same":
        return student, student
    return student, torch.nn.Linear(6, vocab, bias=not bias, dtype=dtype)


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize("bias,teacher", [(True, "other"), (False, "other"), (True, "same")])
def test_scores_from_hidden_equal_the_plain_losses(chunk, bias, teacher):
    """Values and gradients for each chunk size; each token's score has a weight of its own."""
    student, other = head_pair(bias, teacher)
    h, ids = torch.randn(23, 8).double().requires_grad_(), torch.randint(3, 31, (23,))
    g = torch.randn(23, other.in_features).double().requires_grad_()
    banned, weights = torch.tensor([0, 2]), torch.randn(2, 23).double()
    inputs = [h, g, *student.parameters(), *other.parameters()]
    before = [x.detach().clone() for x in inputs]
    options = dict(k=5, logits_mb=budget(chunk, 31, 16))

    def gradients(logp, jsd):
        params = [h, *student.parameters()]
        return torch.autograd.grad((weights[0] * logp + weights[1] * jsd).sum(), params)

    logits = student(h).index_fill(1, banned, -math.inf)
    teacher_logits = other(g).index_fill(1, banned, -math.inf)
    plain_logp, plain_entropy = token_log_probs(logits, ids, 0.8), entropy(logits, 0.8)
    plain_jsd = topk_jsd(logits, teacher_logits, 5, 0.8)
    logp, entropies, jsd = scores_from_hidden(
        h, student, ids, g, other, temperature=0.8, banned=banned, **options
    )
    torch.testing.assert_close(logp, plain_logp, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(entropies, plain_entropy.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(jsd, plain_jsd, rtol=1e-12, atol=1e-14)
    assert logp.requires_grad and jsd.requires_grad and not entropies.requires_grad
    expected = gradients(plain_logp, plain_jsd)
    for ours, reference in zip(gradients(logp, jsd), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-13)

    logp, _, jsd = scores_from_hidden(h, student, ids, g, other, **options)
    (logp + jsd).sum().backward()
    assert g.grad is None
    assert teacher == "same" or all(p.grad is None for p in other.parameters())
    assert all(map(torch.equal, before, inputs))  # nothing is written into


@pytest.mark.parametrize("divergence", ["jsd", "forward_kl", "reverse_kl"])
@pytest.mark.parametrize("support", ["union", "student", "teacher"])
@pytest.mark.parametrize("k", [1, 6, 31, 50])
def test_scores_from_hidden_ablations(divergence, support, k):
    student, other = head_pair()
    h, g = torch.randn(9, 8).double().requires_grad_(), torch.randn(9, 6).double()
    ids = torch.randint(0, 31, (9,))
    ids[:3] = student(h).argmax(-1)[:3]  # in the support; the others mostly not
    options = dict(k=k, divergence=divergence, support=support)
    plain = topk_jsd(student(h), other(g), **options)
    logp, _, jsd = scores_from_hidden(
        h, student, ids, g, other, logits_mb=budget(4, 31, 16), **options
    )
    torch.testing.assert_close(jsd, plain, rtol=1e-11, atol=1e-14)
    ours = torch.autograd.grad(jsd.sum(), [h, student.weight])
    expected = torch.autograd.grad(plain.sum(), [h, student.weight])
    for gradient, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "all"])
def test_scores_from_hidden_gradcheck(trained):
    """Against finite differences, all inputs or one at a time: the others are then frozen."""
    torch.manual_seed(1)
    inputs = dict(
        hidden=torch.randn(5, 4).double(),
        weight=torch.randn(13, 4).double(),
        bias=torch.randn(13).double(),
    )
    teacher, g = torch.nn.Linear(4, 13).double(), torch.randn(5, 4).double()
    ids = torch.randint(0, 13, (5,))

    def scores(*given):
        x = {**inputs, **dict(zip(names, given, strict=True))}
        head = torch.nn.Linear(4, 13, device="meta")
        del head.weight, head.bias
        head.weight, head.bias = x["weight"], x["bias"]
        logp, _, jsd = scores_from_hidden(
            x["hidden"], head, ids, g, teacher, k=3, temperature=0.7, logits_mb=budget(2, 13, 16)
        )
        return logp, jsd

    names = list(inputs) if trained == "all" else [trained]
    given = [inputs[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(scores, given)


def test_vocabulary_padded_beyond_the_tokenizer():
    """Rows of no token change nothing if they are banned: the scores are those without the rows."""
    student, other = head_pair(vocab=40)
    small_student, small_other = head_pair(vocab=31)
    for small, large in ((small_student, student), (small_other, other)):
        small.load_state_dict({name: value[:31] for name, value in large.state_dict().items()})
    h, g = torch.randn(9, 8).double().requires_grad_(), torch.randn(9, 6).double()
    ids = torch.randint(0, 31, (9,))
    ours = scores_from_hidden(h, student, ids, g, other, k=5, banned=torch.arange(31, 40))
    expected = scores_from_hidden(h, small_student, ids, g, small_other, k=5)
    for score, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(score, reference, rtol=1e-12, atol=1e-14)

    def gradients(scores, head):
        return torch.autograd.grad((scores[0] + scores[2]).sum(), [h, head.weight])

    of_hidden, of_weight = gradients(ours, student)
    small_of_hidden, small_of_weight = gradients(expected, small_student)
    torch.testing.assert_close(of_hidden, small_of_hidden, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(of_weight[:31], small_of_weight, rtol=1e-11, atol=1e-14)
    assert (of_weight[31:] == 0).all()


def test_head_tied_to_the_embedding():
    """One parameter used twice: its gradient is the sum of both uses."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(31, 8).double()
    head = torch.nn.Linear(8, 31, bias=False).double()
    head.weight = embedding.weight
    ids, teacher = torch.randint(0, 31, (9,)), torch.nn.Linear(8, 31).double()

    def gradient(scores):
        h = embedding(ids.flip(0)).tanh()
        return torch.autograd.grad(scores(h).sum(), embedding.weight)[0]

    ours = gradient(lambda h: scores_from_hidden(h, head, ids, h.detach(), teacher, k=4)[2])
    plain = gradient(lambda h: topk_jsd(head(h), teacher(h), 4))
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", ["inputs", "autocast"])
def test_scores_from_hidden_in_half_precision(dtype, half):
    """The products are in half precision, all after them in float32.

    So the values equal the plain losses of the same half-precision logits.
    """
    student, other = head_pair(dtype=torch.float32, vocab=300)
    h, g, ids = torch.randn(40, 8), torch.randn(40, 6), torch.randint(0, 300, (40,))
    if half == "inputs":
        student, other, h, g = (x.to(dtype) for x in (student, other, h, g))
    h.requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=half == "autocast"):
        ours = scores_from_hidden(h, student, ids, g, other, k=10, logits_mb=budget(7, 300))
        logits, teacher_logits = student(h), other(g)
    assert all(x.dtype == torch.float32 for x in ours) and logits.dtype == dtype
    plain = token_log_probs(logits, ids), entropy(logits), topk_jsd(logits, teacher_logits, 10)
    for score, reference in zip(ours, plain, strict=True):
        torch.testing.assert_close(score.detach(), reference.detach(), rtol=1e-4, atol=1e-6)

    gradients = torch.autograd.grad((ours[0] + 3 * ours[2]).sum(), [h, student.weight])
    exact = [x.detach().double().requires_grad_() for x in (h, student.weight)]
    logits = torch.nn.functional.linear(*exact, student.bias.double())
    teacher_logits = other(g.to(other.weight.dtype)).double().detach()
    loss = token_log_probs(logits, ids) + 3 * topk_jsd(logits, teacher_logits, 10)
    expected = torch.autograd.grad(loss.sum(), exact)
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.004
    for gradient, reference, x in zip(gradients, expected, (h, student.weight), strict=True):
        assert gradient.dtype == x.dtype
        assert (gradient.double() - reference).norm() < tolerance * reference.norm()


def test_scores_from_hidden_of_a_peaked_pair():
    """Student and teacher each put all mass but 1e-9 on one token.

    In float32, a sum of probabilities would lose the gradient here.
    """
    student, other = torch.nn.Linear(2, 50, bias=False), torch.nn.Linear(2, 50, bias=False)
    with torch.no_grad():
        student.weight.zero_(), other.weight.zero_()
        student.weight[3, 0] = other.weight[7, 0] = math.log(1e9 * 49)
    ids, g = torch.tensor([3, 7, 20]), torch.tensor([[1.0, 0.5]]).repeat(3, 1)
    h = torch.tensor([[1.0, 0.5]]).repeat(3, 1).requires_grad_()
    logp, entropies, jsd = scores_from_hidden(h, student, ids, g, other, k=5)
    grads = torch.autograd.grad(logp.sum() + jsd.sum(), [h, student.weight])
    assert all(torch.isfinite(x).all() for x in (logp, entropies, jsd, *grads))
    exact = student.weight.detach().double().requires_grad_(), h.detach().double().requires_grad_()
    z = exact[1] @ exact[0].T
    plain = token_log_probs(z, ids).sum() + full_jsd(z, other(g).double()).sum()
    for x, y in zip(grads, torch.autograd.grad(plain, exact[::-1]), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-6)


def test_scores_from_hidden_without_gradient_or_teacher():
    student, other = head_pair()
    h, ids = torch.randn(9, 8).double().requires_grad_(), torch.randint(0, 31, (9,))
    logp, entropies, none = scores_from_hidden(h, student, ids, logits_mb=budget(4, 31, 16))
    assert none is None
    torch.testing.assert_close(entropies, entropy(student(h)).detach(), rtol=1e-12, atol=1e-14)
    params = [h, *student.parameters()]
    ours = torch.autograd.grad(logp.sum(), params)
    expected = torch.autograd.grad(token_log_probs(student(h), ids).sum(), params)
    for gradient, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        again = scores_from_hidden(h, student, ids)
    assert not again[0].requires_grad
    torch.testing.assert_close(again[0], logp.detach(), rtol=1e-12, atol=1e-14)


def test_scores_of_no_tokens_keep_the_graph():
    head, h = torch.nn.Linear(4, 9), torch.zeros(0, 4, requires_grad=True)
    ids, teacher_hidden = torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)
    logp, _, jsd = scores_from_hidden(h, head, ids, teacher_hidden, head, k=2)
    (logp.sum() + jsd.sum()).backward()
    assert logp.shape == (0,) and h.grad is not None and head.weight.grad.abs().sum() == 0


# -------------------------------------------------------------------------------- policy gradient
def test_policy_loss_by_hand():
    # A = 1: unclipped, A, clipped at 1.2. A = -1: clipped at 0.8, A, unclipped, unclipped
    ratios = [0.5, 1.0, 1.6, 0.5, 1.0, 1.6, 9.0]
    advantages = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0]]).double()
    expected = [-0.5, -1.0, -1.2, 0.8, 1.0, 1.6, 9.0]
    gradient = [-0.5, -1.0, 0.0, 0.0, 1.0, 1.6, 9.0]
    logp = torch.tensor([ratios], dtype=torch.float64).log().requires_grad_()
    old, mask = torch.zeros(1, 7).double(), torch.ones(1, 7, dtype=torch.bool)
    loss = policy_loss(logp, old, advantages, mask)
    np.testing.assert_allclose(loss.detach().numpy()[0], expected, rtol=1e-12)
    loss.sum().backward()
    np.testing.assert_allclose(logp.grad.numpy()[0], gradient, atol=1e-12)

    dual = policy_loss(logp, old, advantages, mask, dual_clip=3.0)
    assert dual.tolist()[0][:-1] == loss.tolist()[0][:-1] and dual[0, -1].item() == 3.0
    assert torch.autograd.grad(dual.sum(), logp)[0][0, -1] == 0
    narrow = policy_loss(logp, old, advantages, mask, clip_low=0.6, clip_high=0.1)
    expected = [-0.5, -1.0, -1.1, 0.5, 1.0, 1.6, 9.0]
    np.testing.assert_allclose(narrow.detach().numpy()[0], expected, rtol=1e-12)
    with pytest.raises(ValueError, match="token or sequence"):
        policy_loss(logp, old, advantages, mask, ratio="sentence")


def test_sequence_ratio_by_hand():
    """GSPO: one ratio per response, the geometric mean of its tokens' ratios, clipped as one."""
    nan = math.nan
    ratios = [[0.5, 2.0, 1.331], [1.0, 1.21, nan], [3.0, 9.0, 9.0]]
    ratios = torch.tensor(ratios, dtype=torch.float64)
    mask = ~ratios.isnan()  # the geometric means are 1.1, 1.1, 6.24
    logp = ratios.log().requires_grad_()
    advantages = torch.tensor([[1.0], [-2.0], [-1.0]]).double().expand(3, 3)
    old = torch.zeros(3, 3).double()
    settings = {"clip_high": 0.05, "dual_clip": 3.0, "ratio": "sequence"}
    loss = policy_loss(logp, old, advantages, mask, **settings)
    # clipped at 1.05; A < 0 and above the low clip; dual clip
    expected = np.repeat([[-1.05], [2.2], [3.0]], 3, axis=1)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-12)
    weighted_sum(loss, mask, 1 / (3 * mask.sum(1).double())).backward()
    gradient = [[0, 0, 0], [1.1 / 3, 1.1 / 3, 0], [0, 0, 0]]  # 2 * 1.1 / (2 tokens * 3)
    np.testing.assert_allclose(logp.grad.numpy(), gradient, rtol=1e-12)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_values_outside_the_mask_reach_neither_loss_nor_gradient(ratio):
    logp = torch.tensor([[0.1, math.nan, 1e4]], requires_grad=True)
    mask = torch.tensor([[True, False, False]])
    loss = policy_loss(logp, torch.zeros(1, 3), torch.ones(1, 3), mask, ratio=ratio)
    weighted_sum(loss, mask, torch.ones(1)).backward()
    assert torch.isfinite(logp.grad).all() and (logp.grad[0, 1:] == 0).all()
    assert logp.grad[0, 0] != 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_ratio_that_no_float_holds_leaves_the_gradient_finite(advantage, dtype):
    """exp(100) is inf in float32; the clip hides it from the loss alone."""
    logp = torch.tensor([[100.0, -100.0, 0.1]], dtype=dtype, requires_grad=True)
    old, mask = torch.zeros(1, 3, dtype=dtype), torch.ones(1, 3, dtype=torch.bool)
    advantages = torch.full((1, 3), advantage, dtype=dtype)
    loss = policy_loss(logp, old, advantages, mask) + k3_kl(logp, old)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logp.grad).all()
    by_hand = -advantage * math.exp(0.1) + 1 - math.exp(-0.1)
    assert logp.grad[0, 2].item() == pytest.approx(by_hand, rel=0.01)


# -------------------------------------------------------------------------------------- reduction
def test_weighted_sum_gives_the_three_means_by_hand():
    values = torch.tensor([[1.0, 2.0, 6.0], [4.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    lengths = mask.sum(1)
    token_mean = weighted_sum(values, mask, (1 / lengths.sum()).expand(2))
    assert token_mean.item() == 13 / 4
    assert weighted_sum(values, mask, 1 / (2 * lengths)).item() == (9 / 3 + 4) / 2
    fixed_length = weighted_sum(values, mask, torch.full((2,), 1 / (2 * 10)))
    assert fixed_length.item() == pytest.approx(13 / 20)


def test_weighted_sum_does_not_read_outside_the_mask_nor_rows_of_weight_0():
    nan, inf = math.nan, math.inf
    values = torch.tensor([[1.0, 3.0, nan], [nan, inf, 5.0], [-inf, 2.0, 7.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True], [False, True, False]])
    weights = torch.tensor([0.5, 0.0, 2.0], requires_grad=True)
    total = weighted_sum(values, mask, weights)
    total.backward()
    assert total.item() == 0.5 * (1 + 3) + 2 * 2
    expected = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    assert torch.equal(values.grad, expected)
    assert weights.grad is None  # detached


def test_weighted_sum_of_nothing_is_0_and_keeps_the_graph():
    for values in (torch.full((2, 3), math.nan), torch.zeros(0, 3)):
        values.requires_grad_()
        nothing = weighted_sum(values, torch.ones_like(values).bool(), torch.zeros(len(values)))
        nothing.backward()
        assert nothing.item() == 0 and torch.equal(values.grad, torch.zeros_like(values))


def test_weighted_sums_of_micro_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[1], [5], [2], [4], [3], [5]])
    for weights in (1 / (6 * mask.sum(1)), torch.ones(6) / mask.sum()):
        whole = weighted_sum(values, mask, weights)
        parts = zip(values.split(4), mask.split(4), weights.split(4), strict=True)
        torch.testing.assert_close(sum(weighted_sum(*part) for part in parts), whole)


# ------------------------------------------------------------- KL estimate, entropy, the whole file
def test_k3_is_unbiased_positive_and_zero_at_equality():
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    q = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
    terms = k3_kl(p.log(), q.log())
    assert (terms >= 0).all() and terms[2] == 0
    assert abs((p * terms).sum() - (p * (p / q).log()).sum()) < 1e-12  # exact expectation under p
    x = p.log().clone().requires_grad_()
    k3_kl(x, q.log()).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), (1 - q / p).numpy(), rtol=1e-12)


def test_entropy_and_log_probs():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(entropy(logits).numpy(), [1.5 * math.log(2), 0.0], atol=1e-6)
    logp = token_log_probs(logits, torch.tensor([1, 0]))
    np.testing.assert_allclose(logp.numpy(), [math.log(0.25), 0.0], atol=1e-6)
    sharper = token_log_probs(logits[:1], torch.tensor([0]), temperature=0.5)
    assert abs(sharper.exp().item() - 0.25 / 0.375) < 1e-6


def test_the_file_works_when_copied_alone(root, tmp_path):
    shutil.copy(root / "losses.py", tmp_path)
    code = """
import torch, losses
head, ids = torch.nn.Linear(3, 5), torch.tensor([0, 1])
states, teacher_states = torch.zeros(2, 3), torch.ones(2, 3)
print(losses.topk_jsd(torch.zeros(2, 5), torch.eye(5)[:2], k=2).shape)
print(losses.scores_from_hidden(states, head, ids, teacher_states, head, k=2)[2].shape)
"""
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert out.stdout.split("\n") == ["torch.Size([2])", "torch.Size([2])", ""]
