"""plumbing/decoding.py: draws, and the two ways to decode a group."""

import math

import numpy as np
import pytest
import torch
from test_rollout import student_prompts

from plumbing.decoding import decode, draw, generate_by_transformers, uniforms
from rollout import banned_tokens, eos_tokens, pad_prompts, prefill
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


# ----------------------------------------------------------------------------------- ways to decode
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}


@torch.no_grad()
def decode_both_ways(base, eos, max_new_tokens):
    """Greedy responses to six puzzles: by our own sampler, and by model.generate."""
    model, processor = base
    prompts = student_prompts(processor, world.puzzles("heldout", 6))
    inputs = pad_prompts(prompts, processor.tokenizer.pad_token_id)
    banned = sorted(set(banned_tokens(model, processor.tokenizer)) - set(eos))
    special = eos, banned, processor.tokenizer.pad_token_id
    prefilled = prefill(model, inputs, torch.arange(6))
    own = decode(model, prefilled, None, *special, max_new_tokens, **GREEDY)
    theirs = generate_by_transformers(model, inputs, *special, max_new_tokens, **GREEDY)
    assert all(len(ids) == len(logp) for ids, logp in own)
    assert all(logp is None for _, logp in theirs)
    return [ids for ids, _ in own], [ids for ids, _ in theirs]


def test_both_ways_end_at_the_first_of_several_eos_tokens(base):
    """One of them is the pad token, as in many models."""
    eos = eos_tokens(base[0], base[1].tokenizer) + [base[1].tokenizer.pad_token_id]
    own, theirs = decode_both_ways(base, eos, 40)
    assert theirs == own
    assert len({len(ids) for ids in own}) > 1, "rows that end early are padded"
    stop = own[0][5]  # a token of the first response, and from now on an EOS
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in own]
    assert len(expected[0]) <= 6
    assert expected != own
    assert decode_both_ways(base, [*eos, stop], 40) == (expected, expected)


@pytest.mark.parametrize("max_new_tokens", [1, 3])
def test_both_ways_stop_at_the_longest_length(base, max_new_tokens):
    eos = eos_tokens(base[0], base[1].tokenizer)
    whole, _ = decode_both_ways(base, eos, 40)
    expected = [ids[:max_new_tokens] for ids in whole]
    assert decode_both_ways(base, eos, max_new_tokens) == (expected, expected)
