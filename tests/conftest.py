"""Shared by the tests: models, a whole run's options, a trainer and what is read from them.

One thread, so that nothing depends on the machine's cores.
"""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from beside import (  # noqa: F401  pytest finds hooks and a fixture here
    beside,
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_sessionfinish,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
torch.set_flush_denormal(True)

TINY = shlex.split("--steps 2 --questions 2 --group-size 4 --eval-questions 6 --eval-every 1")


@pytest.fixture
def root():
    return ROOT


# ------------------------------------------------------------------------------------------- models
@pytest.fixture(scope="session")
def base():
    """(model, processor) of toy/base, float32, eval. Do not change the weights."""
    from transformers import AutoModelForImageTextToText

    from plumbing.images import load_processor

    path = str(ROOT / "toy" / "base")
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return model.eval(), load_processor(path)


# weights that are large enough to matter
LANGUAGE_MODEL = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    max_position_embeddings=512,
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
PATCHES = dict(
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    depth=2,
    num_heads=2,
    initializer_range=0.2,
)
VISION_TOWERS = {
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
}
KINDS = tuple(VISION_TOWERS)


def make_tiny(kind: str, processor, **text_settings):
    """A random model of one of the three real classes, made from a config, for the processor."""
    import transformers

    token_id = processor.tokenizer.convert_tokens_to_ids
    ends = dict(eos_token_id=token_id("<|im_end|>"), pad_token_id=token_id("<|endoftext|>"))
    text = {**LANGUAGE_MODEL, **ends, "bos_token_id": None, "rope_parameters": ROPE}
    text |= {"vocab_size": len(processor.tokenizer), **text_settings}
    if kind == "Qwen3VL":
        text |= {"head_dim": 12, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text,
        vision_config={**PATCHES, **VISION_TOWERS[kind]},
        tie_word_embeddings=False,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    model.generation_config = transformers.GenerationConfig(**ends)
    return model


@pytest.fixture(params=KINDS)
def tiny(request, base):
    """(model, processor) of each real class."""
    return make_tiny(request.param, base[1]), base[1]


def plain_logits(model, prompt, ids, banned):
    """(T, V) at the response tokens `ids`: one whole sequence, no padding, no cache, no chunks.

    None of our code runs. banned: the tokens that get -inf.
    """
    types = torch.cat([prompt.types, torch.zeros(len(ids), dtype=torch.long)])
    logits = model(
        input_ids=torch.cat([prompt.ids, torch.tensor(ids)])[None],
        mm_token_type_ids=types[None],
        pixel_values=prompt.pixels,
        image_grid_thw=prompt.grid,
    ).logits[0, len(prompt.ids) - 1 : -1]
    return logits.index_fill(-1, torch.as_tensor(banned), -torch.inf)


def greedy_of_transformers(model, processor, prompt, new_tokens):
    """Greedy ids by model.generate, from one prompt alone; the banned tokens are suppressed."""
    from rollout import banned_tokens

    images = {"pixel_values": prompt.pixels, "image_grid_thw": prompt.grid}
    out = model.generate(
        input_ids=prompt.ids[None],
        attention_mask=torch.ones_like(prompt.ids)[None],
        mm_token_type_ids=prompt.types[None],
        **({} if prompt.pixels is None else images),
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        suppress_tokens=banned_tokens(model, processor.tokenizer),
    )
    return out[0, len(prompt.ids) :].tolist()


# ------------------------------------------------------------------------------------------ trainer
@pytest.fixture
def trainer():
    from two_processes import make_trainer

    return make_trainer()


@pytest.fixture
def any_precision():
    """accelerate keeps one precision per process: forget it before and after the test."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def rollout(trainer, questions, keys=None):
    """Phases 1 to 4: a group of responses per question, graded and assigned."""
    groups = trainer.sample(trainer.read(questions), keys)
    trainer.grade(groups)
    trainer.assign(groups)
    return groups


def flat(groups):
    """The responses of all groups."""
    return [response for group in groups for response in group]


def gradient(trainer):
    """name -> gradient, of the parameters that have one."""
    named = trainer.policy.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_close(ours, expected, rtol):
    """Relative to the largest gradient of all parameters: float32 sums in another order."""
    scale = max(value.abs().max() for value in expected.values())
    assert scale > 0
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert (ours[name] - value).abs().max() <= rtol * scale, name


# --------------------------------------------------------------------------------------------- runs
def read_jsonl(path):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))


def logged(run):
    """metrics.jsonl without the times; no rows where there is no file yet."""
    path = run / "metrics.jsonl"
    rows = read_jsonl(path) if path.exists() else []
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def spy(monkeypatch, module, name, note):
    """A list to which each call of module.name adds note(its arguments); the call goes on."""
    seen, real = [], getattr(module, name)

    def watched(*args, **kwargs):
        seen.append(note(*args, **kwargs))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, watched)
    return seen
