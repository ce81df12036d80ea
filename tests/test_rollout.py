"""rollout.py: chats, prompts, batches, sampling, verification and reward."""

import pytest
import torch
from conftest import greedy_of_transformers
from transformers import GenerationConfig

from losses import scores_from_hidden
from plumbing.decoding import PACES, Slots
from plumbing.memory import sequence_bytes
from rollout import (
    FORMAT_PROMPT,
    Question,
    banned_tokens,
    chat,
    collate,
    encode_prompts,
    eos_tokens,
    halve_where_memory_ends,
    pad_prompts,
    prefill,
    response_states,
    reward,
    sample_groups,
    student_messages,
    verify,
)
from toy import world


def student_prompts(processor, questions):
    """The prompts that the student gets."""
    return encode_prompts(processor, questions, [student_messages(q) for q in questions])


def mixed_questions():
    """Questions with one image, with two of different sizes, without any, and with one again."""
    one, other = world.puzzles("heldout", 2)
    two = Question(
        id="two",
        text="How many points are in the star row?",
        answer="3",
        images=[one.images[0], other.images[0].resize((84, 56))],
    )
    none = Question("text", "Which row is the star in?", "top", images=[])
    return [one, two, none, other]


# -------------------------------------------------------------------------------------------- chats
@pytest.mark.parametrize(
    "text, parts",
    [
        ("See", ["image", "image", "text"]),
        ("See <image> and <image> now", ["text", "image", "text", "image", "text"]),
        ("<image><image>See", ["image", "image", "text"]),
    ],
)
def test_images_stand_first_or_where_the_marks_are(text, parts):
    [turn] = student_messages(Question("a", text, "1", images=["x", "y"]))
    assert turn["role"] == "user"
    assert [part["type"] for part in turn["content"]] == parts
    assert turn["content"][-1]["text"] == f"{text.rpartition('<image>')[2]}\n{FORMAT_PROMPT}"


@pytest.mark.parametrize(
    "text, images",
    [
        ("How high is it?", []),
        ("How high is it?", ["one.png", "two.png"]),
        ("In <image>, how high is it?", ["one.png"]),
    ],
)
def test_a_chat_with_privileged_text_differs_from_the_student_s_by_that_text_alone(text, images):
    question = Question("a", text, "12", images)
    privileged = "Look at the left bar.\nIgnore the legend."
    [plain], [told] = student_messages(question), chat(question, privileged)
    assert told["role"] == plain["role"]
    assert told["content"][:-1] == plain["content"][:-1]
    plain_text, told_text = plain["content"][-1]["text"], told["content"][-1]["text"]
    assert told_text.endswith(f"\n{privileged}\n{FORMAT_PROMPT}")
    assert told_text.replace(f"{privileged}\n", "") == plain_text
    assert chat(question) == student_messages(question)


# ------------------------------------------------------------------------------------------ prompts
def test_an_encoded_prompt_holds_its_question_and_its_images(base):
    questions = mixed_questions()
    prompts = student_prompts(base[1], questions)
    assert all(
        prompt.question is question for prompt, question in zip(prompts, questions, strict=True)
    )
    assert [int(prompt.types.sum()) for prompt in prompts] == [16, 22, 0, 16]
    assert [prompt.pixels is None for prompt in prompts] == [False, False, True, False]


def test_padded_prompts_end_in_the_last_column(base):
    prompts = student_prompts(base[1], mixed_questions())
    inputs = pad_prompts(prompts, base[1].tokenizer.pad_token_id)
    longest = max(len(prompt.ids) for prompt in prompts)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.ids)
        assert torch.equal(inputs["input_ids"][row, start:], prompt.ids)
        assert torch.equal(inputs["mm_token_type_ids"][row, start:], prompt.types)
        assert inputs["attention_mask"][row].tolist() == [0] * start + [1] * len(prompt.ids)
    assert len(inputs["image_grid_thw"]) == 4


# ----------------------------------------------------------------------- responses on their prompts
RESPONSES = [[30, 31, 32], [33], [34, 35, 36, 37, 38], [39, 40]]


def prompts_of_responses(processor):
    """One prompt for each of RESPONSES. The first and the third have the same one, with a hint."""
    one, two, _, other = mixed_questions()
    chats = [chat(one, one.hint.render()), student_messages(two), student_messages(other)]
    hinted, with_two_images, plain = encode_prompts(processor, [one, two, other], chats)
    return [hinted, with_two_images, hinted, plain]


def states_alone(model, prompt, response):
    """The states (T, H) that predict a response, by one plain forward pass over it alone."""
    types = torch.cat([prompt.types, torch.zeros(len(response), dtype=torch.long)])
    out = model.model(
        input_ids=torch.cat([prompt.ids, torch.tensor(response)]).unsqueeze(0),
        mm_token_type_ids=types.unsqueeze(0),
        pixel_values=prompt.pixels,
        image_grid_thw=prompt.grid,
    )
    return out.last_hidden_state[0, -len(response) - 1 : -1]


def test_collate_masks_by_length_and_holds_a_shared_prompt_once(base):
    prompts = prompts_of_responses(base[1])
    batch = collate(prompts, RESPONSES, pad_id=base[1].tokenizer.pad_token_id)
    assert batch.mask.tolist() == [
        [True] * 3 + [False] * 2,
        [True] + [False] * 4,
        [True] * 5,
        [True] * 2 + [False] * 3,
    ]
    assert batch.prompt_of.tolist() == [0, 1, 0, 2]
    assert len(batch.prompts["input_ids"]) == 3
    whole = collate(prompts, RESPONSES, 0, one_prompt_per_response=True)
    assert whole.prompt_of.tolist() == [0, 1, 2, 3]
    assert len(whole.prompts["input_ids"]) == 4


def test_the_mask_keeps_an_eos_that_is_the_pad_token(base):
    prompts = student_prompts(base[1], mixed_questions()[:2])
    batch = collate(prompts, [[30, 7], [30, 31, 32]], pad_id=7)
    assert batch.ids.tolist() == [[30, 7, 7], [30, 31, 32]]
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]


@torch.no_grad()
def test_response_states_are_those_of_each_response_alone(base):
    """Prompts of different lengths, with one and two images, two responses on one prompt.

    Together, where prompts run once and are padded, as whole sequences, and each alone.
    """
    model, processor = base
    prompts = prompts_of_responses(processor)
    pad = processor.tokenizer.pad_token_id
    batch = collate(prompts, RESPONSES, pad)
    whole = collate(prompts, RESPONSES, pad, one_prompt_per_response=True)
    states, whole_states = response_states(model, batch), response_states(model, whole)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(whole_states[batch.mask], states[batch.mask], **close)
    for row, prompt, response in zip(states, prompts, RESPONSES, strict=True):
        alone = states_alone(model, prompt, response)
        torch.testing.assert_close(row[: len(response)], alone, **close)


@torch.no_grad()
def test_texts_of_different_lengths_do_not_count_each_other_s_padding(tiny):
    """A batch without any image: each response as in one plain forward pass over it alone."""
    model, processor = tiny
    texts = ["How many?", "How many points are in the star row plus the ring column?"]
    prompts = student_prompts(processor, [Question(t, t, "1", images=[]) for t in texts])
    lengths = [len(prompt.ids) for prompt in prompts]
    assert lengths[1] - lengths[0] > 5
    states = response_states(model, collate(prompts, RESPONSES[:2], 0))
    for row, prompt, response in zip(states, prompts, RESPONSES, strict=False):
        alone = states_alone(model, prompt, response)
        torch.testing.assert_close(row[: len(response)], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_text_only_after_images_does_not_use_stale_positions(base):
    model, processor = base
    with_image, _, text, _ = student_prompts(processor, mixed_questions())
    response_states(model, collate([with_image], [[30, 31]], 0))
    states = response_states(model, collate([text], [[30, 31, 32]], 0))
    whole = torch.cat([text.ids, torch.tensor([30, 31, 32])]).unsqueeze(0)
    alone = model.model(input_ids=whole).last_hidden_state[:, -4:-1]
    torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------- sampling
SPECIAL = (
    "<|image_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<unk>",
)


def respond(base, questions, group_size, **settings):
    """Groups of responses to the students' prompts, at most 40 tokens each."""
    prompts = student_prompts(base[1], questions)
    return sample_groups(*base, prompts, group_size, max_new_tokens=40, **settings)


def slots_mb(base, slots):
    """--sample-mb for so many slots, where the longest prompt has 60 tokens or a little more."""
    return (slots + 0.5) * sequence_bytes(base[0], 100) / 2**20


def ids_of(groups):
    return [[response.ids for response in group] for group in groups]


def test_every_special_token_but_eos_is_banned(base):
    model, processor = base
    id_of = processor.tokenizer.convert_tokens_to_ids
    banned = set(banned_tokens(model, processor.tokenizer))
    assert banned >= set(id_of(list(SPECIAL)))
    assert eos_tokens(model, processor.tokenizer) == [id_of("<|im_end|>")]
    assert id_of("<|im_end|>") not in banned
    assert not banned & set(id_of(["top", "red", "7", "}", "\\boxed{"]))


def test_vision_tokens_are_banned_by_the_model_s_config_too(base, monkeypatch):
    """Whether the tokenizer calls them special or not."""
    model, processor = base
    top = processor.tokenizer.convert_tokens_to_ids("top")
    monkeypatch.setattr(model.config, "image_token_id", top)
    assert top in banned_tokens(model, processor.tokenizer)


def test_rows_of_the_head_beyond_the_tokenizer_are_banned(base, monkeypatch):
    model, processor = base
    known = len(processor.tokenizer)
    padded_head = torch.nn.Linear(1, known + 2)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: padded_head)
    assert set(banned_tokens(model, processor.tokenizer)) >= {known, known + 1}


@pytest.mark.parametrize(
    "configured, names",
    [
        (None, {"<|im_end|>"}),
        ("<|endoftext|>", {"<|im_end|>", "<|endoftext|>"}),
        (["<|im_end|>", "<|endoftext|>"], {"<|im_end|>", "<|endoftext|>"}),
    ],
)
def test_all_tokens_that_end_a_response_are_eos_and_none_is_banned(
    base, monkeypatch, configured, names
):
    model, processor = base
    id_of = processor.tokenizer.convert_tokens_to_ids
    eos = None if configured is None else id_of(configured)
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=eos))
    assert eos_tokens(model, processor.tokenizer) == sorted(id_of(list(names)))
    assert not set(id_of(list(names))) & set(banned_tokens(model, processor.tokenizer))


def test_sampled_responses_end_with_eos_and_hold_no_banned_token(base):
    model, processor = base
    torch.manual_seed(0)
    questions = world.puzzles("heldout", 6)
    # hot: every allowed token gets its chance
    groups = respond(base, questions, 4, temperature=3.0)
    [eos] = eos_tokens(model, processor.tokenizer)
    banned = set(banned_tokens(model, processor.tokenizer))
    assert [len(group) for group in groups] == [4] * 6
    for question, group in zip(questions, groups, strict=True):
        for response in group:
            assert response.question is question
            assert not banned & set(response.ids)
            assert eos not in response.ids[:-1]
            assert response.truncated == (response.ids[-1] != eos)
            assert not response.truncated or len(response.ids) == 40
    assert len({tuple(response.ids) for response in groups[0]}) > 1


@pytest.mark.parametrize("places", [[0], [1], [2], [0, 3], [0, 1, 2, 3]])
def test_greedy_equals_generate_for_each_class(tiny, places):
    """In slots of their own, beside other prompts, against each question's model.generate."""
    model, processor = tiny
    questions = [mixed_questions()[place] for place in places]
    groups = respond(tiny, questions, 2, temperature=0.0)
    for prompt, group in zip(student_prompts(processor, questions), groups, strict=True):
        plain = greedy_of_transformers(model, processor, prompt, 40)
        assert len(set(plain)) > 3, "a constant output would prove little"
        assert [response.ids for response in group] == [plain, plain]


def test_greedy_of_the_embedded_model_equals_generate(base):
    """Responses of many lengths, in fewer slots than responses."""
    questions = world.puzzles("heldout", 12)
    own = respond(base, questions, 1, temperature=0.0, sample_mb=slots_mb(base, 5))
    prompts = student_prompts(base[1], questions)
    assert ids_of(own) == [[greedy_of_transformers(*base, prompt, 40)] for prompt in prompts]
    assert len({len(response.ids) for [response] in own}) > 1
    assert not any(response.truncated for [response] in own)


def test_each_prompt_runs_once_and_rows_that_have_ended_are_refilled(base, monkeypatch):
    questions, sizes, looks = world.puzzles("heldout", 12), [], []
    forward = base[0].model.forward

    def counted(*args, **inputs):
        sizes.append(len(inputs["input_ids"]))
        assert inputs["attention_mask"].all(), "prompts of one length: none is padded"
        return forward(*args, **inputs)

    monkeypatch.setattr(base[0].model, "forward", counted)
    settings = {"temperature": 1.5, "sample_mb": slots_mb(base, 8), "watch": looks.append}
    groups = respond(base, questions, 3, **settings)
    assert sum(sizes) == 12
    lengths = [len(ids) for group in ids_of(groups) for ids in group]
    paid = sum(look.slot_steps for look in looks)
    assert sum(lengths) >= 0.9 * paid
    rounds = [max(lengths[start : start + 8]) for start in range(0, 36, 8)]
    assert sum(lengths) < 0.8 * 8 * sum(rounds), "in lock-step rounds more slots would be idle"


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 5, "temperature": 1.5}])
def test_draws_depend_on_the_key_alone(base, settings):
    """Not on what is decoded beside a response, nor on torch's global state."""
    questions = world.puzzles("heldout", 5)

    def ids(asked, group_size=4, **more):
        return ids_of(respond(base, asked, group_size, **settings, **more))

    together = ids(questions)
    torch.manual_seed(99)
    assert ids(questions, sample_mb=slots_mb(base, 3)) == together
    assert ids(questions[::-1]) == together[::-1]
    assert ids(questions[2:4]) == together[2:4]
    assert ids(questions, group_size=2) == [group[:2] for group in together]
    keys = [f"again {i}" for i in range(5)]
    other = ids(questions, keys=keys)
    assert other != together
    assert ids(questions, keys=keys) == other


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_scorer_agrees_with_the_sampler(tiny, temperature):
    """The scorer's log-probs, token by token, against those that the sampler noted."""
    model, processor = tiny
    groups = respond(tiny, mixed_questions(), 2, temperature=temperature)
    responses = [response for group in groups for response in group]
    batch = collate(
        [response.prompt for response in responses],
        [response.ids for response in responses],
        processor.tokenizer.pad_token_id,
    )
    assert len(batch.prompts["input_ids"]) == 4, "prompts run once and are padded"
    with torch.no_grad():
        logp, _, _ = scores_from_hidden(
            response_states(model, batch)[batch.mask],
            model.get_output_embeddings(),
            batch.ids[batch.mask],
            temperature=temperature,
            banned=torch.tensor(banned_tokens(model, processor.tokenizer)),
        )
    own = torch.tensor([value for response in responses for value in response.logp])
    assert own.std() > 0.3
    assert (logp - own).abs().max() < 1e-4


def test_keys_are_one_per_prompt(base):
    prompts = student_prompts(base[1], world.puzzles("tune", 2))
    with pytest.raises(ValueError, match="3 keys for 2 prompts"):
        sample_groups(*base, prompts, 1, max_new_tokens=2, keys=["a", "b", "c"])


def test_the_training_mode_is_restored_where_watch_raises(base):
    prompts = student_prompts(base[1], world.puzzles("tune", 1))
    model = base[0].train()
    with pytest.raises(ZeroDivisionError):
        sample_groups(*base, prompts, 1, max_new_tokens=9, watch=lambda look: 1 / 0)
    assert model.training
    model.eval()


def test_the_training_mode_is_restored(base):
    model, _ = base
    try:
        for training in (True, False):
            model.train(training)
            respond(base, world.puzzles("heldout", 1), 1)
            assert model.training is training
    finally:
        model.eval()


def test_the_model_s_own_generation_settings_do_not_leak_in(base, monkeypatch):
    model, _ = base
    questions = world.puzzles("heldout", 3)
    before = ids_of(respond(base, questions, 1, temperature=0.0))
    own = model.generation_config
    strange = GenerationConfig(
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        repetition_penalty=5.0,
        top_k=1,
        temperature=0.01,
    )
    monkeypatch.setattr(model, "generation_config", strange)
    assert ids_of(respond(base, questions, 1, temperature=0.0)) == before
    [group] = ids_of(respond(base, questions[:1], 8))
    assert len(set(map(tuple, group))) > 1, "top_k = 1 would make them equal"


# ----------------------------------------------------------------------------- when memory runs out
@pytest.mark.parametrize("steps_before", [0, 12])
def test_running_out_of_memory_halves_the_slots_once_and_loses_nothing(
    base, monkeypatch, capsys, steps_before
):
    """steps_before: steps that go well; some responses have ended by then."""
    questions = world.puzzles("heldout", 3)
    whole = ids_of(respond(base, questions, 4))
    step, counts = Slots.step, []

    def fragile(slots, window):
        counts.append(len(slots.owners))
        if counts[-1] > limit and len(counts) > steps_before:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(slots, window)

    monkeypatch.setattr(Slots, "step", fragile)
    limit = 6
    assert ids_of(respond(base, questions, 4)) == whole
    assert counts[: steps_before + 2] == [12] * (steps_before + 1) + [6]
    message = "out of memory with 12 responses decoding together; going on with 6"
    assert message in capsys.readouterr().err
    limit = 4
    counts.clear()
    with pytest.raises(torch.OutOfMemoryError):
        respond(base, questions, 4)


def test_a_group_that_has_ended_when_memory_runs_out_is_kept(base, monkeypatch):
    """Its prompt does not run again, and the prompts behind it do."""
    monkeypatch.setitem(PACES, "cpu", PACES["cpu"]._replace(shrinks=False))
    questions = world.puzzles("heldout", 4)
    whole = ids_of(respond(base, questions, 2))
    ends = [max(len(ids) for ids in group) for group in whole]
    assert min(ends) < max(ends)
    step, forward, steps, prompts = Slots.step, base[0].model.forward, [], []

    def fragile(slots, window):
        steps.append(len(slots.owners))
        if len(steps) == min(ends) + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(slots, window)

    def counted(*args, **inputs):
        prompts.append(len(inputs["input_ids"]))
        return forward(*args, **inputs)

    monkeypatch.setattr(Slots, "step", fragile)
    monkeypatch.setattr(base[0].model, "forward", counted)
    assert ids_of(respond(base, questions, 2)) == whole
    assert 4 < sum(prompts) < 8


def test_memory_that_ends_with_one_slot_is_an_error():
    asked = []

    def decode(slots):
        asked.append(slots)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        halve_where_memory_ends(decode, 1)
    assert asked == [1]


# -------------------------------------------------------------------------- verification and reward
def test_verify_asks_the_judge_about_the_answer_that_was_found():
    question = Question("a", "Which one?", "B", [], choices=["red", "blue"])
    asked = []

    def judge(*about):
        asked.append(about)
        return True

    assert verify("I think \\boxed{A}, no: \\boxed{blue}", question, judge)
    assert asked == [("blue", "B", ["red", "blue"])]
    assert not verify("\\boxed{", question, judge)
    assert len(asked) == 1, "a missing answer is wrong, whatever the judge says"


def test_verify_compares_by_the_rules_by_default():
    question = Question("a", "Which one?", "B", [], choices=["red", "blue"])
    assert verify("\\boxed{blue}", question)
    assert not verify("\\boxed{red}", question)


@pytest.mark.parametrize(
    "response, correct, format_weight, expected",
    [
        ("\\boxed{7}", True, 0.0, 1.0),
        ("\\boxed{7}", False, 0.0, 0.0),
        ("\\boxed{7}", True, 0.1, 1.0),
        ("\\boxed{7}", False, 0.1, 0.1),
        ("answer: 7", True, 0.1, 0.9),
        ("\\boxed{", False, 0.1, 0.0),
    ],
)
def test_reward(response, correct, format_weight, expected):
    assert reward(response, correct, format_weight) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "response, expected",
    [
        ("so it is</think> \\boxed{7}", 1.0),
        ("<think>so it is</think> \\boxed{7}", 1.0),
        ("\\boxed{7}", 0.9),
        ("\\boxed{7}</think>", 0.9),
        ("a</think>b</think>\\boxed{7}", 0.9),
        ("a</think>7", 0.9),
        ("a<think>b</think>\\boxed{7}", 0.9),
        ("a</think><think>\\boxed{7}", 0.9),
    ],
)
def test_reward_of_thinking(response, expected):
    assert reward(response, True, 0.1, think=True) == pytest.approx(expected, rel=1e-12)
    assert reward(response, False, 0.1, think=True) == pytest.approx(expected - 0.9, rel=1e-12)


def test_the_cache_is_in_the_type_that_attention_multiplies_in(tiny):
    model, processor = tiny
    [question] = world.puzzles("tune", 1)
    [prompt] = student_prompts(processor, [question])
    with torch.autocast("cpu", torch.bfloat16):
        _, cache, attended, start = prefill(model, pad_prompts([prompt], 0), torch.tensor([0, 0]))
        model.model(
            input_ids=torch.tensor([[5], [6]]),
            attention_mask=torch.cat([attended, torch.ones(2, 1, dtype=torch.long)], 1),
            position_ids=start.expand(3, -1, -1),
            past_key_values=cache,
        )
    for layer in cache.layers:
        assert layer.keys.dtype == layer.values.dtype == torch.bfloat16
        assert layer.keys.shape[:3:2] == (2, len(prompt.ids) + 1)
