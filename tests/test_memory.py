"""plumbing/memory.py: predictions against the tensors' own sizes."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losses import chunk_tokens, scores_from_hidden
from plumbing.memory import scores_bytes, sequence_bytes
from rollout import encode_prompts, pad_prompts, prefill, student_messages
from toy import world


class LiveBytes(TorchDispatchMode):
    """Sizes of the storages of at least `least` bytes that operations have made and nobody has dropped: now, and at the worst moment."""

    def __init__(self, inputs, least):
        super().__init__()
        self.least, self.now, self.peak, self.known = (
            least,
            0,
            0,
            weakref.WeakSet(x.untyped_storage() for x in inputs),
        )
        self.inputs = [x.untyped_storage() for x in inputs]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage.nbytes() >= self.least and storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, storage.nbytes())
        return out

    def drop(self, size):
        self.now -= size


def live_peak(tokens, hidden, vocab, k, logits_mb, dtype, train_head, least=0):
    student, other = (
        torch.nn.Linear(hidden, vocab, bias=False, dtype=dtype).requires_grad_(train_head)
        for _ in range(2)
    )
    h, g = (
        torch.randn(tokens, hidden, dtype=dtype, requires_grad=True),
        torch.randn(tokens, hidden, dtype=dtype),
    )
    ids = torch.randint(0, vocab, (tokens,))
    with LiveBytes([h, g, ids, student.weight, other.weight], least) as live:
        logp, _, jsd = scores_from_hidden(h, student, ids, g, other, k=k, logits_mb=logits_mb)
        (logp.sum() + jsd.sum()).backward()
    return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize(
    "tokens,hidden,vocab,k,logits_mb",
    [(200, 64, 20_000, 20, 5), (100, 128, 5000, 50, 8), (150, 256, 4000, 10, 0.1)],
)
def test_predicted_memory_is_the_tensors_own(
    dtype, train_head, tokens, hidden, vocab, k, logits_mb
):
    predicted = scores_bytes(
        tokens, hidden, vocab, k=k, logits_mb=logits_mb, dtype=dtype, train_head=train_head
    )
    assert live_peak(tokens, hidden, vocab, k, logits_mb, dtype, train_head) == pytest.approx(
        predicted, rel=0.05
    )


def test_vocabulary_sized_tensors_stay_within_the_budget_however_many_tokens():
    peaks = [
        live_peak(tokens, 8, 20_000, 5, 3.5, torch.float32, False, least=20_000 * 4)
        for tokens in (22, 50, 400)
    ]
    chunk = chunk_tokens(20_000, 3.5)
    assert chunk == 22 and peaks == [chunk * 20_000 * 8] * 3 and peaks[0] <= 3.5 * 2**20
    assert (
        chunk_tokens(151_936, 0.001) == 1
        and chunk_tokens(151_936, 512) == 441
        and chunk_tokens(151_936, 512, torch.float64) == 220
    )


def test_sequence_bytes_is_the_cache_s_size(tiny):
    model, processor = tiny
    puzzles = world.puzzles("tune", 1)
    prompt = encode_prompts(processor, puzzles, [student_messages(puzzles[0])])[0]
    cache = prefill(model, pad_prompts([prompt], 0), torch.tensor([0, 0, 0]))[1]
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert size == 3 * (sequence_bytes(model, len(prompt.ids)) - sequence_bytes(model, 0))
