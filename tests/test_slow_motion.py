"""docs/one-step.md is what the command writes, and its sentences are true of its numbers."""

import math
import re

import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageChops, ImageStat

from plumbing.slow_motion import write_page
from plumbing.slow_motion_page import buckets

pytestmark = pytest.mark.slow
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-\d+)?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def step(folder):
    return write_page(folder)


def pieces(page):
    """The text between the numbers, without line breaks and spaces, and the numbers."""
    text = page.read_text(encoding="utf-8")
    return ["".join(part.split()) for part in NUMBER.split(text)], NUMBER.findall(text)


def agree(new, old):
    """Within 1 %; a small number has two digits, the others may differ in the fourth decimal."""
    if "e-" in old:
        return math.isclose(float(new), float(old), rel_tol=0.1)
    return math.isclose(float(new), float(old), rel_tol=0.01, abs_tol=1.5e-4)


def test_the_page_is_what_the_command_writes(folder, step):
    texts, numbers = pieces(folder / "one-step.md")
    old_texts, old_numbers = pieces(ROOT / "docs" / "one-step.md")
    assert texts == old_texts
    pairs = list(zip(numbers, old_numbers, strict=True))
    assert [pair for pair in pairs if not agree(*pair)] == []
    assert len(numbers) > 300 and "@" not in "".join(texts)


def test_the_picture_is_what_the_command_writes(folder, step):
    new, old = (Image.open(place / "one-step.png") for place in (folder, ROOT / "docs"))
    assert new.size == old.size == (336, 336)
    assert max(ImageStat.Stat(ImageChops.difference(new, old)).mean) < 1


def test_the_parts_that_are_zero_before_the_step(step):
    assert abs(step.before.parts["policy"]) < 1e-6
    assert abs(step.before.parts["kl"]) < 1e-6
    assert step.gradients["policy"].norm() > 0.1
    assert step.gradients["kl"].norm() < 1e-6
    assert step.after.parts["policy"] < 0 < step.after.parts["kl"]


def test_each_column_of_weights_adds_up_to_one(step):
    weights = torch.tensor([response.weights for response in step.group])
    lengths = torch.tensor([len(response.ids) for response in step.group])
    torch.testing.assert_close(lengths.float() @ weights, torch.ones(3))


def test_the_loss_and_its_gradient_are_the_sums_of_their_parts(step):
    config, parts = step.trainer.config, step.before.parts
    total = parts["policy"] + config.lam * parts["tutor"] + config.beta_kl * parts["kl"]
    assert step.before.loss == pytest.approx(total, rel=1e-5)
    tutor = sum(row.sum().item() for row in step.before.divergence.values()) / step.routed
    assert parts["tutor"] == pytest.approx(tutor, rel=1e-4)
    norm = sum(step.gradients.values()).norm().item()
    assert step.update["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert step.update["grad_norm"] > config.grad_clip


def test_the_divergence_by_hand_is_that_of_losses_and_grows_with_k(step):
    divergence = step.before.divergence[step.shown]
    for place in step.places:
        by_hand = buckets(step, place, step.trainer.config.jsd_k)[-1].sum().item()
        assert by_hand == pytest.approx(divergence[place].item(), rel=1e-5)
    of_k = [buckets(step, step.places[0], k)[-1].sum().item() for k in (1, 2, 20, 92)]
    assert of_k == sorted(of_k) and of_k[-1] <= math.log(2)
    assert of_k[-1] - of_k[0] < 0.001


def test_the_teacher_disagrees_at_one_word_and_the_right_response_holds_its_word(step):
    divergence = step.before.divergence[step.shown]
    assert divergence.max() > 0.99 * divergence.sum()
    place, _, answer = step.places
    wanted = step.teacher[step.shown][place].argmax().item()
    ids = step.group[step.shown].ids
    assert wanted != ids[place] == step.before.student[step.shown][place].argmax()
    right = [response.ids for response in step.group if response.correct]
    assert all(wanted in response for response in right)
    # in the box both expect the wrong sum
    assert step.texts[answer] != step.group[0].question.answer
    for model in (step.before.student, step.teacher):
        assert model[step.shown][answer].argmax() == ids[answer]
    policy, tutor = step.gradients["policy"], step.gradients["tutor"]
    assert torch.cosine_similarity(policy, tutor, dim=0) > 0.5


def test_after_the_step_the_student_is_nearer_to_the_teacher(step):
    place, n = step.places[0], step.shown
    wanted = step.teacher[n][place].argmax()
    assert step.after.student[n][place, wanted] > step.before.student[n][place, wanted] + 1
    assert step.after.divergence[n][place] < step.before.divergence[n][place]
    assert step.after.loss < step.before.loss


def test_where_the_divergence_grew_the_student_moved_to_the_right_response(step):
    n, ids = step.shown, step.group[step.shown].ids
    place = int((step.after.divergence[n] - step.before.divergence[n]).argmax())
    moved = step.after.student[n][place].exp() - step.before.student[n][place].exp()
    for response in (response for response in step.group if response.correct):
        following = response.ids[response.ids.index(ids[place - 1]) + 1]
        assert moved.argmax() == following


def test_the_first_step_of_adamw_moves_nearly_all_weights_by_the_learning_rate(step):
    pairs = zip(step.trainer.policy.parameters(), step.trainer.reference.parameters(), strict=True)
    moved = torch.cat([(new - old).detach().abs().flatten() for new, old in pairs])
    near = (moved / step.trainer.config.lr - 1).abs() < 0.1
    assert near.float().mean() > 0.9
