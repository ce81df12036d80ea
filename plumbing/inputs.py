"""Everything that can be checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoConfig

from hints import Hint, screen_hints, teacher_messages
from plumbing.answers import load_judge
from plumbing.data import Columns, QuestionStream, check_characters, load_questions, texts_of
from plumbing.hint_file import join_hints
from plumbing.images import ImageTextProcessor, check_reachable, first_line, load_processor
from plumbing.settings import is_embedded
from rollout import Question, student_messages

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from train import TrainConfig

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass
class Inputs:
    """What a run starts from.

    stream: question number i of the run. held_out: questions to evaluate on. note: what was read,
    dropped and left out, to be printed. folder: of the run. processor: of the model. same_answer:
    the judge of two answers.
    """

    stream: QuestionStream
    held_out: list[Question]
    note: str
    folder: Path
    processor: ImageTextProcessor
    same_answer: object


def read_inputs(config: TrainConfig, world, world_size: int) -> Inputs:
    """Read and check everything that needs no model. world: the built-in puzzles, toy.world.

    A hint that holds a spoiler or is too long is dropped and counted in the note; its question
    stays and is never tutored. Raises ValueError.
    """
    _check_options(config, world_size)
    same_answer = load_judge(config.verifier)
    shape = _check_model(config.model)
    folder = _run_folder(config)
    processor = load_processor(config.model, config.min_pixels, config.max_pixels)
    _check_tokens(config.model, shape, processor)
    reader = _Reader(config, processor)
    embedded = is_embedded(config.model)
    if config.eval_data:
        held_out = reader.load(config.eval_data, config.eval_split)
        reader.screen_held_out(held_out)
    else:
        held_out = world.puzzles("heldout", config.eval_questions, embedded=embedded)
    if config.data:
        questions = reader.load(config.data, config.split)
        reader.columns.check_seen()
        note = reader.take_hints(questions)
        stream = QuestionStream(questions, config.seed)
        trained_tower = not (config.freeze_vision or config.lora)
        if trained_tower and world_size > 1 and not all(q.images for q in questions):
            raise ValueError(
                "a trained vision tower needs an image in every question in several processes, as "
                "a micro-batch without one leaves the tower's weights out: add --freeze-vision"
            )
    else:
        made_for = "" if embedded else " for real models, 448 pixels"
        note = f"questions: built-in puzzles{made_for}, all with a hint"
        stream = world.PuzzleStream(config.seed, embedded)
    if config.data and not config.eval_data:
        note += "\nevaluated on built-in puzzles, as there is no --eval-data"
    note += reader.left_out()
    held_out = held_out[: config.eval_questions]
    return Inputs(stream, held_out, note, folder, processor, same_answer)


def _check_options(config: TrainConfig, world_size: int) -> None:
    if config.questions % world_size:
        raise ValueError(
            f"--questions {config.questions} must be a multiple of the {world_size} processes"
        )
    if config.hints and not config.data:
        raise ValueError("--hints needs --data: the puzzles bring their own")
    if config.report and world_size > 1:
        raise ValueError(
            "--report runs in one process: afterwards, python train.py --report "
            f"runs/{config.name or 'NAME'}"
        )


def _check_model(model: str) -> PreTrainedConfig:
    """The model's config. Raises ValueError where it cannot be read or trained."""
    is_path = Path(model).is_absolute() or model.startswith(".") or model.count("/") != 1
    if is_path and not Path(model).exists():
        raise ValueError(
            f"--model {model}: no such folder, and not a hub name like Qwen/Qwen2-VL-2B-Instruct"
        )
    try:
        check_reachable(model)
    except ValueError as error:
        raise ValueError(f"--model {error}") from None
    try:
        shape = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(
            f"--model {model}: cannot read its config.json: {first_line(error)}"
        ) from None
    if shape.model_type not in MODEL_TYPES:
        raise ValueError(
            f"--model {model}: is a {shape.model_type} model; supported: {', '.join(MODEL_TYPES)}"
        )
    quantized = getattr(shape, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method", "an unknown method")
        raise ValueError(
            f"--model {model}: its weights are quantized ({method}) and cannot be trained: take "
            "the model that they were made from"
        )
    return shape


def _check_tokens(model: str, shape: PreTrainedConfig, processor: ImageTextProcessor) -> None:
    """Raises ValueError where the tokenizer's ids are not those of the model."""
    tokens, rows = len(processor.tokenizer), shape.get_text_config().vocab_size
    if tokens > rows:
        raise ValueError(
            f"--model {model}: its tokenizer has {tokens} tokens, but the model only {rows}: "
            "resize its embeddings, or take the tokenizer that belongs to it"
        )
    if shape.image_token_id != processor.image_token_id:
        raise ValueError(
            f"--model {model}: in its config.json image_token_id is {shape.image_token_id}, but "
            f"its tokenizer's {processor.image_token} is {processor.image_token_id}"
        )


def _run_folder(config: TrainConfig) -> Path:
    if config.resume:
        return Path(config.resume)
    # TRAP: each process has a clock of its own, and a checkpoint's parts must meet in one folder
    [now] = broadcast_object_list([datetime.now().strftime("%Y%m%d-%H%M%S")])
    folder = Path("runs") / (config.name or now)
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another --name or remove it")
    return folder


class _Reader:
    """Reads questions and their hints, and counts what it leaves out."""

    def __init__(self, config: TrainConfig, processor: ImageTextProcessor):
        self.config, self.processor = config, processor
        self.columns = Columns(config.columns)
        self.special = special_tokens(processor)
        self.bad: list[str] = []
        self.too_long = 0

    def load(self, source: str, split: str) -> list[Question]:
        """The questions of a source whose prompts are short enough.

        A question whose texts or images no prompt can be made of is refused like a line that cannot
        be read: by file, line and field, or it is listed with --skip-bad.
        """
        config, lengths = self.config, {}

        def check(question: Question) -> None:
            lengths[question.id] = check_prompt(question, self.processor, self.special)

        loaded = load_questions(
            source,
            Hint.from_json,
            split=split,
            image_dir=config.image_dir,
            bad=self.bad if config.skip_bad else None,
            columns=self.columns,
            check=check,
        )
        limit = config.max_prompt
        questions = [question for question in loaded if lengths[question.id] <= limit]
        if not questions:
            raise ValueError(f"{source}: every prompt is longer than --max-prompt {limit} tokens")
        self.too_long += len(loaded) - len(questions)
        return questions

    def screen(self, questions: list[Question]) -> dict[str, list[str]]:
        """Take away hints that cannot be used: the questions' ids by reason.

        A hint of the data itself has been checked with its line. One of a hints file has not: the
        expert that wrote it may have another tokenizer.
        """
        unreadable = []
        for question in questions:
            try:
                check_hint(question.hint, self.special)
            except ValueError:
                unreadable.append(question.id)
                question.hint = None
        dropped = screen_hints(questions, self.processor.tokenizer, self.config.max_hint_tokens)
        return {"special tokens": unreadable, **dropped}

    def screen_held_out(self, questions: list[Question]) -> None:
        dropped = sum(len(ids) for ids in self.screen(questions).values())
        if dropped:
            self.bad.append(f"{dropped} unusable hints of held-out questions")

    def take_hints(self, questions: list[Question]) -> str:
        """Join and screen the hints of the training questions: what the note says of them."""
        config = self.config
        strangers = join_hints(questions, config.hints) if config.hints else 0
        dropped = self.screen(questions)
        hinted = sum(question.hint is not None for question in questions)
        note = f"questions: {len(questions)} from {config.data}; {hinted} with a hint"
        for reason, ids in dropped.items():
            if ids:
                note += f", {len(ids)} hints dropped ({reason}; first: {ids[0]})"
        if strangers:
            note += f"; {strangers} lines of {config.hints} belong to no question here"
        context = config.teacher_context
        untaught = sum(teacher_messages(question, context) is None for question in questions)
        if untaught:
            note += f"; {untaught} are never tutored, for want of a {context}"
        return note

    def left_out(self) -> str:
        note = ""
        if self.too_long:
            limit = self.config.max_prompt
            note += f"\nleft out: {self.too_long} questions with a prompt above {limit} tokens"
        return note + "".join(f"\nleft out: {message}" for message in self.bad)


def special_tokens(processor: ImageTextProcessor) -> list[str]:
    """What must not stand in a question's texts: the tokens that a chat is built of.

    The tokenizer reads such a text as the token itself: "<|im_end|>" would end the user's turn, and
    "<|image_pad|>" would ask for one more image. Added tokens that are not special, such as
    "<think>" or "<tool_call>" in Qwen's tokenizers, are text: no chat is built of them in the
    user's turn, and the sampler may draw them.
    """
    tokenizer = processor.tokenizer
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    images = {processor.image_token, processor.video_token}
    return sorted(added | set(tokenizer.all_special_tokens) | images)


def refuse_special_tokens(question: Question, special: list[str]) -> None:
    """Raises ValueError that names field and token where a text of the question holds one.

    <image> is the mark for an image in the question's text, and refused in the other fields.
    """
    for field, text in texts_of(question):
        if field == "id":
            continue  # no prompt holds it
        _refuse(field, text, special if field == "question" else [*special, "<image>"])


def check_hint(hint: Hint | None, special: list[str]) -> None:
    """Raises ValueError where a hint holds a special token or what is no character."""
    if hint:
        check_characters("hint", hint.text)
        _refuse("hint", hint.text, [*special, "<image>"])


def _refuse(field: str, text: str, tokens: list[str]) -> None:
    for token in tokens:
        if token in text:
            raise ValueError(
                f"field '{field}': it holds {token!r}, which the model's tokenizer reads as a "
                "special token: remove or reword it"
            )


def check_prompt(question: Question, processor: ImageTextProcessor, special: list[str]) -> int:
    """Length of the student's prompt, in tokens. special: of special_tokens.

    Raises ValueError, which names the field, where no prompt can be made of the question.
    """
    refuse_special_tokens(question, special)
    try:
        return prompt_tokens(processor, question)
    except ValueError as error:  # the image processor: an image that is too narrow
        raise ValueError(f"field 'images': {error}") from None


def prompt_tokens(processor, question: Question) -> int:
    """Length of the student's prompt in tokens, from the images' sizes: nothing is decoded."""
    text = processor.apply_chat_template(
        student_messages(question), tokenize=False, add_generation_prompt=True
    )
    tokens = len(processor.tokenizer(text)["input_ids"])
    images = processor.image_processor
    for image in question.images:
        is_path = isinstance(image, (str, Path))
        width, height = Image.open(image).size if is_path else image.size
        patches = images.get_number_of_image_patches(height, width)
        tokens += patches // images.merge_size**2 - 1  # the text holds one token per image
    return tokens
