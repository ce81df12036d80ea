"""The command that builds hints."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from hints import attention_hint, build_hint
from plumbing.data import load_questions
from plumbing.experts import _load, local_expert, server_expert
from plumbing.hint_file import load_hints, open_results, write_hints
from plumbing.images import open_image, quiet_loading
from rollout import Question


def results_table(records: dict[str, dict], wanted: int) -> str:
    """What the command ends with: acceptance by try, and the reasons of all rejected replies."""
    rows = records.values()
    tries = Counter(len(r.get("rejected", [])) + 1 for r in rows if r["hint"])
    reasons = Counter(
        kind
        for r in rows
        for reply in r.get("rejected", [])
        for kind in {reason.partition(":")[0] for reason in reply}
    )
    lines = [
        f"questions {wanted}, with a hint {sum(tries.values())} ({', '.join(f'{n} at try {t}' for t, n in sorted(tries.items())) or 'none'}), "
        f"left without {len(records) - sum(tries.values())}, not answered yet {max(0, wanted - len(records))}"
    ]
    if reasons:
        lines += [
            "",
            f"{'replies rejected because':40s}{'replies':>8s}",
            *(f"{kind:40s}{n:8d}" for kind, n in reasons.most_common()),
        ]
    return "\n".join(lines)


def overlay(image: Image.Image, heat: Tensor, boxes: list[list[int]]) -> Image.Image:
    """The image with the map (h, w) laid over it in red, hotter is denser, and the boxes (left, top, right, bottom) drawn."""
    strength = (160 * (heat / heat.max()).clamp(0, 1)).byte().numpy()
    mask = Image.fromarray(strength, "L").resize(image.size, Image.Resampling.BILINEAR)
    out = Image.composite(Image.new("RGB", image.size, (230, 30, 30)), image.convert("RGB"), mask)
    for box in boxes:
        ImageDraw.Draw(out).rectangle(
            [box[0], box[1], box[2] - 1, box[3] - 1],
            outline=(20, 60, 255),
            width=max(2, image.width // 150),
        )
    return out


def main(argv=None) -> int:
    """The command: check, load, build, report."""
    parser = argparse.ArgumentParser(
        usage="python -m plumbing.build_hints --out FILE --model NAME [options]",
        description="Build hints, one JSON line a question; resumable.",
    )
    parser.add_argument(
        "--data", default="", help="questions, as train.py takes them (default: built-in puzzles)"
    )
    parser.add_argument("--split", default="train", help="split of a dataset in --data [train]")
    parser.add_argument(
        "--image-dir",
        default="",
        help="folder that image paths are relative to and must be in [the .jsonl's]",
    )
    parser.add_argument(
        "--out", required=True, help="the hints file; what it holds already is not asked for again"
    )
    parser.add_argument(
        "--model",
        required=True,
        help="the expert, by its name at the server, hub name or path; with --source attention the model to be trained",
    )
    parser.add_argument(
        "--api-base",
        default="",
        help="an OpenAI-compatible server, such as http://localhost:8000/v1; its key is read from OPENAI_API_KEY",
    )
    parser.add_argument(
        "--source",
        choices=("expert", "attention"),
        default="expert",
        help="expert: a model that is shown the answer writes the hint; "
        "attention: no expert, the regions the model itself looks at",
    )
    parser.add_argument(
        "--tries", type=int, default=3, help="replies asked for until one passes [3]"
    )
    parser.add_argument(
        "--parallel", type=int, default=8, help="questions at a time, with --api-base [8]"
    )
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds to wait for the server [300]"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=4096, help="longest reply, thinking included [4096]"
    )
    parser.add_argument(
        "--limit", type=int, help="only the first questions [100 puzzles, or all of --data]"
    )
    parser.add_argument(
        "--layers", default="", help="FIRST-LAST, with --source attention [the middle half]"
    )
    parser.add_argument(
        "--overlay", default="", help="folder for a picture of each map, with --source attention"
    )
    args = parser.parse_args(argv)
    attention, out = args.source == "attention", Path(args.out)
    try:
        if attention and args.api_base or args.overlay and not attention:
            raise ValueError("--api-base is for --source expert, --overlay for --source attention")
        if (
            min(
                args.tries,
                args.parallel,
                args.timeout,
                args.max_new_tokens,
                1 if args.limit is None else args.limit,
            )
            <= 0
        ):
            raise ValueError(
                "--tries, --parallel, --timeout, --max-new-tokens and --limit must be above 0"
            )
        layers = re.fullmatch(r"(\d+)-(\d+)|", args.layers)
        if not layers:
            raise ValueError(f"--layers must be FIRST-LAST, such as 10-18, got {args.layers!r}")
        if args.data:
            samples = load_questions(args.data, split=args.split, image_dir=args.image_dir)[
                : args.limit
            ]
        else:
            from toy import world  # it imports this module

            samples = world.puzzles("train", args.limit or 100)
        file, done = open_results(out)
    except (ValueError, OSError) as error:
        parser.exit(2, f"build_hints: error: {error}\n")
    todo = [sample for sample in samples if sample.id not in done]
    print(f"{len(samples)} questions, {len(samples) - len(todo)} of them in {out} already")
    quiet_loading()
    if attention:
        processor, model = _load(args.model)
        layers = tuple(map(int, layers.groups())) if args.layers else None

        def work(sample: Question) -> dict:
            hint, reasons, maps, boxes = attention_hint(model, processor, sample, layers)
            for n, (image, heat, found) in enumerate(
                zip(sample.images, maps, boxes) if args.overlay else ()
            ):
                Path(args.overlay).mkdir(parents=True, exist_ok=True)
                overlay(open_image(image), heat, found).save(
                    Path(args.overlay) / f"{re.sub(r'[^A-Za-z0-9-]', '_', sample.id)}-{n}.png"
                )
            return {
                "hint": hint and asdict(hint),
                "rejected": [reasons] if reasons else [],
                "boxes": boxes,
                "by": f"attention of {args.model}",
            }
    else:
        ask = (
            (
                server_expert(args.api_base, args.model, args.timeout, args.max_new_tokens)
                if args.api_base
                else local_expert(args.model, args.max_new_tokens)
            )
            if todo
            else None
        )

        def work(sample: Question) -> dict:
            hint, rejected = build_hint(ask, sample, args.tries)
            return {"hint": hint and asdict(hint), "rejected": rejected, "by": args.model}

    with file:
        stopped = write_hints(todo, work, file, args.parallel if args.api_base else 1)
    asked = {sample.id for sample in samples}
    print(
        results_table(
            {key: record for key, record in load_hints(out).items() if key in asked}, len(samples)
        )
    )
    if stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
    return 1 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
