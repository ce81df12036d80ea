"""rollout.py: reading, prompts, sampling, the verifier, padding."""

import pytest
import torch
from transformers import GenerationConfig

import rollout
from hints import teacher_messages
from losses import scores_from_hidden
from plumbing.memory import sequence_bytes
from rollout import (
    FORMAT_PROMPT,
    Question,
    banned_tokens,
    collate,
    encode_prompts,
    eos_tokens,
    pad_prompts,
    response_states,
    reward,
    sample_groups,
    student_messages,
)
from toy import world


# ---------------------------------------------------------------------------------------------------------------- prompts
def test_images_stand_where_the_marks_are():
    content = student_messages(Question("a", "See <image> and <image> now", "1", ["x", "y"]))[0][
        "content"
    ]
    assert [c["type"] for c in content] == ["text", "image", "text", "image", "text"]
    assert content[-1]["text"] == f" now\n{FORMAT_PROMPT}"
    assert [
        c["type"] for c in student_messages(Question("a", "See", "1", ["x", "y"]))[0]["content"]
    ] == ["image", "image", "text"]


def test_response_states_are_those_of_each_response_alone(base):
    """Prompts of different lengths, one and two images, two responses on one prompt: together, prompts run once and padded, and alone in
    one plain forward pass."""
    model, processor = base
    a, b = world.puzzles("heldout", 2)
    two = Question(
        "two",
        "How many points are in the star row?",
        "3",
        [a.images[0], b.images[0].resize((84, 56))],
    )
    x, y, z = encode_prompts(
        processor, [a, two, b], [teacher_messages(a), student_messages(two), student_messages(b)]
    )
    prompts, responses = [x, y, x, z], [[30, 31, 32], [33], [34, 35, 36, 37, 38], [39, 40]]
    batch = collate(prompts, responses, processor.tokenizer.pad_token_id)
    assert batch.mask.tolist() == [
        [True] * 3 + [False] * 2,
        [True] + [False] * 4,
        [True] * 5,
        [True] * 2 + [False] * 3,
    ]
    assert batch.rows.tolist() == [0, 1, 0, 2] and len(batch.prompts["input_ids"]) == 3
    apart = collate(prompts, responses, processor.tokenizer.pad_token_id, apart=True)
    assert apart.rows.tolist() == [0, 1, 2, 3] and len(apart.prompts["input_ids"]) == 4
    with torch.no_grad():
        states = response_states(model, batch)
        torch.testing.assert_close(
            response_states(model, apart)[batch.mask], states[batch.mask], rtol=1e-4, atol=1e-4
        )
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            n, row = len(response), torch.cat([prompt.ids, torch.tensor(response)])[None]
            types = torch.cat([prompt.types, torch.zeros(n, dtype=torch.long)])[None]
            alone = model.model(
                input_ids=row,
                mm_token_type_ids=types,
                pixel_values=prompt.pixels,
                image_grid_thw=prompt.grid,
            )
            torch.testing.assert_close(
                states[i, :n], alone.last_hidden_state[0, -n - 1 : -1], rtol=1e-4, atol=1e-4
            )


def test_text_only_after_images_does_not_use_stale_positions(base):
    model, processor = base
    text = Question("text", "Which row is the star in?", "top", [])
    response_states(
        model,
        collate(
            encode_prompts(processor, (s := world.puzzles("heldout", 1)), [student_messages(s[0])]),
            [[30, 31]],
            0,
        ),
    )
    prompt = encode_prompts(processor, [text], [student_messages(text)])[0]
    with torch.no_grad():
        states = response_states(model, collate([prompt], [[30, 31, 32]], 0))
        alone = model.model(
            input_ids=torch.cat([prompt.ids, torch.tensor([30, 31, 32])])[None]
        ).last_hidden_state[:, -4:-1]
    torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- sampling
def test_every_special_token_but_eos_is_banned(base):
    model, processor = base
    ids = processor.tokenizer.convert_tokens_to_ids
    banned = banned_tokens(model, processor.tokenizer)
    assert set(banned) >= {
        ids(t)
        for t in (
            "<|image_pad|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|video_pad|>",
            "<|im_start|>",
            "<|endoftext|>",
            "<unk>",
        )
    }
    assert (
        eos_tokens(model, processor.tokenizer) == [ids("<|im_end|>")]
        and ids("<|im_end|>") not in banned
    )
    assert not {ids(t) for t in ("top", "red", "7", "}", "\\boxed{")} & set(banned)


def rollouts(base, samples, n, **settings):
    prompts = encode_prompts(base[1], samples, [student_messages(s) for s in samples])
    return sample_groups(*base, samples, prompts, n, max_new_tokens=40, **settings)


def test_sampled_responses_end_with_eos_and_hold_no_banned_token(base):
    torch.manual_seed(0)
    samples = world.puzzles("heldout", 6)
    groups = rollouts(base, samples, 4, temperature=3.0)  # hot: every allowed token gets its chance
    eos = eos_tokens(base[0], base[1].tokenizer)[0]
    banned = set(banned_tokens(base[0], base[1].tokenizer))
    assert [len(g) for g in groups] == [4] * 6 and all(
        r.sample is s for g, s in zip(groups, samples) for r in g
    )
    for r in (r for g in groups for r in g):
        assert not banned & set(r.ids) and eos not in r.ids[:-1]
        assert r.truncated == (r.ids[-1] != eos) and (not r.truncated or len(r.ids) == 40)
    assert len({tuple(r.ids) for r in groups[0]}) > 1


def mixed():
    """Questions with one image, two images of different sizes, and none."""
    a, b = world.puzzles("heldout", 2)
    return [
        a,
        Question(
            "two",
            "How many points are in the star row?",
            "3",
            [a.images[0], b.images[0].resize((84, 56))],
        ),
        Question("text", "Which row is the star in?", "top", []),
        b,
    ]


@pytest.mark.parametrize("questions", [[0], [1], [2], [0, 3], [0, 1, 2, 3]])
def test_greedy_equals_generate_for_each_class(tiny, questions):
    """Alone, and together in one left-padded batch, against each question's own model.generate."""
    model, processor = tiny
    samples = [mixed()[i] for i in questions]
    groups = rollouts(tiny, samples, 2, temperature=0.0)
    for prompt, group in zip(
        encode_prompts(processor, samples, [student_messages(s) for s in samples]), groups
    ):
        inputs = pad_prompts([prompt], processor.tokenizer.pad_token_id)
        out = model.generate(
            **inputs,
            max_new_tokens=40,
            do_sample=False,
            suppress_tokens=banned_tokens(model, processor.tokenizer),
        )
        plain = out[0, len(prompt.ids) :].tolist()
        assert len(set(plain)) > 3, "a constant output would prove little"
        assert all(r.ids == plain[: len(r.ids)] and (len(r.ids) == len(plain)) for r in group)


def test_greedy_of_the_embedded_model_equals_generate(base):
    """Responses of many lengths: rows leave the batch as they end."""
    samples = world.puzzles("heldout", 12)
    own, plain = (
        rollouts(base, samples, 1, temperature=0.0, generate=how) for how in ("own", "hf")
    )
    assert [g[0].ids for g in own] == [g[0].ids for g in plain] and len(
        {len(g[0].ids) for g in own}
    ) > 1
    assert not any(g[0].truncated for g in own) and plain[0][0].logp is None


def test_rows_that_have_ended_leave_the_batch(base, monkeypatch):
    samples, sizes = world.puzzles("heldout", 12), []
    forward = base[0].model.forward
    monkeypatch.setattr(
        base[0].model,
        "forward",
        lambda *args, **more: (sizes.append(len(more["input_ids"])), forward(*args, **more))[1],
    )
    lengths = [len(r.ids) for g in rollouts(base, samples, 3, temperature=1.5) for r in g]
    assert sizes[:2] == [12, 36], "each prompt runs once, then its three responses"
    for t, rows in enumerate(sizes[2:], 2):
        alive = sum(n > t for n in lengths)
        assert alive <= rows <= max(alive / 0.75, 1), "at most a quarter of the rows is idle"
    assert len(sizes) == max(lengths) and sizes[-1] < 36


@pytest.mark.parametrize("how", [{}, {"top_p": 0.9}, {"top_k": 5, "temperature": 1.5}])
def test_draws_depend_on_the_key_alone(base, how):
    """Not on what is decoded beside a response, nor on torch's global state."""
    samples = world.puzzles("heldout", 5)

    def ids(groups):
        return [[r.ids for r in g] for g in groups]

    model = base[0]
    together = ids(rollouts(base, samples, 4, **how))
    one = sequence_bytes(model, 100) / 2**20
    torch.manual_seed(99)
    assert ids(rollouts(base, samples, 4, sample_mb=3 * one, **how)) == together
    assert ids(rollouts(base, samples[2:4], 4, **how)) == together[2:4]
    assert [g[:2] for g in together] == ids(rollouts(base, samples, 2, **how))
    other = ids(rollouts(base, samples, 4, keys=[f"again {i}" for i in range(5)], **how))
    assert (
        other != together
        and ids(rollouts(base, samples, 4, keys=[f"again {i}" for i in range(5)], **how)) == other
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_scorer_agrees_with_the_sampler(tiny, temperature):
    """Log-probs of a response by the scorer, prompts padded and run once, against the sampler's own, token by token."""
    model, processor = tiny
    samples = mixed()
    prompts = encode_prompts(processor, samples, [student_messages(s) for s in samples])
    flat = [r for g in rollouts(tiny, samples, 2, temperature=temperature) for r in g]
    batch = collate(
        [p for p in prompts for _ in range(2)],
        [r.ids for r in flat],
        processor.tokenizer.pad_token_id,
    )
    with torch.no_grad():
        states = response_states(model, batch)[batch.mask]
        logp = scores_from_hidden(
            states,
            model.get_output_embeddings(),
            batch.ids[batch.mask],
            temperature=temperature,
            banned=torch.tensor(banned_tokens(model, processor.tokenizer)),
        )[0]
    own = torch.tensor([x for r in flat for x in r.logp])
    assert own.std() > 0.3 and (logp - own).abs().max() < 1e-4


def test_running_out_of_memory_halves_the_batch_once_and_loses_nothing(base, monkeypatch, capsys):
    samples = world.puzzles("heldout", 3)
    whole = [[r.ids for r in g] for g in rollouts(base, samples, 4)]
    decode, sizes, limit = rollout._decode, [], 8

    def fragile(model, prompts, *args, **more):
        sizes.append(len(prompts))
        if len(prompts) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(model, prompts, *args, **more)

    monkeypatch.setattr(rollout, "_decode", fragile)
    assert [[r.ids for r in g] for g in rollouts(base, samples, 4)] == whole and sizes == [12, 6, 6]
    assert (
        "out of memory decoding 12 sequences together; going on with 6" in capsys.readouterr().err
    )
    limit = 4
    with pytest.raises(torch.OutOfMemoryError):
        rollouts(base, samples, 4)


def test_the_model_s_own_generation_settings_do_not_leak_in(base):
    samples = world.puzzles("heldout", 3)
    before = [g[0].ids for g in rollouts(base, samples, 1, temperature=0.0)]
    own = base[0].generation_config
    base[0].generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        repetition_penalty=5.0,
        top_k=1,
        temperature=0.01,
    )
    try:
        assert [g[0].ids for g in rollouts(base, samples, 1, temperature=0.0)] == before
        torch.manual_seed(1)
        assert (
            len({tuple(r.ids) for r in rollouts(base, samples[:1], 8)[0]}) > 1
        )  # top_k = 1 would make them equal
    finally:
        base[0].generation_config = own


# ---------------------------------------------------------------------------------------------------- answers and rewards


def test_reward():
    assert reward("\\boxed{7}", True) == 1.0 and reward("\\boxed{7}", False) == 0.0
    assert reward("\\boxed{7}", False, 0.1) == pytest.approx(0.1) and reward(
        "answer: 7", True, 0.1
    ) == pytest.approx(0.9)
    assert reward("\\boxed{", False, 0.1) == 0.0
    thought = "so it is</think> \\boxed{7}"
    assert (
        reward(thought, True, 0.1, think=True) == 1.0
        and reward("<think>" + thought, True, 0.1, think=True) == 1.0
    )
    for text in (
        "\\boxed{7}",
        "\\boxed{7}</think>",
        "a</think>b</think>\\boxed{7}",
        "a</think>7",
        "a<think>b</think>\\boxed{7}",
    ):
        assert reward(text, False, 0.1, think=True) == 0.0
