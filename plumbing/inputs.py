"""Everything that can be checked before a model is loaded."""
from __future__ import annotations

from datetime import datetime
from pathlib import Path

from PIL import Image
from transformers import AutoConfig

from hints import Hint, screen_hints, teacher_messages
from plumbing.answers import load_verifier
from plumbing.data import Questions, load_samples
from plumbing.hint_file import join_hints
from plumbing.images import ImageTextProcessor, load_processor
from rollout import Sample, plain_messages
from toy import world

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train import TrainConfig


def read_inputs(cfg: TrainConfig, world_size: int) -> tuple[Questions, list[Sample], str, Path, ImageTextProcessor]:
    """Check everything that can be checked before a model is loaded: -> questions, held-out samples, a note, the run folder, the processor.

    A hint that holds a spoiler or is too long is dropped and counted in the note; its sample is kept and never tutored. Raises ValueError.
    """
    if cfg.questions % world_size:
        raise ValueError(f"--questions {cfg.questions} must be a multiple of the {world_size} processes")
    if cfg.hints and not cfg.data:
        raise ValueError("--hints needs --data: the puzzles bring their own")
    if cfg.fog and cfg.data:
        raise ValueError("--fog is for the built-in puzzles: it cannot stand beside --data")
    load_verifier(cfg.verifier)
    local = Path(cfg.model)
    if not local.exists() and (local.is_absolute() or cfg.model.startswith(".") or cfg.model.count("/") != 1):
        raise ValueError(f"--model {cfg.model}: no such folder, and not a hub name like Qwen/Qwen2-VL-2B-Instruct")
    try:
        model_type = AutoConfig.from_pretrained(cfg.model).model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {cfg.model}: cannot read its config.json: {str(error).splitlines()[0]}") from None
    if model_type not in MODEL_TYPES:
        raise ValueError(f"--model {cfg.model}: is a {model_type} model; supported: {', '.join(MODEL_TYPES)}")
    if cfg.report and world_size > 1:
        raise ValueError(f"--report runs in one process: afterwards, python train.py --report runs/{cfg.name or 'NAME'}")
    run = Path(cfg.resume) if cfg.resume else Path("runs") / (cfg.name or datetime.now().strftime("%Y%m%d-%H%M%S"))
    if run.exists() and not cfg.resume:
        raise ValueError(f"{run} exists already; choose another --name or remove it")
    processor, bad = load_processor(cfg.model, cfg.min_pixels, cfg.max_pixels), []

    def load(source, split):
        found = load_samples(source, Hint.from_json, split=split, image_dir=cfg.image_dir, bad=bad if cfg.skip_bad else None)
        fits = [prompt_tokens(processor, s) <= cfg.max_prompt for s in found]
        if not any(fits):
            raise ValueError(f"{source}: every prompt is longer than --max-prompt {cfg.max_prompt} tokens")
        return [s for s, fine in zip(found, fits) if fine], fits.count(False)
    held_out, long = load(cfg.eval_data, cfg.eval_split) if cfg.eval_data else (world.puzzles("heldout", cfg.eval_questions, fog=cfg.fog), 0)
    if cfg.eval_data and (leaky := sum(map(len, screen_hints(held_out, processor.tokenizer, cfg.max_hint_tokens).values()))):
        bad.append(f"{leaky} unusable hints of held-out questions")
    samples, note = None, "questions: built-in puzzles, all with a hint"
    if cfg.data:
        samples, more = load(cfg.data, cfg.split)
        long += more
        strangers = join_hints(samples, cfg.hints) if cfg.hints else 0
        dropped = screen_hints(samples, processor.tokenizer, cfg.max_hint_tokens)
        note = f"questions: {len(samples)} from {cfg.data}; {sum(s.hint is not None for s in samples)} with a hint"
        note += "".join(f", {len(ids)} hints dropped ({reason}; first: {ids[0]})" for reason, ids in dropped.items() if ids)
        note += f"; {strangers} lines of {cfg.hints} belong to no question here" if strangers else ""
        teachable = sum(teacher_messages(s, cfg.teacher_context) is not None for s in samples)
        note += f"; {len(samples) - teachable} are never tutored, for want of a {cfg.teacher_context}" if teachable < len(samples) else ""
    if samples and cfg.train_vision and world_size > 1 and not all(s.images for s in samples):
        raise ValueError("--train-vision in several processes needs an image in every question: a micro-batch without one leaves the tower's weights out")
    note += f"\nleft out: {long} questions with a prompt above {cfg.max_prompt} tokens" if long else ""
    note += "".join(f"\nleft out: {message}" for message in bad)
    return Questions(samples, cfg.seed, cfg.fog), held_out[:cfg.eval_questions], note, run, processor


def prompt_tokens(processor, sample: Sample) -> int:
    """Length of the sample's plain prompt in tokens, from the images' sizes: nothing is decoded."""
    text = processor.apply_chat_template(plain_messages(sample), tokenize=False, add_generation_prompt=True)
    images = processor.image_processor
    sizes = [Image.open(i).size if isinstance(i, (str, Path)) else i.size for i in sample.images]
    patches = [images.get_number_of_image_patches(height, width) for width, height in sizes]
    return len(processor.tokenizer(text)["input_ids"]) + sum(n // images.merge_size**2 - 1 for n in patches)
