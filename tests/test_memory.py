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
    """Bytes of the storages that operations have made and nobody has dropped: `now` and `peak`.

    Storages of `inputs` and those smaller than `least` bytes do not count.
    """

    def __init__(self, inputs, least):
        super().__init__()
        self.least, self.now, self.peak = least, 0, 0
        self.inputs = [x.untyped_storage() for x in inputs]  # held, so that `known` keeps them
        self.known = weakref.WeakSet(self.inputs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf.untyped_storage())
        return out

    def count(self, storage):
        size = storage.nbytes()
        if size < self.least or storage in self.known:
            return
        self.known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, size)

    def drop(self, size):
        self.now -= size


def live_peak(tokens, hidden, vocab, k, logits_mb, dtype, train_head, least=0):
    """Measured peak of scores_from_hidden, forward and backward, in bytes."""
    student = torch.nn.Linear(hidden, vocab, bias=False, dtype=dtype).requires_grad_(train_head)
    teacher = torch.nn.Linear(hidden, vocab, bias=False, dtype=dtype).requires_grad_(train_head)
    states = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    teacher_states = torch.randn(tokens, hidden, dtype=dtype)
    ids = torch.randint(0, vocab, (tokens,))
    with LiveBytes([states, teacher_states, ids, student.weight, teacher.weight], least) as live:
        logp, _, jsd = scores_from_hidden(
            states, student, ids, teacher_states, teacher, k=k, logits_mb=logits_mb
        )
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
    measured = live_peak(tokens, hidden, vocab, k, logits_mb, dtype, train_head)
    assert measured == pytest.approx(predicted, rel=0.05)


def test_vocabulary_sized_tensors_stay_within_the_budget_however_many_tokens():
    vocab, logits_mb = 20_000, 3.5
    chunk = chunk_tokens(vocab, logits_mb)
    assert chunk == 22
    for tokens in (22, 50, 400):
        peak = live_peak(tokens, 8, vocab, 5, logits_mb, torch.float32, False, least=vocab * 4)
        assert peak == chunk * vocab * 8 <= logits_mb * 2**20
    assert chunk_tokens(151_936, 0.001) == 1
    assert chunk_tokens(151_936, 512) == 441
    assert chunk_tokens(151_936, 512, torch.float64) == 220


def test_sequence_bytes_is_the_cache_s_size(tiny):
    model, processor = tiny
    puzzles = world.puzzles("tune", 1)
    prompt = encode_prompts(processor, puzzles, [student_messages(puzzles[0])])[0]
    cache = prefill(model, pad_prompts([prompt], 0), torch.tensor([0, 0, 0]))[1]
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert size == 3 * (sequence_bytes(model, len(prompt.ids)) - sequence_bytes(model, 0))
