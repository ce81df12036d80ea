"""rollout.py: reading, prompts, sampling, the verifier, padding."""
import json

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from hints import Hint, hinted_messages
from rollout import (FORMAT_PROMPT, Sample, banned_tokens, collate, encode_prompts, eos_tokens, extract_answer, load_processor,
                     load_samples, pad_prompts, plain_messages, response_states, reward, sample_groups, verify)
from toy import world


# ---------------------------------------------------------------------------------------------------------------- reading
@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    return tmp_path


def write(folder, *rows):
    path = folder / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_good_lines(folder):
    path = write(folder, {"question": "How many?", "answer": 3, "images": ["a.png"], "id": "q1", "hint": {"look": ["left"]}}, "",
                 {"problem": "<image>What?", "answer": "blue", "image": "a.png", "hint": "Look left."})
    one, two = load_samples(path, Hint.from_json)
    assert (one.id, one.question, one.answer, one.hint.look) == ("q1", "How many?", "3", ("left",))
    assert (two.id, two.answer, two.hint.steps) == ("data-3", "blue", ("Look left.",)) and len(two.images) == 1


@pytest.mark.parametrize("row,message", [
    ({"question": "a?", "images": ["a.png"]}, r"data.jsonl:2: no answer"), ({"question": "a?", "answer": " "}, "no answer"),
    ({"answer": "1"}, "no question"), ("{oops", "data.jsonl:2"), ("[1]", "expected a JSON object"),
    ({"question": "a?", "answer": "1", "images": ["broken.png"]}, "cannot read .*broken.png"),
    ({"question": "a?", "answer": "1", "image": "gone.png"}, "cannot read .*gone.png"),
    ({"question": "<image> and <image>", "answer": "1", "image": "a.png"}, "2 <image> marks but there are 1"),
    ({"question": "a?", "answer": "1", "hint": {"where": []}}, "data.jsonl:2: unknown hint field")])
def test_bad_lines_name_file_line_and_field(folder, row, message):
    with pytest.raises(ValueError, match=message):
        load_samples(write(folder, {"question": "fine?", "answer": "1"}, row), Hint.from_json)


def test_missing_and_empty_files(folder):
    with pytest.raises(ValueError, match="no such file"):
        load_samples(folder / "none.jsonl")
    with pytest.raises(ValueError, match="no samples"):
        load_samples(write(folder, ""))


# ---------------------------------------------------------------------------------------------------------------- prompts
def test_images_stand_where_the_marks_are():
    content = plain_messages(Sample("a", "See <image> and <image> now", "1", ["x", "y"]))[0]["content"]
    assert [c["type"] for c in content] == ["text", "image", "text", "image", "text"]
    assert content[-1]["text"] == f" now\n{FORMAT_PROMPT}"
    assert [c["type"] for c in plain_messages(Sample("a", "See", "1", ["x", "y"]))[0]["content"]] == ["image", "image", "text"]


def test_processor_survives_saving(base, tmp_path):
    _, processor = base
    processor.save_pretrained(tmp_path)
    again = load_processor(str(tmp_path))
    samples = world.puzzles("heldout", 2)
    for a, b in zip(*(encode_prompts(p, samples, [hinted_messages(s) for s in samples]) for p in (processor, again))):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.pixels, b.pixels) and torch.equal(a.types, b.types)


def test_one_cell_is_one_image_token_and_nothing_is_unknown(base):
    model, processor = base
    samples = world.puzzles("train", 50)
    for prompt in encode_prompts(processor, samples, [hinted_messages(s) for s in samples]):
        assert prompt.types.sum() == 16 == (prompt.ids == model.config.image_token_id).sum()
        assert not (prompt.ids == processor.tokenizer.unk_token_id).any()


def test_response_states_are_those_of_each_response_alone(base):
    """Prompts of different lengths, one and two images, two responses on one prompt: together, prompts run once and padded, and alone in
    one plain forward pass."""
    model, processor = base
    a, b = world.puzzles("heldout", 2)
    two = Sample("two", "How many points are in the star row?", "3", [a.images[0], b.images[0].resize((84, 56))])
    x, y, z = encode_prompts(processor, [a, two, b], [hinted_messages(a), plain_messages(two), plain_messages(b)])
    prompts, responses = [x, y, x, z], [[30, 31, 32], [33], [34, 35, 36, 37, 38], [39, 40]]
    batch = collate(prompts, responses, processor.tokenizer.pad_token_id)
    assert batch.mask.tolist() == [[True] * 3 + [False] * 2, [True] + [False] * 4, [True] * 5, [True] * 2 + [False] * 3]
    assert batch.rows.tolist() == [0, 1, 0, 2] and len(batch.prompts["input_ids"]) == 3
    with torch.no_grad():
        states = response_states(model, batch)
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            n, row = len(response), torch.cat([prompt.ids, torch.tensor(response)])[None]
            types = torch.cat([prompt.types, torch.zeros(n, dtype=torch.long)])[None]
            alone = model.model(input_ids=row, mm_token_type_ids=types, pixel_values=prompt.pixels, image_grid_thw=prompt.grid)
            torch.testing.assert_close(states[i, :n], alone.last_hidden_state[0, -n - 1:-1], rtol=1e-4, atol=1e-4)


def test_text_only_after_images_does_not_use_stale_positions(base):
    model, processor = base
    text = Sample("text", "Which row is the star in?", "top", [])
    response_states(model, collate(encode_prompts(processor, (s := world.puzzles("heldout", 1)), [plain_messages(s[0])]), [[30, 31]], 0))
    prompt = encode_prompts(processor, [text], [plain_messages(text)])[0]
    with torch.no_grad():
        states = response_states(model, collate([prompt], [[30, 31, 32]], 0))
        alone = model.model(input_ids=torch.cat([prompt.ids, torch.tensor([30, 31, 32])])[None]).last_hidden_state[:, -4:-1]
    torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- sampling
def test_every_special_token_but_eos_is_banned(base):
    model, processor = base
    ids = processor.tokenizer.convert_tokens_to_ids
    banned = banned_tokens(model, processor.tokenizer)
    assert set(banned) >= {ids(t) for t in ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|im_start|>",
                                            "<|endoftext|>", "<unk>")}
    assert eos_tokens(model, processor.tokenizer) == [ids("<|im_end|>")] and ids("<|im_end|>") not in banned
    assert not {ids(t) for t in ("top", "red", "7", "}", "\\boxed{")} & set(banned)


def rollouts(base, samples, n, **settings):
    prompts = encode_prompts(base[1], samples, [plain_messages(s) for s in samples])
    return sample_groups(*base, samples, prompts, n, max_new_tokens=40, **settings)


def test_sampled_responses_end_with_eos_and_hold_no_banned_token(base):
    torch.manual_seed(0)
    samples = world.puzzles("heldout", 6)
    groups = rollouts(base, samples, 4, temperature=3.0)        # hot: every allowed token gets its chance
    eos = eos_tokens(base[0], base[1].tokenizer)[0]
    banned = set(banned_tokens(base[0], base[1].tokenizer))
    assert [len(g) for g in groups] == [4] * 6 and all(r.sample is s for g, s in zip(groups, samples) for r in g)
    for r in (r for g in groups for r in g):
        assert not banned & set(r.ids) and eos not in r.ids[:-1]
        assert r.truncated == (r.ids[-1] != eos) and (not r.truncated or len(r.ids) == 40)
    assert len({tuple(r.ids) for r in groups[0]}) > 1


def test_greedy_does_not_depend_on_batching_and_equals_generate(base):
    model, processor = base
    samples = world.puzzles("heldout", 5)
    groups = rollouts(base, samples, 1, temperature=0.0)
    assert [g[0].ids for g in groups] == [g[0].ids for g in rollouts(base, samples, 1, temperature=0.0, batch=2)]
    prompts = encode_prompts(processor, samples, [plain_messages(s) for s in samples])
    for prompt, group in zip(prompts, groups):
        inputs = pad_prompts([prompt], processor.tokenizer.pad_token_id)
        plain = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, len(prompt.ids):].tolist()
        assert plain[:len(group[0].ids)] == group[0].ids


def test_the_model_s_own_generation_settings_do_not_leak_in(base):
    samples = world.puzzles("heldout", 3)
    before = [g[0].ids for g in rollouts(base, samples, 1, temperature=0.0)]
    own = base[0].generation_config
    base[0].generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, repetition_penalty=5.0,
                                                 top_k=1, temperature=0.01)
    try:
        assert [g[0].ids for g in rollouts(base, samples, 1, temperature=0.0)] == before
        torch.manual_seed(1)
        assert len({tuple(r.ids) for r in rollouts(base, samples[:1], 8)[0]}) > 1       # top_k = 1 would make them equal
    finally:
        base[0].generation_config = own


# ---------------------------------------------------------------------------------------------------- answers and rewards
@pytest.mark.parametrize("text,answer", [
    ("so \\boxed{7}", "7"), ("\\boxed{1} no, \\boxed{ 2 }.", "2"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("<answer> B </answer>", "B"),
    ("it is so\nAnswer: 12\n", "12"), ("\\boxed{3", None), ("7", None), ("", None), ("\\boxed{}", None),
    ("<think>\\boxed{1}</think> hm", None), ("<think>\\boxed{1}</think> \\boxed{4}", "4"), ("}{\\boxed{{a}{b}}}", "{a}{b}")])
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


RIGHT = [("7", "7"), ("7.0", "7"), ("1,200", "1200"), ("50%", "0.5"), ("\\frac{1}{2}", "0.5"), ("2/4", "1/2"), ("-3", "-3"), ("$12$", "12"),
         ("(B)", "B"), ("b.", "B"), ("option B", "B"), ("B", "(B)"), ("Red  House.", "red house"), ("\\text{Yes}", "yes"), ("+5", "5"), (".5", "0.5")]
WRONG = [("7", "8"), ("15", "5"), ("not 5", "5"), ("5 or 6", "5"), ("-3", "3"), ("A, B", "B"), ("AB", "B"), ("1,20", "120"), ("1/0", "0"),
         ("5%", "5"), ("red", "red house"), ("", "5"), ("5x", "5"), ("--5", "5"), ("1.2.3", "1.2")]


@pytest.mark.parametrize("given,answer", RIGHT)
def test_verify_right(given, answer):
    assert verify(f"\\boxed{{{given}}}", answer)


@pytest.mark.parametrize("given,answer", WRONG)
def test_verify_wrong(given, answer):
    assert not verify(f"\\boxed{{{given}}}", answer)


def test_reward():
    assert reward("\\boxed{7}", True) == 1.0 and reward("\\boxed{7}", False) == 0.0
    assert reward("\\boxed{7}", False, 0.1) == pytest.approx(0.1) and reward("answer: 7", True, 0.1) == pytest.approx(0.9)
    assert reward("\\boxed{", False, 0.1) == 0.0
