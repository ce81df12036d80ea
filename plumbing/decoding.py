"""Ways to decode a group."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def draw(
    logits: Tensor,
    uniform: Tensor | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """Next tokens (R,) and their log-probs (R,) at `temperature`, before truncation. logits (R, V) float32; None for uniform is greedy.

    uniform (R,) float64 in [0, 1): the token is where the cumulative probability passes it, so that a draw depends on its own row
    alone. top_k > 0 keeps the k most probable tokens, top_p < 1 the fewest that hold this mass (nucleus sampling, arXiv 1904.09751).
    """
    p = (logits if uniform is None else logits / temperature).softmax(-1)
    if uniform is None:
        token = logits.argmax(-1, keepdim=True)
    else:
        kept, order = p, None
        if top_k or top_p < 1:
            kept, order = torch.sort(p, dim=-1, descending=True, stable=True)
            outside = kept.cumsum(-1) - kept >= top_p
            if top_k:
                outside[:, top_k:] = True
            kept = kept.masked_fill(outside, 0)
        mass = kept.cumsum(
            -1, dtype=torch.float64
        )  # float32 sums over 150,000 tokens would move the borders
        token = torch.searchsorted(
            mass, uniform.clamp(max=1 - 1e-9).unsqueeze(-1) * mass[:, -1:], right=True
        )
        token = token if order is None else order.gather(-1, token)
    return token.squeeze(-1), p.gather(-1, token).log().squeeze(-1)


def uniforms(keys: list[str], length: int) -> Tensor:
    """(len(keys), length) float64 numbers in [0, 1), each row from its key alone: neither batches nor processes change what is drawn."""
    rows = []
    for key in keys:
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
        rows.append(
            torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        )
    return torch.stack(rows)
