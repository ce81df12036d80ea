"""The command that builds hints. It can be stopped at any moment and goes on where it stopped.

An expert behind an OpenAI-compatible server, a local model as the expert, or no expert at all
(where the model itself looked when it was right); without --data the questions are built-in
puzzles:

    python -m plumbing.build_hints --data D.jsonl --out hints.jsonl --model NAME --api-base URL
    python -m plumbing.build_hints --data D.jsonl --out hints.jsonl --model NAME_OR_PATH
    python -m plumbing.build_hints --data D.jsonl --out hints.jsonl --model PATH --source attention

With --fallback-model a second expert is asked where the first one gives no hint that passes. Each
line of the output is one question: its hint and who wrote it, or null, and the reasons against the
replies that were rejected. With --source attention the line also holds the model's own right
response, and the layers that were read stand in a file beside the output.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from hints import NoReply, build_hint
from plumbing.attention import check_layers
from plumbing.data import Columns, load_questions
from plumbing.experts import late_expert, load_expert, local_expert, one_line_errors, server_expert
from plumbing.hint_file import load_hints, open_results, write_hints
from plumbing.images import load_processor, open_image, quiet_loading
from plumbing.inputs import check_prompt, special_tokens
from plumbing.own_hints import OwnHints, OwnResponses, layers_for
from plumbing.places import place_words
from plumbing.settings import Parser, is_embedded
from rollout import Question
from toy import own_hints, world
from toy.settings import SETTINGS

PUZZLES = 100  # built-in puzzles without --data and without --limit
# the longest reply of an expert and the longest own response, both the paper's
REPLY_TOKENS, RESPONSE_TOKENS = 16384, 4096
DAY = 86400  # seconds; a system's timer may refuse far longer waits


# ---------------------------------------------------------------------------------- the options
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line as it was given. check_args says what is wrong with its values."""
    parser = Parser(
        prog="build_hints",
        usage="python -m plumbing.build_hints --out FILE --model NAME [options]",
        description="Build hints, one JSON line per question; resumable.",
    )
    _add_questions_and_model(parser)
    _add_fallback(parser)
    _add_limits(parser)
    return parser.parse_args(argv)


def _add_questions_and_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", default="", help="questions, as train.py takes them (default: built-in puzzles)")
    add("--split", default="train", help="split of a dataset in --data [train]")
    add(
        "--image-dir",
        default="",
        help="folder that image paths are relative to and must be in [the .jsonl's]",
    )
    add("--columns", default="", help="FIELD=COLUMN,... as in train.py [the usual names]")
    add("--skip-bad", action="store_true", help="leave out and list lines that cannot be read")
    add("--out", required=True, help="the hints file; what it holds already is not asked for again")
    add(
        "--model",
        required=True,
        help="the expert, by its name at the server, hub name or path; "
        "with --source attention the model to be trained",
    )
    add(
        "--api-base",
        default="",
        help="an OpenAI-compatible server, such as http://localhost:8000/v1; "
        "its key is read from OPENAI_API_KEY",
    )
    add(
        "--source",
        choices=("expert", "attention"),
        default="expert",
        help="expert: a model that is shown the answer writes the hint; "
        "attention: no expert, the regions that the model itself looked at in a right response",
    )


def _add_fallback(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--fallback-model",
        default="",
        help="a second expert, asked where the first one gives no hint that passes within --tries, "
        "or where its reply is cut off",
    )
    add(
        "--fallback-api-base",
        default="",
        help="the second expert's server; its key is read from FALLBACK_API_KEY "
        "[a local model, loaded when it is first needed]",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tries",
        type=int,
        default=3,
        help="replies per expert until one passes; with --source attention, attempts at the steps "
        "[3]",
    )
    add("--parallel", type=int, default=8, help="questions at a time, with --api-base [8]")
    add("--timeout", type=float, default=1200, help="seconds to wait for a reply [1200]")
    add(
        "--max-new-tokens",
        type=int,
        help=f"longest reply in tokens, thinking included [{REPLY_TOKENS}, the paper's; with "
        f"--source attention {RESPONSE_TOKENS}, and {SETTINGS['max_new_tokens']} for toy/base]",
    )
    add("--limit", type=int, help=f"only the first questions [{PUZZLES} puzzles, or all of --data]")
    add(
        "--samples",
        type=int,
        default=32,
        help="own responses per question, with --source attention; a question with a solution in "
        "the data needs none [32]",
    )
    add(
        "--layers",
        default="",
        help="FIRST-LAST, with --source attention [chosen by the model's own right and wrong "
        "responses, and kept beside the output in NAME.layers.json]",
    )
    add("--overlay", default="", help="folder for a picture of each map, with --source attention")


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError where options contradict each other or a value is out of range."""
    attention = args.source == "attention"
    if (attention and args.api_base) or (args.overlay and not attention):
        raise ValueError("--api-base is for --source expert, --overlay for --source attention")
    if attention and args.fallback_model:
        raise ValueError("--fallback-model is for --source expert")
    if args.fallback_api_base and not args.fallback_model:
        raise ValueError("--fallback-api-base needs --fallback-model")
    if args.data and Path(args.out).resolve() == Path(args.data).resolve():
        raise ValueError(
            f"--out {args.out} is the file of --data; hints go into a file of their own"
        )
    numbers = [args.tries, args.parallel, args.samples, args.max_new_tokens, args.limit]
    if min(number for number in numbers if number is not None) <= 0:
        raise ValueError(
            "--tries, --parallel, --samples, --max-new-tokens and --limit must be above 0"
        )
    if not 0 < args.timeout <= DAY:
        raise ValueError(f"--timeout must be above 0 and at most {DAY}, got {args.timeout}")
    parse_layers(args.layers)


def parse_layers(text: str) -> tuple[int, int] | None:
    """The layers of --layers, FIRST-LAST; None for an empty text: they are chosen."""
    if not text:
        return None
    numbers = re.fullmatch(r"(\d+)-(\d+)", text)
    if not numbers:
        raise ValueError(f"--layers must be FIRST-LAST, such as 10-18, got {text!r}")
    return int(numbers[1]), int(numbers[2])


# -------------------------------------------------------------------------- the two ways of work
@dataclass(frozen=True)
class Expert:
    """An expert's name for the record, its `ask` for build_hint, and what a cut-off reply means.

    retry_cut_off: a reply that is cut off costs one try; without it, all of the expert's tries.
    """

    name: str
    ask: Callable[[Question, list[dict]], str]
    retry_cut_off: bool


def choose_experts(args: argparse.Namespace) -> list[Expert]:
    """The expert of --model, and the one of --fallback-model if it is given."""
    longest = args.max_new_tokens or REPLY_TOKENS
    if args.api_base:
        ask = server_expert(args.api_base, args.model, args.timeout, longest)
    else:
        with one_line_errors("--model", args.model):
            ask = local_expert(args.model, longest)
    experts = [Expert(args.model, ask, retry_cut_off=not args.fallback_model)]
    if args.fallback_api_base:
        server = (args.fallback_api_base, args.fallback_model, args.timeout, longest)
        ask = server_expert(*server, key_name="FALLBACK_API_KEY")
        experts.append(Expert(args.fallback_model, ask, retry_cut_off=True))
    elif args.fallback_model:
        ask = late_expert(args.fallback_model, longest)
        experts.append(Expert(args.fallback_model, ask, retry_cut_off=True))
    return experts


def expert_work(args: argparse.Namespace) -> Callable[[Question], dict]:
    """work for write_hints: an expert that is shown the answer writes the hint.

    The second expert is for what the first one cannot do, as in the paper (appendix C): it gets the
    same prompt and as many tries, where the first one used up its tries or its token budget. The
    record's "rejected" holds the reasons against both, in order; "by" is who wrote the hint, or,
    without a hint, who was asked last. An expert that cannot be reached (NoReply) has not failed at
    the question. So the other one is not asked, and the next run starts the question anew.
    """
    experts = choose_experts(args)

    def work(question: Question) -> dict:
        rejected = []
        for expert in experts:
            hint, reasons = build_hint(expert.ask, question, args.tries, expert.retry_cut_off)
            rejected += reasons
            if hint:
                break
        return {"hint": asdict(hint) if hint else None, "rejected": rejected, "by": expert.name}

    return work


def attention_work(args: argparse.Namespace, todo: list[Question]) -> Callable[[Question], dict]:
    """work for write_hints: the hint names where the model looked when it was right.

    todo: the questions that will be asked for, in order. Chooses the layers, if it must.
    """
    with one_line_errors("--model", args.model):
        processor, model = load_expert(args.model)
    longest, name_place, parts = RESPONSE_TOKENS, place_words, None
    if is_embedded(args.model):
        longest = SETTINGS["max_new_tokens"]
        name_place, parts = own_hints.name_place, own_hints.hint_parts
    own = OwnResponses(model, processor, args.samples, args.max_new_tokens or longest)
    chosen = parse_layers(args.layers)
    if chosen:
        layers = tuple(range(chosen[0], chosen[1] + 1))
        check_layers(model, *chosen)
    else:
        layers = layers_for(own, todo, args.model, Path(args.out).with_suffix(".layers.json"))
    source = OwnHints(own, layers, todo, args.tries, name_place, parts)

    def work(question: Question) -> dict:
        record, maps = source.record(question)
        if args.overlay and maps:
            save_overlays(Path(args.overlay), question, maps, record["boxes"])
        return {**record, "by": f"attention of {args.model}"}

    return work


def save_overlays(folder: Path, question: Question, maps: list[Tensor], boxes: list) -> None:
    """Save one picture ID-N.png per image of the question, with its map and its boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    file_name = re.sub(r"[^A-Za-z0-9-]", "_", question.id)
    for number, (image, heat) in enumerate(zip(question.images, maps, strict=True)):
        picture = overlay(open_image(image), heat, boxes[number])
        picture.save(folder / f"{file_name}-{number}.png")


def overlay(image: Image.Image, heat: Tensor, boxes: list[list[int]]) -> Image.Image:
    """Lay the map over the image in red, the hotter the denser, and draw the boxes in blue.

    heat (h, w): one value per cell, at least 0. boxes: (left, top, right, bottom) in pixels of the
    image, right and bottom excluded.
    """
    strength = (160 * (heat / heat.max()).clamp(0, 1)).byte().numpy()
    mask = Image.fromarray(strength, "L").resize(image.size, Image.Resampling.BILINEAR)
    red = Image.new("RGB", image.size, (230, 30, 30))
    picture = Image.composite(red, image.convert("RGB"), mask)
    pen = ImageDraw.Draw(picture)
    for left, top, right, bottom in boxes:
        corners = [left, top, right - 1, bottom - 1]
        pen.rectangle(corners, outline=(20, 60, 255), width=max(2, image.width // 150))
    return picture


# -------------------------------------------------------------------------------------- the run
def results_table(records: dict[str, dict], wanted: int) -> str:
    """The last lines of the command: acceptance per try, hints per expert, reasons of rejection.

    records: as load_hints gives them. wanted: the number of questions asked for. A reply counts
    once per kind of reason, however often it gave that reason. A try counts on from one expert to
    the next.
    """
    tries, authors, reasons = Counter(), Counter(), Counter()
    for record in records.values():
        rejected = record.get("rejected", [])
        if record["hint"]:
            tries[len(rejected) + 1] += 1
            authors[record.get("by", "not named")] += 1
        for reply_reasons in rejected:
            reasons.update({reason.partition(":")[0] for reason in reply_reasons})
    with_hint = sum(tries.values())
    per_try = ", ".join(f"{count} at try {number}" for number, count in sorted(tries.items()))
    lines = [
        f"questions {wanted}, with a hint {with_hint} ({per_try or 'none'}), "
        f"left without {len(records) - with_hint}, "
        f"not answered yet {max(0, wanted - len(records))}"
    ]
    if authors:
        lines += ["", f"{'written by':40s}{'hints':>8s}"]
        lines += [f"{author:40s}{count:8d}" for author, count in authors.most_common()]
    if reasons:
        lines += ["", f"{'rejected because':40s}{'times':>8s}"]
        lines += [f"{kind:40s}{count:8d}" for kind, count in reasons.most_common()]
    return "\n".join(lines)


def read_questions(args: argparse.Namespace) -> list[Question]:
    """The questions of --data, or built-in puzzles; at most --limit of them."""
    if not args.data:
        puzzles = world.puzzles("train", args.limit or PUZZLES)
        # the world's own solutions are no model's: without them it must find a right response
        return [replace(puzzle, solution=None) for puzzle in puzzles]
    columns, bad, check = Columns(args.columns), [] if args.skip_bad else None, None
    if not args.api_base:  # what this model cannot be shown
        with one_line_errors("--model", args.model):
            processor = load_processor(args.model)
        check = partial(check_prompt, processor=processor, special=special_tokens(processor))
    questions = load_questions(
        args.data, split=args.split, image_dir=args.image_dir, columns=columns, check=check, bad=bad
    )
    columns.check_seen()
    for message in bad or ():
        print(f"left out: {message}")
    return questions[: args.limit]


def build(args: argparse.Namespace, questions: list[Question]) -> str:
    """Build the hints that the output lacks -> "", or the reason why the run has failed.

    Raises NoReply, ValueError or OSError where no question can be asked: no expert, or no output. A
    new output is then removed again.
    """
    out = Path(args.out)
    is_new = not out.exists()
    file, done = open_results(out)
    todo = [question for question in questions if question.id not in done]
    print(f"{len(questions)} questions, {len(questions) - len(todo)} of them in {out} already")
    # Threads help where a server does the work; a local model works on one question at a time.
    parallel = args.parallel if args.api_base else 1
    with file:
        if not todo:  # no model is loaded
            return ""
        quiet_loading()
        try:
            attention = args.source == "attention"
            work = attention_work(args, todo) if attention else expert_work(args)
        except (NoReply, ValueError, OSError):
            if is_new:
                out.unlink()
            raise
        return write_hints(todo, work, file, parallel)


def main(argv: list[str] | None = None) -> int:
    """Check the options, read the questions, build the hints, print the table -> exit status.

    0: the run came to its end; 1: it stopped early, or no question got a reply. Exits with 2 where
    options, data, model or output are wrong. In both cases the reason is one line of stderr.
    """
    args = parse_args(argv)
    try:
        check_args(args)
        questions = read_questions(args)
        stopped = build(args, questions)
    except NoReply as error:
        print(f"build_hints: error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        print(f"build_hints: error: {reason}", file=sys.stderr)
        sys.exit(2)
    asked = {question.id for question in questions}
    records = {key: record for key, record in load_hints(args.out).items() if key in asked}
    print(results_table(records, len(questions)))
    if stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
    return 1 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
