"""train.py: what it refuses, what a run leaves behind, and that its gradient is the method's."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_tiny
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText
from two_processes import make_trainer, make_work

import train
from hints import Hint
from losses import chunk_tokens, topk_jsd
from ptdpo import PTDPOConfig
from rollout import load_processor
from toy import world


# ----------------------------------------------------------------------------------------------------------- the command line
@pytest.mark.parametrize("argv,message", [
    (["--nonsense", "1"], "unrecognized arguments: --nonsense"), (["--model", "no/such/folder"], "no such folder"),
    (["--model", "./nowhere"], "no such folder"), (["--group-size", "1"], "--group-size must be at least 2"),
    (["--tau", "0"], "--tau must be in (0, 1]"), (["--tau", "1.5"], "--tau must be in (0, 1]"), (["--k", "0"], "--k must be >= 1"),
    (["--steps", "many"], "invalid int value"), (["--lr", "0"], "--lr must be above 0"), (["--name", "a/b"], "plain folder name"),
    (["--data", "gone.jsonl"], "gone.jsonl: no such file"), (["--data", "bad.jsonl"], "bad.jsonl:2: no answer"),
    (["--data", "image.jsonl"], "image.jsonl:1: field 'images': cannot read"), (["--name", "taken"], "exists already"),
    (["--seed", "400"], "--seed must be at most 399"), (["--hints", "h.jsonl"], "--hints needs --data"),
    (["--teacher-context", "oracle"], "invalid choice: 'oracle'"), (["--data", "good.jsonl", "--hints", "h.jsonl"], "h.jsonl:1: hint fields"),
    (["--fog", "2"], "--fog must be at most 1"), (["--fog", "0.5", "--data", "good.jsonl"], "--fog is for the built-in puzzles")])
def test_bad_input_is_one_clear_line_before_a_model_is_loaded(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "build", lambda *a: pytest.fail("a model was loaded"))
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "bad.jsonl").write_text('{"question": "a?", "answer": "1"}\n{"question": "a?"}\n')
    (tmp_path / "good.jsonl").write_text('{"question": "a?", "answer": "1"}\n')
    (tmp_path / "h.jsonl").write_text('{"id": "good-1", "hint": {"look": "left"}}\n')
    (tmp_path / "image.jsonl").write_text('{"question": "a?", "answer": "1", "image": "none.png"}\n')
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and message in error, error


def test_a_model_without_vision_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SystemExit):
        train.main(["--model", str(tmp_path)])
    assert "is a gpt2 model; supported: qwen2_vl" in capsys.readouterr().err


def test_toy_values_are_for_the_embedded_model_only(tmp_path):
    cfg, method, _ = train.parse_args([])
    assert (cfg.lr, method.lam) == (train.TrainConfig.__dataclass_fields__["lr"].metadata["toy"], 10.0)
    cfg, method, _ = train.parse_args(["--model", "Qwen/Qwen2-VL-2B-Instruct"])
    assert (cfg.lr, cfg.questions, cfg.max_new_tokens, method.lam, method.k, method.tau) == (1e-6, 128, 4096, 0.05, 100, 1.0)
    cfg, method, _ = train.parse_args(["--lam", "0", "--lr", "0.25"])
    assert (cfg.lr, method.lam) == (0.25, 0.0)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 100 and all(train.flag(f) in text for f in train.TrainConfig.__dataclass_fields__)


def test_unusable_hints_are_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": "How many?", "answer": "7", "hint": h} for h in ("count to 7", "count the left ones", "read " * 40)]
    rows += [{"question": "b?", "answer": "1", "solution": "it is 1"}, {"question": "c?", "answer": "1"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "h.jsonl").write_text('{"id": "d-4", "hint": {"look": ["the top"]}}\n{"id": "other", "hint": null}\n')

    def read(**settings):
        cfg = train.TrainConfig(model=train.EMBEDDED, data="d.jsonl", name="x", eval_questions=1, max_hint_tokens=30, **settings)
        questions, _, note, *_ = train.read_inputs(cfg, 1)
        return [s.hint for s in questions.samples], note
    left = Hint(steps=("count the left ones",))
    got, note = read()
    assert got == [None, left, None, None, None]
    assert note == ("questions: 5 from d.jsonl; 1 with a hint, 1 hints dropped (spoilers; first: d-1), 1 hints dropped (too long; first: d-3); "
                    "4 are never tutored, for want of a hint")
    got, note = read(hints="h.jsonl")
    assert got == [None, left, None, Hint(look=("the top",)), None] and "2 with a hint" in note and "1 lines of h.jsonl belong to no question here" in note
    assert note.endswith("1 lines of h.jsonl belong to no question here; 3 are never tutored, for want of a hint")
    assert read(eval_data="d.jsonl")[1].endswith("\nleft out: 2 unusable hints of held-out questions")
    assert "4 are never tutored, for want of a solution" in read(teacher_context="solution")[1]
    assert "never tutored" not in read(teacher_context="answer")[1]


def test_data_is_shuffled_anew_each_epoch_and_nothing_is_left_out():
    samples = [str(i) for i in range(7)]
    stream = train.Questions(samples, seed=3)
    epochs = [[stream[i] for i in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(e) == samples for e in epochs) and epochs[0] != epochs[1]


# ------------------------------------------------------------------------------------------------------------------ a whole run
TINY = ["--steps", "2", "--questions", "2", "--group-size", "4", "--eval-questions", "6", "--eval-every", "1"]


def test_a_run_leaves_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(train, "sample_groups", lambda model, processor, samples, prompts, n, **kw: (
        seen.append((n, [processor.tokenizer.decode(p.ids) for p in prompts])), REAL_SAMPLE(model, processor, samples, prompts, n, **kw))[1])
    train.main([*TINY, "--name", "t"])
    run = tmp_path / "runs" / "t"
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == 2 and config["lam"] == 10.0 and config["tau"] == 1.0
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [0, 1, 2] and "eval_plain" in metrics[1] and "eval_hinted" in metrics[2]
    assert {"reward", "accuracy", "entropy", "all_failed", "tutor_loss", "kl", "grad_norm", "ratio_max", "truncated"} <= set(metrics[1])
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and len(rows[0]["responses"]) == 4 and set(rows[0]["hint"]) == {"look", "ignore", "steps"}
    # the student never reads the hint: neither while sampling nor in an evaluation that is called plain
    assert all("Hint" not in text for n, texts in seen if n == 4 for text in texts)
    assert [any("Hint" in t for t in texts) for n, texts in seen if n == 1] == [False, True, False, False, True]
    model, processor = AutoModelForImageTextToText.from_pretrained(run / "model"), load_processor(str(run / "model"))
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration" and processor.chat_template
    out = capsys.readouterr().out
    assert "accuracy, plain prompt" in out and "runs/t/" in out
    before = sorted(run.rglob("*"))
    with pytest.raises(SystemExit):
        train.main([*TINY, "--name", "t"])
    assert sorted(run.rglob("*")) == before


REAL_SAMPLE, REAL_STATES = train.sample_groups, train.response_states


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_a_whole_run_from_the_path_of_each_real_class(kind, base, tmp_path, monkeypatch, capsys):
    """Saved with save_pretrained, loaded by path, with questions that have two images, one and none, trained, and loaded again without our code."""
    monkeypatch.chdir(tmp_path)
    make_tiny(kind, base[1]).save_pretrained(tmp_path / "m")
    base[1].save_pretrained(tmp_path / "m")
    Image.new("RGB", (70, 50), "red").save(tmp_path / "a.png")
    rows = [{"question": "How many points ?", "answer": "7", "images": ["a.png"] * n, "hint": "look at the red cell"} for n in (2, 1, 0)]
    rows += [{"question": "How many points ? " + "row " * 90, "answer": "7"}, {"question": "How many ?", "answer": "7", "image": "b.png"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train.main(["--model", "m", "--data", "d.jsonl", "--eval-data", "d.jsonl", "--steps", "2", "--questions", "3", "--group-size", "2", "--max-new-tokens", "6",
                "--name", "t", "--lam", "1", "--lr", "0.01", "--max-prompt", "90", "--skip-bad", "--micro-tokens", "200", *(["--gradient-checkpointing"] if kind == "Qwen3VL" else [])])
    out = capsys.readouterr().out
    assert "questions: 3 from d.jsonl; 3 with a hint" in out and "left out: 2 questions with a prompt above 90 tokens" in out
    assert out.count("left out: d.jsonl:5: field 'images': cannot read b.png") == 2              # once for each file that was read
    metrics = logged(tmp_path / "runs" / "t")
    assert metrics[1]["tutored"] == 1 and metrics[1]["tutor_loss"] > 0 and metrics[1]["sampler_gap"] < 1e-3
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
        train.main(["--steps", "5", "--questions", "2", "--group-size", "4", "--eval-questions", "2", "--seed", "1", "--name", name, *options, *more])
        assert (tmp_path / "runs" / name / "checkpoints" / "step-00000005").exists()         # the last of 5 steps, also with 2 a rollout
    rows = [logged(tmp_path / "runs" / name) for name in ("plain", "less")]
    assert sum(row["tutor_loss"] > 0 for row in rows[0][1:]) >= 2 and len(rows[0]) == 6
    for a, b in zip(*rows):
        assert a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], rel=0.02, abs=1e-3) for key in a), (a, b)


# --------------------------------------------------------------------------------------------------------- checkpoints, resuming
LONGER = ["--steps", "8", "--questions", "2", "--group-size", "4", "--eval-questions", "4", "--eval-every", "3", "--save-every", "2"]


def start(folder, *args):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, os.path.join(os.path.dirname(train.__file__), "train.py"), *args], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def logged(run):
    """metrics.jsonl without the seconds."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] if (run / "metrics.jsonl").exists() else []
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys):
    """SIGKILL at a random moment, SIGTERM in the resumed run, resumed again: the same metrics and weights, bit for bit, as a run left alone."""
    whole, broken = tmp_path / "runs" / "whole", tmp_path / "runs" / "broken"
    monkeypatch.chdir(tmp_path)
    train.main([*LONGER, "--name", "whole"])
    seed = random.randrange(10**6)
    process, log = start(tmp_path, *LONGER, "--name", "broken"), broken / "metrics.jsonl"
    wait_for(process, (broken / "checkpoints" / "step-00000002").is_dir)
    time.sleep(random.Random(seed).random() / 3)
    process.kill()
    process.wait()
    last, old = max(int(p.name[5:]) for p in (broken / "checkpoints").glob("step-????????")), log.stat().st_ino
    process = start(tmp_path, "--resume", "runs/broken")
    wait_for(process, lambda: log.stat().st_ino != old and logged(broken)[-1]["step"] > last)      # resuming writes the log anew
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    if process.returncode == 143:                   # 0: the last step was over before the signal came
        assert "stopped by SIGTERM after step" in out and "--resume runs/broken" in out
        done = logged(broken)[-1]["step"]
        assert (broken / "checkpoints" / f"step-{done:08d}").is_dir() and not (broken / "model").exists()
        last = start(tmp_path, "--resume", "runs/broken")
        out, err = last.communicate()
        assert last.returncode == 0 and f"going on from runs/broken/checkpoints/step-{done:08d}" in out, err
    else:
        assert process.returncode == 0, err
    assert logged(broken) == logged(whole), seed
    assert (broken / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    for name in ("model/model.safetensors", "checkpoints/step-00000008/model.safetensors", "checkpoints/step-00000008/optimizer.bin"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), (seed, name)
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]      # --keep 2
    assert "has done all 8 steps; give a larger --steps" in refuse(capsys, "--resume", "runs/whole")


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run of two steps, in a folder to go on from."""
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--name", "t", "--save-every", "1"])
    return tmp_path / "runs" / "t"


def refuse(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(list(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1, error
    return error


def test_a_checkpoint_that_is_not_whole_or_not_ours_is_refused_by_name(finished, capsys):
    again = ["--resume", "runs/t", "--steps", "3"]
    newest = finished / "checkpoints" / "step-00000002"
    weights = (newest / "optimizer.bin").read_bytes()
    (newest / "optimizer.bin").write_bytes(weights[:-1])
    assert "step-00000002 is not whole: optimizer.bin is missing or has another size" in refuse(capsys, *again)
    (newest / "optimizer.bin").write_bytes(weights)
    state = (newest / "state.json").read_text()
    (newest / "state.json").write_text(state[:40])
    assert "step-00000002 is not a checkpoint of ptdpo" in refuse(capsys, *again)
    (newest / "state.json").write_text(state)
    (finished / "checkpoints" / "step-00000009.part").mkdir()               # what a kill while saving leaves: not looked at
    assert "--lr cannot stand beside --resume" in refuse(capsys, *again, "--lr", "1")
    assert "no config.json of a run of this version" in refuse(capsys, "--resume", "runs")
    for path in sorted(newest.parent.iterdir()):
        path.rename(finished / path.name)
    assert "no checkpoint in" in refuse(capsys, *again)


def test_other_data_than_the_run_s_own_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": str(i), "question": "How many?", "answer": "7"} for i in range(4)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train.main([*TINY, "--name", "t", "--data", "d.jsonl"])
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    assert "are not those that" in refuse(capsys, "--resume", "runs/t", "--steps", "3")


def test_a_full_disk_ends_the_run_and_spares_the_last_checkpoint(finished, monkeypatch, capsys):
    before = {p: p.read_bytes() for p in sorted((finished / "checkpoints" / "step-00000002").iterdir())}

    def full(self, folder):
        (train.Path(folder) / "optimizer.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train.Accelerator, "save_state", full)
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "runs/t", "--steps", "4"])
    assert "No space left on device" in stop.value.code and "last good one is runs/t/checkpoints/step-00000002" in stop.value.code
    assert {p: p.read_bytes() for p in before} == before
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert "wandb is not installed; python -m pip install wandb" in refuse(capsys, "--log-with", "wandb")
    assert "peft is not installed; python -m pip install peft" in refuse(capsys, "--lora", "4")


# ---------------------------------------------------------------------------------------------------------------- the gradient
@pytest.fixture
def trainer():
    return make_trainer()


def gradient(trainer):
    return {name: p.grad.clone() for name, p in trainer.policy.named_parameters() if p.grad is not None}


def assert_close(a, b, rtol):
    """Relative to the largest gradient of all parameters: float32 sums in another order."""
    scale = max(g.abs().max() for g in b.values())
    assert scale > 0 and a.keys() == b.keys()
    for name in b:
        assert (a[name] - b[name]).abs().max() <= rtol * scale, name


@pytest.mark.parametrize("lam,options", [(0.0, {}), (2.0, {}), (2.0, dict(divergence="reverse_kl", support="student", aggregate="fixed"))])
def test_gradient_equals_the_plain_formula(trainer, lam, options, monkeypatch):
    """One response at a time, whole-vocabulary logits, no padding, no chunks. With lam 0: GRPO with a KL penalty, and no hinted pass."""
    trainer.method = PTDPOConfig(lam=lam, beta_kl=0.1, k=7, **options)
    work = make_work(trainer, "unequal", range(4))
    if lam == 0:
        for w in work:
            w.tutored, w.kl = False, True
    calls = []
    monkeypatch.setattr(train, "response_states", lambda model, batch: (
        calls.append(batch.prompts["input_ids"].shape[1]), REAL_STATES(model, batch))[1])
    trainer.accumulate(work)
    ours = gradient(trainer)
    trainer.policy.zero_grad()

    def logits(model, prompt, ids):
        n, row = len(ids), torch.cat([prompt.ids, torch.tensor(ids)])[None]
        types = torch.cat([prompt.types, torch.zeros(n, dtype=torch.long)])[None]
        z = model(input_ids=row, mm_token_type_ids=types, pixel_values=prompt.pixels, image_grid_thw=prompt.grid).logits[0, -n - 1:-1]
        z[:, trainer.settings["banned"]] = -torch.inf
        return z
    n_all = sum(len(w.rollout.ids) for w in work)
    n_tutor, n_kl = (sum(len(w.rollout.ids) for w in work if getattr(w, name)) for name in ("tutored", "kl"))
    for w in work:
        ids = torch.tensor(w.rollout.ids)
        z = logits(trainer.policy, w.prompt, w.rollout.ids)
        logp = z.log_softmax(-1)[torch.arange(len(ids)), ids]
        # on policy: nothing is clipped
        loss = -(torch.exp(logp - logp.detach()) * w.advantage).sum() / (len(work) * trainer.cfg.max_new_tokens if options else n_all)
        with torch.no_grad():
            reference = logits(trainer.reference.model, w.prompt, w.rollout.ids).log_softmax(-1)[torch.arange(len(ids)), ids]
            teacher = logits(trainer.reference.model, w.hinted, w.rollout.ids)
        if w.kl:
            loss = loss + 0.1 * (torch.exp(reference - logp) - 1 - (reference - logp)).sum() / n_kl
        if w.tutored:
            loss = loss + lam * topk_jsd(z, teacher, 7, **{k: v for k, v in options.items() if k != "aggregate"}).sum() / n_tutor
        loss.backward()
    assert_close(ours, gradient(trainer), 1e-4)
    hinted_length = len(work[0].hinted.ids)
    assert any(length >= hinted_length for length in calls) == (lam > 0)


def test_micro_batches_do_not_change_the_gradient(trainer):
    grads = []
    for size in (1, 300, 10**6):
        trainer.cfg.micro_tokens = size
        batches = trainer._micro_batches(make_work(trainer, "unequal", range(4)))
        assert size in (1, 10**6) or 1 < len(batches) < 16 and all(trainer._tokens(b) <= size for b in batches)
        parts = trainer.accumulate(make_work(trainer, "unequal", range(4)))
        grads.append((gradient(trainer), parts))
        trainer.policy.zero_grad()
    for g, parts in grads[1:]:
        assert_close(g, grads[0][0], 1e-4)
        assert parts["tutor_loss"] == pytest.approx(grads[0][1]["tutor_loss"], rel=1e-4) and parts["tutor_loss"] > 0


def test_nothing_in_a_step_adds_up_in_an_order_of_chance(trainer):
    """index_put with accumulate, the backward of x[rows], adds by atomics on a CPU with several threads, as index_add does on a GPU. Where equal places
    met, two runs of the default on two threads differed after one step."""
    meeting = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            name = op.overloadpacket.__name__.strip("_")
            assert name != "index_add"
            if name.startswith("index_put") and args[3:4] == (True,):
                places = torch.zeros(args[0].shape, dtype=torch.long).index_put(tuple(args[1]), torch.tensor(1), accumulate=True)
                meeting.append(int(places.max()))
            return op(*args, **(kwargs or {}))
    with Watch():
        trainer.accumulate(make_work(trainer, "unequal", range(4)))
    assert max(meeting) == 1


def test_logits_mb_reaches_the_head_and_does_not_change_the_gradient(trainer, monkeypatch):
    trainer.accumulate(make_work(trainer, "unequal", range(2)))
    small, budgets, real = make_trainer(logits_mb=0.01), [], train.head_scores
    monkeypatch.setattr(train, "head_scores", lambda *args, **more: (budgets.append(more["logits_mb"]), real(*args, **more))[1])
    small.accumulate(make_work(small, "unequal", range(2)))
    assert set(budgets) == {0.01} and chunk_tokens(100, 0.01) == 13
    assert_close(gradient(small), gradient(trainer), 1e-4)


def test_the_hinted_prompt_has_the_same_image(trainer):
    for w in make_work(trainer, "one", range(2)):
        assert torch.equal(w.hinted.pixels, w.prompt.pixels) and w.hinted.types.sum() == w.prompt.types.sum() == 16
        assert len(w.hinted.ids) > len(w.prompt.ids)


@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_tower_sees_each_image_once_a_rollout(trained):
    """And the loss is the one that patches give."""
    trainer = make_trainer(train_vision=trained, questions=3, group_size=3, max_new_tokens=12)
    samples, seen, parts = world.puzzles("tune", 3), [], []
    for model in (trainer.policy, trainer.reference.model):
        model.model.visual.blocks[0].register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    work, _ = trainer.rollout(samples)
    flat = [w for group in work for w in group]
    assert any(w.tutored for w in flat)
    parts.append(trainer.accumulate(flat))
    assert seen == [64] * 3 if not trained else sum(seen) > 64 * 6
    for w in flat:
        w.prompt, w.hinted = (prompt and train.encode_prompts(trainer.processor, [w.rollout.sample], [chat(w.rollout.sample)])[0]
                              for prompt, chat in ((w.prompt, train.plain_messages), (w.hinted, train.hinted_messages)))
    parts.append(trainer.accumulate(flat))
    assert parts[0]["tutor_loss"] > 0 and all(parts[0][name] == pytest.approx(parts[1][name], rel=1e-3, abs=1e-5) for name in parts[0])


def test_the_teacher_looks_at_the_image(trainer):
    work = make_work(trainer, "one", range(1))
    batch = trainer._collate(work, [w.hinted for w in work])
    seen = train.response_states(trainer.reference.model, batch)
    batch.prompts["pixel_values"] = batch.prompts["pixel_values"].flip(0)
    assert (train.response_states(trainer.reference.model, batch) - seen).abs().max() > 1e-2


def test_ratio_is_one_on_the_first_pass_and_not_after():
    trainer = make_trainer(updates=2, questions=2, group_size=4, lr=1e-2, max_new_tokens=40, warmup=0)
    torch.manual_seed(0)
    work, row = trainer.rollout([world.sample(world.make_puzzle("tune", i)) for i in range(4)])
    assert all(w.old_logp is not None and len(w.old_logp) == len(w.rollout.ids) for group in work for w in group)
    first = trainer.update([w for group in work[:2] for w in group])
    assert first["ratio_max"] < 1e-4
    assert trainer.update([w for group in work[2:] for w in group])["ratio_max"] > 1e-3


def test_truncated_responses_can_be_left_out_of_the_loss(trainer):
    """Their step is the step of the others alone, and they stay in their group's advantages."""
    short = dict(group_size=6, max_new_tokens=24)
    samples = [world.sample(world.make_puzzle("tune", i)) for i in range(6)]
    masked = make_trainer(mask_truncated=True, **short)
    work, row = masked.rollout(samples)
    flat = [w for group in work for w in group]
    assert 0 < row["truncated"] < 1 and [w.used for w in flat] == [not w.rollout.truncated for w in flat]
    assert not any((w.tutored or w.kl) and not w.used for w in flat) and any(w.tutored for w in flat)
    parts = masked.accumulate(flat)
    other = trainer.accumulate([w for w in flat if w.used])
    assert_close(gradient(masked), gradient(trainer), 1e-4)
    assert {k: pytest.approx(v, rel=1e-3, abs=1e-6) for k, v in other.items()} == parts
    kept, everything = make_trainer(**short).rollout(samples)[0], [[w.advantage for w in group] for group in work]
    assert [[w.advantage for w in group] for group in kept] == everything and all(w.used for group in kept for w in group)
    nothing = [w for w in flat if not w.used]
    masked.policy.zero_grad()
    assert masked.accumulate(nothing)["policy_loss"] == 0 and all((g == 0).all() for g in gradient(masked).values())


def test_draws_are_keyed_by_seed_and_question(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = []
    monkeypatch.setattr(train, "sample_groups", lambda *args, **more: (keys.append(more.get("keys")), REAL_SAMPLE(*args, **more))[1])
    train.main([*TINY, "--name", "t", "--seed", "3"])
    assert [k for k in keys if k] == [["3-0", "3-1"], ["3-2", "3-3"]]
    metrics = [json.loads(line) for line in (tmp_path / "runs" / "t" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < m["sampler_gap"] < 1e-3 for m in metrics[1:])


def test_routing_in_a_rollout(trainer):
    trainer.cfg.group_size, trainer.cfg.max_new_tokens = 6, 40
    torch.manual_seed(1)
    samples = [world.sample(world.make_puzzle("tune", i)) for i in range(6)]
    samples[0].hint = None
    work, row = trainer.rollout(samples)
    for n, group in enumerate(work):
        failed = [not w.rollout.correct for w in group]
        assert [w.tutored for w in group] == [f and n > 0 for f in failed]
        assert all(w.kl == (n == 0 or not any(failed)) for w in group)
        assert (group[0].hinted is not None) == any(w.tutored for w in group)
        if group[0].hinted:
            hinted, plain = (trainer.processor.tokenizer.decode(p.ids) for p in (group[0].hinted, group[0].prompt))
            assert "Hint" in hinted and "Hint" not in plain
    assert row["tutored"] == pytest.approx(sum(w.tutored for g in work for w in g) / 36) and row["tutored"] > 0


def test_the_teacher_reads_the_chosen_context(trainer):
    """And a sample that lacks it is not tutored, which the log counts. With "none" the teacher is the student: nothing pulls."""
    trainer.cfg.max_new_tokens, losses, texts = 30, {}, {}
    for context in ("hint", "answer", "solution", "none"):
        trainer.cfg.teacher_context = context
        samples = world.puzzles("tune", 3)
        samples[2].hint = samples[2].solution = None
        work, row = trainer.rollout(samples)
        flat = [w for group in work for w in group]
        assert row["untaught"] == (1 / 3 if context in ("hint", "solution") else 0)
        assert any(w.tutored for w in work[2]) == (context in ("answer", "none"))
        texts[context] = trainer.processor.tokenizer.decode(next(w.hinted for w in flat if w.tutored).ids)
        losses[context] = trainer.accumulate(flat)["tutor_loss"]
        trainer.optimizer.zero_grad()
    assert ["Hint" in t for t in texts.values()] == [True, False, False, False] and "The answer is" in texts["answer"]
    assert abs(losses["none"]) < 1e-6 and min(losses[c] for c in ("hint", "answer", "solution")) > 1e-3


def failures(trainer, questions):
    fine, text = train.check(trainer, questions)
    bad = [line[5:].partition(":")[0] for line in text.splitlines() if line.startswith("FAIL")]
    assert fine == (not bad) and text.count("\n     -> ") == len(bad)
    return bad


def test_the_check_passes_on_the_default_and_names_what_is_broken(trainer, monkeypatch):
    trainer.cfg.max_new_tokens, trainer.cfg.group_size = 40, 2
    puzzles = train.Questions(None, 3)
    assert failures(trainer, puzzles) == []
    assert all(p.grad is None for p in trainer.policy.parameters())
    noisy = trainer.policy.model.language_model.norm.register_forward_hook(lambda module, args, out: out + 0.1 * torch.randn_like(out))
    assert "the ratio is 1 on the first pass" in failures(trainer, puzzles)
    noisy.remove()

    def blind(processor, samples, messages, real=train.encode_prompts):
        prompts = real(processor, samples, messages)
        for p in prompts:
            p.pixels = torch.zeros_like(p.pixels)
        return prompts
    with monkeypatch.context() as patch:
        patch.setattr(train, "encode_prompts", blind)
        assert failures(trainer, puzzles) == ["the image changes the teacher's distribution"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "teacher_messages", lambda sample, context: train.plain_messages(sample))
        assert failures(trainer, puzzles) == ["tutoring has a gradient", "the hint changes the teacher's distribution"]
    with monkeypatch.context() as patch:

        def unmasked(*args, real=train.collate):
            batch = real(*args)
            batch.prompts["attention_mask"].fill_(1)
            return batch
        patch.setattr(train, "collate", unmasked)
        assert "padding changes nothing" in failures(trainer, puzzles)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.accelerator, "gather", lambda x: torch.cat([x, x + 1]))
        assert failures(trainer, puzzles) == ["the reference is the same on every process"]
    samples = world.puzzles("tune", 4)
    samples[1].choices, samples[2].choices = ["red", "blue"], [samples[2].answer, "x"]
    assert failures(trainer, train.Questions(samples, 0)) == ["gold answers verify against themselves"]
    samples[1].choices, trainer.cfg.max_new_tokens = None, 5
    trainer.sampling["max_new_tokens"] = 5
    assert failures(trainer, train.Questions(samples, 0)) == ["responses end before the limit"]
    for s in samples:
        s.hint = None
    assert failures(trainer, train.Questions(samples, 0)) == ["hints"]


def test_the_check_from_the_command_line_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv, code in ((["--check"], 0), (["--check", "--max-new-tokens", "4"], 1)):
        with pytest.raises(SystemExit) as stop:
            train.main([*argv, "--group-size", "2"])
        assert stop.value.code == code
    assert "ok   the image changes the teacher's distribution" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_audit_finds_no_leak_in_the_puzzles_and_finds_one_that_is_there(trainer, monkeypatch):
    trainer.cfg.eval_questions, trainer.cfg.max_new_tokens = 100, 48
    text = train.audit(trainer, train.Questions(None, 7))
    rows = {line[:30].strip(): float(line[30:].split()[0]) for line in text.splitlines() if line.endswith("%")}
    assert list(rows) == ["picture + question", "picture + question + hint", "question", "question + hint", "question + another's hint", "hint", "another's hint"]
    assert rows["picture + question + hint"] > 90 and text.count("no leak seen") == 2 and "LEAK" not in text
    # what always answering the most common number would score, 17 %, plus three standard errors
    assert max(rows[name] for name in rows if "picture" not in name) < 28
    # hints that say the answer, read by a model that repeats it
    samples = world.puzzles("tune", 20)
    for s in samples:
        s.hint = Hint(steps=(f"it is {s.answer}",))
    samples[3].hint = None

    def repeat(trainer, samples, messages):
        return {"right": [s.id for s in samples if messages is not train.plain_messages and s.hint.steps[0].split()[-1] == s.answer]}
    monkeypatch.setattr(train, "evaluate", repeat)
    text = train.audit(trainer, train.Questions(samples, 0))
    assert text.count("LEAK") == 2 and "of 19" in text and "first: puzzle-2" in text
    assert "nothing to audit" in train.audit(trainer, train.Questions(samples[3:4], 0))


def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(trainer):
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    handle = next(p for p in trainer.policy.parameters() if p.requires_grad).register_hook(lambda g: g * float("nan"))
    work = make_work(trainer, "one", range(2))
    assert trainer.update(work)["skipped_steps"] == 1
    assert all(torch.equal(p, before[name]) for name, p in trainer.policy.named_parameters())
    handle.remove()
    assert trainer.update(work)["skipped_steps"] == 1
    assert any(not torch.equal(p, before[name]) for name, p in trainer.policy.named_parameters())


def test_evaluation_counts_every_question_once(trainer):
    trainer.sampling.update(max_new_tokens=40, sample_mb=1)           # several batches
    samples = world.puzzles("tune", 10)
    plain, hinted = train.evaluate(trainer, samples), train.evaluate(trainer, samples, train.hinted_messages)
    assert plain["questions"] == hinted["questions"] == 10 and hinted["accuracy"] > plain["accuracy"]
    samples[0].hint = None
    assert train.evaluate(trainer, samples, train.hinted_messages)["questions"] == 9


def alone_and_in_two(root, tmp_path, *args):
    """What tests/two_processes.py saves: run alone, and by torchrun in two processes."""
    script, env = str(root / "tests" / "two_processes.py"), {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, start in (("a", [sys.executable]), ("b", launch)):
        done = subprocess.run([*start, script, str(tmp_path / name), *args], env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = torch.load(tmp_path / "a"), torch.load(tmp_path / "b")
    assert (one["processes"], two["processes"]) == (1, 2)
    return one, two


def test_two_processes_give_the_gradient_of_one(root, tmp_path):
    """gloo, two processes with different numbers of tutored tokens; in case "one" a process has none."""
    one, two = alone_and_in_two(root, tmp_path)
    for case in ("unequal", "one"):
        assert_close(two[case]["grads"], one[case]["grads"], 1e-5)
        for name, value in one[case]["parts"].items():
            assert two[case]["parts"][name] == pytest.approx(value, rel=1e-5, abs=1e-9)


def test_two_sharded_processes_do_three_steps_as_one_does(root, tmp_path):
    """FSDP2 over gloo, student and reference sharded; a process has nothing to tutor and fewer micro-batches, the other no image in one of
    its questions. Losses, weights, the responses that the result samples, and a checkpoint that was written and loaded."""
    one, two = alone_and_in_two(root, tmp_path, "fsdp")
    assert not one["sharded"] and two["sharded"] == [4, 4]        # three layers and the root
    for alone, sharded in zip(one["parts"], two["parts"]):
        for name, value in alone.items():
            assert sharded[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert one["weights"].keys() == two["weights"].keys()
    for name, value in one["weights"].items():
        assert (two["weights"][name] - value).abs().max() <= 1e-4 * value.abs().max(), name     # Adam magnifies noise in small gradients
    assert two["responses"] == one["responses"] and two["evaluation"] == one["evaluation"]
    assert two["loaded"]


def test_the_committed_fsdp_settings_are_ones_that_accelerate_knows(root):
    from accelerate.commands.config.config_args import load_config_from_file
    config = load_config_from_file(str(root / "fsdp.yaml"))             # raises on a key it does not know
    assert (config.num_processes, config.mixed_precision, config.fsdp_config["fsdp_version"]) == (8, "bf16", 2)


def test_a_sharded_run_goes_on_with_another_number_of_processes(root, tmp_path, monkeypatch):
    """train.py with FSDP2 in two processes, resumed in three: the log of one process on the same questions, and a model that loads."""
    options = ["--questions", "6", "--group-size", "4", "--eval-questions", "5", "--eval-every", "1", "--save-every", "1", "--lr", "1e-4"]
    monkeypatch.chdir(tmp_path)
    train.main([*options, "--steps", "3", "--name", "alone"])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for processes, more in ((2, [*options, "--steps", "2", "--name", "sharded"]), (3, ["--resume", "runs/sharded", "--steps", "3"])):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                               str(root / "tests" / "two_processes.py"), "train", *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
    one, several = logged(tmp_path / "runs" / "alone"), logged(tmp_path / "runs" / "sharded")
    for row, other in zip(one, several, strict=True):
        # the run of two steps ended with an evaluation with the hint, which the one of three does not have there
        assert {k: v for k, v in other.items() if k in row} == pytest.approx(row, rel=1e-3, abs=1e-5)
    weights = [AutoModelForImageTextToText.from_pretrained(tmp_path / "runs" / name / "model").state_dict() for name in ("alone", "sharded")]
    for name, value in weights[0].items():
        assert (weights[1][name] - value).abs().max() <= 1e-3 * value.abs().max(), name


# ----------------------------------------------------------------------------------------------------------- a page to look at
def page_data(path):
    html = path.read_text()
    return html, json.loads(html.partition('<script id="data" type="application/json">')[2].partition("</script>")[0])


def test_the_page_shows_the_finished_run(tmp_path, monkeypatch, capsys):
    """Text, divergence and likeliest tokens are those that the loss sees; the same page again from the folder alone."""
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--name", "t", "--report"])
    run = tmp_path / "runs" / "t"
    assert "a page to look at: runs/t/report.html" in capsys.readouterr().out
    html, data = page_data(run / "report.html")
    assert [q["id"] for q in data["questions"]] == [f"puzzle-{10**9 + i}" for i in range(6)] and "://" not in html
    first = world.puzzles("heldout", 1)[0]
    question = data["questions"][0]
    assert question["hint"]["look"] == list(first.hint.look) and len(question["before"]) == len(question["after"]) == 4
    assert question["images"][0]["boxes"] == [[x / 112 for x in box] for box in first.boxes[0]] and question["before"] != question["after"]
    models = {name: AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval() for name, path in (("before", train.EMBEDDED), ("after", run / "model"))}
    processor = load_processor(train.EMBEDDED)
    plain, hinted = train.encode_prompts(processor, [first] * 2, [train.plain_messages(first), train.hinted_messages(first)])
    for name, model in models.items():
        [group] = train.sample_groups(model, processor, [first], [plain], 4, max_new_tokens=48)
        for shown, rollout in zip(question[name], group):
            texts, jsd, student, teacher = zip(*shown["tokens"])
            assert shown["more"] == 0
            assert "".join(texts) == processor.tokenizer.decode(rollout.ids) and shown["truncated"] == rollout.truncated
            assert shown["correct"] == train.load_verifier("rules")(rollout.text, first.answer)
            logits = []
            for m, prompt in ((model, plain), (models["before"], hinted)):          # without any of the machinery: one whole sequence
                ids = torch.cat([prompt.ids, torch.tensor(rollout.ids)])[None]
                types = torch.cat([prompt.types, torch.zeros(len(rollout.ids), dtype=torch.long)])[None]
                with torch.no_grad():
                    z = m(input_ids=ids, mm_token_type_ids=types, pixel_values=prompt.pixels, image_grid_thw=prompt.grid).logits[0, len(prompt.ids) - 1:-1]
                logits.append(z.index_fill(-1, torch.tensor(train.banned_tokens(m, processor.tokenizer)), -torch.inf))
            torch.testing.assert_close(torch.tensor(jsd), topk_jsd(*logits, 20), atol=2e-4, rtol=1e-3)
            assert not {processor.tokenizer.decode([i]) for i in train.banned_tokens(model, processor.tokenizer)} & {text for top in student for text, _ in top}
            for tops, z in zip((student, teacher), logits):
                for top, p in zip(tops, z.softmax(-1)):
                    assert top[0][0] == processor.tokenizer.decode([p.argmax()]) and abs(top[0][1] - p.max()) < 1e-3 and len(top) == 5
    [cut] = train.explain(models["after"], models["before"], processor, *train.parse_args([])[:2], first, 1, most=9)
    assert [t[0] for t in cut["tokens"]] == [t[0] for t in question["after"][0]["tokens"][:9]] and cut["more"] == len(question["after"][0]["tokens"]) - 9
    before = sorted(run.rglob("*"))
    (run / "report.html").unlink()
    train.main(["--report", str(run)])
    assert page_data(run / "report.html")[1] == data and sorted(run.rglob("*")) == before
    shutil.rmtree(run / "model")
    for argv, message in ((["--report", str(run)], "there is no trained model in it"), (["--report", str(run), "--lr", "1"], "--lr cannot stand beside --report"),
                          (["--report", "gone"], "--report gone: no config.json")):
        with pytest.raises(SystemExit):
            train.main(argv)
        assert message in capsys.readouterr().err


def test_the_page_reads_nothing_from_the_data_as_html(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>"
    Image.new("RGB", (900, 450), "red").save("a.png")
    rows = [{"id": bad, "question": f"How many? {bad}", "answer": "1", "image": "a.png"},
            {"id": "2", "question": "And here?", "answer": "2", "image": "a.png", "hint": {"look": [bad]}, "boxes": [[[0, 0, 450, 225]]]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train.main([*TINY, "--steps", "1", "--name", "t", "--data", "d.jsonl", "--eval-data", "d.jsonl", "--max-new-tokens", "8", "--report"])
    html, data = page_data(tmp_path / "runs" / "t" / "report.html")
    assert html.count("<script") == 2 == html.count("</script") and "<img" not in html and "<!--" not in html
    assert [q["id"] for q in data["questions"]] == ["2", bad] and data["questions"][0]["hint"]["look"] == [bad]     # hinted ones first
    assert data["questions"][0]["images"][0]["boxes"] == [[0, 0, 0.5, 0.5]] and data["questions"][0]["images"][0]["width"] == 448
    assert all(token[3] is None and token[1] == 0 for token in data["questions"][1]["before"][0]["tokens"])       # no hint: no teacher
    rows[1]["boxes"] = [[0, 0, 450, 225]]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="d.jsonl:2: field 'boxes'"):
        train.load_samples("d.jsonl")
