"""Ways to decode a group: our own sampler, and model.generate. Nothing of ours is imported."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig


class CastingCache(DynamicCache):
    """A cache of keys and values in the type that attention multiplies in.

    TRAP: under autocast, keys are promoted to float32 by the float32 rotary tables, and the cache
    with them: twice the memory of what attention then casts to bfloat16 again.
    """

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs):
        device = keys.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            keys, values = keys.to(dtype), values.to(dtype)
        return super().update(keys, values, *args, **kwargs)


def draw(
    logits: Tensor,
    uniform: Tensor | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """Next tokens (R,) and their log-probs (R,) at `temperature`, before truncation.

    logits (R, V) float32. uniform (R,) float64 in [0, 1): the token is where the cumulative
    probability passes it, so that a draw depends on its own row alone; None: greedy. top_k > 0
    keeps the k most probable tokens, top_p < 1 the fewest that hold this mass (nucleus sampling,
    arXiv 1904.09751).
    """
    if uniform is None:
        token = logits.argmax(-1, keepdim=True)
        return token.squeeze(-1), logits.softmax(-1).gather(-1, token).log().squeeze(-1)
    p = (logits / temperature).softmax(-1)
    if top_k or top_p < 1:
        kept, order = torch.sort(p, dim=-1, descending=True, stable=True)
        outside = kept.cumsum(-1) - kept >= top_p
        if top_k:
            outside[:, top_k:] = True
        token = order.gather(-1, _inverse_cdf(kept.masked_fill(outside, 0), uniform))
    else:
        token = _inverse_cdf(p, uniform)
    return token.squeeze(-1), p.gather(-1, token).log().squeeze(-1)


def _inverse_cdf(p: Tensor, uniform: Tensor) -> Tensor:
    """The place (R, 1) in each row of weights p (R, V) where `uniform` of its sum is passed."""
    mass = p.cumsum(-1, dtype=torch.float64)  # float32 sums over 150,000 tokens move the borders
    threshold = uniform.clamp(max=1 - 1e-9).unsqueeze(-1) * mass[:, -1:]
    return torch.searchsorted(mass, threshold, right=True)


def uniforms(keys: list[str], length: int) -> Tensor:
    """(len(keys), length) float64 numbers in [0, 1); each row is a function of its key alone."""
    rows = []
    for key in keys:
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows.append(torch.rand(length, dtype=torch.float64, generator=generator))
    return torch.stack(rows)


def next_logits(head: torch.nn.Linear, state: Tensor, banned: Tensor) -> Tensor:
    """Logits (R, V) float32 of the tokens that follow states (R, T, H); -inf where banned."""
    # W x^T, not x W^T: for a dozen rows and a large vocabulary a CPU is 1.6 times as fast so
    logits = (head.weight @ state[:, -1].T).T.float().contiguous()
    return logits.index_fill_(-1, banned, -math.inf)


WATCH_EVERY = 8  # tokens between two calls of `watch`; each call reads the device once


def progress(lengths: list[int], before: int, now: int) -> tuple[int, list[int]]:
    """What happened between token `before` and token `now` of responses of these lengths.

    Returns the number of tokens drawn, and the lengths of the responses that ended.
    """
    tokens = sum(min(length, now) - min(length, before) for length in lengths)
    return tokens, [length for length in lengths if before < length <= now]


def reporter(watch: Callable | None, lengths: Tensor, longest: int) -> Callable[[int], None]:
    """A function that tells `watch` what happened up to token `now`, every WATCH_EVERY tokens.

    lengths (R,): of the responses; `longest` where a response has not ended. Read at each report.
    """
    reported = 0

    def report(now: int) -> None:
        nonlocal reported
        if watch and (now % WATCH_EVERY == 0 or now == longest):
            watch(*progress(lengths.tolist(), reported, now))
            reported = now

    return report


def decode(
    model,
    prefilled: tuple,
    noise: Tensor | None,
    eos: list[int],
    banned: list[int],
    pad: int,
    max_new_tokens: int,
    watch: Callable | None = None,
    **settings,
) -> list[tuple[list[int], list[float]]]:
    """One response for each of R prefilled rows: its token ids, EOS included, and log-probs.

    prefilled: what rollout.prefill returns, the state (R, 1, H), cache, attention mask and first
    position; the cache is used up. noise (R, max_new_tokens): see `draw`. settings: temperature,
    top_p, top_k. All rows step together; rows that ended leave once they are a quarter of the
    batch.

    watch(tokens, lengths) is called before the first token and every few tokens, with numbers of
    the time since its last call: tokens drawn, and the lengths of the responses that ended. An
    exception that it raises ends the decoding.
    """
    state, cache, attended, start = prefilled
    count, device = len(state), state.device
    eos, banned = torch.tensor(eos, device=device), torch.tensor(banned, device=device)
    noise = None if noise is None else noise.to(device)
    ids = torch.full((count, max_new_tokens), pad, device=device)
    logp = torch.zeros(ids.shape, device=device)
    lengths = torch.full((count,), max_new_tokens, device=device)
    row_of = torch.arange(count, device=device)  # which response each row of the cache writes
    done = torch.zeros(count, dtype=torch.bool, device=device)
    head = model.get_output_embeddings()
    report = reporter(watch, lengths, max_new_tokens)
    for t in range(max_new_tokens):
        report(t)
        logits = next_logits(head, state, banned)
        uniform = None if noise is None else noise[row_of, t]
        token, logp[row_of, t] = draw(logits, uniform, **settings)
        ids[row_of, t] = token
        ended = torch.isin(token, eos) & ~done
        lengths[row_of[ended]] = t + 1
        done |= ended
        if t == max_new_tokens - 1 or done.all():
            break
        if done.float().mean() >= 0.25:  # each time costs a copy of the cache
            live = (~done).nonzero().squeeze(1)
            cache.batch_select_indices(live)
            row_of, attended, start, token, done = (
                x[live] for x in (row_of, attended, start, token, done)
            )
        attended = torch.cat([attended, torch.ones_like(attended[:, :1])], 1)
        state = model.model(
            input_ids=token.unsqueeze(1),
            attention_mask=attended,
            position_ids=(start + t).expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    report(max_new_tokens)
    results = zip(ids.tolist(), logp.tolist(), lengths.tolist(), strict=True)
    return [(row_ids[:length], row_logp[:length]) for row_ids, row_logp, length in results]


def generate_by_transformers(
    model,
    inputs: dict[str, Tensor],
    eos: list[int],
    banned: list[int],
    pad: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    watch: Callable | None = None,
) -> list[tuple[list[int], None]]:
    """The same by model.generate, which draws from torch's global random state.

    inputs: one padded prompt per response, repeated where several responses answer it. Log-probs
    are not known. watch: as in `decode`, but it learns of all tokens at the end.
    """

    def look(sequences: Tensor, scores, **_) -> Tensor:
        """A stopping criterion that stops nothing, but lets `watch` raise its exception."""
        drawn = sequences.shape[1] - inputs["input_ids"].shape[1]
        if watch and drawn % WATCH_EVERY == 0:
            watch(0, [])
        return torch.zeros(len(sequences), dtype=torch.bool, device=sequences.device)

    if temperature > 0:
        sampling = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k)
    else:
        sampling = dict(do_sample=False)
    # TRAP: whatever is left None here is taken from the model's own generation config; Qwen's has a
    # repetition penalty
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        num_beams=1,
        pad_token_id=pad,
        repetition_penalty=1.0,
        suppress_tokens=banned,
        **sampling,
    )
    sequences = model.generate(**inputs, generation_config=config, stopping_criteria=[look])
    responses = []
    for ids in sequences[:, inputs["input_ids"].shape[1] :].tolist():
        ends = [place + 1 for place, token in enumerate(ids) if token in eos]
        responses.append((ids[: ends[0]] if ends else ids, None))
    if watch:
        lengths = [len(ids) for ids, _ in responses]
        watch(sum(lengths), lengths)
    return responses
