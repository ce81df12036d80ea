"""What happens at the limits of memory: a long response, out of memory, a run that cannot fit."""

import os
import types
import weakref

import pytest
import torch
from conftest import assert_close, flat, gradient
from two_processes import make_groups, move_student, score

import train
from plumbing import command, engine, runs
from plumbing.models import _recompute_activations
from rollout import response_states


def layers_of(trainer):
    return trainer.policy.model.language_model.layers


@pytest.fixture
def passes(monkeypatch):
    """Per pass of the student: has each response its own prompt, do the layers recompute?"""
    seen = []

    def watched(model, batch):
        if model.training:
            flags = {layer.gradient_checkpointing for layer in model.model.language_model.layers}
            seen.append((batch.one_prompt_per_response, *flags))
        return response_states(model, batch)

    monkeypatch.setattr(train, "response_states", watched)
    return seen


def test_a_response_above_the_limit_recomputes_and_the_gradient_is_the_same(trainer, passes):
    move_student(trainer)
    gradients = []
    for limit in (10**6, 1):
        trainer.config.micro_tokens = limit
        score(trainer, make_groups(trainer, "unequal", range(2)))
        gradients.append(gradient(trainer))
        trainer.policy.zero_grad()
    assert passes == [(False, False)] + 8 * [(True, True)]
    assert_close(gradients[1], gradients[0], 1e-4)


def test_only_the_response_that_is_too_long_recomputes(trainer, passes):
    groups = make_groups(trainer, "unequal", range(2))
    responses = flat(groups)
    responses[0].ids = 60 * responses[0].ids[:3]
    trainer.config.micro_tokens = len(responses[0].prompt.ids) + 170
    score(trainer, groups)
    assert passes.count((True, True)) == 1
    assert len(passes) > 1 and set(passes) == {(True, True), (False, False)}


def test_old_log_probs_take_the_same_path_as_the_loss(trainer, passes):
    groups = make_groups(trainer, "unequal", range(2))
    responses = flat(groups)
    responses[0].ids = 60 * responses[0].ids[:3]
    trainer.weigh(groups)
    trainer.config.micro_tokens = len(responses[0].prompt.ids) + 170
    trainer.record_old_logp(responses)
    recorded = list(passes)
    passes.clear()
    assert trainer.score(responses)["ratio_max"] < 1e-5
    assert recorded == passes and (True, True) in passes


@pytest.mark.parametrize("other_process_recomputes", [False, True])
def test_sharded_all_processes_recompute_or_none(trainer, monkeypatch, other_process_recomputes):
    """A process that recomputes gathers weights once more in the backward pass."""
    asked = []

    def largest(flag):
        asked.append(flag)
        return [max(flag, int(other_process_recomputes))]

    monkeypatch.setattr(trainer, "largest", largest)
    trainer.sharded = True
    trainer.config.micro_tokens = 10**6
    responses = flat(make_groups(trainer, "unequal", range(2)))
    batch = trainer.training_batch(responses)
    assert asked == [0]
    assert batch.one_prompt_per_response == other_process_recomputes
    flags = [layer.gradient_checkpointing for layer in layers_of(trainer)]
    assert flags == [other_process_recomputes] * len(flags)


@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_what_recomputes(trainer, everywhere, tower):
    """On a GPU the tower always does. The gradient is the same, bit for bit."""
    groups = make_groups(trainer, "unequal", range(1))
    score(trainer, groups)
    expected = gradient(trainer)
    trainer.policy.zero_grad()
    _recompute_activations(trainer.policy, everywhere, tower)
    blocks = [block.gradient_checkpointing for block in trainer.policy.model.visual.blocks]
    layers = [layer.gradient_checkpointing for layer in layers_of(trainer)]
    assert blocks == [everywhere or tower] * len(blocks)
    assert layers == [everywhere] * len(layers)
    trainer.score(flat(groups))
    assert_close(gradient(trainer), expected, 0)


# --------------------------------------------------------------------- out of memory in an update
class ShortOfMemory:
    """Trainer.loss that runs out of memory at the calls of these numbers."""

    def __init__(self, trainer, *numbers):
        self.trainer, self.numbers, self.plain = trainer, numbers, trainer.loss
        self.sizes, self.lost = [], []
        trainer.loss = self

    def __call__(self, responses):
        self.sizes.append(len(responses))
        loss, parts = self.plain(responses)
        if len(self.sizes) in self.numbers:
            self.lost.append(weakref.ref(loss))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        self.alive = [ref for ref in self.lost if ref() is not None]
        return loss, parts


def test_out_of_memory_halves_the_micro_batch_once_and_scores_the_step_again(trainer, capsys):
    move_student(trainer)
    trainer.config.micro_tokens = 300
    groups = make_groups(trainer, "unequal", range(4))
    expected_parts = score(trainer, groups)
    expected = gradient(trainer)
    trainer.policy.zero_grad()
    whole = len(trainer.micro_batches(flat(groups)))

    short = ShortOfMemory(trainer, 2)  # after the first micro-batch's gradient
    parts = trainer.score(flat(groups))
    assert_close(gradient(trainer), expected, 1e-5)
    assert parts["tutor_loss"] == pytest.approx(expected_parts["tutor_loss"], rel=1e-5)
    assert short.alive == [], "the tensors of the failed attempt are free"
    again = short.sizes[2:]
    assert sum(again) == 16 and len(again) > whole
    assert trainer.token_limit == 150 and trainer.config.micro_tokens == 300
    [line] = capsys.readouterr().err.splitlines()
    assert "150 tokens" in line and "--micro-tokens" in line

    trainer.optimizer.zero_grad()
    trainer.score(flat(groups))
    assert short.sizes[-len(again) :] == again, "the limit stays halved"
    assert capsys.readouterr().err == ""


def test_out_of_memory_a_second_time_ends_the_run(trainer, capsys):
    trainer.config.micro_tokens = 300
    groups = make_groups(trainer, "unequal", range(4))
    trainer.weigh(groups)
    ShortOfMemory(trainer, 1, 3)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.score(flat(groups))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "--micro-tokens 75" in lines[-1]


def test_out_of_memory_in_one_of_several_processes_ends_the_run(trainer, capsys, monkeypatch):
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    groups = make_groups(trainer, "unequal", range(4))
    for response in flat(groups):
        response.weights = (0.1, 0.1, 0.1)
    short = ShortOfMemory(trainer, 1)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.score(flat(groups))
    assert len(short.sizes) == 1 and trainer.token_limit == trainer.config.micro_tokens
    [line] = capsys.readouterr().err.splitlines()
    assert "--micro-tokens 100" in line


# --------------------------------------------------------------------------------------- the start
@pytest.mark.parametrize(
    "version, name",
    [
        ("2.6.0", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.8.1+cu128", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.9.0", "PYTORCH_ALLOC_CONF"),
        ("2.15.0+cpu", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_expandable_segments_by_the_name_that_this_torch_reads(monkeypatch, version, name):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(os, "environ", {})
    runs.set_expandable_segments()
    assert os.environ == {name: "expandable_segments:True"}


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_the_user_s_own_allocator_settings_stay(monkeypatch, name):
    monkeypatch.setattr(os, "environ", {name: "max_split_size_mb:64"})
    runs.set_expandable_segments()
    assert os.environ == {name: "max_split_size_mb:64"}


def test_a_run_that_cannot_fit_on_the_gpu_stops_before_its_model_is_loaded(monkeypatch):
    gpu = types.SimpleNamespace(
        device=torch.device("cuda:0"),
        distributed_type="NO",
        num_processes=1,
        mixed_precision="bf16",
    )
    free = 10**8
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    assert "--micro-tokens" in command.too_large(train.TrainConfig(), gpu)
    study = train.TrainConfig(study_hints=True)
    assert command.too_large(study, gpu) is None, "nothing is trained"
    free = 10**11
    assert command.too_large(train.TrainConfig(), gpu) is None
    cpu = types.SimpleNamespace(device=torch.device("cpu"))
    assert command.too_large(train.TrainConfig(), cpu) is None


def test_sampling_takes_what_is_free_unless_it_is_set(trainer, monkeypatch):
    budgets = []

    def sample_groups(*args, sample_mb, **settings):
        budgets.append(sample_mb)
        return []

    monkeypatch.setattr(engine, "sample_groups", sample_groups)
    monkeypatch.setattr(engine, "free_bytes", lambda device: 10 * 2**30)
    trainer.respond([], 4)
    trainer.config.sample_mb = 7
    trainer.respond([], 4)
    assert budgets == [pytest.approx(0.8 * 10 * 1024, rel=0.02), 7]
