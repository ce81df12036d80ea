"""Student and reference; LoRA, FSDP."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForImageTextToText

from losses import scores_from_hidden
from plumbing.images import take_features
from rollout import Batch, response_states

if TYPE_CHECKING:
    from train import TrainConfig


class Scorer(torch.nn.Module):
    """A language model as per-token scores. Whatever needs the weights runs inside this forward, so that DDP and FSDP see every use of them."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        # what FSDP shards each by itself. The vision tower is not among them: on a process without images its gathers would be missing
        self._no_split_modules = [
            name for name in model._no_split_modules if name.endswith("DecoderLayer")
        ]

    @property
    def head(self) -> torch.nn.Linear:
        return self.model.get_output_embeddings()

    def forward(
        self,
        batch: Batch | None = None,
        *,
        run=None,
        tutored=None,
        teacher_states=None,
        teacher_head=None,
        **settings,
    ):
        """Log-prob, entropy, Top-K JSD of the response tokens, each (B, T) with 0 outside; settings go to losses.scores_from_hidden.

        tutored (B,) bool: the rows that teacher_states (their tokens, H) belong to; the JSD is 0 elsewhere, None without a teacher.
        With `run` instead: run(the language model), for whatever else needs its weights.
        """
        if run is not None:
            return run(self.model)
        states, mask = response_states(self.model, batch), batch.mask
        taught = (
            mask & tutored.unsqueeze(1) if teacher_states is not None else torch.zeros_like(mask)
        )
        passes = [(mask & ~taught, None), (taught, teacher_states)][
            : 1 if teacher_states is None else 2
        ]  # each token meets the head once
        out = [torch.zeros(mask.shape, device=mask.device) for _ in range(3)]
        for where, teacher in passes:
            scores = scores_from_hidden(
                states[where], self.head, batch.ids[where], teacher, teacher_head, **settings
            )
            out = [
                old if new is None else old.masked_scatter(where, new)
                for old, new in zip(out, scores)
            ]
        return out[0], out[1], (out[2] if teacher_states is not None else None)


def frozen_tower(config: TrainConfig) -> bool:
    """The vision tower is not trained, so that each image goes through it once a rollout, for student and reference alike."""
    return bool(config.lora) or not config.train_vision


class LoraReference:
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
        self.student.eval()  # TRAP: a model that recomputes its activations has no cache while it is in training mode
        self.student.model.disable_adapters()
        try:
            return self.student(*args, **settings)
        finally:
            self.student.model.enable_adapters()
            self.student.train(training)


def build(config: TrainConfig, accelerator: Accelerator):
    """Student and frozen reference. What is trained has float32 master weights; the reference takes bf16 where that is used, and is
    sharded as the student will be."""
    half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    sharded = accelerator.distributed_type == DistributedType.FSDP
    student = Scorer(
        AutoModelForImageTextToText.from_pretrained(
            config.model, dtype=half if config.lora else torch.float32
        )
    )
    model = student.model
    model.model.visual.requires_grad_(not frozen_tower(config))
    if config.lora:
        if sharded:
            raise ValueError("--lora does not run under FSDP: use one of them")
        from peft import LoraConfig

        inside = [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".language_model." in f".{name}"
        ]
        model.add_adapter(
            LoraConfig(r=config.lora, lora_alpha=2 * config.lora, target_modules=inside)
        )  # float32 adapters, all else frozen
        reference = LoraReference(student)
    else:
        reference = (
            Scorer(AutoModelForImageTextToText.from_pretrained(config.model, dtype=half))
            .eval()
            .requires_grad_(False)
        )
    if frozen_tower(config):
        for scorer in (student,) if config.lora else (student, reference):
            take_features(scorer.model)
    if config.gradient_checkpointing:
        enable = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )  # its name up to 5.17
        enable({"use_reentrant": False})
    if sharded:
        # each layer, then the root, which stays whole once it has run: the student's forward reads the reference's head
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for module in [
            m for m in reference.modules() if type(m).__name__ in reference._no_split_modules
        ]:
            fully_shard(module, mesh=mesh)
        fully_shard(reference, mesh=mesh, reshard_after_forward=False)
        return student, reference
    student.to(accelerator.device)
    return student, reference if config.lora else reference.to(accelerator.device)


@contextlib.contextmanager
def weights_whole(scorer: Scorer):
    """Within scorer's forward: the weights whole until the end, weights_whole once instead of once a token. Nothing to do where nothing is sharded."""
    shards = [m for m in scorer.modules() if isinstance(m, FSDPModule)]
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in shards[
            1:
        ]:  # the root is the first, and stays as it is until its own forward ends
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
