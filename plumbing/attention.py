"""Where a model looks in a question's pictures while it writes a response, and in which layers.

A model looks at the evidence while it writes its reasoning, not at the answer, and each word looks
at another place. So a cell of the map is as hot as the *strongest* look that any token of the
reasoning takes at it, less the average one: what all tokens look at alike, such as an attention
sink, cancels exactly.

Which layers look at evidence is seen without labels. In such a layer the maps of right responses
to one question resemble each other more than they resemble the maps of wrong ones.
bench/attention.py measures all of this where the truth is known.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from rollout import Prompt, collate, response_states

WATCHED = "ptdpo_watched"  # the name under which transformers finds the attention that is watched


# --------------------------------------------------------------------------------- the reasoning
def reasoning_tokens(tokenizer, ids: list[int]) -> list[int]:
    r"""The tokens of a response before its last \boxed{}; without one, all that are text.

    They end where the answer begins, so that what is looked at for the answer is not in the map.
    """

    def characters(count: int) -> int:
        return len(tokenizer.decode(ids[:count], skip_special_tokens=True))

    answer = tokenizer.decode(ids, skip_special_tokens=True).rfind("\\boxed")
    if answer < 0:
        special = set(tokenizer.all_special_ids)
        return [token for token in ids if token not in special]
    # the first count of tokens that reach into the answer
    count = bisect_right(range(len(ids) + 1), answer, key=characters)
    return ids[: count - 1]


# -------------------------------------------------------------------------------------- the maps
def layer_count(model) -> int:
    """How many layers of text a model has."""
    return len(model.model.language_model.layers)


def check_layers(model, first: int, last: int) -> None:
    """Raise ValueError for layers that the model does not have."""
    count = layer_count(model)
    if not 0 <= first <= last < count:
        raise ValueError(f"layers {first}-{last}: the model has layers 0 to {count - 1}")


def peaks(looks: Tensor) -> Tensor:
    """The heat (image tokens,) of a layer, from its looks (response tokens, image tokens).

    A token's strongest look less its average one, in units of the average look at a token in the
    middle of the order (the median), over all images. So 0 is a token that is looked at evenly.
    """
    level = looks.mean(0)
    return (looks.amax(0) - level) / level.median().clamp(min=1e-12)


@torch.no_grad()
def layer_maps(
    model,
    prompt: Prompt,
    response: list[int],
    pad_id: int,
    layers: Collection[int] | None = None,
    reduce: Callable[[Tensor], Tensor] = peaks,
) -> Tensor:
    """How hot each image token is in each layer while the model writes `response` on `prompt`.

    response: token ids, at least two. layers: which ones, by default all. reduce: from a layer's
    looks (response tokens, image tokens), which are attention summed over heads, to its heat. A
    token's look is that of the state which predicts it. Returns (layers, image tokens), float32.

    One pass over the whole sequence, without a cache. The model's own attention runs as ever; of
    the watched layers, the weights of the response's rows are made again beside it, one head at a
    time: (response tokens, all tokens) of float32 are in memory, whatever the number of layers.
    """
    wanted = range(layer_count(model)) if layers is None else layers
    image = prompt.types.bool().nonzero()[:, 0].to(model.device)
    heat = {}

    def look(layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        if layer in wanted:
            heat[layer] = reduce(_looks(query[0], key[0], scaling, len(response), image))

    batch = collate([prompt], [response], pad_id, model.device, one_prompt_per_response=True)
    with _watched(model, look):
        response_states(model, batch)
    return torch.stack([heat[layer] for layer in wanted])


def _looks(query: Tensor, key: Tensor, scaling: float, rows: int, image: Tensor) -> Tensor:
    """Attention (rows, image tokens) of the last `rows` queries, summed over heads.

    query (heads, n, d), key (key heads, n, d), in the order of the tokens and without padding.
    image: the image's tokens among the n.
    """
    heads, tokens, _ = query.shape
    share = heads // len(key)  # heads that read one key head
    future = torch.ones(rows, tokens, dtype=torch.bool, device=query.device)
    future = future.triu(tokens - rows + 1)
    total = torch.zeros(rows, len(image), device=query.device)
    for head in range(heads):
        scores = query[head, -rows:].float() @ key[head // share].float().T
        weights = (scores * scaling).masked_fill_(future, -torch.inf).softmax(-1)
        total += weights[:, image]
    return total


@contextlib.contextmanager
def _watched(model, look: Callable[[int, Tensor, Tensor, float], None]):
    """Within: look(layer, query, key, scaling) is called before each layer of text attends.

    By the registry for own attention functions that transformers documents. The functions that
    compute are its own for "sdpa".
    """
    attend = AttentionInterface()["sdpa"]

    def watched(module, query, key, *others, **settings):
        look(module.layer_idx, query, key, module.scaling)
        return attend(module, query, key, *others, **settings)

    AttentionInterface.register(WATCHED, watched)
    # without a mask function of this name no mask would be made, whatever the prompt
    AttentionMaskInterface.register(WATCHED, AttentionMaskInterface()["sdpa"])
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": WATCHED})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


def maps_of_images(heat: Tensor, grid: Tensor, merge_size: int) -> list[Tensor]:
    """The heat (image tokens,) of all images -> one map (h, w) per image, on the CPU.

    grid (images, 3): time, height, width in patches. merge_size: patches per token and side.
    """
    shapes = [(h // merge_size, w // merge_size) for _, h, w in grid.tolist()]
    pieces = heat.cpu().split([h * w for h, w in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


# ------------------------------------------------------------------------------------ the layers
def layer_scores(right: Tensor, wrong: Tensor) -> Tensor:
    """How much each layer's map says about where a response gets its evidence: (layers,).

    right (R, layers, image tokens), wrong (W, layers, image tokens): maps of right and wrong
    responses to one question, R at least 2 and W at least 1. The mean correlation of two right
    responses' maps less that of a right and a wrong one's. Ours; no label of the picture is used.
    """

    def similarity(some: Tensor, others: Tensor) -> Tensor:
        return torch.einsum("ilc,jlc->ijl", some, others)

    right, wrong = (F.normalize(x - x.mean(-1, keepdim=True), dim=-1) for x in (right, wrong))
    pairs = torch.triu_indices(len(right), len(right), 1)
    among_right = similarity(right, right)[pairs[0], pairs[1]].mean(0)
    return among_right - similarity(right, wrong).mean((0, 1))


def choose_layers(scores: Tensor) -> tuple[int, ...]:
    """The layers that look at evidence, from the scores (questions, layers) of layer_scores.

    Those with at least half of the best layer's mean score. All layers where the best one is
    within two standard errors of 0, and where there are fewer than two questions: then nothing is
    known.
    """
    everywhere = tuple(range(scores.shape[1]))
    if len(scores) < 2:
        return everywhere
    means = scores.mean(0)
    best = int(means.argmax())
    error = scores[:, best].std() / len(scores) ** 0.5
    if means[best] <= 2 * error:
        return everywhere
    return tuple(layer for layer in everywhere if means[layer] >= means[best] / 2)
