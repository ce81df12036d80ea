"""Everything that can be checked before a model is loaded."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from PIL import Image
from transformers import AutoConfig

from hints import Hint, screen_hints, teacher_messages
from plumbing.answers import load_verifier
from plumbing.data import QuestionStream, load_questions
from plumbing.hint_file import join_hints
from plumbing.images import ImageTextProcessor, load_processor
from rollout import Question, student_messages
from toy import world

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train import TrainConfig


def read_inputs(
    config: TrainConfig, world_size: int
) -> tuple[QuestionStream, list[Question], str, Path, ImageTextProcessor]:
    """Check everything that can be checked before a model is loaded: -> questions, held-out samples, a note, the run folder, the processor.

    A hint that holds a spoiler or is too long is dropped and counted in the note; its sample is kept and never tutored. Raises ValueError.
    """
    if config.questions % world_size:
        raise ValueError(
            f"--questions {config.questions} must be a multiple of the {world_size} processes"
        )
    if config.hints and not config.data:
        raise ValueError("--hints needs --data: the puzzles bring their own")
    if config.fog and config.data:
        raise ValueError("--fog is for the built-in puzzles: it cannot stand beside --data")
    load_verifier(config.verifier)
    local = Path(config.model)
    if not local.exists() and (
        local.is_absolute() or config.model.startswith(".") or config.model.count("/") != 1
    ):
        raise ValueError(
            f"--model {config.model}: no such folder, and not a hub name like Qwen/Qwen2-VL-2B-Instruct"
        )
    try:
        model_type = AutoConfig.from_pretrained(config.model).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {config.model}: cannot read its config.json: {str(error).splitlines()[0]}"
        ) from None
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"--model {config.model}: is a {model_type} model; supported: {', '.join(MODEL_TYPES)}"
        )
    if config.report and world_size > 1:
        raise ValueError(
            f"--report runs in one process: afterwards, python train.py --report runs/{config.name or 'NAME'}"
        )
    run = (
        Path(config.resume)
        if config.resume
        else Path("runs") / (config.name or datetime.now().strftime("%Y%m%d-%H%M%S"))
    )
    if run.exists() and not config.resume:
        raise ValueError(f"{run} exists already; choose another --name or remove it")
    processor, bad = load_processor(config.model, config.min_pixels, config.max_pixels), []

    def load(source, split):
        found = load_questions(
            source,
            Hint.from_json,
            split=split,
            image_dir=config.image_dir,
            bad=bad if config.skip_bad else None,
        )
        fits = [prompt_tokens(processor, s) <= config.max_prompt for s in found]
        if not any(fits):
            raise ValueError(
                f"{source}: every prompt is longer than --max-prompt {config.max_prompt} tokens"
            )
        return [s for s, fine in zip(found, fits) if fine], fits.count(False)

    held_out, long = (
        load(config.eval_data, config.eval_split)
        if config.eval_data
        else (world.puzzles("heldout", config.eval_questions, fog=config.fog), 0)
    )
    if config.eval_data and (
        leaky := sum(
            map(len, screen_hints(held_out, processor.tokenizer, config.max_hint_tokens).values())
        )
    ):
        bad.append(f"{leaky} unusable hints of held-out questions")
    samples, note = None, "questions: built-in puzzles, all with a hint"
    if config.data:
        samples, more = load(config.data, config.split)
        long += more
        strangers = join_hints(samples, config.hints) if config.hints else 0
        dropped = screen_hints(samples, processor.tokenizer, config.max_hint_tokens)
        note = f"questions: {len(samples)} from {config.data}; {sum(s.hint is not None for s in samples)} with a hint"
        note += "".join(
            f", {len(ids)} hints dropped ({reason}; first: {ids[0]})"
            for reason, ids in dropped.items()
            if ids
        )
        note += (
            f"; {strangers} lines of {config.hints} belong to no question here" if strangers else ""
        )
        teachable = sum(teacher_messages(s, config.teacher_context) is not None for s in samples)
        note += (
            f"; {len(samples) - teachable} are never tutored, for want of a {config.teacher_context}"
            if teachable < len(samples)
            else ""
        )
    if samples and config.train_vision and world_size > 1 and not all(s.images for s in samples):
        raise ValueError(
            "--train-vision in several processes needs an image in every question: a micro-batch without one leaves the tower's weights out"
        )
    note += (
        f"\nleft out: {long} questions with a prompt above {config.max_prompt} tokens"
        if long
        else ""
    )
    note += "".join(f"\nleft out: {message}" for message in bad)
    return (
        QuestionStream(samples, config.seed, config.fog),
        held_out[: config.eval_questions],
        note,
        run,
        processor,
    )


def prompt_tokens(processor, sample: Question) -> int:
    """Length of the sample's plain prompt in tokens, from the images' sizes: nothing is decoded."""
    text = processor.apply_chat_template(
        student_messages(sample), tokenize=False, add_generation_prompt=True
    )
    images = processor.image_processor
    sizes = [Image.open(i).size if isinstance(i, (str, Path)) else i.size for i in sample.images]
    patches = [images.get_number_of_image_patches(height, width) for width, height in sizes]
    return len(processor.tokenizer(text)["input_ids"]) + sum(
        n // images.merge_size**2 - 1 for n in patches
    )
