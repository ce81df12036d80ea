"""losses.py against an independent float64 reference in probability space, and at the places where such losses break."""
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from losses import (entropy, full_jsd, head_scores, k3_kl, masked_mean, policy_loss, token_log_probs, topk_jsd)


# ------------------------------------------------------------------------------------ the reference: numpy, probabilities, sets
def np_probs(logits, temperature=1.0):
    z = np.asarray(logits, dtype=np.float64) / temperature
    e = np.exp(z - z.max())
    return e / e.sum()


def np_jsd(p, q):
    total = 0.0
    for a, b in zip(p, q):
        m = (a + b) / 2
        total += (0.5 * a * math.log(a / m) if a > 0 else 0.0) + (0.5 * b * math.log(b / m) if b > 0 else 0.0)
    return total


def np_topk_jsd(student, teacher, k, temperature=1.0):
    p, q = np_probs(student, temperature), np_probs(teacher, temperature)
    support = set(np.argsort(-p)[:k].tolist()) | set(np.argsort(-q)[:k].tolist())
    rest = [i for i in range(len(p)) if i not in support]
    order = sorted(support)
    return np_jsd([*p[order], p[rest].sum()], [*q[order], q[rest].sum()])


def pair(n, vocab, seed=0, scale=2.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(n, vocab, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))


# -------------------------------------------------------------------------------------------------------------- divergences
@pytest.mark.parametrize("vocab,k,temperature", [(5, 1, 1.0), (5, 3, 0.7), (40, 5, 1.0), (40, 17, 2.0), (300, 100, 1.0), (7, 7, 1.0)])
def test_topk_jsd_equals_the_reference(vocab, k, temperature):
    s, t = pair(6, vocab, seed=vocab + k)
    ours = topk_jsd(s, t, k, temperature)
    expected = [np_topk_jsd(a, b, k, temperature) for a, b in zip(s.numpy(), t.numpy())]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(full_jsd(s, t, temperature).numpy(),
                               [np_jsd(np_probs(a, temperature), np_probs(b, temperature)) for a, b in zip(s.numpy(), t.numpy())], rtol=1e-10)


def test_bounds_symmetry_and_growth_in_k():
    s, t = pair(50, 60, seed=1, scale=4.0)
    full = full_jsd(s, t)
    previous = torch.zeros(50, dtype=torch.float64)
    for k in (1, 2, 5, 10, 30, 59, 60, 100):
        d = topk_jsd(s, t, k)
        assert (d >= 0).all() and (d <= math.log(2)).all() and (d <= full + 1e-12).all()
        assert (d >= previous - 1e-12).all()            # a larger support refines the partition: data-processing inequality
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
    """Re-derived from what the released code does: the weight p is detached, the mixture m is not."""
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
    """Mass 1 - 1e-9 on one token, the other's on another: a clamped tail would lose its gradient here."""
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
    expected = [np_topk_jsd(a, b, 6) for a, b in zip(s.double().numpy(), t.double().numpy())]
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
    np.testing.assert_allclose(d.numpy(), [np_topk_jsd(a, b, 20) for a, b in zip(s.double().numpy(), t.double().numpy())], rtol=1e-4)


def test_bad_arguments():
    with pytest.raises(ValueError, match="k >= 1"):
        topk_jsd(*pair(1, 4), k=0)
    with pytest.raises(ValueError, match="differ in shape"):
        topk_jsd(torch.zeros(2, 4), torch.zeros(2, 5))


# ------------------------------------------------------------------------------------------------------------- chunked head
@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_head_scores_equals_the_plain_losses(chunk, bias):
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(8, 31, bias=bias).double(), torch.nn.Linear(6, 31, bias=False).double()
    h, g, ids = torch.randn(23, 8).double().requires_grad_(), torch.randn(23, 6).double(), torch.randint(3, 31, (23,))
    banned, weights = torch.tensor([0, 2]), torch.randn(2, 23).double()

    def gradients(logp, jsd):
        params = [h, *student.parameters()]
        return torch.autograd.grad((weights[0] * logp + weights[1] * jsd).sum(), params)
    logits, teacher_logits = student(h).clone(), teacher(g).clone()
    logits[:, banned] = -math.inf
    teacher_logits[:, banned] = -math.inf
    plain = token_log_probs(logits, ids, 0.8), entropy(logits, 0.8), topk_jsd(logits, teacher_logits, 5, 0.8)
    expected = gradients(plain[0], plain[2])
    chunked = head_scores(h, student, ids, g, teacher, k=5, temperature=0.8, banned=banned, chunk=chunk)
    for ours, reference in zip(chunked, plain):
        torch.testing.assert_close(ours, reference.detach() if not ours.requires_grad else reference, rtol=1e-12, atol=1e-14)
    for ours, reference in zip(gradients(chunked[0], chunked[2]), expected):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-13)
    assert all(p.grad is None for p in teacher.parameters())
    assert head_scores(h, student, ids, k=5, chunk=chunk)[2] is None


def test_head_scores_of_no_tokens_keeps_the_graph():
    head, h = torch.nn.Linear(4, 9), torch.zeros(0, 4, requires_grad=True)
    logp, _, jsd = head_scores(h, head, torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), head, k=2)
    (logp.sum() + jsd.sum()).backward()
    assert logp.shape == (0,) and h.grad is not None and head.weight.grad.abs().sum() == 0


# ---------------------------------------------------------------------------------------------------------- policy gradient
def test_policy_loss_by_hand():
    ratio, a = [0.5, 1.0, 1.6, 0.5, 1.0, 1.6, 9.0], [1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0]
    #            unclipped  A      clipped at 1.3 | clipped at 0.8, A, unclipped, dual clip at 3
    expected = [-0.5, -1.0, -1.3, 0.8, 1.0, 1.6, 3.0]
    logp = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    loss = policy_loss(logp, torch.zeros(7).double(), torch.tensor(a).double())
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-12)
    loss.sum().backward()
    np.testing.assert_allclose(logp.grad.numpy(), [-0.5, -1.0, 0.0, 0.0, 1.0, 1.6, 0.0], atol=1e-12)
    free = policy_loss(logp, torch.zeros(7).double(), torch.tensor(a).double(), dual_clip=None)
    assert abs(free[-1].item() - 9.0) < 1e-9


def test_k3_is_unbiased_positive_and_zero_at_equality():
    p, q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
    terms = k3_kl(p.log(), q.log())
    assert (terms >= 0).all() and terms[2] == 0
    assert abs((p * terms).sum() - (p * (p / q).log()).sum()) < 1e-12          # exact expectation under p
    x = p.log().clone().requires_grad_()
    k3_kl(x, q.log()).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), (1 - q / p).numpy(), rtol=1e-12)


def test_entropy_and_log_probs():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(entropy(logits).numpy(), [1.5 * math.log(2), 0.0], atol=1e-6)
    np.testing.assert_allclose(token_log_probs(logits, torch.tensor([1, 0])).numpy(), [math.log(0.25), 0.0], atol=1e-6)
    assert abs(token_log_probs(logits[:1], torch.tensor([0]), temperature=0.5).exp().item() - 0.25 / 0.375) < 1e-6


def test_masked_mean():
    x = torch.tensor([1.0, 2.0, math.nan], requires_grad=True)
    assert masked_mean(x, torch.tensor([True, True, False])).item() == 1.5
    assert masked_mean(x, torch.tensor([True, True, False]), 6).item() == 0.5
    empty = masked_mean(x, torch.zeros(3, dtype=torch.bool))
    empty.backward()
    assert empty.item() == 0 and torch.equal(x.grad, torch.zeros(3))


def test_the_file_works_when_copied_alone(root, tmp_path):
    shutil.copy(root / "losses.py", tmp_path)
    code = "import torch, losses; print(losses.topk_jsd(torch.zeros(2, 5), torch.eye(5)[:2], k=2).shape)"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "torch.Size([2])"
