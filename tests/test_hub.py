"""Checkpoints in the hub's own files (tests/hub.py): the whole loop, and what is refused."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import pytest
import torch
from conftest import ROOT, logged, read_jsonl, write_jsonl
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, GenerationConfig

import train
from plumbing import build_hints, command
from plumbing.data import load_questions
from plumbing.images import load_processor
from plumbing.models import load_model
from rollout import (
    banned_tokens,
    encode_prompts,
    eos_tokens,
    pad_prompts,
    sample_groups,
    student_messages,
)

OPTIONS = shlex.split(
    "--data d.jsonl --eval-data d.jsonl --questions 2 --group-size 2 --updates 1 --lr 1e-3 "
    "--max-new-tokens 12 --eval-questions 1 --eval-every 9 --save-every 1"
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """kind -> (folder, weights by their hub names). Do not change the files."""
    written = {}
    for kind in hub.KINDS:
        folder = tmp_path_factory.mktemp(kind)
        written[kind] = folder, hub.write_checkpoint(folder, kind)
    return written


@pytest.fixture(scope="module", params=hub.KINDS)
def checkpoint(request, checkpoints):
    """(kind, folder, weights) of each class."""
    return request.param, *checkpoints[request.param]


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """A folder with d.jsonl: three questions with an image and a hint."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for number in range(3):
        image = Image.new("RGB", (90 + 30 * number, 70), (80 * number, 90, 20))
        image.paste((255, 255, 255), (10, 10, 30, 30))
        image.save(folder / f"{number}.png")
        rows.append(
            {
                "question": f"Which colour is square {number}?",
                "answer": str(number),
                "images": [f"{number}.png"],
                "hint": {"look": ["the left square"], "steps": ["name its colour"]},
            }
        )
    write_jsonl(folder / "d.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def run(checkpoint, questions):
    """The folder of a finished run of two steps with --report, resumed for a third one."""
    kind, folder, _ = checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(questions)
        train.main(["--model", str(folder), *OPTIONS, "--steps", "2", "--name", kind, "--report"])
        train.main(["--resume", f"runs/{kind}", "--steps", "3"])
    return questions / "runs" / kind


def prompts_of(processor, questions):
    loaded = load_questions(str(questions / "d.jsonl"), lambda fields: None)
    return encode_prompts(processor, loaded, [student_messages(question) for question in loaded])


# ------------------------------------------------------------------------------------------ loading
def hub_name(name):
    """The name in the hub's files of a weight of today's Qwen2-VL or Qwen2.5-VL."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def test_the_weights_are_those_of_the_files(checkpoint):
    kind, folder, weights = checkpoint
    model = load_model(str(folder), torch.float32)
    loaded = {}
    for name, value in model.named_parameters():  # a tied head is not among them
        loaded[name if kind == "Qwen3VL" else hub_name(name)] = value
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(loaded[name], value.float()), name
    tied = kind != "Qwen2_5_VL"
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_the_config_of_the_files_is_the_models(checkpoint):
    kind, folder, _ = checkpoint
    model = load_model(str(folder), torch.bfloat16)
    text = model.config.text_config
    assert (text.hidden_size, text.num_key_value_heads, text.vocab_size) == (48, 2, hub.VOCAB)
    assert text.rope_parameters["mrope_section"] == [2, 2, 2]
    assert text.rope_parameters["rope_theta"] == (5e6 if kind == "Qwen3VL" else 1e6)
    assert model.config.vision_config.depth == 2
    tokenizer = load_processor(str(folder)).tokenizer
    assert eos_tokens(model, tokenizer) == [hub.ID["<|endoftext|>"], hub.ID["<|im_end|>"]]
    specials = {number for token, number in hub.ID.items() if "end" not in token}
    ends_of_others = {hub.ID["<|vision_end|>"], hub.ID["<|object_ref_end|>"]}
    padding = set(range(max(hub.ID.values()) + 1, hub.VOCAB))
    assert set(banned_tokens(model, tokenizer)) == specials | ends_of_others | padding


def test_a_head_that_only_text_config_calls_tied_is_tied(checkpoints, tmp_path):
    """As transformers 4.52 to 4.57 wrote it. Here on Qwen3-VL, whose class does not lift it."""
    folder = shutil.copytree(checkpoints["Qwen3VL"][0], tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.pop("tie_word_embeddings"))
    model = load_model(str(folder), torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_rotary_frequencies_in_a_file_are_no_weights(checkpoints, tmp_path):
    folder, weights = checkpoints["Qwen2VL"]
    copy = shutil.copytree(folder, tmp_path / "copy")
    rewrite(copy, {**weights, "visual.rotary_pos_emb.inv_freq": torch.ones(4)})
    for one, other in zip(
        load_model(str(copy), torch.float32).parameters(),
        load_model(str(folder), torch.float32).parameters(),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_template_among_several_by_name_is_the_default_one(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["Qwen2VL"][0], tmp_path / "copy")
    templates = {"tool_use": "no images", "default": hub.VISION_TEMPLATE}
    named = [{"name": name, "template": text} for name, text in templates.items()]
    hub.write_json(folder / "chat_template.json", {"chat_template": named})
    assert load_processor(str(folder)).chat_template == hub.VISION_TEMPLATE


def test_the_processor_is_that_of_the_files(checkpoint):
    """The template that shows images, the limits of an image's area, and the numbers."""
    kind, folder, _ = checkpoint
    processor = load_processor(str(folder))
    side = 16 if kind == "Qwen3VL" else 14
    assert processor.tokenizer.chat_template == (
        hub.VISION_TEMPLATE if kind == "Qwen3VL" else hub.TEXT_TEMPLATE
    )
    assert processor.chat_template == hub.VISION_TEMPLATE
    images = processor.image_processor
    assert images.patch_size == side
    assert list(images.image_mean) == ([0.5] * 3 if kind == "Qwen3VL" else hub.CLIP_MEAN)
    assert image_tokens(processor, 1000) == 9
    assert image_tokens(processor, 20) == 4
    area = (2 * side) ** 2
    limited = load_processor(str(folder), min_pixels=25 * area, max_pixels=36 * area)
    assert (image_tokens(limited, 20), image_tokens(limited, 1000)) == (25, 36)
    limited = load_processor(str(folder), max_pixels=6 * area)  # the other one is the file's
    assert (image_tokens(limited, 20), image_tokens(limited, 1000)) == (4, 4)


def image_tokens(processor, side):
    inputs = processor(text=["<|image_pad|>"], images=[Image.new("RGB", (side, side))])
    return len(inputs["input_ids"][0])


def test_one_models_pixels_are_not_the_next_ones(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["Qwen2VL"][0], tmp_path / "copy")
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    del settings["max_pixels"]
    load_processor(str(checkpoints["Qwen2VL"][0]))
    hub.write_json(path, settings)
    assert load_processor(str(folder)).image_processor.size["longest_edge"] == 28 * 28 * 1280


@pytest.mark.parametrize("file", ["chat_template.jinja", "processor_config.json"])
def test_the_template_is_also_found_in_other_files(checkpoints, file, tmp_path):
    folder = shutil.copytree(checkpoints["Qwen2VL"][0], tmp_path / "copy")
    (folder / "chat_template.json").unlink()
    if file.endswith(".jinja"):
        (folder / file).write_text(hub.VISION_TEMPLATE)
    else:
        hub.write_json(folder / file, {"chat_template": hub.VISION_TEMPLATE})
    assert load_processor(str(folder)).chat_template == hub.VISION_TEMPLATE


# --------------------------------------------------------------------------------------- whole loop
@pytest.mark.slow
def test_a_run_on_it_is_resumed_and_has_a_page(run):
    assert [row["step"] for row in logged(run)] == [0, 1, 2, 3]
    assert all(row["tutor_loss"] > 0 for row in logged(run)[1:])
    assert "Which colour is square 0?" in (run / "report.html").read_text()


@pytest.mark.slow
def test_the_exported_model_loads_back_in_the_hubs_layout(run, checkpoint):
    """By our loader and by transformers' own; the names of the weights are the hub's."""
    kind, folder, weights = checkpoint
    exported = load_model(str(run / "model"), torch.float32)
    plain = AutoModelForImageTextToText.from_pretrained(run / "model", dtype=torch.float32)
    before = load_model(str(folder), torch.float32).state_dict()
    for name, value in exported.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    moved = [name for name, value in exported.state_dict().items() if (value != before[name]).any()]
    assert any(".visual." in name for name in moved) and any("layers.1." in name for name in moved)
    with safe_open(run / "model" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == weights.keys()
        assert {file.get_tensor(name).dtype for name in weights} == {torch.float32}
    assert {path.name for path in (run / "model").iterdir()} >= {
        "chat_template.jinja",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
    }
    for name in ("eos_token_id", "top_k", "repetition_penalty"):
        kept = [getattr(GenerationConfig.from_pretrained(f), name) for f in (folder, run / "model")]
        assert kept[0] == kept[1]


@pytest.mark.slow
def test_the_exported_processor_is_the_files_and_has_the_models_class(run, checkpoint, questions):
    """AutoProcessor looks for the class by its name; ours would be unknown to it."""
    kind, folder, _ = checkpoint
    before, after = (load_processor(str(path)) for path in (folder, run / "model"))
    for one, other in zip(prompts_of(before, questions), prompts_of(after, questions), strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.pixels, other.pixels)
    saved = json.loads((run / "model" / "processor_config.json").read_text())
    assert saved["processor_class"] == f"{kind}Processor"


def test_the_plan_and_check_read_it(checkpoint, questions, monkeypatch, capsys):
    _, folder, _ = checkpoint
    monkeypatch.chdir(questions)
    train.main(["--model", str(folder), *OPTIONS, "--plan", "1"])
    assert "\npeak " in capsys.readouterr().out
    with pytest.raises(SystemExit):  # a random model does not end its responses
        train.main(["--model", str(folder), *OPTIONS, "--check"])
    table = capsys.readouterr().out
    failures = [line for line in table.splitlines() if line.startswith("FAIL")]
    assert len(failures) <= 1 and all("responses end" in line for line in failures), table
    assert "ok   the image changes the teacher's distribution" in table


@pytest.mark.parametrize("source", ["expert", "attention"])
def test_it_writes_hints(checkpoint, questions, source, tmp_path):
    """As an expert, whose replies are noise here, and by its attention."""
    _, folder, _ = checkpoint
    options = ["--data", str(questions / "d.jsonl"), "--out", str(tmp_path / "h.jsonl")]
    options += ["--model", str(folder), "--source", source, "--max-new-tokens", "12"]
    options += ["--samples", "2"]
    assert build_hints.main(options) == 0
    rows = read_jsonl(tmp_path / "h.jsonl")
    replies = [reasons for row in rows for reasons in row["rejected"]]
    reasons = {reason for reasons in replies for reason in reasons}
    assert len(rows) == 3
    if source == "expert":
        assert all(row["hint"] is None for row in rows)
        assert any(reason.startswith("cut off") for reason in reasons), reasons
    else:
        assert all(row["hint"] or row["rejected"] for row in rows)
        assert reasons <= {"no region stands out", "no right response: none of 2"}


# ----------------------------------------------------------------------------------------- sampling
def test_both_ends_of_the_file_end_a_response(checkpoints, questions):
    """A model to which all tokens are equally likely."""
    folder, _ = checkpoints["Qwen2_5_VL"]
    model, processor = load_model(str(folder), torch.float32), load_processor(str(folder))
    model.get_output_embeddings().weight.data.zero_()
    torch.manual_seed(0)
    prompts = prompts_of(processor, questions)
    groups = sample_groups(model, processor, prompts, 8, max_new_tokens=120)
    responses = [response for group in groups for response in group]
    ends = {hub.ID["<|im_end|>"], hub.ID["<|endoftext|>"]}
    assert all(not ends & set(response.ids[:-1]) for response in responses)
    assert {response.ids[-1] for response in responses if not response.truncated} == ends


def test_the_files_repetition_penalty_and_temperature_are_not_used(checkpoints, questions):
    """Draws are those of a model without generation settings."""
    folder, _ = checkpoints["Qwen2_5_VL"]
    model, processor = load_model(str(folder), torch.float32), load_processor(str(folder))
    prompts = prompts_of(processor, questions)
    assert model.generation_config.repetition_penalty == 1.05
    model.generation_config.repetition_penalty = 50.0  # so that it would show

    def drawn():
        groups = sample_groups(model, processor, prompts, 2, max_new_tokens=16)
        return [response.ids for group in groups for response in group]

    with_file = drawn()
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends)
    assert drawn() == with_file
    # the check of the check: a penalty does change what is drawn
    inputs = pad_prompts(prompts[:1], processor.tokenizer.pad_token_id)
    greedy = [
        model.generate(**inputs, do_sample=False, max_new_tokens=16, repetition_penalty=penalty)
        for penalty in (1.0, 50.0)
    ]
    assert greedy[0].tolist() != greedy[1].tolist()


# ---------------------------------------------------------------------------------- what is refused
SHARD = "model-00002-of-00002.safetensors"


def rewrite(folder, weights):
    for path in folder.glob("model*"):
        path.unlink()
    hub.write_weights(folder, weights, 2)


def leave_out(folder, weights):
    rewrite(folder, {k: v for k, v in weights.items() if "layers.1.mlp" not in k})


def add_one(folder, weights):
    rewrite(folder, {**weights, "visual.extra.weight": torch.zeros(2)})


def reshape_one(folder, weights):
    rewrite(folder, {**weights, "model.norm.weight": torch.zeros(7)})


def cut_shard(folder, weights):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


def remove_shard(folder, weights):
    (folder / SHARD).unlink()


def index_without_files(folder, weights):
    hub.write_json(folder / "model.safetensors.index.json", {"metadata": {}})


def break_index(folder, weights):
    (folder / "model.safetensors.index.json").write_text("{oops")


def no_vision_template(folder, weights):
    (folder / "chat_template.json").unlink()


def no_template(folder, weights):
    no_vision_template(folder, weights)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    hub.write_json(path, settings)


def template_of_two_images(folder, weights):
    doubled = hub.VISION_TEMPLATE.replace("<|image_pad|>", "<|image_pad|><|image_pad|>")
    hub.write_json(folder / "chat_template.json", {"chat_template": doubled})


def template_that_raises(folder, weights):
    template = "{{ raise_exception('No images here.') }}"
    hub.write_json(folder / "chat_template.json", {"chat_template": template})


def no_tokenizer(folder, weights):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()


def no_preprocessor(folder, weights):
    (folder / "preprocessor_config.json").unlink()


def template_without_key(folder, weights):
    hub.write_json(folder / "chat_template.json", {})


def broken_template(folder, weights):
    hub.write_json(folder / "chat_template.json", {"chat_template": "{% for %}"})


def edit(path, change):
    """Change a file's JSON in place."""
    content = json.loads(path.read_text())
    change(content)
    hub.write_json(path, content)


def no_end(folder, weights):
    edit(folder / "tokenizer_config.json", lambda settings: settings.update(eos_token=None))


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(checkpoints, tmp_path):
    def no_padding(folder, weights):
        edit(folder / "tokenizer_config.json", lambda settings: settings.update(pad_token=None))

    tokenizer = load_processor(str(copy_changed(checkpoints, tmp_path, no_padding))).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def quantized(folder, weights):
    method = {"quant_method": "awq", "bits": 4}
    edit(folder / "config.json", lambda config: config.update(quantization_config=method))


def other_image_token(folder, weights):
    edit(folder / "config.json", lambda config: config.update(image_token_id=5))


def text_for_a_number(folder, weights):
    edit(folder / "config.json", lambda config: config.update(hidden_size="48"))


def tokens_without_rows(folder, weights):
    """20 more tokens than the embeddings have rows for."""
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    used = max(hub.ID.values()) + 1
    tokens = {
        str(number): {**token, "content": f"<extra{number}>", "special": False}
        for number in range(used, used + 20)
    }
    path = folder / "tokenizer_config.json"
    edit(path, lambda settings: settings["added_tokens_decoder"].update(tokens))


def refusal(capsys):
    """The only line that was printed to stderr."""
    [line] = capsys.readouterr().err.splitlines()
    return line


def copy_changed(checkpoints, tmp_path, change):
    folder, weights = checkpoints["Qwen2VL"]
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy, weights)
    return copy


@pytest.mark.parametrize(
    "change, message",
    [
        (leave_out, "3 missing (model.language_model.layers.1.mlp.down_proj.weight, model.lang"),
        (add_one, "1 unknown to the model (model.visual.extra.weight)"),
        (reshape_one, "1 of another shape (model.language_model.norm.weight [7], not [48])"),
        (cut_shard, "cannot load its weights: Error while deserializing header: incomplete"),
        (remove_shard, f"/copy/{SHARD}"),
        (break_index, "cannot load its weights: Expecting property name"),
        (index_without_files, "cannot load its weights: 'weight_map'"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_in_one_line(
    change, message, checkpoints, questions, tmp_path, monkeypatch, capsys
):
    copy = copy_changed(checkpoints, tmp_path, change)
    monkeypatch.chdir(questions)
    with pytest.raises(SystemExit) as stop:
        train.main(["--model", str(copy), *OPTIONS, "--steps", "1", "--name", "refused"])
    assert stop.value.code == 2
    line = refusal(capsys)
    assert f"error: {copy}: " in line
    assert message in line
    assert not Path("runs/refused").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (no_vision_template, "its tokenizer (tokenizer_config.json) leaves images out"),
        (template_of_two_images, "chat_template.json or chat_template.jinja) leaves images out"),
        (template_that_raises, "chat_template.json or chat_template.jinja) leaves images out"),
        (no_template, "it has no chat template"),
        (no_tokenizer, "its tokenizer is empty or has no <|image_pad|>"),
        (no_preprocessor, "cannot read its processor: Can't load image processor"),
        (template_without_key, "cannot read its processor: 'chat_template'"),
        (broken_template, "its chat template is broken: Expected an expression"),
        (no_end, "its tokenizer names no eos_token"),
        (quantized, "its weights are quantized (awq) and cannot be trained"),
        (other_image_token, "image_token_id is 5, but its tokenizer's <|image_pad|> is 266"),
        (text_for_a_number, "cannot read its config.json: Validation error for field 'hidden_si"),
        (tokens_without_rows, "its tokenizer has 288 tokens, but the model only 272"),
    ],
)
def test_a_processor_without_images_is_refused_before_a_model_is_loaded(
    change, message, checkpoints, tmp_path, monkeypatch, capsys
):
    copy = copy_changed(checkpoints, tmp_path, change)
    monkeypatch.setattr(command, "build", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        train.main(["--model", str(copy)])
    assert stop.value.code == 2
    assert message in refusal(capsys)


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_line_at_once(tmp_path):
    """No second attempt and no line of the hub's own. Nothing listens at this address."""
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment = {**os.environ, **settings, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    options = ["--model", "Qwen/Qwen2-VL-2B-Instruct", "--plan", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "--model Qwen/Qwen2-VL-2B-Instruct: is not in the local cache and cannot be re" in line
    assert done.stdout == ""
