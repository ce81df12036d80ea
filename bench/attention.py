# ruff: noqa: E402
"""Where the model looks, and hints from it, on the embedded world, where the truth is known.

    python bench/attention.py                              # 400 held-out puzzles, minutes
    python bench/attention.py --questions 60               # fewer
    python bench/attention.py --figure docs/attention.png  # draw two maps per family, and stop
    python bench/attention.py --write-hints                # for an arm of claims.py, and stop

Two tables. *Maps*: how much of a map lies on the row or column that the question is about, and how
often that line is the hottest of its kind, per layer and source. Chance is 1/4; for "cross" the
share is 7/16 and both lines are the hottest in 1 of 16. *Hints*: how many questions get one from
their own responses, and how many of these name the right place and no other, at 4 to 64 samples.

The sources of a map: "answer" is what we did before (the mean look of the answer's tokens, relative
to a neutral question), "solution" the world's own text, "own" the model's first right response
(plumbing.attention), "own, mean" the same with the mean look in place of the strongest, "own x
gradient" attention times its gradient of the response's log-probability. The last three are of the
same questions: those that have a right response. "several" are
the layers chosen without labels, of "answer" the middle half. The rows in
bench/results/attention.jsonl are those of the last run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from arms import FIXED_PUZZLES, OWN_HINTS
from bench_losses import machine
from common import RESULTS, append_row, markdown_table

from hints import Hint, attention_hint
from plumbing.attention import choose_layers, layer_count, layer_maps, maps_of_images
from plumbing.build_hints import overlay
from plumbing.experts import load_expert
from plumbing.images import quiet_loading
from plumbing.own_hints import (
    LAYER_QUESTIONS,
    TOGETHER,
    Drawn,
    OwnHints,
    OwnResponses,
    scores_of_layers,
)
from plumbing.settings import EMBEDDED
from rollout import Prompt, Question, encode_prompts, student_messages
from toy import own_hints, world
from toy.settings import SETTINGS

ROWS = RESULTS / "attention.jsonl"
SAMPLES = (4, 8, 16, 32, 64)
SOURCES = ("answer", "solution", "own", "own, mean", "own x gradient")
FAMILIES = world.FAMILIES
CELLS = (world.GRID, world.GRID)
SIDE, GAP = 336, 14  # pixels of the figure


# ---------------------------------------------------------------------------------- the sources
def tokens_of(own: OwnResponses, text: str) -> list[int]:
    return own.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def mean_look(looks: Tensor) -> Tensor:
    return looks.mean(0)


def answer_maps(own: OwnResponses, prompt: Prompt) -> Tensor:
    """The source of before: (layers, image tokens)."""
    tokenizer = own.processor.tokenizer
    question = prompt.question
    neutral = replace(question, text="Describe the image.")
    [ground] = encode_prompts(own.processor, [neutral], [student_messages(neutral)])
    # the answer's tokens look; EOS is there to be predicted by the last of them
    tokens = [*tokens_of(own, question.answer), tokenizer.eos_token_id]
    count = len(tokens) - 1
    asked, unasked = (
        layer_maps(
            own.model,
            one,
            tokens,
            tokenizer.pad_token_id,
            reduce=lambda looks: mean_look(looks[-count:]),
        )
        for one in (prompt, ground)
    )
    return asked / unasked.clamp(min=1e-9)


def gradient_maps(own: OwnResponses, prompt: Prompt, tokens: list[int]) -> Tensor:
    """Attention times its gradient where positive, the mean look: (layers, image tokens)."""
    model, response = own.model, torch.tensor(tokens)
    model.set_attn_implementation({"text_config": "eager"})
    out = model(
        input_ids=torch.cat([prompt.ids, response])[None],
        attention_mask=torch.ones(1, len(prompt.ids) + len(tokens), dtype=torch.long),
        mm_token_type_ids=torch.cat([prompt.types, torch.zeros_like(response)])[None],
        pixel_values=prompt.pixels,
        image_grid_thw=prompt.grid,
        output_attentions=True,
        use_cache=False,
    )
    model.set_attn_implementation({"text_config": "sdpa"})
    image = prompt.types.nonzero()[:, 0]
    rows = slice(len(prompt.ids) - 1, -1)  # they predict the response
    logp = out.logits[0, rows].log_softmax(-1)[range(len(tokens)), tokens].sum()
    slopes = torch.autograd.grad(logp, out.attentions)
    weighted = [
        (weights * slope).clamp(min=0)[0, :, rows].sum(0)[:, image].detach()
        for weights, slope in zip(out.attentions, slopes, strict=True)
    ]
    return torch.stack([mean_look(looks) for looks in weighted])


def maps_of(own: OwnResponses, prompt: Prompt) -> dict[str, Tensor]:
    """The maps (layers, image tokens) of a question by source."""
    pad = own.processor.tokenizer.pad_token_id
    ids = tokens_of(own, prompt.question.solution)
    solution = own.reasonings([Drawn(ids, prompt.question.solution, True)])
    maps = {"answer": answer_maps(own, prompt), "solution": own.maps(prompt, solution)[0]}
    right = [one for one in own.drawn[prompt.question.id] if one.correct]
    for tokens in own.reasonings(right)[:1]:
        maps["own"] = own.maps(prompt, [tokens])[0]
        maps["own, mean"] = layer_maps(own.model, prompt, list(tokens), pad, reduce=mean_look)
        maps["own x gradient"] = gradient_maps(own, prompt, list(tokens))
    return maps


# ------------------------------------------------------------------------------ how right they are
def on_lines(heat: Tensor, puzzle: world.Puzzle) -> tuple[float, bool]:
    """The share of a map (image tokens,) on the question's lines, and whether they are hottest."""
    heat = heat.view(CELLS)
    inside, hottest = torch.zeros(CELLS, dtype=torch.bool), []
    for kind, index in puzzle.lines:
        dimension = 1 if kind == "row" else 0
        hottest.append(int(heat.sum(dimension).argmax()) == index)
        inside.select(1 - dimension, index).fill_(True)
    return (heat[inside].sum() / heat.sum()).item(), all(hottest)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error; 0 for a single value."""
    values = torch.tensor(values, dtype=torch.float64)
    error = values.std(correction=0) / max(1, len(values) - 1) ** 0.5
    return values.mean().item(), error.item()


def map_rows(measured: dict[tuple, list[tuple[float, bool]]]) -> list[dict]:
    """One row per source, family and layer. measured: what on_lines gave, by these three."""
    rows = []
    for (source, family, layer), pairs in measured.items():
        shares, hottest = zip(*pairs, strict=True)
        share, share_error = mean_and_error(shares)
        accuracy, accuracy_error = mean_and_error(hottest)
        row = {"kind": "map", "source": source, "family": family, "layer": layer}
        row |= {"questions": len(pairs), "share": share, "share_error": share_error}
        rows.append({**row, "hottest": accuracy, "hottest_error": accuracy_error})
    return rows


def hint_rows(graded: dict[tuple, list[tuple[bool, bool]]]) -> list[dict]:
    """One row per source, family and number of samples.

    graded: by these three, for each question whether it has a hint, and whether the hint names the
    right place and no other.
    """
    rows = []
    for (source, family, samples), pairs in graded.items():
        right = [is_right for has_hint, is_right in pairs if has_hint]
        row = {"kind": "hint", "source": source, "family": family, "samples": samples}
        row |= {"questions": len(pairs), "hints": len(right)}
        if right:
            row["right_place"], row["right_place_error"] = mean_and_error(right)
        rows.append(row)
    return rows


def grade(hint: Hint | dict | None, question: Question) -> tuple[bool, bool]:
    """Is there a hint, and does it name the question's lines and no other place?"""
    if hint is None:
        return False, False
    look = hint["look"] if isinstance(hint, dict) else hint.look
    lines = [(kind, index) for kind in ("row", "column") for index in range(world.GRID)]
    read = {name for name in map(world.line_name, lines) if name in question.solution}
    return True, set(look) == read


# ----------------------------------------------------------------------------------- the measuring
def make_source(own: OwnResponses, layers: tuple[int, ...], questions: list) -> OwnHints:
    """Hints in the embedded world's words."""
    words = {"name_place": own_hints.name_place, "parts": own_hints.hint_parts}
    return OwnHints(own, layers, questions, **words)


class Measured:
    """What is measured of the questions so far. layers: those that were chosen without labels."""

    def __init__(self, own: OwnResponses, layers: tuple[int, ...]):
        self.own, self.layers = own, list(layers)
        count = layer_count(own.model)
        # the layers of the old source
        self.middle = list(range(count // 4, (3 * count - 1) // 4 + 1))
        self.source = make_source(own, layers, [])
        self.maps, self.hints = defaultdict(list), defaultdict(list)

    def add(self, puzzle: world.Puzzle, question: Question) -> None:
        """All sources' maps and the hints of one question that has its draws."""
        [prompt] = self.own.prompts([question])
        maps = maps_of(self.own, prompt)
        for source, heat in maps.items():
            several = self.middle if source == "answer" else self.layers
            layers = {str(layer): heat[layer] for layer in range(len(heat))}
            layers["several"] = heat[several].mean(0)
            for layer, one in layers.items():
                self.maps[source, puzzle.family, layer].append(on_lines(one, puzzle))
        self.add_hints(puzzle.family, prompt, maps["answer"][self.middle].mean(0))

    def add_hints(self, family: str, prompt: Prompt, answer_map: Tensor) -> None:
        question = prompt.question
        # the old map has another unit: with this scale the test of its contrast never fails
        heat = 100 * answer_map / answer_map.std()
        images = maps_of_images(heat, prompt.grid, self.own.processor.image_processor.merge_size)
        hint, _, _ = attention_hint(question, images, own_hints.name_place)
        self.hints["answer", family, 0].append(grade(hint, question))
        drawn = self.own.drawn[question.id]
        for samples in SAMPLES:
            self.own.drawn[question.id] = drawn[:samples]
            record, _ = self.source.record(replace(question, solution=None))
            self.hints["own", family, samples].append(grade(record["hint"], question))


def load_own() -> OwnResponses:
    processor, model = load_expert(EMBEDDED)
    return OwnResponses(model, processor, max(SAMPLES), SETTINGS["max_new_tokens"])


def tune_scores(own):
    """What the layers are chosen by: their scores on the split "tune"."""
    return scores_of_layers(own, world.puzzles("tune", LAYER_QUESTIONS))


def measure(questions: int) -> list[dict]:
    """Draw, look, write hints and compare; the rows replace those in the results file."""
    began, own = time.time(), load_own()
    scores = tune_scores(own)
    layers = choose_layers(scores)
    measured = Measured(own, layers)
    for start in range(0, questions, TOGETHER):
        indices = range(start, min(start + TOGETHER, questions))
        puzzles = [world.make_puzzle("heldout", index) for index in indices]
        asked = [world.to_question(puzzle) for puzzle in puzzles]
        own.draw(asked)
        for puzzle, question in zip(puzzles, asked, strict=True):
            measured.add(puzzle, question)
    setting = {"kind": "setting", "machine": machine("transformers"), "questions": questions}
    setting |= {"minutes": round((time.time() - began) / 60, 1), "layers": layers}
    setting |= {"layer_questions": len(scores), "layer_scores": scores.mean(0).tolist()}
    rows = [setting, *map_rows(measured.maps), *hint_rows(measured.hints)]
    ROWS.unlink(missing_ok=True)
    for row in rows:
        append_row(ROWS, row)
    return rows


def write_hints() -> None:
    """The model's own hints of the puzzles of bench/arms.py's arm, at the most samples."""
    own = load_own()
    layers = choose_layers(tune_scores(own))
    # the world's solutions are no model's: without them it must find a right response
    questions = [replace(q, solution=None) for q in world.puzzles("train", FIXED_PUZZLES)]
    source = make_source(own, layers, questions)
    rows = [{"id": q.id, "hint": source.record(q)[0]["hint"]} for q in questions]
    OWN_HINTS.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(f"{sum(row['hint'] is not None for row in rows)} hints for {len(rows)} puzzles")


# ------------------------------------------------------------------------------------ the output
def percent(row: dict, name: str) -> str:
    if name not in row:  # among few questions a family may have none
        return "-"
    return f"{100 * row[name]:.1f} ± {100 * row[name + '_error']:.1f}"


def share_of_questions(row: dict) -> str:
    return f"{100 * row['hints'] / row['questions']:.1f}" if row else "-"


def tables(rows: list[dict]) -> str:
    """The rows in Markdown: the setting, the layers, the maps, the hints."""
    [setting] = [row for row in rows if row["kind"] == "setting"]
    scores = ", ".join(f"{score:.2f}" for score in setting["layer_scores"])
    lines = [
        f"Machine: {setting['machine']}; {setting['questions']} held-out puzzles, "
        f"{setting['minutes']} minutes. In % with one standard error.",
        f"Layers chosen without labels: {', '.join(map(str, setting['layers']))}; scores of layers "
        f"0, 1, ...: {scores}, from {setting['layer_questions']} questions of {LAYER_QUESTIONS}.",
    ]
    maps = {(r["source"], r["layer"], r["family"]): r for r in rows if r["kind"] == "map"}
    layers = sorted({layer for _, layer, _ in maps})
    cells = []
    for source in SOURCES:
        for layer in layers:
            of_families = [maps.get((source, layer, family), {}) for family in FAMILIES]
            shares = [percent(row, "share") for row in of_families]
            cells.append([source, layer, *shares, *(percent(r, "hottest") for r in of_families)])
    shares = [f"share: {family}" for family in FAMILIES]
    hottest = [f"hottest: {family}" for family in FAMILIES]
    lines.append(markdown_table(["map from", "layer", *shares, *hottest], cells))
    hints = {(r["source"], r["samples"], r["family"]): r for r in rows if r["kind"] == "hint"}
    cells = []
    for source, samples in sorted({(source, samples) for source, samples, _ in hints}):
        of_families = [hints.get((source, samples, family), {}) for family in FAMILIES]
        has = [share_of_questions(row) for row in of_families]
        right = [percent(row, "right_place") for row in of_families]
        cells.append([source, str(samples or "-"), *has, *right])
    has = [f"with a hint: {family}" for family in FAMILIES]
    right = [f"right place: {family}" for family in FAMILIES]
    lines.append(markdown_table(["hint from", "samples", *has, *right], cells))
    return "\n\n".join(lines)


def draw(path: Path) -> None:
    """Two pictures per family, of one of its puzzles: the old map, the new one with its boxes."""
    own = load_own()
    layers = choose_layers(tune_scores(own))
    measured = Measured(own, layers)
    sheet = Image.new("RGB", (len(FAMILIES) * (SIDE + GAP) + GAP, 2 * (SIDE + 3 * GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, family in enumerate(FAMILIES):
        question, record, maps = first_success(measured, family)
        [prompt] = own.prompts([question])
        picture = question.images[0].resize((SIDE, SIDE))
        answer = answer_maps(own, prompt)[measured.middle].mean(0).view(CELLS)
        scale = SIDE // question.images[0].width
        boxes = [[scale * side for side in box] for box in record["boxes"][0]]
        said = f"reasoning: {', '.join(record['hint']['look'])}"
        left = GAP + column * (SIDE + GAP)
        asked = question.text.removeprefix("How many points are in ")
        rows = [(f"answer: {asked}", answer, []), (said, maps[0], boxes)]
        for row, (title, heat, drawn_boxes) in enumerate(rows):
            top = row * (SIDE + 3 * GAP)
            pen.text((left, top + GAP // 2), title, "black", font)
            sheet.paste(overlay(picture, heat, drawn_boxes), (left, top + 2 * GAP))
    sheet.quantize(256).save(path, optimize=True)


def first_success(measured: Measured, family: str) -> tuple[Question, dict, list[Tensor]]:
    """The first puzzle of a family whose hint names the right place; its record and maps."""
    for question in world.puzzles("heldout", 400):
        if question.family == family:
            measured.own.draw([question])
            record, maps = measured.source.record(replace(question, solution=None))
            if grade(record["hint"], question)[1]:
                return question, record, maps
    raise ValueError(f"no hint names the right place of a {family} question")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=400, help="held-out puzzles [400]")
    parser.add_argument("--figure", type=Path, help="draw the maps into this PNG and stop")
    parser.add_argument(
        "--write-hints", action="store_true", help="write the hints of bench/arms.py and stop"
    )
    args = parser.parse_args()
    quiet_loading()
    torch.set_flush_denormal(True)  # denormal floats make a CPU's matrix products slower by far
    if args.figure:
        return draw(args.figure)
    if args.write_hints:
        return write_hints()
    print(tables(measure(args.questions)))


if __name__ == "__main__":
    main()
