"""What fits: predictions and budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from losses import chunk_tokens

if TYPE_CHECKING:
    from rollout import Response
    from train import TrainConfig


def scores_bytes(
    tokens: int,
    hidden: int,
    vocab: int,
    *,
    k: int = 100,
    logits_mb: float = 512,
    dtype: torch.dtype = torch.float32,
    train_head: bool = True,
    cast_heads: int = 0,
) -> int:
    """Peak memory in bytes of scores_from_hidden with a teacher, forward and backward.

    It is a sum of tensor sizes and leaves out the inputs. tokens N, hidden H, vocab V. dtype: the
    type in which the heads multiply. cast_heads: the number of heads that autocast casts to it,
    because their own weights are float32. train_head: backward forms the gradient of the head's
    weight, (V, H) in float32; in half precision each chunk's product stands beside it.
    """
    product = dtype.itemsize  # bytes per number that a head multiplies or gives
    real = max(4, product)  # all other numbers: float32 or better
    half_precision = product < real
    chunk = min(tokens, chunk_tokens(vocab, logits_mb, dtype))
    buckets = 2 * min(k, vocab) + 2  # the sampled token, both top-K sets, the rest
    one_cast_head = vocab * hidden * product
    ids, gradients, mean_rows = 8 * buckets, 2 * real * buckets, product * hidden  # per token
    kept = tokens * (ids + gradients + mean_rows)

    logits = chunk * vocab * 2 * real
    chunk_buckets = chunk * buckets * 32  # ids and logits in the buckets, as they are computed
    forward = cast_heads * one_cast_head + kept + logits + chunk_buckets

    copies = 2 if half_precision else 1  # of the gradient in the hidden states
    hidden_step = kept + tokens * (buckets * 2 * real + hidden * copies * real)
    if not train_head:
        return max(forward, hidden_step)
    cast = one_cast_head if cast_heads else 0
    width = real + product if half_precision else real  # float32 and its half-precision copy
    gradients_before = tokens * (buckets + hidden) * real
    head_step = cast + kept + gradients_before + vocab * hidden * width + chunk * vocab * width
    return max(forward, hidden_step, head_step)


def sequence_bytes(model, length: int) -> int:
    """Memory of one sequence of `length` tokens while it is decoded, in bytes.

    Its keys and values, and a few copies of the logits of its next token.
    """
    text = model.config.get_text_config()
    numbers_per_token = 2 * text.num_hidden_layers * _key_value_size(text)
    cache = numbers_per_token * model.dtype.itemsize * length
    return cache + 32 * model.get_output_embeddings().weight.shape[0]


def _key_value_size(text) -> int:
    """Numbers in one token's keys in one layer."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_key_value_heads * head


def micro_batches(
    responses: list[Response], token_limit: int, one_prompt_per_response: bool
) -> list[list[Response]]:
    """The responses in groups of at most token_limit tokens each (see `batch_tokens`).

    A question's responses stay together, so that its prompt runs once; so do its tutored ones. Like
    lengths are near each other, for less padding. A response larger than the limit goes alone.
    """
    order = sorted(responses, key=lambda r: (len(r.prompt.ids), r.question.id, not r.tutored))
    batches = []
    for response in order:
        together = [*batches[-1], response] if batches else []
        if together and batch_tokens(together, one_prompt_per_response) <= token_limit:
            batches[-1] = together
        else:
            batches.append([response])
    return batches


def batch_tokens(responses: list[Response], one_prompt_per_response: bool) -> int:
    """Tokens of a micro-batch, padding included, in the larger of student's and teacher's pass."""
    if one_prompt_per_response:
        prompts = len(responses)
    else:
        prompts = len({id(response.prompt) for response in responses})
    lengths = [len(response.prompt.ids) for response in responses]
    lengths += [len(r.teacher_prompt.ids) for r in responses if r.teacher_prompt]
    return prompts * max(lengths) + len(responses) * max(len(r.ids) for r in responses)


# ----------------------------------------------------------------------------------------- --plan
def plan(config: TrainConfig, gpus: int, bf16: bool) -> dict[str, float]:
    """Predicted memory per GPU in GiB, by part, and "peak": from the config alone.

    Nothing is loaded: parameters are counted on the meta device. Not in it: the allocator's own
    waste, attention masks, the vision tower's pass.
    """
    shape = AutoConfig.from_pretrained(config.model)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape)
    text, width = shape.text_config, 2 if bf16 else 4  # bytes per number of what is not trained
    parameters = _count(model)
    trained = _count_trained(model, config)
    copies = 0
    if bf16 and not config.lora:
        copies = 2 * parameters
        if gpus > 1:  # two layers are whole at a time
            layer = _count(model.model.language_model.layers[0])
            copies = 2 * (parameters - layer * (text.num_hidden_layers - 2))
    weights = 4 * parameters
    if config.lora:
        weights = width * parameters + 4 * trained
    parts = {
        "weights": weights / gpus,
        "AdamW": 8 * trained / gpus,
        "reference": 0 if config.lora else width * parameters / gpus,
        "gradients": 4 * trained / gpus,
        "bf16 copies": copies,
        "activations": config.micro_tokens * _activation_bytes(text, bf16, config),
        "logits, head": scores_bytes(
            config.micro_tokens,
            text.hidden_size,
            text.vocab_size,
            k=config.jsd_k,
            logits_mb=config.logits_mb,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            train_head=not config.lora,
        ),
    }
    updating = sum(parts.values())
    parts["caches, sampling"] = config.sample_mb * 2**20
    parts["caches, sampling"] += width * parameters if gpus > 1 else copies
    standing = parts["weights"] + parts["AdamW"] + parts["reference"]
    parts["peak"] = max(updating, standing + parts["caches, sampling"])
    return {name: size / 2**30 for name, size in parts.items()}


def _count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def _count_trained(model, config: TrainConfig) -> int:
    if config.lora:
        layers = model.model.language_model.modules()
        linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
        return sum(config.lora * (layer.in_features + layer.out_features) for layer in linear)
    if config.freeze_vision:
        return _count(model) - _count(model.model.visual)
    return _count(model)


def _activation_bytes(text, bf16: bool, config: TrainConfig) -> int:
    """Bytes per token that the layers keep for backward.

    30 H + 8 I + 4 KV + 8 per layer in bf16, 32 H + 16 I + 8 KV + 8 in float32 (hidden, intermediate
    and key-value sizes), as counted from the tensors that transformers 5.23's Qwen2-VL layers save.
    When they are recomputed: 4 H per layer, and everything of one layer.
    """
    hidden, intermediate, kv = (30, 8, 4) if bf16 else (32, 16, 8)
    layer = hidden * text.hidden_size + intermediate * text.intermediate_size + 8
    layer += kv * _key_value_size(text)
    if config.gradient_checkpointing:
        return 4 * text.hidden_size * text.num_hidden_layers + layer
    return layer * text.num_hidden_layers


def plan_table(parts: dict[str, float], gpus: int) -> str:
    """`plan` as text."""
    sharded = "s, sharded" if gpus > 1 else ""
    lines = [f"predicted memory, each of {gpus} GPU{sharded}:"]
    lines += [f"{name:20s}{size:8.1f} GiB" for name, size in parts.items() if name != "peak"]
    lines.append(
        f"{'peak':20s}{parts['peak']:8.1f} GiB: while updating, or weights, AdamW and reference "
        "with the caches while sampling"
    )
    return "\n".join(lines)
