"""plumbing/decoding.py and text_decoder.py: draws, slots, and CUDA graphs of a step."""

import contextlib
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import greedy_of_transformers, make_tiny, plain_logits
from test_rollout import mixed_questions, student_prompts
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from plumbing.decoding import BLOCK, PACES, Prefilled, Slots, StepGraphs, draw, uniforms
from plumbing.memory import sequence_bytes
from plumbing.models import _add_adapters
from rollout import (
    banned_tokens,
    collate,
    eos_tokens,
    pad_prompts,
    prefill,
    response_states,
    sample_groups,
)
from toy import world

P = torch.tensor([0.0, 0.4, 0.02, 0.3, 0.18, 0.1])
COUNT = 10_000


# -------------------------------------------------------------------------------------------- draws
def draws(temperature=1.0, **settings):
    """Tokens and log-probs for COUNT evenly spread uniforms from the distribution P."""
    spread = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    return draw(P.log().expand(COUNT, -1), spread, temperature, **settings)


def at_temperature(temperature):
    weights = P ** (1 / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize(
    "settings, shares",
    [
        ({}, P),
        ({"temperature": 2.0}, at_temperature(2.0)),
        ({"top_k": 2}, np.array([0, 4, 0, 3, 0, 0]) / 7),
        ({"top_k": 6}, P),
        # 0.7 of the mass is not yet enough
        ({"top_p": 0.75}, np.array([0, 0.4, 0, 0.3, 0.18, 0]) / 0.88),
        ({"top_p": 0.75, "top_k": 2}, np.array([0, 4, 0, 3, 0, 0]) / 7),
        ({"top_p": 0.35, "top_k": 2}, [0, 1, 0, 0, 0, 0]),
    ],
)
def test_each_token_is_drawn_as_often_as_its_probability_says(settings, shares):
    """And top-k and top-p leave exactly the tokens that they should."""
    token, _ = draws(**settings)
    drawn = np.bincount(token.numpy(), minlength=6) / COUNT
    np.testing.assert_allclose(drawn, shares, atol=2 / COUNT)


def test_a_nucleus_of_one_token_is_always_that_token():
    token, _ = draws(top_p=0.35)
    assert (token == 1).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}, {"top_p": 0.75}])
def test_log_probs_are_of_the_whole_distribution(temperature, truncation):
    token, logp = draws(temperature, **truncation)
    expected = at_temperature(temperature).log()[token]
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-6)


def test_the_ends_draw_no_token_of_probability_zero():
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    token, _ = draw(P.log().expand(2, -1), ends)
    assert token.tolist() == [1, 5]


def test_greedy_is_the_most_probable_token():
    token, logp = draw(P.log().unsqueeze(0), None)
    assert token.item() == 1
    assert logp.item() == pytest.approx(math.log(0.4))


def test_uniforms_depend_on_their_key_alone():
    assert uniforms(["a", "b", "a"], 3)[0].tolist() == uniforms(["a"], 3)[0].tolist()
    assert uniforms(["a", "b", "a"], 3)[2].tolist() == uniforms(["a"], 3)[0].tolist()
    assert len(set(uniforms(["a", "b"], 2).flatten().tolist())) == 4


def test_a_draw_over_many_blocks_is_the_plain_inverse_of_the_sums():
    """Vocabulary of no whole number of blocks, with tokens of probability 0 on both sides."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(4, 3 * BLOCK + 77, generator=generator) ** 8
    p[:, :BLOCK] = p[:, -80:] = 0
    uniform = torch.rand(4, dtype=torch.float64, generator=generator)
    uniform = torch.cat([uniform.new_tensor([0.0, 1 - 2**-53]), uniform[2:]])
    token, _ = draw(p.log(), uniform)
    exact = p.double() / p.double().sum(-1, keepdim=True)
    sums = exact.cumsum(-1)
    for row, drawn in enumerate(token.tolist()):
        assert p[row, drawn] > 0
        assert sums[row, drawn] >= uniform[row] - 1e-6
        assert sums[row, drawn - 1] <= uniform[row] + 1e-6


# -------------------------------------------------------------------------------------------- slots
def sampled(base, questions, slots, limit=40, **settings):
    """Two responses to each question: ids and log-probs."""
    prompts = student_prompts(base[1], questions)
    longest = max(len(prompt.ids) for prompt in prompts)
    sample_mb = (slots + 0.5) * sequence_bytes(base[0], longest + limit) / 2**20
    groups = sample_groups(*base, prompts, 2, max_new_tokens=limit, sample_mb=sample_mb, **settings)
    responses = [response for group in groups for response in group]
    return [r.ids for r in responses], [torch.tensor(r.logp) for r in responses], responses


@pytest.mark.slow
def test_the_number_of_slots_changes_nothing(tiny, monkeypatch):
    """Prompts with one image, two and none, of different lengths; against one slot.

    Nor do the order of the questions and a GPU's pace: looks every 8 steps at an old copy, wide
    windows, rows that never leave.
    """
    questions = [*mixed_questions(), *world.puzzles("tune", 3)]
    expected, expected_logp, responses = sampled(tiny, questions, 1)
    for slots in (3, 5, 64):
        ids, logp, _ = sampled(tiny, questions, slots)
        assert ids == expected
        for ours, theirs in zip(logp, expected_logp, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    reverse, _, _ = sampled(tiny, questions[::-1], 5)
    assert sorted(reverse) == sorted(expected)
    monkeypatch.setitem(PACES, "cpu", PACES["cuda"]._replace(window=32))
    lengths = [len(response.ids) for response in responses]
    for slots in (3, 64):
        looks = []
        assert sampled(tiny, questions, slots, watch=looks.append)[0] == expected
        assert sorted(length for look in looks for length in look.lengths) == sorted(lengths)
        assert sum(look.tokens for look in looks) == sum(lengths)
        assert all(look.slot_steps % 8 == 0 for look in looks)


def test_log_probs_are_those_of_whole_sequences(tiny):
    """Without a cache, slots or padding; none of our code runs."""
    model, processor = tiny
    banned = banned_tokens(model, processor.tokenizer)
    _, _, responses = sampled(tiny, mixed_questions(), 5)
    for response in responses:
        logits = plain_logits(model, response.prompt, response.ids, banned)
        plain = logits.log_softmax(-1).gather(1, torch.tensor(response.ids).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(response.logp), plain, rtol=0, atol=1e-5)


def test_a_response_ends_at_the_first_of_several_eos_tokens(base, monkeypatch):
    """One of them is the pad token, as in many models."""
    model, processor = base
    [eos] = eos_tokens(model, processor.tokenizer)
    pad = processor.tokenizer.pad_token_id
    questions = world.puzzles("heldout", 6)
    whole, _, _ = sampled(base, questions, 4, temperature=0.0)
    stop = whole[0][5]  # a token of the first response, and from now on an EOS
    monkeypatch.setattr(model.generation_config, "eos_token_id", [eos, pad, stop])
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in whole]
    assert len(expected[0]) <= 6
    assert expected != whole
    assert sampled(base, questions, 4, temperature=0.0)[0] == expected


@pytest.mark.parametrize("limit", [1, 3])
def test_a_response_stops_at_the_longest_length(base, limit):
    questions = world.puzzles("heldout", 6)
    whole, _, _ = sampled(base, questions, 4, temperature=0.0)
    short, _, responses = sampled(base, questions, 4, limit, temperature=0.0)
    assert short == [ids[:limit] for ids in whole]
    assert all(response.truncated for response in responses)


class Operators(TorchDispatchMode):
    """Counts the operators that run a kernel, and those that read a value on the host."""

    VIEWS = {
        "view", "_unsafe_view", "expand", "slice", "transpose", "t", "unsqueeze", "squeeze",
        "select", "split", "split_with_sizes", "chunk", "unflatten", "detach", "alias",
        "as_strided", "permute", "narrow", "unbind", "empty", "empty_strided",
    }  # fmt: skip
    READS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select"}

    def __init__(self):
        super().__init__()
        self.kernels, self.reads = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.READS:
            self.reads[name] += 1
        elif name not in self.VIEWS:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def running_slots(model, processor, rows, limit):
    """Slots in which `rows` responses to one puzzle have begun."""
    [prompt] = student_prompts(processor, world.puzzles("tune", 1))
    slots = Slots(model, rows, len(prompt.ids), limit, [], [])
    slots.sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    with torch.no_grad():
        state, cache, _, first = prefill(model, pad_prompts([prompt], 0), torch.zeros(1).long())
        noise = torch.rand(rows, limit, dtype=torch.float64)
        where = torch.zeros(rows, dtype=torch.long)
        owners = list(range(rows))
        batch = Prefilled(owners, where, state[:, 0], cache.layers, first[:, 0], noise)
        slots.begin(batch, owners, owners)
    return slots


@torch.no_grad()
def test_no_step_reads_a_value_on_the_host(tiny):
    slots = running_slots(*tiny, 4, 70)
    with Operators() as operators:
        for _ in range(64):
            slots.advance()
    assert not operators.reads
    assert slots.rows["made"].tolist() == [64] * 4


@torch.no_grad()
def test_a_step_of_28_layers_launches_at_most_700_kernels(base, monkeypatch):
    """Qwen2-VL-2B has 28 layers. bfloat16 under autocast over float32 weights, as on a GPU.

    PyTorch's rms_norm is one kernel on a GPU, from torch 2.9 on; on a CPU it is made of six.
    """
    rms_norm, norms = torch.nn.functional.rms_norm, []

    def one_kernel(*args):
        norms.append(True)
        with _disable_current_modes():
            return rms_norm(*args)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", one_kernel)
    model = make_tiny("Qwen2VL", base[1], num_hidden_layers=28)
    with torch.autocast("cpu", torch.bfloat16):
        slots = running_slots(model, base[1], 4, 12)
    norms.clear()
    with Operators() as operators:
        slots.advance()
    assert len(norms) == 2 * 28 + 1
    assert 28 * 10 < len(norms) + sum(operators.kernels.values()) <= 700


@torch.no_grad()
def test_a_step_in_bfloat16_differs_from_the_model_s_own_by_rounding(tiny):
    """Packed products, fused norms, an additive mask: no farther from float32 than transformers."""
    model, processor = tiny

    def states(precision):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            slots = running_slots(model, processor, 3, 8)
            [prompt] = student_prompts(processor, world.puzzles("tune", 1))
            slots.rows["noise"][:] = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
            for _ in range(6):
                with torch.autocast("cpu", enabled=False):
                    slots.step(slots.cache[0].shape[2])
            batch = collate([prompt], [slots.rows["ids"][0, :7].tolist()], 0)
            return slots.rows["state"][0], response_states(model, batch)[0, -1].float()

    ours, theirs = states("bf16")
    ours_exact, exact = states("no")
    torch.testing.assert_close(ours_exact, exact, rtol=1e-4, atol=1e-4)
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-3


@torch.no_grad()
def test_adapters_are_merged_into_the_sampler_s_weights(base):
    """LoRA: greedy equals model.generate, and the model itself is not changed."""
    pytest.importorskip("peft")
    model = make_tiny("Qwen2VL", base[1])
    _add_adapters(model, 4)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    prompts = student_prompts(base[1], world.puzzles("tune", 3))
    settings = {"max_new_tokens": 20, "temperature": 0.0}
    groups = sample_groups(model, base[1], prompts, 1, **settings)
    expected = [greedy_of_transformers(model, base[1], prompt, 20) for prompt in prompts]
    assert [response.ids for [response] in groups] == expected
    model.disable_adapters()
    assert [greedy_of_transformers(model, base[1], prompt, 20) for prompt in prompts] != expected
    groups = sample_groups(model, base[1], prompts, 1, **settings)
    plain = [greedy_of_transformers(model, base[1], prompt, 20) for prompt in prompts]
    assert [response.ids for [response] in groups] == plain, "adapters that are switched off"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# ------------------------------------------------------------------------------------- CUDA graphs
class FakeGraphs:
    """What StepGraphs asks of torch.cuda, on a CPU: a captured step runs when it is replayed."""

    def __init__(self, monkeypatch, fails=False):
        self.fails, self.captured, self.replayed = fails, 0, 0
        fakes = self

        class Graph:
            def replay(self):
                fakes.replayed += 1
                self.step()

        class Stream:
            def wait_stream(self, other):
                pass

        @contextlib.contextmanager
        def capture(graph, pool, stream):
            if fakes.fails:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            fakes.captured += 1
            yield

        for name, fake in {
            "CUDAGraph": Graph,
            "Stream": Stream,
            "graph_pool_handle": lambda: None,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "graph": capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_a_step_is_captured_once_per_window_and_then_replayed(monkeypatch):
    fakes, ran = FakeGraphs(monkeypatch), []
    graphs = StepGraphs(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda.CUDAGraph, "step", lambda self: ran.append("replay"), False)
    for window in (256, 256, 512, 256, 256, 256, 512, 512, 512):
        graphs.run(window, lambda: ran.append("step"))
    assert fakes.captured == 2
    assert fakes.replayed == 3
    # a capture calls the step too, and on a GPU runs nothing
    assert ran.count("step") == 2 * StepGraphs.WARM_UP + 2
    assert set(graphs.graphs) == {256, 512}


def test_a_capture_that_fails_leaves_the_plain_step_and_says_so_once(monkeypatch, capsys):
    FakeGraphs(monkeypatch, fails=True)
    graphs, ran = StepGraphs(torch.device("cuda")), []
    for _ in range(6):
        graphs.run(256, lambda: ran.append("step"))
    assert len(ran) == 6
    message = capsys.readouterr().err
    assert message.count("no CUDA graph") == 1
    assert "operation not permitted" in message
