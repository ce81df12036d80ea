"""plumbing/attention.py: maps of where a model looks, against its own attention weights; layers."""

import pytest
import torch
from conftest import ROOT, VISION_TOWERS, make_tiny
from PIL import Image
from test_memory import LiveBytes

from plumbing.attention import (
    check_layers,
    choose_layers,
    layer_maps,
    layer_scores,
    maps_of_images,
    peaks,
    reasoning_tokens,
)
from plumbing.images import load_processor
from rollout import Question, encode_prompts, student_messages
from toy import world


# --------------------------------------------------------------------------------- the reasoning
@pytest.mark.parametrize(
    "text, reasoning",
    [
        ("Here is the top row : red 1 . \\boxed{ 1 }", "Here is the top row : red 1 ."),
        ("So \\boxed{ 2 } . Next \\boxed{ 1 }", "So \\boxed{ 2 } . Next"),
        ("\\boxed{ 1 }", ""),
        ("the top row : red 1", "the top row : red 1"),
    ],
)
def test_the_reasoning_ends_where_the_last_box_begins(text, reasoning, base):
    tokenizer = base[1].tokenizer
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert tokenizer.decode(reasoning_tokens(tokenizer, ids)) == reasoning


# -------------------------------------------------------------------------------------- the maps
RESPONSE = "the top row : red 1 blue 4"


def two_images():
    [question] = world.puzzles("tune", 1)
    question.images = [question.images[0].resize((140, 84)), question.images[0]]
    return question


def encoded(processor, question):
    [prompt] = encode_prompts(processor, [question], [student_messages(question)])
    return prompt, processor.tokenizer(RESPONSE)["input_ids"]


def weights_of_plain_forward(model, prompt, response):
    """Attention (layers, response tokens, image tokens), summed over heads, of transformers."""
    model.set_attn_implementation("eager")
    ids = torch.cat([prompt.ids, torch.tensor(response)])[None]
    types = torch.cat([prompt.types, torch.zeros(len(response), dtype=torch.long)])[None]
    out = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=types,
        pixel_values=prompt.pixels,
        image_grid_thw=prompt.grid,
        output_attentions=True,
        use_cache=False,
    )
    model.set_attn_implementation("sdpa")
    weights = torch.stack(out.attentions)[:, 0].sum(1)
    # the state before a token predicts it
    return weights[:, len(prompt.ids) - 1 : -1][..., types[0].bool()]


@torch.no_grad()
def test_maps_are_made_of_the_weights_of_a_plain_forward(tiny):
    model, processor = tiny
    prompt, response = encoded(processor, two_images())
    weights = weights_of_plain_forward(model, prompt, response)
    kept = layer_maps(model, prompt, response, 0, layers=(1, 0), reduce=lambda looks: looks[3])
    torch.testing.assert_close(kept, weights[[1, 0], 3], rtol=1e-3, atol=1e-5)
    assert model.config.text_config._attn_implementation == "sdpa"

    heat = layer_maps(model, prompt, response, 0)
    maps = maps_of_images(heat[1], prompt.grid, processor.image_processor.merge_size)
    assert [one.shape for one in maps] == [(3, 5), (4, 4)]
    of_second_image = weights[1][:, 15:]
    middle = weights[1].mean(0).sort().values[(weights.shape[2] - 1) // 2]
    strongest = of_second_image.max(0).values - of_second_image.sum(0) / len(response)
    torch.testing.assert_close(maps[1].flatten(), strongest / middle, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_watching_changes_no_state_of_the_model(tiny):
    model, processor = tiny
    prompt, response = encoded(processor, two_images())
    states = []
    hook = model.model.register_forward_hook(
        lambda module, inputs, out: states.append(out.last_hidden_state)
    )
    layer_maps(model, prompt, response, 0)
    hook.remove()
    ids = torch.cat([prompt.ids, torch.tensor(response[:-1])])[None]
    types = torch.cat([prompt.types, torch.zeros(len(response) - 1, dtype=torch.long)])[None]
    images = {"pixel_values": prompt.pixels, "image_grid_thw": prompt.grid}
    plain = model.model(input_ids=ids, mm_token_type_ids=types, **images).last_hidden_state
    torch.testing.assert_close(states[0], plain, rtol=1e-4, atol=1e-5)


def test_what_all_tokens_look_at_alike_cancels():
    looks = torch.rand(7, 9)
    sink = torch.zeros(9)
    sink[4] = 50
    alone, with_sink = peaks(looks), peaks(looks + sink)
    torch.testing.assert_close(with_sink / with_sink.sum(), alone / alone.sum())


def test_layers_are_checked(base):
    check_layers(base[0], 0, 2)
    with pytest.raises(ValueError, match="layers 1-9: the model has layers 0 to 2"):
        check_layers(base[0], 1, 9)


# Qwen2-VL-2B but for the number of its layers and the width of its MLP, which is counted apart
WIDE = dict(
    hidden_size=1536,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
)
MLP_WIDTH, GIB = 8960, 2**30


@pytest.mark.slow
def test_a_2b_model_takes_two_gib_for_1000_image_tokens_and_500_of_the_response(base, monkeypatch):
    """Counted in float32, the larger type, and the same for two watched layers as for one."""
    monkeypatch.setitem(VISION_TOWERS["Qwen2VL"], "hidden_size", 1536)
    question = Question("a", "Which?", "9", [Image.new("RGB", (40 * 28, 25 * 28))])
    processor = load_processor(str(ROOT / "toy" / "base"), max_pixels=10**6)
    [prompt] = encode_prompts(processor, [question], [student_messages(question)])
    assert prompt.types.sum() == 1000
    model = make_tiny("Qwen2VL", base[1], num_hidden_layers=2, **WIDE)
    peak = {}
    for layers in ((0,), (0, 1)):
        with LiveBytes([*model.parameters()], least=2**10) as live:
            layer_maps(model, prompt, [30] * 500, 0, layers)
        peak[layers] = live.peak
    mlp = 3 * (len(prompt.ids) + 500) * MLP_WIDTH * 4
    assert peak[0, 1] + mlp < 2 * GIB
    assert peak[0, 1] < peak[0,] + 2**20  # no layer's weights are kept


# ------------------------------------------------------------------------------------ the layers
def responses_to_a_question(seed):
    """Maps of 3 right and 2 wrong responses: layer 1 knows the place, 0 looks at one, 2 at any."""
    draw = torch.Generator().manual_seed(seed)
    maps = 0.1 * torch.rand(5, 3, 16, generator=draw)
    maps[:, 0, 5] += 4
    maps[:3, 1, 7] += 4
    maps[3, 1, 2] += 4
    maps[4, 1, 9] += 4
    maps[:, 2] = torch.rand(5, 16, generator=draw)
    return maps[:3], maps[3:]


def test_the_layer_that_tells_right_from_wrong_is_chosen():
    scores = torch.stack([layer_scores(*responses_to_a_question(seed)) for seed in range(20)])
    assert scores[:, 1].min() > 0.9
    assert scores[:, [0, 2]].mean(0).abs().max() < 0.15
    assert choose_layers(scores) == (1,)
    assert choose_layers(scores[:, [0, 2]]) == (0, 1)  # nothing tells these two apart
    assert choose_layers(scores[:1]) == (0, 1, 2)


def test_layers_with_half_of_the_best_score_are_chosen_too():
    scores = torch.tensor([[0.8, 0.5, 0.3], [0.9, 0.4, 0.3]])
    assert choose_layers(scores) == (0, 1)


def test_the_layer_score_is_a_difference_of_correlations():
    right, wrong = torch.rand(3, 2, 8), torch.rand(2, 2, 8)
    every_map = torch.cat([right, wrong])[:, 1]
    correlations = torch.corrcoef(every_map)
    among_right = (correlations[0, 1] + correlations[0, 2] + correlations[1, 2]) / 3
    expected = among_right - correlations[:3, 3:].mean()
    torch.testing.assert_close(layer_scores(right, wrong)[1], expected)
