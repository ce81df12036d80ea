"""Group sampling: tokens per second and peak memory, ours and two peers.

    python -m pip install -r bench/requirements.txt
    python bench/bench_rollout.py               # embedded model, and the shape of a 0.5B; minutes
    python bench/bench_rollout.py --simulate    # by counting alone: see simulation.py; a minute
    python bench/bench_rollout.py --verifier    # milliseconds of the verifier on answers of 1 MB

The peers are model.generate, on a GPU also compiled with a static cache, and TRL's GRPOTrainer.
Each contender runs twice, in new processes: once for the time and once for the memory. Weights are
random, and a question has one image of 256 tokens (on a GPU 1,024 tokens, in the shape of a 2B), 8
responses of 64 new tokens, and temperature 1. Nothing ends early, so that all contenders make the
same number of tokens. Rows of "ours" without the field "sampler" are of the sampler before the
slots, which decoded in rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import simulation  # noqa: E402
from bench_losses import GPU, high_water, machine  # noqa: E402
from common import RESULTS, append_row, markdown_table, measure_in_child  # noqa: E402

ROWS = RESULTS / "rollout.jsonl"
GROUP, NEW = 8, 64
PATCH = 3 * 2 * 14 * 14  # numbers per patch: colours, frames, height, width


@dataclass
class Shape:
    """side: of the image, in merged patches. text, vision: of the model; None: the embedded one."""

    side: int
    questions: int
    text: dict | None = None
    vision: dict | None = None


SHAPES = {
    "tiny": Shape(side=4, questions=16),
    "0.5B": Shape(
        side=16,
        questions=2,
        text={
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
        vision={"depth": 12, "embed_dim": 768, "num_heads": 12, "hidden_size": 896},
    ),
    "2B": Shape(
        side=32,
        questions=8,
        text={
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
        vision={"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536},
    ),
}


@dataclass
class SpecialTokens:
    """Ids that a model's config names."""

    image: int
    vision_start: int
    vision_end: int
    video: int
    pad: int

    def banned(self) -> list[int]:
        """What no contender may sample. 2 ends the embedded tokenizer's texts: TRL asks it."""
        return [self.image, self.vision_start, self.vision_end, self.video, self.pad, 2]


EMBEDDED = SpecialTokens(image=6, vision_start=3, vision_end=4, video=7, pad=0)
QWEN = SpecialTokens(
    image=151_655, vision_start=151_652, vision_end=151_653, video=151_656, pad=151_643
)


# ------------------------------------------------------------------------------- model and prompts
def config_of(shape: str, special: SpecialTokens):
    """A Qwen2VLConfig of the shape."""
    from transformers import Qwen2VLConfig

    text = SHAPES[shape].text
    sections = [16, 24, 24] if text["hidden_size"] == 1536 else [8, 12, 12]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return Qwen2VLConfig(
        text_config={
            **text,
            "vocab_size": 151_936,
            "rope_parameters": rope,
            "max_position_embeddings": 32_768,
            "bos_token_id": None,
            "pad_token_id": special.pad,
        },
        vision_config=SHAPES[shape].vision,
        tie_word_embeddings=True,
        image_token_id=special.image,
        video_token_id=special.video,
        vision_start_token_id=special.vision_start,
        vision_end_token_id=special.vision_end,
    )


def make_model(shape: str) -> tuple[torch.nn.Module, SpecialTokens]:
    """A model of the shape, and its special tokens."""
    from transformers import AutoModelForImageTextToText, GenerationConfig

    if SHAPES[shape].text is None:
        special = EMBEDDED
        model = AutoModelForImageTextToText.from_pretrained(
            ROOT / "toy" / "base", dtype=torch.float32
        )
    else:
        special = QWEN
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(
            config_of(shape, special), dtype=torch.bfloat16 if GPU else torch.float32
        )
    model.generation_config = GenerationConfig(pad_token_id=special.pad)
    return model.to("cuda" if GPU else "cpu").eval(), special


def make_prompts(
    shape: str, special: SpecialTokens, dtype: torch.dtype, questions: int | None = None
) -> list:
    """Random prompts: <vision_start> image <vision_end> and 40 tokens of text.

    questions: their number, where it is not the shape's.
    """
    from rollout import Prompt, Question

    side = SHAPES[shape].side
    largest_word = 100 if SHAPES[shape].text is None else 100_000
    image = [special.vision_start, *[special.image] * side**2, special.vision_end]
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for n in range(questions or SHAPES[shape].questions):
        words = torch.randint(8, largest_word, (40,), generator=generator)
        ids = torch.cat([torch.tensor(image), words])
        prompts.append(
            Prompt(
                Question(str(n), text="", answer="", images=[]),
                ids=ids,
                types=(ids == special.image).long(),
                pixels=torch.randn(4 * side**2, PATCH, generator=generator).to(dtype),
                grid=torch.tensor([[1, 2 * side, 2 * side]]),
            )
        )
    return prompts


# -------------------------------------------------------------------------------------- contenders
# Each makes run(new): `new` tokens for each of GROUP responses to each prompt, a list of id lists.
def ours(model, prompts: list, special: SpecialTokens, count: int | None = None) -> Callable:
    """What rollout.sample_groups does, with `count` slots; None: one for each response.

    Our sampler does not know the model's tokenizer here, so nothing ends a response but its length.
    run(new, watch, graphs): graphs=False runs the steps as they are on a GPU too.
    """
    from plumbing.decoding import Prefilled, Slots, uniforms
    from rollout import equal_lengths, pad_prompts, prefill

    count = count or len(prompts) * GROUP
    longest = max(len(prompt.ids) for prompt in prompts)
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}

    def prefilled(new: int) -> Iterator[Prefilled]:
        lengths = {n: len(prompt.ids) for n, prompt in enumerate(prompts)}
        for part in equal_lengths(lengths, max(1, count // GROUP)):
            rows = [(n, g) for n in part for g in range(GROUP)]
            inputs = pad_prompts([prompts[n] for n in part], special.pad, model.device)
            each_once = torch.arange(len(part)).to(model.device)
            state, cache, _, first = prefill(model, inputs, each_once)
            prompt_of = each_once.repeat_interleave(GROUP).cpu()
            noise = uniforms([f"{n}-{g}" for n, g in rows], new)
            yield Prefilled(rows, prompt_of, state[:, 0], cache.layers, first[:, 0], noise)

    @torch.no_grad()
    def run(new: int, watch: Callable | None = None, graphs: bool = True) -> list[list[int]]:
        slots = Slots(model, count, longest, new, [], special.banned())
        slots.graphs.enabled &= graphs
        drawn = {row: ids for row, ids, _ in slots.decode(prefilled(new), watch, **settings)}
        return [drawn[n, g] for n in range(len(prompts)) for g in range(GROUP)]

    return run


def generate(model, prompts: list, special: SpecialTokens, cache: str | None = None) -> Callable:
    """transformers' model.generate. cache: its cache_implementation; it compiles a static one."""
    from transformers import GenerationConfig

    from rollout import pad_prompts

    inputs = pad_prompts(prompts, special.pad, model.device)
    prompt_length = inputs["input_ids"].shape[1]

    def run(new: int, **settings) -> list[list[int]]:
        config = GenerationConfig(
            max_new_tokens=new,
            do_sample=True,
            top_k=0,
            num_return_sequences=GROUP,
            pad_token_id=special.pad,
            suppress_tokens=special.banned(),
            cache_implementation=cache,
        )
        sequences = model.generate(**inputs, generation_config=config, **settings)
        return sequences[:, prompt_length:].tolist()

    return run


def generate_compiled(model, prompts: list, special: SpecialTokens) -> Callable:
    """The same with a static cache; on a GPU transformers compiles the decoding step."""
    return generate(model, prompts, special, cache="static")


def trl(model, prompts: list, special: SpecialTokens) -> Callable:
    """The sampling of TRL's GRPOTrainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from plumbing.images import load_processor

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        num_generations=GROUP,
        per_device_train_batch_size=GROUP,
        max_completion_length=NEW,
        report_to=[],
        use_cpu=not GPU,
        bf16=GPU,
        generation_kwargs={"suppress_tokens": special.banned()},
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "x"}]),
        processing_class=load_processor(str(ROOT / "toy" / "base")),
    )
    rows = [prompt for prompt in prompts for _ in range(GROUP)]  # as its sampler repeats them
    fields = {
        "pixel_values": torch.cat([prompt.pixels for prompt in rows]),
        "image_grid_thw": torch.cat([prompt.grid for prompt in rows]),
        "mm_token_type_ids": [prompt.types.tolist() for prompt in rows],
    }
    ids = [prompt.ids.tolist() for prompt in rows]

    def run(new: int) -> list[list[int]]:
        trainer.generation_config.max_new_tokens = new
        trainer.generation_config.eos_token_id = None
        return trainer._generate_single_turn(ids, None, fields, GROUP)[0]

    return run


CONTENDERS = {
    "model.generate(num_return_sequences=8)": generate,
    "model.generate, static cache, compiled": generate_compiled,
    "TRL GRPOTrainer": trl,
    "ours": ours,
}
if not GPU:
    del CONTENDERS["model.generate, static cache, compiled"]  # transformers compiles on a GPU alone


# ------------------------------------------------------------------------------------ measurements
def measure(name: str, shape: str) -> dict:
    """One contender in this process: a short warm-up, then timed rollouts."""
    model, special = make_model(shape)
    prompts = make_prompts(shape, special, model.dtype)
    run = CONTENDERS[name](model, prompts, special)
    run(NEW if GPU else 2)  # with all tokens where something is compiled for their number
    before = high_water(reset=True)
    repeats = 5 if shape == "tiny" else 1  # a tiny rollout takes a second or two: the best of five
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        responses = run(NEW)
        times.append(time.perf_counter() - began)
    lengths = [len(ids) for ids in responses]
    assert lengths == [NEW] * (GROUP * len(prompts)), lengths
    seconds = min(times)
    row = {
        "name": name,
        "shape": shape,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(sum(lengths) / seconds, 1),
        "mib": round(high_water() - before),
    }
    return row | {"sampler": "slots"} if name == "ours" else row


def measure_twice(name: str, shape: str) -> dict:
    """Time and memory of one contender, in two new processes."""
    timed = measure_in_child(__file__, [name, shape])
    # The peak then counts what is freed. The page faults take half as much time again, so the time
    # is the other process's.
    peak = measure_in_child(__file__, [name, shape], MALLOC_MMAP_THRESHOLD_=str(2**20))
    return {**timed, "mib": peak["mib"], "machine": machine("transformers", "trl")}


def table(rows: list[dict], shape: str) -> str:
    """Markdown, one line per contender."""
    setting = (
        f"{shape}: {SHAPES[shape].questions} questions x {GROUP}, image of "
        f"{SHAPES[shape].side ** 2} tokens, {NEW} new tokens. {rows[0]['machine']}."
    )
    best_peer = max(row["tokens_per_second"] for row in rows if row["name"] != "ours")
    cells = []
    for row in rows:
        speed = row["tokens_per_second"]
        cells.append([row["name"], f"{speed:.1f}", f"{speed / best_peer:.2f}", str(row["mib"])])
    header = ["", "tokens/s", "/ better peer", "extra peak, MiB"]
    return f"{setting}\n\n{markdown_table(header, cells)}"


def adversarial_responses(length: int) -> dict[str, str]:
    """Responses of about `length` characters (the last four are short) that are hard to read."""
    return {
        "\\boxed{ repeated": "\\boxed{" * (length // 7),
        "one \\boxed{, open braces": "\\boxed{" + "{" * length,
        "answer: repeated": "answer: " * (length // 8),
        "answer and blanks": "answer" + " " * length,
        "newlines": "\n" * length,
        "<think> repeated": "<think>" * (length // 7),
        "<answer> repeated": "<answer>" * (length // 8),
        "blanks in the box": "\\boxed{5" + " " * length + "}",
        "powers of powers": "\\boxed{((((9^64)^64)^64)^64)}",
        "lists": "\\boxed{" + "1 and " * 60 + "1}",
        "units": "\\boxed{" + "5 cm " * 75 + "}",
        "parentheses": "\\boxed{" + "(" * 190 + "1" + ")" * 190 + "}",
    }


def verifier_table() -> str:
    """Milliseconds of rollout.verify: the slowest of four reference answers."""
    from rollout import Question, verify

    questions = [Question("0", "", answer, images=[]) for answer in ("5", "(1, 2)", "B", "red")]
    cells = []
    for name, response in adversarial_responses(10**6).items():
        times = []
        for question in questions:
            began = time.perf_counter()
            verify(response, question)
            times.append(time.perf_counter() - began)
        cells.append([name, f"{1000 * max(times):.2f}"])
    return markdown_table(["response", "ms"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verifier", action="store_true", help="time the verifier instead")
    parser.add_argument("--simulate", action="store_true", help="count a rollout instead")
    parser.add_argument("--lengths", metavar="FILE", help="measured lengths, for --simulate")
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=["tiny", "2B" if GPU else "0.5B"]
    )
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.verifier:
        return print(verifier_table())
    if args.simulate:
        return print(simulation.report(args.lengths))
    if args.run:
        return print(json.dumps(measure(*args.run)))
    for shape in args.shapes:
        rows = []
        for name in CONTENDERS:
            rows.append(measure_twice(name, shape))
            append_row(ROWS, rows[-1])
        print(f"\n{table(rows, shape)}", flush=True)


if __name__ == "__main__":
    main()
