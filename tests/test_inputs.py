"""plumbing/inputs.py and the command line: what is refused before a model is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from test_rollout import student_prompts
from tokenizers import AddedToken

import train
from hints import Hint
from plumbing import command, settings
from plumbing.data import QuestionStream
from plumbing.inputs import prompt_tokens, read_inputs, special_tokens
from toy import world


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that a command runs in, with files of questions, a hints file and a run."""
    monkeypatch.chdir(tmp_path)
    good = {"question": "a?", "answer": "1"}
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    write_lines(tmp_path / "bad.jsonl", [good, {"question": "a?"}])
    write_lines(tmp_path / "good.jsonl", [good])
    write_lines(tmp_path / "h.jsonl", [{"id": "good-1", "hint": {"look": "left"}}])
    write_lines(tmp_path / "image.jsonl", [{**good, "image": "none.png"}])
    return tmp_path


# ---------------------------------------------------------------------- bad input is one clear line
@pytest.mark.parametrize(
    "argv, message",
    [
        (["--nonsense", "1"], "unrecognized arguments: --nonsense"),
        (["--model", "no/such/folder"], "no such folder"),
        (["--model", "./nowhere"], "no such folder"),
        (["--group-size", "1"], "--group-size must be at least 2"),
        (["--tau", "0"], "--tau must be above 0 and at most 1, got 0.0"),
        (["--tau", "1.5"], "--tau must be above 0 and at most 1, got 1.5"),
        (["--jsd-k", "0"], "--jsd-k must be at least 1"),
        (["--steps", "many"], "invalid int value"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--name", "a/b"], "plain folder name"),
        (["--data", "gone.jsonl"], "gone.jsonl: no such file"),
        (["--data", "bad.jsonl"], "bad.jsonl:2: no answer"),
        (["--data", "image.jsonl"], "image.jsonl:1: field 'images': cannot read"),
        (["--name", "taken"], "exists already"),
        (["--name", "x" * 300], "--name must have at most 255 bytes"),
        (["--seed", "1000"], "--seed must be at least 0 and at most 999"),
        (["--hints", "h.jsonl"], "--hints needs --data"),
        (["--teacher-context", "oracle"], "invalid choice: 'oracle'"),
        (["--data", "good.jsonl", "--hints", "h.jsonl"], "h.jsonl:1: hint fields"),
        (["--data", "good.jsonl", "--hints", "gone.jsonl"], "gone.jsonl: cannot be read: "),
        (["--data", "good.jsonl", "--hints", "."], ".: cannot be read: "),
        (["--data", "good.jsonl", "--max-prompt", "5"], "longer than --max-prompt 5 tokens"),
        (["--eval-data", "bad.jsonl"], "bad.jsonl:2: no answer"),
    ],
)
def test_bad_input_is_one_clear_line_before_a_model_is_loaded(
    argv, message, folder, monkeypatch, capsys
):
    monkeypatch.setattr(command, "build", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1, error
    assert message in error


def test_good_input_gets_as_far_as_the_model(folder, monkeypatch):
    """The check of the checks above: `build` is what comes after them."""

    class Reached(Exception):
        pass

    def build(config, accelerator):
        raise Reached

    monkeypatch.setattr(command, "build", build)
    with pytest.raises(Reached):
        train.main(["--data", "good.jsonl"])


@pytest.mark.parametrize(
    "config, message",
    [
        ('{"model_type": "gpt2"}', "is a gpt2 model; supported: qwen2_vl"),
        ("{oops", "cannot read its config.json"),
        (None, "cannot read its config.json"),
    ],
)
def test_a_model_without_vision_is_refused(tmp_path, capsys, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(SystemExit):
        train.main(["--model", str(tmp_path)])
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------- what is read
def read(world_size=1, **settings):
    config = train.TrainConfig(**{"name": "x", "eval_questions": 1, **settings})
    return read_inputs(config, world, world_size)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"questions": 3}, "--questions 3 must be a multiple of the 2 processes"),
        ({"report": "this run"}, "afterwards, python train.py --report runs/x"),
        ({"data": "good.jsonl"}, "a trained vision tower needs an image in every question"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        read(world_size=2, **settings)
    read(world_size=1, **settings)


@pytest.mark.parametrize("frozen_by", [{"freeze_vision": True}, {"lora": 4}])
def test_a_frozen_vision_tower_needs_no_image_in_several_processes(folder, monkeypatch, frozen_by):
    monkeypatch.setattr(settings, "find_spec", lambda package: True)
    inputs = read(world_size=2, data="good.jsonl", **frozen_by)
    assert [question.images for question in inputs.stream.questions] == [[]]


def test_without_data_the_questions_are_puzzles(folder):
    inputs = read(seed=3, eval_questions=5)
    assert isinstance(inputs.stream, world.PuzzleStream)
    assert inputs.stream.first(9) == world.PuzzleStream(3).first(9)
    assert inputs.held_out == world.puzzles("heldout", 5)
    assert inputs.note == "questions: built-in puzzles, all with a hint"
    assert str(inputs.folder) == "runs/x"
    assert inputs.same_answer("7.0", "7", None)


def test_with_data_the_questions_are_shuffled_by_the_seed(folder):
    write_lines(folder / "d.jsonl", [{"question": f"{i}?", "answer": "1"} for i in range(9)])
    inputs = read(data="d.jsonl", eval_data="d.jsonl", seed=3, eval_questions=2)
    shuffled = QuestionStream(inputs.stream.questions, 3)
    assert [inputs.stream[i].id for i in range(9)] == [shuffled[i].id for i in range(9)]
    assert [question.id for question in inputs.held_out] == ["d-1", "d-2"]


def test_what_cannot_be_read_or_is_too_long_is_left_out_and_named(folder):
    rows = [
        {"question": "a?", "answer": "1"},
        {"question": "a?"},
        {"question": "a?" * 40, "answer": "1"},
    ]
    write_lines(folder / "d.jsonl", rows)
    inputs = read(data="d.jsonl", eval_data="d.jsonl", skip_bad=True, max_prompt=60)
    assert [question.id for question in inputs.stream.questions] == ["d-1"]
    assert inputs.note.splitlines()[1] == "left out: 2 questions with a prompt above 60 tokens"
    assert inputs.note.count("\nleft out: d.jsonl:2: no answer") == 2


HINTED = [
    {"question": "How many?", "answer": "7", "hint": "count to 7"},
    {"question": "How many?", "answer": "7", "hint": "count the left ones"},
    {"question": "How many?", "answer": "7", "hint": "read " * 40},
    {"question": "b?", "answer": "1", "solution": "it is 1"},
    {"question": "c?", "answer": "1"},
]
LEFT = Hint(steps=("count the left ones",))
NO_EVAL_DATA = "\nevaluated on built-in puzzles, as there is no --eval-data"


def read_hinted(folder, **settings):
    """The hints that are left to the questions of HINTED, and the note."""
    write_lines(folder / "d.jsonl", HINTED)
    inputs = read(data="d.jsonl", max_hint_tokens=30, **settings)
    note = inputs.note.removesuffix(NO_EVAL_DATA)
    assert (note != inputs.note) == ("eval_data" not in settings)
    return [question.hint for question in inputs.stream.questions], note


def test_all_processes_have_the_folder_of_the_first(folder, monkeypatch):
    """Each has a clock of its own. Here the first one's clock says 20261130-235959."""
    first = ["20261130-235959"]
    monkeypatch.setattr("plumbing.inputs.broadcast_object_list", lambda named: first)
    assert read(name="").folder == Path("runs/20261130-235959")


def test_unusable_hints_are_dropped_and_counted(folder):
    hints, note = read_hinted(folder)
    assert hints == [None, LEFT, None, None, None]
    assert note == (
        "questions: 5 from d.jsonl; 1 with a hint, 1 hints dropped (spoilers; first: d-1), "
        "1 hints dropped (too long; first: d-3); 4 are never tutored, for want of a hint"
    )


def test_a_hints_file_is_joined_and_its_strangers_are_counted(folder):
    lines = [{"id": "d-4", "hint": {"look": ["the top"]}}, {"id": "other", "hint": None}]
    write_lines(folder / "h.jsonl", lines)
    hints, note = read_hinted(folder, hints="h.jsonl")
    assert hints == [None, LEFT, None, Hint(look=("the top",)), None]
    assert "2 with a hint" in note
    assert note.endswith(
        "1 lines of h.jsonl belong to no question here; 3 are never tutored, for want of a hint"
    )


def test_unusable_hints_of_held_out_questions_are_counted_apart(folder):
    _, note = read_hinted(folder, eval_data="d.jsonl")
    assert note.endswith("\nleft out: 2 unusable hints of held-out questions")


def test_the_note_says_who_is_never_tutored_under_another_context(folder):
    _, note = read_hinted(folder, teacher_context="solution")
    assert "4 are never tutored, for want of a solution" in note
    _, note = read_hinted(folder, teacher_context="answer")
    assert "never tutored" not in note


# ---------------------------------------------------------------------------------- special tokens
SPECIAL = [
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
]
FIELDS = ("question", "answer", "choices", "solution", "hint")


def row_with(field, text):
    row = {"question": "a?", "answer": "1"}
    return {**row, field: [text] if field == "choices" else text}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("token", SPECIAL)
@pytest.mark.parametrize("option", ["data", "eval_data"])
def test_a_special_token_in_a_text_is_refused_by_its_line(folder, field, token, option):
    """Training data and held-out data alike."""
    rows = [{"question": "a?", "answer": "1"}, row_with(field, f"see {token} there")]
    write_lines(folder / "d.jsonl", rows)
    with pytest.raises(ValueError, match=f"d.jsonl:2: .*{field if field != 'hint' else 'special'}"):
        read(**{option: "d.jsonl"})
    inputs = read(**{option: "d.jsonl"}, skip_bad=True)
    assert inputs.note.count("left out: d.jsonl:2: ") == 1


@pytest.mark.parametrize("field", ["answer", "choices", "solution", "hint"])
def test_an_image_mark_stands_in_the_question_alone(folder, field):
    """The teacher's chat would have another number of images."""
    write_lines(folder / "d.jsonl", [row_with(field, "see <image> there")])
    with pytest.raises(ValueError, match="d.jsonl:1: "):
        read(data="d.jsonl")


@pytest.mark.parametrize("text", ["<think>", "<tool_call>", "a < b | c", "|x|<|y|", "<|no_token|>"])
def test_what_is_no_special_token_is_text(folder, text):
    write_lines(folder / "d.jsonl", [row_with("question", f"is {text} there?")])
    inputs = read(data="d.jsonl")
    assert text in inputs.stream.questions[0].text


def test_special_tokens_are_those_of_the_tokenizer_and_the_images(base):
    """Ordinary added tokens, as <think> in Qwen3's tokenizer, are no special ones."""
    ordinary = {70: AddedToken("<think>", special=False), 71: AddedToken("<|box|>", special=True)}
    tokenizer = SimpleNamespace(added_tokens_decoder=ordinary, all_special_tokens=["<eos>"])
    processor = SimpleNamespace(tokenizer=tokenizer, image_token="<img>", video_token="<vid>")
    assert special_tokens(processor) == ["<eos>", "<img>", "<vid>", "<|box|>"]
    assert set(SPECIAL) < set(special_tokens(base[1]))


def test_special_tokens_in_a_hints_file(folder):
    """Those of the shape <|...|> by file and line; others of the tokenizer are dropped, counted."""
    questions = [{"question": "a?", "answer": "1"}, {"question": "b?", "answer": "1"}]
    write_lines(folder / "d.jsonl", questions)
    write_lines(folder / "h.jsonl", [{"id": "d-1", "hint": "see <|im_end|>"}])
    with pytest.raises(ValueError, match="h.jsonl:1: .*special token"):
        read(data="d.jsonl", hints="h.jsonl")
    hints = [{"id": "d-1", "hint": "see <unk>"}, {"id": "d-2", "hint": "see \ud800"}]
    write_lines(folder / "h.jsonl", hints)
    inputs = read(data="d.jsonl", hints="h.jsonl")
    assert [question.hint for question in inputs.stream.questions] == [None, None]
    assert "2 hints dropped (special tokens; first: d-1)" in inputs.note


def test_an_image_that_the_processor_refuses_is_named_by_its_line(folder):
    Image.new("RGB", (2, 500)).save(folder / "thin.png")
    write_lines(folder / "d.jsonl", [{"question": "a?", "answer": "1", "image": "thin.png"}])
    with pytest.raises(ValueError, match="d.jsonl:1: field 'images': .*aspect ratio"):
        read(data="d.jsonl")


# --------------------------------------------------------------------------------- other columns
def test_columns_serve_both_sources_and_a_misspelt_one_is_refused(folder):
    write_lines(folder / "d.jsonl", [{"problem": "a?", "answer": "1"}])
    write_lines(folder / "e.jsonl", [{"question": "b?", "query": "b? (A) 1", "answer": "1"}])
    sources = {"data": "d.jsonl", "eval_data": "e.jsonl"}
    inputs = read(**sources, columns="question=query")
    assert inputs.stream.questions[0].text == "a?"
    assert inputs.held_out[0].text == "b? (A) 1"
    with pytest.raises(ValueError, match="no row has a column 'qery'"):
        read(**sources, columns="question=qery")


def test_prompt_lengths_without_decoding(base, tmp_path):
    questions = world.puzzles("tune", 3)
    Image.new("RGB", (84, 140)).save(tmp_path / "a.png")
    questions[1].images = [Image.new("RGB", (200, 90)), Image.new("L", (56, 56))]
    questions[2].images = [tmp_path / "a.png", str(tmp_path / "a.png")]
    for question, prompt in zip(questions, student_prompts(base[1], questions), strict=True):
        assert prompt_tokens(base[1], question) == len(prompt.ids)
