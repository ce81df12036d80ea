"""Shared by the tests: the embedded base model, loaded once, and one thread, so that nothing depends on the machine's cores."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
torch.set_flush_denormal(True)


@pytest.fixture(scope="session")
def base():
    """(model, processor) of toy/base, float32, eval. Do not change the weights."""
    from transformers import AutoModelForImageTextToText

    from plumbing.images import load_processor

    path = str(ROOT / "toy" / "base")
    return AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32
    ).eval(), load_processor(path)


@pytest.fixture
def root():
    return ROOT


def make_tiny(kind: str, processor):
    """A random model of one of the three real classes, built from a config, for the embedded processor. Weights large enough to matter."""
    import transformers

    ids = processor.tokenizer.convert_tokens_to_ids
    heads = dict(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        vocab_size=len(processor.tokenizer),
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=ids("<|im_end|>"),
        pad_token_id=ids("<|endoftext|>"),
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    patches = dict(
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        depth=2,
        num_heads=2,
        initializer_range=0.2,
    )
    vision = {
        "Qwen2VL": dict(embed_dim=32, hidden_size=48, mlp_ratio=2),
        "Qwen2_5_VL": dict(
            hidden_size=32,
            intermediate_size=64,
            out_hidden_size=48,
            window_size=56,
            fullatt_block_indexes=[1],
        ),
        "Qwen3VL": dict(
            hidden_size=32,
            intermediate_size=64,
            out_hidden_size=48,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
    }[kind]
    if kind == "Qwen3VL":
        heads, rope = {**heads, "head_dim": 12}, {**rope, "mrope_interleaved": True}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**heads, "rope_parameters": rope},
        vision_config={**patches, **vision},
        tie_word_embeddings=False,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>")
    )
    return model


@pytest.fixture(params=["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def tiny(request, base):
    """(model, processor) of each real class."""
    return make_tiny(request.param, base[1]), base[1]


TINY = [
    "--steps",
    "2",
    "--questions",
    "2",
    "--group-size",
    "4",
    "--eval-questions",
    "6",
    "--eval-every",
    "1",
]


def logged(run):
    """metrics.jsonl without the seconds."""
    rows = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        if (run / "metrics.jsonl").exists()
        else []
    )
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


@pytest.fixture
def trainer():
    from two_processes import make_trainer

    return make_trainer()


def gradient(trainer):
    return {
        name: p.grad.clone() for name, p in trainer.policy.named_parameters() if p.grad is not None
    }


def assert_close(a, b, rtol):
    """Relative to the largest gradient of all parameters: float32 sums in another order."""
    scale = max(g.abs().max() for g in b.values())
    assert scale > 0 and a.keys() == b.keys()
    for name in b:
        assert (a[name] - b[name]).abs().max() <= rtol * scale, name
