"""The language model of Qwen2-VL, Qwen2.5-VL or Qwen3-VL, one token per row at a time.

transformers' forward launches about 45 kernels per layer and token, and small kernels leave a GPU
idle. Here are about 20: products of the same input are one product, keys and values are not
repeated for the queries that share them, and the norms are PyTorch's own. Prompts still run through
transformers' forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class TextDecoder:
    """The weights of a language model in `dtype`, and a step of one token per row.

    A copy where the model's weights have another type or adapters (LoRA), which are merged into it;
    else the model's own. Therefore it is made anew for each rollout. The residual stream is
    float32, as in scoring.
    """

    def __init__(self, model, dtype: torch.dtype):
        text = model.model.language_model
        self.rotary, self.epsilon = text.rotary_emb, text.norm.variance_epsilon
        self.embedding, self.dtype = text.embed_tokens.weight, dtype
        self.layers = [_Layer(layer, dtype) for layer in text.layers]
        self.norm = text.norm.weight.float()
        self.head = model.get_output_embeddings().weight.to(dtype)

    def empty_cache(self, rows: int, length: int) -> list[Tensor]:
        """Keys and values of each layer in one tensor (rows, 2 * key heads, length, head size)."""
        first = self.layers[0]
        shape = (rows, 2 * first.key_heads, length, first.head_size)
        device = self.embedding.device
        return [torch.zeros(shape, dtype=self.dtype, device=device) for _ in self.layers]

    def logits(self, state: Tensor) -> Tensor:
        """(R, V) float32 after the states (R, H)."""
        # W x^T, not x W^T: for a dozen rows and a large vocabulary a CPU is 1.6 times as fast so
        return (self.head @ state.to(self.dtype).T).T.float().contiguous()

    def step(self, token: Tensor, position: Tensor, place: Tensor, cache: list, window: int):
        """The state (R, H) float32 after one more token per row.

        token, position (R,): its id, and its position for the rotary tables, the same on all three
        axes, as behind an image there is text alone. place (R,): where in the cache its keys and
        values are written; the row sees all places up to it. window: places of the cache that are
        read, more than any place.
        """
        rows = len(token)
        x = F.embedding(token, self.embedding).float()
        cos, sin = self.rotary(x, position.view(1, rows, 1).expand(3, -1, -1))  # (R, 1, D)
        rotation = self.layers[0].rotation(cos.float(), sin.float())
        is_later = torch.arange(window, device=token.device) > place.unsqueeze(1)
        mask = torch.zeros(is_later.shape, dtype=self.dtype, device=token.device)
        mask = mask.masked_fill_(is_later, -torch.inf).view(rows, 1, 1, window)
        written = place.view(rows, 1, 1, 1)
        for layer, stored in zip(self.layers, cache, strict=True):
            x = layer.step(x, rotation, written, stored, mask)
        return F.rms_norm(x, self.norm.shape, self.norm, self.epsilon)


class _Layer:
    """One decoder layer: weights and its step."""

    def __init__(self, layer, dtype: torch.dtype):
        attention, mlp = layer.self_attn, layer.mlp
        if getattr(attention, "sliding_window", None):
            raise ValueError("our sampler has no sliding windows, which this model uses")
        self.dtype, self.head_size, self.scale = dtype, attention.head_dim, attention.scaling
        self.qkv = _Joined([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.out = _Joined([attention.o_proj], dtype)
        self.gate_up = _Joined([mlp.gate_proj, mlp.up_proj], dtype)
        self.down, self.act = _Joined([mlp.down_proj], dtype), mlp.act_fn
        self.norm = layer.input_layernorm.weight.float()
        self.mlp_norm = layer.post_attention_layernorm.weight.float()
        self.epsilon = layer.input_layernorm.variance_epsilon
        self.key_heads = attention.k_proj.out_features // self.head_size
        self.query_heads = attention.q_proj.out_features // self.head_size
        self.head_norms = None
        if hasattr(attention, "q_norm"):
            norms = [(attention.q_norm, self.query_heads), (attention.k_norm, self.key_heads)]
            self.head_norms = torch.cat([norm.weight.float().expand(n, -1) for norm, n in norms])

    def rotation(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin (R, 1, D) for queries and keys, and a turn by nothing for values: (R, heads, D).

        The sine of the first half is negative, so that a rotation is x cos + (halves swapped) sin.
        """
        turned, half = self.query_heads + self.key_heads, self.head_size // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        still = torch.ones_like(cos).expand(-1, self.key_heads, -1)
        cos = torch.cat([cos.expand(-1, turned, -1), still], 1)
        return cos, torch.cat([sin.expand(-1, turned, -1), torch.zeros_like(still)], 1)

    def step(self, x: Tensor, rotation, written: Tensor, stored: Tensor, mask: Tensor) -> Tensor:
        """The residual stream (R, H) after this layer; keys and values are written to `stored`."""
        rows = len(x)
        normed = F.rms_norm(x, self.norm.shape, self.norm, self.epsilon).to(self.dtype)
        qkv = self.qkv(normed).view(rows, -1, self.head_size)
        qkv = self._rotated(qkv.float(), *rotation).to(self.dtype)
        new = qkv[:, self.query_heads :].unsqueeze(2)  # keys and values (R, 2 * key heads, 1, D)
        stored.scatter_(2, written.expand_as(new), new)
        # the queries that share a key stand where other models have several positions
        queries = qkv[:, : self.query_heads].view(rows, self.key_heads, -1, self.head_size)
        keys, values = stored[:, :, : mask.shape[-1]].chunk(2, 1)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=self.scale
        )
        x = x + self.out(attended.reshape(rows, -1))
        normed = F.rms_norm(x, self.mlp_norm.shape, self.mlp_norm, self.epsilon).to(self.dtype)
        gate, up = self.gate_up(normed).chunk(2, -1)
        return x + self.down(self.act(gate) * up)

    def _rotated(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.head_norms is not None:
            turned = len(self.head_norms)
            normed = F.rms_norm(qkv[:, :turned], (self.head_size,), eps=self.epsilon)
            qkv = torch.cat([normed * self.head_norms, qkv[:, turned:]], 1)
        swapped = qkv.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
        return torch.addcmul(qkv * cos, swapped, sin)


class _Joined:
    """Linear layers of one input, with their outputs side by side, in `dtype`.

    One product where the weights are copied anyway, as they have another type or adapters.
    """

    def __init__(self, linears, dtype: torch.dtype):
        weights = [_weight(linear) for linear in linears]
        biases = [linear.bias for linear in linears]
        is_copy = any(
            weight is not linear.weight or weight.dtype != dtype
            for weight, linear in zip(weights, linears, strict=True)
        )
        if is_copy:
            weights = [torch.cat([weight.to(dtype) for weight in weights])]
            biases = [None if biases[0] is None else torch.cat([bias.to(dtype) for bias in biases])]
        self.layers = list(zip(weights, biases, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [F.linear(x, weight, bias) for weight, bias in self.layers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _weight(linear) -> Tensor:
    """The weight, with its LoRA adapters if it has any and they are on."""
    weight = linear.weight
    if hasattr(linear, "get_delta_weight") and not linear.disable_adapters:
        for adapter in linear.active_adapters:
            weight = weight + linear.get_delta_weight(adapter)
    return weight
