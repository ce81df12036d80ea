"""Student and reference; LoRA, FSDP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from plumbing.images import first_line, take_features

if TYPE_CHECKING:
    from train import TrainConfig


class RunInForward(torch.nn.Module):
    """A language model whose forward is run(model), for any function `run`.

    Whatever needs the weights runs inside this forward, so that DDP and FSDP see every use of them.

    autocast: the context of mixed precision. Student and reference compute alike: the products in
    bfloat16, the residual stream in float32, whatever the type of the weights and whether they are
    sharded. So the KL penalty starts at 0.
    """

    def __init__(self, model, autocast: Callable = contextlib.nullcontext):
        super().__init__()
        self.model, self.autocast = model, autocast
        # TRAP: bfloat16 weights give a bfloat16 residual stream, float32 masters a float32 one
        model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].float())
        # What FSDP shards module by module. The vision tower's blocks are not among them: on a
        # process without images their gathers would be missing.
        self._no_split_modules = [
            name for name in model._no_split_modules if name.endswith("DecoderLayer")
        ]

    @property
    def head(self) -> torch.nn.Linear:
        return self.model.get_output_embeddings()

    def forward(self, run: Callable):
        with self.autocast():
            return run(self.model)


class LoraReference:
    """The frozen reference of a LoRA run: the student with its adapters switched off."""

    def __init__(self, student: RunInForward):
        self.student = student

    @property
    def model(self):
        return self.student.model

    @property
    def head(self) -> torch.nn.Linear:
        return self.student.head

    def parameters(self):
        return self.student.parameters()

    def __call__(self, run: Callable):
        training = self.student.training
        # TRAP: a model that recomputes its activations has no cache while it is in training mode
        self.student.eval()
        self.student.model.disable_adapters()
        try:
            return self.student(run)
        finally:
            self.student.model.enable_adapters()
            self.student.train(training)


def frozen_tower(config: TrainConfig) -> bool:
    """Is the vision tower frozen? Then each image goes through it once per rollout.

    Its features serve student and reference alike.
    """
    return bool(config.lora) or config.freeze_vision


def build(config: TrainConfig, accelerator: Accelerator):
    """Student and frozen reference, on the accelerator's device.

    Trained weights are float32 masters. The reference is bf16 where bf16 is used, and sharded as
    the student will be. Raises ValueError for LoRA under FSDP, and as load_model does.
    """
    half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if config.lora and sharded:
        raise ValueError("--lora does not run under FSDP: use one of them")
    student = _load(config.model, half if config.lora else torch.float32, accelerator)
    student.model.model.visual.requires_grad_(not frozen_tower(config))
    if config.lora:
        _add_adapters(student.model, config.lora)
        reference = LoraReference(student)
    else:
        reference = _load(config.model, half, accelerator).eval().requires_grad_(False)
        if not sharded:
            _float_head_norms(reference.model)
    if frozen_tower(config):
        take_features(student.model)
        if not config.lora:
            take_features(reference.model)
    on_gpu = accelerator.device.type != "cpu"
    _recompute_activations(student.model, config.gradient_checkpointing, tower=on_gpu)
    if sharded:
        _set_policy(accelerator)
        _shard(reference, accelerator)
        return student, reference  # accelerator.prepare shards the student
    student.to(accelerator.device)
    if not config.lora:
        reference.to(accelerator.device)
    return student, reference


def _load(path: str, dtype: torch.dtype, accelerator: Accelerator) -> RunInForward:
    return RunInForward(load_model(path, dtype), accelerator.autocast)


def load_model(path: str, dtype: torch.dtype):
    """A saved vision-language model with all of its weights. path: a folder or hub name.

    Raises ValueError, one line, where a file is missing or damaged, and where the checkpoint's
    weights are not exactly the model's.

    TRAP: from_pretrained draws missing weights at random and only warns of it.
    """
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_tied_head(path),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot load its weights: {first_line(error)}") from None
    mismatched = {
        f"{name} {list(shape)}, not {list(expected)}"
        for name, shape, expected in report["mismatched_keys"]
    }
    # rotary frequencies, which some files hold, follow from the config
    unknown = {name for name in report["unexpected_keys"] if not name.endswith(".inv_freq")}
    problems = [
        _named("missing", report["missing_keys"]),
        _named("unknown to the model", unknown),
        _named("of another shape", mismatched),
    ]
    if any(problems):
        raise ValueError(
            f"{path}: its weights are not the model's: {'; '.join(filter(None, problems))}"
        )
    return model


def _tied_head(path: str) -> dict[str, bool]:
    """The settings of a model whose config.json says in text_config alone that its head is tied.

    So transformers 4.52 to 4.57 wrote it: there True was the default of the outer config. Newer
    versions take the outer value, and not all of them lift the inner one.
    """
    saved, _ = PreTrainedConfig.get_config_dict(path)
    inner = saved.get("text_config") or {}
    lifted = inner.get("tie_word_embeddings") and "tie_word_embeddings" not in saved
    return {"tie_word_embeddings": True} if lifted else {}


def _float_head_norms(model) -> None:
    """Make the weights of Qwen3-VL's norms of queries and keys float32; the others have none.

    TRAP: these norms read bfloat16. A float32 weight makes their output float32, a bfloat16 one
    rounds it, so the reference would not start equal to a student with float32 masters. Sharded,
    the student's are gathered in bfloat16 as well.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data = parameter.data.float()


def _named(problem: str, keys: set[str], shown: int = 3) -> str:
    """The number of keys and the first of them; "" where there are none."""
    if not keys:
        return ""
    names = ", ".join(sorted(keys)[:shown])
    return f"{len(keys)} {problem} ({names}{', ...' if len(keys) > shown else ''})"


def _add_adapters(model, rank: int) -> None:
    """LoRA adapters in float32 on every linear layer of the language model; all else is frozen."""
    from peft import LoraConfig

    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".language_model." in f".{name}"
    ]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))


def _recompute_activations(model, everywhere: bool, tower: bool = True) -> None:
    """Let all layers recompute their activations in the backward pass; or the tower's blocks alone.

    On a GPU the tower always does: it runs once per prompt, so this costs little time where
    responses are long, and an image token would keep more than twice what a text token keeps in the
    language model. On a CPU, with short responses, it would cost a quarter of an update.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        enable = model.activation_checkpointing_enable
    else:  # its name up to transformers 5.17
        enable = model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    recompute_layers(model, everywhere)
    for block in model.model.visual.blocks:
        block.gradient_checkpointing = everywhere or tower


def recompute_layers(model, recomputed: bool) -> None:
    """Choose for the coming passes whether the decoder layers recompute their activations.

    TRAP: a layer that does has no cache while it is in training mode. Its batch must have one
    prompt per response.
    """
    for layer in model.model.language_model.layers:
        layer.gradient_checkpointing = recomputed


def _set_policy(accelerator: Accelerator) -> None:
    """FSDP2's mixed precision for the student: gather in bfloat16, reduce gradients in float32.

    TRAP: accelerate's own policy casts outputs and each layer's inputs to bfloat16 as well. Then
    log-probs come out in bfloat16, and the residual stream is another one than on one GPU.
    """
    if accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def _shard(reference: RunInForward, accelerator: Accelerator) -> None:
    """FSDP2 by decoder layer, then the root.

    The root stays whole once it has run, as the student's forward reads the reference's head.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in list(reference.modules()):
        if type(module).__name__ in reference._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(reference, mesh=mesh, reshard_after_forward=False)


@contextlib.contextmanager
def weights_whole(student: RunInForward):
    """Within the student's forward: gather the weights once, not once per token.

    Nothing happens where nothing is sharded.
    """
    sharded = [module for module in student.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded[1:]:  # the root stays as it is until its own forward ends
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
