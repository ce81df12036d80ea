"""train.py: what it refuses, what a run leaves behind, and that its gradient is the method's."""

import json

import pytest
import torch
from conftest import TINY, assert_close, gradient, logged, make_tiny
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText
from two_processes import make_trainer, make_work

import train
from losses import chunk_tokens, topk_jsd
from plumbing import models
from plumbing.images import load_processor
from ptdpo import PTDPOConfig
from rollout import response_states
from toy import world

# ------------------------------------------------------------------------------------------------------------------ a whole run


def test_a_run_leaves_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        train,
        "sample_groups",
        lambda model, processor, samples, prompts, n, **kw: (
            seen.append((n, [processor.tokenizer.decode(p.ids) for p in prompts])),
            REAL_SAMPLE(model, processor, samples, prompts, n, **kw),
        )[1],
    )
    train.main([*TINY, "--name", "t"])
    run = tmp_path / "runs" / "t"
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == 2 and config["lam"] == 10.0 and config["tau"] == 1.0
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (
        [m["step"] for m in metrics] == [0, 1, 2]
        and "eval_plain" in metrics[1]
        and "eval_hinted" in metrics[2]
    )
    assert {
        "reward",
        "accuracy",
        "entropy",
        "all_failed",
        "tutor_loss",
        "kl",
        "grad_norm",
        "ratio_max",
        "truncated",
    } <= set(metrics[1])
    rows = [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]
    assert (
        len(rows) == 2
        and len(rows[0]["responses"]) == 4
        and set(rows[0]["hint"]) == {"look", "ignore", "steps"}
    )
    # the student never reads the hint: neither while sampling nor in an evaluation that is called plain
    assert all("Hint" not in text for n, texts in seen if n == 4 for text in texts)
    assert [any("Hint" in t for t in texts) for n, texts in seen if n == 1] == [
        False,
        True,
        False,
        False,
        True,
    ]
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(run / "model"),
        load_processor(str(run / "model")),
    )
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration" and processor.chat_template
    out = capsys.readouterr().out
    assert "accuracy, plain prompt" in out and "runs/t/" in out
    before = sorted(run.rglob("*"))
    with pytest.raises(SystemExit):
        train.main([*TINY, "--name", "t"])
    assert sorted(run.rglob("*")) == before


REAL_SAMPLE, REAL_STATES = train.sample_groups, models.response_states


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_a_whole_run_from_the_path_of_each_real_class(kind, base, tmp_path, monkeypatch, capsys):
    """Saved with save_pretrained, loaded by path, with questions that have two images, one and none, trained, and loaded again without our code."""
    monkeypatch.chdir(tmp_path)
    make_tiny(kind, base[1]).save_pretrained(tmp_path / "m")
    base[1].save_pretrained(tmp_path / "m")
    Image.new("RGB", (70, 50), "red").save(tmp_path / "a.png")
    rows = [
        {
            "question": "How many points ?",
            "answer": "7",
            "images": ["a.png"] * n,
            "hint": "look at the red cell",
        }
        for n in (2, 1, 0)
    ]
    rows += [
        {"question": "How many points ? " + "row " * 90, "answer": "7"},
        {"question": "How many ?", "answer": "7", "image": "b.png"},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train.main(
        [
            "--model",
            "m",
            "--data",
            "d.jsonl",
            "--eval-data",
            "d.jsonl",
            "--steps",
            "2",
            "--questions",
            "3",
            "--group-size",
            "2",
            "--max-new-tokens",
            "6",
            "--name",
            "t",
            "--lam",
            "1",
            "--lr",
            "0.01",
            "--max-prompt",
            "90",
            "--skip-bad",
            "--micro-tokens",
            "200",
            *(["--gradient-checkpointing"] if kind == "Qwen3VL" else []),
        ]
    )
    out = capsys.readouterr().out
    assert (
        "questions: 3 from d.jsonl; 3 with a hint" in out
        and "left out: 2 questions with a prompt above 90 tokens" in out
    )
    assert (
        out.count("left out: d.jsonl:5: field 'images': cannot read b.png") == 2
    )  # once for each file that was read
    metrics = logged(tmp_path / "runs" / "t")
    assert (
        metrics[1]["tutored"] == 1
        and metrics[1]["tutor_loss"] > 0
        and metrics[1]["sampler_gap"] < 1e-3
    )
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "runs" / "t" / "model")
    assert type(trained).__name__ == f"{kind}ForConditionalGeneration"
    old = make_tiny(kind, base[1]).state_dict()
    assert any(not torch.equal(p, old[name]) for name, p in trained.state_dict().items())


@pytest.mark.parametrize("options", [["--updates", "2"], ["--lora", "4"]])
def test_recomputed_activations_change_nothing(options, tmp_path, monkeypatch):
    """--gradient-checkpointing has no cache in training mode, while old log-probs, a LoRA run's reference and sampling use one."""
    monkeypatch.chdir(tmp_path)
    if "--lora" in options:
        pytest.importorskip("peft")
    for name, more in (("plain", []), ("less", ["--gradient-checkpointing"])):
        train.main(
            [
                "--steps",
                "5",
                "--questions",
                "2",
                "--group-size",
                "4",
                "--eval-questions",
                "2",
                "--seed",
                "1",
                "--name",
                name,
                *options,
                *more,
            ]
        )
        assert (
            tmp_path / "runs" / name / "checkpoints" / "step-00000005"
        ).exists()  # the last of 5 steps, also with 2 a rollout
    rows = [logged(tmp_path / "runs" / name) for name in ("plain", "less")]
    assert sum(row["tutor_loss"] > 0 for row in rows[0][1:]) >= 2 and len(rows[0]) == 6
    for a, b in zip(*rows):
        assert a.keys() == b.keys() and all(
            a[key] == pytest.approx(b[key], rel=0.02, abs=1e-3) for key in a
        ), (a, b)


# ---------------------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize(
    "lam,options",
    [
        (0.0, {}),
        (2.0, {}),
        (2.0, dict(divergence="reverse_kl", support="student", aggregate="fixed")),
    ],
)
def test_gradient_equals_the_plain_formula(trainer, lam, options, monkeypatch):
    """One response at a time, whole-vocabulary logits, no padding, no chunks. With lam 0: GRPO with a KL penalty, and no hinted pass."""
    trainer.method = PTDPOConfig(lam=lam, beta_kl=0.1, jsd_k=7, **options)
    work = make_work(trainer, "unequal", range(4))
    if lam == 0:
        for w in work:
            w.tutored, w.kl = False, True
    calls = []
    for module in (train, models):
        monkeypatch.setattr(
            module,
            "response_states",
            lambda model, batch: (
                calls.append(batch.prompts["input_ids"].shape[1]),
                REAL_STATES(model, batch),
            )[1],
        )
    trainer.accumulate(work)
    ours = gradient(trainer)
    trainer.policy.zero_grad()

    def logits(model, prompt, ids):
        n, row = len(ids), torch.cat([prompt.ids, torch.tensor(ids)])[None]
        types = torch.cat([prompt.types, torch.zeros(n, dtype=torch.long)])[None]
        z = model(
            input_ids=row,
            mm_token_type_ids=types,
            pixel_values=prompt.pixels,
            image_grid_thw=prompt.grid,
        ).logits[0, -n - 1 : -1]
        z[:, trainer.settings["banned"]] = -torch.inf
        return z

    n_all = sum(len(w.rollout.ids) for w in work)
    n_tutor, n_kl = (
        sum(len(w.rollout.ids) for w in work if getattr(w, name)) for name in ("tutored", "kl")
    )
    for w in work:
        ids = torch.tensor(w.rollout.ids)
        z = logits(trainer.policy, w.prompt, w.rollout.ids)
        logp = z.log_softmax(-1)[torch.arange(len(ids)), ids]
        # on policy: nothing is clipped
        loss = -(torch.exp(logp - logp.detach()) * w.advantage).sum() / (
            len(work) * trainer.config.max_new_tokens if options else n_all
        )
        with torch.no_grad():
            reference = logits(trainer.reference.model, w.prompt, w.rollout.ids).log_softmax(-1)[
                torch.arange(len(ids)), ids
            ]
            teacher = logits(trainer.reference.model, w.hinted, w.rollout.ids)
        if w.kl:
            loss = loss + 0.1 * (torch.exp(reference - logp) - 1 - (reference - logp)).sum() / n_kl
        if w.tutored:
            loss = (
                loss
                + lam
                * topk_jsd(
                    z, teacher, 7, **{k: v for k, v in options.items() if k != "aggregate"}
                ).sum()
                / n_tutor
            )
        loss.backward()
    assert_close(ours, gradient(trainer), 1e-4)
    hinted_length = len(work[0].hinted.ids)
    assert any(length >= hinted_length for length in calls) == (lam > 0)


def test_micro_batches_do_not_change_the_gradient(trainer):
    grads = []
    for size in (1, 300, 10**6):
        trainer.config.micro_tokens = size
        batches = trainer._micro_batches(make_work(trainer, "unequal", range(4)))
        assert (
            size in (1, 10**6)
            or 1 < len(batches) < 16
            and all(trainer._tokens(b) <= size for b in batches)
        )
        parts = trainer.accumulate(make_work(trainer, "unequal", range(4)))
        grads.append((gradient(trainer), parts))
        trainer.policy.zero_grad()
    for g, parts in grads[1:]:
        assert_close(g, grads[0][0], 1e-4)
        assert (
            parts["tutor_loss"] == pytest.approx(grads[0][1]["tutor_loss"], rel=1e-4)
            and parts["tutor_loss"] > 0
        )


def test_nothing_in_a_step_adds_up_in_an_order_of_chance(trainer):
    """index_put with accumulate, the backward of x[rows], adds by atomics on a CPU with several threads, as index_add does on a GPU. Where equal places
    met, two runs of the default on two threads differed after one step."""
    meeting = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            name = op.overloadpacket.__name__.strip("_")
            assert name != "index_add"
            if name.startswith("index_put") and args[3:4] == (True,):
                places = torch.zeros(args[0].shape, dtype=torch.long).index_put(
                    tuple(args[1]), torch.tensor(1), accumulate=True
                )
                meeting.append(int(places.max()))
            return op(*args, **(kwargs or {}))

    with Watch():
        trainer.accumulate(make_work(trainer, "unequal", range(4)))
    assert max(meeting) == 1


def test_logits_mb_reaches_the_head_and_does_not_change_the_gradient(trainer, monkeypatch):
    trainer.accumulate(make_work(trainer, "unequal", range(2)))
    small, budgets, real = make_trainer(logits_mb=0.01), [], models.scores_from_hidden
    monkeypatch.setattr(
        models,
        "scores_from_hidden",
        lambda *args, **more: (budgets.append(more["logits_mb"]), real(*args, **more))[1],
    )
    small.accumulate(make_work(small, "unequal", range(2)))
    assert set(budgets) == {0.01} and chunk_tokens(100, 0.01) == 13
    assert_close(gradient(small), gradient(trainer), 1e-4)


def test_the_hinted_prompt_has_the_same_image(trainer):
    for w in make_work(trainer, "one", range(2)):
        assert (
            torch.equal(w.hinted.pixels, w.prompt.pixels)
            and w.hinted.types.sum() == w.prompt.types.sum() == 16
        )
        assert len(w.hinted.ids) > len(w.prompt.ids)


@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_tower_sees_each_image_once_a_rollout(trained):
    """And the loss is the one that patches give."""
    trainer = make_trainer(train_vision=trained, questions=3, group_size=3, max_new_tokens=12)
    samples, seen, parts = world.puzzles("tune", 3), [], []
    for model in (trainer.policy, trainer.reference.model):
        model.model.visual.blocks[0].register_forward_hook(
            lambda module, args, out: seen.append(len(args[0]))
        )
    work, _ = trainer.rollout(samples)
    flat = [w for group in work for w in group]
    assert any(w.tutored for w in flat)
    parts.append(trainer.accumulate(flat))
    assert seen == [64] * 3 if not trained else sum(seen) > 64 * 6
    for w in flat:
        w.prompt, w.hinted = (
            prompt
            and train.encode_prompts(
                trainer.processor, [w.rollout.sample], [chat(w.rollout.sample)]
            )[0]
            for prompt, chat in (
                (w.prompt, train.student_messages),
                (w.hinted, train.teacher_messages),
            )
        )
    parts.append(trainer.accumulate(flat))
    assert parts[0]["tutor_loss"] > 0 and all(
        parts[0][name] == pytest.approx(parts[1][name], rel=1e-3, abs=1e-5) for name in parts[0]
    )


def test_the_teacher_looks_at_the_image(trainer):
    work = make_work(trainer, "one", range(1))
    batch = trainer._collate(work, [w.hinted for w in work])
    seen = response_states(trainer.reference.model, batch)
    batch.prompts["pixel_values"] = batch.prompts["pixel_values"].flip(0)
    assert (response_states(trainer.reference.model, batch) - seen).abs().max() > 1e-2


def test_ratio_is_one_on_the_first_pass_and_not_after():
    trainer = make_trainer(
        updates=2, questions=2, group_size=4, lr=1e-2, max_new_tokens=40, warmup=0
    )
    torch.manual_seed(0)
    work, row = trainer.rollout([world.to_question(world.make_puzzle("tune", i)) for i in range(4)])
    assert all(
        w.old_logp is not None and len(w.old_logp) == len(w.rollout.ids)
        for group in work
        for w in group
    )
    first = trainer.update([w for group in work[:2] for w in group])
    assert first["ratio_max"] < 1e-4
    assert trainer.update([w for group in work[2:] for w in group])["ratio_max"] > 1e-3


def test_truncated_responses_can_be_left_out_of_the_loss(trainer):
    """Their step is the step of the others alone, and they stay in their group's advantages."""
    short = dict(group_size=6, max_new_tokens=24)
    samples = [world.to_question(world.make_puzzle("tune", i)) for i in range(6)]
    masked = make_trainer(mask_truncated=True, **short)
    work, row = masked.rollout(samples)
    flat = [w for group in work for w in group]
    assert 0 < row["truncated"] < 1 and [w.used for w in flat] == [
        not w.rollout.truncated for w in flat
    ]
    assert not any((w.tutored or w.kl) and not w.used for w in flat) and any(
        w.tutored for w in flat
    )
    parts = masked.accumulate(flat)
    other = trainer.accumulate([w for w in flat if w.used])
    assert_close(gradient(masked), gradient(trainer), 1e-4)
    assert {k: pytest.approx(v, rel=1e-3, abs=1e-6) for k, v in other.items()} == parts
    kept, everything = (
        make_trainer(**short).rollout(samples)[0],
        [[w.advantage for w in group] for group in work],
    )
    assert [[w.advantage for w in group] for group in kept] == everything and all(
        w.used for group in kept for w in group
    )
    nothing = [w for w in flat if not w.used]
    masked.policy.zero_grad()
    assert masked.accumulate(nothing)["policy_loss"] == 0 and all(
        (g == 0).all() for g in gradient(masked).values()
    )


def test_draws_are_keyed_by_seed_and_question(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = []
    monkeypatch.setattr(
        train,
        "sample_groups",
        lambda *args, **more: (keys.append(more.get("keys")), REAL_SAMPLE(*args, **more))[1],
    )
    train.main([*TINY, "--name", "t", "--seed", "3"])
    assert [k for k in keys if k] == [["3-0", "3-1"], ["3-2", "3-3"]]
    metrics = [
        json.loads(line)
        for line in (tmp_path / "runs" / "t" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(0 < m["sampler_gap"] < 1e-3 for m in metrics[1:])


def test_routing_in_a_rollout(trainer):
    trainer.config.group_size, trainer.config.max_new_tokens = 6, 40
    torch.manual_seed(1)
    samples = [world.to_question(world.make_puzzle("tune", i)) for i in range(6)]
    samples[0].hint = None
    work, row = trainer.rollout(samples)
    for n, group in enumerate(work):
        failed = [not w.rollout.correct for w in group]
        assert [w.tutored for w in group] == [f and n > 0 for f in failed]
        assert all(w.kl == (n == 0 or not any(failed)) for w in group)
        assert (group[0].hinted is not None) == any(w.tutored for w in group)
        if group[0].hinted:
            hinted, plain = (
                trainer.processor.tokenizer.decode(p.ids)
                for p in (group[0].hinted, group[0].prompt)
            )
            assert "Hint" in hinted and "Hint" not in plain
    assert (
        row["tutored"] == pytest.approx(sum(w.tutored for g in work for w in g) / 36)
        and row["tutored"] > 0
    )


def test_the_teacher_reads_the_chosen_context(trainer):
    """And a sample that lacks it is not tutored, which the log counts. With "none" the teacher is the student: nothing pulls."""
    trainer.config.max_new_tokens, losses, texts = 30, {}, {}
    for context in ("hint", "answer", "solution", "none"):
        trainer.config.teacher_context = context
        samples = world.puzzles("tune", 3)
        samples[2].hint = samples[2].solution = None
        work, row = trainer.rollout(samples)
        flat = [w for group in work for w in group]
        assert row["untaught"] == (1 / 3 if context in ("hint", "solution") else 0)
        assert any(w.tutored for w in work[2]) == (context in ("answer", "none"))
        texts[context] = trainer.processor.tokenizer.decode(
            next(w.hinted for w in flat if w.tutored).ids
        )
        losses[context] = trainer.accumulate(flat)["tutor_loss"]
        trainer.optimizer.zero_grad()
    assert ["Hint" in t for t in texts.values()] == [
        True,
        False,
        False,
        False,
    ] and "The answer is" in texts["answer"]
    assert (
        abs(losses["none"]) < 1e-6 and min(losses[c] for c in ("hint", "answer", "solution")) > 1e-3
    )


def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(trainer):
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    handle = next(p for p in trainer.policy.parameters() if p.requires_grad).register_hook(
        lambda g: g * float("nan")
    )
    work = make_work(trainer, "one", range(2))
    assert trainer.update(work)["skipped_steps"] == 1
    assert all(torch.equal(p, before[name]) for name, p in trainer.policy.named_parameters())
    handle.remove()
    assert trainer.update(work)["skipped_steps"] == 1
    assert any(not torch.equal(p, before[name]) for name, p in trainer.policy.named_parameters())


def test_evaluation_counts_every_question_once(trainer):
    trainer.sampling.update(max_new_tokens=40, sample_mb=1)  # several batches
    samples = world.puzzles("tune", 10)
    plain, hinted = (
        train.evaluate(trainer, samples),
        train.evaluate(trainer, samples, train.teacher_messages),
    )
    assert (
        plain["questions"] == hinted["questions"] == 10 and hinted["accuracy"] > plain["accuracy"]
    )
    samples[0].hint = None
    assert train.evaluate(trainer, samples, train.teacher_messages)["questions"] == 9
