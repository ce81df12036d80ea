"""Train a vision-language model with PTD-PO. (arXiv 2606.07000)

GRPO, plus one thing: a response that failed is also scored by the frozen starting model, which reads the same image and question and
a hint; the student, who never reads the hint, is pulled toward it token by token. Sampling, the ratio and the evaluation that counts use
the plain prompt; the hint is read by the teacher in phase 5, and in the row "with the hint" of the table that a run ends with.

    python train.py                                              # embedded tiny Qwen2-VL, built-in puzzles, CPU, minutes
    python train.py --lam 0                                      # the same run as plain GRPO
    python train.py --model Qwen/Qwen2-VL-2B-Instruct            # one GPU
    accelerate launch --num_processes 8 train.py --model ...     # data-parallel

The numbered phases, in `Trainer.rollout` and `Trainer.update`, are the method; the rest is reading and writing.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

from hints import CONTEXTS, Hint, audit_views, hinted_messages, join_hints, screen_hints, teacher_messages
from losses import head_scores, head_scores_bytes, topk_jsd
from ptdpo import PTDPOConfig, Route, count_tokens, group_advantages, option, ptdpo_loss, route
from rollout import (Batch, ImageTextProcessor, Prompt, Rollout, Sample, banned_tokens, collate, encode_images, encode_prompts, load_processor, load_samples,
                     load_verifier, open_image, pick_option, plain_messages, prompt_tokens, quiet_loading, response_states, reward, sample_groups, take_features)
from toy import world

EMBEDDED = str(Path(__file__).resolve().parent / "toy" / "base")
THIS_RUN = "this run"
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


# --------------------------------------------------------------------------------------------------------------- settings
@dataclass
class TrainConfig:
    """The run's settings; the method's own are PTDPOConfig."""
    model: str = option(EMBEDDED, "model, by hub name or path (embedded: toy/base)", shown="toy/base")
    data: str = option("", "questions: a .jsonl file, or a dataset's folder or hub name (pip install datasets)", shown="puzzles")
    eval_data: str = option("", "held-out questions, as --data", shown="held-out puzzles")
    split: str = option("train", "split of a dataset in --data")
    eval_split: str = option("test", "split of a dataset in --eval-data")
    image_dir: str = option("", "folder that image paths are relative to and must be in", shown="the .jsonl's")
    skip_bad: bool = option(False, "leave out what cannot be read, and list it, instead of stopping at the first")
    max_prompt: int = option(8192, "a question with a longer prompt, in tokens, is left out, never cut (paper: 8192)")
    min_pixels: int = option(0, "smallest area of an image, pixels; 0: the model's own")
    max_pixels: int = option(0, "largest area of an image, pixels: 28 * 28 pixels, in Qwen3-VL 32 * 32, are a token; 0: the model's own")
    fog: float = option(0.0, "share of the built-in puzzles that are in fog: there the hinted teacher is right only 2 times in 3")
    hints: str = option("", "hints for --data by id, as hints.py writes them", shown="the data's own")
    max_hint_tokens: int = option(512, "a longer hint is dropped, never cut")
    teacher_context: str = option("hint", "what the teacher reads besides the question; all but hint are for comparison", choices=CONTEXTS)
    audit_hints: bool = option(False, "no training: how often the frozen model is right from hints without the picture, on --eval-questions")
    check: bool = option(False, "no training: is the machinery right for this model and these questions? Run it before any long run")
    plan: int = option(0, "no training: predicted memory of each part on this many GPUs, sharded if more than one", shown="0; 1 if bare", const=1)
    report: str = option("", "also write report.html, a page to look at: questions, hints, responses before and after, token by token; with a "
                         "finished run's folder: only that", shown="no; this run if bare", const=THIS_RUN)
    name: str = option("", "run name: a new folder runs/NAME", shown="date-time")
    steps: int = option(607, "optimizer steps (paper: 2 epochs of 38,870 questions / 128)", toy=250)
    questions: int = option(128, "questions an optimizer step, all processes together (paper: 128)", toy=24)
    updates: int = option(1, "optimizer steps a rollout batch; the paper's 384 questions a rollout are 3")
    group_size: int = option(8, "responses a question, >= 2 (paper: 8)", toy=4)
    max_new_tokens: int = option(4096, "longest response, tokens (paper: 4096)", toy=48)
    temperature: float = option(1.0, "sampling temperature, also in the losses (paper: 1.0)")
    top_p: float = option(1.0, "sample from this much mass (paper: 0.99; 1 keeps scorer and sampler equal)")
    top_k: int = option(0, "sample from this many tokens; 0: all")
    format_weight: float = option(0.1, "share of the reward that is for the format (released recipe: 0.1)")
    format: str = option("boxed", "boxed answer; think: closed thinking, then a boxed answer (released recipe)", choices=("boxed", "think"))
    lr: float = option(1e-6, "AdamW learning rate (paper: 1e-6)", toy=1e-3)
    weight_decay: float = option(0.01, "AdamW weight decay (paper: 0.01)")
    warmup: int = option(10, "steps of linear warm-up, then constant")
    grad_clip: float = option(1.0, "largest gradient norm (paper: 1.0)")
    lora: int = option(0, "rank of LoRA adapters, trained instead of the weights; 0: none (pip install peft)")
    train_vision: bool = option(False, "train the vision tower as well, but under --lora", toy=True)
    micro_tokens: int = option(8192, "tokens in one forward pass, a process: prompts, once for all their responses, responses, padding", toy=4096)
    gradient_checkpointing: bool = option(False, "recompute activations while going back: less memory, but every response runs its prompt again")
    logits_mb: float = option(512, "memory for logits while scoring, MiB, a process: how many tokens meet the output head at once")
    sample_mb: float = option(8192, "memory for the sequences that decode together, MiB, a process")
    generate: str = option("own", "own sampler, or model.generate: slower, and draws depend on batches and processes", choices=("own", "hf"))
    mask_truncated: bool = option(False, "leave responses that reach --max-new-tokens out of the loss")
    verifier: str = option("rules", "rules: ours; math: math-verify, for more LaTeX (pip install math-verify)", choices=("rules", "math"))
    precision: str = option("auto", "no, bf16, or auto: bf16 on a GPU", choices=("auto", "no", "bf16"))
    save_every: int = option(50, "steps between checkpoints; one more is written at SIGTERM and at the end", toy=50)
    keep: int = option(2, "checkpoints kept, the newest")
    resume: str = option("", "go on with the run in this folder, from its newest checkpoint; only --steps may stand beside", shown="a new run")
    log_with: str = option("none", "also send the log to a tracker (pip install tensorboard, or wandb)", choices=("none", "tensorboard", "wandb"))
    eval_every: int = option(50, "steps between evaluations", toy=50)
    eval_questions: int = option(400, "held-out questions an evaluation")
    seed: int = option(0, "seed of questions and sampling, 0 to 399")

    def __post_init__(self):
        least = dict(steps=1, questions=1, updates=1, group_size=2, max_new_tokens=1, warmup=0, micro_tokens=1, top_k=0,
                     eval_every=1, eval_questions=1, max_prompt=1, min_pixels=0, max_pixels=0, lora=0, plan=0, max_hint_tokens=1,
                     save_every=1, keep=1, seed=0, weight_decay=0, format_weight=0, fog=0)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{flag(name)} must be at least {low}, got {getattr(self, name)}")
        for name in ("lr", "temperature", "top_p", "grad_clip", "logits_mb", "sample_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{flag(name)} must be above 0, got {getattr(self, name)}")
        for name, high in (("top_p", 1), ("format_weight", 1), ("fog", 1), ("seed", 399)):
            if getattr(self, name) > high:
                raise ValueError(f"{flag(name)} must be at most {high}, got {getattr(self, name)}")
        for needed, package in ((self.log_with != "none", self.log_with), (self.lora, "peft")):
            if needed and find_spec(package) is None:
                raise ValueError(f"{package} is not installed; python -m pip install {package}")
        if self.name and (Path(self.name).name != self.name or self.name in (".", "..")):
            raise ValueError(f"--name must be a plain folder name, got {self.name!r}")


def flag(name: str) -> str:
    """group_size -> --group-size"""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, instead of every option and then the error."""

    def error(self, message):
        self.exit(2, f"train.py: error: {message}\n")


def parse_args(argv=None) -> tuple[TrainConfig, PTDPOConfig, argparse.ArgumentParser]:
    """The command line. Defaults are for real models; with the embedded one, options that name a toy value use it.

    Bad values end the program with one line and exit code 2.
    """
    parser = Parser(usage="python train.py [options]", formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=125),
                    description=__doc__.partition("\n\n")[0] + " Defaults in [brackets]: real models | embedded one. "
                    "Where no source is named, the choice is ours.")
    kinds = {"int": int, "float": float, "str": str}
    for config in (TrainConfig, PTDPOConfig):
        group = parser.add_argument_group("the method" if config is PTDPOConfig else "the run")
        for f in fields(config):
            toy = f.metadata["toy"]
            shown = f.metadata.get("shown", f.default if toy is None else f"{f.default} | {toy}")
            choices = f.metadata.get("choices")
            if f.type == "bool":
                action = "store_true" if toy is None else argparse.BooleanOptionalAction
                group.add_argument(flag(f.name), action=action, default=None, help=f.metadata["help"] + ("" if toy is None else f" [{shown}]"))
                continue
            bare = {"nargs": "?", "const": f.metadata["const"]} if "const" in f.metadata else {}
            group.add_argument(flag(f.name), type=kinds[f.type], default=None, choices=choices, **bare,
                               metavar="|".join(choices) if choices else f.type.upper(), help=f"{f.metadata['help']} [{shown}]".replace("%", "%%"))
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    old = "resume" if given.get("resume") else "report" if given.get("report", THIS_RUN) != THIS_RUN else None
    if old:
        if more := sorted(set(given) - ({"resume", "steps"} if old == "resume" else {"report"})):
            parser.error(f"{flag(more[0])} cannot stand beside {flag(old)}: the run has its own settings")
        try:
            saved = json.loads((Path(given[old]) / "config.json").read_text())
            given = {**{name: saved[name] for config in (TrainConfig, PTDPOConfig) for name in config.__dataclass_fields__}, **given}
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{flag(old)} {given[old]}: no config.json of a run of this version in it ({type(error).__name__}: {error})")
    toy = "model" not in given or Path(given["model"]).resolve() == Path(EMBEDDED)
    made = []
    for config in (TrainConfig, PTDPOConfig):
        values = {f.name: f.metadata["toy"] for f in fields(config) if toy and f.metadata["toy"] is not None}
        values.update({f.name: given[f.name] for f in fields(config) if f.name in given})
        try:
            made.append(config(**values))
        except ValueError as error:
            parser.error(str(error))
    return *made, parser


# ------------------------------------------------------------------------------------------------------- reading the input
class Questions:
    """Question number i of the run, for ever: a stream of puzzles, or the data shuffled anew each epoch by the seed."""

    def __init__(self, samples: list[Sample] | None, seed: int, fog: float = 0.0):
        self.samples, self.seed, self.fog, self.epoch, self.order = samples, seed, fog, -1, []

    def fingerprint(self) -> str:
        """Changes where the data's ids do."""
        return hashlib.sha256("\n".join(s.id for s in self.samples or ()).encode()).hexdigest()[:16]

    def __getitem__(self, i: int) -> Sample:
        if self.samples is None:
            return world.sample(world.make_puzzle("train", self.seed * 10**6 + i, fog=self.fog))
        epoch, place = divmod(i, len(self.samples))
        if epoch != self.epoch:                 # shuffled once an epoch, not once a question
            self.epoch, self.order = epoch, list(range(len(self.samples)))
            random.Random(f"{self.seed}-{epoch}").shuffle(self.order)
        return self.samples[self.order[place]]


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


# ------------------------------------------------------------------------------------------------------------------ models
class Scorer(torch.nn.Module):
    """A language model as per-token scores. Whatever needs the weights runs inside this forward, so that DDP and FSDP see every use of them."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        # what FSDP shards each by itself. The vision tower is not among them: on a process without images its gathers would be missing
        self._no_split_modules = [name for name in model._no_split_modules if name.endswith("DecoderLayer")]

    @property
    def head(self) -> torch.nn.Linear:
        return self.model.get_output_embeddings()

    def forward(self, batch: Batch | None = None, *, run=None, tutored=None, teacher_states=None, teacher_head=None, **settings):
        """Log-prob, entropy, Top-K JSD of the response tokens, each (B, T) with 0 outside; settings go to losses.head_scores.

        tutored (B,) bool: the rows that teacher_states (their tokens, H) belong to; the JSD is 0 elsewhere, None without a teacher.
        With `run` instead: run(the language model), for whatever else needs its weights.
        """
        if run is not None:
            return run(self.model)
        states, mask = response_states(self.model, batch), batch.mask
        taught = mask & tutored.unsqueeze(1) if teacher_states is not None else torch.zeros_like(mask)
        passes = [(mask & ~taught, None), (taught, teacher_states)][:1 if teacher_states is None else 2]   # each token meets the head once
        out = [torch.zeros(mask.shape, device=mask.device) for _ in range(3)]
        for where, teacher in passes:
            scores = head_scores(states[where], self.head, batch.ids[where], teacher, teacher_head, **settings)
            out = [old if new is None else old.masked_scatter(where, new) for old, new in zip(out, scores)]
        return out[0], out[1], (out[2] if teacher_states is not None else None)


def frozen_tower(cfg: TrainConfig) -> bool:
    """The vision tower is not trained, so that each image goes through it once a rollout, for student and reference alike."""
    return bool(cfg.lora) or not cfg.train_vision


class AdapterOff:
    """The frozen reference of a LoRA run: the student with its adapters switched off."""

    def __init__(self, student: Scorer):
        self.student = student

    @property
    def head(self) -> torch.nn.Linear:
        return self.student.head

    def parameters(self):
        return self.student.parameters()

    def __call__(self, *args, **settings):
        training = self.student.training
        self.student.eval()                     # TRAP: a model that recomputes its activations has no cache while it is in training mode
        self.student.model.disable_adapters()
        try:
            return self.student(*args, **settings)
        finally:
            self.student.model.enable_adapters()
            self.student.train(training)


def build(cfg: TrainConfig, accelerator: Accelerator):
    """Student and frozen reference. What is trained has float32 master weights; the reference takes bf16 where that is used, and is
    sharded as the student will be."""
    half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    sharded = accelerator.distributed_type == DistributedType.FSDP
    student = Scorer(AutoModelForImageTextToText.from_pretrained(cfg.model, dtype=half if cfg.lora else torch.float32))
    model = student.model
    model.model.visual.requires_grad_(not frozen_tower(cfg))
    if cfg.lora:
        if sharded:
            raise ValueError("--lora does not run under FSDP: use one of them")
        from peft import LoraConfig
        inside = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".language_model." in f".{name}"]
        model.add_adapter(LoraConfig(r=cfg.lora, lora_alpha=2 * cfg.lora, target_modules=inside))       # float32 adapters, all else frozen
        reference = AdapterOff(student)
    else:
        reference = Scorer(AutoModelForImageTextToText.from_pretrained(cfg.model, dtype=half)).eval().requires_grad_(False)
    if frozen_tower(cfg):
        for scorer in (student,) if cfg.lora else (student, reference):
            take_features(scorer.model)
    if cfg.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable     # its name up to 5.17
        enable({"use_reentrant": False})
    if sharded:
        # each layer, then the root, which stays whole once it has run: the student's forward reads the reference's head
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for module in [m for m in reference.modules() if type(m).__name__ in reference._no_split_modules]:
            fully_shard(module, mesh=mesh)
        fully_shard(reference, mesh=mesh, reshard_after_forward=False)
        return student, reference
    student.to(accelerator.device)
    return student, reference if cfg.lora else reference.to(accelerator.device)


@contextlib.contextmanager
def gathered(scorer: Scorer):
    """Within scorer's forward: the weights whole until the end, gathered once instead of once a token. Nothing to do where nothing is sharded."""
    shards = [m for m in scorer.modules() if isinstance(m, FSDPModule)]
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in shards[1:]:               # the root is the first, and stays as it is until its own forward ends
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def plan(cfg: TrainConfig, method: PTDPOConfig, gpus: int, bf16: bool) -> dict[str, float]:
    """Memory a GPU in GiB, by part, and "peak": from the config alone, nothing is loaded.

    Parameters are counted on the meta device. Activations: 30 H + 8 I + 4 KV + 8 bytes a token and layer in bf16, 32 H + 16 I + 8 KV + 8 in
    float32 (hidden, intermediate and key-value sizes), as counted from the tensors that transformers 5.23's Qwen2-VL layers save for
    backward; 4 H and one layer's all when they are recomputed. Not in it: the allocator's own waste, attention masks, the vision tower's pass.
    """
    config = AutoConfig.from_pretrained(cfg.model)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text, half = config.text_config, 2 if bf16 else 4
    every, tower = (sum(p.numel() for p in part.parameters()) for part in (model, model.model.visual))
    layer = sum(p.numel() for p in model.model.language_model.layers[0].parameters())
    inside = [m for m in model.model.language_model.modules() if isinstance(m, torch.nn.Linear)]
    trained = sum(cfg.lora * (m.in_features + m.out_features) for m in inside) if cfg.lora else every - (0 if cfg.train_vision else tower)
    kv = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    a, b, c = (30, 8, 4) if bf16 else (32, 16, 8)
    token = a * text.hidden_size + b * text.intermediate_size + c * kv + 8
    copies = 0 if not bf16 or cfg.lora else 2 * (every - layer * (text.num_hidden_layers - 2) if gpus > 1 else every)
    head = head_scores_bytes(cfg.micro_tokens, text.hidden_size, text.vocab_size, k=method.k, logits_mb=cfg.logits_mb,
                             dtype=torch.bfloat16 if bf16 else torch.float32, train_head=not cfg.lora)
    layers = (4 * text.hidden_size * text.num_hidden_layers + token) if cfg.gradient_checkpointing else token * text.num_hidden_layers
    parts = {"weights": (half * every + 4 * trained if cfg.lora else 4 * every) / gpus, "AdamW": 8 * trained / gpus,
             "reference": 0 if cfg.lora else half * every / gpus, "gradients": 4 * trained / gpus, "bf16 copies": copies,
             "activations": cfg.micro_tokens * layers, "logits, head": head}
    standing = parts["weights"] + parts["AdamW"] + parts["reference"]
    parts["caches, sampling"] = cfg.sample_mb * 2**20 + (half * every if gpus > 1 else copies)
    parts["peak"] = max(sum(parts.values()) - parts["caches, sampling"], standing + parts["caches, sampling"])
    return {name: size / 2**30 for name, size in parts.items()}


def plan_table(parts: dict[str, float], gpus: int) -> str:
    """`plan` for reading."""
    lines = [f"{name:20s}{size:8.1f} GiB" for name, size in parts.items() if name != "peak"]
    return "\n".join([f"predicted memory, each of {gpus} GPU{'s, sharded' if gpus > 1 else ''}:", *lines,
                      f"{'peak':20s}{parts['peak']:8.1f} GiB: while updating, or weights, AdamW and reference with the caches while sampling"])


# ------------------------------------------------------------------------------------------------------------------- step
@dataclass
class Work:
    """One response on its way through an optimizer step. used False (a truncated one, with --mask-truncated): in no loss."""
    rollout: Rollout
    prompt: Prompt
    hinted: Prompt | None
    advantage: float
    tutored: bool
    kl: bool
    used: bool = True
    old_logp: torch.Tensor | None = None


class Trainer:
    """What one process holds during a run; `rollout` and `update` are the method."""

    def __init__(self, cfg, method, accelerator, processor, student, reference):
        self.cfg, self.method, self.accelerator, self.processor, self.reference = cfg, method, accelerator, processor, reference
        self.policy, self.sharded = student.model, accelerator.distributed_type == DistributedType.FSDP
        trained = [p for p in student.parameters() if p.requires_grad]
        decay, rest = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}],
                                      lr=cfg.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / max(1, cfg.warmup)))
        self.student, self.optimizer = accelerator.prepare(student, optimizer)
        accelerator.register_for_checkpointing(self.schedule)
        banned = torch.tensor(banned_tokens(self.policy, processor.tokenizer), device=accelerator.device)
        self.settings = dict(temperature=cfg.temperature, banned=banned, logits_mb=cfg.logits_mb)
        self.verify = load_verifier(cfg.verifier)
        self.sampling = dict(max_new_tokens=cfg.max_new_tokens, sample_mb=cfg.sample_mb, generate=cfg.generate)
        self.skipped = 0

    def sample(self, samples: list[Sample], prompts: list[Prompt], group_size: int, **settings) -> list[list[Rollout]]:
        """sample_groups with the student."""
        def run(model):
            with gathered(self.student):
                if frozen_tower(self.cfg):
                    encode_images(model, prompts)
                return sample_groups(model, self.processor, samples, prompts, group_size, **self.sampling, **settings)
        with torch.no_grad(), self.accelerator.autocast():
            return self.student(run=run) if self.sharded else run(self.policy)

    def rollout(self, samples: list[Sample], keys: list[str] | None = None) -> tuple[list[list[Work]], dict]:
        """Phases 1 to 4 for this process's questions: -> one list of Work a question, and what the log says of them.

        keys: one a question, what its draws are seeded with (default: the samples' ids).
        """
        cfg, method = self.cfg, self.method
        # 1 read
        prompts = encode_prompts(self.processor, samples, [plain_messages(s) for s in samples])
        # 2 sample: the student acts on the plain prompt
        groups = self.sample(samples, prompts, cfg.group_size, keys=keys, temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k)
        # 3 verify
        for rollout in (r for group in groups for r in group):
            rollout.correct = self.verify(rollout.text, rollout.sample.answer, rollout.sample.choices)
            rollout.reward = reward(rollout.text, rollout.correct, cfg.format_weight, think=cfg.format == "think")
        rewards = torch.tensor([[r.reward for r in group] for group in groups])                     # (N, G)
        correct = torch.tensor([[r.correct for r in group] for group in groups])                    # (N, G)
        # 4 route
        contexts = [teacher_messages(s, cfg.teacher_context) for s in samples]
        routes = route(correct, torch.tensor([c is not None for c in contexts]), method.tau, method.lam)
        advantages = group_advantages(rewards)
        work = []
        for n, (sample, prompt, group) in enumerate(zip(samples, prompts, groups)):
            hinted = encode_prompts(self.processor, [sample], [contexts[n]])[0] if routes.tutored[n].any() else None
            if hinted and hinted.pixels is not None:
                hinted.pixels = prompt.pixels           # the same images; where the tower is frozen, their features
            used = [not (cfg.mask_truncated and r.truncated) for r in group]
            work.append([Work(r, prompt, hinted, advantages[n, g].item(), routes.tutored[n, g].item() and used[g],
                              routes.kl[n, g].item() and used[g], used[g]) for g, r in enumerate(group)])
        if cfg.updates > 1:                     # with one update a batch the sampling policy is the current one: ratio 1
            flat = [w for group in work for w in group]
            self.student.eval()                 # without gradient, so with a cache: see AdapterOff
            for batch in self._micro_batches(flat):
                with torch.no_grad():
                    logp = self.student(self._collate(batch, [w.prompt for w in batch]), **self.settings)[0]
                for w, row in zip(batch, logp):
                    w.old_logp = row[:len(w.rollout.ids)]
        every = [r for group in groups for r in group]
        sums = {"reward": rewards.sum(), "accuracy": correct.sum(), "all_failed": (~correct).all(1).sum() * cfg.group_size,
                "all_correct": correct.all(1).sum() * cfg.group_size, "tutored": routes.tutored.sum(), "untaught": contexts.count(None) * cfg.group_size,
                "length": sum(len(r.ids) for r in every), "truncated": sum(r.truncated for r in every)}
        return work, {name: float(value) / len(every) for name, value in sums.items()}

    def _micro_batches(self, work: list[Work]):
        # a question's responses together, so that its prompt runs once, and tutored ones together; like lengths near: less padding
        work = sorted(work, key=lambda w: (len(w.prompt.ids), w.rollout.sample.id, not w.tutored))
        batches = []
        for w in work:
            if batches and self._tokens([*batches[-1], w]) <= self.cfg.micro_tokens:
                batches[-1].append(w)
            else:
                batches.append([w])             # one that is larger than the budget goes alone
        if self.sharded:                        # as many forwards on every process: a response that is in no loss, again and again
            [most] = self._largest(len(batches))
            batches += [[replace(work[0], used=False, tutored=False, kl=False)]] * (most - len(batches))
        return batches

    def _tokens(self, work: list[Work]) -> int:
        """Tokens of one micro-batch, padding included, in the larger of the student's and the teacher's pass."""
        prompts = len(work) if self.cfg.gradient_checkpointing else len({id(w.prompt) for w in work})
        return prompts * max(len(p.ids) for w in work for p in (w.prompt, w.hinted) if p) + len(work) * max(len(w.rollout.ids) for w in work)

    def _largest(self, *numbers: float) -> list[float]:
        """Each number's largest value over all processes."""
        return self.accelerator.gather(torch.tensor([numbers], device=self.accelerator.device)).amax(0).tolist()

    def _collate(self, work: list[Work], prompts: list[Prompt], apart: bool = False) -> Batch:
        return collate(prompts, [w.rollout.ids for w in work], self.processor.tokenizer.pad_token_id, self.accelerator.device, apart)

    def accumulate(self, work: list[Work]) -> dict:
        """Phase 5: the gradient of one optimizer step, over micro-batches and processes. Returns the step's loss parts."""
        accelerator = self.accelerator
        tutored, kl = torch.tensor([w.tutored for w in work]), torch.tensor([w.kl for w in work])
        lengths = torch.tensor([len(w.rollout.ids) * w.used for w in work])
        counts = accelerator.reduce(count_tokens(lengths, Route(tutored, kl)).to(accelerator.device))
        names, worst = ("policy_loss", "tutor_loss", "kl", "entropy"), torch.zeros(2, device=accelerator.device)
        sums = torch.zeros(len(names), dtype=torch.float64, device=accelerator.device)
        self.student.train()
        batches = self._micro_batches(work)
        for i, batch in enumerate(batches):
            # one sum over processes, at the end; sharded, gradients that wait for it would be whole ones
            with contextlib.nullcontext() if self.sharded or i == len(batches) - 1 else accelerator.no_sync(self.student):
                loss, parts = self.loss(batch, counts)
                # gradients are averaged over processes, and the denominators are already global: undo the average
                accelerator.backward(loss * accelerator.num_processes)
            worst = torch.maximum(worst, parts["worst"])
            sums += torch.stack([parts.get(name, loss.new_zeros(())).double() for name in names])
        ratio, gap = self._largest(*worst.tolist())
        return {**dict(zip(names, accelerator.reduce(sums).tolist())), "ratio_max": ratio, "sampler_gap": gap}

    def update(self, work: list[Work]) -> dict:
        """Phases 5 and 6: accumulate, then step unless the gradient is not finite."""
        # 5 accumulate
        parts = self.accumulate(work)
        # 6 step
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), self.cfg.grad_clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if torch.isfinite(norm):
            self.optimizer.step()
            self.schedule.step()
        else:
            self.skipped += 1                   # counted, logged and reported at the end, never silent
        self.optimizer.zero_grad()
        return {**parts, "grad_norm": float(norm), "skipped_steps": self.skipped}

    def loss(self, batch: list[Work], counts: torch.Tensor):
        """This micro-batch's share of the step's loss, and its parts: shares as well, but `worst`: the largest |ratio - 1|, and the largest difference
        between the scorer's and the sampler's log-probs of a token at the time of sampling (0 from model.generate, which gives none)."""
        device, method = self.accelerator.device, self.method
        tutored, kl = (torch.tensor([getattr(w, name) for w in batch], device=device) for name in ("tutored", "kl"))
        taught, penalised = [w for w in batch if w.tutored], [w for w in batch if w.kl]
        student_batch = self._collate(batch, [w.prompt for w in batch], apart=self.cfg.gradient_checkpointing)
        student_batch.mask &= torch.tensor([w.used for w in batch], device=device).unsqueeze(1)
        mask, teacher, ref_logp = student_batch.mask, {}, None
        teach, penalise = self._largest(len(taught), len(penalised)) if self.sharded else (taught, penalised)
        with torch.no_grad(), self.accelerator.autocast():
            if teach:                           # the teacher: same image, same question, plus the hint; scores, never writes
                hinted = self._collate(taught or batch[:1], [w.hinted or w.prompt for w in taught or batch[:1]])
                states = self.reference(run=lambda model: response_states(model, hinted))[hinted.mask]
                if taught:
                    teacher = dict(tutored=tutored, teacher_states=states, teacher_head=self.reference.head, k=method.k,
                                   divergence=method.divergence, support=method.support)
            if penalise and method.beta_kl:     # the reference without the hint
                plain = self._collate(penalised or batch[:1], [w.prompt for w in penalised or batch[:1]])
                scores = self.reference(plain, **self.settings)[0]
                if penalised:
                    ref_logp = torch.zeros(mask.shape, device=device).masked_scatter(mask & kl.unsqueeze(1), scores[plain.mask])
        logp, entropy, jsd = self.student(student_batch, **teacher, **self.settings)
        old = logp.detach()
        if batch[0].old_logp is not None:
            old = old.masked_scatter(mask, torch.cat([w.old_logp for w in batch if w.used]))
        advantages = torch.tensor([w.advantage for w in batch], device=device)
        loss, parts = ptdpo_loss(method, logp, old, advantages, mask, counts, jsd, tutored, ref_logp, kl, longest=self.cfg.max_new_tokens)
        parts["entropy"] = entropy.sum() / counts[0]
        sampler = old
        if batch[0].rollout.logp is not None:
            drawn = torch.tensor([x for w in batch if w.used for x in w.rollout.logp], device=device)
            sampler = old.masked_scatter(mask, drawn)
        parts["worst"] = torch.stack([(torch.exp(logp.detach() - old) - 1).abs().max(), (old - sampler).abs().max()])
        return loss, parts


# -------------------------------------------------------------------------------------------------------------- evaluation
def evaluate(trainer: Trainer, samples: list[Sample], messages=plain_messages) -> dict:
    """Greedy accuracy and mean length over all processes, and the ids of what was right. messages: plain_messages (the measure) or
    hinted_messages (the teacher's view)."""
    accelerator = trainer.accelerator
    mine = [s for s in samples if messages is plain_messages or s.hint][accelerator.process_index::accelerator.num_processes]
    prompts = encode_prompts(trainer.processor, mine, [messages(s) for s in mine])
    groups = trainer.sample(mine, prompts, 1, temperature=0.0)
    right = [trainer.verify(g[0].text, s.answer, s.choices) for s, g in zip(mine, groups)]
    total = accelerator.reduce(torch.tensor([sum(right), sum(len(g[0].ids) for g in groups), len(mine)], dtype=torch.float64,
                                            device=accelerator.device)).tolist()
    return {"accuracy": total[0] / max(1, total[2]), "length": total[1] / max(1, total[2]), "questions": int(total[2]),
            "right": gather_object([s.id for s, fine in zip(mine, right) if fine])}


def audit(trainer: Trainer, questions: Questions) -> str:
    """How often the frozen model finds the answer from what a hint says, with the picture and without it, as a table.

    A hint set leaks where, without the picture, more questions are right with their own hint than with that of another question, alike
    where there is one, by more than two standard errors of the difference (McNemar's test).
    """
    count = min(trainer.cfg.eval_questions, len(questions.samples or range(10**9)))
    samples = sorted((s for s in (questions[i] for i in range(count)) if s.hint), key=lambda s: s.question)
    if len(samples) < 2:
        return f"{len(samples)} of {count} questions have a hint: nothing to audit"
    views = [audit_views(s, other.hint) for s, other in zip(samples, samples[1:] + samples[:1])]
    right, lines = {}, [f"{'what the frozen model reads':30s}{'right':>7s}   of {len(samples)}"]
    for name in views[0]:
        right[name] = set(evaluate(trainer, [view[name][0] for view in views], views[0][name][1])["right"])
        lines.append(f"{name:30s}{100 * len(right[name]) / len(samples):7.1f} %")
    for own, placebo in (("question + hint", "question + another's hint"), ("hint", "another's hint")):
        more, less = right[own] - right[placebo], right[placebo] - right[own]
        leaks = len(more) - len(less) > 2 * (len(more) + len(less)) ** 0.5
        lines.append(f"{'LEAK' if leaks else 'no leak seen'}: without the picture, '{own}' alone is right {len(more)} times, '{placebo}' alone {len(less)} times"
                     + (f"; first: {', '.join(sorted(more)[:5])}" if leaks else ""))
    return "\n".join(lines)


def check(trainer: Trainer, questions: Questions) -> tuple[bool, str]:
    """What goes wrong silently, looked for on the user's own model and data before a long run: -> all fine?, the table.

    Samples four questions, scores them in every way that training does, and grades gold answers against themselves.
    """
    cfg, accelerator, method = trainer.cfg, trainer.accelerator, trainer.method
    exact, rows = accelerator.mixed_precision == "no", []

    def expect(name: str, fine: bool, seen: str, advice: str) -> None:
        rows.append(f"{'ok  ' if fine else 'FAIL'} {name}: {seen}" + ("" if fine else f"\n     -> {advice}"))
    some = [questions[i] for i in range(min(200, len(questions.samples or range(200))))]
    taught = [s for s in some if teacher_messages(s, cfg.teacher_context) is not None][:4]
    if not taught:
        return False, f"FAIL hints: none of the first {len(some)} questions has a {cfg.teacher_context}\n     -> build hints with hints.py; without any, PTD-PO is GRPO"
    groups, row = trainer.rollout(taught)
    work = [group[0] for group in groups]                   # one response a question is scored: a micro-batch
    contexts, plain = [teacher_messages(s, cfg.teacher_context) for s in taught], trainer._collate(work, [w.prompt for w in work])
    grey = [replace(s, images=[Image.new("RGB", open_image(i).size, "grey") for i in s.images]) for s in taught]
    views = {name: encode_prompts(trainer.processor, samples, chats) for name, samples, chats in
             (("hint", taught, contexts), ("nothing", taught, [plain_messages(s) for s in taught]), ("grey", grey, contexts))}
    with torch.no_grad(), accelerator.autocast():
        states = {name: trainer.reference(run=lambda model, b=trainer._collate(work, prompts): response_states(model, b))[plain.mask] for name, prompts in views.items()}
        head = trainer.reference.head
        moved = {name: head_scores(states[name], head, plain.ids[plain.mask], states["hint"], head, k=method.k, **trainer.settings)[2].mean().item()
                 for name in ("nothing", "grey")}
        together = trainer.student(plain, **trainer.settings)[0]
        alone = [trainer.student(trainer._collate([w], [w.prompt]), **trainer.settings)[0][0] for w in work]
    trainer.student.train()
    learning = trainer._collate(work, [w.prompt for w in work], apart=cfg.gradient_checkpointing)
    logp, _, jsd = trainer.student(learning, tutored=torch.ones_like(plain.rows, dtype=torch.bool), teacher_states=states["hint"], teacher_head=head, k=method.k,
                                   **trainer.settings)
    ratio = (logp.detach() - together).exp().sub(1).abs().max().item()
    expect("the ratio is 1 on the first pass", ratio < (1e-4 if exact else 1e-2), f"largest |ratio - 1| {ratio:.1e}",
           "two passes over the same tokens differ: is there dropout in the model's config, or a kernel that is not deterministic?")
    drawn = [max(abs(a - b) for a, b in zip(together[i].tolist(), w.rollout.logp)) for i, w in enumerate(work) if w.rollout.logp]
    expect("the scorer agrees with the sampler", max(drawn, default=0) < (1e-3 if exact else 1.0), f"largest difference of a log-prob {max(drawn, default=0):.1e}",
           "positions or masks differ between decoding and scoring; try --generate hf, and report the model's class")
    gap = max((a - b[:len(a)]).abs().max().item() for a, b in zip(alone, together))
    expect("padding changes nothing", gap < (1e-3 if exact else 0.5), f"largest difference of a log-prob, padded and alone, {gap:.1e}",
           "the model reads its padding; report the model's class")
    accelerator.backward(jsd.sum() / plain.mask.sum())
    norm = torch.stack([p.grad.norm() for p in trainer.student.parameters() if p.grad is not None]).norm().item()
    trainer.optimizer.zero_grad()
    expect("tutoring has a gradient", norm > 1e-8, f"norm {norm:.1e}", "the teacher's distribution is the student's own, or nothing is trainable: see the two lines below")
    expect(f"the {cfg.teacher_context} changes the teacher's distribution", moved["nothing"] > 1e-5, f"mean divergence with and without it {moved['nothing']:.1e}",
           "the hint is not read: does the chat template drop it? Or it says nothing new")
    pictured = any(s.images for s in taught)
    expect("the image changes the teacher's distribution", not pictured or moved["grey"] > 1e-6, f"mean divergence to a grey one {moved['grey']:.1e}" if pictured else "no images here",
           "the teacher does not see the image: check the column 'images' and the processor")
    marks = torch.stack([torch.stack([p.detach().double().sum(), p.detach().double().abs().sum()]) for p in trainer.reference.parameters()]).sum(0)
    everywhere = accelerator.gather(marks.unsqueeze(0))
    expect("the reference is the same on every process", bool((everywhere == everywhere[0]).all()), f"{len(everywhere)} checksums", "the processes loaded different weights: is the model folder the same for all?")
    unread = [s.id for s in some if not trainer.verify(f"\\boxed{{{s.answer}}}", s.answer, s.choices) or s.choices and pick_option(s.answer, s.choices) is None]
    expect("gold answers verify against themselves", not unread, f"{len(some) - len(unread)} of {len(some)}, {sum(bool(s.choices) for s in some)} with options" + (f"; first that does not: {unread[0]}" if unread else ""),
           "such an answer can never be rewarded: a gold answer that is no option, is too long, or needs --verifier math")
    cut, count = row["truncated"], len(taught) * cfg.group_size
    expect("responses end before the limit", cut <= 0.25, f"{100 * cut:.0f} % of {count} cut off at --max-new-tokens {cfg.max_new_tokens}", "raise --max-new-tokens, or --mask-truncated")
    rows.append(f"     sampled: {100 * row['accuracy']:.0f} % right, {100 * row['all_failed']:.0f} % in groups that all failed, {row['length']:.0f} tokens long")
    return not any(line.startswith("FAIL") for line in rows), "\n".join(rows)


# --------------------------------------------------------------------------------------------------------------------- run
class RunFolder:
    """runs/NAME/: config.json, metrics.jsonl (one line a step), samples.jsonl, checkpoints/, model/. Only the main process writes.

    step: the one a resumed run goes on from; what was logged after it is cut off, as it will be done again.
    """

    def __init__(self, path: Path, config: dict, active: bool, step: int | None = None):
        self.path, self.active = path, active
        if active and step is None:
            path.mkdir(parents=True)
        if active:
            write_beside(path / "config.json", json.dumps({**config, "resume": ""}, indent=2) + "\n")
        for log in (path / "metrics.jsonl", path / "samples.jsonl") if active and step is not None else ():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            write_beside(log, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))

    def append(self, name: str, row: dict) -> None:
        if self.active:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def save_model(self, trainer: Trainer) -> None:
        """The student's weights, or its LoRA adapters alone. Written beside and renamed: model/ is there whole or not at all."""
        trainer.accelerator.wait_for_everyone()
        weights = None if trainer.cfg.lora else trainer.accelerator.get_state_dict(trainer.student)
        if self.active:
            part = self.path / "model.part"
            shutil.rmtree(part, ignore_errors=True)
            trainer.policy.save_pretrained(part, state_dict=weights and {name.removeprefix("model."): value for name, value in weights.items()})
            trainer.processor.save_pretrained(part)
            shutil.rmtree(self.path / "model", ignore_errors=True)
            os.rename(part, self.path / "model")


def write_beside(path: Path, text: str) -> None:
    """Replace a file at once: it holds the old text or the new, never half of one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class Checkpoints:
    """runs/NAME/checkpoints/step-N: weights, optimizer, schedule and random states, as accelerate writes them, and state.json: step,
    what the final table needs, the data's fingerprint, and every file's size. Written beside and renamed."""

    def __init__(self, accelerator: Accelerator, folder: Path, keep: int):
        self.accelerator, self.folder, self.keep = accelerator, folder / "checkpoints", keep

    def found(self) -> list[Path]:
        """The finished ones, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.suffix != ".part")

    def save(self, state: dict) -> None:
        """After a whole rollout batch. A full disk ends the run with a message; the checkpoints before are untouched."""
        accelerator, target = self.accelerator, self.folder / f"step-{state['step']:08d}"
        part = target.with_suffix(".part")
        accelerator.wait_for_everyone()
        try:
            if accelerator.is_main_process:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(part))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                sizes = {str(p.relative_to(part)): p.stat().st_size for p in sorted(part.rglob("*")) if p.is_file()}
                (part / "state.json").write_text(json.dumps({**state, "files": sizes}))
                os.rename(part, target)
                for old in self.found()[:-self.keep]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError) as error:            # torch.save tells of a full disk by a RuntimeError
            shutil.rmtree(part, ignore_errors=True)
            last = self.found()
            sys.exit(f"cannot write the checkpoint {target}: {error}\n" + (f"the last good one is {last[-1]}" if last else "there is none before it"))

    def newest(self, questions: Questions, cfg: TrainConfig) -> tuple[Path, dict]:
        """The newest checkpoint and its state. Raises ValueError where there is none, where it is not whole, and where the run cannot go on from it."""
        if not self.found():
            raise ValueError(f"--resume: no checkpoint in {self.folder}")
        path = self.found()[-1]
        try:
            state = json.loads((path / "state.json").read_text())
            short = [name for name, size in state["files"].items() if not (path / name).is_file() or (path / name).stat().st_size != size]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--resume: {path} is not a checkpoint of ptdpo ({type(error).__name__}: {error})") from None
        if short:
            raise ValueError(f"--resume: {path} is not whole: {short[0]} is missing or has another size; remove the folder to go on from the one before")
        if state["data"] != questions.fingerprint():
            raise ValueError(f"--resume: the questions in {cfg.data} are not those that {path} was trained on")
        if state["step"] >= cfg.steps:
            raise ValueError(f"--resume: {path} has done all {cfg.steps} steps; give a larger --steps to go on")
        return path, state


def sample_row(step: int, group: list[Work]) -> dict:
    """One question of a step for samples.jsonl."""
    sample = group[0].rollout.sample
    return {"step": step, "id": sample.id, "question": sample.question, "answer": sample.answer,
            "hint": sample.hint and asdict(sample.hint),
            "responses": [{"text": w.rollout.text, "correct": w.rollout.correct, "reward": round(w.rollout.reward, 4),
                           "tutored": w.tutored, "truncated": w.rollout.truncated} for w in group]}


def train(trainer: Trainer, questions: Questions, held_out: list[Sample], folder: RunFolder, checkpoints: Checkpoints, state: dict | None) -> dict:
    """All steps with evaluations before, during and after: -> {"before": ..., "after": ...} for the table. state: of the checkpoint that
    a resumed run goes on from."""
    cfg, accelerator = trainer.cfg, trainer.accelerator
    rank, world_size = accelerator.process_index, accelerator.num_processes

    def both():
        plain, hinted = evaluate(trainer, held_out), evaluate(trainer, held_out, hinted_messages)
        return {"plain": plain["accuracy"], "hinted": hinted["accuracy"], "length": plain["length"], "questions": plain["questions"]}

    stopping, began = [], time.time()
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    if state is None:
        state = {"step": 0, "before": both(), "entropies": [], "seconds": 0.0, "skipped": 0, "data": questions.fingerprint()}
        folder.append("metrics.jsonl", {"step": 0, "eval_plain": state["before"]["plain"], "eval_hinted": state["before"]["hinted"]})
    trainer.skipped, entropies, before, work = state["skipped"], state["entropies"], state["before"], []
    bar = tqdm(range(state["step"] + 1, cfg.steps + 1), initial=state["step"], total=cfg.steps, disable=not accelerator.is_main_process, unit="step", dynamic_ncols=True)
    for step in bar:
        start = time.time()
        if not work:
            first, per = (step - 1) * cfg.questions, cfg.questions // world_size
            updates = min(cfg.updates, cfg.steps + 1 - step)        # the last rollout batch is for the steps that are left, so the run ends on a checkpoint
            indices = range(first + rank, first + cfg.questions * updates, world_size)
            work, row = trainer.rollout([questions[i] for i in indices], [f"{cfg.seed}-{i}" for i in indices])
            folder.append("samples.jsonl", sample_row(step, work[0]))
        sampled = time.time()
        losses = trainer.update([w for group in work[:per] for w in group])
        work = work[per:]
        # 7 log and save
        shared = accelerator.reduce(torch.tensor(list(row.values()), dtype=torch.float64, device=accelerator.device), "mean").tolist()
        metrics = {"step": step, **dict(zip(row, shared)), **losses, "lr": trainer.schedule.get_last_lr()[0],
                   "sample_seconds": sampled - start, "update_seconds": time.time() - sampled}
        entropies.append(metrics["entropy"])
        if step % cfg.eval_every == 0 and step < cfg.steps:
            metrics["eval_plain"] = evaluate(trainer, held_out)["accuracy"]
            bar.write(f"step {step}: {100 * metrics['eval_plain']:.1f} % of the held-out questions right, plain prompt")
        elif step == cfg.steps:
            after = both()
            metrics.update(eval_plain=after["plain"], eval_hinted=after["hinted"])
        folder.append("metrics.jsonl", metrics)
        accelerator.log({name: value for name, value in metrics.items() if name != "step"}, step=step)
        bar.set_postfix_str(f"reward {metrics['reward']:.2f} acc {metrics['accuracy']:.2f} entropy {metrics['entropy']:.2f} "
                            f"all-failed {metrics['all_failed']:.2f} tutor {metrics['tutor_loss']:.3f}")
        [asked] = trainer._largest(len(stopping))               # all stop, or none
        if not work and (step - state["step"] >= cfg.save_every or asked or step == cfg.steps):
            state = {**state, "step": step, "entropies": entropies, "skipped": trainer.skipped, "seconds": state["seconds"] + time.time() - began}
            began = time.time()
            checkpoints.save(state)
            if asked and step < cfg.steps:
                bar.close()
                accelerator.print(f"stopped by SIGTERM after step {step}; go on with: python train.py --resume {folder.path}")
                accelerator.end_training()
                sys.exit(143)
    return {"before": {**before, "entropy": entropies[0]}, "after": {**after, "entropy": entropies[-1]}, "seconds": state["seconds"]}


def report(table: dict, folder: RunFolder, trainer: Trainer) -> None:
    """The table that a run ends with, and on a GPU the memory it took."""
    before, after = table["before"], table["after"]
    print(f"\n{'':30s}{'before':>9s}{'after':>9s}")
    for label, key, scale, unit in (("accuracy, plain prompt", "plain", 100, "%"), ("accuracy, with the hint", "hinted", 100, "%"),
                                    ("entropy, nats a token", "entropy", 1, ""), ("response length, tokens", "length", 1, "")):
        digits = 2 if key == "entropy" else 1
        print(f"{label:30s}{scale * before[key]:9.{digits}f}{scale * after[key]:9.{digits}f} {unit}")
    print(f"({before['questions']} held-out questions, greedy; entropy of the sampled responses, first and last step; "
          f"{table['seconds'] / 60:.1f} minutes; {trainer.skipped} steps skipped for a non-finite gradient)")
    print(f"\nwritten to {folder.path}/: config.json, metrics.jsonl, samples.jsonl, checkpoints/, model/. Load the model with\n"
          f"  AutoModelForImageTextToText.from_pretrained(\"{folder.path}/model\")   # the processor: rollout.load_processor")
    if torch.cuda.is_available():
        gpus = trainer.accelerator.num_processes if trainer.sharded else 1
        print(f"peak memory of this process: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB; predicted (--plan): "
              f"{plan(trainer.cfg, trainer.method, gpus, trainer.accelerator.mixed_precision == 'bf16')['peak']:.1f}")


# --------------------------------------------------------------------------------------------------------- a page to look at
@torch.no_grad()
def explain(model, reference, processor, cfg: TrainConfig, method: PTDPOConfig, sample: Sample, count: int = 4, most: int = 1000) -> list[dict]:
    """`count` responses of `model` to the plain prompt, as the page shows them: verdict, and for each of the first `most` tokens its text, its
    divergence from the teacher (the reference with the hint), and the five tokens that student and teacher found likeliest there."""
    context = teacher_messages(sample, cfg.teacher_context)
    chats = [plain_messages(sample)] + [context] * (context is not None)
    prompts = encode_prompts(processor, [sample] * len(chats), chats)
    [group] = sample_groups(model, processor, [sample], prompts[:1], count, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                            top_p=cfg.top_p, top_k=cfg.top_k, sample_mb=cfg.sample_mb)
    tokenizer, verify = processor.tokenizer, load_verifier(cfg.verifier)
    banned = torch.tensor(banned_tokens(model, tokenizer), device=model.device)

    def likeliest(logits):
        top = (logits / cfg.temperature).softmax(-1).topk(min(5, logits.shape[-1]), dim=-1)
        return [[[tokenizer.decode([i]), round(p, 5)] for p, i in zip(*row)] for row in zip(top.values.tolist(), top.indices.tolist())]
    shown = []
    for rollout in group:
        ids, tokens = rollout.ids[:most], []
        states = [(m, response_states(m, collate([prompt], [ids], tokenizer.pad_token_id, m.device))[0]) for m, prompt in zip((model, reference), prompts)]
        for a in range(0, len(ids), 256):               # (256, V) logits at a time
            logits = [m.get_output_embeddings()(x[a:a + 256]).float().index_fill_(-1, banned, float("-inf")) for m, x in states]
            d = topk_jsd(*logits, method.k, cfg.temperature, divergence=method.divergence, support=method.support).tolist() if context else None
            tops = [likeliest(x) for x in logits]
            for i in range(len(logits[0])):
                # what the token adds to the text: a token alone may be part of a character, or lack its space
                near, end = max(0, a + i - 8), a + i
                text = tokenizer.decode(ids[near:end + 1])[len(tokenizer.decode(ids[near:end])):]
                tokens.append([text, round(d[i], 5) if d else 0, tops[0][i], tops[1][i] if d else None])
        shown.append({"correct": verify(rollout.text, sample.answer, sample.choices), "truncated": rollout.truncated,
                      "more": len(rollout.ids) - len(ids), "tokens": tokens})
    return shown


def write_page(run: Path, cfg: TrainConfig, method: PTDPOConfig, held_out: list[Sample], processor, count: int = 6) -> Path:
    """runs/NAME/report.html from a finished run: its first `count` held-out questions, those with a hint first. One file, no network; what comes
    from the data stands in it as JSON without any "<", and the page never reads it as HTML."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" and cfg.precision != "no" else torch.float32
    reference, student = (AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device).eval() for path in (cfg.model, str(run / "model")))
    questions = []
    for sample in tqdm(sorted(held_out, key=lambda s: s.hint is None)[:count], unit="question", desc="report", dynamic_ncols=True):
        images = []
        for n, image in enumerate(map(open_image, sample.images)):
            (width, height), small, file = image.size, image.copy(), io.BytesIO()
            small.thumbnail((448, 448))
            small.save(file, "PNG")
            boxes = sample.boxes[n] if sample.hint and sample.boxes else []
            images.append({"src": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), "width": max(224, small.width),
                           "boxes": [[left / width, top / height, right / width, bottom / height] for left, top, right, bottom in boxes]})
        before, after = (explain(model, reference, processor, cfg, method, sample) for model in (reference, student))
        questions.append({"id": sample.id, "family": sample.family, "question": sample.question, "answer": sample.answer, "images": images,
                          "hint": sample.hint and asdict(sample.hint), "before": before, "after": after})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    plain = [row["eval_plain"] for row in rows if "eval_plain" in row]
    settings = (f"{'toy/base' if cfg.model == EMBEDDED else cfg.model}; {rows[-1]['step']} steps; lam {method.lam}, tau {method.tau}, K {method.k}, lr {cfg.lr}. Held-out questions, plain prompt, greedy: "
                f"{100 * plain[0]:.1f} % right before, {100 * plain[-1]:.1f} % after. Below: the first {len(questions)} of them, sampled at temperature {cfg.temperature}.")
    data = json.dumps({"title": f"PTD-PO, before and after: {run.name}", "settings": settings, "questions": questions}).replace("<", "\\u003c")
    write_beside(run / "report.html", (Path(__file__).resolve().parent / "report.html").read_text(encoding="utf-8").replace("@DATA@", data))
    return run / "report.html"


def main(argv=None) -> None:
    """Read, build, train, report."""
    cfg, method, parser = parse_args(argv)
    finished = Path(cfg.report) if cfg.report not in ("", THIS_RUN) else None
    if finished:                                # its training questions are not read again
        cfg = replace(cfg, data="", hints="", resume=cfg.report)
    precision = cfg.precision if cfg.precision != "auto" else "bf16" if torch.cuda.is_available() else "no"
    accelerator = Accelerator(mixed_precision=precision, log_with=None if cfg.log_with == "none" else cfg.log_with, project_dir="runs")
    try:
        questions, held_out, note, path, processor = read_inputs(cfg, accelerator.num_processes)
        if finished and not (finished / "model").is_dir():
            raise ValueError(f"--report {finished}: there is no trained model in it; is the run finished?")
        checkpoints = Checkpoints(accelerator, path, cfg.keep)
        checkpoint, state = checkpoints.newest(questions, cfg) if cfg.resume and not finished else (None, None)
    except ValueError as error:
        parser.error(str(error))
    if cfg.plan:
        return accelerator.print(plan_table(plan(cfg, method, cfg.plan, cfg.precision != "no"), cfg.plan))
    quiet_loading()
    if finished:
        return print(f"written: {write_page(finished, cfg, method, held_out, processor)}")
    set_seed(cfg.seed, device_specific=True)
    torch.set_flush_denormal(True)              # denormal floats make CPU matrix products several times slower
    logging.getLogger("accelerate").setLevel(logging.ERROR)         # at each checkpoint: that tied weights are saved once
    try:
        student, reference = build(cfg, accelerator)
    except ValueError as error:
        parser.error(str(error))
    accelerator.wait_for_everyone()             # every process has seen that the run folder is new before one makes it
    config = {**asdict(cfg), **asdict(method)}
    folder = RunFolder(path, config, accelerator.is_main_process and not (cfg.audit_hints or cfg.check), state and state["step"])
    trainer = Trainer(cfg, method, accelerator, processor, student, reference)
    count, trained = (sum(p.numel() for p in student.parameters() if p.requires_grad or every) / 1e6 for every in (True, False))
    accelerator.print(f"model: {cfg.model}, {count:.2f} M parameters, {trained:.2f} M of them trained, on "
                      f"{accelerator.device} x {accelerator.num_processes}, mixed precision: {precision}\n{note}")
    if cfg.audit_hints:
        return accelerator.print(audit(trainer, questions))
    if cfg.check:
        fine, text = check(trainer, questions)
        accelerator.print(text)
        sys.exit(0 if fine else 1)
    if state:
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"going on from {checkpoint}")
    accelerator.project_configuration.logging_dir = str(path)
    accelerator.init_trackers("ptdpo", config=config)
    accelerator.print(f"{cfg.steps} steps of {cfg.questions} questions x {cfg.group_size} responses; lam {method.lam}, tau {method.tau}, "
                      f"k {method.k}, lr {cfg.lr}; log in {path}")
    table = train(trainer, questions, held_out, folder, checkpoints, state)
    folder.save_model(trainer)
    if accelerator.is_main_process:
        report(table, folder, trainer)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if cfg.report:
        trainer, student, reference = accelerator.free_memory(trainer, student, reference)      # the page loads its own two models
        print(f"a page to look at: {write_page(path, cfg, method, held_out, processor)}")


if __name__ == "__main__":
    main()
