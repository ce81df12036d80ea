"""plumbing/memory.py: predictions against the tensors' own sizes."""

import dataclasses
import random
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losses import chunk_tokens, scores_from_hidden
from plumbing import settings
from plumbing.decoding import PACES, Slots
from plumbing.memory import (
    CPU_SAMPLE_MB,
    MicroBatch,
    batch_tokens,
    free_bytes,
    kept_bytes,
    largest_micro_batch,
    micro_batches,
    plan,
    plan_table,
    sample_budget_mb,
    scores_bytes,
    sequence_bytes,
    tower_block_bytes,
    tower_bytes,
    what_to_change,
)
from plumbing.models import RunInForward, _add_adapters, _recompute_activations
from rollout import Batch, Prompt, Question, Response, response_states
from train import TrainConfig


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
    [(200, 64, 20_000, 20, 5), (100, 128, 5000, 50, 8), (40, 256, 4000, 10, 0.1)],
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


def test_sequence_bytes_counts_a_few_copies_of_the_logits(tiny):
    model, processor = tiny
    logits = 4 * model.get_output_embeddings().weight.shape[0]
    assert 3 * logits <= sequence_bytes(model, 0) <= 10 * logits


# ------------------------------------------------------------------------------------ micro-batches
def prompt(question_id, length):
    ids = torch.zeros(length, dtype=torch.long)
    return Prompt(Question(question_id, "?", "1", []), ids, ids, None, None)


def group(prompt, lengths, tutored=(), teacher_length=0):
    """Responses of these lengths to one prompt. tutored: which of them are, by a longer prompt."""
    hinted = prompt_of_teacher(prompt, teacher_length) if teacher_length else None
    return [
        Response(prompt, [0] * length, "", False, tutored=i in tutored, teacher_prompt=hinted)
        for i, length in enumerate(lengths)
    ]


def prompt_of_teacher(prompt, length):
    ids = torch.zeros(length, dtype=torch.long)
    return Prompt(prompt.question, ids, ids, None, None)


def shapes(batches):
    """(question, length) of the responses in each batch."""
    return [[(r.question.id, len(r.ids)) for r in batch] for batch in batches]


@pytest.mark.parametrize(
    "lengths, teacher_length, one_prompt_per_response, tokens",
    [
        ([5], 0, False, 10 + 5),
        ([5, 5], 0, False, 10 + 2 * 5),
        ([5, 5], 0, True, 2 * 10 + 2 * 5),
        ([5, 1], 0, False, 10 + 2 * 5),  # padding counts
        ([5, 5], 14, False, 14 + 2 * 5),  # the teacher's pass is the larger one
        ([5, 5], 14, True, 2 * 14 + 2 * 5),
        ([5, 5], 7, False, 10 + 2 * 5),
    ],
)
def test_tokens_of_a_batch(lengths, teacher_length, one_prompt_per_response, tokens):
    responses = group(prompt("a", 10), lengths, teacher_length=teacher_length)
    assert batch_tokens(responses, one_prompt_per_response) == tokens


def test_prompts_of_a_batch_are_padded_to_the_longest():
    responses = group(prompt("a", 10), [5, 5]) + group(prompt("b", 12), [3])
    assert batch_tokens(responses, False) == 2 * 12 + 3 * 5
    assert batch_tokens(responses, True) == 3 * 12 + 3 * 5


@pytest.mark.parametrize("one_prompt_per_response", [False, True])
@pytest.mark.parametrize("limit", [1, 30, 47, 80, 10_000])
def test_each_response_is_in_one_batch_within_the_limit(limit, one_prompt_per_response):
    responses = [
        *group(prompt("a", 12), [5, 9, 2, 7], tutored=(1, 3), teacher_length=20),
        *group(prompt("b", 10), [4, 4, 8, 1]),
        *group(prompt("c", 25), [3, 6, 3, 6], tutored=(0,), teacher_length=33),
    ]
    batches = micro_batches(responses, limit, one_prompt_per_response)
    together = [response for batch in batches for response in batch]
    assert sorted(map(id, together)) == sorted(map(id, responses))
    for batch in batches:
        assert len(batch) == 1 or batch_tokens(batch, one_prompt_per_response) <= limit
    if limit == 1:
        assert len(batches) == len(responses), "one that is larger than the limit goes alone"
    if limit == 10_000:
        assert len(batches) == 1


def test_a_question_s_responses_stay_together_and_like_lengths_are_near_each_other():
    a, b, c = prompt("a", 10), prompt("b", 20), prompt("c", 10)
    one, two, three = group(b, [1, 2]), group(a, [3, 4]), group(c, [5, 6])
    mixed = [one[0], two[0], three[0], one[1], two[1], three[1]]
    assert shapes(micro_batches(mixed, 24, False)) == [
        [("a", 3), ("a", 4)],
        [("c", 5), ("c", 6)],
        [("b", 1), ("b", 2)],
    ]


def test_tutored_responses_stay_together():
    responses = group(prompt("a", 10), [5, 6, 7, 8], tutored=(1, 3))
    assert shapes(micro_batches(responses, 26, False)) == [
        [("a", 6), ("a", 8)],
        [("a", 5), ("a", 7)],
    ]


def test_one_prompt_per_response_makes_smaller_batches():
    responses = group(prompt("a", 10), [5] * 4)
    assert [len(batch) for batch in micro_batches(responses, 30, False)] == [4]
    assert [len(batch) for batch in micro_batches(responses, 30, True)] == [2, 2]


# ----------------------------------------------------------------------------- kept for backward
class WeightCopies(TorchDispatchMode):
    """The storages of weights and of their casts, which the plan counts elsewhere."""

    def __init__(self, model):
        super().__init__()
        self.held = [*model.parameters(), *model.buffers()]
        self.storages = {x.untyped_storage()._cdata for x in self.held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        casts = func is torch.ops.aten._to_copy.default
        if casts and args[0].untyped_storage()._cdata in self.storages:
            self.held.append(out)  # so that no other tensor gets its address
            self.storages.add(out.untyped_storage()._cdata)
        return out


def counted_bytes(model, bf16, run):
    """Bytes of all storages that autograd saves during run(), without weights and their casts."""
    saved = {}

    def pack(tensor):
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with WeightCopies(model) as weights, hooks, autocast:
        out = run()
    sizes = [x.untyped_storage().nbytes() for at, x in saved.items() if at not in weights.storages]
    del out
    return sum(sizes)


def batch_of(shape, one_prompt_per_response):
    """A Batch of this shape, without images; the first prompt and response are padded."""
    prompts, prompt_length, responses, response_length = shape
    if one_prompt_per_response:
        prompts = responses
    ids = torch.full((prompts, prompt_length), 9)
    attended = torch.ones_like(ids)
    mask = torch.ones((responses, response_length), dtype=torch.bool)
    if prompts > 1:
        attended[0, 0] = 0
    if responses > 1:
        mask[0, -2:] = False
    inputs = {"input_ids": ids, "attention_mask": attended}
    inputs["mm_token_type_ids"] = torch.zeros_like(ids)
    prompt_of = torch.arange(responses) * prompts // responses
    response_ids = torch.full((responses, response_length), 11)
    return Batch(inputs, prompt_of, response_ids, mask, one_prompt_per_response)


def train_by(model, everywhere=False):
    """The model as models.build has it. TRAP: `tiny` is made anew for each test."""
    _recompute_activations(model, everywhere)
    return RunInForward(model.train())


# prompts, their length, responses, their length; keys in multiples of 16, as CUDA pads the mask
SHAPES = [(1, 96, 8, 17), (3, 48, 12, 33), (1, 16, 2, 161), (2, 128, 2, 49)]


@pytest.mark.parametrize("bf16", [True, False])
def test_kept_activations_are_those_that_autograd_saves(tiny, bf16):
    student = train_by(tiny[0])
    for shape in SHAPES:
        batch = batch_of(shape, False)
        run = lambda batch=batch: student(lambda model: response_states(model, batch))  # noqa: E731
        counted = counted_bytes(student, bf16, run)
        assert kept_bytes(tiny[0], MicroBatch(*shape), bf16=bf16) == pytest.approx(
            counted, rel=0.05
        )


@pytest.mark.parametrize("bf16", [True, False])
def test_recomputed_layers_keep_their_inputs_and_one_layer_is_whole(tiny, bf16):
    student = train_by(tiny[0], everywhere=True)
    [first, *_] = layers = tiny[0].model.language_model.layers
    for shape in [(1, 96, 1, 33), (1, 48, 6, 33)]:
        batch = batch_of(shape, True)
        run = lambda batch=batch: student(lambda model: response_states(model, batch))  # noqa: E731
        inputs = counted_bytes(student, bf16, run)
        first.gradient_checkpointing = False
        with_one_layer = counted_bytes(student, bf16, run)
        first.gradient_checkpointing = True
        predicted = kept_bytes(tiny[0], MicroBatch(*shape), bf16=bf16, recomputed=True)
        assert predicted == pytest.approx(with_one_layer, rel=0.05)
        assert len(layers) == 2 and inputs < predicted


def test_kept_activations_of_adapters(tiny):
    pytest.importorskip("peft")
    model = tiny[0].requires_grad_(False)
    _add_adapters(model.to(torch.bfloat16), 8)
    student = train_by(model)
    for shape in SHAPES:
        batch = batch_of(shape, False)
        run = lambda batch=batch: student(lambda model: response_states(model, batch))  # noqa: E731
        counted = counted_bytes(student, True, run)
        predicted = kept_bytes(model, MicroBatch(*shape), bf16=True, lora=8)
        assert predicted == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("bf16", [True, False])
def test_the_tower_keeps_its_blocks_inputs_and_one_block_is_whole(tiny, bf16, monkeypatch):
    """On a CUDA device autocast runs layer_norm in float32, on a CPU it does not."""
    plain = torch.nn.functional.layer_norm
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda x, *args: plain(x.float(), *args))
    model = tiny[0].train()
    tower = model.model.visual
    grid = torch.tensor([[1, 8, 12]])
    pixels = torch.randn(96, 3 * 2 * 14 * 14)

    def counted(*whole):
        for number, block in enumerate(tower.blocks):
            block.gradient_checkpointing = number not in whole
        return counted_bytes(tower, bf16, lambda: tower(pixels, grid_thw=grid))

    _recompute_activations(model, False)
    nothing, one = counted(), counted(0)
    width = 2 if bf16 else 4
    input_of_one = 96 * width * tower.blocks[0].norm1.weight.numel()
    block = 96 * tower_block_bytes(tower, bf16=bf16)
    assert block == pytest.approx(one - nothing + input_of_one, rel=0.05)
    assert tower_bytes(tower, 96, bf16=bf16) == block + 2 * input_of_one


# -------------------------------------------------------------------------------------- --sample-mb
def test_the_sampling_budget_is_four_fifths_of_what_is_free(tiny):
    model = tiny[0]
    budget = sample_budget_mb(model, 10, 10 * GIB)
    assert 0.79 * 10 * 1024 < budget < 0.8 * 10 * 1024, "tiny prompts take a little"
    assert sample_budget_mb(model, 10**6, 10 * GIB) < budget, "one long prompt takes more"
    assert sample_budget_mb(model, 10, 0) == 1.0


def test_the_copies_of_the_weights_are_not_free_for_slots(tiny):
    """Autocast's, and the sampler's own of the language model."""
    model = tiny[0]
    with torch.autocast("cpu", torch.bfloat16):
        copied = sample_budget_mb(model, 10, 10 * GIB)
        kept = sample_budget_mb(model.to(torch.bfloat16), 10, 10 * GIB)
    copies = 2 * (size(model.parameters()) + size(model.model.language_model.parameters()))
    assert (kept - copied) * 2**20 == pytest.approx(0.8 * copies)


def test_slots_take_what_is_predicted(tiny, monkeypatch):
    """The cache in the type that attention multiplies in, whole as on a GPU, and the tables."""
    monkeypatch.setitem(PACES, "cpu", PACES["cuda"])
    model = tiny[0]
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            slots = Slots(model, 3, 20, 80, [], [])
            predicted = 3 * (sequence_bytes(model, 100) - sequence_bytes(model, 0))
        tables = [table for name, table in slots.rows.items() if name in ("ids", "logp", "noise")]
        taken = sum(tensor.nbytes for tensor in [*slots.cache, *tables])
        assert taken == pytest.approx(predicted, rel=0.05)


def test_a_cpu_s_budget_is_bounded():
    assert 0 < free_bytes(torch.device("cpu")) <= CPU_SAMPLE_MB * 2**20


# ------------------------------------------------------------------------------------------- --plan
GIB = 2**30


def size(parameters):
    return sum(parameter.numel() for parameter in parameters)


@pytest.fixture
def sizes(base):
    """Parameters of the embedded model: all, of its vision tower, of one of its layers."""
    model = base[0].model
    whole, tower = size(base[0].parameters()), size(model.visual.parameters())
    return whole, tower, size(model.language_model.layers[0].parameters())


@pytest.mark.parametrize("freeze_vision", [False, True])
def test_plan_of_one_gpu_in_float32(sizes, freeze_vision):
    whole, tower, _ = sizes
    parts = plan(TrainConfig(freeze_vision=freeze_vision), 1, bf16=False)
    trained = whole - tower if freeze_vision else whole
    assert parts["weights"] * GIB == 4 * whole
    assert parts["reference"] * GIB == 4 * whole
    assert parts["gradients"] * GIB == 4 * trained
    assert parts["AdamW"] * GIB == 8 * trained
    assert parts["bf16 copies"] == 0


def test_plan_of_several_gpus_shards_what_is_kept_and_not_what_is_computed(base, sizes):
    whole, _, layer = sizes
    config = TrainConfig(sample_mb=100)
    one, four = plan(config, 1, bf16=True), plan(config, 4, bf16=True)
    for name in ("weights", "AdamW", "reference", "gradients"):
        assert four[name] == one[name] / 4
    for name in ("activations", "logits, head"):
        assert four[name] == one[name]
    assert one["reference"] * GIB == 2 * whole
    assert one["bf16 copies"] * GIB == 2 * whole
    layers = 3
    assert four["bf16 copies"] * GIB == 2 * (whole - (layers - 2) * layer), "two layers are whole"
    language_model = size(base[0].model.language_model.parameters())
    caches = config.sample_mb * 2**20 + 2 * whole
    assert four["caches, sampling"] * GIB == caches, "all weights, gathered once"
    assert one["caches, sampling"] * GIB == caches + 2 * language_model


def test_plan_of_lora_counts_adapters_and_no_reference(sizes, monkeypatch):
    monkeypatch.setattr(settings, "find_spec", lambda package: True)
    whole, _, _ = sizes
    parts = plan(TrainConfig(lora=4), 1, bf16=True)
    # hidden size 128, intermediate size 256: four projections of attention and three of the MLP
    per_layer = 4 * 4 * (128 + 128) + 3 * 4 * (128 + 256)
    assert parts["weights"] * GIB == 2 * whole + 4 * 3 * per_layer
    assert parts["AdamW"] * GIB == 8 * 3 * per_layer
    assert parts["gradients"] * GIB == 4 * 3 * per_layer
    assert parts["reference"] == 0
    assert parts["bf16 copies"] == 0


def test_plan_takes_the_settings_that_bound_memory():
    config = TrainConfig(micro_tokens=100, jsd_k=7, logits_mb=3, max_prompt=50, max_new_tokens=40)
    parts = plan(config, 1, bf16=False)
    twice = plan(dataclasses.replace(config, micro_tokens=200), 1, bf16=False)
    assert twice["activations"] > 1.5 * parts["activations"]
    expected = scores_bytes(100, 128, 105, k=7, logits_mb=3, dtype=torch.float32, train_head=True)
    assert parts["logits, head"] * GIB == expected
    recomputed = dataclasses.replace(config, gradient_checkpointing=True)
    assert plan(recomputed, 1, bf16=False)["activations"] < parts["activations"]
    assert plan(config, 1, bf16=True)["activations"] < parts["activations"]


@pytest.mark.parametrize(
    "limit, longest, scored",
    [(100, 40, 100), (20, 40, 40), (10**6, 40, 2 * 3 * 40)],
    ids=["a full micro-batch", "one longer response", "all of the step's"],
)
def test_plan_of_the_head_counts_the_tokens_that_meet_it(limit, longest, scored):
    config = TrainConfig(micro_tokens=limit, max_new_tokens=longest, questions=2, group_size=3)
    parts = plan(config, 1, bf16=False)
    scores = {"k": config.jsd_k, "logits_mb": config.logits_mb}
    assert parts["logits, head"] * GIB == scores_bytes(scored, 128, 105, **scores)


@pytest.mark.parametrize("recomputed", [False, True])
def test_no_micro_batch_of_the_plan_is_larger_than_a_step(recomputed):
    step = {"questions": 2, "group_size": 3, "max_prompt": 50, "max_new_tokens": 40}
    config = TrainConfig(**step, gradient_checkpointing=recomputed, micro_tokens=10**6)
    whole = dataclasses.replace(
        config, micro_tokens=6 * (50 + 40) if recomputed else 2 * 50 + 6 * 40
    )
    assert plan(config, 1, bf16=True)["activations"] == plan(whole, 1, bf16=True)["activations"]


def test_no_micro_batch_takes_more_than_the_plan_s(base):
    config = TrainConfig(micro_tokens=400, max_prompt=200, max_new_tokens=150, group_size=8)
    predicted = largest_micro_batch(base[0], config, True)
    draw = random.Random(0)
    sizes = []
    for _ in range(300):
        groups = [
            group(prompt(str(q), draw.randint(1, 200)), [draw.randint(1, 150)] * 8)
            for q in range(draw.randint(1, 6))
        ]
        responses = [response for responses in groups for response in responses]
        for part in micro_batches(responses, config.micro_tokens, False):
            sizes.append(micro_batch_bytes(base[0], part, config.micro_tokens))
    assert max(sizes) <= predicted
    assert max(sizes) > 0.6 * predicted, "the prediction is near what happens"


def micro_batch_bytes(model, responses, limit):
    """As the plan counts it: the shape that these responses are padded to."""
    lengths = [len(response.prompt.ids) for response in responses]
    prompts = len({id(response.prompt) for response in responses})
    batch = MicroBatch(prompts, max(lengths), len(responses), max(len(r.ids) for r in responses))
    recomputed = batch.tokens > limit
    tower = tower_bytes(model.model.visual, 4 * prompts * max(lengths), bf16=True)
    return kept_bytes(model, batch, bf16=True, recomputed=recomputed) + tower


def test_a_plan_without_recomputing_grows_with_the_longest_prompt():
    short = plan(TrainConfig(micro_tokens=100, max_prompt=40), 1, bf16=True)
    long = plan(TrainConfig(micro_tokens=100, max_prompt=4000), 1, bf16=True)
    assert long["activations"] > 2 * short["activations"], "one alone, although it recomputes"


def test_what_does_not_fit_says_what_to_change():
    config = TrainConfig(micro_tokens=50_000)
    needed = int(plan(config, 1, True)["peak"] * GIB)
    assert what_to_change(config, 1, True, needed + 1) is None
    line = what_to_change(config, 1, True, needed - 1)
    assert "\n" not in line
    for option in ("--gradient-checkpointing", "--micro-tokens 25000", "--freeze-vision", "--lora"):
        assert option in line
    smaller = plan(dataclasses.replace(config, micro_tokens=25_000), 1, True)["peak"]
    assert f"--micro-tokens 25000 ({smaller:.1f} GiB)" in line
    frozen = dataclasses.replace(config, freeze_vision=True, gradient_checkpointing=True)
    line = what_to_change(frozen, 1, True, 1)
    assert "--freeze-vision" not in line and "--gradient-checkpointing" not in line


@pytest.mark.parametrize("sample_mb", [1, 10**6])
def test_the_peak_is_the_larger_of_updating_and_sampling(sample_mb):
    parts = plan(TrainConfig(sample_mb=sample_mb), 1, bf16=False)
    peak, caches = parts.pop("peak"), parts.pop("caches, sampling")
    standing = parts["weights"] + parts["AdamW"] + parts["reference"]
    assert peak == pytest.approx(max(sum(parts.values()), standing + caches))
    assert (peak == pytest.approx(standing + caches)) == (sample_mb > 1)


@pytest.mark.parametrize("gpus, title", [(1, "each of 1 GPU:"), (8, "each of 8 GPUs, sharded:")])
def test_the_plan_s_table_has_a_line_for_each_part(gpus, title):
    parts = plan(TrainConfig(), gpus, bf16=True)
    lines = plan_table(parts, gpus).splitlines()
    assert lines[0] == f"predicted memory, {title}"
    assert len(lines) == 1 + len(parts)
    for line, (name, value) in zip(lines[1:], parts.items(), strict=True):
        assert line.startswith(f"{name:20s}{value:8.1f} GiB")
