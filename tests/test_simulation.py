"""bench/simulation.py counts the steps that the real slots take. No timing here."""

import sys

import pytest
from conftest import ROOT, make_tiny, spy
from test_rollout import student_prompts

from plumbing.decoding import PACES, Slots
from plumbing.memory import sequence_bytes
from rollout import sample_groups
from toy import world

sys.path.insert(0, str(ROOT / "bench"))
import bench_rollout  # noqa: E402
import simulation  # noqa: E402
from simulation import lock_step, refilled, shrinking  # noqa: E402

LIMIT, GROUP = 40, 3
LENGTHS = [3, 9, 1, 5, 5, 2]


CPU = PACES["cpu"]
UNSHRUNK = CPU._replace(shrinks=False)
LATE = UNSHRUNK._replace(steps=8, late=True)  # as on a GPU


@pytest.fixture(scope="module")
def model(base):
    """Random weights, and a tenth of the tokens end a response: lengths are spread."""
    processor = base[1]
    model = make_tiny("Qwen2VL", processor)
    model.generation_config.eos_token_id = list(range(9, 90, 10))
    return model, processor


def prompts_of_one_length(processor):
    prompts = student_prompts(processor, world.puzzles("tune", 24))
    return [prompt for prompt in prompts if len(prompt.ids) == len(prompts[0].ids)]


def rolled_out(model, monkeypatch, pace, slots):
    """Lengths in the order in which responses begin, and the slot steps at this pace."""
    monkeypatch.setitem(PACES, "cpu", pace)
    prompts = prompts_of_one_length(model[1])
    sample_mb = (slots + 0.5) * sequence_bytes(model[0], len(prompts[0].ids) + LIMIT) / 2**20
    looks = []
    settings = {"max_new_tokens": LIMIT, "sample_mb": sample_mb, "watch": looks.append}
    groups = sample_groups(*model, prompts, GROUP, **settings)
    lengths = [len(response.ids) for group in groups for response in group]
    return lengths, sum(look.slot_steps for look in looks)


@pytest.mark.parametrize("slots", [3, 5])
@pytest.mark.parametrize(
    "pace, settings",
    [
        (UNSHRUNK, {"look": 1, "behind": 0}),
        (CPU, {"look": 1, "behind": 0, "shrinks": True}),
        (LATE, {"look": 8, "behind": 1}),
    ],
)
def test_the_real_slots_take_as_many_steps(model, monkeypatch, slots, pace, settings):
    lengths, slot_steps = rolled_out(model, monkeypatch, pace, slots)
    assert len(set(lengths)) > 2
    assert len(lengths) > 2 * slots
    counted = refilled(lengths, slots, **settings)
    assert counted.used == sum(lengths)
    assert counted.computed == slot_steps


def test_the_real_slots_read_as_many_places(model, monkeypatch):
    windows = spy(monkeypatch, Slots, "step", lambda slots, window: window)
    lengths, _ = rolled_out(model, monkeypatch, UNSHRUNK, 3)
    prompt = len(prompts_of_one_length(model[1])[0].ids)
    counted = refilled(lengths, 3, look=1, behind=0, prompt=prompt, limit=LIMIT, bucket=1)
    assert counted.read == sum(windows)
    assert counted.steps == len(windows)


def test_rounds_wait_for_their_longest_response():
    """Two rounds of four slots, of 9 and 5 steps; the second has two responses."""
    counted = lock_step(LENGTHS, 4)
    assert counted.used == sum(LENGTHS)
    assert (counted.steps, counted.computed, counted.reserved) == (14, 4 * 9 + 2 * 5, 4 * 14)


def test_rows_that_ended_leave_a_shrinking_round_once_they_are_a_quarter():
    """Of nine rows three must have ended; then two of six, two of four, and one of two."""
    counted = shrinking([1, 2, 3, 4, 5, 6, 7, 8, 9], 9)
    assert counted.computed == 9 * 3 + 6 * 2 + 4 * 1 + 3 * 1 + 2 * 1 + 1 * 1
    assert counted.reserved == 9 * 9


def test_a_slot_that_nobody_waits_for_is_paid_until_the_end():
    """Responses of 10 and 1 begin; the third begins at the look that shows the first end."""
    counted = refilled([10, 1, 7], 2, look=4, behind=1)
    # 10: three looks and one more; 1: one and one more, then 7: two and one more
    assert counted.steps == 4 * max(4, 2 + 3)
    assert (counted.used, counted.reserved) == (18, 2 * counted.steps)


def test_drawn_lengths_have_their_mean_and_their_cut():
    [lengths] = [sum(simulation.rollouts(simulation.log_normal(1000), 64), [])]
    assert sum(lengths) / len(lengths) == pytest.approx(1000, rel=0.05)
    assert max(lengths) <= simulation.LIMIT


def test_measured_lengths_are_drawn_and_cut(tmp_path):
    (tmp_path / "lengths").write_text("5 7\n9000\n")
    drawn = simulation.rollouts(simulation.measured(str(tmp_path / "lengths")), 4)
    assert set(sum(drawn, [])) == {5, 7, simulation.LIMIT}


def test_more_slots_never_make_a_step_faster_or_a_token_slower_than_alone():
    """The prediction's parts: none shrinks with the slots, and none is negative."""
    steps = [simulation.step_seconds(slots, 2000.0) for slots in (8, 64, 256)]
    for few, many in zip(steps, steps[1:], strict=False):
        assert all(0 < few[part] <= many[part] for part in ("weights", "logits", "kernels"))
        assert sum(few.values()) < sum(many.values())


def test_the_contender_that_is_measured_gives_the_same_tokens_with_few_slots():
    model, special = bench_rollout.make_model("tiny")
    prompts = bench_rollout.make_prompts("tiny", special, model.dtype, questions=3)
    expected = bench_rollout.ours(model, prompts, special)(4)
    assert [len(ids) for ids in expected] == [4] * 3 * bench_rollout.GROUP
    assert len(set(map(tuple, expected))) > 3
    assert bench_rollout.ours(model, prompts, special, count=5)(4) == expected
