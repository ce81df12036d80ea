"""plumbing/images.py: the processor, and a frozen tower's features."""

import pytest
import torch
from conftest import ROOT

from hints import teacher_messages
from plumbing.images import encode_images, load_processor, take_features
from rollout import (
    Question,
    collate,
    encode_prompts,
    response_states,
    sample_groups,
    student_messages,
)
from toy import world


def test_pixels_limit_the_image_tokens(base):
    small, large = (
        load_processor(str(ROOT / "toy" / "base"), **limit)
        for limit in (dict(max_pixels=56 * 56), dict(min_pixels=28 * 28 * 25, max_pixels=10**6))
    )
    [sample] = world.puzzles("tune", 1)
    counts = [
        encode_prompts(p, [sample], [student_messages(sample)])[0].types.sum().item()
        for p in (small, base[1], large)
    ]
    assert counts[0] == 4 and counts[1] == 16 and counts[2] >= 25


def test_processor_survives_saving(base, tmp_path):
    _, processor = base
    processor.save_pretrained(tmp_path)
    again = load_processor(str(tmp_path))
    samples = world.puzzles("heldout", 2)
    for a, b in zip(
        *(
            encode_prompts(p, samples, [teacher_messages(s) for s in samples])
            for p in (processor, again)
        )
    ):
        assert (
            torch.equal(a.ids, b.ids)
            and torch.equal(a.pixels, b.pixels)
            and torch.equal(a.types, b.types)
        )


def test_one_cell_is_one_image_token_and_nothing_is_unknown(base):
    model, processor = base
    samples = world.puzzles("train", 50)
    for prompt in encode_prompts(processor, samples, [teacher_messages(s) for s in samples]):
        assert prompt.types.sum() == 16 == (prompt.ids == model.config.image_token_id).sum()
        assert not (prompt.ids == processor.tokenizer.unk_token_id).any()


@pytest.mark.parametrize("generate", ["own", "hf"])
def test_features_in_the_place_of_patches_change_nothing(tiny, generate):
    """Two images, one and none: states, and greedy responses, from what the tower made once."""
    model, processor = tiny
    a, b = world.puzzles("heldout", 2)
    samples = [
        Question(
            "two",
            "How many points are in the star row?",
            "3",
            [a.images[0], b.images[0].resize((84, 56))],
        ),
        b,
        Question("none", "How many?", "1", []),
    ]
    patches, features = (
        encode_prompts(processor, samples, [student_messages(s) for s in samples]) for _ in range(2)
    )
    with torch.no_grad():
        expected = (
            response_states(model, collate(patches, [[30, 31, 32]] * 3, 0)),
            response_states(model, collate(patches, [[30, 31, 32]] * 3, 0, apart=True)),
        )
        greedy = [
            [r.ids for r in g]
            for g in sample_groups(
                model,
                processor,
                samples,
                patches,
                1,
                max_new_tokens=6,
                temperature=0,
                generate=generate,
            )
        ]
        take_features(model)
        encode_images(model, features)
        model.model.visual.blocks[0].forward = None  # the tower is not run again
        encode_images(model, features)
        got = (
            response_states(model, collate(features, [[30, 31, 32]] * 3, 0)),
            response_states(model, collate(features, [[30, 31, 32]] * 3, 0, apart=True)),
        )
        again = [
            [r.ids for r in g]
            for g in sample_groups(
                model,
                processor,
                samples,
                features,
                1,
                max_new_tokens=6,
                temperature=0,
                generate=generate,
            )
        ]
    assert (
        [len(p.pixels) for p in features[:2]] == [22, 16]
        and features[2].pixels is None
        and greedy == again
    )
    for x, y in zip(expected, got):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
