"""What fits: predictions and budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from losses import chunk_tokens
from ptdpo import PTDPOConfig

if TYPE_CHECKING:
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
    """Memory that one sequence of `length` tokens takes while it is decoded: keys, values, and a few copies of its next token's logits."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * head
        * model.dtype.itemsize
        * length
    )
    return cache + 32 * model.get_output_embeddings().weight.shape[0]


def plan(config: TrainConfig, method: PTDPOConfig, gpus: int, bf16: bool) -> dict[str, float]:
    """Memory a GPU in GiB, by part, and "peak": from the config alone, nothing is loaded.

    Parameters are counted on the meta device. Activations: 30 H + 8 I + 4 KV + 8 bytes a token and layer in bf16, 32 H + 16 I + 8 KV + 8 in
    float32 (hidden, intermediate and key-value sizes), as counted from the tensors that transformers 5.23's Qwen2-VL layers save for
    backward; 4 H and one layer's all when they are recomputed. Not in it: the allocator's own waste, attention masks, the vision tower's pass.
    """
    shape = AutoConfig.from_pretrained(config.model)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape)
    text, half = shape.text_config, 2 if bf16 else 4
    every, tower = (
        sum(p.numel() for p in part.parameters()) for part in (model, model.model.visual)
    )
    layer = sum(p.numel() for p in model.model.language_model.layers[0].parameters())
    inside = [m for m in model.model.language_model.modules() if isinstance(m, torch.nn.Linear)]
    trained = (
        sum(config.lora * (m.in_features + m.out_features) for m in inside)
        if config.lora
        else every - (0 if config.train_vision else tower)
    )
    kv = text.num_key_value_heads * (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    a, b, c = (30, 8, 4) if bf16 else (32, 16, 8)
    token = a * text.hidden_size + b * text.intermediate_size + c * kv + 8
    copies = (
        0
        if not bf16 or config.lora
        else 2 * (every - layer * (text.num_hidden_layers - 2) if gpus > 1 else every)
    )
    head = scores_bytes(
        config.micro_tokens,
        text.hidden_size,
        text.vocab_size,
        k=method.jsd_k,
        logits_mb=config.logits_mb,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        train_head=not config.lora,
    )
    layers = (
        (4 * text.hidden_size * text.num_hidden_layers + token)
        if config.gradient_checkpointing
        else token * text.num_hidden_layers
    )
    parts = {
        "weights": (half * every + 4 * trained if config.lora else 4 * every) / gpus,
        "AdamW": 8 * trained / gpus,
        "reference": 0 if config.lora else half * every / gpus,
        "gradients": 4 * trained / gpus,
        "bf16 copies": copies,
        "activations": config.micro_tokens * layers,
        "logits, head": head,
    }
    standing = parts["weights"] + parts["AdamW"] + parts["reference"]
    parts["caches, sampling"] = config.sample_mb * 2**20 + (half * every if gpus > 1 else copies)
    parts["peak"] = max(
        sum(parts.values()) - parts["caches, sampling"], standing + parts["caches, sampling"]
    )
    return {name: size / 2**30 for name, size in parts.items()}


def plan_table(parts: dict[str, float], gpus: int) -> str:
    """`plan` for reading."""
    lines = [f"{name:20s}{size:8.1f} GiB" for name, size in parts.items() if name != "peak"]
    return "\n".join(
        [
            f"predicted memory, each of {gpus} GPU{'s, sharded' if gpus > 1 else ''}:",
            *lines,
            f"{'peak':20s}{parts['peak']:8.1f} GiB: while updating, or weights, AdamW and reference with the caches while sampling",
        ]
    )
