"""Group sampling: tokens per second and peak memory, ours against model.generate and TRL's GRPOTrainer, each twice, in processes of its own.

    python -m pip install -r bench/requirements.txt
    python bench/bench_rollout.py               # on a CPU: the embedded model, and the shape of a 0.5B; minutes
    python bench/bench_rollout.py --verifier    # milliseconds of the verifier on answers of 1 MB

Random weights, images of 256 tokens (1,000 on a GPU, 2B shape), 8 responses a question, 64 new tokens each, temperature 1. Nothing ends
early, so that all contenders make the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from bench_losses import GPU, high_water, machine  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "rollout.jsonl"
GROUP, NEW = 8, 64
# shape -> image side in merged patches, questions, text config, vision config
SHAPES = {
    "tiny": (4, 16, None, None),
    "0.5B": (
        16,
        2,
        dict(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
        ),
        dict(depth=12, embed_dim=768, num_heads=12, hidden_size=896),
    ),
    "2B": (
        32,
        8,
        dict(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
        ),
        dict(depth=32, embed_dim=1280, num_heads=16, hidden_size=1536),
    ),
}
IMAGE, VISION_START, VISION_END, VIDEO, PAD = 151_655, 151_652, 151_653, 151_656, 151_643


def config_of(shape: str, special):
    """A Qwen2VLConfig of the shape. special: ids of image, vision start, vision end, video and padding."""
    from transformers import Qwen2VLConfig

    text, vision = SHAPES[shape][2:]
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24] if text["hidden_size"] == 1536 else [8, 12, 12],
    }
    text = dict(
        **text,
        vocab_size=151_936,
        rope_parameters=rope,
        max_position_embeddings=32_768,
        bos_token_id=None,
        pad_token_id=special[4],
    )
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=special[0],
        video_token_id=special[3],
        vision_start_token_id=special[1],
        vision_end_token_id=special[2],
    )


def setup(shape: str):
    """Model and prompts: <vision_start> image <vision_end> and 40 tokens of text."""
    from transformers import AutoModelForImageTextToText, GenerationConfig

    from rollout import Prompt

    side, questions, text, _ = SHAPES[shape]
    make = torch.Generator().manual_seed(0)
    if text is None:
        model, vocab, special = (
            AutoModelForImageTextToText.from_pretrained(ROOT / "toy" / "base", dtype=torch.float32),
            100,
            (6, 3, 4, 7, 0),
        )
    else:
        vocab, special = 151_936, (IMAGE, VISION_START, VISION_END, VIDEO, PAD)
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(
            config_of(shape, special), dtype=torch.bfloat16 if GPU else torch.float32
        )
    model.generation_config = GenerationConfig(pad_token_id=special[4])
    model = model.to("cuda" if GPU else "cpu").eval()
    prompts = []
    for _ in range(questions):
        words = torch.randint(8, min(vocab, 100_000), (40,), generator=make)
        ids = torch.cat([torch.tensor([special[1], *[special[0]] * side**2, special[2]]), words])
        pixels = torch.randn(4 * side**2, 1176, generator=make).to(model.dtype)
        prompts.append(
            Prompt(ids, (ids == special[0]).long(), pixels, torch.tensor([[1, 2 * side, 2 * side]]))
        )
    return (
        model,
        prompts,
        [*special, 2],
    )  # 2 is what the embedded tokenizer, which TRL asks, ends with


def ours(model, prompts, special):
    from plumbing.decoding import uniforms
    from rollout import _decode

    rows = [p for p in prompts for _ in range(GROUP)]
    return lambda new: _decode(
        model,
        rows,
        uniforms([str(i) for i in range(len(rows))], new),
        [],
        special,
        special[4],
        new,
        temperature=1.0,
    )[0]


def generate(model, prompts, special):
    from transformers import GenerationConfig

    from rollout import pad_prompts

    inputs = pad_prompts(prompts, special[4], model.device)

    def run(new):
        config = GenerationConfig(
            max_new_tokens=new,
            do_sample=True,
            top_k=0,
            num_return_sequences=GROUP,
            pad_token_id=special[4],
            suppress_tokens=special,
        )
        return model.generate(**inputs, generation_config=config)[
            :, inputs["input_ids"].shape[1] :
        ].tolist()

    return run


def trl(model, prompts, special):
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
        generation_kwargs={"suppress_tokens": special},
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "x"}]),
        processing_class=load_processor(str(ROOT / "toy" / "base")),
    )
    rows = [p for p in prompts for _ in range(GROUP)]  # as its sampler repeats them
    fields = {
        "pixel_values": torch.cat([p.pixels for p in rows]),
        "image_grid_thw": torch.cat([p.grid for p in rows]),
        "mm_token_type_ids": [p.types.tolist() for p in rows],
    }

    def run(new):
        trainer.generation_config.max_new_tokens = new
        trainer.generation_config.eos_token_id = None
        return trainer._generate_single_turn([p.ids.tolist() for p in rows], None, fields, GROUP)[0]

    return run


CONTENDERS = {
    "model.generate(num_return_sequences=8)": generate,
    "TRL GRPOTrainer": trl,
    "ours": ours,
}


def measure(name: str, shape: str) -> dict:
    """One contender in this process: a short warm-up, then timed rollouts."""
    model, prompts, special = setup(shape)
    run = CONTENDERS[name](model, prompts, special)
    run(2)
    before = high_water(reset=True)
    times = []
    for _ in range(
        5 if shape == "tiny" else 1
    ):  # a tiny rollout takes two seconds: the best of five
        start = time.perf_counter()
        out = run(NEW)
        times.append(time.perf_counter() - start)
    seconds = min(times)
    assert len(out) == GROUP * len(prompts) and all(len(ids) == NEW for ids in out), [
        len(ids) for ids in out
    ]
    return {
        "name": name,
        "shape": shape,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(GROUP * len(prompts) * NEW / seconds, 1),
        "mib": round(high_water() - before),
    }


def verifier() -> None:
    """Milliseconds of `verify` on adversarial responses of 1 MB: the slowest gold answer of four."""
    from plumbing.answers import verify

    n = 10**6
    cases = {
        "\\boxed{ repeated": "\\boxed{" * (n // 7),
        "one \\boxed{, open braces": "\\boxed{" + "{" * n,
        "answer: repeated": "answer: " * (n // 8),
        "answer and blanks": "answer" + " " * n,
        "newlines": "\n" * n,
        "<think> repeated": "<think>" * (n // 7),
        "<answer> repeated": "<answer>" * (n // 8),
        "blanks in the box": "\\boxed{5" + " " * n + "}",
        "powers of powers": "\\boxed{((((9^64)^64)^64)^64)}",
        "lists": "\\boxed{" + "1 and " * 60 + "1}",
        "units": "\\boxed{" + "5 cm " * 75 + "}",
        "parentheses": "\\boxed{" + "(" * 190 + "1" + ")" * 190 + "}",
    }
    print("| response | ms |\n|---|---|")
    for name, text in cases.items():
        worst = 0.0
        for gold in ("5", "(1, 2)", "B", "red"):
            start = time.perf_counter()
            verify(text, gold)
            worst = max(worst, time.perf_counter() - start)
        print(f"| {name} | {1000 * worst:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verifier", action="store_true", help="time the verifier instead")
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=["tiny", "2B" if GPU else "0.5B"]
    )
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.verifier:
        return verifier()
    if args.run:
        return print(json.dumps(measure(*args.run)))
    env = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
    exact = {
        "MALLOC_MMAP_THRESHOLD_": str(2**20)
    }  # the peak then counts what is freed; the page faults cost half as much time again
    for shape in args.shapes:
        rows = []
        for name in CONTENDERS:
            timed, peak = (
                json.loads(
                    subprocess.run(
                        [sys.executable, __file__, "--run", name, shape],
                        check=True,
                        stdout=subprocess.PIPE,
                        text=True,
                        env={**env, **more},
                    ).stdout.splitlines()[-1]
                )
                for more in ({}, exact)
            )
            rows.append({**timed, "mib": peak["mib"], "machine": machine("transformers", "trl")})
            RESULTS.parent.mkdir(exist_ok=True)
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        best = max(r["tokens_per_second"] for r in rows if r["name"] != "ours")
        print(
            f"\n{shape}: {SHAPES[shape][1]} questions x {GROUP}, image of {SHAPES[shape][0] ** 2} tokens, {NEW} new tokens. {rows[0]['machine']}.\n\n"
            "| | tokens/s | / better peer | extra peak, MiB |\n|---|---|---|---|"
        )
        for r in rows:
            print(
                f"| {r['name']} | {r['tokens_per_second']:.1f} | {r['tokens_per_second'] / best:.2f} | {r['mib']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
