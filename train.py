"""Train a vision-language model with PTD-PO. (arXiv 2606.07000, figure 4)

PTD-PO is GRPO plus one thing. A response that failed is also scored by the teacher: the frozen
starting model, which reads the same image and question and a hint. The student, who never reads the
hint, is pulled toward the teacher's distribution, token by token. Phases 1 to 4 run once per
rollout, phases 5 to 7 once per optimizer step. `train` calls them by name:

    1 read      questions become the student's prompts: image, question, no hint
    2 sample    G responses per question
    3 grade     verify the final answer; reward
    4 assign    advantages; who is tutored; weights in the means; log-probs under pi_old
    5 score     student, teacher and plain reference score the responses; gradient
    6 step      clip, AdamW
    7 log       evaluate on plain prompts, log, save

What differs from plain GRPO: `assign` routes failed responses, and `loss` adds their divergence
from the teacher. --lam 0 is GRPO.

    python train.py                                           # embedded model and puzzles, on a CPU
    python train.py --model Qwen/Qwen2-VL-2B-Instruct         # one GPU
    accelerate launch --num_processes 8 train.py --model ...  # data-parallel
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch
from torch import Tensor

import toy.settings
import toy.world
from hints import CONTEXTS, teacher_messages
from losses import scores_from_hidden
from plumbing import runs
from plumbing.command import run_command
from plumbing.engine import Engine, halve_when_out_of_memory, monitors, old_log_probs
from plumbing.settings import RunConfig, option
from ptdpo import (
    PTDPOConfig,
    ResponseWeights,
    group_advantages,
    ptdpo_loss,
    response_weights,
    route,
)
from rollout import (
    Batch,
    Prompt,
    Question,
    Response,
    encode_prompts,
    response_states,
    reward,
    student_messages,
    verify,
)


@dataclass
class TrainConfig(PTDPOConfig, RunConfig):
    """One flat config: what the loop reads; the method's settings and the run's are inherited."""

    steps: int = option(607, "optimizer steps (paper: 2 epochs of 38,870 / 128)", at_least=1)
    questions: int = option(
        128, "questions per optimizer step, all processes together (paper: 128)", at_least=1
    )
    updates: int = option(
        3, "optimizer steps per rollout (paper: 3, of 384 questions together)", at_least=1
    )
    seed: int = option(0, "seed of questions and sampling", at_least=0, at_most=999)
    group_size: int = option(8, "responses per question (paper: 8)", at_least=2)
    max_new_tokens: int = option(4096, "longest response, tokens (paper: 4096)", at_least=1)
    temperature: float = option(
        1.0, "sampling temperature, also in the losses (paper: 1.0)", above=0
    )
    top_p: float = option(
        1.0, "sample from this much mass (paper: 0.99; 1: as it is scored)", above=0, at_most=1
    )
    top_k: int = option(0, "sample from this many tokens; 0: all", at_least=0)
    format_weight: float = option(
        0.1, "share of the reward that is for the format (paper: 0.1)", at_least=0, at_most=1
    )
    format: str = option(
        "boxed",
        "boxed answer; think: closed thinking, then a boxed answer (as EasyR1, the release's base)",
        choices=("boxed", "think"),
    )
    mask_truncated: bool = option(
        False, "leave responses that reach --max-new-tokens out of the loss"
    )
    teacher_context: str = option(
        "hint",
        "what the teacher reads besides the question; all but hint are for comparison",
        choices=CONTEXTS,
    )
    lr: float = option(1e-6, "AdamW learning rate (paper: 1e-6)", above=0)
    weight_decay: float = option(0.01, "AdamW weight decay (paper: 0.01)", at_least=0)
    warmup: int = option(0, "steps of linear warm-up, then constant (paper: 0)", at_least=0)
    grad_clip: float = option(1.0, "largest gradient norm", above=0)
    eval_temperature: float = option(
        1.0, "temperature of evaluations, at top-p 1; 0: greedy (paper: 1.0)", at_least=0
    )

    def __post_init__(self):
        PTDPOConfig.__post_init__(self)  # it checks the bounds of all fields
        RunConfig.__post_init__(self)


def token_scores(
    model,
    batch: Batch,
    *,
    tutored: Tensor | None = None,
    teacher_states: Tensor | None = None,
    teacher_head: torch.nn.Linear | None = None,
    **settings,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-prob, entropy and Top-K JSD of the response tokens, each (B, T), 0 outside the mask.

    tutored (B,) bool: the rows that teacher_states (their tokens, H) belong to; the JSD is 0 in the
    others, and None without a teacher. Those rows meet the head apart from the others, with or
    without a teacher. settings: of losses.scores_from_hidden. Gradient and what is detached: as
    there. Each token meets the head once.
    """
    states, head = response_states(model, batch), model.get_output_embeddings()

    def scores_at(tokens: Tensor, *teacher):
        return scores_from_hidden(states[tokens], head, batch.ids[tokens], *teacher, **settings)

    zeros = torch.zeros(batch.mask.shape, device=batch.mask.device)
    if tutored is None:
        tutored = torch.zeros_like(batch.mask[:, 0])
    tutored_tokens = batch.mask & tutored.unsqueeze(1)
    other_tokens = batch.mask & ~tutored_tokens
    logp, entropy, _ = scores_at(other_tokens)
    logp = zeros.masked_scatter(other_tokens, logp)
    entropy = zeros.masked_scatter(other_tokens, entropy)
    if not tutored.any():
        return logp, entropy, None
    tutored_logp, tutored_entropy, jsd = scores_at(tutored_tokens, teacher_states, teacher_head)
    logp = logp.masked_scatter(tutored_tokens, tutored_logp)
    entropy = entropy.masked_scatter(tutored_tokens, tutored_entropy)
    return logp, entropy, None if jsd is None else zeros.masked_scatter(tutored_tokens, jsd)


class Trainer(Engine):
    """The phases, in their order. Engine holds models, optimizer, batches and processes.

    self.student(f) and self.ask_reference(f) return f(model): every use of the weights goes through
    the model's wrapper, as FSDP needs. self.scoring: temperature, banned ids, logits_mb.
    self.respond: rollout.sample_groups with the student. self.on_all_processes(needed, ...):
    `needed`, but under FSDP a stand-in where another process needs a forward and this one does not.
    """

    # 1 read
    def read(self, questions: list[Question], messages=student_messages) -> list[Prompt]:
        """Prompts of the questions: plain ones, unless `messages` makes other chats of them."""
        chats = [messages(question) for question in questions]
        return encode_prompts(self.processor, questions, chats, self.ahead.images_of(questions))

    # 2 sample
    def sample(self, prompts: list[Prompt], keys: list[str] | None = None) -> list[list[Response]]:
        """A group of responses to each prompt (Eq. 6). keys: one per prompt, seeds of its draws."""
        config = self.config
        truncation = {"top_p": config.top_p, "top_k": config.top_k}
        settings = {"temperature": config.temperature, **truncation}
        return self.respond(prompts, config.group_size, keys=keys, **settings)

    # 3 grade
    def grade(self, groups: list[list[Response]]) -> None:
        """Fill in `correct` and `reward`."""
        weight, think = self.config.format_weight, self.config.format == "think"
        for group in groups:
            for response in group:
                text = response.text
                response.correct = verify(text, response.question, self.same_answer)
                response.reward = reward(text, response.correct, weight, think=think)

    # 4 assign
    def assign(self, groups: list[list[Response]]) -> None:
        """Fill in advantages (Eq. 1), who is tutored (Eq. 8), and what each response counts."""
        config = self.config
        rewards = torch.tensor([[response.reward for response in group] for group in groups])
        correct = torch.tensor([[response.correct for response in group] for group in groups])
        chats = [teacher_messages(group[0].question, config.teacher_context) for group in groups]
        can_tutor = torch.tensor([chat is not None and config.lam > 0 for chat in chats])
        advantages = group_advantages(rewards, config.scale_advantages)
        tutored = route(correct, can_tutor, config.tau)
        for n, group in enumerate(groups):
            teacher_prompt = None
            if tutored[n].any():
                teacher_prompt = self.hinted_prompt(group[0].prompt, chats[n])
            for g, response in enumerate(group):
                response.teacher_prompt = teacher_prompt
                response.advantage = advantages[n, g].item()
                response.in_loss = not (config.mask_truncated and response.truncated)
                response.tutored = bool(tutored[n, g])
        per_step = config.questions // self.accelerator.num_processes
        for start in range(0, len(groups), per_step):
            groups_of_step = groups[start : start + per_step]
            self.weigh(groups_of_step)
            if config.updates > 1:  # otherwise pi_old is the current policy, and the ratio is 1
                self.record_old_logp([response for group in groups_of_step for response in group])

    def hinted_prompt(self, prompt: Prompt, chat: list[dict]) -> Prompt:
        """The same question and images (or their features), and the teacher's chat (Eq. 9)."""
        images = [(prompt.pixels, prompt.grid)]
        [hinted] = encode_prompts(self.processor, [prompt.question], [chat], images)
        return hinted

    def weigh(self, groups: list[list[Response]]) -> None:
        """Fill in what each response of one optimizer step counts, and in which losses it is."""
        lengths = [[len(r.ids) if r.in_loss else 0 for r in group] for group in groups]
        weights = response_weights(
            self.config,
            lengths=torch.tensor(lengths),
            tutored=torch.tensor([[response.tutored for response in group] for group in groups]),
            longest=self.config.max_new_tokens,
            sum_over_processes=self.sum_over_processes,
        )
        for n, group in enumerate(groups):
            for g, response in enumerate(group):
                response.weights = tuple(table[n, g].item() for table in weights)
                _, kl_weight, tutor_weight = response.weights
                response.penalised = kl_weight > 0 and self.config.beta_kl > 0
                response.tutored = tutor_weight > 0

    @torch.no_grad()
    def record_old_logp(self, responses: list[Response]) -> None:
        """Fill in the log-probs under the policy that sampled (pi_old, Eq. 2).

        responses: of one optimizer step, scored on the path and in the micro-batches of `loss`:
        others would round otherwise, and the first ratio would not be 1. Tutored tokens meet no
        teacher here, so theirs is 1 up to about 1e-6.
        """
        self.student.train()
        for part in self.until_stopped(self.micro_batches(responses)):
            tutored = self.tensor([response.tutored for response in part])
            logp, _, _ = self.student_scores(self.training_batch(part), tutored=tutored)
            for response, row in zip(part, logp, strict=True):
                response.old_logp = row[: len(response.ids)]

    # 5 score
    @halve_when_out_of_memory
    def score(self, responses: list[Response]) -> dict[str, float]:
        """The gradient of one optimizer step, over its micro-batches and all processes.

        Returns the parts of the loss, and ratio_max and sampler_gap (plumbing.engine.monitors).
        """
        accelerator = self.accelerator
        names = ("policy_loss", "tutor_loss", "kl", "entropy", "tokens")
        sums = torch.zeros(len(names), dtype=torch.float64, device=accelerator.device)
        largest = torch.zeros(2, device=accelerator.device)
        self.student.train()
        batches = self.micro_batches(responses)
        for number, batch in enumerate(self.until_stopped(batches)):
            # One sum over processes, at the end. Under FSDP one per micro-batch: a gradient that
            # waits is not sharded, and takes as much memory as the whole model.
            waits = not self.sharded and number < len(batches) - 1
            with accelerator.no_sync(self.student) if waits else contextlib.nullcontext():
                loss, parts = self.loss(batch)
                # gradients are averaged over processes, but the weights count all of them: undo it
                accelerator.backward(loss * accelerator.num_processes)
            largest = torch.maximum(largest, parts["monitors"])
            sums += torch.stack([parts.get(name, sums.new_zeros(())).double() for name in names])
        totals = dict(zip(names, self.sum_over_processes(sums).tolist(), strict=True))
        totals["entropy"] /= max(1, totals.pop("tokens"))
        totals["ratio_max"], totals["sampler_gap"] = self.largest(*largest.tolist())
        return totals

    def loss(self, responses: list[Response]) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch's share of the step's loss (Eq. 12), and its parts."""
        batch = self.training_batch(responses)
        teacher = self.teacher_arguments(responses)
        reference_logp = self.reference_logp(responses, batch.mask)
        logp, entropy, teacher_divergence = self.student_scores(batch, **teacher)
        old_logp = old_log_probs(responses, logp, batch.mask)
        advantages = self.tensor([response.advantage for response in responses])
        weights = self.tensor([response.weights for response in responses])  # (B, 3)
        loss, parts = ptdpo_loss(
            self.config,
            logp,
            old_logp,
            advantages,
            batch.mask,
            ResponseWeights(*weights.T),
            teacher_divergence,
            reference_logp,
        )
        parts |= {"entropy": entropy.sum(), "tokens": batch.mask.sum()}
        parts["monitors"] = monitors(responses, logp, old_logp, batch.mask)
        return loss, parts

    def student_scores(self, batch: Batch, **teacher) -> tuple[Tensor, Tensor, Tensor | None]:
        """token_scores of the student, who reads no hint (Eq. 10)."""
        return self.student(lambda model: token_scores(model, batch, **teacher, **self.scoring))

    def teacher_arguments(self, responses: list[Response]) -> dict:
        """What the frozen reference, who reads the hint, expects at the tutored tokens (Eq. 9).

        It scores the student's responses, with the same images, and never writes. Returns the
        teacher's arguments of token_scores; none where no response is tutored.
        """
        config = self.config
        tutored = [response for response in responses if response.tutored]
        shown = self.on_all_processes(tutored, responses)
        if not shown:
            return {}
        batch = self.collate(shown, prompts=[r.teacher_prompt or r.prompt for r in shown])
        states = self.ask_reference(lambda model: response_states(model, batch))[batch.mask]
        if not tutored:
            return {}  # the forward was for another process
        return {
            "tutored": self.tensor([response.tutored for response in responses]),
            "teacher_states": states,
            "teacher_head": self.reference.head,
            "k": config.jsd_k,
            "divergence": config.divergence,
            "support": config.support,
        }

    def reference_logp(self, responses: list[Response], mask: Tensor) -> Tensor | None:
        """Log-probs (B, T) under the reference without a hint, at the penalised responses."""
        penalised = [response for response in responses if response.penalised]
        shown = self.on_all_processes(penalised, responses)
        if not shown:
            return None
        batch = self.collate(shown)
        logp, _, _ = self.ask_reference(lambda model: token_scores(model, batch, **self.scoring))
        if not penalised:
            return None  # the forward was for another process
        tokens = mask & self.tensor([r.penalised for r in responses]).unsqueeze(1)
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(tokens, logp[batch.mask])

    # 6 step
    def step(self) -> dict[str, float]:
        """Clip the gradient and step, unless the gradient is not finite."""
        norm = self.clip_gradient()
        if torch.isfinite(norm):
            self.optimizer.step()
            self.schedule.step()
        else:
            self.skipped += 1  # counted, logged and reported at the end, never silent
        self.optimizer.zero_grad()
        return {"grad_norm": float(norm), "skipped_steps": self.skipped}

    # 7 log
    def evaluate(self, questions: list[Question], messages=student_messages) -> dict:
        """Accuracy and mean length of one response per question, and the ids of what was right.

        messages: the function that makes a question's chat. student_messages is the measure; with
        others only questions with a hint are asked. Over all processes. The draws depend on the
        question alone: they are the same in each evaluation, whatever the seed.
        """
        accelerator = self.accelerator
        if messages is not student_messages:
            questions = [question for question in questions if question.hint]
        mine = questions[accelerator.process_index :: accelerator.num_processes]
        prompts = self.read(mine, messages)
        groups = self.respond(prompts, 1, temperature=self.config.eval_temperature)
        responses = [response for [response] in groups]
        right = [r.question.id for r in responses if verify(r.text, r.question, self.same_answer)]
        tokens = sum(len(response.ids) for response in responses)
        return self.merge_evaluations(right, tokens, len(mine))


def train(trainer: Trainer, stream, held_out: list[Question], run: runs.Run) -> dict:
    """The loop: all steps, with evaluations before, on the way and after.

    stream[i] is question number i of the run. run: its folder, checkpoints, and where it stands.
    Returns the numbers of the summary.
    """
    config, processes = trainer.config, trainer.accelerator.num_processes
    run.start(trainer, held_out, stream)
    groups = []
    for step in run.steps():
        began = time.time()
        if not groups:
            indices = run.questions_of_rollout(step)
            prompts = trainer.read(trainer.ahead.draw(stream, indices))  # 1
            groups = trainer.sample(prompts, [f"{config.seed}-{i}" for i in indices])  # 2
            trainer.grade(groups)  # 3
            trainer.assign(groups)  # 4: which failed responses are tutored
            trainer.ahead.start(stream, run.questions_of_rollout(step + config.updates))
            statistics = runs.rollout_statistics(groups, config)
            statistics |= runs.sampling_row(trainer.looks)
            run.folder.append("responses.jsonl", runs.group_row(step, groups[0]))
        sampled = time.time()
        groups_of_step, groups = runs.split(groups, config.questions // processes)
        # 5: the teacher reads the hint and scores what failed; the student is pulled toward it
        numbers = trainer.score([response for group in groups_of_step for response in group])
        numbers |= trainer.step()  # 6
        # 7: statistics are the rollout's, and repeated in each of its steps
        metrics = {"step": step, **trainer.mean_over_processes(statistics), **numbers}
        metrics |= {"sample_seconds": sampled - began, "update_seconds": time.time() - sampled}
        run.log(trainer, held_out, metrics)
        if not groups:  # between two rollouts
            run.save(trainer, step)
    return run.summary


def main(argv=None) -> None:
    """The command line: read, train, print a summary."""
    groups = {"the method": PTDPOConfig, "the loop": TrainConfig, "the run": RunConfig}
    run_command(TrainConfig, Trainer, train, toy, groups, argv)


if __name__ == "__main__":
    main()
