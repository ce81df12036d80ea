"""Models, optimizer, micro-batches and processes: what the phases of train.Trainer stand on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from plumbing.answers import same_answer
from plumbing.decoding import Look
from plumbing.images import QuestionsAhead, encode_images
from plumbing.memory import batch_tokens, free_bytes, micro_batches, sample_budget_mb
from plumbing.models import frozen_tower, recompute_layers, weights_whole
from plumbing.progress import ResponseBar
from plumbing.stopping import Stopped, StopSignals
from rollout import Batch, Prompt, Response, banned_tokens, collate, sample_groups

if TYPE_CHECKING:
    from accelerate import Accelerator

    from plumbing.images import ImageTextProcessor
    from plumbing.models import LoraReference, RunInForward
    from train import TrainConfig


class Engine:
    """What one process holds during a run, and how it works with the others."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        processor: ImageTextProcessor,
        student: RunInForward,
        reference: RunInForward | LoraReference,
        same: Callable[..., bool] = same_answer,
    ):
        self.config, self.accelerator, self.processor = config, accelerator, processor
        self.reference, self.same_answer = reference, same
        self.policy = student.model  # the language model; self.student is its wrapper
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        optimizer = make_optimizer(student, config)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / max(1, config.warmup))
        )
        self.student, self.optimizer = accelerator.prepare(student, optimizer)
        accelerator.register_for_checkpointing(self.schedule)
        self.scoring = {
            "temperature": config.temperature,
            "banned": self.tensor(banned_tokens(self.policy, processor.tokenizer)),
            "logits_mb": config.logits_mb,
        }
        self.ahead = QuestionsAhead(processor)
        self.looks: list[Look] = []  # of the sampler, in the last rollout or evaluation
        self.halved = False  # memory has run out once in an update
        self.update_peak = 0  # bytes of a GPU, the largest of all updates
        self.skipped = 0  # steps without an update, as their gradient was not finite
        self.signals = StopSignals()

    @torch.no_grad()
    def respond(self, prompts: list[Prompt], group_size: int, **settings) -> list[list[Response]]:
        """rollout.sample_groups with the student; a frozen tower encodes each image once.

        To be called by all processes. Raises Stopped on all of them if a signal asked one to stop.
        """
        config = self.config
        bar = ResponseBar(len(prompts) * group_size, self.accelerator.is_main_process)
        self.looks = []

        def watch(look: Look) -> None:
            self.looks.append(look)
            bar.update(look.tokens, look.lengths)
            if self.signals.number:
                raise Stopped(self.signals.number)

        def run(model):
            # TRAP: sharded, this is inside the wrapper's forward. An exception must not leave it:
            # the weights would stay gathered, and the other processes would wait for this one.
            with weights_whole(self.student), contextlib.suppress(Stopped):
                if frozen_tower(config):
                    encode_images(model, prompts)
                sample_mb = config.sample_mb
                if not sample_mb:
                    longest = max((len(prompt.ids) for prompt in prompts), default=0)
                    free = free_bytes(self.accelerator.device)
                    sample_mb = sample_budget_mb(model, longest, free)
                return sample_groups(
                    model,
                    self.processor,
                    prompts,
                    group_size,
                    max_new_tokens=config.max_new_tokens,
                    sample_mb=sample_mb,
                    watch=watch,
                    **settings,
                )

        with bar, self.accelerator.autocast():
            groups = self.student(run) if self.sharded else run(self.policy)
        self.stop_if_asked()
        return groups

    @torch.no_grad()
    def ask_reference(self, run: Callable):
        """run(the frozen reference), without gradient."""
        return self.reference(run)

    def clip_gradient(self) -> Tensor:
        """Clip the gradient to config.grad_clip and return its norm before that."""
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), self.config.grad_clip)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # batches
    def collate(
        self, responses: list[Response], one_prompt_per_response=False, prompts=None
    ) -> Batch:
        """A batch of the responses, on their own prompts unless others are given."""
        return collate(
            prompts or [response.prompt for response in responses],
            [response.ids for response in responses],
            self.processor.tokenizer.pad_token_id,
            self.accelerator.device,
            one_prompt_per_response,
        )

    def training_batch(self, responses: list[Response]) -> Batch:
        """A micro-batch as the student is scored in training; its mask: the tokens in the loss.

        Old log-probs are scored on the same batch, so that the first ratio is 1. A response larger
        than --micro-tokens recomputes its activations, so the layers are told here which way the
        coming pass takes. All processes must call this together.
        """
        recomputed = self.must_recompute(responses)
        recompute_layers(self.policy, recomputed)
        batch = self.collate(responses, recomputed)
        batch.mask &= self.tensor([response.in_loss for response in responses]).unsqueeze(1)
        return batch

    @property
    def token_limit(self) -> int:
        """Tokens in a micro-batch: --micro-tokens, or half of it once memory has run out."""
        return max(1, self.config.micro_tokens // (2 if self.halved else 1))

    def must_recompute(self, responses: list[Response]) -> bool:
        """Does this micro-batch recompute its activations?

        TRAP: sharded, all processes must agree. Recomputing gathers the layers' weights once more
        in the backward pass, and a process that does not recompute would not take part.
        """
        if self.config.gradient_checkpointing:
            return True
        too_large = batch_tokens(responses, False) > self.token_limit
        if self.sharded:
            [too_large] = self.largest(int(too_large))
        return bool(too_large)

    def micro_batches(self, responses: list[Response]) -> list[list[Response]]:
        """plumbing.memory.micro_batches; sharded, as many of them on every process."""
        config = self.config
        batches = micro_batches(responses, self.token_limit, config.gradient_checkpointing)
        if self.sharded:
            [count] = self.largest(len(batches))
            flags = {"in_loss": False, "tutored": False, "penalised": False}
            idle = replace(responses[0], **flags, weights=(0.0, 0.0, 0.0))
            batches += [[idle]] * (int(count) - len(batches))
        return batches

    def on_all_processes(self, needed: list, responses: list[Response]) -> list[Response]:
        """`needed`; or, sharded, one stand-in where only another process needs a forward.

        Sharded, all processes must run the same forwards.
        """
        if not self.sharded:
            return needed
        [count] = self.largest(len(needed))
        if needed or not count:
            return needed
        return responses[:1]

    # a stop by a signal
    def stop_if_asked(self) -> None:
        """Raise Stopped on all processes if a signal asked one of them to stop.

        To be called by all processes, each as often as the others.
        """
        [number] = self.largest(self.signals.number)
        if number:
            raise Stopped(int(number))

    def until_stopped(self, batches: list) -> Iterator:
        """The micro-batches in turn, with stop_if_asked before them.

        TRAP: not sharded, processes can have different numbers of micro-batches, and stop_if_asked
        is for all of them together. So it comes before as many as every process has.
        """
        [negative] = self.largest(-len(batches))
        in_common = -int(negative)
        for number, batch in enumerate(batches):
            if number < in_common:
                self.stop_if_asked()
            yield batch

    # numbers
    def merge_evaluations(self, right: list[str], tokens: int, questions: int) -> dict:
        """One evaluation of the parts of all processes: ids of what was right, and counts."""
        counts = torch.tensor([len(right), tokens, questions], dtype=torch.float64)
        right_of_all, tokens_of_all, questions_of_all = self.sum_over_processes(counts).tolist()
        return {
            "accuracy": right_of_all / max(1, questions_of_all),
            "length": tokens_of_all / max(1, questions_of_all),
            "questions": int(questions_of_all),
            "right": gather_object(right),
        }

    def tensor(self, values: list) -> Tensor:
        """The values as a tensor on this process's device."""
        return torch.tensor(values, device=self.accelerator.device)

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Sums over all processes, on the CPU."""
        return self.accelerator.reduce(values.to(self.accelerator.device)).cpu()

    def mean_over_processes(self, numbers: dict[str, float]) -> dict[str, float]:
        """Means over all processes."""
        values = torch.tensor(list(numbers.values()), dtype=torch.float64)
        means = self.sum_over_processes(values) / self.accelerator.num_processes
        return dict(zip(numbers, means.tolist(), strict=True))

    def largest(self, *values: float) -> list[float]:
        """Each value's largest over all processes."""
        return self.accelerator.gather(self.tensor([values])).amax(0).tolist()


def note_peak(trainer: Engine) -> None:
    """Note the GPU memory that the update took, for the comparison with --plan."""
    if trainer.accelerator.device.type == "cuda":
        trainer.update_peak = max(trainer.update_peak, torch.cuda.max_memory_allocated())


def halve_when_out_of_memory(score: Callable) -> Callable:
    """Trainer.score that starts again, once per run, with half of --micro-tokens.

    The step's gradient so far is dropped and made anew. With several processes the error is raised,
    as the others wait in a collective; so is the second one.
    """

    @wraps(score)
    def retried(self, responses: list[Response]) -> dict[str, float]:
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            numbers = score(self, responses)
            note_peak(self)
            return numbers
        except torch.OutOfMemoryError:
            half = self.token_limit // 2
            if self.halved or self.accelerator.num_processes > 1 or half < 1:
                print(
                    f"out of memory in an update: set --micro-tokens {max(1, half)}, "
                    "--gradient-checkpointing or --freeze-vision, and --resume",
                    file=sys.stderr,
                )
                raise
        # TRAP: after the except clause, as the traceback holds the tensors as long as it lasts
        self.halved = True
        self.optimizer.zero_grad()
        print(
            f"out of memory in an update; this run goes on with {half} tokens per micro-batch "
            "(--micro-tokens sets this)",
            file=sys.stderr,
        )
        torch.cuda.empty_cache()
        return retried(self, responses)

    return retried


def make_optimizer(student: RunInForward, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW on what is trained; weight decay on matrices alone, not on norms and biases."""
    trained = [p for p in student.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    decayed = {"params": matrices, "weight_decay": config.weight_decay}
    return torch.optim.AdamW([decayed, {"params": vectors, "weight_decay": 0.0}], lr=config.lr)


def old_log_probs(responses: list[Response], logp: Tensor, mask: Tensor) -> Tensor:
    """Log-probs (B, T) under pi_old: those recorded, or else the current ones: ratio 1.

    logp (B, T): the current ones; mask (B, T) bool: the tokens in the loss. Detached.
    """
    recorded = [r.old_logp for r in responses if r.in_loss and r.old_logp is not None]
    if not recorded:
        return logp.detach()
    return logp.detach().masked_scatter(mask, torch.cat(recorded))


def monitors(responses: list[Response], logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Two numbers that should be near 0, (2,): ratio_max and sampler_gap.

    The largest |ratio - 1|, and the largest difference of a token's log-prob between scorer and
    sampler at the time of sampling.
    """
    sampler_logp = old_logp
    if responses[0].logp is not None:
        drawn = [x for response in responses if response.in_loss for x in response.logp]
        sampler_logp = old_logp.masked_scatter(mask, torch.tensor(drawn, device=mask.device))
    ratio = torch.exp(logp.detach() - old_logp)
    return torch.stack([(ratio - 1).abs().max(), (old_logp - sampler_logp).abs().max()])
