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
    """Peak memory of scores_from_hidden' forward and backward with a teacher, on top of its inputs, in bytes, as a sum of its tensors' sizes.

    tokens N, hidden H, vocab V; dtype: what the heads compute in; cast_heads: how many heads autocast must cast to it (float32 masters).
    train_head: the gradient of the head's weight is formed, (V, H) float32; in half precision each chunk's share stands beside it.
    """
    half, real = dtype.itemsize, max(4, dtype.itemsize)
    chunk, support = min(tokens, chunk_tokens(vocab, logits_mb, dtype)), 2 * min(k, vocab) + 2
    cast = cast_heads * vocab * hidden * half
    kept = tokens * (
        support * (8 + 2 * real) + hidden * half
    )  # ids, two gradients in the buckets, mean rows
    forward = (
        cast + kept + chunk * (vocab * 2 * real + support * 32)
    )  # 32: a chunk's ids and logits in the buckets
    share = 0 if half == real else half  # copies in half precision
    backward = kept + tokens * (support * 2 * real + hidden * (real if half == real else 2 * real))
    if train_head:
        backward = max(
            backward,
            cast // max(1, cast_heads)
            + kept
            + tokens * (support + hidden) * real
            + vocab * hidden * (real + share)
            + chunk * vocab * (real + share),
        )
    return max(forward, backward)


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
