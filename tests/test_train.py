"""train.py: what a run leaves behind, that its gradient is the method's, and who is tutored."""

import json
import re
import shlex

import pytest
import torch
from conftest import (
    KINDS,
    ROOT,
    TINY,
    assert_close,
    flat,
    gradient,
    logged,
    make_tiny,
    plain_logits,
    read_jsonl,
    rollout,
    spy,
    write_jsonl,
)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText
from two_processes import TUTORED, make_groups, make_trainer, move_student, score, update

import train
from hints import teacher_messages
from losses import chunk_tokens, topk_jsd
from plumbing import engine
from plumbing.images import load_processor
from plumbing.memory import batch_tokens, micro_batches
from plumbing.recipes import RECIPES
from plumbing.runs import rollout_statistics
from rollout import Response, encode_prompts, response_states, student_messages
from toy import world


# -------------------------------------------------------------------------------------- a whole run
@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in. A run writes to runs/NAME below it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documented_keys():
    """Of metrics.jsonl, from the table in docs/your-model.md."""
    page = (ROOT / "docs" / "your-model.md").read_text("utf-8")
    section = page.partition("## What a step logs\n")[2].partition("\n## ")[0]
    names = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return set(re.findall(r"`(\w+)`", " ".join(names)))


def test_a_run_leaves_what_it_promises(folder, capsys):
    train.main([*TINY, "--name", "t"])
    run = folder / "runs" / "t"
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == 2
    assert config["lam"] == 10.0
    assert config["tau"] == 1.0
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert "eval_plain" in metrics[1]
    assert "eval_hinted" in metrics[2]
    assert set().union(*metrics) == documented_keys()
    rows = read_jsonl(run / "responses.jsonl")
    assert len(rows) == 2
    assert len(rows[0]["responses"]) == 4
    assert set(rows[0]["hint"]) == {"look", "ignore", "steps"}
    model = AutoModelForImageTextToText.from_pretrained(run / "model")
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert load_processor(str(run / "model")).chat_template
    out = capsys.readouterr().out
    assert "accuracy, plain prompt" in out
    assert "runs/t/" in out
    before = sorted(run.rglob("*"))
    with pytest.raises(SystemExit):  # the folder is there already
        train.main([*TINY, "--name", "t"])
    assert sorted(run.rglob("*")) == before


def test_the_student_never_reads_the_hint(folder, monkeypatch):
    """Neither while sampling nor in an evaluation that is called plain."""

    def prompts_read(model, processor, prompts, group_size, **settings):
        return group_size, [processor.tokenizer.decode(prompt.ids) for prompt in prompts]

    calls = spy(monkeypatch, engine, "sample_groups", prompts_read)
    train.main([*TINY, "--name", "t"])
    sampled = [texts for group_size, texts in calls if group_size == 4]
    evaluated = [texts for group_size, texts in calls if group_size == 1]
    assert len(sampled) == 2
    assert not any("Hint" in text for texts in sampled for text in texts)
    hinted = [any("Hint" in text for text in texts) for texts in evaluated]
    assert hinted == [False, True, False, False, True]


def write_questions(folder):
    """d.jsonl: two images, one and none; a prompt that is too long; an image that is missing."""
    Image.new("RGB", (70, 50), "red").save(folder / "a.png")
    row = {"question": "How many points ?", "answer": "7", "hint": "look at the red cell"}
    rows = [{**row, "images": ["a.png"] * count} for count in (2, 1, 0)]
    rows.append({"question": "How many points ? " + "row " * 90, "answer": "7"})
    rows.append({"question": "How many ?", "answer": "7", "image": "b.png"})
    write_jsonl(folder / "d.jsonl", rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run_from_the_path_of_each_real_class(kind, base, folder, capsys):
    """Saved with save_pretrained, loaded by path, trained, and loaded again without our code."""
    make_tiny(kind, base[1]).save_pretrained("m")
    base[1].save_pretrained("m")
    write_questions(folder)
    options = shlex.split(
        "--model m --data d.jsonl --eval-data d.jsonl --skip-bad --max-prompt 90 --name t "
        "--steps 2 --questions 3 --group-size 2 --max-new-tokens 6 --micro-tokens 200 "
        "--lam 1 --lr 0.01"
    )
    if kind == "Qwen3VL":
        options.append("--gradient-checkpointing")
    train.main(options)
    out = capsys.readouterr().out
    assert "questions: 3 from d.jsonl; 3 with a hint" in out
    assert "left out: 2 questions with a prompt above 90 tokens" in out
    # once for each file that was read
    assert out.count("left out: d.jsonl:5: field 'images': cannot read b.png") == 2
    metrics = logged(folder / "runs" / "t")
    assert metrics[1]["tutored"] == 1
    assert metrics[1]["tutor_loss"] > 0
    assert metrics[1]["sampler_gap"] < 1e-3
    trained = AutoModelForImageTextToText.from_pretrained(folder / "runs" / "t" / "model")
    assert type(trained).__name__ == f"{kind}ForConditionalGeneration"
    before = make_tiny(kind, base[1]).state_dict()
    assert any(not torch.equal(p, before[name]) for name, p in trained.state_dict().items())


@pytest.mark.parametrize("options", [["--updates", "2"], ["--lora", "4"]])
@pytest.mark.slow
def test_recomputed_activations_change_nothing(options, folder):
    """--gradient-checkpointing has no cache in training mode.

    Old log-probs, a LoRA run's reference and sampling use one.
    """
    if "--lora" in options:
        pytest.importorskip("peft")
    settings = shlex.split("--steps 5 --questions 2 --group-size 4 --eval-questions 2 --seed 1")
    settings += options
    train.main([*settings, "--name", "plain"])
    train.main([*settings, "--name", "recomputed", "--gradient-checkpointing"])
    runs = [folder / "runs" / name for name in ("plain", "recomputed")]
    for run in runs:  # a checkpoint at the last of 5 steps, also with 2 per rollout
        assert (run / "checkpoints" / "step-00000005").exists()
    plain, recomputed = (logged(run) for run in runs)
    assert len(plain) == 6
    assert sum(row["tutor_loss"] > 0 for row in plain[1:]) >= 2
    for expected, row in zip(plain, recomputed, strict=True):
        assert row == pytest.approx(expected, rel=0.02, abs=1e-3)


def test_draws_are_keyed_by_seed_and_question(folder, monkeypatch):
    keys = spy(monkeypatch, engine, "sample_groups", lambda *args, **more: more.get("keys"))
    train.main([*TINY, "--name", "t", "--seed", "3"])
    assert [of_call for of_call in keys if of_call] == [["3-0", "3-1"], ["3-2", "3-3"]]
    for row in logged(folder / "runs" / "t")[1:]:
        assert 0 < row["sampler_gap"] < 1e-3


# ------------------------------------------------------------------------------------- the gradient
def log_probs(logits, ids):
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


def token_count(responses):
    return sum(len(response.ids) for response in responses)


def plain_mean(kind, values, responses, config):
    """What values (T,), of one of the responses, contribute to the mean over all their tokens."""
    if kind == "response":
        return values.mean() / len(responses)
    if kind == "fixed":
        return values.sum() / (len(responses) * config.max_new_tokens)
    return values.sum() / token_count(responses)


def in_loss(responses):
    return [response for response in responses if response.in_loss]


def tutored_in_loss(group):
    return [response for response in in_loss(group) if response.tutored]


def plain_policy_loss(config, logp, response, groups):
    """A response's share, on policy, so that nothing is clipped."""
    ratio = torch.exp(logp - logp.detach())
    return plain_mean(config.aggregate, -ratio * response.advantage, in_loss(flat(groups)), config)


def plain_kl(config, logp, reference_logp, group, groups):
    """A response's share of the KL penalty; 0 for a group with tutoring, in the release."""
    if config.kl_on == "untutored" and any(r.tutored for r in group):
        return 0.0
    difference = reference_logp - logp
    k3 = torch.exp(difference) - 1 - difference
    return plain_mean(config.aggregate, k3, in_loss(flat(groups)), config)


def plain_tutoring(config, divergence, group, groups):
    """A tutored response's share: Eq. 11 and the mean over all questions, or one mean (release)."""
    if config.tutor_mean == "question":
        return divergence.sum() / token_count(tutored_in_loss(group)) / len(groups)
    return divergence.sum() / token_count(tutored_in_loss(flat(groups)))


def plain_loss(trainer, groups, group, response):
    """A response's share of the step's loss."""
    config, ids, banned = trainer.config, response.ids, trainer.scoring["banned"]
    reference = trainer.reference.model
    logits = plain_logits(trainer.policy, response.prompt, ids, banned)
    logp = log_probs(logits, ids)
    with torch.no_grad():
        reference_logits = plain_logits(reference, response.prompt, ids, banned)
        teacher_logits = plain_logits(reference, response.teacher_prompt, ids, banned)
    loss = plain_policy_loss(config, logp, response, groups)
    kl = plain_kl(config, logp, log_probs(reference_logits, ids), group, groups)
    loss = loss + config.beta_kl * kl
    if response.tutored:
        choice = {"divergence": config.divergence, "support": config.support}
        divergence = topk_jsd(logits, teacher_logits, config.jsd_k, **choice)
        loss = loss + config.lam * plain_tutoring(config, divergence, group, groups)
    return loss


def plain_gradient(trainer, groups):
    for group in groups:
        for response in in_loss(group):
            plain_loss(trainer, groups, group, response).backward()
    values = gradient(trainer)
    trainer.policy.zero_grad()
    return values


OTHER_CHOICES = {"divergence": "reverse_kl", "support": "student", "aggregate": "fixed"}


@pytest.mark.parametrize(
    "settings",
    [{"lam": 0.0}, RECIPES["paper"], RECIPES["release"], OTHER_CHOICES],
    ids=["grpo", "paper", "release", "others"],
)
def test_gradient_equals_the_plain_formula(settings, monkeypatch):
    """One response at a time. With lam 0: GRPO with a KL penalty, and no pass with the hint.

    Two responses are left out of the loss. One of them is all that is tutored in its group.
    """
    trainer = make_trainer(**settings)
    move_student(trainer)
    groups = make_groups(trainer, "unequal", range(4))
    groups[0][3].in_loss = groups[1][0].in_loss = False
    assert TUTORED["unequal"][1] == 1
    if trainer.config.lam == 0:
        for response in flat(groups):
            response.tutored = False
    expected = plain_gradient(trainer, groups)  # first: weigh unmarks what is left out
    prompt_lengths = spy(
        monkeypatch,
        train,
        "response_states",
        lambda model, batch: batch.prompts["input_ids"].shape[1],
    )
    score(trainer, groups)
    assert_close(gradient(trainer), expected, 1e-4)
    hinted_length = len(groups[0][0].teacher_prompt.ids)
    teacher_ran = any(length >= hinted_length for length in prompt_lengths)
    assert teacher_ran == (trainer.config.lam > 0)


def test_micro_batches_do_not_change_the_gradient(trainer):
    results = []
    for limit in (1, 300, 10**6):
        trainer.config.micro_tokens = limit
        parts = score(trainer, make_groups(trainer, "unequal", range(4)))
        results.append((gradient(trainer), parts["tutor_loss"]))
        trainer.policy.zero_grad()
    expected_gradient, expected_loss = results[0]
    assert expected_loss > 0
    for values, tutor_loss in results[1:]:
        assert_close(values, expected_gradient, 1e-4)
        assert tutor_loss == pytest.approx(expected_loss, rel=1e-4)


def test_micro_batches_stay_below_the_limit(trainer):
    responses = flat(make_groups(trainer, "unequal", range(4)))
    assert len(micro_batches(responses, 1, False)) == 16  # each is larger, and goes alone
    assert len(micro_batches(responses, 10**6, False)) == 1
    batches = micro_batches(responses, 300, False)
    assert 1 < len(batches) < 16
    assert all(batch_tokens(batch, False) <= 300 for batch in batches)
    trainer.config.micro_tokens = 300
    assert trainer.micro_batches(responses) == batches


class MeetingPlaces(TorchDispatchMode):
    """Notes how many values each index_put with accumulate adds up at one place, at most."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__.strip("_")
        assert name != "index_add"
        if name.startswith("index_put") and args[3:4] == (True,):
            places = torch.zeros(args[0].shape, dtype=torch.long)
            one = torch.tensor(1)
            self.counts.append(int(places.index_put(tuple(args[1]), one, accumulate=True).max()))
        return op(*args, **(kwargs or {}))


def test_nothing_in_a_step_adds_up_in_an_order_of_chance(trainer):
    """index_put with accumulate is the backward of x[rows].

    It adds by atomics on a CPU with several threads, as index_add does on a GPU. Where equal places
    met, two runs of the default on two threads differed after one step.
    """
    with MeetingPlaces() as meeting:
        score(trainer, make_groups(trainer, "unequal", range(4)))
    assert max(meeting.counts) == 1


def test_logits_mb_reaches_the_head_and_does_not_change_the_gradient(trainer, monkeypatch):
    score(trainer, make_groups(trainer, "unequal", range(2)))
    small = make_trainer(logits_mb=0.01)
    budgets = spy(monkeypatch, train, "scores_from_hidden", lambda *args, **more: more["logits_mb"])
    score(small, make_groups(small, "unequal", range(2)))
    assert set(budgets) == {0.01}
    assert chunk_tokens(100, 0.01) == 13
    assert_close(gradient(small), gradient(trainer), 1e-4)


def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(trainer):
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}

    def unchanged():
        named = trainer.policy.named_parameters()
        return all(torch.equal(p, before[name]) for name, p in named)

    trained = next(p for p in trainer.policy.parameters() if p.requires_grad)
    handle = trained.register_hook(lambda grad: grad * float("nan"))
    groups = make_groups(trainer, "one", range(2))
    assert update(trainer, groups)["skipped_steps"] == 1
    assert unchanged()
    handle.remove()
    assert update(trainer, groups)["skipped_steps"] == 1
    assert not unchanged()


# ---------------------------------------------------------------------------------------- the image
def test_the_hinted_prompt_has_the_same_image(trainer):
    for response in flat(make_groups(trainer, "one", range(2))):
        plain, hinted = response.prompt, response.teacher_prompt
        assert torch.equal(hinted.pixels, plain.pixels)
        assert hinted.types.sum() == plain.types.sum() == 16
        assert len(hinted.ids) > len(plain.ids)


def encode_again(trainer, response):
    """Give the response new prompts, with patches in the place of features."""
    question = response.question

    def encoded(messages):
        [prompt] = encode_prompts(trainer.processor, [question], [messages(question)])
        return prompt

    response.prompt = encoded(student_messages)
    if response.teacher_prompt:
        response.teacher_prompt = encoded(teacher_messages)


@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_tower_sees_each_image_once_per_rollout(trained):
    """And the loss is the one that patches give."""
    trainer = make_trainer(freeze_vision=not trained, questions=3, group_size=3, max_new_tokens=12)
    patches = []
    for model in (trainer.policy, trainer.reference.model):
        model.model.visual.blocks[0].register_forward_hook(
            lambda module, args, out: patches.append(len(args[0]))
        )
    responses = flat(rollout(trainer, world.puzzles("tune", 3)))
    assert any(response.tutored for response in responses)
    parts = trainer.score(responses)
    assert parts["tutor_loss"] > 0
    if trained:
        assert sum(patches) > 64 * 6
    else:
        assert patches == [64] * 3
    for response in responses:
        encode_again(trainer, response)
    assert trainer.score(responses) == pytest.approx(parts, rel=1e-3, abs=1e-5)


def test_the_teacher_looks_at_the_image(trainer):
    responses = flat(make_groups(trainer, "one", range(1)))
    batch = trainer.collate(responses, prompts=[r.teacher_prompt for r in responses])
    states = response_states(trainer.reference.model, batch)
    batch.prompts["pixel_values"] = batch.prompts["pixel_values"].flip(0)
    assert (response_states(trainer.reference.model, batch) - states).abs().max() > 1e-2


# -------------------------------------------------------------------- rollouts and what is assigned
CORRECT = [[0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]


def graded_groups(trainer):
    """Four groups with the verdicts of CORRECT. The last question has no hint."""
    questions = world.puzzles("tune", 4)
    questions[3].hint = None
    groups = []
    for prompt, verdicts in zip(trainer.read(questions), CORRECT, strict=True):
        group = [Response(prompt, [9, 10], "", truncated=False) for _ in verdicts]
        for response, verdict in zip(group, verdicts, strict=True):
            response.correct, response.reward = bool(verdict), float(verdict)
        groups.append(group)
    return groups


def marked(groups, name):
    """Which responses have the flag, as lists."""
    return [[getattr(response, name) for response in group] for group in groups]


ROUTED = [[True] * 4, [False, True, False, False], [False] * 4, [False] * 4]


def test_the_kl_penalty_is_on_all_responses(trainer):
    """On right and on tutored ones as well (Eq. 3)."""
    groups = graded_groups(trainer)
    trainer.assign(groups)
    assert marked(groups, "tutored") == ROUTED
    assert marked(groups, "penalised") == [[True] * 4] * 4


def test_the_kl_penalty_is_where_no_response_of_the_group_is_tutored(trainer):
    """With kl_on untutored, as in the release."""
    trainer.config.kl_on = "untutored"
    groups = graded_groups(trainer)
    trainer.assign(groups)
    assert marked(groups, "tutored") == ROUTED
    assert marked(groups, "penalised") == [[False] * 4, [False] * 4, [True] * 4, [True] * 4]


@pytest.mark.parametrize("kl_on", ["all", "untutored"])
def test_a_response_that_is_left_out_is_in_no_loss(trainer, kl_on):
    """And its group stays one with tutoring, where it was the only one to be tutored."""
    trainer.config.kl_on, trainer.config.mask_truncated = kl_on, True
    groups = graded_groups(trainer)
    left_out = [groups[0][0], groups[1][1], groups[3][0]]
    for response in left_out:
        response.truncated = True
    trainer.assign(groups)
    assert [r for r in flat(groups) if not r.in_loss] == left_out
    assert marked(groups, "tutored") == [[False, True, True, True], *[[False] * 4] * 3]
    in_group_1 = [True, False, True, True] if kl_on == "all" else [False] * 4
    in_group_0 = [False, True, True, True] if kl_on == "all" else [False] * 4
    rows = [in_group_0, in_group_1, [True] * 4, [False, True, True, True]]
    assert marked(groups, "penalised") == rows
    assert all(response.weights == (0, 0, 0) for response in left_out)


def test_without_lam_nothing_is_tutored_and_the_kl_penalty_is_everywhere(trainer):
    trainer.config.lam, trainer.config.kl_on = 0.0, "untutored"
    groups = graded_groups(trainer)
    trainer.assign(groups)
    assert not any(response.tutored for response in flat(groups))
    assert all(response.penalised for response in flat(groups))
    assert all(response.teacher_prompt is None for response in flat(groups))


@pytest.mark.parametrize("beta_kl", [0.0, 0.1])
def test_without_beta_kl_the_reference_does_not_run(trainer, monkeypatch, beta_kl):
    """Nothing is tutored here, so the reference could run for the KL penalty alone."""
    trainer.config.lam, trainer.config.beta_kl = 0.0, beta_kl
    groups = graded_groups(trainer)
    trainer.assign(groups)
    assert {response.penalised for response in flat(groups)} == {beta_kl > 0}
    passes = spy(monkeypatch, trainer, "ask_reference", lambda run: run)
    trainer.score(flat(groups))
    assert bool(passes) == (beta_kl > 0)


def test_advantages_are_scaled_or_not(trainer):
    """Group 1 of CORRECT: mean 3/4, unbiased standard deviation 1/2."""
    for scale, expected in ((True, [0.5, -1.5, 0.5, 0.5]), (False, [0.25, -0.75, 0.25, 0.25])):
        trainer.config.scale_advantages = scale
        groups = graded_groups(trainer)
        trainer.assign(groups)
        assert [r.advantage for r in groups[1]] == pytest.approx(expected, rel=1e-5)


def test_weights_are_those_of_an_optimizer_step(trainer):
    """Two steps of two questions: in each the weights of the policy loss add up to 1.

    Those of the tutoring loss do in the first step alone, as nothing is tutored in the second one.
    """
    trainer.config.questions = 2
    groups = graded_groups(trainer)
    trainer.assign(groups)
    for groups_of_step, tutored in ((groups[:2], 1), (groups[2:], 0)):
        weights = torch.tensor([r.weights for r in flat(groups_of_step)], dtype=torch.float64)
        sums = 2 * weights.sum(0)  # each response has 2 tokens
        assert sums.tolist() == pytest.approx([1, 1, tutored])


def test_ratio_is_one_on_the_first_pass_and_not_after():
    trainer = make_trainer(
        updates=2, questions=2, group_size=4, lr=1e-2, max_new_tokens=40, warmup=0
    )
    torch.manual_seed(0)
    groups = rollout(trainer, world.puzzles("tune", 4))
    for response in flat(groups):
        assert len(response.old_logp) == len(response.ids)
    first_pass = trainer.score(flat(groups[:2]))
    assert first_pass["ratio_max"] < 1e-4
    trainer.step()
    assert trainer.score(flat(groups[2:]))["ratio_max"] > 1e-3


def test_truncated_responses_can_be_left_out_of_the_loss():
    """Their step is the step of the others alone, and the log counts who is tutored in it.

    Here each of the others is a group by itself, so the tutoring loss has one mean over all.
    """
    masked = make_trainer(mask_truncated=True, group_size=6, max_new_tokens=24, tutor_mean="step")
    trainer = make_trainer(tutor_mean="step")
    groups = rollout(masked, world.puzzles("tune", 6))
    responses = flat(groups)
    left_out = [response for response in responses if not response.in_loss]
    kept = [response for response in responses if response.in_loss]
    assert 0 < len(left_out) < 36
    assert [r.in_loss for r in responses] == [not r.truncated for r in responses]
    assert not any(response.tutored or response.penalised for response in left_out)
    assert any(response.tutored for response in kept)
    row = rollout_statistics(groups, masked.config)
    assert row["truncated"] == len(left_out) / 36
    assert row["tutored"] == pytest.approx(sum(response.tutored for response in kept) / 36)
    parts = masked.score(responses)
    expected = score(trainer, [[response] for response in kept])
    assert_close(gradient(masked), gradient(trainer), 1e-4)
    assert parts == pytest.approx(expected, rel=1e-3, abs=1e-6)
    masked.policy.zero_grad()
    assert score(masked, [[response] for response in left_out])["policy_loss"] == 0
    assert all((grad == 0).all() for grad in gradient(masked).values())


def test_truncated_responses_stay_in_their_group_s_advantages():
    questions = world.puzzles("tune", 6)
    short = dict(group_size=6, max_new_tokens=24)
    masked = flat(rollout(make_trainer(mask_truncated=True, **short), questions))
    unmasked = flat(rollout(make_trainer(**short), questions))
    assert any(not response.in_loss for response in masked)
    assert all(response.in_loss for response in unmasked)
    assert [r.advantage for r in masked] == [r.advantage for r in unmasked]


def test_routing_in_a_rollout(trainer):
    trainer.config.group_size, trainer.config.max_new_tokens = 6, 40
    trainer.config.kl_on = "untutored"
    torch.manual_seed(1)
    questions = world.puzzles("tune", 6)
    questions[0].hint = None
    groups = rollout(trainer, questions)
    for n, group in enumerate(groups):
        failed = [not response.correct for response in group]
        tutored_group = n > 0 and any(failed)
        assert [r.tutored for r in group] == [tutored_group and f for f in failed]
        assert all(response.penalised == (not tutored_group) for response in group)
        assert all((r.teacher_prompt is not None) == tutored_group for r in group)
        if tutored_group:
            decode = trainer.processor.tokenizer.decode
            assert "Hint" in decode(group[0].teacher_prompt.ids)
            assert "Hint" not in decode(group[0].prompt.ids)
    share = sum(response.tutored for response in flat(groups)) / 36
    assert share > 0
    assert rollout_statistics(groups, trainer.config)["tutored"] == pytest.approx(share)


@pytest.mark.parametrize("context", ["hint", "answer", "solution", "none"])
def test_the_teacher_reads_the_chosen_context(trainer, context):
    """And a question that lacks it is not tutored, which the log counts.

    With "none" the teacher is the student: nothing pulls.
    """
    trainer.config.max_new_tokens, trainer.config.teacher_context = 30, context
    questions = world.puzzles("tune", 3)
    questions[2].hint = questions[2].solution = None
    groups = rollout(trainer, questions)
    lacking = context in ("hint", "solution")
    untaught = rollout_statistics(groups, trainer.config)["untaught"]
    assert untaught == (1 / 3 if lacking else 0)
    assert any(response.tutored for response in groups[2]) == (not lacking)
    tutored = next(response for response in flat(groups) if response.tutored)
    text = trainer.processor.tokenizer.decode(tutored.teacher_prompt.ids)
    assert ("Hint" in text) == (context == "hint")
    assert ("The answer is" in text) == (context == "answer")
    tutor_loss = trainer.score(flat(groups))["tutor_loss"]
    if context == "none":
        assert abs(tutor_loss) < 1e-6
    else:
        # the embedded model has learnt that a told answer changes little
        assert tutor_loss > (1e-5 if context == "answer" else 1e-3)


# --------------------------------------------------------------------------------------- evaluation
def test_evaluation_counts_every_question_once(trainer):
    trainer.config.max_new_tokens, trainer.config.sample_mb = 40, 1  # several batches
    questions = world.puzzles("tune", 10)
    plain = trainer.evaluate(questions)
    hinted = trainer.evaluate(questions, teacher_messages)
    assert plain["questions"] == hinted["questions"] == 10
    assert hinted["accuracy"] > plain["accuracy"]
    questions[0].hint = None
    assert trainer.evaluate(questions, teacher_messages)["questions"] == 9


def test_without_hints_of_held_out_questions_there_is_no_accuracy_with_them(folder, capsys):
    """Not 0 %, which would read as a failure."""
    write_jsonl(folder / "d.jsonl", [{"question": "How many points ?", "answer": "7"}] * 2)
    train.main([*TINY, "--name", "t", "--eval-data", "d.jsonl"])
    assert re.search(r"accuracy, with the hint +- +- %", capsys.readouterr().out)
    assert all("eval_hinted" not in row for row in logged(folder / "runs" / "t"))


# ----------------------------------------------------------------------------------------- bfloat16
@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_first_ratio_is_1_and_the_kl_penalty_starts_at_0(precision, recompute, any_precision):
    """Old log-probs are scored as the update scores; student and reference compute alike."""
    settings = {"precision": precision, "gradient_checkpointing": recompute}
    trainer = make_trainer(**settings, questions=2, updates=2, group_size=4, max_new_tokens=40)
    groups = rollout(trainer, world.puzzles("tune", 4))
    for of_step in (groups[:2], groups[2:]):
        assert any(response.tutored for response in flat(of_step))
        parts = trainer.score(flat(of_step))
        trainer.optimizer.zero_grad()
        assert parts["ratio_max"] < 2e-6
        # recomputed, the student runs whole sequences, and the reference goes on from a cache
        assert parts["kl"] < (1e-4 if recompute and precision == "bf16" else 1e-11)
