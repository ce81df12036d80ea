"""What fits: predictions and budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from losses import chunk_tokens
from plumbing.decoding import product_dtype

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


TABLES = 8 + 4 + 8  # bytes per token of a slot: its id, log-prob and draw


def sequence_bytes(model, length: int) -> int:
    """Memory of one slot, with room for `length` tokens, in bytes.

    Its keys and values in the type that attention multiplies in, its row of the tables, and a few
    copies of the logits of its next token.
    """
    per_token = _cache_bytes_per_token(model) + TABLES
    return per_token * length + 32 * model.get_output_embeddings().weight.shape[0]


def _cache_bytes_per_token(model) -> int:
    text = model.config.get_text_config()
    width = product_dtype(model.device, model.dtype).itemsize
    return 2 * text.num_hidden_layers * _key_value_size(text) * width


def _head_size(text) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _key_value_size(text) -> int:
    """Numbers in one token's keys in one layer."""
    return text.num_key_value_heads * _head_size(text)


CPU_SAMPLE_MB = 4096


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that nobody uses now, torch's own reserve included.

    On a CPU: 4 GiB, or half of what the machine has available if that is less.
    """
    if device.type != "cuda":
        return min(CPU_SAMPLE_MB * 2**20, psutil.virtual_memory().available // 2)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


PREFILL_TOKENS = 4096  # of prompts that run together; a longer one runs alone


def sample_budget_mb(model, prompt_length: int, free: int) -> float:
    """MiB for the slots (--sample-mb 0), from `free` bytes. prompt_length: of the longest.

    80 % of what is free without three parts: autocast's copies of the weights, which the prompts
    use; the sampler's own copy (plumbing.text_decoder); and the prompts that run together, with
    their keys and values. The rest is for a step's work, graphs and the allocator's waste.
    """
    bf16 = torch.is_autocast_enabled(model.device.type)
    language_model = 2 * _count(model.model.language_model)
    weights = 0
    if bf16 and model.dtype == torch.float32:
        weights = 2 * _count(model) + language_model
    elif _has_adapters(model):
        weights = language_model
    per_token = _prefill_bytes_per_token(model, bf16) + _cache_bytes_per_token(model)
    prompts = max(PREFILL_TOKENS, prompt_length) * per_token
    return max(1.0, 0.8 * (free - weights - prompts) / 2**20)


def _has_adapters(model) -> bool:
    return bool(getattr(model, "peft_config", None))


def _prefill_bytes_per_token(model, bf16: bool) -> int:
    """What a prompt's token takes while it runs without gradient: a layer's, or a block's."""
    text = model.config.get_text_config()
    merge = model.config.vision_config.spatial_merge_size**2
    block = merge * tower_block_bytes(model.model.visual, bf16=bf16)
    return max(_TextSizes(text, bf16, 0, norms_of_heads=True).token, block)


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


# ----------------------------------------------------------------------------- kept for backward
class MicroBatch(NamedTuple):
    """Sizes of a micro-batch: U prompts of P tokens, B responses of T tokens, padding included."""

    prompts: int
    prompt_length: int
    responses: int
    response_length: int

    @property
    def tokens(self) -> int:
        return self.prompts * self.prompt_length + self.responses * self.response_length


def kept_bytes(
    model, batch: MicroBatch, *, bf16: bool, lora: int = 0, recomputed: bool = False
) -> int:
    """What the language model keeps for the backward pass of rollout.response_states, in bytes.

    model may be on the meta device. bf16: autocast. lora: the adapters' rank, 0 without.
    recomputed: each response runs its prompt again, each layer keeps its input alone, and one layer
    at a time is whole. Not in it: weights, their bf16 copies, the vision tower, the head.

    Derived from what each operation of transformers 5.23's layers saves; tests/test_memory.py
    counts that. On a CUDA device attention with a mask runs the memory-efficient kernel, without a
    mask the flash kernel. Both save what a CPU's kernel saves, but the mask is padded to a multiple
    of 16 keys.
    """
    text = model.config.text_config
    prompts, prompt_length, responses, response_length = batch
    heads = getattr(model.model.language_model.layers[0].self_attn, "q_norm", None) is not None
    sizes = _TextSizes(text, bf16, lora, heads)
    whole = prompt_length + response_length - 1  # the last token is predicted and never read
    if recomputed:
        one_layer = sizes.layer(responses, whole, whole, masked=responses > 1)
        norms = 1 if lora else 2
        inputs = 4 * text.hidden_size * (text.num_hidden_layers + norms)
        return responses * whole * inputs + one_layer
    later = response_length - 1
    tokens = prompts * prompt_length + responses * later
    layer = sizes.layer(prompts, prompt_length, prompt_length, masked=prompts > 1)
    layer += sizes.layer(responses, later, whole, masked=True)
    last_norm = 0 if lora else 8 * text.hidden_size
    rotary_tables = 8 * sizes.head
    return text.num_hidden_layers * layer + tokens * (last_norm + rotary_tables)


class _TextSizes:
    """Bytes that one decoder layer keeps, by what they grow with."""

    def __init__(self, text, bf16: bool, lora: int, norms_of_heads: bool):
        self.head = _head_size(text)
        self.width = width = 2 if bf16 else 4
        self.queries = text.num_attention_heads * self.head  # numbers per token
        self.keys = _key_value_size(text)
        hidden = text.hidden_size
        # float32: each of two norms keeps its input, and its output while its weight is trained
        norms = 2 * 4 * hidden * (1 if lora else 2)
        # autocast casts the input of q, k, v, gate and up once for each of them
        inputs = width * hidden * (5 if bf16 else 2)
        mlp = 4 * width * text.intermediate_size  # gate, its activation, up, their product
        attention = 2 * width * self.queries  # queries and result
        attention += 4 * text.num_attention_heads  # the logarithm of each softmax's sum
        self.token = norms + inputs + mlp + attention
        if norms_of_heads:  # Qwen3-VL: norms of queries and keys
            self.token += (self.queries + self.keys) * (4 if lora else 4 + width)
        if lora:
            ranks = 7 * width * lora  # between both matrices of seven adapters
            output_projection = width * self.queries if bf16 else 0  # a copy of its input
            self.token += ranks + output_projection

    def layer(self, rows: int, queries: int, keys: int, masked: bool) -> int:
        """`rows` sequences of `queries` tokens, each of which may look at `keys` tokens.

        masked: there is padding, or a cache. Then transformers repeats keys and values for all
        heads, and scaled_dot_product_attention makes a bias of the mask in every layer.
        """
        key = 2 * self.width * (self.queries if masked else self.keys)  # and value
        bias = rows * queries * _round_up(keys, 16) * self.width if masked else 0
        return rows * (queries * self.token + keys * key) + bias


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def tower_bytes(tower, patches: int, *, bf16: bool) -> int:
    """What a trained vision tower takes for this many patches, in bytes.

    Its blocks recompute their activations (models.build), so each keeps its input, and one block at
    a time is whole. There are four patches per image token.
    """
    width = 2 if bf16 else 4
    kept = width * tower.config.depth * _tower_width(tower)
    return patches * (kept + tower_block_bytes(tower, bf16=bf16))


def tower_block_bytes(tower, *, bf16: bool) -> int:
    """What one block of the vision tower keeps per patch while it is whole, in bytes."""
    width = 2 if bf16 else 4
    hidden, block = _tower_width(tower), tower.blocks[0]
    linear = [layer for layer in block.mlp.modules() if isinstance(layer, torch.nn.Linear)]
    intermediate = linear[0].out_features
    # inputs of both norms in float32; queries, keys, values before and after the rotation,
    # attention's result and its input to the projection
    kept = 8 * hidden + 7 * width * hidden
    # the rotation's tables, each norm's statistics, the logarithm of each softmax's sum
    heads = tower.config.num_heads
    kept += 8 * hidden // heads + 16 + 4 * heads
    if len(linear) == 3:  # Qwen2.5-VL: RMS norms, which keep their outputs, and a gate
        inputs = 3 if bf16 else 2
        return kept + (2 + inputs) * width * hidden + 4 * width * intermediate
    kept += 2 * width * hidden
    quick_gelu = tower.config.hidden_act == "quick_gelu"  # Qwen2-VL
    return kept + (3 if quick_gelu else 2) * width * intermediate


def _tower_width(tower) -> int:
    return tower.blocks[0].norm1.weight.numel()


# ----------------------------------------------------------------------------------------- --plan
def plan(config: TrainConfig, gpus: int, bf16: bool) -> dict[str, float]:
    """Predicted memory per GPU in GiB, by part, and "peak": from the config alone.

    Nothing is loaded: parameters are counted on the meta device. Activations are those of the
    micro-batch that takes most. With --sample-mb 0 the caches take a share of what is free, so they
    count nothing. Not in it: the allocator's own waste, and what CUDA itself takes.
    """
    model = meta_model(config.model)
    text, width = model.config.text_config, 2 if bf16 else 4  # bytes per number not trained
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
        "activations": largest_micro_batch(model, config, bf16),
        "logits, head": scores_bytes(
            most_scored_tokens(config),
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
    if gpus > 1:  # the whole weights, in the type that the sampler uses
        parts["caches, sampling"] += width * parameters
    elif bf16:  # autocast's copies, and the sampler's own, into which adapters are merged
        parts["caches, sampling"] += copies + 2 * _count(model.model.language_model)
    standing = parts["weights"] + parts["AdamW"] + parts["reference"]
    parts["peak"] = max(updating, standing + parts["caches, sampling"])
    return {name: size / 2**30 for name, size in parts.items()}


def meta_model(path: str):
    """A model without numbers, from its config alone."""
    shape = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(shape)


def largest_micro_batch(model, config: TrainConfig, bf16: bool) -> int:
    """Bytes of the activations of the micro-batch that takes most, the vision tower's included.

    It is the largest of all shapes within --micro-tokens, and of one response alone of
    --max-new-tokens to a prompt of --max-prompt, which recomputes its activations.
    """
    merge = model.config.vision_config.spatial_merge_size**2
    tower_is_trained = not (config.lora or config.freeze_vision)

    def size(batch: MicroBatch, recomputed: bool) -> int:
        kept = kept_bytes(model, batch, bf16=bf16, lora=config.lora, recomputed=recomputed)
        if not tower_is_trained:
            return kept
        patches = batch.prompts * batch.prompt_length * merge
        return kept + tower_bytes(model.model.visual, patches, bf16=bf16)

    recomputed = config.gradient_checkpointing
    sizes = [size(batch, recomputed) for batch in micro_batch_shapes(config)]
    longest = MicroBatch(1, config.max_prompt, 1, config.max_new_tokens)
    if longest.tokens > config.micro_tokens:
        sizes.append(size(longest, True))
    return max(sizes)


def micro_batch_shapes(config: TrainConfig) -> list[MicroBatch]:
    """Micro-batches that fill --micro-tokens, from short to long prompts and responses.

    One prompt has --group-size responses; with gradient checkpointing each response has a prompt of
    its own. No micro-batch has more prompts than a step.
    """
    group = 1 if config.gradient_checkpointing else config.group_size
    most_prompts = config.questions * config.group_size // group
    shapes = []
    for prompt_length in _lengths(min(config.max_prompt, config.micro_tokens - 1)):
        for response_length in _lengths(config.max_new_tokens):
            room = config.micro_tokens - prompt_length
            responses = min(group, room // response_length)
            if responses < 1:
                continue
            prompts = config.micro_tokens // (prompt_length + responses * response_length)
            prompts = min(prompts, most_prompts)
            shapes.append(MicroBatch(prompts, prompt_length, prompts * responses, response_length))
    return shapes or [MicroBatch(1, 1, 1, 1)]


def most_scored_tokens(config: TrainConfig) -> int:
    """The most response tokens of a micro-batch: --micro-tokens, or one longer response alone."""
    of_a_step = config.questions * config.group_size * config.max_new_tokens
    return max(config.max_new_tokens, min(config.micro_tokens, of_a_step))


def _lengths(longest: int) -> list[int]:
    """`longest`, and below it one, two and so on in steps of about a quarter."""
    lengths = [max(longest, 1)]
    while lengths[-1] > 1:
        lengths.append(lengths[-1] * 4 // 5)
    return lengths


def what_to_change(config: TrainConfig, gpus: int, bf16: bool, available: int) -> str | None:
    """One line that says what to change where the predicted peak exceeds the GPU's memory.

    available: bytes of the GPU that are free before the models are loaded. None: it fits.
    """
    peak = plan(config, gpus, bf16)["peak"]
    if peak * 2**30 <= available:
        return None
    changes = {}
    if not config.gradient_checkpointing:
        changes["--gradient-checkpointing"] = {"gradient_checkpointing": True}
    if config.micro_tokens > 1:
        half = config.micro_tokens // 2
        changes[f"--micro-tokens {half}"] = {"micro_tokens": half}
    if not (config.freeze_vision or config.lora):
        changes["--freeze-vision"] = {"freeze_vision": True}
    peaks = [
        f"{option} ({plan(replace(config, **change), gpus, bf16)['peak']:.1f} GiB)"
        for option, change in changes.items()
    ]
    rest = "more GPUs with fsdp.yaml" if config.lora else "--lora 32, or more GPUs with fsdp.yaml"
    return (
        f"by prediction this run needs {peak:.1f} GiB per GPU, and {available / 2**30:.1f} GiB are "
        f"free. What needs less: {', '.join(peaks)}, {rest}; --plan prints the parts"
    )


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
