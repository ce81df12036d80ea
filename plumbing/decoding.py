"""The sampler: draws, and slots in which many responses of different lengths decode together."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from plumbing.text_decoder import TextDecoder


class CastingCache(DynamicCache):
    """A cache of keys and values in the type that attention multiplies in.

    TRAP: under autocast, keys are promoted to float32 by the float32 rotary tables, and the cache
    with them: twice the memory of what attention then casts to bfloat16 again.
    """

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs):
        dtype = product_dtype(keys.device, keys.dtype)
        return super().update(keys.to(dtype), values.to(dtype), *args, **kwargs)


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The type in which matrices are multiplied: autocast's where it is on, else `dtype`."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


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


BLOCK = 512  # tokens whose probabilities are added up first


def _inverse_cdf(p: Tensor, uniform: Tensor) -> Tensor:
    """The place (R, 1) in each row of weights p (R, V) where `uniform` of its sum is passed.

    Sums are float64: in float32 sums over 150,000 tokens move the borders. Two levels, first the
    block of BLOCK tokens and then the token in it: a running float64 sum over all V is slow.
    """
    blocks = F.pad(p, (0, -p.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    mass = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    threshold = uniform.clamp(max=1 - 1e-9).unsqueeze(-1) * mass[:, -1:]
    block = torch.searchsorted(mass, threshold, right=True).clamp_(max=mass.shape[-1] - 1)
    before = F.pad(mass, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    mass_inside = inside.cumsum(-1, dtype=torch.float64)
    # rounding can put the threshold at the block's end: its last token that has any weight
    last = (inside > 0).cumsum(-1).argmax(-1, keepdim=True)
    place = torch.searchsorted(mass_inside, threshold - before, right=True).minimum(last)
    return block * BLOCK + place


def uniforms(keys: list[str], length: int) -> Tensor:
    """(len(keys), length) float64 numbers in [0, 1); each row is a function of its key alone."""
    rows = []
    for key in keys:
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows.append(torch.rand(length, dtype=torch.float64, generator=generator))
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------- slots
class Pace(NamedTuple):
    """What differs between a GPU and a CPU.

    steps: per look at the rows that have ended. late: a look reads the copy of the look before. A
    look costs nothing on a CPU; on a GPU it must not wait for the steps that were just asked for.
    window: the places of the cache that are read are a multiple of it, so that few graphs serve.
    growth: places are added to the cache by so many, as a CPU reads a cache with gaps slowly; 0:
    all at once. shrinks: free rows are left out at the end; a GPU hardly pays for them.
    """

    steps: int
    late: bool
    window: int
    growth: int
    shrinks: bool


PACES = {"cuda": Pace(8, True, 256, 0, False), "cpu": Pace(1, False, 1, 32, True)}


@dataclass
class Prefilled:
    """U prompts of one length that have run, and R responses that continue them.

    owners: a name for each response. prompt_of (R,): which prompt it answers. state (U, H):
    predicts the first token. layers: of the cache, with keys and values (U, heads, P, D).
    first_position (U,): of the first token. noise (R, T): see `draw`; None: greedy.
    """

    owners: list
    prompt_of: Tensor
    state: Tensor
    layers: list
    first_position: Tensor
    noise: Tensor | None

    @property
    def prompt_length(self) -> int:
        return self.layers[0].keys.shape[2]


class Look(NamedTuple):
    """What happened since the look before.

    tokens: drawn. lengths: of the responses that ended. slot_steps: steps times slots, free ones
    included. prefill_seconds: for prompts, and the copies into their slots. decode_seconds: else.
    """

    tokens: int = 0
    lengths: tuple[int, ...] = ()
    slot_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Slots:
    """S rows that decode together, each with its own length.

    Where a response has ended, the next one begins. No step reads the device: on a GPU the rows
    that have ended are found every few steps, in a copy that is one look old.
    """

    def __init__(
        self, model, count: int, length: int, limit: int, eos: list[int], banned: list[int]
    ):
        """count: S. length: of the longest prompt. limit: T, the most tokens per response."""
        device = model.device
        self.decoder = TextDecoder(model, product_dtype(device, model.dtype))
        self.device, self.limit, self.pace = device, limit, PACES[device.type]
        self.places = length + limit
        first_places = min(self.places, length + (self.pace.growth or limit))
        self.cache = self.decoder.empty_cache(count, first_places)
        self.eos = torch.tensor(eos, dtype=torch.long, device=device)
        self.banned = torch.tensor(banned, dtype=torch.long, device=device)
        self.owners: list = [None] * count
        self.reach = [0] * count  # places written per row at most: known without a look
        self.looks = 0
        self.first_look = [0] * count  # that tells of the row's present owner
        self.seen = None  # the copy of the last look
        self.graphs = StepGraphs(device)

        def table(*shape: int, dtype=torch.long) -> Tensor:
            return torch.zeros(count, *shape, dtype=dtype, device=device)

        self.rows = {
            "state": table(len(self.decoder.norm), dtype=torch.float32),  # predicts the next token
            "place": table(),  # where in the cache the next token is written
            "position": table(),
            "made": table(),  # tokens
            "live": table(dtype=torch.bool),
            # one column more: a row that has ended goes on writing, behind its last token
            "ids": table(limit + 1),
            "logp": table(limit + 1, dtype=torch.float32),
            "noise": table(limit + 1, dtype=torch.float64),
        }

    @torch.no_grad()
    def decode(
        self, batches: Iterator[Prefilled], watch: Callable | None = None, **sampling
    ) -> Iterator[tuple]:
        """(owner, ids, log-probs) of each response, EOS included, as the responses end.

        batches: asked for the next one when a slot is free for it. sampling: temperature, top_p,
        top_k of `draw`. watch(look): called every few steps with a Look. An exception that it
        raises ends the decoding.
        """
        self.sampling = sampling
        source, drawn, ended_tokens = _Source(batches), 0, 0
        began = time.perf_counter()
        self.fill(source)
        while self.busy:
            filled = time.perf_counter()
            with torch.autocast(self.device.type, enabled=False):
                for _ in range(self.pace.steps):
                    self.advance()
            ended, under_way = self.look()
            lengths = tuple(len(ids) for _, ids, _ in ended)
            ended_tokens += sum(lengths)
            if watch:
                tokens, drawn = ended_tokens + under_way - drawn, ended_tokens + under_way
                now = time.perf_counter()
                slot_steps = self.pace.steps * len(self.owners)
                watch(Look(tokens, lengths, slot_steps, filled - began, now - filled))
            yield from ended
            began = time.perf_counter()
            self.fill(source)
            if source.is_empty and self.pace.shrinks:
                self.shrink()

    @property
    def busy(self) -> bool:
        return any(owner is not None for owner in self.owners)

    def fill(self, source: _Source) -> None:
        """Begin the next responses in the free slots."""
        free = [slot for slot, owner in enumerate(self.owners) if owner is None]
        while free and source.has_more():
            batch, rows = source.take(len(free))
            self.begin(batch, rows, free[: len(rows)])
            free = free[len(rows) :]

    def begin(self, batch: Prefilled, rows: list[int], slots: list[int]) -> None:
        """Copy what a batch's rows need into these slots."""
        length = batch.prompt_length
        for slot, row in zip(slots, rows, strict=True):
            self.owners[slot], self.reach[slot] = batch.owners[row], length
            self.first_look[slot] = self.looks + 1
        at = torch.tensor(slots, device=self.device)
        prompt_of = batch.prompt_of[rows].to(self.device)
        for stored, layer in zip(self.cache, batch.layers, strict=True):
            heads = layer.keys.shape[1]
            stored[at, :heads, :length] = layer.keys[prompt_of].to(stored.dtype)
            stored[at, heads:, :length] = layer.values[prompt_of].to(stored.dtype)
        now = self.rows
        now["state"][at] = batch.state[prompt_of].float()
        now["position"][at] = batch.first_position[prompt_of]
        now["place"][at], now["made"][at], now["live"][at] = length, 0, True
        if batch.noise is not None:
            now["noise"][at, : self.limit] = batch.noise[rows].to(self.device)

    def advance(self) -> None:
        """One token in every row."""
        for slot, owner in enumerate(self.owners):
            self.reach[slot] += owner is not None
        window = math.ceil((max(self.reach) + 1) / self.pace.window) * self.pace.window
        window = min(window, self.places)
        if window > self.cache[0].shape[2]:
            shape = list(self.cache[0].shape)
            shape[2] = self.pace.growth
            self.cache = [torch.cat([x, x.new_zeros(shape)], 2) for x in self.cache]
        self.graphs.run(window, lambda: self.step(window))

    def step(self, window: int) -> None:
        """One token in every row, from the first `window` places of the cache.

        TRAP: nothing here may depend on a value on the host, as a CUDA graph repeats it.
        """
        now = self.rows
        logits = self.decoder.logits(now["state"]).index_fill_(-1, self.banned, -math.inf)
        column = now["made"].unsqueeze(1)
        uniform = None
        if self.sampling["temperature"] > 0:
            uniform = now["noise"].gather(1, column).squeeze(1)
        token, logp = draw(logits, uniform, **self.sampling)
        now["ids"].scatter_(1, column, token.unsqueeze(1))
        now["logp"].scatter_(1, column, logp.unsqueeze(1))
        now["made"] += now["live"]
        ends = (token.unsqueeze(1) == self.eos).any(1) | (now["made"] == self.limit)
        now["live"] &= ~ends
        state = self.decoder.step(token, now["position"], now["place"], self.cache, window)
        now["state"].copy_(state)
        # a row that has ended stays where it is, and writes over its last place
        now["place"] += now["live"]
        now["position"] += now["live"]

    def look(self) -> tuple[list[tuple], int]:
        """Free the rows that have ended: (owner, ids, log-probs) each; and tokens under way."""
        self.looks += 1
        seen, self.seen = self.seen, _Flags(self.looks, self.rows["live"], self.rows["made"])
        if not self.pace.late:
            seen = self.seen
        if seen is None:
            return [], 0
        number, live, made = seen.read()
        owned = [
            slot
            for slot, owner in enumerate(self.owners)
            if owner is not None and self.first_look[slot] <= number
        ]
        ended = [slot for slot in owned if not live[slot]]
        under_way = sum(made[slot] for slot in owned if live[slot])
        return self.release(ended, made) if ended else [], under_way

    def release(self, ended: list[int], made: list[int]) -> list[tuple]:
        """Read the responses of these slots and free them."""
        at = torch.tensor(ended, device=self.device)
        longest = max(made[slot] for slot in ended)
        ids, logp = (self.rows[name][at, :longest].tolist() for name in ("ids", "logp"))
        results = []
        for row, slot in enumerate(ended):
            count = made[slot]
            results.append((self.owners[slot], ids[row][:count], logp[row][:count]))
            self.owners[slot], self.reach[slot] = None, 0
        return results

    def shrink(self) -> None:
        """Leave out the free rows once they are a quarter: a CPU pays for each row."""
        busy = [slot for slot, owner in enumerate(self.owners) if owner is not None]
        if not busy or len(busy) > 0.75 * len(self.owners):
            return
        at = torch.tensor(busy, device=self.device)
        self.cache = [stored[at] for stored in self.cache]
        self.rows = {name: table[at] for name, table in self.rows.items()}
        for name in ("owners", "reach", "first_look"):
            setattr(self, name, [getattr(self, name)[slot] for slot in busy])


class _Source:
    """Batches of prefilled prompts, row by row."""

    def __init__(self, batches: Iterator[Prefilled]):
        self.batches, self.batch, self.rows, self.is_empty = batches, None, [], False

    def has_more(self) -> bool:
        """Is there another row? A new batch runs its prompts here."""
        if not self.rows and not self.is_empty:
            self.batch = None  # its keys and values are free before the next ones are made
            self.batch = next(self.batches, None)
            self.is_empty = self.batch is None
            self.rows = [] if self.is_empty else list(range(len(self.batch.owners)))
        return bool(self.rows)

    def take(self, count: int) -> tuple[Prefilled, list[int]]:
        """The batch, and the next `count` of its rows or fewer."""
        taken, self.rows = self.rows[:count], self.rows[count:]
        return self.batch, taken


class _Flags:
    """A copy of `live` and `made` on its way to the host, of look number `number`."""

    def __init__(self, number: int, live: Tensor, made: Tensor):
        self.number, self.event = number, None
        packed = torch.where(live, made, -made)
        if live.device.type == "cuda":
            self.packed = torch.empty_like(packed, device="cpu", pin_memory=True)
            self.packed.copy_(packed, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.packed = packed

    def read(self) -> tuple[int, list[bool], list[int]]:
        """number, live, made, once the copy is there."""
        if self.event is not None:
            self.event.synchronize()
        values = self.packed.tolist()
        return self.number, [value > 0 for value in values], [abs(value) for value in values]


class StepGraphs:
    """CUDA graphs of a step, one per window. Without a GPU the step just runs.

    The first steps of a window run as they are, on a side stream, as the libraries set themselves
    up there. All graphs share one pool of memory, which is free again when this object is gone.
    """

    WARM_UP = 3

    def __init__(self, device: torch.device):
        self.enabled = device.type == "cuda"
        self.runs: dict[int, int] = {}
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if self.enabled:
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def run(self, window: int, step: Callable[[], None]) -> None:
        """One step: replayed where there is a graph for the window, else run, or captured."""
        if not self.enabled:
            return step()
        if window not in self.graphs:
            self.runs[window] = self.runs.get(window, 0) + 1
            if self.runs[window] <= self.WARM_UP:
                return self.run_aside(step)
            if not self.capture(window, step):
                return step()
        self.graphs[window].replay()

    def run_aside(self, step: Callable[[], None]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            step()
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, window: int, step: Callable[[], None]) -> bool:
        """Record a step, which does not run it. Where that fails, all steps just run, slower."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.enabled = False
            reason = str(error).partition("\n")[0]
            print(f"no CUDA graph, sampling is slower: {reason}", file=sys.stderr)
            return False
        self.graphs[window] = graph
        return True
